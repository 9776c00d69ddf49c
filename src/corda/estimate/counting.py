"""Counts that need nothing but shapes: bytes of covariances, sizes of eigenproblems, the end of shared work."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from corda.targets import LayerSpec

FP32 = 4  # bytes

# Distinct inputs with the layers that take each.
Groups = Sequence[tuple[str, list[LayerSpec]]]


def eigenproblem(layer: LayerSpec, mode: str) -> int:
    """Size of the one that two contexts pose.

    Args:
        layer: The layer.
        mode: contrast or dual.
    """
    return layer.d_in if mode == "contrast" else layer.max_rank


def half(d: int) -> int:
    """Numbers in a packed upper triangle."""
    return d * (d + 256) // 2 if d > 256 else d * d


def square(groups: Groups) -> int:
    """Bytes of the sums while they are collected, fp32."""
    return sum(FP32 * members[0].d_in ** 2 for _, members in groups)


def packed(groups: Groups) -> int:
    """Bytes of the packed triangles, fp32."""
    return sum(FP32 * half(members[0].d_in) for _, members in groups)


def makespan(costs: Sequence[float], processes: int) -> float:
    """When the last of the processes ends, the dearest layers being given out first.

    Args:
        costs: Each layer's, in any unit.
        processes: How many there are.
    """
    loads = [0.0] * processes
    for cost in sorted(costs, reverse=True):
        heapq.heapreplace(loads, loads[0] + cost)
    return max(loads)
