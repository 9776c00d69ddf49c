"""The demo over several seeds: what LoRA, CorDA-KPM and contrast learn and forget.

python benchmarks/demo_seeds.py [--methods ...] [--folder FOLDER] writes benchmarks/results/demo-seeds.json. Runs of
methods that are left out stay in the file as they are.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

from harness import RESULTS

from corda import artifact
from corda.demo.run import METHODS, demonstrate

SEEDS = (0, 1, 2)


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard error over seeds."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": statistics.mean(values), "stderr": error, "n": len(values)}


def facts(method: str, seed: int, result: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run."""
    return {
        "method": method,
        "seed": seed,
        "learning_rate": result["recipe"]["training"]["learning_rate"],
        "steps": result["train"]["steps"],
        "trainable_parameters": result["plan"]["trainable_parameters"],
        "scores": result["scores"],
        "timing": result["timing"],
        "memory": result["memory"],
        "provenance": artifact.provenance(),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Per score: base, each method's value and change, and differences from LoRA by seed."""
    found: dict[str, Any] = {}
    by_method = {m: sorted((r for r in runs if r["method"] == m), key=lambda r: r["seed"]) for m in METHODS}
    for key in runs[0]["scores"]["before"]:
        before = {m: [r["scores"]["before"][key]["value"] for r in some] for m, some in by_method.items()}
        after = {m: [r["scores"]["after"][key]["value"] for r in some] for m, some in by_method.items()}
        entry: dict[str, Any] = {"base": spread(before["lora"])}
        for m in METHODS:
            if len(after[m]) == len(SEEDS):
                change = spread([a - b for a, b in zip(after[m], before[m], strict=True)])
                entry[m] = spread(after[m]) | {"change": change}
                if m != "lora":
                    entry[f"{m}_minus_lora"] = spread([a - b for a, b in zip(after[m], after["lora"], strict=True)])
        found[key] = entry
    return found


def main(folder: Path, methods: list[str]) -> None:
    """Run every seed and summarise."""
    place = RESULTS / "demo-seeds.json"
    known = artifact.read_json(place) if place.is_file() else {"runs": []}
    where = known.get("provenance")
    runs = [r for r in known["runs"] if r["method"] not in methods]
    runs = [r if "provenance" in r else r | {"provenance": where} for r in runs]
    for seed in SEEDS:
        results, _ = demonstrate(folder / f"seed-{seed}", seed, methods=methods)
        runs += [facts(method, seed, result) for method, result in zip(methods, results, strict=True)]
        print(seed, [{key: score["value"] for key, score in r["scores"]["after"].items()} for r in results], flush=True)
    artifact.write_json(
        place,
        {
            "name": "demo-seeds",
            "model": "SmolLM2-135M-Instruct, weights de-quantised from a Q4_1 GGUF file",
            "device": artifact.provenance()["device"],
            "runs": runs,
            "summary": summary(runs),
            "provenance": artifact.provenance(),
        },
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--folder", type=Path, default=Path("runs/demo-seeds"))
    given = parser.parse_args()
    main(given.folder, given.methods)
