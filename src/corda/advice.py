"""Settings of a recipe that are allowed and do nothing, or do what is hardly meant: said before anything runs."""

from __future__ import annotations

from typing import Any

from corda.recipe import TWO_CONTEXTS, AdapterOptions, Recipe

_STARTS = frozenset({"kpm", "ipm", "dual"})  # modes whose adapter starts with components of the base
# Adapter options that other modes do not look at.
_OF_MODES: dict[str, frozenset[str]] = {
    "mu": TWO_CONTEXTS,
    "normalise": TWO_CONTEXTS,
    "beta": TWO_CONTEXTS,
    "row_norm": frozenset({"contrast"}),
    "orthonormal": frozenset({"contrast"}),
    "balance": frozenset({"kpm", "ipm"}),
    "exponent": _STARTS,
}
_OF_ALLOCATION = ("rank_floor", "rank_cap", "overshoot")


def advice(recipe: Recipe) -> list[str]:
    """What a reader of the recipe would not expect, a sentence each; nothing where all settings count.

    Args:
        recipe: What is to be done.
    """
    adapter, context, training = recipe.adapter, recipe.context, recipe.training
    notes = [
        f"adapter.{name} {_shown(getattr(adapter, name))} does nothing in mode {adapter.mode}: it is one of "
        f"{', '.join(sorted(modes))}"
        for name, modes in _OF_MODES.items()
        if adapter.mode not in modes and _changed(adapter, name)
    ]
    if adapter.allocation == "uniform":
        idle = [f"adapter.{name}" for name in _OF_ALLOCATION if _changed(adapter, name)]
        notes += (
            [f"{' and '.join(idle)} count under adapter.allocation dynamic alone, which is not set"] if idle else []
        )
    if training.weight_decay and adapter.mode in _STARTS:
        notes.append(
            f"training.weight_decay {training.weight_decay:g} pulls B A to zero, and mode {adapter.mode} starts with "
            "components of the base in it, which are then lost: set training.decay_to_init instead"
        )
    collected = adapter.mode != "lora"
    if collected and context.rounds > 1 and context.selection == "first":
        notes.append(
            f"context.rounds {context.rounds} are collected and only the first is used: set context.selection to "
            "dynamic or pooled"
        )
    if collected and context.rounds == 1 and context.selection != "first":
        notes.append(f"context.selection {context.selection} has one round to choose from: set context.rounds, e.g. 5")
    if adapter.mode == "contrast" and "learning_rate" not in training.model_fields_set:
        notes.append(
            f"training.learning_rate is not set, and the default {training.learning_rate:g} hardly moves a small model "
            "in mode contrast: begin with 1e-3, with 3e-4 from some 3 B parameters on"
        )
    if recipe.data.keep is not None and recipe.data.keep == recipe.data.learn:
        notes.append(
            "data.keep and data.learn are the same records: what is to be kept is not told from what is learnt"
        )
    if not recipe.evaluation.tasks:
        notes.append(
            "evaluation.tasks is empty: nothing is measured before and after training; name held-out records of the "
            "task and of what is to be kept"
        )
    notes += [
        f"evaluation.tasks.{name}.answer_after is never reached in an answer of several lines: `stop` ends it with the "
        "first one"
        for name, task in recipe.evaluation.tasks.items()
        if task.answer_after and "\n" in task.stop
    ]
    return notes


def _changed(adapter: AdapterOptions, name: str) -> bool:
    return bool(getattr(adapter, name) != AdapterOptions.model_fields[name].get_default())


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"
