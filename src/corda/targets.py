"""Which layers can be adapted, and which were asked for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from corda.errors import TargetError
from corda.recipe import Tower
from corda.sharding import stored_weight
from corda.towers import tower_of, towers

Kind = Literal["linear", "conv1d"]


@dataclass(frozen=True)
class LayerSpec:
    """One adaptable layer.

    Attributes:
        name: Full dotted name in the model.
        kind: "linear" (weight is (d_out, d_in)) or "conv1d" (transformers' Conv1D, weight is (d_in, d_out)).
        d_out: Output features.
        d_in: Input features.
    """

    name: str
    kind: Kind
    d_out: int
    d_in: int

    @property
    def max_rank(self) -> int:
        """min(d_out, d_in)."""
        return min(self.d_out, self.d_in)

    def as_json(self) -> dict[str, Any]:
        """Plain dict."""
        return asdict(self)


def adaptable_layers(model: nn.Module) -> list[LayerSpec]:
    """Every nn.Linear and Conv1D in module order, the output head among them.

    The inner projection of nn.MultiheadAttention is none: it is never called, only its weight is read.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            found.append(LayerSpec(name, "conv1d", module.weight.shape[1], module.weight.shape[0]))
        elif isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear):
            found.append(LayerSpec(name, "linear", module.out_features, module.in_features))
    return found


def find_targets(
    model: nn.Module,
    target_modules: str | Sequence[str] = "all-linear",
    where: Sequence[Tower] | None = None,
) -> list[LayerSpec]:
    """The layers that `target_modules` names, in module order.

    Args:
        model: Any transformers model, before or without PEFT.
        target_modules: "all-linear" (all but the output head); a list of names, where "q_proj" matches every layer
            whose dotted name ends in it; or one regular expression that has to match the full dotted name.
        where: Towers of a vision-language model that are looked at; default: the language model.

    Raises:
        TargetError: nothing matched, or one name of the list matched nothing; lists what there is.
    """
    layers = _of_towers(model, adaptable_layers(model), where)
    if not layers:
        raise TargetError("the model has no linear layer to adapt", where=type(model).__name__)
    if target_modules == "all-linear":
        head = output_head(model)
        chosen = [layer for layer in layers if layer.name != head]
    elif isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise TargetError(
                "target_modules is not a regular expression", got=f"{target_modules!r}: {error}"
            ) from None
        chosen = [layer for layer in layers if pattern.fullmatch(layer.name) or layer.name == target_modules]
        if not chosen:
            chosen = [layer for layer in layers if _ends_in(layer.name, target_modules)]
    else:
        unmatched = [t for t in target_modules if not any(_ends_in(layer.name, t) for layer in layers)]
        if unmatched:
            raise _nothing_matched(layers, unmatched)
        chosen = [layer for layer in layers if any(_ends_in(layer.name, t) for t in target_modules)]
    if not chosen:
        raise _nothing_matched(layers, [str(target_modules)])
    return chosen


def _of_towers(model: nn.Module, layers: list[LayerSpec], where: Sequence[Tower] | None) -> list[LayerSpec]:
    found = towers(model)
    if not found:
        if where is not None:
            raise TargetError(
                "only a vision-language model has towers",
                where="adapter.towers",
                got=f"{list(where)} for {type(model).__name__}",
                fix="leave towers out",
            )
        return layers
    wanted = set(where) if where is not None else {"language"}
    chosen = [layer for layer in layers if tower_of(layer.name, found) in wanted]
    if not chosen:
        raise TargetError(
            "the towers have no linear layer to adapt",
            where="adapter.towers",
            got=", ".join(sorted(wanted)),
            expected=", ".join(sorted({tower_of(layer.name, found) for layer in layers})),
            fix="name another tower",
        )
    return chosen


def output_head(model: nn.Module) -> str | None:
    """Dotted name of the output embeddings, or None for a model without a head."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def weight_of(model: nn.Module, layer: LayerSpec, weight: Tensor | None = None) -> Tensor:
    """The layer's weight as (d_out, d_in) fp32, detached; a view where no conversion is needed.

    Args:
        model: Where the layer is.
        layer: Which one.
        weight: The stored parameter, where the model itself has none. One that is sharded by FSDP2 is gathered: all
            processes then have to ask for the same layer.
    """
    stored = (stored_weight(model.get_submodule(layer.name)) if weight is None else weight).detach()
    return (stored.T if layer.kind == "conv1d" else stored).to(torch.float32)


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _nothing_matched(layers: Sequence[LayerSpec], unmatched: Sequence[str]) -> TargetError:
    endings = sorted({layer.name.rpartition(".")[2] for layer in layers})
    near = [m for t in unmatched for m in difflib.get_close_matches(t.rpartition(".")[2], endings, n=1, cutoff=0.5)]
    hint = f"did you mean {', '.join(near)}? " if near else ""
    return TargetError(
        f"target_modules matches no layer: {', '.join(map(repr, unmatched))}",
        where="adapter.target_modules",
        expected=f"names ending in {', '.join(endings)} (as in {layers[0].name}), or all-linear",
        fix=f"{hint}correct the name",
    )
