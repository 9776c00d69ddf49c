"""Runs whose training accelerate shards with FSDP2, in two processes on CPUs.

accelerate offers FSDP on accelerators only. Here its state is told that the CPU is one; everything behind that, the
sharding, the optimiser, the checkpoints and the gathering, is its own code.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from spawned import in_processes

from corda import pipeline
from corda.reading import parse_recipe

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("base", ["intact", "residual"])
def test_a_training_sharded_by_accelerate_is_that_of_one_process(raw_recipe, tmp_path, base):
    raw_recipe["adapter"]["base"] = base
    raw_recipe["training"] |= {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2}
    one = raw_recipe | {"output_dir": str(tmp_path / "one")}
    one["training"] = raw_recipe["training"] | {"gradient_accumulation_steps": 2}
    first, second = in_processes(sharded_run, raw_recipe, seconds=1200)
    assert first == second
    assert first["sharded"] > 0
    alone = pipeline.run(parse_recipe(one))
    assert first["loss"] == pytest.approx(alone["train"]["loss"], rel=1e-4)
    assert first["export"] <= 1e-5
    for name, value in first["after"].items():
        assert value == pytest.approx(alone["scores"]["after"][name]["value"], rel=1e-3)


def test_a_sharded_training_that_was_cut_off_goes_on(raw_recipe, tmp_path):
    raw_recipe["training"] |= {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2}
    whole = raw_recipe | {"output_dir": str(tmp_path / "whole")}
    undisturbed, _ = in_processes(sharded_run, whole, seconds=1200)
    cut, _ = in_processes(cut_off_run, raw_recipe, seconds=1200)
    assert cut == {"stopped": 3}
    assert list((tmp_path / "run").rglob("checkpoint-2")), "nothing to go on from"
    continued, second = in_processes(sharded_run, raw_recipe, seconds=1200)
    assert continued == second
    assert continued["steps_seen"] == 2
    assert continued["loss"] == pytest.approx(undisturbed["loss"], rel=1e-5)
    for name, value in continued["after"].items():
        assert value == pytest.approx(undisturbed["after"][name], rel=1e-5)


class CutOffError(Exception):
    """Where a run is cut off."""


def cut_off_run(raw: dict[str, Any]) -> dict[str, Any]:
    """A run that dies after three steps."""
    try:
        sharded_run(raw, stop=3)
    except CutOffError:
        return {"stopped": 3}
    return {}


def sharded_run(raw: dict[str, Any], stop: int | None = None) -> dict[str, Any]:
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from transformers import TrainerCallback

    os.environ.update(
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_TRANSFORMER_CLS_TO_WRAP="LlamaDecoderLayer",
        FSDP_CPU_RAM_EFFICIENT_LOADING="false",
        FSDP_STATE_DICT_TYPE="FULL_STATE_DICT",
        FSDP_RESHARD_AFTER_FORWARD="true",
    )
    PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            from torch.distributed.tensor import DTensor

            seen.append(sum(isinstance(p, DTensor) for p in kwargs["model"].parameters()))
            if state.global_step == stop:
                raise CutOffError

    import trl

    begin = trl.SFTTrainer.__init__
    trl.SFTTrainer.__init__ = lambda self, *a, **k: begin(self, *a, callbacks=[Look()], **k)
    results = pipeline.run(parse_recipe(raw))
    return {
        "loss": results["train"]["loss"],
        "sharded": min(seen),
        "steps_seen": len(seen),
        "export": results["export"]["max_relative_logit_difference"],
        "after": {name: score["value"] for name, score in results["scores"]["after"].items()},
    }
