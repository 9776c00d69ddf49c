"""Which left singular vectors of W C^a: the one computation behind every mode. Tensors and numbers only.

CorDA (arXiv 2406.05223, eqs. 2-5) takes U Σ Vᵀ = SVD(W C) and builds B A = U_S Σ_S V_Sᵀ C⁻¹. Because
Vᵀ C⁻¹ = Σ⁻¹ Uᵀ W, that product is U_S U_Sᵀ W, so only U_S is needed and C is never inverted.

Costs are for n = min(d_out, d_in) and d = d_in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from corda import krylov
from corda.krylov import GRAM_CONDITION_LIMIT
from corda.metric import Metric

End = Literal["smallest", "largest"]
Solver = Literal["auto", "exact", "krylov"]

# Up to this n a full eigendecomposition is as fast as an iteration, and gives the whole spectrum besides.
EXACT_LIMIT = 1024
_CHOLESKY_QR_LIMIT = 1e4


@dataclass(frozen=True)
class Subspace:
    """Chosen left singular vectors of W C^a.

    Attributes:
        U: (d_out, r) fp64, orthonormal columns, each with its entry of largest magnitude positive.
        sigma: (r,) fp64, the singular values of W (C + λI)^a that belong to them, ascending.
        spectrum: (n,) fp64, all singular values, ascending; None where the solver did not compute them.
        path: The solver that produced them: "gram", "lq" or "krylov"; with a note where one solver gave up.
        condition: Estimated condition number of R (C + λI)^a; NaN where the solver did not need it.
    """

    U: Tensor
    sigma: Tensor
    spectrum: Tensor | None
    path: str
    condition: float


@dataclass(frozen=True)
class Reduced:
    """W = Q R with the row space's dimension reduced to n = min(d_out, d_in).

    Attributes:
        R: (n, d_in) fp64; upper triangular where W is tall, else W itself, in fp32 where an iteration takes it.
        Q: (d_out, n) fp64 with orthonormal columns; None where W is not tall, or where Q is W R⁻¹.
        tall: (d_out, d_in) fp64, W itself where Q is W R⁻¹; else None.
    """

    R: Tensor
    Q: Tensor | None = None
    tall: Tensor | None = None

    @property
    def triangular(self) -> bool:
        """Whether R is upper triangular."""
        return self.Q is not None or self.tall is not None

    def lift(self, U: Tensor) -> Tensor:
        """From (n, r) in the reduced space to (d_out, r), orthonormal columns."""
        if self.tall is not None:
            lifted = self.tall @ torch.linalg.solve_triangular(self.R, U, upper=True)
            # Orthonormal to cond(W)² eps already: the QR changes no direction beyond that, and signs are taken back.
            Q, T = torch.linalg.qr(lifted)
            signed: Tensor = Q * T.diagonal().sign()
            return signed
        return U if self.Q is None else self.Q @ U


def reduce(W: Tensor) -> Reduced:
    """Thin QR of a tall weight, so that every later matrix has n = min(d_out, d_in) rows.

    While the condition of W stays below 1e4, R is the Cholesky factor of WᵀW, a third of Householder's time; what that
    loses, cond(W)² eps, is below 1e-7.

    Args:
        W: (d_out, d_in), any floating dtype.
    """
    W = W.double()
    if W.shape[0] <= W.shape[1]:
        return Reduced(W)
    R, failed = torch.linalg.cholesky_ex(krylov.symmetric_product(W.T), upper=True)
    pivots = R.diagonal().abs()
    if not int(failed) and bool(pivots.max() <= _CHOLESKY_QR_LIMIT * pivots.min()):
        return Reduced(R, tall=W)
    Q, R = torch.linalg.qr(W)
    return Reduced(R, Q)


def subspace(W: Tensor, metric: Metric, rank: int, end: End, solver: Solver = "auto") -> Subspace:
    """The r left singular vectors of W (C + λI)^a at one end of the spectrum (CorDA eqs. 2-5).

    "exact": eigenvectors of the fp64 Gram matrix M Mᵀ while cond(M) stays below GRAM_CONDITION_LIMIT; beyond it, for
    the small end, M is factorised by LQ and the triangular factor is iterated on, which never squares the condition.
    O(n² d + n³). "krylov": a block Krylov space at the wanted end only, see `corda.krylov`; where it does not
    converge, or there is nothing it can solve with, the exact path is taken and `path` says so. "auto": krylov for n
    above EXACT_LIMIT and r up to n / 8.

    Args:
        W: (d_out, d_in), any floating dtype.
        metric: (C + λI)^a.
        rank: r, 1 <= r <= n.
        end: "smallest" (KPM, MiLoRA) or "largest" (IPM, PiSSA).
        solver: Which path.

    Raises:
        ValueError: rank out of range, or entries that are not finite.
    """
    n = min(W.shape)
    if not 1 <= rank <= n:
        raise ValueError(f"rank {rank} is not in 1..{n}")
    if not _finite(W) or (metric.C is not None and metric.exponent and not _finite(metric.C)):
        raise ValueError("the weight or its covariance has entries that are not finite")
    note = ""
    reduced: Reduced | None = None
    if solver == "krylov" or (solver == "auto" and n > EXACT_LIMIT and rank * 8 <= n):
        if end == "largest":
            found: krylov.Found | None = krylov.largest(W, metric, rank)
            lifted = found.U if found else None
        else:
            wide = W.shape[0] < W.shape[1]
            reduced = Reduced(W.float()) if wide and W.dtype != torch.float64 else reduce(W)
            found = krylov.smallest(reduced.R, metric, rank, triangular=reduced.triangular)
            lifted = reduced.lift(found.U) if found else None
        if found is not None and lifted is not None and found.converged:
            return Subspace(fix_signs(lifted), found.sigma, None, "krylov", math.nan)
        note = " after krylov"
    exactly = reduced if reduced is not None and reduced.R.dtype == torch.float64 else reduce(W)
    return _exactly(exactly, metric, rank, end, note)


def _exactly(reduced: Reduced, metric: Metric, rank: int, end: End, note: str) -> Subspace:
    n = reduced.R.shape[0]
    M = metric.root(reduced.R)
    G = krylov.symmetric_product(M)
    if not bool(torch.isfinite(G.diagonal()).all()):
        raise ValueError("the weight or its covariance has entries that are not finite")
    values, vectors = torch.linalg.eigh(G)
    spectrum = values.clamp_min(0).sqrt()
    condition = _condition(spectrum)
    if end == "largest":
        chosen, U, path = slice(n - rank, n), vectors[:, n - rank :], "gram"
    elif condition < GRAM_CONDITION_LIMIT:
        chosen, U, path = slice(0, rank), vectors[:, :rank], "gram"
    else:
        sigma, U = smallest_by_lq(M, rank)
        spectrum = torch.cat([sigma, torch.maximum(spectrum[rank:], sigma[-1])])
        chosen, path = slice(0, rank), "lq"
    U = fix_signs(reduced.lift(U))
    return Subspace(U, spectrum[chosen].clone(), spectrum, path + note, condition)


def smallest_by_lq(M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Smallest singular values and left vectors of M without squaring its condition.

    M = L Qᵀ; a Krylov space of (L Lᵀ)⁻¹ by triangular solves; where it does not converge to fp64's limits, the SVD of
    L decides. O(n² d + n² r · expansions).

    Args:
        M: (n, d) fp64 with n <= d.
        rank: r.

    Returns:
        singular values (r,) ascending and vectors (n, r), fp64.
    """
    L = torch.linalg.qr(M.T, mode="r")[1].T
    found = krylov.smallest_of_triangle(L, rank)
    if found is not None:
        return found.sigma, found.U
    left, sigma, _ = torch.linalg.svd(L)
    return sigma.flip(0)[:rank], left.flip(1)[:, :rank]


def same_spectrum(W: Tensor) -> Tensor:
    """What has the singular values of W in every metric, as small as can be: a tall W's triangle R, else W itself.

    Args:
        W: (d_out, d_in).
    """
    return reduce(W).R if W.shape[0] > W.shape[1] else W


def spectrum(W: Tensor, metric: Metric) -> Tensor:
    """All singular values of W (C + λI)^a, (n,) fp64, ascending, without vectors. O(n² d + n³).

    Args:
        W: (d_out, d_in).
        metric: (C + λI)^a.
    """
    values: Tensor = torch.linalg.eigvalsh(krylov.symmetric_product(metric.root(reduce(W).R)))
    return values.clamp_min(0).sqrt()


def fix_signs(U: Tensor) -> Tensor:
    """Flip columns so that each one's entry of largest magnitude is positive; U is (d, r)."""
    rows = U.abs().argmax(dim=0, keepdim=True)
    signs = torch.sign(U.gather(0, rows))
    return U * torch.where(signs == 0, torch.ones_like(signs), signs)


def captured_energy(W: Tensor, metric: Metric, U: Tensor) -> float:
    """E(U) = ‖Uᵀ W (C + λI)^a‖_F in fp64, what a subspace holds of the layer; smaller is better for the small end.

    Args:
        W: (d_out, d_in).
        metric: (C + λI)^a.
        U: (d_out, r), orthonormal columns.
    """
    return float(metric.root(U.double().T @ W.double()).norm())


def factors(
    W: Tensor, chosen: Subspace, *, scaling: float, balance: Literal["equal", "sigma"]
) -> tuple[Tensor, Tensor, int]:
    """LoRA factors with s · B A = U_S U_Sᵀ W.

    balance "equal": B = U D/√s, A = D⁻¹ UᵀW/√s with D_ii = ‖u_iᵀW‖^½, so column i of B is as long as row i of A.
    balance "sigma": B = U Σ^½/√s, A = Σ^-½ UᵀW/√s, the papers' split with C = X Xᵀ/T.
    A direction with ‖u_iᵀW‖ <= 1e-7 ‖W‖ gets a unit row of A and a zero column of B.

    Args:
        W: (d_out, d_in).
        chosen: Its subspace.
        scaling: s = alpha / r (or alpha / √r) that PEFT will apply.
        balance: The split.

    Returns:
        A (r, d_in) and B (d_out, r), both fp32, and the number of dead directions.
    """
    U = chosen.U.to(W.device)
    P = krylov.double_product(U.T, W)
    lengths = P.norm(dim=1)
    dead = lengths <= 1e-7 * float(W.norm())
    split = lengths.clone() if balance == "equal" else chosen.sigma.to(W.device).clone()
    split[dead] = 1.0
    D = split.sqrt()
    A = P / D[:, None] / math.sqrt(scaling)
    B = U * D / math.sqrt(scaling)
    if bool(dead.any()):
        A[dead] = _unit_rows(P, dead)
        B[:, dead] = 0.0
    return A.float().contiguous(), B.float().contiguous(), int(dead.sum())


def _finite(X: Tensor) -> bool:
    """A finite sum, of entries that are finite, is 20 times faster to see than every entry."""
    return bool(torch.isfinite(X.sum())) or bool(torch.isfinite(X).all())


def _unit_rows(P: Tensor, dead: Tensor) -> Tensor:
    rows = P[dead]
    lengths = rows.norm(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(0)
    fallback = torch.randn(rows.shape, generator=generator, dtype=P.dtype).to(P.device)
    rows = torch.where(lengths > 0, rows, fallback)
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return unit


def _condition(spectrum: Tensor) -> float:
    largest, smallest = float(spectrum[-1]), float(spectrum[0])
    return math.inf if smallest <= 0 else largest / smallest
