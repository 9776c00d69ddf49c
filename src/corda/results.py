"""results.json: what a run was asked, what it did and what came out, put together from its artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corda import artifact, models
from corda.advice import advice
from corda.evaluation.evaluate import Scores
from corda.evaluation.scores import change
from corda.exporting.kept import kept_warning
from corda.inputs import Inputs
from corda.plan.plan import Plan

RESULTS = "results.json"
_ROUNDINGS = 1e-4  # a step-0 difference that the arithmetic of fp32 does not explain


def results(
    folder: Path,
    inputs: Inputs,
    plan: Plan,
    trained: artifact.Artifact,
    exported: Mapping[str, Any],
    before: Scores,
    after: Scores,
) -> dict[str, Any]:
    """The content of results.json.

    Args:
        folder: The run's, with the artifacts of its stages.
        inputs: Recipe and model files.
        plan: The adapter's.
        trained: The training's artifact.
        exported: What the export reported; empty for none.
        before: Scores of the base model.
        after: Scores of the trained model.

    Raises:
        ArtifactError: a stage's artifact is missing or damaged.
    """
    r = inputs.recipe
    curve = artifact.read_json(trained.path("curve.json"))
    stages = ["plan", "before", "after", *(["context"] if r.context_sources() else [])]
    drift = artifact.read_json(trained.path("drift.json")) if r.metered else None
    costs = [trained.manifest["costs"], exported.get("costs", {})]
    costs += [artifact.read(folder / stage, stage, verify=False).manifest["costs"] for stage in stages]
    return {
        "schema": artifact.SCHEMA,
        "recipe": r.as_json(),
        "model": {
            "name": r.model.model_name_or_path,
            "fingerprint": models.identity(inputs.source, r.model),
            "note": inputs.source.note,
        },
        "plan": plan.as_json(),
        "step0": trained.manifest["step0"],
        "train": curve | {"steps": curve["step"][-1] if curve["step"] else 0},
        "drift": drift and drift | {"limit": r.training.max_drift, "weight": r.training.drift_weight},
        "scores": {"before": _flat(before), "after": _flat(after), "change": _changes(before, after)},
        "answers": {"before": dict(before.answers), "after": dict(after.answers)},
        "export": {k: v for k, v in exported.items() if k != "costs"},
        "timing": {stage: cost["seconds"] for part in costs for stage, cost in part.items()},
        "memory": {stage: cost["peak_bytes"] for part in costs for stage, cost in part.items()},
        "warnings": [
            *advice(r),
            *plan.warnings,
            *_drift(inputs, trained.manifest["step0"]),
            *trained.manifest["warnings"],
            *kept_warning(exported),
        ],
        "provenance": trained.manifest["provenance"],
    }


def _drift(inputs: Inputs, step0: Mapping[str, float]) -> list[str]:
    """What rounding W - BA to 16 bits did to the model before training; in 4 bits another error is meant."""
    drift = step0["max_relative_logit_difference"]
    if inputs.quantisation is not None or inputs.recipe.adapter.base != "residual" or drift <= _ROUNDINGS:
        return []
    return [
        f"base residual moved the logits by {100 * drift:.2g} % of the largest before training: W - BA is rounded to "
        "the model's dtype; base intact starts at the model itself"
    ]


def _changes(before: Scores, after: Scores) -> dict[str, Any]:
    return {name: change(score, after.values[name]).as_json() for name, score in before.values.items()}


def _flat(scores: Scores) -> dict[str, Any]:
    return {name: score.as_json() for name, score in scores.values.items()}
