"""`corda compare` on a random model: results, resuming, what diverges, what cannot be had, the page."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pytest
import torch
from conftest import WORDS, write_jsonl
from typer.testing import CliRunner

from corda import artifact, models
from corda.cli.app import app
from corda.comparing import compare as comparing
from corda.comparing.cell import _fingerprint, finished, recipe_inputs, result_path, run_cell
from corda.comparing.compare import compare, gathered
from corda.comparing.fairness import check
from corda.comparing.peft_made import build
from corda.comparing.smoke import smoke_study
from corda.comparing.study import Cell, cells, parse_study
from corda.errors import RecipeError

EVERY = ["full", "lora_frozen_a", "dora", "pissa", "milora", "eva", "lora_ga", "lora_null", "peft_corda_kpm"]
EVERY += ["peft_corda_ipm", "kpm_plus", "ipm_plus", "kpm_sigma", "contrast", "dual", "qlora", "ipm_4bit"]


def tiny(folder, methods, **more):
    raw = smoke_study(folder, methods).model_dump(mode="json")
    raw["base"]["training"]["max_steps"] = 2
    raw["learning_rates"] = [0.001, 0.03]
    raw["extensions"] = 0
    return parse_study(raw | more)


def leave_a_mark(folder):
    (folder / f"{os.getpid()}.began").touch()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished comparison of LoRA and KPM, and its study."""
    study = tiny(tmp_path_factory.mktemp("compare"), ["lora", "kpm"])
    return study, compare(study)


def test_every_cell_is_in_the_comparison_with_what_it_cost(done):
    found = done[1]
    assert [(r["method"], r["learning_rate"]) for r in found["runs"]] == [
        ("lora", 0.001),
        ("lora", 0.03),
        ("kpm", 0.001),
        ("kpm", 0.03),
    ]
    for run in found["runs"]:
        assert run["status"] == "done"
        assert run["trainable_parameters"] == found["trainable_parameters"] == 3712
        assert run["steps"] == 2
        assert len(run["curve"]["loss"]) == 2
        for side in ("before", "after"):
            assert set(run["scores"][side]["facts/answer_loss"]) == {"value", "stderr", "n"}
        assert run["timing"]["train"] > 0
        assert run["memory"]["train"] > 1e6
        assert run["provenance"]["packages"]["torch"]
    kpm = found["runs"][2]
    assert kpm["timing"]["collect"] > 0
    assert found["empty"] == []
    assert found["conclusions"]["steps"]["kpm"]["against"] == "lora"
    assert found["conclusions"]["steps"]["lora"]["seeds"]["0"]["of"] == 2
    assert "data_dir" not in json.dumps(found)


def test_all_methods_share_base_scores_and_a_method_shares_its_context(done):
    study, found = done
    before = {json.dumps(run["scores"]["before"], sort_keys=True) for run in found["runs"]}
    assert len(before) == 1
    shared = sorted(p.name for folder in (study.output_dir / "shared").iterdir() for p in folder.iterdir())
    assert shared == ["before", "context", "plan", "plan"]  # LoRA's plan holds ranks alone


def test_the_page_is_one_file_with_fronts_and_differences(done):
    study, _ = done
    page = (study.output_dir / "comparison.html").read_text()
    for text in ("Learning and forgetting", "Forgetting at equal task loss", "CorDA-KPM", "steps to reach", "front-1"):
        assert text in page
    assert 'src="http' not in page


def test_a_second_call_runs_nothing_and_says_the_same(done):
    study, found = done
    said = []
    again = compare(study, announce=said.append)
    assert said == []
    assert again["runs"] == found["runs"]
    assert again["conclusions"] == found["conclusions"]


def test_a_changed_recipe_is_run_again(done):
    study, _ = done
    raw = study.model_dump(mode="json")
    raw["base"]["training"]["max_steps"] = 1
    changed = parse_study(raw)
    assert gathered(changed)["runs"] == []
    assert len(gathered(changed)["empty"]) == 4


def test_a_run_that_diverges_is_listed(tmp_path):
    study = tiny(tmp_path, ["lora"], learning_rates=[0.001, 1e30])
    found = compare(study)
    assert [run["status"] for run in found["runs"]] == ["done", "diverged"]
    assert found["conclusions"]["diverged"] == ["lora, learning rate 1e+30, seed 0"]
    assert found["conclusions"]["best"]["lora"]["learning_rate"] == 0.001
    json.loads((study.output_dir / "comparison.json").read_text(), parse_constant=pytest.fail)


def test_the_drift_of_every_run_is_read_and_compared_with_what_was_forgotten(tmp_path):
    raw = smoke_study(tmp_path, ["lora", "kpm"]).model_dump(mode="json")
    raw["base"]["training"] |= {"max_steps": 2, "drift_meter": True}
    raw |= {"learning_rates": [0.001, 0.03], "extensions": 0, "also_against": ["kpm"]}
    found = compare(parse_study(raw))
    drifts = {(run["method"], run["learning_rate"]): run["drift"] for run in found["runs"]}
    for drift in drifts.values():
        assert all(drift[reading] > 0 for reading in ("rms", "held_out_rms", "total", "held_out"))
    assert drifts["lora", 0.03]["total"] > drifts["lora", 0.001]["total"]
    entry = found["conclusions"]["drift"]["facts/answer_loss"]["total"]
    assert entry["n"] == 4
    assert -1 <= entry["all"] <= 1
    assert entry["within"] == {}
    assert set(found["conclusions"]["also"]["kpm"]["texts/perplexity"]) == {"lora"}
    page = (parse_study(raw).output_dir / "comparison.html").read_text()
    assert "Drift and forgetting" in page
    assert "forgets more than CorDA-KPM by" in page


@pytest.mark.parametrize("name", ["pissa", "dora", "lora_null", "full"])
def test_an_adapter_that_peft_made_has_not_drifted_at_its_start(tmp_path, name):
    raw = smoke_study(tmp_path, ["lora", name]).model_dump(mode="json")
    raw["base"]["training"] |= {"max_steps": 2, "drift_meter": True}
    study = parse_study(raw)
    still, moved = (run_cell(study, Cell(name, rate, 0), device="cpu")["drift"] for rate in (1e-9, 1e-2))
    assert still["total"] < 1e-5
    assert moved["total"] > 1e-3
    assert moved["held_out"] > 1e-3


def test_eva_is_run_again_where_its_calibration_changes(tmp_path):
    raw = smoke_study(tmp_path, ["lora", "eva", "kpm"]).model_dump(mode="json")
    raw["base"]["training"]["drift_meter"] = False
    fingerprints = []
    for samples in (8, 16):
        raw["base"]["context"] = raw["base"].get("context", {}) | {"samples": samples}
        study = parse_study(raw)
        chosen = [Cell(name, 1e-3, 0) for name in ("lora", "eva", "kpm")]
        fingerprints.append([_fingerprint(study, one, recipe_inputs(study, one)) for one in chosen])
    assert [a == b for a, b in zip(*fingerprints, strict=True)] == [True, False, False]


def test_a_classifiers_head_is_counted_for_no_method(tmp_path):
    """transformers' and PEFT's methods train it alike; corda's count leaves it out."""
    raw = smoke_study(tmp_path / "study", ["lora", "lora_frozen_a", "lora_null"]).model_dump(mode="json")
    rows = [{"text": f"The {w} is {i}.", "label": i % 2} for i, w in enumerate(WORDS * 9)]
    for name, part in (("learn", rows[:40]), ("test", rows[40:])):
        write_jsonl(tmp_path / f"{name}.jsonl", part)
    write_jsonl(tmp_path / "keep.jsonl", [{"text": f"Some {w} that is to be kept."} for w in WORDS])
    base = raw["base"]
    base["model"] |= {"task": "sequence-classification", "num_labels": 2}
    base["data"] = {"data_dir": str(tmp_path), "learn": "learn.jsonl", "keep": "keep.jsonl", "max_length": 64}
    base["training"]["max_steps"] = 1
    base["evaluation"] = {
        "tasks": {
            "task": {"measures": "learn", "metrics": ["loss"], "dataset": {"dataset": "test.jsonl", "part": [0, 10]}},
            "dev": {"measures": "learn", "metrics": ["loss"], "dataset": {"dataset": "test.jsonl", "part": [10, 20]}},
            "kept": {"measures": "keep", "metrics": ["loss"], "dataset": {"dataset": "test.jsonl", "part": [20, 30]}},
        }
    }
    study = parse_study(
        raw | {"learn": "task/loss", "development": "dev/loss", "keep": ["kept/loss"], "unseen": ["kept"]}
    )
    counts = {
        name: run_cell(study, Cell(name, 1e-3, 0), device="cpu", reference=None)["trainable_parameters"]
        for name in ("lora", "lora_null")
    }
    assert counts["lora_null"] == counts["lora"] > 0


def test_what_cannot_be_had_is_listed_with_its_reason(tmp_path, monkeypatch):
    from corda.comparing import peft_made

    def refuse(*args, **kwargs):
        raise RuntimeError("needs a GPU")

    monkeypatch.setattr(peft_made, "get_peft_model", refuse)
    study = tiny(tmp_path, ["lora", "pissa"])
    result = run_cell(study, Cell("pissa", 0.001, 0), device="cpu")
    assert result["status"] == "unavailable"
    assert "needs a GPU" in result["reason"]
    monkeypatch.undo()
    runs = {(run["method"], run["status"]) for run in compare(study)["runs"]}
    assert runs == {("lora", "done"), ("pissa", "done")}  # what it lacked is there now


def test_what_peft_makes_has_the_settings_that_all_share(tmp_path):
    study = smoke_study(tmp_path, ["lora", "dora"])
    shared = {"lora_dropout": 0.25, "use_rslora": True, "lora_alpha": 6.0, "rank": 4}
    raw = study.model_dump(mode="json")
    raw["base"]["adapter"] = raw["base"].get("adapter", {}) | shared
    inputs = recipe_inputs(parse_study(raw), Cell("dora", 1e-3, 0), "cpu")
    made = build(models.load(inputs.model).model, inputs, "dora").peft_config["default"]
    assert (made.lora_dropout, made.use_rslora) == (0.25, True)
    assert made.lora_alpha / made.r**0.5 == pytest.approx(6.0 / 4**0.5)


@pytest.mark.parametrize(("key", "value"), [("pack_to", 64), ("positions", "response")])
def test_pefts_corda_on_other_tokens_is_refused(tmp_path, key, value):
    raw = smoke_study(tmp_path, ["lora", "peft_corda_kpm"]).model_dump(mode="json")
    raw["base"]["context"] |= {key: value}
    with pytest.raises(RecipeError, match=rf"peft_corda_kpm, context\.{key}"):
        check(parse_study(raw))


def test_no_cell_is_begun_when_the_minutes_are_over(tmp_path):
    study = tiny(tmp_path, ["lora"], minutes=1e-9)
    found = compare(study)
    assert found["runs"] == []
    assert found["empty"] == [cell.id for cell in cells(study)]
    assert found["conclusions"]["best"] == {}


def test_the_grid_is_extended_where_the_best_rate_is_at_its_end(tmp_path):
    study = tiny(tmp_path, ["lora"], extensions=1)
    found = compare(study)
    added = [run for run in found["runs"] if run["extension"]]
    assert [run["learning_rate"] for run in added] == [0.09]  # two small steps on a random model: more is better


@pytest.mark.slow
def test_cells_side_by_side_give_the_same_scores(done, tmp_path):
    _, found = done
    study = tiny(tmp_path, ["lora", "kpm"], devices=["cpu", "cpu"])
    told: list[str] = []
    again = compare(study, announce=told.append, prepare=partial(leave_a_mark, tmp_path))
    assert told[0] == "[1/4] lora-lr0.001-seed0 on cpu"
    assert len(list(tmp_path.glob("*.began"))) == 2
    key = "problems/answer_loss"
    one, two = (
        {(r["method"], r["learning_rate"]): r["scores"]["after"][key]["value"] for r in runs["runs"]}
        for runs in (found, again)
    )
    assert one == pytest.approx(two, rel=1e-6)


def killed_at(cell):
    """For a worker: it is killed as soon as it comes to that cell."""
    from corda.comparing import cell as cells_of

    measured = cells_of._measured

    def failing(stages, method, study):
        if cell in str(stages.folder):
            os.kill(os.getpid(), signal.SIGKILL)
        return measured(stages, method, study)

    cells_of._measured = failing


@pytest.mark.slow
def test_a_cell_whose_process_is_killed_stays_empty_and_the_others_go_on(tmp_path):
    study = tiny(tmp_path, ["lora", "kpm"], devices=["cpu", "cpu"])
    told: list[str] = []
    found = compare(study, announce=told.append, prepare=partial(killed_at, "lora-lr0.03"))
    assert [run["status"] for run in found["runs"]] == ["done"] * 3
    assert found["empty"] == ["lora-lr0.03-seed0"]
    assert "lora-lr0.03-seed0 stays empty: its process was killed, perhaps for want of memory" in told


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_every_method_trains_and_starts_from_the_base(tmp_path, name):
    study = tiny(tmp_path, ["lora", name])
    result = run_cell(study, Cell(name, 0.001, 0), device="cpu", reference=3712)
    assert result["status"] == "done"
    if "4bit" not in name:
        assert result["step0"] < 1e-5


def test_a_cell_that_fails_is_listed_with_its_reason_and_the_others_go_on(tmp_path, monkeypatch):
    from corda.comparing import cell as cells_of

    study = tiny(tmp_path, ["lora", "kpm"], learning_rates=[0.001, 0.03])
    measured = cells_of._measured

    def failing(stages, method, study):
        if stages.recipe.adapter.mode == "kpm":
            raise torch.OutOfMemoryError("out of memory")
        return measured(stages, method, study)

    monkeypatch.setattr(cells_of, "_measured", failing)
    told: list[str] = []
    found = compare(study, announce=told.append)
    assert [run["status"] for run in found["runs"]] == ["done", "done", "unavailable", "unavailable"]
    assert found["runs"][2]["reason"] == "OutOfMemoryError: out of memory"
    assert "kpm-lr0.001-seed0 is unavailable: OutOfMemoryError: out of memory" in told
    trace = study.output_dir / "cells" / "kpm-lr0.001-seed0" / "traceback.txt"
    assert "raise torch.OutOfMemoryError" in trace.read_text(encoding="utf-8")


def test_a_worker_sees_the_gpu_of_its_own_alone(monkeypatch):
    for visible, device, expected in ((None, "cuda:1", "1"), ("4,6", "cuda:1", "6"), ("4,6", "cuda", "4,6")):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with comparing._visible(device), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            assert pool.submit(os.getenv, "CUDA_VISIBLE_DEVICES").result() == expected
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible
    with pytest.raises(RecipeError, match=r"no such device.*cuda:7.*0 GPUs"):
        comparing._refuse_devices(["cpu", "cuda:7"])


def test_the_verb_checks_and_lists_cells_without_running(tmp_path):
    given = ["compare", "--smoke", "--methods", "lora,kpm", "-o", str(tmp_path / "s"), "--dry-run", "--json"]
    shown = CliRunner().invoke(app, given)
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["order"][0] == "lora-lr0.0005-seed0"
    assert not (tmp_path / "s" / "study").exists()


def test_results_are_whole_or_absent(done):
    study, _ = done
    path = result_path(study, cells(study)[0])
    assert artifact.read_json(path)["status"] == "done"
    assert not list(path.parent.glob(".*json*"))


def test_cells_of_a_named_device_are_found_again_whatever_auto_would_pick(done, monkeypatch):
    study, _ = done
    monkeypatch.setattr(models.torch.cuda, "is_available", lambda: True)
    assert models.pick_device("auto").type == "cuda"
    on_cpu = study.model_copy(update={"devices": ["cpu"]})
    assert all(finished(on_cpu, cell) is not None for cell in cells(study))


def test_a_development_split_that_shares_records_with_any_seed_is_refused(tmp_path):
    study = tiny(tmp_path, ["lora", "kpm"], seeds=[0])
    base = {**study.base}
    tasks = {**base["evaluation"]["tasks"]}
    test, development = (key.partition("/")[0] for key in (study.learn, study.development))
    file = tasks[test]["dataset"]["dataset"]
    tasks[test] = {**tasks[test], "dataset": {"dataset": file, "part": [0, 2]}}
    tasks[development] = {**tasks[development], "dataset": {"dataset": file, "max_records": 2}}
    base["evaluation"] = {**base["evaluation"], "tasks": tasks}

    def shares(seed):
        try:
            check(study.model_copy(update={"base": base, "seeds": [seed]}))
        except RecipeError as error:
            return "shares records with the test" in str(error)
        return False

    apart = next(seed for seed in range(20) if not shares(seed))
    together = next(seed for seed in range(20) if shares(seed))
    with pytest.raises(RecipeError, match=f"with seed {together}.*no max_records"):
        check(study.model_copy(update={"base": base, "seeds": [apart, together]}))


def test_pefts_corda_on_other_tokens_is_refused_in_a_grid_too(tmp_path):
    methods = {"lora": {}, "peft_corda_kpm": {"grid": {"context.positions": ["all", "response"]}}}
    with pytest.raises(RecipeError, match="other tokens"):
        check(tiny(tmp_path, methods))
