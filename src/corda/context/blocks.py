"""A decoder's repeated blocks, found in the module tree, and running one of them at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from corda.targets import LayerSpec


class _ReachedError(Exception):
    """Ends a forward pass at the block whose arguments were wanted."""


def find_blocks(body: nn.Module, model: nn.Module, layers: Sequence[LayerSpec]) -> list[tuple[str, nn.Module]] | None:
    """Names (in `model`) and modules of the blocks, or None if the targets do not all lie in one list of blocks.

    The blocks are the elements of the outermost nn.ModuleList inside `body` that holds every target layer.

    Args:
        body: The decoder without its head.
        model: The model that it is in.
        layers: Target layers.
    """
    inside = {id(module) for module in body.modules()}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or id(module) not in inside or len(module) == 0:
            continue
        if all(layer.name.startswith(f"{name}.") for layer in layers):
            return [(f"{name}.{index}", block) for index, block in enumerate(module)]
    return None


def block_arguments(
    body: nn.Module, blocks: Sequence[nn.Module], index: int, inputs: dict[str, Any], wrap: Callable[[Tensor], Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Hidden states that enter `body`'s first block, and every other argument that block `index` is called with.

    The body runs with the blocks before `index` skipped, so masks and position embeddings are the model's own, layer
    by layer, at the cost of an embedding look-up.

    Args:
        body: The decoder without its head.
        blocks: Its blocks.
        index: Which one.
        inputs: Keyword arguments of the body.
        wrap: Puts hidden states into the form that a block returns.

    Returns:
        Hidden states (B, L, d), positional arguments behind them, and keyword arguments.
    """
    caught: dict[str, Any] = {}

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught["kwargs"] = dict(kwargs)
        caught["args"] = args
        raise _ReachedError

    with ExitStack() as stack:
        for block in blocks[:index]:
            stack.enter_context(_skipped(block, wrap))
        handle = blocks[index].register_forward_pre_hook(stop, with_kwargs=True, prepend=True)  # before it is gathered
        stack.callback(handle.remove)
        with suppress(_ReachedError):
            body(**inputs)
    args, kwargs = caught["args"], caught["kwargs"]
    hidden = args[0] if args else kwargs.pop("hidden_states")
    assert isinstance(hidden, Tensor)
    return hidden, tuple(args[1:]), kwargs


def run_block(
    block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Hidden states after a block, and how it wraps them (some return a tuple).

    Args:
        block: The block.
        hidden: (B, L, d).
        args: Positional arguments behind the hidden states.
        kwargs: Keyword arguments.
    """
    with torch.no_grad():
        out = block(hidden, *args, **kwargs)
    if isinstance(out, tuple):
        rest = (None,) * (len(out) - 1)
        return out[0], lambda states: (states, *rest)
    assert isinstance(out, Tensor)
    return out, lambda states: states


@contextmanager
def _skipped(block: nn.Module, wrap: Callable[[Tensor], Any]) -> Iterator[None]:
    """Inside, the block hands its hidden states on unchanged, and hooks that would bring its weights in are not run."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return wrap(args[0] if args else kwargs["hidden_states"])

    own = vars(block).get("forward")  # accelerate's hooks put one there
    hooks = {name: vars(block)[name] for name in ("_forward_pre_hooks", "_forward_hooks")}  # FSDP's are there
    vars(block).update(forward=forward, _forward_pre_hooks=OrderedDict(), _forward_hooks=OrderedDict())
    try:
        yield
    finally:
        del vars(block)["forward"]
        vars(block).update(hooks)
        if own is not None:
            vars(block)["forward"] = own
