"""The page of a comparison, from comparison.json alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from corda.report.front import convergence, costs, learning_forgetting, share
from corda.report.html import cell, figure, row, section, table, write_document
from corda.report.metered import metered_section

_TOO_WIDE = 10.0  # limits of a share further apart say nothing
_OWN_SHARE = 0.8  # a method that passes its own final loss earlier is not timed by that loss


def write_comparison(comparison: Mapping[str, Any], path: Path) -> None:
    """Write the page; it appears whole or not at all.

    Args:
        comparison: The content of comparison.json.
        path: The file.

    Raises:
        ResourceError: no space.
    """
    name = str(comparison["recipe"].get("model", {}).get("model_name_or_path", "the base"))
    title = escape(f"{len(comparison['labels'])} methods on {name}")
    study = comparison["study"]
    done = sum(run["status"] == "done" for run in comparison["runs"])
    facts = (
        f"{done} runs, {len(comparison['conclusions']['diverged'])} diverged, "
        f"{len(comparison['empty'])} cells not run; "
        f"{comparison['trainable_parameters']:,} trainable parameters; calibration never saw "
        f"{', '.join(study['unseen'])}; rates chosen on {study['development']}; device {comparison['device']}."
    )
    fronts = [
        figure(
            f"front-{number}",
            learning_forgetting(comparison, keep),
            "Every run is a point, with the standard error over records (paired with base); a line is a method's "
            "front: runs that no other one of it beats on both sides. Lower left is better. The scale of what is "
            "forgotten is linear near 0 and logarithmic beyond. Diverged runs lie outside; a double click shows them.",
        )
        for number, keep in enumerate(study["keep"])
    ]
    body = [
        f"<h1>{title}</h1>",
        f'<p class="quiet">{escape(facts)}</p>',
        section("Best rate of each method", _best(comparison)),
        section("Learning and forgetting", *fronts),
        section(
            "Forgetting at equal task loss",
            "<p>How much worse what is to be kept got, as a share of how much worse it got with another method at the "
            "same task score, with 95 % limits over seeds and records, of one seed over records alone. A difference, "
            "with its sign, stands where that other method's own rise is not told from none: no limits hold a share "
            "then.</p>",
            *[_at_equal_loss(comparison, other) for other in _references(comparison)],
        ),
        section(
            "Convergence",
            figure("convergence", convergence(comparison), "At each method's best rate, mean over seeds"),
            *_reached(comparison),
        ),
        metered_section(comparison),
        section("Time and memory", figure("costs", costs(comparison), "Mean over seeds"), _memory(comparison)),
        section("Every run", _runs(comparison)),
        section("What was asked", _asked(comparison)),
    ]
    write_document(path, title, body)


def _best(comparison: Mapping[str, Any]) -> str:
    study = comparison["study"]
    metrics = [study["learn"], *study["keep"]]
    rows = []
    for name, best in comparison["conclusions"]["best"].items():
        if "scores" not in best:
            rows.append(row(comparison["labels"][name], [cell(escape(best["why"])), *[cell("")] * (len(metrics) + 1)]))
            continue
        mark = "" if best["inside"] else " (end of grid)"
        cells = [cell(f"{best['learning_rate']:g}{mark}"), cell(str(len(best["scores"][metrics[0]]["seeds"])))]
        for metric in metrics:
            score = best["scores"][metric]
            kept = f" ({share(score['retained'])})" if metric != study["learn"] else ""
            cells.append(cell(f"{score['mean']:.4g}{kept}"))
        rows.append(row(_label(comparison, name, best["variant"]), cells))
    note = (
        "<p>In brackets what is retained of the base: of losses the probability per token, of other scores the score. "
        "Where the best rate is at the end of its grid, a better one may lie beyond, and nothing follows from it.</p>"
    )
    return note + table(["method", "learning rate", "seeds", *metrics], rows)


def _label(comparison: Mapping[str, Any], name: str, variant: Mapping[str, Any]) -> str:
    """A method's name, with what its own grid set."""
    own = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in variant.items())
    return f"{comparison['labels'][name]} ({own})" if own else str(comparison["labels"][name])


def _references(comparison: Mapping[str, Any]) -> list[str]:
    """The methods that the others are compared with at equal task loss."""
    return [comparison["study"]["reference"], *comparison["conclusions"].get("also", {})]


def _compared(comparison: Mapping[str, Any], against: str) -> Mapping[str, Mapping[str, Any]]:
    """Retained set -> method -> how it compares with another method."""
    conclusions = comparison["conclusions"]
    found: Mapping[str, Mapping[str, Any]] = (
        conclusions["differences"] if against == comparison["study"]["reference"] else conclusions["also"][against]
    )
    return found


def _at_equal_loss(comparison: Mapping[str, Any], against: str) -> str:
    """A row per method, a column per retained set; what the shares come from is folded away."""
    kept, labels = comparison["study"]["keep"], comparison["labels"]
    found = _compared(comparison, against)
    names = dict.fromkeys(name for keep in kept for name in found[keep])
    rows = [row(labels[n], [cell(escape(_share(found[k].get(n, {"why": ""})))) for k in kept]) for n in names]
    more = "".join(_differences(comparison, keep, against) for keep in kept)
    folded = f"<details><summary>Differences, and over which task scores</summary>{more}</details>"
    return table([f"against {labels[against]}", *kept], rows) + folded


def _share(found: Mapping[str, Any]) -> str:
    if "why" in found:
        return str(found["why"])
    if "ratio_low" not in found or found["ratio_high"] - found["ratio_low"] > _TOO_WIDE:
        return f"{found['difference']:+.3f} ({_limits(found, '+.3f')})"
    return f"{found['ratio']:.2f} ({found['ratio_low']:.2f} to {found['ratio_high']:.2f})"


def _limits(found: Mapping[str, Any], form: str) -> str:
    low, high = found["low"], found["high"]
    return "no limits: one seed, one record" if low is None else f"{low:{form}} to {high:{form}}"


def _differences(comparison: Mapping[str, Any], keep: str, against: str) -> str:
    reference = comparison["labels"][against]
    rows = []
    for name, found in _compared(comparison, against)[keep].items():
        label = comparison["labels"][name]
        if "why" in found:
            rows.append(row(label, [cell(escape(found["why"])), *[cell("")] * 4]))
            continue
        ratio = f"{found['ratio']:.2f}" if found["ratio"] is not None else "–"
        if "ratio_low" in found:
            ratio += f" ({found['ratio_low']:.2f} to {found['ratio_high']:.2f})"
        rows.append(
            row(
                label,
                [
                    cell(f"{found['difference']:+.4f}"),
                    cell(_limits(found, "+.4f")),
                    cell(ratio),
                    cell(f"{found['from']:.4g} to {found['to']:.4g}"),
                    cell(str(found["seeds"])),
                ],
            )
        )
    head = [
        f"{keep}, as loss" if keep.endswith("/perplexity") else keep,
        f"forgets more than {reference} by",
        "95 %",
        "ratio of the rises",
        "over task scores",
        "seeds",
    ]
    return table(head, rows)


def _reached(comparison: Mapping[str, Any]) -> list[str]:
    """Steps to another method's final loss: of training, and of validation where it was read."""
    steps = comparison["conclusions"]["steps"]
    validated = {
        name: {"against": one["against"], **one["validation"]} for name, one in steps.items() if "validation" in one
    }
    parts = []
    for found, kind in ((validated, "validation"), (steps, "training")):
        if not found:
            continue
        early = [name for name, one in found.items() if name == one["against"] and (one["share"] or 1) < _OWN_SHARE]
        if early:
            names = escape(", ".join(comparison["labels"][name] for name in early))
            parts.append(
                f"<p>{names} passes its own final {kind} loss after less than {_OWN_SHARE:.0%} of its steps: here the "
                f"{kind} loss is too noisy to say who is faster.</p>"
            )
        parts += [_steps(comparison, found, kind), _steps_at_one_rate(comparison, found, kind)]
    return parts


def _steps(comparison: Mapping[str, Any], found: Mapping[str, Any], kind: str) -> str:
    labels, rows = comparison["labels"], []
    for name, one in found.items():
        seeds = one["seeds"].values()
        text = ", ".join("not" if s["steps"] is None else f"{_plain(s['steps'])} of {s['of']}" for s in seeds)
        rows.append(row(labels[name], [cell(escape(labels[one["against"]])), cell(text)]))
    return table(["method", "against", f"steps to reach its final {kind} loss, seed by seed"], rows)


def _plain(steps: float) -> str:
    """With one decimal, where it is none of nothing."""
    return f"{steps:.1f}".removesuffix(".0")


def _steps_at_one_rate(comparison: Mapping[str, Any], found: Mapping[str, Any], kind: str) -> str:
    labels = comparison["labels"]
    rates = sorted({float(rate) for one in found.values() for rate in one["by_rate"]})
    rows = []
    for name, one in found.items():
        if name != one["against"]:
            shares = [one["by_rate"].get(f"{rate:g}") for rate in rates]
            texts = ["" if s is None else "not" if s["share"] is None else f"{s['share']:.2f}" for s in shares]
            rows.append(row(labels[name], [cell(escape(labels[one["against"]])), *map(cell, texts)]))
    head = ["both at the rate", f"{kind} loss: share of the steps of", *[f"{rate:g}" for rate in rates]]
    return table(head, rows)


def _memory(comparison: Mapping[str, Any]) -> str:
    rows = [
        row(
            comparison["labels"][name],
            [
                cell(f"{best['trainable_parameters']:,}"),
                cell(f"{best['start_seconds']:.1f}"),
                cell(f"{best['train_seconds']:.1f}"),
                cell(f"{best['peak_bytes'] / 1e9:.2f}"),
            ],
        )
        for name, best in comparison["conclusions"]["best"].items()
        if "scores" in best
    ]
    return table(["method", "trainable parameters", "start, s", "training, s", "peak memory in training, GB"], rows)


def _runs(comparison: Mapping[str, Any]) -> str:
    study = comparison["study"]
    metrics = [study["learn"], *study["keep"]]
    rows = []
    for run in comparison["runs"]:
        after = run["scores"].get("after", {})
        values = [f"{after[m]['value']:.4g} ± {after[m]['stderr']:.2g}" if m in after else "–" for m in metrics]
        status = run["status"] if run["status"] != "unavailable" else f"unavailable: {run['reason']}"
        cells = [f"{run['learning_rate']:g}", str(run["seed"]), escape(status), *values]
        rows.append(row(_label(comparison, run["method"], run["variant"]), [cell(text) for text in cells]))
    empty = comparison["empty"]
    rest = f"<p>Not run: {escape(', '.join(empty))}.</p>" if empty else ""
    return table(["method", "learning rate", "seed", "status", *metrics], rows) + rest


def _asked(comparison: Mapping[str, Any]) -> str:
    text = yaml.safe_dump({"study": comparison["study"], "recipe": comparison["recipe"]}, sort_keys=False)
    where = json.dumps(comparison["provenance"], indent=1)
    return f"<details><summary>Study, recipe and versions</summary><pre>{escape(text)}{escape(where)}</pre></details>"


def best_table(comparison: Mapping[str, Any]) -> Table:
    """For the terminal: every method at its best rate."""
    study = comparison["study"]
    metrics = [study["learn"], *study["keep"]]
    made = Table(title="Each method at its best rate, mean over seeds", title_justify="left")
    made.add_column("method")
    for column in ("rate", "seeds", *metrics):
        made.add_column(column, justify="right")
    for name, best in comparison["conclusions"]["best"].items():
        if "scores" not in best:
            made.add_row(comparison["labels"][name], "–", "0", *["–"] * len(metrics))
            continue
        scores = [best["scores"][metric] for metric in metrics]
        texts = [f"{s['mean']:.4g}" + (f" ({share(s['retained'])})" if i else "") for i, s in enumerate(scores)]
        rate = f"{best['learning_rate']:g}" + ("" if best["inside"] else "*")
        made.add_row(_label(comparison, name, best["variant"]), rate, str(len(scores[0]["seeds"])), *texts)
    made.caption = "In brackets what is retained of the base. * at the end of the grid: nothing follows from it"
    return made
