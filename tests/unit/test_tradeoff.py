"""Directions weighed by two contexts, against SciPy's generalised eigenproblem in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg as scipy_linalg

from corda import linalg, tradeoff


def moment(d, tokens, seed, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64) * torch.logspace(1, -2, d, dtype=torch.float64)
    X = scale * mix @ torch.randn(d, tokens, generator=generator, dtype=torch.float64)
    return X @ X.T / tokens


def pair(d=40, task_tokens=300, kept_tokens=200):
    return tradeoff.unit_trace(moment(d, task_tokens, 0)), tradeoff.unit_trace(moment(d, kept_tokens, 1, 0.2))


@pytest.mark.parametrize(("task_tokens", "kept_tokens"), [(300, 200), (15, 200), (300, 15), (12, 9)])
@pytest.mark.parametrize("mu", [1.0, 0.01])
def test_contrast_is_scipys_generalised_eigenproblem(task_tokens, kept_tokens, mu):
    d, r = 40, 8
    T, K = pair(d, task_tokens, kept_tokens)
    found = tradeoff.directions(T, K, r, mu=mu)
    values, vectors = scipy_linalg.eigh(T.numpy(), K.numpy() + mu / d * np.eye(d))
    assert np.allclose(found.values, values[::-1][:r], rtol=1e-9)
    assert np.allclose(found.spectrum, values[::-1].clip(0), rtol=1e-7, atol=1e-12 * values.max())
    assert np.allclose(tradeoff.thetas(T, K, mu), values[::-1].clip(0), rtol=1e-7, atol=1e-12 * values.max())
    theirs = vectors[:, ::-1][:, :r] / np.linalg.norm(vectors[:, ::-1][:, :r], axis=0)
    assert np.allclose(np.abs((found.vectors.numpy() * theirs).sum(axis=0)), 1, atol=1e-8)
    E = K + mu / d * torch.eye(d, dtype=torch.float64)
    along = [((C @ found.vectors) * found.vectors).sum(dim=0) for C in (T, E)]
    assert torch.allclose(along[0] / along[1], found.values)


@pytest.mark.parametrize("task_tokens", [2000, 90])
def test_krylov_finds_the_exact_directions(task_tokens):
    T, K = pair(220, task_tokens, 900)
    exact, fast = (tradeoff.directions(T, K, 12, solver=solver) for solver in ("exact", "krylov"))
    assert (exact.path, fast.path, fast.spectrum) == ("exact", "krylov", None)
    assert torch.allclose(fast.values, exact.values, rtol=1e-4)
    E = K + torch.eye(220, dtype=torch.float64) / 220
    root = torch.linalg.cholesky(E)
    bases = [torch.linalg.qr(root.T @ found.vectors)[0] for found in (exact, fast)]
    leading = torch.linalg.svdvals(bases[0][:, :6].T @ bases[1])
    assert float(leading.min()) > 1 - 1e-4


def test_the_scale_of_either_context_does_not_matter():
    C_t, C_k = moment(30, 100, 0), moment(30, 100, 1)
    one = tradeoff.directions(tradeoff.unit_trace(C_t), tradeoff.unit_trace(C_k), 5)
    other = tradeoff.directions(tradeoff.unit_trace(1e6 * C_t), tradeoff.unit_trace(1e-5 * C_k), 5)
    assert torch.allclose(one.vectors, other.vectors, atol=1e-8)
    assert float(tradeoff.unit_trace(C_t).trace()) == pytest.approx(1)


def test_one_direction_of_huge_activations_does_not_hide_the_others_at_unit_median():
    d = 40
    C_t, C_k = moment(d, 300, 0), moment(d, 300, 1)
    huge = torch.zeros(d, dtype=torch.float64)
    huge[3] = 4e3
    shared = [C + torch.outer(huge, huge) * size for C, size in ((C_t, 1.0), (C_k, 0.9))]
    at_trace, at_median = ([scale(C) for C in shared] for scale in (tradeoff.unit_trace, tradeoff.unit_median))
    assert abs(float(tradeoff.directions(*at_trace, 1).vectors[3, 0])) > 0.99
    assert float(tradeoff.directions(*at_median, 4).vectors[3].abs().max()) < 0.1
    plain = tradeoff.directions(tradeoff.unit_median(C_t), tradeoff.unit_median(C_k), 4).values
    assert torch.allclose(tradeoff.directions(*at_median, 4).values, plain, rtol=0.5)
    values = torch.linalg.eigvalsh(at_median[0])
    assert float(values.median()) == pytest.approx(1 / d, rel=0.1)
    rounded = (C_k + 1e14 * torch.outer(huge, huge)).float()
    assert torch.isfinite(tradeoff.directions(at_median[0], tradeoff.unit_median(rounded), 4).vectors).all()
    singular = torch.linalg.eigvalsh(tradeoff.unit_median(moment(d, 9, 2)))
    assert float(singular[-9:].median()) == pytest.approx(1 / d, rel=1e-6)


def test_a_small_mu_keeps_more_of_the_knowledge_out():
    T, K = pair()
    shares = [tradeoff.share(tradeoff.directions(T, K, 8, mu=mu).vectors, K) for mu in (100.0, 1.0, 0.01)]
    task = tradeoff.share(tradeoff.directions(T, K, 8, kind="task").vectors, K)
    null = tradeoff.share(tradeoff.directions(T, K, 8, kind="null").vectors, K)
    assert task > shares[0] > shares[1] > shares[2] > null


def test_controls_are_the_eigenvectors_they_say():
    T, K = pair()
    values = {}
    for kind, matrix, end in (("task", T, -1), ("null", K, 0), ("combination", 0.7 * T - 0.3 * K, -1)):
        found = tradeoff.directions(T, K, 6, kind=kind, beta=0.3)
        theirs = np.linalg.eigvalsh(matrix.numpy())
        assert found.values[0] == pytest.approx(theirs[end], abs=1e-12)
        assert np.allclose(matrix @ found.vectors, found.vectors * found.values, atol=1e-10)
        assert torch.allclose(found.vectors.T @ found.vectors, torch.eye(6, dtype=torch.float64), atol=1e-10)
        values[kind] = found.vectors
    assert tradeoff.share(values["null"], K) < 1e-4 < tradeoff.share(values["task"], K)
    one, same, other = (tradeoff.directions(T, K, 6, kind="random", seed=seed).vectors for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert float((one.T @ other).abs().max()) < 0.9


@pytest.mark.parametrize("orthonormal", [False, True])
def test_rows_have_one_length(orthonormal):
    T, K = pair()
    found = tradeoff.directions(T, K, 8)
    A = tradeoff.rows(found.vectors, length=0.5, orthonormal=orthonormal)
    assert A.shape == (8, 40)
    assert torch.allclose(A.norm(dim=1), torch.full((8,), 0.5))
    off = (A @ A.T - 0.25 * torch.eye(8)).abs().max()
    assert (float(off) < 1e-6) == orthonormal
    both = torch.cat([A.double(), found.vectors.T])
    assert int((torch.linalg.svdvals(both) > 1e-6).sum()) == 8


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_output_moments_are_those_of_the_weight(exponent):
    W = torch.randn(25, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    C = moment(40, 10, 0)
    reduced = linalg.reduce(W)
    found = tradeoff.unit_trace(tradeoff.output_moment(reduced.R, C, exponent))
    values, vectors = np.linalg.eigh(C.numpy())
    power = (vectors * values.clip(0) ** (2 * exponent)) @ vectors.T
    G = W.numpy() @ power @ W.numpy().T
    assert np.allclose(found, G / np.trace(G), atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda T, K: tradeoff.directions(T, K, 41), "rank 41"),
        (lambda T, K: tradeoff.directions(T, K, 0), "rank 0"),
        (lambda T, K: tradeoff.directions(T * float("nan"), K, 4), "not finite"),
        (lambda T, K: tradeoff.directions(T, K - torch.eye(40), 4, mu=0.1), r"raise adapter\.mu"),
        (lambda T, K: tradeoff.unit_trace(0 * T), "trace"),
        (lambda T, K: tradeoff.output_moment(torch.eye(40, dtype=torch.float64), T, 0.0), "exponent 0"),
    ],
)
def test_what_has_no_answer_is_refused(call, message):
    T, K = pair()
    with pytest.raises(ValueError, match=message):
        call(T, K)
