"""Which learning rate a method is judged by: the best on the development split, which must lie inside its grid."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from corda.evaluation.scores import sign

Setting = tuple[float, tuple[tuple[str, Any], ...]]


@dataclass(frozen=True)
class Choice:
    """A method's best setting.

    Attributes:
        learning_rate: Of the lowest mean development loss over seeds.
        variant: The other settings chosen with it.
        inside: No end of the grid, so that the best rate is known to be bracketed.
        end: "low", "high" or "" where it is inside.
        development: The mean at each rate of the chosen variant, rate -> value.
    """

    learning_rate: float
    variant: tuple[tuple[str, Any], ...]
    inside: bool
    end: str
    development: Mapping[float, float]


def choose(runs: Sequence[Mapping[str, Any]], development: str) -> Choice | None:
    """The setting with the best mean on the development split; diverged runs count as infinitely bad.

    Where not every setting has run with every seed yet, the seeds that all of them have decide, if there are any;
    a divergence counts with any seed.

    Args:
        runs: Those of one method.
        development: task/metric.
    """
    losses: dict[Setting, dict[int, float]] = defaultdict(dict)
    for run in runs:
        if run["status"] not in {"done", "diverged"}:
            continue
        after = run["scores"].get("after", {}).get(development)
        value = sign(development) * after["value"] if run["status"] == "done" and after else math.inf
        losses[run["learning_rate"], tuple(sorted(run["variant"].items()))][run["seed"]] = value
    common = set.intersection(*map(set, losses.values())) if losses else set()
    means = {
        setting: statistics.fmean(v for seed, v in values.items() if seed in (common or values) or math.isinf(v))
        for setting, values in losses.items()
    }
    if not means or not any(math.isfinite(mean) for mean in means.values()):
        return None
    rate, variant = min(means, key=lambda setting: (means[setting], setting[0]))
    own = {r: mean for (r, v), mean in sorted(means.items(), key=lambda item: item[0][0]) if v == variant}
    rates = sorted(own)
    end = "low" if rate == rates[0] else "high" if rate == rates[-1] else ""
    return Choice(rate, variant, not end, end, {r: sign(development) * own[r] for r in rates})


def further(rates: Sequence[float], end: str) -> float:
    """The next rate beyond one end of a grid, a step of the grid away (at most 3 x).

    Args:
        rates: The grid, a rate as often as there are seeds.
        end: "low" or "high".
    """
    ordered = sorted(set(rates))
    one, two = (ordered[0], ordered[1]) if end == "low" else (ordered[-2], ordered[-1])
    step = min(two / one, 3.0)
    return float(f"{ordered[0] / step if end == 'low' else ordered[-1] * step:.3g}")


def smoothed(losses: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values at each place; shorter at the start.

    Args:
        losses: In nats, one a step.
        window: Steps.
    """
    return [sum(losses[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(losses))]


def steps_to_reach(run: Mapping[str, Any], reference: Mapping[str, Any], of: str = "loss") -> dict[str, Any]:
    """When a run's loss falls below the final one of another run with the same batches.

    The training loss, `of="loss"`, is smoothed over a tenth of the steps, and only places with a whole window count. It
    is of other records at every step: with few records a step a run passes its own final loss long before its end.
    The loss on validation records, `of="eval_loss"`, is of the same ones at every reading, and is taken as linear
    between two of them.

    Args:
        run: With its curve.
        reference: Another one.
        of: Which of the curve's losses.

    Returns:
        steps (None where it does not), of (the reference's steps), share, and the loss to reach.
    """
    total = reference["curve"]["step"][-1]
    steps: float | None
    if of == "loss":
        window = max(1, len(reference["curve"]["loss"]) // 10)
        target = smoothed(reference["curve"]["loss"], window)[-1]
        own = smoothed(run["curve"]["loss"], window)
        places = list(zip(run["curve"]["step"], own, strict=True))[window - 1 :]
        steps = next((step for step, loss in places if loss <= target), None)
    else:
        target = reference["curve"][of][-1]
        steps = _first_below(list(zip(run["curve"]["eval_step"], run["curve"][of], strict=True)), target)
    return {"steps": steps, "of": total, "share": None if steps is None else steps / total, "loss": target}


def _first_below(readings: Sequence[tuple[int, float]], target: float) -> float | None:
    """The step at which a line through readings, (step, loss), first is at the target; None where it never is."""
    for number, (step, loss) in enumerate(readings):
        if loss <= target:
            if number == 0:
                return float(step)
            earlier, higher = readings[number - 1]
            return step - (step - earlier) * (target - loss) / (higher - loss)
    return None


def shares_by_rate(
    runs: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]], of: str = "loss"
) -> dict[str, Any]:
    """`steps_to_reach` at one learning rate for both, as papers compare, for every rate that both were run at.

    Args:
        runs: Finished runs of a method.
        references: Those of the reference.
        of: Which of the curve's losses.

    Returns:
        Rate -> the mean share over seeds that both have (None where one of them does not reach it), and their number.
    """
    known = {(one["learning_rate"], one["seed"]): one for one in references}
    shares: dict[float, list[float | None]] = {}
    for run in runs:
        other = known.get((run["learning_rate"], run["seed"]))
        if other is not None:
            shares.setdefault(run["learning_rate"], []).append(steps_to_reach(run, other, of)["share"])
    found = {}
    for rate, own in sorted(shares.items()):
        reached = [share for share in own if share is not None]
        found[f"{rate:g}"] = {"share": sum(reached) / len(own) if len(reached) == len(own) else None, "seeds": len(own)}
    return found
