"""A drafted recipe fits model and data, explains itself, and passes --dry-run as it stands."""

from __future__ import annotations

import json
import os
import re

import pytest
import yaml

from corda.drafting import draft, held_out
from corda.reading import load_recipe, parse_recipe
from corda.recipe import Recipe
from tests.conftest import write_jsonl


def test_it_passes_the_dry_run_and_says_why(corda, pico, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = corda("init-recipe", pico, "--learn", data / "learn.jsonl", "--keep", data / "keep.jsonl")
    assert code == 0
    assert "Next:    corda run recipe.yaml --dry-run" in out
    code, out, _ = corda("run", "recipe.yaml", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["tasks"] == {"data": 10, "data_keep": 10}
    text, recipe = (tmp_path / "recipe.yaml").read_text(), load_recipe(tmp_path / "recipe.yaml")
    assert text.startswith("# corda run recipe.yaml\n")
    assert max(map(len, text.splitlines())) < 400
    whole = re.sub(r"\n\s*#  +", " ", text)  # comments that were wrapped
    for section in ("context", "adapter", "training"):
        block = Recipe.model_fields[section].annotation
        for key in yaml.safe_load(text)[section]:
            assert f"  {key}: " in text
            if description := block.model_fields[key].description:
                assert description in whole, key
    assert recipe.adapter.mode == "contrast"
    assert recipe.training.learning_rate == pytest.approx(1e-3)
    assert recipe.adapter.rank == 4  # a quarter of the narrowest layer's 24 is 6
    assert recipe.data.template == "chat"
    assert recipe.data.max_length == 64
    assert recipe.context.samples == 20  # all there are: 80 inputs would like 640 tokens
    assert recipe.evaluation.tasks["data"].answer_after == "####"
    assert recipe.evaluation.tasks["data_keep"].measures == "keep"
    assert corda("init-recipe", pico, "--learn", data / "learn.jsonl")[0] == 2  # is there already


def test_overrides_win_and_without_held_out_files_it_says_how(corda, pico, data, tmp_path):
    learn = write_jsonl(tmp_path / "mine.jsonl", [{"text": f"Running text number {i}, " * 60} for i in range(9)])
    target = tmp_path / "r.yaml"
    code, out, _ = corda(
        "init-recipe",
        pico,
        "--learn",
        learn,
        "-o",
        target,
        "--set",
        "adapter.rank=2",
        "--set",
        "data.template=plain",
        "--json",
    )
    assert code == 0
    facts = json.loads(out)["facts"]
    assert facts["data"]["learn"]["kind"] == "running text"
    recipe = load_recipe(target)
    assert (recipe.adapter.mode, recipe.adapter.rank, recipe.data.template) == ("ipm", 2, "plain")
    assert recipe.data.max_length == 512  # the model's positions; the records are longer
    assert "longer ones are cut" in target.read_text()
    assert "--learn-test FILE" in target.read_text()
    commented_out = "\n".join(
        line[2:]
        for line in target.read_text().splitlines()
        if line.startswith("# evaluation") or line.startswith("#   ")
    )
    filled = yaml.safe_load(target.read_text()) | yaml.safe_load(commented_out)
    parse_recipe(filled)


def test_no_chat_template_small_layers_and_what_is_wrong_is_said(corda, pico, data, tmp_path):
    import shutil

    plain = shutil.copytree(pico, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    done = draft(str(plain), str(data / "learn.jsonl"), str(data / "keep.jsonl"))
    assert "template: plain" in done.text
    assert yaml.safe_load(done.text)["evaluation"]["tasks"]["data_keep"]["shots"] == 3
    for arguments, message in (
        ([pico, "--learn", "gone.jsonl"], "does not exist"),
        ([tmp_path / "nowhere", "--learn", data / "learn.jsonl"], "model folder does not exist"),
        ([pico, "--learn", data / "learn.jsonl", "--mode", "kpm"], "data.keep, which is not set"),
        ([pico, "--learn", data / "learn.jsonl", "--set", "adapter.rnk=3"], "did you mean 'rank'"),
    ):
        code, _, err = corda("init-recipe", *arguments, "-o", tmp_path / "never.yaml")
        assert code == 2
        assert message in err
        assert not (tmp_path / "never.yaml").exists()


@pytest.mark.parametrize(
    ("train", "test"), [("train.jsonl", "validation.jsonl"), ("a_train.jsonl", "a_dev.jsonl"), ("x.csv", "x_test.csv")]
)
def test_held_out_files_are_found_by_name(tmp_path, train, test):
    (tmp_path / train).write_text("")
    assert held_out(train, tmp_path) is None
    (tmp_path / test).write_text("")
    assert held_out(train, tmp_path) == test
    assert held_out(str(tmp_path / train), None) == os.fspath(tmp_path / test)
    assert held_out("some/hub-id", tmp_path) is None


@pytest.mark.parametrize(
    ("mode", "given", "balance", "rate"),
    [
        ("kpm", [], "sigma", 1e-4),
        ("kpm", ["--set", "adapter.balance=equal"], "equal", 2e-4),
        ("ipm", [], "equal", 2e-4),
        ("ipm", ["--set", "adapter.balance=sigma"], "sigma", 1e-4),
    ],
)
def test_the_rate_goes_with_the_balance(corda, pico, data, tmp_path, mode, given, balance, rate):
    target = tmp_path / "r.yaml"
    files = ("--learn", data / "learn.jsonl", "--keep", data / "keep.jsonl")
    assert corda("init-recipe", pico, *files, "--mode", mode, "-o", target, *given)[0] == 0
    recipe = load_recipe(target)
    assert (recipe.adapter.balance, recipe.training.learning_rate) == (balance, pytest.approx(rate))


@pytest.mark.parametrize(("records", "said"), [(30, None), (8000, "of 4 to 12, 8 to 24 here")])
def test_a_draft_of_contrast_says_what_decay_would_be(corda, pico, data, tmp_path, records, said):
    learn = write_jsonl(
        tmp_path / "more.jsonl", [{"question": f"Add {i} and 1.", "answer": f"{i + 1}"} for i in range(records)]
    )
    files = ("--learn", learn, "--keep", data / "keep.jsonl", "--mode", "contrast")
    target = tmp_path / "r.yaml"
    assert corda("init-recipe", pico, *files, "-o", target)[0] == 0
    text = re.sub(r"\n\s*#  +", " ", target.read_text())
    assert load_recipe(target).training.weight_decay == 0
    assert "where forgetting matters try more" in text
    assert (said in text) if said else "of 4 to 12)" in text  # in 500 steps of 16 records


def test_a_draft_without_damping_keeps_the_balance_that_needs_none(corda, pico, data, tmp_path):
    files = ("--learn", data / "learn.jsonl", "--keep", data / "keep.jsonl", "--mode", "kpm")
    assert corda("init-recipe", pico, *files, "-o", tmp_path / "r.yaml", "--set", "adapter.damp=0")[0] == 0
    assert load_recipe(tmp_path / "r.yaml").adapter.balance == "equal"
