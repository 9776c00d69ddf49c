"""Adapters that PEFT itself made in the papers' form become plain ones on the original base."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import corda
from corda.adapter import attach, relative_difference
from corda.context.collect import collect
from corda.errors import AdapterError
from corda.options import ExportOptions, ModelOptions
from corda.plan.make import make_plan

IDS = torch.tensor([[5, 9, 100, 33, 7, 250, 41], [77, 3, 8, 160, 161, 12, 90]])
PLAIN = {"lora_alpha": 8}
PATTERNS = {
    "lora_alpha": 6,
    "use_rslora": True,
    "rank_pattern": {"model.layers.1.mlp.up_proj": 6, "k_proj": 2},
    "alpha_pattern": {"k_proj": 3},
}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def base(pico, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(pico, dtype=dtype).eval()


def move(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)


def pissa(pico, folder, settings, dtype=torch.float32):
    """Train PiSSA in PEFT and keep what its users keep: initial and trained adapter, residual base. -> logits."""
    config = LoraConfig(r=4, init_lora_weights="pissa", target_modules=["k_proj", "up_proj", "down_proj"], **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base(pico, dtype), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(folder / "initial"))
    move(model)
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(str(folder / "trained"))
    expected = logits(model)
    model.unload().save_pretrained(folder / "residual")
    return expected


def convert(pico, folder, **arguments):
    options = ExportOptions(**arguments.pop("options", {}))
    model = ModelOptions(model_name_or_path=str(pico), device="cpu", dtype=arguments.pop("dtype", "auto"))
    if "residual_base" in arguments:
        arguments["residual_base"] = str(arguments["residual_base"])
    return corda.convert(folder / "trained", model, folder / "out", options, **arguments)


def reloaded(pico, folder):
    return PeftModel.from_pretrained(base(pico), str(folder / "out")).eval()


@pytest.mark.parametrize("given", ["initial", "residual_base"])
@pytest.mark.parametrize("settings", [PLAIN, PATTERNS])
def test_pissa_made_by_peft(pico, tmp_path, given, settings):
    expected = pissa(pico, tmp_path, settings)
    assert relative_difference(expected, logits(base(pico))) > 0.05
    done = convert(pico, tmp_path, **{given: tmp_path / given.removesuffix("_base")})
    assert done.max_relative_logit_difference <= done.tolerance == 1e-5
    assert relative_difference(logits(reloaded(pico, tmp_path)), expected) < 1e-5
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["base_model_name_or_path"] == str(pico)
    assert not config["use_rslora"]
    ranks = {name: A.shape[0] for name, A in load_file(tmp_path / "out" / "adapter_model.safetensors").items()}
    up = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    assert ranks[up] == (8 if settings is PLAIN else 12)
    assert (done.low_rank_fit is None) is (given == "initial")
    if done.low_rank_fit:
        assert done.low_rank_fit.lost_energy < 1e-9


@pytest.mark.parametrize("given", ["initial", "residual_base"])
def test_corda_in_pefts_own_files(pico, tokenizer, texts, tmp_path, given):
    plan = make_plan(base(pico), collect(base(pico), tokenizer, texts), mode="ipm", rank=4, balance="sigma")
    model = attach(base(pico), plan, base="residual")
    move(model)
    expected = logits(model)
    model.peft_config["default"] = replace(model.peft_config["default"], init_lora_weights="corda")
    PeftModel.save_pretrained(model, str(tmp_path / "trained"), selected_adapters=["default"])
    PeftModel.save_pretrained(model, str(tmp_path), selected_adapters=["initial"])
    model.unload().save_pretrained(tmp_path / "residual")
    convert(pico, tmp_path, **{given: tmp_path / given.removesuffix("_base")}, options={"layout": "uniform"})
    assert relative_difference(logits(reloaded(pico, tmp_path)), expected) < 1e-5


def test_a_residual_base_in_16_bits_fits_within_its_rounding(pico, tmp_path):
    half = base(pico, torch.bfloat16)
    half.save_pretrained(tmp_path / "base")
    shutil.copy(pico / "tokenizer.json", tmp_path / "base")
    shutil.copy(pico / "tokenizer_config.json", tmp_path / "base")
    expected = pissa(tmp_path / "base", tmp_path, PLAIN, torch.bfloat16)
    done = convert(tmp_path / "base", tmp_path, residual_base=tmp_path / "residual", dtype="bfloat16")
    assert 1e-8 < done.low_rank_fit.lost_energy < 1e-2
    assert done.max_relative_logit_difference <= done.tolerance
    found = PeftModel.from_pretrained(base(tmp_path / "base", torch.bfloat16), str(tmp_path / "out")).eval()
    assert relative_difference(logits(found), expected) <= done.tolerance


def test_a_residual_base_finer_than_the_base_is_read_as_it_is_stored(pico, tmp_path):
    """A bf16 base whose residual was saved in fp32: rounding it first would hide what is of low rank."""
    half = base(pico, torch.bfloat16)
    half.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pico / name, tmp_path / "base")
    expected = pissa(tmp_path / "base", tmp_path, PLAIN)
    done = convert(tmp_path / "base", tmp_path, residual_base=tmp_path / "residual", dtype="bfloat16")
    assert done.low_rank_fit.lost_energy < 1e-9
    found = PeftModel.from_pretrained(base(tmp_path / "base"), str(tmp_path / "out")).eval()
    assert relative_difference(logits(found), expected) < 1e-5


def test_compressed_merged_and_without_a_start(pico, tmp_path):
    expected = pissa(pico, tmp_path, PLAIN)
    done = convert(pico, tmp_path, initial=tmp_path / "initial", options={"rank": 3})
    assert done.rank == 3
    assert 0 < done.compression.lost_energy < 1
    measured = relative_difference(logits(reloaded(pico, tmp_path)), expected)
    assert 0.1 * measured < done.compression.max_relative_logit_difference < 10 * measured
    shutil.rmtree(tmp_path / "out")
    convert(pico, tmp_path, initial=tmp_path / "initial", options={"format": "merged"})
    assert relative_difference(logits(base(tmp_path / "out")), expected) < 1e-5
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "trained")
    model = get_peft_model(base(pico), LoraConfig(r=3, target_modules=["q_proj"], rank_pattern={"layers.1": 2}))
    move(model)
    model.save_pretrained(str(tmp_path / "trained"))
    convert(pico, tmp_path, options={"layout": "uniform"})
    assert relative_difference(logits(reloaded(pico, tmp_path)), logits(model)) < 1e-5


def test_what_cannot_be_converted_says_why(pico, tmp_path):
    pissa(pico, tmp_path, PLAIN)
    with pytest.raises(AdapterError, match=r"neither is given.*'pissa'.*--initial.*--residual-base"):
        convert(pico, tmp_path)
    with pytest.raises(AdapterError, match="not both"):
        convert(pico, tmp_path, initial=tmp_path / "initial", residual_base=tmp_path / "residual")
    with pytest.raises(AdapterError, match="written as lora or merged"):
        convert(pico, tmp_path, initial=tmp_path / "initial", options={"format": "residual"})
    with pytest.raises(AdapterError, match=r"cannot be read.*adapter_model\.safetensors"):
        convert(pico, tmp_path, initial=tmp_path / "nowhere")
    for name, content in (("adapter_model.safetensors", b"cut"), ("adapter_config.json", b"[1, 2]")):
        shutil.copytree(tmp_path / "initial", tmp_path / name)
        (tmp_path / name / name).write_bytes(content)
        with pytest.raises(AdapterError, match=r"cannot be read.*as PEFT saves them"):
            convert(pico, tmp_path, initial=tmp_path / name)
    other = get_peft_model(base(pico), LoraConfig(r=3, target_modules=["k_proj"]))
    other.save_pretrained(str(tmp_path / "other"))
    with pytest.raises(AdapterError, match=r"not that of the trained one.*down_proj"):
        convert(pico, tmp_path, initial=tmp_path / "other")
    assert not (tmp_path / "out").exists()


def spoil(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_residual_base_of_something_else(pico, tmp_path):
    pissa(pico, tmp_path, PLAIN)
    name = "model.layers.0.mlp.up_proj.weight"
    original = load_file(tmp_path / "residual" / "model.safetensors")

    def noise(state):
        state[name] = original[name] + 0.01 * torch.randn_like(original[name])

    spoil(tmp_path / "residual", noise)
    with pytest.raises(AdapterError, match=r"more than a matrix of low rank.*layers\.0\.mlp\.up_proj.*% of the diff"):
        convert(pico, tmp_path, residual_base=tmp_path / "residual")

    def norm(state):
        state.update(original)
        state["model.norm.weight"] = 2 * original["model.norm.weight"]

    spoil(tmp_path / "residual", norm)
    with pytest.raises(AdapterError, match=r"not one of this base.*model\.norm\.weight.*has no adapter"):
        convert(pico, tmp_path, residual_base=tmp_path / "residual")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, r"pair of factors per layer.*lora_magnitude"),
        ({"bias": "all"}, "lora_A and lora_B of linear layers"),
        ({"modules_to_save": ["lm_head"]}, "lora_A and lora_B of linear layers"),
    ],
)
def test_more_than_two_factors_per_layer_is_refused(pico, tmp_path, settings, message):
    if settings.get("bias"):
        model = base(pico)
        model.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(48))
    else:
        model = base(pico)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **settings)).save_pretrained(
        str(tmp_path / "trained")
    )
    with pytest.raises(AdapterError, match=message):
        convert(pico, tmp_path)


def test_other_methods_and_other_models_are_refused(pico, tmp_path):
    from peft import LoHaConfig

    get_peft_model(base(pico), LoHaConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path / "trained"))
    with pytest.raises(AdapterError, match=r"not a LoRA.*LOHA"):
        convert(pico, tmp_path)
    shutil.rmtree(tmp_path / "trained")
    get_peft_model(base(pico), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path / "trained"))
    state = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    moved = {key.replace("layers.1", "layers.7"): tensor for key, tensor in state.items()}
    save_file(moved, tmp_path / "trained" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"not in the base model.*layers\.7"):
        convert(pico, tmp_path)
