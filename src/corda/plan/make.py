"""Make a Plan: survey the layers where something is to be chosen, give out ranks, factorise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from corda import linalg
from corda.context.again import Recollected
from corda.context.store import Context
from corda.distributed import ALONE, Processes
from corda.errors import PlanError
from corda.journal import Journal
from corda.metric import full_precision
from corda.plan.allocation import Candidate, allocate
from corda.plan.byhand import by_hand, check_ranks_by_hand, with_ranks_by_hand
from corda.plan.part import Part
from corda.plan.passes import Passes
from corda.plan.plan import LayerPlan, Plan, check_ranks, corrected
from corda.plan.sharing import PARTS, SURVEYED, THETAS, Shared, Weights
from corda.plan.weigh import ranks_by_theta
from corda.progress import Progress, silent
from corda.reading import parse_adapter
from corda.recipe import TWO_CONTEXTS, AdapterOptions, Selection
from corda.sharding import device_of
from corda.targets import LayerSpec

Groups = Mapping[str, Sequence[LayerSpec]]  # layers by the input that they share


def make_plan(
    model: nn.Module,
    context: Context | Sequence[LayerSpec],
    options: AdapterOptions | None = None,
    *,
    selection: Selection = "first",
    journal: Journal | None = None,
    weights: Callable[[str], Tensor] | None = None,
    device: torch.device | None = None,
    quantise: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    progress: Progress = silent,
    processes: Processes = ALONE,
    **settings: Any,
) -> Plan:
    """Choose the components of every layer and build their factors (CorDA, eqs. 2-5; CorDA++, eqs. 7-10).

    Args:
        model: The base model that the context was collected on; only read.
        context: Covariances, or the bare layers for mode "lora".
        options: Adapter options.
        selection: Which of a context's candidates a layer takes: the first, all pooled, or the one of lowest score.
        journal: Where finished layers are kept, so that an interrupted decomposition continues.
        weights: For a model without weights: gives a parameter by its full name.
        device: To compute on; default: that of the model.
        quantise: For a 4-bit model: W (d_out, d_in) -> Q(W) as numbers; see `corda.quantization.round_trip`.
        seed: Of random directions.
        progress: Shows how far it is.
        processes: `corda.distributed.world()` shares the layers out over all of torch.distributed's processes, which
            then all have to call this with the same arguments; a model sharded by FSDP2 is always shared out.
        settings: Adapter options by name instead, e.g. mode="ipm", rank=32.

    Raises:
        PlanError: a rank (also one set by hand) or budget that the layers do not allow, log π that is not positive,
            or a mode that needs a context and has none.
    """
    if options is not None and settings:
        raise PlanError("give adapter options or settings by name, not both", got=", ".join(settings))
    options = options or parse_adapter(settings)
    specs = context.layers if isinstance(context, Context) else tuple(context)
    check_ranks_by_hand(specs, options, context.rounds if isinstance(context, Context) else 1)
    rank = uniform_rank(specs, options)
    trained = not options.freezes_a
    blank = {s.name: LayerPlan(s.name, s.kind, s.d_out, s.d_in, rank, s.name, train_a=trained) for s in specs}
    if options.mode == "lora":
        blank, changed = with_ranks_by_hand(blank, options)
        return Plan(options, tuple(blank.values()), warnings=(changed,) if changed else ())
    if not isinstance(context, Context):
        raise PlanError("a mode that needs covariances got none", where=f"mode {options.mode}", fix="collect first")
    device = device or device_of(model)
    weight = Weights(model, weights, device)
    if corrected(options, quantise is not None) != "none" and quantise is None:
        raise PlanError(
            "there is no error of 4 bits to correct",
            where=f"adapter.correction {options.correction}",
            fix="set model.load_in_4bit: true, or correction: none",
        )
    weighs = options.mode in TWO_CONTEXTS
    learn = context.side("learn") if weighs else None
    work = Passes(context, options, selection, weight, device, journal, quantise, learn, seed)
    groups = context.members()
    small = device.type == "cpu" and max(min(spec.d_out, spec.d_in) for spec in specs) <= linalg.EXACT_LIMIT
    share = Shared(weight, processes, small, isinstance(context.packed, Recollected), progress)
    with torch.no_grad(), full_precision():
        layers = _ranked(work, share, groups, blank, rank)
        layers, changed = with_ranks_by_hand(layers, options)
        made = share.each(work.factorise, _with_plans(groups, layers), "decompose", PARTS)
    parts = {part.layer.name: part for some in made for part in some}
    notes = (*context.warnings, *([changed] if changed else []))
    return _assembled(options, [parts[spec.name] for spec in specs], notes)


def _with_plans(groups: Groups, layers: Mapping[str, LayerPlan]) -> list[tuple[str, list[tuple[LayerSpec, LayerPlan]]]]:
    return [(group, [(spec, layers[spec.name]) for spec in members]) for group, members in groups.items()]


def _ranked(
    work: Passes, share: Shared, groups: Groups, blank: dict[str, LayerPlan], rank: int
) -> dict[str, LayerPlan]:
    """Candidate and rank of every layer, by spectra or θ where something is to be chosen; no vectors yet."""
    options, weighs = work.options, work.learn is not None
    layers = blank
    if work.selection == "dynamic" or (options.allocation == "dynamic" and not weighs):
        found = share.each(work.survey, list(groups.items()), "survey", SURVEYED)
        surveyed = {layer.name: (layer, spectrum) for survey in found for layer, spectrum in survey}
        ranks = dict.fromkeys(surveyed, rank) if weighs else _ranks(surveyed, options, rank)
        layers = {
            name: replace(layer, rank=ranks[name], train_a=blank[name].train_a) for name, (layer, _) in surveyed.items()
        }
    else:
        taken = None if work.selection == "pooled" else 0
        layers = {name: replace(layer, chosen=taken) for name, layer in layers.items()}
    layers = {spec.name: work.with_round_by_hand(spec, layers[spec.name]) for spec in work.context.layers}
    if weighs and options.allocation == "dynamic":
        weighed = share.each(work.thetas, _with_plans(groups, layers), "weigh", THETAS)
        layers = ranks_by_theta(layers, {name: t for some in weighed for name, t in some.items()}, options)
    return layers


def _assembled(options: AdapterOptions, parts: Sequence[Part], notes: Sequence[str]) -> Plan:
    """The plan from its layers' parts, with a word on directions that hold nothing."""
    dead = sum(part.layer.dead for part in parts)
    if dead and options.mode == "contrast":
        notes = (*notes, f"{dead} directions in which the task has nothing: fewer task tokens than the ranks ask for")
    elif dead and options.mode == "dual":
        why = "the task has fewer tokens than the ranks ask for, or the weights have nothing there"
        notes = (*notes, f"{dead} directions that hold nothing: {why}")
    elif dead:
        notes = (*notes, f"{dead} directions with negligible weight start with a zero column of B")
    return Plan(
        options,
        tuple(part.layer for part in parts),
        {part.layer.name: (part.A, part.B) for part in parts},
        {part.layer.name: part.spectrum for part in parts if part.spectrum.numel()},
        tuple(notes),
        {part.layer.name: part.removed for part in parts if part.removed},
        {part.layer.name: part.correction for part in parts if part.correction},
        {f"{part.layer.name}.{kind}": t for part in parts for kind, t in part.weighed.items()},
    )


def uniform_rank(specs: Sequence[LayerSpec], options: AdapterOptions) -> int:
    """The rank of every layer under uniform allocation: the largest that a budget allows, or the rank itself.

    Args:
        specs: The layers.
        options: With rank and budget.

    Raises:
        PlanError: larger than a layer allows, or a budget below one per layer.
    """
    per_rank = sum(options.cost(spec.d_out, spec.d_in) for spec in specs)
    rank = options.rank if options.budget is None else options.budget // per_rank
    if rank < 1:
        raise PlanError(
            "the budget is below rank 1 in every layer",
            where="adapter.budget",
            got=options.budget,
            expected=f"at least {per_rank}",
            fix="raise it, or adapt fewer layers",
        )
    if options.allocation == "uniform":
        same = [spec for spec in specs if by_hand(options, spec.name).rank is None]
        check_ranks(same, dict.fromkeys((spec.name for spec in same), rank))
    return rank


def _ranks(surveyed: Mapping[str, tuple[LayerPlan, Tensor]], options: AdapterOptions, rank: int) -> dict[str, int]:
    """Ranks by the options' allocation under their budget."""
    layers = [layer for layer, _ in surveyed.values()]
    if options.allocation == "uniform":
        return {layer.name: rank for layer in layers}
    budget = options.budget or sum((layer.d_in + layer.d_out) * options.rank for layer in layers)
    candidates = [Candidate(s, layer.log_pi or 0.0, layer.d_in + layer.d_out) for layer, s in surveyed.values()]
    try:
        ranks = allocate(
            candidates,
            budget,
            "kpm" if options.mode == "kpm" else "ipm",
            floor=options.rank_floor,
            cap=options.rank_cap,
            overshoot=options.overshoot,
        )
    except ValueError as error:
        raise PlanError("ranks cannot be allocated", where="adapter.budget", got=error) from None
    return {layer.name: r for layer, r in zip(layers, ranks, strict=True)}
