"""Several processes of one run (torchrun, accelerate launch): what they share out and what they tell each other.

Everything goes through torch.distributed as JSON or plain tensors; no Python object is rebuilt from what is received.
"""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor

from corda import errors
from corda.errors import CordaError

T = TypeVar("T")
_BUCKET = 64 << 20  # bytes; smaller tensors are added up together
_PATIENCE = timedelta(days=2)  # one process may evaluate or write for hours while the others wait


@dataclass(frozen=True)
class Processes:
    """The processes that work together, as one of them sees them. Every method is called by all of them.

    Attributes:
        rank: Which one this is, from 0.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            self.hear(None)

    def tell(self, value: Any, source: int = 0) -> Any:
        """The JSON value that process `source` has."""
        if self.size == 1:
            return value
        own = json.dumps(value).encode() if self.rank == source else b""
        return json.loads(self._send(own, source))

    def hear(self, value: Any) -> list[Any]:
        """Every process's JSON value, in order of rank."""
        if self.size == 1:
            return [value]
        own = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=_place())
        sizes = [torch.zeros(1, dtype=torch.int64, device=_place()) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([own.numel()], dtype=torch.int64, device=_place()))
        longest = max(int(size) for size in sizes)
        parts = [torch.empty(longest, dtype=torch.uint8, device=_place()) for _ in range(self.size)]
        dist.all_gather(parts, torch.nn.functional.pad(own, (0, longest - own.numel())))
        return [json.loads(bytes(p[: int(n)].tolist())) for p, n in zip(parts, sizes, strict=True)]

    def share(self, tensors: Mapping[str, Tensor], source: int) -> dict[str, Tensor]:
        """The tensors that one process has, on the CPU.

        Args:
            tensors: Name -> tensor of any shape; only those of `source` count.
            source: Its rank.
        """
        if self.size == 1:
            return dict(tensors)
        own = bytes_of({k: t.cpu().contiguous() for k, t in tensors.items()}) if self.rank == source else b""
        found: dict[str, Tensor] = tensors_of(self._send(own, source))
        return found

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in place; the same bits on every process.

        Args:
            tensors: Of one dtype and device, of the same shapes on every process; contiguous.
        """
        if self.size == 1:
            return
        waiting: list[Tensor] = []
        for tensor in tensors:
            if tensor.numel() * tensor.element_size() >= _BUCKET:
                self._reduce(tensor)
                continue
            waiting.append(tensor)
            if sum(t.numel() * t.element_size() for t in waiting) >= _BUCKET:
                self._add_bucket(waiting)
                waiting = []
        if waiting:
            self._add_bucket(waiting)

    def agree(self, work: Callable[[], T]) -> T:
        """work() on every process; an error that corda raises on purpose on one of them is raised on all.

        Raises:
            CordaError: the first process's in order of rank, with its rank where it is not this one.
        """
        own: CordaError | None = None
        result: T | None = None
        try:
            result = work()
        except CordaError as error:
            own = error
        if self.size > 1:
            for told in self.hear(own and described(own)):
                if told is not None:
                    raised = own or _rebuilt(told)
                    raised.shared = True
                    raise raised
        elif own is not None:
            raise own
        return cast(T, result)

    def first_only(self, work: Callable[[], None]) -> None:
        """work() on the first process while the others wait; its errors are raised on all.

        Raises:
            CordaError: see above.
        """
        self.agree(work if self.first else lambda: None)

    def _send(self, own: bytes, source: int) -> bytes:
        place = _place()
        size = torch.tensor([len(own)], dtype=torch.int64, device=place)
        dist.broadcast(size, source)
        if self.rank == source:
            buffer = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(place)
        else:
            buffer = torch.empty(int(size), dtype=torch.uint8, device=place)
        dist.broadcast(buffer, source)
        return buffer.cpu().numpy().tobytes()

    def _add_bucket(self, tensors: Sequence[Tensor]) -> None:
        flat = torch.cat([t.reshape(-1) for t in tensors])
        self._reduce(flat)
        for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def _reduce(self, tensor: Tensor) -> None:
        if _place().type == tensor.device.type or (tensor.device.type == "cpu" and _on_cpu()):
            dist.all_reduce(tensor)
            return
        moved = tensor.to(_place())
        dist.all_reduce(moved)
        tensor.copy_(moved)


ALONE = Processes()


def world() -> Processes:
    """The processes of torch.distributed's default group; this one alone where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return Processes(dist.get_rank(), dist.get_world_size())


@contextmanager
def joined(*, cpu: bool) -> Iterator[Processes]:
    """Inside, the processes that a launcher has started are connected; nothing happens without a launcher.

    They stay connected until the process ends: gloo does not connect the same processes a second time.

    Args:
        cpu: Compute on CPUs even where there are GPUs.
    """
    if world().size > 1 or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield world()
        return
    gpus = torch.cuda.is_available() and not cpu
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=_PATIENCE)
    atexit.register(_part)
    yield world()


def _part() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def dealt(items: Sequence[T], processes: Processes) -> list[T]:
    """This process's share of items that cost alike with their neighbours: every size-th of them.

    Args:
        items: In an order that all processes share.
        processes: How many there are and which one this is.
    """
    return list(items[processes.rank :: processes.size])


def by_cost(costs: Sequence[float], size: int) -> list[int]:
    """Which of `size` processes takes which item: the costliest first, each to the one with the least so far.

    Args:
        costs: Each item's, in any unit.
        size: Number of processes.

    Returns:
        Rank of every item.
    """
    loads = [0.0] * size
    owner = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner[item] = min(range(size), key=lambda rank: (loads[rank], rank))
        loads[owner[item]] += costs[item]
    return owner


def described(error: CordaError) -> dict[str, Any]:
    """An error as JSON."""
    parts = {key: None if (v := getattr(error, key)) is None else str(v) for key in ("where", "got", "expected", "fix")}
    return {"type": type(error).__name__, "what": error.what, **parts}


def _rebuilt(told: Mapping[str, Any]) -> CordaError:
    parts = {key: told[key] for key in ("where", "got", "expected", "fix")}
    kind = getattr(errors, told["type"], CordaError)
    rebuilt: CordaError = kind(told["what"], **parts)
    return rebuilt


def _on_cpu() -> bool:
    return "gloo" in dist.get_backend() or "mpi" in dist.get_backend()


def _place() -> torch.device:
    """Where tensors must be to be sent."""
    return torch.device("cpu") if _on_cpu() else torch.device("cuda", torch.cuda.current_device())
