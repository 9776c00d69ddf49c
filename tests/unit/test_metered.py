"""The drift meter against forgetting: rank correlations, readings of weights that anything changed."""

from __future__ import annotations

import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy import stats
from transformers import AutoModelForCausalLM

from corda.comparing.cell import _drift
from corda.comparing.metered import foretold, ranks, spearman
from corda.context.collect import collect_encoded
from corda.context.store import HELD_OUT
from corda.data.batches import encode
from corda.data.formats import to_records
from corda.drift import DriftMeter, drift_of_weights, yardstick
from corda.targets import find_targets, weight_of


def test_rank_correlation_is_scipys_with_ties():
    rng = random.Random(3)
    for _ in range(20):
        pairs = [(float(rng.randrange(6)), rng.gauss(0, 40)) for _ in range(15)]
        assert spearman(pairs) == pytest.approx(float(stats.spearmanr(*zip(*pairs, strict=True)).statistic))
    assert ranks([30.0, 10.0, 30.0, 20.0]) == [3.5, 1.0, 3.5, 2.0]
    assert spearman([(1.0, 2.0), (1.0, 3.0), (1.0, 4.0)]) is None


def made(rate, drift, before, after, status="done"):
    return {
        "status": status,
        "learning_rate": rate,
        "drift": {"total": drift, "rms": 100 - drift, "held_out": None},
        "scores": {
            "before": {"facts/answer_loss": {"value": before}},
            "after": {"facts/answer_loss": {"value": after}},
        },
    }


def test_the_order_is_compared_over_all_runs_and_within_each_rate():
    # Within each rate the meter is wrong, over both it follows the rate.
    low = [made(1e-3, 1 + i, 2.0, 2.4 - 0.1 * i) for i in range(4)]
    high = [made(1e-2, 11 + i, 2.0, 9.4 - 0.1 * i) for i in range(4)]
    found = foretold([*low, *high], "facts/answer_loss")
    assert set(found) == {"total", "rms"}
    assert found["total"]["within"] == {"0.001": pytest.approx(-1), "0.01": pytest.approx(-1)}
    assert found["total"]["median_within"] == pytest.approx(-1)
    assert found["total"]["all"] == pytest.approx(stats.spearmanr(range(8), [4, 3, 2, 1, 8, 7, 6, 5]).statistic)
    assert found["rms"]["all"] == pytest.approx(-found["total"]["all"])
    assert found["total"]["n"] == 8


def test_diverged_runs_count_and_unmeasured_ones_do_not():
    runs = [made(1e-3, 1.0 + i, 2.0, 2.0 + i) for i in range(3)]
    assert foretold(runs, "facts/answer_loss") == {}
    lost = made(1e-1, 50.0, 2.0, 90.0, "diverged")
    assert foretold([*runs, lost], "facts/answer_loss")["total"]["all"] == pytest.approx(1)
    unmeasured = made(1e-1, 60.0, 2.0, 0.0) | {"scores": {}}
    assert foretold([*runs, lost, unmeasured], "facts/answer_loss")["total"]["n"] == 4


def test_an_accuracy_that_falls_is_a_rise_in_forgetting():
    runs = []
    for i in range(4):
        run = made(1e-3, 1.0 + i, 0, 0)
        run["scores"] = {s: {"arc/accuracy": {"value": 0.9 - i * 0.1 * (s == "after")}} for s in ("before", "after")}
        runs.append(run)
    assert foretold(runs, "arc/accuracy")["total"]["all"] == pytest.approx(1)


@pytest.fixture
def yards(model, tokenizer, texts):
    def encoded(some):
        return [encode(record, tokenizer) for record in to_records([{"text": t} for t in some])]

    context = collect_encoded(
        model, [encoded(texts[:12]), encoded(texts[12:])], find_targets(model), pad_token_id=0, sides=[HELD_OUT]
    )
    return [yardstick(side, lambda spec: weight_of(model, spec)) for side in (context, context.side(HELD_OUT))]


def test_changed_weights_read_as_the_meter_reads_the_factors(model, yards):
    started = {spec.name: weight_of(model, spec).clone() for spec in find_targets(model)}
    config = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules="all-linear")
    adapted = get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    expected = DriftMeter(adapted, *yards).read()
    adapted.merge_adapter()
    base = adapted.base_model.model

    def change(spec):
        return base.get_submodule(spec.name).base_layer.weight - started[spec.name]

    found = drift_of_weights(change, *yards)
    assert found.total == pytest.approx(expected.total, rel=1e-4)
    assert found.rms == pytest.approx(expected.rms, rel=1e-4)
    assert found.held_out == pytest.approx(expected.held_out, rel=1e-4)
    assert found.held_out_rms == pytest.approx(expected.held_out_rms, rel=1e-4)
    assert found.layers == pytest.approx(dict(expected.layers), rel=1e-3)
    assert drift_of_weights(change, yards[0]).held_out is None
    assert drift_of_weights(lambda spec: 0 * started[spec.name], *yards).total == 0


def test_a_change_below_the_roundings_of_a_16_bit_base_is_read(pico, tokenizer, texts):
    """Merged into bf16 weights it would be gone, though the model that is measured has it."""
    base = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.bfloat16).eval()
    encoded = [encode(record, tokenizer) for record in to_records([{"text": text} for text in texts[:6]])]
    layers = find_targets(base)
    context = collect_encoded(base, encoded, layers, pad_token_id=0)
    started = {spec.name: weight_of(base, spec).clone() for spec in layers}
    yard = yardstick(context, lambda spec: started[spec.name])
    model = get_peft_model(base, LoraConfig(r=2, target_modules=[spec.name for spec in layers]))
    torch.manual_seed(0)
    deltas = {}
    for spec in layers:
        module = base.get_submodule(spec.name)
        torch.nn.init.normal_(module.lora_B["default"].weight, std=1e-5)
        deltas[spec.name] = module.get_delta_weight("default")
    expected = drift_of_weights(lambda spec: deltas[spec.name], yard)
    found = _drift(model, started, [yard])
    assert 0 < expected.total < 1e-4
    assert found["total"] == pytest.approx(expected.total, rel=1e-3)
