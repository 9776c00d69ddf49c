"""Whether the calibration set goes through a model block by block or whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from corda.context.blocks import block_arguments, find_blocks, run_block
from corda.context.capture import Capture, hooked
from corda.context.feeding import is_causal
from corda.context.vision import embedded
from corda.data.batches import Batch
from corda.distributed import Processes
from corda.sharding import is_spread
from corda.targets import LayerSpec

_TRIED = 16  # tokens
# What a block raises where it lacks what another one has for it.
_LACKING = (KeyError, IndexError, TypeError, AttributeError, RuntimeError, AssertionError)
_TOLERANCE = 0.02  # relative; rounding to 16 bits is far below, a scale or a convolution far above


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


def _handed_on(
    model: PreTrainedModel,
    body: nn.Module,
    blocks: Sequence[nn.Module],
    rounds: Sequence[Sequence[Batch]],
    device: torch.device,
) -> bool:
    """Whether each block takes what the one before it returned, tried on a few tokens against the body as a whole.

    Some bodies convolve or scale between blocks, or hand keys and values on beside the hidden states. Weights that are
    not here, or spread, are not brought in for this: such a model is taken to be like most.
    """
    batch = next((part for parts in rounds for part in parts), None)
    if batch is None or is_spread(model) or any(p.is_meta for p in body.parameters()):
        return True
    # BigBird gives up its sparse attention for good where a row is short.
    length = None if hasattr(model.base_model, "set_attention_type") else _TRIED
    ids = batch.input_ids[:1, batch.attention_mask[0].bool()][:, :length].to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | (
        {"use_cache": False} if is_causal(model) else {}
    )
    entered: list[list[Tensor]] = [[] for _ in blocks]
    wrap: Callable[[Tensor], Any] = lambda states: states  # noqa: E731
    with hooked(model, Capture([])), ExitStack() as stack:
        for index, block in enumerate(blocks):

            def note(_block: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
                states = args[0] if args else kwargs.get("hidden_states")
                if isinstance(states, Tensor):
                    entered[index].append(states)

            stack.callback(block.register_forward_pre_hook(note, with_kwargs=True).remove)
        body(**inputs)
    if any(len(states) != 1 for states in entered):  # ALBERT runs one block again and again
        return False
    states = entered[0][0]
    with suppress(*_LACKING), hooked(model, Capture([])):
        for index, block in enumerate(blocks):
            if not _close(states, entered[index][0]):
                return False
            _, args, kwargs = block_arguments(body, blocks, index, inputs, wrap)
            states, wrap = run_block(block, states, args, kwargs)
        return True
    return False


def _close(one: Tensor, two: Tensor) -> bool:
    difference = (one.double() - two.double()).norm() if one.shape == two.shape else torch.inf
    return bool(difference <= _TOLERANCE * two.double().norm())


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
        known = _handed_on(model, body, [block for _, block in blocks], rounds, device)
        if all(processes.hear(known)):
            return Route(blocks, rounds, body)
        why = "what a block returns is not what the next one takes"
        return Route(None, rounds, body_of(model, layers), why)
    entering = [embedded(model, parts, device) for parts in rounds]
    ready = [parts for parts in entering if parts is not None]
    if all(processes.hear(len(ready) == len(rounds))):
        return Route(blocks, ready, body)
    why = "the language model takes more than embeddings from the vision encoder"
    return Route(None, rounds, body_of(model, layers), why)
