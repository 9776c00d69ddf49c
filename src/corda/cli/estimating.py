"""The verb that says what a run will need before anything is loaded."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from corda.cli.app import app
from corda.cli.arguments import AsJson, Overrides, RecipeFile
from corda.cli.output import load, print_value, quiet


@app.command()
def estimate(
    recipe: RecipeFile,
    device_profile: Annotated[str, typer.Option(help="auto: this machine, measured for some seconds; h100")] = "auto",
    processes: Annotated[int, typer.Option(min=1, help="With one device each")] = 1,
    shard: Annotated[bool, typer.Option("--shard", help="Divide the weights over the processes")] = False,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Predict a run's memory, disk and time without weights."""
    from corda.estimate.estimate import estimate as predict

    quiet()
    found = predict(load(recipe, set_), device_profile, processes=processes, shard=shard)
    if as_json:
        print_value(found, True)
        return
    _show(found)


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    table = Table(title=f"{found['device']['name']}, {found['processes']} process(es), each")
    for column in ("stage", "device memory, GB", "of it weights", "host memory, GB", "time"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage, memory in found["memory"].items():
        device, host = memory["device"], sum(memory["host"].values())
        seconds = found["seconds"].get(stage, {}).get("total")
        table.add_row(
            stage, _gb(device["total"]), _gb(device["weights"]), _gb(host), "" if seconds is None else _time(seconds)
        )
    console.print(table)
    console.print(f"Trainable parameters: {found['trainable_parameters']:,} of {found['model_parameters']:,}")
    calibration = found["calibration"]
    if calibration:
        console.print(
            f"Calibration: {calibration['sets']} x {calibration['tokens_per_round']:,} tokens (rounds and sides); "
            f"{calibration['would_do']:,} are enough for the widest input"
            + ("" if calibration["enough"] else ", so these are too few")
        )
    console.print(f"Disk: {_gb(found['disk']['total'])} GB, {_gb(found['disk']['covariances'])} of it covariances")
    for stage, size in found["network"].items():
        console.print(f"Sent by each process, {stage}: {_gb(size)} GB")
    if not found["fits"]:
        console.print("[bold]Does not fit[/]: lower batch sizes, or set context.offload: true")
    for line in found["assumptions"]:
        console.print(f"Note: {line}", markup=False)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 300 else f"{seconds / 60:.0f} min"
