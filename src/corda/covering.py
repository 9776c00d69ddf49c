"""Does the calibration set cover what is to be kept? How much of other data's energy reaches the adapter's inputs.

An adapter changes a layer's output by ΔB A x, so what it can disturb of an input x is its part in the row space of A.
Of data with second moment C, the exposed share is tr(Qᵀ C Q) / tr C, Q an orthonormal basis of A's rows; the rest is
protected, whatever training makes of B. A plan that keeps knowledge exposes little of its calibration set; where it
exposes much more of a set that is to be kept as well, the calibration set does not stand for it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from corda.context.collect import collect_encoded
from corda.context.store import Context
from corda.data.batches import pad_id
from corda.errors import PlanError
from corda.pipeline import Stages
from corda.plan.plan import Plan

# A retained set whose exposed share is this many times the calibration set's, in the median layer, is not covered.
LIMIT = 2.0
_WORST = 5


def exposed_share(A: Tensor, C: Tensor) -> float:
    """tr(Qᵀ C Q) / tr C for an orthonormal basis Q of the rows of A (r, d_in); C is (d_in, d_in). NaN for C = 0."""
    Q, R = torch.linalg.qr(A.double().T)
    diagonal = R.diagonal().abs()
    Q = Q[:, diagonal > 1e-9 * float(diagonal.max())]
    total = float(C.diagonal().double().sum())
    inside = float((Q * (C.double() @ Q)).sum())
    return inside / total if total > 0 else math.nan


def coverage(plan: Plan, calibration: Context, others: Mapping[str, Context]) -> dict[str, Any]:
    """How much of each set's activation energy the plan protects, per layer and in total, against its calibration set.

    Args:
        plan: With factors; not plain LoRA.
        calibration: What the plan was made from.
        others: Name of a retained set -> its covariances, of the same layers.

    Returns:
        sets: name -> protected (share of the energy summed over layers), protected_median (over layers), ratio (median
        over layers of exposed share over the calibration set's), tokens; layers: one dict per layer with the exposed
        share of every set; random: the exposed share of random directions of the same ranks; warnings.
    """
    names = ["calibration", *others]
    contexts = [calibration, *others.values()]
    energy = {name: [0.0, 0.0] for name in names}  # exposed, all
    layers: list[dict[str, Any]] = []
    for layer in plan.layers:
        A = plan.factors[layer.name][0]
        shares = {}
        for name, context in zip(names, contexts, strict=True):
            C = context.covariance(layer.name, layer.chosen if name == "calibration" else 0)
            shares[name] = exposed_share(A, C)
            total = float(C.diagonal().double().sum())
            energy[name][0] += shares[name] * total
            energy[name][1] += total
        layers.append({"name": layer.name, "rank": layer.rank, "random": layer.rank / layer.d_in, "exposed": shares})
    sets, warnings = {}, []
    for name, context in zip(names, contexts, strict=True):
        own = [layer["exposed"][name] for layer in layers]
        ratios = [layer["exposed"][name] / max(layer["exposed"]["calibration"], 1e-12) for layer in layers]
        sets[name] = {
            "protected": 1 - energy[name][0] / energy[name][1],
            "protected_median": 1 - statistics.median(own),
            "ratio": statistics.median(ratios),
            "tokens": context.token_count(plan.layers[0].name),
        }
        if name != "calibration" and sets[name]["ratio"] > LIMIT:
            worst = sorted(zip(ratios, layers, strict=True), key=lambda pair: -pair[0])[:_WORST]
            most = ", ".join(layer["name"] for _, layer in worst)
            warnings.append(
                f"the calibration set does not cover {name}: the adapter's inputs hold {sets[name]['ratio']:.1f} times "
                f"the share of its energy (median layer; most in {most}); add records like it to data.keep"
            )
    return {
        "sets": sets,
        "random": statistics.median(layer["random"] for layer in layers),
        "layers": layers,
        "warnings": warnings,
    }


def covered(stages: Stages) -> dict[str, Any]:
    """`coverage` of a run's plan for every evaluation task that measures what is kept.

    Args:
        stages: Of a recipe in a mode with a context; collects and plans what is not there yet.

    Raises:
        PlanError: the mode has no factors from data, or no task measures what is kept.
    """
    recipe = stages.recipe
    tasks = [task for task in stages.inputs.tasks if task.options.measures == "keep"]
    if recipe.data.keep is None or recipe.adapter.mode not in {"kpm", "dual", "contrast"} or not tasks:
        raise PlanError(
            "there is no coverage to check",
            where=f"mode {recipe.adapter.mode}, {len(tasks)} tasks that measure what is kept",
            expected="mode kpm, dual or contrast, data.keep, and evaluation tasks with measures: keep",
        )
    context, plan = stages.context(), stages.plan()
    assert context is not None
    model, kind = stages.bases.bare(), stages.inputs.kind
    others = {}
    for task in stages.progress(tasks, "coverage", len(tasks)):
        encoded = [one for one in map(kind.encode, task.records) if len(one)]
        others[task.name] = collect_encoded(
            model,
            encoded,
            stages.inputs.targets,
            pad_token_id=pad_id(kind.tokenizer),
            batch_size=recipe.context.batch_size,
        )
    return coverage(plan, context, others)
