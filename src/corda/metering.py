"""Wall-clock time and peak memory of a stage."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import torch

_INTERVAL = 0.05


@dataclass
class Meter:
    """Filled stage by stage.

    Attributes:
        seconds: Stage -> wall-clock seconds.
        peak_bytes: Stage -> highest resident memory of the process (sampled), or of the GPU where there is one.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the body as stage `name`."""
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        process = psutil.Process()
        peak = process.memory_info().rss
        done = threading.Event()

        def sample() -> None:
            nonlocal peak
            while not done.wait(_INTERVAL):
                peak = max(peak, process.memory_info().rss)

        watcher = threading.Thread(target=sample, daemon=True)
        watcher.start()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - start
            done.set()
            watcher.join()
            self.peak_bytes[name] = torch.cuda.max_memory_allocated() if cuda else peak
