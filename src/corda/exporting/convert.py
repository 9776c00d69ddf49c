"""Adapters that PEFT trained in the papers' form (CorDA, PiSSA and the like), turned into plain ones on the base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from corda import compress, models
from corda.errors import AdapterError
from corda.exporting.check import reloader, spread_probe
from corda.exporting.export import published, write_checked
from corda.exporting.forms import Exported, Work
from corda.exporting.update import Factors, Update, account, subtract
from corda.exporting.write import layer_of, shift_weights
from corda.options import ExportOptions, ModelOptions

# Initialisations of PEFT's that take the start of the adapter out of the base weights.
_SUBTRACTING = ("pissa", "corda", "olora", "loftq", "lora_ga")
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Saved:
    """An adapter's folder as PEFT wrote it.

    Attributes:
        folder: Where it is.
        config: Its adapter_config.json.
        factors: s B A per full dotted layer name.
    """

    folder: Path
    config: LoraConfig
    factors: Mapping[str, Factors]


def convert(
    adapter: Path,
    base: ModelOptions,
    folder: Path,
    options: ExportOptions,
    *,
    initial: Path | None = None,
    residual_base: str | None = None,
) -> Exported:
    """Write an adapter trained elsewhere as one on the original base, reload it and compare the logits.

    ΔW = s B A - s0 B0 A0 where the initial adapter is known, and W_res + s B A - W, brought to rank 2r, where the
    residual base is; without either, an adapter that started from zero is only written anew.

    Args:
        adapter: The trained adapter.
        base: The original base.
        folder: Where to.
        options: Of the export; format lora or merged.
        initial: The adapter as it was before training.
        residual_base: Folder or Hub id of the model that the adapter was trained on.

    Raises:
        AdapterError: the adapter is none of these, does not fit the base, or the residual base differs from the base
            by more than a matrix of low rank.
        CheckError, ArtifactError, RecipeError, ResourceError: see `corda.export`.
        ModelError: a model cannot be loaded.
    """
    if options.format not in {"lora", "merged"}:
        raise AdapterError("a converted adapter is written as lora or merged", got=f"format {options.format!r}")
    saved = read_adapter(adapter)
    _refuse_unknown_start(saved, initial, residual_base)
    loaded = models.load(base)
    probe = spread_probe(loaded.model)
    fit = None
    if residual_base is not None:
        source = models.resolve(ModelOptions(model_name_or_path=residual_base))
        stored, kind = _stored_dtype(source), saved.config.task_type
        # Such folders often lack a tokenizer. Differences are taken of what is stored, unrounded.
        found = differences(loaded.model, reloader(loaded.model, kind, stored)(source.path), saved)
        reference = reloader(loaded.model, kind)(source.path)
        added = {name: Factors(one.A, one.B) for name, one in found.items()}
        fit = account(found, max(factors.A.shape[0] for factors in added.values()))
    else:
        start = read_adapter(initial).factors if initial is not None else {}
        added = subtract_all(saved, start) if initial is not None else dict(saved.factors)
        reference = models.load(base).model
        shift_weights(reference, start, -1)
    task = saved.config.task_type or "CAUSAL_LM"
    update = Update(added, base=loaded.source.path, revision=loaded.source.revision, task_type=task)
    tokenizer = loaded.tokenizer
    del loaded  # its weights need not stay beside those that follow
    plain = replace(saved.config, init_lora_weights=True, corda_config=None)  # else PEFT takes the start out once more
    live = PeftModel.from_pretrained(reference, str(adapter), config=plain).eval()
    work = Work(update, live, lambda: models.load(base).model, probe, tokenizer=tokenizer)
    return published(write_checked(work, folder, options, low_rank_fit=fit), options)


def read_adapter(folder: Path) -> Saved:
    """An adapter folder of PEFT's LoRA.

    Raises:
        AdapterError: it is not there, holds another method, or more than the two factors of linear layers.
    """
    try:
        raw = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise TypeError("adapter_config.json is not a JSON object")
        config = LoraConfig.from_pretrained(str(folder)) if raw.get("peft_type") == "LORA" else None
        state = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise AdapterError(
            "the adapter cannot be read",
            where=str(folder),
            got=str(error).splitlines()[0],
            expected=f"adapter_config.json and {SAFETENSORS_WEIGHTS_NAME}, as PEFT saves them",
        ) from None
    if config is None:
        raise AdapterError("the adapter is not a LoRA", where=str(folder), got=raw.get("peft_type"), expected="LORA")
    if config.target_parameters:
        raise AdapterError(
            "adapters of stacked experts that PEFT trained cannot be converted",
            where=str(folder),
            got=f"target_parameters {', '.join(sorted(config.target_parameters)[:3])}",
            expected="lora_A and lora_B of linear layers",
        )
    names = {key.removeprefix(_PREFIX).rpartition(".lora_")[0] for key in state}
    wanted = {f"{_PREFIX}{name}.lora_{part}.weight" for name in names for part in "AB"}
    if wanted != set(state) or config.use_dora:
        odd = sorted(wanted ^ set(state))
        raise AdapterError(
            "the adapter holds more or less than a pair of factors per layer",
            where=str(folder),
            got=", ".join(odd[:3]) or "DoRA",
            expected="lora_A and lora_B of linear layers; no bias, DoRA, embeddings or modules_to_save",
        )
    return Saved(folder, config, {name: _scaled(state, name, config) for name in sorted(names)})


def subtract_all(saved: Saved, start: Mapping[str, Factors]) -> dict[str, Factors]:
    """s B A - s0 B0 A0 for every layer, rank 2r.

    Args:
        saved: The trained adapter.
        start: Layer name -> A (r, d_in) and B (d_out, r) of its start.

    Raises:
        AdapterError: the two adapters have other layers or shapes.
    """
    for name in sorted({*saved.factors, *start}):
        one, other = (tuple(f[name].A.shape + f[name].B.shape) if name in f else None for f in (saved.factors, start))
        if one != other:
            raise AdapterError(
                "the initial adapter is not that of the trained one", where=name, got=other, expected=one
            )
    return {name: subtract(factors, start[name]) for name, factors in saved.factors.items()}


@torch.no_grad()
def differences(base: PreTrainedModel, residual: PreTrainedModel, saved: Saved) -> dict[str, compress.Truncated]:
    """W_res + s B A - W for every adapted layer, as factors of rank 2r.

    Args:
        base: With W.
        residual: With W_res, in the dtype that it is stored in: the difference has low rank but for that rounding, and
            that of a base which was rounded when it was loaded.
        saved: The trained adapter.

    Raises:
        AdapterError: other parameters differ too, or the difference is not of low rank.
    """
    theirs = dict(residual.named_parameters())
    adapted = {f"{name}.weight" for name in saved.factors}
    for name, parameter in base.named_parameters():
        other = theirs.get(name)
        if other is None or other.shape != parameter.shape:
            wrong = "another shape, or none"
        elif name not in adapted and not torch.equal(parameter, other.to(parameter.dtype)):
            wrong = "other values in a layer that has no adapter"
        else:
            continue
        raise AdapterError("the residual base is not one of this base model", where=name, got=wrong)
    found = {}
    coarsest = max((base.dtype, residual.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    for name, (A, B) in saved.factors.items():
        W, W_res = (_oriented(layer_of(model, name)).double().cpu() for model in (base, residual))
        D = W_res - W + B.double() @ A.double()
        found[name] = compress.low_rank(D, 2 * A.shape[0])
        rounding = torch.finfo(coarsest).eps * float(W_res.norm())
        if not found[name].lost ** 0.5 <= rounding:
            share = 100 * compress.relative_error(found[name])
            raise AdapterError(
                "residual base and adapter differ from the base by more than a matrix of low rank",
                where=name,
                got=f"{share:.2g} % of the difference beyond rank {2 * A.shape[0]}",
                expected=f"at most the rounding of {str(coarsest).removeprefix('torch.')}",
                fix="give the residual base that this adapter was trained on, unquantised, or the initial adapter",
            )
    return found


def _refuse_unknown_start(saved: Saved, initial: Path | None, residual_base: str | None) -> None:
    if initial is not None and residual_base is not None:
        raise AdapterError("give the initial adapter or the residual base, not both", where=str(saved.folder))
    start = str(saved.config.init_lora_weights).lower()
    if initial is None and residual_base is None and start.startswith(_SUBTRACTING):
        raise AdapterError(
            "the adapter's start was taken out of the base weights, and neither is given",
            where=str(saved.folder),
            got=f"init_lora_weights {start!r}",
            fix="give --initial, the adapter as it was before training, or --residual-base, what it was trained on",
        )


def _scaled(state: Mapping[str, Tensor], name: str, config: LoraConfig) -> Factors:
    A, B = (state[f"{_PREFIX}{name}.lora_{part}.weight"].float() for part in "AB")
    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), name), config.lora_alpha)
    rank = A.shape[0]
    return Factors(A, B * (alpha / (rank**0.5 if config.use_rslora else rank)))


def _oriented(module: Any) -> Tensor:
    weight: Tensor = module.weight
    return weight.T if isinstance(module, Conv1D) else weight


def _stored_dtype(source: models.Source) -> torch.dtype:
    found = AutoConfig.from_pretrained(source.path, revision=source.revision).dtype
    return found if isinstance(found, torch.dtype) else torch.float32
