"""Which of several covariances a layer is decomposed with (CorDA++, eqs. 7-8)."""

from __future__ import annotations

from torch import Tensor


def candidate_score(log_pi: float, spectrum: Tensor) -> float:
    """s(C_i) = log π(C_i) · Σ_k σ_k / σ_1; the candidate with the lowest score is taken.

    Args:
        log_pi: log π of the candidate.
        spectrum: (R,) singular values of W C_i, in any order.

    Raises:
        ValueError: log π <= 0, where the order of scores would turn over.
    """
    if log_pi <= 0:
        raise ValueError(f"log π = {log_pi:.3g} is not positive")
    values = spectrum.double()
    return log_pi * float(values.sum() / values.max().clamp_min(1e-300))


def choose(scores: list[float]) -> int:
    """Index of the lowest score; the first of equals."""
    return min(range(len(scores)), key=lambda i: (scores[i], i))
