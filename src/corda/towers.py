"""The parts of a vision-language model: the language model, the vision encoder, and the projector between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from corda.architectures import takes_images
from corda.errors import TargetError
from corda.recipe import Tower

# Projectors that sit inside of the vision encoder (Qwen-VL).
_INSIDE = ("merger", "deepstack_merger_list")


def towers(model: Any) -> dict[Tower, tuple[str, ...]]:
    """Full dotted names of the modules that make up each tower; empty for a model of text alone.

    Args:
        model: A transformers model, before or without PEFT.

    Raises:
        TargetError: a model that takes images, but whose towers cannot be told apart.
    """
    if not takes_images(getattr(model, "config", None)):
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    decoder, encoder = model.get_decoder(), model.get_encoder(modality="image")
    whole = {id(model), id(model.base_model)}
    if id(decoder) in whole or id(encoder) in whole or decoder is encoder:
        raise TargetError(
            "the language model and the vision encoder cannot be told apart",
            where=type(model).__name__,
            expected="modules of their own, as in LLaVA, Qwen-VL, Idefics3 and SmolVLM",
            fix="use a model of one of these layouts",
        )
    language, vision = names[id(decoder)], names[id(encoder)]
    parent = model.get_submodule(vision.rpartition(".")[0])
    beside = [names[id(child)] for child in parent.children() if child is not decoder and child is not encoder]
    inside = [names[id(child)] for name, child in encoder.named_children() if name in _INSIDE]
    head = model.get_output_embeddings()
    projector = tuple(name for name in [*beside, *inside] if _has_linear(model.get_submodule(name), head))
    return {"language": (language,), "vision": (vision,), "projector": projector}


def tower_of(name: str, found: Mapping[Tower, tuple[str, ...]]) -> Tower:
    """Which tower a layer is in; what is in none of them, such as the output head, goes with the language model.

    Args:
        name: Full dotted name.
        found: From `towers`.
    """
    order: tuple[Tower, ...] = ("projector", "vision")
    for tower in order:
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in found.get(tower, ())):
            return tower
    return "language"


def _has_linear(module: nn.Module, head: nn.Module | None) -> bool:
    return any(isinstance(part, nn.Linear) and part is not head for part in module.modules())
