"""The verb that writes a first recipe."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from corda.cli.app import app
from corda.cli.arguments import AsJson, Overrides
from corda.cli.output import print_value, quiet, warn
from corda.errors import RecipeError


@app.command("init-recipe")
def init_recipe(
    model: Annotated[str, typer.Argument(help="Hub id, folder, .gguf file or package:NAME", metavar="MODEL")],
    learn: Annotated[str, typer.Option(help="The task to learn: a data file or Hub id", metavar="FILE")],
    keep: Annotated[
        str | None, typer.Option(help="The knowledge to keep; without it: mode ipm", metavar="FILE")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe")] = Path("recipe.yaml"),
    learn_test: Annotated[str | None, typer.Option(help="Held-out records of the task", metavar="FILE")] = None,
    keep_test: Annotated[str | None, typer.Option(help="Held-out records to keep", metavar="FILE")] = None,
    mode: Annotated[
        str | None, typer.Option(help="kpm, ipm, contrast, dual or lora; default: contrast, or ipm without --keep")
    ] = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Write a first, commented recipe for a model and data.

    The model's config and the data are looked at; no weights are loaded. Held-out files that lie beside the data, such
    as test.jsonl beside train.jsonl, are used to measure with.
    """
    if output.exists():
        raise RecipeError("the recipe exists already", where=str(output), fix="name another file with --output")
    quiet()
    from corda import artifact
    from corda.drafting import draft

    done = draft(
        model,
        learn,
        keep,
        learn_test=learn_test,
        keep_test=keep_test,
        mode=mode,
        output_dir=Path("runs") / output.stem,
        overrides=set_ or [],
        launch=f"corda run {shlex.quote(str(output))}",
    )
    artifact.make_folder(output.parent)
    output.write_text(done.text, encoding="utf-8")
    if as_json:
        print_value({"recipe": str(output), "facts": done.facts, "checked": done.checked}, True)
        return
    typer.echo(f"Recipe:  {output}")
    for side, seen in done.facts["data"].items():
        typer.echo(f"{side + ':':<9}{seen['records']:,} records, {seen['kind']}, {seen['mean']:.0f} tokens on average")
    typer.echo(f"Adapter: {done.checked['trainable_parameters']:,} parameters in {done.checked['layers']} layers")
    warn(done.checked.get("warnings", []))
    typer.echo(f"Next:    corda run {shlex.quote(str(output))} --dry-run")
