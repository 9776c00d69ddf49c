"""The recipe: every option, its default and its help, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from corda.options import ExportOptions, Folder, ModelOptions, PositiveInt, Strict, number
from corda.ranks import Ranks
from corda.tasks import DataSource, EvaluationOptions

Mode = Literal["kpm", "ipm", "dual", "contrast", "lora"]
Directions = Literal["contrast", "random", "task", "null", "combination"]
Balance = Literal["equal", "sigma"]
Base = Literal["intact", "residual"]
Allocation = Literal["uniform", "dynamic"]
Selection = Literal["first", "pooled", "dynamic"]
Scale = Literal["token", "unit"]
Covariances = Literal["auto", "disk", "recollect"]
Correction = Literal["none", "fit", "frozen"]
Tower = Literal["language", "vision", "projector"]

_VALIDATED = {"eval_steps", "eval_strategy", "eval_on_start", "load_best_model_at_end"}  # fields of the trainer
TWO_CONTEXTS = frozenset({"dual", "contrast"})  # modes that weigh the task against the knowledge


class DataOptions(Strict):
    """What to learn, what to keep, and how records become tokens."""

    data_dir: Folder | None = Field(None, description="folder that relative data files are looked up in")
    template: Literal["plain", "chat"] = Field(
        "plain", description="plain: 'Question: ...\\nAnswer: ...'; chat: the tokenizer's chat template"
    )
    max_length: PositiveInt = Field(
        1024, description="tokens per record, or what the model takes; more are cut at the end"
    )
    learn: DataSource | None = Field(None, description="the task to learn: trained on; context of ipm, contrast, dual")
    keep: DataSource | None = Field(None, description="the knowledge to keep: context of kpm, contrast, dual")
    validation: DataSource | None = Field(None, description="held-out records of the task: their loss during training")


class ContextOptions(Strict):
    """What the covariances are collected from."""

    rounds: PositiveInt = Field(1, description="disjoint sample sets, each a candidate covariance; the paper has 5")
    selection: Selection = Field("first", description="first: CorDA; pooled: all as one; dynamic: the best per layer")
    samples: PositiveInt | None = Field(256, description="calibration records per round, or windows with pack_to")
    tokens: PositiveInt | None = Field(None, description="per round, stop after this many tokens")
    pack_to: PositiveInt | None = Field(None, description="fill windows of this many tokens with whole records")
    positions: Literal["all", "response"] = Field("all", description="which tokens count")
    batch_size: PositiveInt = Field(8, description="records per forward pass; does not change the result")
    stream: bool = Field(True, description="one block after the other where the model allows; same result, less memory")
    offload: bool = Field(False, description="weights of one block at a time in memory, the rest stays on disk")
    covariances: Covariances = Field(
        "auto", description="for planning: kept on disk, or recollect: block by block each time; auto: the cheaper one"
    )
    skip_unseen: bool = Field(False, description="leave out layers that saw no token instead of failing")
    held_out: int = Field(32, ge=0, description="records of data.keep not calibrated on, for the drift meter; 0: none")


class AdapterOptions(Strict):
    """The adapter: which components of which layers, and how they are attached."""

    mode: Mode = Field(
        "kpm",
        description="kpm: keep knowledge; ipm: learn faster; contrast: what the task needs and the knowledge lacks; "
        "dual: components weighed the same way; lora: PEFT's plain LoRA",
    )
    directions: Directions = Field(
        "contrast",
        description="for contrast and dual, what A or the components come from: contrast: both contexts; controls: "
        "random, task (as EVA), null (as LoRA-Null), combination (as SC-LoRA)",
    )
    mu: float | None = Field(
        None, gt=0, description="least share of the knowledge in every direction; default: 1 for contrast, 0.1 for dual"
    )
    normalise: Literal["trace", "median"] = Field(
        "trace", description="scale of both contexts: trace; median: of eigenvalues, which huge activations do not move"
    )
    beta: float = Field(0.5, ge=0, le=1, description="for directions combination: weight of the knowledge")
    train_a: bool | None = Field(None, description="train A too; default: not in contrast, where A only sees the task")
    row_norm: float = Field(0.577, gt=0, description="length of A's rows in contrast; LoRA's random rows have 0.577")
    orthonormal: bool = Field(False, description="make A's rows in contrast orthogonal too")
    rank: PositiveInt = Field(16, description="components per layer")
    lora_alpha: float | None = Field(None, gt=0, description="LoRA alpha; default: the rank, so scaling 1")
    use_rslora: bool = Field(False, description="scaling alpha/sqrt(rank) instead of alpha/rank")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    budget: PositiveInt | None = Field(None, description="trainable parameters; default: those of rank in every layer")
    allocation: Allocation = Field("uniform", description="uniform: rank in every layer; dynamic: by CorDA++ scores")
    rank_floor: PositiveInt = Field(1, description="smallest rank of a layer, for dynamic allocation")
    rank_cap: PositiveInt | None = Field(None, description="largest rank of a layer, for dynamic allocation")
    ranks: Ranks = Field(
        default_factory=dict, description="by hand: a file or mapping layer: rank; layers not named keep what they get"
    )
    overshoot: bool = Field(False, description="take the step that passes the budget too, as the paper does")
    compactness_scale: Scale = Field("token", description="C inside π: token: as it is; unit: over its mean diagonal")
    compactness_damp: float = Field(0.01, ge=0, description="damping of C inside π, in units of its mean diagonal")
    compactness_of: Literal["C", "WC"] = Field("C", description="whose extreme singular values π is made of")
    exponent: float = Field(1.0, description="a in W C^a: 1 CorDA, 0.5 output energy, 0 plain SVD")
    damp: float = Field(0.01, ge=0, description="damping, in units of C's mean diagonal")
    balance: Balance = Field("equal", description="split of BA: equal norms, or the paper's sigma")
    base: Base | None = Field(
        None, description="intact: W stays; residual: W - BA replaces it; default: intact, residual for a 4-bit model"
    )
    expert_prior: float | None = Field(None, gt=0, description="k of an expert's (T C + k C_pool) / (T + k); or d_in")
    correction: Correction | None = Field(
        None,
        description="of the error of 4 bits, by the data: fit: refit adapter; frozen: a frozen part beside it; none; "
        "default: fit (ipm) or frozen on a 4-bit residual base (benchmarks/results/four-bit-start-*), else none",
    )
    correction_rank: PositiveInt | None = Field(None, description="of the frozen part; default: rank")
    correction_rounds: PositiveInt = Field(1, description="of quantising and refitting")
    target_modules: str | list[str] = Field("all-linear", description="all-linear, names, or a regular expression")
    towers: list[Tower] | None = Field(
        None,
        description="of a vision-language model, where target_modules looks: language, vision, projector; "
        "default: language",
    )

    @field_validator("exponent")
    @classmethod
    def _known_exponent(cls, value: float) -> float:
        if value not in {0.0, 0.5, 1.0}:
            raise ValueError("the exponent is one of 0, 0.5 and 1")
        return value

    @model_validator(mode="after")
    def _allocation_fits(self) -> AdapterOptions:
        if self.allocation == "dynamic" and self.mode == "lora":
            raise ValueError("allocation 'dynamic' needs covariances, which mode lora has not")
        if self.rank_cap is not None and self.rank_cap < self.rank_floor:
            raise ValueError("rank_cap is below rank_floor")
        return self

    @model_validator(mode="after")
    def _two_contexts_fit(self) -> AdapterOptions:
        if self.directions != "contrast" and self.mode not in TWO_CONTEXTS:
            raise ValueError(f"directions {self.directions!r} has a meaning in modes contrast and dual only")
        if self.directions != "contrast" and self.allocation == "dynamic":
            raise ValueError("allocation 'dynamic' in modes contrast and dual goes by θ: use directions 'contrast'")
        if self.train_a is False and self.mode != "contrast":
            raise ValueError("A can be frozen in mode contrast only; a control is directions 'random'")
        if self.mode == "contrast" and (self.base == "residual" or self.correction == "fit"):
            raise ValueError("mode contrast starts at zero, so there is no residual: use base 'intact'")
        if self.mode == "dual" and (self.exponent == 0 or self.balance == "sigma"):
            raise ValueError("mode dual needs exponent 0.5 or 1 and balance 'equal'")
        return self

    @model_validator(mode="after")
    def _no_dropped_base(self) -> AdapterOptions:
        if self.lora_dropout > 0 and self.base == "residual" and self.mode != "lora":
            raise ValueError("lora_dropout with base 'residual' drops components of the base: use base 'intact'")
        return self

    @model_validator(mode="after")
    def _correction_fits(self) -> AdapterOptions:
        if self.correction not in {None, "none"} and self.mode == "lora":
            raise ValueError("a correction needs covariances, which mode lora has not")
        if self.base == "intact" and (self.correction == "fit" or self.correction_rounds > 1):
            raise ValueError("an intact base can only have correction 'frozen', of one round: use base 'residual'")
        return self

    def form(self, four_bit: bool) -> Base:
        """How the base is held: as asked, else intact, or residual for a 4-bit model."""
        default: Base = "residual" if four_bit and self.has_start else "intact"
        return self.base or default

    @property
    def has_start(self) -> bool:
        """Whether the adapter starts with components of the base, which have to be subtracted again."""
        return self.mode not in {"lora", "contrast"}

    @property
    def freezes_a(self) -> bool:
        """Whether only B is trained."""
        return self.mode == "contrast" and not self.train_a

    @property
    def least_share(self) -> float:
        """μ: as set, or the mode's default."""
        return self.mu or (1.0 if self.mode == "contrast" else 0.1)

    def cost(self, d_out: int, d_in: int) -> int:
        """Trainable parameters per component of a layer, of d_in inputs and d_out outputs."""
        return d_out if self.freezes_a else d_out + d_in

    @model_validator(mode="after")
    def _sigma_needs_damping(self) -> AdapterOptions:
        if self.balance == "sigma" and self.damp == 0:
            raise ValueError("balance 'sigma' divides by singular values: it needs damp > 0")
        return self


class TrainingOptions(BaseModel):
    """Training by TRL's SFTTrainer; any other field of its SFTConfig may be set here too."""

    model_config = ConfigDict(extra="allow", frozen=True)

    learning_rate: float = Field(2e-4, gt=0)
    max_steps: int = Field(-1, description="optimiser steps; -1: num_train_epochs decides")
    num_train_epochs: float = Field(1.0, gt=0)
    per_device_train_batch_size: PositiveInt = 8
    gradient_accumulation_steps: PositiveInt = 1
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = Field(0.03, ge=0, description="steps, or below 1 a share of all steps")
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="pulls BA to 0: back to the base in contrast and lora, away from the start in kpm, ipm, dual",
    )
    decay_to_init: float = Field(0.0, ge=0, description="decoupled decay towards the initial factors instead of to 0")
    max_grad_norm: float = 1.0
    bf16: bool | None = Field(None, description="mixed precision; default: on a GPU that has it, never on a CPU")
    gradient_checkpointing: bool = Field(False, description="less memory for a third more time")
    disable_tqdm: bool | None = Field(
        None, description="false: the trainer's own bar with every logged line; default: corda's bar, on a terminal"
    )
    logging_steps: PositiveInt = 1
    save_steps: PositiveInt | None = Field(None, description="checkpoint every so many steps; default: none")
    eval_steps: float | None = Field(None, gt=0, description="steps between readings of data.validation, or a share")
    report_to: str = Field("none", description="none, tensorboard, wandb or mlflow")
    resume_from_checkpoint: bool = Field(True, description="continue an interrupted training of the same recipe")
    drift_meter: bool | None = Field(
        None, description="meter how far outputs on data.keep move; default: in kpm, dual and contrast"
    )
    drift_steps: PositiveInt | None = Field(
        None, description="optimiser steps between readings; default: 1 with max_drift, else 20 readings in all"
    )
    max_drift: float | None = Field(None, gt=0, description="training stops when the drift passes this")
    drift_weight: float | None = Field(
        None,
        gt=0,
        description="instead of stopping: weight of a penalty from 0.8 max_drift on; steps past it are shortened",
    )

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, value: object) -> object:
        """YAML 1.1 reads 1e-8 as a string."""
        return number(value)


class Recipe(Strict):
    """One run, from a base model and data to an adapter with its scores."""

    output_dir: Folder = Field(description="folder of the run: one recipe, one folder")
    seed: int = Field(0, description="of data order, calibration samples and random starts")
    model: ModelOptions
    data: DataOptions = Field(default_factory=lambda: DataOptions())
    context: ContextOptions = Field(default_factory=lambda: ContextOptions())
    adapter: AdapterOptions = Field(default_factory=lambda: AdapterOptions())
    training: TrainingOptions = Field(default_factory=lambda: TrainingOptions())
    evaluation: EvaluationOptions = Field(default_factory=lambda: EvaluationOptions())
    export: ExportOptions = Field(default_factory=lambda: ExportOptions())

    @model_validator(mode="after")
    def _has_its_data(self) -> Recipe:
        mode = self.adapter.mode
        if (mode == "kpm" or mode in TWO_CONTEXTS) and self.data.keep is None:
            raise ValueError(f"mode {mode} collects its context from data.keep, which is not set")
        if self.training.decay_to_init and not self.adapter.has_start:
            raise ValueError(f"training.decay_to_init needs initial factors, which mode {mode} has not")
        if self.data.learn is None:
            raise ValueError("data.learn, the task to train on, is not set")
        asked = self.training.model_dump()
        if self.data.validation is None and any(asked.get(key) not in (None, False, "no") for key in _VALIDATED):
            raise ValueError("training.eval_steps and its like read the loss on data.validation, which is not set")
        if self.export.format == "residual" and not self.adapter.has_start:
            raise ValueError(f"export.format residual needs initial factors, which mode {mode} has not")
        adapter = self.adapter
        if self.context.positions == "response" and {"vision", "projector"} & set(adapter.towers or ()):
            raise ValueError("patches of an image are no response: set context.positions to 'all' for these towers")
        if self.model.load_in_4bit and adapter.lora_dropout > 0 and adapter.form(four_bit=True) == "residual":
            raise ValueError("lora_dropout with a 4-bit residual base drops components of it: use base 'intact'")
        return self

    @model_validator(mode="after")
    def _drift_can_be_metered(self) -> Recipe:
        training = self.training
        if self.metered and self.data.keep is None:
            raise ValueError("training.drift_meter needs data.keep, which is not set")
        if training.max_drift is not None and not self.metered:
            raise ValueError("training.max_drift needs the drift meter: set training.drift_meter: true")
        if training.drift_weight is not None and training.max_drift is None:
            raise ValueError("training.drift_weight is of a penalty above training.max_drift, which is not set")
        return self

    @property
    def metered(self) -> bool:
        """Whether the drift of outputs on the knowledge is metered."""
        default = self.adapter.mode == "kpm" or self.adapter.mode in TWO_CONTEXTS
        return default if self.training.drift_meter is None else self.training.drift_meter

    def context_source(self) -> DataSource | None:
        """The data set whose covariances the plan is made of, or None for plain LoRA."""
        mode = self.adapter.mode
        return None if mode == "lora" else self.data.learn if mode == "ipm" else self.data.keep

    def context_sources(self) -> dict[str, DataSource]:
        """Every data set that covariances are collected from, by side; the one of `context_source` first."""
        sides = ["learn"] if self.adapter.mode == "ipm" else []
        if self.metered or self.adapter.mode == "kpm" or self.adapter.mode in TWO_CONTEXTS:
            sides.append("keep")
        if self.adapter.mode in TWO_CONTEXTS:
            sides.append("learn")
        both = {"learn": self.data.learn, "keep": self.data.keep}
        return {side: source for side in sides if (source := both[side]) is not None}

    def export_folder(self) -> Path:
        """Where the export goes."""
        return self.export.output or self.output_dir / {"lora": "adapter"}.get(self.export.format, self.export.format)

    def identity(self) -> dict[str, Any]:
        """What makes an output folder this run's; other settings may change and redo what depends on them."""
        return {
            "model": Path(self.model.model_name_or_path).name,
            "mode": self.adapter.mode,
            "learn": Path(self.data.learn.dataset).name if self.data.learn else None,
            "keep": Path(self.data.keep.dataset).name if self.data.keep else None,
        }

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types, every default filled in."""
        return self.model_dump(mode="json")
