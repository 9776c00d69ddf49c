"""Whether the calibration set goes through a model block by block or whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from corda.context.blocks import find_blocks
from corda.context.vision import embedded
from corda.data.batches import Batch
from corda.distributed import Processes
from corda.targets import LayerSpec


def body_of(model: PreTrainedModel, layers: Sequence[LayerSpec]) -> nn.Module:
    """The model without its head where no target lies outside of it: logits are never needed.

    Args:
        model: Of transformers.
        layers: Target layers.
    """
    body: nn.Module = model.base_model
    inside = {id(module) for module in body.modules()}
    places = (model.get_submodule(layer.stored[0].rpartition(".")[0]) for layer in layers)
    return body if all(id(module) in inside for module in places) else model


@dataclass(frozen=True)
class Route:
    """How the calibration set goes through the model.

    Attributes:
        blocks: Names and modules to run one by one; None for the whole body at once.
        rounds: Batches of every round, as they enter `body`.
        body: The part of the model that is run.
        why: Why not in blocks.
    """

    blocks: list[tuple[str, nn.Module]] | None
    rounds: list[list[Batch]]
    body: nn.Module
    why: str = ""


def find_route(
    model: PreTrainedModel,
    layers: Sequence[LayerSpec],
    rounds: list[list[Batch]],
    images: bool,
    processes: Processes,
    device: torch.device,
) -> Route:
    """Block by block where the model allows it; with images that is the language model, after all else has run.

    Args:
        model: To run.
        layers: Target layers.
        rounds: Batches on the CPU.
        images: Whether there are any in the batches.
        processes: Those that share the batches out.
        device: Where the model is.
    """
    body = model.get_decoder() if images else body_of(model, layers)
    blocks = find_blocks(body, model, layers)
    if blocks is None:
        inside = "the blocks of the language model" if images else "one list of blocks"
        return Route(None, rounds, body_of(model, layers), f"the targets do not all lie in {inside}")
    if not images:
        return Route(blocks, rounds, body)
    entering = [embedded(model, parts, device) for parts in rounds]
    ready = [parts for parts in entering if parts is not None]
    if all(processes.hear(len(ready) == len(rounds))):
        return Route(blocks, ready, body)
    why = "the language model takes more than embeddings from the vision encoder"
    return Route(None, rounds, body_of(model, layers), why)
