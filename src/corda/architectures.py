"""What kind of model a checkpoint holds, decided on its config alone, and the class of transformers that loads it."""

from __future__ import annotations

from typing import Any, Literal

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

Architecture = Literal["causal", "image-text"]

_LOADERS: dict[Architecture, Any] = {"causal": AutoModelForCausalLM, "image-text": AutoModelForImageTextToText}


def architecture(config: Any) -> Architecture:
    """The kind of model that a config describes.

    What the checkpoint says that it was saved from (`architectures`) decides. Without that, a config with a vision
    tower means a model for images and text where there is one of its type.

    Args:
        config: A transformers config.
    """
    kind = getattr(config, "model_type", "")
    with_images = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind)
    saved = tuple(getattr(config, "architectures", None) or ())
    if with_images is None:
        return "causal"
    if with_images in saved or (not saved and takes_images(config)) or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "image-text"
    return "causal"


def takes_images(config: Any) -> bool:
    """Whether a config has a vision tower."""
    return getattr(config, "vision_config", None) is not None


def loader(config: Any) -> Any:
    """The Auto class of transformers that loads the model of a config."""
    return _LOADERS[architecture(config)]
