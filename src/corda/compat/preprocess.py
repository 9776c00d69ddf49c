"""`preprocess_corda` with PEFT's signature, so that `get_peft_model` stays as it is.

PEFT reads a layer's decomposition off the layer itself (`module.eigens`): the only attribute that corda ever sets on a
user's model, and the only place where it does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from corda.compat import kept
from corda.compat.eigens import from_factors
from corda.compat.kept import Kept
from corda.compat.matching import check_weights, matched_layers, rank_of
from corda.context import store
from corda.context.collect import collect_running
from corda.context.store import Context
from corda.errors import CalibrationError, RecipeError, TargetError
from corda.plan import plan as planning
from corda.plan.byhand import CHANGED
from corda.plan.make import make_plan
from corda.plan.plan import Plan, check_ranks
from corda.progress import shown, silent
from corda.ranks import LayerRank
from corda.recipe import AdapterOptions
from corda.targets import LayerSpec, adaptable_layers

_RESIDUAL = (
    "get_peft_model replaces W by W - BA, so disable_adapter() will not be the base, and save_pretrained alone writes "
    "an adapter that does not load on it: save the initial adapter before training and convert with it, or use "
    "corda.attach, which leaves W alone; see docs/moving-from-peft.md"
)


def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], object] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Prepare `model` for `get_peft_model(model, lora_config)` with init_lora_weights="corda" (CorDA, eqs. 2-5).

    Of `lora_config.corda_config`: `cache_file` and `covariance_file` name folders of safetensors, which are created
    with their parents; those made for other weights, ranks or another method are refused, and files of torch.save are
    never opened. Weights are compared, calibration data is not known here: remove the folders when it changes.
    `use_float16_for_covariance` and `prune_temporary_fields=False` have no effect and say so: covariances are fp32, and
    none stays on a module.

    Tokens are what the 2-D attention_mask says with which the model is called; without one every input counts.

    What follows from PEFT's form, W - BA in place of W, stays, and a warning says so: disable_adapter() is not the
    base, a 16-bit base is rounded once more, and an adapter from `save_pretrained` does not load on the base. Save the
    initial adapter before training and convert with it (docs/moving-from-peft.md), or use `corda.attach`.

    Args:
        model: The base model. Its target layers get an attribute `eigens`, which get_peft_model takes off again.
        lora_config: With init_lora_weights "corda"; only read.
        run_model: Runs `hooked_model` on the calibration data, in any number of forward passes and rows in each. Not
            needed where cache_file or covariance_file is there.
        hooked_model: The model that run_model runs; default: `model`. Left in its mode and without hooks.

    Raises:
        RecipeError: the configuration is not one for CorDA.
        TargetError: target_modules does not match what it names, or a layer that PEFT's form cannot adapt.
        ModelError: a layer's weight is quantised, sharded or without data.
        AdapterError: the model carries an adapter already.
        PlanError: a rank that a layer does not allow.
        CalibrationError: no run_model, a layer without tokens, or activations that are not finite.
        ArtifactError: cache_file or covariance_file is foreign, corrupted or was made for something else.
        ResourceError: they cannot be written.
    """
    options = _options(lora_config)
    settings = lora_config.corda_config
    layers = matched_layers(model, lora_config)
    check_weights(model, layers)
    ranks = {layer.name: rank_of(lora_config, layer.name) for layer in layers}
    check_ranks(layers, ranks)
    weights = {layer.name: kept.digest(_weight(model, layer)) for layer in layers}
    covariances = Kept("covariance_file", "context", _path(settings.covariance_file), kept.of_covariances(weights))
    cache = Kept("cache_file", "plan", _path(settings.cache_file), kept.of_factors(weights, ranks, options))
    found = cache.found()
    if found is not None:
        plan = planning.load(found)
    else:
        cache.prepare(4 * sum(ranks[layer.name] * (layer.d_in + layer.d_out) for layer in layers))
        context = _context(model, layers, covariances, run_model, hooked_model)
        by_layer = options.model_copy(update={"ranks": {name: LayerRank(rank=r) for name, r in ranks.items()}})
        plan = make_plan(model, context, by_layer, progress=shown if settings.verbose else silent)
        if cache.folder is not None:
            parents = {"context": covariances.fingerprint}
            planning.save(plan, cache.folder, cache.fingerprint, parents, {"made_for": cache.made_for})
    for layer in layers:
        A, B = plan.factors[layer.name]
        vars(model.get_submodule(layer.name))["eigens"] = from_factors(A, B, _weight(model, layer).device)
    for text in _notes(model, layers, lora_config, plan):
        warnings.warn(text, stacklevel=2)


def _options(config: LoraConfig) -> AdapterOptions:
    """corda's options that PEFT's configuration stands for; PEFT applies its scaling itself."""
    if config.init_lora_weights != "corda" or config.corda_config is None:
        raise RecipeError(
            "the configuration is not one for CorDA",
            where="lora_config",
            got=f"init_lora_weights={config.init_lora_weights!r}, corda_config={config.corda_config}",
            expected='init_lora_weights="corda" and a CordaConfig',
        )
    method = config.corda_config.corda_method
    if method not in {"kpm", "ipm"}:
        two = method in {"dual", "contrast"}
        raise RecipeError(
            "corda_method takes one context, that mode two" if two else "corda_method is unknown",
            where="lora_config.corda_config",
            got=repr(method),
            expected="'kpm' or 'ipm'",
            fix="use a recipe with adapter.mode, or collect(..., learn=...) and make_plan(mode=...)" if two else None,
        )
    return AdapterOptions(mode=method, base="residual")


def _context(
    model: nn.Module,
    layers: Sequence[LayerSpec],
    covariances: Kept,
    run_model: Callable[[], object] | None,
    hooked_model: nn.Module | None,
) -> Context:
    found = covariances.found()
    if found is not None:
        return replace(store.load(found), layers=tuple(layers))
    if run_model is None:
        raise CalibrationError(
            "there are no covariances and nothing to collect them from",
            where="run_model",
            got="None, and neither cache_file nor covariance_file is there",
            fix="give a run_model",
        )
    covariances.prepare()
    hooked = model if hooked_model is None else hooked_model
    there = {layer.name: layer for layer in adaptable_layers(hooked)}
    missing = [layer.name for layer in layers if there.get(layer.name) != layer]
    if missing:
        raise TargetError(
            f"hooked_model lacks {len(missing)} of the target layers, or has them in another shape",
            where=missing[0],
            fix="give the model itself, not a wrapper around it",
        )
    context = collect_running(hooked, run_model, layers)
    if covariances.folder is not None:
        store.save(context, covariances.folder, covariances.fingerprint, {"made_for": covariances.made_for})
    return context


def _notes(model: nn.Module, layers: Sequence[LayerSpec], config: LoraConfig, plan: Plan) -> list[str]:
    """What a user should know of this call."""
    notes = [*(text for text in plan.warnings if not text.startswith(CHANGED)), _RESIDUAL]
    if any(_weight(model, layer).dtype != torch.float32 for layer in layers):
        notes.append("W - BA is rounded to 16 bits: the start differs from the base by a few roundings")
    if config.lora_dropout > 0:
        notes.append("lora_dropout drops components of the base in PEFT's form: set it to 0, or use corda.attach")
    if config.corda_config.use_float16_for_covariance:
        notes.append("use_float16_for_covariance has no effect: covariances are fp32, one per distinct input")
    if not config.corda_config.prune_temporary_fields:
        notes.append("prune_temporary_fields has no effect: what was collected is in covariance_file")
    return notes


def _weight(model: nn.Module, layer: LayerSpec) -> Tensor:
    weight: Any = model.get_submodule(layer.name).weight
    assert isinstance(weight, Tensor)
    return weight


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)
