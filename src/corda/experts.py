"""Mixtures of experts as transformers 5 holds them: one stacked parameter for all experts of a projection.

Such a module takes hidden states (tokens, d), the experts chosen for each token (tokens, k) and their weights. Expert e
of `gate_up_proj` sees the hidden states of the tokens routed to it; expert e of `down_proj` sees what the module itself
makes of them, which is computed again here from the module's own weights, biases and gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from corda.errors import CalibrationError, TargetError

_FIRST, _LAST = ("gate_up_proj", "up_proj"), "down_proj"


@dataclass(frozen=True)
class Stack:
    """One stacked parameter.

    Attributes:
        parameter: Its name in the experts module.
        experts: E.
        d_out: Output features of an expert.
        d_in: Input features of an expert.
        transposed: Stored as (E, d_in, d_out) instead of (E, d_out, d_in).
        last: Whether its input is what the experts have made of the module's.
    """

    parameter: str
    experts: int
    d_out: int
    d_in: int
    transposed: bool
    last: bool


def is_stacked(module: nn.Module) -> bool:
    """Whether a module is of the common form of transformers 5: one of `use_experts_implementation`."""
    return all(hasattr(module, name) for name in ("_apply_gate", "has_gate", "has_bias", "is_transposed"))


def stacks(module: nn.Module) -> list[Stack]:
    """The stacked parameters of an experts module, in the order of the forward pass; none for another module."""
    if not is_stacked(module):
        return []
    transposed = bool(module.is_transposed)
    found = []
    for name in (*_FIRST, _LAST):
        parameter = dict(module.named_parameters(recurse=False)).get(name)
        if parameter is not None and parameter.dim() == 3:
            experts, first, second = parameter.shape
            d_out, d_in = (second, first) if transposed else (first, second)
            found.append(Stack(name, experts, d_out, d_in, transposed, name == _LAST))
    return found


def refuse_unknown(model: nn.Module) -> None:
    """Refuse experts whose inputs cannot be told apart.

    Raises:
        TargetError: names the module and what would be needed.
    """
    for name, module in model.named_modules():
        if is_stacked(module) or isinstance(module, nn.modules.conv._ConvNd):
            continue
        for parameter, value in module.named_parameters(recurse=False):
            if value.dim() == 3 and value.shape[0] > 1 and "expert" in f"{name}.{type(module).__name__}".lower():
                raise TargetError(
                    "the experts of this model are stacked in a form whose inputs cannot be told apart",
                    where=f"{name}.{parameter} of {type(module).__name__}",
                    got=f"shape {tuple(value.shape)}",
                    expected="experts of transformers' use_experts_implementation, or one nn.Linear per expert",
                    fix="name other layers in target_modules, e.g. those of the attention",
                )


def routed(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> tuple[Tensor, Tensor]:
    """Hidden states (tokens, d) and chosen experts (tokens, k) among the arguments of an experts module's forward.

    Args:
        module: Holds the stacked parameters.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
        name: Full dotted name of the module.

    Raises:
        CalibrationError: they are not there.
    """
    given = [*args, *kwargs.values()]
    hidden, index = (given[0], given[1]) if len(given) > 1 else (None, None)
    if isinstance(hidden, Tensor) and isinstance(index, Tensor) and not index.is_floating_point():
        rows, chosen = hidden.detach().reshape(-1, hidden.shape[-1]), index.reshape(-1, index.shape[-1])
        if len(rows) == len(chosen):
            return rows, chosen
    raise CalibrationError(
        "cannot tell which tokens go to which expert",
        where=f"{name} of {type(module).__name__}",
        got=f"arguments {[tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in given]}",
        expected="hidden states and the indices of the chosen experts",
        fix="leave the experts out of target_modules",
    )


def by_expert(hidden: Tensor, index: Tensor, counts: Tensor | None, experts: int) -> Iterator[tuple[int, Tensor]]:
    """(expert, its inputs) for every expert that a counted token is routed to.

    Args:
        hidden: (tokens, d).
        index: (tokens, k); E and above mean no expert.
        counts: (tokens,) bool, or None for all of them.
        experts: E.
    """
    chosen = index if counts is None else index.masked_fill(~counts[:, None], experts)
    for expert in torch.unique(chosen).tolist():
        if expert < experts:
            yield int(expert), hidden[(chosen == expert).any(dim=1)]


def between(module: Any, expert: int, x: Tensor) -> Tensor:
    """What expert `expert` hands to its down_proj for inputs x (tokens, d): (tokens, d_ff).

    Args:
        module: Holds the stacked parameters.
        expert: Its number.
        x: (tokens, d).
    """
    name = _FIRST[0] if module.has_gate else _FIRST[1]
    weight = getattr(module, name)[expert]
    out = x.to(weight.dtype) @ (weight if module.is_transposed else weight.T)
    if module.has_bias:
        out = out + getattr(module, f"{name}_bias")[expert]
    inner: Tensor = module._apply_gate(out) if module.has_gate else module.act_fn(out)
    return inner


def one_of(stack: Tensor, expert: int, transposed: bool) -> Tensor:
    """The (d_out, d_in) view of one expert in a stacked parameter.

    Args:
        stack: (experts, ...), the stacked parameter.
        expert: Its number.
        transposed: Stored as (d_in, d_out).
    """
    return stack[expert].T if transposed else stack[expert]
