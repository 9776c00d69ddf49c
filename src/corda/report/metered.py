"""What the drift meter read against what was forgotten, as a section of a comparison's page."""

from __future__ import annotations

import html
from collections.abc import Mapping
from html import escape
from typing import Any

import plotly.graph_objects as go

from corda.report.figures import layout
from corda.report.front import bend, bending, change_axis, colour, forgotten, symbol
from corda.report.html import cell, figure, row, section, table

_READINGS = {
    "rms": "root mean square over layers",
    "held_out_rms": "the same, held out",
    "total": "total",
    "held_out": "total, held out",
}
_DRAWN = "rms"


def metered_section(comparison: Mapping[str, Any]) -> str:
    """A figure per retained score and the rank correlations; empty where no run was metered.

    Args:
        comparison: The content of comparison.json.
    """
    found = {keep: one for keep, one in comparison["conclusions"].get("drift", {}).items() if one}
    if not found:
        return ""
    figures = [
        figure(
            f"drift-{number}",
            drift_against_rise(comparison, keep),
            "Every metered run: the drift at its end, on the knowledge that was calibrated on, and what it forgot.",
        )
        for number, keep in enumerate(found)
    ]
    head = ["retained", "reading", "runs", "Spearman, all runs", "median within a learning rate", "within each"]
    rows = [_row(keep, reading, entry) for keep, readings in found.items() for reading, entry in readings.items()]
    said = "<p>Does the meter put the runs in the order of what they forgot? 1: exactly.</p>"
    return section("Drift and forgetting", said, *figures, table(head, rows))


def drift_against_rise(comparison: Mapping[str, Any], keep: str) -> go.Figure:
    """Drift (logarithmic) on x, what the retained set lost on y, a colour per method.

    Args:
        comparison: The content of comparison.json.
        keep: "task/metric" on y.
    """
    drawn, values, bent = go.Figure(), [], bending(comparison, keep)
    for number, (name, label) in enumerate(comparison["labels"].items()):
        runs = [
            run
            for run in comparison["runs"]
            if run["method"] == name and run.get("drift") and keep in run["scores"].get("after", {})
        ]
        if not runs:
            continue
        rises = [forgotten(run, keep) for run in runs]
        values += rises
        drawn.add_scatter(
            x=[run["drift"][_DRAWN] for run in runs],
            y=[bent(value) for value in rises],
            mode="markers",
            name=html.escape(label),
            marker={"color": colour(number), "size": 8, "symbol": symbol(number)},
            text=[
                f"learning rate {run['learning_rate']:g}, seed {run['seed']}: {value:+.3g}"
                for run, value in zip(runs, rises, strict=True)
            ],
            hovertemplate="%{text}, drift %{x:.3g}",
        )
    drawn.update_layout(layout(380))
    drawn.update_xaxes(title="drift", type="log")
    bend(drawn, bent, values, change_axis(keep))
    return drawn


def _row(keep: str, reading: str, entry: Mapping[str, Any]) -> str:
    within = ", ".join(f"{rate}: {_value(value)}" for rate, value in entry["within"].items())
    cells = [escape(_READINGS[reading]), str(entry["n"]), _value(entry["all"]), _value(entry["median_within"]), within]
    return row(keep, [cell(text) for text in cells])


def _value(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
