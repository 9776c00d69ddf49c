"""Covariances that are not kept: the calibration set goes through the blocks again, one block's are in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from corda.context.capture import Captured
from corda.context.rounds import share
from corda.context.route import find_route
from corda.context.routing import rows_a_pass
from corda.context.stream import streamed
from corda.data.batches import Encoded
from corda.distributed import ALONE
from corda.errors import ArtifactError
from corda.offload import LazyWeights
from corda.sharding import device_of
from corda.targets import LayerSpec


class Recollected(Mapping[str, Tensor]):
    """Covariances by collecting again, block after block: the block asked for last is in memory, with all rounds.

    Meant to be gone through in order, as planning does, by one thread; going back starts from the first block.

    Args:
        names: Every candidate.
        march: Starts a collection; yields each block's rounds one after the other, as `streamed` does.
        rounds: Parts that a block comes in.
        threads: Of torch, that the first collection had: the sums are its own then, bit for bit.
    """

    def __init__(
        self, names: Iterable[str], march: Callable[[], Iterator[Captured]], rounds: int, threads: int
    ) -> None:
        self._names = dict.fromkeys(names)
        self._march, self._rounds, self._threads = march, rounds, threads
        self._running: Iterator[Captured] = iter(())
        self._ahead: set[str] = set()
        self._block: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._block:
            before = torch.get_num_threads()
            torch.set_num_threads(self._threads)
            try:
                self._advance(name)
            except BaseException:
                self.close()
                raise
            finally:
                torch.set_num_threads(before)
        return self._block[name]

    def close(self) -> None:
        """Let go of the block in memory and of the march; the next one that is asked for starts anew."""
        self._running, self._ahead, self._block = iter(()), set(), {}

    def _advance(self, name: str) -> None:
        if name not in self._ahead:
            self._running, self._ahead = self._march(), set(self._names)
        while name not in self._block:
            self._block = {}  # let go before the next one is collected
            parts = [part.packed for part in itertools.islice(self._running, self._rounds)]
            self._block = {candidate: C for packed in parts for candidate, C in packed.items()}
            if not parts:
                raise ArtifactError("collecting again gave other layers", where=name, fix="collect the context again")
            self._ahead -= self._block.keys()
        if not self._ahead:
            next(self._running, None)  # the end: what it held open is closed

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def march(
    model: PreTrainedModel,
    encoded: Sequence[Sequence[Encoded]],
    layers: Sequence[LayerSpec],
    *,
    pad_token_id: int,
    batch_size: int = 8,
    response_only: bool = False,
    weights: LazyWeights | None = None,
    device: torch.device | None = None,
) -> Iterator[Captured]:
    """The parts of `collect_encoded`, block after block and round after round, each in memory until the next one.

    Args:
        model: See `collect_encoded`, as the other arguments; of one process, in blocks.
        encoded: Calibration records of every round of every side.
        layers: Target layers.
        pad_token_id: Of pads.
        batch_size: Rows per forward pass.
        response_only: Only response tokens count.
        weights: For a model without weights.
        device: To compute on.
    """
    batch_size, device = rows_a_pass(layers, batch_size, response_only), device or device_of(model)
    rounds = [share(part, ALONE, pad_token_id, batch_size, response_only=response_only, even=False) for part in encoded]
    images = any(batch.visual for parts in rounds for batch in parts)
    route = find_route(model, layers, rounds, images, ALONE, device)
    return streamed(model, route, layers, weights=weights, device=device)
