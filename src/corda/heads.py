"""Heads of classifiers: trained in full beside the adapter, saved and exported with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from corda.forms import TRAINED


def trained_heads(model: PeftModel) -> dict[str, Tensor]:
    """Full parameter name in the base -> its trained values, of its shape, fp32 or as trained, on the CPU."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and TRAINED in module.modules_to_save:
            for own, value in module.modules_to_save[TRAINED].named_parameters():
                found[f"{name}.{own}"] = value.detach().cpu().clone()
    return found


@torch.no_grad()
def set_heads(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy trained heads into a base model.

    Args:
        model: Changed in place.
        values: Full parameter name -> values of its shape.
    """
    for name, value in values.items():
        model.get_parameter(name).copy_(value)


@contextmanager
def with_heads(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, a base model has other heads.

    Args:
        model: The base.
        values: Full parameter name -> values of its shape.
    """
    before = {name: model.get_parameter(name).detach().clone() for name in values}
    set_heads(model, values)
    try:
        yield
    finally:
        set_heads(model, before)
