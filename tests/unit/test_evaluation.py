"""Scores against hand-made sums; independence of the batch size; overlap refused."""

from __future__ import annotations

import math

import pytest
import torch

from corda.data.batches import encode, load_records
from corda.data.formats import to_records
from corda.errors import DataError
from corda.evaluation.evaluate import evaluate, load_tasks, refuse_overlap
from corda.evaluation.generation import exact_match, generate, normalise
from corda.evaluation.likelihood import answer_loss, choice_accuracy, perplexity, token_losses
from corda.evaluation.scores import mean, ratio
from corda.recipe import DataSource, parse_recipe


@pytest.fixture
def records(data):
    return load_records(DataSource(dataset="keep.jsonl"), data, 0)


def test_answer_loss_is_the_mean_over_response_tokens(model, tokenizer, records):
    encoded = [encode(r, tokenizer) for r in records]
    total, count = 0.0, 0
    for one in encoded:
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([one.ids])).logits[0].double().log_softmax(-1)
        for i in range(1, len(one)):
            if one.response[i]:
                total -= float(logp[i - 1, one.ids[i]])
                count += 1
    for size in (1, 3, 64):
        score = answer_loss(model, encoded, 0, size)
        assert score.value == pytest.approx(total / count, rel=1e-5)
        assert score.n == len(records)
        assert 0 < score.stderr < score.value


def test_losses_come_in_the_order_given(model, tokenizer, records):
    encoded = [encode(r, tokenizer) for r in records]
    together = token_losses(model, encoded, 0, 5)
    for i in (0, 7, 19):
        alone = token_losses(model, [encoded[i]], 0, 1)[0]
        assert torch.allclose(together[i], alone, atol=1e-5)


def test_standard_errors():
    assert mean([1.0, 2.0, 3.0, 4.0]).stderr == pytest.approx(math.sqrt(5 / 3) / 2)
    weighted = ratio([2.0, 9.0], [1.0, 3.0])
    assert weighted.value == 11 / 4
    assert ratio([5.0], [2.0]).n == 1


def test_perplexity_of_a_uniform_model(model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight.zero_()
    records = to_records([{"text": "abc def " * 40}, {"text": "more"}])
    score = perplexity(model, tokenizer, records, 0, 4, window=50)
    assert score.value == pytest.approx(259, rel=1e-4)
    assert score.n == math.ceil((8 * 40 + 4) / 50)


def test_choices_are_scored_per_byte_and_into_gaps(model, tokenizer):
    raw = [
        {"context": "Snow is", "choices": ["white as milk", "red"], "label": 0},
        {"context": "Ann saw Bo because _ looked.", "choices": ["Ann", "Bo"], "label": 1},
    ]
    for wanted in (0, 1):
        for record in raw:
            record["label"] = wanted
        scores = [choice_accuracy(model, tokenizer, to_records([r]), 0, 2).value for r in raw]
        assert set(scores) <= {0.0, 1.0}
        flipped = [choice_accuracy(model, tokenizer, to_records([r | {"label": 1 - wanted}]), 0, 2).value for r in raw]
        assert [a + b for a, b in zip(scores, flipped, strict=True)] == [1.0, 1.0]


def test_generation_does_not_depend_on_the_batch(model, tokenizer, records):
    prompts = [r.prompt for r in records[:9]]
    alone = generate(model, tokenizer, prompts, ["\n"], 8, 1)
    assert alone == generate(model, tokenizer, prompts, ["\n"], 8, 4)
    assert any(alone)


def test_exact_match_normalises(model, tokenizer, records):
    said = generate(model, tokenizer, [records[0].prompt], ["\n"], 6, 1)[0]
    raw = [{"question": "x", "answer": ["no", f"The  {said.upper()}!"]}]
    record = to_records(raw)[0]
    matched = type(record)(records[0].prompt, record.response, (), record.answers)
    score, answers = exact_match(model, tokenizer, [matched, records[1]], template="plain", max_new_tokens=6)
    assert answers[0].generated == said
    assert answers[0].right
    assert score.n == 2
    assert normalise("The  Eiffel-Tower!") == "eiffel tower"


def test_answer_after_compares_the_tail_only(model, tokenizer):
    record = to_records([{"question": "q", "answer": "1 + 1 = 2\n#### 2"}])[0]
    _, answers = exact_match(
        model, tokenizer, [record], template="plain", answer_after="####", max_new_tokens=2, stop=[]
    )
    assert answers[0].expected == ("1 + 1 = 2\n#### 2",)


def test_overlap_is_refused(raw_recipe, data):
    raw_recipe["evaluation"]["tasks"]["things"]["dataset"] = "keep.jsonl"
    recipe = parse_recipe(raw_recipe)
    tasks = load_tasks(recipe)
    used = load_records(DataSource(dataset="keep.jsonl"), data, 0)
    with pytest.raises(DataError, match=r"20 of 20 evaluation records are also in the calibration data.*tasks\.things"):
        refuse_overlap(tasks, {"the calibration data": used})


def test_all_tasks_of_a_recipe(raw_recipe, model, tokenizer):
    recipe = parse_recipe(raw_recipe)
    scores = evaluate(model, tokenizer, load_tasks(recipe), recipe)
    assert set(scores.values) == {"sums/answer_loss", "sums/exact_match", "things/answer_loss"}
    assert len(scores.answers["sums"]) == 4
