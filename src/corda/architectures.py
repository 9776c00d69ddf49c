"""What kind of model a checkpoint holds, decided on its config alone, and the class of transformers that loads it."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from corda.errors import ModelError

Architecture = Literal["causal", "image-text"]

_LOADERS: dict[Architecture, Any] = {"causal": AutoModelForCausalLM, "image-text": AutoModelForImageTextToText}


_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")


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


def refuse_unrecipied(config: Any) -> None:
    """Refuse models that a recipe cannot run: only the Python API can.

    Raises:
        ModelError: names what the model is.
    """
    saved = tuple(getattr(config, "architectures", None) or ())
    kind = getattr(config, "model_type", "")
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in saved)
    if getattr(config, "is_encoder_decoder", False):
        what = "a model with an encoder and a decoder"
    elif any(name.endswith(_CLASSIFIERS) for name in saved):
        what = "a classifier"
    elif kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not causal:
        what = "an encoder"
    else:
        return
    raise ModelError(
        f"a recipe trains models that continue text, and this is {what}",
        where=f"model.model_name_or_path, {saved[0] if saved else kind}",
        fix="use collect, make_plan, attach and export on a model that you loaded, and a trainer of transformers; "
        "benchmarks/glue_minilm.py does so",
    )


def loader(config: Any) -> Any:
    """The Auto class of transformers that loads the model of a config.

    Raises:
        ModelError: see `refuse_unrecipied`.
    """
    if architecture(config) == "causal":
        refuse_unrecipied(config)
    return _LOADERS[architecture(config)]


def heads(model: nn.Module) -> list[str]:
    """Names of the modules beside the body of a model that classifies sequences or tokens.

    Such heads are trained whole: mostly they are drawn at random when a body is loaded, and an adapter of random
    weights has nothing to start from.
    """
    if not type(model).__name__.endswith(_CLASSIFIERS):
        return []
    body = getattr(model, "base_model", None)
    return [
        name for name, child in model.named_children() if child is not body and any(True for _ in child.parameters())
    ]
