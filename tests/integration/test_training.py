"""What the trainer is handed, decay towards the start, TensorBoard."""

from __future__ import annotations

import os

import pytest
import torch

from corda.adapter import attach
from corda.context.collect import collect
from corda.data.batches import Encoded, encode, load_records
from corda.errors import DataError, RecipeError
from corda.forms import INITIAL
from corda.plan.make import make_plan
from corda.recipe import TrainingOptions
from corda.tasks import DataSource
from corda.training import train, trainer_arguments

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


@pytest.mark.parametrize("checkpointed", [False, True])
def test_checkpointing_is_as_asked_for_and_under_the_name_that_stays(tmp_path, checkpointed, recwarn):
    options = TrainingOptions(gradient_checkpointing=checkpointed)
    made = trainer_arguments(options, tmp_path, 0, torch.device("cpu"), validated=False)
    assert made.gradient_checkpointing is checkpointed
    assert not [w for w in recwarn if "checkpointing" in str(w.message)]


def test_of_several_gpus_the_models_own_is_taken_and_it_alone(tmp_path, monkeypatch):
    at = [0]
    for name, what in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: at[0],
        "set_device": lambda device: at.__setitem__(0, device if isinstance(device, int) else device.index),
        "is_bf16_supported": lambda *a, **k: True,
        "get_device_capability": lambda *a: (9, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, what)
    device = torch.device("cuda:1")
    made = trainer_arguments(TrainingOptions(per_device_train_batch_size=4), tmp_path, 0, device, validated=False)
    assert (made.device, made.n_gpu, made.train_batch_size) == (device, 1, 4)
    assert made.distributed_state.device == device  # accelerate's
    assert at == [0]
    assert "ACCELERATE_TORCH_DEVICE" not in os.environ


def test_tensorboard_through_report_to(adapted, tokenizer, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run(adapted, tokenizer, rows, tmp_path / "t", report_to="tensorboard")
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_the_loss_on_validation_records_is_read_as_often_as_asked(adapted, tokenizer, rows, tmp_path):
    from corda.evaluation.likelihood import answer_loss

    held, few = rows[20:], {"per_device_eval_batch_size": 16, "learning_rate": 1e-12}
    expected = answer_loss(adapted, held, 0, 8).value
    options = TrainingOptions(**(OPTIONS | few | {"eval_steps": 2}))
    curve = train(adapted, tokenizer, rows[:20], options, folder=tmp_path, fingerprint="k", validation=held)
    assert curve.eval_step == (2, 4)
    assert curve.eval_loss == pytest.approx((expected, expected), rel=1e-4)
    assert len(curve.loss) == 4


def test_by_default_validation_is_read_twenty_times(adapted, tokenizer, rows, tmp_path):
    options = TrainingOptions(**(OPTIONS | {"max_steps": 40}))
    curve = train(adapted, tokenizer, rows[:20], options, folder=tmp_path, fingerprint="k", validation=rows[20:])
    assert curve.eval_step == tuple(range(2, 41, 2))
    assert curve.eval_loss[-1] < curve.eval_loss[0]


def test_the_best_checkpoint_is_what_is_left_where_that_is_asked_for(adapted, tokenizer, rows, tmp_path):
    from corda.evaluation.likelihood import answer_loss

    # The highest loss counts as the best here, so that it is not the last one.
    asked = {"load_best_model_at_end": True, "greater_is_better": True, "per_device_eval_batch_size": 16}
    options = TrainingOptions(**(OPTIONS | asked | {"eval_steps": 1, "save_steps": 1}))
    curve = train(adapted, tokenizer, rows[:20], options, folder=tmp_path, fingerprint="k", validation=rows[20:])
    assert curve.eval_loss[0] == max(curve.eval_loss) > 1.01 * curve.eval_loss[-1]
    assert answer_loss(adapted, rows[20:], 0, 8).value == pytest.approx(curve.eval_loss[0], rel=1e-3)


def test_validation_records_without_an_answer_are_named(adapted, tokenizer, rows, tmp_path):
    blank = [Encoded(row.ids, (False,) * len(row.ids)) for row in rows[20:]]
    with pytest.raises(DataError, match=r"data\.validation"):
        train(
            adapted,
            tokenizer,
            rows[:20],
            TrainingOptions(**OPTIONS),
            folder=tmp_path,
            fingerprint="k",
            validation=blank,
        )


BEST = {"load_best_model_at_end": True, "greater_is_better": True, "per_device_eval_batch_size": 16, "eval_steps": 1}


@pytest.mark.parametrize("limit", [1, 2])
def test_the_best_checkpoint_outlives_the_limit_and_a_restart(pico, tokenizer, texts, rows, tmp_path, limit):
    from transformers import AutoModelForCausalLM

    from corda.evaluation.likelihood import answer_loss

    options = TrainingOptions(**(OPTIONS | BEST | {"save_steps": 1, "save_total_limit": limit}))
    losses = []
    for _ in range(2):  # the second time all steps are done, as where a run is killed before it has written its result
        model = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32)
        adapted = attach(model, make_plan(model, collect(model, tokenizer, texts), rank=4))
        curve = train(adapted, tokenizer, rows[:20], options, folder=tmp_path, fingerprint="k", validation=rows[20:])
        losses.append(answer_loss(adapted, rows[20:], 0, 8).value)
    assert curve.eval_loss[0] == max(curve.eval_loss) > 1.01 * curve.eval_loss[-1]
    assert losses == pytest.approx([curve.eval_loss[0]] * 2, rel=1e-3)
    assert (tmp_path / "checkpoint-1").is_dir()
    assert len(list(tmp_path.glob("checkpoint-*"))) <= max(2, limit)
