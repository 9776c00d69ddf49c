"""Labels of any common form become numbers of classes; what a classifier scores, and how sure that is."""

from __future__ import annotations

import math
import random

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from corda.data.batches import Encoded
from corda.data.formats import to_records
from corda.data.labelled import class_name, class_number, found_classes
from corda.errors import DataError
from corda.evaluation.classification import class_logits, class_scores, f1
from corda.evaluation.tagging import spans, tag_scores
from corda.kinds.labels import mean_loss

KNOWN = ("classification",)


@pytest.mark.parametrize(
    ("fields", "first", "second"),
    [
        ({"sentence": "a b"}, "a b", ""),
        ({"text": "a b"}, "a b", ""),
        ({"sentence1": "a", "sentence2": "b", "idx": 3}, "a", "b"),
        ({"premise": "a", "hypothesis": "b"}, "a", "b"),
        ({"question": "a", "sentence": "b"}, "a", "b"),
        ({"text": "a", "text_pair": "b"}, "a", "b"),
    ],
)
def test_a_text_or_a_pair_is_found_by_its_fields(fields, first, second):
    [record] = to_records([{**fields, "label": 1}], known=KNOWN)
    assert (record.prompt, record.second, record.answers) == (first, second, ("1",))


def test_columns_of_other_names_are_mapped():
    raw = [{"review": "Fine.", "stars": "good"}]
    [record] = to_records(raw, columns={"text": "review", "label": "stars"}, known=KNOWN)
    assert (record.prompt, record.answers) == ("Fine.", ("good",))


def test_pairs_that_differ_in_the_second_text_are_different_records():
    one, two = to_records([{"premise": "a", "hypothesis": h, "label": 0} for h in ("b", "c")], known=KNOWN)
    assert one.key != two.key


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a", "label": -1}, "records without a label"),
        ({"text": "a", "label": 0.5}, "a regression, which recipes do not train"),
        ({"text": "a", "label": [0, 1]}, "expected the one class"),
        ({"text": " ", "label": 0}, "expected text"),
        ({"body": "a", "label": 0}, "no text beside the label: expected sentence1"),
        ({"text": "a", "label": None}, "fit no format"),
    ],
)
def test_a_record_without_text_or_class_is_refused_by_number(record, message):
    with pytest.raises(DataError, match=rf"(?s){message}") as caught:
        to_records([{"text": "a", "label": 0}, record], "classification", known=KNOWN)
    assert "record 2" in str(caught.value)


def test_labels_become_numbers():
    assert [class_name(value) for value in (True, 2, 3.0, "good")] == ["1", "2", "3", "good"]
    assert found_classes(["2", "0"]) == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert found_classes(["yes", "no", "yes"]) == ("no", "yes")
    assert class_number("yes", ("no", "yes"), "x") == 1
    assert class_number("0", ("no", "yes"), "x") == 0
    assert class_number("0", ("1", "0"), "x") == 1  # a name goes before a number
    with pytest.raises(DataError, match=r"none of the classes.*no, yes, or a number below 2"):
        class_number("2", ("no", "yes"), "x")


def test_f1_is_the_usual_one():
    guesses, labels = [1, 1, 0, 1, 0, 0], [1, 0, 0, 1, 1, 0]
    assert f1(guesses, labels, 2).value == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    three = f1([0, 1, 2, 2], [0, 1, 1, 2], 3)
    assert three.value == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert f1([0, 0], [0, 0], 2).value == 0
    assert f1([0, 1], [0, 1], 3).value == pytest.approx(2 / 3)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_error_of_f1_is_that_of_drawing_records_again(classes):
    draw = random.Random(0)
    labels = [draw.randrange(classes) for _ in range(400)]
    guesses = [y if draw.random() < 0.7 else draw.randrange(classes) for y in labels]
    score = f1(guesses, labels, classes)
    again = []
    for _ in range(300):
        some = [draw.randrange(400) for _ in range(400)]
        again.append(f1([guesses[i] for i in some], [labels[i] for i in some], classes).value)
    middle = sum(again) / len(again)
    spread = math.sqrt(sum((value - middle) ** 2 for value in again) / (len(again) - 1))
    assert score.stderr == pytest.approx(spread, rel=0.15)
    assert score.stderr == pytest.approx(math.sqrt(sum(p * p for p in score.influence) * 400 / 399))


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-X I-X O", {("X", 1, 3)}),
        ("B-X B-X I-Y", {("X", 0, 1), ("X", 1, 2), ("Y", 2, 3)}),
        ("I-X I-X", {("X", 0, 2)}),
        ("O O", set()),
    ],
)
def test_spans(tags, found):
    assert spans(tags.split()) == found


def test_scores_of_tags():
    classes = ("O", "B-X", "I-X")
    labels = [[1, 2, 0, 1], [0, 1]]
    guesses = [[1, 2, 0, 0], [1, 1]]
    logits = [5.0 * torch.nn.functional.one_hot(torch.tensor(one), 3).float() for one in guesses]
    scores = tag_scores(logits, labels, classes)
    assert scores["accuracy"].value == pytest.approx(4 / 6)
    assert scores["f1"].value == pytest.approx(2 * 2 / (3 + 3))  # found X(0, 2), X(0, 1), X(1, 2); meant 3; 2 agree
    assert scores["loss"].value == pytest.approx(
        float(torch.nn.functional.cross_entropy(torch.cat(logits), torch.tensor([1, 2, 0, 1, 0, 1]))), rel=1e-6
    )
    assert {score.n for score in scores.values()} == {2}


def test_words_and_tags_of_a_record():
    [record] = to_records([{"tokens": ["a", "b"], "ner_tags": ["O", "B-X"]}], known=("tagged",))
    assert (record.words, record.answers, record.prompt) == (("a", "b"), ("O", "B-X"), "a b")
    with pytest.raises(DataError, match="1 tags for 2 tokens"):
        to_records([{"tokens": ["a", "b"], "tags": [1]}], known=("tagged",))


def test_scores_of_logits():
    logits = torch.tensor([[4.0, 1.0, -3.0], [0.5, 0.25, 7.0], [2.0, 2.5, 0.0]])
    scores = class_scores(logits, [0, 2, 0])
    assert scores["accuracy"].value == pytest.approx(2 / 3)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2, 0]))
    assert scores["loss"].value == pytest.approx(float(expected), rel=1e-6)
    assert all(score.n == 3 for score in scores.values())


def test_logits_come_in_the_order_of_the_records_whatever_the_batch():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=90, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2)
    config.num_labels, config.initializer_range = 3, 0.3
    model = BertForSequenceClassification(config).eval()
    draw = random.Random(1)
    rows = [tuple(draw.randrange(1, 90) for _ in range(n)) for n in (3, 9, 5, 9, 2)]
    encoded = [Encoded(ids, (False,) * len(ids)) for ids in rows]
    with torch.no_grad():
        expected = torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in rows])
    for size in (1, 2, 5):
        found = torch.stack(class_logits(model, encoded, 0, size))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_loss_of_parts_adds_up_to_that_of_the_whole():
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(6, 4), torch.tensor([0, 3, 1, -100, 2, 2])
    whole = mean_loss(logits, labels)
    torch.testing.assert_close(whole, torch.nn.functional.cross_entropy(logits, labels))
    parts = mean_loss(logits[:4], labels[:4], 5) + mean_loss(logits[4:], labels[4:], 5)
    torch.testing.assert_close(parts, whole)
    smooth = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(mean_loss(logits, labels, smoothing=0.1), smooth)
