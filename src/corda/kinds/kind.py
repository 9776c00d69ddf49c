"""What a recipe trains its model for decides how records become tokens, what is trained on, and what is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer

from corda import models
from corda.data.batches import Encoded, load_records
from corda.data.formats import Record
from corda.errors import RecipeError
from corda.evaluation.evaluate import Scores, Task, load_tasks
from corda.options import ModelOptions, ModelTask
from corda.progress import Progress, silent
from corda.recipe import Recipe
from corda.tasks import DataSource


class Kind(ABC):
    """One way to train a model, with the recipe that asks for it.

    Args:
        recipe: What to do.
        source: Where the base model's files are.
        task: What the model is for.

    Attributes:
        formats: Record formats that hold what is learnt, in the order in which `auto` tries them.
        kept: The same for what is to be kept, of which nothing but the text counts.
    """

    formats: ClassVar[tuple[str, ...]]
    kept: ClassVar[tuple[str, ...]]

    def __init__(self, recipe: Recipe, source: models.Source, task: ModelTask) -> None:
        self.recipe, self.source, self.task = recipe, source, task

    @cached_property
    def tokenizer(self) -> Any:
        """The base model's tokenizer; of a model of images and text its processor."""
        return models.load_tokenizer(self.source, self.model)

    @property
    def model(self) -> ModelOptions:
        """The recipe's options of the model with what follows from model and data filled in."""
        return self.recipe.model.model_copy(update={"task": self.task})

    def head(self) -> list[Any]:
        """What training and scores depend on besides model and data: a fresh head's classes and seed."""
        return []

    def records(self, source: DataSource, known: Sequence[str] | None = None) -> list[Record]:
        """Records of a data set.

        Args:
            source: Where they are.
            known: Formats that are of use; default: those that hold what is learnt.

        Raises:
            DataError: they cannot be read, or are of no use here.
        """
        return load_records(source, self.recipe.data.data_dir, self.recipe.seed, known or self.formats)

    @cached_property
    def learn_records(self) -> list[Record]:
        """Training records."""
        assert self.recipe.data.learn is not None
        return self.records(self.recipe.data.learn)

    @cached_property
    def validation_records(self) -> list[Record]:
        """Records whose loss is read during training; none where the recipe names none."""
        source = self.recipe.data.validation
        return [] if source is None else self.records(source)

    @cached_property
    def tasks(self) -> list[Task]:
        """Evaluation tasks with their records."""
        return load_tasks(self.recipe, self.records, self.check_task)

    def notes(self) -> list[str]:
        """What a look at the training records says about the settings, a sentence each."""
        return []

    @abstractmethod
    def encode(self, record: Record, limit: int | None = None) -> Encoded:
        """A record as tokens.

        Args:
            record: From `records`.
            limit: At most so many tokens, and at most data.max_length.
        """

    def encode_kept(self, record: Record, limit: int | None = None) -> Encoded:
        """A record of what is to be kept as tokens: its labels, which may be those of another set, do not count.

        Args:
            record: From `records`.
            limit: As in `encode`.
        """
        return self.encode(record, limit)

    @abstractmethod
    def forward(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Keyword arguments of a forward pass whose logits are compared: (B, L) ids and what belongs to them."""

    def shown(self, records: Sequence[Record], limit: int) -> dict[str, Tensor]:
        """`forward` of some records: (B, L) ids and what belongs to them.

        Args:
            records: From `records`.
            limit: At most so many tokens of each.
        """
        return self.forward([self.encode(record, limit) for record in records])

    @abstractmethod
    def batch(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Keyword arguments of a forward pass that has a loss: padded (B, L) ids, and labels."""

    @abstractmethod
    def trainer(
        self, model: PeftModel, learnt: Sequence[Encoded], folder: Path, validation: Sequence[Encoded] = ()
    ) -> Trainer:
        """What trains a model on records.

        Args:
            model: From `attach`.
            learnt: Records that have something to learn from.
            folder: For checkpoints.
            validation: Records whose loss is read during training.
        """

    @abstractmethod
    def check(self, used: Mapping[str, Sequence[Record]], device: torch.device) -> None:
        """Refuse what can be found wrong before a weight is loaded.

        Args:
            used: Name of a data set in use -> its records.
            device: To train on.

        Raises:
            CordaError: an option or a record that this kind of training has no use for.
        """

    @abstractmethod
    def check_task(self, task: Task) -> None:
        """Refuse metrics that do not fit a task's records.

        Raises:
            DataError: names metric and task.
        """

    @abstractmethod
    def evaluate(self, model: nn.Module, tasks: Sequence[Task], progress: Progress = silent) -> Scores:
        """Measure tasks on a model in eval mode.

        Args:
            model: The base, or with its adapter.
            tasks: What to measure.
            progress: Shows how far it is.
        """

    def refuse_unless_text(self, what: str, *, images: bool = True) -> None:
        """Refuse what is only there for models that continue text.

        Args:
            what: Named in the message, e.g. "corda chat".
            images: A model of images and text will do.

        Raises:
            RecipeError: the recipe trains something else.
        """
        if self.task not in {"causal-lm", "image-text-to-text"} or (self.task != "causal-lm" and not images):
            raise RecipeError(
                f"{what} is there for models that continue text",
                where="model.task",
                got=self.task,
                expected="causal-lm",
            )


def refused(options: Sequence[tuple[str, bool, str]], task: ModelTask) -> None:
    """Refuse options that a task has no use for.

    Args:
        options: Key, whether it is set, and what to do about it.
        task: What the recipe trains for.

    Raises:
        RecipeError: the first that is set.
    """
    for key, wrong, fix in options:
        if wrong:
            raise RecipeError(f"this is not done for {task}", where=key, fix=fix)
