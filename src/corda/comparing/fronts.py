"""The learning-forgetting front: methods are compared at equal task loss, where their fronts overlap, never beyond."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from corda.evaluation.scores import rise, sign

_STEPS = 21
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Point:
    """One run of a front.

    Attributes:
        learn: How badly the task was learnt: its loss, or minus its score.
        rise: How much worse the retained set got, in the same sense: after - before.
        rate: Learning rate.
        pulls: Influence of every retained record on `rise`, through after and before; empty where unknown.
    """

    learn: float
    rise: float
    rate: float
    pulls: tuple[float, ...] = ()


def retained(metric: str, before: float, after: float) -> float:
    """Share of the base's score that is left, in %.

    Of a loss: the probability per token against the base's, 100 exp(before - after); of a perplexity the same, as the
    ratio of the two; of an accuracy, after / before.

    Args:
        metric: Its name.
        before: Of the base.
        after: Of the trained model.
    """
    kind = metric.rpartition("/")[2]
    if kind in {"answer_loss", "loss"}:
        return 100 * math.exp(min(before - after, 50.0))
    if kind == "perplexity":
        return 100 * before / after
    return 100 * after / before if before else math.nan


def points(runs: Sequence[Mapping[str, Any]], learn: str, keep: str) -> list[Point]:
    """The points of one method and seed; diverged runs have no score and so no point.

    Args:
        runs: Results of one method and seed.
        learn: "task/metric" on x.
        keep: "task/metric" on y.
    """
    found = []
    for run in runs:
        before, after = run["scores"].get("before", {}), run["scores"].get("after", {})
        if run["status"] != "done" or learn not in after or keep not in after:
            continue
        old, new = before[keep]["value"], after[keep]["value"]
        learnt = sign(learn) * after[learn]["value"]
        first, second = (1 / old, 1 / new) if keep.endswith("/perplexity") else (sign(keep), sign(keep))
        was, is_ = (run.get(name, {}).get(keep, ()) for name in ("influence_before", "influence"))
        pulls = [second * p - first * q for p, q in zip(is_, was, strict=True)] if len(was) == len(is_) else ()
        found.append(Point(learnt, rise(keep, old, new), run["learning_rate"], tuple(pulls)))
    return found


def front(some: Sequence[Point]) -> list[Point]:
    """The points that no other one beats on both sides, from the best learnt to the best kept."""
    best: list[Point] = []
    for point in sorted(some, key=lambda p: (p.learn, p.rise)):
        if not best or point.rise < best[-1].rise:
            best.append(point)
    return best


def at(curve: Sequence[Point], learn: float) -> Point | None:
    """The front at a task loss, linearly between its runs; None beyond its ends.

    Args:
        curve: From `front`.
        learn: Task loss.
    """
    for one, two in zip(curve, [*curve[1:], curve[-1]], strict=True):
        if one.learn <= learn <= two.learn:
            share = (learn - one.learn) / (two.learn - one.learn) if two.learn > one.learn else 0.0
            same = len(one.pulls) == len(two.pulls)
            pulls = [(1 - share) * a + share * b for a, b in zip(one.pulls, two.pulls, strict=True)] if same else []
            return Point(learn, (1 - share) * one.rise + share * two.rise, math.nan, tuple(pulls))
    return None


def overlap(one: Sequence[Point], two: Sequence[Point]) -> tuple[float, float] | None:
    """The task losses that both fronts reach; None where there are none.

    Args:
        one: Points of a front.
        two: Points of another.
    """
    if not one or not two:
        return None
    low, high = max(one[0].learn, two[0].learn), min(one[-1].learn, two[-1].learn)
    return (low, high) if low <= high else None


def mean_over(curve: Sequence[Point], span: tuple[float, float]) -> Point:
    """The mean of a front over a range of task losses that it covers.

    Args:
        curve: Points of a front.
        span: Lowest and highest task loss.
    """
    low, high = span
    places = [low + (high - low) * i / (_STEPS - 1) for i in range(_STEPS)]
    found = [point for place in places if (point := at(curve, min(max(place, low), high))) is not None]
    n = min(len(p.pulls) for p in found)  # none where one of them is unknown
    pulls = tuple(sum(p.pulls[i] for p in found) / len(found) for i in range(n)) if n else ()
    return Point((low + high) / 2, sum(p.rise for p in found) / len(found), math.nan, pulls)


def compared(one: Mapping[int, Sequence[Point]], two: Mapping[int, Sequence[Point]]) -> dict[str, Any]:
    """Mean difference of two methods' rises at equal task loss, paired by seed and by record, with 95 % limits.

    The error has two parts: over seeds (Student's t), and over the retained records, paired.

    Args:
        one: Seed -> the points of the first method.
        two: Seed -> those of the second.

    Returns:
        difference (first minus second; negative: the first forgets less), low, high, ratio of the rises with its own
        limits, seeds and the range of task losses; or only `why` there is nothing to compare.
    """
    pulls, rises, spans = [], [], []
    for seed in sorted(set(one) & set(two)):
        a, b = front(one[seed]), front(two[seed])
        span = overlap(a, b)
        if span is None:
            continue
        first, second = mean_over(a, span), mean_over(b, span)
        rises.append((first.rise, second.rise))
        spans.append(span)
        if first.pulls and len(first.pulls) == len(second.pulls):
            pulls.append(list(zip(first.pulls, second.pulls, strict=True)))
    if not rises:
        return {"why": "the fronts do not overlap", "seeds": len(set(one) & set(two))}
    seeds = len(rises)
    first_mean, second_mean = (sum(pair[side] for pair in rises) / seeds for side in (0, 1))
    paired = pulls if len(pulls) == seeds else []
    over_seeds, over_records, half = _limits(rises, paired, 1.0)
    found = {
        "difference": first_mean - second_mean,
        "low": first_mean - second_mean - half,
        "high": first_mean - second_mean + half,
        "stderr_seeds": over_seeds,
        "stderr_records": over_records,
        "seeds": seeds,
        "rise": first_mean,
        "reference_rise": second_mean,
        "ratio": None,
        "from": min(low for low, _ in spans),
        "to": max(high for _, high in spans),
    }
    if second_mean > 0:
        ratio = first_mean / second_mean
        half = _limits(rises, paired, ratio)[2] / second_mean
        found |= {"ratio": ratio, "ratio_low": ratio - half, "ratio_high": ratio + half}
    return found


def _limits(
    rises: Sequence[tuple[float, float]], pulls: Sequence[Sequence[tuple[float, float]]], factor: float
) -> tuple[float | None, float | None, float]:
    """Standard errors over seeds and records of the mean of first - factor x second, and half its 95 % range.

    At the ratio of both means this is that of the ratio times the second mean (delta method). Where seeds have other
    numbers of records, they drew them apart, and records of one place are not the same ones.
    """
    seeds = len(rises)
    values = [a - factor * b for a, b in rises]
    mean = sum(values) / seeds
    over_seeds = math.sqrt(sum((v - mean) ** 2 for v in values) / (seeds - 1) / seeds) if seeds > 1 else None
    over_records = None
    if pulls and (n := max(map(len, pulls))) > 1:
        joint = [sum(p[i][0] - factor * p[i][1] for p in pulls if i < len(p)) / seeds for i in range(n)]
        over_records = math.sqrt(sum(p * p for p in joint) * n / (n - 1))
    seed_part = 0.0 if over_seeds is None else quantile(seeds - 1) * over_seeds
    return over_seeds, over_records, math.hypot(seed_part, 1.96 * (over_records or 0.0))


def quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t; 1.96 + 2.4 / df beyond 10 degrees of freedom, exact to 0.01."""
    return _T[freedom - 1] if freedom <= len(_T) else 1.96 + 2.4 / freedom
