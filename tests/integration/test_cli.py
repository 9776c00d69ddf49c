"""The command line as a user meets it: verbs, JSON, exit codes, one-paragraph errors."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import write_jsonl

from corda import pipeline
from corda.errors import CordaError


def test_verbs_one_by_one_and_then_run(corda, raw_recipe, write_recipe, tmp_path):
    path = write_recipe(raw_recipe)
    code, out, _ = corda("run", path, "--dry-run", "--json")
    assert code == 0
    checked = json.loads(out)
    assert checked["layers"] == 14
    assert not (tmp_path / "run").exists()
    code, out, _ = corda("collect", path, "--json")
    assert code == 0
    assert json.loads(out)["distinct_inputs"] == 8
    assert set(json.loads(out)["tokens"]) == {"keep", "held_out"}
    assert (
        json.loads(out)["tokens"]["keep"]
        == json.loads(out)["kept"]["collect_again_tokens"] - json.loads(out)["tokens"]["held_out"]
    )
    assert json.loads(out)["kept"]["bytes"] > 8 * 48 * 48 * 2
    assert json.loads(out)["kept"]["collect_again_tokens"] > 100
    code, out, _ = corda("plan", path, "--json")
    assert json.loads(out)["trainable_parameters"] == checked["trainable_parameters"]
    code, out, _ = corda("plan", path)
    assert "energy %" in out
    assert "…" not in out
    assert "down_proj" in out
    code, out, _ = corda("train", path, "--json")
    assert json.loads(out)["step0"]["max_relative_logit_difference"] == 0
    code, out, _ = corda("eval", path, "--json")
    assert set(json.loads(out)) == {"before", "after"}
    code, out, _ = corda("export", path, "--json")
    assert json.loads(out)["format"] == "lora"
    code, out, _ = corda("run", path, "--json")
    assert code == 0
    assert json.loads(out)["plan"]["mode"] == "kpm"
    code, out, _ = corda("run", path)
    assert "Held-out scores" in out
    for verb in ("export", "eval"):
        code, _, err = corda(verb, path, "--set", "training.max_steps=1")
        assert (code, "trained with other settings" in err) == (2, True)
    assert "report.html" in out
    code, out, _ = corda("report", tmp_path / "run", "-o", tmp_path / "page.html")
    assert code == 0
    assert (tmp_path / "page.html").is_file()


def test_run_says_what_its_stages_warn_of(corda, raw_recipe, write_recipe):
    raw_recipe["context"] = {"samples": 1}
    code, out, _ = corda("run", write_recipe(raw_recipe))
    assert code == 0
    assert out.count("few calibration tokens") == 1


def test_a_plan_is_looked_at_edited_by_hand_and_used(corda, raw_recipe, write_recipe, pico, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    raw_recipe["context"] = {"samples": 6, "rounds": 3, "selection": "dynamic"}
    raw_recipe["adapter"] |= {"allocation": "dynamic", "compactness_scale": "unit"}
    path, run, ranks = write_recipe(raw_recipe), tmp_path / "run", tmp_path / "kept" / "ranks.yaml"
    code, _, err = corda("inspect", "plan", run)
    assert code == 2
    assert "there is no plan here" in err
    code, out, _ = corda("plan", path, "--save-ranks", ranks, "--json")
    assert code == 0
    made = {layer["name"]: layer for layer in json.loads(out)["layers"]}
    for where in (path, run):
        code, out, _ = corda("inspect", "plan", where)
        assert code == 0
        assert "Rank, module type by block" in out
        assert "Scores of the candidates" in out
        assert max(map(len, out.splitlines())) <= 80
    code, out, _ = corda("inspect", "plan", run, "--json")
    assert json.loads(out)["layers"] == list(made.values())
    code, out, _ = corda("inspect", "plan", run, "--html", "--json")
    assert json.loads(out) == {"page": str(run / "plan.html")}
    assert "compactness0" in (run / "plan.html").read_text()
    code, out, _ = corda("inspect", "plan", run, "-o", tmp_path / "other.html")
    assert (tmp_path / "other.html").is_file()
    code, out, _ = corda("inspect", "context", path, "--json")
    assert [one["side"] for one in json.loads(out)["inputs"]] == [""] * 8 + ["held_out"] * 8
    code, out, _ = corda("inspect", "context", run)
    assert "eff. rank" in out
    assert "covariances kept on disk, written in" in " ".join(out.split())

    code, _, err = corda("plan", path, "--save-ranks", ranks)
    assert code == 2
    assert "exists already" in err
    name = "model.layers.1.mlp.up_proj"
    edited = [line for line in ranks.read_text().splitlines() if not line.startswith(name)]
    ranks.write_text("\n".join([*edited, f"{name}: {{rank: 13, round: 1}}"]))
    code, out, _ = corda("plan", path, "--set", f"adapter.ranks={ranks}")
    assert code == 0
    assert "Warning: adapter.ranks changed 1 of 14 layers:" in out
    code, out, _ = corda("run", path, "--set", f"adapter.ranks={ranks}", "--json")
    results = json.loads(out)
    assert {layer["name"]: layer["rank"] for layer in results["plan"]["layers"]} == {
        layer: 13 if layer == name else facts["rank"] for layer, facts in made.items()
    }
    assert "ranks" in results["recipe"]["adapter"]
    assert "1 of them edited by hand" in (run / "adapter" / "README.md").read_text()
    code, out, _ = corda("inspect", "adapter", run / "adapter", "--json")
    assert code == 0
    for layer in json.loads(out)["layers"]:
        assert layer["rank"] == 2 * (13 if layer["name"] == name else made[layer["name"]]["rank"])
        assert layer["norm"] > 0
    code, out, _ = corda("inspect", "adapter", run / "adapter")
    assert "‖s B A‖" in out
    assert corda("inspect", "adapter", run)[0] == 2


def test_a_plan_changed_in_place_is_an_error_that_shows_the_way(corda, raw_recipe, write_recipe, tmp_path):
    path, file = write_recipe(raw_recipe), tmp_path / "run" / "plan" / "plan.json"
    assert corda("plan", path)[0] == 0
    file.write_text(file.read_text().replace('"rank": 4', '"rank": 5', 1))
    for call in (["inspect", "plan", tmp_path / "run"], ["train", path]):
        code, _, err = corda(*call)
        assert code == 2
        assert "corrupted artifact: plan.json was changed" in err
        assert "`corda plan RECIPE --save-ranks FILE` writes and set adapter.ranks: FILE" in err


def without_chat_template(pico, tmp_path):
    folder = shutil.copytree(pico, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter.rnk=3"], "did you mean 'rank'"),
        (["adapter.rank=three"], "adapter.rank"),
        (["training.max_length=9"], "set by data.max_length"),
        (["training.lr_scheduler_type=cosin"], "the trainer refuses"),
        (["adapter.lora_dropout=0.1", "adapter.base=residual"], "use base 'intact'"),
        (["model.device=gpu"], "unknown device"),
        (["data.template=chat", "model.model_name_or_path=plain"], "no chat template"),
        (["adapter.rank=30"], "larger than a layer allows"),
        (["adapter.target_modules=[nothing]"], "matches no layer"),
        (["adapter.ranks={model.layers.0.mlp.up_prj: 3}"], "did you mean 'model.layers.0.mlp.up_proj'"),
        (["adapter.ranks=gone.yaml"], "the file of ranks does not exist"),
        (["data.keep=gone.jsonl"], "does not exist"),
        (["data.keep=broken.jsonl"], "broken.jsonl, line 2"),
        (["data.keep=empty.jsonl"], "empty"),
        (["data.keep=odd.jsonl"], "fit no format"),
        (["model.model_name_or_path=/nowhere/model"], "model folder does not exist"),
        (["model.model_name_or_path=package:no_such_package"], "not installed"),
    ],
)
def test_bad_input_is_one_paragraph_and_exit_code_2(
    corda, raw_recipe, write_recipe, pico, data, tmp_path, overrides, message
):
    (data / "broken.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question"\n')
    (data / "empty.jsonl").write_text("")
    (data / "odd.jsonl").write_text('{"foo": 1}\n')
    if "model.model_name_or_path=plain" in overrides:
        overrides = [overrides[0], f"model.model_name_or_path={without_chat_template(pico, tmp_path)}"]
    path = write_recipe(raw_recipe)
    code, out, err = corda("run", path, *[part for o in overrides for part in ("--set", o)])
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert len(err.strip().split("\n\n")) == 1
    assert not (tmp_path / "run").exists()


def test_a_conversation_that_the_template_refuses_is_found_at_the_end_of_a_file(
    corda, raw_recipe, write_recipe, pico, data
):
    turn = {"role": "user", "content": "Weight of 7?"}
    good = {"messages": [turn, {"role": "assistant", "content": "7 g"}]}
    write_jsonl(data / "sorted.jsonl", [good] * 230 + [{"messages": [turn, turn, good["messages"][1]]}] * 20)
    strict = "{% if messages | length == 3 %}{{ raise_exception('roles must alternate') }}{% endif %}"
    template = (pico / "chat_template.jinja").read_text()
    folder = shutil.copytree(pico, data / "strict")
    (folder / "chat_template.jinja").write_text(strict + template)
    path = write_recipe(raw_recipe)
    asked = ["--set", "data.learn=sorted.jsonl", "--set", f"model.model_name_or_path={folder}", "--dry-run"]
    code, _, err = corda("run", path, *asked)
    assert code == 2
    assert "roles must alternate" in err


def test_records_that_are_cut_are_counted_before_anything_runs(corda, raw_recipe, write_recipe, data, monkeypatch):
    short = [{"prompt": "Weight?", "completion": "7 g"}] * 34
    answers = [{"prompt": "Weight?", "completion": "7 g and " * 20}] * 3
    prompts = [{"prompt": "What is the weight? " * 10, "completion": "7 g"}] * 3
    write_jsonl(data / "long.jsonl", short + answers + prompts)
    path = write_recipe(raw_recipe)
    asked = ["run", path, "--dry-run", "--json", "--set", "data.learn=long.jsonl", "--set"]
    code, out, _ = corda(*asked, "data.max_length=64")
    assert code == 0
    assert [one for one in json.loads(out)["warnings"] if "training records" in one] == [
        "6 of 40 training records are cut at 64 tokens (data.max_length), 3 of them before their answer: left out"
    ]
    code, out, _ = corda(*asked, "data.max_length=250")
    assert code == 0
    assert not [one for one in json.loads(out).get("warnings", []) if "training records" in one]
    write_jsonl(data / "texts.jsonl", [{"text": f"Item {i} weighs {i} g."} for i in range(40)])
    code, out, _ = corda("run", path, "--dry-run", "--json", "--set", "data.learn=texts.jsonl")
    assert code == 0
    assert [one for one in json.loads(out)["warnings"] if "no end mark" in one and "</s>" in one]

    def stopped(stages):
        raise CordaError("nothing is collected in this test")

    monkeypatch.setattr(pipeline.Stages, "context", stopped)
    code, out, err = corda("run", path, "--set", "data.learn=long.jsonl", "--set", "data.max_length=64")
    assert code == 2
    assert "nothing is collected" in err
    assert "6 of 40 training records are cut at 64 tokens" in out, "said before the first stage"


def test_a_full_disk_and_a_corrupted_artifact(corda, raw_recipe, write_recipe, tmp_path, monkeypatch):
    from collections import namedtuple

    from corda import artifact

    path = write_recipe(raw_recipe)
    with monkeypatch.context() as patch:
        patch.setattr(artifact.shutil, "disk_usage", lambda _: namedtuple("usage", "free")(1000))
        code, _, err = corda("run", path)
    assert code == 2
    assert "not enough disk space" in err
    assert not (tmp_path / "run").exists()
    assert corda("collect", path)[0] == 0
    (tmp_path / "run" / "context" / "block-0000.safetensors").write_bytes(b"x")
    code, _, err = corda("plan", path)
    assert code == 2
    assert "corrupted artifact" in err


def test_a_failed_check_is_exit_code_1(corda, raw_recipe, write_recipe):
    raw_recipe["export"] = {"tolerance": 1e-30}
    raw_recipe["adapter"]["base"] = "residual"
    code, _, err = corda("run", write_recipe(raw_recipe))
    assert code == 1
    assert "after reload" in err
    assert "Traceback" not in err


def test_nan_activations_name_the_layer_and_leave_nothing(corda, raw_recipe, write_recipe, pico, tmp_path):
    import shutil

    import torch
    from transformers import AutoModelForCausalLM

    sick = tmp_path / "sick"
    shutil.copytree(pico, sick)
    model = AutoModelForCausalLM.from_pretrained(pico)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = float("inf")
    model.save_pretrained(sick)
    raw_recipe["model"]["model_name_or_path"] = str(sick)
    code, _, err = corda("run", write_recipe(raw_recipe))
    assert code == 2
    assert "model.layers.1.self_attn.q_proj" in err
    assert not (tmp_path / "run" / "context").exists()


def test_another_runs_folder(corda, raw_recipe, write_recipe, tmp_path):
    path = write_recipe(raw_recipe)
    assert corda("collect", path)[0] == 0
    code, _, err = corda("collect", path, "--set", "adapter.mode=ipm")
    assert code == 2
    assert "belongs to another run" in err


def test_an_interrupt_says_how_to_go_on(corda, raw_recipe, write_recipe, monkeypatch):
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
    code, _, err = corda("run", write_recipe(raw_recipe))
    assert code == 130
    assert "same command again" in err


def test_usage_errors_and_version(corda):
    code, _, err = corda("rnu", "x")
    assert code == 2
    assert "rnu" in err
    code, out, _ = corda("--version")
    assert code == 0
    assert out.strip()
    assert corda("report", "/nowhere")[0] == 2


def test_an_unexpected_error_is_not_hidden(corda, raw_recipe, write_recipe, monkeypatch):
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: (_ for _ in ()).throw(ZeroDivisionError("bug")))
    with pytest.raises(ZeroDivisionError):
        corda("run", write_recipe(raw_recipe))
