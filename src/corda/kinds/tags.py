"""Words that have a tag each: a head is trained in full beside the adapter, on the first token of every word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from corda.data import labelled
from corda.data.batches import IGNORED, Encoded, pad_id
from corda.data.formats import TEXTS, Record
from corda.errors import DataError
from corda.evaluation.classification import class_logits
from corda.evaluation.evaluate import Scores, Task
from corda.evaluation.generation import Answer
from corda.evaluation.scores import Score
from corda.evaluation.tagging import named_as_spans, tag_scores
from corda.kinds.classes import Classes
from corda.progress import Progress, silent


class Tags(Classes):
    """See the module."""

    formats = ("tagged",)
    kept = (*(name for name in TEXTS if name != "text"), "tagged", "text")

    def encode(self, record: Record, limit: int | None = None) -> Encoded:
        """A record as tokens, with the special tokens of the tokenizer; a word has its tag at its first token.

        Args:
            record: From `records`.
            limit: At most so many tokens, and at most data.max_length, and what the model takes.
        """
        if not record.words:
            return super().encode(record, limit)
        ids, words = labelled.words_tokenised(record.words, self.tokenizer, self.longest(limit))
        if not record.answers:
            return Encoded(ids, (False,) * len(ids))
        numbers = [labelled.class_number(name, self.classes, "a tag") for name in record.answers]
        first = [word is not None and (i == 0 or words[i - 1] != word) for i, word in enumerate(words)]
        labels = (numbers[w] if start and w is not None else IGNORED for w, start in zip(words, first, strict=True))
        return Encoded(ids, (False,) * len(ids), labels=tuple(labels))

    def batch(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Padded (B, L) ids and what belongs to them; labels are the numbers of the tags, (B, L)."""
        made = self.forward(rows)
        labels = torch.full_like(made["input_ids"], IGNORED)
        for r, row in enumerate(rows):
            labels[r, : len(row)] = torch.tensor(row.labels)
        return made | {"labels": labels}

    def check_task(self, task: Task) -> None:
        """Refuse metrics that do not fit a task's records.

        Raises:
            DataError: names metric and task.
        """
        super().check_task(task)
        if "f1" in task.options.metrics and not named_as_spans(self.classes):
            raise DataError(
                "the metric f1 of tags counts spans, which these classes do not name",
                where=f"evaluation.tasks.{task.name}",
                got=", ".join(self.classes[:5]),
                expected="O, B-... and I-...",
                fix="name them in model.id2label, or leave f1 out of metrics",
            )

    def evaluate(self, model: nn.Module, tasks: Sequence[Task], progress: Progress = silent) -> Scores:
        """Measure tasks on a model in eval mode; words that were cut off do not count.

        Args:
            model: The base, or with its adapter.
            tasks: What to measure.
            progress: Shows how far it is.
        """
        options, values, shown = self.recipe.evaluation, dict[str, Score](), dict[str, list[dict[str, Any]]]()
        for task in tasks:
            encoded = [self.encode(record) for record in task.records]
            found = class_logits(model, encoded, pad_id(self.tokenizer), options.batch_size, progress)
            places = [[i for i, label in enumerate(one.labels) if label != IGNORED] for one in encoded]
            logits = [own[some] for own, some in zip(found, places, strict=True)]
            labels = [[one.labels[i] for i in some] for one, some in zip(encoded, places, strict=True)]
            scores = tag_scores(logits, labels, self.classes)
            values |= {f"{task.name}/{metric}": scores[metric] for metric in task.options.metrics}
            shown[task.name] = []
            for record, own, right in list(zip(task.records, logits, labels, strict=True))[: options.samples_shown]:
                said, meant = (" ".join(self.classes[i] for i in some) for some in (own.argmax(-1).tolist(), right))
                shown[task.name].append(Answer(record.prompt, (meant,), said, said == meant).as_json())
        return Scores(values, shown)
