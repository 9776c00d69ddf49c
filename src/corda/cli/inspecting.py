"""The verbs that look into what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corda.cli.app import app
from corda.cli.arguments import AsJson, Overrides, RecipeFile, RunOrRecipe
from corda.cli.output import folder_of, opened, print_value, show, warn
from corda.progress import shown

inspect = typer.Typer(no_args_is_help=True, help="Look into a plan, a context or a LoRA adapter.")
app.add_typer(inspect, name="inspect")


@inspect.command("plan")
def inspect_plan(
    run: RunOrRecipe,
    set_: Overrides = None,
    html: Annotated[bool, typer.Option("--html", help="Write a page, plan.html in the run's folder")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the page to this file")] = None,
    as_json: AsJson = False,
) -> None:
    """Draw every layer's rank, compactness and scores."""
    from corda import artifact
    from corda.report.heatmap import plan_overview
    from corda.report.layers import write_plan_page

    folder = folder_of(run, set_)
    found = artifact.read(folder / "plan", "plan")
    made = artifact.read_json(found.path("plan.json"))
    if html or output:
        page = output or folder / "plan.html"
        write_plan_page(found.folder, made, page)
        print_value({"page": str(page)}, as_json)
    elif as_json:
        print_value(made, True)
    else:
        show(plan_overview(made))
        warn(made["warnings"])


@inspect.command("context")
def inspect_context(run: RunOrRecipe, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Show each covariance's tokens, size and effective rank."""
    from corda.inspecting import context_facts
    from corda.report.table import context_table

    facts = context_facts(folder_of(run, set_) / "context", shown)
    if as_json:
        print_value(facts, True)
        return
    show(context_table(facts))
    warn(facts["warnings"])


@inspect.command("adapter")
def inspect_adapter(
    folder: Annotated[Path, typer.Argument(help="A folder with adapter_config.json", metavar="FOLDER")],
    as_json: AsJson = False,
) -> None:
    """Show layers, ranks and norms of any LoRA of PEFT's."""
    from corda.inspecting import adapter_facts
    from corda.report.table import adapter_table

    facts = adapter_facts(folder)
    if as_json:
        print_value(facts, True)
        return
    show(adapter_table(facts))


@inspect.command("coverage")
def inspect_coverage(recipe: RecipeFile, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Show how much of the retained sets' energy a plan protects.

    Collects and plans first where that is not done.
    """
    from corda.covering import covered
    from corda.report.table import coverage_table

    with opened(recipe, set_) as stages:
        facts = covered(stages)
    if as_json:
        print_value(facts, True)
        return
    show(coverage_table(facts))
    warn(facts["warnings"])
