"""The verb that compares methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corda.cli.app import app, note
from corda.cli.arguments import AsJson, Overrides
from corda.cli.output import print_value, quiet, show
from corda.errors import RecipeError
from corda.progress import shown


@app.command()
def compare(
    study: Annotated[Path | None, typer.Argument(help="Study, a YAML file", metavar="STUDY")] = None,
    set_: Overrides = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="A random tiny model and generated data instead")] = False,
    methods: Annotated[str | None, typer.Option(help="For --smoke: these methods, separated by commas")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="For --smoke: folder")] = Path("runs/smoke"),
    minutes: Annotated[float | None, typer.Option(help="Begin no cell later than this: minutes")] = None,
    gather: Annotated[bool, typer.Option("--gather", help="Run nothing: write up the cells that are done")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the study; list its cells; run nothing")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare methods over learning rates and seeds."""
    from corda.comparing import compare as comparing
    from corda.comparing.fairness import check
    from corda.comparing.smoke import smoke_study
    from corda.comparing.study import cells, load_study
    from corda.report.comparison import best_table

    if (study is None) != smoke:
        raise RecipeError("give a study or --smoke", where="corda compare", fix="corda compare STUDY, or --smoke")
    quiet()
    given = (
        smoke_study(output, methods.split(",") if methods else None) if study is None else load_study(study, set_ or [])
    )
    if minutes is not None:
        given = given.model_copy(update={"minutes": minutes})
    if dry_run:
        print_value(check(given) | {"order": [cell.id for cell in cells(given)]}, as_json)
        return
    if gather:
        found = comparing.gathered(given)
    else:
        found = comparing.compare(given, progress=shown, announce=note, prepare=quiet)
    if as_json:
        print_value(found, True)
        return
    show(best_table(found))
    typer.echo(f"Comparison: {given.output_dir / comparing.COMPARISON}")
    typer.echo(f"Page:       {given.output_dir / comparing.PAGE}")
