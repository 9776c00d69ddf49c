"""Bytes of tensors that are alive, counted at every operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Inside, every tensor that an operation of this thread takes or gives is counted until its storage is freed.

    Views count once, with the whole storage behind them. What an operation allocates and frees inside itself is not
    seen.

    Attributes:
        peak: The most bytes alive at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        known = self._alive.get(key)
        if known is not None and not known[0].expired():
            return
        self._alive[key] = (StorageWeakRef(storage), storage.nbytes())
        self._now += storage.nbytes() - (known[1] if known else 0)
        if self._now > self.peak:
            self._alive = {k: pair for k, pair in self._alive.items() if not pair[0].expired()}
            self._now = sum(size for _, size in self._alive.values())
            self.peak = max(self.peak, self._now)
