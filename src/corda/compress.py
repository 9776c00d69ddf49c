"""Low-rank updates of a weight, ΔW = B A, kept as factors: their difference, and the best one of lower rank.

Nothing here forms a d_out x d_in matrix, but for `low_rank`, which is given one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_GUARD = 8
_POWER_ITERATIONS = 6
# Above this share of the smaller side a full SVD costs no more than an iteration.
_FULL_SHARE = 4


@dataclass(frozen=True)
class Truncated:
    """The best approximation of an update by one of rank k, in the Frobenius norm (Eckart-Young).

    Attributes:
        A: (k, d_in) fp32.
        B: (d_out, k) fp32, each column as long as its row of A.
        energy: ‖ΔW‖²_F of what was approximated.
        lost: ‖ΔW - B A‖²_F.
    """

    A: Tensor
    B: Tensor
    energy: float
    lost: float


def difference(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of B A - B0 A0 that do not cancel: [A; A - A0] and [B - B0, B0].

    (B - B0) A + B0 (A - A0) is the same matrix as [B, -B0] times [A; A0], but its two terms are of the size of the
    difference, so rounding the factors to 16 bits, as servers do, costs a rounding of the difference and not one of
    each of the two large products. With B = B0 and A = A0 it is exactly zero.

    Args:
        A: (r, d_in).
        B: (d_out, r).
        A0: (r, d_in).
        B0: (d_out, r).

    Returns:
        (2r, d_in) and (d_out, 2r), in the dtype given.
    """
    return torch.cat([A, A - A0], dim=0), torch.cat([B - B0, B0], dim=1)


def truncate(A: Tensor, B: Tensor, rank: int) -> Truncated:
    """The best rank-k approximation of B A: an SVD of the (r, r) core between two thin QRs. O((d_out + d_in) r²).

    Args:
        A: (r, d_in).
        B: (d_out, r).
        rank: k >= 1; what r, d_out or d_in do not allow is not used.
    """
    Q_out, R_out = torch.linalg.qr(B.double())
    Q_in, R_in = torch.linalg.qr(A.double().T)
    U, sigma, Vh = torch.linalg.svd(R_out @ R_in.T, full_matrices=False)
    k = min(rank, len(sigma))
    A_k, B_k = _balanced(Q_out @ U[:, :k], sigma[:k], Vh[:k] @ Q_in.T)
    return Truncated(A_k, B_k, float(sigma.square().sum()), float(sigma[k:].square().sum()))


def low_rank(D: Tensor, rank: int) -> Truncated:
    """The best rank-k approximation of a matrix that is given whole, by subspace iteration with a fixed seed.

    Args:
        D: (d_out, d_in), any floating dtype.
        rank: k >= 1.
    """
    D = D.double()
    n = min(D.shape)
    k = min(rank, n)
    if (k + _GUARD) * _FULL_SHARE > n:
        U, sigma, Vh = torch.linalg.svd(D, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(0)
        X = torch.randn(D.shape[1], k + _GUARD, generator=generator, dtype=D.dtype).to(D.device)
        for _ in range(_POWER_ITERATIONS):
            X = torch.linalg.qr(D.T @ torch.linalg.qr(D @ X)[0])[0]
        left, sigma, Vh = torch.linalg.svd(D @ X, full_matrices=False)
        U, Vh = left, Vh @ X.T
    A, B = _balanced(U[:, :k], sigma[:k], Vh[:k])
    rest = D - B.double() @ A.double()
    return Truncated(A, B, float(D.square().sum()), float(rest.square().sum()))


def pad(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same update with rows and columns of zeros up to rank k: (k, d_in) and (d_out, k).

    Args:
        A: (r, d_in).
        B: (d_out, r).
        rank: k.

    Raises:
        ValueError: the factors have a larger rank.
    """
    missing = rank - A.shape[0]
    if missing < 0:
        raise ValueError(f"factors of rank {A.shape[0]} do not fit into rank {rank}")
    return (
        torch.cat([A, A.new_zeros(missing, A.shape[1])], dim=0),
        torch.cat([B, B.new_zeros(B.shape[0], missing)], dim=1),
    )


def add(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """W + B A, summed in fp32 or better and rounded once to the dtype of W.

    Args:
        W: (d_out, d_in), any floating dtype.
        A: (r, d_in).
        B: (d_out, r).
    """
    wide = torch.float64 if W.dtype == torch.float64 else torch.float32
    return torch.addmm(W.to(wide), B.to(wide), A.to(wide)).to(W.dtype)


def share(lost: float, energy: float) -> float:
    """lost / energy, 0 for an update that is zero."""
    return lost / energy if energy > 0 else 0.0


def relative_error(found: Truncated) -> float:
    """‖ΔW - B A‖_F / ‖ΔW‖_F."""
    return math.sqrt(share(found.lost, found.energy))


def _balanced(U: Tensor, sigma: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    root = sigma.sqrt()
    return (root[:, None] * Vh).float().contiguous(), (U * root).float().contiguous()
