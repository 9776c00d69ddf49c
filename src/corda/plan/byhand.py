"""Ranks and rounds set by hand, layer by layer, over what selection and allocation give."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import yaml

from corda.errors import PlanError
from corda.plan.plan import LayerPlan, Plan
from corda.ranks import LayerRank
from corda.recipe import AdapterOptions
from corda.targets import LayerSpec

CHANGED = "adapter.ranks changed"  # how the sentence begins that says so in a plan's warnings
_NOTHING = LayerRank.model_construct()


def check_ranks_by_hand(specs: Sequence[LayerSpec], options: AdapterOptions, rounds: int) -> None:
    """Refuse `adapter.ranks` that the layers or the context do not allow, with every problem at once.

    Args:
        specs: The layers that are adapted.
        options: Adapter options, `ranks` among them.
        rounds: Candidate covariances that a context has.

    Raises:
        PlanError: an unknown layer, a rank outside of 1..min(d_out, d_in), a round that there is not, or more
            parameters in the named layers alone than `adapter.budget`.
    """
    known = {spec.name: spec for spec in specs}
    problems = []
    for name, given in options.ranks.items():
        spec = known.get(name)
        if spec is None:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f", did you mean {near[0]!r}?" if near else ""
            problems.append(f"{name!r} is none of the {len(known)} adapted layers{hint}")
            continue
        if given.rank is not None and given.rank > spec.max_rank:
            problems.append(f"{name} is {spec.d_out}x{spec.d_in}: rank {given.rank} is not in 1..{spec.max_rank}")
        if given.round is not None and options.mode == "lora":
            problems.append(f"{name}: mode lora has no covariances to choose a round of")
        elif isinstance(given.round, int) and given.round >= rounds:
            there = f"rounds 0 to {rounds - 1}" if rounds > 1 else "round 0 only"
            problems.append(f"{name}: there is no round {given.round}, the context has {there}")
    if problems:
        raise PlanError(
            f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the ranks by hand: " + "; ".join(problems),
            where="adapter.ranks",
            fix="correct the lines; `corda plan RECIPE --save-ranks FILE` writes a file that fits",
        )
    named = [(known[name], given.rank) for name, given in options.ranks.items() if given.rank is not None]
    total = sum(options.cost(s.d_out, s.d_in) * r for s, r in named)
    _check_budget(total, [s for s, _ in named], options, "at least ")


def with_ranks_by_hand(layers: Mapping[str, LayerPlan], options: AdapterOptions) -> tuple[dict[str, LayerPlan], str]:
    """Put the ranks by hand over those that were allocated, and say in one sentence what that changed, if anything.

    Args:
        layers: Layer name -> what was allocated.
        options: With ranks and budget.

    Raises:
        PlanError: the result has more parameters than `adapter.budget`.
    """
    done = {}
    for name, layer in layers.items():
        rank = by_hand(options, name).rank or layer.rank
        done[name] = replace(layer, rank=rank, edited=layer.edited or rank != layer.rank)
    before, after = (sum(layer.parameters for layer in some.values()) for some in (layers, done))
    if options.ranks:
        _check_budget(after, list(done.values()), options)
    edited = sum(layer.edited for layer in done.values())
    if not edited:
        return done, ""
    return done, (f"{CHANGED} {edited} of {len(done)} layers: {after:,} trainable parameters, {before:,} without it")


def by_hand(options: AdapterOptions, layer: str) -> LayerRank:
    """What is set by hand for a layer; of a layer that is not named, nothing.

    Args:
        options: With ranks.
        layer: Full dotted name.
    """
    return options.ranks.get(layer, _NOTHING)


def round_by_hand(options: AdapterOptions, layer: str, otherwise: int | None) -> int | None:
    """The round set by hand, None for all of them pooled; where there is none, `otherwise`.

    Args:
        options: With ranks.
        layer: Full dotted name.
        otherwise: The round without a hand.
    """
    given = by_hand(options, layer).round
    return otherwise if given is None else None if given == "all" else given


def ranks_file(plan: Plan, rounds: int) -> str:
    """A plan's ranks (and rounds, where there are several) as YAML to edit, for `adapter.ranks`."""
    lines = [
        f"# {len(plan.layers)} layers, mode {plan.mode}, {plan.trainable_parameters:,} trainable parameters.",
        "# Edit this file, name it in the recipe (adapter.ranks: THIS FILE, or --set adapter.ranks=THIS FILE), and",
        "# check it with `corda run RECIPE --dry-run`. A layer that is deleted here keeps what the recipe gives it.",
    ]
    if rounds > 1:
        lines.append(f"# round: the calibration round whose covariance is taken, 0 to {rounds - 1}, or all of them.")
    for layer in plan.layers:
        name = layer.name if yaml.safe_load(layer.name) == layer.name else repr(layer.name)
        chosen = "all" if layer.chosen is None else layer.chosen
        value = f"{{rank: {layer.rank}, round: {chosen}}}" if rounds > 1 else f"{layer.rank}"
        each = plan.options.cost(layer.d_out, layer.d_in)
        lines.append(f"{name}: {value}  # rank 1 to {min(layer.d_out, layer.d_in)}, {each} parameters per component")
    return "\n".join(lines) + "\n"


def _check_budget(
    total: int, layers: Sequence[LayerSpec | LayerPlan], options: AdapterOptions, least: str = ""
) -> None:
    """`total` parameters against the budget; the paper's overshoot may pass it by one component."""
    slack = max((options.cost(layer.d_out, layer.d_in) for layer in layers), default=0) if options.overshoot else 0
    if options.budget is not None and total > options.budget + slack:
        raise PlanError(
            "the ranks by hand pass the budget",
            where="adapter.ranks",
            got=f"{least}{total:,} trainable parameters",
            expected=f"at most {options.budget:,}, adapter.budget",
            fix="lower some ranks, or raise or remove adapter.budget",
        )
