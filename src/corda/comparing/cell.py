"""One cell of a study: the same data, training and evaluation for every method, whoever makes its adapter."""

from __future__ import annotations

import gc
import math
import os
import shutil
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from corda import adapter, artifact, pipeline, training
from corda.comparing import peft_made
from corda.comparing.fairness import refuse_unequal
from corda.comparing.methods import Method
from corda.comparing.null_space import null_plan
from corda.comparing.study import Cell, Study, method_of, recipe_of
from corda.drift import READINGS, Yardstick, drift_of_weights
from corda.errors import AdapterError, CordaError
from corda.evaluation.evaluate import Scores
from corda.evaluation.scores import change, sign
from corda.exporting.kept import effective_weight
from corda.inputs import Inputs
from corda.models import pick_device
from corda.pipeline import Stages
from corda.progress import Progress, silent
from corda.targets import LayerSpec, weight_of

_SHELF = ("context", "plan", "before")
_HEADS = ".modules_to_save."  # a classifier's head, which all methods train in full, is counted for none
_DIVERGED = 1.5  # a task loss this many times the base's is a divergence


def result_path(study: Study, cell: Cell) -> Path:
    """Where a cell's results lie.

    Args:
        study: What was decided beforehand.
        cell: Which training.
    """
    return study.output_dir / "cells" / f"{cell.id}.json"


def finished(study: Study, cell: Cell) -> dict[str, Any] | None:
    """A cell's results if they are there and of this very recipe.

    Args:
        study: What was decided beforehand.
        cell: Which training.
    """
    path = result_path(study, cell)
    if not path.is_file():
        return None
    known = artifact.read_json(path)
    own = _fingerprint(study, cell, recipe_inputs(study, cell, study.devices[0]))
    return known if known.get("fingerprint") == own else None


def recipe_inputs(study: Study, cell: Cell, device: str = "auto") -> Inputs:
    """The inputs of a cell's recipe.

    Args:
        study: What was decided beforehand.
        cell: Which training.
        device: To compute on.
    """
    return Inputs(recipe_of(study, cell, device))


def run_cell(
    study: Study, cell: Cell, *, device: str = "auto", reference: int | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """Train and measure one cell; its results are written when it is done, whole or not at all.

    What another cell made of the same context, plan or base is taken over from the study's folder `shared`.

    Args:
        study: The study.
        cell: Which one.
        device: To run on.
        reference: Trainable parameters that the others have; None: do not check.
        progress: Shows how far it is.

    Returns:
        The results; where the method cannot be had here, fails or trains another number of parameters, their `status`
        is "unavailable", with the reason.
    """
    inputs = recipe_inputs(study, cell, device)
    method = method_of(study, cell)
    head = {
        "method": cell.name,
        "label": method.label,
        "setting": study.methods[cell.name].method,
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "variant": dict(cell.variant),
        "extension": cell.extension,
        "fingerprint": _fingerprint(study, cell, inputs),
    }
    shelf = study.output_dir / "shared"
    found = {kind: shelf / inputs.fingerprints[kind] for kind in _SHELF}
    try:
        with pipeline.opened(inputs.recipe, progress, list(found.values())) as stages:
            measured = _measured(stages, method, study)
            if reference is not None and method.kind != "full":
                refuse_unequal(cell.name, measured["trainable_parameters"], reference, study.parameter_tolerance)
            result = head | measured
            _shelve(stages.folder, found)
            if not study.keep_adapters:
                _empty(stages.folder)
    except (CordaError, ImportError, NotImplementedError) as error:
        result = head | {"status": "unavailable", "reason": str(error), "scores": {}}
    except Exception as error:  # out of memory, what a library refuses: the other cells go on
        artifact.make_folder(inputs.recipe.output_dir)
        (inputs.recipe.output_dir / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
        result = head | {"status": "unavailable", "reason": f"{type(error).__name__}: {error}", "scores": {}}
    if result["status"] == "unavailable":
        gc.collect()
        torch.cuda.empty_cache()
    result["provenance"] = artifact.provenance(pick_device(inputs.recipe.model.device))
    artifact.make_folder(result_path(study, cell).parent)
    artifact.write_json(result_path(study, cell), finite(result))
    return dict(artifact.read_json(result_path(study, cell)))


def _measured(stages: Stages, method: Method, study: Study) -> dict[str, Any]:
    before = stages.before()
    facts: dict[str, Any]
    model: nn.Module
    if method.kind == "corda":
        trained = stages.trained()
        curve = artifact.read_json(trained.path("curve.json"))
        plan = stages.plan()
        facts = {
            "trainable_parameters": plan.trainable_parameters,
            "step0": trained.manifest["step0"]["max_relative_logit_difference"],
            "warnings": [*plan.warnings, *trained.manifest["warnings"]],
        }
        if stages.recipe.metered:
            drift = artifact.read_json(trained.path("drift.json"))
            facts["drift"] = {key: drift.get(key) for key in READINGS}
        sound = all(math.isfinite(loss) for loss in curve["loss"])
        after = _or_none(stages.after) if sound else None
    else:
        yards = stages.yardsticks() if _readable(stages.inputs) else []
        base = stages.bases.bare()
        started = {spec.name: weight_of(base, spec).clone() for spec in stages.inputs.targets} if yards else {}
        model, facts, curve = _trained_elsewhere(stages, method)
        with stages.meter.stage("after"):
            after = _or_none(lambda: stages.inputs.kind.evaluate(model.eval(), stages.inputs.tasks, stages.progress))
        if yards:
            facts["drift"] = _drift(model, started, yards)
    scores = {"before": _flat(before), "after": _flat(after) if after else {}}
    moved = {k: change(s, after.values[k]).as_json() for k, s in before.values.items()} if after else {}
    ok = after is not None and _sound(before, after, study.learn)
    return {
        "status": "done" if ok else "diverged",
        **facts,
        "steps": curve["step"][-1] if curve["step"] else 0,
        "scores": scores,
        "change": moved,
        "influence": {k: list(s.influence) for k, s in after.values.items()} if after else {},
        "influence_before": {k: list(s.influence) for k, s in before.values.items()},
        "curve": {key: curve.get(key, []) for key in ("step", "loss", "learning_rate", "eval_step", "eval_loss")},
        "timing": _costs(stages, "seconds") | {"train": curve["seconds"]},
        "memory": _costs(stages, "peak_bytes"),
    }


def _trained_elsewhere(stages: Stages, method: Method) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Model, facts and curve of a method whose adapter the pipeline does not make."""
    inputs, r = stages.inputs, stages.recipe
    context = stages.context() if method.kind == "null" else None
    base = stages.bases.bare()
    probe = stages.bases.probe()
    with torch.no_grad():
        reference = base(**{k: v.to(base.device) for k, v in probe.items()}).logits
    stages.bases.live = None  # what follows changes it
    model: Any = base
    with stages.meter.stage("plan"):
        if context is not None:
            model = adapter.attach(base, null_plan(base, context, r.adapter), base=r.adapter.form(False), seed=r.seed)
        elif method.kind == "peft":
            model = _built(base, inputs, method)
    step0 = peft_made.relative_change(model, reference, probe)
    encoded = [inputs.kind.encode(record) for record in inputs.learn_records]
    if method.kind == "full":
        base.float()  # as adapters are: in 16 bits a small step rounds to none
    with peft_made.all_trainable(base) if method.kind == "full" else nullcontext(), stages.meter.stage("train"):
        count = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and _HEADS not in name)
        curve = training.train(
            model,
            inputs.tokenizer,
            encoded,
            r.training,
            folder=stages.folder / "checkpoints",
            fingerprint=artifact.fingerprint(method.name, inputs.fingerprints["train"]),
            seed=r.seed,
            trainer_of=inputs.kind.trainer,
            validation=[inputs.kind.encode(record) for record in inputs.kind.validation_records],
        )
    facts = {"trainable_parameters": count, "step0": step0, "warnings": []}
    return model, facts, vars(curve)


def _readable(inputs: Inputs) -> bool:
    """Whether the change of every layer can be read off its weights, before and after."""
    plain = all(spec.stored[1] is None for spec in inputs.targets)
    return inputs.recipe.metered and inputs.quantisation is None and plain


def _drift(model: nn.Module, started: Mapping[str, Tensor], yards: Sequence[Yardstick]) -> dict[str, float | None]:
    """The meter's reading of a model that something else trained; DoRA's adapter is merged."""
    peft = model if isinstance(model, PeftModel) else None
    if peft is not None and any(getattr(config, "use_dora", False) for config in peft.peft_config.values()):
        peft.merge_adapter()
        model = peft.base_model.model

    def change(spec: LayerSpec) -> Tensor:
        now = effective_weight(model, spec.name, adapted=model is peft)
        assert now is not None  # see `_readable`
        return now - started[spec.name].to(now.device)

    reading = drift_of_weights(change, *yards)
    return {key: getattr(reading, key) for key in READINGS}


def _built(base: PreTrainedModel, inputs: Inputs, method: Method) -> PeftModel:
    try:
        return peft_made.build(base, inputs, method.peft, frozen=method.frozen)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterError(
            "PEFT cannot make this adapter here", where=method.name, got=f"{type(error).__name__}: {error}"
        ) from error


def _fingerprint(study: Study, cell: Cell, inputs: Inputs) -> str:
    chosen = method_of(study, cell)
    started = [inputs.recipe.context.samples] if chosen.peft == "eva" else []  # the task's records that its start is of
    return artifact.fingerprint("cell", chosen.kind, chosen.peft, chosen.frozen, *started, inputs.fingerprints["after"])


def _or_none(measure: Any) -> Scores | None:
    """Scores, or None where they overflow."""
    try:
        scores: Scores = measure()
    except OverflowError:
        return None
    return scores if all(math.isfinite(score.value) for score in scores.values.values()) else None


def _sound(before: Scores, after: Scores, learn: str) -> bool:
    """Whether the task's loss is where a training that converges leaves it."""
    return sign(learn) < 0 or after.values[learn].value < _DIVERGED * before.values[learn].value


def _flat(scores: Scores) -> dict[str, Any]:
    return {name: score.as_json() for name, score in scores.values.items()}


def _costs(stages: Stages, what: str) -> dict[str, Any]:
    """Seconds or bytes of every stage, whoever paid for it first."""
    costs: dict[str, Any] = {}
    for kind in ("context", "plan", "before", "train", "after"):
        folder = stages.folder / kind
        if (folder / artifact.MANIFEST).is_file():
            for stage, cost in artifact.read(folder, kind, verify=False).manifest["costs"].items():
                costs[stage] = cost[what]
    return {**costs, **getattr(stages.meter, what)}


def _shelve(folder: Path, places: Mapping[str, Path]) -> None:
    """Leave context, plan and base scores for the cells to come, as links."""
    for kind, place in places.items():
        if (folder / kind).is_dir():
            artifact.offer(artifact.read(folder / kind, kind, verify=False), place / kind)


def _empty(folder: Path) -> None:
    for child in folder.iterdir():
        if child.is_dir():
            shutil.rmtree(child)
        elif child.name != ".lock":
            os.unlink(child)


def finite(value: Any) -> Any:
    """JSON has no NaN: what is not finite becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(item) for item in value]
    return value
