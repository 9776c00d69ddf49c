"""CorDA, + selection, + allocation, and both, on SmolLM2: task loss and retained knowledge at equal parameters.

python benchmarks/ablation.py DATA_DIR [--seeds N] [--steps N] [--output DIR] writes results/ablation-smollm2.json from
the four shipped recipes. The runs of one seed share their collected covariances; what is there already is not run
again.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from harness import RESULTS

from corda import artifact, pipeline
from corda.reading import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
VARIANTS = ("corda", "selection", "allocation", "both")


def one(variant: str, seed: int, data_dir: str, output: Path, more: list[str]) -> dict[str, Any]:
    """Run one recipe; everything of a seed goes through one folder, whose covariances stay."""
    kept = output / f"{variant}-{seed}.json"
    if kept.is_file():
        return dict(artifact.read_json(kept))
    settings = [f"seed={seed}", f"output_dir={output / f'seed-{seed}'}", f"data.data_dir={data_dir}", *more]
    results = pipeline.run(load_recipe(RECIPES / f"smollm2-ablation-{variant}-kpm.yaml", settings))
    plan = results["plan"]
    ranks = [layer["rank"] for layer in plan["layers"]]
    chosen = [layer["chosen"] for layer in plan["layers"]]
    run = {
        "method": variant,
        "seed": seed,
        "trainable_parameters": plan["trainable_parameters"],
        "ranks": {"min": min(ranks), "median": statistics.median(ranks), "max": max(ranks)},
        "rounds_chosen": {str(r): chosen.count(r) for r in sorted({c for c in chosen if c is not None})},
        "steps": results["train"]["steps"],
        "scores": results["scores"],
        "seconds": results["timing"],
        "recipe": results["recipe"],
        "note": results["model"]["note"],
    }
    artifact.write_json(kept, run)
    return run


def main(
    data_dir: str, seeds: int, blocks: str, steps: int, samples: int, records: tuple[int, int], output: Path
) -> None:
    """Every variant with every seed."""
    more = [
        rf"adapter.target_modules='model\.layers\.({blocks})\..*'",
        f"training.max_steps={steps}",
        "training.per_device_train_batch_size=2",
        "training.learning_rate=0.002",
        "evaluation.tasks.nq_open.shots=0",
        f"context.samples={samples}",
        "evaluation.tasks.gsm8k.metrics=[answer_loss]",
        "evaluation.tasks.nq_open.metrics=[answer_loss]",
        f"evaluation.tasks.gsm8k.dataset.max_records={records[0]}",
        f"evaluation.tasks.nq_open.dataset.max_records={records[1]}",
        "export.format=none",
    ]
    output.mkdir(parents=True, exist_ok=True)
    runs = [one(variant, seed, data_dir, output, more) for seed in range(seeds) for variant in VARIANTS]
    table = {}
    for variant in VARIANTS:
        own = [run for run in runs if run["method"] == variant]
        entry: dict[str, Any] = {"trainable_parameters": [run["trainable_parameters"] for run in own]}
        for task in ("gsm8k/answer_loss", "nq_open/answer_loss"):
            change = [run["scores"]["change"][task]["value"] for run in own]
            entry[task] = {
                "before": statistics.mean(run["scores"]["before"][task]["value"] for run in own),
                "after": statistics.mean(run["scores"]["after"][task]["value"] for run in own),
                "change": statistics.mean(change),
                "change_stderr_over_seeds": statistics.stdev(change) / len(change) ** 0.5 if len(change) > 1 else None,
            }
        table[variant] = entry
        print(variant, {k: v for k, v in entry.items() if k != "trainable_parameters"}, flush=True)
    for run in runs:  # where things lay is nobody's business
        run["recipe"].pop("output_dir", None)
        run["recipe"]["data"].pop("data_dir", None)
    budgets = [n for entry in table.values() for n in entry["trainable_parameters"]]
    where = artifact.provenance()
    artifact.write_json(
        RESULTS / "ablation-smollm2.json",
        {
            "name": "ablation-smollm2",
            "device": where["device"],
            "settings_beyond_the_recipes": more,
            "parameters_max_over_min": max(budgets) / min(budgets),
            "table": table,
            "runs": runs,
            "provenance": where,
        },
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_dir")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--blocks", default="[0-9]+", help="regular expression of the blocks adapted")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--samples", type=int, default=128, help="calibration records per round")
    parser.add_argument("--records", type=int, nargs=2, default=(96, 300), help="held-out records of GSM8K and NQ-open")
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    given = parser.parse_args()
    main(given.data_dir, given.seeds, given.blocks, given.steps, given.samples, tuple(given.records), given.output)
