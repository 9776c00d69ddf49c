"""`corda demo`: plain LoRA, CorDA-KPM and contrast on the same budget, steps and data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from corda import pipeline
from corda.demo import write
from corda.errors import RecipeError
from corda.progress import Progress, silent
from corda.reading import apply_overrides, parse_recipe
from corda.report.card import method_name
from corda.report.page import write_page

METHODS = ("lora", "kpm", "contrast")


def demonstrate(
    folder: Path,
    seed: int = 0,
    overrides: Sequence[str] = (),
    methods: Sequence[str] = METHODS,
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda _: None,
) -> tuple[list[dict[str, Any]], Path]:
    """Run the demo's recipe once per method.

    Args:
        folder: Data, runs and page go there.
        seed: Of data order and sampling.
        overrides: `key=value` for all runs; `lora:key=value`, `kpm:key=value` or `contrast:key=value` for one.
        methods: Which of `METHODS`, in this order.
        progress: Shows how far it is.
        announce: Told what comes next.

    Returns:
        The runs' results, and the path of the page.

    Raises:
        RecipeError: a method that the demo does not have.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        raise RecipeError(
            "no method of the demo", where="--methods", got=", ".join(unknown), expected=f"some of {', '.join(METHODS)}"
        )
    write(folder / "data")
    results = []
    for number, method in enumerate(methods, start=1):
        announce(f"[{number}/{len(methods)}] {method_name(method)}")
        raw = yaml.safe_load(files("corda.demo").joinpath(f"{method}.yaml").read_text(encoding="utf-8"))
        raw |= {"output_dir": str(folder / method), "seed": seed}
        raw["data"]["data_dir"] = str(folder / "data")
        prefixes = tuple(f"{other}:" for other in METHODS)
        own = [item.removeprefix(f"{method}:") for item in overrides]
        apply_overrides(raw, [item for item in own if not item.startswith(prefixes)])
        others = [folder / other for other in methods if other != method]
        results.append(pipeline.run(parse_recipe(raw, f"demo {method}"), progress=progress, reuse_from=others))
    page = folder / "report.html"
    write_page([folder / method for method in methods], page)
    return results, page
