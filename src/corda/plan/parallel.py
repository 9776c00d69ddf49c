"""Several layers side by side on a CPU: LAPACK's decompositions of small matrices leave a second core idle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(work: Callable[[Item], Result], items: Sequence[Item], *, side_by_side: bool) -> Iterator[Result]:
    """work(item) for every item, in order.

    Side by side, every one of torch's threads takes an item of its own and computes it alone, so that results are the
    same bits whatever the number of threads; that number is as before when the iterator ends.

    Args:
        work: Runs without gradients.
        items: What on.
        side_by_side: Else one after the other, each with all of torch's threads.
    """
    if not side_by_side:
        yield from map(work, items)
        return
    threads = torch.get_num_threads()

    def alone(item: Item) -> Result:
        with torch.no_grad():
            return work(item)

    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(alone, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
