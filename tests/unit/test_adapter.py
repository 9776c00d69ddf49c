"""Step 0, disabling, the factors' formulas on a live model, saving and resuming."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from corda import lora_config
from corda.adapter import attach, relative_difference
from corda.context.collect import collect
from corda.errors import AdapterError, ModelError, PlanError, TargetError
from corda.exporting.export import export
from corda.forms import INITIAL
from corda.plan.make import make_plan
from corda.targets import weight_of

IDS = torch.tensor([[5, 9, 100, 33, 7, 250, 41], [77, 3, 8, 160, 161, 12, 90]])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=48, n_layer=2, n_head=4, n_positions=128, n_inner=80, pad_token_id=0)
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("base", ["intact", "residual"])
def test_conv1d_is_transposed_right(tokenizer, texts, tmp_path, base):
    gpt = gpt2().eval()
    gpt.save_pretrained(tmp_path / "gpt2")
    context = collect(gpt, tokenizer, texts)
    assert {(s.kind, s.d_out, s.d_in) for s in context.layers} >= {("conv1d", 144, 48), ("conv1d", 48, 80)}
    reference = logits(gpt)
    wrapped = attach(gpt, make_plan(gpt, context, rank=4, mode="ipm"), base=base)
    assert relative_difference(logits(wrapped), reference) < 1e-5
    perturb(wrapped)
    wrapped.save_pretrained(str(tmp_path / "a"))
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    reloaded = PeftModel.from_pretrained(fresh, str(tmp_path / "a")).eval()
    assert relative_difference(logits(reloaded), logits(wrapped.eval())) < 1e-5


def test_settings_by_name_are_checked(model, context):
    from corda.errors import RecipeError
    from corda.recipe import AdapterOptions

    with pytest.raises(RecipeError, match="did you mean 'rank'"):
        make_plan(model, context, rnk=4)
    with pytest.raises(PlanError, match="not both"):
        make_plan(model, context, AdapterOptions(), rank=4)


def test_a_bf16_base_exports_within_roundings(pico, context, tmp_path):
    half = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.bfloat16).eval()
    wrapped = attach(half, make_plan(pristine(pico), context, rank=4))
    perturb(wrapped)
    done = export(wrapped, tmp_path / "out")
    assert done.max_relative_logit_difference < 5e-2


def test_export_needs_a_way_to_load_the_base_again(context, tmp_path):
    from conftest import llama

    from corda.errors import ModelError

    wrapped = attach(llama(), make_plan(llama(), context, rank=4))
    with pytest.raises(ModelError, match="fresh_base"):
        export(wrapped, tmp_path / "out")


def test_export_never_removes_other_files(model, context, tmp_path):
    from corda.errors import ArtifactError

    wrapped = attach(model, make_plan(model, context, rank=4))
    folder = tmp_path / "out"
    export(wrapped, folder)
    export(wrapped, folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="something else"):
        export(wrapped, folder)
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.fixture
def context(model, tokenizer, texts):
    return collect(model, tokenizer, texts)


def perturb(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and ".default." in name:
                p += 0.05 * torch.randn_like(p)


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize("base", ["intact", "residual"])
@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 3.0}, {"use_rslora": True, "lora_alpha": 5.0}])
def test_step_0_equals_the_base_in_eval_and_train_mode(model, context, mode, base, settings):
    reference = logits(model)
    plan = make_plan(model, context, mode=mode, rank=4, balance="sigma", **settings)
    wrapped = attach(model, plan, base=base)
    for training in (False, True):
        wrapped.train(training)
        assert relative_difference(logits(wrapped), reference) <= (0 if base == "intact" else 1e-5)


def test_intact_disables_to_the_base_exactly_after_training(model, context):
    reference = logits(model)
    wrapped = attach(model, make_plan(model, context, rank=4))
    perturb(wrapped)
    assert relative_difference(logits(wrapped), reference) > 1e-3
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), reference)


def test_dropout_with_an_intact_base_shares_its_mask(model, context):
    reference = logits(model)
    plan = make_plan(model, context, rank=4, lora_dropout=0.5)
    with pytest.raises(AdapterError, match="dropout with a residual base"):
        attach(model, plan, base="residual")
    assert torch.equal(logits(attach(model, plan).train()), reference)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj", "model.layers.0.mlp.up_proj"])
@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_residual_weights_are_the_papers(model, context, name, mode):
    W = weight_of(model, next(s for s in context.layers if s.name == name)).double().clone()
    plan = make_plan(model, context, mode=mode, rank=6, lora_alpha=2.0)
    C = context.covariance(name).double()
    C = C + 0.01 * C.diagonal().mean() * torch.eye(C.shape[0])
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    chosen = slice(len(S) - 6, None) if mode == "kpm" else slice(0, 6)
    BA = (U[:, chosen] * S[chosen]) @ (Vh @ torch.linalg.inv(C))[chosen]
    wrapped = attach(model, plan, base="residual")
    layer = wrapped.base_model.model.get_submodule(name)
    assert (layer.base_layer.weight.double() - (W - BA)).norm() / W.norm() < 1e-6
    product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert (product.double() - BA).norm() / W.norm() < 1e-6


def test_only_the_adapter_trains(model, context):
    plan = make_plan(model, context, rank=4)
    wrapped = attach(model, plan)
    trainable = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    assert all(".default." in name for name in trainable)
    assert sum(p.numel() for p in trainable.values()) == plan.trainable_parameters
    assert plan.trainable_parameters == sum(4 * (s.d_in + s.d_out) for s in context.layers)


@pytest.mark.parametrize("base", ["intact", "residual"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "lora_alpha": 5.0}, {"lora_alpha": 3.0}])
def test_save_pretrained_is_a_plain_lora_on_the_original_base(model, pico, context, tmp_path, base, settings):
    wrapped = attach(model, make_plan(model, context, rank=4, **settings), base=base)
    perturb(wrapped)
    wrapped.save_pretrained(str(tmp_path / "a"))
    assert not (tmp_path / "a" / INITIAL).exists()
    fresh = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32)
    reloaded = PeftModel.from_pretrained(fresh, str(tmp_path / "a")).eval()
    assert relative_difference(logits(reloaded), logits(wrapped.eval())) < 1e-5
    assert reloaded.peft_config["default"].r == 8
    assert sorted(reloaded.peft_config["default"].target_modules) == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]


@pytest.mark.parametrize("base", ["intact", "residual"])
def test_an_adapted_output_head_is_not_saved_beside_its_adapter(model, pico, tokenizer, texts, tmp_path, base):
    """PEFT adds the weight of an adapted lm_head, which here is W - BA: the start would be subtracted twice."""
    reference, context = logits(model), collect(model, tokenizer, texts, target_modules=["q_proj", "lm_head"])
    wrapped = attach(model, make_plan(model, context, rank=4), base=base)
    perturb(wrapped)
    wrapped.save_pretrained(str(tmp_path / "a"))
    fresh = pristine(pico)
    reloaded = PeftModel.from_pretrained(fresh, str(tmp_path / "a")).eval()
    assert relative_difference(logits(reloaded), logits(wrapped.eval())) < 1e-5
    with reloaded.disable_adapter():
        assert torch.equal(logits(reloaded), reference)
    assert all(".lora_" in key for key in load_file(tmp_path / "a" / "adapter_model.safetensors"))
    again = attach(pristine(pico), make_plan(pristine(pico), context, rank=4), base=base)
    again.load_adapter(str(tmp_path / "a"), "default", is_trainable=True)
    assert relative_difference(logits(again.eval()), logits(wrapped)) < 1e-5


def test_what_was_saved_loads_back_as_the_trained_factors(model, pico, context, tmp_path):
    plan = make_plan(model, context, rank=4)
    wrapped = attach(model, plan)
    perturb(wrapped)
    wrapped.save_pretrained(str(tmp_path / "a"))
    again = attach(AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32).eval(), plan)
    again.load_adapter(str(tmp_path / "a"), "default", is_trainable=True)
    for (name, one), (_, two) in zip(wrapped.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    other = attach(
        AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32),
        make_plan(pristine(pico), context, mode="ipm", rank=4),
    )
    with pytest.raises(AdapterError, match="starts from other factors"):
        other.load_adapter(str(tmp_path / "a"), "default")


def pristine(pico):
    return AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32).eval()


def test_merging_gives_the_same_logits(model, context):
    wrapped = attach(model, make_plan(model, context, rank=4, lora_alpha=2.0))
    perturb(wrapped)
    expected = logits(wrapped)
    wrapped.merge_adapter()
    assert relative_difference(logits(wrapped), expected) < 1e-5
    wrapped.unmerge_adapter()
    assert relative_difference(logits(wrapped), expected) < 1e-5
    merged = wrapped.merge_and_unload(safe_merge=True)
    assert relative_difference(logits(merged), expected) < 1e-5


def test_a_second_adapter_shares_the_intact_base(model, context):
    reference = logits(model)
    wrapped = attach(model, make_plan(model, context, rank=4))
    perturb(wrapped)
    first = logits(wrapped)
    other = copy.deepcopy(wrapped.peft_config["default"])
    other.init_lora_weights = True
    wrapped.add_adapter("second", other)
    wrapped.set_adapter("second")
    assert relative_difference(logits(wrapped), reference) < 1e-6
    wrapped.set_adapter("default")
    assert torch.equal(logits(wrapped), first)


def test_bf16_step_0_is_the_base_bit_for_bit(model, context):
    plan = make_plan(model, context, rank=4)
    half = copy.deepcopy(model).to(torch.bfloat16)
    reference = logits(half)
    wrapped = attach(half, plan)
    assert torch.equal(logits(wrapped), reference)


def test_export_reloads_and_compares(model, context, tmp_path):
    wrapped = attach(model, make_plan(model, context, rank=4))
    perturb(wrapped)
    done = export(wrapped, tmp_path / "out")
    assert done.max_relative_logit_difference < 1e-5
    assert done.rank == 8
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }


def test_an_export_that_does_not_reload_to_the_same_is_not_left_behind(model, pico, context, tmp_path):
    from corda.errors import CheckError

    wrapped = attach(model, make_plan(model, context, rank=4))
    perturb(wrapped)

    def wrong_base():
        base = pristine(pico)
        with torch.no_grad():
            base.model.layers[0].mlp.up_proj.weight *= 1.5
        return base

    with pytest.raises(CheckError, match="after reload"):
        export(wrapped, tmp_path / "out", fresh_base=wrong_base)
    assert not any(tmp_path.iterdir())


def test_plain_lora_has_the_same_number_of_parameters(model, context):
    plan = make_plan(model, context.layers, mode="lora", rank=4)
    reference = logits(model)
    wrapped = attach(model, plan, seed=3)
    assert torch.equal(logits(wrapped), reference)
    assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) == plan.trainable_parameters


def test_rank_larger_than_a_layer_allows(model, context):
    with pytest.raises(PlanError, match=r"larger than a layer allows.*k_proj \(24x48\).*at most 24"):
        make_plan(model, context, rank=25)


def test_a_plan_of_another_model_is_refused(model, context, pico):
    from dataclasses import replace

    plan = make_plan(model, context, rank=4)
    layers = (replace(plan.layers[0], name="model.layers.9.self_attn.q_proj"), *plan.layers[1:])
    with pytest.raises(AdapterError, match=r"not in the model.*layers\.9"):
        attach(model, replace(plan, layers=layers))
    layers = (replace(plan.layers[0], d_in=99), *plan.layers[1:])
    with pytest.raises(AdapterError, match="another shape"):
        attach(model, replace(plan, layers=layers))
    wrapped = attach(model, plan)
    with pytest.raises(AdapterError, match="carries an adapter already"):
        attach(wrapped, plan)


def test_target_names_collapse_only_where_they_match_exactly(model):
    assert lora_config.target_names(model, [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]) == ["up_proj"]
    assert lora_config.target_names(model, ["model.layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]


def test_balance_changes_the_split_and_not_the_product(model, context):
    name = "model.layers.0.mlp.gate_proj"
    A1, B1 = make_plan(model, context, rank=4, balance="equal").factors[name]
    A2, B2 = make_plan(model, context, rank=4, balance="sigma").factors[name]
    assert torch.allclose(B1 @ A1, B2 @ A2, atol=1e-6)
    assert torch.allclose(A1.norm(dim=1), B1.norm(dim=0), rtol=1e-5)
    assert not torch.allclose(A2.norm(dim=1), B2.norm(dim=0), rtol=1e-2)


@pytest.mark.parametrize("second", ["kpm", "lora"])
def test_a_model_that_was_attached_to_is_refused_until_it_is_unloaded(model, context, second):
    """The caller's own variable is no PeftModel, and its layers are PEFT's all the same."""
    before = logits(model)
    first = make_plan(model, context, rank=4)
    other = first if second == "kpm" else make_plan(model, context.layers, mode="lora", rank=4)
    wrapped = attach(model, first)
    with pytest.raises(AdapterError, match=r"carries an adapter already.*q_proj.*unload"):
        attach(model, other)
    perturb(wrapped)
    assert torch.equal(logits(attach(wrapped.unload(), other)), before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["kpm", "lora"])
def test_the_mode_of_the_model_is_kept(model, context, mode, training):
    plan = make_plan(model, context if mode == "kpm" else context.layers, mode=mode, rank=4, lora_dropout=0.5)
    wrapped = attach(model.train(training), plan)
    assert {module.training for module in wrapped.modules()} == {training}


class Weighing(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.weights_proj, self.inner = torch.nn.Linear(48, 48, bias=False), inner

    def forward(self, x):
        return self.inner(self.weights_proj(x))


def test_a_layer_whose_name_begins_with_weight_is_restored(model, tokenizer, texts, tmp_path):
    model.model.layers[1].mlp = Weighing(model.model.layers[1].mlp)
    plan = make_plan(model, collect(model, tokenizer, texts[:8], target_modules=["weights_proj"]), rank=4)
    wrapped = attach(model, plan)
    perturb(wrapped)
    kept = {name: p.clone() for name, p in wrapped.named_parameters() if ".default." in name}
    wrapped.save_pretrained(str(tmp_path))
    perturb(wrapped, seed=1)
    wrapped.load_adapter(str(tmp_path), "default")
    assert len(kept) == 2
    assert all(torch.equal(p, kept[name]) for name, p in wrapped.named_parameters() if name in kept)


def test_a_tied_head_is_not_taken_out_of_the_embeddings(tokenizer, texts):
    from conftest import llama

    model = llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    before = logits(model)
    plan = make_plan(model, collect(model, tokenizer, texts[:8], target_modules=["lm_head", "up_proj"]), rank=4)
    with pytest.raises(TargetError, match=r"shares its weight.*lm_head.*embed_tokens.*base: intact"):
        attach(model, plan, base="residual")
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(attach(model, plan)), before)


@pytest.mark.parametrize(
    "stored",
    [
        lambda W: (W * 10).to(torch.int8),  # codes of 8 bits, whose scales lie elsewhere
        lambda W: torch.zeros((W.numel() + 1) // 2, 1, dtype=torch.uint8),  # packed codes of 4 bits
    ],
)
def test_codes_of_a_quantised_layer_are_not_taken_for_its_weight(model, context, stored):
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    layer.weight = torch.nn.Parameter(stored(layer.weight.detach()), requires_grad=False)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj.*float matrix.*load the model unquantised"):
        make_plan(model, context, rank=4)


def test_an_export_of_a_model_with_new_tokens_names_what_is_missing(model, context, tmp_path):
    model.resize_token_embeddings(300)
    wrapped = attach(model, make_plan(model, context, rank=4))
    with pytest.raises(AdapterError, match=r"another vocabulary.*259 rows, 300 trained.*fresh_base"):
        export(wrapped, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("mode", ["kpm", "lora"])
def test_a_resized_vocabulary_is_saved_with_the_adapter(model, pico, context, tmp_path, mode):
    from corda.targets import find_targets

    model.resize_token_embeddings(264)
    reference = logits(model)
    made = (
        make_plan(model, context, mode=mode, rank=4)
        if mode == "kpm"
        else make_plan(model, find_targets(model), mode=mode, rank=4)
    )
    wrapped = attach(model, made)
    perturb(wrapped)
    wrapped.save_pretrained(str(tmp_path / "a"))
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {key.rpartition("model.")[2] for key in saved if ".lora_" not in key} == {
        "embed_tokens.weight",
        "lm_head.weight",
    }
    fresh = pristine(pico)
    fresh.resize_token_embeddings(264)
    reloaded = PeftModel.from_pretrained(fresh, str(tmp_path / "a")).eval()
    assert relative_difference(logits(reloaded), logits(wrapped.eval())) < 1e-5
    assert relative_difference(logits(wrapped), reference) > 1e-3


@pytest.mark.parametrize(
    ("mode", "base"), [("kpm", "intact"), ("ipm", "intact"), ("kpm", "residual"), ("contrast", None)]
)
def test_a_copy_of_the_adapter_is_the_reference_that_trl_makes_of_it(model, tokenizer, texts, mode, base):
    """As DPOTrainer does: an adapter "ref" with the default one's config, its factors copied parameter by parameter."""
    reference = logits(model)
    context = collect(model, tokenizer, texts, learn=texts[::2])
    plan = make_plan(model, context, rank=4, mode=mode)
    adapted = attach(model, plan) if base is None else attach(model, plan, base=base)
    perturb(adapted)
    trained = logits(adapted.eval())
    adapted.add_adapter("ref", adapted.peft_config["default"])
    for name, parameter in adapted.named_parameters():
        if ".default." in name:
            adapted.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    adapted.set_adapter("ref")
    assert relative_difference(logits(adapted), trained) < 1e-6
    adapted.set_adapter("default")
    assert torch.equal(logits(adapted), trained)
    assert relative_difference(trained, reference) > 1e-3
