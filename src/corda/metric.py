"""(C + λI)^a in the forms that the solvers need. Tensors and numbers only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

_STRIPS, _WHOLE = 8, 1024


def strip(d: int) -> int:
    """How many of d rows or columns are converted to fp64 at a time: an eighth, or all of few."""
    return d if d <= _WHOLE else -(-d // _STRIPS)


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, fp32 matrix products on a GPU are fp32 and not TF32, whatever the user has set."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set under torch 2.9's names, beside which this function refuses to answer
        before = None
    if before is None:
        with _ieee(torch.backends.cuda.matmul):
            yield
        return
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _ieee(matmul: Any) -> Iterator[None]:
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@dataclass(frozen=True)
class Metric:
    """(C + λI)^a; what layers with one input have in common is computed once, when first needed.

    Attributes:
        C: (d_in, d_in) symmetric, fp32 or fp64; may be None for exponent 0.
        exponent: a, one of 0, ½, 1.
        lam: λ >= 0, see `damping`.
    """

    C: Tensor | None
    exponent: float
    lam: float

    def __post_init__(self) -> None:
        if self.exponent not in {0.0, 0.5, 1.0}:
            raise ValueError(f"exponent {self.exponent} is not one of 0, 0.5, 1")
        if self.C is None and self.exponent:
            raise ValueError("a covariance is needed unless the exponent is 0")

    @cached_property
    def damped(self) -> Tensor:
        """C + λI, (d_in, d_in) fp64."""
        assert self.C is not None
        damped = self.C.to(torch.float64, copy=True)
        damped.diagonal().add_(self.lam)
        return damped

    @cached_property
    def cholesky(self) -> Tensor | None:
        """Lower K with K Kᵀ = C + λI, fp64; None where it is not positive definite. O(d³/3)."""
        upper, failed = torch.linalg.cholesky_ex(self.damped, upper=True)  # a quarter faster than the lower one
        return upper.T if int(failed) == 0 else None

    @cached_property
    def factor(self) -> Tensor | None:
        """F (d_in, d_in) fp64 with F Fᵀ = (C + λI)^{2a}; None, meaning the identity, for a = 0.

        W F has the left singular vectors and the singular values of W (C + λI)^a. For a = ½ no root is taken: F is
        the Cholesky factor, or one from eigenvectors where C + λI is singular.
        """
        if self.exponent == 0:
            return None
        if self.exponent == 1:
            return self.damped
        if self.cholesky is not None:
            return self.cholesky
        values, vectors = torch.linalg.eigh(self.damped)
        root: Tensor = vectors * values.clamp_min(0).sqrt()
        return root

    def root(self, R: Tensor) -> Tensor:
        """M = R F, (n, d_in) in the dtype of R (n, d_in)."""
        if self.exponent == 0:
            return R
        if self.exponent == 1:
            return self._undamped_root(R)
        assert self.factor is not None
        return R @ self.factor.to(R.dtype)

    def back(self, X: Tensor) -> Tensor:
        """F X, (d_in, k) in the dtype of X (d_in, k)."""
        if self.exponent == 0:
            return X
        if self.exponent == 1:
            return self.root(X.T).T
        assert self.factor is not None
        return self.factor.to(X.dtype) @ X

    def _undamped_root(self, R: Tensor) -> Tensor:
        """R C + λ R without a damped or converted copy of C, whose size decides a wide layer's memory."""
        assert self.C is not None
        if R.dtype == self.C.dtype:
            return torch.addmm(R, R, self.C, beta=self.lam)
        M = self.lam * R
        step = strip(self.C.shape[0])
        for start in range(0, self.C.shape[0], step):
            rows = slice(start, start + step)
            M.addmm_(R[:, rows], self.C[rows].to(R.dtype))
        return M

    @property
    def invertible(self) -> bool:
        """Whether `solve_half` can be used."""
        return self.exponent == 0 or self.cholesky is not None

    def solve_half(self, X: Tensor, *, transposed: bool = False) -> Tensor:
        """F⁻¹ X, or F⁻ᵀ X, by triangular solves, never by an inverse; X is (d_in, k) fp64.

        Args:
            X: (d_in, k) fp64.
            transposed: F⁻ᵀ instead of F⁻¹.
        """
        if self.exponent == 0:
            return X
        assert self.cholesky is not None
        if self.exponent == 1:
            return solve_cholesky(self.cholesky, X)
        K = self.cholesky
        solved: Tensor = torch.linalg.solve_triangular(K.T if transposed else K, X, upper=transposed)
        return solved


def solve_cholesky(K: Tensor, X: Tensor) -> Tensor:
    """(K Kᵀ)⁻¹ X for lower K (n, n). As torch.cholesky_solve, which copies K every time."""
    half = torch.linalg.solve_triangular(K, X, upper=False)
    solved: Tensor = torch.linalg.solve_triangular(K.T, half, upper=True)
    return solved


def damping(C: Tensor, damp: float) -> float:
    """λ = damp · mean(diag C), the number added to the diagonal of C (d_in, d_in)."""
    return damp * float(C.diagonal().double().mean())
