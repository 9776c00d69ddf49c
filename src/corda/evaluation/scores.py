"""One measured value with its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """A mean over records.

    Attributes:
        value: The mean.
        stderr: Its standard error over records.
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
    value = sum(sums) / total
    if n < 2:
        return Score(value, math.inf if n == 0 else 0.0, n)
    residual = sum((s - value * w) ** 2 for s, w in zip(sums, weights, strict=True))
    return Score(value, math.sqrt(residual * n / (n - 1)) / total, n)
