"""Models that continue text, with images or without: trained by TRL on the tokens of answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer

from corda import models, training
from corda.architectures import carrying, learned_positions
from corda.context.feeding import refuse_windows
from corda.data.batches import IGNORED, Encoded, adds_bos, encode, pad_id, padded, puts_blanks
from corda.data.formats import TEXTS, Record
from corda.data.rendering import render
from corda.errors import RecipeError
from corda.evaluation.evaluate import Scores, Task, check_metrics, evaluate, refuse_longer
from corda.kinds.kind import Kind
from corda.processing import takes_images, tokenizer_of
from corda.progress import Progress, silent

_LOOKED_AT = 100
# Whether a tokenizer puts a blank, and a mark, in front of any text: a study asks for every cell, and loading one takes
# half a second.
_BEGIN: dict[models.Source, tuple[bool, bool]] = {}


class Text(Kind):
    """See the module."""

    formats = kept = TEXTS

    def head(self) -> list[Any]:
        """How records are read where that was once done in another way: what was made then is made again.

        Of tokenizers that put a blank in front of any text, that records in pieces are kept free of it; of those that
        begin any text with a mark, that every window does; of chat templates, that what they say first is prompt.
        """
        if self.source not in _BEGIN:
            _BEGIN[self.source] = puts_blanks(self.tokenizer), adds_bos(tokenizer_of(self.tokenizer))
        blanks, bos = _BEGIN[self.source]
        ways = {
            "no blanks": blanks,
            "windows with bos": bos,
            "chat leads": self.recipe.data.template == "chat" or any(one.always_chat for one in self.learn_records[:1]),
        }
        told = ", ".join(way for way, is_so in ways.items() if is_so)
        return [told] if told else []

    def encode(self, record: Record, limit: int | None = None) -> Encoded:
        """A record as tokens, its text as the template has it. A record whose images do not fit has no tokens.

        Args:
            record: From `records`.
            limit: At most so many tokens, and at most data.max_length.
        """
        data = self.recipe.data
        longest = min(x for x in (data.max_length, limit, self.positions) if x is not None)
        return encode(record, self.tokenizer, template=data.template, max_length=longest)

    @cached_property
    def positions(self) -> int | None:
        """The longest sequence in tokens that the model takes; None where nothing limits it."""
        return learned_positions(models.skeleton(self.source, self.model))

    def forward(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """(B, L) ids and what belongs to them; records without images are cut to the length of the shortest."""
        if takes_images(self.tokenizer):
            batch = padded(rows, pad_id(self.tokenizer))
            return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **(batch.more or {})}
        width = min(len(row) for row in rows)
        ids = torch.tensor([row.ids[:width] for row in rows])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def shown(self, records: Sequence[Record], limit: int) -> dict[str, Tensor]:
        """`forward` of some records: (B, L) ids and what belongs to them.

        Args:
            records: From `records`.
            limit: At most so many tokens of each; a record with images is not cut.
        """
        whole = takes_images(self.tokenizer)
        return self.forward([self.encode(record, None if whole else limit) for record in records])

    def batch(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Padded (B, L) ids; labels are the tokens of answers, (B, L)."""
        made = padded(rows, pad_id(self.tokenizer), response_only=True)
        labels = made.input_ids.masked_fill(~made.counts, IGNORED)
        ids = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
        return ids | {"labels": labels, **(made.more or {})}

    def trainer(
        self, model: PeftModel, learnt: Sequence[Encoded], folder: Path, validation: Sequence[Encoded] = ()
    ) -> Trainer:
        """TRL's trainer.

        Args:
            model: From `attach`.
            learnt: Records that have something to learn from.
            folder: For checkpoints.
            validation: Records whose loss is read during training.
        """
        r = self.recipe
        own = {"tokenizer": self.tokenizer, "options": r.training, "seed": r.seed}
        return training.text_trainer(model, learnt, folder, validation, **own)

    def notes(self) -> list[str]:
        """Training texts that do not end, and records that are cut: one in twenty, or before their answer."""
        if takes_images(self.tokenizer):
            return []
        looked, mark = _some(self.learn_records), tokenizer_of(self.tokenizer).eos_token
        endless = mark and looked and all(r.is_text and not r.response.rstrip().endswith(mark) for r in looked)
        end = f"training texts have no end mark: for the model to learn where to stop, end them with {mark}"
        return [*([end] if endless else []), *self._cut(looked)]

    def _cut(self, looked: Sequence[Record]) -> list[str]:
        data = self.recipe.data
        longest = min(x for x in (data.max_length, self.positions) if x is not None)
        made = [encode(one, self.tokenizer, template=data.template, max_length=longest + 1) for one in looked]
        cut = [one for one in made if len(one) > longest]
        lost = sum(not any(one.response[:longest]) for one in cut)
        if not lost and len(cut) * 20 <= len(looked):
            return []
        some = " looked at" if len(looked) < len(self.learn_records) else ""
        why = "data.max_length" if longest == data.max_length else "all that the model takes"
        without = f", {lost} of them before their answer: left out" if lost else ""
        return [f"{len(cut)} of {len(looked)} training records{some} are cut at {longest} tokens ({why}){without}"]

    def check(self, used: Mapping[str, Sequence[Record]], device: torch.device) -> None:
        """Refuse what can be found wrong before a weight is loaded.

        Args:
            used: Name of a data set in use -> its records.
            device: To train on.

        Raises:
            CordaError: a record that cannot be rendered, or an option that the trainer or images do not allow.
        """
        r = self.recipe
        if r.context.pack_to is not None and self.positions is not None and r.context.pack_to > self.positions:
            raise RecipeError(
                "windows are longer than the model takes",
                where="context.pack_to",
                got=r.context.pack_to,
                expected=f"at most {self.positions}",
            )
        if r.context.pack_to is not None:
            refuse_windows(carrying(models.skeleton(self.source, self.model)))
        training.trainer_arguments(
            r.training, r.output_dir / "checkpoints", r.seed, device, validated=r.data.validation is not None
        )
        for records in used.values():
            # A chat template may refuse an order of roles that only a few records have.
            orders = {tuple(role for role, _ in record.turns): record for record in records}
            for record in (*_some(records), *orders.values()):
                render(record, self.tokenizer, r.data.template)
        if takes_images(self.tokenizer):
            self._check_images(used)

    def check_task(self, task: Task) -> None:
        """Refuse metrics that do not fit a task's records.

        Raises:
            DataError: names metric and task; or a record is longer than the model takes.
        """
        check_metrics(task)
        if self.positions is not None:
            refuse_longer(task, self.tokenizer, self.recipe.data.template, self.positions)

    def evaluate(self, model: nn.Module, tasks: Sequence[Task], progress: Progress = silent) -> Scores:
        """Measure tasks on a model in eval mode.

        Args:
            model: The base, or with its adapter.
            tasks: What to measure.
            progress: Shows how far it is.
        """
        return evaluate(model, self.tokenizer, tasks, self.recipe, progress)

    def _check_images(self, used: Mapping[str, Sequence[Record]]) -> None:
        """Refuse what is not done for models of images and text, and images that do not fit data.max_length."""
        recipe = self.recipe
        for key, wrong in (
            ("context.pack_to", recipe.context.pack_to is not None),
            ("context.offload", recipe.context.offload),
            ("model.load_in_4bit", models.quantisation(self.source, self.model) is not None),
        ):
            if wrong:
                raise RecipeError("this is not done for a model of images and text", where=key, fix="leave it out")
        for origin, records in used.items():
            shown = next((record for record in records if record.images), None)
            if shown and not len(self.encode(shown)):
                raise RecipeError(
                    f"the images of a record in {origin} are more tokens than a record may have",
                    where="data.max_length",
                    got=recipe.data.max_length,
                    fix="raise it",
                )


def _some(records: Sequence[Record]) -> Sequence[Record]:
    """At most a hundred, from the first to the last: files are often sorted."""
    return records[:: -(-len(records) // _LOOKED_AT) or 1]
