"""The model card of a run's export, from its recipe, plan and scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from corda.evaluation.scores import Score, change
from corda.exporting.card import CardFacts, CardScore, hub_card, hub_id, license_of
from corda.options import ModelOptions
from corda.recipe import Recipe

if TYPE_CHECKING:
    from corda.models import Source
    from corda.plan.plan import Plan

_NAMES = {
    "kpm": "CorDA, knowledge-preserved mode",
    "ipm": "CorDA, instruction-previewed mode",
    "dual": "CorDA, two contexts (dual)",
    "contrast": "CorDA, two contexts (contrast)",
    "lora": "LoRA",
}


def method_name(mode: str) -> str:
    """A mode in words."""
    return _NAMES[mode]


def model_card(
    recipe: Recipe,
    plan: Plan,
    source: Source,
    *,
    before: Mapping[str, Score] | None = None,
    after: Mapping[str, Score] | None = None,
    steps: int | None = None,
    model: ModelOptions | None = None,
) -> str:
    """README.md of an export: how it was made, what it scores and how to load it.

    Args:
        recipe: The run's.
        plan: The adapter's ranks.
        source: Where the base model's files are.
        before: "task/metric" -> score of the base, where it was measured.
        after: The same of the trained model.
        steps: Optimiser steps trained, where known.
        model: The recipe's options of the model, with its task and classes filled in.
    """
    learn, keep = recipe.data.learn, recipe.data.keep
    used = [one.dataset for one in (learn, keep) if one]
    ranks = sorted({layer.rank for layer in plan.layers})
    edited = sum(layer.edited for layer in plan.layers)
    tokens = max((layer.tokens for layer in plan.layers), default=0)
    train = recipe.training
    rows = train.per_device_train_batch_size * train.gradient_accumulation_steps
    facts = [
        ("Task data", _shown(learn.dataset) if learn else "none"),
        ("Knowledge to keep", _shown(keep.dataset) if keep else "none"),
        (
            "Trained parameters",
            f"{plan.trainable_parameters:,} in {len(plan.layers)} layers"
            + (f", {edited} of them edited by hand" if edited else ""),
        ),
        ("Rank while training", f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}, by layer"),
        (
            "Training",
            f"{f'{steps} steps' if steps else 'steps'} of {rows} records, learning rate {train.learning_rate:g}",
        ),
    ]
    if tokens:
        facts.insert(2, ("Calibration", f"{tokens:,} tokens"))
    measured = _scores(recipe, before, after) if before and after else ()
    options = model or recipe.model
    known = CardFacts(
        method=method_name(plan.mode),
        base=recipe.model.model_name_or_path,
        note=source.note,
        task="causal-lm" if options.task == "auto" else options.task,
        classes=tuple((options.id2label or {}).values()),
        tags=(plan.mode,),
        datasets=tuple(used),
        license=license_of(source.path),
        facts=tuple(facts),
        scores=measured,
        recipe=yaml.safe_dump(_public(recipe), sort_keys=False, allow_unicode=True, width=100),
    )
    return hub_card(known, recipe.export)


def _scores(recipe: Recipe, before: Mapping[str, Score], after: Mapping[str, Score]) -> tuple[CardScore, ...]:
    rows = []
    for key, base in before.items():
        task, _, metric = key.rpartition("/")
        options = recipe.evaluation.tasks[task]
        moved = change(base, after[key])
        rows.append(
            CardScore(
                task,
                metric,
                _shown(options.dataset.dataset),
                options.measures,
                (base.value, base.stderr),
                (after[key].value, after[key].stderr),
                (moved.value, moved.stderr),
                base.n,
            )
        )
    return tuple(rows)


def _shown(dataset: str) -> str:
    """A Hub id as it is; of a file its name alone, because the rest says nothing elsewhere."""
    return dataset if hub_id(dataset) else Path(dataset).name


def _public(recipe: Recipe) -> dict[str, Any]:
    """The recipe without defaults, folders of this machine and ranks by hand, which the adapter itself shows."""
    raw = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"output_dir": True, "adapter": {"ranks"}})
    raw.get("data", {}).pop("data_dir", None)
    raw.get("export", {}).pop("output", None)
    model = recipe.model.model_name_or_path
    raw["model"]["model_name_or_path"] = model if hub_id(model) or ":" in model else Path(model).name

    def shorten(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else ():
            if key == "dataset" and isinstance(value, str):
                node[key] = _shown(value)
            shorten(value)

    shorten(raw)
    return raw
