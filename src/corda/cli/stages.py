"""The verbs of a run's stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from corda.cli.app import app, note
from corda.cli.arguments import AsJson, Overrides, RecipeFile
from corda.cli.output import load, opened, print_table, print_value, quiet, refuse_other_training, show, warn
from corda.errors import ArtifactError, CordaError
from corda.progress import shown


@app.command()
def run(
    recipe: RecipeFile,
    set_: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check recipe, data and layers; load no weights")] = False,
    as_json: AsJson = False,
) -> None:
    """Everything: collect, plan, train, eval, export, report."""
    parsed = load(recipe, set_)
    quiet()
    if dry_run:
        from corda.inputs import Inputs

        facts = Inputs(parsed).dry_run()
        notes = [] if as_json else facts.pop("warnings", [])
        print_value(facts, as_json)
        warn(notes)
        return
    from corda import pipeline

    said: list[str] = []

    def say(warnings: list[str]) -> None:
        said.extend(warnings)
        warn([] if as_json else warnings)

    results = pipeline.run(parsed, progress=shown, warn=say)
    if as_json:
        print_value(results, True)
        return
    print_table([results])
    warn([one for one in results["warnings"] if one not in said])
    if results["export"]:
        typer.echo(f"Export:  {results['export']['path']}")
    typer.echo(f"Report:  {parsed.output_dir / 'report.html'}")


@app.command()
def collect(recipe: RecipeFile, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Collect the covariances of the layers' inputs."""
    with opened(recipe, set_) as stages:
        context = stages.context()
        if context is None:
            print_value({"context": None, "why": "mode lora needs none"}, as_json)
            return
        from corda import artifact, inspecting
        from corda.report.table import kept_sentence

        folder = stages.folder / "context"
        kept = inspecting.kept(artifact.read(folder, "context", verify=False))
        first = next(iter(stages.recipe.context_sources()))
        sides = {first: context} | {side: context.side(side) for side in dict.fromkeys(context.sides)}
        summary = {
            "layers": len(context.layers),
            "distinct_inputs": len(context.members()),
            "tokens": {
                side: max(one.token_count(spec.name, None) for spec in one.layers) for side, one in sides.items()
            },
            "warnings": list(context.warnings),
            "kept": kept if as_json else kept_sentence(kept),
            "folder": str(folder),
        }
        print_value(summary, as_json)


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

    with opened(recipe, set_) as stages:
        done = stages.plan()
        made = done.as_json()
        if save_ranks is not None:
            from corda.plan.byhand import ranks_file

            artifact.make_folder(save_ranks.parent)
            save_ranks.write_text(ranks_file(done, stages.recipe.context.rounds), encoding="utf-8")
        if not as_json:
            from corda.report.table import plan_table

            show(plan_table(made))
            warn(made["warnings"])
            return
        print_value(made, as_json)


@app.command()
def train(recipe: RecipeFile, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Train the adapter."""
    with opened(recipe, set_) as stages:
        found = stages.trained()
        curve = json.loads(found.path("curve.json").read_text(encoding="utf-8"))
        print_value(
            {"folder": str(found.folder), "step0": found.manifest["step0"], "last_loss": curve["loss"][-1:]}, as_json
        )


@app.command("eval")
def evaluate(
    recipe: RecipeFile,
    set_: Overrides = None,
    harness: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness instead, separated by commas", metavar="TASKS")
    ] = None,
    harness_path: Annotated[Path | None, typer.Option(help="Folder with more of its task files")] = None,
    limit: Annotated[int | None, typer.Option(help="For --harness: records per task")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the base and the trained model."""
    from corda.evaluation.harness import harness_scores, require

    if harness is not None:
        require()
    with opened(recipe, set_) as stages:
        refuse_other_training(stages)
        if harness is None:
            both = (("before", stages.before()), ("after", stages.after()))
            sides = {side: {name: s.as_json() for name, s in scores.values.items()} for side, scores in both}
        else:
            stages.inputs.kind.refuse_unless_text("the harness", images=False)
            tokenizer, size = stages.inputs.tokenizer, stages.recipe.evaluation.batch_size
            sides = {
                side: harness_scores(
                    model().eval(), tokenizer, harness.split(","), include=harness_path, limit=limit, batch_size=size
                )
                for side, model in (("before", stages.bases.bare), ("after", stages.tuned))
            }
        if harness is None and not as_json:
            recipe_json = stages.recipe.as_json()
            print_table([{"plan": {"mode": stages.recipe.adapter.mode}, "scores": sides, "recipe": recipe_json}])
            return
        print_value(sides, as_json)


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
    from corda.report.page import write_page
    from corda.results import RESULTS

    if len(runs) == 1 and runs[0].is_file():
        runs = [load(runs[0], set_).output_dir]
    missing = [folder for folder in runs if not (folder / RESULTS).is_file()]
    if missing:
        raise CordaError("there is no finished run here", where=str(missing[0]), fix="run the recipe first")
    page = output or runs[0] / ("report.html" if len(runs) == 1 else "comparison.html")
    write_page(runs, page)
    print_value({"page": str(page)}, as_json)


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="Where the demo's runs go")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of data order and sampling")] = 0,
    methods: Annotated[str, typer.Option(help="Which of these; finished runs are reused")] = "lora,kpm,contrast",
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train LoRA and CorDA on built-in data, and compare."""
    from corda.demo.run import demonstrate

    quiet()
    results, page = demonstrate(output_dir, seed, set_ or [], methods.split(","), shown, announce=note)
    if as_json:
        print_value({"runs": results, "page": str(page)}, True)
        return
    print_table(results)
    typer.echo(f"Report: {page}")
