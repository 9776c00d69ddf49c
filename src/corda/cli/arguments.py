"""Arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def recipe_keys(incomplete: str) -> list[tuple[str, str]]:
    """Dotted keys of the recipe that begin so, with their help, for the shell's completion."""
    from corda.recipe import Recipe

    found = []
    for name, field in Recipe.model_fields.items():
        below = getattr(field.annotation, "model_fields", None)
        for key, inner in below.items() if below else [("", field)]:
            found.append((f"{name}.{key}=" if key else f"{name}=", inner.description or ""))
    return [(key, text) for key, text in found if key.startswith(incomplete)]


RecipeFile = Annotated[Path, typer.Argument(help="Recipe, a YAML file", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override, e.g. --set adapter.rank=32", metavar="KEY=VALUE", autocompletion=recipe_keys),
]
RunOrRecipe = Annotated[Path, typer.Argument(help="The folder of a run, or its recipe", metavar="RUN|RECIPE")]
AsJson = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON only")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder: export.output")]
Form = Annotated[str | None, typer.Option("--format", help="lora, residual or merged: export.format")]
Rank = Annotated[int | None, typer.Option(help="Compress to this rank: export.rank")]
Layout = Annotated[str | None, typer.Option(help="patterns or, for servers, uniform: export.layout")]
MaxRank = Annotated[int | None, typer.Option(help="Largest rank that a server takes: export.max_rank")]
Repository = Annotated[str | None, typer.Option(help="Upload there: export.push_to_hub", metavar="REPO")]
