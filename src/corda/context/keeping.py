"""Whether covariances stay on disk for planning or are collected again whenever they are needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor

from corda.context.capture import Captured
from corda.errors import ArtifactError, RecipeError, ResourceError
from corda.journal import Journal
from corda.recipe import TWO_CONTEXTS, Covariances, Recipe

# Planning again, looking into a context and resuming need no model where covariances are kept: worth this many seconds.
WORTH = 30.0
_CHOICE = "choice"


class Keeping:
    """Decides after the first block, from what collecting and writing its covariances took.

    Args:
        wanted: disk and recollect are obeyed; auto takes the cheaper one.
        readings: How often planning goes through all covariances.
        why: For a choice that is made already: its reason.

    Attributes:
        kept: Whether covariances stay on disk; None while undecided.
        why: The comparison in words.
    """

    def __init__(self, wanted: Covariances = "disk", readings: int = 1, why: str = "") -> None:
        self.readings = readings
        self.kept = {"disk": True, "recollect": False}.get(wanted)
        self.why = why

    def resume(self, journal: Journal) -> None:
        """Take up the choice of an interrupted collection, where one was made.

        Args:
            journal: That of the collection.
        """
        noted = journal.facts(_CHOICE) if self.kept is None else None
        if noted is not None:
            self.kept, self.why = noted["kept"], noted["why"]

    def settle(self, kept: bool, why: str) -> None:
        """Decide for a reason other than cost, where nothing is decided yet.

        Args:
            kept: Whether covariances stay on disk.
            why: The reason.
        """
        if self.kept is None:
            self.kept, self.why = kept, why

    def weigh(
        self, collect: float, room: Callable[[], None], write: Callable[[], Captured], parts: float, journal: Journal
    ) -> Captured | None:
        """Keep the first part on trial, decide, and note the choice.

        A reading is counted as a writing: covariances that outgrow the memory come from the disk itself.

        Args:
            collect: Seconds that collecting it took.
            room: Raises ResourceError where the disk will not hold all parts.
            write: Keeps it.
            parts: How many times its size all blocks and rounds come to.
            journal: Where the choice is noted.

        Returns:
            The part as kept, or None where covariances are not.

        Raises:
            ResourceError: the folder cannot be written.
        """
        try:
            room()
        except ResourceError as error:
            self.settle(False, f"they do not fit on the disk ({error.got}, needed: {error.expected})")
            part = None
        else:
            started = time.perf_counter()
            part = write()
            keeping = (time.perf_counter() - started) * parts * (1 + self.readings)
            again = collect * parts * self.readings
            costs = f"writing and reading them takes about {keeping:.1f} s, collecting again {again:.1f} s"
            self.settle(keeping <= again + WORTH, costs)
        journal.put(_CHOICE, {}, {"kept": self.kept, "why": self.why})
        return part if self.kept else None


def keeping_of(recipe: Recipe, processes: int) -> Keeping:
    """What a recipe asks for, or what leaves no choice.

    Args:
        recipe: Of the run.
        processes: That share it.
    """
    options = recipe.context
    reasons = (
        (options.covariances != "auto", f"context.covariances is {options.covariances}"),
        (processes > 1, "several processes plan from the disk"),
        (not options.stream, "the model is not run block by block"),
        (recipe.metered, "the drift meter reads them while the adapter trains"),
    )
    why = next((text for true, text in reasons if true), "")
    if why and options.covariances == "auto":
        return Keeping("disk", why=why)
    return Keeping(options.covariances, readings(recipe), why)


def refuse_recollecting(recipe: Recipe) -> None:
    """Where covariances that are not kept would be missed.

    Args:
        recipe: Of the run.

    Raises:
        RecipeError: context.covariances is recollect, and the model is not run in blocks or a drift meter reads them.
    """
    if recipe.context.covariances != "recollect":
        return
    for true, why, fix in (
        (not recipe.context.stream, "covariances are collected again block by block", "context.stream: true"),
        (recipe.metered, "the drift meter reads covariances during training", "training.drift_meter: false"),
    ):
        if true:
            raise RecipeError(
                why, where="context.covariances", got="recollect", fix=f"set {fix}, or context.covariances: disk"
            )


def readings(recipe: Recipe) -> int:
    """How often a recipe's plan goes through the covariances of all blocks.

    Args:
        recipe: With adapter and context options.
    """
    by_theta = recipe.adapter.mode in TWO_CONTEXTS and recipe.adapter.allocation == "dynamic"
    surveyed = recipe.context.selection == "dynamic" or (recipe.adapter.allocation == "dynamic" and not by_theta)
    return 1 + surveyed + by_theta


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
