"""The demo over several seeds: what LoRA and CorDA-KPM learn and forget at comparable task loss.

python benchmarks/demo_seeds.py [FOLDER] writes benchmarks/results/demo-seeds.json.
"""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path

from corda import artifact
from corda.demo.run import METHODS, demonstrate

SEEDS = (0, 1, 2)
RESULTS = Path(__file__).parent / "results"


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard error over seeds."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": statistics.mean(values), "stderr": error, "n": len(values)}


def main(folder: Path) -> None:
    """Run every seed and summarise."""
    runs = []
    for seed in SEEDS:
        results, _ = demonstrate(folder / f"seed-{seed}", seed)
        for method, result in zip(METHODS, results, strict=True):
            runs.append(
                {
                    "method": method,
                    "seed": seed,
                    "learning_rate": result["recipe"]["training"]["learning_rate"],
                    "steps": result["train"]["steps"],
                    "trainable_parameters": result["plan"]["trainable_parameters"],
                    "scores": result["scores"],
                    "timing": result["timing"],
                    "memory": result["memory"],
                }
            )
    summary = {}
    for key in runs[0]["scores"]["before"]:
        rise = {
            m: [
                r["scores"]["after"][key]["value"] - r["scores"]["before"][key]["value"]
                for r in runs
                if r["method"] == m
            ]
            for m in METHODS
        }
        value = {m: [r["scores"]["after"][key]["value"] for r in runs if r["method"] == m] for m in METHODS}
        summary[key] = {
            "base": spread([r["scores"]["before"][key]["value"] for r in runs if r["method"] == METHODS[0]]),
            **{m: spread(value[m]) | {"change": spread(rise[m])} for m in METHODS},
            "kpm_minus_lora": spread([a - b for a, b in zip(value["kpm"], value["lora"], strict=True)]),
        }
    RESULTS.mkdir(exist_ok=True)
    artifact.write_json(
        RESULTS / "demo-seeds.json",
        {
            "name": "demo-seeds",
            "model": "SmolLM2-135M-Instruct, weights de-quantised from a Q4_1 GGUF file",
            "device": artifact.provenance()["device"],
            "runs": runs,
            "summary": summary,
            "provenance": artifact.provenance(),
        },
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo-seeds"))
