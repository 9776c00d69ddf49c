"""The recipe is strict, and says everything that is wrong at once."""

from __future__ import annotations

import pytest

from corda.errors import RecipeError
from corda.reading import load_recipe, parse_recipe
from corda.recipe import Recipe


def test_defaults_are_filled_in_and_survive_json(raw_recipe):
    recipe = parse_recipe(raw_recipe)
    assert recipe.adapter.damp == 0.01
    assert recipe.adapter.balance == "equal"
    assert recipe.training.weight_decay == 0.0
    assert Recipe.model_validate(recipe.as_json()) == recipe


def test_every_problem_is_reported_at_once_with_suggestions(raw_recipe):
    raw_recipe["adapter"]["rnak"] = 3
    raw_recipe["adapter"]["mode"] = "kpn"
    raw_recipe["contxt"] = {}
    raw_recipe["context"]["samples"] = "many"
    raw_recipe["training"]["learning_rat"] = 1
    raw_recipe["evaluation"]["tasks"]["sums"]["metric"] = []
    del raw_recipe["model"]["model_name_or_path"]
    with pytest.raises(RecipeError) as caught:
        parse_recipe(raw_recipe)
    message = str(caught.value)
    assert message.startswith("7 problems")
    for part in (
        "'adapter.rnak', did you mean 'rank'",
        "adapter.mode: Input should be 'kpm', 'ipm', 'dual', 'contrast' or 'lora' (got 'kpn')",
        "'contxt', did you mean 'context'",
        "context.samples",
        "'training.learning_rat', did you mean 'learning_rate'",
        "'evaluation.tasks.sums.metric', did you mean 'metrics'",
        "missing key 'model.model_name_or_path'",
    ):
        assert part in message


def test_fields_of_trl_pass_through(raw_recipe):
    raw_recipe["training"]["adam_beta2"] = 0.95
    assert parse_recipe(raw_recipe).training.model_dump()["adam_beta2"] == 0.95


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter": {"balance": "sigma", "damp": 0}}, "needs damp > 0"),
        ({"adapter": {"exponent": 2}}, "one of 0, 0.5 and 1"),
        ({"data": {"keep": None}}, "data.keep, which is not set"),
        ({"data": {"learn": None}}, "data.learn"),
        ({"training": {"eval_steps": 5}}, "data.validation, which is not set"),
        ({"training": {"load_best_model_at_end": True}}, "data.validation, which is not set"),
        ({"adapter": {"mode": "lora"}, "export": {"format": "residual"}}, "needs initial factors, which mode lora"),
    ],
)
def test_combinations_that_make_no_sense(raw_recipe, change, message):
    for block, values in change.items():
        raw_recipe.setdefault(block, {}).update(values)
    with pytest.raises(RecipeError, match=message):
        parse_recipe(raw_recipe)


def test_overrides(raw_recipe, write_recipe):
    path = write_recipe(raw_recipe)
    recipe = load_recipe(path, ["adapter.rank=7", "training.learning_rate=5e-5", "data.learn.max_records=3", "seed=4"])
    assert recipe.adapter.rank == 7
    assert recipe.training.learning_rate == 5e-5
    assert recipe.data.learn.dataset == "learn.jsonl"
    assert recipe.data.learn.max_records == 3
    assert recipe.seed == 4
    with pytest.raises(RecipeError, match="not of the form key=value"):
        load_recipe(path, ["adapter.rank"])
    with pytest.raises(RecipeError, match="did you mean 'rank'"):
        load_recipe(path, ["adapter.rang=7"])


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1, 2")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(broken)
    broken.write_text("- a\n")
    with pytest.raises(RecipeError, match="not a mapping"):
        load_recipe(broken)
