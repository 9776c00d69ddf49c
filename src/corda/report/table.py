"""Tables for the terminal: scores of runs, a plan, a context, an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, takewhile, zip_longest
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

_LABELS = {
    "answer_loss": "loss (nats/token)",
    "exact_match": "exact match %",
    "perplexity": "perplexity",
    "accuracy": "accuracy %",
    "f1": "F1 %",
    "loss": "loss (nats/label)",
    "pass_at_1": "programs right %",
}
_SHORT = {
    "kpm": "CorDA-KPM",
    "ipm": "CorDA-IPM",
    "dual": "dual",
    "contrast": "contrast",
    "lora": "LoRA",
}
_PERCENT = {"exact_match", "accuracy", "f1", "pass_at_1"}


def short_name(results: dict[str, Any]) -> str:
    """Method of a run in a word."""
    return _SHORT[results["plan"]["mode"]]


def format_score(metric: str, score: dict[str, Any]) -> str:
    """Value ± standard error in the metric's unit.

    Args:
        metric: Its name.
        score: Value and stderr.
    """
    factor, digits = (100, 1) if metric in _PERCENT else (1, 3)
    return f"{score['value'] * factor:.{digits}f} ± {score['stderr'] * factor:.{digits}f}"


def scores_table(runs: Sequence[dict[str, Any]]) -> Table:
    """Base and every run, a row per task and metric; the runs share their base and tasks."""
    table = Table(
        title="Held-out scores, mean ± standard error", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("task")
    table.add_column("metric", no_wrap=True)
    table.add_column("n", justify="right")
    for name in ("base", *map(short_name, runs)):
        table.add_column(name, justify="right", min_width=len(name))  # a narrow terminal breaks cells, not names
    first = runs[0]
    tasks = first["recipe"]["evaluation"]["tasks"]
    for task, keys in groupby(first["scores"]["before"], key=lambda key: key.rpartition("/")[0]):
        titles = [task, "to learn" if tasks[task]["measures"] == "learn" else "to keep"]
        rows = list(keys)
        for key, title in zip_longest(rows, titles if len(rows) > 1 else ["\n".join(titles)], fillvalue=""):
            metric, score = key.rpartition("/")[2], first["scores"]["before"][key]
            cells = [format_score(metric, run["scores"]["after"][key]) for run in runs]
            table.add_row(title, _LABELS[metric], str(score["n"]), format_score(metric, score), *cells)
    return table


def plan_table(plan: dict[str, Any]) -> Table:
    """A plan as JSON, a row per layer: candidate taken, compactness, scores, rank, share of the budget, energy."""
    names, prefix = own_parts([layer["name"] for layer in plan["layers"]])
    table = _table(f"Plan, mode {plan['mode']}, {plan['trainable_parameters']:,} trainable parameters")
    captions = [quantisation_sentence(plan["quantisation"])] if plan.get("quantisation") else []
    if any(layer["floor_decided"] for layer in plan["layers"]):
        captions.append("* more than half of the smallest eigenvalue in π is damping: more tokens would help")
    table.caption = "\n".join(captions) or None
    table.add_column(f"layer of {prefix}", overflow="fold")
    table.add_column("round", justify="right", no_wrap=True)
    table.add_column("log π", justify="right", no_wrap=True)
    table.add_column("scores", justify="right")
    for column in ("rank", "budget %", "energy %"):
        table.add_column(column, justify="right", no_wrap=True)
    if plan.get("quantisation"):
        for column in ("Q(W) weight %", "output %", "start weight %", "output %"):
            table.add_column(column, justify="right")
    for name, layer in zip(names, plan["layers"], strict=True):
        d_out, d_in = layer["shape"]
        share = 100 * (d_out + d_in * layer["train_a"]) * layer["rank"] / plan["trainable_parameters"]
        floor = "*" if layer["floor_decided"] else ""
        table.add_row(
            name,
            "all" if layer["chosen"] is None else str(layer["chosen"]),
            "–" if layer["log_pi"] is None else f"{layer['log_pi']:.2f}{floor}",
            " ".join(f"{score:.3g}" for score in layer["scores"]) or "–",
            str(layer["rank"]),
            f"{share:.2f}",
            f"{100 * layer['energy']:.2g}",
            *(_errors(layer.get("quantised")) if plan.get("quantisation") else ()),
        )
    return table


def quantisation_sentence(totals: Mapping[str, float]) -> str:
    """What 4 bits cost all layers together, from the totals in a plan."""
    parts = [
        f"{what} {100 * totals[f'{kind}_plain']:.3g} % as Q(W), {100 * totals[f'{kind}_start']:.3g} % as it starts"
        for kind, what in (("weight", "weights are off by"), ("output", "outputs on the calibration data by"))
    ]
    ratio = f"{totals['output_ratio']:.3g}"
    return f"4 bits, all layers together: {parts[0]}; {parts[1]}: {ratio} of plain quantisation's"


def _errors(errors: Mapping[str, float] | None) -> list[str]:
    """Weight and output error of Q(W), then of the start, in % of ‖W‖ and ‖W X‖."""
    if errors is None:
        return ["–"] * 4
    kinds = ("weight_plain", "output_plain", "weight_start", "output_start")
    norms = [errors[f"{kind.partition('_')[0]}_norm"] for kind in kinds]
    return [f"{100 * errors[kind] / norm:.2g}" if norm else "–" for kind, norm in zip(kinds, norms, strict=True)]


def context_table(facts: Mapping[str, Any]) -> Table:
    """A context's facts, a row per distinct input; where rounds differ, their mean or the least and the most."""
    inputs = len({one["group"] for one in facts["inputs"]})
    rounds = "1 round" if facts["rounds"] == 1 else f"{facts['rounds']} rounds"
    table = _table(f"Context, {rounds}, {facts['layers']} layers, {inputs} distinct inputs")
    table.caption = (
        f"tr C / d: mean diagonal; eff. rank: (tr C)² / ‖C‖², between 1 and the width\n{kept_sentence(facts['kept'])}"
    )
    names, prefix = own_parts([one["group"] for one in facts["inputs"]])
    table.add_column(f"input of, {prefix}", overflow="fold")
    for column in ("layers", "width", "tokens", "tr C / d", "eff. rank"):
        table.add_column(column, justify="right")
    for name, one in zip(names, facts["inputs"], strict=True):
        table.add_row(
            f"{name} ({one['side']})" if one["side"] else name,
            str(len(one["layers"])),
            str(one["d_in"]),
            _span(one["tokens"], "{:,}"),
            f"{sum(one['mean_diagonal']) / len(one['mean_diagonal']):.3g}" if one["mean_diagonal"] else "not kept",
            _span(one["effective_rank"], "{:.1f}") if one["effective_rank"] else "not kept",
        )
    return table


def kept_sentence(kept: Mapping[str, Any]) -> str:
    """What a context's covariances take on the disk, against what it would take to collect them once more."""
    text = "covariances not kept: every pass of the plan collects them again, block by block"
    if kept["on_disk"]:
        text = f"{kept['bytes'] / 1e6:,.1f} MB of covariances kept on disk"
        if kept["write_seconds"] is not None:
            text += f", written in {kept['write_seconds']:.1f} s"
    if kept["collect_again_tokens"] is not None:
        tokens, seconds = kept["collect_again_tokens"], kept["collect_again_seconds"]
        text += f"; collecting them again puts {tokens:,} tokens through the model, {seconds:.1f} s"
    if kept["why"]:
        text += f"; {kept['why']}"
    return text


def adapter_table(facts: Mapping[str, Any]) -> Table:
    """An adapter's facts, a row per layer."""
    form = f"rank {facts['rank']}, alpha {facts['lora_alpha']:g}{', rsLoRA' if facts['use_rslora'] else ''}"
    table = _table(f"LoRA for {facts['base'] or 'an unnamed base'}, {form}, {facts['parameters']:,} parameters")
    if facts["other_parameters"]:
        table.caption = f"{facts['other_parameters']:,} of the parameters are not LoRA factors"
    names, prefix = own_parts([layer["name"] for layer in facts["layers"]])
    table.add_column(f"layer of {prefix}", overflow="fold")
    for column in ("shape", "rank", "scaling s", "‖s B A‖", "‖A‖", "‖B‖", "parameters"):
        table.add_column(column, justify="right")
    for name, layer in zip(names, facts["layers"], strict=True):
        norms = [f"{layer[key]:.3g}" for key in ("scaling", "norm", "norm_A", "norm_B")]
        shape = f"{layer['d_out']}×{layer['d_in']}"
        table.add_row(name, shape, str(layer["rank"]), *norms, f"{layer['parameters']:,}")
    return table


def coverage_table(facts: Mapping[str, Any]) -> Table:
    """What a plan protects of its calibration set and of the retained sets, a row per set."""
    table = _table("Activation energy outside of the adapter's inputs")
    table.caption = (
        f"random directions would expose {100 * facts['random']:.2g} %; times exposed: against the calibration set, "
        "median layer"
    )
    table.add_column("set")
    for column in ("tokens", "protected %", "in the median layer", "times exposed"):
        table.add_column(column, justify="right")
    for name, one in facts["sets"].items():
        shares = [f"{100 * one[key]:.3f}" for key in ("protected", "protected_median")]
        table.add_row(name, f"{one['tokens']:,}", *shares, f"{one['ratio']:.2f}")
    return table


def own_parts(names: Sequence[str]) -> tuple[list[str], str]:
    """Dotted names without the parts that all of them begin with, and those parts."""
    split = [name.split(".") for name in names]
    shared = len(list(takewhile(lambda parts: len(set(parts)) == 1, zip(*(n[:-1] for n in split), strict=False))))
    return [".".join(parts[shared:]) for parts in split], ".".join(split[0][:shared]) or "the model"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", caption_justify="left")


def _span(values: Sequence[float], form: str) -> str:
    least, most = form.format(min(values)), form.format(max(values))
    return least if least == most else f"{least}–{most}"
