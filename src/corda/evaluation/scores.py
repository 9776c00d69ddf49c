"""One measured value with its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from corda.errors import DataError

_LOSSES = ("answer_loss", "perplexity", "loss")


@dataclass(frozen=True)
class Score:
    """A mean over records.

    Attributes:
        value: The mean.
        stderr: Its standard error over records; as large as the value itself where one record tells nothing of it.
        n: Records.
        influence: How much each record pulls the value from what it is; stderr² = n / (n - 1) Σ influence².
    """

    value: float
    stderr: float
    n: int
    influence: tuple[float, ...] = field(default=(), repr=False)

    def as_json(self) -> dict[str, Any]:
        """Value, stderr and n."""
        return {"value": self.value, "stderr": self.stderr, "n": self.n}

    def scaled(self, value: float, slope: float) -> Score:
        """The score of a function of this one, `value` with derivative `slope` (delta method)."""
        pulls = tuple(slope * pull for pull in self.influence)
        return Score(value, abs(slope) * self.stderr, self.n, pulls)


def sign(metric: str) -> int:
    """1 where less is better, -1 where more is.

    Args:
        metric: "task/metric".
    """
    return 1 if metric.rpartition("/")[2] in _LOSSES else -1


def rise(metric: str, before: float, after: float) -> float:
    """How much worse a score got: positive where something was forgotten.

    Of a perplexity it is the rise of its logarithm, the loss in nats per token: a few runs that have lost the language
    would otherwise decide every mean.

    Args:
        metric: "task/metric".
        before: Of the base.
        after: Of the trained model.
    """
    return math.log(after / before) if metric.endswith("/perplexity") else sign(metric) * (after - before)


def change(before: Score, after: Score) -> Score:
    """after - before on the same records: the error is that of paired differences."""
    value, n = after.value - before.value, after.n
    if n < 2 or len(before.influence) != n or len(after.influence) != n:
        return Score(value, math.hypot(before.stderr, after.stderr), n)
    pulls = tuple(a - b for a, b in zip(after.influence, before.influence, strict=True))
    return Score(value, math.sqrt(sum(p * p for p in pulls) * n / (n - 1)), n, pulls)


def mean(values: Sequence[float]) -> Score:
    """Mean of equally weighted values."""
    return ratio(values, [1.0] * len(values))


def ratio(sums: Sequence[float], weights: Sequence[float]) -> Score:
    """Σ sums / Σ weights, with the standard error of that ratio over records (linearised).

    Raises:
        DataError: there is no record, or the weights sum to 0.
    """
    n, total = len(sums), sum(weights)
    if n == 0 or total == 0:
        raise DataError("nothing to measure", got=f"{n} records", expected="at least one with an answer")
    value = sum(sums) / total
    if n == 1:
        return Score(value, abs(value), n)
    pulls = tuple((s - value * w) / total for s, w in zip(sums, weights, strict=True))
    return Score(value, math.sqrt(sum(p * p for p in pulls) * n / (n - 1)), n, pulls)
