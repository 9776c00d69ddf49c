"""What a plan did to each layer, as sections of a page, and a page of its own for a plan without a finished run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml
from safetensors.numpy import load_file

from corda.report import figures
from corda.report.figures import Run, percent
from corda.report.html import cell, data, figure, row, section, table, write_document
from corda.report.table import quantisation_sentence, short_name
from corda.report.weighed import weighed_section

_ROWS = 400  # of all layer tables of a page together
_FACTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "shape": lambda layer: " × ".join(str(size) for size in layer["shape"]),
    "rank": lambda layer: f"{layer['rank']}{' (by hand)' if layer.get('edited') else ''}",
    "energy adapted": lambda layer: percent(layer["energy"]),
    "tokens": lambda layer: f"{layer['tokens']:,}",
    "damping": lambda layer: f"{layer['damping']:.3g}",
    "condition": lambda layer: f"{layer['condition']:.3g}" if layer["condition"] >= 0 else "unknown",
    "solver": lambda layer: str(layer["solver"]),
    "‖A‖/‖B‖": lambda layer: f"{layer['norm_ratio']:.3g}",
    "dead": lambda layer: str(layer["dead"]),
}
_WEIGHED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "task energy adapted": lambda layer: percent(layer["task_energy"]),
    "θ": lambda layer: " … ".join(f"{value:.3g}" for value in layer["theta"]) or "–",
}
_SURVEYED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "log π": lambda layer: "–" if layer["log_pi"] is None else f"{layer['log_pi']:.2f}",
    "round": lambda layer: "all" if layer["chosen"] is None else str(layer["chosen"]),
    "scores": lambda layer: " ".join(f"{score:.4g}" for score in layer["scores"]) or "–",
}
# What 4 bits cost a layer, relative to ‖W‖ and to ‖W X‖ on the calibration inputs X: as Q(W), and as it starts.
_QUANTISED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "Q(W): weight error": lambda layer: _share(layer["quantised"], "weight_plain"),
    "start: weight error": lambda layer: _share(layer["quantised"], "weight_start"),
    "Q(W): output error": lambda layer: _share(layer["quantised"], "output_plain"),
    "start: output error": lambda layer: _share(layer["quantised"], "output_start"),
}


def write_plan_page(folder: Path, plan: Mapping[str, Any], path: Path) -> None:
    """Write a page of a plan alone, which needs no finished run.

    Args:
        folder: The plan artifact's, for its spectra.
        plan: The content of its plan.json.
        path: The HTML file to write.

    Raises:
        ResourceError: no space, or it cannot be written.
    """
    values = (load_file(file) if file.is_file() else {} for file in spectra_files(folder))
    run = Run(short_name({"plan": plan}), {"plan": plan}, *values)
    title = escape(f"Plan of {folder.resolve().parent.name}: {run.label}")
    warnings = "".join(f"<li>{escape(text)}</li>" for text in plan["warnings"])
    options = yaml.safe_dump({"adapter": plan["options"]}, sort_keys=False, allow_unicode=True, width=100)
    body = [
        f"<h1>{title}</h1>",
        '<p class="quiet">Which components of which layers are adapted, and why. To edit a plan, change what '
        "<code>corda plan RECIPE --save-ranks FILE</code> writes and set <code>adapter.ranks: FILE</code>.</p>",
        layers_section([run]),
        spectra_section([run]),
        weighed_section([run]),
        section("Warnings", f"<ul>{warnings}</ul>" if warnings else "<p>None.</p>"),
        section("Options", f"<pre>{escape(options)}</pre>"),
    ]
    write_document(path, title, body)


def spectra_files(plan: Path) -> tuple[Path, Path]:
    """Where a plan's spectra are, and those of a mode of two contexts; either may be missing."""
    return plan / "spectra.safetensors", plan / "weighed.safetensors"


def spectra_section(runs: Sequence[Run]) -> str:
    """Singular values of one layer at a time; empty where no run has any."""
    if not any(run.spectra for run in runs):
        return ""
    return section(
        "Spectra",
        "<p>Singular values of W C<sup>a</sup>, the weight as the context's activations see it. "
        "KPM adapts the smallest, which matter least to the knowledge to keep; IPM the largest, which matter most "
        "to the task.</p>",
        '<div class="picker"><label>Layer <select id="layer"></select></label>'
        '<label><input type="checkbox" id="log-components"> logarithmic component axis</label></div>'
        '<p class="quiet" id="layer-facts"></p>',
        figure("spectrum", figures.spectrum(runs), "Line: frozen components; open markers: adapted ones"),
        data("spectra-data", json.dumps(figures.spectra_data(runs), separators=(",", ":"))),
    )


def layers_section(runs: Sequence[Run]) -> str:
    """Heat maps of each run's layers, its candidates' scores, and a table of all layers."""
    parts = []
    drawn: dict[tuple[tuple[str, int], ...], str] = {}
    for i, run in enumerate(runs):
        ranks = tuple((layer["name"], layer["rank"]) for layer in run.layers)
        low, high = min(rank for _, rank in ranks), max(rank for _, rank in ranks)
        span = f"rank {low}" if low == high else f"ranks {low} to {high}"
        same = f" The same layers and ranks as {escape(drawn[ranks])}." if ranks in drawn else ""
        count = f"{run.results['plan']['trainable_parameters']:,} trained parameters"
        parts.append(f"<h3>{escape(run.label)}</h3><p>{len(run.layers)} layers, {span}, {count}.{same}</p>")
        parts.append(f'<div class="maps">{"".join(_maps(run, i, with_ranks=not same))}</div>')
        drawn.setdefault(ranks, run.label)
        if any(layer.get("scores") for layer in run.layers):
            caption = "Score of each round's covariance, above the lowest of its layer; large markers: taken"
            parts.append(figure(f"scores{i}", figures.candidate_scores(run), caption))
        surveyed = any(layer.get("log_pi") is not None for layer in run.layers)
        weighed = any(layer.get("theta") for layer in run.layers)
        totals = run.results["plan"].get("quantisation")
        if totals:
            parts.append(f"<p>{escape(quantisation_sentence(totals))}</p>")
        columns = _FACTS | (_WEIGHED if weighed else {}) | (_SURVEYED if surveyed else {})
        columns |= _QUANTISED if totals else {}
        rows = [
            row(layer["name"], [cell(escape(show(layer))) for show in columns.values()])
            for layer in run.layers[: _ROWS // len(runs)]
        ]
        more = "<p>More are in plan/plan.json.</p>" if len(run.layers) > len(rows) else ""
        parts.append(f"<details><summary>Every layer</summary>{table(['layer', *columns], rows)}{more}</details>")
    return section("Adapted layers", *parts)


def _share(errors: Mapping[str, float] | None, name: str) -> str:
    """An error relative to the norm of what it is an error of."""
    if not errors:
        return "–"
    norm = errors[f"{name.partition('_')[0]}_norm"]
    return percent(errors[name] / norm) if norm else "–"


def _maps(run: Run, i: int, *, with_ranks: bool) -> list[str]:
    maps = [figure(f"rank{i}", figures.layer_map(run, "rank"), "Rank")] if with_ranks else []
    if any(layer["energy"] for layer in run.layers):
        maps.append(figure(f"energy{i}", figures.layer_map(run, "energy"), "Share of the energy ‖W Cᵃ‖² adapted"))
    if any(layer.get("log_pi") is not None for layer in run.layers):
        caption = "log π of the covariance taken; lower is more compact"
        maps.append(figure(f"compactness{i}", figures.layer_map(run, "log_pi"), caption))
    if len({layer.get("chosen") for layer in run.layers}) > 1:
        maps.append(figure(f"round{i}", figures.layer_map(run, "round"), "Calibration round whose covariance is taken"))
    return maps
