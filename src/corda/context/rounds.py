"""A process's batches of every round of the calibration set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from corda.data.batches import Batch, Encoded, batches
from corda.distributed import Processes, dealt


def as_rounds(encoded: Sequence[Encoded] | Sequence[Sequence[Encoded]]) -> list[list[Encoded]]:
    """One round for records that are given flat.

    Args:
        encoded: Records, or those of several rounds.
    """
    flat = [part for part in encoded if isinstance(part, Encoded)]
    return [flat] if flat else [list(part) for part in encoded if not isinstance(part, Encoded)]


def share(
    encoded: Sequence[Encoded], processes: Processes, pad: int, size: int, *, response_only: bool, even: bool
) -> list[Batch]:
    """This process's batches of a round: every so many-th record in order of length.

    Args:
        encoded: The whole round.
        processes: Those that share it.
        pad: Token of pads.
        size: Rows per batch.
        response_only: Only response tokens count.
        even: As many batches in every process, with batches that do not count where there are too few.
    """
    ordered = sorted(encoded, key=len, reverse=True)
    own = list(batches(dealt(ordered, processes), pad, size, response_only=response_only))
    if even:
        (idle,) = batches([Encoded(ordered[-1].ids[:1], (False,))], pad, 1)
        idle = replace(idle, counts=torch.zeros_like(idle.counts))
        own += [idle] * (max(processes.hear(len(own))) - len(own))
    return own
