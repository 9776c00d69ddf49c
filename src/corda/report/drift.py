"""How far the outputs on the knowledge moved in training, as a section of a page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from corda.report.figures import COLOURS, DASHES, Run, layout, percent
from corda.report.html import cell, figure, row, section, table

_WORST = 5


def drift_section(runs: Sequence[Run]) -> str:
    """The curve, the values at the end and the layers that moved most; empty where no run was metered."""
    metered = [run for run in runs if run.results.get("drift")]
    if not metered:
        return ""
    head = ["", "drift", "held out", "total over layers", "limit", "layers that moved most"]
    return section(
        "Drift on the knowledge",
        "<p>Change of a layer's outputs on the knowledge to keep, over these outputs themselves, "
        "‖s (B A − B₀ A₀) C<sup>½</sup>‖ / ‖W C<sup>½</sup>‖; root mean square over layers.</p>",
        figure("drift", drift_curves(runs), "Line: on what was calibrated on; dots: on held-out records of it"),
        table(head, [_row(run) for run in metered]),
    )


def drift_curves(runs: Sequence[Run]) -> go.Figure:
    """Drift against steps of the runs that were metered, each in the colour that it has in the page's other figures."""
    drawn = go.Figure()
    for i, run in enumerate(runs):
        if not run.results.get("drift"):
            continue
        curve = run.results["train"]
        colour, name = COLOURS[i % len(COLOURS)], html.escape(run.label)
        steps = np.asarray(curve["drift_step"])
        line = {"color": colour, "width": 2.2, "dash": DASHES[i % len(DASHES)]}
        common = {"x": steps, "name": name, "legendgroup": name}
        drawn.add_scatter(
            **common, y=np.asarray(curve["drift"]), mode="lines", line=line, hovertemplate="step %{x}: %{y:.3g}"
        )
        if curve["drift_held_out"]:
            unseen = np.asarray(curve["drift_held_out"])
            marker = {"color": colour, "size": 5, "symbol": "circle-open"}
            drawn.add_scatter(
                **common, y=unseen, mode="markers", marker=marker, showlegend=False, hovertemplate="held out: %{y:.3g}"
            )
        limit = run.results["drift"]["limit"]
        if limit is not None:
            drawn.add_hline(y=limit, line={"color": colour, "width": 1, "dash": "dot"})
    drawn.update_layout(layout(320))
    drawn.update_xaxes(title="step")
    drawn.update_yaxes(title="drift", rangemode="tozero")
    return drawn


def _row(run: Run) -> str:
    drift = run.results["drift"]
    worst = sorted(drift["layers"].items(), key=lambda item: -item[1])[:_WORST]
    named = ", ".join(f"{name} {percent(value)}" for name, value in worst)
    values = [drift["rms"], drift.get("held_out_rms"), drift["total"], drift["limit"]]
    return row(escape(run.label), [*[cell(_value(v)) for v in values], cell(escape(named))])


def _value(value: Any) -> str:
    return "–" if value is None else percent(value)
