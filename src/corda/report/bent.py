"""An axis that is linear near zero and logarithmic beyond, for changes of either sign that span decades."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bent:
    """y -> asinh(y / unit).

    Attributes:
        unit: Up to about here the axis is linear; in the units of what is drawn.
    """

    unit: float

    @classmethod
    def of(cls, errors: Iterable[float]) -> Bent:
        """Linear up to the median standard error, rounded down to a power of ten: what is less is noise.

        Args:
            errors: Standard errors of what is drawn.
        """
        known = sorted(error for error in errors if error > 0)
        return cls(10.0 ** math.floor(math.log10(known[len(known) // 2])) if known else 0.01)

    def __call__(self, value: float) -> float:
        """Where a value lies on the axis."""
        return math.asinh(value / self.unit)

    def ticks(self, values: Sequence[float]) -> tuple[list[float], list[str]]:
        """Places and texts of the ticks that reach just beyond the values.

        Args:
            values: What is drawn, in its own units.
        """
        low, high = min([*values, 0.0]), max([*values, 0.0])
        sizes = [self.unit]
        while sizes[-1] < max(-low, high):
            sizes.append(sizes[-1] * (3 if len(sizes) % 2 else 10 / 3))
        few = sizes if len(sizes) <= 6 else sizes[::2]
        beyond = [one for one in few if one <= 1.5 * high], [one for one in few if one <= -1.5 * low]
        ticks = [*(-one for one in reversed(beyond[1])), 0.0, *beyond[0]]
        return [self(tick) for tick in ticks], [f"{tick:+.3g}" if tick else "0" for tick in ticks]
