"""Two processes: what each of them computes, and what a model sharded over them gives."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from conftest import WORDS, byte_tokenizer, llama
from peft import PeftModel
from spawned import in_processes
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from corda import distributed, pipeline
from corda.adapter import attach, relative_difference
from corda.context.collect import collect
from corda.context.store import Context
from corda.distributed import Processes
from corda.errors import CordaError, PlanError
from corda.plan.make import make_plan
from corda.reading import parse_recipe
from corda.sharding import average_gradients

TEXTS = [f"The {w} of item {i} is {i * 7 % 13}, not {w[::-1]}." for i, w in enumerate(WORDS * 3)]
SAMPLES: dict[str, Any] = {"rounds": 2, "samples": 11, "batch_size": 3}
CHOICES: dict[str, Any] = {"mode": "kpm", "rank": 4, "allocation": "dynamic", "selection": "dynamic"}


def test_two_processes_give_what_one_gives(tmp_path):
    first, second = in_processes(two_processes, str(tmp_path))
    assert first["digests"] == second["digests"]
    for found in (first, second):
        assert all(difference < 1e-6 for difference in found["covariances"].values()), found["covariances"]
        assert found["same factors"] == {"replicated": True, "sharded": True}
        assert found["blocks gathered at once"] == 1
        for form in ("intact", "residual"):
            assert found[f"{form} attached"]["start"] < 1e-5
            assert found[f"{form} attached"]["after a step"] < 1e-5
            assert found[f"{form} attached"]["moved"] > 1e-3
        assert found["told"] == [
            "PlanError: process 1 cannot. Where: layer 7. To fix: x.",
            "activations are not finite",
        ]


def two_processes(folder: str) -> dict[str, Any]:
    with distributed.joined(cpu=True) as processes:
        found: dict[str, Any] = {"digests": {}, "covariances": {}, "same factors": {}}
        alone = collect(llama(), byte_tokenizer(), TEXTS, **SAMPLES)
        planned = make_plan(llama(), alone, **CHOICES)
        for kind, model in (("replicated", llama()), ("sharded", sharded(llama()))):
            most = [0]
            if kind == "sharded":
                watch(model, most)
            context = collect(model, byte_tokenizer(), TEXTS, **SAMPLES, processes=processes)
            assert (context.tokens, context.groups, context.layers) == (alone.tokens, alone.groups, alone.layers)
            found["digests"][f"{kind} covariances"] = digest(context.packed)
            found["covariances"][kind] = max(
                float((packed - alone.packed[key]).norm() / alone.packed[key].norm())
                for key, packed in context.packed.items()
            )
            plan = make_plan(model, alone, **CHOICES, processes=processes)
            assert plan.as_json() == planned.as_json()
            found["digests"][f"{kind} factors"] = digest(named(plan.factors))
            found["same factors"][kind] = digest(named(plan.factors)) == digest(named(planned.factors))
        assert all(isinstance(p, DTensor) for p in model.parameters())
        found["blocks gathered at once"] = most[0]
        for form in ("intact", "residual"):
            found[f"{form} attached"] = attached(alone, form, processes, folder)
        found["told"] = [disagreement(processes), not_finite(processes)]
        return found


def attached(context: Context, form: Any, processes: Processes, folder: str) -> dict[str, float]:
    """An adapter on a sharded model: its start, and one step of gradients over both processes, against one process."""
    ids = torch.tensor([[5, 9, 100, 33, 7, 250, 41], [77, 3, 8, 160, 161, 12, 90]])
    model = llama()
    plan = make_plan(model, context, mode="kpm", rank=4)
    with torch.no_grad():
        base = model(input_ids=ids).logits
    whole, spread = attach(llama(), plan, base=form), attach(sharded(llama()), plan, base=form)
    with torch.no_grad():
        start = relative_difference(spread(input_ids=ids).logits, base)
    for adapted, rows in ((whole, ids), (spread, ids[processes.rank :: 2])):
        adapted(input_ids=rows, labels=rows).loss.backward()
        if adapted is spread:
            average_gradients(adapted)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter -= 0.1 * parameter.grad
    with torch.no_grad():
        one, two = whole(input_ids=ids).logits, spread(input_ids=ids).logits
    spread.save_pretrained(f"{folder}/{form}")
    processes.wait()
    saved = PeftModel.from_pretrained(llama(), f"{folder}/{form}")
    with torch.no_grad():
        assert relative_difference(saved(input_ids=ids).logits, two) < 1e-5
    return {
        "start": start,
        "after a step": relative_difference(two, one),
        "moved": relative_difference(one, base),
    }


def test_a_run_in_two_processes_is_the_run_of_one_and_goes_on_in_one(raw_recipe, tmp_path):
    raw_recipe["training"] |= {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2}
    one = raw_recipe | {"output_dir": str(tmp_path / "one")}
    one["training"] = raw_recipe["training"] | {"gradient_accumulation_steps": 2}
    first, second = in_processes(run_in_two_processes, raw_recipe)
    assert first["loss"] == second["loss"]
    assert first["results"] == second["results"]
    alone = pipeline.run(parse_recipe(one))
    shared = first["results"]
    assert shared["scores"]["before"] == alone["scores"]["before"]
    assert shared["train"]["loss"] == pytest.approx(alone["train"]["loss"], rel=1e-4)
    for name, score in shared["scores"]["after"].items():
        assert score["value"] == pytest.approx(alone["scores"]["after"][name]["value"], rel=1e-3)
    assert shared["export"]["max_relative_logit_difference"] <= 1e-5
    # The training that two processes began, one process ends: steps of as many records, shared out in another way.
    cut = raw_recipe | {"output_dir": str(tmp_path / "run-cut"), "training": one["training"]}
    assert (tmp_path / "run-cut" / "checkpoints" / "checkpoint-2").is_dir()
    assert not (tmp_path / "run-cut" / "train").exists()
    ended = pipeline.run(parse_recipe(cut))
    assert ended["train"]["step"] == [1, 2, 3, 4]
    assert ended["train"]["loss"] == pytest.approx(alone["train"]["loss"], rel=1e-4)
    assert ended["train"]["loss"][:2] == shared["train"]["loss"][:2]  # taken over from the checkpoint


def run_in_two_processes(raw: dict[str, Any]) -> dict[str, Any]:
    results = pipeline.run(parse_recipe(raw))
    for key in ("timing", "memory", "provenance"):
        results.pop(key)
    import trl

    begin = trl.SFTTrainer.__init__
    trl.SFTTrainer.__init__ = lambda self, *a, **k: begin(self, *a, callbacks=[CutOff()], **k)
    try:
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(parse_recipe(raw | {"output_dir": raw["output_dir"] + "-cut"}))
    finally:
        trl.SFTTrainer.__init__ = begin
    return {"results": results, "loss": results["train"]["loss"]}


class CutOff(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def disagreement(processes: Processes) -> str:
    def work() -> None:
        if not processes.first:
            raise PlanError("process 1 cannot", where="layer 7", fix="x")

    try:
        processes.agree(work)
    except CordaError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def not_finite(processes: Processes) -> str:
    """A NaN that one process alone meets stops both."""
    model = llama()
    if not processes.first:
        with torch.no_grad():
            model.model.embed_tokens.weight.fill_(float("nan"))
    try:
        collect(model, byte_tokenizer(), TEXTS, processes=processes)
    except CordaError as error:
        return error.what
    return "nothing"


def sharded(model: Any) -> Any:
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def watch(model: Any, most: list[int]) -> None:
    """Note how many blocks have whole weights while one of them runs."""

    def look(*_: Any) -> None:
        whole = sum(not isinstance(b.self_attn.q_proj.weight, DTensor) for b in model.model.layers)
        most[0] = max(most[0], whole)

    for block in model.model.layers:
        block.mlp.down_proj.register_forward_pre_hook(look)


def named(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {f"{name}.{part}": t for name, pair in factors.items() for part, t in zip("AB", pair, strict=True)}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names and bytes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()
