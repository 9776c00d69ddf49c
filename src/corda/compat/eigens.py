"""A layer's decomposition in the form that PEFT's `corda_init` reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Eigens:
    """PEFT takes A = (S/s)^½ Vᵀ and B = U (S/s)^½, s being its scaling, and W' = W - s B A.

    With U the chosen left singular vectors of W (C + λI), S_ii = ‖u_iᵀW‖ and V = Wᵀ U S⁻¹, that is s B A = U Uᵀ W
    whatever s is, each column of B is as long as its row of A, and no inverse of C is needed.

    Attributes:
        S_WC: (r,) fp32, > 0, in the order of U_WC; PEFT divides it by s in place.
        U_WC: (d_out, r) fp32, orthonormal columns by falling singular value, as PEFT orders them; a direction of
            negligible ‖uᵀW‖ is a zero column, so that B starts at zero there.
        V_WC: (d_in, r) fp32, unit columns.
    """

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


def from_factors(A: Tensor, B: Tensor, device: torch.device | str = "cpu") -> Eigens:
    """The decomposition that makes PEFT arrive at s B' A' = B A.

    Args:
        A: (r, d_in), rows by rising singular value, none of length zero.
        B: (d_out, r), orthogonal columns, zero in dead directions.
        device: Of the result.
    """
    A, B = A.double().flip(0), B.double().flip(1)
    rows, columns = A.norm(dim=1), B.norm(dim=0)
    one = torch.ones_like(columns)
    dead = columns == 0
    S = torch.where(dead, one, rows * columns)
    U = B / torch.where(dead, one, columns)
    V = (A / rows[:, None]).T
    return Eigens(*(part.to(device, torch.float32).contiguous() for part in (S, U, V)))
