"""Progress bars with the time left, on a terminal; nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Wraps an iterable and shows how far it is."""

    def __call__(self, items: Iterable[T], what: str, total: int) -> Iterable[T]:
        """Yield the items of `items`, of which there are `total`."""


def silent(items: Iterable[T], what: str, total: int) -> Iterable[T]:
    """No display.

    Args:
        items: What to go through.
        what: Named beside the bar.
        total: How many there are.
    """
    return items


def shown(items: Iterable[T], what: str, total: int) -> Iterable[T]:
    """A bar on stderr while the items are consumed, with the time gone and left, where stderr is a terminal.

    Args:
        items: What to go through.
        what: Named beside the bar.
        total: How many there are.
    """
    from rich.console import Console  # a tenth of a second, which `corda --help` need not wait for

    console = Console(stderr=True)
    if not console.is_terminal:
        yield from items
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("gone,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        yield from bar.track(items, total=total, description=what)
