"""The files of an export: a plain LoRA as PEFT and servers read it, and full weights as transformers reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from corda import compress, parameters
from corda.architectures import heads as heads_of
from corda.errors import AdapterError, TargetError
from corda.exporting.update import Factors
from corda.lora_config import exact_key, target_names
from corda.options import Layout
from corda.targets import LayerSpec, spec_of, weight_view


def write_lora(
    folder: Path,
    factors: Mapping[str, Factors],
    model: nn.Module,
    *,
    layout: Layout = "patterns",
    base: str | None = None,
    revision: str | None = None,
    task_type: str | None = None,
    heads: Mapping[str, Tensor] | None = None,
) -> int:
    """Write adapter_config.json and adapter_model.safetensors of a plain LoRA with scaling 1.

    "patterns": a layer of another rank than most is named in rank_pattern and alpha_pattern, alpha being its rank.
    "uniform": every layer is padded with zeros to the largest rank, so that a reader which knows only one r and one
    alpha applies the same update.

    Args:
        folder: Where to; created.
        factors: Full dotted layer name -> A (k, d_in) and B (d_out, k).
        model: The base that the layers are in, for their names.
        layout: See above.
        base: What base_model_name_or_path says.
        revision: Its revision.
        task_type: PEFT's.
        heads: Full parameter name -> trained values, of modules that are saved whole.

    Returns:
        The largest rank.
    """
    as_parameters = parameters.pattern_of(model, factors)
    ranks: dict[str, int] = {}
    for name, pair in factors.items():
        key = as_parameters.get(name, name)
        ranks[key] = max(pair.A.shape[0], ranks.get(key, 0))
    modules = [name for name in factors if name not in as_parameters]
    targeted = list(dict.fromkeys(as_parameters.values()))
    largest = max(ranks.values())
    r = largest if layout == "uniform" else Counter(ranks.values()).most_common(1)[0][0]
    targets = target_names(model, modules)
    others: dict[str, int] = {}
    if layout == "uniform":
        factors = {name: Factors(*compress.pad(*pair, largest)) for name, pair in factors.items()}
        targets = targets if isinstance(targets, list) else sorted(modules)
    else:
        others = {exact_key(model, name): rank for name, rank in ranks.items() if rank != r}
    config = LoraConfig(
        task_type=task_type,
        r=r,
        lora_alpha=r,
        target_modules=targets,
        target_parameters=targeted or None,
        rank_pattern=others,
        alpha_pattern=dict(others),
        fan_in_fan_out=bool(modules) and all(isinstance(layer_of(model, name), Conv1D) for name in modules),
        modules_to_save=heads_of(model) if heads else None,
        inference_mode=True,
        base_model_name_or_path=base,
        revision=revision,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    state = {f"base_model.model.{name}": value.contiguous() for name, value in (heads or {}).items()}
    for name in modules:
        state |= _entries(name, *factors[name])
    prefixes = parameters.saved_prefix(model, targeted)
    for parameter, of_experts in parameters.by_parameter(factors, as_parameters).items():
        stored = model.get_parameter(parameter)
        experts = stored.shape[0] if stored.dim() == 3 else 1
        rank = largest if layout == "uniform" else ranks[parameter]
        state |= _entries(prefixes[parameter], *parameters.stacked(of_experts, experts, rank))
    save_file(state, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    return largest


def _entries(prefix: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    keys = (f"base_model.model.{prefix}.lora_{part}.weight" for part in "AB")
    return dict(zip(keys, (A.contiguous(), B.contiguous()), strict=True))


def write_model(
    folder: Path, model: PreTrainedModel, tokenizer: Any, max_shard_size: str, *, original_names: bool = True
) -> None:
    """Write weights in sharded safetensors, config, generation config and, where there is one, the tokenizer.

    Args:
        folder: Where to.
        model: The model.
        tokenizer: Its tokenizer, or None.
        max_shard_size: Such as "5GB".
        original_names: Take back what transformers renamed while loading, which it cannot for 4-bit checkpoints.
    """
    model.save_pretrained(str(folder), max_shard_size=max_shard_size, save_original_format=original_names)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


@torch.no_grad()
def shift_weights(model: PreTrainedModel, factors: Mapping[str, Factors], sign: int = 1) -> float | None:
    """W ± B A for each named layer, in place, summed in fp32 and rounded once to the weight's dtype.

    Args:
        model: Changed in place.
        factors: Full dotted layer name -> A (k, d_in) and B (d_out, k).
        sign: 1 or -1.

    Returns:
        Share of ±B A that the weights hold afterwards: Σ ⟨W_after - W_before, ±B A⟩ / Σ ‖B A‖²_F; None without any.

    Raises:
        AdapterError: a layer is missing, has another shape, is quantised, or shares its weight with the embeddings.
    """
    embeddings = model.get_input_embeddings()
    held = energy = 0.0
    for name, pair in factors.items():
        spec = _spec(model, name)
        weight = model.get_parameter(spec.stored[0])
        W = weight_view(model, spec)
        if not weight.is_floating_point() or W.shape != (pair.B.shape[0], pair.A.shape[1]):
            raise AdapterError(
                "an update does not fit the weight that it is added to",
                where=name,
                got=f"{tuple(W.shape)} {weight.dtype}",
                expected=f"{(pair.B.shape[0], pair.A.shape[1])}, floating point",
                fix="export format lora, which leaves the weights alone",
            )
        if embeddings is not None and weight is getattr(embeddings, "weight", None):
            raise AdapterError(
                "an adapted layer shares its weight with the input embeddings, which merging would change too",
                where=name,
                fix="export format lora",
            )
        A, B = pair.A.to(W.device), sign * pair.B.to(W.device)
        shifted = compress.add(W, A, B)
        held += float((B.T @ (shifted.float() - W.float()) * A).double().sum())
        energy += float(((B.T @ B) * (A @ A.T)).double().sum())
        W.copy_(shifted)
    return held / energy if energy else None


def layer_of(model: nn.Module, name: str) -> Any:
    """The module that has the layer of that full dotted name.

    Args:
        model: The model.
        name: Full dotted name.

    Raises:
        AdapterError: there is none.
    """
    return model.get_submodule(_spec(model, name).stored[0].rpartition(".")[0])


def _spec(model: nn.Module, name: str) -> LayerSpec:
    try:
        return spec_of(model, name)
    except TargetError:
        raise AdapterError("a layer of the adapter is not in the base model", where=name) from None
