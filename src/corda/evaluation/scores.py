"""One measured value with its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from corda.errors import DataError


@dataclass(frozen=True)
class Score:
    """A mean over records.

    Attributes:
        value: The mean.
        stderr: Its standard error over records; as large as the value itself where one record tells nothing of it.
        n: Records.
    """

    value: float
    stderr: float
    n: int

    def as_json(self) -> dict[str, Any]:
        """Plain dict."""
        return asdict(self)


def mean(values: Sequence[float]) -> Score:
    """Mean of equally weighted values."""
    return ratio(values, [1.0] * len(values))


def ratio(sums: Sequence[float], weights: Sequence[float]) -> Score:
    """Σ sums / Σ weights, with the standard error of that ratio over records (linearised)."""
    n, total = len(sums), sum(weights)
    if n == 0 or total == 0:
        raise DataError("nothing to measure", got=f"{n} records", expected="at least one with an answer")
    value = sum(sums) / total
    if n == 1:
        return Score(value, abs(value), n)
    residual = sum((s - value * w) ** 2 for s, w in zip(sums, weights, strict=True))
    return Score(value, math.sqrt(residual * n / (n - 1)) / total, n)
