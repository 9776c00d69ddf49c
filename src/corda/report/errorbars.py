"""Scores before and after with their errors, a figure for each metric."""

from __future__ import annotations

import html
from collections.abc import Sequence

import plotly.graph_objects as go

from corda.report.figures import COLOURS, Run, layout
from corda.report.html import figure
from corda.report.metrics import metric_of, ordered_keys, split_key

_BASE = "#7d7d7d"
_WIDTH = 2  # standard errors; a change within as many is called unclear


def score_figures(runs: Sequence[Run]) -> str:
    """All metrics' figures side by side; empty where nothing was measured."""
    names = dict.fromkeys(split_key(key)[1] for key in ordered_keys(runs))
    caption = "{}; bars: two standard errors over records"
    drawn = [
        figure(f"errors-{name}", score_errors(runs, name), caption.format(metric_of(name).label)) for name in names
    ]
    return f'<div class="maps">{"".join(drawn)}</div>' if drawn else ""


def score_errors(runs: Sequence[Run], metric: str) -> go.Figure:
    """Tasks by value: the base as a grey circle and each run in its colour, with bars of two standard errors.

    Args:
        runs: With scores; a run that lacks a task is left out of its row.
        metric: Which metric.
    """
    m = metric_of(metric)
    keys = [key for key in ordered_keys(runs) if split_key(key)[1] == metric]
    drawn = go.Figure()
    base = {key: run.results["scores"]["before"][key] for run in reversed(runs) for key in keys if _has(run, key)}
    told = [("base", _BASE, "circle-open", base)]
    for i, run in enumerate(runs):
        after = {key: run.results["scores"]["after"][key] for key in keys if key in run.results["scores"]["after"]}
        told.append((html.escape(run.label), COLOURS[i % len(COLOURS)], "circle", after))
    for place, (name, colour, symbol, scores) in enumerate(told):
        having = [key for key in keys if key in scores]
        values = [(scores[key]["value"] * m.factor, scores[key]["stderr"] * m.factor) for key in having]
        shift = 0.56 * (place / max(1, len(runs)) - 0.5)
        drawn.add_scatter(
            name=name,
            mode="markers",
            x=[value for value, _ in values],
            y=[keys.index(key) + shift for key in having],
            error_x={"array": [_WIDTH * error for _, error in values], "thickness": 1.4, "width": 4},
            marker={"color": colour, "symbol": symbol, "size": 9, "line": {"width": 2, "color": colour}},
            text=[
                f"{html.escape(split_key(key)[0])}, {name}: {value:.{m.digits}f} ± {error:.{m.digits}f}"
                for key, (value, error) in zip(having, values, strict=True)
            ],
            hovertemplate="%{text}<extra></extra>",
        )
    rows = len(keys)
    drawn.update_layout(layout(100 + 24 * rows * (1 + len(runs))))
    labels = [html.escape(split_key(key)[0]) for key in keys]
    drawn.update_yaxes(tickvals=list(range(rows)), ticktext=labels, range=[rows - 0.4, -0.6], showgrid=False)
    return drawn


def _has(run: Run, key: str) -> bool:
    return key in run.results["scores"]["before"]
