"""Collecting from images: what counts in each tower, and a calibration set that enters the language model embedded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from corda.context.capture import Capture, hooked
from corda.data.batches import Batch
from corda.errors import CalibrationError
from corda.targets import LayerSpec
from corda.towers import tower_of, towers

_CARRIED = {"inputs_embeds", "attention_mask", "position_ids"}


class _ReachedError(Exception):
    """Ends a forward pass at the language model."""


@contextmanager
def patches_counted(model: PreTrainedModel, capture: Capture) -> Iterator[None]:
    """Inside, every patch of an image counts in the vision encoder and the projector, but not what pads an image.

    The text's own counts, in which an image is as many tokens as it has places, hold in the language model.

    Args:
        model: With its towers.
        capture: What counts.
    """
    found = towers(model)
    handles = []

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("patch_attention_mask")
        padded = isinstance(mask, Tensor) and not bool(mask.all())
        capture.begin(mask.flatten(1).bool() if padded and isinstance(mask, Tensor) else None)

    def leave(_module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        capture.end()

    try:
        for name in (*found.get("vision", ()), *found.get("projector", ())):
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def refuse_response_only(model: PreTrainedModel, layers: Sequence[LayerSpec]) -> None:
    """Refuse to count response tokens alone where layers see patches, which belong to no response.

    Args:
        model: With its towers.
        layers: Target layers.

    Raises:
        CalibrationError: such a layer is among the targets.
    """
    found = towers(model)
    layer = next((layer for layer in layers if found and tower_of(layer.name, found) != "language"), None)
    if layer is not None:
        raise CalibrationError(
            "a layer of the vision encoder or projector has no response tokens",
            where=layer.name,
            fix="set positions: all, or leave these towers out",
        )


def embedded(model: PreTrainedModel, parts: Iterable[Batch], device: torch.device) -> list[Batch] | None:
    """The batches as they enter the language model: the vision encoder and the projector are run once, here.

    Args:
        model: Of images and text; left as it was.
        parts: Batches on the CPU.
        device: Where the model is.

    Returns:
        Batches on the CPU with `inputs_embeds` (B, L, d) and the model's own positions; None where the language model
        is handed more than embeddings, positions and a mask of tokens.
    """
    decoder = model.get_decoder()
    caught: dict[str, Any] = {}

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.update(kwargs)
        raise _ReachedError

    found = []
    handle = decoder.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with hooked(model, Capture([])):
            for cpu_batch in parts:
                batch = cpu_batch.to(device)
                caught.clear()
                tokens = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
                with suppress(_ReachedError):
                    model.base_model(**tokens, use_cache=False, **(batch.more or {}))
                if not _carried(caught):
                    return None
                more = {name: caught[name].cpu() for name in _CARRIED if caught.get(name) is not None}
                found.append(replace(cpu_batch, more=more))
    finally:
        handle.remove()
    return found


def _carried(caught: dict[str, Any]) -> bool:
    """Whether a batch holds all that a language model was called with."""
    mask = caught.get("attention_mask")
    plain = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
    others = [value for name, value in caught.items() if name not in _CARRIED]
    return plain and "inputs_embeds" in caught and all(v is None or isinstance(v, bool | int | float) for v in others)
