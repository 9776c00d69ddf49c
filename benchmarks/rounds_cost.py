"""Five candidate covariances against one, from the same number of tokens: time and peak memory of collect and plan.

python benchmarks/rounds_cost.py [--repetitions N] writes rounds-cost.json: random blocks of SmolLM2-135M's shape, each
side in a process of its own, in turn. Times are CPU seconds, so that a busy machine does not matter much. N = 1 is
CorDA as it is (selection first, uniform ranks); N = 5 selects a covariance per layer and allocates ranks. Calibration
sizes: those of 5 x 256 short questions, and four times as much.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from harness import RESULTS, child, summary
from transformers import LlamaConfig, LlamaForCausalLM

from corda import artifact
from corda.context.collect import collect_encoded
from corda.data.batches import Encoded
from corda.journal import Journal
from corda.metering import Meter
from corda.plan.make import make_plan
from corda.targets import find_targets

BLOCKS, LENGTH, RANK = 4, 256, 32
TOKENS = (20480, 81920)  # 5 x 16 and 5 x 64 windows of 256


def one(rounds: int, tokens: int) -> None:
    """Collect and plan once; prints seconds of both and bytes above the loaded model."""
    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2048, num_hidden_layers=BLOCKS, **shape)).eval()
    ids = torch.multinomial(1 / torch.arange(1, 2049.0), tokens, replacement=True).tolist()  # some tokens are frequent
    rows = [Encoded(tuple(ids[i : i + LENGTH]), (True,) * LENGTH) for i in range(0, tokens, LENGTH)]
    share = len(rows) // rounds
    parts = [rows[r * share : (r + 1) * share] for r in range(rounds)]
    several = {"selection": "dynamic", "allocation": "dynamic", "compactness_scale": "unit"} if rounds > 1 else {}
    with torch.no_grad():
        model(input_ids=torch.tensor([rows[0].ids]))
    base, meter = psutil.Process().memory_info().rss, Meter()
    with tempfile.TemporaryDirectory() as folder:
        start, wall = time.process_time(), time.perf_counter()
        with meter.stage("collect"):
            book = Journal(Path(folder) / "context", "benchmark")
            context = collect_encoded(model, parts, find_targets(model), pad_token_id=0, batch_size=4, journal=book)
        with meter.stage("plan"):
            make_plan(
                model, context, mode="kpm", rank=RANK, journal=Journal(Path(folder) / "plan", "benchmark"), **several
            )
        seconds, wall = time.process_time() - start, time.perf_counter() - wall
    extra = {stage: peak - base for stage, peak in meter.peak_bytes.items()}
    print(
        json.dumps(
            {
                "seconds": seconds,
                "wall": wall,
                "stages_wall": meter.seconds,
                "extra_bytes": extra,
                "peak": meter.peak_bytes,
            }
        )
    )


def main(repetitions: int) -> None:
    """Both sides at each size, in turn."""
    table: dict[str, Any] = {}
    for tokens in TOKENS:
        runs: dict[int, list[dict[str, Any]]] = {1: [], 5: []}
        for _ in range(repetitions):
            for rounds, found in runs.items():
                found.append(child(__file__, str(rounds), str(tokens)))
        seconds = {rounds: statistics.median(run["seconds"] for run in found) for rounds, found in runs.items()}
        peaks = {rounds: max(max(run["peak"].values()) for run in found) for rounds, found in runs.items()}
        extras = {rounds: max(max(run["extra_bytes"].values()) for run in found) for rounds, found in runs.items()}
        table[str(tokens)] = {
            "seconds_ratio": seconds[5] / seconds[1],
            "peak_memory_ratio": peaks[5] / peaks[1],
            "memory_above_the_model_ratio": extras[5] / extras[1],
            "one": summary([run["seconds"] for run in runs[1]], "s") | {"runs": runs[1]},
            "five": summary([run["seconds"] for run in runs[5]], "s") | {"runs": runs[5]},
        }
        print(tokens, {k: v for k, v in table[str(tokens)].items() if k.endswith("ratio")}, seconds, flush=True)
    where = artifact.provenance()
    artifact.write_json(
        RESULTS / "rounds-cost.json",
        {
            "name": "rounds-cost",
            "device": where["device"],
            "model": f"random Llama layout, hidden size 576, intermediate 1536, {BLOCKS} blocks",
            "rank": RANK,
            "seconds_are": "CPU time of the process",
            "by_tokens_in_all": table,
            "provenance": where,
        },
    )


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].isdigit():
        one(int(sys.argv[1]), int(sys.argv[2]))
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("--repetitions", type=int, default=2)
        main(parser.parse_args().repetitions)
