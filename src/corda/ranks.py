"""Ranks that a person sets layer by layer: what may stand under a recipe's `adapter.ranks`."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator


class LayerRank(BaseModel):
    """What is set by hand for one layer; what is left out stays as selection and allocation give it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int | None = Field(None, ge=1, strict=True, description="components adapted")
    round: int | Literal["all"] | None = Field(None, description="whose covariance is taken; all: pooled")

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: object) -> object:
        if isinstance(value, int) and not isinstance(value, bool):
            return {"rank": value}
        if not isinstance(value, dict | LayerRank):
            raise ValueError("neither a rank nor of the form {rank: 8, round: 0}")  # noqa: TRY004 (pydantic's)
        return value

    @field_validator("round", mode="before")
    @classmethod
    def _known_round(cls, value: object) -> object:
        if value is None or value == "all" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
            return value
        raise ValueError("neither a calibration round, counted from 0, nor all")

    @model_validator(mode="after")
    def _says_something(self) -> LayerRank:
        if self.rank is None and self.round is None:
            raise ValueError("neither rank nor round is given")
        return self


def read_ranks(value: object) -> object:
    """The content of a YAML file of ranks where its path is given; anything else as it is.

    Raises:
        ValueError: the file is missing, not YAML, not a mapping, or names a layer twice.
    """
    if not isinstance(value, str | Path):
        return value
    try:
        content = yaml.load(Path(value).read_text(encoding="utf-8"), Loader=_Loader)
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError("the file of ranks does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the file of ranks is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError("the file of ranks is not a mapping of layers to ranks")  # noqa: TRY004 (pydantic's)
    return content


Ranks = Annotated[dict[str, LayerRank], BeforeValidator(read_ranks)]


class _Loader(yaml.SafeLoader):
    """A safe loader that does not let a second line for a layer win over the first in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise ValueError(f"the file of ranks names {twice!r} twice")
        return super().construct_mapping(node, deep)
