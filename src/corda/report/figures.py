"""Plotly figures from the results of finished runs; page.js sets their text and grid colours, light or dark."""

from __future__ import annotations

import html
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.colors import sample_colorscale

Floats = NDArray[np.floating[Any]]
Quantity = Literal["rank", "energy", "log_pi", "round"]

COLOURS = ("#3f7fc1", "#d0642b", "#2a977b", "#a867a5", "#8a7d2c", "#7d7d7d")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x")
_SCALES = {
    "rank": [[0, "#c9d8e8"], [1, "#3a75b0"]],
    "energy": "Cividis",
    "log_pi": [[0, "#3a75b0"], [0.5, "#c9c9c4"], [1, "#c4601f"]],
}
_TICKS = 12
_CURVE_POINTS = 1000
_SPECTRUM_POINTS = 200
_ALL_SPECTRUM_POINTS = 80_000
_LOG_STEPS = 1000  # a singular value is stored as its rounded log10 times this: exact to 0.12 %


@dataclass(frozen=True)
class Run:
    """One finished run as the report needs it.

    Attributes:
        label: Its name on the page, unique there.
        results: The content of results.json.
        spectra: Layer name -> singular values, ascending; empty for plain LoRA and modes of two contexts.
        weighed: For modes of two contexts, "LAYER.theta", "LAYER.task", "LAYER.knowledge" -> values, descending.
    """

    label: str
    results: Mapping[str, Any]
    spectra: Mapping[str, Floats] = field(default_factory=dict)
    weighed: Mapping[str, Floats] = field(default_factory=dict)

    @property
    def layers(self) -> list[dict[str, Any]]:
        """The adapted layers, in module order."""
        return list(self.results["plan"]["layers"])

    @property
    def mode(self) -> str:
        """kpm, ipm, dual, contrast or lora."""
        return str(self.results["plan"]["mode"])


def training_curves(runs: Sequence[Run]) -> go.Figure:
    """Training loss against steps, as logged, faint, with its running mean; dots: that of validation records."""
    figure = go.Figure()
    for i, run in enumerate(runs):
        curve = run.results["train"]
        step, loss = np.asarray(curve["step"], np.float64), np.asarray(curve["loss"], np.float64)
        n = min(len(step), len(loss))
        smooth = _running_mean(loss[:n], max(1, n // 15))
        keep = _spread(n, _CURVE_POINTS)
        colour, name = COLOURS[i % len(COLOURS)], html.escape(run.label)
        line = {"color": colour, "width": 2.2, "dash": DASHES[i % len(DASHES)]}
        faint = {"color": colour, "width": 1}
        common = {"mode": "lines", "name": name, "legendgroup": name, "x": step[keep]}
        figure.add_scatter(**common, y=loss[keep], line=faint, opacity=0.35, showlegend=False, hoverinfo="skip")
        figure.add_scatter(**common, y=smooth[keep], line=line, hovertemplate="step %{x}: %{y:.3f}")
        figure.add_scatter(
            x=curve.get("eval_step", []),
            y=curve.get("eval_loss", []),
            mode="markers",
            name=f"{name}, validation",
            marker={"color": colour, "size": 6},
            showlegend=bool(curve.get("eval_loss")),
            hovertemplate="step %{x}: validation %{y:.3f}",
        )
    figure.update_layout(layout(360))
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="training loss (nats/token)")
    return figure


def spectrum(runs: Sequence[Run]) -> go.Figure:
    """Empty plot for one layer's singular values; page.js fills in what `spectra_data` holds, trace by trace."""
    figure = go.Figure()
    for order, (i, run) in enumerate(_with_spectra(runs)):
        colour, name = COLOURS[i % len(COLOURS)], html.escape(run.label)
        hover = f"{name}, %{{meta}}<br>component %{{x}}: %{{y:.3g}}<extra></extra>"
        figure.add_scatter(
            name=f"{name}: frozen",
            meta="frozen",
            mode="lines",
            line={"color": colour, "width": 1.6, "dash": DASHES[order % len(DASHES)]},
            hovertemplate=hover,
        )
        figure.add_scatter(
            name=f"{name}: adapted",
            meta="adapted",
            mode="markers",
            marker={"color": colour, "size": 8, "symbol": f"{_SYMBOLS[i % len(_SYMBOLS)]}-open", "line": {"width": 2}},
            hovertemplate=hover,
        )
    figure.update_layout(layout(420))
    figure.update_xaxes(title="component (1: the smallest)")
    figure.update_yaxes(title="singular value", type="log", exponentformat="power", dtick=1, tickfont={"size": 10})
    return figure


def spectra_data(runs: Sequence[Run]) -> dict[str, Any]:
    """Every layer's thinned spectra, in the order of `spectrum`'s traces.

    Returns:
        steps: A value v stands for 10^(v / steps); None for a singular value of 0.
        components: Lists of component numbers, which layers of one size share.
        layers: For each layer its name, a line of facts for each run, and per trace [which components, values].
    """
    chosen = [run for _, run in _with_spectra(runs)]
    plans = [{layer["name"]: layer for layer in run.layers if layer["name"] in run.spectra} for run in chosen]
    names = list(dict.fromkeys(name for plan in plans for name in plan))
    points = min(_SPECTRUM_POINTS, max(12, _ALL_SPECTRUM_POINTS // max(1, len(names) * len(chosen))))
    components: dict[tuple[int, ...], int] = {}
    layers = []
    for name in names:
        traces: list[list[Any]] = []
        facts = []
        for run, plan in zip(chosen, plans, strict=True):
            values, layer = run.spectra.get(name, np.empty(0)), plan.get(name, {"rank": 0})
            for part in thin(len(values), layer["rank"], run.mode, points):
                which = components.setdefault(tuple(int(i) + 1 for i in part), len(components))
                traces.append([which, [_log(values[i]) for i in part]])
            if name in plan:
                share = percent(layer["energy"])
                facts.append(f"{run.label}: {layer['rank']} of {len(values)} adapted, {share} of the energy")
        layers.append({"name": name, "facts": facts, "traces": traces})
    return {"steps": _LOG_STEPS, "components": [list(c) for c in components], "layers": layers}


def thin(n: int, rank: int, mode: str, points: int = _SPECTRUM_POINTS) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which of n ascending values to draw, as (frozen, adapted); the ends of both parts are always among them.

    Args:
        n: Singular values there are.
        rank: Adapted ones: the first for kpm, the last for ipm.
        mode: kpm or ipm.
        points: At most so many in all.
    """
    rank = min(rank, n)
    shown = min(rank, max(points // 3, points - (n - rank)))
    adapted, frozen = _spread(rank, shown), _spread(n - rank, points - shown)
    return (frozen + rank, adapted) if mode == "kpm" else (frozen, adapted + n - rank)


def layer_map(run: Run, what: Quantity) -> go.Figure:
    """Blocks by module types, coloured by rank, share of energy adapted, log π, or the calibration round taken.

    Args:
        run: The run.
        what: What the colour means.
    """
    places = locate([layer["name"] for layer in run.layers])
    columns = list(dict.fromkeys(module for _, module in places))
    rows = sorted({block for block, _ in places}, key=lambda b: (b == "-", int(b) if b != "-" else 0))
    shown = _shading(run, what)
    z: list[list[float | None]] = [[None] * len(columns) for _ in rows]
    text = [[""] * len(columns) for _ in rows]
    for layer, value, (block, module) in zip(run.layers, shown.values, places, strict=True):
        r, c = rows.index(block), columns.index(module)
        z[r][c] = value
        text[r][c] = "<br>".join([html.escape(layer["name"]), *layer_facts(layer)])
    bar = {"thickness": 10, "outlinewidth": 0, "len": 1, "lenmode": "fraction", **shown.bar}
    figure = go.Figure(
        go.Heatmap(
            z=z,
            x=[html.escape(c) for c in columns],
            y=rows,
            text=text,
            hovertemplate="%{text}<extra></extra>",
            hoverongaps=False,
            colorscale=shown.scale,
            zmin=shown.low,
            zmax=shown.high,
            xgap=1,
            ygap=1,
            colorbar=bar,
        )
    )
    figure.update_layout(layout(min(900, 130 + 12 * max(len(rows), 5))))
    figure.update_xaxes(type="category", showgrid=False, zeroline=False, tickangle=-45)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, zeroline=False, title="block")
    return figure


def candidate_scores(run: Run) -> go.Figure:
    """Every layer's candidate covariances: how far each one's score lies above the layer's lowest.

    Large markers are taken. Layers stand in module order, ticks at the first layer of a block.
    """
    layers = [(i, layer) for i, layer in enumerate(run.layers) if layer.get("scores")]
    figure = go.Figure()
    for k in range(max(len(layer["scores"]) for _, layer in layers)):
        having = [(i, layer) for i, layer in layers if k < len(layer["scores"])]
        taken = [layer["chosen"] == k for _, layer in having]
        figure.add_scatter(
            name=f"round {k}",
            mode="markers",
            x=[i for i, _ in having],
            y=[excess(layer["scores"])[k] for _, layer in having],
            text=[f"{html.escape(layer['name'])}<br>score {layer['scores'][k]:.4g}" for _, layer in having],
            hovertemplate="%{text}, %{y:.2f} % above the lowest",
            cliponaxis=False,
            marker={
                "color": COLOURS[k % len(COLOURS)],
                "symbol": _SYMBOLS[k % len(_SYMBOLS)],
                "size": [9 if one else 5 for one in taken],
                "opacity": [1.0 if one else 0.8 for one in taken],
                "line": {"width": 0},
            },
        )
    blocks = [block for block, _ in locate([layer["name"] for layer in run.layers])]
    starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    starts = starts[:: -(-len(starts) // _TICKS)]
    figure.update_layout(layout(360), legend_itemsizing="constant")
    figure.update_xaxes(title="block", tickvals=starts, ticktext=[blocks[i] for i in starts])
    figure.update_yaxes(title="score above the lowest, %", rangemode="tozero")
    return figure


def excess(scores: Sequence[float]) -> list[float]:
    """How far each score lies above the lowest, in % of it."""
    lowest = min(scores)
    return [100 * (score / lowest - 1) for score in scores]


def layer_facts(layer: Mapping[str, Any]) -> list[str]:
    """What is known of an adapted layer, a line each."""
    facts = [
        f"{' × '.join(str(size) for size in layer['shape'])}, rank {layer['rank']}",
        f"energy adapted: {percent(layer['energy'])}",
    ]
    if layer.get("log_pi") is not None:
        floor = ", its smallest eigenvalue mostly damping" if layer["floor_decided"] else ""
        facts.append(f"log π {layer['log_pi']:.2f}{floor}")
    if layer.get("scores"):
        scores = [f"{score:.4g}{' taken' if k == layer['chosen'] else ''}" for k, score in enumerate(layer["scores"])]
        facts.append(f"scores: {', '.join(scores)}")
    if layer.get("edited"):
        facts.append("set by hand")
    return facts


@dataclass(frozen=True)
class _Shading:
    """A heat map's values, one a layer, and how they are coloured."""

    values: list[float | None]
    scale: Any
    low: float | None = None
    high: float | None = None
    bar: Mapping[str, Any] = field(default_factory=dict)


def _shading(run: Run, what: Quantity) -> _Shading:
    layers = run.layers
    if what == "rank":
        ranks = [layer["rank"] for layer in layers]
        return _Shading(ranks, _SCALES[what], 0, max(ranks, default=None))
    if what == "log_pi":
        return _Shading([layer.get("log_pi") for layer in layers], _SCALES[what])
    if what == "round":
        rounds = max([len(layer.get("scores", ())) for layer in layers] + [1 + (x["chosen"] or 0) for x in layers])
        names = [*map(str, range(rounds)), *(["all"] if any(layer["chosen"] is None for layer in layers) else [])]
        n = len(names)
        colours = COLOURS if n <= len(COLOURS) else sample_colorscale("Turbo", n)
        scale = [[edge / n, colours[k]] for k in range(n) for edge in (k, k + 1)]
        chosen: list[float | None] = [rounds if layer["chosen"] is None else layer["chosen"] for layer in layers]
        return _Shading(chosen, scale, -0.5, n - 0.5, {"tickvals": list(range(n)), "ticktext": names})
    shares = [layer["energy"] for layer in layers if layer["energy"] > 0]
    if not shares or max(shares) <= 20 * min(shares):
        return _Shading([100 * layer["energy"] for layer in layers], _SCALES[what], bar={"ticksuffix": " %"})
    ticks = range(math.floor(math.log10(100 * min(shares))), math.ceil(math.log10(100 * max(shares))) + 1)
    logs = [math.log10(100 * layer["energy"]) if layer["energy"] > 0 else None for layer in layers]
    return _Shading(logs, _SCALES[what], bar={"tickvals": list(ticks), "ticktext": [f"{10.0**t:g} %" for t in ticks]})


def locate(names: Sequence[str]) -> list[tuple[str, str]]:
    """(block, module type) of dotted layer names: block "-" without a number, the type as short as it is unique."""
    split = []
    for name in names:
        found = re.search(r"(?:^|\.)(\d+)\.(?=.)", name)
        split.append((found[1], name[: found.start()], name[found.end() :]) if found else ("-", "", name))
    several = len({prefix for block, prefix, _ in split if block != "-"}) > 1
    full = [f"{prefix}.{rest}" if several and prefix else rest for _, prefix, rest in split]
    last = Counter(kind.rpartition(".")[2] for kind in dict.fromkeys(full))
    short = [kind.rpartition(".")[2] if last[kind.rpartition(".")[2]] == 1 else kind for kind in full]
    return [(block, kind) for (block, _, _), kind in zip(split, short, strict=True)]


def percent(share: float) -> str:
    """A share in %, with digits that suit its size."""
    return f"{100 * share:.3g} %"


def _with_spectra(runs: Sequence[Run]) -> list[tuple[int, Run]]:
    return [(i, run) for i, run in enumerate(runs) if run.spectra]


def _running_mean(values: Floats, window: int) -> Floats:
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start, stop = np.maximum(index - window // 2, 0), np.minimum(index + (window + 1) // 2, len(values))
    return np.asarray((sums[stop] - sums[start]) / np.maximum(stop - start, 1))


def _spread(n: int, points: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, n - 1, min(n, points)).round().astype(np.int64))


def _log(value: float) -> int | None:
    return round(_LOG_STEPS * math.log10(value)) if value > 0 and math.isfinite(value) else None


def layout(height: int) -> dict[str, Any]:
    """What all figures of the page have in common; height in pixels."""
    clear = "rgba(0,0,0,0)"
    axis = {"automargin": True, "zeroline": False}
    return {
        "template": go.layout.Template(),
        "height": height,
        "margin": {"l": 8, "r": 8, "t": 8, "b": 16},
        "paper_bgcolor": clear,
        "plot_bgcolor": clear,
        "font": {"size": 13},
        "xaxis": axis,
        "yaxis": axis,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hoverlabel": {"align": "left"},
    }
