"""Factors of modes dual and contrast: directions weighed by two contexts at once (docs/papers.md, ours)."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from corda import linalg, tradeoff
from corda.errors import PlanError
from corda.plan.plan import LayerPlan, scaling
from corda.recipe import AdapterOptions
from corda.targets import LayerSpec

_SPECTRA_LIMIT = 2048  # beyond this width the report does without the two covariances' own spectra
_NOTHING = 1e-9  # of the largest energy


@dataclass(frozen=True)
class Weighed:
    """One layer's factors and what they were chosen by.

    Attributes:
        layer: With its numbers filled in.
        A: (r, d_in) fp32.
        B: (d_out, r) fp32; zeros in contrast.
        spectra: "theta" (r,) or all of them, best first; "task" and "knowledge" (n,), eigenvalues of the two second
            moments at unit trace, descending, fp32, where they were computed.
    """

    layer: LayerPlan
    A: Tensor
    B: Tensor
    spectra: dict[str, Tensor]


def weigh(
    members: Sequence[tuple[LayerSpec, LayerPlan]],
    weights: Sequence[Tensor],
    task: Tensor,
    knowledge: Tensor,
    options: AdapterOptions,
    seed: int = 0,
) -> list[Weighed]:
    """Factors of layers that share their input and their candidate covariance.

    Args:
        members: Layers with their ranks.
        weights: W (d_out, d_in) of each; mode contrast does not look at their values.
        task: C_t (d_in, d_in), any scale.
        knowledge: C_k, the same.
        options: Of the adapter.
        seed: Of random directions.

    Raises:
        PlanError: the eigenproblem has no solution; names the layer.
    """
    try:
        if options.mode == "contrast":
            return _contrast(members, weights, task, knowledge, options, seed)
        return [
            _dual(spec, layer, W, task, knowledge, options, seed)
            for (spec, layer), W in zip(members, weights, strict=True)
        ]
    except ValueError as error:
        raise PlanError("the two contexts of a layer cannot be weighed", where=members[0][0].name, got=error) from None


def all_thetas(
    specs: Sequence[LayerSpec], weights: Sequence[Tensor], task: Tensor, knowledge: Tensor, options: AdapterOptions
) -> list[Tensor]:
    """Every θ of every layer, best first, (n,) fp64 on the CPU, for the allocation of ranks.

    Args:
        specs: Layers that share their input.
        weights: Each one's (d_out, d_in).
        task: C of the task, (d_in, d_in).
        knowledge: C of the knowledge, (d_in, d_in).
        options: With adapter.mu and the mode.

    Raises:
        PlanError: see `weigh`.
    """
    try:
        if options.mode == "contrast":
            T, K = _scaled(task, options), _scaled(knowledge, options)
            found = tradeoff.thetas(T, K, options.least_share).cpu()
            return [found[: spec.max_rank] for spec in specs]
        moments = [_outputs(W, task, knowledge, options)[1:] for W in weights]
        return [tradeoff.thetas(T, K, options.least_share).cpu() for T, K in moments]
    except ValueError as error:
        raise PlanError("the two contexts of a layer cannot be weighed", where=specs[0].name, got=error) from None


def allocate_by_theta(
    thetas: Sequence[Tensor], costs: Sequence[int], budget: int, *, floor: int = 1, cap: int | None = None
) -> list[int]:
    """Ranks of every layer: components in the order of θ per parameter, as many as the budget holds (ours).

    θ is a ratio of shares at unit trace and so comparable between layers; because it falls within a layer, the greedy
    choice is one sort. The first component that does not fit ends it, so a budget is never passed.

    Args:
        thetas: Of each layer, best first.
        costs: Parameters per component.
        budget: Parameters in all.
        floor: Smallest rank of a layer.
        cap: Largest rank of a layer.

    Raises:
        ValueError: the budget is below `floor` per layer.
    """
    highest = [min(len(values), cap or len(values)) for values in thetas]
    lowest = [min(floor, high) for high in highest]
    least = sum(cost * low for cost, low in zip(costs, lowest, strict=True))
    if budget < least:
        raise ValueError(f"the budget of {budget} parameters is below {least}, rank {floor} in each layer")
    steps = [values[low:high] / c for values, c, low, high in zip(thetas, costs, lowest, highest, strict=True)]
    owner = torch.cat([torch.full((len(part),), index) for index, part in enumerate(steps)])
    order = torch.sort(torch.cat(steps), descending=True, stable=True).indices
    owner = owner[order]
    spent = torch.tensor(list(costs))[owner].cumsum(0)
    taken = torch.bincount(owner[: int((spent <= budget - least).sum())], minlength=len(costs)).tolist()
    return [low + more for low, more in zip(lowest, taken, strict=True)]


def ranks_by_theta(
    layers: Mapping[str, LayerPlan], thetas: Mapping[str, Tensor], options: AdapterOptions
) -> dict[str, LayerPlan]:
    """The layers with ranks by θ per parameter under the options' budget.

    Args:
        layers: Layer name -> what is known of it.
        thetas: Layer name -> (n,) θ, best first.
        options: With budget, floor and cap.

    Raises:
        PlanError: the budget is below the floor of ranks.
    """
    costs = [options.cost(layer.d_out, layer.d_in) for layer in layers.values()]
    budget = options.budget or sum(costs) * options.rank
    ordered = [thetas[name] for name in layers]
    try:
        ranks = allocate_by_theta(ordered, costs, budget, floor=options.rank_floor, cap=options.rank_cap)
    except ValueError as error:
        raise PlanError("ranks cannot be allocated", where="adapter.budget", got=error) from None
    return {name: replace(layer, rank=r) for (name, layer), r in zip(layers.items(), ranks, strict=True)}


def _contrast(
    members: Sequence[tuple[LayerSpec, LayerPlan]],
    weights: Sequence[Tensor],
    task: Tensor,
    knowledge: Tensor,
    options: AdapterOptions,
    seed: int,
) -> list[Weighed]:
    T, K = _scaled(task, options), _scaled(knowledge, options)
    widest = max(layer.rank for _, layer in members)
    best = _best(T, K, widest, members[0][0].name, options, seed)
    spectra = _own_spectra(T, K)
    found = []
    for (spec, layer), W in zip(members, weights, strict=True):
        r = layer.rank
        V = best.vectors[:, :r]
        A = tradeoff.rows(V, length=options.row_norm, orthonormal=options.orthonormal)
        B = torch.zeros(spec.d_out, r, dtype=torch.float32, device=W.device)
        found.append(_weighed(replace(layer, norm_ratio=0.0), A, B, V, best, T, K, spectra))
    return found


def _dual(
    spec: LayerSpec,
    layer: LayerPlan,
    W: Tensor,
    task: Tensor,
    knowledge: Tensor,
    options: AdapterOptions,
    seed: int,
) -> Weighed:
    reduced, T, K = _outputs(W, task, knowledge, options)
    best = _best(T, K, layer.rank, spec.name, options, seed)
    U = linalg.fix_signs(torch.linalg.qr(reduced.lift(best.vectors))[0])
    chosen = linalg.Subspace(U, best.values, None, best.path, float("nan"))
    A, B, dead = linalg.factors(W, chosen, scaling=scaling(options, layer.rank), balance="equal")
    layer = replace(layer, dead=dead, norm_ratio=float(A.norm()) / max(float(B.norm()), 1e-30))
    return _weighed(layer, A, B, best.vectors, best, T, K, _own_spectra(T, K))


def _outputs(
    W: Tensor, task: Tensor, knowledge: Tensor, options: AdapterOptions
) -> tuple[linalg.Reduced, Tensor, Tensor]:
    reduced = linalg.reduce(W)
    T, K = (_scaled(tradeoff.output_moment(reduced.R, C, options.exponent), options) for C in (task, knowledge))
    return reduced, T, K


def _scaled(C: Tensor, options: AdapterOptions) -> Tensor:
    return tradeoff.unit_median(C) if options.normalise == "median" else tradeoff.unit_trace(C)


def _best(T: Tensor, K: Tensor, rank: int, name: str, options: AdapterOptions, seed: int) -> tradeoff.Directions:
    return tradeoff.directions(
        T,
        K,
        rank,
        kind=options.directions,
        mu=options.least_share,
        beta=options.beta,
        seed=zlib.crc32(f"{seed} {name}".encode()),
    )


def _weighed(
    layer: LayerPlan,
    A: Tensor,
    B: Tensor,
    V: Tensor,
    best: tradeoff.Directions,
    T: Tensor,
    K: Tensor,
    spectra: dict[str, Tensor],
) -> Weighed:
    r = layer.rank
    values = best.values[:r]
    # Not every kind of direction is ordered by the task; what has nothing of it has no energy there.
    own = best.vectors[:, :r].to(T)
    of_task = (own * (T @ own)).sum(0)
    empty = int((of_task <= _NOTHING * T.diagonal().max()).sum()) if layer.dead == 0 else layer.dead
    layer = replace(
        layer,
        solver=best.path,
        energy=tradeoff.share(V, tradeoff.unit_trace(K)),
        task_energy=tradeoff.share(V, tradeoff.unit_trace(T)),
        theta=(float(values[0]), float(values[-1])),
        dead=empty,
    )
    theta = (best.values[:r] if best.spectrum is None else best.spectrum).float().cpu()
    return Weighed(layer, A.cpu(), B.cpu(), {"theta": theta.clone(), **{k: v.clone() for k, v in spectra.items()}})


def _own_spectra(T: Tensor, K: Tensor) -> dict[str, Tensor]:
    if len(T) > _SPECTRA_LIMIT:
        return {}
    pairs = (("task", tradeoff.unit_trace(T)), ("knowledge", tradeoff.unit_trace(K)))
    return {name: torch.linalg.eigvalsh(C.float()).flip(0).clamp_min(0).cpu() for name, C in pairs}
