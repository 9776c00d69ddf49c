"""What is refused by name, and how work is shared out."""

from __future__ import annotations

import json

import pytest

from corda import pipeline, sharding
from corda.distributed import ALONE, Processes, by_cost, dealt
from corda.errors import ModelError, PlanError, RecipeError
from corda.reading import parse_recipe


def test_the_costliest_go_first_and_to_the_least_loaded():
    costs = [1, 8, 2, 7, 3, 6, 4, 5]
    owner = by_cost(costs, 3)
    loads = [sum(c for c, o in zip(costs, owner, strict=True) if o == rank) for rank in range(3)]
    assert loads == [13, 12, 11]
    assert by_cost(costs, 1) == [0] * 8
    assert by_cost([], 4) == []


def test_every_item_is_dealt_once():
    shares = [dealt(list(range(11)), Processes(rank, 4)) for rank in range(4)]
    assert sorted(item for share in shares for item in share) == list(range(11))
    assert [len(share) for share in shares] == [3, 3, 3, 2]
    assert dealt([1, 2], ALONE) == [1, 2]


def test_one_process_alone_tells_and_hears_itself():
    assert ALONE.tell({"a": 1}) == {"a": 1}
    assert ALONE.hear([1]) == [[1]]

    def work():
        raise PlanError("no")

    with pytest.raises(PlanError, match="no") as raised:
        ALONE.agree(work)
    assert not raised.value.shared


@pytest.mark.parametrize("how", ["file", "mapping", "launcher"])
def test_zero3_is_refused_before_any_work(raw_recipe, tmp_path, monkeypatch, how):
    config = {"zero_optimization": {"stage": 3}}
    if how == "launcher":
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    else:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(config))
        raw_recipe["training"]["deepspeed"] = str(path) if how == "file" else config
    with pytest.raises(ModelError, match=r"ZeRO-3.*use FSDP2.*--fsdp_version 2"):
        pipeline.run(parse_recipe(raw_recipe))
    assert not (tmp_path / "run").exists()


def test_zero2_leaves_weights_whole():
    sharding.refuse_zero3({"deepspeed": {"zero_optimization": {"stage": 2}}})


def test_a_spread_model_in_several_processes_is_refused(raw_recipe):
    raw_recipe["model"] |= {"device": "auto", "device_map": "auto"}
    stages = pipeline.Stages(parse_recipe(raw_recipe), pipeline.silent, (), Processes(0, 2))
    with pytest.raises(RecipeError, match=r"device_map.*2 processes.*--use_fsdp"):
        stages.check()


def test_a_run_with_a_part_of_the_model_on_disk_is_the_run_in_memory(raw_recipe, tmp_path, one_thread):
    plain = pipeline.run(parse_recipe(raw_recipe | {"output_dir": str(tmp_path / "plain")}))
    where = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    where |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    raw_recipe["model"]["device_map"] = where
    spread = pipeline.run(parse_recipe(raw_recipe))
    assert spread["train"]["loss"] == pytest.approx(plain["train"]["loss"], rel=1e-4)
    assert spread["export"]["max_relative_logit_difference"] <= 1e-5
    one, two = ((tmp_path / run / "plan" / "factors.safetensors").read_bytes() for run in ("plain", "run"))
    assert one == two
