"""The scores of one or several runs as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from rich.table import Table

_LABELS = {
    "answer_loss": "loss (nats/token)",
    "exact_match": "exact match %",
    "perplexity": "perplexity",
    "accuracy": "accuracy %",
}
_SHORT = {"kpm": "CorDA-KPM", "ipm": "CorDA-IPM", "lora": "LoRA"}
_PERCENT = {"exact_match", "accuracy"}


def short_name(results: dict[str, Any]) -> str:
    """Method of a run in a word."""
    return _SHORT[results["plan"]["mode"]]


def format_score(metric: str, score: dict[str, Any]) -> str:
    """Value ± standard error in the metric's unit."""
    factor, digits = (100, 1) if metric in _PERCENT else (1, 3)
    return f"{score['value'] * factor:.{digits}f} ± {score['stderr'] * factor:.{digits}f}"


def scores_table(runs: Sequence[dict[str, Any]]) -> Table:
    """Base and every run, a row per task and metric; the runs share their base and tasks."""
    table = Table(title="Held-out scores, mean ± standard error", title_justify="left")
    table.add_column("task")
    table.add_column("measures")
    table.add_column("metric")
    table.add_column("n", justify="right")
    table.add_column("base", justify="right")
    for results in runs:
        table.add_column(short_name(results), justify="right")
    first = runs[0]
    for key, score in first["scores"]["before"].items():
        task, _, metric = key.rpartition("/")
        side = "to learn" if first["recipe"]["evaluation"]["tasks"][task]["measures"] == "learn" else "to keep"
        cells = [format_score(metric, run["scores"]["after"][key]) for run in runs]
        table.add_row(task, side, _LABELS[metric], str(score["n"]), format_score(metric, score), *cells)
    return table


def plan_table(plan: dict[str, Any]) -> Table:
    """A plan as JSON, a row per layer: candidate taken, compactness, scores, rank, share of the budget, energy."""
    names = [layer["name"].split(".") for layer in plan["layers"]]
    shared = len(list(takewhile(lambda parts: len(set(parts)) == 1, zip(*(n[:-1] for n in names), strict=False))))
    table = Table(title=f"Plan, mode {plan['mode']}, {plan['trainable_parameters']:,} trainable parameters")
    table.title_justify = table.caption_justify = "left"
    if any(layer["floor_decided"] for layer in plan["layers"]):
        table.caption = "* more than half of the smallest eigenvalue in π is damping: more tokens would help"
    table.add_column(f"layer of {'.'.join(names[0][:shared]) or 'the model'}", overflow="fold")
    table.add_column("round", justify="right", no_wrap=True)
    table.add_column("log π", justify="right", no_wrap=True)
    table.add_column("scores", justify="right")
    for column in ("rank", "budget %", "energy %"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, layer in zip(names, plan["layers"], strict=True):
        share = 100 * sum(layer["shape"]) * layer["rank"] / plan["trainable_parameters"]
        floor = "*" if layer["floor_decided"] else ""
        table.add_row(
            ".".join(name[shared:]),
            "all" if layer["chosen"] is None else str(layer["chosen"]),
            "–" if layer["log_pi"] is None else f"{layer['log_pi']:.2f}{floor}",
            " ".join(f"{score:.3g}" for score in layer["scores"]) or "–",
            str(layer["rank"]),
            f"{share:.2f}",
            f"{100 * layer['energy']:.2g}",
        )
    return table
