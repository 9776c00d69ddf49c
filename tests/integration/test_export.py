"""The export stage of a run in every form, and the verbs `export` and `convert` as a user meets them."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from corda import artifact, cli, pipeline
from corda.adapter import relative_difference
from corda.errors import RecipeError, ResourceError
from corda.exporting import hub
from corda.reading import parse_recipe

IDS = torch.tensor([[5, 9, 100, 33, 7, 250, 41], [77, 3, 8, 160, 161, 12, 90]])


@pytest.fixture
def corda(monkeypatch, capsys):
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["corda", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as done:
            code = int(done.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def raw_recipe(raw_recipe):
    """Nothing but what an export needs."""
    raw_recipe["evaluation"]["tasks"] = {}
    raw_recipe["training"]["max_steps"] = 2
    return raw_recipe


@pytest.fixture
def written(monkeypatch):
    """Formats that were written, in order."""
    calls: list[str] = []
    original = pipeline.exporting.write_checked

    def counted(work, folder, options, **rest):
        calls.append(options.format)
        return original(work, folder, options, **rest)

    monkeypatch.setattr(pipeline.exporting, "write_checked", counted)
    return calls


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def test_one_training_leaves_in_every_form(corda, raw_recipe, write_recipe, pico, tmp_path, written):
    raw_recipe["adapter"] |= {"use_rslora": True, "lora_alpha": 3.0}
    path, run = write_recipe(raw_recipe), tmp_path / "run"
    code, out, _ = corda("export", path, "--json")
    assert code == 0
    assert json.loads(out)["path"] == str(run / "adapter")
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico), str(run / "adapter")))

    code, out, _ = corda("export", path, "--format", "merged", "--json")
    assert code == 0
    done = json.loads(out)
    assert (done["format"], done["path"], done["rank"]) == ("merged", str(run / "merged"), None)
    assert relative_difference(logits(AutoModelForCausalLM.from_pretrained(run / "merged")), expected) < 1e-5
    assert AutoTokenizer.from_pretrained(run / "merged")("a")["input_ids"]
    assert "library_name: transformers" in (run / "merged" / "README.md").read_text()

    assert corda("export", path, "--format", "residual")[0] == 0
    base = AutoModelForCausalLM.from_pretrained(run / "residual")
    loaded = PeftModel.from_pretrained(base, str(run / "residual" / "adapter"))
    assert relative_difference(logits(loaded), expected) < 1e-5
    assert 'subfolder="adapter"' in (run / "residual" / "README.md").read_text()

    short = ("--rank", 3, "--layout", "uniform", "--max-rank", 8, "-o", tmp_path / "small one")
    code, out, _ = corda("export", path, *short, "--json")
    assert code == 0
    lost = json.loads(out)["compression"]
    assert 0 < lost["lost_energy"] <= lost["worst_lost_energy"] < 1
    assert lost["worst_layer"] in lost["lost_energy_of_layers"]
    assert lost["records"] == 16
    assert lost["max_relative_logit_difference"] > 0
    config = json.loads((tmp_path / "small one" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 3, False)
    assert "best approximation of rank 3" in (tmp_path / "small one" / "README.md").read_text()
    code, out, _ = corda("export", path, *short)
    assert "worst_lost_energy" in out
    assert "lost_energy_of_layers" not in out
    assert written == ["lora", "merged", "residual", "lora"]

    for form in ("lora", "merged", "residual"):
        assert corda("export", path, "--format", form)[0] == 0
    assert len(written) == 4  # all of them are still there


@pytest.mark.parametrize(
    "form", [pytest.param("merged", marks=pytest.mark.slow), pytest.param("residual", marks=pytest.mark.slow), "lora"]
)
def test_results_tell_of_the_form(raw_recipe, tmp_path, written, form):
    raw_recipe["export"] = {"format": form} | ({"rank": 2} if form == "lora" else {})
    results = pipeline.run(parse_recipe(raw_recipe))
    found = results["export"]
    assert found["format"] == form
    assert found["max_relative_logit_difference"] <= found["tolerance"] == 1e-5
    assert (found["compression"] is not None) is (form == "lora")
    assert "costs" not in found
    assert results["timing"]["export"] > 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"<td>{form}</td>" in page
    assert ("lost to export.rank 2" in page) is (form == "lora")
    assert pipeline.run(parse_recipe(raw_recipe))["export"] == found
    assert len(written) == 1


@pytest.mark.slow
def test_a_damaged_export_is_written_again(raw_recipe, tmp_path, written):
    recipe = parse_recipe(raw_recipe)
    for _ in range(2):
        with pipeline.opened(recipe) as stages:
            stages.exported()
        (tmp_path / "run" / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
    assert len(written) == 2


def test_a_rank_that_no_server_takes_is_found_before_training(raw_recipe, monkeypatch, written):
    raw_recipe["export"] = {"layout": "uniform", "max_rank": 4}
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.models, "load", lambda *_: pytest.fail("a model was loaded"))
        with pytest.raises(RecipeError, match=r"rank 8, twice the trained rank.*set export\.rank to 4"):
            pipeline.run(parse_recipe(raw_recipe))
    raw_recipe["adapter"] |= {"allocation": "dynamic", "compactness_scale": "unit"}
    monkeypatch.setattr(pipeline.training, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(RecipeError, match=r"twice the trained rank.*at most 4"):
        pipeline.run(parse_recipe(raw_recipe))


def test_an_upload_needs_a_token_and_happens_once(raw_recipe, tmp_path, monkeypatch, written):
    raw_recipe["export"] = {"push_to_hub": "me/adapter"}
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(ResourceError, match=r"cannot be uploaded.*no access token"):
        pipeline.run(parse_recipe(raw_recipe))
    assert not (tmp_path / "run").exists()
    raw_recipe["export"] = {}
    assert pipeline.run(parse_recipe(raw_recipe))["export"]["pushed_to"] is None
    monkeypatch.setattr(hub, "get_token", lambda: "a token")
    pushed: list[str] = []
    monkeypatch.setattr(pipeline.exporting.hub, "push", lambda folder, repository, *_, **__: pushed.append(repository))
    raw_recipe["export"] = {"push_to_hub": "me/adapter"}
    for _ in range(2):
        assert pipeline.run(parse_recipe(raw_recipe))["export"]["pushed_to"] == "me/adapter"
    assert pushed == ["me/adapter"]
    assert written == ["lora"]


def test_convert(corda, pico, tmp_path):
    config = LoraConfig(r=3, init_lora_weights="pissa", target_modules=["up_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(pico), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "initial"))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05
    model.save_pretrained(str(tmp_path / "trained"))
    expected = logits(model)
    model.unload().save_pretrained(tmp_path / "residual")
    common = ("convert", tmp_path / "trained", "--base", pico)
    code, out, _ = corda(*common, "--initial", tmp_path / "initial", "-o", tmp_path / "one", "--json")
    assert code == 0
    assert json.loads(out)["rank"] == 6
    code, out, _ = corda(
        *common, "--residual-base", tmp_path / "residual", "-o", tmp_path / "two", "--format", "merged"
    )
    assert code == 0
    assert "low_rank_fit" in out
    assert "lost_energy_of_layers" not in out
    one = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico), str(tmp_path / "one"))
    two = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert relative_difference(logits(one), expected) < 1e-5
    assert relative_difference(logits(two), expected) < 1e-5
    assert artifact.read(tmp_path / "one", "export").manifest["export"]["format"] == "lora"
    for arguments, message in (
        ((*common, "--initial", tmp_path / "gone", "-o", tmp_path / "x"), "adapter cannot be read"),
        ((*common, "--initial", tmp_path / "initial", "-o", tmp_path / "x", "--max-rank", 4), "set export.rank to 4"),
        ((*common, "-o", tmp_path / "x", "--set", "export.fromat=lora"), "did you mean 'format'"),
        (("convert", tmp_path / "trained", "--base", tmp_path / "gone", "-o", tmp_path / "x"), "does not exist"),
    ):
        code, out, err = corda(*arguments)
        assert code == 2
        assert message in err
        assert "Traceback" not in err
    assert not (tmp_path / "x").exists()
