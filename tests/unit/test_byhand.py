"""A plan edited by hand: exported, changed, validated, used; every refusal by its message."""

from __future__ import annotations

import pytest
import torch
import yaml

from corda import linalg
from corda.context.collect import collect
from corda.errors import PlanError, RecipeError
from corda.inputs import Inputs
from corda.metric import Metric, damping
from corda.plan.byhand import ranks_file
from corda.plan.make import make_plan
from corda.reading import load_recipe, parse_recipe
from corda.recipe import AdapterOptions, Recipe
from corda.targets import weight_of

UP, DOWN, K = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj"
DYNAMIC = {"rank": 4, "allocation": "dynamic", "compactness_scale": "unit"}


@pytest.fixture
def rounds(model, tokenizer, texts):
    return collect(model, tokenizer, texts, samples=10, rounds=3)


def by_name(plan):
    return {layer.name: layer for layer in plan.layers}


def test_what_is_exported_is_used_as_it_is(model, rounds, tmp_path):
    plan = make_plan(model, rounds, selection="dynamic", **DYNAMIC)
    file = tmp_path / "ranks.yaml"
    file.write_text(ranks_file(plan, rounds.rounds))
    assert f"{plan.trainable_parameters:,} trainable parameters" in file.read_text()
    assert set(yaml.safe_load(file.read_text())) == {layer.name for layer in plan.layers}
    for selection, others in (("dynamic", DYNAMIC), ("first", {"rank": 3})):
        again = make_plan(model, rounds, selection=selection, ranks=str(file), **others)
        for name, layer in by_name(plan).items():
            assert (by_name(again)[name].rank, by_name(again)[name].chosen) == (layer.rank, layer.chosen)
    same = make_plan(model, rounds, selection="dynamic", ranks=str(file), **DYNAMIC)
    assert not any(layer.edited for layer in same.layers)
    assert same.warnings == plan.warnings
    for name, (A, B) in plan.factors.items():
        assert torch.equal(A, same.factors[name][0])
        assert torch.equal(B, same.factors[name][1])


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_an_edit_is_factorised_with_its_rank_and_round(model, rounds, mode):
    free = make_plan(model, rounds, mode=mode, selection="dynamic", **DYNAMIC)
    other = (by_name(free)[UP].chosen + 1) % 3
    ranks = {UP: {"rank": 11, "round": other}, DOWN: {"round": "all"}, K: by_name(free)[K].rank + 2}
    plan = make_plan(model, rounds, mode=mode, selection="dynamic", ranks=ranks, **DYNAMIC)
    done = by_name(plan)
    assert (done[UP].rank, done[UP].chosen) == (11, other)
    assert done[UP].tokens == rounds.token_count(UP, other)
    assert done[UP].scores == by_name(free)[UP].scores
    assert done[UP].log_pi != by_name(free)[UP].log_pi
    assert done[DOWN].chosen is None
    assert {name for name, layer in done.items() if layer.edited} == {UP, DOWN, K}
    end = "smallest" if mode == "kpm" else "largest"
    for name, round_ in ((UP, other), (DOWN, None)):
        spec = next(s for s in rounds.layers if s.name == name)
        C = rounds.covariance(name, round_)
        found = linalg.subspace(weight_of(model, spec), Metric(C, 1.0, damping(C, 0.01)), done[name].rank, end)
        A, B, _ = linalg.factors(weight_of(model, spec), found, scaling=1.0, balance="equal")
        assert torch.equal(A, plan.factors[name][0])
        assert torch.equal(B, plan.factors[name][1])


def test_layers_not_named_keep_what_they_had_and_the_total_is_said(model, rounds):
    free = make_plan(model, rounds, **DYNAMIC)
    plan = make_plan(model, rounds, ranks={UP: 20}, **DYNAMIC)
    for name, layer in by_name(free).items():
        assert by_name(plan)[name].rank == (20 if name == UP else layer.rank)
    before, after = free.trainable_parameters, plan.trainable_parameters
    assert after == before + 128 * (20 - by_name(free)[UP].rank)
    said = f"adapter.ranks changed 1 of 14 layers: {after:,} trainable parameters, {before:,} without it"
    assert said in plan.warnings
    rounds_alone = {name: {"round": (layer.chosen + 1) % 3} for name, layer in list(by_name(free).items())[:7]}
    moved = make_plan(model, rounds, ranks=rounds_alone, **DYNAMIC)
    assert [layer.rank for layer in moved.layers] == [layer.rank for layer in free.layers]
    assert [layer.edited for layer in moved.layers] == [True] * 7 + [False] * 7
    static = make_plan(model, rounds, rank=24, ranks={UP: 48, K: {"round": 2}})
    assert {layer.rank for layer in static.layers if layer.name != UP} == {24}
    assert by_name(static)[UP].rank == 48
    assert {layer.chosen for layer in static.layers if layer.name != K} == {0}
    assert by_name(static)[K].chosen == 2


def test_a_rank_too_large_for_a_layer_is_fine_where_that_layer_has_its_own(model, rounds):
    narrow = {layer.name: 24 for layer in rounds.layers if layer.max_rank == 24}
    assert len(narrow) == 4
    plan = make_plan(model, rounds, rank=30, ranks=narrow)
    assert {layer.rank for layer in plan.layers} == {24, 30}
    with pytest.raises(PlanError, match="larger than a layer allows"):
        make_plan(model, rounds, rank=30, ranks=dict(list(narrow.items())[1:]))


def test_plain_lora_takes_ranks_too(model, rounds):
    plan = make_plan(model, rounds.layers, mode="lora", rank=4, ranks={UP: 9})
    assert {layer.rank for layer in plan.layers if layer.name != UP} == {4}
    assert by_name(plan)[UP].rank == 9
    with pytest.raises(PlanError, match="mode lora has no covariances to choose a round of"):
        make_plan(model, rounds.layers, mode="lora", ranks={UP: {"rank": 4, "round": 0}})


def test_every_problem_with_layers_ranks_and_rounds_is_named_at_once(model, rounds):
    ranks = {"model.layers.0.mlp.up_prj": 4, K: 25, DOWN: {"round": 3}, "nothing": 1}
    with pytest.raises(PlanError) as caught:
        make_plan(model, rounds, ranks=ranks)
    message = str(caught.value)
    assert message.startswith("4 problems in the ranks by hand")
    for part in (
        "'model.layers.0.mlp.up_prj' is none of the 14 adapted layers, did you mean 'model.layers.0.mlp.up_proj'?",
        "'nothing' is none of the 14 adapted layers.",
        f"{K} is 24x48: rank 25 is not in 1..24",
        f"{DOWN}: there is no round 3, the context has rounds 0 to 2",
        "adapter.ranks",
        "--save-ranks",
    ):
        assert part in message, part


def test_one_round_is_said_as_such(model, tokenizer, texts):
    with pytest.raises(PlanError, match="the context has round 0 only"):
        make_plan(model, collect(model, tokenizer, texts), ranks={UP: {"round": 1}})


def test_a_budget_is_never_passed(model, rounds):
    per_rank = sum(s.d_in + s.d_out for s in rounds.layers)
    with pytest.raises(PlanError, match=r"pass the budget.*Got: at least 6,144 .*at most 5,000, adapter\.budget"):
        make_plan(model, rounds, budget=5000, allocation="dynamic", compactness_scale="unit", ranks={UP: 48})
    with pytest.raises(PlanError, match=rf"pass the budget.*Got: {3 * per_rank + 128:,} trainable"):
        make_plan(model, rounds, budget=3 * per_rank, ranks={UP: 4})
    assert make_plan(model, rounds, budget=3 * per_rank + 128, ranks={UP: 4}).trainable_parameters == 3 * per_rank + 128


def test_the_papers_overshoot_survives_a_round_trip(model, rounds, tmp_path):
    settings = {"budget": 5000, "overshoot": True, "allocation": "dynamic", "compactness_scale": "unit"}
    plan = make_plan(model, rounds, **settings)
    assert plan.trainable_parameters > 5000
    (tmp_path / "r.yaml").write_text(ranks_file(plan, 3))
    again = make_plan(model, rounds, ranks=str(tmp_path / "r.yaml"), **settings)
    assert again.trainable_parameters == plan.trainable_parameters


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "adapter.ranks: the file of ranks does not exist"),
        ("a: [1", "adapter.ranks: the file of ranks is not valid YAML"),
        ("- a\n", "adapter.ranks: the file of ranks is not a mapping of layers to ranks"),
        ("", "adapter.ranks: the file of ranks is not a mapping of layers to ranks"),
        ("a: 3\nb: 4\na: 5\n", "adapter.ranks: the file of ranks names 'a' twice"),
        ("a: 0\n", "adapter.ranks.a.rank: Input should be greater than or equal to 1 (got 0)"),
        ("a: 1.5\n", "adapter.ranks.a: neither a rank nor of the form {rank: 8, round: 0} (got 1.5)"),
        ("a: yes\n", "adapter.ranks.a: neither a rank nor of the form {rank: 8, round: 0} (got True)"),
        ("a: {}\n", "adapter.ranks.a: neither rank nor round is given"),
        ("a: {rank: 2.5}\n", "adapter.ranks.a.rank: Input should be a valid integer (got 2.5)"),
        ("a: {round: -1}\n", "adapter.ranks.a.round: neither a calibration round, counted from 0, nor all (got -1)"),
        ("a: {rnk: 3}\n", "unknown key 'adapter.ranks.a.rnk', did you mean 'rank'?"),
    ],
)
def test_a_file_that_cannot_be_read_as_ranks(raw_recipe, tmp_path, content, message):
    file = tmp_path / "ranks.yaml"
    if content is not None:
        file.write_text(content)
    raw_recipe["adapter"]["ranks"] = str(file)
    with pytest.raises(RecipeError) as caught:
        parse_recipe(raw_recipe)
    assert message in str(caught.value)


def test_the_content_and_not_the_path_is_what_a_plan_depends_on(raw_recipe, write_recipe, tmp_path):
    (tmp_path / "a.yaml").write_text(f"{UP}: 5\n{K}: {{rank: 3}}\n")
    (tmp_path / "b.yaml").write_text(f"# the same\n{K}: 3\n{UP}: 5\n")
    (tmp_path / "c.yaml").write_text(f"{K}: 3\n{UP}: 6\n")
    path = write_recipe(raw_recipe)
    recipes = [load_recipe(path, [f"adapter.ranks={tmp_path / name}.yaml"]) for name in "abc"]
    keys = [Inputs(recipe).fingerprints["plan"] for recipe in (*recipes, load_recipe(path))]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    assert "yaml" not in str(recipes[0].as_json()["adapter"]["ranks"])
    assert Recipe.model_validate(recipes[0].as_json()) == recipes[0]


def test_a_check_before_the_model_is_loaded_counts_the_ranks(raw_recipe):
    raw_recipe["adapter"]["ranks"] = {UP: 9}
    plain = 4 * sum(s.d_in + s.d_out for s in Inputs(parse_recipe(raw_recipe)).targets)
    checked = Inputs(parse_recipe(raw_recipe)).check()
    assert checked["trainable_parameters"] == plain + 128 * 5
    assert "note" not in checked
    raw_recipe["adapter"] |= {"allocation": "dynamic"}
    assert "allocated later" in Inputs(parse_recipe(raw_recipe)).check()["note"]
    raw_recipe["adapter"]["ranks"] = {UP: 99}
    with pytest.raises(PlanError, match=r"rank 99 is not in 1\.\.48"):
        Inputs(parse_recipe(raw_recipe)).check()


def test_names_that_yaml_would_read_as_something_else_are_quoted():
    from corda.plan.plan import LayerPlan, Plan

    layers = tuple(LayerPlan(name, "linear", 5, 6, 2) for name in ("0.1", "no", "blocks.0.q"))
    text = ranks_file(Plan(AdapterOptions(), layers), 1)
    assert yaml.safe_load(text) == {"0.1": 2, "no": 2, "blocks.0.q": 2}
