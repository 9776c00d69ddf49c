"""`corda compare --smoke`: every method of a list on a random model of two blocks and generated data, in minutes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from corda import artifact
from corda.comparing.methods import METHODS
from corda.comparing.study import Study, parse_study
from corda.demo import word_problems, write

_SLOW = {"qlora", "kpm_4bit", "ipm_4bit"}  # need bitsandbytes


def smoke_study(folder: Path, methods: list[str] | None = None, seeds: int = 1) -> Study:
    """A tiny study of the named methods (default: all but those in 4 bits), with its model and data in `folder`.

    Its numbers say nothing: the model is random. It shows that everything runs.

    Args:
        folder: Where its model, data and runs go.
        methods: Their names.
        seeds: How many.
    """
    artifact.make_folder(folder)
    model, data = folder / "model", folder / "data"
    if not (model / "config.json").is_file():
        tiny_model(model)
    write(data)
    (folder / "texts").mkdir(exist_ok=True)
    lines = [
        json.dumps({"text": f"{problem['question']} {problem['answer']}\n"}) for problem in word_problems(24, 7, "test")
    ]
    (folder / "texts" / "held_out.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return parse_study(_raw(folder, methods or [name for name in METHODS if name not in _SLOW], seeds), "smoke study")


def tiny_model(folder: Path) -> None:
    """A Llama of two blocks with random weights and a byte tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=259,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=256,
            eos_token_id=257,
            pad_token_id=258,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    made: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    return made


def _raw(folder: Path, methods: list[str], seeds: int) -> dict[str, Any]:
    task = {"measures": "learn", "metrics": ["answer_loss"]}
    kept = {"measures": "keep", "metrics": ["answer_loss"]}
    facts = "data/keep_heldout.jsonl"
    return {
        "output_dir": str(folder / "study"),
        "learn": "problems/answer_loss",
        "development": "problems_dev/answer_loss",
        "keep": ["facts/answer_loss", "texts/perplexity"],
        "unseen": ["texts"],
        "methods": methods,
        "learning_rates": [0.0005, 0.004, 0.03],
        "seeds": list(range(seeds)),
        "devices": ["cpu"],
        "parameter_tolerance": 0.15,  # DoRA's magnitudes weigh more at so small a rank
        "base": {
            "model": {"model_name_or_path": str(folder / "model"), "device": "cpu"},
            "data": {
                "data_dir": str(folder),
                "learn": {"dataset": "data/learn_train.jsonl", "part": [0, 200]},  # five rounds of 32
                "keep": {"dataset": "data/keep_calibration.jsonl", "part": [0, 200]},
                "max_length": 160,
            },
            "context": {"samples": 32},
            "adapter": {"budget": 3712},  # rank 4 where A and B are trained
            "training": {"max_steps": 6, "per_device_train_batch_size": 4},
            "evaluation": {
                "tasks": {
                    "problems": task | {"dataset": {"dataset": "data/learn_test.jsonl", "part": [0, 16]}},
                    "problems_dev": task | {"dataset": {"dataset": "data/learn_test.jsonl", "part": [16, 24]}},
                    "facts": kept | {"dataset": {"dataset": facts, "part": [0, 24]}},
                    "texts": kept
                    | {
                        "metrics": ["perplexity"],
                        "dataset": {"dataset": "texts/held_out.jsonl", "format": "text"},
                    },
                }
            },
        },
    }
