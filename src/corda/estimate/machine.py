"""How fast and how large a device is: measured here in a few seconds, or assumed by name."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from corda import linalg
from corda.estimate.rehearse import Live
from corda.metric import Metric, damping
from corda.plan.parallel import each

_SCALED = 640  # widths that layers are scaled down to for a rehearsal of their decomposition
_SCALED_LONG = 1536
_DISK_BYTES = 1 << 26


@dataclass(frozen=True)
class Device:
    """One device of a kind, with its share of host, disk and network. Rates are per second.

    Attributes:
        name: Of the profile.
        kind: "cpu" or "cuda".
        memory: Bytes of it; on a CPU, of the machine.
        threads: Decompositions that run side by side.
        forward: FLOP of matrix products inside a forward or backward pass, in the dtype of the weights.
        products: FLOP of the triangular products.
        solve: FLOP of decompositions, by the count of `decomposition_flops`.
        disk: Bytes read or written.
        link: Bytes between host and device.
        network: Bytes between processes.
        measured: On this machine; otherwise assumed.
    """

    name: str
    kind: str
    memory: int
    threads: int
    forward: float
    products: float
    solve: float
    disk: float
    link: float
    network: float
    measured: bool

    def as_json(self) -> dict[str, Any]:
        """Plain dict."""
        return dict(vars(self))


# Data sheet: 989 TFLOP/s dense bf16, 67 fp64 on tensor cores and 67 fp32, 80 GB, PCIe 5 x16, 8 x 400 Gbit/s for 8
# cards. Assumed of that: 45 % in passes, 30 % in the products with fp32 output, 10 % in decompositions, one disk of
# 3 GB/s for 8 cards, half of link and network. Nothing here has been measured by this project.
H100 = Device("h100", "cuda", 80_000_000_000, 1, 445e12, 300e12, 6.7e12, 3e9, 25e9, 25e9, False)
PROFILES = {"h100": H100}


def decomposition_flops(d_out: int, d_in: int, rank: int, exponent: float = 1.0) -> float:
    """Nominal fp64 operations of one layer's decomposition, in the order of the path that `linalg.subspace` takes.

    Args:
        d_out: The layer's output features.
        d_in: The layer's input features.
        rank: r.
        exponent: a in W C^a.
    """
    n = min(d_out, d_in)
    metric = {0.0: 0.0, 0.5: d_in**3 / 3}.get(exponent, d_in**3 / 3)
    tall = float(d_out * d_in**2) if d_out > d_in else 0.0
    if n <= linalg.EXACT_LIMIT or rank * 8 > n:
        return tall + 2.0 * n * d_in**2 + n**2 * d_in + 9.0 * n**3
    if d_out < d_in:
        return 2.0 * n * d_in**2 + n**2 * d_in + n**3 / 3 + 24.0 * rank * d_in**2
    return tall + metric + 2 / 3 * n**3 + 40.0 * rank * n**2


def survey_flops(d_out: int, d_in: int) -> float:
    """Nominal fp64 operations of one layer's spectrum.

    Args:
        d_out: The layer's output features.
        d_in: The layer's input features.
    """
    n = min(d_out, d_in)
    return decomposition_flops(d_out, d_in, n) - 7.0 * n**3


@dataclass(frozen=True)
class Rehearsed:
    """A decomposition that was run at a smaller scale.

    Attributes:
        rate: Nominal FLOP per second of one thread's share.
        bytes: Peak of what was alive, scaled up to the layer's real size.
    """

    rate: float
    bytes: int


def rehearse_decomposition(
    d_out: int, d_in: int, rank: int, end: linalg.End, exponent: float, dtype: torch.dtype, *, side_by_side: bool
) -> Rehearsed:
    """Decompose a random layer of the same proportions, at most 640 (its long side 1536) wide.

    Args:
        d_out: Of the real layer.
        d_in: Of the real layer.
        rank: Of the real layer.
        end: Which end.
        exponent: a.
        dtype: Of the weights.
        side_by_side: As small layers are done on a CPU.
    """
    n = min(d_out, d_in)
    scale = min(1.0, _SCALED / n, _SCALED_LONG / max(d_out, d_in))
    iterates = n > linalg.EXACT_LIMIT and rank * 8 <= n
    rows, columns, r = (max(8, round(scale * x)) for x in (d_out, d_in, rank))
    r = min(r, rows, columns)
    g = torch.Generator().manual_seed(0)
    weight = (torch.randn(rows, columns, generator=g) / columns**0.5).to(dtype)
    X = torch.randn(2 * columns, columns, generator=g) * torch.logspace(0.3, -1, columns)
    second = X.T @ X / len(X)

    def work(_: int) -> None:
        W = weight.to(torch.float32, copy=dtype != torch.float32)
        C = second.clone()
        found = linalg.subspace(W, Metric(C, exponent, damping(C, 0.01)), r, end, "krylov" if iterates else "exact")
        linalg.factors(W, found, scaling=1.0, balance="equal")

    with torch.no_grad():
        with Live() as live:
            work(0)
        copies = torch.get_num_threads() if side_by_side else 1
        start = time.perf_counter()
        list(each(work, range(copies), side_by_side=side_by_side))
        seconds = (time.perf_counter() - start) / copies
    lapack = 0 if iterates else 2 * 8 * min(rows, columns) ** 2
    flops = decomposition_flops(rows, columns, r, exponent)
    if iterates:  # counted as the large layer is, not as one of that size
        flops = decomposition_flops(d_out, d_in, rank, exponent) * scale**3
    return Rehearsed(flops / seconds, round((live.peak + lapack) / scale**2))


def measure(shapes: Sequence[tuple[int, int]], width: int, folder: Path) -> Device:
    """This machine, by a few timed products and a file of 64 MiB.

    Args:
        shapes: (d_out, d_in) of the model's layers, whose products with 512 tokens are timed, at most 2048 wide.
        width: Of the covariance whose products are timed.
        folder: Where the run will write.
    """
    forward = _rate(_passes(shapes))
    products = _rate(_triangles(width))
    memory = psutil.virtual_memory().total
    return Device(
        "cpu-measured", "cpu", memory, torch.get_num_threads(), forward, products, 0.0, _disk(folder), 1e12, 1e9, True
    )


def with_solve(device: Device, rate: float) -> Device:
    """The device with a measured rate of decompositions."""
    return replace(device, solve=rate)


def _passes(shapes: Sequence[tuple[int, int]]) -> Callable[[], float]:
    x: dict[int, Tensor] = {}
    weights = [torch.randn(min(d_out, 2048), min(d_in, 2048)) for d_out, d_in in sorted(set(shapes))[:6]]

    def run() -> float:
        flops = 0.0
        for W in weights:
            d = W.shape[1]
            if d not in x:
                x[d] = torch.randn(512, d)
            torch.nn.functional.linear(x[d], W)
            flops += 2.0 * 512 * W.numel()
        return flops

    return run


def _triangles(width: int) -> Callable[[], float]:
    from corda.context.accumulator import Accumulator

    d = min(width, 2048)
    accumulator, x = Accumulator(d), torch.randn(512, d)

    def run() -> float:
        accumulator.add(x)
        return triangle_flops(d, 512)

    return run


def triangle_flops(d: int, tokens: float) -> float:
    """Operations of the block rows of a triangular product: 58 % of the full one.

    Args:
        d: Width of the input.
        tokens: How many.
    """
    return 2.0 * 0.583 * d * d * tokens


def _rate(run: Callable[[], float]) -> float:
    with torch.no_grad():
        run()
        flops, start = 0.0, time.perf_counter()
        while time.perf_counter() - start < 0.3:
            flops += run()
        return flops / (time.perf_counter() - start)


def _disk(folder: Path) -> float:
    while not folder.exists():
        folder = folder.parent
    block = os.urandom(1 << 20)
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            start = time.perf_counter()
            for _ in range(_DISK_BYTES >> 20):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
            return _DISK_BYTES / (time.perf_counter() - start)
    except OSError:
        return 1e9
