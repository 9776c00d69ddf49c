"""The drift meter against the outputs themselves; limits that stop or hold training; the curve in every artifact."""

from __future__ import annotations

import json

import pytest
import torch

from corda import pipeline
from corda.adapter import attach
from corda.context.collect import collect, collect_encoded
from corda.context.store import HELD_OUT
from corda.data.batches import batches, encode, load_records
from corda.data.formats import to_records
from corda.drift import DriftMeter, yardstick
from corda.errors import RecipeError
from corda.forms import INITIAL
from corda.plan.make import make_plan
from corda.reading import parse_recipe
from corda.recipe import TrainingOptions
from corda.targets import find_targets, weight_of
from corda.tasks import DataSource
from corda.training import train

SUMS = [f"Add {i} and {3 * i + 2}: {i} + {3 * i + 2} = {4 * i + 2}." for i in range(30)]


def moved(adapted, size=0.05):
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and f".{INITIAL}." not in name:
                parameter.add_(size * torch.randn_like(parameter))
    return adapted


def meter_of(model, context, plan, **settings):
    """The adapted model and its meter."""
    sides = [context, *([context.side(HELD_OUT)] if HELD_OUT in context.sides else [])]
    yards = [yardstick(side, lambda spec: weight_of(model, spec)) for side in sides]
    adapted = attach(model, plan, **settings)
    return adapted, DriftMeter(adapted, *yards)


@pytest.fixture
def context(model, tokenizer, texts):
    def encoded(some):
        return [encode(record, tokenizer) for record in to_records([{"text": t} for t in some])]

    rounds = [encoded(texts[:12]), encoded(texts[12:20]), encoded(SUMS[:15]), encoded(texts[20:])]
    sides = ["learn", HELD_OUT]
    return collect_encoded(model, rounds, find_targets(model), pad_token_id=0, sides=sides)


def measured(pico, adapted, tokenizer, texts):
    """Drift of each layer from the outputs themselves, on inputs of the frozen base."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32).eval()
    rows = [encode(record, tokenizer) for record in to_records([{"text": t} for t in texts])]
    sums: dict[str, list[float]] = {}

    def hook(name, counts):
        def see(module, args, out):
            x = args[0][counts].double()
            layer = adapted.base_model.model.get_submodule(name)
            delta = torch.zeros(module.out_features, module.in_features, dtype=torch.float64)
            for which, sign in (("default", 1), (INITIAL, -1)):
                if which in layer.lora_A:
                    A, B = layer.lora_A[which].weight.double(), layer.lora_B[which].weight.double()
                    delta += sign * layer.scaling[which] * B @ A
            both = sums.setdefault(name, [0.0, 0.0])
            both[0] += float((x @ delta.T).square().sum())
            both[1] += float((x @ module.weight.double().T).square().sum())

        return see

    with torch.no_grad():
        for batch in batches(rows, 0, 6):
            counts = batch.attention_mask.bool()
            layers = find_targets(base)
            hooks = [base.get_submodule(s.name).register_forward_hook(hook(s.name, counts)) for s in layers]
            base.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            for one in hooks:
                one.remove()
    return {name: (a / b) ** 0.5 for name, (a, b) in sums.items()}, sums


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "kpm"},
        {"mode": "kpm", "base": "residual"},
        {"mode": "ipm", "lora_alpha": 12},
        {"mode": "dual"},
        {"mode": "contrast"},
        {"mode": "contrast", "train_a": True, "lora_alpha": 12},
        {"mode": "lora"},
    ],
    ids=str,
)
def test_the_meter_reads_what_the_outputs_show(pico, model, tokenizer, texts, context, options):
    plan = make_plan(model, context, rank=4, **options)
    adapted, meter = meter_of(model, context, plan)
    start = meter.read()
    assert start.total == start.rms == start.held_out == start.held_out_rms == 0
    moved(adapted)
    reading = meter.read()
    layers, sums = measured(pico, adapted, tokenizer, texts[:20])
    assert reading.layers.keys() == layers.keys()
    for name, value in layers.items():
        assert reading.layers[name] == pytest.approx(value, rel=1e-3)
    changed, whole = (sum(pair[i] for pair in sums.values()) for i in (0, 1))
    assert reading.total == pytest.approx((changed / whole) ** 0.5, rel=1e-3)
    assert reading.rms == pytest.approx((sum(v * v for v in layers.values()) / len(layers)) ** 0.5, rel=1e-3)
    unseen, sums = measured(pico, adapted, tokenizer, texts[20:])
    assert reading.held_out == pytest.approx(
        (sum(a for a, _ in sums.values()) / sum(b for _, b in sums.values())) ** 0.5, rel=1e-3
    )
    assert reading.held_out_rms == pytest.approx((sum(v * v for v in unseen.values()) / len(unseen)) ** 0.5, rel=1e-3)
    assert reading.held_out_layers[next(iter(unseen))] == pytest.approx(next(iter(unseen.values())), rel=1e-3)


def test_a_small_drift_is_not_lost_beside_a_large_start(model, context):
    adapted, meter = meter_of(model, context, make_plan(model, context, rank=8, mode="ipm"))
    readings = []
    for _ in range(2):
        moved(adapted, 1e-6)
        readings.append(meter.read().total)
    assert 0 < readings[0] < 1e-4
    assert readings[1] == pytest.approx(2 * readings[0], rel=0.02)


@pytest.mark.parametrize("mode", ["kpm", "contrast"])
def test_the_penalty_has_the_gradient_of_its_value(model, context, mode):
    adapted, meter = meter_of(model, context, make_plan(model, context, rank=4, mode=mode))
    moved(adapted)
    limit = meter.read().rms / 1.7
    value = meter.penalty(limit)
    assert float(value.detach()) == pytest.approx((1.7 / 0.8 - 1) ** 2, rel=1e-4)
    value.backward()
    parameter = next(p for n, p in adapted.named_parameters() if ".lora_B.default" in n)
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    slope = float((parameter.grad * direction).sum())
    values = []
    for step in (1e-3, -2e-3):
        with torch.no_grad():
            parameter.add_(step * direction)
        values.append(float(meter.penalty(limit).detach()))
    assert slope == pytest.approx((values[0] - values[1]) / 2e-3, rel=2e-2)
    assert float(meter.penalty(100.0).detach()) == 0


@pytest.fixture
def rows(data, tokenizer):
    return [encode(r, tokenizer) for r in load_records(DataSource(dataset="learn.jsonl"), data, 0)]


def run(adapted, tokenizer, rows, folder, meter, **options):
    given = {"max_steps": 12, "learning_rate": 0.02, "warmup_steps": 0, "per_device_train_batch_size": 4} | options
    return train(adapted, tokenizer, rows, TrainingOptions(**given), folder=folder, fingerprint="k", meter=meter)


@pytest.mark.parametrize("mode", ["kpm", "contrast"])
def test_a_limit_stops_training_or_a_penalty_keeps_it(pico, context, tokenizer, rows, tmp_path, mode):
    from transformers import AutoModelForCausalLM

    curves = {}
    limit = None
    for name in ("free", "stopped", "held"):
        base = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32)
        adapted, meter = meter_of(base, context, make_plan(base, context, rank=4, mode=mode))
        more = {"max_drift": limit} if limit else {}
        more |= {"drift_weight": 3.0, "max_steps": 40} if name == "held" else {}
        curves[name] = run(adapted, tokenizer, rows, tmp_path / name, meter, drift_steps=1, **more)
        limit = limit or curves["free"].drift[-1] / 2
    free, stopped, held = curves["free"], curves["stopped"], curves["held"]
    assert free.drift_step == free.step == tuple(range(1, 13))
    assert len(free.loss) == 12
    assert len(free.drift_held_out) == 12
    assert free.stopped is None
    passed = next(step for step, d in zip(free.step, free.drift, strict=True) if d > limit)
    assert stopped.stopped == stopped.step[-1] == passed
    assert stopped.drift[-1] > limit >= stopped.drift[-2]
    assert held.stopped is None
    assert len(held.step) == 40
    assert limit / 2 < held.drift[-1] <= max(held.drift) <= limit
    assert held.loss[-1] < held.loss[0]


def test_a_run_tells_its_drift_everywhere(raw_recipe):
    raw_recipe["adapter"]["mode"] = "contrast"
    raw_recipe["context"] = {"samples": 12, "held_out": 5}
    recipe = parse_recipe(raw_recipe)
    results = pipeline.run(recipe)
    drift, train_ = results["drift"], results["train"]
    assert train_["drift_step"] == train_["step"] == [1, 2, 3]
    assert 0 <= train_["drift"][0] < train_["drift"][-1]
    assert drift["rms"] == pytest.approx(train_["drift"][-1])
    assert drift["total"] == pytest.approx(train_["drift_total"][-1])
    assert drift["held_out_rms"] == pytest.approx(train_["drift_held_out"][-1])
    assert (
        set(drift["layers"]) == set(drift["held_out_layers"]) == {layer["name"] for layer in results["plan"]["layers"]}
    )
    assert (drift["limit"], drift["weight"]) == (None, None)
    context = json.loads((recipe.output_dir / "context" / "manifest.json").read_text())
    assert context["sides"] == ["learn", HELD_OUT]
    assert "Drift" in (recipe.output_dir / "report.html").read_text()


@pytest.mark.parametrize("mode", ["lora", "ipm"])
def test_other_modes_are_metered_when_asked(raw_recipe, mode):
    raw_recipe["adapter"]["mode"] = mode
    raw_recipe["context"] = {"samples": 12}
    plain = pipeline.run(parse_recipe(raw_recipe))
    assert plain["drift"] is None
    assert plain["train"]["drift"] == []
    raw_recipe["training"]["drift_meter"] = True
    metered = pipeline.run(parse_recipe(raw_recipe))
    assert metered["drift"]["total"] > 0
    assert metered["drift"]["held_out"] > 0
    assert metered["train"]["loss"] == plain["train"]["loss"]
    assert metered["scores"]["after"] == plain["scores"]["after"]


def test_no_record_left_means_no_second_meter(raw_recipe):
    raw_recipe["context"] = {"samples": 20}
    results = pipeline.run(parse_recipe(raw_recipe))
    assert results["drift"]["total"] > 0
    assert results["drift"]["held_out"] is None


def test_a_stop_is_said_in_the_warnings(raw_recipe):
    raw_recipe["adapter"]["mode"] = "contrast"
    raw_recipe["training"] |= {"max_steps": 8, "max_drift": 1e-3}
    results = pipeline.run(parse_recipe(raw_recipe))
    assert results["train"]["stopped"] == results["train"]["steps"] < 8
    assert any("training stopped at step" in note and "max_drift" in note for note in results["warnings"])
    assert results["export"]["max_relative_logit_difference"] <= 1e-5


@pytest.mark.parametrize(
    ("mode", "training", "message"),
    [
        ("lora", {"max_drift": 0.1}, "set training.drift_meter: true"),
        ("kpm", {"drift_weight": 1.0}, "training.max_drift, which is not set"),
        ("kpm", {"max_drift": 0.0}, "greater than 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(raw_recipe, mode, training, message):
    raw_recipe["adapter"]["mode"] = mode
    raw_recipe["training"] |= training
    with pytest.raises(RecipeError, match=message):
        parse_recipe(raw_recipe)


def test_a_meter_needs_knowledge(raw_recipe):
    del raw_recipe["data"]["keep"]
    del raw_recipe["evaluation"]["tasks"]["things"]
    raw_recipe["adapter"]["mode"] = "ipm"
    raw_recipe["training"]["drift_meter"] = True
    with pytest.raises(RecipeError, match=r"drift_meter needs data\.keep"):
        parse_recipe(raw_recipe)


def test_collect_needs_no_meter(model, tokenizer, texts):
    assert collect(model, tokenizer, texts, samples=5).sides == ()
