"""The iterative solver against the fp64 optimum on adversarial spectra, and its fall-back to the exact path."""

from __future__ import annotations

import pytest
import torch

from corda import krylov, linalg
from corda.metric import Metric, damping

SHAPES = [(200, 200), (320, 160), (160, 320)]


def weight(d_out, d_in, spectrum, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = min(d_out, d_in)
    U = torch.linalg.qr(torch.randn(d_out, n, generator=g, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(d_in, n, generator=g, dtype=torch.float64))[0]
    return 23.0 * (U * spectrum(n)) @ V.T


def covariance(d, tokens, seed=1):
    g = torch.Generator().manual_seed(seed)
    X = 7.0 * torch.logspace(0, -1.5, d, dtype=torch.float64)[:, None]
    X = X * torch.randn(d, tokens, generator=g, dtype=torch.float64)
    return X @ X.T / tokens


def flat(n):
    return torch.linspace(1, 0.5, n, dtype=torch.float64)


def clustered(n):
    return torch.cat([torch.full((n // 2,), 1.0), torch.full((n - n // 2,), 0.1)]).double()


def steep(decades):
    return lambda n: torch.logspace(0, -decades, n, dtype=torch.float64)


def random(n):
    return torch.rand(n, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 1e-4


SPECTRA = {"flat": flat, "clustered": clustered, "random": random, **{f"steep{k}": steep(k) for k in (2, 6, 8, 12)}}


def check(W, metric, rank, end, found, tolerance):
    S = torch.linalg.svdvals(W if metric.factor is None else W @ metric.factor)
    best = float(S.sort().values[:rank].norm() if end == "smallest" else S[:rank].norm())
    floor = max(best, 1e-12 * float(S.norm()))
    off = abs(linalg.captured_energy(W, metric, found.U) - best) / floor
    assert off < tolerance
    assert torch.allclose(found.U.T @ found.U, torch.eye(rank, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("end", ["smallest", "largest"])
@pytest.mark.parametrize("exponent", [0, 0.5, 1])
def test_captured_energy_is_the_optimum(shape, spectrum, end, exponent):
    W = weight(*shape, SPECTRA[spectrum])
    C = covariance(shape[1], 3 * shape[1])
    metric = Metric(C, exponent, damping(C, 0.01))
    found = linalg.subspace(W, metric, 16, end, solver="krylov")
    check(W, metric, 16, end, found, 1e-3)


def test_the_krylov_path_is_taken_where_it_can_be():
    C = covariance(200, 600)
    metric = Metric(C, 1, damping(C, 0.01))
    for end in ("smallest", "largest"):
        for shape in SHAPES:
            C = covariance(shape[1], 600)
            found = linalg.subspace(weight(*shape, random), Metric(C, 1, damping(C, 0.01)), 16, end, solver="krylov")
            assert found.path == "krylov"
            assert found.spectrum is None
    assert linalg.subspace(weight(200, 200, random), metric, 16, "smallest").path == "gram"


@pytest.mark.parametrize("end", ["smallest", "largest"])
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_covariance_without_damping(shape, end):
    W, C = weight(*shape, random), covariance(shape[1], 40)
    metric = Metric(C, 1, 0.0)
    found = linalg.subspace(W, metric, 12, end, solver="krylov")
    if end == "smallest":
        assert found.path.endswith("after krylov")
    check(W, metric, 12, end, found, 1e-3 if end == "largest" else 10.0)
    assert linalg.captured_energy(W, metric, found.U) <= 1e-9 * float(metric.root(W).norm()) or end == "largest"


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_weight_falls_back_and_says_so(shape):
    W, C = weight(*shape, random), covariance(shape[1], 600)
    W[3:9] = 0
    if shape[0] > shape[1]:
        W[:, 5] = W[:, 6]
    metric = Metric(C, 1, damping(C, 0.01))
    found = linalg.subspace(W, metric, 12, "smallest", solver="krylov")
    assert found.path in {"gram after krylov", "lq after krylov"}
    check(W, metric, 12, "smallest", found, 1e-3)


def test_a_stalled_iteration_falls_back(monkeypatch):
    W, C = weight(200, 200, random), covariance(200, 600)
    metric = Metric(C, 1, damping(C, 0.01))
    original = krylov.extreme
    monkeypatch.setattr(krylov, "extreme", lambda *a, **k: original(*a, **(k | {"tolerance": 0.0, "max_width": 40})))
    found = linalg.subspace(W, metric, 16, "smallest", solver="krylov")
    assert found.path == "gram after krylov"
    check(W, metric, 16, "smallest", found, 1e-8)


def test_widths_of_one_and_full_rank():
    for n in (1, 2, 9):
        W, C = weight(n, n + 3, random), covariance(n + 3, 50)
        metric = Metric(C, 1, damping(C, 0.01))
        for end in ("smallest", "largest"):
            found = linalg.subspace(W, metric, n, end, solver="krylov")
            check(W, metric, n, end, found, 1e-6)


def test_equal_inputs_give_equal_bytes():
    W, C = weight(200, 200, random), covariance(200, 600)
    one, two = (linalg.subspace(W, Metric(C, 1, 0.5), 16, "smallest", solver="krylov") for _ in range(2))
    assert torch.equal(one.U, two.U)


def test_symmetric_product():
    M = torch.randn(700, 30, dtype=torch.float64)
    G = krylov.symmetric_product(M)
    assert torch.equal(G, G.T)
    assert torch.allclose(G, M @ M.T)


def test_nan_ends():
    W, C = weight(200, 200, random), covariance(200, 600)
    W[0, 0] = float("nan")
    for solver in ("krylov", "exact"):
        with pytest.raises(ValueError, match="not finite"):
            linalg.subspace(W, Metric(C, 1, 0.5), 16, "smallest", solver=solver)


@pytest.mark.parametrize("spectrum", ["flat", "clustered", "random", "steep2", "steep6"])
@pytest.mark.parametrize("exponent", [0, 0.5, 1])
def test_wide_fp32_weights_are_not_converted_whole(spectrum, exponent, monkeypatch):
    """As with 1,200 inputs, of which an eighth is converted at a time."""
    W, C = weight(150, 1200, SPECTRA[spectrum]).float(), covariance(1200, 3000).float()
    metric = Metric(C, exponent, damping(C, 0.01))
    converted = []
    original = torch.Tensor.double

    def spy(self):
        converted.append(tuple(self.shape))
        return original(self)

    monkeypatch.setattr(torch.Tensor, "double", spy)
    found = linalg.subspace(W, metric, 12, "smallest", solver="krylov")
    monkeypatch.undo()
    if found.path == "krylov" and not spectrum.startswith("steep"):  # those are tried in fp64 next
        assert (150, 1200) not in converted
        assert (150, 150) in converted  # a strip
    check(W.double(), Metric(C.double(), exponent, metric.lam), 12, "smallest", found, 1e-3)


@pytest.mark.parametrize("exponent", [0, 0.5, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_with_a_metric_need_no_copy_of_it(exponent, dtype):
    C = covariance(1100, 2300).float()
    metric = Metric(C, exponent, 0.3)
    damped = C.double() + 0.3 * torch.eye(1100, dtype=torch.float64)
    F = {0: torch.eye(1100, dtype=torch.float64), 0.5: torch.linalg.cholesky(damped), 1: damped}[exponent]
    X = torch.randn(7, 1100, dtype=dtype, generator=torch.Generator().manual_seed(3))
    near = {"rtol": 1e-4, "atol": 1e-2} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    assert torch.allclose(metric.root(X).double(), X.double() @ F, **near)
    assert torch.allclose(metric.back(X.T.contiguous()).double(), F @ X.T.double(), **near)
    assert metric.root(X).dtype == metric.back(X.T).dtype == dtype


def test_symmetric_product_of_fp32_is_summed_in_fp64():
    M = 1e3 * torch.randn(300, 1500, generator=torch.Generator().manual_seed(2))
    G = krylov.symmetric_product(M)
    assert G.dtype == torch.float64
    assert torch.equal(G, G.T)
    assert torch.allclose(G, M.double() @ M.double().T, rtol=1e-13, atol=1e-6)
