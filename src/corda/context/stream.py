"""Collect one block after the other, so that memory does not grow with depth."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from corda import artifact
from corda.context.blocks import block_arguments, run_block
from corda.context.capture import Capture, Captured, hooked
from corda.context.keeping import Keeping
from corda.context.lanes import Lanes, Threads, lanes, lanes_for
from corda.data.batches import Batch
from corda.distributed import ALONE, Processes
from corda.errors import ResourceError
from corda.journal import Journal
from corda.offload import LazyWeights
from corda.progress import Progress
from corda.sharding import device_of, is_spread
from corda.targets import LayerSpec


def streamed(
    model: PreTrainedModel,
    body: nn.Module,
    blocks: Sequence[tuple[str, nn.Module]],
    rounds: Sequence[Sequence[Batch]],
    layers: Sequence[LayerSpec],
    *,
    inputs_of: Callable[[Batch], dict[str, Any]],
    journal: Journal | None,
    progress: Progress,
    weights: LazyWeights | None = None,
    device: torch.device | None = None,
    processes: Processes = ALONE,
    keeping: Keeping | None = None,
) -> Iterator[Captured]:
    """Run the calibration set through one block at a time and yield each block's covariances.

    Hidden states of the whole set wait on the CPU between blocks: tokens x d x bytes. A block whose part is in the
    journal is run for its hidden states only, and not even that while no later block needs them.

    Args:
        model: The whole model, for hooks.
        body: The part of it that is run.
        blocks: Name and module of each block, in order.
        rounds: Calibration batches of each round, on the CPU; every round makes a covariance of its own.
        layers: Target layers, all inside the blocks.
        inputs_of: Keyword arguments of `body` for a batch.
        journal: Finished blocks, or None.
        progress: Shows how far it is.
        weights: Where a model without weights gets those of one block at a time.
        device: To compute on; default: that of the model.
        processes: Those that run other batches of the same rounds; their sums are added up block by block.
        keeping: Whether covariances stay in the journal; without, they do. Those that do not are let go.

    Raises:
        ResourceError: what is to be kept of all blocks and rounds does not fit on the disk; found out after the first
            block of the first round.
    """
    device = device or device_of(model)
    modules = [block for _, block in blocks]
    members = [[layer for layer in layers if layer.name.startswith(f"{name}.")] for name, _ in blocks]
    keeping = keeping or Keeping()
    if journal is not None:
        keeping.resume(journal)
    known = _known(journal if keeping.kept is not False else None, len(blocks), len(rounds), processes)
    if any(part for row in known for part in row):
        keeping.settle(True, "some of them were on the disk already")
    needed = max((i for i in range(len(blocks)) if members[i] and None in known[i]), default=-1)
    missing = sum(_width(members[i]) for i in range(len(blocks)) for part in known[i] if part is None)
    with lanes(1 if is_spread(model) else lanes_for(layers, device)) as threads:
        march = _March(body, modules, inputs_of, rounds, threads, device)
        for index in progress(range(len(blocks)), "collect", len(blocks)):
            started = time.perf_counter()
            with ExitStack() as stack:
                if weights is not None and index <= needed:
                    embedding = model.get_input_embeddings()
                    stack.enter_context(weights.on(embedding, _name_of(model, embedding), device))
                    stack.enter_context(weights.on(modules[index], blocks[index][0], device))
                for r in range(len(rounds)):
                    done = known[index][r]
                    if index <= needed:
                        capture = Lanes(members[index] if done is None else [], threads, device)
                        with hooked(model, capture):
                            march.through(index, r, capture)
                        capture.merge()
                        if processes.size == 1:
                            capture.check_finite()
                        if done is None and members[index]:
                            done = capture.captured(r, processes)
                            capture.accumulators.clear()  # a reader may stop here for long
                            if journal is not None:
                                parts, missing = missing / _width(members[index]), 0
                                need = int(done.bytes * parts)  # of all blocks, asked for before the second one is run
                                room = functools.partial(_room, journal, need, processes)
                                keep = functools.partial(_kept, journal, _key(index, r), done, processes)
                                if keeping.kept is None:
                                    took = time.perf_counter() - started
                                    kept = keeping.weigh(took, room, keep, parts, journal)
                                else:
                                    kept = (room(), keep())[1] if keeping.kept else None
                                done = kept or replace(done, packed={})
                    if done is not None:
                        yield done
                        del done


class _March:
    """The hidden states of every batch of every round, on the CPU, on their way through the blocks."""

    def __init__(
        self,
        body: nn.Module,
        modules: Sequence[nn.Module],
        inputs_of: Callable[[Batch], dict[str, Any]],
        rounds: Sequence[Sequence[Batch]],
        threads: Threads,
        device: torch.device,
    ) -> None:
        self._body, self._modules, self._inputs_of = body, modules, inputs_of
        self._rounds, self._threads, self._device = rounds, threads, device
        self._states: list[list[Tensor]] = [[] for _ in rounds]
        self._wrap: Callable[[Tensor], Any] = lambda states: states

    def through(self, index: int, round_: int, capture: Lanes) -> None:
        """Run one block on one round's batches, as many at a time as there are threads."""
        parts, states, count = self._rounds[round_], self._states[round_], self._threads.count
        run = functools.partial(_run, self._modules[index], capture)
        for first in range(0, len(parts), count):
            ready = [self._ready(index, round_, b) for b in range(first, min(first + count, len(parts)))]
            ran = self._threads.run(run, ready)
            states[first : first + count] = [out.cpu() for out, _ in ran]
            self._wrap = ran[-1][1]

    def _ready(self, index: int, round_: int, b: int) -> _Ready:
        batch = self._rounds[round_][b].to(self._device)
        entering, args, kwargs = block_arguments(self._body, self._modules, index, self._inputs_of(batch), self._wrap)
        states = self._states[round_][b].to(self._device) if index else entering
        return _Ready(batch.counts, states, args, kwargs)


@dataclass(frozen=True)
class _Ready:
    """All that a block is called with for one batch, and which of its tokens count."""

    counts: Tensor
    states: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _run(block: nn.Module, capture: Capture, ready: _Ready) -> tuple[Tensor, Callable[[Tensor], Any]]:
    with capture.batch(ready.counts):
        return run_block(block, ready.states, ready.args, ready.kwargs)


def _known(journal: Journal | None, blocks: int, rounds: int, processes: Processes) -> list[list[Captured | None]]:
    """What the journal has, as the first process finds it."""
    if journal is None:
        return [[None] * rounds for _ in range(blocks)]
    verify = processes.first
    found = [[Captured.noted(journal, _key(i, r), verify=verify) for r in range(rounds)] for i in range(blocks)]
    there = processes.tell([[part is not None for part in parts] for parts in found])
    return [[part if yes else None for part, yes in zip(*row, strict=True)] for row in zip(found, there, strict=True)]


def _kept(journal: Journal, key: str, part: Captured, processes: Processes) -> Captured:
    """The part as the journal holds it."""
    processes.first_only(lambda: journal.put(key, part.packed, part.facts()))
    kept = Captured.noted(journal, key, verify=processes.first)
    if kept is None:
        raise ResourceError("a part is not as it was written a moment ago", where=str(journal.path(key)))
    return kept


def _room(journal: Journal, need: int, processes: Processes) -> None:
    otherwise = "lower context.rounds, or with one process and no drift meter set context.covariances: recollect"
    processes.first_only(lambda: artifact.need_disk(journal.folder, need, otherwise) if need else None)


def _width(layers: Sequence[LayerSpec]) -> int:
    """What the size of a block's covariances is proportional to, where blocks share inputs alike."""
    return sum(layer.d_in**2 for layer in layers)


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    names: list[str] = [name for name, module in model.named_modules() if module is wanted]
    return names[0]


def _key(index: int, round_: int) -> str:
    return f"block-{index:04d}" + (f"-round-{round_}" if round_ else "")
