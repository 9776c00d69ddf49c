"""How much of an update is in a reloaded model's weights: sharper than logits where 16 bits blur those."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from corda import parameters
from corda.errors import CheckError
from corda.exporting.update import Factors
from corda.exporting.write import layer_of
from corda.forms import INITIAL, Difference
from corda.sharding import stored_weight
from corda.targets import LayerSpec, spec_of, weight_of

# What a form that is exact but for its own arithmetic may be off by, and what rounded weights may lose at most.
_EXACT, _MOST = 0.01, 0.5
_WORTH_A_WARNING = 0.05
_TOO_SMALL = 1e-6  # ‖ΔW‖ / ‖W‖


def confirm_kept(kept: float | None, expected: float, dtype: torch.dtype, form: str, where: Path) -> None:
    """Refuse an export whose weights do not hold the update, whatever the logits say.

    Args:
        kept: See `update_kept`.
        expected: 1, or what a compressed update keeps.
        dtype: Of the weights.
        form: The export's format; full weights in 16 bits may lose some of it by rounding.
        where: The export's folder.

    Raises:
        CheckError: too little or too much of it is there.
    """
    rounded = form != "lora" and torch.finfo(dtype).bits == 16
    allowed = _MOST if rounded else _EXACT
    if kept is None or abs(kept - expected) <= allowed:
        return
    raise CheckError(
        "the reloaded weights do not hold the trained update",
        where=str(where),
        got=f"{100 * kept:.3g} % of it",
        expected=f"{100 * expected:.3g} % within {100 * allowed:.0f} %",
        fix=f"the update is finer than {str(dtype).removeprefix('torch.')} can add to the weights: "
        "export format lora, or set model.dtype to float32"
        if rounded
        else None,
    )


def kept_warning(exported: Mapping[str, Any]) -> list[str]:
    """What a person should know of an export as JSON; that it rounds away much of the update, for one."""
    notes = list(exported.get("notes", ()))
    kept = exported.get("update_kept")
    if kept is None or exported["compression"] or abs(kept - 1) <= _WORTH_A_WARNING:
        return notes
    return [
        *notes,
        f"the {exported['format']} export holds {100 * kept:.3g} % of the update: {exported['dtype']} rounds the rest",
    ]


@torch.no_grad()
def update_kept(reloaded: nn.Module, live: nn.Module | None, added: Mapping[str, Factors]) -> float | None:
    """1 + Σ ⟨E_reloaded - E_live, ΔW⟩ / Σ ‖ΔW‖²_F over the adapted layers, E being what a layer multiplies x with.

    For an adapter on the original base W, Σ ⟨E_reloaded - W, ΔW⟩ / Σ ‖ΔW‖²_F.

    1 where the reloaded weights hold the whole update, 0 where they hold none of it. Rounding is no even noise here:
    a 16-bit W lies on the grid that W + ΔW is rounded to, so entries of ΔW below half its spacing vanish.

    Args:
        reloaded: The export, as a PeftModel or a model without adapter.
        live: The trained model; None if the export is an adapter on the original base.
        added: Its update ΔW by layer.

    Returns:
        The share, or None for an update that fp32 cannot tell from none, or weights that are not floating point.
    """
    apart = energy = weights = 0.0
    for name, (A, B) in added.items():
        one = effective_weight(reloaded, name)
        other = effective_weight(reloaded if live is None else live, name, adapted=live is not None)
        if one is None or other is None:
            return None
        D = one - other.to(one.device)
        A64, B64 = A.double(), B.double()
        apart += float(((B.to(D.device).T @ D).cpu().double() * A64).sum())
        energy += float(((B64.T @ B64) * (A64 @ A64.T)).sum())
        weights += float(one.square().sum())
    return (live is not None) + apart / energy if energy > _TOO_SMALL**2 * weights else None


def effective_weight(model: nn.Module, name: str, *, adapted: bool = True) -> Tensor | None:
    """What a layer multiplies its input with, (d_out, d_in) fp32; None for a quantised layer.

    Args:
        model: With or without an adapter.
        name: The layer's full dotted name in the base.
        adapted: With what adapters add, or without.
    """
    root = model.base_model.model if isinstance(model, PeftModel) else model
    if isinstance(model, PeftModel):
        spec = spec_of(root, name)
        wrapper = parameters.wrapper_of(model, spec.stored[0])
        if wrapper is not None:
            return _of_parameter(wrapper, spec, adapted)
    elif (spec := spec_of(root, name)).stored[1] is not None:
        return weight_of(root, spec)
    module: Any = layer_of(root, name)
    inner = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if not inner.weight.is_floating_point():
        return None
    W = stored_weight(inner).float()
    if isinstance(module, LoraLayer) and adapted:
        for adapter in module.active_adapters:
            if adapter in module.lora_A:
                change = module.get_delta_weight(adapter)
                W = W.to(change.device) + change
            if type(module.lora_variant.get(adapter)) is Difference:
                W = W - module.get_delta_weight(INITIAL)
    return W.T if isinstance(inner, Conv1D) else W


def _of_parameter(wrapper: ParamWrapper, spec: LayerSpec, adapted: bool) -> Tensor:
    """`effective_weight` of a layer that is adapted as a parameter."""
    expert = spec.stored[1]
    stored = wrapper.get_param().detach()
    W: Tensor = (stored if expert is None else stored[expert]).float()
    for adapter in wrapper.active_adapters if adapted else ():
        if adapter in wrapper.lora_A:
            W = W + parameters.delta(wrapper, adapter, expert)
    return W.T if spec.kind in {"conv1d", "expert_t"} else W
