"""Which inputs are tokens when the caller runs the model: what the attention_mask of each forward pass says."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from corda.context.capture import Capture
from corda.errors import CalibrationError


@contextmanager
def followed(model: nn.Module, capture: Capture) -> Iterator[None]:
    """Inside, each forward pass is a batch of `capture` whose tokens are those of its 2-D attention_mask.

    The model itself and any model inside of it that takes token ids or embeddings are watched, so it does not matter
    which of them is run. A pass without a mask counts what the pass around it counts, and every input where there is
    none.

    Raises:
        CalibrationError: a padded batch without a 2-D mask, whose tokens cannot be told from pads.
    """
    # Source and target have masks of their own, and cross-attention sees the one inside a pass of the other.
    two_sequences = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    running: list[nn.Module] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = attention_mask(module, args, kwargs)
        padded = mask is not None and not bool(mask.all())
        running.append(module)
        capture.begin(capture.counts if mask is None else mask if padded else None)
        if padded and two_sequences:
            raise CalibrationError(
                "padding in an encoder-decoder: pads cannot be told from tokens in every layer",
                where=type(module).__name__,
                fix="run the model on batches without padding, e.g. of one record",
            )

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        if not running or running[-1] is not module:  # a pass that failed before it was entered
            return
        running.pop()
        capture.end()
        if module is model:
            capture.check_finite()

    handles = []
    try:
        for module in model.modules():
            if module is model or _takes_tokens(module):
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def attention_mask(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The 2-D attention_mask among a forward pass's arguments as (B, L) bool, None if there is none.

    Where the mask is longer than the input, as with a key-value cache, it ends with the input's.

    Args:
        module: What is run.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """
    given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(given.get(name), Tensor):
            mask = mask[:, -given[name].shape[1] :]
            break
    return mask > 0


def _takes_tokens(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return "attention_mask" in parameters and bool({"input_ids", "inputs_embeds"} & set(parameters))
