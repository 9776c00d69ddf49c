"""Scores against hand-made sums; independence of the batch size; overlap refused."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from corda.data.batches import Encoded, encode, load_records
from corda.data.formats import to_records
from corda.errors import DataError
from corda.evaluation import generation, likelihood
from corda.evaluation.evaluate import evaluate, load_tasks, refuse_overlap, refuse_shared
from corda.evaluation.generation import exact_match, generate, judged, normalise
from corda.evaluation.likelihood import answer_loss, choice_accuracy, perplexity, token_losses
from corda.evaluation.scores import change, mean, ratio
from corda.reading import parse_recipe
from corda.tasks import DataSource


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


class Heedless(torch.nn.Module):
    """A model that takes `logits_to_keep` and answers with all logits."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, logits_to_keep=None, **given):
        return self.inner(**given)


def test_a_model_that_does_not_heed_logits_to_keep_is_scored_the_same(model, tokenizer, records):
    encoded = [encode(r, tokenizer) for r in records[:7]]
    for ours, theirs in zip(
        token_losses(Heedless(model), encoded, 0, 3), token_losses(model, encoded, 0, 3), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_of_a_model_in_parts_all_logits_are_taken(model, tokenizer, records, monkeypatch):
    """Which ones are wanted is known on the first device, and the last layer's output is on another."""
    encoded = [encode(r, tokenizer) for r in records[:7]]
    expected = token_losses(model, encoded, 0, 3)
    asked = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **given: asked.append("logits_to_keep" in given) or forward(**given))
    for places, some in (({"": 0}, True), ({"a": 0, "b": "cpu", "c": "disk"}, True), ({"a": 0, "b": 1}, False)):
        monkeypatch.setattr(model, "hf_device_map", places, raising=False)
        asked.clear()
        for ours, theirs in zip(token_losses(model, encoded, 0, 3), expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)
        assert set(asked) == {some}


def test_standard_errors():
    assert mean([1.0, 2.0, 3.0, 4.0]).stderr == pytest.approx(math.sqrt(5 / 3) / 2)
    weighted = ratio([2.0, 9.0], [1.0, 3.0])
    assert weighted.value == 11 / 4
    assert ratio([5.0], [2.0]).stderr == 2.5  # one record tells nothing of the spread
    with pytest.raises(DataError, match="nothing to measure"):
        mean([])


def test_perplexity_of_a_uniform_model(model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight.zero_()
    records = to_records([{"text": "abc def " * 40}, {"text": "more"}])  # white space is between them already
    score = perplexity(model, tokenizer, records, 0, 4, window=50)
    assert score.value == pytest.approx(259, rel=1e-4)
    assert score.n == math.ceil((8 * 40 + 4) / 50)


def test_every_window_begins_with_the_mark_that_the_tokenizer_puts_before_a_text(model, tokenizer, monkeypatch):
    (record,) = to_records([{"text": "abcdef" * 20}])
    seen: list[Encoded] = []
    monkeypatch.setattr(likelihood, "answer_loss", lambda _m, rows, *_: seen.extend(rows) or mean([1.0]))
    perplexity(model, tokenizer, [record], 0, 4, window=50)
    assert [len(row) for row in seen] == [50, 50, 20]
    seen.clear()
    perplexity(model, tokenizer, to_records([{"text": "one."}, {"text": "Two"}, {"text": "\nthree"}]), 0, 4, window=50)
    assert tokenizer.decode(seen[0].ids) == "one.\nTwo\nthree"
    seen.clear()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    perplexity(model, tokenizer, [record], 0, 4, window=50)
    assert [(row.ids[0], len(row), sum(row.response)) for row in seen] == [(1, 50, 49), (1, 50, 49), (1, 23, 22)]
    told = [token for row in seen for token in row.ids[1:]]
    assert told == tokenizer("abcdef" * 20, add_special_tokens=False)["input_ids"]


def test_headings_may_be_in_several_parts_of_a_running_text():
    heading, told = (
        to_records([{"text": text}])[0] for text in ("= = Reception = =", "It was told that day by day " * 3)
    )
    refuse_shared("here", [heading], {"there": [heading, told]})
    (clause,) = to_records([{"text": "山高水长" * 12}])  # a text without blanks
    with pytest.raises(DataError, match="1 of 1 evaluation records"):
        refuse_shared("here", [clause], {"there": [clause]})
    with pytest.raises(DataError, match="1 of 2 evaluation records"):
        refuse_shared("here", [heading, told], {"there": [heading, told]})


class Rigged(torch.nn.Module):
    """Gives each byte a fixed logit, whatever came before."""

    def __init__(self, preferred: dict[int, float]):
        super().__init__()
        self.row = torch.nn.Parameter(torch.zeros(259))
        with torch.no_grad():
            for token, value in preferred.items():
                self.row[token] = value

    def forward(self, input_ids, logits_to_keep, **_):
        class Out:
            logits = self.row.expand(input_ids.shape[0], len(logits_to_keep), -1)

        return Out


def test_the_longer_choice_wins_per_byte_though_its_sum_is_worse(tokenizer):
    a, b, space = (tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in ("a", "b", " "))
    model = Rigged({a: 4.0, space: 4.0, b: 3.5})
    record = {"context": "x", "choices": ["aaaaaaaaaaaa", "b"], "label": 0}
    assert choice_accuracy(model, tokenizer, to_records([record]), 0, 2).value == 1.0
    assert choice_accuracy(model, tokenizer, to_records([record | {"label": 1}]), 0, 2).value == 0.0


def test_a_gap_is_filled_and_what_follows_is_scored(tokenizer):
    """The continuation is the same for both choices, so only its own likelihood can decide: a tie goes to the first."""
    a = tokenizer("a", add_special_tokens=False)["input_ids"][0]
    record = {"context": "z _ aa", "choices": ["a", "bbbb"], "label": 0}
    assert choice_accuracy(Rigged({a: 5.0}), tokenizer, to_records([record]), 0, 2).value == 1.0
    assert choice_accuracy(Rigged({a: -5.0}), tokenizer, to_records([record]), 0, 2).value == 1.0


def test_other_underscores_are_no_gap(tokenizer):
    a = tokenizer("a", add_special_tokens=False)["input_ids"][0]
    for context in ("x is _", "x is ____.", "x is _ .", "what does a_b give?", "_ or _ is x"):
        record = {"context": context, "choices": ["b", "aa"], "label": 1}
        assert choice_accuracy(Rigged({a: 9.0}), tokenizer, to_records([record]), 0, 2).value == 1.0, context


def test_every_label_has_one_winner(model, tokenizer):
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
    said = "2 is wrong here\n#### 2"
    for text, right in ((said, True), ("#### 3", False), ("1 + 1 = 2", False), ("#### 3 #### 2", True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generation, "generate", lambda *_, text=text, **__: [text])
            _, answers = exact_match(model, tokenizer, [record], template="plain", answer_after="####")
        assert answers[0].right is right, text


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ("2,125", "2125", True),
        ("-5", "5", False),
        ("-5", "−5", True),
        ("a (5)", "5", True),
        ("3-4", "3 4", True),
        ("1/2", "1.2", False),
        ("It is 1.5.", "it is 1.5", True),
        ("U.S.A.", "U S A", True),
        (".5", "5", False),
        ("-.5", "-0.5", True),
        ("$.50", "0.50", True),
    ],
)
def test_numbers_are_compared_as_numbers(one, two, same):
    assert (normalise(one) == normalise(two)) is same


@pytest.mark.parametrize(
    ("accepted", "said", "right"),
    [
        ("A", "", False),
        ("A", "The", False),
        ("A", "B", False),
        ("A", " a", True),
        ("<", ">", False),
        ("<", "<", True),
        ("an owl", "the owl", True),
    ],
)
def test_an_answer_that_normalises_to_nothing_is_compared_as_it_is(accepted, said, right):
    record = to_records([{"question": "q", "answer": accepted}])[0]
    assert judged(record, said, None).right is right


def test_metrics_have_to_fit_the_data(raw_recipe):
    for metric in ("perplexity", "accuracy"):
        raw_recipe["evaluation"]["tasks"]["things"]["metrics"] = [metric]
        with pytest.raises(DataError, match=rf"metric {metric} does not fit.*tasks\.things"):
            load_tasks(parse_recipe(raw_recipe))


def test_shots_may_not_be_among_the_questions(raw_recipe):
    task = raw_recipe["evaluation"]["tasks"]["things"]
    task["shots_from"] = "keep_test.jsonl"
    recipe = parse_recipe(raw_recipe)
    with pytest.raises(DataError, match="also in its own shots"):
        refuse_overlap(load_tasks(recipe), {})


def test_long_records_are_scored_whole(raw_recipe, model, tokenizer):
    raw_recipe["data"]["max_length"] = 8
    recipe = parse_recipe(raw_recipe)
    scores = evaluate(model, tokenizer, load_tasks(recipe), recipe)
    assert scores.values["things/answer_loss"].n == 10


def test_a_prompt_starts_as_in_training(model, tokenizer):
    """A tokenizer that adds a first token adds it to prompts for generation too."""
    seen = []

    def spy(**kwargs):
        seen.append(kwargs["input_ids"])
        return kwargs["input_ids"]

    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "generate", spy)
        generate(model, tokenizer, ["abc"], [], 2, 1)
    record = to_records([{"prompt": "abc", "completion": "d"}])[0]
    assert seen[0][0].tolist() == list(encode(record, tokenizer).ids[:4])
    assert seen[0][0][0] == tokenizer.bos_token_id


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


def test_the_error_of_a_change_is_that_of_paired_differences():
    before = mean([1.0, 5.0, 9.0, 2.0])
    after = mean([2.0, 6.1, 10.0, 2.9])
    difference = change(before, after)
    pairs = [1.0, 1.1, 1.0, 0.9]
    assert difference.value == pytest.approx(1.0)
    assert difference.stderr == pytest.approx(mean(pairs).stderr)
    assert difference.stderr < 0.1 * math.hypot(before.stderr, after.stderr)
    weighted = [ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0]), ratio([3.0, 12.0, 6.0], [1.0, 3.0, 2.0])]
    assert change(*weighted).stderr == pytest.approx(0.0, abs=1e-12)  # one more per token, in every record
