"""What the trainer is handed, decay towards the start, TensorBoard."""

from __future__ import annotations

import pytest
import torch

from corda.adapter import attach
from corda.context.collect import collect
from corda.data.batches import encode, load_records
from corda.errors import DataError, RecipeError
from corda.forms import INITIAL
from corda.plan.make import make_plan
from corda.recipe import DataSource, TrainingOptions
from corda.training import train

OPTIONS = {"max_steps": 4, "learning_rate": 0.01, "per_device_train_batch_size": 4, "warmup_steps": 0}


@pytest.fixture
def rows(data, tokenizer):
    return [encode(r, tokenizer) for r in load_records(DataSource(dataset="learn.jsonl"), data, 0)]


@pytest.fixture
def adapted(model, tokenizer, texts):
    return attach(model, make_plan(model, collect(model, tokenizer, texts), rank=4))


def distance(model):
    parameters = dict(model.named_parameters())
    return sum(
        float((p.detach() - parameters[n.replace(".default.", f".{INITIAL}.")]).norm() ** 2)
        for n, p in parameters.items()
        if p.requires_grad
    )


def run(model, tokenizer, rows, folder, **options):
    return train(model, tokenizer, rows, TrainingOptions(**(OPTIONS | options)), folder=folder, fingerprint="k")


def test_the_loss_is_that_of_response_tokens(adapted, tokenizer, rows, tmp_path):
    from corda.evaluation.likelihood import answer_loss

    expected = answer_loss(adapted, rows, 0, 8).value
    curve = run(adapted, tokenizer, rows, tmp_path, max_steps=1, per_device_train_batch_size=30)
    assert curve.loss[0] == pytest.approx(expected, rel=1e-4)


def test_training_moves_the_trained_factors_only(adapted, tokenizer, rows, tmp_path):
    frozen = {n: p.clone() for n, p in adapted.named_parameters() if not p.requires_grad}
    curve = run(adapted, tokenizer, rows, tmp_path)
    assert curve.step == (1, 2, 3, 4)
    assert curve.loss[-1] < curve.loss[0]
    assert distance(adapted) > 0
    for name, parameter in adapted.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


def test_decay_to_init_pulls_towards_the_start(pico, tokenizer, texts, rows, tmp_path):
    from transformers import AutoModelForCausalLM

    distances = []
    for strength in (0.0, 20.0):
        model = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32)
        adapted = attach(model, make_plan(model, collect(model, tokenizer, texts), rank=4))
        run(adapted, tokenizer, rows, tmp_path / str(strength), decay_to_init=strength)
        distances.append(distance(adapted))
    assert 0 < distances[1] < 0.9 * distances[0]


def test_decay_to_init_needs_a_start(model, tokenizer, rows, tmp_path):
    from corda.targets import find_targets

    plain = attach(model, make_plan(model, find_targets(model), mode="lora", rank=4))
    with pytest.raises(RecipeError, match="initial factors"):
        run(plain, tokenizer, rows, tmp_path, decay_to_init=0.1)


def test_no_response_token_is_an_error(adapted, tokenizer, data, tmp_path):
    records = load_records(DataSource(dataset="learn.jsonl"), data, 0)
    with pytest.raises(DataError, match=r"no training record.*max_length"):
        run(adapted, tokenizer, [encode(r, tokenizer, max_length=5) for r in records], tmp_path)


def test_no_autocast_is_left_on_the_model(adapted, tokenizer, rows, tmp_path):
    run(adapted, tokenizer, rows, tmp_path, max_steps=1, bf16=True)
    assert not {"forward", "_original_forward"} & set(vars(adapted))
    ids = torch.tensor([rows[0].ids])
    assert adapted(input_ids=ids).logits.dtype == torch.float32
    twice = [adapted(input_ids=ids).logits for _ in range(2)]
    assert torch.equal(*twice)


def test_tensorboard_through_report_to(adapted, tokenizer, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run(adapted, tokenizer, rows, tmp_path / "t", report_to="tensorboard")
    assert list(tmp_path.rglob("events.out.tfevents*"))
