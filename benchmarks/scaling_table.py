"""The tables of docs/scaling.md out of results/scaling.json and estimate-*.json.

python benchmarks/scaling_table.py rewrites them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
CHECKED = {"estimate-smollm2": "SmolLM2-135M", "estimate-1b": "random Llama layout of 1.0 B parameters, fp32"}


def time(seconds: float) -> str:
    """Seconds or minutes."""
    return f"{seconds:.0f} s" if seconds < 180 else f"{seconds / 60:.0f} min"


def paper(rows: list[dict[str, Any]]) -> str:
    """A line for every model and number of cards."""
    lines = [
        "| model | cards | weights | memory, GB | above weights | hidden states, host | disk, GB | network, GB | time "
        "| training: memory, GB | s/step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        gb = {key: row[f"{key}_bytes"] / 1e9 for key in ("device", "above_weights", "host_hidden", "disk", "network")}
        took = sum(stage["total"] for stage in row["seconds"].values())
        training = row["train"]
        fits = training["placement"]
        note = f"{training['bytes'] / 1e9:.0f}, {fits}" if fits else f"{training['bytes'] / 1e9:.0f}: does not fit"
        step = f"{training['seconds_per_step']:.2g}" if fits else ""
        lines.append(
            f"| {row['model']} | {row['processes']} | {row['placement']} | {gb['device']:.1f} | "
            f"{gb['above_weights']:.1f} | {gb['host_hidden']:.1f} | {gb['disk']:.0f} | {gb['network']:.0f} | "
            f"{time(took)} | {note} | {step} |"
        )
    return "\n".join(lines) + "\n"


def checks() -> str:
    """Predicted and measured peaks, stage by stage."""
    lines = ["| model | stage | predicted, GB | measured, GB | ratio |", "| --- | --- | --- | --- | --- |"]
    for name, label in CHECKED.items():
        book = RESULTS / f"{name}.json"
        if not book.is_file():
            continue
        for stage, found in json.loads(book.read_text())["stages"].items():
            lines.append(
                f"| {label} | {stage} | {found['predicted_bytes'] / 1e9:.2f} | {found['measured_bytes'] / 1e9:.2f} | "
                f"{found['predicted_over_measured']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Put both tables between their marks."""
    text = PAGE.read_text(encoding="utf-8")
    rows = json.loads((RESULTS / "scaling.json").read_text())["rows"]
    for mark, table in (("scaling", paper(rows)), ("checks", checks())):
        before, _, rest = text.partition(f"<!-- {mark} -->\n")
        text = f"{before}<!-- {mark} -->\n{table}<!-- end -->{rest.partition('<!-- end -->')[2]}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
