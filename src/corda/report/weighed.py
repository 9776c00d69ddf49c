"""What modes dual and contrast chose by: θ and the two sides' spectra over all layers, as a section of a page."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from corda.report.figures import COLOURS, Floats, Run, layout
from corda.report.html import figure, section

_POINTS = 60
_NAMES = {
    "theta": "θ: the task's share over the knowledge's",
    "task": "task: share of its energy",
    "knowledge": "knowledge: share of its energy",
}


def weighed_section(runs: Sequence[Run]) -> str:
    """A figure for each run of dual or contrast; empty where there is none."""
    parts = [
        figure(f"weighed{i}", weighed_curves(run.weighed), f"{run.label}: median over layers, band: quartiles")
        for i, run in enumerate(runs)
        if run.weighed
    ]
    if not parts:
        return ""
    text = (
        "<p>Directions are taken in the order of θ, the ratio of the task's energy along a direction to the "
        "knowledge's, both at unit total. The other curves are the two second moments' own eigenvalues: the further a "
        "layer's θ lies above 1, the less the task and the knowledge share there.</p>"
    )
    return section("Task against knowledge", text, *parts)


def weighed_curves(weighed: Mapping[str, Floats]) -> go.Figure:
    """Median and quartiles over layers of each quantity, against the index of the direction, both logarithmic."""
    drawn = go.Figure()
    for colour, (kind, label) in zip(COLOURS, _NAMES.items(), strict=False):
        curves = [np.asarray(v, np.float64) for name, v in weighed.items() if name.endswith(f".{kind}")]
        if not curves:
            continue
        width = max(map(len, curves))
        padded = np.full((len(curves), width), np.nan)
        for r, curve in enumerate(curves):
            padded[r, : len(curve)] = np.where(curve > 0, curve, np.nan)
        which = np.unique(np.geomspace(1, width, _POINTS).astype(int)) - 1
        which = which[~np.isnan(padded[:, which]).all(axis=0)]  # beyond the rank of C no layer has an eigenvalue
        low, middle, high = np.nanquantile(padded[:, which], (0.25, 0.5, 0.75), axis=0)
        common = {"x": which + 1, "mode": "lines", "legendgroup": kind}
        thin = {"width": 0}
        drawn.add_scatter(**common, y=high, line=thin, showlegend=False, hoverinfo="skip")
        drawn.add_scatter(
            **common, y=low, line=thin, fill="tonexty", fillcolor=_faint(colour), showlegend=False, hoverinfo="skip"
        )
        drawn.add_scatter(
            **common, y=middle, name=html.escape(label), line={"color": colour}, hovertemplate="%{x}: %{y:.3g}"
        )
    drawn.update_layout(layout(340))
    drawn.update_xaxes(title="direction", type="log")
    drawn.update_yaxes(type="log")
    return drawn


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"
