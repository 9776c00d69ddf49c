"""Memory, disk, network and time of large models on 1, 8 and 64 H100, on paper, for docs/scaling.md.

python benchmarks/scaling.py [MODEL ...] writes results/scaling.json from `corda estimate`, which reads configs alone.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import RESULTS

from corda import artifact
from corda.estimate.estimate import Setting, estimates
from corda.estimate.machine import H100
from corda.reading import parse_recipe

LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "LLaMA-3-8B": LLAMA3
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "LLaMA-3-70B": LLAMA3
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "LLaMA-3-405B": LLAMA3
    | {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
    "Mixtral-8x22B": {
        "model_type": "mixtral",
        "vocab_size": 32768,
        "hidden_size": 6144,
        "intermediate_size": 16384,
        "num_hidden_layers": 56,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 65536,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
}
PROCESSES = (1, 8, 64)
PLACEMENTS = ("whole", "sharded", "off-loaded")  # of the weights, in order of preference
STEPS = 1000
LAYERS = {"Mixtral-8x22B": ["q_proj", "k_proj", "v_proj", "o_proj"]}  # of the others, all


def recipe(folder: Path, layers: str | list[str]) -> Any:
    """256 x 2,048 calibration tokens, rank 128, training with gradient checkpointing on rows of 2,048 tokens."""
    return parse_recipe(
        {
            "output_dir": str(folder / "run"),
            "model": {"model_name_or_path": str(folder)},
            "data": {"keep": "keep.jsonl", "learn": "learn.jsonl", "max_length": 2048},
            "context": {"samples": 256, "pack_to": 2048, "batch_size": 1},
            "adapter": {"mode": "kpm", "rank": 128, "target_modules": layers},
            "training": {
                "per_device_train_batch_size": 1,
                "gradient_checkpointing": True,
                "max_steps": STEPS,
                "drift_meter": False,
            },
        }
    )


def fits(found: dict[str, Any], *stages: str) -> bool:
    """Whether these stages fit the device."""
    return all(found["memory"][stage]["device"]["total"] <= H100.memory for stage in stages)


def rows_of(name: str, folder: Path) -> list[dict[str, Any]]:
    """One model on every number of devices, each with the first placement of its weights that fits."""
    settings = {
        (processes, placement): Setting(processes, placement == "sharded", placement == "off-loaded")
        for processes in PROCESSES
        for placement in PLACEMENTS
        if processes > 1 or placement != "sharded"
    }
    found = dict(
        zip(
            settings,
            estimates(recipe(folder, LAYERS.get(name, "all-linear")), "h100", list(settings.values())),
            strict=True,
        )
    )
    rows = []
    for processes in PROCESSES:
        own = {placement: found[p, placement] for p, placement in settings if p == processes}
        start = next((p for p in own if fits(own[p], "collect", "plan")), "off-loaded")
        training = next((p for p in own if p != "off-loaded" and fits(own[p], "train")), None)
        rows.append(
            row(
                name, processes, start, own[start], training, own[training or ("sharded" if processes > 1 else "whole")]
            )
        )
        print(name, processes, start, training, round(rows[-1]["device_bytes"] / 1e9, 1), flush=True)
    return rows


def row(
    name: str, processes: int, start: str, found: dict[str, Any], training: str | None, trained: dict[str, Any]
) -> dict[str, Any]:
    """The numbers of one line."""
    memory = found["memory"]
    return {
        "model": name,
        "processes": processes,
        "parameters": found["model_parameters"],
        "layers": found["layers"],
        "trainable_parameters": found["trainable_parameters"],
        "placement": start,
        "fits": fits(found, "collect", "plan"),
        "device_bytes": max(memory[s]["device"]["total"] for s in ("collect", "plan")),
        "above_weights_bytes": found["memory_above_weights"]["initialisation"],
        "host_hidden_bytes": memory["collect"]["host"]["hidden_states"],
        "disk_bytes": found["disk"]["total"],
        "covariance_bytes": found["disk"]["covariances"],
        "network_bytes": found["network"].get("collect", 0) + found["network"].get("plan", 0),
        "seconds": {stage: found["seconds"][stage] for stage in ("collect", "plan")},
        "train": {
            "placement": training,
            "bytes": trained["memory"]["train"]["device"]["total"],
            "seconds_per_step": trained["seconds"]["train"]["total"] / STEPS,
            "network_bytes_per_step": trained["network"].get("train_per_step", 0),
        },
        "calibration": found["calibration"],
        "assumptions": found["assumptions"],
    }


def main(wanted: list[str]) -> None:
    """Every model on every number of devices."""
    book = RESULTS / "scaling.json"
    rows = []
    for name in wanted or list(CONFIGS):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            (folder / "config.json").write_text(json.dumps(CONFIGS[name]), encoding="utf-8")
            rows += rows_of(name, folder)
    if wanted and book.is_file():
        rows = [r for r in artifact.read_json(book)["rows"] if r["model"] not in wanted] + rows
    where = artifact.provenance()
    artifact.write_json(
        book,
        {
            "name": "scaling",
            "device": "H100 80 GB, assumed; nothing here was measured on one",
            "profile": H100.as_json(),
            "recipe": "256 x 2,048 tokens, rank 128, KPM, 2,048 tokens per batch, training with gradient checkpointing",
            "rows": rows,
            "provenance": where,
        },
    )


if __name__ == "__main__":
    main(sys.argv[1:])
