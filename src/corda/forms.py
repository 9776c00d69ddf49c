"""What an adapted layer computes, as variants of PEFT's LoRA layer: the intact form, and a 4-bit layer's correction."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from corda.errors import AdapterError

# Names of the adapters that a layer carries.
TRAINED = "default"
INITIAL = "initial"
CORRECTION = "correction"


def refuse_adapted(model: nn.Module) -> None:
    """Refuse a model whose layers PEFT has replaced already, whether or not it is wrapped in a PeftModel.

    Raises:
        AdapterError: names the first such layer, or the wrapper.
    """
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | PeftModel):
            raise AdapterError(
                "the model carries an adapter already",
                where=name or None,
                got=type(module).__name__,
                expected="the base model, as it was loaded",
                fix="load it anew, or go on with what `unload()` of the PeftModel returns",
            )


class Difference(LoraVariant):  # type: ignore[misc]
    """PEFT forward of the intact form: the two products are subtracted before they meet W x.

    At step 0 both are the same bits, so their difference is exactly zero in any dtype; and dropout draws one mask for
    both.
    """

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Nothing to set up: the initial factors are an adapter of their own.

        Args:
            module: The adapted layer.
            adapter_name: Its adapter's name.
        """

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The layer's output, same shape as `result`; x is (..., d_in).

        Args:
            module: The adapted layer.
            active_adapter: Its adapter's name.
            x: (..., d_in).
            result: (..., d_out), the base layer's output.
        """
        fixed = _corrected(module, x, result)
        x = module.lora_dropout[active_adapter](x)
        now = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
        start = module.lora_B[INITIAL](module.lora_A[INITIAL](x))
        out: Tensor = fixed + (now - start) * module.scaling[active_adapter]
        return out

    @classmethod
    def merge_safe(cls, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """orig_weight with everything that `forward` adds, in the layer's own layout, rounded once to its dtype.

        Args:
            module: The adapted layer.
            active_adapter: Its adapter's name.
            orig_weight: (d_out, d_in), or (d_in, d_out) for Conv1D.
        """
        return (orig_weight + cls.delta(module, active_adapter)).to(orig_weight.dtype)

    @classmethod
    def merge_unsafe(cls, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """The same in place.

        Args:
            module: The adapted layer.
            active_adapter: Its adapter's name.
            orig_weight: (d_out, d_in), or (d_in, d_out) for Conv1D.
        """
        orig_weight.data.copy_(cls.merge_safe(module, active_adapter, orig_weight.data))

    @classmethod
    def unmerge(cls, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Take it out again.

        Args:
            module: The adapted layer.
            active_adapter: Its adapter's name.
            orig_weight: (d_out, d_in), or (d_in, d_out) for Conv1D.
        """
        return (orig_weight - cls.delta(module, active_adapter)).to(orig_weight.dtype)

    @staticmethod
    def delta(module: LoraLayer, active_adapter: str) -> Tensor:
        """s (B A - B0 A0) and the correction, shape of the layer's weight.

        Args:
            module: The adapted layer.
            active_adapter: Its adapter's name.
        """
        change: Tensor = module.get_delta_weight(active_adapter) - module.get_delta_weight(INITIAL)
        return change + module.get_delta_weight(CORRECTION) if CORRECTION in module.lora_A else change


class Corrected(Difference):
    """PEFT forward of the residual form of a 4-bit layer with a frozen correction: Q(W') x + s B A x + F x."""

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The layer's output, same shape as `result`; x is (..., d_in).

        Args:
            module: The adapted layer.
            active_adapter: Its adapter's name.
            x: (..., d_in).
            result: (..., d_out), the base layer's output.
        """
        now = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
        out: Tensor = _corrected(module, x, result) + now * module.scaling[active_adapter]
        return out

    @staticmethod
    def delta(module: LoraLayer, active_adapter: str) -> Tensor:
        """s B A and the correction, shape of the layer's weight.

        Args:
            module: The adapted layer.
            active_adapter: Its adapter's name.
        """
        total: Tensor = module.get_delta_weight(active_adapter) + module.get_delta_weight(CORRECTION)
        return total


class Beside(Difference):
    """PEFT forward of an adapter that starts at zero beside a frozen correction: Q(W) x + s B A x + F x."""

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The layer's output, same shape as `result`; x is (..., d_in).

        Args:
            module: The adapted layer.
            active_adapter: Its adapter's name.
            x: (..., d_in).
            result: (..., d_out), the base layer's output.
        """
        fixed = _corrected(module, x, result)
        now = module.lora_B[active_adapter](module.lora_A[active_adapter](module.lora_dropout[active_adapter](x)))
        out: Tensor = fixed + now * module.scaling[active_adapter]
        return out

    @staticmethod
    def delta(module: LoraLayer, active_adapter: str) -> Tensor:
        """s B A and the correction, shape of the layer's weight.

        Args:
            module: The adapted layer.
            active_adapter: Its adapter's name.
        """
        return Corrected.delta(module, active_adapter)


def _corrected(module: LoraLayer, x: Tensor, result: Tensor) -> Tensor:
    if CORRECTION not in module.lora_A:
        return result
    out: Tensor = result + module.lora_B[CORRECTION](module.lora_A[CORRECTION](x))
    return out
