"""Texts, or pairs of texts, that belong to classes: a head is trained in full beside the adapter, by transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer

from corda import models
from corda.architectures import has_head, learned_positions
from corda.data import labelled
from corda.data.batches import Encoded, pad_id, padded
from corda.data.formats import TEXTS, Record
from corda.errors import DataError, ModelError
from corda.evaluation.classification import METRICS, class_logits, class_scores
from corda.evaluation.evaluate import Scores, Task
from corda.evaluation.generation import Answer
from corda.evaluation.scores import Score
from corda.kinds.kind import Kind, refused
from corda.kinds.labels import label_arguments, label_trainer
from corda.options import ModelOptions
from corda.progress import Progress, silent


class Classes(Kind):
    """See the module."""

    formats = ("classification",)
    kept = (*(name for name in TEXTS if name != "text"), "classification", "text")

    @property
    def model(self) -> ModelOptions:
        """The recipe's options of the model, with the classes of the head and its seed filled in."""
        return super().model.model_copy(update={"id2label": dict(enumerate(self.classes)), "head_seed": self._seed})

    def head(self) -> list[Any]:
        """Task, classes and seed of the head."""
        return [self.task, list(self.classes), self._seed]

    @cached_property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return models.load_tokenizer(self.source, super().model)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes by number: the checkpoint's head's, or as the recipe has them, or those of data.learn.

        Raises:
            ModelError: the recipe asks for other classes than the checkpoint's head has.
            DataError: the data does not have at least two classes, or more than the recipe says.
        """
        options = self.recipe.model
        config = self._config
        asked = len(options.id2label) if options.id2label else options.num_labels
        stored = tuple(config.id2label[i] for i in sorted(config.id2label)) if has_head(config, self.task) else ()
        if stored and asked not in {None, len(stored)}:
            raise ModelError(
                "the checkpoint has a head for another number of classes",
                where=f"model.model_name_or_path, {self.source.path}",
                got=f"{len(stored)} classes",
                expected=f"{asked}, as model.num_labels or model.id2label says",
                fix="leave these out, or start from a checkpoint without a head",
            )
        if options.id2label is not None:
            return tuple(options.id2label[i] for i in range(len(options.id2label)))
        if stored:
            return stored
        assert self.recipe.data.learn is not None
        found = labelled.found_classes(name for record in self.learn_records for name in record.answers)
        if len(found) < 2 or (asked is not None and len(found) > asked):
            raise DataError(
                "the data has too few classes" if len(found) < 2 else "the data has more classes than the head",
                where=self.recipe.data.learn.dataset,
                got=f"{len(found)}: {', '.join(found[:5])}",
                expected="at least 2" if asked is None else f"at least 2, at most model.num_labels {asked}",
                fix="check the `label` column; numbers count from 0",
            )
        return (*found, *(f"LABEL_{i}" for i in range(len(found), asked or 0)))

    def encode(self, record: Record, limit: int | None = None) -> Encoded:
        """A record as tokens, its text with the special tokens of the tokenizer.

        Args:
            record: From `records`.
            limit: At most so many tokens, and at most data.max_length, and what the model takes.
        """
        kinds = getattr(self._config, "type_vocab_size", None) or 0
        first = record.prompt + record.response
        ids, more = labelled.tokenised(first, record.second, self.tokenizer, self.longest(limit), kinds=kinds > 1)
        labels = (labelled.class_number(record.answers[0], self.classes, "label"),) if _classified(record) else ()
        return Encoded(ids, (False,) * len(ids), kinds=more, labels=labels)

    def encode_kept(self, record: Record, limit: int | None = None) -> Encoded:
        """See `Kind.encode_kept`.

        Args:
            record: From `records`.
            limit: As in `encode`.
        """
        return self.encode(replace(record, answers=()), limit)

    def longest(self, limit: int | None = None) -> int:
        """Tokens that a text may have."""
        return min(x for x in (self.recipe.data.max_length, self._positions, limit) if x is not None)

    def forward(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Padded (B, L) ids and what belongs to them."""
        made = padded(rows, pad_id(self.tokenizer))
        return {"input_ids": made.input_ids, "attention_mask": made.attention_mask, **(made.more or {})}

    def batch(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Padded (B, L) ids and what belongs to them; labels are the numbers of the classes, (B,)."""
        return self.forward(rows) | {"labels": torch.tensor([row.labels[0] for row in rows])}

    def trainer(
        self, model: PeftModel, learnt: Sequence[Encoded], folder: Path, validation: Sequence[Encoded] = ()
    ) -> Trainer:
        """transformers' trainer.

        Args:
            model: From `attach`.
            learnt: Records that have something to learn from.
            folder: For checkpoints.
            validation: Records whose loss is read during training.
        """
        return label_trainer(self, model, learnt, folder, validation)

    def check(self, used: Mapping[str, Sequence[Record]], device: torch.device) -> None:
        """Refuse what can be found wrong before a weight is loaded.

        Args:
            used: Name of a data set in use -> its records.
            device: To train on.

        Raises:
            CordaError: a head, an option or a label that is of no use here, named.
        """
        r, config = self.recipe, self._config
        kind = getattr(config, "problem_type", None)
        two = getattr(config, "is_encoder_decoder", False)
        if two or kind not in {None, "single_label_classification"}:
            raise ModelError(
                "recipes train heads that choose one class of a text, on an encoder or on a decoder",
                where=f"model.model_name_or_path, {self.source.path}",
                got="an encoder with a decoder" if two else f"problem_type {kind}",
                fix="use collect_running, make_plan, attach and export with a trainer of your own",
            )
        refused(
            (
                ("context.pack_to", r.context.pack_to is not None, "leave it out: an encoder sees a whole window"),
                ("context.positions", r.context.positions == "response", "set it to all: no token is an answer"),
                ("context.offload", r.context.offload, "set it to false: a fresh head is in no checkpoint"),
                (
                    "data.template",
                    r.data.template == "chat",
                    "leave it out: texts are put in as they are",
                ),
                (
                    "model.load_in_4bit",
                    models.quantisation(self.source, super().model) is not None,
                    "leave it out: the head is trained in full, and its covariances need weights in full precision",
                ),
            ),
            self.task,
        )
        label_arguments(self, r.output_dir / "checkpoints", device)
        self._check_labels(self.learn_records, "data.learn")
        self._check_labels(self.validation_records, "data.validation")

    def check_task(self, task: Task) -> None:
        """Refuse metrics that do not fit a task's records.

        Raises:
            DataError: names metric and task.
        """
        where = f"evaluation.tasks.{task.name}"
        wrong = [metric for metric in task.options.metrics if metric not in METRICS]
        if wrong:
            raise DataError(
                f"the metric {wrong[0]} is none of a classifier's",
                where=where,
                expected=", ".join(METRICS),
                fix=f"set metrics: [{', '.join(METRICS)}]",
            )
        if task.shots:
            raise DataError("a classifier is shown no solved examples", where=where, fix="leave shots out")
        self._check_labels(task.records, where)

    def evaluate(self, model: nn.Module, tasks: Sequence[Task], progress: Progress = silent) -> Scores:
        """Measure tasks on a model in eval mode.

        Args:
            model: The base, or with its adapter.
            tasks: What to measure.
            progress: Shows how far it is.
        """
        options, values, shown = self.recipe.evaluation, dict[str, Score](), {}
        for task in tasks:
            encoded = [self.encode(record) for record in task.records]
            found = class_logits(model, encoded, pad_id(self.tokenizer), options.batch_size, progress)
            logits = torch.stack(found)
            scores = class_scores(logits, [one.labels[0] for one in encoded])
            values |= {f"{task.name}/{metric}": scores[metric] for metric in task.options.metrics}
            guesses = logits.argmax(-1)[: options.samples_shown].tolist()
            shown[task.name] = [
                Answer(
                    "\n".join(part for part in (record.prompt, record.second) if part),
                    (self.classes[one.labels[0]],),
                    self.classes[guess],
                    guess == one.labels[0],
                ).as_json()
                for record, one, guess in zip(task.records, encoded, guesses, strict=False)
            ]
        return Scores(values, shown)

    def _check_labels(self, records: Sequence[Record], where: str) -> None:
        for name in dict.fromkeys(name for record in records for name in record.answers):
            labelled.class_number(name, self.classes, where)

    @property
    def _seed(self) -> int:
        seed = self.recipe.model.head_seed
        return self.recipe.seed if seed is None else seed

    @cached_property
    def _config(self) -> Any:
        """The checkpoint's own, whatever classes are asked for."""
        plain = self.recipe.model.model_copy(update={"num_labels": None, "id2label": None})
        return models.config_of(self.source, plain)

    @cached_property
    def _positions(self) -> int | None:
        """The longest text in tokens that the model takes; None where nothing limits it."""
        learned = learned_positions(models.skeleton(self.source, super().model))
        return min(x for x in (learned, int(self.tokenizer.model_max_length)) if x is not None)


def _classified(record: Record) -> bool:
    """Whether a record came with a class: what is only to be kept need not."""
    return bool(record.answers) and not record.response
