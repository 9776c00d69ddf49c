"""Block Krylov iteration for r left singular vectors at one end of a matrix. Tensors and numbers only.

Both ends share one loop. A block Q is expanded to a Krylov space of the operator S, and of that space the r directions
with the least (or most) energy ‖Mᵀ u‖ are taken. At the large end S = M Mᵀ; at the small end S = (M Mᵀ)⁻¹, given by
triangular solves, and the space is S times the basis, because one more application of S is what suppresses the
directions of large energy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from corda.metric import Metric

# Beyond this condition of M its fp64 Gram matrix, whose condition is the square, loses the small end.
GRAM_CONDITION_LIMIT = 1e6

# Takes an orthonormal block Q (n, k); returns the block Z (n, k) that joins the search space, Mᵀ Z (d, k), and S Q.
Expand = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Found:
    """What the iteration returned.

    Attributes:
        U: (n, r) fp64, orthonormal.
        sigma: (r,) fp64 ascending, ‖Mᵀ u‖ of each.
        change: Relative change of the captured energy in the last expansion; the excess left is smaller still.
        converged: Whether that met the tolerance.
        width: Vectors that S was applied to.
    """

    U: Tensor
    sigma: Tensor
    change: float
    converged: bool
    width: int


def extreme(
    expand: Expand,
    n: int,
    rank: int,
    *,
    smallest: bool,
    dtype: torch.dtype,
    device: torch.device,
    tolerance: float = 1e-4,
    max_width: int | None = None,
    seed: int = 0,
) -> Found:
    """r left singular vectors of M at one end, from a growing block Krylov space.

    Stops when the captured energy ‖Mᵀ U‖_F changes by less than `tolerance` in one expansion. (The residual of single
    vectors would never settle where the cut goes through a cluster, though mixing there costs no energy.) Each
    expansion divides the excess by some 10 to 30 on flat spectra, more on steep ones.

    Args:
        expand: One application of S, see `Expand`.
        n: Rows of M.
        rank: r.
        smallest: Which end.
        dtype: Of the basis; fp32 is enough at the large end.
        device: Of the basis.
        tolerance: Relative change of the energy.
        max_width: Widest space; default 6 r + 64, at most n.
        seed: Of the first block.
    """
    block = min(n, rank // 3 + 8)
    limit = min(n, max_width or 6 * rank + 64)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(n, block, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)
    fresh: Tensor = torch.linalg.qr(start)[0]
    basis = fresh
    spaces: list[Tensor] = []
    images: list[Tensor] = []
    energy = torch.inf
    while True:
        space, image, following = expand(fresh)
        spaces.append(space)
        images.append(image)
        width = basis.shape[1]
        if width >= min(rank + block, n):
            U, sigma = _ritz(torch.cat(spaces, dim=1), torch.cat(images, dim=1), rank, smallest)
            now = float(sigma.norm())
            change = abs(energy - now) / max(now, 1e-300)
            if change <= tolerance or width >= limit:
                return Found(U, sigma, change, change <= tolerance, width)
            energy = now
        fresh = _orthonormal_against(basis, following[:, : n - width])
        basis = torch.cat([basis, fresh], dim=1)


def _orthonormal_against(basis: Tensor, new: Tensor) -> Tensor:
    new = new / new.norm(dim=0).clamp_min(torch.finfo(new.dtype).tiny)
    for _ in range(2):  # twice is enough
        new = new - basis @ (basis.T @ new)
        new = torch.linalg.qr(new)[0]
    return new


def _ritz(space: Tensor, image: Tensor, rank: int, smallest: bool) -> tuple[Tensor, Tensor]:
    """The r directions of span(space) with extreme ‖Mᵀ u‖, image being Mᵀ space."""
    scale = space.norm(dim=0).clamp_min(torch.finfo(space.dtype).tiny)
    Q, T = torch.linalg.qr((space / scale).double())
    P = torch.linalg.solve_triangular(T, (image / scale).double(), upper=True, left=False)
    # The Gram matrix would square the condition, so the small end goes through one more QR.
    R = torch.linalg.qr(P, mode="r")[1]
    _, sigma, Vh = torch.linalg.svd(R)
    sigma, V = sigma.flip(0), Vh.T.flip(1)
    chosen = slice(0, rank) if smallest else slice(len(sigma) - rank, len(sigma))
    return Q @ V[:, chosen], sigma[chosen]


def largest(W: Tensor, metric: Metric, rank: int) -> Found:
    """The r largest components of W (C + λI)^a, W being (d_out, d_in) of any float type. O(d_out d_in r) a step.

    Products are fp32: at this end their error is far below the tolerance.
    """
    W = W.float()
    F = metric.factor32

    def expand(Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        P = W.T @ Q
        P = P if F is None else F.T @ P
        return Q, P, W @ (P if F is None else F @ P)

    return extreme(expand, W.shape[0], rank, smallest=False, dtype=torch.float32, device=W.device)


def smallest(R: Tensor, metric: Metric, rank: int) -> Found | None:
    """The r smallest components of R (C + λI)^a for R (n, d_in) fp64, n <= d_in; None where nothing can be solved.

    A square R (a square weight, or the triangle of a tall one) is factorised itself, so neither M = R (C + λI)^a nor
    its Gram matrix is formed: S = R⁻ᵀ (C + λI)^{-2a} R⁻¹. A wide R goes through a Cholesky factor of M Mᵀ; its M is
    fp32, but the energies that decide are taken with fp64 products. O(2n³/3), or O(n d² + n² d), and O(n d r) a step.
    """
    solve = _inverse_of_square(R, metric) if R.shape[0] == R.shape[1] else _inverse_of_wide(R, metric)
    if solve is None:
        return None
    F = metric.factor

    def expand(Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        Z = solve(Q)
        P = R.T @ Z
        return Z, P if F is None else F.T @ P, Z

    found = extreme(expand, R.shape[0], rank, smallest=True, dtype=torch.float64, device=R.device)
    return found if bool(torch.isfinite(found.sigma).all()) else None


def _inverse_of_square(R: Tensor, metric: Metric) -> Callable[[Tensor], Tensor] | None:
    if not metric.invertible:
        return None
    upper = not bool(R.tril(-1).any())
    if upper:  # from a QR
        small = R.diagonal().abs().min() <= torch.finfo(R.dtype).eps * R.diagonal().abs().max()
        if bool(small):
            return None

        def solve(X: Tensor) -> Tensor:
            Y: Tensor = metric.solve(torch.linalg.solve_triangular(R, X, upper=True))
            out: Tensor = torch.linalg.solve_triangular(R.T, Y, upper=False)
            return out

        return solve
    factors, pivots, failed = torch.linalg.lu_factor_ex(R)
    diagonal = factors.diagonal().abs()
    if int(failed) or bool(diagonal.min() <= torch.finfo(R.dtype).eps * diagonal.max()):
        return None

    def solve_by_lu(X: Tensor) -> Tensor:
        Y: Tensor = metric.solve(torch.linalg.lu_solve(factors, pivots, X))
        out: Tensor = torch.linalg.lu_solve(factors, pivots, Y, adjoint=True)
        return out

    return solve_by_lu


def _inverse_of_wide(R: Tensor, metric: Metric) -> Callable[[Tensor], Tensor] | None:
    M = metric.root(R.float()).double()
    factor, failed = torch.linalg.cholesky_ex(symmetric_product(M))
    # The diagonal of a Cholesky factor of the Gram matrix shows its condition, which is that of M squared.
    if int(failed) or float(factor.diagonal().max() / factor.diagonal().min()) > GRAM_CONDITION_LIMIT:
        return None
    return lambda X: torch.cholesky_solve(X, factor)


def symmetric_product(M: Tensor) -> Tensor:
    """M Mᵀ for M (n, d), upper triangle by blocks and mirrored: 56 % of the full product."""
    n = M.shape[0]
    G = torch.empty(n, n, dtype=M.dtype, device=M.device)
    step = max(256, -(-n // 8))
    for start in range(0, n, step):
        end = min(start + step, n)
        torch.mm(M[:end], M[start:end].T, out=G[:end, start:end])
        G[start:end, :start] = G[:start, start:end].T
    return G
