"""One self-contained HTML page from the artifacts of one or several runs. It needs no model and no network."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml
from safetensors.numpy import load_file

from corda.errors import ArtifactError
from corda.report import figures
from corda.report.differences import differences_section
from corda.report.drift import drift_section
from corda.report.errorbars import score_figures
from corda.report.figures import Run
from corda.report.html import cell, figure, row, section, table, write_document
from corda.report.layers import layers_section, spectra_files, spectra_section
from corda.report.metrics import Metric, metric_of, ordered_keys, position, split_key
from corda.report.table import short_name
from corda.report.weighed import weighed_section

_SAMPLES, _TEXT = 12, 1200  # shown per task, characters of each text
_STAGES = ("collect", "plan", "before", "train", "after", "export")
_SECTIONS = ("model", "data", "context", "adapter", "training", "evaluation", "export", "seed", "output_dir")


_VERBS = {
    "learn": {1: "learnt {}", 0: "did not measurably learn {}", -1: "got worse at {}"},
    "keep": {1: "improved on {}", 0: "kept {} within error", -1: "forgot some of {}"},
}


def write_page(runs: Sequence[Path], path: Path) -> None:
    """Write the report of one run, or of several side by side; it appears whole or not at all.

    Args:
        runs: Folders with results.json, and plan/spectra.safetensors where there are spectra.
        path: The HTML file to write.

    Raises:
        ArtifactError: a folder has no readable results.json, or none is given.
        ResourceError: no space.
    """
    read = _read(runs)
    title = escape(f"{_join([run.label for run in read])} on {_join([run.results['model']['name'] for run in read])}")
    write_document(path, title, _body(read, title))


def _read(folders: Sequence[Path]) -> list[Run]:
    if not folders:
        raise ArtifactError("there is no run to report on", expected="the folder of a finished run")
    results = []
    for folder in folders:
        try:
            results.append(json.loads((folder / "results.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ArtifactError("there is no finished run here", where=str(folder), fix="run the recipe") from None
        except ValueError:
            raise ArtifactError("results.json is not JSON", where=str(folder), fix="run the report stage") from None
    names = [short_name(result) for result in results]
    if max(Counter(names).values()) > 1:
        names = [f"{name} ({folder.resolve().name})" for name, folder in zip(names, folders, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{name} {i}" for i, name in enumerate(names, 1)]
    return [
        Run(name, result, *(load_file(file) if file.is_file() else {} for file in spectra_files(folder / "plan")))
        for name, result, folder in zip(names, results, folders, strict=True)
    ]


def _body(runs: Sequence[Run], title: str) -> list[str]:
    models = _join([run.results["model"]["name"] for run in runs])
    notes = [run.results["model"]["note"] for run in runs if run.results["model"].get("note")]
    validated = any(run.results["train"].get("eval_loss") for run in runs)
    return [
        f"<h1>{title}</h1>",
        f'<p class="quiet">Base model {escape(models)}{escape("; " + _join(notes)) if notes else ""}.</p>',
        f'<ul class="statements">{"".join(f"<li>{_statement(run)}</li>" for run in runs)}</ul>',
        _scores(runs),
        section(
            "Training",
            figure(
                "training",
                figures.training_curves(runs),
                "Faint: as logged; strong: running mean" + ("; dots: of data.validation" if validated else ""),
            ),
        ),
        drift_section(runs),
        spectra_section(runs),
        weighed_section(runs),
        layers_section(runs),
        _answers(runs),
        section("Warnings", *[_warnings(run) for run in runs]),
        differences_section(runs),
        section("What was asked", *[_recipe(run) for run in runs]),
        _costs(runs),
        _provenance(runs),
    ]


def _statement(run: Run) -> str:
    """What was learnt and what was forgotten, in one sentence."""
    clauses, seen = [], set()
    tasks = run.results["recipe"]["evaluation"]["tasks"]
    for key, before in sorted(run.results["scores"]["before"].items(), key=lambda item: position(item[0], run)):
        task, name = split_key(key)
        after = run.results["scores"]["after"].get(key)
        if task in seen or after is None:
            continue
        seen.add(task)
        m, side = metric_of(name), tasks[task]["measures"]
        change = run.results["scores"]["change"][key]
        values = f"{_number(before['value'], m)} → {_number(after['value'], m)}"
        clauses.append(
            f"{_VERBS[side][_verdict(change, m)].format(escape(task))}"
            f" ({escape(m.short)} {values}, {_difference(change, m)})"
        )
    return f"<strong>{escape(run.label)}</strong> {_join(clauses)}." if clauses else f"{escape(run.label)}: no scores."


def _scores(runs: Sequence[Run]) -> str:
    rows = []
    for key in ordered_keys(runs):
        task, name = split_key(key)
        m = metric_of(name)
        having = [run for run in runs if key in run.results["scores"]["before"]]
        base = having[0].results["scores"]["before"][key]
        side = having[0].results["recipe"]["evaluation"]["tasks"][task]["measures"]
        facts = f"{m.label}; to {side}; {base['n']} records"
        cells = [f"<th>{escape(task)}<small>{escape(facts)}</small></th>", cell(_value(base, m))]
        for run in runs:
            own = run.results["scores"]["before"].get(key)
            after = run.results["scores"]["after"].get(key)
            if own is None or after is None:
                cells.append(cell("not measured"))
                continue
            difference = run.results["scores"]["change"][key]
            arrow = {1: "↑", 0: "=", -1: "↓"}[_sign(difference["value"])]
            kind = {1: "better", 0: "", -1: "worse"}[_verdict(difference, m)]
            change = f"{arrow} {_difference(difference, m)} {kind or 'unclear'}"
            from_own = f"<small>from {_value(own, m)}</small>" if own["value"] != base["value"] else ""
            cells.append(cell(f'{_value(after, m)}<small class="{kind}">{change}</small>{from_own}'))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = ["held-out task", "base", *[run.label for run in runs]]
    note = (
        "Mean ± standard error over records. Below it the change from the base, its error that of paired differences "
        "on the same records. A change within two of its errors is called unclear."
    )
    return section("Scores", table(head, rows), f'<p class="quiet">{note}</p>', score_figures(runs))


def _answers(runs: Sequence[Run]) -> str:
    tasks = dict.fromkeys(task for run in runs for task in run.results["answers"]["after"])
    parts = []
    for task in tasks:
        parts.append(f"<h3>{escape(task)}</h3>")
        columns: list[tuple[str, list[dict[str, Any]]]] = []
        for run in runs:
            answers = run.results["answers"]
            if not columns and task in answers["before"]:
                columns.append(("Base", answers["before"][task]))
            columns.append((run.label, answers["after"].get(task, [])))
        prompts = {a["prompt"]: a["expected"] for _, answers in columns for a in answers}
        for prompt, expected in list(prompts.items())[:_SAMPLES]:
            told = [(who, next((a for a in answers if a["prompt"] == prompt), None)) for who, answers in columns]
            accepted = _clip(" / ".join(expected[:4]) + (" / …" if len(expected) > 4 else ""))
            parts.append(
                f'<div class="sample"><p class="question">{_clip(prompt)}</p><p class="quiet">Expected: {accepted}</p>'
                f'<div class="answers">{"".join(_answer(who, answer) for who, answer in told if answer)}</div></div>'
            )
        if len(prompts) > _SAMPLES:
            parts.append(f"<p>{len(prompts) - _SAMPLES} more are in results.json.</p>")
    return section("Answers", *parts) if parts else ""


def _answer(who: str, answer: Mapping[str, Any]) -> str:
    verdict = '<span class="better">right</span>' if answer["right"] else '<span class="worse">wrong</span>'
    text = _clip(answer["generated"]) if answer["generated"].strip() else '<span class="quiet">(nothing)</span>'
    return f'<div><div class="who">{escape(who)}: {verdict}</div><div class="text">{text}</div></div>'


def _warnings(run: Run) -> str:
    texts = dict.fromkeys([*run.results["warnings"], *run.results["plan"]["warnings"]])
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<p>{escape(run.label)}:</p><ul>{items}</ul>" if items else f"<p>{escape(run.label)}: none.</p>"


def _recipe(run: Run) -> str:
    recipe = run.results["recipe"]
    ordered = {key: recipe[key] for key in (*_SECTIONS, *recipe) if key in recipe}
    text = yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, width=100)
    return (
        f"<p>{escape(run.label)}: save the recipe below as recipe.yaml and run</p><pre>corda run recipe.yaml</pre>"
        f"<details><summary>{escape(run.label)}: recipe</summary><div><pre>{escape(text)}</pre></div></details>"
    )


def _costs(runs: Sequence[Run]) -> str:
    used = dict.fromkeys(stage for run in runs for stage in run.results["timing"])
    rows = []
    for stage in [*[s for s in _STAGES if s in used], *[s for s in used if s not in _STAGES]]:
        costs = [(run.results["timing"].get(stage), run.results["memory"].get(stage)) for run in runs]
        rows.append(row(stage, [cell(f"{_duration(time)}<small>{_size(peak)}</small>") for time, peak in costs]))
    rows.append(row("all", [cell(_duration(sum(run.results["timing"].values()))) for run in runs]))
    return section("Time and peak memory", table(["stage", *[run.label for run in runs]], rows))


def _provenance(runs: Sequence[Run]) -> str:
    columns = [_facts(run.results) for run in runs]
    rows = [
        row(name, [f"<td>{escape(str(facts.get(name, '–')))}</td>" for facts in columns])
        for name in dict.fromkeys(name for facts in columns for name in facts)
    ]
    return section("Provenance", table(["", *[run.label for run in runs]], rows, numbers=False))


def _facts(results: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(results["provenance"])
    packages = made.pop("packages", {})
    facts = {
        "base model": results["model"]["name"],
        "its fingerprint": results["model"]["fingerprint"],
        "optimiser steps": results["train"]["steps"],
        "relative logit difference at step 0": f"{results['step0']['max_relative_logit_difference']:.2g}",
        "export": results["export"].get("format", "none"),
    }
    if results["export"]:
        facts["relative logit difference after reload"] = f"{results['export']['max_relative_logit_difference']:.2g}"
    if lost := results["export"].get("compression"):
        facts[f"the same lost to export.rank {lost['rank']}"] = f"{lost['max_relative_logit_difference']:.2g}"
    return {**facts, **made, **packages, "schema of results.json": results["schema"]}


def _number(value: float, m: Metric) -> str:
    return f"{value * m.factor:.{m.digits}f}" if math.isfinite(value) else "unknown"


def _value(score: Mapping[str, Any], m: Metric) -> str:
    return f"{_number(score['value'], m)} ± {_number(score['stderr'], m)}"


def _difference(change: Mapping[str, Any], m: Metric) -> str:
    sign = "−" if change["value"] < 0 else "+"
    return f"{sign}{_number(abs(change['value']), m)} ± {_number(change['stderr'], m)}"


def _verdict(change: Mapping[str, Any], m: Metric) -> int:
    """1 better, -1 worse, 0 within two standard errors."""
    return 0 if not abs(change["value"]) > 2 * change["stderr"] else m.better * _sign(change["value"])


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _join(words: Iterable[str]) -> str:
    *most, last = dict.fromkeys(words)
    return f"{', '.join(most)} and {last}" if most else last


def _clip(text: str) -> str:
    return escape(text if len(text) <= _TEXT else f"{text[:_TEXT]} …")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _size(count: float | None) -> str:
    return "" if count is None else f"{count / 1e9:.2f} GB"
