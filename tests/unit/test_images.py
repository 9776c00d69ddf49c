"""Records with images: where they come from, where they stand in the text, and what becomes of them as tokens."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from corda.data import pictures, sources
from corda.data.batches import batches, calibration_rounds, encode, load_records, padded
from corda.data.formats import to_records
from corda.data.images import training_rows
from corda.data.rendering import render
from corda.errors import DataError
from corda.processing import framed_mark
from corda.tasks import DataSource
from tests.conftest import byte_tokenizer, write_jsonl
from tests.vlms import LAYOUTS, picture, records


@pytest.fixture(scope="module")
def processors():
    return {name: make()[1] for name, make in LAYOUTS.items()}


def test_images_stand_before_the_question_where_the_text_does_not_say(tmp_path: Path):
    [one] = to_records(records(tmp_path, 1), folder=tmp_path)
    assert one.prompt == "<image>\nQuestion: Which colour is number 0?\nAnswer:"
    assert one.turns[0] == ("user", "<image>\nWhich colour is number 0?")
    assert one.images == (str(tmp_path / "images/blue-0.png"),)


def test_marks_in_the_text_say_where_images_stand():
    two = [picture("red"), picture("blue")]
    [one] = to_records([{"images": two, "question": "Is <image> or <image> red?", "answer": "the first"}])
    assert one.prompt == "Question: Is <image> or <image> red?\nAnswer:"
    with pytest.raises(DataError, match=r"2 image marks <image> in the text, but 1 images"):
        to_records([{"image": two[0], "question": "Is <image> or <image> red?", "answer": "the first"}])


def test_what_follows_the_last_image_of_a_text_is_the_response():
    [one] = to_records([{"image": picture("red"), "text": "A red square."}])
    assert (one.prompt, one.response, one.answers) == ("<image>", "\nA red square.", ("A red square.",))
    with pytest.raises(DataError, match="no text behind the last image"):
        to_records([{"image": picture("red"), "text": "A red square: <image>"}])


def test_parts_of_messages_are_images_and_text():
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    raw = {"images": [picture("red")], "messages": [{"role": "user", "content": parts}, _said("a square")]}
    [one] = to_records([raw])
    assert one.turns == (("user", "<image>What is it?"), ("assistant", "a square"))
    raw["messages"][0]["content"] = [{"type": "video"}]
    with pytest.raises(DataError, match=r"video.*expected text and image"):
        to_records([raw])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_conversation_renders_with_the_models_own_mark(layout: str, processors):
    turns = [{"role": "user", "content": "<image>\nWhat is it?"}, _said("a square"), _asked("Sure?"), _said("yes")]
    [one] = to_records([{"images": [picture("red")], "messages": turns}])
    segments = render(one, processors[layout], "chat")
    mark = framed_mark(processors[layout])
    assert [s.text for s in segments] == [
        f"<|user|>{mark}What is it?</s><|assistant|>",
        "a square</s>",
        "<|user|>Sure?</s><|assistant|>",
        "yes</s>",
    ]
    assert [s.response for s in segments] == [False, True, False, True]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("template", ["plain", "chat"])
def test_an_image_is_as_many_tokens_as_the_processor_makes_of_it(layout: str, template: str, processors):
    processor = processors[layout]
    [one] = to_records([{"image": picture("red", 40, 24), "question": "Which colour?", "answer": "red"}])
    found = encode(one, processor, template=template)
    text = "".join(segment.text for segment in render(one, processor, template))
    whole = processor(text=[text], images=[[picture("red", 40, 24)]], add_special_tokens=False)
    assert list(found.ids) == list(whole["input_ids"][0])
    said = [token for token, response in zip(found.ids, found.response, strict=True) if response]
    assert processor.tokenizer.decode(said).strip() == "red</s>"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_sees_the_tokens_and_labels_that_are_calibrated_and_measured(layout: str, processors, tmp_path):
    processor = processors[layout]
    encoded = [encode(r, processor) for r in to_records(records(tmp_path, 3), folder=tmp_path)]
    batch = padded(encoded, 0, response_only=True)
    rows = training_rows([one.visual for one in encoded if one.visual is not None])
    theirs = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)(rows)
    assert torch.equal(theirs["input_ids"], batch.input_ids)
    assert torch.equal(theirs["attention_mask"], batch.attention_mask)
    assert torch.equal(theirs["labels"] != -100, batch.counts)
    assert set(batch.more) == set(theirs) - {"input_ids", "attention_mask", "labels"}
    for name, value in batch.more.items():
        assert torch.equal(theirs[name], value)


def test_each_answer_of_a_conversation_is_a_row_to_train_on(processors):
    turns = [_asked("What is it?"), _said("a square"), _asked("Sure?"), _said("yes")]
    [one] = to_records([{"images": [picture("red")], "messages": turns}])
    rows = training_rows([encode(one, processors["llava"]).visual])
    assert [row["completion"] for row in rows] == ["a square</s>", "yes</s>"]
    assert rows[1]["prompt"] == rows[0]["prompt"] + "a square</s><|user|>Sure?</s><|assistant|>"
    assert [len(row["images"]) for row in rows] == [1, 1]


def test_images_of_other_shapes_share_a_batch(processors):
    raw = [
        {"image": picture("red", *size), "question": "?", "answer": "red"} for size in ((16, 16), (48, 16), (16, 40))
    ]
    for processor in processors.values():
        encoded = [encode(one, processor) for one in to_records(raw)]
        [batch] = list(batches(encoded, 0, 8))
        apart = [padded([one], 0).more for one in encoded]
        pixels = batch.more["pixel_values"]
        assert float(pixels.double().sum()) == pytest.approx(
            sum(float(m["pixel_values"].double().sum()) for m in apart)
        )


def test_half_an_image_is_none(processors):
    [one] = to_records([{"image": picture("red"), "question": "Which colour?", "answer": "red"}])
    whole = encode(one, processors["llava"])
    assert len(encode(one, processors["llava"], max_length=4)) == 4
    assert len(encode(one, processors["llava"], max_length=3)) == 0
    assert encode(one, processors["llava"], max_length=9).ids == whole.ids[:9]
    with pytest.raises(DataError, match="not enough calibration records"):
        calibration_rounds([one], processors["llava"], max_length=3)


def test_a_mark_without_an_image_is_refused(processors):
    [one] = to_records([{"question": "Is <image> red?", "answer": "yes"}])
    with pytest.raises(DataError, match=r"an image token without an image.*take the mark out"):
        encode(one, processors["llava"])
    assert len(encode(one, byte_tokenizer())) > 20  # a model of text alone has no such token


def test_images_for_a_model_that_takes_none_are_refused():
    [one] = to_records([{"image": picture("red"), "question": "?", "answer": "red"}])
    with pytest.raises(DataError, match=r"the records have images, and the model takes none"):
        encode(one, byte_tokenizer())


def test_a_missing_or_broken_image_is_named(tmp_path: Path, processors):
    with pytest.raises(DataError, match=r"record 1.*the image .*nowhere\.png does not exist"):
        to_records([{"image": "nowhere.png", "question": "?", "answer": "red"}], folder=tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no image")
    [one] = to_records([{"image": "broken.png", "question": "?", "answer": "red"}], folder=tmp_path)
    with pytest.raises(DataError, match=r"an image cannot be read.*broken\.png"):
        encode(one, processors["llava"])
    with pytest.raises(DataError, match="an image is int, expected a path, bytes or a PIL image"):
        to_records([{"image": 3, "question": "?", "answer": "red"}])


def test_packing_is_refused(processors):
    [one] = to_records([{"image": picture("red"), "question": "?", "answer": "red"}])
    with pytest.raises(DataError, match=r"not packed for a model of images and text.*pack_to"):
        calibration_rounds([one], processors["llava"], pack_to=64)


def test_bytes_of_datasets_are_images_too(tmp_path: Path, processors):
    stream = io.BytesIO()
    picture("green").save(stream, "PNG")
    table = datasets.Dataset.from_list(
        [{"image": {"bytes": stream.getvalue(), "path": None}, "question": "Which colour?", "answer": "green"}]
    ).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "data.parquet")
    [one] = load_records(DataSource(dataset="data.parquet"), tmp_path, 0)
    assert pictures.opened(one.images[0]).tobytes() == picture("green").tobytes()
    assert len(encode(one, processors["llava"])) > 20


def test_equal_questions_on_other_images_are_other_records(tmp_path: Path):
    raw = [{"image": picture(c), "question": "Which colour?", "answer": c} for c in ("red", "blue", "red")]
    keys = [one.key for one in to_records(raw)]
    assert keys[0] == keys[2] != keys[1]


def test_what_a_run_depends_on_includes_the_images(tmp_path: Path):
    write_jsonl(tmp_path / "data.jsonl", records(tmp_path, 2))
    source = DataSource(dataset="data.jsonl")
    before = sources.identity(source, tmp_path, 0)
    picture("white", 20, 16).save(tmp_path / "images/blue-0.png")
    assert sources.identity(source, tmp_path, 0) != before


@pytest.mark.parametrize("layout", ["a first record of text", "a path in a mapping"])
def test_images_count_wherever_they_are_named(tmp_path: Path, layout: str):
    rows = records(tmp_path, 2)
    path = next(tmp_path.glob("images/blue-*.png"))
    if layout == "a path in a mapping":
        rows = [{**row, "image": {"path": row["image"]}} for row in rows]
    else:
        rows = [{"question": "Which colour has the sky?", "answer": "blue"}, *rows]
    write_jsonl(tmp_path / "data.jsonl", rows)
    source = DataSource(dataset="data.jsonl")
    before = sources.identity(source, tmp_path, 0)
    assert sources.identity(source, tmp_path, 0) == before
    picture("white", 20, 16).save(path)
    assert sources.identity(source, tmp_path, 0) != before


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _asked(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
