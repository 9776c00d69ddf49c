"""START READING HERE: one run, from a recipe to an adapter with its scores, one line a stage.

    model + data -collect-> Context -plan-> Plan -attach, train-> adapter -evaluate-> Scores -export-> PEFT folder

Every stage leaves an artifact with a fingerprint of all that it depends on. A stage whose artifact has the right
fingerprint is not run again, so an interrupted run continues where it was, and a changed recipe redoes what the change
concerns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from corda import architectures, artifact, models, training
from corda.bases import Bases
from corda.context import collect, store
from corda.context.store import HELD_OUT, Context
from corda.data.batches import encode, pad_id
from corda.drift import DriftMeter, Yardstick, drift_notes, yardstick
from corda.evaluation.evaluate import Scores, evaluate
from corda.exporting import export as exporting
from corda.forms import TRAINED
from corda.inputs import Inputs
from corda.journal import Journal, discard
from corda.metering import Meter
from corda.plan import plan as plans
from corda.plan.make import make_plan
from corda.plan.plan import Plan
from corda.progress import Progress, silent
from corda.recipe import Recipe
from corda.report.card import model_card
from corda.report.page import write_page
from corda.results import RESULTS, results
from corda.targets import LayerSpec, weight_of


def run(recipe: Recipe, *, progress: Progress = silent, reuse_from: Sequence[Path] = ()) -> dict[str, Any]:
    """Everything: collect, plan, train, evaluate before and after, export, report.

    Args:
        recipe: What to do.
        progress: Shows how far each stage is.
        reuse_from: Other runs' folders whose context, plan and scores of the base may be taken over where they fit.

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
        self.bases = Bases(self.inputs)
        self._context: Context | None = None
        self._plan: Plan | None = None

    def context(self) -> Context | None:
        """Covariances of the calibration data; None for plain LoRA without a drift meter."""
        if not self.recipe.context_sources() or self._context is not None:
            return self._context
        found = self._reusable("context", *self.reuse_from)
        if found is not None:
            discard(self.folder / "context.partial")
        else:
            r, options = self.recipe, self.recipe.context
            journal = Journal(self.folder / "context.partial", self.inputs.fingerprints["context"])
            with self.meter.stage("collect"):
                chosen, sides = self.inputs.calibration()
                model, weights = self.bases.for_context()
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
                    sides=sides,
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
        found = self._reusable("plan", *self.reuse_from)
        if found is not None:
            discard(self.folder / "plan.partial")
        else:
            context = self.context() if self.recipe.context_source() else None
            key = self.inputs.fingerprints["plan"]
            journal = Journal(self.folder / "plan.partial", key)
            with self.meter.stage("plan"):
                model, lazy = self.bases.for_context() if context else (self.bases.shell(), None)
                plan = make_plan(
                    model,
                    context or self.inputs.targets,
                    self.recipe.adapter,
                    selection=self.recipe.context.selection,
                    journal=journal,
                    weights=lazy.get if lazy else None,
                    device=models.pick_device(self.recipe.model.device),
                    quantise=self.bases.quantise(),
                    seed=self.recipe.seed,
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
        return self._scores(found) if found else self._measure("before", self.bases.bare())

    def trained(self) -> artifact.Artifact:
        """The trained adapter, as a plain LoRA, with the training curve and the check at step 0."""
        found = self._reusable("train")
        if found is not None:
            return found
        r = self.recipe
        self.inputs.check_export({layer.name: layer.rank for layer in self.plan().layers})
        yardsticks = self._yardsticks()
        model, step0 = self.bases.attached(self.plan())
        meter = DriftMeter(model, *yardsticks) if yardsticks else None
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
                progress=self.progress,
                meter=meter,
            )
        parents = {"plan": self.inputs.fingerprints["plan"]}
        with artifact.writing(self.folder / "train", "train", key, parents) as (temporary, extra):
            model.save_pretrained(str(temporary))
            artifact.write_json(temporary / "curve.json", vars(curve))
            cut = sum(not any(one.response) for one in encoded)
            notes = [f"{cut} training records left out: cut at data.max_length before their answer"] if cut else []
            if meter is not None:
                drift = meter.read()
                artifact.write_json(temporary / "drift.json", vars(drift))
                notes += drift_notes(drift, r.training, curve.stopped)
            extra.update(step0=step0, warnings=notes, **self._costs("train"))
        return artifact.read(self.folder / "train", "train", verify=False)

    def after(self) -> Scores:
        """Scores of the trained model."""
        found = self._reusable("after")
        return self._scores(found) if found else self._measure("after", self.tuned())

    def exported(self) -> dict[str, Any]:
        """The adapter as other tools load it, compared after reload; uploaded where that is asked for."""
        r, folder = self.recipe, self.recipe.export_folder()
        if r.export.format == "none":
            return {}
        key, book = self.inputs.fingerprints["export"], self.folder / "export.json"
        known = artifact.read_json(book) if book.is_file() else {}
        done = exporting.finished(folder, key)
        if done is None:
            model = self.tuned()
            with self.meter.stage("export"):
                done = exporting.export(
                    model,
                    folder,
                    r.export.model_copy(update={"push_to_hub": None}),
                    fresh_base=lambda: models.load(self.bases.for_export()).model,
                    probe=self.bases.probe(),
                    records=self.bases.measured_on() if r.export.rank is not None else (),
                    tokenizer=self.inputs.tokenizer,
                    card=self._card(),
                    fingerprint=key,
                )
            known[key] = self._costs("export")
        known[key] = known.get(key, {}) | exporting.published(done, r.export).as_json()
        artifact.write_json(book, known)
        return dict(known[key])

    def _card(self) -> str:
        """The export's model card, with the scores that are there already."""
        found = {kind: self._reusable(kind) for kind in ("before", "after")}
        before, after = (self._scores(one).values if one else None for one in found.values())
        curve = artifact.read_json(self.trained().path("curve.json"))
        steps = curve["step"][-1] if curve["step"] else 0
        images = architectures.takes_images(self.tuned().get_base_model().config)
        source = self.inputs.source
        return model_card(self.recipe, self.plan(), source, before=before, after=after, steps=steps, images=images)

    def report(self) -> dict[str, Any]:
        """results.json and the page, from the artifacts."""
        plan, trained, exported = self.plan(), self.trained(), self.exported()
        found = results(self.folder, self.inputs, plan, trained, exported, self.before(), self.after())
        artifact.write_json(self.folder / RESULTS, found)
        write_page([self.folder], self.folder / "report.html")
        return found

    def _yardsticks(self) -> list[Yardstick]:
        """What drift is measured on: the calibrated knowledge, and some of it that is not; nothing without a meter."""
        context = self.context()
        if context is None or not self.recipe.metered:
            return []
        keep = context if next(iter(self.recipe.context_sources())) == "keep" else context.side("keep")
        model, lazy = self.bases.for_context()

        def weight(spec: LayerSpec) -> Tensor:
            return weight_of(model, spec, lazy.get(f"{spec.name}.weight") if lazy else None)

        unseen = [context.side(HELD_OUT)] if HELD_OUT in context.sides else []
        return [yardstick(side, weight) for side in (keep, *unseen)]

    def tuned(self) -> PeftModel:
        """The trained model."""
        trained = self.trained()
        if not isinstance(self.bases.live, PeftModel):
            model, _ = self.bases.attached(self.plan())
            model.load_adapter(str(trained.folder), TRAINED)
        assert isinstance(self.bases.live, PeftModel)
        return self.bases.live

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
