"""Keep a finished run's numbers as a result file: python benchmarks/keep_run.py RUN NAME."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from corda import artifact

RESULTS = Path(__file__).parent / "results"
KEPT = ("step0", "train", "scores", "timing", "memory", "warnings", "provenance")


def main(run: Path, name: str) -> None:
    """Scores, curve, costs and provenance; of the plan only its size, of the recipe no folder of this machine."""
    results = json.loads((run / "results.json").read_text())
    recipe = results["recipe"]
    recipe["data"]["data_dir"] = None
    plan = {key: results["plan"][key] for key in ("mode", "trainable_parameters")}
    plan["layers"] = len(results["plan"]["layers"])
    kept = {key: results[key] for key in KEPT}
    export = {key: value for key, value in results["export"].items() if key != "path"}
    head = {"name": name, "device": results["provenance"]["device"], "recipe": recipe, "model": results["model"]}
    artifact.write_json(RESULTS / f"{name}.json", head | {"plan": plan, "export": export} | kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
