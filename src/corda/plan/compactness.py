"""How compactly a covariance holds what its data uses: π(C) of CorDA++ (arXiv 2506.13187, section on compactness)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["token", "unit"]
_EXACT = 2048
_STEPS = 60
_BLOCK = 8
_SETTLED = 1e-8


@dataclass(frozen=True)
class Compactness:
    """π(C) = √(d_out σ_max) / σ_min of the damped C, with its parts. Smaller is more compact.

    It bounds what dropping the r-th smallest component does to the output: ‖ΔY‖₁ <= π(C) σ₋ᵣ.

    Attributes:
        log_pi: log π(C), natural.
        sigma_max: Largest eigenvalue of C + λI, at the scale chosen.
        sigma_min: Smallest.
        floor: λ at the same scale; where it is most of sigma_min, damping decided and not the data.
    """

    log_pi: float
    sigma_max: float
    sigma_min: float
    floor: float

    @property
    def floor_decided(self) -> bool:
        """Whether more than half of σ_min is damping."""
        return self.floor > 0.5 * self.sigma_min


def compactness(
    C: Tensor,
    d_out: int,
    *,
    damp: float = 0.01,
    scale: Scale = "token",
    extremes: tuple[float, float] | None = None,
) -> Compactness:
    """π of a covariance for a layer with `d_out` outputs.

    Args:
        C: (d_in, d_in) second moment per token, any float type.
        d_out: Rows of the layer's weight.
        damp: Damping inside π, in units of C's mean diagonal; π has its own because σ_min >= λ decides it wherever
            there are fewer tokens than inputs.
        scale: "token": C as it is, so that π depends on the size of the activations; "unit": C divided by its mean
            diagonal, free of a factor common to all candidates.
        extremes: Smallest and largest eigenvalue of C, where they are known: layers with one input share them.

    Raises:
        ValueError: C + λI is not positive definite.
    """
    size = float(C.diagonal().double().mean())
    lam = damp * size
    smallest, largest = extremes or extreme_eigenvalues(C.double(), lam)
    smallest, largest = max(smallest, 0.0) + lam, largest + lam
    if smallest <= 0:
        raise ValueError("C is singular and not damped: π is infinite")
    unit = size if scale == "unit" else 1.0
    smallest, largest, lam = smallest / unit, largest / unit, lam / unit
    return Compactness(0.5 * math.log(d_out * largest) - math.log(smallest), largest, smallest, lam)


def from_spectrum(spectrum: Tensor, d_out: int) -> Compactness:
    """π with the extreme singular values of W C instead of C, the paper's other reading.

    Args:
        spectrum: (n,) singular values of W C, ascending.
        d_out: Output features.

    Raises:
        ValueError: the smallest is 0.
    """
    smallest, largest = float(spectrum.min()), float(spectrum.max())
    if smallest <= 0:
        raise ValueError("W C is singular: π is infinite")
    return Compactness(0.5 * math.log(d_out * largest) - math.log(smallest), largest, smallest, 0.0)


def extreme_eigenvalues(C: Tensor, floor: float = 0.0) -> tuple[float, float]:
    """Smallest and largest eigenvalue of a symmetric positive semi-definite matrix (d, d) fp64.

    Exact up to d = 2048, O(d³). Beyond: block iteration with C and with a Cholesky factor of it, O(d³/3), until a step
    changes neither by 1e-8 of itself; where there is no factor, C is singular to rounding and the smallest is 0.

    Args:
        C: (d, d) fp64.
        floor: What will be added to both: the smallest need not be known better than to a part of it.
    """
    d = C.shape[0]
    if d <= _EXACT:
        values = torch.linalg.eigvalsh(C)
        return float(values[0]), float(values[-1])
    start = torch.randn(d, _BLOCK, generator=torch.Generator().manual_seed(0), dtype=C.dtype).to(C.device)
    largest = _settled(lambda X: C @ X, start, lambda X: float(torch.linalg.eigvalsh(X.T @ (C @ X))[-1]), floor)
    factor, failed = torch.linalg.cholesky_ex(C)
    if int(failed):
        return 0.0, largest
    inverse: Callable[[Tensor], Tensor] = lambda X: torch.cholesky_solve(X, factor)  # noqa: E731
    return _settled(inverse, start, lambda X: float(torch.linalg.eigvalsh(X.T @ (C @ X))[0]), floor), largest


def _settled(step: Callable[[Tensor], Tensor], X: Tensor, value: Callable[[Tensor], float], floor: float) -> float:
    """The value of orthonormal X (d, b) once a step no longer changes it, or after 60 steps."""
    before = math.inf
    for _ in range(_STEPS):
        X = torch.linalg.qr(step(X))[0]
        now = value(X)
        if abs(now - before) <= _SETTLED * abs(now + floor):
            break
        before = now
    return now
