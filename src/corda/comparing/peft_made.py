"""Adapters that PEFT initialises itself: PiSSA, EVA, LoRA-GA, DoRA, its own CorDA, and LoRA with a frozen A."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, LoraGAConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from transformers import PreTrainedModel

from corda.architectures import heads
from corda.data.batches import Encoded, calibration_rounds
from corda.errors import ModelError
from corda.inputs import Inputs
from corda.lora_config import target_names, task_type
from corda.plan.make import uniform_rank
from corda.plan.plan import scaling
from corda.quantization import is_4bit

_GRADIENT_RECORDS, _ROWS = 32, 4  # LoRA-GA's estimate of the gradient


def build(model: PreTrainedModel, inputs: Inputs, kind: str, *, frozen: bool = False) -> PeftModel:
    """The model with the adapter that PEFT makes.

    Args:
        model: The base; some kinds change its weights, so that W - s B A replaces W.
        inputs: Of the cell's recipe.
        kind: lora, dora, pissa, eva, lora_ga, corda_kpm or corda_ipm.
        frozen: A is not trained, and the rank is as large as the same number of trainable parameters allows.

    Raises:
        ModelError: PEFT's initialisation reads weights that a 4-bit model does not show.
    """
    if kind not in {"lora", "dora"} and any(is_4bit(module) for module in model.modules()):
        raise ModelError("PEFT's initialisation needs full-precision weights", where=kind, fix="load_in_4bit: false")
    config = _config(model, inputs, kind, frozen)
    with torch.random.fork_rng():
        torch.manual_seed(inputs.recipe.seed)
        if kind == "lora_ga":
            preprocess_loraga(model, config, lambda: _gradients(model, inputs))
        elif kind in {"corda_kpm", "corda_ipm"}:
            preprocess_corda(model, config, lambda: _forwards(model, inputs))
        wrapped: PeftModel = get_peft_model(model, config)
        if kind == "eva":
            initialize_lora_eva_weights(wrapped, _EvaData(inputs), show_progress_bar=False)
    if frozen:
        for name, parameter in wrapped.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
    return wrapped


def frozen_rank(inputs: Inputs) -> int:
    """The rank at which B alone has the trainable parameters of A and B at the recipe's rank."""
    targets = inputs.targets
    options = inputs.recipe.adapter
    budget = options.budget or sum(t.d_in + t.d_out for t in targets) * options.rank
    return max(1, budget // sum(t.d_out for t in targets))


def relative_change(model: nn.Module, reference: Tensor, probe: dict[str, Tensor]) -> float:
    """Largest logit difference to the base before training, over the largest logit.

    Args:
        model: With the adapter.
        reference: The base's logits, (B, L, V).
        probe: Keyword arguments of a forward pass, (B, L) ids among them.
    """
    with torch.no_grad():
        logits = model(**{k: v.to(reference.device) for k, v in probe.items()}).logits
    return float((logits - reference).abs().max() / reference.abs().max())


def _config(model: PreTrainedModel, inputs: Inputs, kind: str, frozen: bool) -> LoraConfig:
    options = inputs.recipe.adapter
    rank = frozen_rank(inputs) if frozen else uniform_rank(inputs.targets, options)
    start: dict[str, Any] = {
        "pissa": {"init_lora_weights": "pissa"},
        "eva": {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)},
        "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
        "corda_kpm": {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="kpm")},
        "corda_ipm": {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="ipm")},
        "dora": {"use_dora": True},
    }.get(kind, {})
    return LoraConfig(
        task_type=task_type(model),
        modules_to_save=heads(model) or None,
        r=rank,
        lora_alpha=scaling(options, rank) * (math.sqrt(rank) if options.use_rslora else rank),
        lora_dropout=options.lora_dropout,
        use_rslora=options.use_rslora,
        target_modules=target_names(model, [t.name for t in inputs.targets]),
        **start,
    )


def _calibration(inputs: Inputs, records: Sequence[Any]) -> list[Encoded]:
    r, options = inputs.recipe, inputs.recipe.context
    [chosen] = calibration_rounds(
        records,
        inputs.tokenizer,
        1,
        max_length=r.data.max_length,
        samples=options.samples,
        tokens=options.tokens,
        seed=r.seed,
        encoding=inputs.kind.encode,
    )
    return chosen


@torch.no_grad()
def _forwards(model: PreTrainedModel, inputs: Inputs) -> None:
    for one in _calibration(inputs, inputs.context_records):  # PEFT's hooks take one row at a time
        fed = {name: value.to(model.device) for name, value in inputs.kind.forward([one]).items()}
        model.base_model(**fed)


def _gradients(model: PreTrainedModel, inputs: Inputs) -> None:
    for batch in _labelled(inputs, inputs.learn_records[:_GRADIENT_RECORDS], _ROWS):
        model(**{key: value.to(model.device) for key, value in batch.items()}).loss.backward()


def _labelled(inputs: Inputs, records: Sequence[Any], rows: int) -> Iterator[dict[str, Tensor]]:
    encoded = [one for one in map(inputs.kind.encode, records) if one.learnable]
    for start in range(0, len(encoded), rows):
        yield inputs.kind.batch(encoded[start : start + rows])


class _EvaData:
    """What EVA iterates over, as often as it wants."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        samples = inputs.recipe.context.samples or len(inputs.learn_records)
        self.records = inputs.learn_records[:samples]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return _labelled(self.inputs, self.records, _ROWS)

    def __len__(self) -> int:
        return (len(self.records) + _ROWS - 1) // _ROWS


@contextmanager
def all_trainable(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Full fine-tuning: every parameter is trained inside."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(True)
    yield model
    for parameter, wanted in before:
        parameter.requires_grad_(wanted)
