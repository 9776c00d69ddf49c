"""Several batches side by side on a CPU, each thread with sums of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from corda.context.capture import Capture
from corda.targets import LayerSpec

Item = TypeVar("Item")
Result = TypeVar("Result")

# Wider layers keep all cores busy by themselves, and a second set of sums would cost memory.
WIDTH_LIMIT = 2048
_MOST = 4


def lanes_for(layers: Sequence[LayerSpec], device: torch.device) -> int:
    """How many batches are run side by side: torch's threads, up to 4, for narrow layers on a CPU; else one.

    Args:
        layers: Target layers.
        device: To compute on.
    """
    if device.type != "cpu" or max((layer.d_in for layer in layers), default=0) > WIDTH_LIMIT:
        return 1
    return min(_MOST, torch.get_num_threads())


class Threads:
    """n threads, each of which always takes the same place in a row of items.

    Attributes:
        count: n.
    """

    def __init__(self, count: int, share: int) -> None:
        self.count, self._share = count, share
        self._local = threading.local()
        self._pools = [
            ThreadPoolExecutor(1, initializer=self._begin, initargs=(lane,))
            for lane in range(count if count > 1 else 0)
        ]

    @property
    def lane(self) -> int:
        """Of the thread that asks; 0 outside of them."""
        return int(getattr(self._local, "lane", 0))

    def run(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """work(item) of at most n items, item i in thread i, without gradients; results in order."""
        if self.count == 1:
            return [work(item) for item in items]
        running = [pool.submit(self._alone, work, item) for pool, item in zip(self._pools, items, strict=False)]
        return [one.result() for one in running]

    def close(self) -> None:
        """End the threads."""
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)

    def _begin(self, lane: int) -> None:
        self._local.lane = lane

    def _alone(self, work: Callable[[Item], Result], item: Item) -> Result:
        torch.set_num_threads(self._share)  # every time: in between, others may set what holds for all threads
        with torch.no_grad():
            return work(item)


@contextmanager
def lanes(count: int) -> Iterator[Threads]:
    """Threads that share torch's own between them; at the end torch has as many as before.

    They are started once for a whole collection: what the libraries below set aside for a thread is not given back.
    """
    before = torch.get_num_threads()
    threads = Threads(count, max(1, before // count))
    try:
        yield threads
    finally:
        threads.close()
        if count > 1:
            torch.set_num_threads(before)


class Lanes(Capture):
    """A capture that several threads feed.

    Batch i goes to lane i mod n, whose sums are its own until `merge` adds them in the order of lanes: so the result
    depends on n and on nothing else. With n = 1 it is a plain capture.
    """

    def __init__(self, layers: Sequence[LayerSpec], threads: Threads, device: torch.device | str = "cpu") -> None:
        super().__init__(layers, device)
        self._threads = threads
        self._others = [Capture(layers) for _ in range(threads.count - 1)]

    def merge(self) -> None:
        """Add the other lanes' sums to the first lane's, which are this object's own.

        Raises:
            CalibrationError: layers share an input in some lanes only.
        """
        for other in self._others:
            for name, group in other.groups.items():
                self._set_group(name, group)
            for group, sums in other.accumulators.items():
                if group in self.accumulators:
                    self.accumulators[group].total += sums.total
                    self.accumulators[group].tokens += sums.tokens
                else:
                    self.accumulators[group] = sums
            other.accumulators.clear()

    def begin(self, counts: Tensor | None) -> None:
        """Open a batch in the lane of this thread."""
        mine = self._mine()
        super().begin(counts) if mine is self else mine.begin(counts)

    def end(self) -> None:
        """Close it."""
        mine = self._mine()
        super().end() if mine is self else mine.end()

    def see(self, name: str, x: Tensor) -> None:
        """Take an input x, (..., d_in), of the layer `name` in the lane of this thread; see `Capture.see`.

        Args:
            name: Full dotted name of the layer.
            x: Its input, (..., d_in).
        """
        mine = self._mine()
        super().see(name, x) if mine is self else mine.see(name, x)

    def see_experts(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take the inputs of experts in the lane of this thread; see `Capture.see_experts`.

        Args:
            name: Full dotted name of the module.
            module: Holds the stacked parameters.
            args: Positional arguments of its forward.
            kwargs: Keyword arguments of its forward.
        """
        mine = self._mine()
        see = super().see_experts if mine is self else mine.see_experts
        see(name, module, args, kwargs)

    def _mine(self) -> Capture:
        lane = self._threads.lane
        return self if lane == 0 else self._others[lane - 1]
