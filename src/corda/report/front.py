"""Figures of a comparison: the learning-forgetting front, convergence, cost; page.js sets text and grid colours."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from corda.evaluation.scores import rise, sign
from corda.report.bent import Bent
from corda.report.figures import layout

COLOURS = (
    *("#3f7fc1", "#d0642b", "#2a977b", "#a867a5", "#8a7d2c", "#7d7d7d", "#c14f6d", "#4b4fa8"),
    *("#5f9e2f", "#b08a52", "#2f9eb3", "#8c4a2f"),
)
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x", "star", "pentagon")
_LABELS = {
    "answer_loss": "loss, nats per token",
    "loss": "loss, nats per label",
    "exact_match": "exact match",
    "f1": "F1",
}
_WINDOW = 10  # a tenth of the steps


def learning_forgetting(comparison: Mapping[str, Any], keep: str) -> go.Figure:
    """Every run a point: the task's score on x, the retained set's change on y; lines join each method's front.

    The changes of y are bent, so that runs which have lost the language leave room for those that have not.

    Args:
        comparison: The content of comparison.json.
        keep: "task/metric" on y.
    """
    figure = go.Figure()
    learn = comparison["study"]["learn"]
    bent, drawn = bending(comparison, keep), []
    for number, (name, label) in enumerate(comparison["labels"].items()):
        runs = [r for r in comparison["runs"] if r["method"] == name and keep in r["scores"].get("after", {})]
        style = {"color": colour(number), "size": 9, "symbol": symbol(number)}
        shared = {"legendgroup": name, "name": html.escape(label)}
        if runs:
            after = [run["scores"]["after"] for run in runs]
            rises = [forgotten(run, keep) for run in runs]
            drawn += rises
            upper, lower = _bars(runs, rises, keep, bent)
            error = {"array": upper, "arrayminus": lower, "thickness": 1, "width": 2}
            hover = [
                f"{html.escape(label)}<br>learning rate {run['learning_rate']:g}, seed {run['seed']}, "
                f"{run['status']}<br>"
                f"{html.escape(keep)}: {run['scores']['after'][keep]['value']:.4g}, base "
                f"{run['scores']['before'][keep]['value']:.4g}, {share(run['retained'][keep])} retained"
                for run in runs
            ]
            figure.add_scatter(
                **shared,
                x=[scores[learn]["value"] for scores in after],
                y=[bent(value) for value in rises],
                error_y=error,
                mode="markers",
                marker=style,
                text=hover,
                hovertemplate="%{text}<extra></extra>",
            )
        points = comparison["conclusions"]["fronts"][keep].get(name, [])
        if len(points) > 1:
            figure.add_scatter(
                **shared,
                x=[sign(learn) * point[0] for point in points],
                y=[bent(point[1]) for point in points],
                mode="lines",
                line={"color": colour(number), "width": 1.6},
                showlegend=False,
                hoverinfo="skip",
            )
    figure.add_hline(y=0, line={"width": 1, "dash": "dot", "color": "#7d7d7d"})
    figure.update_layout(layout(460 + _legend(comparison)))
    figure.update_xaxes(title=f"{axis(learn)} after training", range=_span(comparison["runs"], learn))
    bend(figure, bent, drawn, f"{change_axis(keep)}, against base")
    return figure


def _span(runs: Sequence[Mapping[str, Any]], learn: str) -> list[float] | None:
    """The scores of the runs that ended well, with a margin; None where all of them did, and plotly finds it."""
    done = [run["scores"]["after"][learn]["value"] for run in runs if run["status"] == "done"]
    if not done or all(run["status"] != "diverged" for run in runs):
        return None
    margin = 0.06 * (max(done) - min(done)) or 0.1
    return [min(done) - margin, max(done) + margin]


def bending(comparison: Mapping[str, Any], keep: str) -> Bent:
    """The axis of a retained set's changes, linear up to their errors.

    Args:
        comparison: The content of comparison.json.
        keep: "task/metric".
    """
    return Bent.of(_error(run, keep) for run in comparison["runs"] if keep in run["scores"].get("after", {}))


def bend(figure: go.Figure, bent: Bent, values: Sequence[float], title: str) -> None:
    """Give y its ticks and title.

    Args:
        figure: Whose traces are bent already.
        bent: How.
        values: All that is drawn, not bent.
        title: Of the axis.
    """
    places, texts = bent.ticks(values)
    figure.update_yaxes(title=title, tickvals=places, ticktext=texts)


def _bars(
    runs: Sequence[Mapping[str, Any]], rises: Sequence[float], keep: str, bent: Bent
) -> tuple[list[float], list[float]]:
    """Lengths of the error bars upwards and downwards."""
    pairs = [(value, _error(run, keep)) for run, value in zip(runs, rises, strict=True)]
    return [bent(v + e) - bent(v) for v, e in pairs], [bent(v) - bent(v - e) for v, e in pairs]


def _error(run: Mapping[str, Any], keep: str) -> float:
    """Standard error of what was forgotten, paired with the base."""
    if keep in run.get("rise_stderr", {}):
        return float(run["rise_stderr"][keep])
    error: float = run["change"][keep]["stderr"]
    return error / run["scores"]["after"][keep]["value"] if keep.endswith("/perplexity") else error


def _legend(comparison: Mapping[str, Any]) -> int:
    """Pixels that the legend of many methods needs beyond two rows of four, so that the plot keeps its height."""
    return 30 * max(0, math.ceil(len(comparison["labels"]) / 4) - 2)


def convergence(comparison: Mapping[str, Any]) -> go.Figure:
    """Loss against steps at each method's best rate, mean over seeds: of validation records where it was read.

    Otherwise that of training, smoothed over a tenth of the steps.
    """
    shown = {name: runs for name in comparison["labels"] if (runs := _at_best_rate(comparison, name))}
    validated = bool(shown) and all(run["curve"].get("eval_loss") for runs in shown.values() for run in runs)
    figure = go.Figure()
    for number, (name, label) in enumerate(comparison["labels"].items()):
        if name not in shown:
            continue
        step, loss = _mean_curve(shown[name], validated)
        figure.add_scatter(
            x=step,
            y=loss,
            mode="lines",
            name=html.escape(f"{label}, {shown[name][0]['learning_rate']:g}"),
            line={"color": colour(number), "width": 2},
            hovertemplate="step %{x}: %{y:.3f}",
        )
    figure.update_layout(layout(400 + _legend(comparison)))
    figure.update_xaxes(title="step")
    figure.update_yaxes(title=f"{'validation' if validated else 'training'} loss, nats per token")
    return figure


def _at_best_rate(comparison: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """A method's finished runs at its best setting."""
    best = comparison["conclusions"]["best"].get(name, {})
    chosen = best.get("learning_rate"), best.get("variant", {})
    runs = (run for run in comparison["runs"] if run["method"] == name and run["status"] == "done")
    return [run for run in runs if (run["learning_rate"], run["variant"]) == chosen]


def _mean_curve(runs: Sequence[Mapping[str, Any]], validated: bool) -> tuple[list[int], list[float]]:
    """Steps and the mean loss over runs there."""
    key, at = ("eval_loss", "eval_step") if validated else ("loss", "step")
    n = min(len(run["curve"][key]) for run in runs)
    window = 1 if validated else max(1, n // _WINDOW)
    means = [sum(run["curve"][key][i] for run in runs) / len(runs) for i in range(n)]
    return runs[0]["curve"][at][window - 1 : n], [
        sum(means[i - window + 1 : i + 1]) / window for i in range(window - 1, n)
    ]


def costs(comparison: Mapping[str, Any]) -> go.Figure:
    """Seconds before and in training, at each method's best rate."""
    best = {n: b for n, b in comparison["conclusions"]["best"].items() if b.get("scores")}
    labels = [html.escape(comparison["labels"][name]) for name in best]
    figure = go.Figure()
    for key, title, shade in (("start_seconds", "start", "#7d7d7d"), ("train_seconds", "training", "#3f7fc1")):
        figure.add_bar(
            y=labels, x=[b[key] for b in best.values()], name=title, orientation="h", marker={"color": shade}
        )
    figure.update_layout(layout(110 + 28 * max(len(labels), 2)), barmode="stack")
    figure.update_xaxes(title="seconds")
    figure.update_yaxes(autorange="reversed")
    return figure


def colour(number: int) -> str:
    """Of the n-th method."""
    return COLOURS[number % len(COLOURS)]


def symbol(number: int) -> str:
    """Of the n-th method."""
    return _SYMBOLS[number % len(_SYMBOLS)]


def forgotten(run: Mapping[str, Any], keep: str) -> float:
    """How much worse than the base's a retained score is after a run; of a perplexity, the loss.

    Args:
        run: Of comparison.json.
        keep: "task/metric".
    """
    before, after = (run["scores"][side][keep]["value"] for side in ("before", "after"))
    return rise(keep, before, after)


def share(percent: float | None) -> str:
    """What is retained, in %; nothing is left of a base that scored 0."""
    return "–" if percent is None or math.isnan(percent) else f"{percent:.1f} %"


def axis(metric: str) -> str:
    """What an axis is of, with its unit.

    Args:
        metric: "task/metric".
    """
    task, _, kind = metric.rpartition("/")
    return f"{task}, {_LABELS.get(kind, kind)}"


def change_axis(metric: str) -> str:
    """What an axis of `forgotten` is of, with its unit.

    Args:
        metric: "task/metric".
    """
    task, _, kind = metric.rpartition("/")
    sense = "rise" if sign(metric) > 0 else "fall"
    return f"{sense} of {task}, loss, nats per token" if kind == "perplexity" else f"{sense} of {axis(metric)}"
