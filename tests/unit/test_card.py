"""The model card of every export: metadata as the Hub reads it, the facts, and three lines that load it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from peft import PeftModel
from transformers import AutoModelForCausalLM

import corda
from corda import pipeline
from corda.exporting.card import CardFacts, hub_card, hub_id, license_of, load_snippet
from corda.reading import parse_export, parse_recipe


def card_of(folder: Path) -> Any:
    text = (folder / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    card.data.to_yaml()
    return card


def run_snippet(text: str, folder: Path) -> Any:
    code = re.search(r"```python\n(.*?)```", text, re.S)[1].replace("path/to/this/folder", str(folder))
    assert len(code.strip().splitlines()) <= 3
    names: dict[str, Any] = {}
    exec(code, names)
    return names["model"].eval()


@pytest.mark.parametrize("form", ["lora", "merged", "residual"])
def test_a_runs_card_states_scores_and_loads(raw_recipe, pico, form):
    raw_recipe["export"] = {"format": form}
    (pico / "README.md").write_text("---\nlicense: mit\n---\n# pico\n")
    try:
        results = pipeline.run(parse_recipe(raw_recipe))
    finally:
        (pico / "README.md").unlink()
    folder = Path(results["export"]["path"])
    card = card_of(folder)
    data = card.data.to_dict()
    assert data["library_name"] == ("transformers" if form == "merged" else "peft")
    assert data["pipeline_tag"] == "text-generation"
    assert data["license"] == "mit"
    assert {"lora", "corda", "kpm"} <= set(data["tags"])
    assert "base_model" not in data  # a folder of this machine is no model of the Hub's
    assert set(data["metrics"]) == {"loss", "exact_match"}
    assert data["model-index"][0]["name"]
    _, found = model_index_to_eval_results(data["model-index"])
    values = {(one.dataset_name, one.metric_type): one.metric_value for one in found}
    scores = results["scores"]["after"]
    assert values == {
        ("sums", "loss"): scores["sums/answer_loss"]["value"],
        ("sums", "exact_match"): scores["sums/exact_match"]["value"],
        ("things", "loss"): scores["things/answer_loss"]["value"],
    }
    text = card.content
    assert f"{results['plan']['trainable_parameters']:,} in 14 layers" in text
    assert "3 steps of 4 records, learning rate 0.01" in text
    assert "learn.jsonl" in text
    assert str(pico.parent) not in re.sub(r"```python.*?```", "", text, flags=re.S)
    assert re.search(r"\| things \| keep \| loss, nats per token \| 10 \| [\d.]+ ± [\d.]+ \|", text)
    model = run_snippet(text, folder)
    assert isinstance(model, PeftModel) == (form != "merged")
    ids = torch.arange(5, 25)[None]
    base = AutoModelForCausalLM.from_pretrained(pico).eval()
    with torch.no_grad():
        apart = (model(ids).logits - base(ids).logits).abs().max() / base(ids).logits.abs().max()
    assert 1e-4 < apart < 1


def test_an_export_from_python_has_a_card_too(model, tokenizer, tmp_path):
    context = corda.collect(model, tokenizer, ["Some text of a few words."] * 8)
    adapted = corda.attach(model, corda.make_plan(model, context, mode="kpm", rank=3))
    corda.export(adapted, tmp_path / "adapter")
    card = card_of(tmp_path / "adapter")
    assert card.data.to_dict()["library_name"] == "peft"
    assert "Rank while training: 3" in card.content
    run_snippet(card.content, tmp_path / "adapter")


def test_hub_names_reach_the_metadata_and_files_do_not():
    task = "image-text-to-text"
    known = CardFacts("LoRA", "HuggingFaceTB/SmolLM2-135M", datasets=("openai/gsm8k", "mine.jsonl"), task=task)
    options = parse_export({"push_to_hub": "me/adapter"})
    data = ModelCard(hub_card(known, options)).data.to_dict()
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert data["base_model_relation"] == "adapter"
    assert data["datasets"] == ["openai/gsm8k"]
    assert data["pipeline_tag"] == "image-text-to-text"
    assert "license" not in data
    assert "Licence: not stated" in hub_card(known, options)
    stated = ModelCard(hub_card(known, parse_export({"license": "cc-by-4.0"}))).data.to_dict()
    assert stated["license"] == "cc-by-4.0"
    assert '"me/adapter")' in load_snippet(known, options)
    assert "AutoModelForImageTextToText" in load_snippet(known, options)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b", True),
        ("package:x", False),
        ("data.jsonl", False),
        ("x/data.jsonl", False),
        ("/a/b", False),
        ("a/b/c", False),
    ],
)
def test_hub_ids(name, expected):
    assert hub_id(name) == expected


def test_a_licence_is_only_what_a_card_states(tmp_path):
    assert license_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("# no front matter\n")
    assert license_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert license_of(str(tmp_path)) == "apache-2.0"
