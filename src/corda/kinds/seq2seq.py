"""Models with an encoder for the question and a decoder for the answer, such as T5: trained by transformers.

A record is its prompt's tokens and its answer's; the first go to the encoder, the second, with an end mark, to the
decoder, which is fed them shifted right by its start token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer

from corda import models
from corda.data.batches import IGNORED, Encoded, pad_id
from corda.data.formats import Record
from corda.errors import DataError
from corda.evaluation.evaluate import Scores, Task, check_metrics
from corda.evaluation.scores import Score
from corda.evaluation.two_sequences import answer_loss, exact_match
from corda.kinds.kind import Kind, refused
from corda.kinds.labels import label_arguments, label_trainer
from corda.progress import Progress, silent

_METRICS = ("answer_loss", "exact_match")


class Seq2Seq(Kind):
    """See the module."""

    formats = ("prompt_completion", "qa", "alpaca")
    kept = (*formats, "text")

    def encode(self, record: Record, limit: int | None = None) -> Encoded:
        """A record as tokens, prompt and answer one behind the other; running text is all answer.

        Args:
            record: From `records`.
            limit: At most so many tokens, and at most data.max_length; the prompt is cut first at its end.
        """
        longest = self.recipe.data.max_length if limit is None else min(self.recipe.data.max_length, limit)
        answer, end = self._tokens(record.response.strip(), longest), self.tokenizer.eos_token_id
        if end is not None and answer[-1] != end:
            answer = (*answer[: longest - 1], end)
        if record.is_text:
            return Encoded(answer, (True,) * len(answer))
        prompt = self._tokens(record.prompt, max(longest - len(answer), 1))
        return Encoded(prompt + answer, (False,) * len(prompt) + (True,) * len(answer))

    def forward(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Padded (B, L) ids of prompts, and (B, M) of answers as the decoder is fed them."""
        made = self.batch(rows)
        return {name: made[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}

    def batch(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Padded (B, L) ids of prompts; of answers labels, (B, M), and the same shifted right."""
        pad = pad_id(self.tokenizer)
        prompts = [torch.tensor([t for t, r in zip(row.ids, row.response, strict=True) if not r]) for row in rows]
        answers = [torch.tensor([t for t, r in zip(row.ids, row.response, strict=True) if r]) for row in rows]
        prompts = [one if len(one) else answer for one, answer in zip(prompts, answers, strict=True)]
        ids, labels = (
            nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=pad) for some in (prompts, answers)
        )
        lengths = (torch.tensor([len(one) for one in some])[:, None] for some in (prompts, answers))
        mask, own = (torch.arange(x.shape[1])[None] < n for x, n in zip((ids, labels), lengths, strict=True))
        start = torch.full_like(labels[:, :1], self._start)
        return {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "decoder_input_ids": torch.cat([start, labels[:, :-1]], dim=1),
            "labels": labels.masked_fill(~own, IGNORED),
        }

    def trainer(
        self, model: PeftModel, learnt: Sequence[Encoded], folder: Path, validation: Sequence[Encoded] = ()
    ) -> Trainer:
        """transformers' trainer, on the loss of the answers' tokens.

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
            RecipeError: an option that is of no use here.
        """
        r = self.recipe
        sides = len(r.context_sources()) > 1 or r.adapter.mode in {"dual", "contrast"}
        refused(
            (
                ("adapter.mode", sides, "use kpm, ipm or lora without a drift meter: one context is collected"),
                ("context.held_out", r.metered and r.context.held_out > 0, "set it to 0: one context is collected"),
                ("context.pack_to", r.context.pack_to is not None, "leave it out: an encoder sees a whole window"),
                ("context.positions", r.context.positions == "response", "set it to all: encoder and decoder count"),
                ("context.offload", r.context.offload, "set it to false: the model is collected whole"),
                ("data.template", r.data.template == "chat", "leave it out: such models have no chat template"),
                (
                    "model.load_in_4bit",
                    models.quantisation(self.source, self.model) is not None,
                    "leave it out: the model is collected whole, in full precision",
                ),
            ),
            self.task,
        )
        label_arguments(self, r.output_dir / "checkpoints", device)

    def check_task(self, task: Task) -> None:
        """Refuse metrics that do not fit a task's records.

        Raises:
            DataError: names metric and task.
        """
        where = f"evaluation.tasks.{task.name}"
        wrong = [metric for metric in task.options.metrics if metric not in _METRICS]
        if wrong or task.shots:
            raise DataError(
                "a model with an encoder and a decoder is shown no solved examples"
                if task.shots
                else f"the metric {wrong[0]} is not measured on a model with an encoder and a decoder",
                where=where,
                fix="leave shots out" if task.shots else f"set metrics: [{', '.join(_METRICS)}]",
            )
        check_metrics(task)

    def evaluate(self, model: nn.Module, tasks: Sequence[Task], progress: Progress = silent) -> Scores:
        """Measure tasks on a model in eval mode.

        Args:
            model: The base, or with its adapter.
            tasks: What to measure.
            progress: Shows how far it is.
        """
        options, values, shown = self.recipe.evaluation, dict[str, Score](), dict[str, list[Any]]()
        for task in tasks:
            encoded = [self.encode(record) for record in task.records]
            order = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i]), i))
            parts = [order[i : i + options.batch_size] for i in range(0, len(order), options.batch_size)]
            batches = [(rows, self.batch([encoded[i] for i in rows])) for rows in parts]
            for metric in task.options.metrics:
                key = f"{task.name}/{metric}"
                if metric == "answer_loss":
                    values[key] = answer_loss(model, batches, self.tokenizer, progress)
                    continue
                values[key], answers = exact_match(model, batches, self.tokenizer, task, progress)
                shown[task.name] = [one.as_json() for one in answers[: options.samples_shown]]
        return Scores(values, shown)

    @cached_property
    def _start(self) -> int:
        """The token that the decoder begins with."""
        config = models.config_of(self.source, self.model)
        start = getattr(config, "decoder_start_token_id", None)
        return pad_id(self.tokenizer) if start is None else int(start)

    def _tokens(self, text: str, limit: int) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, truncation=True, max_length=limit)["input_ids"])
