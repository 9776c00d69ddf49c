"""Does the drift meter foretell forgetting: does it put the runs in the order of what they lost."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from corda.drift import READINGS
from corda.evaluation.scores import rise

_FEWEST = 4  # runs that an order is spoken of


def foretold(runs: Sequence[Mapping[str, Any]], keep: str) -> dict[str, Any]:
    """Spearman's correlation of each of the meter's readings with the rise of a retained score.

    Over all runs it also shows the learning rate's doing, which moves and forgets more where it is higher; so it is
    given within each learning rate too, across methods and seeds. Diverged runs that were measured count.

    Args:
        runs: Results of cells.
        keep: "task/metric".

    Returns:
        Reading -> n, over all runs, learning rate -> within it, and the median of those; empty without a meter.
    """
    found: dict[str, Any] = {}
    for reading in READINGS:
        points = [point for run in runs if (point := _point(run, reading, keep)) is not None]
        if len(points) < _FEWEST:
            continue
        by_rate = defaultdict(list)
        for rate, drift, worse in points:
            by_rate[rate].append((drift, worse))
        ordered = {f"{rate:g}": spearman(pairs) for rate, pairs in sorted(by_rate.items()) if len(pairs) >= _FEWEST}
        known = [value for value in ordered.values() if value is not None]
        found[reading] = {
            "n": len(points),
            "all": spearman([(drift, rise) for _, drift, rise in points]),
            "within": ordered,
            "median_within": statistics.median(known) if known else None,
        }
    return found


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Pearson's correlation of the ranks, equal values sharing their mean rank; None where one side is constant.

    Args:
        pairs: Two values of each case.
    """
    one, two = ([rank - (len(pairs) + 1) / 2 for rank in ranks([pair[i] for pair in pairs])] for i in (0, 1))
    scale = math.sqrt(sum(a * a for a in one) * sum(b * b for b in two))
    return sum(a * b for a, b in zip(one, two, strict=True)) / scale if scale else None


def ranks(values: Sequence[float]) -> list[float]:
    """1 for the lowest value, ..., equal ones sharing their mean."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for place in order[start:end]:
            found[place] = (start + 1 + end) / 2
        start = end
    return found


def _point(run: Mapping[str, Any], reading: str, keep: str) -> tuple[float, float, float] | None:
    """Learning rate, drift and rise of a run; None where one of the last two was not measured."""
    drift = (run.get("drift") or {}).get(reading)
    before, after = (run.get("scores", {}).get(side, {}).get(keep) for side in ("before", "after"))
    if drift is None or not math.isfinite(drift) or not before or not after:
        return None
    return run["learning_rate"], drift, rise(keep, before["value"], after["value"])
