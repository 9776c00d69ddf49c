"""The README's tables out of the result files: python benchmarks/readme_table.py rewrites them between their marks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from study_table import cell

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LABELS = {"answer_loss": ("loss, nats per token", 1, 3), "exact_match": ("exact match, %", 100, 1)}
# Study -> what is kept -> how the column is called.
KEPT = {
    "keep-smollm2-cpu": {
        "nq_open/answer_loss": "SmolLM2: NQ-open (calibrated on)",
        "wikitext/perplexity": "SmolLM2: WikiText-2 (not)",
    },
    "grown-keep": {
        "people/answer_loss": "grown: people (calibrated on)",
        "minerals/answer_loss": "grown: minerals (not)",
    },
}
# A row's name -> the method of each study, in that order.
ROWS = {
    "LoRA + weight decay": ("lora_wd", "lora_wd"),
    "PiSSA": ("pissa", "pissa"),
    "MiLoRA": ("milora", "milora"),
    "PEFT's CorDA, KPM": ("peft_corda_kpm", "peft_corda_kpm"),
    "CorDA-IPM": ("ipm", "ipm"),
    "CorDA-KPM": ("kpm", "kpm"),
    "CorDA-KPM, the papers' balance": ("kpm_sigma", "kpm_sigma"),
    "CorDA++ KPM": ("kpm_plus", "kpm_plus"),
    "CorDA++ KPM, ranks within limits, decay to start": ("kpm_plus_decay", "kpm_plus_decay"),
    "the same, the papers' balance": ("kpm_plus_sigma", ""),
    "contrast": ("contrast", "contrast"),
    "contrast + weight decay": ("contrast_wd", "contrast_wd"),
}


def table(results: dict[str, Any]) -> str:
    """Markdown rows, one per task and metric; ± is the standard error over seeds."""
    lines = [
        "| held-out | base | LoRA | CorDA-KPM | contrast | contrast − LoRA |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for key, row in results["summary"].items():
        task, _, metric = key.rpartition("/")
        label, factor, digits = LABELS[metric]

        def show(cell: dict[str, float], signed: bool = False) -> str:
            value = f"{cell['mean'] * factor:{'+' if signed else ''}.{digits}f}"  # noqa: B023
            return f"{value.replace('-', '−')} ± {cell['stderr'] * factor:.{digits}f}"  # noqa: B023

        cells = [show(row[column]) for column in ("base", "lora", "kpm", "contrast")]
        cells.append(show(row["contrast_minus_lora"], signed=True))
        lines.append(f"| {task}: {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def kept(studies: dict[str, dict[str, Any]]) -> str:
    """Markdown rows, one per method: rises of retained losses over LoRA's at equal task loss, 95 % limits, seeds."""
    titles = [title for columns in KEPT.values() for title in columns.values()]
    lines = [f"| forgotten, LoRA being 1 | {' | '.join(titles)} |", "| --- " * (1 + len(titles)) + "|"]
    for label, methods in ROWS.items():
        cells = []
        for method, (name, columns) in zip(methods, KEPT.items(), strict=True):
            found = studies[name]["conclusions"]["differences"]
            cells += [cell(found[wanted].get(method), itself=False) if method else "—" for wanted in columns]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def read(name: str) -> dict[str, Any]:
    """A result file."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Put the tables between their marks."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    for mark, made in (("demo-seeds", table(read("demo-seeds"))), ("kept", kept({name: read(name) for name in KEPT}))):
        between = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- end -->)", re.S)
        text = between.sub(lambda m: m.group(1) + made + m.group(2), text, count=1)  # noqa: B023
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
