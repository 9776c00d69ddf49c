"""All tasks of a recipe on one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from corda.architectures import learned_positions
from corda.data.batches import encode, encode_segments, load_records, pad_id
from corda.data.formats import Record
from corda.data.rendering import Segment, Template
from corda.errors import DataError, RecipeError
from corda.evaluation.execution import pass_at_1
from corda.evaluation.generation import exact_match, prompt
from corda.evaluation.likelihood import answer_loss, choice_accuracy, choice_texts, perplexity
from corda.evaluation.scores import Score
from corda.progress import Progress, silent
from corda.recipe import Recipe
from corda.tasks import DataSource, EvaluationTask

_A_SENTENCE = 40  # characters; running text that is shorter may be anywhere


@dataclass(frozen=True)
class Task:
    """A recipe's task with its records in memory.

    Attributes:
        name: As in the recipe.
        options: Its settings.
        records: Held-out records.
        shots: Solved examples.
    """

    name: str
    options: EvaluationTask
    records: tuple[Record, ...]
    shots: tuple[Record, ...]


@dataclass(frozen=True)
class Scores:
    """What was measured on one model.

    Attributes:
        values: "task/metric" -> score.
        answers: Task -> some generated answers, as JSON.
    """

    values: Mapping[str, Score]
    answers: Mapping[str, list[dict[str, Any]]]

    def as_json(self) -> dict[str, Any]:
        """Plain dict."""
        return {
            "values": {name: score.as_json() | {"influence": score.influence} for name, score in self.values.items()},
            "answers": dict(self.answers),
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Scores:
        """Inverse of as_json."""
        values = {n: Score(s["value"], s["stderr"], s["n"], tuple(s["influence"])) for n, s in raw["values"].items()}
        return cls(values, raw["answers"])


def load_tasks(
    recipe: Recipe,
    read: Callable[[DataSource], list[Record]] | None = None,
    check: Callable[[Task], None] | None = None,
) -> list[Task]:
    """Read every task's records.

    Args:
        recipe: With the tasks.
        read: Gives a data set's records; default: `load_records`.
        check: Refuses metrics that do not fit; default: `check_metrics`.

    Raises:
        RecipeError: a task runs what the model writes, and evaluation.execute_code does not allow it.
        DataError: see `load_records`; or shots are asked for and there is nothing to take them from.
    """
    read = read or (lambda source: load_records(source, recipe.data.data_dir, recipe.seed))
    tasks = []
    for name, options in recipe.evaluation.tasks.items():
        if "pass_at_1" in options.metrics and not recipe.evaluation.execute_code:
            raise RecipeError(
                "the metric pass_at_1 runs code that the model writes",
                where=f"evaluation.tasks.{name}",
                fix="set evaluation.execute_code: true on a machine where that does no harm",
            )
        shots: list[Record] = []
        if options.shots:
            origin = options.shots_from or (recipe.data.keep if options.measures == "keep" else recipe.data.learn)
            if origin is None:
                raise DataError(
                    "shots are asked for, but there is no data to take them from",
                    where=f"evaluation.tasks.{name}.shots",
                    got=options.shots,
                    fix="name some in shots_from, or set shots: 0",
                )
            shots = read(origin)[: options.shots]
        tasks.append(Task(name, options, tuple(read(options.dataset)), tuple(shots)))
        (check or check_metrics)(tasks[-1])
    return tasks


def check_metrics(task: Task) -> None:
    """Refuse metrics that do not fit a task's records, for a model that continues text.

    Raises:
        DataError: names metric and task.
    """
    records = task.records
    wanted = {
        "perplexity": ("running text", all(r.is_text for r in records)),
        "accuracy": ("choices and a label", all(r.choices for r in records)),
        "exact_match": ("a question with an answer", all(r.answers and not (r.choices or r.program) for r in records)),
        "pass_at_1": ("a prompt, a test and an entry point", all(r.program for r in records)),
        "answer_loss": ("a prompt with an answer", not any(r.is_text or r.choices for r in records)),
    }
    for metric in task.options.metrics:
        needs, fits = wanted.get(metric, ("classes, for a classifier", False))
        if not fits:
            raise DataError(
                f"the metric {metric} does not fit the data",
                where=f"evaluation.tasks.{task.name}",
                expected=f"records with {needs}",
                fix="choose another metric or data set",
            )


def refuse_overlap(tasks: Sequence[Task], used: Mapping[str, Sequence[Record]]) -> None:
    """Refuse held-out records that were calibrated or trained on.

    Args:
        tasks: What will be measured.
        used: Name of a data set in use -> its records.

    Raises:
        DataError: names the task, the data set and an example.
    """
    for task in tasks:
        refuse_shared(f"evaluation.tasks.{task.name}", task.records, {**used, "its own shots": task.shots})


def refuse_longer(task: Task, tokenizer: Any, template: Template, positions: int) -> None:
    """Refuse records that are longer than a model takes; of running text windows are cut.

    Args:
        task: With its records and shots.
        tokenizer: The model's.
        template: How records become text.
        positions: Tokens that the model takes.

    Raises:
        DataError: names the task, the longest record's tokens and what the model takes.
    """
    metrics, options = set(task.options.metrics), task.options
    needed: list[tuple[int, str]] = []
    for record in task.records:
        if metrics & {"exact_match", "pass_at_1"}:
            asked = len(prompt(record, tokenizer, template, task.shots))
            needed.append((asked + options.max_new_tokens, f"of which {options.max_new_tokens} to generate"))
        if "answer_loss" in metrics:
            needed.append((len(encode(record, tokenizer, template=template, shots=task.shots)), "with its answer"))
        if "accuracy" in metrics:
            for texts in choice_texts(record, options.choice_prompt):
                pieces = [Segment(text, False) for text in texts]
                needed.append((len(encode_segments(pieces, tokenizer)), "with a choice"))
    longest, what = max(needed, default=(0, ""))
    if longest > positions:
        raise DataError(
            "evaluation records are longer than the model takes",
            where=f"evaluation.tasks.{task.name}",
            got=f"{longest} tokens, {what}",
            expected=f"at most {positions}",
            fix="leave longer records out, or lower shots or max_new_tokens",
        )


def refuse_shared(where: str, held: Sequence[Record], used: Mapping[str, Sequence[Record]]) -> None:
    """Refuse records that are to be held out and are not.

    Args:
        where: The key that they are given by.
        held: To be held out.
        used: Name of a data set in use -> its records.

    Raises:
        DataError: names the key, the data set and an example.
    """
    for origin, records in used.items():
        keys = {record.key for record in records}
        # Headings of running text are in every part of it.
        shared = [r for r in held if r.key in keys and not (r.is_text and len(r.key) < _A_SENTENCE)]
        if shared:
            raise DataError(
                f"{len(shared)} of {len(held)} evaluation records are also in {origin}",
                where=where,
                got=repr(shared[0].key[:80]),
                expected="held-out records",
                fix="use another split or file for one of the two",
            )


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Task],
    recipe: Recipe,
    progress: Progress = silent,
) -> Scores:
    """Measure every task; the model is put in eval mode by the caller.

    Args:
        model: Any causal language model of transformers.
        tokenizer: Its tokenizer.
        tasks: What to measure.
        recipe: For batch size, window, template and how many answers are kept.
        progress: Shows how far it is.
    """
    values: dict[str, Score] = {}
    shown: dict[str, list[dict[str, Any]]] = {}
    options, template = recipe.evaluation, recipe.data.template
    pad, size = pad_id(tokenizer), options.batch_size
    window = min(options.window, learned_positions(model) or options.window)
    for task in tasks:
        for metric in task.options.metrics:
            key = f"{task.name}/{metric}"
            if metric == "answer_loss":
                encoded = [
                    encode(record, tokenizer, template=template, shots=task.shots, end=False) for record in task.records
                ]
                values[key] = answer_loss(model, encoded, pad, size, progress)
            elif metric == "perplexity":
                values[key] = perplexity(model, tokenizer, task.records, pad, size, window, progress)
            elif metric == "accuracy":
                values[key] = choice_accuracy(
                    model, tokenizer, task.records, pad, size, task.options.choice_prompt, progress
                )
            elif metric == "pass_at_1":
                values[key], answers = pass_at_1(
                    model,
                    tokenizer,
                    task.records,
                    max_new_tokens=task.options.max_new_tokens,
                    batch_size=size,
                    progress=progress,
                )
                shown[task.name] = [answer.as_json() for answer in answers[: options.samples_shown]]
            else:
                values[key], answers = exact_match(
                    model,
                    tokenizer,
                    task.records,
                    template=template,
                    shots=task.shots,
                    stop=task.options.stop,
                    answer_after=task.options.answer_after,
                    max_new_tokens=task.options.max_new_tokens,
                    batch_size=size,
                    progress=progress,
                )
                shown[task.name] = [answer.as_json() for answer in answers[: options.samples_shown]]
    return Scores(values, shown)
