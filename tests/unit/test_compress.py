"""Low-rank factors against full fp64 matrices: the best of its rank, a difference without cancelling, one rounding."""

from __future__ import annotations

import pytest
import torch

from corda import compress


def factors(d_out, d_in, r, seed=0, scale=7.0):
    g = torch.Generator().manual_seed(seed)
    A = scale * torch.randn(r, d_in, generator=g) * torch.logspace(0, -1.5, r)[:, None]
    return A, torch.randn(d_out, r, generator=g) / scale**0.5


@pytest.mark.parametrize(("d_out", "d_in", "r", "k"), [(40, 25, 8, 3), (12, 70, 8, 8), (9, 30, 14, 5), (30, 6, 10, 20)])
def test_truncation_is_the_best_of_its_rank(d_out, d_in, r, k):
    A, B = factors(d_out, d_in, r)
    D = B.double() @ A.double()
    sigma = torch.linalg.svdvals(D)
    found = compress.truncate(A, B, k)
    kept = min(k, r, d_out, d_in)
    assert found.A.shape == (kept, d_in)
    assert found.B.shape == (d_out, kept)
    assert found.energy == pytest.approx(float(sigma.square().sum()))
    best = float(sigma[kept:].square().sum())
    assert found.lost == pytest.approx(best, abs=1e-12 * found.energy)
    actual = float((D - found.B.double() @ found.A.double()).square().sum())
    assert actual == pytest.approx(best, rel=1e-4, abs=1e-11 * found.energy)
    assert torch.allclose(found.A.norm(dim=1), found.B.norm(dim=0), rtol=1e-4)


def test_an_update_of_zero_loses_nothing():
    found = compress.truncate(torch.zeros(4, 7), torch.randn(9, 4), 2)
    assert found.energy == found.lost == 0
    assert compress.share(found.lost, found.energy) == 0


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(30, 44, 6), (150, 110, 6), (110, 150, 40)])
def test_low_rank_of_a_full_matrix(d_out, d_in, rank):
    A, B = factors(d_out, d_in, rank)
    noise = 1e-4 * torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(5))
    D = B.double() @ A.double() + noise
    found = compress.low_rank(D, rank)
    best = float(torch.linalg.svdvals(D)[rank:].square().sum())
    assert found.A.shape == (rank, d_in)
    assert found.lost == pytest.approx(best, rel=0.05)
    again = compress.low_rank(D, rank)
    assert torch.equal(found.A, again.A)
    assert torch.equal(found.B, again.B)


def test_the_difference_does_not_cancel():
    """In 16 bits [B, -B0] [A; A0] loses what the two large products have in common; this form does not."""
    A0, B0 = factors(60, 35, 6, scale=30.0)
    g = torch.Generator().manual_seed(1)
    A, B = (X + 1e-3 * X.abs().mean() * torch.randn(X.shape, generator=g) for X in (A0, B0))
    exact = B.double() @ A.double() - B0.double() @ A0.double()

    def error(down, up):
        return float((up.double() @ down.double() - exact).norm() / exact.norm())

    ours = compress.difference(A, B, A0, B0)
    plain = torch.cat([A, A0]), torch.cat([B, -B0], dim=1)
    assert error(*ours) < 1e-4
    assert error(*(x.bfloat16() for x in ours)) < 1e-2
    assert error(*(x.bfloat16() for x in plain)) > 0.3
    A_same, B_same = compress.difference(A0, B0, A0, B0)
    assert not bool((B_same @ A_same).any())


def test_padding_changes_nothing_but_the_rank():
    A, B = factors(8, 11, 3)
    A5, B5 = compress.pad(A, B, 5)
    assert A5.shape == (5, 11)
    assert B5.shape == (8, 5)
    assert torch.equal(B5 @ A5, B @ A)
    with pytest.raises(ValueError, match="rank 3 do not fit into rank 2"):
        compress.pad(A, B, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_sum_is_rounded_once(dtype):
    A, B = factors(40, 25, 6)
    W = (3 * torch.randn(40, 25, generator=torch.Generator().manual_seed(2))).to(dtype)
    exact = W.double() + B.double() @ A.double()
    done = compress.add(W, A, B)
    assert done.dtype == dtype
    unit = torch.finfo(dtype).eps / 2
    terms = W.double().abs() + B.double().abs() @ A.double().abs()
    wide = 1e-6 if dtype != torch.float64 else 1e-15
    assert bool(((done.double() - exact).abs() <= unit * exact.abs() + wide * terms).all())
