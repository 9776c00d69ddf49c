"""What the stages of a run depend on: read when first needed, checked before a weight is loaded."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

from corda import artifact, models, quantization
from corda.advice import advice
from corda.context.keeping import refuse_recollecting
from corda.context.store import HELD_OUT
from corda.data import sources
from corda.data.batches import Encoded, calibration_rounds, drawing_order
from corda.data.formats import Record
from corda.distributed import world
from corda.errors import DataError, RecipeError
from corda.evaluation.evaluate import Task, refuse_overlap, refuse_shared
from corda.exporting.hub import refuse_without_token
from corda.exporting.update import refuse_rank
from corda.kinds.choose import kind_of
from corda.kinds.kind import Kind
from corda.options import ModelOptions
from corda.plan.byhand import by_hand, check_ranks_by_hand
from corda.plan.make import uniform_rank
from corda.plan.plan import corrected
from corda.recipe import Recipe
from corda.targets import LayerSpec, find_targets

# Options that change how a context is collected or used, not what is in it; held_out counts where drift is metered.
_NOT_OF_A_CONTEXT = {"batch_size", "stream", "offload", "covariances", "selection", "held_out"}
# Of the trainer's further fields, those that change neither what is learnt nor from what.
_NOT_OF_A_TRAINING = {"run_name", "logging_first_step", "dataloader_num_workers", "dataloader_pin_memory"}
_NOT_OF_A_TRAINING |= {"dataloader_persistent_workers", "dataloader_prefetch_factor", "torch_empty_cache_steps"}
_NOT_OF_A_TRAINING |= {"save_only_model", "dataset_num_proc", "gradient_checkpointing_kwargs"}


class Inputs:
    """Model files, layers, records and tasks of a recipe, and the fingerprints that follow from them."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @cached_property
    def source(self) -> models.Source:
        """Where the base model is."""
        return models.resolve(self.recipe.model)

    @cached_property
    def kind(self) -> Kind:
        """What the recipe trains the model for, which decides all that follows from that."""
        return kind_of(self.recipe, self.source)

    @property
    def model(self) -> ModelOptions:
        """The recipe's options of the model, with its task and classes filled in."""
        return self.kind.model

    @property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return self.kind.tokenizer

    @cached_property
    def targets(self) -> list[LayerSpec]:
        """Target layers, found on a model without weights."""
        model, adapter = models.skeleton(self.source, self.model), self.recipe.adapter
        return find_targets(model, adapter.target_modules, adapter.towers)

    @cached_property
    def quantisation(self) -> models.Quantisation | None:
        """The 4-bit form of the base, or None."""
        return models.quantisation(self.source, self.recipe.model)

    @property
    def learn_records(self) -> list[Record]:
        """Training records."""
        return self.kind.learn_records

    @cached_property
    def calibration_records(self) -> dict[str, list[Record]]:
        """Records that calibration samples are drawn from, by side: "keep" and "learn"; see `context_sources`."""
        known = {"learn": self.kind.formats, "keep": self.kind.kept}
        return {side: self.kind.records(s, known[side]) for side, s in self.recipe.context_sources().items()}

    @property
    def context_records(self) -> list[Record]:
        """Those of the first side; none for plain LoRA without a drift meter."""
        return next(iter(self.calibration_records.values()), [])

    def calibration(self) -> tuple[list[list[Encoded]], tuple[str, ...]]:
        """Calibration samples of every round of every side, and the names of those behind the first side's rounds.

        For the drift meter the rounds of the knowledge are followed by some records of it that no round has.
        """
        r, options = self.recipe, self.recipe.context
        drawn: list[list[Encoded]] = []
        names: list[str] = []
        unseen: list[list[Encoded]] = []
        for side, records in self.calibration_records.items():
            order = drawing_order(records, r.seed)
            draw = functools.partial(
                calibration_rounds,
                records,
                self.tokenizer,
                max_length=r.data.max_length,
                order=order,
                encoding=self.kind.encode_kept if side == "keep" else self.kind.encode,
            )
            drawn += draw(options.rounds, samples=options.samples, tokens=options.tokens, pack_to=options.pack_to)
            names += [side] * options.rounds
            if side == "keep" and r.metered and options.held_out:
                with suppress(DataError):  # nothing is left
                    unseen = draw(1, samples=options.held_out)
        return [*drawn, *unseen], (*names[options.rounds :], *[HELD_OUT] * len(unseen))

    @property
    def tasks(self) -> list[Task]:
        """Evaluation tasks with their records."""
        return self.kind.tasks

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Stage -> fingerprint of all that its artifact depends on."""
        r = self.recipe
        device = models.pick_device(r.model.device).type
        dtype = "float32" if (r.model.dtype, device) == ("auto", "cpu") else r.model.dtype
        model = [models.identity(self.source, self.recipe.model), dtype, device]
        data = [r.data.template, r.data.max_length, r.seed]
        head = self.kind.head()

        def identify(source: Any) -> Any:
            return sources.identity(source, r.data.data_dir, r.seed) if source else None

        tasks = [
            [
                name,
                identify(t.dataset),
                identify(t.shots_from),
                t.model_dump(mode="json", exclude={"dataset", "shots_from"}),
            ]
            for name, t in r.evaluation.tasks.items()
        ]
        context = artifact.fingerprint(
            "context",
            model,
            data,
            [[side, identify(source)] for side, source in r.context_sources().items()],
            r.context.model_dump(mode="json", exclude=_NOT_OF_A_CONTEXT),
            r.context.held_out if r.metered else 0,
            [r.adapter.target_modules, r.adapter.towers],
            *head[:1],
        )
        options = r.adapter.model_dump(mode="json", exclude={"base"})
        chosen = [context, r.context.selection] if r.context_source() else None
        if self.quantisation is not None:  # the context is that of the weights in full precision
            model = [*model, repr(self.quantisation), r.adapter.form(four_bit=True)]
        plan = artifact.fingerprint("plan", model, chosen, options)
        size, gathered = r.training.per_device_train_batch_size, r.training.gradient_accumulation_steps
        excluded = {"report_to", "disable_tqdm", "resume_from_checkpoint", "save_steps", "save_total_limit"}
        excluded |= {"per_device_train_batch_size", "gradient_accumulation_steps", "deepspeed", "fsdp", "fsdp_config"}
        excluded |= {"eval_steps"}
        if (r.training.model_extra or {}).get("load_best_model_at_end"):
            excluded -= {"save_steps"}  # what there is to choose from
        settings = r.training.model_dump(mode="json", exclude=excluded | _NOT_OF_A_TRAINING)
        settings["gradient_checkpointing"] = False  # the same numbers for less memory
        settings["records_per_step"] = size * gathered * world().size  # however they are shared out
        metered = context if r.metered else None
        learn, validation = identify(r.data.learn), identify(r.data.validation)
        read = [validation, r.training.eval_steps] if validation else []  # in the curve
        train = artifact.fingerprint("train", plan, r.adapter.base, data, learn, settings, metered, *head, *read)
        evaluation = r.evaluation.model_dump(mode="json", exclude={"batch_size", "tasks"})
        shots = [identify(s) for s in (r.data.keep, r.data.learn)]
        before = artifact.fingerprint("before", model, data[:2], tasks, evaluation, shots, *head)
        after = artifact.fingerprint("after", train, before)
        return {
            "context": context,
            "plan": plan,
            "train": train,
            "before": before,
            "after": after,
            "export": artifact.fingerprint("export", train, r.export.content(), self._export_place()),
        }

    @property
    def exports_in_full(self) -> bool:
        """Whether a 4-bit run's export is for the base in full precision, which is then loaded on the CPU."""
        if self.quantisation is None:
            return False
        anew = self.recipe.adapter.form(four_bit=True) == "residual" and not self.quantisation.stored
        return anew or self.recipe.export.format == "merged"

    def _export_place(self) -> str | None:
        """A residual export's adapter names its base by its path; the other formats depend on no place."""
        return str(self.recipe.export_folder().resolve()) if self.recipe.export.format == "residual" else None

    def check_export(self, ranks: Mapping[str, int]) -> None:
        """Refuse an export that could not be written after training.

        Args:
            ranks: Layer name -> rank of the adapter.

        Raises:
            RecipeError: the exported adapter would have a larger rank than export.max_rank.
            ResourceError: an upload is asked for and there is no access token.
        """
        options = self.recipe.export
        adapter, exported = self.recipe.adapter, options.format
        doubled = exported == "lora" and adapter.has_start
        four_bit = self.quantisation is not None
        frozen = corrected(adapter, four_bit) == "frozen"
        carries = frozen and (exported == "residual" or (exported == "lora" and adapter.form(four_bit) == "intact"))
        more = (adapter.correction_rank or adapter.rank) if carries else 0
        refuse_rank(
            {name: rank * (2 if doubled else 1) + more for name, rank in ranks.items()}, options, doubled=doubled
        )
        if options.push_to_hub is not None:
            refuse_without_token(options.push_to_hub)

    def _check_experts(self) -> None:
        """Refuse what stacked experts do not allow.

        Raises:
            RecipeError: names the option and what to set it to.
        """
        r, stacked = self.recipe, [t.name for t in self.targets if t.stored[1] is not None]
        for key, got in (
            ("adapter.lora_dropout", r.adapter.lora_dropout),
            ("context.offload", r.context.offload),
            ("model.load_in_4bit", self.quantisation is not None),
        ):
            if stacked and got:
                raise RecipeError(
                    f"{key} is not possible with adapters on stacked experts",
                    where=f"{key}, {stacked[0]} and {len(stacked) - 1} more",
                    got=got,
                    fix=f"set {key}: {'false' if got is True else 0}, or name other layers in adapter.target_modules",
                )

    def _check_validation(self, used: dict[str, Sequence[Record]]) -> None:
        """Add the validation records to what is in use, unless training or calibration has them too."""
        if self.kind.validation_records:
            refuse_shared("data.validation", self.kind.validation_records, used)
            used["data.validation"] = self.kind.validation_records

    def check(self) -> dict[str, Any]:
        """Everything that can be found wrong before a weight is loaded.

        Raises:
            CordaError: whatever is wrong with model, data, targets, rank or export.
        """
        refuse_recollecting(self.recipe)
        targets = self.targets
        self._check_experts()
        check_ranks_by_hand(targets, self.recipe.adapter, self.recipe.context.rounds)
        if self.quantisation is not None:
            quantization.require()
            names = [target.name for target in targets if target.stored[1] is None]
            quantization.refuse_unpacked(models.skeleton(self.source, self.model), names)
            form = self.recipe.adapter.form(four_bit=True)
            if form == "intact" and self.recipe.export.format == "residual":
                raise RecipeError(
                    "an intact 4-bit base has no residual form",
                    where="export.format",
                    got="residual",
                    fix="set adapter.base: residual, or export.format: lora or merged",
                )
        rank = uniform_rank(targets, self.recipe.adapter)
        ranks = {t.name: by_hand(self.recipe.adapter, t.name).rank or rank for t in targets}
        dynamic = self.recipe.adapter.allocation == "dynamic"
        self.check_export({} if dynamic else ranks)
        used: dict[str, Sequence[Record]] = {"data.learn": self.learn_records}
        if self.calibration_records:
            used["the calibration data"] = [record for some in self.calibration_records.values() for record in some]
        self._check_validation(used)
        refuse_overlap(self.tasks, used)
        self.kind.check(used, models.pick_device(self.recipe.model.device))
        allocated = self.recipe.adapter.allocation == "dynamic" and any(
            by_hand(self.recipe.adapter, t.name).rank is None for t in targets
        )
        later = {"note": "ranks are allocated later; until then a layer counts with adapter.rank"} if allocated else {}
        return {
            "layers": len(targets),
            "trainable_parameters": sum(self.recipe.adapter.cost(t.d_out, t.d_in) * ranks[t.name] for t in targets),
            "calibration_records_to_draw_from": len(self.context_records),
            "training_records": len(self.learn_records),
            "tasks": {task.name: len(task.records) for task in self.tasks},
            "output_dir": str(self.recipe.output_dir),
            **later,
        }

    def warnings(self) -> list[str]:
        """What is allowed but hardly meant, of a recipe that passed `check`: settings, and records that are cut."""
        return [*advice(self.recipe), *self.kind.notes()]

    def dry_run(self) -> dict[str, Any]:
        """What `corda run --dry-run` says: the facts of `check`, and warnings where there are any.

        Raises:
            CordaError: see `check`.
        """
        facts, warnings = self.check(), self.warnings()
        return facts | ({"warnings": warnings} if warnings else {})


def refuse_several(recipe: Recipe, processes: int) -> None:
    """What one process can do and several cannot.

    Args:
        recipe: Of a run that several processes share.
        processes: How many.

    Raises:
        RecipeError: the model is spread over devices, or covariances are to be collected again.
    """
    if recipe.model.device_map is not None:
        raise RecipeError(
            "a model that is spread over devices by one process cannot be trained by several",
            where="model.device_map",
            got=f"{processes} processes",
            fix="start one process, or leave device_map out: accelerate launch --use_fsdp --fsdp_version 2",
        )
    if recipe.context.covariances == "recollect":
        raise RecipeError(
            "several processes plan from covariances on disk",
            where="context.covariances",
            got="recollect",
            fix="set it to disk, or start one process",
        )
