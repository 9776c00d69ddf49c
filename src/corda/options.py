"""A recipe's options of the model and the export, and what all blocks have in common; `corda.recipe` holds the rest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DeviceMap = Literal["auto", "balanced", "sequential"] | dict[str, int | str] | None
ExportFormat = Literal["lora", "residual", "merged", "none"]
Layout = Literal["patterns", "uniform"]
# As transformers' Auto classes and PEFT's task types call them.
ModelTask = Literal["causal-lm", "image-text-to-text", "seq2seq-lm", "sequence-classification", "token-classification"]

PositiveInt = Annotated[int, Field(ge=1)]


def _expanded(path: Path) -> Path:
    """~ is the home folder, as in a shell."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from None


Folder = Annotated[Path, AfterValidator(_expanded)]


class Strict(BaseModel):
    """A block of options that refuses unknown keys and does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ModelOptions(Strict):
    """The base model."""

    model_name_or_path: str = Field(
        description="Hub id, local folder, path of a .gguf file, or package:NAME (a Python package with one)"
    )
    revision: str | None = Field(None, description="Hub revision")
    task: Literal["auto"] | ModelTask = Field(
        "auto", description="what the model is for; auto: as its checkpoint says, which an encoder's does not"
    )
    num_labels: PositiveInt | None = Field(None, description="of a fresh head: classes; default: those of data.learn")
    id2label: dict[int, str] | None = Field(
        None, description="of a fresh head: names of the classes by number, e.g. {0: negative, 1: positive}"
    )
    head_seed: int | None = Field(None, description="of a fresh head's weights; default: the run's seed")
    dtype: Dtype = Field("auto", description="auto: float32 on a CPU, the checkpoint's own elsewhere")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    device_map: DeviceMap = Field(None, description="spread the weights: auto, or module: GPU number, cpu or disk")
    max_memory: dict[int | str, str] | None = Field(None, description="per device, for device_map, e.g. {0: 70GB}")
    trust_remote_code: bool = Field(False, description="run code that comes with the checkpoint")
    load_in_4bit: bool = Field(False, description="hold the linear layers in 4 bits (bitsandbytes)")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="code book, for load_in_4bit")
    bnb_4bit_use_double_quant: bool = Field(False, description="quantise the scales too, for load_in_4bit")

    @property
    def computes_on(self) -> str:
        """The device as given, or "all" where weights are spread over what GPUs there are."""
        spread = self.device_map
        places = set(map(str, spread.values())) if isinstance(spread, dict) else set()
        if places and places <= {"cpu", "disk"}:
            return "cpu"
        return self.device if spread is None or self.device == "cpu" else "all"

    @model_validator(mode="after")
    def _classes_agree(self) -> ModelOptions:
        names, number = self.id2label, self.num_labels
        if names is not None and sorted(names) != list(range(len(names))):
            raise ValueError("id2label names the classes 0, 1, 2, ... without a gap")
        if names is not None and number not in {None, len(names)}:
            raise ValueError(f"num_labels is {number}, and id2label names {len(names)} classes")
        return self


class ExportOptions(Strict):
    """What leaves the run, in which form, and where to."""

    format: ExportFormat = Field(
        "lora",
        description="lora: plain LoRA on the original base; residual: the papers' residual base with its adapter; "
        "merged: full weights; none",
    )
    rank: PositiveInt | None = Field(
        None,
        description="lora: best approximation of this rank per layer; default: exact, in kpm, ipm and dual twice the "
        "adapter's rank",
    )
    layout: Layout = Field(
        "patterns", description="patterns: a rank per layer, for PEFT; uniform: one rank and alpha, for servers"
    )
    max_rank: PositiveInt | None = Field(None, description="largest rank that your server takes; more is an error")
    output: Folder | None = Field(None, description="folder; default: adapter, residual or merged in output_dir")
    max_shard_size: str = Field("5GB", description="largest file of full weights")
    tolerance: float | None = Field(
        None,
        gt=0,
        description="largest relative logit difference after reload; default 1e-5, or for a 16-bit base 4 times what "
        "one random rounding of each adapted layer's output does",
    )
    push_to_hub: str | None = Field(None, description="Hub repository to upload to, e.g. me/adapter, after the check")
    license: str | None = Field(
        None,
        description="for the model card, as the Hub names it, e.g. apache-2.0; default: what the base's card states",
    )
    hub_private_repo: bool | None = Field(None, description="create that repository private; default: the Hub's own")

    @field_validator("push_to_hub")
    @classmethod
    def _repository(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"([\w.-]+/)?[\w.-]+", value):
            raise ValueError("a Hub repository is OWNER/NAME")
        return value

    @model_validator(mode="after")
    def _fits_the_format(self) -> ExportOptions:
        adapter = self.format in {"lora", "residual"}
        for name, needs, has in (
            ("rank", self.format == "lora", self.rank is not None),
            ("layout", adapter, self.layout != "patterns"),
            ("max_rank", adapter, self.max_rank is not None),
        ):
            if has and not needs and self.format != "none":
                raise ValueError(f"{name} has no meaning for format {self.format!r}")
        if self.rank is not None and self.max_rank is not None and self.rank > self.max_rank:
            raise ValueError("rank is above max_rank")
        return self

    def content(self) -> dict[str, Any]:
        """What the files depend on, without where they go."""
        return self.model_dump(mode="json", exclude={"output", "push_to_hub", "hub_private_repo"})


def number(value: Any) -> Any:
    """The number that a text like 1e-8 means, which YAML 1.1 reads as a string; in mappings too, all else as it is."""
    if isinstance(value, dict):
        return {key: number(one) for key, one in value.items()}
    if not isinstance(value, str) or not re.fullmatch(r"[-+]?[0-9.]+[eE][-+]?[0-9]+", value):
        return value
    return float(value)
