"""How many components each layer adapts under one budget (CorDA++, eqs. 9-10)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Candidate:
    """A layer that ranks are allocated to.

    Attributes:
        spectrum: (R,) singular values of W C^a, ascending, R = min(d_out, d_in).
        log_pi: log π(C) of its covariance.
        cost: Parameters per component, d_in + d_out.
    """

    spectrum: Tensor
    log_pi: float
    cost: int


def step_scores(layer: Candidate) -> Tensor:
    """s(r) = log π(C) · σ₋ᵣ / Σ_{k=1..R-r} σ_k for r = 1..R-1, (R-1,) fp64; grows with r.

    σ₋ᵣ is the r-th smallest singular value, and the sum is over the R - r largest, those not filtered yet.

    Raises:
        ValueError: log π <= 0, where s(r) would fall with r.
    """
    if layer.log_pi <= 0:
        raise ValueError(f"log π = {layer.log_pi:.3g} is not positive")
    values = layer.spectrum.double()
    remaining = values.flip(0).cumsum(0).flip(0)[1:]
    return layer.log_pi * values[:-1] / remaining.clamp_min(1e-300)


def allocate(
    layers: Sequence[Candidate],
    budget: int,
    mode: Literal["kpm", "ipm"],
    *,
    floor: int = 1,
    cap: int | None = None,
    overshoot: bool = False,
) -> list[int]:
    """Adapter ranks of every layer.

    Every layer starts with one filtered component, and the layer with the lowest s(r) filters one more, ties in layer
    order. KPM adapts what is filtered and stops before the budget is passed; IPM adapts what remains and goes on until
    that fits the budget. Because s(r) grows with r, the steps of the greedy are one sort of all (layer, r).

    Args:
        layers: In module order.
        budget: Parameters, Σ cost · rank.
        mode: Which part is the adapter.
        floor: Smallest rank of a layer.
        cap: Largest rank of a layer; at most R - 1 in any case, which is also the default.
        overshoot: Take the step that passes the budget too (KPM), as the paper does.

    Raises:
        ValueError: the budget is below `floor` per layer, or log π <= 0 somewhere.
    """
    widths = [len(layer.spectrum) for layer in layers]
    highest = [max(min(w - 1, cap or w), 1) for w in widths]
    lowest = [min(max(floor, 1), high) for high in highest]
    least = sum(layer.cost * low for layer, low in zip(layers, lowest, strict=True))
    if budget < least:
        raise ValueError(f"the budget of {budget} parameters is below {least}, rank {floor} in each layer")
    if mode == "kpm":
        first, last = lowest, highest
    else:  # filtered components r, of which R - r remain
        first = [w - high for w, high in zip(widths, highest, strict=True)]
        last = [w - low for w, low in zip(widths, lowest, strict=True)]
        first = [max(f, 1) if w > 1 else 0 for f, w in zip(first, widths, strict=True)]
    owners, scores = [], []
    for index, layer in enumerate(layers):
        steps = step_scores(layer)[max(first[index], 1) - 1 : last[index] - 1]
        owners.append(torch.full((len(steps),), index))
        scores.append(steps)
    order = torch.sort(torch.cat(scores), stable=True).indices
    owner = torch.cat(owners)[order]
    costs = torch.tensor([layer.cost for layer in layers])[owner].cumsum(0)
    filtered = list(first)
    if mode == "kpm":
        room = budget - least
        taken = int((costs <= room).sum())
        taken = min(taken + 1, len(owner)) if overshoot and room > 0 and taken < len(owner) else taken
    else:
        excess = sum(layer.cost * (w - f) for layer, w, f in zip(layers, widths, first, strict=True)) - budget
        taken = int((costs < excess).sum()) + 1 if excess > 0 else 0
    for index, count in enumerate(torch.bincount(owner[:taken], minlength=len(layers)).tolist()):
        filtered[index] += count
    return filtered if mode == "kpm" else [w - f for w, f in zip(widths, filtered, strict=True)]
