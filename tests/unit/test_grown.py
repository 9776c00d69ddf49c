"""What the grown model is made of: its world, its skills, its documents; small."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PICO = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture
def grown(monkeypatch):
    """The two modules, and nothing left of them afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import grown_data
    import grown_model

    yield grown_data, grown_model
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_a_world_is_the_same_for_a_seed_and_its_subjects_are_apart(grown):
    data, _ = grown
    one, same, other = data.world(3), data.world(3), data.world(4)
    assert one == same
    assert one != other
    subjects = [subject for family in one.families.values() for subject in family.facts]
    assert len(subjects) == len(set(subjects)) == 200 + 80 + 80
    for family in one.families.values():
        for values in family.facts.values():
            assert all(value in r.values for value, r in zip(values, family.relations, strict=True))


def test_what_is_measured_is_never_calibrated_on_nor_learnt(grown):
    data, model = grown
    files = model.files_of(data.world(0))
    asked = {name: {row["question"] for row in rows} for name, rows in files.items() if "question" in rows[0]}
    assert len(asked["people/calibration"]) == 140 * 4
    assert len(asked["people/heldout"]) == 60 * 4
    assert not asked["people/calibration"] & asked["people/heldout"]
    assert not asked["problems/train"] & asked["problems/test"]
    assert not asked["programs/train"] & asked["programs/test"]


def test_neither_skill_is_in_what_the_model_grows_on(grown):
    data, model = grown
    shown = model.documents(data.world(0), random.Random(0))
    texts = [one if isinstance(one, str) else one["question"] + one["answer"] for one in shown]
    assert sum("Run " in text or "####" in text for text in texts) == 0
    world = data.world(0)
    facts = {row["question"] for family in world.families.values() for row in family.rows()}
    assert facts <= {one["question"] for one in shown if isinstance(one, dict)}


def test_traces_are_what_the_commands_do(grown):
    data, _ = grown
    for row in data.programs(200, 1, "train"):
        commands, _, letters = row["question"].removeprefix("Run ").rstrip(".").partition(" on ")
        word = letters.split()
        steps = row["answer"].split("; ")
        assert [step.split(": ")[0] for step in steps] == commands.split(", ")
        for step in steps:
            name, after = step.split(": ")
            before, word = word, after.split()
            if name in {"turn", "swap"}:
                assert sorted(before) == sorted(word)
            else:
                assert len(word) == len(before) + (1 if name == "twin" else -1)


def test_windows_hold_whole_documents_and_teach_answers_alone(grown):
    data, model = grown
    shown = model.documents(data.world(0, people=12, towns=3, minerals=3, measured=4), random.Random(0))
    texts = [one if isinstance(one, str) else f"Question: {one['question']}\nAnswer: {one['answer']}" for one in shown]
    tokenizer = model.make_tokenizer(texts, 400)
    tokens = model.encoded(shown, tokenizer, 64)
    ids, labels = model.windows(tokens, 64, tokenizer.pad_token_id)
    assert ids.shape == labels.shape
    assert ids.shape[1] == 64
    taught = labels[labels >= 0]
    assert torch.equal(taught, ids[labels >= 0])
    assert len(taught) == sum(sum(one.response) for one in tokens)
    answer = next(one["answer"] for one in shown if isinstance(one, dict))
    assert f" {answer}</s>" in tokenizer.decode(taught)


def test_a_pico_model_grows_and_knows_more_than_before(grown):
    data, model = grown
    world = data.world(0, people=4, towns=2, minerals=2, measured=1)
    rows = [row for family in world.families.values() for row in family.rows()]
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]
    tokenizer = model.make_tokenizer(texts, 320)
    files = {"facts": rows, "texts": [{"text": data.story(random.Random(1))}]}
    losses = []
    for passes in (1, 60):
        grown_one, tokens = model.grow(world, tokenizer, passes, shape=PICO)
        assert tokens > 0
        losses.append(model.known(grown_one, tokenizer, files)["facts"]["value"])
    assert losses[1] < losses[0] - 0.5
