"""Mixtures of experts: stacked parameters of transformers 5 in several layouts, and experts that are layers."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import encoded_texts, llama, note_family
from peft import PeftModel
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from corda import pipeline
from corda.adapter import attach, relative_difference
from corda.context.collect import collect_encoded
from corda.drift import DriftMeter, yardstick
from corda.errors import AdapterError, CalibrationError, RecipeError, TargetError
from corda.exporting.export import export
from corda.inputs import Inputs
from corda.models import keep_exact
from corda.parameters import update_of, wrappers
from corda.plan.make import make_plan
from corda.reading import parse_recipe
from corda.targets import find_targets, weight_of

IDS = torch.tensor([[5, 9, 100, 33, 7, 250, 41], [77, 3, 8, 160, 161, 12, 90]])
COMMON = {
    "vocab_size": 259,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
LAYOUTS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**COMMON, intermediate_size=40, num_local_experts=4)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **COMMON,
            num_experts=5,
            intermediate_size=40,
            moe_intermediate_size=28,
            shared_expert_intermediate_size=36,
            mlp_only_layers=[1],
        )
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**COMMON, head_dim=12, num_experts=5, moe_intermediate_size=28, intermediate_size=40)
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**COMMON, num_experts=5, intermediate_size=28)),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**COMMON, head_dim=12, num_local_experts=4, intermediate_size=28)
    ),
}


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3, self.w2 = (nn.Linear(*shape, bias=False) for shape in ((48, 28), (48, 28), (28, 48)))

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Unstacked(nn.Module):
    """Experts as layers of their own, as before transformers 5."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(48, 4, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(4))

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == e)
            if len(rows):
                out.index_add_(0, rows, expert(flat[rows]) * weights[rows, place, None])
        return out.reshape(x.shape)


def make(layout):
    if layout == "unstacked":
        model = llama()
        torch.manual_seed(1)
        for block in model.model.layers:
            block.mlp = Unstacked()
            for p in block.mlp.parameters():
                p.data.normal_(std=0.2)
        return model
    torch.manual_seed(0)
    model = LAYOUTS[layout]().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gate.weight" in name or "router.weight" in name:
                p.mul_(4)  # so that experts differ in what they see
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def move(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p) * (p != 0)


def context_of(model, tokenizer, texts, targets="all-linear", **options):
    rows = encoded_texts(texts, tokenizer)
    return collect_encoded(model, rows, find_targets(model, targets), pad_token_id=0, **options)


@pytest.mark.parametrize("layout", [*LAYOUTS, "unstacked"])
def test_every_layout_from_collecting_to_a_reloaded_export(layout, tokenizer, texts, tmp_path):
    model = make(layout)
    model.save_pretrained(tmp_path / "base") if layout != "unstacked" else None
    pristine = copy.deepcopy(model)
    before = logits(model)
    context = context_of(model, tokenizer, texts)
    whole = context_of(model, tokenizer, texts, stream=False)
    for layer in context.layers:
        a, b = context.covariance(layer.name), whole.covariance(layer.name)
        assert float((a - b).norm()) <= 1e-5 * float(b.norm())
        assert context.token_count(layer.name) == whole.token_count(layer.name)
    assert any("experts." in layer.name for layer in context.layers)
    assert not any(module._forward_pre_hooks for module in model.modules())

    facts = {"collect": f"{len(context.layers)} layers", "stream": "= whole"}
    for name, options in {
        "IPM": {"mode": "ipm"},
        "++": {"mode": "kpm", "allocation": "dynamic", "compactness_scale": "unit"},
        "KPM": {"mode": "kpm"},
    }.items():
        adapted = attach(copy.deepcopy(pristine), make_plan(model, context, rank=3, **options))
        step0 = relative_difference(logits(adapted), before)
        assert step0 <= 1e-5
        facts[name] = f"step 0 {step0:.0e}" if step0 else "step 0 exact"
    move(adapted)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)
    moved = logits(adapted)
    assert relative_difference(moved, before) > 1e-2

    optimiser = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(2):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[1] < losses[0]

    fresh = lambda: copy.deepcopy(pristine)  # noqa: E731
    done = export(adapted, tmp_path / "out", fresh_base=fresh, probe={"input_ids": IDS})
    assert done.max_relative_logit_difference <= 1e-5
    assert done.update_kept == pytest.approx(1, abs=1e-4)
    again = PeftModel.from_pretrained(fresh(), str(tmp_path / "out")).eval()
    reload = relative_difference(logits(again), logits(adapted))
    assert reload <= 1e-5
    facts |= {} if layout == "unstacked" else {"4-bit": "refused: stacked experts"}
    facts |= {"train": "loss falls", "export": "rank 2r", "reload": f"{max(reload, 1e-9):.0e}"}
    note_family(f"{layout} (experts)", facts)


def seen_by_hand(model, texts, tokenizer, block):
    """Expert -> inputs of gate_up_proj and of down_proj, from a forward pass of the whole model, written out."""
    experts, gate = model.model.layers[block].mlp.experts, model.model.layers[block].mlp.gate
    rows = {}
    caught = []
    handle = gate.register_forward_pre_hook(lambda _m, args: caught.append(args[0].reshape(-1, 48)))
    with torch.no_grad():
        for record in encoded_texts(texts, tokenizer):
            model(input_ids=torch.tensor([record.ids]))
    handle.remove()
    for inputs in caught:
        chosen = (inputs @ gate.weight.T).softmax(-1).topk(2).indices
        for t, x in enumerate(inputs):
            for e in chosen[t].tolist():
                a, b = (experts.gate_up_proj[e].detach() @ x).chunk(2)
                rows.setdefault(e, []).append((x, nn.functional.silu(a) * b))
    return {e: [torch.stack(part) for part in zip(*pairs, strict=True)] for e, pairs in rows.items()}


def test_each_expert_has_the_covariance_of_the_tokens_routed_to_it(tokenizer, texts):
    model = make("mixtral")
    context = context_of(model, tokenizer, texts[:12], batch_size=5)  # padded
    for e, inputs in seen_by_hand(model, texts[:12], tokenizer, 1).items():
        for name, X in zip(("gate_up_proj", "down_proj"), inputs, strict=True):
            layer = f"model.layers.1.mlp.experts.{name}.{e}"
            assert context.token_count(layer) == len(X)
            reference = X.T @ X / len(X)
            assert float((context.covariance(layer) - reference).norm()) < 1e-5 * float(reference.norm())


def test_all_experts_pooled_have_the_covariance_of_the_shared_input(tokenizer, texts):
    """Every token goes to k experts, so Σ T_e C_e = k Σ x xᵀ: no second accumulator is needed."""
    model = make("qwen2_moe")
    context = context_of(model, tokenizer, texts)
    shared = context.covariance("model.layers.0.mlp.shared_expert.gate_proj")
    pooled = context.pooled("model.layers.0.mlp.experts.gate_up_proj")
    assert float((pooled - shared).norm()) < 1e-5 * float(shared.norm())


def test_experts_that_are_layers_in_4_bits(tokenizer, texts, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = make("unstacked")
    plan = make_plan(model, context_of(model, tokenizer, texts), rank=3, mode="ipm")

    def fresh():
        held = make("unstacked")
        for layer in plan.layers:
            place, _, leaf = layer.name.rpartition(".")
            inner = getattr(held.get_submodule(place), leaf)
            packed = bitsandbytes.nn.Linear4bit(layer.d_in, layer.d_out, bias=False, quant_type="nf4")
            packed.weight = bitsandbytes.nn.Params4bit(inner.weight.data, requires_grad=False, quant_type="nf4")
            setattr(held.get_submodule(place), leaf, packed.to("cpu"))
        keep_exact(held)
        return held.eval()

    held = fresh()
    before = logits(held)
    assert relative_difference(before, logits(model)) > 1e-3
    adapted = attach(held, plan, base="intact")
    step0 = relative_difference(logits(adapted), before)
    move(adapted)
    done = export(adapted, tmp_path / "out", fresh_base=fresh, probe={"input_ids": IDS})
    reload = relative_difference(logits(PeftModel.from_pretrained(fresh(), str(tmp_path / "out"))), logits(adapted))
    assert max(step0, reload, done.max_relative_logit_difference) <= 1e-5
    facts = {"4-bit": f"step 0 {step0:.0e}, reload {max(reload, 1e-9):.0e}".replace("0e+00", "exact")}
    note_family("unstacked (experts)", facts)


def without_expert(layout, expert=2):
    model = make(layout)
    gate = model.model.layers[0].mlp.gate
    with torch.no_grad():
        gate.weight[expert] = -1000 * gate.weight[expert].sign()
    place = model.model.layers[0].mlp

    def closed(module, args, output):
        first = output[0] if isinstance(output, tuple) else output
        first = first.clone()
        first[..., expert] = -1e9
        if not isinstance(output, tuple):
            return first
        weights, chosen = first.softmax(-1).topk(2)
        return first, weights, chosen

    place.gate.register_forward_hook(closed)
    return model


@pytest.mark.parametrize("layout", ["mixtral", "unstacked"])
def test_an_expert_that_no_token_reaches_takes_the_pooled_covariance(layout, tokenizer, texts):
    model = without_expert(layout)
    context = context_of(model, tokenizer, texts)
    name, seen = {
        "mixtral": ("model.layers.0.mlp.experts.gate_up_proj.2", "model.layers.0.mlp.experts.gate_up_proj.0"),
        "unstacked": ("model.layers.0.mlp.experts.2.w1", "model.layers.0.mlp.experts.0.w1"),
    }[layout]
    assert context.token_count(name) == 0
    assert any("saw none" in warning and "expert_prior" in warning for warning in context.warnings)
    plan = make_plan(model, context, rank=2, expert_prior=30)
    layers = {layer.name: layer for layer in plan.layers}
    assert layers[name].pooled == 1.0
    T = context.token_count(seen)
    assert layers[seen].tokens == T
    assert layers[seen].pooled == pytest.approx(30 / (T + 30))
    assert make_plan(model, context, rank=2).layers[0].pooled == 0  # not an expert
    assert torch.isfinite(plan.factors[name][0]).all()
    pool = next(layer.pool for layer in context.layers if layer.name == name)
    alone = make_plan(model, context, rank=2, expert_prior=1e-6).factors[seen][0]
    leaning = make_plan(model, context, rank=2, expert_prior=1e9)
    C = context.pooled(pool)
    W = weight_of(model, next(layer for layer in context.layers if layer.name == seen))
    damped = C + 0.01 * C.diagonal().mean() * torch.eye(len(C))
    U = torch.linalg.svd(W.double() @ damped.double(), full_matrices=False)[0][:, -2:]
    A, B = leaning.factors[seen]
    expected = (U @ U.T @ W.double()).float()
    assert float((B @ A - expected).norm()) < 1e-3 * float(expected.norm())
    assert not torch.allclose(alone, A)


def test_rounds_and_dynamic_ranks(tokenizer, texts):
    """Experts of one parameter may get different ranks: PEFT's common rank is filled with zeros that stay zeros."""
    model = make("olmoe")
    before = logits(model)
    halves = [encoded_texts(part, tokenizer) for part in (texts[:15], texts[15:])]
    context = collect_encoded(model, halves, find_targets(model), pad_token_id=0)
    options = {"allocation": "dynamic", "compactness_scale": "unit", "rank": 3}
    plan = make_plan(model, context, selection="dynamic", **options)
    ranks = {layer.name: layer.rank for layer in plan.layers}
    experts = [r for name, r in ranks.items() if "experts.gate_up_proj" in name]
    assert len(set(experts)) > 1
    adapted = attach(model, plan)
    assert relative_difference(logits(adapted), before) <= 1e-5
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    for parameter, wrapper in wrappers(adapted).items():
        A = wrapper.lora_A["default"].weight.grad.unflatten(0, (wrapper.num_experts, -1))
        B = wrapper.lora_B["default"].weight.grad.unflatten(1, (-1, wrapper.num_experts))
        for e in range(wrapper.num_experts):
            beyond = ranks[f"{parameter}.{e}"]
            assert not A[e, beyond:].any()
            assert not B[:, beyond:, e].any()


@pytest.mark.parametrize("layout", ["qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("form", ["lora", "merged", "residual", "compressed"])
def test_forms_of_export(layout, form, tokenizer, texts, tmp_path):
    model = make(layout)
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base").eval()
    context = context_of(model, tokenizer, texts[:10], ["gate_up_proj", "down_proj", "q_proj"])
    adapted = attach(model, make_plan(model, context, rank=3, mode="ipm"), base="residual" if form == "lora" else None)
    move(adapted)
    options = {"format": "lora", "rank": 4} if form == "compressed" else {"format": form}
    done = export(adapted, tmp_path / "out", **options)
    assert done.max_relative_logit_difference <= 1e-5
    if form == "compressed":
        assert 0 < done.compression.lost_energy < 1
    else:
        assert done.update_kept == pytest.approx(1, abs=1e-3)


def test_saved_and_restored(tokenizer, texts, tmp_path):
    model = make("mixtral")
    context = context_of(model, tokenizer, texts[:10], ["gate_up_proj"])
    plan = make_plan(model, context, rank=3)
    pristine = copy.deepcopy(model)
    adapted = attach(model, plan)
    move(adapted)
    adapted.save_pretrained(str(tmp_path))
    trained = logits(adapted)
    plain = PeftModel.from_pretrained(copy.deepcopy(pristine), str(tmp_path)).eval()
    assert relative_difference(logits(plain), trained) <= 1e-5
    resumed = attach(pristine, plan)
    resumed.load_adapter(str(tmp_path), "default")
    assert torch.equal(logits(resumed), trained)


@pytest.mark.parametrize("mode", ["kpm", "lora"])
def test_some_experts_of_a_parameter_only(mode, tokenizer, texts):
    model = make("mixtral")
    names = ["model.layers.1.mlp.experts.down_proj.3", "model.layers.1.mlp.experts.down_proj.0", "q_proj"]
    context = context_of(model, tokenizer, texts[:10], names)
    assert [layer.name for layer in context.layers if "experts" in layer.name] == sorted(names[:2])
    plan = make_plan(model, context if mode == "kpm" else context.layers, mode=mode, rank=2)
    adapted = attach(model, plan)
    optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1, weight_decay=0)
    for _ in range(3):
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimiser.step()
    (wrapper,) = wrappers(adapted).values()
    change = wrapper.get_delta_weight("default").detach()
    assert [bool(change[e].any()) for e in range(4)] == [True, False, False, True]


def test_what_is_refused(tokenizer, texts):
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        **(COMMON | {"num_experts_per_tok": 1}), intermediate_size=28, intermediate_size_mlp=40, num_local_experts=3
    )
    config.head_dim = 12
    with pytest.raises(TargetError, match=r"(?s)feed_forward.experts.gate_up_proj of Llama4TextExperts.*attention"):
        find_targets(Llama4ForCausalLM(config))
    model = make("unstacked")
    with pytest.raises(CalibrationError, match=r"context\.positions"):
        context_of(model, tokenizer, texts[:3], response_only=True)
    model = make("mixtral")
    context = context_of(model, tokenizer, texts[:3], ["gate_up_proj"])
    plan = make_plan(model, context, rank=2)
    with pytest.raises(AdapterError, match="lora_dropout: 0"):
        attach(model, replace(plan, options=plan.options.model_copy(update={"lora_dropout": 0.1})))


def test_hooks_are_undone_when_a_pass_fails(tokenizer, texts):
    model = make("mixtral").train()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj[0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="not finite"):
        context_of(model, tokenizer, texts[:3])
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("mode", ["dual", "contrast"])
def test_two_contexts(mode, tokenizer, texts):
    """An expert without tokens of the task leans on the pooled covariance of the task, too."""
    model = without_expert("mixtral")
    before = logits(model)
    learn, keep = (encoded_texts(part, tokenizer) for part in (texts[:8], texts[8:]))
    context = collect_encoded(model, [keep, learn], find_targets(model), pad_token_id=0, sides=("learn",))
    plan = make_plan(model, context, mode=mode, rank=2)
    adapted = attach(model, plan)
    assert relative_difference(logits(adapted), before) <= 1e-5
    optimiser = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(2):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[1] < losses[0]


@pytest.mark.parametrize(("section", "key", "value"), [("adapter", "lora_dropout", 0.1), ("context", "offload", True)])
def test_refused_before_work_starts(section, key, value, raw_recipe, tokenizer, tmp_path):
    make("mixtral").save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    raw_recipe["model"]["model_name_or_path"] = str(tmp_path / "moe")
    raw_recipe.setdefault(section, {})[key] = value
    with pytest.raises(RecipeError, match=f"{section}.{key} is not possible with adapters on stacked experts"):
        Inputs(parse_recipe(raw_recipe)).check()


def test_a_run_of_a_recipe(raw_recipe, tokenizer, tmp_path):
    make("qwen3_moe").save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    raw_recipe["model"]["model_name_or_path"] = str(tmp_path / "moe")
    raw_recipe["training"] |= {"max_steps": 2, "gradient_checkpointing": True}
    del raw_recipe["evaluation"]["tasks"]["things"]
    results = pipeline.run(parse_recipe(raw_recipe))
    assert results["step0"]["max_relative_logit_difference"] <= 1e-5
    assert results["export"]["max_relative_logit_difference"] <= 1e-5
    expert = next(layer for layer in results["plan"]["layers"] if "experts" in layer["name"])
    assert 0 < expert["pooled"] < 1


def test_drift_of_experts(tokenizer, texts):
    model = make("mixtral")
    context = context_of(model, tokenizer, texts, ["gate_up_proj", "q_proj"])
    known = yardstick(context, lambda spec: weight_of(model, spec))
    weights = {layer.name: weight_of(model, layer).clone() for layer in context.layers}
    adapted = attach(model, make_plan(model, context, rank=3))
    meter = DriftMeter(adapted, known)
    assert meter.read().total == 0
    move(adapted)
    reading = meter.read()
    name = "model.layers.1.mlp.experts.gate_up_proj.2"
    D = wrappers(adapted)["model.layers.1.mlp.experts.gate_up_proj"].get_delta_weight("default")[2].detach()
    C, W = context.covariance(name), weights[name]
    expected = (torch.trace(D @ C @ D.T) / torch.trace(W @ C @ W.T)).sqrt()
    assert reading.layers[name] == pytest.approx(float(expected), rel=1e-4)
    meter.hold(reading.total / 2)
    assert meter.read().total <= reading.total / 2


@pytest.mark.parametrize("layout", ["mixtral", "gpt_oss"])
def test_a_small_change_of_16_bit_parameters_is_not_rounded_away(layout, tokenizer, texts):
    """B0 rounds to 2⁻⁹ of itself in bf16; a change of 0.1 % of it has to reach the forward pass and a merge."""
    model = make(layout)
    plan = make_plan(model, context_of(model, tokenizer, texts[:10], ["gate_up_proj", "down_proj"]), mode="ipm", rank=3)
    adapted = attach(model.bfloat16(), plan)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p *= 1 + 1e-3 * torch.randn_like(p)
    for wrapper in wrappers(adapted).values():
        start = update_of(wrapper, "initial")
        lhs, rhs, scaling = wrapper.get_delta_factors("default")
        folded, merged = scaling * lhs.float() @ rhs.float(), wrapper.get_delta_weight("default").float()
        for expert, (A, B) in update_of(wrapper, "default").items():
            exact = B @ A - start[expert][1] @ start[expert][0]
            for found in (folded[expert], merged[expert]):
                apart = found - (exact if found.shape == exact.shape else exact.T)
                assert float(apart.detach().norm() / exact.norm()) < 0.01


def test_the_residual_form_rounds_16_bit_parameters_once(tokenizer, texts):
    model = make("mixtral")
    plan = make_plan(model, context_of(model, tokenizer, texts[:10], ["down_proj"]), mode="ipm", rank=3)
    model = model.bfloat16()
    before = {name: p.float().clone() for name, p in model.named_parameters()}
    for name, wrapper in wrappers(attach(model, plan, base="residual")).items():
        after = wrapper.get_param()
        for expert, (A, B) in update_of(wrapper, "initial").items():
            assert torch.equal(after[expert], (before[name][expert] - B @ A).bfloat16())


@pytest.mark.parametrize("base", ["intact", "residual"])
def test_a_copy_as_trls_reference(base, tokenizer, texts):
    """Right in the residual form; in the intact form refused, because a copy of a parameter's adapter has no start."""
    model = make("mixtral")
    plan = make_plan(model, context_of(model, tokenizer, texts, ["gate_up_proj"]), rank=2, mode="kpm")
    adapted = attach(model, plan, base=base)
    move(adapted)
    trained = logits(adapted.eval())
    if base == "intact":
        with pytest.raises(AdapterError, match=r"not copied as a reference.*residual"):
            adapted.add_adapter("ref", adapted.peft_config["default"])
        assert torch.equal(logits(adapted), trained)
        return
    adapted.add_adapter("ref", adapted.peft_config["default"])
    adapted.set_adapter("ref")
    assert relative_difference(logits(adapted), trained) < 1e-6
