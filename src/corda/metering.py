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
        device: That the run computes on, as in a recipe; "all": every GPU there is.
        seconds: Stage -> wall-clock seconds.
        peak_bytes: Stage -> highest memory of the device's GPU, summed over several; of a run on a CPU the process's
            resident memory (sampled).
    """

    device: str = "auto"
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the body as stage `name`."""
        gpus = _gpus(self.device)
        for gpu in gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
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
            self.peak_bytes[name] = sum(map(torch.cuda.max_memory_allocated, gpus)) if gpus else peak


def _gpus(device: str) -> list[int]:
    if device == "cpu" or not torch.cuda.is_available():
        return []
    current = torch.cuda.current_device()  # begins CUDA; what is asked of a GPU by its number does not
    if device == "all":
        return list(range(torch.cuda.device_count()))
    index = torch.device("cuda" if device == "auto" else device).index
    return [current if index is None else index]
