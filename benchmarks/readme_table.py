"""The README's table out of benchmarks/results/demo-seeds.json: python benchmarks/readme_table.py rewrites it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARK = re.compile(r"(<!-- demo-seeds -->\n).*?(<!-- end -->)", re.S)
LABELS = {"answer_loss": ("loss, nats per token", 1, 3), "exact_match": ("exact match, %", 100, 1)}


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


def main() -> None:
    """Put the table between its marks."""
    results = json.loads((ROOT / "benchmarks" / "results" / "demo-seeds.json").read_text())
    readme = ROOT / "README.md"
    readme.write_text(MARK.sub(lambda m: m.group(1) + table(results) + m.group(2), readme.read_text()))


if __name__ == "__main__":
    main()
