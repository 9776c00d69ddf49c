"""Whether covariances stay on disk for planning or are collected again whenever they are needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor

from corda.context.capture import Captured
from corda.errors import ArtifactError, ResourceError
from corda.recipe import TWO_CONTEXTS, Covariances, Recipe

# Planning again, looking into a context and resuming need no model where covariances are kept: worth this many seconds.
WORTH = 30.0


class Keeping:
    """Decides after the first block, from what collecting and writing its covariances took.

    Args:
        wanted: disk and recollect are obeyed; auto takes the cheaper one.
        readings: How often planning and the drift meter go through all covariances.

    Attributes:
        kept: Whether covariances stay on disk; None while undecided.
        why: The comparison in words.
    """

    def __init__(self, wanted: Covariances = "disk", readings: int = 1) -> None:
        self.readings = readings
        self.kept = {"disk": True, "recollect": False}.get(wanted)
        self.why = "" if self.kept is None else f"context.covariances is {wanted}"

    def weigh(self, collect: float, write: Callable[[], Captured | None], parts: float) -> Captured | None:
        """Keep the first part on trial.

        Args:
            collect: Seconds that collecting it took.
            write: Keeps it.
            parts: How many times its size all blocks and rounds come to.

        Returns:
            The part as kept, or None where covariances are not.
        """
        started = time.perf_counter()
        try:
            part = write()
        except ResourceError as error:
            self.kept, self.why = False, f"they do not fit on the disk ({error.got}, needed: {error.expected})"
            return None
        keeping = (time.perf_counter() - started) * parts * (1 + self.readings)
        again = collect * parts * self.readings
        self.kept = keeping <= again + WORTH
        self.why = f"writing and reading them takes about {keeping:.1f} s, collecting again {again:.1f} s"
        return part if self.kept else None


def readings(recipe: Recipe) -> int:
    """How often a recipe's plan and drift meter go through the covariances of all blocks.

    Args:
        recipe: With adapter, context and training options.
    """
    chosen = recipe.context.selection == "dynamic" or recipe.adapter.allocation == "dynamic"
    by_theta = recipe.adapter.mode in TWO_CONTEXTS and recipe.adapter.allocation == "dynamic"
    surveyed = chosen and (recipe.context.selection == "dynamic" or not by_theta)
    metered = recipe.metered * (1 + (recipe.context.held_out > 0))
    return 1 + surveyed + by_theta + metered


class NotKept(Mapping[str, Tensor]):
    """The covariances of a context that has none on disk, where there is no model to collect them again with.

    Args:
        names: Every candidate.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        raise ArtifactError(
            "the covariances of this context were not kept", where=name, fix="collect with context.covariances: disk"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
