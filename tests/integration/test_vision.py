"""A run on images, from the recipe to the exported adapter; what is refused before it starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from corda import models, pipeline
from corda.chatting import open_pair
from corda.errors import DataError, ModelError, RecipeError
from corda.inputs import Inputs
from corda.options import ModelOptions
from corda.reading import parse_recipe
from tests.vlms import recipe, save


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    return recipe(tmp_path)


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_a_run_on_images(raw, tmp_path, template):
    raw["data"]["template"] = template
    results = pipeline.run(parse_recipe(raw))
    assert results["step0"]["max_relative_logit_difference"] <= 1e-5
    assert results["train"]["loss"][1] < results["train"]["loss"][0]
    assert set(results["scores"]["change"]) == {"colours/answer_loss", "colours/exact_match"}
    assert results["export"]["max_relative_logit_difference"] <= 1e-5
    assert "AutoModelForImageTextToText" in (tmp_path / "run/adapter/README.md").read_text()
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert PeftModel.from_pretrained(base, tmp_path / "run/adapter").peft_config["default"].r == 8


def test_the_loss_on_validation_images_is_read(raw, tmp_path):
    records = sorted(tmp_path.rglob(raw["data"]["learn"]))[0]
    lines = records.read_text(encoding="utf-8").splitlines(keepends=True)
    records.write_text("".join(lines[4:]), encoding="utf-8")
    records.with_name("validation.jsonl").write_text("".join(lines[:4]), encoding="utf-8")
    raw["data"]["validation"] = "validation.jsonl"
    with pipeline.opened(parse_recipe(raw)) as stages:
        curve = json.loads(stages.trained().path("curve.json").read_text(encoding="utf-8"))
    assert curve["eval_step"] == curve["step"]
    assert curve["eval_loss"][-1] < curve["eval_loss"][0]


def test_the_harness_is_refused_for_a_model_that_takes_images(raw):
    with pytest.raises(RecipeError, match=r"the harness.*image-text-to-text"):
        Inputs(parse_recipe(raw)).kind.refuse_unless_text("the harness", images=False)


def test_chat_with_a_model_that_takes_images_is_refused(raw):
    recipe = parse_recipe(raw)
    pipeline.run(recipe)
    with pytest.raises(ModelError, match=r"chat has no way to show an image.*corda eval"):
        open_pair(recipe)


@pytest.mark.parametrize(
    ("section", "key", "value"), [("context", "pack_to", 64), ("context", "offload", True), ("data", "max_length", 3)]
)
def test_what_is_not_done_for_images_is_refused_first(raw, section, key, value):
    raw.setdefault(section, {})[key] = value
    with pytest.raises(RecipeError, match=f"{section}.{key}"):
        Inputs(parse_recipe(raw)).check()


def test_a_model_of_text_refuses_images_first(raw, pico):
    raw["model"]["model_name_or_path"] = str(pico)
    with pytest.raises(DataError, match="the records have images, and the model takes none"):
        Inputs(parse_recipe(raw)).check()


def test_patches_are_no_response_in_a_recipe_either(raw):
    raw["adapter"]["towers"] = ["vision"]
    raw["context"] = {"positions": "response"}
    with pytest.raises(RecipeError, match="patches of an image are no response"):
        parse_recipe(raw)


def test_a_processor_that_needs_another_package_names_it(tmp_path, monkeypatch):
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("AutoVideoProcessor requires the Torchvision library")

    save("llava", tmp_path)
    monkeypatch.setattr(models.AutoProcessor, "from_pretrained", missing)
    options = ModelOptions(model_name_or_path=str(tmp_path))
    with pytest.raises(ModelError, match=r"needs a package that is not installed.*pip install torchvision"):
        models.load_tokenizer(models.resolve(options), options)
