"""The class that loads a checkpoint follows from its config."""

from __future__ import annotations

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3TextConfig,
    Idefics3Config,
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
)

from corda.architectures import architecture, loader


@pytest.mark.parametrize("config", [LlavaConfig(), Idefics3Config(), Qwen2_5_VLConfig(), Gemma3Config()])
def test_a_config_with_a_vision_tower_is_of_images_and_text(config):
    assert architecture(config) == "image-text"
    assert loader(config) is AutoModelForImageTextToText


@pytest.mark.parametrize("config", [LlamaConfig(), Gemma3TextConfig()])
def test_a_config_without_one_is_causal(config):
    assert architecture(config) == "causal"
    assert loader(config) is AutoModelForCausalLM


def test_what_a_checkpoint_was_saved_from_decides():
    pair = LlavaConfig(architectures=["LlavaForConditionalGeneration"])
    assert architecture(pair) == "image-text"
    both = Gemma3Config(architectures=["Gemma3ForCausalLM"])  # a type that has a class of either kind
    assert architecture(both) == "causal"
