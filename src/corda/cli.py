"""The command line: one verb a stage, recipe file first."""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from corda import __version__
from corda.errors import ArtifactError, CordaError
from corda.progress import shown
from corda.reading import load_recipe
from corda.recipe import Recipe

if TYPE_CHECKING:
    from corda.pipeline import Stages

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 100},
)
_inspect = typer.Typer(no_args_is_help=True, help="Look into a run's plan or context, or into a LoRA adapter.")
app.add_typer(_inspect, name="inspect")
_errors = Console(stderr=True, soft_wrap=True, highlight=False)
_debug = False
_INTERRUPTED = 130

RecipeFile = Annotated[Path, typer.Argument(help="Recipe, a YAML file", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override, e.g. --set adapter.rank=32", metavar="KEY=VALUE")
]
RunOrRecipe = Annotated[Path, typer.Argument(help="The folder of a run, or its recipe", metavar="RUN|RECIPE")]
AsJson = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON only")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder: export.output")]
Form = Annotated[str | None, typer.Option("--format", help="lora, residual or merged: export.format")]
Rank = Annotated[int | None, typer.Option(help="Compress to this rank: export.rank")]
Layout = Annotated[str | None, typer.Option(help="patterns or, for servers, uniform: export.layout")]
MaxRank = Annotated[int | None, typer.Option(help="Largest rank that a server takes: export.max_rank")]
Repository = Annotated[str | None, typer.Option(help="Upload there: export.push_to_hub", metavar="REPO")]


def main() -> None:
    """Console script: exit code 0, 1 (failed), 2 (bad input) or 130 (interrupted)."""
    try:
        code = app(standalone_mode=False)
        if code == _INTERRUPTED:  # typer turns a KeyboardInterrupt into this
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except CordaError as error:
        if _debug:
            raise
        _errors.print(f"[bold red]Error[/] {type(error).__name__}:", end=" ")
        _errors.print(str(error), markup=False)
        sys.exit(error.exit_code)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _errors.print("Interrupted. Finished stages are kept: run the same command again to continue.")
        sys.exit(_INTERRUPTED)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            _errors.print(f"[bold red]Error[/] {error.format_message()}")
            sys.exit(2)
        raise


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks")] = False,
) -> None:
    """Fine-tune language models without making them forget."""
    global _debug  # noqa: PLW0603
    _debug = debug
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def run(
    recipe: RecipeFile,
    set_: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check recipe, data and layers; load no weights")] = False,
    as_json: AsJson = False,
) -> None:
    """Everything: collect, plan, train, evaluate, export, report."""
    parsed = _load(recipe, set_)
    if dry_run:
        _print(_check(parsed), as_json)
        return
    from corda import pipeline

    _quiet()
    results = pipeline.run(parsed, progress=shown)
    if as_json:
        _print(results, True)
        return
    _print_table([results])
    console = Console(soft_wrap=True)
    if results["export"]:
        console.print(f"Export:  {results['export']['path']}")
    console.print(f"Report:  {parsed.output_dir / 'report.html'}")


@app.command()
def collect(recipe: RecipeFile, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Collect the covariances of the layers' inputs."""
    with _opened(recipe, set_) as stages:
        context = stages.context()
        if context is None:
            _print({"context": None, "why": "mode lora needs none"}, as_json)
            return
        from corda import artifact, inspecting
        from corda.report.table import kept_sentence

        folder = stages.folder / "context"
        kept = inspecting.kept(artifact.read(folder, "context", verify=False))
        summary = {
            "layers": len(context.layers),
            "distinct_inputs": len(context.members()),
            "tokens": max(context.tokens.values()),
            "warnings": list(context.warnings),
            "kept": kept if as_json else kept_sentence(kept),
            "folder": str(folder),
        }
        _print(summary, as_json)


@app.command()
def plan(
    recipe: RecipeFile,
    set_: Overrides = None,
    save_ranks: Annotated[
        Path | None, typer.Option("--save-ranks", help="Write the ranks as YAML to edit, for adapter.ranks")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Decompose the layers: ranks, spectra and initial factors."""
    if save_ranks is not None and save_ranks.exists():
        raise ArtifactError("the file of ranks exists already", where=str(save_ranks), fix="name another file")
    from corda import artifact

    with _opened(recipe, set_) as stages:
        done = stages.plan()
        made = done.as_json()
        if save_ranks is not None:
            from corda.plan.byhand import ranks_file

            artifact.make_folder(save_ranks.parent)
            save_ranks.write_text(ranks_file(done, stages.recipe.context.rounds), encoding="utf-8")
        if not as_json:
            from corda.report.table import plan_table

            Console().print(plan_table(made))
            _warn(made["warnings"])
            return
        _print(made, as_json)


@app.command()
def train(recipe: RecipeFile, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Train the adapter."""
    with _opened(recipe, set_) as stages:
        found = stages.trained()
        curve = json.loads(found.path("curve.json").read_text(encoding="utf-8"))
        _print(
            {"folder": str(found.folder), "step0": found.manifest["step0"], "last_loss": curve["loss"][-1:]}, as_json
        )


@app.command("eval")
def evaluate(recipe: RecipeFile, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Measure the base and the trained model."""
    with _opened(recipe, set_) as stages:
        before, after = stages.before(), stages.after()
        scores = {k: {n: v.as_json() for n, v in s.values.items()} for k, s in (("before", before), ("after", after))}
        _print(scores, as_json)


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
    """Write the adapter as other tools load it, and check it after reload."""
    short = _short(format=format_, rank=rank, layout=layout, max_rank=max_rank, output=output, push_to_hub=push_to_hub)
    with _opened(recipe, [*(set_ or []), *short]) as stages:
        _print_export(stages.exported(), as_json)


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
    """Turn a CorDA or PiSSA adapter trained elsewhere into a plain LoRA on the original base."""
    from corda.exporting.convert import convert as converted
    from corda.reading import apply_overrides, parse_export, parse_model

    raw: dict[str, Any] = {"model": {"model_name_or_path": base}, "export": {}}
    short = _short(format=format_, rank=rank, layout=layout, max_rank=max_rank, push_to_hub=push_to_hub)
    apply_overrides(raw, [*(set_ or []), *short])
    model, options = parse_model(raw["model"]), parse_export(raw["export"])
    _quiet()
    done = converted(adapter, model, output, options, initial=initial, residual_base=residual_base)
    _print_export(done.as_json(), as_json)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="One recipe, or the folders of finished runs", metavar="RECIPE|RUN...")
    ],
    set_: Overrides = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The page; default: in the first run")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the HTML page of a run, or of several side by side."""
    from corda.pipeline import RESULTS
    from corda.report.page import write_page

    if len(runs) == 1 and runs[0].is_file():
        runs = [_load(runs[0], set_).output_dir]
    missing = [folder for folder in runs if not (folder / RESULTS).is_file()]
    if missing:
        raise CordaError("there is no finished run here", where=str(missing[0]), fix="run the recipe first")
    page = output or runs[0] / ("report.html" if len(runs) == 1 else "comparison.html")
    write_page(runs, page)
    _print({"page": str(page)}, as_json)


@_inspect.command("plan")
def inspect_plan(
    run: RunOrRecipe,
    set_: Overrides = None,
    html: Annotated[bool, typer.Option("--html", help="Write a page, plan.html in the run's folder")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the page to this file")] = None,
    as_json: AsJson = False,
) -> None:
    """Draw ranks, compactness and the candidates' scores of all layers."""
    from corda import artifact
    from corda.report.heatmap import plan_overview
    from corda.report.layers import write_plan_page

    folder = _folder(run, set_)
    found = artifact.read(folder / "plan", "plan")
    made = artifact.read_json(found.path("plan.json"))
    if html or output:
        page = output or folder / "plan.html"
        write_plan_page(found.folder, made, page)
        _print({"page": str(page)}, as_json)
    elif as_json:
        _print(made, True)
    else:
        Console().print(plan_overview(made))
        _warn(made["warnings"])


@_inspect.command("context")
def inspect_context(run: RunOrRecipe, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Show what each distinct input's covariance was collected from, its size and its effective rank."""
    from corda.inspecting import context_facts
    from corda.report.table import context_table

    facts = context_facts(_folder(run, set_) / "context", shown)
    if as_json:
        _print(facts, True)
        return
    Console().print(context_table(facts))
    _warn(facts["warnings"])


@_inspect.command("adapter")
def inspect_adapter(
    folder: Annotated[Path, typer.Argument(help="A folder with adapter_config.json", metavar="FOLDER")],
    as_json: AsJson = False,
) -> None:
    """Show layers, ranks, scaling and norms of any LoRA adapter in PEFT's format."""
    from corda.inspecting import adapter_facts
    from corda.report.table import adapter_table

    facts = adapter_facts(folder)
    if as_json:
        _print(facts, True)
        return
    Console().print(adapter_table(facts))


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="Where the demo's runs go")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of data order and sampling")] = 0,
    set_: Overrides = None,
) -> None:
    """Train plain LoRA and CorDA on built-in data and show what each learnt and forgot."""
    from corda.demo.run import demonstrate

    _quiet()
    results, page = demonstrate(
        output_dir, seed, set_ or [], shown, announce=lambda text: _errors.print(text, markup=False)
    )
    _print_table(results)
    Console().print(f"Report: {page}", soft_wrap=True)


def _load(path: Path, overrides: list[str] | None) -> Recipe:
    return load_recipe(path, overrides or [])


def _folder(run: Path, overrides: list[str] | None) -> Path:
    """The output folder of a recipe, or a run's folder itself."""
    return _load(run, overrides).output_dir if run.is_file() else run


def _short(**options: object) -> list[str]:
    """Short-hands of --set export.KEY=VALUE."""
    return [f"export.{key}={json.dumps(value, default=str)}" for key, value in options.items() if value is not None]


def _check(recipe: Recipe) -> dict[str, Any]:
    from corda.inputs import Inputs

    return Inputs(recipe).check()


def _opened(path: Path, overrides: list[str] | None) -> AbstractContextManager[Stages]:
    from corda import pipeline

    _quiet()
    return pipeline.opened(_load(path, overrides), shown)


def _quiet() -> None:
    """No bars or notices of the libraries below where nobody watches."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")  # of TRL's calls, not ours
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _print(value: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(value, ensure_ascii=False))
        return
    for key, item in value.items():
        text = json.dumps(item, ensure_ascii=False) if isinstance(item, dict | list) else str(item)
        typer.echo(f"{key}: {text}")


def _warn(warnings: list[str]) -> None:
    for warning in warnings:
        typer.echo(f"Warning: {warning}")


def _print_export(done: dict[str, Any], as_json: bool) -> None:
    """An export; for people without what each layer lost, which its manifest holds."""
    from corda.exporting.kept import kept_warning

    facts = {key: value for key, value in done.items() if key != "costs" and (as_json or value is not None)}
    for key in () if as_json else ("compression", "low_rank_fit"):
        if key in facts:
            facts[key] = {k: v for k, v in facts[key].items() if k != "lost_energy_of_layers"}
    _print(facts, as_json)
    _warn([] if as_json else kept_warning(done))


def _print_table(results: list[dict[str, Any]]) -> None:
    from corda.report.table import scores_table

    Console().print(scores_table(results))
