"""What a study's runs show: best rates, fronts, differences at equal task loss, steps to the reference's loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from corda.comparing.choosing import Choice, choose, shares_by_rate, steps_to_reach
from corda.comparing.fronts import Point, compared, front, points, retained
from corda.comparing.metered import foretold
from corda.comparing.study import Study

Runs = Sequence[Mapping[str, Any]]


def conclusions(study: Study, runs: Runs) -> dict[str, Any]:
    """Everything that the page says, as plain JSON.

    Args:
        study: What was decided beforehand.
        runs: The results that are there.

    Returns:
        best: method -> chosen rate, whether it is inside the grid, scores and retained % there;
        fronts: keep metric -> method -> points of the front over all seeds;
        differences: keep metric -> method -> against the reference, see `fronts.compared`;
        also: further method of the study -> the same against it;
        steps: method -> steps to reach the final training loss of `against`, each at its best rate, seed by seed, their
            mean share, and the shares with both at one rate;
        drift: keep metric -> how well the drift meter orders the runs by what they forgot, see `metered.foretold`.
    """
    by_method: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for run in runs:
        by_method[run["method"]].append(run)
    chosen = {name: choose(own, study.development) for name, own in by_method.items()}
    return {
        "best": {name: _best(study, by_method[name], choice) for name, choice in chosen.items()},
        "fronts": {
            keep: {
                name: [[p.learn, p.rise, p.rate] for p in front(points(own, study.learn, keep))]
                for name, own in by_method.items()
            }
            for keep in study.keep
        },
        "differences": {keep: _differences(study, by_method, keep, study.reference) for keep in study.keep},
        "also": {
            other: {keep: _differences(study, by_method, keep, other) for keep in study.keep}
            for other in study.also_against
        },
        "steps": _steps(study, by_method, chosen),
        "drift": {keep: foretold(runs, keep) for keep in study.keep},
        "diverged": [_name(run) for run in runs if run["status"] == "diverged"],
        "unavailable": {_name(run): run["reason"] for run in runs if run["status"] == "unavailable"},
    }


def _best(study: Study, runs: Runs, choice: Choice | None) -> dict[str, Any]:
    if choice is None:
        return {"learning_rate": None, "inside": False, "why": "no run of it ended well"}
    own = [run for run in runs if _is(run, choice) and run["status"] == "done"]
    scores: dict[str, Any] = {}
    for metric in [study.learn, *study.keep]:
        values = [run["scores"]["after"][metric]["value"] for run in own]
        before = [run["scores"]["before"][metric]["value"] for run in own]  # seeds may draw records apart
        scores[metric] = {
            "mean": sum(values) / len(values),
            "seeds": values,
            "stderr_records": own[0]["scores"]["after"][metric]["stderr"],
            "base": sum(before) / len(before),
            "retained": sum(retained(metric, *pair) for pair in zip(before, values, strict=True)) / len(values),
        }
    return {
        "learning_rate": choice.learning_rate,
        "variant": dict(choice.variant),
        "inside": choice.inside,
        "development": {f"{rate:g}": value for rate, value in choice.development.items()},
        "scores": scores,
        "trainable_parameters": own[0]["trainable_parameters"],
        "train_seconds": sum(run["timing"]["train"] for run in own) / len(own),
        "start_seconds": sum(run["timing"].get("collect", 0) + run["timing"].get("plan", 0) for run in own) / len(own),
        "peak_bytes": max(run["memory"].get("train", 0) for run in own),
    }


def _differences(study: Study, by_method: Mapping[str, Runs], keep: str, against: str) -> dict[str, Any]:
    reference = _by_seed(by_method.get(against, ()), study.learn, keep)
    return {
        name: compared(_by_seed(own, study.learn, keep), reference, drawn=study.draws(keep))
        for name, own in by_method.items()
        if name != against
    }


def _by_seed(runs: Runs, learn: str, keep: str) -> dict[int, list[Point]]:
    seeds: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for run in runs:
        seeds[run["seed"]].append(run)
    return {seed: points(own, learn, keep) for seed, own in seeds.items()}


def _steps(study: Study, by_method: Mapping[str, Runs], chosen: Mapping[str, Choice | None]) -> dict[str, Any]:
    """Steps to another method's final training loss; under "validation" the same of the validation loss, if known."""
    found: dict[str, Any] = {}
    for name in by_method:
        against = study.methods[name].against or study.reference
        own, reference = ((by_method.get(one, ()), chosen.get(one)) for one in (name, against))
        timed = _timed(own, reference, "loss")
        if timed["seeds"]:
            found[name] = {"against": against, **timed}
            validated = _timed(own, reference, "eval_loss")
            if validated["seeds"]:
                found[name]["validation"] = validated
    return found


def _timed(one: tuple[Runs, Choice | None], other: tuple[Runs, Choice | None], of: str) -> dict[str, Any]:
    """Steps of one method to the other's final loss: at the best rates of both, seed by seed, and at equal rates."""
    own, reference = ([run for run in _chosen(*some) if run["curve"].get(of)] for some in (one, other))
    mine, theirs = _at_best(own, one[1]), _at_best(reference, other[1])
    seeds = {str(seed): steps_to_reach(run, theirs[seed], of) for seed, run in mine.items() if seed in theirs}
    shares = [found["share"] for found in seeds.values()]
    mean = None if None in shares or not shares else sum(shares) / len(shares)
    return {"seeds": seeds, "share": mean, "by_rate": shares_by_rate(own, reference, of)}


def _chosen(runs: Runs, choice: Choice | None) -> Runs:
    """Finished runs of a method's chosen variant, at every rate."""
    return [r for r in runs if choice and r["variant"] == dict(choice.variant) and r["status"] == "done"]


def _at_best(runs: Runs, choice: Choice | None) -> dict[int, Mapping[str, Any]]:
    """Seed -> the run at a method's chosen setting."""
    return {r["seed"]: r for r in _chosen(runs, choice) if choice and _is(r, choice)}


def _is(run: Mapping[str, Any], choice: Choice) -> bool:
    return bool(run["learning_rate"] == choice.learning_rate and run["variant"] == dict(choice.variant))


def _name(run: Mapping[str, Any]) -> str:
    parts = [run["method"], f"learning rate {run['learning_rate']:g}", f"seed {run['seed']}"]
    return ", ".join([*parts, *(f"{key} {value}" for key, value in run["variant"].items())])
