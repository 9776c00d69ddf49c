"""What makes a comparison unfair, refused before the first cell runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corda.comparing.methods import method
from corda.comparing.study import Study, cells, recipe_of, shared_recipe
from corda.data.batches import load_records
from corda.data.sources import HELD_OUT_NAMES
from corda.errors import RecipeError
from corda.inputs import Inputs
from corda.recipe import Recipe

SPAN = 30.0
_SPLITS = "|".join((*HELD_OUT_NAMES, "held_out", "train", "calibration"))
_SPLIT = re.compile(rf"(?:^|[-_.])(?:{_SPLITS})(?=$|[-_.])")
# Settings that a method may have of its own; everything else is shared by all.
OWN = (
    "adapter.",
    "context.",
    "training.weight_decay",
    "training.decay_to_init",
    "model.load_in_4bit",
    "model.bnb_4bit",
)
SHARED = ("adapter.target_modules", "adapter.rank", "adapter.budget")


def check(study: Study) -> dict[str, Any]:
    """Refuse a study whose result would mean nothing.

    Returns:
        The number of cells, layers and trainable parameters.

    Raises:
        RecipeError: a grid that is too narrow, settings that must be shared, no development split, nothing unseen, or
            unequal trainable parameters.
        CordaError: whatever is wrong with a method's recipe.
    """
    for name in study.methods:
        refuse_narrow(name, study.rates(name))
        keys = [*study.methods[name].settings, *study.methods[name].grid]
        refuse_unshared(name, keys)
    for wanted in (study.reference, *study.also_against, *(entry.against for entry in study.methods.values())):
        if wanted is not None and wanted not in study.methods:
            raise RecipeError(
                "the reference is not among the methods", where="reference", got=wanted, fix="add it to methods"
            )
    first = {(cell.name, cell.variant): cell for cell in reversed(cells(study))}
    recipes = [(cell.name, recipe_of(study, cell)) for cell in first.values()]
    shared = recipes[0][1]
    refuse_tasks(study, shared)
    refuse_calibrated(study, shared)
    inputs = Inputs(shared)
    refuse_overlapping_splits(study, inputs, study.seeds)
    reference = expected_parameters(inputs, shared)
    for name, recipe in recipes:
        chosen = method(study.methods[name].method)
        if chosen.peft.startswith("corda"):
            refuse_other_calibration(name, recipe)
        count = Inputs(recipe).check()["trainable_parameters"]
        if chosen.kind != "full":  # a frozen A has its rank set from the same number
            refuse_unequal(name, count, reference, study.parameter_tolerance)
    return {"cells": len(cells(study)), "layers": len(inputs.targets), "trainable_parameters": reference}


def refuse_narrow(name: str, rates: Sequence[float]) -> None:
    """Refuse a grid of learning rates that spans less than 30 x.

    Args:
        name: Of the method.
        rates: Its grid.

    Raises:
        RecipeError: it does.
    """
    if max(rates) < SPAN * min(rates) * (1 - 1e-9):
        raise RecipeError(
            "the learning rates are too near to each other for a comparison",
            where=f"methods.{name}.learning_rates",
            got=f"{min(rates):g} to {max(rates):g}, a factor of {max(rates) / min(rates):.3g}",
            expected=f"a factor of {SPAN:g} at least",
            fix="widen the grid: no ranking holds at one learning rate",
        )


def refuse_unshared(name: str, keys: Sequence[str]) -> None:
    """Refuse settings of one method that all have to share: data, targets, tokens, steps, schedule, evaluation.

    Args:
        name: Of the method.
        keys: Dotted keys that it sets.

    Raises:
        RecipeError: names the key.
    """
    for key in keys:
        if not key.startswith(OWN) or key in SHARED:
            raise RecipeError(
                "a method has a setting of its own that all methods have to share",
                where=f"methods.{name}",
                got=key,
                expected="settings of the adapter, its context, weight decay, or 4 bits",
                fix="set it for all, in overrides",
            )


def refuse_other_calibration(name: str, recipe: Recipe) -> None:
    """Refuse PEFT's CorDA where the others calibrate on windows or on answers alone: it takes whole records.

    Args:
        name: Of the method.
        recipe: Of one of its cells.

    Raises:
        RecipeError: names the key.
    """
    for key, given, fix in (
        ("pack_to", recipe.context.pack_to is not None, "leave it out"),
        ("positions", recipe.context.positions != "all", "set it to all"),
    ):
        if given:
            raise RecipeError(
                "PEFT's CorDA would calibrate on other tokens than the other methods",
                where=f"methods.{name}, context.{key}",
                got=str(getattr(recipe.context, key)),
                expected="all tokens of whole records",
                fix=f"{fix}, or take the method out",
            )


def refuse_tasks(study: Study, recipe: Recipe) -> None:
    """Refuse names of tasks or metrics that the base does not measure, and a development split that is the test.

    Args:
        study: With the names.
        recipe: With the tasks.

    Raises:
        RecipeError: names the key.
    """
    tasks = recipe.evaluation.tasks
    known = {f"{name}/{metric}": task for name, task in tasks.items() for metric in task.metrics}
    for key, wanted in [("learn", study.learn), ("development", study.development), *[("keep", k) for k in study.keep]]:
        if wanted not in known:
            raise RecipeError("the base does not measure this", where=key, got=wanted, expected=", ".join(known))
        side = "keep" if key == "keep" else "learn"
        if known[wanted].measures != side:
            raise RecipeError(
                "the task is on the other side of the bargain",
                where=key,
                got=f"{wanted} measures {known[wanted].measures}",
                expected=f"measures: {side}",
            )
    if study.development.partition("/")[0] == study.learn.partition("/")[0]:
        raise RecipeError(
            "learning rates would be chosen on the test data",
            where="development",
            got=study.development,
            fix="give a task on other records, e.g. another `part` of the file",
        )


def refuse_calibrated(study: Study, recipe: Recipe) -> None:
    """Refuse a study that measures retention on nothing but the set that was calibrated on.

    Args:
        study: Names what is kept.
        recipe: With the calibration data.

    Raises:
        RecipeError: a task in `unseen` is not measured, or is another split of data.keep.
    """
    kept = {wanted.partition("/")[0] for wanted in study.keep}
    for name in study.unseen:
        if name not in kept:
            raise RecipeError("an unseen task is not in keep", where="unseen", got=name, expected=", ".join(kept))
        source = recipe.evaluation.tasks[name].dataset
        if recipe.data.keep is not None and _set(source.dataset) == _set(recipe.data.keep.dataset):
            raise RecipeError(
                "a task that is called unseen is of the set that was calibrated on",
                where=f"unseen, {name}",
                got=source.dataset,
                fix="measure retention on another set too",
            )


def refuse_overlapping_splits(study: Study, inputs: Inputs, seeds: Sequence[int] = ()) -> None:
    """Refuse a development split that shares records with the test, with any seed where records are drawn by it.

    Args:
        study: Names the splits.
        inputs: Of the recipe that all share.
        seeds: The study's.

    Raises:
        RecipeError: it does.
    """
    names = [key.partition("/")[0] for key in (study.learn, study.development)]
    sources = [inputs.recipe.evaluation.tasks[name].dataset for name in names]
    drawn = any(source.max_records is not None for source in sources)
    for seed in dict.fromkeys(seeds) if drawn and seeds else [inputs.recipe.seed]:
        data_dir, kind = inputs.recipe.data.data_dir, inputs.kind
        test, development = (
            {record.key for record in load_records(source, data_dir, seed, kind.formats)} for source in sources
        )
        if test & development:
            raise RecipeError(
                "the development split shares records with the test",
                where="development",
                got=f"{len(test & development)} of {len(development)} records with seed {seed}",
                fix="give disjoint records: another `part` of the file, and no max_records",
            )


def refuse_unequal(name: str, count: int, reference: int, tolerance: float) -> None:
    """Refuse a method with another number of trainable parameters.

    Args:
        name: Of the method.
        count: Its trainable parameters.
        reference: Those of the base's rank.
        tolerance: Share of them that may differ.

    Raises:
        RecipeError: it has.
    """
    if abs(count - reference) > tolerance * reference:
        raise RecipeError(
            "a method has another number of trainable parameters than the others",
            where=f"methods.{name}",
            got=f"{count:,}",
            expected=f"{reference:,} within {tolerance:.0%}",
            fix=f"correct its settings; where A is frozen give the base adapter.budget: {reference}, not adapter.rank, "
            "and where ranks are too coarse for that, raise parameter_tolerance",
        )


def expected_parameters(inputs: Inputs, recipe: Recipe) -> int:
    """Trainable parameters of rank (or budget) in every target layer.

    Args:
        inputs: With the target layers.
        recipe: With rank or budget.
    """
    per_rank = sum(spec.d_in + spec.d_out for spec in inputs.targets)
    return recipe.adapter.budget or per_rank * recipe.adapter.rank


def shared_settings(study: Study) -> dict[str, Any]:
    """The recipe that all cells share, for the record."""
    raw = shared_recipe(study)
    raw.pop("output_dir", None)
    return raw


def _set(dataset: str) -> str:
    """The set that a file or Hub id belongs to: the file's folder and name without what says which split it is."""
    path = Path(dataset)
    if not path.suffix:
        return path.as_posix()
    return (path.parent / (_SPLIT.sub("", path.stem) or ".")).as_posix()
