"""A study's table in Markdown out of its result file: python benchmarks/study_table.py NAME [--against METHOD].

A row per method: seeds, the rate that the development split chose (* : at the end of what was run), task loss there,
and for every retained set the rise of its loss over that of the reference at equal task loss, with 95 % limits and in
square brackets how many seeds both have fronts that overlap with.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from harness import RESULTS

from corda import artifact

TOO_WIDE = 3.0  # limits of a ratio further apart than this say nothing and are left out


def show(value: float, digits: int = 2) -> str:
    """A number with a proper minus."""
    return f"{value:.{digits}f}".replace("-", "−")


def cell(found: Mapping[str, Any] | None, *, itself: bool) -> str:
    """A ratio with its limits, or why there is none."""
    if itself:
        return "1"
    if found is None or found.get("ratio") is None:
        return "no overlap" if found and "why" in found else "—"
    low, high = found.get("ratio_low"), found.get("ratio_high")
    text = show(found["ratio"])
    known = low is not None and high is not None and high - low <= TOO_WIDE
    return f"{text} ({show(low)} to {show(high)}) [{found['seeds']}]" if known else f"{text} [{found['seeds']}]"


def table(result: Mapping[str, Any], against: str | None = None) -> str:
    """The rows.

    Args:
        result: Of a comparison.
        against: Whose rise is 1; default: the study's reference.
    """
    study, conclusions = result["study"], result["conclusions"]
    reference = against or study["reference"]
    found = conclusions["also"][against] if against else conclusions["differences"]
    sets = study["keep"]
    names = [wanted.partition("/")[0] for wanted in sets]
    lines = [
        f"| method | seeds | best rate | task loss there | {' | '.join(names)} |",
        "| --- " * (4 + len(sets)) + "|",
    ]
    for name, best in conclusions["best"].items():
        if name not in result["labels"] or best is None or "scores" not in best:
            continue
        score = best["scores"][study["learn"]]
        ratios = [cell(found.get(wanted, {}).get(name), itself=name == reference) for wanted in sets]
        rate = f"{best['learning_rate']:.2g}{'' if best['inside'] else '*'}"
        seeds = len(score["seeds"])
        row = [result["labels"][name], str(seeds), rate, show(score["mean"]), *ratios]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--against")
    given = parser.parse_args()
    print(table(artifact.read_json(RESULTS / f"{given.name}.json"), given.against), end="")
