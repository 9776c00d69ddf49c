"""Running sums Σ x xᵀ over tokens, upper triangle only."""

from __future__ import annotations

import torch
from torch import Tensor

_MIN_BLOCK = 128
_BLOCKS = 6
_STRIP = 256


class Accumulator:
    """The second moment of one distinct layer input.

    The upper triangle is summed in 6 block rows, 58 % of the full product. Sums are fp32: with T tokens in
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
            block = self.total[start:end, start:]
            if exact_products:
                # The product of two bf16 numbers is exact in fp32, so tensor cores lose nothing here.
                block += torch.mm(x[:, start:end].T, x[:, start:], out_dtype=torch.float32)
            else:
                block.addmm_(x[:, start:end].T, x[:, start:])
        self.tokens += x.shape[0]

    def finite(self) -> bool:
        """Whether every sum is finite; a NaN or Inf in an input always reaches its own diagonal entry."""
        return bool(torch.isfinite(self.total.diagonal()).all())


def pack_upper(matrix: Tensor) -> Tensor:
    """Upper triangle of (d, d) as a vector: strips of 256 rows, each from its diagonal block to the right edge."""
    d = matrix.shape[0]
    return torch.cat([matrix[s : s + _STRIP, s:].reshape(-1) for s in range(0, d, _STRIP)])


def unpack_upper(packed: Tensor, d: int) -> Tensor:
    """The symmetric (d, d) matrix of a packed upper triangle; diagonal blocks are mirrored from above too."""
    matrix = packed.new_empty(d, d)
    place = 0
    for s in range(0, d, _STRIP):
        rows = min(_STRIP, d - s)
        strip = packed[place : place + rows * (d - s)].reshape(rows, d - s)
        place += strip.numel()
        block = strip[:, :rows].triu()
        matrix[s : s + rows, s : s + rows] = block + block.triu(1).T
        matrix[s : s + rows, s + rows :] = strip[:, rows:]
        matrix[s + rows :, s : s + rows] = strip[:, rows:].T
    return matrix
