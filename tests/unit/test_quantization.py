"""The 4-bit round trip, its errors, and corrections in the metric of the data."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from corda import adapter, linalg, models, quantization
from corda.errors import ModelError, PlanError
from corda.metric import Metric, damping
from corda.models import Quantisation, Source
from corda.offload import LazyWeights, empty_model
from corda.options import ModelOptions
from corda.plan.make import make_plan
from corda.plan.plan import corrected
from corda.reading import parse_adapter, parse_recipe
from corda.targets import find_targets, weight_of

bitsandbytes = pytest.importorskip("bitsandbytes")

NF4 = Quantisation("nf4", False, False)
quantise = functools.partial(quantization.round_trip, kind=NF4, dtype=torch.float32)


@pytest.fixture
def layer():
    """W (96, 64) and inputs whose size falls over two decades, seen and unseen."""
    g = torch.Generator().manual_seed(0)
    W = 3 * torch.randn(96, 64, generator=g)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=g))[0] * torch.logspace(1, -1, 64)
    X, unseen = (torch.randn(4000, 64, generator=g) @ basis.T for _ in range(2))
    return W, X, unseen


def begun(layer, mode="largest", rank=8, **settings):
    W, X, _ = layer
    C = X.T @ X / len(X)
    metric = Metric(C, 1.0, damping(C, 0.01))
    A, B, _ = linalg.factors(W, linalg.subspace(W, metric, rank, mode), scaling=2.0, balance="equal")
    options = {"residual": True, "correction": "none", "rank": rank} | settings
    return (A, B), quantization.start(W, metric, (A, B), scaling=2.0, quantise=quantise, **options)


def weight_at_start(W, begin, residual=True):
    A, B = begin.trained
    taken = begin.removed[1] @ begin.removed[0] if begin.removed else 2 * B @ A
    weight = quantise(W - taken) + 2 * B @ A if residual else quantise(W)
    return weight + begin.correction[1] @ begin.correction[0] if begin.correction else weight


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_round_trip_is_that_of_a_4bit_layer(layer, quant_type, double_quant):
    W, X, _ = layer
    module = bitsandbytes.nn.Linear4bit(
        64, 96, bias=False, compute_dtype=torch.float32, quant_type=quant_type, compress_statistics=double_quant
    )
    module.load_state_dict({"weight": W})
    module.to("cpu")
    module.support_avx512bf16_for_cpu = False
    Q = quantization.round_trip(W, Quantisation(quant_type, double_quant, False), torch.float32)
    assert 0 < float((Q - W).norm() / W.norm()) < 0.2
    torch.testing.assert_close(module(X), X @ Q.T, rtol=1e-4, atol=1e-3)
    assert quantization.is_4bit(module)
    torch.testing.assert_close(quantization.full_weight(module), Q)
    quantization.requantise(module, 2 * W)
    torch.testing.assert_close(module(X), 2 * X @ Q.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"correction": "fit"},
        {"correction": "fit", "rounds": 3},
        {"correction": "frozen", "rounds": 3, "rank": 5},
        {"correction": "frozen", "residual": False},
    ],
)
def test_errors_are_those_of_the_weight_it_starts_with(layer, settings):
    W, X, _ = layer
    _, begin = begun(layer, **settings)
    now = weight_at_start(W, begin, settings.get("residual", True))
    scale = len(X) ** 0.5
    expected = {
        "weight_norm": W.norm(),
        "output_norm": (X @ W.T).norm() / scale,
        "weight_plain": (quantise(W) - W).norm(),
        "output_plain": (X @ (quantise(W) - W).T).norm() / scale,
        "weight_start": (now - W).norm(),
        "output_start": (X @ (now - W).T).norm() / scale,
    }
    for name, value in expected.items():
        assert getattr(begin.error, name) == pytest.approx(float(value), rel=1e-3), name


def test_a_refit_is_the_best_approximation_of_what_is_missing(layer):
    W, X, _ = layer
    (A, B), begin = begun(layer, correction="fit")
    missing = W - quantise(W - 2 * B @ A)
    best = torch.linalg.svdvals((X @ missing.T).double())[8:].norm() / len(X) ** 0.5
    assert begin.error.output_start == pytest.approx(float(best), rel=2e-2)  # the fit is damped
    assert begin.error.output_start >= float(best) * (1 - 1e-4)


def test_corrections_hold_on_unseen_inputs_and_more_rounds_help(layer):
    W, _, unseen = layer

    def error(**settings):
        return float((unseen @ (weight_at_start(W, begun(layer, rank=16, **settings)[1]) - W).T).norm())

    plain = float((unseen @ (quantise(W) - W).T).norm())
    alone, once, thrice = error(), error(correction="fit"), error(correction="fit", rounds=3)
    assert thrice < once < alone < plain
    assert error(mode="smallest", correction="frozen") < 0.8 * plain


def test_a_frozen_part_leaves_the_adapter_its_directions(layer):
    (A, B), begin = begun(layer, "smallest", correction="frozen", rounds=2)
    assert torch.equal(begin.trained[0], A)
    assert torch.equal(begin.trained[1], B)
    assert begin.removed[0].shape[0] == 16


def test_an_intact_base_is_not_requantised(layer):
    with pytest.raises(ValueError, match="can only have a frozen correction, of one round"):
        begun(layer, residual=False, correction="fit")


@pytest.mark.parametrize(
    ("settings", "four_bit", "correction"),
    [
        ({"mode": "ipm"}, True, "fit"),
        ({"mode": "kpm"}, True, "frozen"),
        ({"mode": "dual"}, True, "frozen"),
        ({"mode": "ipm"}, False, "none"),
        ({"mode": "kpm", "base": "intact"}, True, "none"),
        ({"mode": "lora"}, True, "none"),
        ({"mode": "contrast"}, True, "none"),
        ({"mode": "ipm", "correction": "none"}, True, "none"),
    ],
)
def test_the_default_correction_follows_from_mode_and_base(settings, four_bit, correction):
    assert corrected(parse_adapter(settings), four_bit) == correction


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "lora", "correction": "frozen"}, "a correction needs covariances"),
        ({"base": "intact", "correction": "fit"}, "use base 'residual'"),
        ({"base": "intact", "correction": "frozen", "correction_rounds": 2}, "use base 'residual'"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(Exception, match=message):
        parse_adapter(settings)


def test_dropout_on_a_4bit_residual_base_is_refused(raw_recipe):
    raw_recipe["model"]["load_in_4bit"] = True
    raw_recipe["adapter"]["lora_dropout"] = 0.1
    with pytest.raises(Exception, match="lora_dropout with a 4-bit residual base"):
        parse_recipe(raw_recipe)


def test_a_correction_without_4_bits_is_refused(model, tokenizer, texts):
    from corda import collect

    context = collect(model, tokenizer, texts, batch_size=4)
    with pytest.raises(PlanError, match="there is no error of 4 bits to correct"):
        make_plan(model, context, rank=4, correction="frozen")


def test_another_quantisation_is_refused_by_name(pico, tmp_path):
    config = (Path(pico) / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace("{", '{"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128},', 1)
    )
    options = ModelOptions(model_name_or_path=str(tmp_path))
    with pytest.raises(ModelError, match=re.compile("quantised in a way whose weights cannot be read.*gptq", re.S)):
        models.quantisation(Source(str(tmp_path), None), options)


def test_bitsandbytes_missing_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=re.escape("pip install 'corda-adapt[quantization]'")):
        quantization.require()


def save_gpt2(folder):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def save_4bit(folder, target, double_quant=False):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=double_quant,
    )
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config).save_pretrained(
        target
    )


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_a_stored_4bit_checkpoint_is_read_as_numbers(pico, tmp_path, layout):
    source = pico
    if layout == "gpt2":
        torch.manual_seed(0)
        source = tmp_path / "gpt2"
        GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64)).save_pretrained(
            source
        )
    save_4bit(source, tmp_path / "packed", double_quant=layout == "llama")
    options = ModelOptions(model_name_or_path=str(tmp_path / "packed"))
    packed = Source(str(tmp_path / "packed"), None)
    kind = models.quantisation(packed, options)
    assert kind == Quantisation("nf4", layout == "llama", True)
    shell = empty_model(packed, options, torch.float32)
    lazy = LazyWeights(packed, shell, torch.float32)
    full = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for spec in find_targets(shell):
        W = weight_of(shell, spec, lazy.get(f"{spec.name}.weight"))
        expected = quantization.round_trip(weight_of(full, spec), kind, torch.float32)
        torch.testing.assert_close(W, expected, rtol=1e-5, atol=1e-6)


def test_evaluation_does_not_repack_what_is_trained(pico):
    loaded = models.load(ModelOptions(model_name_or_path=str(pico), load_in_4bit=True, device="cpu"))
    before = {n: p.clone() for n, p in loaded.model.named_parameters()}
    with torch.no_grad():
        loaded.model(input_ids=torch.arange(32)[None])
    assert all(torch.equal(before[n], p) for n, p in loaded.model.named_parameters())


def test_conv1d_in_4_bits(tmp_path):
    save_gpt2(tmp_path)
    full = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    from corda.context.collect import collect_encoded
    from corda.data.batches import Encoded

    rows = [Encoded(tuple(range(i, i + 40)), (True,) * 40) for i in range(40)]
    context = collect_encoded(full, rows, find_targets(full), pad_token_id=0)
    plan = make_plan(full, context, mode="ipm", rank=8, correction="fit", quantise=quantise)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=config)
    for module in base.modules():
        vars(module).pop("support_avx512bf16_for_cpu", None)
        if quantization.is_4bit(module):
            module.support_avx512bf16_for_cpu = False
    probe = {"input_ids": torch.arange(60).reshape(2, 30)}
    with torch.no_grad():
        exact, plain = full(**probe).logits, base(**probe).logits
        weights = dict(full.named_parameters())
        tuned = adapter.attach(base.eval(), plan, weights=weights.__getitem__)
        now = tuned(**probe).logits
    assert (now - exact).norm() < 0.8 * (plain - exact).norm()
