"""START READING HERE: one run, from a recipe to an adapter with its scores, one line a stage.

    model + data -collect-> Context -plan-> Plan -attach, train-> adapter -evaluate-> Scores -export-> PEFT folder

Every stage leaves an artifact with a fingerprint of all that it depends on. A stage whose artifact has the right
fingerprint is not run again, so an interrupted run continues where it was, and a changed recipe redoes what the change
concerns.
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from corda import adapter, artifact, models, training
from corda.context import collect, store
from corda.context.store import Context
from corda.data.batches import calibration_rounds, encode, pad_id
from corda.errors import CheckError
from corda.evaluation.evaluate import Scores, evaluate
from corda.evaluation.scores import change
from corda.exporting import export as exporting
from corda.exporting.check import probe_logits
from corda.exporting.kept import kept_warning
from corda.forms import TRAINED
from corda.inputs import Inputs
from corda.journal import Journal
from corda.metering import Meter
from corda.offload import LazyWeights, empty_model
from corda.plan import plan as plans
from corda.plan.make import make_plan
from corda.plan.plan import Plan
from corda.progress import Progress, silent
from corda.quantization import round_trip
from corda.recipe import ModelOptions, Recipe
from corda.report.card import model_card
from corda.report.page import write_page

RESULTS = "results.json"
STEP0_TOLERANCE = {torch.float32: 1e-5}
_LOOSE = 2e-2


def run(recipe: Recipe, *, progress: Progress = silent, reuse_from: Sequence[Path] = ()) -> dict[str, Any]:
    """Everything: collect, plan, train, evaluate before and after, export, report.

    Args:
        recipe: What to do.
        progress: Shows how far each stage is.
        reuse_from: Other runs' folders whose scores of the same base may be taken over.

    Returns:
        The content of results.json.

    Raises:
        CordaError: bad input, before anything expensive; or a failed check.
    """
    with opened(recipe, progress, reuse_from) as stages:
        stages.context()
        stages.plan()
        stages.before()
        stages.trained()
        stages.after()
        stages.exported()
        return stages.report()


@contextmanager
def opened(recipe: Recipe, progress: Progress = silent, reuse_from: Sequence[Path] = ()) -> Iterator[Stages]:
    """The stages of a recipe that has been checked, with its output folder claimed and locked.

    Raises:
        CordaError: whatever `Inputs.check` finds, before anything is written.
        ArtifactError: the folder is another run's, holds something else, or is in use.
    """
    stages = Stages(recipe, progress, reuse_from)
    stages.inputs.check()
    with artifact.claimed(recipe.output_dir, recipe.identity()):
        yield stages


class Stages:
    """The stages of one run; each returns its artifact's content and runs what it needs first."""

    def __init__(self, recipe: Recipe, progress: Progress, reuse_from: Sequence[Path] = ()) -> None:
        self.recipe, self.progress, self.reuse_from = recipe, progress, reuse_from
        self.inputs = Inputs(recipe)
        self.folder = recipe.output_dir
        self.meter = Meter()
        self._live: PreTrainedModel | PeftModel | None = None  # the base, or the base with the adapter on it
        self._context: Context | None = None
        self._plan: Plan | None = None

    def context(self) -> Context | None:
        """Covariances of the calibration data; None for plain LoRA."""
        if self.recipe.context_source() is None or self._context is not None:
            return self._context
        found = self._reusable("context")
        if found is None:
            r, options = self.recipe, self.recipe.context
            journal = Journal(self.folder / "context.partial", self.inputs.fingerprints["context"])
            with self.meter.stage("collect"):
                chosen = calibration_rounds(
                    self.inputs.context_records,
                    self.inputs.tokenizer,
                    options.rounds,
                    template=r.data.template,
                    max_length=r.data.max_length,
                    samples=options.samples,
                    tokens=options.tokens,
                    pack_to=options.pack_to,
                    seed=r.seed,
                )
                model, weights = self._for_context()
                context = collect.collect_encoded(
                    model,
                    chosen,
                    self.inputs.targets,
                    pad_token_id=pad_id(self.inputs.tokenizer),
                    batch_size=options.batch_size,
                    response_only=options.positions == "response",
                    skip_unseen=options.skip_unseen,
                    stream=options.stream,
                    journal=journal,
                    weights=weights,
                    device=models.pick_device(r.model.device),
                    progress=self.progress,
                )
            tokens, seconds = sum(len(one) for part in chosen for one in part), self.meter.seconds["collect"]
            extra = {"again": {"tokens": tokens, "seconds": max(seconds - journal.seconds, 0.0)}}
            key = self.inputs.fingerprints["context"]
            store.save(context, self.folder / "context", key, extra | self._costs("collect"), journal.seconds)
            journal.remove()
            found = artifact.read(self.folder / "context", "context", verify=False)
        self._context = store.load(found)
        return self._context

    def plan(self) -> Plan:
        """Ranks, spectra and initial factors."""
        if self._plan is not None:
            return self._plan
        found = self._reusable("plan")
        if found is None:
            context, key = self.context(), self.inputs.fingerprints["plan"]
            journal = Journal(self.folder / "plan.partial", key)
            with self.meter.stage("plan"):
                model, lazy = self._for_context() if context else (self._shell(), None)
                plan = make_plan(
                    model,
                    context or self.inputs.targets,
                    self.recipe.adapter,
                    selection=self.recipe.context.selection,
                    journal=journal,
                    weights=lazy.get if lazy else None,
                    device=models.pick_device(self.recipe.model.device),
                    quantise=self._quantise(),
                    progress=self.progress,
                )
            parents = {"context": self.inputs.fingerprints["context"]} if context else {}
            found = plans.save(plan, self.folder / "plan", key, parents, self._costs("plan"))
            journal.remove()
        self._plan = plans.load(found)
        return self._plan

    def before(self) -> Scores:
        """Scores of the base model."""
        found = self._reusable("before", *self.reuse_from)
        return self._scores(found) if found else self._measure("before", self._base())

    def trained(self) -> artifact.Artifact:
        """The trained adapter, as a plain LoRA, with the training curve and the check at step 0."""
        found = self._reusable("train")
        if found is not None:
            return found
        r = self.recipe
        self.inputs.check_export({layer.name: layer.rank for layer in self.plan().layers})
        model, step0 = self._attach()
        encoded = [
            encode(record, self.inputs.tokenizer, template=r.data.template, max_length=r.data.max_length)
            for record in self.inputs.learn_records
        ]
        key = self.inputs.fingerprints["train"]
        with self.meter.stage("train"):
            curve = training.train(
                model,
                self.inputs.tokenizer,
                encoded,
                r.training,
                folder=self.folder / "checkpoints",
                fingerprint=key,
                seed=r.seed,
            )
        parents = {"plan": self.inputs.fingerprints["plan"]}
        with artifact.writing(self.folder / "train", "train", key, parents) as (temporary, extra):
            model.save_pretrained(str(temporary))
            artifact.write_json(temporary / "curve.json", vars(curve))
            cut = sum(not any(one.response) for one in encoded)
            notes = [f"{cut} training records left out: cut at data.max_length before their answer"] if cut else []
            extra.update(step0=step0, warnings=notes, **self._costs("train"))
        return artifact.read(self.folder / "train", "train", verify=False)

    def after(self) -> Scores:
        """Scores of the trained model."""
        found = self._reusable("after")
        return self._scores(found) if found else self._measure("after", self._tuned())

    def exported(self) -> dict[str, Any]:
        """The adapter as other tools load it, compared after reload; uploaded where that is asked for."""
        r, folder = self.recipe, self.recipe.export_folder()
        if r.export.format == "none":
            return {}
        key, book = self.inputs.fingerprints["export"], self.folder / "export.json"
        known = artifact.read_json(book) if book.is_file() else {}
        done = exporting.finished(folder, key)
        if done is None:
            model = self._tuned()
            with self.meter.stage("export"):
                done = exporting.export(
                    model,
                    folder,
                    r.export.model_copy(update={"push_to_hub": None}),
                    fresh_base=lambda: models.load(self._export_base()).model,
                    probe=self._probe(),
                    records=self._measured_on() if r.export.rank is not None else (),
                    tokenizer=self.inputs.tokenizer,
                    card=model_card(r, self.plan(), self.inputs.source),
                    fingerprint=key,
                )
            known[key] = self._costs("export")
        known[key] = known.get(key, {}) | exporting.published(done, r.export).as_json()
        artifact.write_json(book, known)
        return dict(known[key])

    def _export_base(self) -> ModelOptions:
        """The base that an export is for: as in the run, or in full precision where the run's was quantised anew."""
        residual = self.recipe.adapter.form(self.inputs.quantisation is not None) == "residual"
        return self.recipe.model.model_copy(update={"load_in_4bit": False}) if residual else self.recipe.model

    def report(self) -> dict[str, Any]:
        """results.json and the page, from the artifacts."""
        r, plan = self.recipe, self.plan()
        trained, exported = self.trained(), self.exported()
        before, after = self.before(), self.after()
        curve = artifact.read_json(trained.path("curve.json"))
        costs = [trained.manifest["costs"], exported.get("costs", {})]
        costs += [
            artifact.read(self.folder / k, k, verify=False).manifest["costs"] for k in ("plan", "before", "after")
        ]
        if self.recipe.context_source():
            costs.append(artifact.read(self.folder / "context", "context", verify=False).manifest["costs"])
        results = {
            "schema": artifact.SCHEMA,
            "recipe": r.as_json(),
            "model": {
                "name": r.model.model_name_or_path,
                "fingerprint": models.identity(self.inputs.source, r.model),
                "note": self.inputs.source.note,
            },
            "plan": plan.as_json(),
            "step0": trained.manifest["step0"],
            "train": curve | {"steps": curve["step"][-1] if curve["step"] else 0},
            "scores": {"before": _flat(before), "after": _flat(after), "change": _changes(before, after)},
            "answers": {"before": dict(before.answers), "after": dict(after.answers)},
            "export": {k: v for k, v in exported.items() if k != "costs"},
            "timing": {stage: cost["seconds"] for part in costs for stage, cost in part.items()},
            "memory": {stage: cost["peak_bytes"] for part in costs for stage, cost in part.items()},
            "warnings": [*plan.warnings, *trained.manifest["warnings"], *kept_warning(exported)],
            "provenance": trained.manifest["provenance"],
        }
        artifact.write_json(self.folder / RESULTS, results)
        write_page([self.folder], self.folder / "report.html")
        return results

    def _base(self) -> PreTrainedModel:
        if self._live is None or isinstance(self._live, PeftModel):
            self._live = None
            gc.collect()
            self._live = models.load(self.recipe.model).model
        return self._live

    def _for_context(self) -> tuple[PreTrainedModel, LazyWeights | None]:
        """The base, or with off-loading or in 4 bits its empty shell and where weights in full precision come from."""
        if not self.recipe.context.offload and self.inputs.quantisation is None:
            return self._base(), None
        shell = self._shell()
        return shell, LazyWeights(self.inputs.source, shell, self._dtype())

    def _shell(self) -> PreTrainedModel:
        return empty_model(self.inputs.source, self.recipe.model, self._dtype())

    def _dtype(self) -> torch.dtype:
        return models.pick_dtype(self.recipe.model, self.inputs.source)

    def _quantise(self) -> Callable[[Tensor], Tensor] | None:
        kind = self.inputs.quantisation
        return None if kind is None else functools.partial(round_trip, kind=kind, dtype=self._dtype())

    def _attach(self) -> tuple[PeftModel, dict[str, Any]]:
        plan, base = self.plan(), self._base()
        probe = self._probe()
        reference = probe_logits(base, probe)
        dtype = base.dtype
        base.eval()
        four_bit = self.inputs.quantisation is not None
        form = self.recipe.adapter.form(four_bit)
        weights = self._for_context()[1] if four_bit and form == "residual" else None
        model = adapter.attach(base, plan, base=form, seed=self.recipe.seed, weights=weights.get if weights else None)
        self._live = model
        differences = {}
        for mode in ("eval", "train"):
            for module in model.modules():
                if isinstance(module, LoraLayer):  # the base's own dropout is none of the adapter's business
                    module.train(mode == "train")
            differences[mode] = adapter.relative_difference(probe_logits(model, probe), reference)
        model.eval()
        largest = max(differences.values())
        tolerance = STEP0_TOLERANCE.get(dtype, _LOOSE)
        nearer = four_bit and (form == "residual" or bool(plan.corrections))  # meant to differ from the 4-bit base
        if not (largest <= tolerance or (nearer and math.isfinite(largest))):
            raise CheckError(
                "the adapter changes the model before training",
                where="step 0",
                got=f"relative logit difference {largest:.2g}",
                expected=f"at most {tolerance:.2g}",
                fix="use base: intact, or a float32 model",
            )
        return model, {"max_relative_logit_difference": largest, **differences}

    def _tuned(self) -> PeftModel:
        trained = self.trained()
        if not isinstance(self._live, PeftModel):
            model, _ = self._attach()
            model.load_adapter(str(trained.folder), TRAINED)
        assert isinstance(self._live, PeftModel)
        return self._live

    def _measure(self, name: str, model: PreTrainedModel | PeftModel) -> Scores:
        model.eval()
        with self.meter.stage(name):
            scores = evaluate(model, self.inputs.tokenizer, self.inputs.tasks, self.recipe, self.progress)
        with artifact.writing(self.folder / name, name, self.inputs.fingerprints[name]) as (temporary, extra):
            artifact.write_json(temporary / "scores.json", scores.as_json())
            extra.update(self._costs(name))
        return scores

    def _scores(self, found: artifact.Artifact) -> Scores:
        return Scores.from_json(artifact.read_json(found.path("scores.json")))

    def _reusable(self, kind: str, *elsewhere: Path) -> artifact.Artifact | None:
        own = artifact.reusable(self.folder / kind, kind, self.inputs.fingerprints[kind])
        if own is not None:
            return own
        for folder in elsewhere:
            found = artifact.reusable(folder / kind, kind, self.inputs.fingerprints[kind])
            if found is not None:
                return artifact.copy(found, self.folder / kind)
        return None

    def _costs(self, stage: str) -> dict[str, Any]:
        cost = {"seconds": self.meter.seconds[stage], "peak_bytes": self.meter.peak_bytes[stage]}
        return {"costs": {stage: cost}}

    def _probe(self) -> dict[str, Tensor]:
        rows = [
            encode(record, self.inputs.tokenizer, template=self.recipe.data.template, max_length=64)
            for record in self.inputs.learn_records[:4]
        ]
        width = min(len(row) for row in rows)
        ids = torch.tensor([row.ids[:width] for row in rows])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _measured_on(self) -> list[dict[str, Tensor]]:
        """Some records of what the context came from and of the training data, one by one, without padding."""
        data = self.recipe.data
        records = [*self.inputs.context_records[:8], *self.inputs.learn_records[:8]]
        rows = [encode(record, self.inputs.tokenizer, template=data.template, max_length=256) for record in records]
        return [{"input_ids": torch.tensor([row.ids])} for row in rows]


def _changes(before: Scores, after: Scores) -> dict[str, Any]:
    return {name: change(score, after.values[name]).as_json() for name, score in before.values.items()}


def _flat(scores: Scores) -> dict[str, Any]:
    return {name: score.as_json() for name, score in scores.values.items()}
