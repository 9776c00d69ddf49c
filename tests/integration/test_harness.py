"""lm-evaluation-harness on our models, and that it and our own tasks say the same."""

from __future__ import annotations

import json

import pytest
import yaml
from typer.testing import CliRunner

from corda.cli.app import app
from corda.data.batches import pad_id
from corda.data.formats import to_records
from corda.errors import DataError, ResourceError
from corda.evaluation.harness import flattened, harness_scores
from corda.evaluation.likelihood import choice_accuracy

pytest.importorskip("lm_eval")


@pytest.fixture
def shared_task(tmp_path):
    """A folder with a task file of the harness over a file of ours, and the file's records."""
    words = ["red", "green", "blue", "pale grey", "black"]
    records = [
        {
            "id": str(i),
            "context": f"The door of house {i} is painted",
            "choices": [words[i % 5], words[(i + 2) % 5] + " today", words[(i + 3) % 5]],
            "label": i % 3,
        }
        for i in range(40)
    ]
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "doors.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    task = {
        "task": "corda_doors",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "doors.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "doors.yaml").write_text(yaml.safe_dump(task))
    return folder, records


def test_harness_and_own_task_agree(shared_task, model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder, records = shared_task
    theirs = harness_scores(model, tokenizer, ["corda_doors"], include=folder)["corda_doors/acc_norm"]
    ours = choice_accuracy(model, tokenizer, to_records(records), pad_id(tokenizer), 8)
    assert theirs["n"] == ours.n == 40
    assert theirs["value"] == pytest.approx(ours.value, abs=1e-9)
    assert 0.1 < ours.value < 0.9  # neither all nor nothing, which would agree by accident
    assert theirs["stderr"] == pytest.approx(ours.stderr, rel=1e-6)


def test_the_verb_measures_base_and_tuned_model(shared_task, raw_recipe, write_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder, _ = shared_task
    given = ["eval", str(write_recipe(raw_recipe)), "--harness", "corda_doors", "--harness-path", str(folder)]
    shown = CliRunner().invoke(app, [*given, "--limit", "12", "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout.strip().splitlines()[-1])
    assert found["before"]["corda_doors/acc_norm"]["n"] == 12
    assert set(found["after"]) == set(found["before"])


@pytest.mark.slow  # the harness reads all of its task files
def test_an_unknown_task_is_an_error_with_a_hint(model, tokenizer):
    with pytest.raises(DataError, match=r"no such task.*lm_eval ls tasks"):
        harness_scores(model, tokenizer, ["corda_windows"])


def test_no_network_is_said(shared_task, model, tokenizer, monkeypatch):
    import lm_eval

    def offline(**kwargs):
        raise ConnectionError("Couldn't reach 'a/b' on the Hub")

    monkeypatch.setattr(lm_eval, "simple_evaluate", offline)
    with pytest.raises(ResourceError, match=r"download.*corda_doors.*Couldn't reach.*--harness-path"):
        harness_scores(model, tokenizer, ["corda_doors"], include=shared_task[0])


def test_results_of_the_harness_in_our_form():
    results = {"gsm8k": {"alias": "gsm8k", "exact_match,strict": 0.25, "exact_match_stderr,strict": "N/A"}}
    assert flattened(results, {"gsm8k": {"effective": 8}}) == {
        "gsm8k/exact_match (strict)": {"value": 0.25, "stderr": None, "n": 8}
    }
