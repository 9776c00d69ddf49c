"""Adapters on parameters instead of modules, as PEFT's target_parameters makes them: stacked experts above all.

PEFT holds lora_A of a stacked parameter of E experts as (E r, d_in), experts outermost, and lora_B as (d_out, r E),
experts innermost; all experts of a parameter have the same r. Where a plan gives an expert less, or nothing, the rest
are zeros in A and in B, which get no gradient and so stay zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn

from corda.forms import INITIAL, TRAINED
from corda.recipe import Base
from corda.sharding import subtract
from corda.targets import spec_of

_INSIDE = ".base_layer"


class ParameterDifference(ParamWrapper):  # type: ignore[misc]
    """PEFT's wrapper of a parameter in the intact form: it computes with W + s (B A - B0 A0).

    B A - B0 A0 = (B - B0) A + B0 (A - A0), which at step 0 is a product with zeros: W stays the same bits in any dtype.
    The differences are taken of the factors as they are held and only then rounded to the parameter's dtype: rounded
    first, what training adds to B0 and A0 is lost in 16 bits.
    """

    def get_delta_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, float]:
        """Factors of the change, (..., m, 2r) and (..., 2r, n) for parameters (..., m, n), in their dtype, and s."""
        if adapter_name != TRAINED:
            lhs, rhs, scaling = super().get_delta_factors(adapter_name)
            return lhs, rhs, scaling
        dtype = self.get_param().dtype
        lhs, rhs = self._change()
        return lhs.to(dtype), rhs.to(dtype), self.scaling[TRAINED]

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """s (B A - B0 A0), shape and dtype of the parameter, rounded once."""
        if adapter_name != TRAINED:
            delta: Tensor = super().get_delta_weight(adapter_name, *args, **kwargs)
            return delta
        stored = self.get_param()
        lhs, rhs = self._change()
        change: Tensor = self.scaling[TRAINED] * (lhs @ rhs)
        return change.reshape(stored.shape).to(stored.dtype)

    def _change(self) -> tuple[Tensor, Tensor]:
        (lhs, rhs), (lhs0, rhs0) = _by_expert(self, TRAINED), _by_expert(self, INITIAL)
        return torch.cat([lhs - lhs0, lhs0], dim=-1), torch.cat([rhs, rhs - rhs0], dim=-2)


def _by_expert(wrapper: ParamWrapper, adapter: str) -> tuple[Tensor, Tensor]:
    """Factors (E, m, r) and (E, r, n) of an adapter, fp32, in the layout in which the parameter is stored."""
    E = wrapper.num_experts
    A = wrapper.lora_A[adapter].weight.float()
    B = wrapper.lora_B[adapter].weight.float()
    A, B = A.reshape(E, -1, A.shape[1]), B.reshape(B.shape[0], -1, E).permute(2, 0, 1)
    output_first = wrapper._did_swap_in_out_features or wrapper.get_param().dim() == 2
    return (B, A) if output_first else (A.mT, B.mT)


def wrappers(model: PeftModel) -> dict[str, ParamWrapper]:
    """Full parameter name in the base -> the wrapper that adapts it."""
    return {
        f"{name.replace(_INSIDE, '')}.{module.parameter_name}": module
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, ParamWrapper)
    }


def wrapper_of(model: PeftModel, parameter: str) -> ParamWrapper | None:
    """What adapts the parameter of this full name in the base; None if nothing does."""
    owner, _, own = parameter.rpartition(".")
    module = model.base_model.model.get_submodule(owner)
    while isinstance(module, ParamWrapper):
        if module.parameter_name == own:
            return module
        module = module.base_layer
    return None


def pattern_of(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Layer name -> the parameter by which PEFT has to target it; layers that are targeted as modules are left out.

    Those are experts of stacked parameters, and linear layers whose names PEFT takes for the former names of experts
    in models where such experts were stacked later, e.g. the shared experts' gate_proj.
    """
    taken = _taken_for_experts(model, {name.rpartition(".")[2] for name in names})
    found = {}
    for name in names:
        spec = spec_of(model, name)
        if spec.stored[1] is not None or name.rpartition(".")[2] in taken:
            found[name] = spec.stored[0]
    return found


def _taken_for_experts(model: nn.Module, endings: Iterable[str]) -> set[str]:
    taken = set()
    for ending in endings:
        config = LoraConfig(target_modules=[ending])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # it wants the other half of a fused projection as well
            taken.add(ending)
        if config.target_parameters:
            taken.add(ending)
    return taken


def stacked(factors: Mapping[int, tuple[Tensor, Tensor]], experts: int, rank: int) -> tuple[Tensor, Tensor]:
    """PEFT's lora_A (E r, d_in) and lora_B (d_out, r E) of A (k, d_in) and B (d_out, k) of some experts, k <= r.

    Args:
        factors: Expert -> A (k, d_in) and B (d_out, k).
        experts: E, how many there are.
        rank: r.
    """
    some_A, some_B = next(iter(factors.values()))
    A = some_A.new_zeros(experts, rank, some_A.shape[1])
    B = some_B.new_zeros(some_B.shape[0], rank, experts)
    for expert, (one_A, one_B) in factors.items():
        A[expert, : one_A.shape[0]] = one_A
        B[:, : one_B.shape[1], expert] = one_B
    return A.flatten(0, 1), B.flatten(1, 2)


def unstacked(A: Tensor, B: Tensor, experts: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Expert -> A (r, d_in) and B (d_out, r), of those that have any.

    Args:
        A: (E r, d_in).
        B: (d_out, r E).
        experts: E, how many there are.
    """
    As, Bs = A.reshape(experts, -1, A.shape[1]), B.reshape(B.shape[0], -1, experts)
    return {e: (As[e], Bs[..., e]) for e in range(experts) if bool(As[e].any()) or bool(Bs[..., e].any())}


def joined(now: Tensor, start: Tensor, experts: int) -> Tensor:
    """lora_A of rank 2r, [A; A0] of each expert; both (E r, d_in).

    Args:
        now: (E r, d_in).
        start: (E r, d_in).
        experts: E, how many there are.
    """
    return (
        torch.cat([each.reshape(experts, -1, each.shape[1]) for each in (now, start)], dim=1).flatten(0, 1).contiguous()
    )


def halves(A: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Inverse of `joined`.

    Args:
        A: (2 E r, d_in).
        experts: E, how many there are.
    """
    now, start = A.reshape(experts, -1, A.shape[1]).chunk(2, dim=1)
    return now.flatten(0, 1), start.flatten(0, 1)


def by_parameter(
    factors: Mapping[str, tuple[Tensor, Tensor]], names: Mapping[str, str]
) -> dict[str, dict[int, tuple[Tensor, Tensor]]]:
    """Parameter -> expert (0 for a parameter that is one matrix) -> factors.

    Args:
        factors: Layer name -> A (r, d_in) and B (d_out, r).
        names: Layer name -> name of its parameter.
    """
    found: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for name, parameter in names.items():
        expert = 0 if parameter == f"{name}.weight" else int(name.rpartition(".")[2])
        found.setdefault(parameter, {})[expert] = factors[name]
    return found


def fill(wrapper: ParamWrapper, adapter: str, factors: Mapping[int, tuple[Tensor, Tensor]]) -> None:
    """Set an adapter's factors.

    Args:
        wrapper: PEFT's, around the parameter.
        adapter: Its name.
        factors: Expert -> A (r, d_in) and B (d_out, r).
    """
    A, B = stacked(factors, wrapper.num_experts, wrapper.r[adapter])
    with torch.no_grad():
        wrapper.lora_A[adapter].weight.copy_(A)
        wrapper.lora_B[adapter].weight.copy_(B)


def update_of(wrapper: ParamWrapper, adapter: str) -> dict[int, tuple[Tensor, Tensor]]:
    """Expert -> A (r, d_in) and s B (d_out, r) of an adapter, fp32, on the CPU.

    Args:
        wrapper: PEFT's, around the parameter.
        adapter: Its name.
    """
    A = wrapper.lora_A[adapter].weight.detach().float().cpu()
    B = wrapper.lora_B[adapter].weight.detach().float().cpu() * wrapper.scaling[adapter]
    return unstacked(A, B, wrapper.num_experts)


def layer_name(parameter: str, wrapper: ParamWrapper, expert: int) -> str:
    """The layer that an expert of a wrapper is in a plan.

    Args:
        parameter: Its full dotted name.
        wrapper: PEFT's, around it.
        expert: Its number.
    """
    return parameter.removesuffix(".weight") if wrapper.get_param().dim() == 2 else f"{parameter}.{expert}"


def saved_prefix(model: nn.Module, parameters: Sequence[str]) -> dict[str, str]:
    """Parameter -> the module under which PEFT saves its factors: wrappers of one module's parameters are nested.

    The first of a module's targeted parameters is innermost.
    """
    prefixes = {}
    for parameter in parameters:
        module, _, own = parameter.rpartition(".")
        order = [name for name, _ in model.get_submodule(module).named_parameters(recurse=False)]
        outside = [name for name in order[order.index(own) + 1 :] if f"{module}.{name}" in parameters]
        prefixes[parameter] = module + _INSIDE * len(outside)
    return prefixes


def delta(wrapper: ParamWrapper, adapter: str, expert: int | None) -> Tensor:
    """What an adapter adds to one matrix of the parameter, in the shape that it is stored in.

    Args:
        wrapper: PEFT's, around the parameter.
        adapter: Its name.
        expert: Its number, or None for a parameter that is one matrix.
    """
    if expert is None or wrapper.num_experts == 1:
        added: Tensor = wrapper.get_delta_weight(adapter)
        return added if expert is None else added[expert]
    lhs, rhs, scaling = wrapper.get_delta_factors(adapter)
    change: Tensor = scaling * (lhs[expert] @ rhs[expert])
    return change


class Factor(NamedTuple):
    """One expert's part of lora_A or lora_B, sharing its memory and its gradient."""

    weight: Tensor


class ExpertView:
    """One expert of a wrapper, read and written like a LoRA layer of its own: lora_A, lora_B and scaling."""

    def __init__(self, wrapper: ParamWrapper, expert: int) -> None:
        self._wrapper, self._expert = wrapper, expert
        self.scaling: Mapping[str, float] = wrapper.scaling

    @property
    def lora_A(self) -> dict[str, Factor]:
        """Adapter -> A (r, d_in)."""
        E = self._wrapper.num_experts
        return {k: Factor(m.weight.unflatten(0, (E, -1))[self._expert]) for k, m in self._wrapper.lora_A.items()}

    @property
    def lora_B(self) -> dict[str, Factor]:
        """Adapter -> B (d_out, r)."""
        E = self._wrapper.num_experts
        return {k: Factor(m.weight.unflatten(1, (-1, E))[..., self._expert]) for k, m in self._wrapper.lora_B.items()}


def expert_views(model: PeftModel) -> dict[str, ExpertView]:
    """Layer name -> view, of every expert of every stacked parameter that is adapted."""
    return {
        f"{parameter}.{expert}": ExpertView(wrapper, expert)
        for parameter, wrapper in wrappers(model).items()
        if wrapper.get_param().dim() == 3
        for expert in range(wrapper.num_experts)
    }


def experts_of_keys(model: PeftModel) -> dict[str, int]:
    """Where PEFT saves the factors of a parameter -> its number of experts."""
    return {name: module.num_experts for name, module in model.named_modules() if isinstance(module, ParamWrapper)}


@torch.no_grad()
def start(model: PeftModel, factors: Mapping[str, tuple[Tensor, Tensor]], names: Mapping[str, str], form: Base) -> None:
    """Set the start and the form of the layers that are adapted as parameters.

    Args:
        model: With the trained adapter and, in a mode with a start, the initial one.
        factors: Layer name -> A, B.
        names: From `pattern_of`.
        form: How the base is held.
    """
    known = wrappers(model)
    for parameter, of_experts in by_parameter(factors, names).items():
        wrapper = known[parameter]
        fill(wrapper, TRAINED, of_experts)
        if INITIAL not in wrapper.lora_A:
            continue
        fill(wrapper, INITIAL, of_experts)
        if form == "intact":
            wrapper.__class__ = ParameterDifference
        else:
            stored = wrapper.get_param()
            lhs, rhs = _by_expert(wrapper, INITIAL)
            subtract(stored.data, (wrapper.scaling[INITIAL] * (lhs @ rhs)).reshape(stored.shape))


def drop_unplanned(model: PeftModel, ranks: Mapping[str, int]) -> None:
    """Set to zero what plain LoRA drew at random for experts, or components, that the plan does not have.

    Args:
        model: Changed in place.
        ranks: Layer name -> rank.
    """
    for parameter, wrapper in wrappers(model).items():
        with torch.no_grad():
            A = wrapper.lora_A[TRAINED].weight.unflatten(0, (wrapper.num_experts, -1))
            for expert in range(wrapper.num_experts):
                A[expert, ranks.get(layer_name(parameter, wrapper, expert), 0) :] = 0
