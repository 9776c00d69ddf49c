"""Sort-based allocation against the naive greedy loop; selection and compactness against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corda.plan.allocation import Candidate, allocate, step_scores
from corda.plan.compactness import compactness, extreme_eigenvalues
from corda.plan.selection import candidate_score, choose


def score(layer, r):
    """s(r) straight from the paper, r components filtered."""
    s = layer.spectrum.double()
    return layer.log_pi * float(s[r - 1]) / float(s[r:].sum())


def naive(layers, budget, mode, floor=1, cap=None):
    """The greedy loop, one component at a time."""
    widths = [len(layer.spectrum) for layer in layers]
    high = [min(w - 1, cap or w) for w in widths]
    low = [min(floor, h) for h in high]
    if mode == "kpm":
        r, last = list(low), high
    else:
        r, last = [w - h for w, h in zip(widths, high, strict=True)], [w - x for w, x in zip(widths, low, strict=True)]
    while True:
        adapted = r if mode == "kpm" else [w - x for w, x in zip(widths, r, strict=True)]
        spent = sum(layer.cost * x for layer, x in zip(layers, adapted, strict=True))
        if mode == "ipm" and spent <= budget:
            return adapted
        free = [i for i in range(len(layers)) if r[i] < last[i]]
        if not free:
            return adapted
        i = min(free, key=lambda i: (score(layers[i], r[i]), i))
        if mode == "kpm" and spent + layers[i].cost > budget:
            return adapted
        r[i] += 1


def spectra(draw_ties):
    values = st.sampled_from([0.5, 1.0, 2.0, 4.0]) if draw_ties else st.floats(1e-3, 1e3)
    return st.lists(values, min_size=3, max_size=12)


@st.composite
def problems(draw):
    ties = draw(st.booleans())
    layers = [
        Candidate(
            torch.tensor(sorted(draw(spectra(ties))), dtype=torch.float64),
            draw(st.sampled_from([1.0, 2.0])) if ties else draw(st.floats(0.1, 20)),
            draw(st.integers(1, 9)),
        )
        for _ in range(draw(st.integers(1, 5)))
    ]
    floor = draw(st.integers(1, 2))
    least = sum(layer.cost * min(floor, len(layer.spectrum) - 1) for layer in layers)
    most = sum(layer.cost * len(layer.spectrum) for layer in layers)
    return layers, draw(st.integers(least, most)), floor, draw(st.sampled_from([None, 3, 6]))


@settings(max_examples=300, deadline=None)
@given(problems(), st.sampled_from(["kpm", "ipm"]))
def test_one_sort_is_the_greedy_loop(problem, mode):
    layers, budget, floor, cap = problem
    ranks = allocate(layers, budget, mode, floor=floor, cap=cap)
    assert ranks == naive(layers, budget, mode, floor, cap)
    assert sum(layer.cost * r for layer, r in zip(layers, ranks, strict=True)) <= budget
    for layer, r in zip(layers, ranks, strict=True):
        high = min(len(layer.spectrum) - 1, cap or 99)
        assert min(floor, high) <= r <= high


@settings(max_examples=100, deadline=None)
@given(problems())
def test_step_scores_are_the_formula_and_grow(problem):
    for layer in problem[0]:
        steps = step_scores(layer)
        assert steps.tolist() == pytest.approx([score(layer, r) for r in range(1, len(layer.spectrum))])
        assert (steps.diff() >= 0).all()


def test_ipm_is_the_complement_of_kpm_on_the_same_scores():
    torch.manual_seed(0)
    layers = [Candidate(torch.rand(20).sort().values + 0.01, 1.0 + i, 7) for i in range(6)]
    whole = sum(layer.cost * 20 for layer in layers)
    for budget in (7 * 6 * 3, 7 * 6 * 9 + 7):
        filtered = allocate(layers, budget, "kpm")
        remaining = allocate(layers, whole - 7 * sum(filtered), "ipm")
        assert [f + r for f, r in zip(filtered, remaining, strict=True)] == [20] * 6


def test_overshooting_takes_one_step_more():
    torch.manual_seed(1)
    layers = [Candidate(torch.rand(20).sort().values + 0.01, 1.0 + i, 7 + i) for i in range(6)]
    exact, over = (allocate(layers, 400, "kpm", overshoot=o) for o in (False, True))
    assert sum(over) == sum(exact) + 1


def test_a_budget_below_one_per_layer_and_a_negative_log_are_errors():
    layers = [Candidate(torch.rand(9).sort().values, 1.0, 10)] * 3
    with pytest.raises(ValueError, match="below 30"):
        allocate(layers, 29, "kpm")
    with pytest.raises(ValueError, match="not positive"):
        allocate([Candidate(torch.rand(9).sort().values, -1.0, 10)], 50, "kpm")
    with pytest.raises(ValueError, match="not positive"):
        candidate_score(0.0, torch.rand(4))


def covariance(d, tokens, size, seed=0):
    g = torch.Generator().manual_seed(seed)
    X = size * torch.randn(d, tokens, generator=g, dtype=torch.float64) * torch.logspace(0, -1, d)[:, None]
    return X @ X.T / tokens


def test_compactness_is_its_formula():
    C = covariance(30, 200, 5.0)
    lam = 0.02 * C.diagonal().mean()
    values = torch.linalg.eigvalsh(C) + lam
    found = compactness(C, 70, damp=0.02)
    assert found.log_pi == pytest.approx(math.log(math.sqrt(70 * float(values[-1])) / float(values[0])))
    assert not found.floor_decided
    assert compactness(covariance(30, 10, 5.0), 70, damp=0.02).floor_decided
    with pytest.raises(ValueError, match="singular"):
        compactness(covariance(30, 10, 5.0) * 0, 70)


def test_unit_scale_is_free_of_a_common_factor_and_token_scale_is_not():
    C = covariance(30, 200, 5.0)
    unit, token = ([compactness(k * C, 70, scale=s).log_pi for k in (1.0, 1e4)] for s in ("unit", "token"))
    assert unit[0] == pytest.approx(unit[1])
    assert token[0] == pytest.approx(token[1] + 0.5 * math.log(1e4))
    assert compactness(1e9 * C, 70).log_pi < 0


def test_extreme_eigenvalues_beyond_the_exact_size(monkeypatch):
    from corda.plan import compactness as module

    C = covariance(120, 700, 3.0)
    exact = extreme_eigenvalues(C)
    monkeypatch.setattr(module, "_EXACT", 10)
    assert extreme_eigenvalues(C) == pytest.approx(exact, rel=1e-3)
    assert extreme_eigenvalues(covariance(120, 50, 3.0))[0] == pytest.approx(0.0, abs=1e-9)


def test_choose_takes_the_lowest_and_the_first_of_equals():
    assert choose([3.0, 1.0, 2.0, 1.0]) == 1
    flat, peaked = torch.ones(10), torch.tensor([10.0] + [0.1] * 9)
    assert candidate_score(2.0, peaked) < candidate_score(2.0, flat) == pytest.approx(20.0)
