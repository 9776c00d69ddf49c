"""The verbs that write adapters for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from corda.cli.app import app
from corda.cli.arguments import AsJson, Form, Layout, MaxRank, Output, Overrides, Rank, RecipeFile, Repository
from corda.cli.output import opened, print_export, quiet, refuse_other_training, short


@app.command()
def export(
    recipe: RecipeFile,
    format_: Form = None,
    rank: Rank = None,
    layout: Layout = None,
    max_rank: MaxRank = None,
    output: Output = None,
    push_to_hub: Repository = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Write the adapter for other tools, and check it."""
    given = short(format=format_, rank=rank, layout=layout, max_rank=max_rank, output=output, push_to_hub=push_to_hub)
    with opened(recipe, [*(set_ or []), *given]) as stages:
        refuse_other_training(stages)
        print_export(stages.exported(), as_json)


@app.command()
def convert(
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA adapter that PEFT saved", metavar="ADAPTER")],
    base: Annotated[str, typer.Option(help="The original base: Hub id, folder, .gguf file or package:NAME")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to")],
    initial: Annotated[Path | None, typer.Option(help="The adapter as it was before training")] = None,
    residual_base: Annotated[str | None, typer.Option(help="The model that the adapter was trained on")] = None,
    format_: Form = None,
    rank: Rank = None,
    layout: Layout = None,
    max_rank: MaxRank = None,
    push_to_hub: Repository = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Turn an adapter trained elsewhere into a plain LoRA.

    CorDA, PiSSA and OLoRA adapters of PEFT's then fit the original base.
    """
    from corda.exporting.convert import convert as converted
    from corda.reading import apply_overrides, parse_export, parse_model

    raw: dict[str, Any] = {"model": {"model_name_or_path": base}, "export": {}}
    given = short(format=format_, rank=rank, layout=layout, max_rank=max_rank, push_to_hub=push_to_hub)
    apply_overrides(raw, [*(set_ or []), *given])
    model, options = parse_model(raw["model"]), parse_export(raw["export"])
    quiet()
    done = converted(adapter, model, output, options, initial=initial, residual_base=residual_base)
    print_export(done.as_json(), as_json)
