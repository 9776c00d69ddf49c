"""Tasks of lm-evaluation-harness on a model that corda holds: base and tuned model measured the same way."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from corda.errors import DataError, ResourceError


def require() -> None:
    """Refuse early where the package is not installed.

    Raises:
        ResourceError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ResourceError("lm-evaluation-harness is not installed", fix="pip install 'corda-adapt[harness]'")


def harness_scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 16,
) -> dict[str, dict[str, Any]]:
    """Scores of the harness's tasks; code that a model writes is never run.

    Args:
        model: Any causal language model of transformers, also with a PEFT adapter on it.
        tokenizer: Its tokenizer.
        tasks: Names, as `lm_eval ls tasks` lists them, or of tasks in `include`.
        include: Folder with more task files.
        limit: At most so many records per task.
        shots: Solved examples; default: the task's own.
        batch_size: Rows; does not change the result.

    Returns:
        "task/metric" -> value, stderr (None where the harness has none) and n.

    Raises:
        DataError: there is no such task.
        ResourceError: the package is not installed, or a task's data cannot be had.
    """
    require()
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # Reading thousands of task files takes most of a minute, for which there is no need where the folder has them all.
    manager = TaskManager(include_path=str(include), include_defaults=False) if include else TaskManager()
    if include and not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=str(include))
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise DataError(
            "lm-evaluation-harness has no such task",
            where="--harness",
            got=", ".join(unknown),
            fix="`lm_eval ls tasks` lists them; --harness-path names a folder with more",
        )
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=1000,
            log_samples=False,
        )
    except ConnectionError as error:
        raise ResourceError(
            "the harness cannot download a task's data",
            where=", ".join(tasks),
            got=error,
            fix="try again with a network, or name a folder of tasks with data of your own by --harness-path",
        ) from None
    return flattened(found["results"], found.get("n-samples", {}))


def flattened(results: Mapping[str, Any], counts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The harness's "metric,filter" and "metric_stderr,filter" per task as "task/metric" -> value, stderr and n.

    Args:
        results: Task -> what the harness says of it.
        counts: Task -> records.
    """
    scores: dict[str, dict[str, Any]] = {}
    for task, values in results.items():
        n = counts.get(task, {}).get("effective")
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            name = f"{task}/{metric}" if kind == "none" else f"{task}/{metric} ({kind})"
            scores[name] = {
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, int | float) else None,
                "n": n,
            }
    return scores
