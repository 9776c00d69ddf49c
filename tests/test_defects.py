"""What breaks in PEFT's own CorDA, numbered as in docs/defects.md; each is a case that works here."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import itertools
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import llama
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from corda import linalg, pipeline
from corda.adapter import attach, relative_difference
from corda.context import collect as collecting
from corda.context.collect import collect
from corda.data.batches import batches, encode
from corda.data.formats import to_records
from corda.errors import AdapterError, CalibrationError, ModelError, PlanError, TargetError
from corda.exporting.convert import convert
from corda.metric import Metric, damping
from corda.models import Quantisation, load
from corda.options import ExportOptions, ModelOptions
from corda.plan.make import make_plan
from corda.quantization import round_trip
from corda.reading import parse_adapter, parse_recipe
from corda.targets import find_targets

IDS = torch.tensor([[5, 9, 100, 33, 7, 250, 41], [77, 3, 8, 160, 161, 12, 90]])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def move(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)


def encoded(texts, tokenizer):
    return [encode(record, tokenizer) for record in to_records([{"text": text} for text in texts])]


def test_defect_01_every_import_is_a_declared_dependency():
    """Importing all of corda needs nothing that pyproject.toml does not name."""
    import ast
    from pathlib import Path

    import corda

    declared = {re.split(r"[\s;<>=\[~!]", r)[0].lower() for r in importlib.metadata.requires("corda-adapt") or []}
    names = {"pyyaml": "yaml", "huggingface-hub": "huggingface_hub", "pillow": "PIL", "lm-eval": "lm_eval"}
    allowed = {names.get(d, d) for d in declared} | set(sys.stdlib_module_names) | {"corda"}
    for path in Path(corda.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module is None or node.module.split(".")[0] in allowed, (path, node.module)
            elif isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in allowed for alias in node.names), path
    subprocess.run([sys.executable, "-c", "import corda.cli, corda.pipeline"], check=True)


def test_defect_02_any_batch_size(model, tokenizer, texts):
    one, two = (collect(model, tokenizer, texts, batch_size=size) for size in (1, 2))
    for layer in one.layers:
        a, b = one.covariance(layer.name), two.covariance(layer.name)
        assert float((a - b).norm() / a.norm()) < 1e-6


def test_defect_03_no_target_modules_given(model, tokenizer, texts):
    assert len(collect(model, tokenizer, texts[:5]).layers) == 14


def test_defect_04_all_linear(model, tokenizer, texts):
    context = collect(model, tokenizer, texts[:5], target_modules="all-linear")
    assert len(context.layers) == 14
    attach(model, make_plan(model, context, rank=2))


def test_defect_05_a_typo_in_target_modules(model):
    with pytest.raises(TargetError, match="did you mean q_proj"):
        find_targets(model, ["q_porj", "k_proj"])


def test_defect_06_folders_are_made_before_the_work(raw_recipe, tmp_path):
    raw_recipe["output_dir"] = str(tmp_path / "not" / "there" / "yet")
    pipeline.run(parse_recipe(raw_recipe))
    assert (tmp_path / "not" / "there" / "yet" / "context" / "block-0001.safetensors").is_file()


def test_defect_07_what_was_made_for_other_settings_is_not_reused(raw_recipe):
    factors = []
    for change in ({}, {"rank": 3}, {"exponent": 0.5}, {"damp": 0.1}):
        raw_recipe["adapter"] |= change
        with pipeline.opened(parse_recipe(raw_recipe)) as stages:
            plan = stages.plan()
            assert plan.layers[0].rank == raw_recipe["adapter"]["rank"]
            factors.append(plan.factors["model.layers.0.mlp.down_proj"][0])
    assert factors[0].shape != factors[1].shape
    assert not torch.equal(factors[1], factors[2])
    assert not torch.equal(factors[2], factors[3])


def test_defect_08_left_padding_does_not_count(model, tokenizer, texts):
    rows = encoded([texts[0]] + [t * 4 for t in texts[:1]], tokenizer)  # one row of the two is 75 % pads
    layers = find_targets(model)
    alone = collecting.collect_batches(model, batches(rows, 0, 1), layers)
    padded = collecting.collect_batches(model, batches(rows, 0, 2, padding_side="left"), layers)
    for layer in layers:
        a, b = alone.covariance(layer.name), padded.covariance(layer.name)
        assert float((a - b).norm() / a.norm()) < 1e-6


def test_defect_09_a_layer_that_sees_no_token(model, tokenizer, texts, monkeypatch):
    block = model.model.layers[1].mlp
    monkeypatch.setattr(block, "forward", lambda x: block.down_proj(block.act_fn(block.gate_proj(x))))
    with pytest.raises(CalibrationError, match=r"1 target layer saw no token.*layers\.1\.mlp\.up_proj"):
        collect(model, tokenizer, texts[:3])
    layers = find_targets(model)
    context = collecting.collect_encoded(model, encoded(texts[:3], tokenizer), layers, pad_token_id=0, skip_unseen=True)
    assert len(context.layers) == 13
    assert any("left out" in warning for warning in context.warnings)


def test_defect_10_stacked_experts(tokenizer, texts, tmp_path):
    """Every expert has a covariance of its own tokens and a part of the adapter; what is saved loads on the base."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = MixtralConfig(vocab_size=259, num_key_value_heads=2, num_local_experts=4, pad_token_id=0, **sizes)
    moe = MixtralForCausalLM(settings).eval()
    moe.save_pretrained(tmp_path / "base")
    reference = logits(moe)
    context = collect(moe, tokenizer, texts)
    assert sum(".experts.down_proj." in layer.name for layer in context.layers) == 8
    wrapped = attach(moe, make_plan(moe, context, rank=3))
    assert relative_difference(logits(wrapped), reference) < 1e-5
    move(wrapped)
    wrapped.save_pretrained(str(tmp_path / "a"))
    fresh = MixtralForCausalLM.from_pretrained(tmp_path / "base")
    assert relative_difference(logits(PeftModel.from_pretrained(fresh, str(tmp_path / "a"))), logits(wrapped)) < 1e-5
    assert relative_difference(logits(wrapped), reference) > 1e-3


@pytest.mark.parametrize("base", ["intact", "residual"])
def test_defect_11_save_and_load_on_the_base(model, pico, tokenizer, texts, tmp_path, base):
    wrapped = attach(model, make_plan(model, collect(model, tokenizer, texts), rank=4), base=base)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if ".lora_B.default" in name:
                p += 0.02
    wrapped.save_pretrained(str(tmp_path / "a"))
    fresh = AutoModelForCausalLM.from_pretrained(pico)
    assert relative_difference(logits(PeftModel.from_pretrained(fresh, str(tmp_path / "a"))), logits(wrapped)) < 1e-5


def test_defect_12_disable_adapter_is_the_base(model, tokenizer, texts):
    reference = logits(model)
    wrapped = attach(model, make_plan(model, collect(model, tokenizer, texts), rank=4))
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), reference)


def test_defect_13_too_few_tokens_is_said(model, tokenizer, texts):
    plan = make_plan(model, collect(model, tokenizer, texts, tokens=20), rank=4)
    assert any("few calibration tokens: 20" in warning for warning in plan.warnings)
    assert all(0.5 < layer.norm_ratio < 2 for layer in plan.layers)  # balance equal keeps the factors alike


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_defect_14_a_bf16_base_does_not_drift(tokenizer, texts):
    """Intact: not by a bit. Residual: rounding W - BA moves logits as it does in PEFT's form; ours says by how much."""
    drifts: dict[str, list[float]] = {"peft": [], "residual": [], "intact": []}
    for seed, mode in itertools.product(range(3), ("kpm", "ipm")):
        base = llama(seed).to(torch.bfloat16)
        start = logits(base).float()
        context = collect(base, tokenizer, texts[:10])
        models = {"peft": peft_corda(copy.deepcopy(base), tokenizer, texts[:10], mode)}
        for form in ("residual", "intact"):
            own = copy.deepcopy(base)
            models[form] = attach(own, make_plan(own, context, mode=mode, rank=8), base=form)
        for name, model in models.items():
            drifts[name].append(float((logits(model).float() - start).norm() / start.norm()))
    assert max(drifts["intact"]) == 0
    assert 0 < sum(drifts["residual"]) < 1.1 * sum(drifts["peft"])


def test_defect_14_a_residual_bf16_base_prints_its_drift(raw_recipe, tmp_path):
    raw_recipe["model"]["dtype"] = "bfloat16"
    raw_recipe["training"] |= {"max_steps": 1, "bf16": False}
    raw_recipe["evaluation"]["tasks"] = {}
    raw_recipe["export"] = {"format": "none"}
    raw_recipe["adapter"] |= {"mode": "ipm", "base": "residual"}
    results = pipeline.run(parse_recipe(raw_recipe))
    drift = results["step0"]["max_relative_logit_difference"]
    assert 1e-4 < drift < 0.1
    assert f"moved the logits by {100 * drift:.2g} % of the largest" in " ".join(results["warnings"])
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "base residual moved the logits by" in page


def peft_corda(model, tokenizer, texts, mode):
    """PEFT's own two calls."""
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config = LoraConfig(
        r=8,
        lora_alpha=8,
        target_modules=[f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")],
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
    )

    def run():
        with torch.no_grad():
            for text in texts:
                model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"])

    preprocess_corda(model, config, run_model=run)
    return get_peft_model(model, config).eval()


def test_defect_15_train_mode_and_hooks_are_put_back(model, tokenizer, texts):
    model.train()
    collect(model, tokenizer, texts[:3])
    assert model.training
    assert all(m.training for m in model.modules())
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[0] = float("nan")
    with pytest.raises(CalibrationError):
        collect(model, tokenizer, texts[:3])
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_defect_16_rslora_with_a_rank_per_layer_becomes_a_plain_lora(model, pico, tokenizer, texts, tmp_path):
    """What corda trains, and what PEFT trained: alpha/sqrt(r) and patterns, and the rank doubles."""
    adapter = {"allocation": "dynamic", "compactness_scale": "unit", "use_rslora": True, "lora_alpha": 5.0}
    wrapped = attach(model, make_plan(model, collect(model, tokenizer, texts), rank=4, **adapter), base="residual")
    move(wrapped)
    wrapped.save_pretrained(str(tmp_path / "a"))
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico), str(tmp_path / "a")).eval()
    config = reloaded.peft_config["default"]
    assert config.use_rslora
    assert config.rank_pattern
    assert relative_difference(logits(reloaded), logits(wrapped)) < 1e-5

    settings = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        init_lora_weights="pissa",
        target_modules=["up_proj", "k_proj"],
        rank_pattern={"k_proj": 2},
        alpha_pattern={"k_proj": 3},
    )
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(pico), settings).eval()
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(str(tmp_path / "initial"))
    move(theirs)
    theirs.save_pretrained(str(tmp_path / "trained"))
    with pytest.raises(ValueError, match="not supported"):
        theirs.save_pretrained(str(tmp_path / "b"), path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    base = ModelOptions(model_name_or_path=str(pico), device="cpu")
    convert(tmp_path / "trained", base, tmp_path / "c", ExportOptions(), initial=tmp_path / "initial")
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico), str(tmp_path / "c")).eval()
    assert relative_difference(logits(reloaded), logits(theirs)) < 1e-5


def test_defect_17_the_smallest_components_are_the_smallest():
    """A steep fp32 case: the usual fp32 route with an explicit inverse is far from the optimum, this one is not."""
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(d, 96, generator=g))[0] for d in (96, 160))
    W = 30 * (U * torch.logspace(0, -6, 96)) @ V.T
    X = torch.randn(160, 4000, generator=g) * torch.logspace(1.5, -1.5, 160)[:, None]
    C = (X @ X.T / 4000).float()
    lam = damping(C, 0.01)
    found = linalg.subspace(W, Metric(C, 1, lam), 8, "smallest")
    damped = C.double() + lam * torch.eye(160, dtype=torch.float64)
    best = torch.linalg.svdvals(W.double() @ damped).sort().values[:8].norm()
    ours = linalg.captured_energy(W, Metric(C, 1, lam), found.U) / float(best) - 1
    usual = torch.linalg.svd(W @ damped.float(), full_matrices=False)[0][:, -8:]
    theirs = linalg.captured_energy(W, Metric(C, 1, lam), usual) / float(best) - 1
    assert ours < 1e-6
    assert theirs > 1e-3


def test_defect_18_damping_never_loops(model, tokenizer, texts):
    from dataclasses import replace

    context = collect(model, tokenizer, texts[:5])
    sick = {group: packed.clone() for group, packed in context.packed.items()}
    next(iter(sick.values()))[0] = float("nan")
    with pytest.raises(PlanError, match="not finite"):
        make_plan(model, replace(context, packed=sick), rank=2)


def test_defect_19_no_normaliser_that_depends_on_the_batch(model, tokenizer, texts):
    """C is a mean over tokens: collecting two halves and averaging by tokens gives the whole."""
    rows = encoded(texts, tokenizer)
    layers = find_targets(model, ["o_proj"])
    whole, first, second = (
        collecting.collect_batches(model, batches(part, 0, size), layers)
        for part, size in ((rows, 4), (rows[:11], 1), (rows[11:], 7))
    )
    name = layers[0].name
    t1, t2 = (c.tokens[c.groups[name]] for c in (first, second))
    mixed = (t1 * first.covariance(name) + t2 * second.covariance(name)) / (t1 + t2)
    assert float((mixed - whole.covariance(name)).norm() / mixed.norm()) < 1e-6


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("base", ["residual", "intact"])
def test_defect_20_a_4bit_base(pico, tokenizer, texts, tmp_path, base):
    """Decomposed in full precision, attached to 4-bit weights, saved as a plain LoRA of the base it is for."""
    pytest.importorskip("bitsandbytes")
    full = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32).eval()
    four_bit = load(ModelOptions(model_name_or_path=str(pico), load_in_4bit=True, device="cpu")).model
    if base == "residual":
        theirs = load(ModelOptions(model_name_or_path=str(pico), load_in_4bit=True, device="cpu")).model
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # packed codes taken for a weight
            peft_corda(theirs, tokenizer, texts[:10], "ipm")
    plain = logits(four_bit)
    quantise = functools.partial(round_trip, kind=Quantisation("nf4", False, False), dtype=torch.float32)
    options = parse_adapter({"mode": "ipm", "rank": 8, "base": base})
    plan = make_plan(full, collect(full, tokenizer, texts), options, quantise=quantise)
    wrapped = attach(four_bit, plan, weights=dict(full.named_parameters()).__getitem__)
    off = float((logits(wrapped) - logits(full)).norm() / (plain - logits(full)).norm())
    assert off == 1 if base == "intact" else 0 < off < 0.9
    move(wrapped)
    wrapped.save_pretrained(str(tmp_path / "a"))
    again = full if base == "residual" else load(ModelOptions(model_name_or_path=str(pico), load_in_4bit=True)).model
    start = logits(again)
    reloaded = PeftModel.from_pretrained(again, str(tmp_path / "a")).eval()
    assert relative_difference(logits(reloaded), start) > 1e-3
    if base == "intact":
        assert relative_difference(logits(reloaded), logits(wrapped)) < 1e-5


def test_defect_21_models_that_are_spread_over_devices_or_processes(
    pico, model, tokenizer, texts, tmp_path, one_thread
):
    """device_map with a part on disk, FSDP2 (here in a group of one; of two in test_distributed.py), and ZeRO-3."""
    context = collect(model, tokenizer, texts)
    plan = make_plan(model, context, rank=4)
    base = logits(model)

    def check(other, form):
        found = collect(other, tokenizer, texts)
        assert all(torch.equal(found.packed[key], packed) for key, packed in context.packed.items())
        again = make_plan(other, found, rank=4)
        assert all(torch.equal(again.factors[n][i], plan.factors[n][i]) for n in plan.factors for i in (0, 1))
        if form == "intact" and any(p.device.type == "meta" for p in other.parameters()):
            with pytest.raises(AdapterError, match=r"off-loaded cannot be changed.*base: intact"):
                attach(other, again, base="residual")
        assert relative_difference(logits(attach(other, again, base=form)), base) < 1e-5

    where = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    where |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = AutoModelForCausalLM.from_pretrained(pico, device_map=where, offload_folder=tmp_path / "offload")
    assert spread.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    check(spread, "intact")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for form in ("intact", "residual"):
            sharded = AutoModelForCausalLM.from_pretrained(pico)
            for block in sharded.model.layers:
                fully_shard(block)
            check(fully_shard(sharded), form)
    finally:
        dist.destroy_process_group()
    partitioned = AutoModelForCausalLM.from_pretrained(pico)
    vars(next(partitioned.parameters()))["ds_id"] = 0  # what DeepSpeed marks them with
    for work in (lambda: collect(partitioned, tokenizer, texts), lambda: attach(partitioned, plan)):
        with pytest.raises(ModelError, match=r"ZeRO-3.*To fix: use FSDP2"):
            work()
