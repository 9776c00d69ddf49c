"""The recipe: every option, its default and its help, once. YAML files and `--set` are read into it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from corda.errors import RecipeError
from corda.ranks import Ranks

Mode = Literal["kpm", "ipm", "lora"]
Balance = Literal["equal", "sigma"]
Base = Literal["intact", "residual"]
Allocation = Literal["uniform", "dynamic"]
Selection = Literal["first", "pooled", "dynamic"]
Scale = Literal["token", "unit"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
RecordFormat = Literal["auto", "qa", "alpaca", "prompt_completion", "messages", "sharegpt", "text", "choice"]
Metric = Literal["answer_loss", "exact_match", "perplexity", "accuracy"]

PositiveInt = Annotated[int, Field(ge=1)]


# Fields of TRL's that corda sets from elsewhere in the recipe.
_SET_BY = {
    "output_dir": "output_dir",
    "seed": "seed",
    "data_seed": "seed",
    "use_cpu": "model.device",
    "max_length": "data.max_length",
    "save_strategy": "training.save_steps",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ModelOptions(_Strict):
    """The base model."""

    model_name_or_path: str = Field(
        description="Hub id, local folder, path of a .gguf file, or package:NAME (a Python package with one)"
    )
    revision: str | None = Field(None, description="Hub revision")
    dtype: Dtype = Field("auto", description="auto: float32 on a CPU, the checkpoint's own elsewhere")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    trust_remote_code: bool = Field(False, description="run code that comes with the checkpoint")


class DataSource(_Strict):
    """One data set: a Hub id or a json, jsonl, csv or parquet file."""

    dataset: str = Field(description="Hub id, or a file (relative to data.data_dir, else to the working folder)")
    name: str | None = Field(None, description="Hub configuration name")
    split: str = Field("train", description="split, for Hub data sets")
    format: RecordFormat = Field("auto", description="record format; auto looks at the fields")
    columns: dict[str, str] = Field(
        default_factory=dict, description="mapping from a format's field to your column, e.g. {question: q}"
    )
    max_records: PositiveInt | None = Field(None, description="use at most this many, drawn with the run's seed")

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: object) -> object:
        return {"dataset": value} if isinstance(value, str) else value


class DataOptions(_Strict):
    """What to learn, what to keep, and how records become tokens."""

    data_dir: Path | None = Field(None, description="folder that relative data files are looked up in")
    template: Literal["plain", "chat"] = Field(
        "plain", description="plain: 'Question: ...\\nAnswer: ...'; chat: the tokenizer's chat template"
    )
    max_length: PositiveInt = Field(1024, description="tokens per record; longer ones are cut at the end")
    learn: DataSource | None = Field(None, description="the task to learn: trained on, and the context in ipm")
    keep: DataSource | None = Field(None, description="the knowledge to keep: the context in kpm")


class ContextOptions(_Strict):
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
    skip_unseen: bool = Field(False, description="leave out layers that saw no token instead of failing")


class AdapterOptions(_Strict):
    """The adapter: which components of which layers, and how they are attached."""

    mode: Mode = Field("kpm", description="kpm: keep knowledge; ipm: learn faster; lora: PEFT's plain LoRA")
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
    base: Base = Field("intact", description="intact: W stays; residual: W - BA replaces it")
    target_modules: str | list[str] = Field(
        "all-linear", description="all-linear (all but the output head), names, or a regular expression"
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
    def _no_dropped_base(self) -> AdapterOptions:
        if self.lora_dropout > 0 and self.base == "residual" and self.mode != "lora":
            raise ValueError("lora_dropout with base 'residual' drops components of the base: use base 'intact'")
        return self

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
    weight_decay: float = Field(0.0, ge=0, description="pulls BA to 0, away from the start: see docs/footguns.md")
    decay_to_init: float = Field(0.0, ge=0, description="decoupled decay towards the initial factors instead of to 0")
    max_grad_norm: float = 1.0
    bf16: bool | None = Field(None, description="mixed precision; default: on a GPU that has it, never on a CPU")
    gradient_checkpointing: bool = Field(False, description="less memory for a third more time")
    disable_tqdm: bool | None = Field(None, description="default: a progress bar on a terminal only")
    logging_steps: PositiveInt = 1
    save_steps: PositiveInt | None = Field(None, description="checkpoint every so many steps; default: none")
    report_to: str = Field("none", description="none, tensorboard, wandb or mlflow")
    resume_from_checkpoint: bool = Field(True, description="continue an interrupted training of the same recipe")

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, value: object) -> object:
        """YAML 1.1 reads 1e-8 as a string."""
        return {k: _number(v) for k, v in value.items()} if isinstance(value, dict) else value


class EvaluationTask(_Strict):
    """One held-out data set with its metrics."""

    dataset: DataSource
    measures: Literal["learn", "keep"] = Field(description="which side of the bargain it measures")
    metrics: list[Metric] = Field(["answer_loss"], min_length=1)
    shots: int = Field(0, ge=0, description="solved examples before each question, from `shots_from`")
    shots_from: DataSource | None = Field(None, description="where the shots come from; default: data.keep/learn")
    max_new_tokens: PositiveInt = Field(32, description="for exact_match")
    stop: list[str] = Field(default_factory=lambda: ["\n"], description="generated text ends before these")
    answer_after: str | None = Field(
        None, description="compare only what follows the last occurrence of this, e.g. '####'"
    )
    choice_prompt: str = Field("{context}", description="for accuracy: how a context is put to the model")

    @field_validator("metrics")
    @classmethod
    def _no_mixture(cls, value: list[Metric]) -> list[Metric]:
        alone = {"perplexity", "accuracy"} & set(value)
        if alone and len(value) > 1:
            raise ValueError(f"{sorted(alone)[0]} stands alone; give the other metrics a task of their own")
        return value


class EvaluationOptions(_Strict):
    """What is measured before and after training."""

    tasks: dict[str, EvaluationTask] = Field(default_factory=dict)
    batch_size: PositiveInt = 16
    window: PositiveInt = Field(1024, description="tokens per window, for perplexity")
    samples_shown: int = Field(4, ge=0, description="generated answers per task kept for the report")


class ExportOptions(_Strict):
    """What leaves the run."""

    format: Literal["lora", "none"] = Field("lora", description="lora: plain LoRA on the original base")
    tolerance: float | None = Field(
        None, gt=0, description="largest relative logit difference after reload; default 1e-4, 5e-2 for 16-bit bases"
    )


class Recipe(_Strict):
    """One run, from a base model and data to an adapter with its scores."""

    output_dir: Path
    seed: int = 0
    model: ModelOptions
    data: DataOptions = Field(default_factory=lambda: DataOptions())
    context: ContextOptions = Field(default_factory=lambda: ContextOptions())
    adapter: AdapterOptions = Field(default_factory=lambda: AdapterOptions())
    training: TrainingOptions = Field(default_factory=lambda: TrainingOptions())
    evaluation: EvaluationOptions = Field(default_factory=lambda: EvaluationOptions())
    export: ExportOptions = Field(default_factory=lambda: ExportOptions())

    @model_validator(mode="after")
    def _has_its_data(self) -> Recipe:
        if self.adapter.mode == "kpm" and self.data.keep is None:
            raise ValueError("mode kpm collects its context from data.keep, which is not set")
        if self.training.decay_to_init and self.adapter.mode == "lora":
            raise ValueError("training.decay_to_init needs initial factors, which mode lora has not")
        if self.data.learn is None:
            raise ValueError("data.learn, the task to train on, is not set")
        return self

    def context_source(self) -> DataSource | None:
        """The data set that the covariances come from, or None for plain LoRA."""
        return {"kpm": self.data.keep, "ipm": self.data.learn, "lora": None}[self.adapter.mode]

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


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply `key.sub=value` overrides.

    Raises:
        RecipeError: the file is missing or not YAML, or one or several keys or values are wrong; all are named.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError("the recipe does not exist", where=str(path), fix="check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError("the recipe is not valid YAML", where=str(path), got=str(error)) from None
    if not isinstance(raw, dict):
        raise RecipeError("the recipe is not a mapping", where=str(path), got=type(raw).__name__)
    apply_overrides(raw, overrides)
    return parse_recipe(raw, str(path))


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set `key.sub=value` items in a raw recipe; values are read as YAML.

    Raises:
        RecipeError: an item is not of that form.
    """
    for item in overrides:
        _apply_override(raw, item)


def parse_recipe(raw: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Validate a mapping as a recipe; `where` names its origin in messages.

    Raises:
        RecipeError: with every problem found, and a suggestion for each unknown key.
    """
    problems: list[str] = []
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        problems += [_describe(dict(problem)) for problem in error.errors()]
    training = raw.get("training")
    if isinstance(training, Mapping):
        problems += _unknown_training_keys(training)
    if problems or recipe is None:
        raise RecipeError(
            f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the recipe: " + "; ".join(problems),
            where=where,
            fix="correct the named keys; `corda run RECIPE --dry-run` checks again without loading a model",
        )
    return recipe


def parse_adapter(settings: Mapping[str, Any]) -> AdapterOptions:
    """Adapter options by name, as Python callers give them.

    Raises:
        RecipeError: with every problem found, and a suggestion for each unknown name.
    """
    try:
        return AdapterOptions.model_validate(dict(settings))
    except ValidationError as error:
        problems = [_describe(dict(problem), ["adapter"]) for problem in error.errors()]
        raise RecipeError("; ".join(problems), where="adapter options") from None


def _apply_override(raw: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise RecipeError("an override is not of the form key=value", where="--set", got=repr(item))
    try:
        value = _number(yaml.safe_load(text))
    except yaml.YAMLError:
        value = text
    node = raw
    *parents, last = key.split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if isinstance(child, str):
            child = node[parent] = {"dataset": child}
        if not isinstance(child, dict):
            raise RecipeError("an override goes below a value", where=f"--set {item}", got=f"{parent}={child!r}")
        node = child
    node[last] = value


def _number(value: Any) -> Any:
    if not isinstance(value, str) or not re.fullmatch(r"[-+]?[0-9.]+[eE][-+]?[0-9]+", value):
        return value
    return float(value)


def _describe(problem: dict[str, Any], inside: Sequence[str] = ()) -> str:
    location = [*inside, *(str(part) for part in problem["loc"])]
    key = ".".join(location) or "recipe"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_suggest(location[-1], _fields_at(location[:-1]))}"
    if problem["type"] == "missing":
        return f"missing key {key!r}"
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(problem["input"], dict | BaseModel) else f" (got {problem['input']!r})"
    return f"{key}: {message}{shown}"


def _suggest(word: str, candidates: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, candidates, n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else f" (there are: {', '.join(sorted(candidates))})"


def _fields_at(location: Sequence[str]) -> list[str]:
    node: Any = Recipe
    for part in location:
        fields = getattr(node, "model_fields", None)
        node = fields[part].annotation if fields and part in fields else node
        while get_origin(node) is not None:  # Optional[...], dict[str, Task]
            inner = [arg for arg in get_args(node) if isinstance(arg, type) and issubclass(arg, BaseModel)]
            node = inner[0] if inner else Recipe
            if get_origin(node) is Union:
                break
    return list(getattr(node, "model_fields", {}))


def _unknown_training_keys(training: Mapping[str, Any]) -> list[str]:
    extra = [key for key in training if key not in TrainingOptions.model_fields]
    if not extra:
        return []
    from trl import SFTConfig  # slow to import, so only where a key has to be looked up

    known = [*SFTConfig.__dataclass_fields__, *TrainingOptions.model_fields]
    ours = [f"'training.{key}' is set by {_SET_BY[key]}" for key in extra if key in _SET_BY]
    return ours + [f"unknown key 'training.{key}'{_suggest(key, known)}" for key in extra if key not in known]
