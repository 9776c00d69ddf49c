"""What training added to a model, read out as factors with all scaling folded in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor

from corda import compress, parameters
from corda.errors import RecipeError
from corda.forms import CORRECTION, INITIAL, TRAINED, Corrected, Difference
from corda.heads import trained_heads
from corda.options import ExportOptions
from corda.quantization import is_4bit


class Factors(NamedTuple):
    """A low-rank term B A of one layer, fp32, on the CPU, the LoRA scaling folded into B.

    Attributes:
        A: (k, d_in).
        B: (d_out, k).
    """

    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class Update:
    """What an export writes, by full dotted layer name.

    Attributes:
        added: ΔW = s (B A - B0 A0), rank 2r; or s B A for plain LoRA; and the correction of an intact 4-bit base.
        trained: s B A, rank r.
        start: s B0 A0, rank r; empty for plain LoRA.
        frozen: The correction that a requantised 4-bit layer carries beside its adapter.
        base: Hub id or path of the original base.
        revision: Its Hub revision.
        task_type: PEFT's, e.g. "CAUSAL_LM".
        heads: Full parameter name -> trained values, of a classifier's head.
    """

    added: Mapping[str, Factors]
    trained: Mapping[str, Factors] = field(default_factory=dict)
    start: Mapping[str, Factors] = field(default_factory=dict)
    frozen: Mapping[str, Factors] = field(default_factory=dict)
    base: str | None = None
    revision: str | None = None
    task_type: str | None = None
    heads: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def on_residual(self) -> dict[str, Factors]:
        """What a layer adds to its residual weight: s B A, and where there is one the correction, stacked."""
        return {n: stack(pair, self.frozen[n]) if n in self.frozen else pair for n, pair in self.trained.items()}

    @property
    def learned(self) -> dict[str, Factors]:
        """s (B A - B0 A0), or plain LoRA's s B A, without a correction: for weights that have no error of 4 bits."""
        return {n: subtract(pair, self.start[n]) if n in self.start else pair for n, pair in self.trained.items()}


@dataclass(frozen=True)
class Compression:
    """What an approximation of lower rank loses.

    Attributes:
        rank: The rank asked for.
        lost_energy: Σ ‖lost‖²_F / Σ ‖ΔW‖²_F over all layers.
        worst_layer: The layer that loses the largest share of its own energy.
        worst_lost_energy: That share.
        lost_energy_of_layers: Layer name -> its share.
        max_relative_logit_difference: max |compressed - exact| / max |exact| over the logits of all records below;
            None before it is measured.
        records: Records that it was measured on.
        tokens: Tokens in them.
    """

    rank: int
    lost_energy: float
    worst_layer: str
    worst_lost_energy: float
    lost_energy_of_layers: Mapping[str, float]
    max_relative_logit_difference: float | None = None
    records: int = 0
    tokens: int = 0

    def measured(self, difference: float, records: int, tokens: int) -> Compression:
        """The same with what it does to the logits.

        Args:
            difference: Largest relative difference of a logit.
            records: Records that it was measured on.
            tokens: Tokens in them.
        """
        return replace(self, max_relative_logit_difference=difference, records=records, tokens=tokens)


def read_update(model: PeftModel) -> Update:
    """The trained update of a model from `attach`, whichever form its base has."""
    trained, start, added, frozen = {}, {}, {}, {}
    for name, module in model.base_model.model.named_modules():
        if not isinstance(module, LoraLayer) or isinstance(module, ParamWrapper) or TRAINED not in module.lora_A:
            continue
        now = _folded(module, TRAINED)
        trained[name] = added[name] = now
        if INITIAL in module.lora_A:
            start[name] = _folded(module, INITIAL)
            added[name] = subtract(now, start[name])
        if CORRECTION in module.lora_A:
            correction = _folded(module, CORRECTION)
            if isinstance(module.lora_variant[TRAINED], Corrected):
                frozen[name] = correction  # of Q(W'), which an export on W leaves behind
            else:
                added[name] = stack(added[name], correction)  # of Q(W), which stays the base
    for parameter, wrapper in parameters.wrappers(model).items():
        first = parameters.update_of(wrapper, INITIAL) if INITIAL in wrapper.lora_A else {}
        for expert, pair in parameters.update_of(wrapper, TRAINED).items():
            name = parameters.layer_name(parameter, wrapper, expert)
            trained[name] = added[name] = Factors(*pair)
            if expert in first:
                start[name] = Factors(*first[expert])
                added[name] = subtract(trained[name], start[name])
    config, whole = model.peft_config[TRAINED], trained_heads(model)
    place = (config.base_model_name_or_path, config.revision, config.task_type)
    return Update(added, trained, start, frozen, *place, whole)


def has_4bit_base(model: PeftModel) -> bool:
    """Whether some adapted layer's weight is held in 4 bits."""
    return any(isinstance(m, LoraLayer) and is_4bit(m.get_base_layer()) for m in model.modules())


def is_requantised(model: PeftModel) -> bool:
    """Whether the model is a 4-bit one in the residual form."""
    return any(
        isinstance(module, LoraLayer)
        and INITIAL in module.lora_A
        and is_4bit(module.get_base_layer())
        and type(module.lora_variant.get(TRAINED)) is not Difference
        for module in model.modules()
    )


def stack(one: Factors, other: Factors) -> Factors:
    """Factors of the sum of two terms.

    Args:
        one: Factors of a term.
        other: Of the same layer.
    """
    return Factors(torch.cat([one.A, other.A]), torch.cat([one.B, other.B], dim=1))


def subtract(now: Factors, start: Factors) -> Factors:
    """Factors of the difference of two terms of the same shapes, rank 2r; see `compress.difference`.

    Args:
        now: s B A.
        start: s B0 A0.
    """
    return Factors(*compress.difference(now.A, now.B, start.A, start.B))


def approximate(added: Mapping[str, Factors], rank: int) -> tuple[dict[str, Factors], Compression]:
    """Every layer's best approximation of rank min(k, its own), with what is lost.

    Args:
        added: Layer name -> A (k, d_in) and B (d_out, k).
        rank: The largest rank left.
    """
    found = {name: compress.truncate(*factors, rank) for name, factors in added.items()}
    return {name: Factors(one.A, one.B) for name, one in found.items()}, account(found, rank)


def account(found: Mapping[str, compress.Truncated], rank: int) -> Compression:
    """The lost energy of approximations, per layer, the worst and in total.

    Args:
        found: Layer name -> its approximation.
        rank: The rank asked for.
    """
    shares = {name: compress.share(one.lost, one.energy) for name, one in found.items()}
    worst = max(shares, key=lambda name: shares[name])
    total = compress.share(sum(one.lost for one in found.values()), sum(one.energy for one in found.values()))
    return Compression(rank, total, worst, shares[worst], shares)


def refuse_rank(ranks: Mapping[str, int], options: ExportOptions, *, doubled: bool) -> None:
    """Refuse an adapter that is larger than the servers' cap.

    Args:
        ranks: Layer name -> rank of the adapter that would be written without `export.rank`.
        options: Of the export.
        doubled: They hold the start beside what was trained.

    Raises:
        RecipeError: names the largest rank and the way out.
    """
    if options.max_rank is None or options.format not in {"lora", "residual"} or not ranks:
        return
    name = max(ranks, key=lambda key: ranks[key])
    largest = ranks[name] if options.rank is None else min(ranks[name], options.rank)
    if largest <= options.max_rank:
        return
    lora = options.format == "lora"
    raise RecipeError(
        "the exported adapter has a larger rank than export.max_rank",
        where=f"export.max_rank, layer {name}",
        got=f"rank {largest}" + (", twice the trained rank: it holds the start too" if doubled else ""),
        expected=f"at most {options.max_rank}",
        fix=f"set export.rank to {options.max_rank}, an approximation whose loss is measured"
        if lora
        else "lower adapter.rank, or export format lora with export.rank",
    )


def _folded(module: Any, name: str) -> Factors:
    A, B = module.lora_A[name].weight, module.lora_B[name].weight
    return Factors(A.detach().float().cpu(), (B.detach().float() * module.scaling[name]).cpu())
