"""Keep a comparison's numbers as a result file: python benchmarks/keep_study.py COMPARISON_JSON NAME [NOTE]."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from harness import RESULTS

from corda import artifact


def keep(comparison: Path, name: str, note: str | None = None) -> None:
    """Everything but each run's own provenance and learning rates step by step; losses of curves to 5 digits."""
    found = artifact.read_json(comparison)
    runs = [_short(run) for run in found["runs"]]
    head: dict[str, Any] = {"name": name} | ({"note": note} if note else {})
    artifact.write_json(RESULTS / f"{name}.json", head | found | {"runs": runs})


_KEPT = ("step", "loss", "eval_step", "eval_loss")


def _five_digits(losses: list[float | None]) -> list[float | None]:
    return [None if loss is None else float(f"{loss:.5g}") for loss in losses]


def _short(run: dict[str, Any]) -> dict[str, Any]:
    short = {key: value for key, value in run.items() if key != "provenance"}
    if "curve" in short:
        curve = {key: short["curve"][key] for key in _KEPT if short["curve"].get(key)}
        short["curve"] = {
            key: values if key.endswith("step") else _five_digits(values) for key, values in curve.items()
        }
    return short


if __name__ == "__main__":
    keep(Path(sys.argv[1]), *sys.argv[2:])
