"""Run code for its bytes alone: models of fake tensors, and the peak of what is alive at one time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from corda.context.blocks import find_blocks
from corda.targets import LayerSpec

# TRL's training head works in tiles of so many logits at a time, tokens x vocabulary entries, in fp32; its torch code
# was measured to hold some 13 of them at once, its Triton kernels hold the logits and their gradient.
_TILE_TOKENS, _TILE_ENTRIES = 4096, 32768
TILES = {"cpu": 13, "cuda": 2}


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch
    """Bytes of the tensors that operations made inside of it and that are still alive; works for fake tensors too.

    Attributes:
        now: Bytes alive.
        peak: Most of them at any one time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.now, self.peak = 0, 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._note(tensor, 0)  # was there before: parameters, inputs
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor, tensor.untyped_storage().nbytes())
        return out

    def _note(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


@dataclass(frozen=True)
class Step:
    """What one batch costs in one part of a model.

    Attributes:
        fixed: Bytes whatever the number of blocks.
        per_block: Bytes more for every block.
        flops: Of one block.
    """

    fixed: int
    per_block: int
    flops: int

    def peak(self, blocks: int) -> int:
        """Bytes at the peak of a model of so many blocks."""
        return self.fixed + self.per_block * blocks


@contextmanager
def faked() -> Iterator[None]:
    """Inside, tensors have shapes, dtypes and a device but no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def forward_bytes(build: Callable[[], PreTrainedModel], layers: Sequence[LayerSpec], batch: int, length: int) -> Step:
    """Working memory of one forward pass through the decoder body, block by block, without gradients.

    Args:
        build: Makes the model; called under fake tensors.
        layers: Target layers, by which its blocks are found.
        batch: Rows.
        length: Tokens per row.
    """
    return _by_depth(build, layers, lambda model: _forward(model, batch, length))


def training_bytes(
    build: Callable[[], PreTrainedModel],
    layers: Sequence[LayerSpec],
    ranks: dict[str, int],
    batch: int,
    length: int,
    *,
    checkpointing: bool = False,
    intact: bool = True,
    tiles: int = 13,
) -> Step:
    """Activations, their gradients and working memory of one training step, optimiser and weights aside.

    Args:
        build: Makes the model; called under fake tensors.
        layers: Adapted layers.
        ranks: Layer name -> rank.
        batch: Rows.
        length: Tokens per row.
        checkpointing: Gradient checkpointing.
        intact: Whether each layer computes its initial factors' product too.
        tiles: Tiles of logits that the loss holds at once, see TILES.
    """

    def run(model: PreTrainedModel) -> tuple[int, int]:
        present = {name for name, _ in model.named_modules()}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for layer in layers:
            if layer.name in present:
                module = model.get_submodule(layer.name)
                module.register_forward_hook(_adapted(layer, ranks[layer.name], intact, module))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        return _backward(model, batch, length, tiles)

    return _by_depth(build, layers, run)


def _by_depth(
    build: Callable[[], PreTrainedModel],
    layers: Sequence[LayerSpec],
    run: Callable[[PreTrainedModel], tuple[int, int]],
) -> Step:
    """Measure with one block and with two; blocks of a decoder are alike."""
    found = []
    for depth in (1, 2):
        with faked():
            model = build().eval()
            _keep(model, layers, depth)
            found.append(run(model))
    (one, flops), (two, more) = found
    per_block = max(two - one, 0)
    return Step(one - per_block, per_block, more - flops)


def _keep(model: PreTrainedModel, layers: Sequence[LayerSpec], depth: int) -> None:
    """Drop all blocks but the first ones of a model that is thrown away afterwards."""
    blocks = find_blocks(model.base_model, model, layers)
    if blocks is None or len(blocks) < depth:
        raise ValueError("no list of blocks")
    name = blocks[0][0].rpartition(".")[0]
    parent = model.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], nn.ModuleList([block for _, block in blocks[:depth]]))


def _inputs(batch: int, length: int) -> dict[str, Any]:
    ids = torch.zeros(batch, length, dtype=torch.long)
    return {"input_ids": ids, "position_ids": torch.arange(length).expand(batch, length), "use_cache": False}


def _forward(model: PreTrainedModel, batch: int, length: int) -> tuple[int, int]:
    inputs = _inputs(batch, length)
    with torch.no_grad(), Live() as live:
        model.base_model(**inputs)
    return live.peak, 0


def _backward(model: PreTrainedModel, batch: int, length: int, tiles: int) -> tuple[int, int]:
    inputs = _inputs(batch, length)
    with Live() as live:
        hidden = model.base_model(**inputs)[0]
        # The loss is computed in tiles, forwards and backwards; the head itself is frozen.
        vocabulary = model.get_output_embeddings().weight.shape[0]
        rows, columns = min(batch * length, _TILE_TOKENS), min(vocabulary, _TILE_ENTRIES)
        held = [hidden.new_empty(rows, columns, dtype=torch.float32) for _ in range(tiles)]
        gradient = torch.ones_like(hidden)
        del held
        hidden.backward(gradient)
    with FlopCounterMode(display=False) as counter:  # apart: it keeps tensors alive
        hidden = model.base_model(**inputs)[0]
        hidden.backward(torch.ones_like(hidden))
    return live.peak, counter.get_total_flops()


def _adapted(layer: LayerSpec, rank: int, intact: bool, module: nn.Module) -> Callable[..., Tensor]:
    dtype = torch.float32
    pairs = [
        (torch.empty(rank, layer.d_in, dtype=dtype), torch.empty(layer.d_out, rank, dtype=dtype))
        for _ in range(2 if intact else 1)
    ]
    for factor in pairs[0]:
        factor.requires_grad_()
    linear = nn.functional.linear

    def hook(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = args[0].to(dtype)
        change = linear(linear(x, pairs[0][0]), pairs[0][1])
        for A, B in pairs[1:]:
            change = change - linear(linear(x, A), B)
        return (out + change * 1.0).to(out.dtype)

    return hook


def shared_inputs(build: Callable[[], PreTrainedModel], layers: Sequence[LayerSpec]) -> dict[str, str]:
    """Layer name -> group: which layers are handed the very same input, by a forward pass of fake tensors.

    Where all blocks hold the same layers, one of them stands for all.

    Args:
        build: Makes the model; called under fake tensors.
        layers: Target layers.

    Raises:
        Exception: whatever a model raises that cannot run without values.
    """
    with faked():
        model = build().eval()
        blocks = [name for name, _ in find_blocks(model.base_model, model, layers) or []]
        inside = [
            [layer.name.removeprefix(f"{b}.") for layer in layers if layer.name.startswith(f"{b}.")] for b in blocks
        ]
        alike = len(blocks) > 1 and all(names == inside[0] for names in inside)
        if alike:
            _keep(model, layers, 1)
        present = {name for name, _ in model.named_modules()}
        groups = _groups(model, [layer.name for layer in layers if layer.name in present])
    if alike:
        first = f"{blocks[0]}."
        of = {name.removeprefix(first): group.removeprefix(first) for name, group in groups.items()}
        groups = {
            f"{b}.{name}": f"{b}.{of.get(name, name)}"
            for b, names in zip(blocks, inside, strict=True)
            for name in names
        }
    return {layer.name: groups.get(layer.name, layer.name) for layer in layers}


def _groups(model: PreTrainedModel, names: Sequence[str]) -> dict[str, str]:
    groups: dict[str, str] = {}
    last: list[Any] = [None, ""]

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            groups.setdefault(name, last[1] if x is last[0] else name)
            last[:] = [x, groups[name]]

        return hook

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(hook_of(name), with_kwargs=True)
    with torch.no_grad():
        model.base_model(**_inputs(1, 8))
    return groups
