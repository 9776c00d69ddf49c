"""The study: what is compared, on what, in which order; and the recipe of each of its cells."""

from __future__ import annotations

import copy
import difflib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from corda.comparing.methods import Method, method
from corda.errors import RecipeError
from corda.options import Folder, number
from corda.reading import apply_overrides, parse_recipe, read_mapping
from corda.recipe import Recipe

Rate = Annotated[float, Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Entry(_Strict):
    """One method of a study, where more than its name is to be said."""

    method: str = Field(description="one of the known methods; see docs/comparing.md")
    settings: dict[str, Any] = Field(default_factory=dict, description="dotted recipe keys, of the method alone")
    grid: dict[str, list[Any]] = Field(
        default_factory=dict, description="dotted recipe keys with values to choose from on the development split"
    )
    learning_rates: list[Rate] | None = Field(None, description="own grid; default: that of the study")
    against: str | None = Field(None, description="whose final loss it is timed against; default: the reference")


class Step(_Strict):
    """One line of the priority list: these cells before those of the next line."""

    methods: list[str] | None = Field(None, description="default: all")
    learning_rates: list[Rate] | None = Field(None, description="default: each method's grid")
    seeds: list[int] | None = Field(None, description="default: all")


class Study(_Strict):
    """Everything that is decided before a comparison runs."""

    output_dir: Folder = Field(description="folder of the study: cells, comparison.json and the page")
    base: dict[str, Any] = Field(description="the recipe that all cells share: a mapping, or the path of a file")
    overrides: dict[str, Any] = Field(default_factory=dict, description="merged into base")
    learn: str = Field(description="task/metric that says how well the task was learnt, on test data")
    development: str = Field(description="task/metric that rates and weight decay are chosen on, other records")
    keep: list[str] = Field(min_length=1, description="task/metric of what is to be kept")
    unseen: list[str] = Field(min_length=1, description="those tasks of keep whose set the calibration never saw")
    methods: dict[str, Entry] = Field(min_length=1, description="names, or name: {method, settings, learning_rates}")
    reference: str = Field("lora", description="the method whose final loss the others are timed against")
    also_against: list[str] = Field(
        default_factory=list, description="further methods that forgetting at equal task loss is compared with"
    )
    learning_rates: list[Rate] = Field(min_length=2, description="every method's grid, unless it has its own")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="of data order, calibration and random starts")
    minutes: float | None = Field(None, gt=0, description="no cell is begun later than this; default: no limit")
    priority: list[Step] = Field(default_factory=list, description="which cells come first; the others follow")
    extensions: int = Field(2, ge=0, description="rates added where a method's best one is at the end of its grid")
    parameter_tolerance: float = Field(0.03, ge=0, lt=1, description="of trainable parameters, against the base's rank")
    devices: list[str] = Field(default_factory=lambda: ["auto"], description="one process each, e.g. [cuda:0, cuda:1]")
    keep_adapters: bool = Field(False, description="keep every cell's folder; else its results alone")

    @field_validator("learning_rates")
    @classmethod
    def _ascending(cls, value: list[float]) -> list[float]:
        return sorted(set(value))

    def rates(self, name: str) -> list[float]:
        """The grid of a method."""
        return sorted(self.methods[name].learning_rates or self.learning_rates)

    def draws(self, metric: str) -> bool:
        """Whether every seed draws the records of a task for itself.

        Args:
            metric: "task/metric".
        """
        tasks = _merged(self.base, self.overrides).get("evaluation", {}).get("tasks", {})
        source = tasks.get(metric.rpartition("/")[0], {}).get("dataset")
        return isinstance(source, dict) and source.get("max_records") is not None


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        name: The method's name in the study.
        learning_rate: Peak.
        seed: Of data order, calibration samples and random starts.
        variant: Dotted keys from the method's grid, sorted.
        extension: Added because the best rate was at the end of the grid.
    """

    name: str
    learning_rate: float
    seed: int
    variant: tuple[tuple[str, Any], ...] = ()
    extension: bool = False

    @property
    def id(self) -> str:
        """File name of its results."""
        more = "".join(f"-{key.rpartition('.')[2]}-{value}" for key, value in self.variant)
        return f"{self.name}{more}-lr{self.learning_rate:.3g}-seed{self.seed}"


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study with `key=value` overrides; a base given as a path is read, relative to the study's file.

    Raises:
        RecipeError: missing, not YAML, or wrong keys or values, all of them named.
    """
    raw = read_mapping(path, "study")
    apply_overrides(raw, overrides)
    if isinstance(raw.get("base"), str):
        raw["base"] = read_mapping(path.parent / raw["base"], "recipe")
    return parse_study(raw, str(path))


def parse_study(raw: Mapping[str, Any], where: str = "study") -> Study:
    """Validate a mapping as a study.

    Args:
        raw: As YAML gives it.
        where: Its origin, named in messages.

    Raises:
        RecipeError: with every problem found, a suggestion for each unknown key and method.
    """
    given = copy.deepcopy(dict(raw))
    listed = given.get("methods")
    if isinstance(listed, list):
        given["methods"] = {name: {"method": name} for name in listed}
    elif isinstance(listed, Mapping):
        given["methods"] = {name: {"method": name} | (entry or {}) for name, entry in listed.items()}
    for block in (given, *(given["methods"] if isinstance(given.get("methods"), dict) else {}).values()):
        if isinstance(block, dict) and isinstance(block.get("learning_rates"), list):
            block["learning_rates"] = [number(rate) for rate in block["learning_rates"]]
    try:
        study = Study.model_validate(given)
    except ValidationError as error:
        problems = [_describe(dict(problem)) for problem in error.errors()]
        raise RecipeError(
            f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the study: " + "; ".join(problems),
            where=where,
            fix="correct the named keys",
        ) from None
    for entry in study.methods.values():
        method(entry.method)
    known = set(study.methods)
    for position, step in enumerate(study.priority):
        unknown = set(step.methods or ()) - known
        if unknown:
            raise RecipeError(
                "the priority list names a method that the study has not",
                where=f"{where}, priority.{position}",
                got=", ".join(sorted(unknown)),
                expected=", ".join(sorted(known)),
            )
        if others := sorted(set(step.seeds or ()) - set(study.seeds)):
            raise RecipeError(
                "the priority list names a seed that the study has not",
                where=f"{where}, priority.{position}.seeds",
                got=", ".join(map(str, others)),
                expected=f"some of seeds: {study.seeds}",
            )
    return study


def cells(study: Study) -> list[Cell]:
    """Every cell, those of the priority list first, in its order; seeds turn slowest."""
    ordered: dict[Cell, None] = {}
    for step in [*study.priority, Step()]:
        for seed in step.seeds if step.seeds is not None else study.seeds:
            for name in step.methods or study.methods:
                entry = study.methods[name]
                for rate in step.learning_rates or study.rates(name):
                    for values in itertools.product(*entry.grid.values()):
                        variant = tuple(sorted(zip(entry.grid, values, strict=True)))
                        ordered.setdefault(Cell(name, float(rate), seed, variant))
    return list(ordered)


def recipe_of(study: Study, cell: Cell, device: str = "auto") -> Recipe:
    """The recipe of a cell: the base, the study's overrides, the method's settings, rate and seed.

    Args:
        study: What was decided beforehand.
        cell: Which training.
        device: To compute on.

    Raises:
        RecipeError: the settings do not fit together.
    """
    raw = shared_recipe(study)
    chosen = method(study.methods[cell.name].method)
    for key, value in {**chosen.settings, **study.methods[cell.name].settings, **dict(cell.variant)}.items():
        _put(raw, key, value)
    _put(raw, "training.learning_rate", cell.learning_rate)
    _put(raw, "export.format", "none")
    raw |= {"seed": cell.seed, "output_dir": str(study.output_dir / "cells" / cell.id)}
    if device != "auto":
        _put(raw, "model.device", device)
    return parse_recipe(raw, f"study, cell {cell.id}")


def shared_recipe(study: Study) -> dict[str, Any]:
    """What all cells have in common, as a raw recipe."""
    raw = _merged(study.base, study.overrides)
    raw.setdefault("output_dir", str(study.output_dir))
    return raw


def method_of(study: Study, cell: Cell) -> Method:
    """The method behind a cell.

    Args:
        study: What was decided beforehand.
        cell: Which training.
    """
    return method(study.methods[cell.name].method)


def _merged(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(one))
    for key, value in two.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _put(raw: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        raw = raw.setdefault(parent, {})
    raw[last] = value


def _describe(problem: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location) or "study"
    if problem["type"] == "extra_forbidden":
        blocks: dict[str, type[BaseModel]] = {"methods": Entry, "priority": Step}
        block = blocks.get(location[0], Study) if len(location) > 1 else Study
        near = difflib.get_close_matches(location[-1], block.model_fields, n=1, cutoff=0.5)
        return f"unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else "")
    if problem["type"] == "missing":
        return f"missing key {key!r}"
    return f"{key}: {problem['msg'].removeprefix('Value error, ')}"
