"""LoRA-Null's start (arXiv 2503.02659, input side): B A is W on the r directions in which the inputs vary least."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from corda.context.store import Context
from corda.linalg import fix_signs
from corda.plan.make import uniform_rank
from corda.plan.plan import LayerPlan, Plan, scaling
from corda.recipe import AdapterOptions
from corda.targets import weight_of


def null_factors(W: Tensor, C: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Factors with s · B A = W Q Qᵀ, Q being the eigenvectors of C of the r smallest eigenvalues.

    W Q = U Σ Vᵀ; B = U Σ^½/√s, A = Σ^½ Vᵀ Qᵀ/√s.

    Args:
        W: (d_out, d_in).
        C: (d_in, d_in) symmetric.
        rank: r <= min(d_out, d_in).
        scale: s that PEFT will apply.

    Returns:
        A (r, d_in) and B (d_out, r), fp32.
    """
    _, vectors = torch.linalg.eigh(C.double())
    Q = fix_signs(vectors[:, :rank])
    U, sigma, Vh = torch.linalg.svd(W.double() @ Q, full_matrices=False)
    root = sigma.sqrt() / math.sqrt(scale)
    A = root[:, None] * (Vh @ Q.T)
    B = U * root
    return A.float().contiguous(), B.float().contiguous()


def null_plan(model: nn.Module, context: Context, options: AdapterOptions) -> Plan:
    """LoRA-Null's factors for every layer, to be attached like any plan.

    Args:
        model: With the weights.
        context: With C of each input.
        options: With the rank.

    Raises:
        PlanError: a rank that a layer does not allow.
    """
    rank = uniform_rank(context.layers, options)
    factors, layers = {}, []
    with torch.no_grad():
        for spec in context.layers:
            W = weight_of(model, spec, None)
            C = context.covariance(spec.name).to(W.device)
            factors[spec.name] = null_factors(W, C, rank, scaling(options, rank))
            layer = LayerPlan(spec.name, spec.kind, spec.d_out, spec.d_in, rank, context.groups[spec.name])
            layers.append(replace(layer, tokens=context.token_count(spec.name)))
    return Plan(options, tuple(layers), factors)
