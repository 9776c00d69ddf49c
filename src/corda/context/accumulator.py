"""Running sums Σ x xᵀ over tokens, upper triangle only."""

from __future__ import annotations

import torch
from torch import Tensor

_MIN_BLOCK = 128
_BLOCKS = 8


class Accumulator:
    """The second moment of one distinct layer input.

    The upper triangle is summed in 8 block columns, 56 % of the full product. Sums are fp32: with T tokens in
    batches of t, the error of an entry against fp64 is at most about (t + T/t) · 2⁻²⁴ of √(C_ii C_jj) T, and in
    practice near √(t + T/t) · 2⁻²⁴, because batches are added once each.

    Attributes:
        total: (d, d) fp32, valid on and above the diagonal (and in some of the blocks on it, below).
        tokens: How many inputs were added.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(width, width, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Add inputs x of shape (tokens, d), any floating dtype, on the accumulator's device."""
        d = self.total.shape[0]
        step = max(_MIN_BLOCK, -(-d // _BLOCKS))
        exact_products = x.is_cuda and x.dtype == torch.bfloat16
        if not exact_products:
            x = x.to(torch.float32)
        for start in range(0, d, step):
            end = min(start + step, d)
            block = self.total[:end, start:end]
            if exact_products:
                # The product of two bf16 numbers is exact in fp32, so tensor cores lose nothing here.
                block += torch.mm(x[:, :end].T, x[:, start:end], out_dtype=torch.float32)
            else:
                block.addmm_(x[:, :end].T, x[:, start:end])
        self.tokens += x.shape[0]

    def finite(self) -> bool:
        """Whether every sum is finite; a NaN or Inf in an input always reaches its own diagonal entry."""
        return bool(torch.isfinite(self.total.diagonal()).all())


def pack_upper(matrix: Tensor) -> Tensor:
    """Upper triangle of (d, d), row by row, as a vector of d(d+1)/2."""
    d = matrix.shape[0]
    rows, columns = torch.triu_indices(d, d, device=matrix.device)
    return matrix[rows, columns]


def unpack_upper(packed: Tensor, d: int) -> Tensor:
    """The symmetric (d, d) matrix of a packed upper triangle."""
    matrix = packed.new_empty(d, d)
    rows, columns = torch.triu_indices(d, d, device=packed.device)
    matrix[rows, columns] = packed
    matrix[columns, rows] = packed
    return matrix
