"""What a checkpoint's model is for, decided on its config and the recipe alone, and the class that loads it."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any, Literal

from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto import modeling_auto

from corda.errors import ModelError
from corda.options import ModelTask

# The class that loads a task's models, and its own list of the types that have one.
_LOADERS: dict[ModelTask, tuple[Any, Any]] = {
    "causal-lm": (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "image-text-to-text": (AutoModelForImageTextToText, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    "seq2seq-lm": (AutoModelForSeq2SeqLM, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "sequence-classification": (
        AutoModelForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "token-classification": (
        AutoModelForTokenClassification,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
}
_POSITIONS = ("position_embeddings", "embed_positions", "wpe")  # BERT and its like; OPT, BART; GPT-2
_CARRIES = re.compile("Mamba|Rwkv|LSTM|Lightning|LinearAtt|DeltaNet|Retention|Recurrent", re.IGNORECASE)
_HEADS: dict[str, ModelTask] = {
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
}


def task_of(config: Any, asked: Literal["auto"] | ModelTask = "auto") -> ModelTask:
    """What a model is for.

    What was asked for decides, else what the checkpoint says that it was saved from (`architectures`). Without either,
    a config with a vision tower means a model for images and text where there is one of its type.

    Args:
        config: A transformers config.
        asked: A recipe's `model.task`.

    Raises:
        ModelError: it is an encoder, which is for nothing until it is told; or transformers has no class for what was
            asked for.
    """
    kind = getattr(config, "model_type", "")
    if asked != "auto":
        _refuse_unknown(config, asked)
        return asked
    saved = tuple(getattr(config, "architectures", None) or ())
    for ending, task in _HEADS.items():
        if any(name.endswith(ending) for name in saved):
            return task
    with_images = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind)
    if with_images is not None and (
        with_images in saved
        or (not saved and takes_images(config))
        or kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ):
        return "image-text-to-text"
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq-lm"
    if _encodes(config):
        raise ModelError(
            "the checkpoint is an encoder, and nothing says what it is to be trained for",
            where=f"model.model_name_or_path, {saved[0] if saved else kind}",
            fix="set model.task: sequence-classification or token-classification, for which it gets a fresh head",
        )
    return "causal-lm"


def loader(config: Any, asked: Literal["auto"] | ModelTask = "auto") -> Any:
    """The Auto class of transformers that loads the model of a config.

    Args:
        config: A transformers config.
        asked: A recipe's `model.task`.

    Raises:
        ModelError: see `task_of`.
    """
    return _LOADERS[task_of(config, asked)][0]


def loader_name(task: ModelTask) -> str:
    """The name of the Auto class of a task's models."""
    return str(_LOADERS[task][0].__name__)


def task_of_model(model: nn.Module) -> ModelTask:
    """What a loaded model is for, by its class; causal-lm where that does not tell."""
    name = type(model).__name__
    for ending, task in _HEADS.items():
        if name.endswith(ending):
            return task
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq-lm"
    return "image-text-to-text" if takes_images(config) else "causal-lm"


def classes_of(model: nn.Module) -> tuple[str, ...]:
    """Names of a classifier's classes by number; none for any other model."""
    if not type(model).__name__.endswith(tuple(_HEADS)):
        return ()
    names: dict[int, str] = getattr(model, "config").id2label  # noqa: B009
    return tuple(names[i] for i in sorted(names))


def has_head(config: Any, task: ModelTask) -> bool:
    """Whether a checkpoint was saved with the head that a task needs.

    Args:
        config: Its config.
        task: What it is to be used for.
    """
    ending = next((ending for ending, known in _HEADS.items() if known == task), None)
    saved = tuple(getattr(config, "architectures", None) or ())
    return ending is not None and any(name.endswith(ending) for name in saved)


def takes_images(config: Any) -> bool:
    """Whether a config has a vision tower."""
    return getattr(config, "vision_config", None) is not None


def heads(model: nn.Module) -> list[str]:
    """Names of the modules beside the body of a model that classifies sequences or tokens.

    Such heads are trained whole: mostly they are drawn at random when a body is loaded, and an adapter of random
    weights has nothing to start from.
    """
    if not type(model).__name__.endswith(tuple(_HEADS)):
        return []
    body = getattr(model, "base_model", None)
    return [
        name for name, child in model.named_children() if child is not body and any(True for _ in child.parameters())
    ]


def _encodes(config: Any) -> bool:
    """Whether a config is that of an encoder, which does not continue text."""
    saved = tuple(getattr(config, "architectures", None) or ())
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in saved)
    return getattr(config, "model_type", "") in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not causal


def _refuse_unknown(config: Any, asked: ModelTask) -> None:
    kind = getattr(config, "model_type", "")
    known = kind in _LOADERS[asked][1] or getattr(config, "auto_map", None)
    one_way = asked == "causal-lm" and (_encodes(config) or getattr(config, "is_encoder_decoder", False))
    if known and not one_way:
        return
    possible = [
        task for task, (_, kinds) in _LOADERS.items() if kind in kinds and not (task == "causal-lm" and one_way)
    ]
    raise ModelError(
        f"a model of type {kind} cannot be loaded for this",
        where="model.task",
        got=asked,
        expected=", ".join(possible) or "a model type that transformers knows",
    )


def learned_positions(model: nn.Module) -> int | None:
    """The longest sequence that a model with an embedding of positions takes; None for one that computes them."""
    places = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(_POSITIONS) and "vision" not in name:
            padding = 0 if module.padding_idx is None else module.padding_idx + 1
            places.append(module.num_embeddings - int(getattr(module, "offset", padding)))
    return min(places, default=None)


def carrying(model: nn.Module) -> str | None:
    """A layer that carries a state along the whole row, so that records side by side in it are not kept apart.

    Convolutions over the sequence, as they are in front of state spaces and linear attention, and what has none but
    calls itself so.

    Args:
        model: Of text; the towers of a model with images are not looked at.

    Returns:
        Its name; None where attention alone mixes tokens.
    """
    for name, module in model.named_modules():
        inside = "vision" not in name and "visual" not in name and "audio" not in name
        if inside and (isinstance(module, nn.Conv1d) or _CARRIES.search(type(module).__name__)):
            return name or type(module).__name__
    return None


def embeddings_of(model: Any) -> list[nn.Module]:
    """The embedding of tokens and the output head, where a model has them and says so."""
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(NotImplementedError, AttributeError):
            module = getattr(model, name)()
            found += [module] if isinstance(module, nn.Module) else []
    return found
