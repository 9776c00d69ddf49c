"""Two contexts at once: directions that weigh what a task needs against what is to be kept. Tensors and numbers only.

T is the task's second moment and K that of the knowledge, both (n, n) at a unit scale: of a layer's inputs (mode
contrast) or of its outputs (mode dual). The contrast takes the largest generalised eigenvectors of
T a = θ (K + μ/n I) a: θ says how many times more of the task's energy than of the knowledge's lies along a direction,
μ/n being as much of the knowledge as every direction is taken to hold at least.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from corda import krylov, linalg

Kind = Literal["contrast", "random", "task", "null", "combination"]
Solver = Literal["auto", "exact", "krylov"]
_ROUNDING = 3e-7


@dataclass(frozen=True)
class Directions:
    """Chosen directions, best first.

    Attributes:
        vectors: (n, r) fp64, Euclidean unit columns, not orthogonal in general; signs fixed.
        values: (r,) fp64, what they were chosen by: θ, or the eigenvalue; of random ones θ along them.
        spectrum: (n,) fp64, all such values, best first; None where they were not computed.
        path: "exact", "krylov", "exact after krylov" or "random".
    """

    vectors: Tensor
    values: Tensor
    spectrum: Tensor | None
    path: str


def unit_trace(C: Tensor) -> Tensor:
    """C (n, n) in fp64, divided by its trace.

    Raises:
        ValueError: the trace is not a positive number.
    """
    C = C.double()
    trace = float(C.diagonal().sum())
    if not 0 < trace < float("inf"):
        raise ValueError(f"the trace of a covariance is {trace:.3g}")
    return C / trace


def unit_median(C: Tensor) -> Tensor:
    """C (n, n) in fp64, divided by n times the median of its positive eigenvalues: 1/n is a typical direction's energy.

    Where one direction of very large activations is nearly all of the trace, every other one is far below μ/n at unit
    trace, and the contrast would take that very direction; at unit median it is one among n. The median counts as
    3e-7 of the largest eigenvalue at least: below it are the roundings of a covariance in fp32.

    Raises:
        ValueError: C is zero or not finite.
    """
    C = unit_trace(C)
    values = torch.linalg.eigvalsh(C)
    positive = values[values > 1e-12 * values[-1]]
    return C / (len(C) * max(float(positive.median()), _ROUNDING * float(values[-1])))


def output_moment(R: Tensor, C: Tensor, exponent: float) -> Tensor:
    """R C^{2a} Rᵀ, (n, n) fp64, at any scale, without a square root of C.

    Args:
        R: (n, d_in) fp64, see `linalg.reduce`.
        C: (d_in, d_in), may be singular.
        exponent: a, ½ or 1.

    Raises:
        ValueError: another exponent.
    """
    if exponent not in {0.5, 1.0}:
        raise ValueError(f"exponent {exponent} does not tell two contexts apart; it has to be 0.5 or 1")
    M = R @ C.double()
    moment: Tensor = M @ R.T if exponent == 0.5 else krylov.symmetric_product(M)
    return moment


def directions(
    T: Tensor,
    K: Tensor,
    rank: int,
    *,
    kind: Kind = "contrast",
    mu: float = 1.0,
    beta: float = 0.5,
    seed: int = 0,
    solver: Solver = "auto",
) -> Directions:
    """The r best directions.

    "contrast": largest generalised eigenvectors of (T, K + μ/n I). Controls: "task": largest eigenvectors of T (as
    EVA); "null": smallest of K (as LoRA-Null); "combination": largest of (1 - β) T - β K (as SC-LoRA, there of
    outputs); "random": Gaussian.

    Args:
        T: (n, n) fp64 at unit trace or unit median, symmetric; may be singular.
        K: The same of the knowledge.
        rank: r, 1 <= r <= n.
        kind: Which.
        mu: μ > 0, for "contrast".
        beta: β in 0..1, for "combination".
        seed: For "random".
        solver: For "contrast": "exact" computes all θ, O(n³); "krylov" the largest r alone; "auto": krylov for n above
            `linalg.EXACT_LIMIT` and r up to n / 8.

    Raises:
        ValueError: rank out of range, entries that are not finite, or K + μ/n I not positive definite.
    """
    n = T.shape[0]
    if not 1 <= rank <= n:
        raise ValueError(f"rank {rank} is not in 1..{n}")
    if not bool(torch.isfinite(T.sum())) or not bool(torch.isfinite(K.sum())):
        raise ValueError("a covariance has entries that are not finite")
    if kind == "contrast":
        return _contrast(T, K, mu, rank, solver)
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        V = _unit(torch.randn(n, rank, generator=generator, dtype=torch.float64).to(T.device))
        return Directions(V, _along(V, T) / (_along(V, K) + mu / n), None, "random")
    matrix = {"task": T, "null": -K}.get(kind)
    values, vectors = torch.linalg.eigh((1 - beta) * T - beta * K if matrix is None else matrix)
    sign = -1.0 if kind == "null" else 1.0
    spectrum = sign * values.flip(0)
    return Directions(linalg.fix_signs(vectors.flip(1)[:, :rank]), spectrum[:rank].clone(), spectrum, "exact")


def thetas(T: Tensor, K: Tensor, mu: float) -> Tensor:
    """All θ of (T, K + μ/n I), (n,) fp64, largest first, without vectors. O(n³).

    Args:
        T: (n, n), of the task.
        K: (n, n), of the knowledge.
        mu: μ > 0; μ/n is added to the diagonal of K.
    """
    values: Tensor = torch.linalg.eigvalsh(_whitened(T, _damped_root(K, mu)))
    return values.flip(0).clamp_min(0)


def rows(vectors: Tensor, *, length: float, orthonormal: bool = False) -> Tensor:
    """A of contrast, (r, n) fp32: directions (n, r) as rows of one length, first orthonormalised where asked for.

    Args:
        vectors: (n, r).
        length: Of each row.
        orthonormal: Make them orthogonal first.
    """
    V = torch.linalg.qr(vectors)[0] if orthonormal else _unit(vectors)
    return (length * linalg.fix_signs(V).T).float().contiguous()


def share(vectors: Tensor, C: Tensor) -> float:
    """tr(Qᵀ C Q) for an orthonormal basis Q of the span of (n, r) vectors: their share of C at unit trace."""
    Q = torch.linalg.qr(vectors)[0]
    return float(((C @ Q) * Q).sum())


def _contrast(T: Tensor, K: Tensor, mu: float, rank: int, solver: Solver) -> Directions:
    L = _damped_root(K, mu)
    n = T.shape[0]
    path = "exact"
    if solver == "krylov" or (solver == "auto" and n > linalg.EXACT_LIMIT and rank * 8 <= n):
        found = _largest(T, L, rank)
        if found.converged:
            theta = found.sigma.flip(0).square()
            return Directions(_back(L, found.U.flip(1)), theta, None, "krylov")
        path = "exact after krylov"
    values, vectors = torch.linalg.eigh(_whitened(T, L))
    spectrum = values.flip(0).clamp_min(0)
    return Directions(_back(L, vectors.flip(1)[:, :rank]), spectrum[:rank].clone(), spectrum, path)


def _largest(T: Tensor, L: Tensor, rank: int) -> krylov.Found:
    """The largest r eigenvectors of L⁻¹ T L⁻ᵀ from a block Krylov space, O(n² r) a step."""

    def expand(Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        half = torch.linalg.solve_triangular(L.T, Q, upper=True)
        S = torch.linalg.solve_triangular(L, T @ half, upper=False)
        return Q, S, S

    def ritz(space: Tensor, image: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        inner = space.T @ image
        values, V = torch.linalg.eigh((inner + inner.T) / 2)
        return space @ V[:, -rank:], values[-rank:].clamp_min(0).sqrt()

    n = T.shape[0]
    return krylov.extreme(expand, ritz, n, rank, dtype=torch.float64, device=T.device, tolerance=1e-6)


def _damped_root(K: Tensor, mu: float) -> Tensor:
    """Lower L with L Lᵀ = K + μ/n I."""
    L: Tensor
    E = K.clone()
    E.diagonal().add_(mu / K.shape[0])
    L, failed = torch.linalg.cholesky_ex(E)
    if int(failed):
        raise ValueError(f"the knowledge's covariance with μ = {mu:g} is not positive definite: raise adapter.mu")
    return L


def _whitened(T: Tensor, L: Tensor) -> Tensor:
    half = torch.linalg.solve_triangular(L, T, upper=False)
    S = torch.linalg.solve_triangular(L, half.T, upper=False)
    symmetric: Tensor = (S + S.T) / 2
    return symmetric


def _back(L: Tensor, Y: Tensor) -> Tensor:
    """a = L⁻ᵀ y, to unit length."""
    return linalg.fix_signs(_unit(torch.linalg.solve_triangular(L.T, Y.contiguous(), upper=True)))


def _along(V: Tensor, C: Tensor) -> Tensor:
    along: Tensor = ((C @ V) * V).sum(dim=0)
    return along


def _unit(V: Tensor) -> Tensor:
    scaled: Tensor = V / V.norm(dim=0).clamp_min(torch.finfo(V.dtype).tiny)
    return scaled
