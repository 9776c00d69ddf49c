"""4-bit bases: collected and decomposed in full precision, attached, trained, resumed."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("bitsandbytes")

import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from corda import pipeline
from corda.adapter import relative_difference
from corda.bases import Bases
from corda.errors import RecipeError
from corda.inputs import Inputs
from corda.models import keep_exact
from corda.reading import parse_recipe
from corda.report.table import plan_table

IDS = torch.tensor([[5, 9, 100, 33, 7, 250, 41], [77, 3, 8, 160, 161, 12, 90]])


def four_bit(raw_recipe, **adapter):
    raw_recipe["model"]["load_in_4bit"] = True
    raw_recipe["adapter"] |= adapter
    return parse_recipe(raw_recipe)


def test_an_export_in_full_precision_is_not_loaded_onto_the_gpu(raw_recipe):
    """What is there in 4 bits may not fit in 16; a LoRA for the 4-bit base itself needs no such base."""
    for given, device in (({}, "cpu"), ({"base": "intact"}, "cuda")):
        raw = copy.deepcopy(raw_recipe)
        raw["model"] |= {"device": "cuda", "dtype": "bfloat16"}
        inputs = Inputs(four_bit(raw, mode="kpm", **given))
        options = Bases(inputs).for_export()
        assert (options.device, options.dtype) == (device, "bfloat16")
        assert options.load_in_4bit is (device == "cuda")


@pytest.mark.parametrize(
    ("mode", "base", "correction", "rounds"),
    [
        ("ipm", None, "none", 1),
        ("ipm", None, "fit", 3),
        ("kpm", None, "frozen", 2),
        ("kpm", "intact", "frozen", 1),
        ("kpm", "intact", "none", 1),
        ("dual", None, "fit", 2),
        ("dual", "intact", "frozen", 1),
        ("contrast", None, "none", 1),
        ("contrast", None, "frozen", 1),
        ("lora", None, "none", 1),
    ],
)
def test_a_run_on_a_4bit_base(raw_recipe, mode, base, correction, rounds):
    recipe = four_bit(raw_recipe, mode=mode, base=base, correction=correction, correction_rounds=rounds)
    results = pipeline.run(recipe)
    before, after = (results["scores"][k]["sums/answer_loss"]["value"] for k in ("before", "after"))
    assert after < before
    assert results["export"]["max_relative_logit_difference"] <= 1e-5
    if mode == "lora":
        assert results["plan"]["quantisation"] is None
        return
    intact = base == "intact" or mode == "contrast"
    extra = 4 if intact and correction == "frozen" else 0
    assert results["export"]["rank"] == (4 if mode == "contrast" else 8) + extra
    errors = results["plan"]["quantisation"]
    assert 0 < errors["output_plain"] < 1
    if correction == "none" and intact:
        assert errors["output_ratio"] == 1
        assert results["step0"]["max_relative_logit_difference"] == 0
    else:
        assert errors["output_ratio"] < 0.9
    page = (recipe.output_dir / "report.html").read_text(encoding="utf-8")
    assert "Q(W): output error" in page
    first = results["plan"]["layers"][0]["quantised"]
    assert f"{100 * first['output_start'] / first['output_norm']:.3g} %" in page
    console = Console(width=200, record=True)
    console.print(plan_table(results["plan"]))
    text = console.export_text()
    assert f"{errors['output_ratio']:.3g} of plain quantisation's" in text
    assert f"{100 * first['weight_plain'] / first['weight_norm']:.2g}" in text


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def exported(raw_recipe, form, output, **more):
    """The run's export in that form, what was trained, and the folder."""
    raw_recipe["export"] = {"format": form, "output": str(output), **more}
    with pipeline.opened(parse_recipe(raw_recipe)) as stages:
        facts = stages.exported()
        live = logits(stages.tuned())
    return facts, live


@pytest.mark.parametrize("stored", [False, True])
def test_residual_and_merged_exports_of_a_requantised_base(raw_recipe, pico, tmp_path, stored):
    raw_recipe["evaluation"]["tasks"] = {}
    raw_recipe["model"]["load_in_4bit"] = not stored
    raw_recipe["adapter"] |= {"correction": "frozen", "correction_rank": 2, "correction_rounds": 2}
    if stored:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        packed = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32, quantization_config=config)
        packed.save_pretrained(tmp_path / "packed")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "packed" / name).write_bytes((pico / name).read_bytes())
        raw_recipe["model"]["model_name_or_path"] = str(tmp_path / "packed")
    facts, live = exported(raw_recipe, "residual", tmp_path / "residual")
    assert facts["dtype"] == "nf4"
    assert facts["rank"] == 4 + 2
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "residual", dtype=torch.float32)
    keep_exact(base)
    assert base.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    reloaded = PeftModel.from_pretrained(base, str(tmp_path / "residual" / "adapter"))
    assert relative_difference(logits(reloaded), live) <= 1e-5

    facts, _ = exported(raw_recipe, "merged", tmp_path / "merged")
    assert facts["notes"][0].startswith("the weights are de-quantised" if stored else "the weights are those in full")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert getattr(merged.config, "quantization_config", None) is None
    assert facts["update_kept"] == pytest.approx(1, abs=1e-3)
    assert 0 < facts["from_trained"] < 1

    exported(raw_recipe, "lora", tmp_path / "lora")
    source = AutoModelForCausalLM.from_pretrained(raw_recipe["model"]["model_name_or_path"], dtype=torch.float32)
    keep_exact(source)
    plain = PeftModel.from_pretrained(source, str(tmp_path / "lora"))
    assert relative_difference(logits(plain), logits(merged)) < 1e-5

    # What compression costs is measured apart from the 4 bits that the trained model computes with.
    facts, _ = exported(raw_recipe, "lora", tmp_path / "lossless", rank=10)
    assert facts["compression"]["lost_energy"] < 1e-9
    assert facts["compression"]["max_relative_logit_difference"] < 1e-4 < facts["from_trained"]


@pytest.mark.parametrize("mode", ["kpm", "lora"])
def test_merged_export_of_an_intact_4bit_base_leaves_the_correction_out(raw_recipe, pico, tmp_path, mode):
    raw_recipe["evaluation"]["tasks"] = {}
    raw_recipe["model"]["load_in_4bit"] = True
    raw_recipe["adapter"] |= {"mode": mode, "base": "intact"} | ({"correction": "frozen"} if mode == "kpm" else {})
    raw_recipe["training"]["learning_rate"] = 1e-6  # next to nothing learned: what is left is the base
    exported(raw_recipe, "merged", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    full = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32)
    assert 0 < relative_difference(logits(merged), logits(full)) < 1e-2


def test_an_intact_4bit_base_has_no_residual_export(raw_recipe):
    recipe = four_bit(raw_recipe, mode="ipm", base="intact")
    recipe = recipe.model_copy(update={"export": recipe.export.model_copy(update={"format": "residual"})})
    with pytest.raises(RecipeError, match="an intact 4-bit base has no residual form"):
        pipeline.run(recipe)


def test_a_frozen_correction_counts_in_the_rank_of_a_residual_export(raw_recipe):
    raw_recipe["export"] = {"format": "residual", "max_rank": 8}
    recipe = four_bit(raw_recipe, mode="ipm", correction="frozen", correction_rank=5)
    with pytest.raises(RecipeError, match=r"larger rank than export\.max_rank"):
        pipeline.run(recipe)
