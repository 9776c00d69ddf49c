"""The recipe is strict, and says everything that is wrong at once."""

from __future__ import annotations

import pytest

from corda import training
from corda.advice import advice
from corda.errors import RecipeError
from corda.inputs import Inputs
from corda.reading import load_recipe, parse_recipe, read_mapping
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
    broken.write_text("")
    with pytest.raises(RecipeError, match=r"an empty file.*model:, data:"):
        load_recipe(broken)
    broken.write_text("adapter: {mode: kpm}\ndata: {}\nadapter: {rank: 4}\n")
    with pytest.raises(RecipeError, match=r"'adapter' is there twice[\s\S]*line 3"):
        load_recipe(broken)
    with pytest.raises(RecipeError, match=r"cannot be read.*name the recipe, a YAML file"):
        load_recipe(tmp_path)


def test_blocks_that_are_merged_in_may_be_set_again(raw_recipe, tmp_path):
    given = tmp_path / "recipe.yaml"
    given.write_text("a: &a {rank: 4, mode: ipm}\nadapter: {<<: *a, mode: kpm}\n")
    with pytest.raises(RecipeError, match="unknown key 'a'"):
        load_recipe(given)
    assert read_mapping(given, "recipe")["adapter"] == {"rank": 4, "mode": "kpm"}
    given.write_text("a: {b: &b {<<: &c {rank: 4, mode: ipm}, mode: kpm}}\nadapter: {<<: *b, rank: 2}\n")
    assert read_mapping(given, "recipe")["adapter"] == {"rank": 2, "mode": "kpm"}
    given.write_text("adapter: {rank: {{ rank }}}\n")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": {"packing": True}}, r"packing' is not offered"),
        ({"training": {"assistant_only_loss": True}}, r"is not offered: the loss is always that of answers"),
        ({"training": {"push_to_hub": True}}, r"is not offered.*export\.push_to_hub"),
        ({"training": {"eos_token": "</s>"}}, r"is not offered.*tokenizer's files"),
        ({"training": {"completion_only_loss": False}}, r"is not offered: give the records as `text`"),
        ({"training": {"max_seq_length": 8}}, r"set by data\.max_length"),
        ({"training": {"activation_checkpointing": True}}, r"set by training\.gradient_checkpointing"),
        ({"model": "tiny"}, r"model: has keys of its own \(model_name_or_path"),
        ({"data": {"test": "a"}}, r"'data\.test', did you mean 'evaluation\.tasks'"),
        ({"data": {"learn": {"path": "a"}}}, r"did you mean 'dataset'"),
    ],
)
def test_what_other_tools_call_it_is_sent_to_its_place(raw_recipe, change, message):
    for block, values in change.items():
        raw_recipe[block] = raw_recipe[block] | values if isinstance(values, dict) else values
    with pytest.raises(RecipeError, match=message):
        parse_recipe(raw_recipe)


def test_a_reporter_that_is_not_installed_is_named_before_anything_runs(raw_recipe, monkeypatch):
    monkeypatch.setattr(training, "get_available_reporting_integrations", lambda: ["tensorboard"])
    raw_recipe["training"]["report_to"] = "wandb"
    with pytest.raises(RecipeError, match=r"training\.report_to.*pip install wandb"):
        Inputs(parse_recipe(raw_recipe)).check()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"rank": 8}, "adapter.rank"),
        ({"data": {"columns": {}}}, "data.learn.columns"),
        ({"context": {"mode": 1}}, "mode"),
    ],
)
def test_a_key_in_the_wrong_block_is_sent_to_the_right_one(raw_recipe, change, key):
    for block, values in change.items():
        raw_recipe[block] = {**raw_recipe.get(block, {}), **values} if isinstance(values, dict) else values
    with pytest.raises(RecipeError, match=rf"did you mean '(\w+\.)*{key}'"):
        parse_recipe(raw_recipe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"adapter": {"mode": "contrast", "balance": "sigma", "rank": 4}},
            "balance sigma does nothing in mode contrast",
        ),
        ({"adapter": {"mode": "ipm", "orthonormal": True}}, "orthonormal true does nothing in mode ipm"),
        ({"adapter": {"rank_cap": 4}}, "rank_cap count under adapter.allocation dynamic"),
        ({"training": {"weight_decay": 0.1}}, "weight_decay 0.1 pulls B A to zero, and mode kpm starts with"),
        ({"evaluation": {"tasks": {}}}, "evaluation.tasks is empty: nothing is measured"),
        ({"data": {"keep": "learn.jsonl"}}, "are the same records"),
        (
            {"adapter": {"mode": "contrast", "rank": 4}, "training": None},
            "the default 0.0002 hardly moves a small model",
        ),
        ({"context": {"rounds": 5}}, "only the first is used: set context.selection"),
        ({"context": {"selection": "dynamic"}}, "has one round to choose from"),
    ],
)
def test_settings_that_do_nothing_or_harm_are_named(raw_recipe, change, message):
    assert advice(parse_recipe(raw_recipe)) == []
    for block, values in change.items():
        raw_recipe[block] = raw_recipe[block] | values if values is not None else {}
    (note,) = advice(parse_recipe(raw_recipe))
    assert message in note
    assert Inputs(parse_recipe(raw_recipe)).warnings() == [note]


@pytest.mark.parametrize(
    "change",
    [
        {"adapter": {"mode": "contrast", "mu": 0.5}, "training": {"weight_decay": 5.0}},
        {"adapter": {"allocation": "dynamic", "rank_cap": 6}},
        {"context": {"rounds": 3, "selection": "pooled"}},
        {"adapter": {"mode": "lora"}, "training": {"weight_decay": 5.0}},
    ],
)
def test_settings_that_count_are_not_named(raw_recipe, change):
    for block, values in change.items():
        raw_recipe[block] |= values
    assert advice(parse_recipe(raw_recipe)) == []


def test_a_tilde_is_the_home_folder(raw_recipe, pico, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(pico)
    raw_recipe["output_dir"] = "~/run"
    raw_recipe["data"]["data_dir"] = "~/data"
    raw_recipe["model"]["model_name_or_path"] = "~/model"
    raw_recipe["export"] = {"output": "~/adapter"}
    recipe = parse_recipe(raw_recipe)
    assert (recipe.output_dir, recipe.export_folder()) == (tmp_path / "run", tmp_path / "adapter")
    assert Inputs(recipe).check()["layers"] == 14


def test_text_that_is_searched_for_an_answer_is_not_cut_at_its_first_line(raw_recipe):
    sums = raw_recipe["evaluation"]["tasks"]["sums"]
    assert parse_recipe(raw_recipe).evaluation.tasks["sums"].stop == ["Question:"]
    assert parse_recipe(raw_recipe).evaluation.tasks["things"].stop == ["\n"]
    sums["stop"] = ["\n"]
    assert parse_recipe(raw_recipe).evaluation.tasks["sums"].stop == ["\n"]  # as asked
    (note,) = advice(parse_recipe(raw_recipe))
    assert "sums.answer_after is never reached in an answer of several lines" in note


def test_switches_that_are_off_need_no_validation_records(raw_recipe):
    raw_recipe["training"] |= {"load_best_model_at_end": False, "eval_strategy": "no", "eval_steps": None}
    assert parse_recipe(raw_recipe).data.validation is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_dir": "~nosuchuser/x"}, r"output_dir: ~nosuchuser/x"),
        ({"model": {"model_name_or_path": "m", "format": "x"}}, r"'data\.learn\.format' or .*'export\.format'"),
    ],
)
def test_odd_values_are_named_and_not_raised_raw(raw_recipe, change, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(raw_recipe | change)


def test_an_odd_strategy_of_evaluation_is_not_raised_raw(raw_recipe):
    with pytest.raises(RecipeError, match=r"data\.validation"):
        parse_recipe(raw_recipe | {"training": {"eval_strategy": ["steps"]}})
