"""Pico models with non-square layers, a byte tokenizer and data that is not unit scale; all made here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from corda import cli

os.environ.setdefault("HF_HUB_OFFLINE", "1")

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="right"
    )
    fast.chat_template = CHAT
    return fast


def llama(seed: int = 0, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-block Llama with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("pico") / "model"
    llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def model(pico: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32).eval()


@pytest.fixture
def one_thread() -> Any:
    """torch with one thread, where bits are compared: how batches are run side by side depends on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tokenizer(pico: Path) -> Any:
    return AutoTokenizer.from_pretrained(pico)


@pytest.fixture
def texts() -> list[str]:
    return [f"The {w} of item {i} is {i * 7 % 13}, not {w[::-1]}." for i, w in enumerate(WORDS * 3)]


def encoded_texts(texts: list[str], tokenizer: Any) -> list[Any]:
    from corda.data.batches import encode
    from corda.data.formats import to_records

    return [encode(record, tokenizer) for record in to_records([{"text": text} for text in texts])]


FAMILIES_RUN = Path(__file__).parents[1] / "docs" / "families.json"


def note_family(family: str, facts: dict[str, str]) -> None:
    """With CORDA_RECORD_FAMILIES set, what was run is written down; a table of the docs is made of it."""
    if os.environ.get("CORDA_RECORD_FAMILIES"):
        known = json.loads(FAMILIES_RUN.read_text(encoding="utf-8")) if FAMILIES_RUN.is_file() else {}
        merged = known | {family: known.get(family, {}) | facts}
        text = json.dumps(dict(sorted(merged.items())), indent=1)
        FAMILIES_RUN.write_text(text + "\n", encoding="utf-8")


WORDS = ["colour", "weight", "price", "origin", "width", "maker", "age", "smell", "shape", "name"]


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    keep = [{"question": f"What is the {w} of {i}?", "answer": [f"{w[:3]}{i}", w]} for i, w in enumerate(WORDS * 3)]
    learn = [
        {"question": f"Add {i} and {i + 3}.", "answer": f"{i} + {i + 3} = {2 * i + 3}\n#### {2 * i + 3}"}
        for i in range(40)
    ]
    write_jsonl(folder / "keep.jsonl", keep[:20])
    write_jsonl(folder / "keep_test.jsonl", keep[20:])
    write_jsonl(folder / "learn.jsonl", learn[:30])
    write_jsonl(folder / "learn_test.jsonl", learn[30:])
    return folder


@pytest.fixture
def raw_recipe(pico: Path, data: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path / "run"),
        "model": {"model_name_or_path": str(pico), "device": "cpu"},
        "data": {"data_dir": str(data), "learn": "learn.jsonl", "keep": "keep.jsonl"},
        "context": {"samples": 16},
        "adapter": {"mode": "kpm", "rank": 4},
        "training": {"max_steps": 3, "learning_rate": 0.01, "per_device_train_batch_size": 4},
        "evaluation": {
            "batch_size": 4,
            "tasks": {
                "sums": {
                    "dataset": "learn_test.jsonl",
                    "measures": "learn",
                    "metrics": ["answer_loss", "exact_match"],
                    "answer_after": "####",
                    "max_new_tokens": 4,
                },
                "things": {"dataset": "keep_test.jsonl", "measures": "keep", "shots": 2},
            },
        },
    }


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    def write(raw: dict[str, Any]) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(raw), encoding="utf-8")
        return path

    return write


@pytest.fixture
def corda(monkeypatch, capsys):
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["corda", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as done:
            code = int(done.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call
