"""Evaluation in several processes: each measures some metrics of some tasks on its own copy of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from corda.distributed import Processes, by_cost
from corda.evaluation.evaluate import Scores, Task

_GENERATION = 8  # times what a loss costs


def dealt_tasks(tasks: Sequence[Task], processes: Processes) -> list[Task]:
    """This process's share: whole metrics, so that every score is the one that a single process gives.

    Args:
        tasks: All of them.
        processes: How many there are and which one this is.
    """
    pairs = [(number, metric) for number, task in enumerate(tasks) for metric in task.options.metrics]
    costs = [len(tasks[n].records) * (_GENERATION if m == "exact_match" else 1) for n, m in pairs]
    owner = by_cost(costs, processes.size)
    share = []
    for number, task in enumerate(tasks):
        own = [m for (n, m), rank in zip(pairs, owner, strict=True) if n == number and rank == processes.rank]
        if own:
            share.append(replace(task, options=task.options.model_copy(update={"metrics": own})))
    return share


def together(own: Scores, tasks: Sequence[Task], processes: Processes) -> Scores:
    """The scores of all processes, in the order of the tasks.

    Args:
        own: This process's scores.
        tasks: All of them.
        processes: How many there are and which one this is.
    """
    if processes.size == 1:
        return own
    parts = [Scores.from_json(part) for part in processes.hear(own.as_json())]
    values = {name: score for part in parts for name, score in part.values.items()}
    answers: dict[str, list[dict[str, Any]]] = {name: a for part in parts for name, a in part.answers.items()}
    order = [f"{task.name}/{metric}" for task in tasks for metric in task.options.metrics]
    told = {task.name: answers[task.name] for task in tasks if task.name in answers}
    return Scores({name: values[name] for name in order}, told)
