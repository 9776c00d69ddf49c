"""Experts with few tokens: their covariances lean on what all experts of their projection have seen.

C' = (T C + k C_pool) / (T + k), as if k tokens of the pooled kind had been seen besides the T routed ones.
"""

from __future__ import annotations

from torch import Tensor

from corda.context.store import Context
from corda.targets import LayerSpec


def covariance(context: Context, layer: str, round_: int | None, prior: float | None) -> Tensor:
    """C of a layer's input, or C' of an expert's, (d_in, d_in) fp32.

    Args:
        context: What was collected.
        layer: Full name.
        round_: Which candidate; None for all of them pooled.
        prior: k in tokens; None for the layer's number of inputs.
    """
    C = context.covariance(layer, round_)
    spec = context.spec(layer)
    if spec.pool is None:
        return C
    share = pooled_share(spec, context.token_count(layer, round_), prior)
    return (1 - share) * C + share * context.pooled(spec.pool, round_)


def pooled_share(layer: LayerSpec, tokens: int, prior: float | None) -> float:
    """k / (T + k), the weight of C_pool; 0 for a layer that every token reaches.

    Args:
        layer: The layer.
        tokens: T, those that reached it.
        prior: k, in tokens; None: none.
    """
    if layer.pool is None:
        return 0.0
    k = float(layer.d_in) if prior is None else prior
    return k / (tokens + k)
