"""Collect one block after the other, so that memory does not grow with depth."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from corda import artifact
from corda.context.blocks import block_arguments, run_block
from corda.context.capture import Capture, Captured, hooked
from corda.context.feeding import feeder
from corda.context.keeping import Keeping
from corda.context.lanes import Lanes, Threads, lanes, lanes_for
from corda.context.route import Route
from corda.distributed import ALONE, Processes
from corda.errors import ResourceError
from corda.journal import Journal
from corda.offload import LazyWeights
from corda.progress import Progress, silent
from corda.sharding import device_of, is_spread
from corda.targets import LayerSpec


def streamed(
    model: PreTrainedModel,
    route: Route,
    layers: Sequence[LayerSpec],
    *,
    journal: Journal | None = None,
    progress: Progress = silent,
    weights: LazyWeights | None = None,
    device: torch.device | None = None,
    processes: Processes = ALONE,
    keeping: Keeping | None = None,
) -> Iterator[Captured]:
    """Run the calibration set through one block at a time and yield each block's covariances, round after round.

    Hidden states of the whole set wait on the CPU between blocks: tokens x d x bytes. A block whose part is in the
    journal is run for its hidden states only, and not even that while no later block needs them.

    Args:
        model: The whole model, for hooks.
        route: Blocks, the body that they are part of, and the batches of every round, on the CPU.
        layers: Target layers, all inside the blocks.
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
    assert route.blocks is not None
    blocks, rounds, device = route.blocks, route.rounds, device or device_of(model)
    members = [[layer for layer in layers if layer.name.startswith(f"{name}.")] for name, _ in blocks]
    keeping = keeping or Keeping()
    if journal is not None:
        keeping.resume(journal)
    known = _known(journal if keeping.kept is not False else None, len(blocks), len(rounds), processes)
    if any(part for row in known for part in row):
        keeping.settle(True, "some of them were on the disk already")
    needed = max((i for i in range(len(blocks)) if members[i] and None in known[i]), default=-1)
    missing = sum(_width(members[i]) for i in range(len(blocks)) for part in known[i] if part is None)
    shelf = _Shelf(journal, keeping, processes, missing)
    with lanes(1 if is_spread(model) else lanes_for(layers, device)) as threads:
        march = _March(model, route, threads, device, checked=processes.size == 1)
        for index in progress(range(len(blocks)), "collect", len(blocks)):
            started = time.perf_counter()
            with _present(model, blocks[index], weights if index <= needed else None, device):
                for r in range(len(rounds)):
                    done = known[index][r]
                    wanted = members[index] if done is None else []
                    if index <= needed:
                        capture = march.through(index, r, wanted)
                        fresh = capture.captured(r, processes) if wanted else None
                        del capture  # its sums are in `fresh`
                        if fresh is not None:
                            done = shelf.put(_key(index, r), fresh, _width(wanted), started)
                        del fresh  # a reader may stop here for long
                    if done is not None:
                        yield done
                        del done


@contextmanager
def _present(
    model: PreTrainedModel, block: tuple[str, nn.Module], weights: LazyWeights | None, device: torch.device
) -> Iterator[None]:
    """A block's weights and those of the embedding, for a model that has none of its own."""
    with ExitStack() as stack:
        if weights is not None:
            embedding = model.get_input_embeddings()
            stack.enter_context(weights.on(embedding, _name_of(model, embedding), device))
            stack.enter_context(weights.on(block[1], block[0], device))
        yield


class _Shelf:
    """Keeps parts in a journal or lets them go, as was decided; the first part decides.

    Args:
        journal: Where, or None: parts stay in memory.
        keeping: The decision.
        processes: Those that share the collection.
        missing: Widths of all parts that are to come.
    """

    def __init__(self, journal: Journal | None, keeping: Keeping, processes: Processes, missing: int) -> None:
        self._journal, self._keeping, self._processes, self._missing = journal, keeping, processes, missing

    def put(self, key: str, part: Captured, width: int, started: float) -> Captured:
        """The part as kept, or only its facts where covariances are let go.

        Args:
            key: In the journal.
            part: With its covariances.
            width: What its size is proportional to.
            started: When its block began, in `time.perf_counter`.

        Raises:
            ResourceError: all parts that are to come, which the first one answers for, do not fit on the disk.
        """
        if self._journal is None:
            return part
        parts, self._missing = self._missing / width, 0
        room = functools.partial(_room, self._journal, int(part.bytes * parts), self._processes)
        keep = functools.partial(_kept, self._journal, key, part, self._processes)
        if self._keeping.kept is None:
            kept = self._keeping.weigh(time.perf_counter() - started, room, keep, parts, self._journal)
        else:
            kept = (room(), keep())[1] if self._keeping.kept else None
        return kept or replace(part, packed={})


class _March:
    """The hidden states of every batch of every round, on the CPU, on their way through the blocks.

    Args:
        model: For hooks and inputs.
        route: Blocks, body and batches.
        threads: That run batches side by side.
        device: To compute on.
        checked: Whether sums have to be finite already; those of several processes are looked at when added up.
    """

    def __init__(
        self, model: PreTrainedModel, route: Route, threads: Threads, device: torch.device, *, checked: bool
    ) -> None:
        self._model, self._body, self._inputs_of = model, route.body, feeder(model)
        self._modules = [block for _, block in route.blocks or ()]
        self._rounds, self._threads, self._device, self._checked = route.rounds, threads, device, checked
        self._states: list[list[Tensor]] = [[] for _ in route.rounds]
        self._wrap: Callable[[Tensor], Any] = lambda states: states

    def through(self, index: int, round_: int, layers: Sequence[LayerSpec]) -> Lanes:
        """Run one block on one round's batches, as many at a time as there are threads; what it saw of `layers`."""
        parts, states, count = self._rounds[round_], self._states[round_], self._threads.count
        capture = Lanes(layers, self._threads, self._device)
        run = functools.partial(_run, self._modules[index], capture)
        with hooked(self._model, capture):
            for first in range(0, len(parts), count):
                ready = [self._ready(index, round_, b) for b in range(first, min(first + count, len(parts)))]
                ran = self._threads.run(run, ready)
                states[first : first + count] = [out.cpu() for out, _ in ran]
                self._wrap = ran[-1][1]
        capture.merge()
        if self._checked:
            capture.check_finite()
        return capture

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
