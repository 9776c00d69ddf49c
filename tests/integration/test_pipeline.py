"""Every stage on a pico model: artifacts, reuse, results, resuming."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import write_jsonl
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from corda import artifact, bases, checkpoints, journal, pipeline
from corda.errors import ArtifactError, CheckError, DataError, PlanError, RecipeError, TargetError
from corda.inputs import Inputs
from corda.kinds import text
from corda.reading import parse_recipe

REQUIRED = {"schema", "recipe", "model", "plan", "step0", "train", "scores", "export", "timing", "memory", "provenance"}


@pytest.mark.parametrize("mode", ["kpm", "ipm", "dual", "contrast", "lora"])
@pytest.mark.parametrize("base", ["intact", "residual"])
def test_a_run_from_recipe_to_adapter(raw_recipe, pico, mode, base):
    if mode in {"lora", "contrast"} and base == "residual":
        pytest.skip("an adapter that starts at zero has no residual")
    raw_recipe["adapter"] |= {"mode": mode, "base": base}
    recipe = parse_recipe(raw_recipe)
    results = pipeline.run(recipe)
    folder = recipe.output_dir
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert set(results) >= REQUIRED
    assert results["step0"]["max_relative_logit_difference"] <= 1e-5
    assert results["export"]["max_relative_logit_difference"] <= 1e-5
    assert len(results["train"]["loss"]) == results["train"]["steps"] == 3
    assert results["plan"]["trainable_parameters"] == sum(
        4 * (layer["shape"][0] if mode == "contrast" else sum(layer["shape"])) for layer in results["plan"]["layers"]
    )
    assert (
        set(results["scores"]["before"])
        == set(results["scores"]["after"])
        == {"sums/answer_loss", "sums/exact_match", "things/answer_loss"}
    )
    before, after = (results["scores"][k]["sums/answer_loss"]["value"] for k in ("before", "after"))
    assert after < before
    stages = {"plan", "before", "train", "after", "export"} | ({"collect"} if mode != "lora" else set())
    assert set(results["timing"]) == set(results["memory"]) == stages
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico), str(folder / "adapter"))
    assert loaded.peft_config["default"].r == (4 if mode in {"lora", "contrast"} else 8)
    assert (folder / "report.html").is_file()


def count_work(monkeypatch):
    calls: list[str] = []

    def counted(module, name, label):
        original = getattr(module, name)

        def wrapper(*args, **kwargs):
            calls.append(label)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapper)

    counted(pipeline.collect, "collect_encoded", "collect")
    counted(pipeline, "make_plan", "plan")
    counted(pipeline.training, "train", "train")
    counted(text, "evaluate", "evaluate")
    counted(pipeline.exporting, "export", "export")
    return calls


def test_finished_stages_are_reused_and_changes_redo_what_they_concern(raw_recipe, monkeypatch):
    calls = count_work(monkeypatch)
    pipeline.run(parse_recipe(raw_recipe))
    assert calls == ["collect", "plan", "evaluate", "train", "evaluate", "export"]
    calls.clear()
    pipeline.run(parse_recipe(raw_recipe))
    assert calls == []
    raw_recipe["training"]["learning_rate"] = 0.02
    pipeline.run(parse_recipe(raw_recipe))
    assert calls == ["train", "evaluate", "export"]
    calls.clear()
    raw_recipe["adapter"]["rank"] = 3
    pipeline.run(parse_recipe(raw_recipe))
    assert calls == ["plan", "train", "evaluate", "export"]
    calls.clear()
    raw_recipe["context"]["batch_size"] = 3
    pipeline.run(parse_recipe(raw_recipe))
    assert calls == []
    raw_recipe["context"]["samples"] = 12
    pipeline.run(parse_recipe(raw_recipe))
    assert calls == ["collect", "plan", "train", "evaluate", "export"]


def test_the_loss_on_validation_records_is_shown_and_changes_no_training(raw_recipe, data, tmp_path):
    rows = [json.loads(line) for line in (data / "learn_test.jsonl").read_text().splitlines()]
    write_jsonl(data / "validation.jsonl", rows[:5])
    write_jsonl(data / "learn_test.jsonl", rows[5:])
    plain = parse_recipe(raw_recipe)
    assert pipeline.run(plain)["train"]["eval_loss"] == []
    raw_recipe["output_dir"] = str(tmp_path / "validated")
    raw_recipe["data"]["validation"] = "validation.jsonl"
    raw_recipe["training"]["eval_steps"] = 1
    recipe = parse_recipe(raw_recipe)
    results = pipeline.run(recipe)
    assert results["train"]["eval_step"] == [1, 2, 3]
    assert results["train"]["eval_loss"][-1] < results["train"]["eval_loss"][0]
    adapters = [load_file(one.output_dir / "adapter" / "adapter_model.safetensors") for one in (plain, recipe)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    keys = [Inputs(one).fingerprints for one in (plain, recipe)]
    assert [kind for kind in keys[0] if keys[0][kind] != keys[1][kind]] == ["train", "after", "export"]
    pages = [(one.output_dir / "report.html").read_text(encoding="utf-8") for one in (plain, recipe)]
    assert ["dots: of data.validation" in page for page in pages] == [False, True]


def test_scores_of_the_same_base_are_taken_over(raw_recipe, tmp_path, monkeypatch):
    first = pipeline.run(parse_recipe(raw_recipe))
    calls = count_work(monkeypatch)
    raw_recipe["output_dir"] = str(tmp_path / "other")
    raw_recipe["adapter"]["mode"] = "lora"
    second = pipeline.run(parse_recipe(raw_recipe), reuse_from=[tmp_path / "run"])
    assert calls.count("evaluate") == 1
    assert second["scores"]["before"] == first["scores"]["before"]


def interrupt(raw, monkeypatch):
    """Run a recipe as far as the fifth step of its training."""
    import trl
    from transformers import TrainerCallback

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    original = trl.SFTTrainer.__init__
    with monkeypatch.context() as patch:
        patch.setattr(
            trl.SFTTrainer, "__init__", lambda self, *a, **k: original(self, *a, callbacks=[Interrupt()], **k)
        )
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(parse_recipe(raw))


def test_an_interrupted_training_continues_from_its_checkpoint(raw_recipe, tmp_path, monkeypatch):
    raw_recipe["training"] |= {"max_steps": 6, "save_steps": 2}
    straight = pipeline.run(parse_recipe(raw_recipe | {"output_dir": str(tmp_path / "straight")}))
    interrupt(raw_recipe, monkeypatch)
    run = tmp_path / "run"
    assert not (run / "train").exists()
    assert (run / "checkpoints" / "checkpoint-4").is_dir()
    resumed = pipeline.run(parse_recipe(raw_recipe))
    assert resumed["train"]["step"] == straight["train"]["step"] == [1, 2, 3, 4, 5, 6]
    assert resumed["train"]["loss"] == pytest.approx(straight["train"]["loss"], rel=1e-4)


def test_a_training_never_continues_from_one_that_was_not_to_be_continued(raw_recipe, tmp_path, monkeypatch):
    """The second one begins anew in the folder of the first; its checkpoints are not those of the first's recipe."""
    raw_recipe["training"] |= {"max_steps": 6, "save_steps": 2}
    straight = pipeline.run(parse_recipe(raw_recipe | {"output_dir": str(tmp_path / "straight")}))
    interrupt(raw_recipe, monkeypatch)
    other = {**raw_recipe["training"], "learning_rate": 0.05, "resume_from_checkpoint": False}
    interrupt(raw_recipe | {"training": other}, monkeypatch)
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-4").is_dir()
    resumed = pipeline.run(parse_recipe(raw_recipe))
    assert resumed["train"]["loss"] == pytest.approx(straight["train"]["loss"], rel=1e-4)


def test_only_whole_checkpoints_of_the_same_training_are_continued(tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    assert checkpoints.last(folder, "one") is None
    for step in (2, 4, 6):
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        if step != 6:  # it was cut off while it was saved
            checkpoints.seal(folder / f"checkpoint-{step}")
    assert checkpoints.last(folder, "one") == str(folder / "checkpoint-4")
    assert not (folder / "checkpoint-6").exists()
    (folder / "checkpoint-4" / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    assert checkpoints.last(folder, "one") == str(folder / "checkpoint-2")
    assert "trainer_state.json of" in caplog.text
    assert checkpoints.last(folder, "two") is None
    assert not (folder / "checkpoint-2").exists()


def test_checkpoints_that_a_killed_process_did_not_let_go_are_let_go(tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoints.last(folder, "one")
    for step in (8, 10, 12):  # by number, not by name
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        checkpoints.seal(folder / f"checkpoint-{step}")
    assert checkpoints.last(folder, "one", limit=2) == str(folder / "checkpoint-12")
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-10", "checkpoint-12"}


def test_a_training_that_was_cut_off_behind_its_last_checkpoint_takes_no_further_step(raw_recipe, tmp_path):
    raw_recipe["training"] |= {"max_steps": 4, "save_steps": 2}
    straight = pipeline.run(parse_recipe(raw_recipe))
    weights = (tmp_path / "run" / "train" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run" / "train")
    again = pipeline.run(parse_recipe(raw_recipe))
    assert again["train"]["loss"] == straight["train"]["loss"]
    assert (tmp_path / "run" / "train" / "adapter_model.safetensors").read_bytes() == weights


def test_an_interrupted_collect_or_plan_continues_with_the_same_bytes(raw_recipe, tmp_path, monkeypatch):
    straight = raw_recipe | {"output_dir": str(tmp_path / "straight")}
    pipeline.run(parse_recipe(straight))
    original = journal.Journal.put
    done: list[str] = []

    def put(self, key, tensors, facts):
        if len(done) in (1, 4):
            done.append("interrupt")
            raise KeyboardInterrupt
        done.append(key)
        original(self, key, tensors, facts)

    monkeypatch.setattr(journal.Journal, "put", put)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(parse_recipe(raw_recipe))
    pipeline.run(parse_recipe(raw_recipe))
    assert done[:2] == ["block-0000", "interrupt"]
    assert done[2] == "block-0000-round-1"  # the knowledge held out for the drift meter
    assert len(set(done)) == len(done) - 1  # nothing was done twice
    for stage in ("context", "plan", "train"):
        one, two = (artifact.read(tmp_path / run / stage, stage).manifest["files"] for run in ("straight", "run"))
        tensors = {name for name in one if name.endswith(".safetensors")}
        assert tensors
        assert {name: one[name] for name in tensors} == {name: two[name] for name in tensors}
    assert not list((tmp_path / "run").glob("*.partial"))


def test_a_damaged_part_is_done_again(tmp_path):
    book = journal.Journal(tmp_path / "j", "k")
    book.put("one", {"x": torch.ones(3)}, {"n": 1})
    assert book.facts("one") == {"n": 1}
    content = bytearray(book.path("one").read_bytes())
    content[-1] ^= 1
    book.path("one").write_bytes(content)
    assert book.facts("one") is None
    book.put("one", {"x": torch.ones(3)}, {"n": 1})
    assert journal.Journal(tmp_path / "j", "k").facts("one") == {"n": 1}
    assert journal.Journal(tmp_path / "j", "other").facts("one") is None


def test_a_corrupted_artifact_is_never_used(raw_recipe, tmp_path):
    pipeline.run(parse_recipe(raw_recipe))
    file = tmp_path / "run" / "plan" / "factors.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"corrupted artifact: factors\.safetensors"):
        pipeline.run(parse_recipe(raw_recipe))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"adapter": {"target_modules": ["q_pro"]}}, TargetError, "did you mean q_proj"),
        ({"adapter": {"rank": 30}}, PlanError, "at most 24"),
        ({"data": {"keep": "none.jsonl"}}, DataError, "does not exist"),
        ({"data": {"keep": "keep_test.jsonl"}}, DataError, "also in the calibration data"),
        ({"data": {"learn": "learn_test.jsonl"}}, DataError, r"also in data\.learn"),
        ({"data": {"validation": "learn.jsonl"}}, DataError, r"also in data\.learn"),
        ({"data": {"validation": "learn_test.jsonl"}}, DataError, r"also in data\.validation"),
    ],
)
def test_bad_input_is_found_before_a_model_is_loaded(raw_recipe, tmp_path, monkeypatch, change, error, message):
    monkeypatch.setattr(pipeline.models, "load", lambda *_: pytest.fail("a model was loaded"))
    for block, values in change.items():
        raw_recipe[block] |= values
    with pytest.raises(error, match=message):
        pipeline.run(parse_recipe(raw_recipe))
    assert not (tmp_path / "run").exists()


def test_a_model_with_dropout_of_its_own(raw_recipe, tmp_path):
    from conftest import byte_tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=48, n_layer=2, n_head=4, n_positions=256, pad_token_id=0, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    raw_recipe["model"]["model_name_or_path"] = str(tmp_path / "gpt2")
    results = pipeline.run(parse_recipe(raw_recipe))
    assert results["step0"] == {"eval": 0.0, "train": 0.0, "max_relative_logit_difference": 0.0}


def test_another_model_in_the_same_place_is_another_model(raw_recipe, pico, tmp_path):
    import shutil

    from conftest import llama

    folder = tmp_path / "model"
    shutil.copytree(pico, folder)
    raw_recipe["model"]["model_name_or_path"] = str(folder)
    keys = [Inputs(parse_recipe(raw_recipe)).fingerprints["context"]]
    llama(seed=1).save_pretrained(folder)
    keys.append(Inputs(parse_recipe(raw_recipe)).fingerprints["context"])
    assert keys[0] != keys[1]
    raw_recipe["model"]["model_name_or_path"] = str(shutil.copytree(folder, tmp_path / "moved" / "model"))
    keys.append(Inputs(parse_recipe(raw_recipe)).fingerprints["context"])
    assert keys[1] == keys[2]


def test_a_start_that_changes_the_model_is_refused(raw_recipe, monkeypatch):
    original = bases.adapter.attach

    def broken(*args, **kwargs):
        model = original(*args, **kwargs)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if ".lora_B.default" in name:
                    p += 0.1
        return model

    monkeypatch.setattr(bases.adapter, "attach", broken)
    with pytest.raises(CheckError, match="before training"):
        pipeline.run(parse_recipe(raw_recipe))


@pytest.fixture
def short_gpt(raw_recipe, tokenizer, tmp_path):
    """A recipe for a GPT-2 that takes 64 tokens, fewer than some records have."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=48, n_layer=2, n_head=4, n_positions=64, pad_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt")
    tokenizer.save_pretrained(tmp_path / "gpt")
    raw_recipe["model"]["model_name_or_path"] = str(tmp_path / "gpt")
    lines = [{"question": f"Add {i} and {i}." + " Please." * (10 * (i % 2)), "answer": str(2 * i)} for i in range(20)]
    write_jsonl(tmp_path / "data" / "learn.jsonl", lines)
    raw_recipe["evaluation"]["tasks"] = {
        "text": {"dataset": "text.jsonl", "measures": "keep", "metrics": ["perplexity"]},
        "sums": {"dataset": "learn_test.jsonl", "measures": "learn"},
    }
    write_jsonl(tmp_path / "data" / "text.jsonl", [{"text": "A text that goes on and on. " * 8}])
    return raw_recipe


def test_a_model_with_learned_positions_is_given_no_more_than_it_takes(short_gpt):
    results = pipeline.run(parse_recipe(short_gpt))
    assert results["train"]["steps"] == 3
    assert results["scores"]["after"]["text/perplexity"]["n"] >= 2  # in windows of 64, whatever the default is


@pytest.mark.parametrize(
    ("metrics", "message"), [(["answer_loss"], "got: [0-9]+ tokens"), (["exact_match"], "of which 40 to generate")]
)
def test_evaluation_records_longer_than_the_model_takes_are_refused_first(short_gpt, tmp_path, metrics, message):
    long = [{"question": "Add 1 and 1." + " Please." * 10, "answer": "2"}]
    short = [{"question": "Add up 1 and 2, please.", "answer": "3"}]
    write_jsonl(tmp_path / "data" / "learn_test.jsonl", long if metrics == ["answer_loss"] else short)
    short_gpt["evaluation"]["tasks"]["sums"] |= {"metrics": metrics, "max_new_tokens": 40}
    with pytest.raises(DataError, match=rf"(?i)longer than the model takes.*sums.*{message}.*at most 64"):
        Inputs(parse_recipe(short_gpt)).check()


def test_windows_longer_than_the_model_takes_are_refused(short_gpt):
    short_gpt["context"]["pack_to"] = 65
    with pytest.raises(RecipeError, match=r"context\.pack_to.*at most 64"):
        Inputs(parse_recipe(short_gpt)).check()


def test_an_adapter_names_the_revision_of_its_base(raw_recipe, monkeypatch):
    with pipeline.opened(parse_recipe(raw_recipe)) as stages:
        plan = stages.plan()
        stages.inputs.__dict__["source"] = replace(stages.inputs.source, revision="abc")
        assert stages.bases.attached(plan)[0].peft_config["default"].revision == "abc"


def test_what_there_is_to_choose_from_counts_where_the_best_is_kept(raw_recipe, data):
    rows = (data / "learn.jsonl").read_text().splitlines(keepends=True)
    (data / "learn.jsonl").write_text("".join(rows[5:]))
    (data / "validation.jsonl").write_text("".join(rows[:5]))
    raw_recipe["data"]["validation"] = "validation.jsonl"
    raw_recipe["training"] |= {"eval_steps": 1, "save_steps": 1}

    def key(**more):
        return Inputs(parse_recipe(raw_recipe | {"training": raw_recipe["training"] | more})).fingerprints["train"]

    assert key() == key(save_steps=2)
    assert key(load_best_model_at_end=True) != key(load_best_model_at_end=True, save_steps=2)
    # what changes neither the data nor the arithmetic does not throw a training away
    assert key() == key(gradient_checkpointing=True, run_name="again", dataloader_num_workers=2)
    assert key() != key(weight_decay=0.1)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"metrics": ["answer_loss", "exact_match"], "max_new_tokens": 2}, "with its answer"),
        ({"metrics": ["accuracy"]}, "with a choice"),
        ({"metrics": ["accuracy"], "choice_prompt": "Please " * 12 + "{context}"}, "with a choice"),
    ],
)
def test_every_metric_counts_for_the_length_of_a_record(short_gpt, tmp_path, task, message):
    long, short = "a long one " * 6, "short"
    choices = [short, short] if "choice_prompt" in task else [short, long]
    row = (
        {"context": "Which?", "choices": choices, "label": 0}
        if "accuracy" in task["metrics"]
        else {"question": "Which?", "answer": long}
    )
    write_jsonl(tmp_path / "data" / "learn_test.jsonl", [row])
    short_gpt["evaluation"]["tasks"]["sums"] |= task
    with pytest.raises(DataError, match=rf"longer than the model takes.*sums.*{message}"):
        Inputs(parse_recipe(short_gpt)).check()


def test_artifacts_of_a_tokenizer_that_puts_blanks_are_those_without_them(raw_recipe, monkeypatch):
    plain = Inputs(parse_recipe(raw_recipe)).fingerprints
    monkeypatch.setattr(text, "puts_blanks", lambda _: True)
    monkeypatch.setattr(text, "_BEGIN", {})
    blanked = Inputs(parse_recipe(raw_recipe)).fingerprints
    monkeypatch.setattr(text, "adds_bos", lambda _: True)
    monkeypatch.setattr(text, "_BEGIN", {})
    marked = Inputs(parse_recipe(raw_recipe)).fingerprints
    for kind in ("context", "before", "train", "after"):
        assert len({plain[kind], blanked[kind], marked[kind]}) == 3
