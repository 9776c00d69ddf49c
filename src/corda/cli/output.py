"""What verbs share: reading recipes, opening runs, printing."""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import AbstractContextManager
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from corda.errors import ArtifactError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from corda.pipeline import Stages
    from corda.recipe import Recipe


def load(path: Path, overrides: list[str] | None) -> Recipe:
    """A recipe file with its overrides.

    Args:
        path: The recipe.
        overrides: Items of --set.
    """
    from corda.reading import load_recipe

    return load_recipe(path, overrides or [])


def folder_of(run: Path, overrides: list[str] | None) -> Path:
    """The output folder of a recipe, or a run's folder itself.

    Args:
        run: A run's folder, or a recipe.
        overrides: Items of --set.
    """
    return load(run, overrides).output_dir if run.is_file() else run


def short(**options: object) -> list[str]:
    """Short-hands of --set export.KEY=VALUE."""
    return [f"export.{key}={json.dumps(value, default=str)}" for key, value in options.items() if value is not None]


def opened(path: Path, overrides: list[str] | None) -> AbstractContextManager[Stages]:
    """The stages of a recipe, checked and locked, with progress bars.

    Args:
        path: The recipe.
        overrides: Items of --set.
    """
    quiet()
    from corda import pipeline
    from corda.progress import shown

    return pipeline.opened(load(path, overrides), shown)


def refuse_other_training(stages: Stages) -> None:
    """For verbs after training: it may be done here, but not thrown away and done again with other settings.

    Args:
        stages: Of the recipe.

    Raises:
        ArtifactError: the adapter that was trained in the run's folder has other settings than the recipe.
    """
    from corda import artifact

    folder = stages.folder / "train"
    done = (folder / artifact.MANIFEST).is_file()
    if done and artifact.reusable(folder, "train", stages.inputs.fingerprints["train"]) is None:
        raise ArtifactError(
            "the adapter here was trained with other settings or data than the recipe has now",
            where=str(folder),
            fix="give the settings that it was trained with, and as many processes (records per step count); or "
            "`corda run RECIPE` to train again, in its place",
        )


def quiet() -> None:
    """No bars or notices of the libraries below where nobody watches."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    getLogger("bitsandbytes").setLevel(ERROR)  # that a kernel for some CPUs is not installed
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")  # of TRL's calls, not ours
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def print_value(value: dict[str, Any], as_json: bool) -> None:
    """A mapping, as JSON or a line a key.

    Args:
        value: What to print.
        as_json: As one line of JSON.
    """
    if as_json:
        typer.echo(json.dumps(value, ensure_ascii=False))
        return
    for key, item in value.items():
        text = json.dumps(item, ensure_ascii=False) if isinstance(item, dict | list) else str(item)
        typer.echo(f"{key}: {text}")


def warn(warnings: list[str]) -> None:
    """One line a warning."""
    for warning in warnings:
        typer.echo(f"Warning: {warning}")


def print_export(done: dict[str, Any], as_json: bool) -> None:
    """An export; for people without what each layer lost, which its manifest holds.

    Args:
        done: What the export reported.
        as_json: As one line of JSON.
    """
    from corda.exporting.kept import kept_warning

    facts = {key: value for key, value in done.items() if key != "costs" and (as_json or value is not None)}
    for key in () if as_json else ("compression", "low_rank_fit"):
        if key in facts:
            facts[key] = {k: v for k, v in facts[key].items() if k != "lost_energy_of_layers"}
    print_value(facts, as_json)
    warn([] if as_json else kept_warning(done))


def print_table(results: list[dict[str, Any]]) -> None:
    """Scores of runs, side by side."""
    from corda.report.table import scores_table

    show(scores_table(results))


def show(drawn: RenderableType) -> None:
    """A table or picture of rich's, as wide as the terminal."""
    from rich.console import Console

    Console().print(drawn)
