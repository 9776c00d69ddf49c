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

from corda import compress
from corda.adapter import exact_key, target_names
from corda.errors import AdapterError
from corda.exporting.update import Factors
from corda.options import Layout


def write_lora(
    folder: Path,
    factors: Mapping[str, Factors],
    model: nn.Module,
    *,
    layout: Layout = "patterns",
    base: str | None = None,
    revision: str | None = None,
    task_type: str | None = None,
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

    Returns:
        The largest rank.
    """
    ranks = {name: pair.A.shape[0] for name, pair in factors.items()}
    largest = max(ranks.values())
    r = largest if layout == "uniform" else Counter(ranks.values()).most_common(1)[0][0]
    targets = target_names(model, list(ranks))
    others: dict[str, int] = {}
    if layout == "uniform":
        factors = {name: Factors(*compress.pad(*pair, largest)) for name, pair in factors.items()}
        targets = targets if isinstance(targets, list) else sorted(ranks)
    else:
        others = {exact_key(model, name): rank for name, rank in ranks.items() if rank != r}
    config = LoraConfig(
        task_type=task_type,
        r=r,
        lora_alpha=r,
        target_modules=targets,
        rank_pattern=others,
        alpha_pattern=dict(others),
        fan_in_fan_out=all(isinstance(layer_of(model, name), Conv1D) for name in ranks),
        inference_mode=True,
        base_model_name_or_path=base,
        revision=revision,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    state: dict[str, Tensor] = {}
    for name, pair in factors.items():
        state[f"base_model.model.{name}.lora_A.weight"] = pair.A.contiguous()
        state[f"base_model.model.{name}.lora_B.weight"] = pair.B.contiguous()
    save_file(state, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    return largest


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

    Returns:
        Share of ±B A that the weights hold afterwards: Σ ⟨W_after - W_before, ±B A⟩ / Σ ‖B A‖²_F; None without any.

    Raises:
        AdapterError: a layer is missing, has another shape, is quantised, or shares its weight with the embeddings.
    """
    embeddings = model.get_input_embeddings()
    held = energy = 0.0
    for name, pair in factors.items():
        module = layer_of(model, name)
        weight = module.weight
        W = weight.T if isinstance(module, Conv1D) else weight
        if not weight.is_floating_point() or W.shape != (pair.B.shape[0], pair.A.shape[1]):
            raise AdapterError(
                "an update does not fit the weight that it is added to",
                where=name,
                got=f"{tuple(W.shape)} {weight.dtype}",
                expected=f"{(pair.B.shape[0], pair.A.shape[1])}, floating point",
                fix="export format lora, which leaves the weights alone",
            )
        if module is not embeddings and weight is getattr(embeddings, "weight", None):
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
    """The layer of that full dotted name.

    Raises:
        AdapterError: there is none.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise AdapterError("a layer of the adapter is not in the base model", where=name) from None
