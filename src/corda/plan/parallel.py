"""Several layers at once: side by side on a CPU, and shared out over processes by what they cost.

LAPACK's decompositions of small matrices leave a second core idle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from corda.distributed import Processes, by_cost
from corda.progress import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(
    work: Callable[[Item], Result], items: Sequence[Item], *, side_by_side: bool, in_order: bool = False
) -> Iterator[Result]:
    """work(item) for every item, in order.

    Side by side, every one of torch's threads takes an item of its own and computes it alone, so that results are the
    same bits whatever the number of threads; that number is as before when the iterator ends.

    Args:
        work: Runs without gradients.
        items: What on.
        side_by_side: Else one after the other, each with all of torch's threads.
        in_order: One after the other in any case, with the bits of side by side.
    """
    if not side_by_side:
        yield from map(work, items)
        return
    threads = torch.get_num_threads()

    def alone(item: Item) -> Result:
        with torch.no_grad():
            return work(item)

    pool = ThreadPoolExecutor(1 if in_order else threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(alone, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Form(Generic[Result]):
    """How a result goes to other processes: as tensors and JSON.

    Attributes:
        packed: Result -> tensors by name, and everything else.
        unpacked: The way back.
    """

    packed: Callable[[Result], tuple[Mapping[str, Tensor], Any]]
    unpacked: Callable[[Mapping[str, Tensor], Any], Result]


def each_shared(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    costs: Sequence[float],
    form: Form[Result],
    processes: Processes,
    side_by_side: bool,
    in_order: bool,
    progress: Progress,
    what: str,
    bring: Callable[[Item, bool], None] | None = None,
) -> list[Result]:
    """work(item) for every item, in order, on every process; each does its share and gets the rest from the others.

    Args:
        work: As in `each`.
        items: The same ones on every process.
        costs: What each costs, in any unit.
        form: How results are sent.
        processes: Who shares.
        side_by_side: As in `each`.
        in_order: As in `each`.
        progress: Shows how far this process's own share is.
        what: What is done, for the display.
        bring: Called by all processes together before an item is worked on, with whether it is this one's: where
            something of the item lies with all of them. Items then go one by one.

    Raises:
        CordaError: the one that work raised, on every process.
    """
    owner = by_cost(costs, processes.size)
    shares = [[i for i in range(len(items)) if owner[i] == rank] for rank in range(processes.size)]
    own = shares[processes.rank]

    def mine() -> dict[int, Result]:
        if bring is None:
            found = each(work, [items[i] for i in own], side_by_side=side_by_side, in_order=in_order)
            return dict(zip(own, progress(found, what, len(own)), strict=True))
        return dict(zip(own, progress(together(), what, len(own)), strict=True))

    def together() -> Iterator[Result]:
        brought: Any = bring
        for turn in range(max(map(len, shares))):
            for rank, share in enumerate(shares):
                if turn < len(share):
                    brought(items[share[turn]], rank == processes.rank)
            if turn < len(own):
                yield work(items[own[turn]])

    done = processes.agree(mine)
    if processes.size == 1:
        return [done[i] for i in range(len(items))]
    results: list[Result] = []
    for i, rank in enumerate(owner):
        tensors, facts = form.packed(done[i]) if rank == processes.rank else ({}, None)
        shared = processes.share(tensors, rank)
        results.append(form.unpacked(shared, processes.tell(facts, rank)))
    return results
