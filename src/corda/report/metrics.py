"""What the metrics are called, which way is better, and the order that they stand in on a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from corda.report.figures import Run


@dataclass(frozen=True)
class Metric:
    """How a metric is shown.

    Attributes:
        label: With its unit.
        short: In a sentence.
        better: Sign of an improvement; 0 where that is not known.
        factor: From the stored value to the shown one.
        digits: After the decimal point.
    """

    label: str
    short: str
    better: int
    factor: float = 1
    digits: int = 3


METRICS = {
    "answer_loss": Metric("loss, nats per token", "loss", -1),
    "perplexity": Metric("perplexity", "perplexity", -1, digits=2),
    "exact_match": Metric("exact match, %", "exact match in %", 1, 100, 1),
    "accuracy": Metric("accuracy, %", "accuracy in %", 1, 100, 1),
    "f1": Metric("F1, %", "F1 in %", 1, 100, 1),
    "loss": Metric("loss, nats per label", "loss", -1),
    "pass_at_1": Metric("programs right, %", "programs right in %", 1, 100, 1),
}


def metric_of(name: str) -> Metric:
    """The metric of that name; a metric that is not known shows its own name."""
    return METRICS.get(name, Metric(name, name, 0))


def split_key(key: str) -> tuple[str, str]:
    """Task and metric of a score's key, "task/metric"."""
    task, _, name = key.rpartition("/")
    return task, name


def position(key: str, run: Run) -> tuple[bool, str, int]:
    """Sorts a run's scores: what is to be learnt first, then by task and metric.

    Args:
        key: "task/metric".
        run: The run that has it.
    """
    task, name = split_key(key)
    keep = run.results["recipe"]["evaluation"]["tasks"][task]["measures"] == "keep"
    return keep, task, list(METRICS).index(name) if name in METRICS else len(METRICS)


def ordered_keys(runs: Sequence[Run]) -> list[str]:
    """Every score's key that some run has, each once."""
    return list(
        dict.fromkeys(
            key for run in runs for key in sorted(run.results["scores"]["before"], key=lambda k: position(k, run))
        )
    )
