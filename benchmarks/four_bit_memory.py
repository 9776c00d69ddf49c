"""Peak memory of building a 4-bit run from a checkpoint in full precision, counted as bytes of live tensors.

python benchmarks/four_bit_memory.py [--blocks N] [--adapted REGEX] writes four-bit-memory.json: a random Llama layout
of 1.1 billion parameters (hidden size 2048, 22 blocks) or of fewer blocks of that shape, stored in bf16 safetensors, is
collected on, planned with a refit, loaded in 4 bits and attached. The bar: the 4-bit model and two of its blocks in
fp32, the calibration set's hidden states apart. Tensors inside of one operation are not seen.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # operations of other threads are not counted

import torch
from harness import RESULTS
from live_tensors import LiveTensors
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from corda import artifact, pipeline
from corda.metering import Meter
from corda.reading import parse_recipe

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}


def checkpoint(folder: Path, shape: dict[str, int], blocks: int) -> None:
    """A random checkpoint, written one shard a block, and a byte tokenizer."""
    config = LlamaConfig(num_hidden_layers=blocks, dtype="bfloat16", architectures=["LlamaForCausalLM"], **shape)
    config.save_pretrained(folder)
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    shards: dict[str, list[str]] = {}
    for name, _ in empty.named_parameters():
        shards.setdefault(name.split(".")[2] if ".layers." in name else "outside", []).append(name)
    generator = torch.Generator().manual_seed(0)
    where = {}
    for shard, names in shards.items():
        file = f"model-{shard}.safetensors"
        tensors = {}
        for name in names:
            size = empty.get_parameter(name).shape
            value = torch.randn(size, generator=generator) * size[-1] ** -0.5 if len(size) > 1 else torch.ones(size)
            tensors[name] = value.to(torch.bfloat16)
            where[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    artifact.write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "</s>", *alphabet])}, []))
    bytes_.pre_tokenizer, bytes_.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytes_, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)


def measure(folder: Path, shape: dict[str, int], blocks: int, **adapter: Any) -> dict[str, Any]:
    """Build a run in `folder` and return the peaks of its stages in bytes, with what they are held against."""
    checkpoint(folder / "model", shape, blocks)
    records = [{"question": f"What is {i} times {i + 1}?", "answer": str(i * (i + 1))} for i in range(24)]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    recipe = parse_recipe(
        {
            "output_dir": str(folder / "run"),
            "model": {"model_name_or_path": str(folder / "model"), "device": "cpu", "load_in_4bit": True},
            "data": {"learn": str(folder / "data.jsonl")},
            "context": {"samples": 16},
            "adapter": {"mode": "ipm", "rank": 16, **adapter},
            "export": {"format": "none"},
        }
    )
    peaks, meter = {}, Meter()
    with pipeline.opened(recipe) as stages:
        steps = {"collect": stages.context, "plan": stages.plan, "attach": lambda: stages.bases.attached(stages.plan())}
        for name, step in steps.items():
            with meter.stage(name), LiveTensors() as alive:
                step()
            peaks[name] = alive.peak
        model = stages.bases.live
        assert model is not None
        held = {name: p.untyped_storage().nbytes() for name, p in model.named_parameters()}
        scales = sum(
            t.untyped_storage().nbytes()
            for module in model.modules()
            if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None
            for t in (state.absmax, state.code)
        )
        tokens = sum(stages.context().tokens.values()) // len(stages.context().tokens)
    adapters = sum(size for name, size in held.items() if ".lora_" in name)
    block = 4 * sum(
        t.numel()
        for name, t in LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **shape)).named_parameters()
        if ".layers.0." in name
    )
    four_bit = sum(held.values()) - adapters + scales
    hidden = 4 * tokens * shape["hidden_size"]
    return {
        "peaks": peaks,
        "resident": meter.peak_bytes,
        "seconds": meter.seconds,
        "four_bit_model": four_bit,
        "block_fp32": block,
        "adapter_factors": adapters,
        "hidden_states": hidden,
        "tokens": tokens,
        "allowed": four_bit + 2 * block + hidden,
        "share_of_allowed": max(peaks.values()) / (four_bit + 2 * block + hidden),
    }


def main(blocks: int, adapted: str) -> None:
    """Measure and write."""
    targets = rf"model\.layers\.({adapted})\..*"
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), SHAPE, blocks, correction="fit", correction_rounds=2, target_modules=targets)
    where = artifact.provenance()
    artifact.write_json(
        RESULTS / "four-bit-memory.json",
        {
            "name": "four-bit-memory",
            "device": where["device"],
            "shape": SHAPE | {"blocks": blocks},
            "adapted_blocks": adapted,
            **found,
            "provenance": where,
        },
    )
    print({key: value for key, value in found.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=22)
    parser.add_argument("--adapted", default="[0-9]+", help="regular expression of the adapted blocks")
    given = parser.parse_args()
    main(given.blocks, given.adapted)
