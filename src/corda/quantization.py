"""4-bit weights of bitsandbytes: the round trip, what it costs a layer's output, and corrections in the data's metric.

CorDA++ (arXiv 2506.13187) quantises the residual W - BA instead of W and leaves it there. A refit of a low-rank part
to what is really missing afterwards, W - Q(W - BA), weighted by the data's covariance, recovers most of the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from corda import linalg
from corda.errors import ModelError
from corda.metric import Metric
from corda.models import Quantisation

Factors = tuple[Tensor, Tensor]
Correction = Literal["none", "fit", "frozen"]


@dataclass(frozen=True)
class QuantisationError:
    """What 4 bits cost one layer; Frobenius norms, X being the calibration inputs with X Xᵀ / T = C.

    Attributes:
        weight_norm: ‖W‖.
        output_norm: ‖W X‖ / √T.
        weight_plain: ‖Q(W) - W‖.
        output_plain: ‖(Q(W) - W) X‖ / √T.
        weight_start: ‖start - W‖, the start being everything the layer computes with before training.
        output_start: ‖(start - W) X‖ / √T.
    """

    weight_norm: float
    output_norm: float
    weight_plain: float
    output_plain: float
    weight_start: float
    output_start: float


@dataclass(frozen=True)
class Start:
    """What a layer of a 4-bit model begins with: Q(W - removed) + s B A + correction.

    Attributes:
        trained: (A (r, d_in), B (d_out, r)), the adapter's start, to be scaled by s.
        removed: In the residual form, (A, B) whose product B A is taken out of W before it is quantised; None where
            that is s B A of the adapter's start.
        correction: (A, B) of a frozen part beside the adapter, unscaled; None without one.
        error: Against the weight in full precision.
    """

    trained: Factors
    removed: Factors | None
    correction: Factors | None
    error: QuantisationError


def round_trip(W: Tensor, kind: Quantisation, dtype: torch.dtype) -> Tensor:
    """Q(W) as the numbers that the 4-bit layer computes with.

    Args:
        W: (d_out, d_in), any floating dtype.
        kind: The 4-bit format.
        dtype: Of the model; weights have it before they are quantised and after.

    Returns:
        (d_out, d_in) in the dtype of W.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    functional = _bitsandbytes().functional
    codes, state = functional.quantize_4bit(
        W.to(dtype).contiguous(), blocksize=64, compress_statistics=kind.double_quant, quant_type=kind.quant_type
    )
    back: Tensor = functional.dequantize_4bit(codes, state)
    return back.to(W.dtype)


def start(
    W: Tensor,
    metric: Metric,
    adapter: Factors,
    *,
    scaling: float,
    quantise: Callable[[Tensor], Tensor],
    residual: bool,
    correction: Correction,
    rank: int,
    rounds: int = 1,
    balance: Literal["equal", "sigma"] = "equal",
) -> Start:
    """Build a 4-bit layer around an adapter (method of CorDA++, section on quantisation; refits are ours, as QERA's).

    Args:
        W: (d_out, d_in) fp32.
        metric: The covariance with its damping; refits use (C + λI)^½, errors the undamped C.
        adapter: (A, B) of the mode.
        scaling: s.
        quantise: W -> Q(W), same shape and dtype.
        residual: Quantise W - s B A, else W.
        correction: "none"; "fit": the adapter itself becomes the best approximation of what is missing, of its own
            rank; "frozen": an extra part of `rank` does, and the adapter keeps its directions.
        rank: Of the frozen part; ignored otherwise.
        rounds: Of quantising and refitting.
        balance: Split of refitted factors.

    Returns:
        Factors in fp32 on the device of W.

    Raises:
        ValueError: "fit" or several rounds where Q(W) stays as it is.
    """
    if not residual and (correction == "fit" or rounds > 1):
        raise ValueError("a base that stays as it is can only have a frozen correction, of one round")
    assert metric.C is not None
    half = Metric(metric.C, 0.5, metric.lam)
    A, B = adapter
    plain = quantise(W)
    removed: Factors | None = (A, scaling * B) if residual else None
    frozen: Factors | None = None
    Q = quantise(W - removed[1] @ removed[0]) if removed else plain
    for turn in range(0 if correction == "none" else rounds):
        if turn and correction == "fit":
            removed = (A, scaling * B)
        elif turn and frozen is not None:
            removed = (torch.cat([A, frozen[0]]), torch.cat([scaling * B, frozen[1]], dim=1))
        if turn and removed is not None:
            Q = quantise(W - removed[1] @ removed[0])
        if correction == "fit":
            A, B = _fitted(W - Q, half, A.shape[0], scaling, balance)
        else:
            missing = W - Q - scaling * (B @ A) if residual else W - Q
            frozen = _fitted(missing, half, rank, 1.0, balance)
    begin = Q + scaling * (B @ A) if residual else Q.clone()
    if frozen is not None:
        begin = begin + frozen[1] @ frozen[0]
    other = removed if removed is not None and removed[0] is not A else None
    return Start((A, B), other, frozen, _error(W, plain, begin, metric.C))


def totals(errors: Iterable[QuantisationError]) -> dict[str, float]:
    """Relative errors over all layers together: root of summed squares over root of summed squares."""
    parts = list(errors)

    def root(name: str) -> float:
        return float(sum(getattr(part, name) ** 2 for part in parts) ** 0.5)

    weight, output = root("weight_norm") or 1.0, root("output_norm") or 1.0
    return {
        "weight_plain": root("weight_plain") / weight,
        "weight_start": root("weight_start") / weight,
        "output_plain": root("output_plain") / output,
        "output_start": root("output_start") / output,
        "output_ratio": root("output_start") / (root("output_plain") or 1.0),
    }


def is_4bit(module: nn.Module) -> bool:
    """Whether a layer's weight is held in bitsandbytes' 4-bit form."""
    return type(getattr(module, "weight", None)).__name__ == "Params4bit"


def requantise(module: Any, W: Tensor) -> None:
    """Put Q(W) into a 4-bit layer, in the layer's own format; W is (d_out, d_in).

    Args:
        module: A 4-bit layer; changed in place.
        W: (d_out, d_in), what to quantise.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    old = module.weight
    value = W.to(old.quant_state.dtype).contiguous()
    module.weight = (
        _bitsandbytes()
        .nn.Params4bit(
            value,
            requires_grad=False,
            blocksize=old.quant_state.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            module=module,
        )
        .to(old.device)
    )


def refuse_unpacked(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse layers that stay in full precision where a model is loaded in 4 bits: those of a class of their own.

    Args:
        model: With or without weights.
        names: Full dotted names of the layers that are to be in 4 bits.

    Raises:
        ModelError: names such a layer and its class.
    """
    for name in names:
        kind = type(model.get_submodule(name))
        if issubclass(kind, nn.Linear | Conv1D) and kind not in {nn.Linear, Conv1D}:
            raise ModelError(
                "transformers packs no layers of this class into 4 bits",
                where=f"model.load_in_4bit, {name}",
                got=kind.__name__,
                expected="nn.Linear or Conv1D",
                fix="set model.load_in_4bit: false",
            )


def full_weight(module: Any) -> Tensor:
    """A 4-bit layer's weight as numbers, (d_out, d_in) fp32.

    Raises:
        ModelError: bitsandbytes has repacked it for inference on a CPU, with rounded scales.
    """
    if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
        raise ModelError(
            "bitsandbytes has repacked the 4-bit weights for inference, with rounded scales",
            fix="attach before the first forward pass, load with corda.models.load, or give attach `weights`",
        )
    weight: Tensor = _bitsandbytes().functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    return weight.to(torch.float32)


def unpacked(packed: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """A weight that a checkpoint holds in 4 bits, as numbers (d_out, d_in).

    Args:
        packed: The codes.
        parts: The tensors stored beside them, by their full names.
    """
    state = _bitsandbytes().functional.QuantState.from_dict(dict(parts), device=packed.device)
    weight: Tensor = _bitsandbytes().functional.dequantize_4bit(packed, state)
    return weight


def require() -> None:
    """Refuse 4-bit work without bitsandbytes.

    Raises:
        ModelError: it is not installed.
    """
    _bitsandbytes()


def _fitted(missing: Tensor, half: Metric, rank: int, scaling: float, balance: Literal["equal", "sigma"]) -> Factors:
    """s B A = the best approximation of `missing` (d_out, d_in) of that rank, errors weighted by the inputs."""
    found = linalg.subspace(missing, half, min(rank, *missing.shape), "largest")
    A, B, _ = linalg.factors(missing, found, scaling=scaling, balance=balance)
    return A, B


def _error(W: Tensor, plain: Tensor, begin: Tensor, C: Tensor) -> QuantisationError:
    def weight(E: Tensor) -> float:
        return float(E.double().norm())

    def output(E: Tensor) -> float:
        return math.sqrt(max(0.0, float(((E @ C.to(E.dtype)) * E).double().sum())))

    return QuantisationError(
        weight(W), output(W), weight(plain - W), output(plain - W), weight(begin - W), output(begin - W)
    )


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError:
        raise ModelError(
            "4-bit weights need the bitsandbytes package",
            where="model.load_in_4bit",
            fix="pip install 'corda-adapt[quantization]'",
        ) from None
    return bitsandbytes
