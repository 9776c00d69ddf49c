"""Which layers can be adapted, and which were asked for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from corda import experts
from corda.architectures import heads
from corda.errors import ModelError, TargetError
from corda.recipe import Tower
from corda.sharding import stored_weight, whole
from corda.towers import tower_of, towers

_FLOATS = {torch.float32, torch.bfloat16, torch.float16, torch.float64}
Kind = Literal["linear", "conv1d", "expert", "expert_t"]
_NUMBERED = re.compile(r"(.*\.experts)\.(?:expert_)?(\d+)\.(.+)")


@dataclass(frozen=True)
class LayerSpec:
    """One adaptable layer.

    Attributes:
        name: Full dotted name in the model; for an expert of a stacked parameter, the parameter's name and its number.
        kind: "linear" (weight is (d_out, d_in)), "conv1d" (transformers' Conv1D, weight is (d_in, d_out)), "expert" or
            "expert_t": one of the matrices (d_out, d_in) or (d_in, d_out) of a stacked parameter.
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

    @property
    def stored(self) -> tuple[str, int | None]:
        """Full name of the parameter that holds the weight, and which of its matrices it is."""
        return stored_as(self.name, self.kind)

    @property
    def pool(self) -> str | None:
        """What the experts of one projection share, or None for a layer that every token reaches."""
        name, expert = self.stored
        if expert is not None:
            return name
        numbered = _NUMBERED.fullmatch(self.name)
        return f"{numbered[1]}.*.{numbered[3]}" if numbered else None

    def as_json(self) -> dict[str, Any]:
        """Plain dict."""
        return asdict(self)


def stored_as(name: str, kind: str) -> tuple[str, int | None]:
    """See `LayerSpec.stored`.

    Args:
        name: Full dotted name of the layer.
        kind: Its kind.
    """
    if kind not in {"expert", "expert_t"}:
        return f"{name}.weight", None
    parameter, _, expert = name.rpartition(".")
    return parameter, int(expert)


def adaptable_layers(model: nn.Module) -> list[LayerSpec]:
    """Every nn.Linear, Conv1D and stacked expert in module order, the output head among them.

    The inner projection of nn.MultiheadAttention is none: it is never called, only its weight is read.
    """
    return [layer for name, module in model.named_modules() for layer in _layers_of(module, name)]


def _layers_of(module: nn.Module | None, name: str) -> list[LayerSpec]:
    """What a module is, or holds as stacked parameters."""
    if module is None or isinstance(module, NonDynamicallyQuantizableLinear):
        return []
    if isinstance(module, Conv1D):
        return [LayerSpec(name, "conv1d", module.weight.shape[1], module.weight.shape[0])]
    if isinstance(module, nn.Linear):
        return [LayerSpec(name, "linear", module.out_features, module.in_features)]
    return [
        LayerSpec(
            f"{name}.{stack.parameter}.{e}", "expert_t" if stack.transposed else "expert", stack.d_out, stack.d_in
        )
        for stack in experts.stacks(module)
        for e in range(stack.experts)
    ]


def _module(model: nn.Module, name: str) -> nn.Module | None:
    """The module of that name, without PEFT's wrappers."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    unwrap: Any = getattr(module, "get_base_layer", None)
    return unwrap() if callable(unwrap) else module


def find_targets(
    model: nn.Module,
    target_modules: str | Sequence[str] = "all-linear",
    where: Sequence[Tower] | None = None,
) -> list[LayerSpec]:
    """The layers that `target_modules` names, in module order.

    Args:
        model: Any transformers model, before or without PEFT.
        target_modules: "all-linear" (all but the output head, routers and gates of one output); a list of names, where
            "q_proj" matches every layer, or all experts of a stacked parameter, whose dotted name ends in it; or one
            regular expression that has to match the full dotted name.
        where: Towers of a vision-language model that are looked at; default: the language model.

    Raises:
        TargetError: nothing matched, or one name of the list matched nothing; lists what there is. Or all-linear in a
            model whose experts are stacked in an unknown form. Or the model is compiled.
    """
    _refuse_compiled(model)
    layers = _of_towers(model, adaptable_layers(model), where)
    if not layers:
        raise TargetError("the model has no linear layer to adapt", where=type(model).__name__)
    if target_modules == "all-linear":
        experts.refuse_unknown(model)
        head = output_head(model)
        apart = {head, *heads(model)}
        chosen = [
            layer for layer in layers if layer.d_out > 1 and not apart & {layer.name, layer.name.partition(".")[0]}
        ]
    elif isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise TargetError(
                "target_modules is not a regular expression", got=f"{target_modules!r}: {error}"
            ) from None
        chosen = [layer for layer in layers if pattern.fullmatch(layer.name) or layer.name == target_modules]
        if not chosen:
            chosen = [layer for layer in layers if _named(layer, target_modules)]
    else:
        unmatched = [t for t in target_modules if not any(_named(layer, t) for layer in layers)]
        if unmatched:
            raise _nothing_matched(layers, unmatched)
        chosen = [layer for layer in layers if any(_named(layer, t) for t in target_modules)]
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


def _refuse_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise TargetError(
                "the layers of a compiled model cannot be watched",
                where=name or type(model).__name__,
                fix="collect and attach first, and compile what attach returns",
            )


def output_head(model: nn.Module) -> str | None:
    """Dotted name of the output embeddings, or None for a model without a head."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def spec_of(model: nn.Module, name: str) -> LayerSpec:
    """The layer of that full name, bare or wrapped by PEFT.

    Raises:
        TargetError: there is none.
    """
    known = _layers_of(_module(model, name), name)
    if not known:
        owner = name.rpartition(".")[0].rpartition(".")[0]
        known = _layers_of(_module(model, owner), owner)
    found = next((layer for layer in known if layer.name == name), None)
    if found is None:
        raise TargetError("there is no such layer in the model", where=name)
    return found


def refuse_shared(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse layers whose weight another module uses too, where W - BA is to replace it: a tied head above all.

    Args:
        model: The model.
        names: Full dotted names of layers.

    Raises:
        TargetError: names the first such layer and what else uses its weight.
    """
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for name in names:
        same = users[id(model.get_parameter(spec_of(model, name).stored[0]))]
        if len(same) > 1:
            raise TargetError(
                "a layer shares its weight with another module, which W - BA would change too",
                where=name,
                got=", ".join(same),
                fix="leave it out of target_modules, or use corda.attach with base: intact, which leaves W alone",
            )


def weight_view(model: nn.Module, layer: LayerSpec) -> Tensor:
    """The stored weight as (d_out, d_in) in its own dtype, sharing its memory, detached.

    Args:
        model: Where it is.
        layer: Which one.
    """
    return _oriented(model.get_parameter(layer.stored[0]), layer)


def weight_of(model: nn.Module, layer: LayerSpec, weight: Tensor | None = None) -> Tensor:
    """The layer's weight as (d_out, d_in) fp32, detached; a view where no conversion is needed.

    Args:
        model: Where the layer is.
        layer: Which one.
        weight: The stored parameter, where the model itself has none. One that is sharded by FSDP2 is gathered: all
            processes then have to ask for the same layer.

    Raises:
        ModelError: what is stored is no matrix of numbers, as in 8 or 4 bits.
    """
    if weight is None and layer.stored[1] is None:
        weight = stored_weight(model.get_submodule(layer.name))
    elif weight is None:
        weight = whole(model.get_parameter(layer.stored[0]).detach())
    found = _oriented(weight, layer)
    if found.dtype not in _FLOATS or tuple(found.shape) != (layer.d_out, layer.d_in):
        raise ModelError(
            "a layer's weight cannot be decomposed as it is stored",
            where=layer.name,
            got=f"{found.dtype} {tuple(found.shape)}",
            expected=f"a float matrix {(layer.d_out, layer.d_in)}",
            fix="load the model unquantised for collecting and planning, or use a recipe with model.load_in_4bit",
        )
    return found.to(torch.float32)


def _oriented(stored: Tensor, layer: LayerSpec) -> Tensor:
    expert = layer.stored[1]
    if expert is not None:
        return experts.one_of(stored.detach(), expert, layer.kind == "expert_t")
    return stored.detach().T if layer.kind == "conv1d" else stored.detach()


def _named(layer: LayerSpec, target: str) -> bool:
    name, expert = layer.stored
    names = [layer.name, name] if expert is not None else [layer.name]
    return any(each == target or each.endswith("." + target) for each in names)


def _nothing_matched(layers: Sequence[LayerSpec], unmatched: Sequence[str]) -> TargetError:
    endings = sorted({layer.stored[0].removesuffix(".weight").rpartition(".")[2] for layer in layers})
    near = [m for t in unmatched for m in difflib.get_close_matches(t.rpartition(".")[2], endings, n=1, cutoff=0.5)]
    hint = f"did you mean {', '.join(near)}? " if near else ""
    return TargetError(
        f"target_modules matches no layer: {', '.join(map(repr, unmatched))}",
        where="adapter.target_modules",
        expected=f"names ending in {', '.join(endings)} (as in {layers[0].name}), or all-linear",
        fix=f"{hint}correct the name",
    )
