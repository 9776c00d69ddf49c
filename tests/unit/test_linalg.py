"""U, B, A and W' against the papers' own formulas in fp64, on non-square cases that are not unit scale."""

from __future__ import annotations

import math

import pytest
import torch

from corda import linalg
from corda.metric import Metric, damping

SHAPES = [(30, 30), (50, 20), (20, 50)]


def case(d_out: int, d_in: int, *, decades: float = 2.0, seed: int = 0, tokens: int | None = None):
    g = torch.Generator().manual_seed(seed)
    n = min(d_out, d_in)
    U = torch.linalg.qr(torch.randn(d_out, n, generator=g, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(d_in, n, generator=g, dtype=torch.float64))[0]
    W = 37.0 * (U * torch.logspace(0, -decades / 2, n, dtype=torch.float64)) @ V.T
    X = torch.randn(d_in, tokens or 4 * d_in, generator=g, dtype=torch.float64)
    X = 11.0 * torch.logspace(0, -decades / 4, d_in, dtype=torch.float64)[:, None] * X
    return W, X @ X.T / X.shape[1]


def paper(W: torch.Tensor, C: torch.Tensor, rank: int, end: str):
    """Eqs. 2-5 with the explicit inverse."""
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    V = Vh @ torch.linalg.inv(C)
    s = slice(len(S) - rank, None) if end == "smallest" else slice(0, rank)
    B, A = U[:, s] * S[s].sqrt(), S[s].sqrt()[:, None] * V[s]
    return B, A, W - B @ A, S[s]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("end", ["smallest", "largest"])
@pytest.mark.parametrize("scaling", [1.0, 0.25])
@pytest.mark.parametrize("balance", ["equal", "sigma"])
def test_factors_are_the_papers(shape, end, scaling, balance):
    W, C = case(*shape)
    lam = damping(C, 0.01)
    damped = C + lam * torch.eye(C.shape[0], dtype=C.dtype)
    B0, A0, residual, sigma = paper(W, damped, 5, end)
    found = linalg.subspace(W, Metric(C, 1, lam), 5, end)
    A, B, dead = linalg.factors(W, found, scaling=scaling, balance=balance)
    A, B = A.double(), B.double()
    assert dead == 0
    assert torch.allclose(found.sigma, sigma.sort().values, rtol=1e-8)
    scale = W.norm()
    assert (scaling * B @ A - B0 @ A0).norm() / scale < 1e-6
    assert (W - scaling * B @ A - residual).norm() / scale < 1e-6
    if balance == "sigma":
        order = found.sigma.argsort(descending=True)
        products = (B[:, order] / B0 * math.sqrt(scaling)).abs()
        assert torch.allclose(products, torch.ones_like(products), rtol=1e-4)
        assert torch.allclose((A[order] * math.sqrt(scaling)).norm(dim=1), A0.norm(dim=1), rtol=1e-5)
    else:
        assert torch.allclose(B.norm(dim=0), A.norm(dim=1), rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("end", ["smallest", "largest"])
@pytest.mark.parametrize("exponent", [0, 0.5, 1])
def test_exponents_are_the_svd_of_w_c_to_the_a(shape, end, exponent):
    W, C = case(*shape, seed=3)
    lam = damping(C, 0.01)
    values, vectors = torch.linalg.eigh(C + lam * torch.eye(C.shape[0], dtype=C.dtype))
    M = W @ (vectors * values**exponent) @ vectors.T
    U, S, _ = torch.linalg.svd(M, full_matrices=False)
    chosen = U[:, -6:] if end == "smallest" else U[:, :6]
    found = linalg.subspace(W, Metric(C, exponent, lam), 6, end)
    assert (found.U @ found.U.T - chosen @ chosen.T).norm() < 1e-7
    assert torch.allclose(found.spectrum, S.flip(0), rtol=1e-8, atol=1e-10 * float(S[0]))
    assert torch.allclose(linalg.spectrum(W, Metric(C, exponent, lam)), S.flip(0), rtol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("end", ["smallest", "largest"])
def test_singular_covariance_needs_no_damping(shape, end):
    W, C = case(*shape, tokens=7)
    found = linalg.subspace(W, Metric(C, 1, 0.0), 4, end)
    A, B, _ = linalg.factors(W, found, scaling=1.0, balance="equal")
    P = found.U @ found.U.T
    assert torch.isfinite(A).all()
    assert torch.isfinite(B).all()
    assert (B.double() @ A.double() - P @ W).norm() / W.norm() < 1e-6
    energy = linalg.captured_energy(W, Metric(C, 1, 0.0), found.U)
    S = torch.linalg.svdvals(W @ C)
    best = S.sort().values[:4].norm() if end == "smallest" else S[:4].norm()
    assert abs(energy - best) <= 1e-7 * S[0]


@pytest.mark.parametrize("decades", [2, 6, 8, 12])
def test_small_end_is_optimal_on_steep_spectra(decades):
    n, rank = 60, 8
    g = torch.Generator().manual_seed(1)
    U = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    S = torch.logspace(0, -decades, n, dtype=torch.float64)
    W = (U * S) @ V.T
    C = torch.eye(n, dtype=torch.float64)
    found = linalg.subspace(W, Metric(C, 1, 0.0), rank, "smallest")
    best = S[-rank:].norm()
    excess = linalg.captured_energy(W, Metric(C, 1, 0.0), found.U) / best - 1
    assert excess < 1e-5
    assert decades == 6 or found.path == ("gram" if decades < 6 else "lq")  # 6 is the limit itself


def test_gram_alone_would_fail_where_lq_is_used():
    n, rank = 60, 8
    g = torch.Generator().manual_seed(1)
    U = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    S = torch.logspace(0, -12, n, dtype=torch.float64)
    M = (U * S) @ V.T
    gram = torch.linalg.eigh(M @ M.T)[1][:, :rank]
    assert (gram.T @ M).norm() / S[-rank:].norm() > 10


def test_equal_inputs_give_equal_bytes_and_positive_signs():
    W, C = case(40, 30, seed=5)
    one = linalg.subspace(W, Metric(C, 1, 0.1), 6, "smallest")
    two = linalg.subspace(W.clone(), Metric(C.clone(), 1, 0.1), 6, "smallest")
    assert torch.equal(one.U, two.U)
    rows = one.U.abs().argmax(dim=0)
    assert (one.U[rows, torch.arange(6)] > 0).all()


def test_scale_of_c_leaves_the_product_alone():
    W, C = case(25, 40, seed=6)
    products = []
    for k in (1.0, 1000.0):
        found = linalg.subspace(W, Metric(k * C, 1, damping(k * C, 0.01)), 5, "smallest")
        A, B, _ = linalg.factors(W, found, scaling=2.0, balance="sigma")
        products.append((B @ A, B.norm()))
    assert torch.allclose(products[0][0], products[1][0], atol=1e-4)
    assert products[1][1] / products[0][1] == pytest.approx(1000**0.5, rel=1e-3)


def test_dead_rows_get_a_unit_row_of_a_and_a_zero_column_of_b():
    W, C = case(20, 50, seed=7)
    W[3] = 0
    W[11] = 0
    found = linalg.subspace(W, Metric(C, 1, damping(C, 0.01)), 4, "smallest")
    A, B, dead = linalg.factors(W, found, scaling=1.0, balance="equal")
    assert dead == 2
    zero = B.norm(dim=0) == 0
    assert int(zero.sum()) == 2
    assert torch.allclose(A[zero].norm(dim=1), torch.ones(2), rtol=1e-5)


@pytest.mark.parametrize("rank", [0, 21])
def test_rank_out_of_range_is_refused(rank):
    W, C = case(20, 50)
    with pytest.raises(ValueError, match=r"not in 1\.\.20"):
        linalg.subspace(W, Metric(C, 1, 0.1), rank, "smallest")


def test_full_rank_and_width_one():
    W, C = case(20, 50)
    found = linalg.subspace(W, Metric(C, 1, 0.1), 20, "smallest")
    A, B, _ = linalg.factors(W, found, scaling=1.0, balance="equal")
    assert (B.double() @ A.double() - W).norm() / W.norm() < 1e-6
    one = linalg.subspace(torch.tensor([[3.0, 4.0]]), Metric(torch.eye(2), 1, 0.0), 1, "largest")
    assert one.sigma.item() == pytest.approx(5.0)


def test_nan_is_an_error_and_ends():
    W, C = case(20, 30)
    C[2, 2] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        linalg.subspace(W, Metric(C, 1, 0.1), 4, "smallest")
