"""START READING HERE: one run, from a recipe to an adapter with its scores, one line a stage.

    model + data -collect-> Context -plan-> Plan -attach, train-> adapter -evaluate-> Scores -export-> PEFT folder

Every stage leaves an artifact with a fingerprint of all that it depends on. A stage whose artifact has the right
fingerprint is not run again, so an interrupted run continues where it was, and a changed recipe redoes what the change
concerns.

Under torchrun or accelerate launch every process walks through the stages: what can be shared out is, the first one
writes the artifacts, and the others read them; see docs/distributed.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from corda import artifact, distributed, models, sharding, training
from corda.bases import Bases
from corda.context import collect, store
from corda.context.again import Recollected
from corda.context.keeping import keeping_of
from corda.context.store import HELD_OUT, Context
from corda.data.batches import pad_id
from corda.distributed import ALONE, Processes
from corda.drift import DriftMeter, Yardstick, drift_notes, yardstick
from corda.evaluation.evaluate import Scores
from corda.evaluation.sharing import dealt_tasks, together
from corda.exporting import export as exporting
from corda.forms import TRAINED
from corda.inputs import Inputs, refuse_several
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


def run(
    recipe: Recipe,
    *,
    progress: Progress = silent,
    reuse_from: Sequence[Path] = (),
    warn: Callable[[list[str]], None] = lambda _: None,
) -> dict[str, Any]:
    """Everything: collect, plan, train, evaluate before and after, export, report.

    Args:
        recipe: What to do.
        progress: Shows how far each stage is.
        reuse_from: Other runs' folders whose context, plan and scores of the base may be taken over where they fit.
        warn: Told, before the first stage, what is allowed but hardly meant; see `Inputs.warnings`.

    Returns:
        The content of results.json.

    Raises:
        CordaError: bad input, before anything expensive; or a failed check.
    """
    with opened(recipe, progress, reuse_from) as stages:
        stages.processes.first_only(lambda: warn(stages.inputs.warnings()))
        stages.context()
        stages.plan()
        stages.before()
        stages.trained()
        stages.after()
        stages.exported()
        return stages.report()


@contextmanager
def opened(recipe: Recipe, progress: Progress = silent, reuse_from: Sequence[Path] = ()) -> Iterator[Stages]:
    """The stages of a recipe that has been checked, with its output folder claimed and locked, in all processes.

    Args:
        recipe: What to do.
        progress: Shows how far each stage is.
        reuse_from: Other runs' folders whose scores of the same base may be taken over.

    Raises:
        CordaError: whatever `Inputs.check` finds, before anything is written.
        ArtifactError: the folder is another run's, holds something else, or is in use.
    """
    with distributed.joined(cpu=recipe.model.device == "cpu") as processes, ExitStack() as stack:
        stages = Stages(recipe, progress if processes.first else silent, reuse_from, processes)
        processes.first_only(stages.check)
        processes.first_only(lambda: stack.enter_context(artifact.claimed(recipe.output_dir, recipe.identity())))
        yield stages


class Stages:
    """The stages of one run; each returns its artifact's content and runs what it needs first."""

    def __init__(
        self, recipe: Recipe, progress: Progress, reuse_from: Sequence[Path] = (), processes: Processes = ALONE
    ) -> None:
        self.recipe, self.progress, self.reuse_from, self.processes = recipe, progress, reuse_from, processes
        self.inputs = Inputs(recipe)
        self.folder = recipe.output_dir
        self.meter = Meter(recipe.model.computes_on)
        self.bases = Bases(self.inputs)
        self._context: Context | None = None
        self._plan: Plan | None = None

    def check(self) -> None:
        """Refuse what can be found wrong before a weight is loaded.

        Raises:
            CordaError: see `Inputs.check`; or the launcher asks for DeepSpeed ZeRO-3.
        """
        sharding.refuse_zero3(self.recipe.training.model_extra or {})
        if self.processes.size > 1:
            refuse_several(self.recipe, self.processes.size)
        self.inputs.check()

    def context(self) -> Context | None:
        """Covariances of the calibration data; None for plain LoRA without a drift meter."""
        if not self.recipe.context_sources() or self._context is not None:
            return self._context
        r, options = self.recipe, self.recipe.context
        keeping = keeping_of(r, self.processes.size)
        found = self._reusable("context", *self.reuse_from)
        if found is not None and not found.manifest.get("kept", True) and keeping.kept:
            found = None
        if found is not None:
            discard(self.folder / "context.partial")
        else:
            journal = self._journal("context")
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
                    processes=self.processes,
                    keeping=keeping,
                )
            tokens, seconds = sum(len(one) for part in chosen for one in part), self.meter.seconds["collect"]
            again = {"tokens": tokens, "seconds": max(seconds - journal.seconds, 0.0), "why": keeping.why}
            again |= {"batch_size": options.batch_size, "threads": torch.get_num_threads()}
            key, kept = self.inputs.fingerprints["context"], keeping.kept is not False

            def save() -> None:
                costs = {"again": again} | self._costs("collect")
                store.save(context, self.folder / "context", key, costs, journal.seconds, kept=kept)
                journal.remove()

            found = self._written("context", save)
        self._context = store.load(found)
        if not found.manifest.get("kept", True):
            again = found.manifest["again"]
            self._context = self.bases.collecting_again(self._context, again["batch_size"], again["threads"])
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
            journal = self._journal("plan")
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
                    processes=self.processes,
                )
            if context is not None and isinstance(context.packed, Recollected):
                context.packed.close()
            parents = {"context": self.inputs.fingerprints["context"]} if context else {}

            def save() -> None:
                plans.save(plan, self.folder / "plan", key, parents, self._costs("plan"))
                journal.remove()

            found = self._written("plan", save)
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
        yardsticks = self.yardsticks()
        model, step0 = self.bases.attached(self.plan())
        meter = DriftMeter(model, *yardsticks) if yardsticks else None
        kind = self.inputs.kind
        encoded = [kind.encode(record) for record in self.inputs.learn_records]
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
                trainer_of=kind.trainer,
                validation=[kind.encode(record) for record in kind.validation_records],
            )
        parents = {"plan": self.inputs.fingerprints["plan"]}
        state = sharding.whole_adapters(model)
        drift = meter.read() if meter is not None else None

        def save() -> None:
            with artifact.writing(self.folder / "train", "train", key, parents) as (temporary, extra):
                model.save_pretrained(str(temporary), state_dict=state)
                artifact.write_json(temporary / "curve.json", vars(curve))
                cut = sum(not one.learnable for one in encoded)
                notes = [f"{cut} training records left out: cut at data.max_length before their answer"] if cut else []
                if drift is not None:
                    artifact.write_json(temporary / "drift.json", vars(drift))
                    notes += drift_notes(drift, r.training, curve.stopped)
                where = artifact.provenance(models.pick_device(self.recipe.model.device))
                extra.update(step0=step0, warnings=notes, provenance=where, **self._costs("train"))

        if state is not None:  # the trainer has sharded the model; what follows loads it anew
            self.bases.live = None
        return self._written("train", save)

    def after(self) -> Scores:
        """Scores of the trained model."""
        found = self._reusable("after")
        return self._scores(found) if found else self._measure("after", self.tuned())

    def exported(self) -> dict[str, Any]:
        """The adapter as other tools load it, compared after reload; uploaded where that is asked for."""
        if self.recipe.export.format == "none":
            return {}
        trained, plan = self.trained(), self.plan()
        said: dict[str, Any] = {}
        self.processes.first_only(lambda: said.update(self._export(trained, plan)))
        return dict(self.processes.tell(said))

    def _export(self, trained: artifact.Artifact, plan: Plan) -> dict[str, Any]:
        r, folder = self.recipe, self.recipe.export_folder()
        key, book = self.inputs.fingerprints["export"], self.folder / "export.json"
        known = artifact.read_json(book) if book.is_file() else {}
        done = exporting.finished(folder, key)
        if done is None:
            model = self._with_adapter(trained, plan)
            with self.meter.stage("export"):
                done = exporting.export(
                    model,
                    folder,
                    r.export.model_copy(update={"push_to_hub": None}),
                    fresh_base=lambda: models.load(self.bases.for_export()).model,
                    probe=self.bases.probe(),
                    records=self.bases.measured_on() if r.export.rank is not None else (),
                    tokenizer=self.inputs.tokenizer,
                    card=self._card(trained, plan),
                    fingerprint=key,
                )
            known[key] = self._costs("export")
        known[key] = known.get(key, {}) | exporting.published(done, r.export).as_json()
        artifact.write_json(book, known)
        return dict(known[key])

    def _card(self, trained: artifact.Artifact, plan: Plan) -> str:
        """The export's model card, with the scores that are there already."""
        found = {kind: self._found(kind) for kind in ("before", "after")}
        before, after = (self._scores(one).values if one else None for one in found.values())
        curve = artifact.read_json(trained.path("curve.json"))
        steps = curve["step"][-1] if curve["step"] else 0
        source, model = self.inputs.source, self.inputs.model
        return model_card(self.recipe, plan, source, before=before, after=after, steps=steps, model=model)

    def report(self) -> dict[str, Any]:
        """results.json and the page, from the artifacts."""
        plan, trained, exported = self.plan(), self.trained(), self.exported()
        before, after = self.before(), self.after()

        def write() -> None:
            made = results(self.folder, self.inputs, plan, trained, exported, before, after)
            artifact.write_json(self.folder / RESULTS, made)
            write_page([self.folder], self.folder / "report.html")

        self.processes.first_only(write)
        return artifact.read_json(self.folder / RESULTS)

    def yardsticks(self) -> list[Yardstick]:
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
        return self._with_adapter(self.trained(), self.plan())

    def _with_adapter(self, trained: artifact.Artifact, plan: Plan) -> PeftModel:
        if not isinstance(self.bases.live, PeftModel):
            model, _ = self.bases.attached(plan)
            model.load_adapter(str(trained.folder), TRAINED)
        return cast(PeftModel, self.bases.live)

    def _measure(self, name: str, model: PreTrainedModel | PeftModel) -> Scores:
        model.eval()
        with self.meter.stage(name):
            share = dealt_tasks(self.inputs.tasks, self.processes)
            own = self.inputs.kind.evaluate(model, share, self.progress)
            scores = together(own, self.inputs.tasks, self.processes)

        def save() -> None:
            with artifact.writing(self.folder / name, name, self.inputs.fingerprints[name]) as (temporary, extra):
                artifact.write_json(temporary / "scores.json", scores.as_json())
                extra.update(self._costs(name))

        self._written(name, save)
        return scores

    def _scores(self, found: artifact.Artifact) -> Scores:
        return Scores.from_json(artifact.read_json(found.path("scores.json")))

    def _journal(self, kind: str) -> Journal:
        """The journal of a stage; the first process makes it."""
        folder, key = self.folder / f"{kind}.partial", self.inputs.fingerprints[kind]
        made: list[Journal] = []
        self.processes.first_only(lambda: made.append(Journal(folder, key)))
        return made[0] if made else Journal(folder, key, made=True)

    def _written(self, kind: str, save: Callable[[], None]) -> artifact.Artifact:
        """What the first process has written, as all of them read it."""
        self.processes.first_only(save)
        return artifact.read(self.folder / kind, kind, verify=False)

    def _reusable(self, kind: str, *elsewhere: Path) -> artifact.Artifact | None:
        """An artifact that has the right fingerprint, as the first process finds it."""
        found: list[artifact.Artifact | None] = []
        self.processes.first_only(lambda: found.append(self._found(kind, *elsewhere)))
        if found:
            self.processes.tell(found[0] is not None)
            return found[0]
        return artifact.read(self.folder / kind, kind, verify=False) if self.processes.tell(None) else None

    def _found(self, kind: str, *elsewhere: Path) -> artifact.Artifact | None:
        for folder in (self.folder, *elsewhere):
            found = artifact.reusable(folder / kind, kind, self.inputs.fingerprints[kind])
            if found is not None:
                return found if folder == self.folder else artifact.copy(found, self.folder / kind)
        return None

    def _costs(self, stage: str) -> dict[str, Any]:
        return {"costs": {stage: {"seconds": self.meter.seconds[stage], "peak_bytes": self.meter.peak_bytes[stage]}}}
