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

Floats = NDArray[np.floating[Any]]

COLOURS = ("#3f7fc1", "#d0642b", "#2a977b", "#a867a5", "#8a7d2c", "#7d7d7d")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x")
_SCALES = {"rank": [[0, "#c9d8e8"], [1, "#3a75b0"]], "energy": "Cividis"}
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
        spectra: Layer name -> singular values, ascending; empty for plain LoRA.
    """

    label: str
    results: Mapping[str, Any]
    spectra: Mapping[str, Floats] = field(default_factory=dict)

    @property
    def layers(self) -> list[dict[str, Any]]:
        """The adapted layers, in module order."""
        return list(self.results["plan"]["layers"])

    @property
    def mode(self) -> str:
        """kpm, ipm or lora."""
        return str(self.results["plan"]["mode"])


def training_curves(runs: Sequence[Run]) -> go.Figure:
    """Training loss against steps: each run's logged values, faint, and their running mean."""
    figure = go.Figure()
    for i, run in enumerate(runs):
        curve = run.results["train"]
        step, loss = np.asarray(curve["step"], np.float64), np.asarray(curve["loss"], np.float64)
        n = min(len(step), len(loss))
        smooth = _running_mean(loss[:n], max(1, n // 15))
        keep = _spread(n, _CURVE_POINTS)
        colour, name = COLOURS[i % len(COLOURS)], html.escape(run.label)
        line = {"color": colour, "width": 2.2, "dash": _DASHES[i % len(_DASHES)]}
        faint = {"color": colour, "width": 1}
        common = {"mode": "lines", "name": name, "legendgroup": name, "x": step[keep]}
        figure.add_scatter(**common, y=loss[keep], line=faint, opacity=0.35, showlegend=False, hoverinfo="skip")
        figure.add_scatter(**common, y=smooth[keep], line=line, hovertemplate="step %{x}: %{y:.3f}")
    figure.update_layout(_layout(360))
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
            line={"color": colour, "width": 1.6, "dash": _DASHES[order % len(_DASHES)]},
            hovertemplate=hover,
        )
        figure.add_scatter(
            name=f"{name}: adapted",
            meta="adapted",
            mode="markers",
            marker={"color": colour, "size": 8, "symbol": f"{_SYMBOLS[i % len(_SYMBOLS)]}-open", "line": {"width": 2}},
            hovertemplate=hover,
        )
    figure.update_layout(_layout(420))
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


def layer_map(run: Run, what: Literal["rank", "energy"]) -> go.Figure:
    """Blocks by module types, coloured by rank or by the share of energy adapted."""
    places = locate([layer["name"] for layer in run.layers])
    columns = list(dict.fromkeys(module for _, module in places))
    rows = sorted({block for block, _ in places}, key=lambda b: (b == "-", int(b) if b != "-" else 0))
    z: list[list[float | None]] = [[None] * len(columns) for _ in rows]
    text = [[""] * len(columns) for _ in rows]
    shares = [layer["energy"] for layer in run.layers if layer["energy"] > 0]
    log = what == "energy" and len(shares) > 0 and max(shares) > 20 * min(shares)
    for layer, (block, module) in zip(run.layers, places, strict=True):
        r, c = rows.index(block), columns.index(module)
        if what == "rank":
            z[r][c] = layer["rank"]
        elif not log:
            z[r][c] = 100 * layer["energy"]
        elif layer["energy"] > 0:
            z[r][c] = math.log10(100 * layer["energy"])
        shape = " × ".join(str(size) for size in layer["shape"])
        facts = f"{shape}, rank {layer['rank']}<br>energy adapted: {percent(layer['energy'])}"
        text[r][c] = f"{html.escape(layer['name'])}<br>{facts}"
    bar: dict[str, Any] = {"thickness": 10, "outlinewidth": 0, "len": 1, "lenmode": "fraction"}
    if log:
        ticks = range(math.floor(math.log10(100 * min(shares))), math.ceil(math.log10(100 * max(shares))) + 1)
        bar |= {"tickvals": list(ticks), "ticktext": [f"{10.0**t:g} %" for t in ticks]}
    elif what == "energy":
        bar |= {"ticksuffix": " %"}
    figure = go.Figure(
        go.Heatmap(
            z=z,
            x=[html.escape(c) for c in columns],
            y=rows,
            text=text,
            hovertemplate="%{text}<extra></extra>",
            hoverongaps=False,
            colorscale=_SCALES[what],
            zmin=0 if what == "rank" else None,
            zmax=max(layer["rank"] for layer in run.layers) if what == "rank" and run.layers else None,
            xgap=1,
            ygap=1,
            colorbar=bar,
        )
    )
    figure.update_layout(_layout(min(900, 130 + 12 * max(len(rows), 5))))
    figure.update_xaxes(type="category", showgrid=False, zeroline=False, tickangle=-45)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, zeroline=False, title="block")
    return figure


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


def _layout(height: int) -> dict[str, Any]:
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
