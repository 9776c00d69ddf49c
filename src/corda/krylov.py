"""Block Krylov iteration for r left singular vectors at one end of a matrix. Tensors and numbers only.

Both ends share one loop. A block Q is expanded to a Krylov space of the operator S, and of that space the r directions
with the least (or most) energy ‖Mᵀ u‖ are taken. At the large end S = M Mᵀ; at the small end S = (M Mᵀ)⁻¹, given by
triangular solves, and the space is S times the basis, because one more application of S is what suppresses the
directions of large energy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from corda.metric import Metric, solve_cholesky, strip

# Beyond this condition of M its fp64 Gram matrix, whose condition is the square, loses the small end.
GRAM_CONDITION_LIMIT = 1e6

# Beyond this condition of M its small end is not in an M formed in fp32, of which about (1e-6 cond)² would be lost.
FLOAT_CONDITION_LIMIT = 1e4

# Pivots this far below the largest are zero to fp64.
_SINGULAR = 1e-13

# Takes an orthonormal block Q (n, k); returns the block Z (n, k) that joins the search space, Mᵀ Z (d, k), and S Q.
Expand = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
# The directions of extreme ‖Mᵀ u‖ in the span of a space (n, w), given Mᵀ space (d, w), r and which end.
Ritz = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Found:
    """What the iteration returned.

    Attributes:
        U: (n, r) fp64, orthonormal.
        sigma: (r,) fp64 ascending, ‖Mᵀ u‖ of each.
        excess: Estimated relative distance of the captured energy from the optimum.
        converged: Whether that met the tolerance.
        width: Vectors that S was applied to.
    """

    U: Tensor
    sigma: Tensor
    excess: float
    converged: bool
    width: int


def extreme(
    expand: Expand,
    ritz: Ritz,
    n: int,
    rank: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    tolerance: float = 5e-4,
    max_width: int | None = None,
    seed: int = 0,
) -> Found:
    """r left singular vectors of M at one end, from a growing block Krylov space.

    Each expansion divides the excess of the captured energy ‖Mᵀ U‖_F by some 5 to 30 on flat spectra, more on steep
    ones, and by more every time. So what is left after a change c that was ρ times the change before is at most about
    c ρ / (1 - ρ); the iteration stops when that is below `tolerance`. (The residual of single vectors would never
    settle where the cut goes through a cluster, though mixing there costs no energy.)

    Args:
        expand: One application of S, see `Expand`.
        ritz: Takes the wanted directions of a space, see `Ritz`.
        n: Rows of M.
        rank: r.
        dtype: Of the basis; fp32 is enough at the large end.
        device: Of the basis.
        tolerance: Estimated relative excess.
        max_width: Widest space; default 6 r + 64, at most n.
        seed: Of the first block.
    """
    block = min(n, rank // 2 + 8)
    limit = min(n, max_width or 6 * rank + 64)
    wide = 3 if tolerance > 1e-6 else 6  # from here on, in half ranks, a look at the energy is worth its cost
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(n, block, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)
    fresh: Tensor = torch.linalg.qr(start)[0]
    basis = fresh
    spaces: list[Tensor] = []
    images: list[Tensor] = []
    energies: list[float] = []
    while True:
        space, image, following = expand(fresh)
        spaces.append(space)
        images.append(image)
        width = basis.shape[1]
        if width >= min(wide * rank // 2, n):
            U, sigma = ritz(torch.cat(spaces, dim=1), torch.cat(images, dim=1), rank)
            energies.append(float(sigma.norm()))
            excess = 0.0 if width >= n else _remaining(energies)
            if excess <= tolerance or width >= limit:
                return Found(torch.linalg.qr(U.double())[0], sigma, excess, excess <= tolerance, width)
        fresh = _orthonormal_against(basis, following[:, : n - width])
        basis = torch.cat([basis, fresh], dim=1)


def _remaining(energies: list[float]) -> float:
    """Estimated relative excess after the last of these energies."""
    if len(energies) < 3:
        return torch.inf
    before, last = (abs(a - b) / max(b, 1e-300) for a, b in pairwise(energies[-3:]))
    ratio = min(last / max(before, 1e-300), 0.9)
    return last * ratio / (1 - ratio)


def _orthonormal_against(basis: Tensor, new: Tensor) -> Tensor:
    new = new / new.norm(dim=0).clamp_min(torch.finfo(new.dtype).tiny)
    for _ in range(2):  # twice is enough
        new = new - basis @ (basis.T @ new)
        new = torch.linalg.qr(new)[0]
    return new


def _largest_of(basis: Tensor, image: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Ritz for an orthonormal space; at this end the Gram matrix of the image loses nothing."""
    image = image.double()
    energy, V = torch.linalg.eigh(image.T @ image)
    return basis @ V[:, -rank:].to(basis.dtype), energy[-rank:].clamp_min(0).sqrt()


def _smallest_of(space: Tensor, image: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Ritz for any space; a Gram matrix would square the condition, so it goes through two QRs."""
    scale = space.norm(dim=0).clamp_min(torch.finfo(space.dtype).tiny)
    Q, T = torch.linalg.qr(space / scale)
    P = torch.linalg.solve_triangular(T, image / scale, upper=True, left=False)
    R = torch.linalg.qr(P, mode="r")[1]
    _, sigma, Vh = torch.linalg.svd(R)
    return Q @ Vh[-rank:].flip(0).T, sigma[-rank:].flip(0)


def largest(W: Tensor, metric: Metric, rank: int) -> Found:
    """The r largest components of W (C + λI)^a, W being (d_out, d_in) of any float type. O(d_out d_in r) a step.

    Products are fp32: at this end their error is far below the tolerance.

    Args:
        W: (d_out, d_in), any float type.
        metric: (C + λI)^a.
        rank: r.
    """
    W = W.float()

    def expand(Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        P = metric.root(Q.T @ W).T  # a row-major W is read twice as fast from this side
        return Q, P, W @ metric.back(P)

    return extreme(expand, _largest_of, W.shape[0], rank, dtype=torch.float32, device=W.device)


def smallest(R: Tensor, metric: Metric, rank: int, *, triangular: bool = False) -> Found | None:
    """The r smallest components of R (C + λI)^a for R (n, d_in), n <= d_in; None where nothing can be solved.

    A square R (a square weight, or the triangle of a tall one) is factorised itself, so neither M = R (C + λI)^a nor
    its Gram matrix is formed: S = R⁻ᵀ (C + λI)^{-2a} R⁻¹, and Mᵀ S Q = M⁻¹ Q is met half-way. A wide R goes through a
    Cholesky factor of M Mᵀ, and is converted to fp64 a strip at a time where it is fp32. The energies that come out
    are compared with those of fp64 products in the end. O(2n³/3), or O(n d² + n² d), and O(n d r) a step.

    Args:
        R: (n, d_in), fp64 if it is square.
        metric: (C + λI)^a.
        rank: r.
        triangular: R is upper triangular.
    """
    expand = _square(R, metric, triangular) if R.shape[0] == R.shape[1] else _wide(R, metric)
    if expand is None:
        return None
    found = extreme(expand, _smallest_of, R.shape[0], rank, dtype=torch.float64, device=R.device)
    if not bool(torch.isfinite(found.sigma).all()):
        return None
    exact = float(metric.root(double_product(found.U.T, R)).norm())
    agrees = abs(exact - float(found.sigma.norm())) <= 1e-4 * exact
    return found if agrees else replace(found, converged=False)


def smallest_of_triangle(L: Tensor, rank: int) -> Found | None:
    """The r smallest components of a lower triangular L (n, n) fp64, to the limits of fp64.

    None where L is singular to fp64, where the iteration stalls, or where its energies are not those of its vectors.

    Args:
        L: (n, n) fp64, lower triangular.
        rank: r.
    """
    diagonal = L.diagonal().abs()
    if not float(diagonal.min()) > _SINGULAR * float(diagonal.max()):
        return None

    def expand(Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        half = torch.linalg.solve_triangular(L, Q, upper=False)
        Z = torch.linalg.solve_triangular(L.T, half, upper=True)
        return Z, half, Z

    found = extreme(expand, _smallest_of, L.shape[0], rank, dtype=L.dtype, device=L.device, tolerance=1e-9)
    exact = (found.U.T @ L).norm(dim=1).sort().values
    agrees = bool(((exact - found.sigma).abs() <= 1e-3 * exact).all()) and bool(torch.isfinite(exact).all())
    return found if found.converged and agrees else None


def _square(R: Tensor, metric: Metric, triangular: bool) -> Expand | None:
    if not metric.invertible:
        return None
    if triangular:
        pivot = R.diagonal().abs()

        def first(X: Tensor) -> Any:
            return torch.linalg.solve_triangular(R, X, upper=True)

        def last(X: Tensor) -> Any:
            return torch.linalg.solve_triangular(R.T, X, upper=False)
    else:
        # Of Rᵀ, which is R in LAPACK's order of storage: no transposed copies, here or in the solves.
        factors, pivots, failed = torch.linalg.lu_factor_ex(R.T)
        if int(failed):
            return None
        pivot = factors.diagonal().abs()

        def first(X: Tensor) -> Any:
            return torch.linalg.lu_solve(factors, pivots, X, adjoint=True)

        def last(X: Tensor) -> Any:
            return torch.linalg.lu_solve(factors, pivots, X)

    if bool(pivot.min() <= torch.finfo(R.dtype).eps * pivot.max()):
        return None

    def expand(Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image = metric.solve_half(first(Q))
        Z = last(metric.solve_half(image, transposed=True))
        return Z, image, Z

    return expand


def _wide(R: Tensor, metric: Metric) -> Expand | None:
    for dtype, limit in ((torch.float32, FLOAT_CONDITION_LIMIT), (torch.float64, GRAM_CONDITION_LIMIT)):
        G = symmetric_product(metric.root(R.to(dtype)))
        # Symmetric, and so transposed for free into LAPACK's order of storage.
        factor, failed = torch.linalg.cholesky_ex(G.T)
        del G
        # The diagonal of a Cholesky factor of M Mᵀ shows the condition of M.
        if not int(failed) and float(factor.diagonal().max() / factor.diagonal().min()) <= limit:
            break
    else:
        return None

    def expand(Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        Z = solve_cholesky(factor, Q)
        return Z, metric.root(double_product(Z.T, R)).T, Z

    return expand


def double_product(Z: Tensor, R: Tensor) -> Tensor:
    """Z R in fp64 for Z (k, n) fp64 and R (n, d), an fp32 R being converted a strip of columns at a time."""
    if R.dtype == torch.float64:
        return Z @ R
    step = strip(R.shape[1])
    return torch.cat([Z @ R[:, s : s + step].double() for s in range(0, R.shape[1], step)], dim=1)


def symmetric_product(M: Tensor) -> Tensor:
    """M Mᵀ in fp64 for M (n, d), upper triangle by blocks and mirrored: 56 % of the full product."""
    n, d = M.shape
    G = torch.zeros(n, n, dtype=torch.float64, device=M.device)
    step = max(256, -(-n // 8))
    width = d if M.dtype == torch.float64 else strip(d)
    for first in range(0, d, width):
        part = M[:, first : first + width].double()
        for start in range(0, n, step):
            end = min(start + step, n)
            G[:end, start:end].addmm_(part[:end], part[start:end].T)
    for start in range(0, n, step):
        end = min(start + step, n)
        G[start:end, :start] = G[:start, start:end].T
        block = G[start:end, start:end]
        block.copy_(block.triu() + block.triu(1).T)
    return G
