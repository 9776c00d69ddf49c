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
        learnt = sign(learn) * after[learn]["value"]
        moved = rise(keep, before[keep]["value"], after[keep]["value"])
        found.append(Point(learnt, moved, run["learning_rate"], pulls(run, keep)))
    return found


def pulls(run: Mapping[str, Any], keep: str) -> tuple[float, ...]:
    """How every retained record pulls a run's rise, through after and before; empty where that is unknown.

    Args:
        run: A cell's results, with what its records pull.
        keep: "task/metric".
    """
    old, new = (run["scores"][side][keep]["value"] for side in ("before", "after"))
    first, second = (1 / old, 1 / new) if keep.endswith("/perplexity") else (sign(keep), sign(keep))
    was, is_ = (run.get(name, {}).get(keep, ()) for name in ("influence_before", "influence"))
    return tuple(second * p - first * q for p, q in zip(is_, was, strict=True)) if len(was) == len(is_) else ()


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


def compared(
    one: Mapping[int, Sequence[Point]], two: Mapping[int, Sequence[Point]], *, drawn: bool = False
) -> dict[str, Any]:
    """Mean difference of two methods' rises at equal task loss, paired by seed and by record, with 95 % limits.

    The error has two parts, each with Student's t: over seeds, where there are several, and over the retained records,
    paired. Limits are None where neither is known.

    Args:
        one: Seed -> the points of the first method.
        two: Seed -> those of the second.
        drawn: Every seed drew retained records of its own, so that the n-th of two seeds are not the same one.

    Returns:
        difference (first minus second; negative: the first forgets less), low, high, ratio of the rises, with limits
        where they are bounded, seeds and the range of task losses; or only `why` there is nothing to compare.
    """
    common = sorted(seed for seed in set(one) & set(two) if one[seed] and two[seed])
    if not common:
        return {"why": "no seed at which both have a finished run", "seeds": 0}
    pairs, rises, spans = [], [], []
    for seed in common:
        a, b = front(one[seed]), front(two[seed])
        span = overlap(a, b)
        if span is None:
            continue
        first, second = mean_over(a, span), mean_over(b, span)
        rises.append((first.rise, second.rise))
        spans.append(span)
        if first.pulls and len(first.pulls) == len(second.pulls):
            pairs.append(list(zip(first.pulls, second.pulls, strict=True)))
    if not rises:
        return {"why": "the fronts do not overlap", "seeds": len(common)}
    seeds = len(rises)
    first_mean, second_mean = (sum(pair[side] for pair in rises) / seeds for side in (0, 1))
    spread = _Spread(rises, pairs if len(pairs) == seeds else [], drawn)
    difference, half = first_mean - second_mean, spread.half(1.0)
    found = {
        "difference": difference,
        "low": None if half is None else difference - half,
        "high": None if half is None else difference + half,
        "stderr_seeds": spread.over_seeds(1.0),
        "stderr_records": spread.over_records(1.0),
        "seeds": seeds,
        "rise": first_mean,
        "reference_rise": second_mean,
        "ratio": None,
        "from": min(low for low, _ in spans),
        "to": max(high for _, high in spans),
    }
    if second_mean > 0:
        found["ratio"] = first_mean / second_mean
        limits = spread.ratio_limits(first_mean, second_mean)
        if limits is not None:
            found |= {"ratio_low": limits[0], "ratio_high": limits[1]}
    return found


class _Spread:
    """Errors of the mean of first - factor x second over seeds and records.

    Attributes:
        rises: Of the first method and the second, by seed.
        pulls: Of every record on both, by seed; empty where those of a seed are unknown.
        drawn: Whether records of one place are other ones in every seed; seeds with other numbers of them drew apart.
    """

    def __init__(
        self, rises: Sequence[tuple[float, float]], pulls: Sequence[Sequence[tuple[float, float]]], drawn: bool
    ) -> None:
        self.rises, self.pulls = rises, pulls
        self.drawn = drawn or len(set(map(len, pulls))) > 1

    def over_seeds(self, factor: float) -> float | None:
        """Standard error over seeds; None of a single one."""
        values, seeds = [a - factor * b for a, b in self.rises], len(self.rises)
        mean = sum(values) / seeds
        return math.sqrt(sum((v - mean) ** 2 for v in values) / (seeds - 1) / seeds) if seeds > 1 else None

    def over_records(self, factor: float) -> float | None:
        """Standard error over records, None where it is unknown.

        Records that every seed drew for itself may be the same ones, at other places: their errors then add up as if
        all were, which is the most that they can be.
        """
        if not self.pulls or min(map(len, self.pulls)) < 2:
            return None
        own = [[a - factor * b for a, b in pairs] for pairs in self.pulls]
        if self.drawn:
            return sum(map(error, own)) / len(own)
        return error([sum(of_record) / len(own) for of_record in zip(*own, strict=True)])

    def half(self, factor: float) -> float | None:
        """Half the 95 % range; None where no error is known."""
        over_seeds, over_records = self.over_seeds(factor), self.over_records(factor)
        if over_seeds is None and over_records is None:
            return None
        seed_part = 0.0 if over_seeds is None else quantile(len(self.rises) - 1) * over_seeds
        record_part = 0.0 if over_records is None else quantile(min(map(len, self.pulls)) - 1) * over_records
        return math.hypot(seed_part, record_part)

    def ratio_limits(self, first: float, second: float) -> tuple[float, float] | None:
        """Fieller's limits of first / second: every factor at which first - factor x second is within its range of 0.

        None where they are not bounded, which is where the second mean is within its own range of 0.

        Args:
            first: Mean over seeds.
            second: Mean over seeds.
        """
        halves = [self.half(factor) for factor in (-1.0, 0.0, 1.0)]
        if None in halves:
            return None
        below, none, above = (half * half for half in halves if half is not None)
        # half(f)² = none + f (above - below) / 2 + f² ((above + below) / 2 - none): the limits solve af² + bf + c = 0.
        a = second**2 - ((above + below) / 2 - none)
        b = -2 * first * second - (above - below) / 2
        c = first**2 - none
        if a <= 0:
            return None
        root = math.sqrt(max(b * b - 4 * a * c, 0.0))
        return (-b - root) / (2 * a), (-b + root) / (2 * a)


def error(pulls: Sequence[float]) -> float:
    """Standard error of a mean that records pull so far each; there are two of them or more."""
    return math.sqrt(sum(p * p for p in pulls) * len(pulls) / (len(pulls) - 1))


def quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t; beyond 10 degrees of freedom the expansion in 1 / df, exact to 0.001.

    Args:
        freedom: Degrees of freedom.
    """
    return (
        _T[freedom - 1] if freedom <= len(_T) else 1.95996 + 2.3723 / freedom + 2.8225 / freedom**2 + 2.556 / freedom**3
    )
