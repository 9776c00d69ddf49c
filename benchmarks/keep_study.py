"""Keep a comparison's numbers as a result file: python benchmarks/keep_study.py COMPARISON_JSON NAME [NOTE].

python benchmarks/keep_study.py again NAME computes the limits of ratios in a result file anew from the runs in it, over
seeds alone: for files whose cells, with what each record pulls, were not kept.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from harness import RESULTS

from corda import artifact
from corda.comparing.fronts import Point, compared, points


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


def again(name: str) -> None:
    """Limits of every ratio in a result file by what `compared` makes of its runs."""
    result = artifact.read_json(RESULTS / f"{name}.json")
    study, found = result["study"], result["conclusions"]
    for against, by_set in ((study["reference"], found["differences"]), *found.get("also", {}).items()):
        for kept, by_method in by_set.items():
            for method, old in by_method.items():
                new = compared(*(_by_seed(result["runs"], one, study["learn"], kept) for one in (method, against)))
                for limit in ("ratio_low", "ratio_high"):
                    old.pop(limit, None)
                    if limit in new:
                        old[limit] = new[limit]
    result["ratio_limits"] = "over seeds alone (Fieller): what each record pulls was not kept"
    artifact.write_json(RESULTS / f"{name}.json", result)


def _by_seed(runs: list[dict[str, Any]], method: str, learn: str, kept: str) -> dict[int, list[Point]]:
    own = [run for run in runs if run["method"] == method]
    return {seed: points([r for r in own if r["seed"] == seed], learn, kept) for seed in {r["seed"] for r in own}}


if __name__ == "__main__":
    again(sys.argv[2]) if sys.argv[1] == "again" else keep(Path(sys.argv[1]), *sys.argv[2:])
