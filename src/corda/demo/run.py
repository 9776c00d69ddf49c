"""`corda demo`: plain LoRA and CorDA-KPM on the same budget, steps and data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from corda import pipeline
from corda.demo import write
from corda.progress import Progress, silent
from corda.reading import apply_overrides, parse_recipe
from corda.report.card import method_name
from corda.report.page import write_page

METHODS = ("lora", "kpm")


def demonstrate(
    folder: Path,
    seed: int = 0,
    overrides: Sequence[str] = (),
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda _: None,
) -> tuple[list[dict[str, Any]], Path]:
    """Run the demo's recipe once per method.

    Args:
        folder: Data, runs and page go there.
        seed: Of data order and sampling.
        overrides: `key=value` for both runs; `lora:key=value` or `kpm:key=value` for one.
        progress: Shows how far it is.
        announce: Told what comes next.

    Returns:
        The results of both runs, LoRA's first, and the path of the page.
    """
    write(folder / "data")
    results = []
    for number, method in enumerate(METHODS, start=1):
        announce(f"[{number}/{len(METHODS)}] {method_name(method)}")
        raw = yaml.safe_load(files("corda.demo").joinpath(f"{method}.yaml").read_text(encoding="utf-8"))
        raw |= {"output_dir": str(folder / method), "seed": seed}
        raw["data"]["data_dir"] = str(folder / "data")
        prefixes = tuple(f"{other}:" for other in METHODS)
        own = [item.removeprefix(f"{method}:") for item in overrides]
        apply_overrides(raw, [item for item in own if not item.startswith(prefixes)])
        others = [folder / other for other in METHODS if other != method]
        results.append(pipeline.run(parse_recipe(raw, f"demo {method}"), progress=progress, reuse_from=others))
    page = folder / "report.html"
    write_page([folder / method for method in METHODS], page)
    return results, page
