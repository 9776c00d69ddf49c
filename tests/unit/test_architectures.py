"""The class that loads a checkpoint follows from its config."""

from __future__ import annotations

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma3Config,
    Gemma3TextConfig,
    Idefics3Config,
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
    RobertaConfig,
    T5Config,
)

from corda.architectures import has_head, loader, task_of
from corda.errors import ModelError


@pytest.mark.parametrize("config", [LlavaConfig(), Idefics3Config(), Qwen2_5_VLConfig(), Gemma3Config()])
def test_a_config_with_a_vision_tower_is_of_images_and_text(config):
    assert task_of(config) == "image-text-to-text"
    assert loader(config) is AutoModelForImageTextToText


@pytest.mark.parametrize("config", [LlamaConfig(), Gemma3TextConfig()])
def test_a_config_without_one_is_causal(config):
    assert task_of(config) == "causal-lm"
    assert loader(config) is AutoModelForCausalLM


def test_what_a_checkpoint_was_saved_from_decides():
    pair = LlavaConfig(architectures=["LlavaForConditionalGeneration"])
    assert task_of(pair) == "image-text-to-text"
    both = Gemma3Config(architectures=["Gemma3ForCausalLM"])  # a type that has a class of either kind
    assert task_of(both) == "causal-lm"


@pytest.mark.parametrize(
    ("config", "task"),
    [
        (BertConfig(architectures=["BertForTokenClassification"]), "token-classification"),
        (RobertaConfig(architectures=["RobertaForSequenceClassification"]), "sequence-classification"),
        (LlamaConfig(architectures=["LlamaForSequenceClassification"]), "sequence-classification"),
        (T5Config(architectures=["T5ForConditionalGeneration"]), "seq2seq-lm"),
    ],
)
def test_a_head_or_a_decoder_beside_an_encoder_is_told_by_the_config(config, task):
    assert task_of(config) == task


def test_an_encoder_is_for_nothing_until_it_is_told():
    config = BertConfig(architectures=["BertForMaskedLM"])
    with pytest.raises(ModelError, match=r"encoder.*BertForMaskedLM.*set model\.task: sequence-classification"):
        task_of(config)
    assert loader(config, "sequence-classification") is AutoModelForSequenceClassification
    assert not has_head(config, "sequence-classification")


@pytest.mark.parametrize(
    ("config", "asked", "possible"),
    [
        (BertConfig(), "causal-lm", "sequence-classification, token-classification"),
        (LlamaConfig(), "seq2seq-lm", "causal-lm, sequence-classification, token-classification"),
        (T5Config(), "causal-lm", "seq2seq-lm, sequence-classification, token-classification"),
    ],
)
def test_what_a_model_cannot_be_is_refused_with_what_it_can(config, asked, possible):
    with pytest.raises(ModelError, match=rf"model\.task.*{asked}.*{possible}"):
        task_of(config, asked)
