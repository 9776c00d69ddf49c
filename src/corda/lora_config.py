"""PEFT's config of a plan: which layers, which ranks, in the terms by which PEFT matches them and no others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from corda import parameters
from corda.architectures import heads
from corda.plan.plan import Plan


def lora_config(model: nn.Module, plan: Plan) -> LoraConfig:
    """PEFT's config of a plan: uniform where the ranks are, patterns by full dotted name where not."""
    as_parameters = parameters.pattern_of(model, [layer.name for layer in plan.layers])
    ranks: dict[str, int] = {}
    for layer in plan.layers:
        key = as_parameters.get(layer.name, layer.name)
        ranks[key] = max(layer.rank, ranks.get(key, 0))
    modules = [layer.name for layer in plan.layers if layer.name not in as_parameters]
    r = Counter(ranks.values()).most_common(1)[0][0]
    options = plan.options
    root = r**0.5 if options.use_rslora else r
    return LoraConfig(
        task_type=task_type(model),
        r=r,
        lora_alpha=whole(plan.scaling(r) * root),
        use_rslora=options.use_rslora,
        lora_dropout=options.lora_dropout,
        target_modules=target_names(model, modules),
        modules_to_save=heads(model) or None,
        target_parameters=list(dict.fromkeys(as_parameters.values())) or None,
        rank_pattern={exact_key(model, name): rank for name, rank in ranks.items() if rank != r},
        alpha_pattern={
            exact_key(model, name): whole(plan.scaling(rank) * (rank**0.5 if options.use_rslora else rank))
            for name, rank in ranks.items()
            if rank != r
        },
        fan_in_fan_out=bool(modules) and all(isinstance(model.get_submodule(name), Conv1D) for name in modules),
        init_lora_weights=not plan.options.has_start,
        base_model_name_or_path=getattr(model, "name_or_path", None),
    )


def target_names(model: nn.Module, names: Sequence[str]) -> list[str] | str:
    """The shortest target_modules of all `names` by which PEFT matches these layers of the model and no others."""
    wanted = set(names)
    if not wanted:
        return []
    everything = [name for name, module in model.named_modules() if name]
    for candidate in (sorted({name.rpartition(".")[2] for name in names}), sorted(wanted)):
        matched = {n for n in everything if any(n == c or n.endswith("." + c) for c in candidate)}
        if matched == wanted:
            return candidate
    return "|".join(re.escape(name) for name in sorted(wanted))


def exact_key(model: nn.Module, name: str) -> str:
    """The key by which PEFT's patterns match the layer of this name and no other."""
    others = [*(other for other, _ in model.named_modules()), *(other for other, _ in model.named_parameters())]
    clash = any(other.endswith("." + name) for other in others)
    return f"^{re.escape(name)}" if clash else name


def task_type(model: nn.Module) -> str:
    """PEFT's name of what a model is for, by its class and config."""
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    if name.endswith("ForTokenClassification"):
        return "TOKEN_CLS"
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    can_generate = getattr(model, "can_generate", None)
    return "CAUSAL_LM" if callable(can_generate) and can_generate() else "FEATURE_EXTRACTION"


def whole(value: float) -> float:
    """An int where the number is one, as PEFT writes them."""
    return int(value) if float(value).is_integer() else value
