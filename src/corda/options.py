"""A recipe's options of the export, and what every block of options has in common; `corda.recipe` holds the rest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

DeviceMap = Literal["auto", "balanced", "sequential"] | dict[str, int | str] | None
ExportFormat = Literal["lora", "residual", "merged", "none"]
Layout = Literal["patterns", "uniform"]

PositiveInt = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    """A block of options that refuses unknown keys and does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ExportOptions(Strict):
    """What leaves the run, in which form, and where to."""

    format: ExportFormat = Field(
        "lora",
        description="lora: plain LoRA on the original base; residual: the papers' residual base with its adapter; "
        "merged: full weights; none",
    )
    rank: PositiveInt | None = Field(
        None, description="lora: best approximation of this rank per layer; default: exact, twice the adapter's rank"
    )
    layout: Layout = Field(
        "patterns", description="patterns: a rank per layer, for PEFT; uniform: one rank and alpha, for servers"
    )
    max_rank: PositiveInt | None = Field(None, description="largest rank that your server takes; more is an error")
    output: Path | None = Field(None, description="folder; default: adapter, residual or merged in output_dir")
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
