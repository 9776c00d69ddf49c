"""corda chat: both models of a run, side by side, from a pipe."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from conftest import write_jsonl

from corda import chatting
from corda.chatting import _Spoken, open_pair, recipe_of, reply
from corda.evaluation.generation import generate
from corda.inputs import Inputs
from corda.reading import parse_recipe


@pytest.fixture
def trained(corda, raw_recipe, write_recipe, tmp_path):
    raw_recipe["training"] |= {"max_steps": 12, "learning_rate": 0.05}
    raw_recipe["evaluation"] = {}
    assert corda("run", write_recipe(raw_recipe))[0] == 0
    return tmp_path / "run"


def piped(monkeypatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_answers_come_from_base_and_tuned(corda, trained, raw_recipe, monkeypatch, data):
    piped(monkeypatch, "Add 2 and 5.\n\nWho?\n")
    code, out, _ = corda("chat", trained, "--json", "--max-new-tokens", 8)
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in lines] == ["Add 2 and 5.", "Who?"]
    pair = open_pair(parse_recipe(raw_recipe))
    prompts = [f"Question: {line['prompt']}\nAnswer:" for line in lines]
    for who, model in (("base", pair.tuned.get_base_model()), ("tuned", pair.tuned)):
        with pair.tuned.disable_adapter() if who == "base" else torch.no_grad():
            expected = generate(model, pair.tokenizer, prompts, ["\nQuestion:", "\n\n"], 8, 2)
        assert [line[who].rstrip() for line in lines] == [text.rstrip() for text in expected]
    assert any(line["base"] != line["tuned"] for line in lines)


def test_text_streams_and_needs_no_data(corda, trained, monkeypatch, data):
    (data / "learn.jsonl").unlink()
    (data / "keep.jsonl").unlink()
    piped(monkeypatch, "Who?\n")
    code, out, _ = corda("chat", trained, "--max-new-tokens", 4, "--form", "chat")
    assert code == 0
    assert out.startswith("prompt: Who?\nbase: ")
    assert "\ntuned: " in out
    pieces: list[str] = []
    pair = open_pair(recipe_of(trained), "raw")
    assert reply(pair, "tuned", [("user", "The colour of")], 12, pieces.append) == "".join(pieces)


def test_a_run_of_conversations_is_talked_to_in_the_form_it_was_trained_in(raw_recipe, tmp_path):
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes."}]
    learn = tmp_path / "talks.jsonl"
    write_jsonl(learn, [{"messages": turns}] * 4)
    inputs = Inputs(parse_recipe(raw_recipe))
    assert chatting._form(inputs, None) == "plain"
    raw_recipe["data"]["learn"] = str(learn)
    inputs = Inputs(parse_recipe(raw_recipe))
    assert chatting._form(inputs, None) == "chat"
    assert chatting._form(inputs, "raw") == "raw"
    learn.unlink()
    assert chatting._form(Inputs(parse_recipe(raw_recipe)), None) == "plain"  # it cannot be told any more


def test_pieces_are_whole_characters_and_end_before_a_stop(tokenizer):
    pieces: list[str] = []
    spoken = _Spoken(tokenizer, ["\n\n", "\nQuestion:"], pieces.append)
    spoken.put(torch.tensor([[5, 6, 7]]))  # the prompt
    for token in tokenizer("Déjà vu\nQuest\n\nmore", add_special_tokens=False)["input_ids"]:
        spoken.put(torch.tensor([token]))
    spoken.end()
    assert spoken.text == "".join(pieces) == "Déjà vu\nQuest"
    assert pieces[:4] == ["D", "é", "j", "à"]
    assert "\n" not in pieces


def test_a_residual_base_is_not_the_base(corda, raw_recipe, write_recipe, tmp_path):
    raw_recipe["adapter"] |= {"base": "residual"}
    raw_recipe["evaluation"] = {}
    assert corda("run", write_recipe(raw_recipe))[0] == 0
    pair = open_pair(parse_recipe(raw_recipe))
    assert pair.base is not None
    ids = torch.arange(3, 23)[None]
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(raw_recipe["model"]["model_name_or_path"]).eval()
    with torch.no_grad():
        assert torch.equal(pair.base(ids).logits, reference(ids).logits)


def test_what_is_missing_is_said(corda, raw_recipe, write_recipe, tmp_path, monkeypatch):
    piped(monkeypatch, "x\n")
    code, _, err = corda("chat", tmp_path / "gone")
    assert code == 2
    assert "no finished run" in err
    code, _, err = corda("chat", write_recipe(raw_recipe))
    assert code == 2
    assert "there is no train here" in err
