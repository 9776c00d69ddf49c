"""Training by transformers on batches that have labels, whatever these are of.

The loss of a step is the cross-entropy summed over its labels, over their number, however they are gathered from
batches: some of transformers' classifiers average over each batch whatever the trainer tells them, and a gradient that
is accumulated over k batches is then k times too large.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from corda import training
from corda.data.batches import IGNORED, Encoded
from corda.kinds.kind import Kind
from corda.sharding import device_of


def label_trainer(
    kind: Kind, model: PeftModel, learnt: Sequence[Encoded], folder: Path, validation: Sequence[Encoded] = ()
) -> Trainer:
    """transformers' trainer on the batches that a kind of training makes of records.

    Args:
        kind: Makes them.
        model: From `attach`.
        learnt: Records with labels.
        folder: For checkpoints.
        validation: Records whose loss is read during training.
    """
    smoothing = float((kind.recipe.training.model_extra or {}).get("label_smoothing_factor", 0.0))

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        return mean_loss(outputs["logits"], labels, num_items_in_batch, smoothing)

    return Trainer(
        model=model,
        args=label_arguments(kind, folder, device_of(model)),
        train_dataset=list(learnt),
        eval_dataset=list(validation) or None,
        data_collator=kind.batch,
        processing_class=kind.tokenizer,
        compute_loss_func=loss,
    )


def label_arguments(kind: Kind, folder: Path, device: torch.device) -> TrainingArguments:
    """The trainer's arguments.

    Args:
        kind: With the recipe.
        folder: For checkpoints.
        device: To train on.

    Raises:
        RecipeError: the trainer refuses some of the recipe's.
    """
    r = kind.recipe
    own: dict[str, Any] = {"remove_unused_columns": False, "label_names": ["labels"]}
    own["validated"] = r.data.validation is not None
    return training.arguments_of(TrainingArguments, r.training, folder, r.seed, device, **own)


def mean_loss(logits: Tensor, labels: Tensor, count: Tensor | int | None = None, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy in nats summed over what has a label, over `count`.

    Args:
        logits: (..., classes).
        labels: (...) numbers of classes; -100 is left out.
        count: Labels of the whole optimiser step; default: those given.
        smoothing: Share of the target that goes to all classes alike.
    """
    flat, targets = logits.flatten(0, -2).float(), labels.flatten()
    total = nn.functional.cross_entropy(flat, targets, reduction="sum", label_smoothing=smoothing)
    return total / ((targets != IGNORED).sum() if count is None else count)
