"""Which layers and ranks PEFT will use for a configuration, and whether CorDA can be done on them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from corda.errors import ModelError, TargetError
from corda.forms import refuse_adapted
from corda.targets import LayerSpec, adaptable_layers, find_targets, refuse_shared

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def matched_layers(model: nn.Module, config: LoraConfig) -> list[LayerSpec]:
    """The layers that get_peft_model will adapt: corda looks for typos first, then PEFT itself matches.

    Args:
        model: The base model.
        config: Its target_modules, exclude_modules, layers_to_transform ...; without target_modules, PEFT's default
            for the model's type. Only read.

    Raises:
        AdapterError: the model carries an adapter already.
        TargetError: nothing matched, one name matched nothing, or an option that PEFT cannot combine with CorDA.
    """
    refuse_adapted(model)
    for key in ("target_parameters", "layer_replication"):
        if getattr(config, key, None):
            raise TargetError(
                f"{key} cannot be combined with CorDA in PEFT", where=f"lora_config.{key}", fix="unset it"
            )
    wanted = _wanted(model, config)
    names = wanted if isinstance(wanted, str) else sorted(wanted)
    if config.target_modules is not None:
        find_targets(model, names)
    resolved = copy.copy(config)
    resolved.target_modules = wanted
    resolved = _maybe_include_all_linear_layers(resolved, model)
    layers = [s for s in adaptable_layers(model) if LoraModel._check_target_module_exists(resolved, s.name)]
    if not layers:
        near = find_targets(model, names)[0].name
        raise TargetError(
            "PEFT matches no layer",
            where="lora_config.target_modules",
            got=repr(config.target_modules),
            expected=f"layers like {near}",
            fix="give names in a list, since PEFT takes a string for a regular expression of the full name; and check "
            "exclude_modules, layers_to_transform and modules_to_save",
        )
    return layers


def rank_of(config: LoraConfig, name: str) -> int:
    """The rank that PEFT will give a layer, by its rank_pattern.

    Args:
        config: PEFT's configuration.
        name: Full dotted name of the layer.
    """
    rank: int = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
    return rank


def check_weights(model: nn.Module, layers: Sequence[LayerSpec]) -> None:
    """Refuse layers whose weight PEFT cannot replace by W - BA.

    Args:
        model: The model that they are in.
        layers: Target layers.

    Raises:
        ModelError: a weight that is quantised, sharded or without data.
        TargetError: a weight that another module uses too.
    """
    for layer in layers:
        weight = model.get_submodule(layer.name).weight
        assert isinstance(weight, Tensor)
        shape = (layer.d_in, layer.d_out) if layer.kind == "conv1d" else (layer.d_out, layer.d_in)
        if weight.dtype not in _FLOATS or tuple(weight.shape) != shape or weight.is_meta:
            raise ModelError(
                "a layer's weight cannot be decomposed: it is quantised, sharded or without data",
                where=layer.name,
                got=f"{weight.dtype} {tuple(weight.shape)} on {weight.device}",
                expected=f"float32, float16 or bfloat16 {shape}",
                fix="load the whole model unquantised",
            )
    refuse_shared(model, [layer.name for layer in layers])


def _wanted(model: nn.Module, config: LoraConfig) -> str | set[str]:
    wanted = config.target_modules
    if wanted is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        wanted = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
        if wanted is None:
            raise TargetError(
                "target_modules is not set, and PEFT has no default for this model",
                where="lora_config.target_modules",
                got=f"model_type {kind!r}",
                fix="set target_modules, e.g. to 'all-linear'",
            )
    if isinstance(wanted, str):
        return wanted.lower() if wanted.lower() == "all-linear" else wanted
    return set(wanted)
