"""How far training has moved the outputs on the knowledge to keep: the drift meter, during training and after it.

drift of a layer = ‖s (B A - B0 A0) C^½‖_F / ‖W C^½‖_F, C being the undamped second moment of the knowledge at the
layer's input: the root mean square change of its output over that of the output itself, exact for the inputs of the
frozen base. With A frozen, A C Aᵀ is computed once, and a reading costs O(d_out r²) a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback

from corda.context.store import Context
from corda.forms import INITIAL, TRAINED
from corda.metric import full_precision
from corda.parameters import expert_views
from corda.recipe import TrainingOptions
from corda.sharding import whole
from corda.targets import LayerSpec

_IN_MEMORY = 2 << 30  # bytes of covariances that stay in memory between readings; more are read from the disk again
_READINGS = 20
_SHORTENINGS = 20
_LEAST = 1e-300  # of a norm, for layers that saw nothing but zeros
_EASE = 0.8  # the penalty sets in at this share of the limit
READINGS = ("rms", "held_out_rms", "total", "held_out")
_LOGGED = {"drift": "rms", "drift_held_out": "held_out_rms", "drift_total": "total"}


Summary = tuple[dict[str, float], float, float]  # drift of each layer, root mean square, total


@dataclass(frozen=True)
class Reading:
    """What the meter reads at one moment.

    Attributes:
        layers: Layer name -> drift on the inputs that were calibrated on.
        rms: Root mean square of the layers' drifts: the one that foretells forgetting, and that a limit is of.
        total: √(Σ ‖s (B A - B0 A0) C^½‖² / Σ ‖W C^½‖²) over the layers, nearly that of the few with huge outputs.
        held_out_rms: `rms` on knowledge that was not calibrated on; None where there is none.
        held_out: `total` on it.
        held_out_layers: `layers` on it.
    """

    layers: Mapping[str, float]
    rms: float
    total: float
    held_out_rms: float | None = None
    held_out: float | None = None
    held_out_layers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Yardstick:
    """The knowledge that drift is measured on.

    Attributes:
        context: Its covariances.
        norms: Layer name -> ‖W C^½‖_F².
    """

    context: Context
    norms: Mapping[str, float]


def yardstick(context: Context, weight: Callable[[LayerSpec], Tensor]) -> Yardstick:
    """What drift is measured against, before anything is attached.

    Args:
        context: Covariances of the knowledge, of all rounds.
        weight: Gives W (d_out, d_in) of a layer.
    """
    norms = {}
    with torch.no_grad(), full_precision():
        for members in context.members().values():
            C = context.covariance(members[0].name, None)
            for spec in members:
                W = weight(spec).float()
                norms[spec.name] = float(((W @ C.to(W.device)) * W).double().sum())
    return Yardstick(context, norms)


def drift_notes(reading: Reading, options: TrainingOptions, stopped: int | None) -> list[str]:
    """What a person should know of a finished training's drift: that the limit ended it, or was passed all the same.

    Args:
        reading: The last one.
        options: With the limit.
        stopped: The step that the limit ended training at, or None.
    """
    limit = options.max_drift
    if limit is None:
        return []
    if stopped is not None:
        return [f"training stopped at step {stopped}: drift {reading.rms:.3g} passed training.max_drift {limit:.3g}"]
    if reading.rms > limit:
        return [
            f"drift {reading.rms:.3g} is above training.max_drift {limit:.3g}: raise training.drift_weight, "
            f"or lower the learning rate"
        ]
    return []


def drift_of_weights(
    change: Callable[[LayerSpec], Tensor], knowledge: Yardstick, held_out: Yardstick | None = None
) -> Reading:
    """The reading for weights that were changed in any way: ‖ΔW C^½‖_F / ‖W C^½‖_F, whoever trained them.

    Args:
        change: Gives ΔW (d_out, d_in) of a layer.
        knowledge: What was calibrated on.
        held_out: What was not, or None.
    """
    with torch.no_grad(), full_precision():
        sides = [_summed(_energies(change, one), one.norms) for one in (knowledge, held_out) if one is not None]
    return _reading(sides)


class DriftMeter:
    """Reads the drift of a live adapter.

    Args:
        model: From `attach`.
        knowledge: What was calibrated on.
        held_out: What was not, or None.
    """

    def __init__(self, model: PeftModel, knowledge: Yardstick, held_out: Yardstick | None = None) -> None:
        self._sides = [_Side(model, one) for one in (knowledge, held_out) if one is not None]

    def read(self) -> Reading:
        """The drift now."""
        with torch.no_grad(), full_precision():
            return _reading([side.summary() for side in self._sides])

    def penalty(self, limit: float) -> Tensor:
        """max(0, drift / (0.8 limit) - 1)² on the calibrated knowledge, a scalar with a gradient."""
        drift = self._sides[0].rms()
        return (drift / (_EASE * limit) - 1).clamp_min(0).square()

    @torch.no_grad()
    def hold(self, limit: float) -> None:
        """Where the drift is above the limit, move the factors back towards their start until it is not.

        Where B starts at zero only B moves, and the drift with it in proportion; elsewhere A and B do.
        """
        for _ in range(_SHORTENINGS):
            drift = float(self._sides[0].rms())
            if drift <= limit:
                return
            for module in self._sides[0].layers.values():
                started = INITIAL in module.lora_A
                for factors in (module.lora_A, module.lora_B) if started else (module.lora_B,):
                    now = factors[TRAINED].weight
                    begin = factors[INITIAL].weight.to(now) if started else torch.zeros_like(now)
                    now.copy_(begin.lerp(now, (1 - 1e-4) * limit / drift))


class Watch(TrainerCallback):  # type: ignore[misc]
    """Reads the meter during training, logs it, and keeps or stops at the limit.

    Attributes:
        stopped: The step that training was stopped at, None where it was not.
    """

    def __init__(self, meter: DriftMeter, options: TrainingOptions, log: Callable[[dict[str, float]], None]) -> None:
        self.meter, self.log = meter, log
        self.limit, self.weight, self.every = options.max_drift, options.drift_weight, options.drift_steps
        self.stopped: int | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called between the gradients of the loss and the optimiser's step: adds those of the penalty."""
        if self.weight is not None and self.limit is not None:
            penalty = self.weight * self.meter.penalty(self.limit)
            if float(penalty.detach()) > 0:
                penalty.backward()  # type: ignore[no-untyped-call]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called after the optimiser's step: with a penalty, a step that passes the limit all the same is shortened."""
        if self.weight is not None and self.limit is not None:
            with full_precision():
                self.meter.hold(self.limit)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called after each optimiser step."""
        every = self.every or (1 if self.limit is not None else max(1, state.max_steps // _READINGS))
        if state.global_step % every and state.global_step < state.max_steps:
            return
        reading = self.meter.read()
        logged = {name: getattr(reading, attribute) for name, attribute in _LOGGED.items()}
        due = control.should_log
        self.log({name: value for name, value in logged.items() if value is not None})
        control.should_log = due  # logging takes it back, and the loss would not be logged
        if self.limit is not None and self.weight is None and reading.rms > self.limit:
            self.stopped = state.global_step
            control.should_training_stop = True


class _Side:
    """The adapter seen through one side's covariances."""

    def __init__(self, model: PeftModel, yard: Yardstick) -> None:
        self.context, self.norms = yard.context, yard.norms
        known = {name: module for name, module in model.base_model.model.named_modules() if name in yard.norms}
        self.layers: dict[str, Any] = {name: m for name, m in known.items() if TRAINED in getattr(m, "lora_A", {})}
        self.layers |= {name: view for name, view in expert_views(model).items() if name in yard.norms}
        size = sum(4 * members[0].d_in ** 2 for members in self.context.members().values())
        self._kept: dict[str, Tensor] | None = {} if size <= _IN_MEMORY else None
        self._inner: dict[str, Tensor] = {}  # A C Aᵀ of frozen A

    def energies(self) -> Iterator[tuple[str, Tensor]]:
        """Layer name, ‖s (B A - B0 A0) C^½‖²_F as an fp64 scalar."""
        for group, members in self.context.members().items():
            mine = [spec.name for spec in members if spec.name in self.layers]
            C: Tensor | None = None
            for name in mine:
                module = self.layers[name]
                P, Q = _change(module)
                inner = self._inner.get(name)
                if inner is None:
                    C = self._covariance(group, name, Q.device) if C is None else C
                    inner = (Q @ C @ Q.T).double()
                    if INITIAL not in module.lora_A and not module.lora_A[TRAINED].weight.requires_grad:
                        self._inner[name] = inner
                P = P.double()
                yield name, module.scaling[TRAINED] ** 2 * ((P.T @ P) * inner).sum().clamp_min(0)

    def summary(self) -> Summary:
        """Drift of each layer, their root mean square, and the total."""
        return _summed({name: float(value) for name, value in self.energies()}, self.norms)

    def rms(self) -> Tensor:
        """Root mean square of the layers' drifts, a scalar with a gradient."""
        squares = [energy / max(self.norms[name], _LEAST) for name, energy in self.energies()]
        return torch.stack([square.to(squares[0].device) for square in squares]).mean().clamp_min(1e-30).sqrt()

    def _covariance(self, group: str, name: str, device: torch.device) -> Tensor:
        if self._kept is None:
            return self.context.covariance(name, None).to(device)
        if group not in self._kept:
            self._kept[group] = self.context.covariance(name, None).to(device)
        return self._kept[group]


def _energies(change: Callable[[LayerSpec], Tensor], yard: Yardstick) -> dict[str, float]:
    """Layer name -> ‖ΔW C^½‖²_F."""
    found = {}
    for members in yard.context.members().values():
        C = yard.context.covariance(members[0].name, None)
        for spec in members:
            moved = change(spec).float()
            found[spec.name] = max(float(((moved @ C.to(moved.device)) * moved).double().sum()), 0.0)
    return found


def _summed(energies: Mapping[str, float], of: Mapping[str, float]) -> Summary:
    """Drift of each layer, their root mean square, and the total, from ‖ΔW C^½‖² and ‖W C^½‖²."""
    norms = {name: max(of[name], _LEAST) for name in energies}
    layers = {name: (value / norms[name]) ** 0.5 for name, value in energies.items()}
    total = (sum(energies.values()) / sum(norms.values())) ** 0.5
    return layers, (sum(d**2 for d in layers.values()) / len(layers)) ** 0.5, total


def _reading(sides: Sequence[Summary]) -> Reading:
    """Of the calibrated knowledge and, where there is any, of that which was not."""
    layers, rms, total = sides[0]
    if len(sides) == 1:
        return Reading(layers, rms, total)
    unseen, unseen_rms, unseen_total = sides[1]
    return Reading(layers, rms, total, unseen_rms, unseen_total, unseen)


def _change(module: Any) -> tuple[Tensor, Tensor]:
    """P (d_out, k), Q (k, d_in) with P Q = B A - B0 A0, such that near the start nothing large cancels."""
    A, B = (whole(part[TRAINED].weight).float() for part in (module.lora_A, module.lora_B))
    if INITIAL not in module.lora_A:
        return B, A
    A0, B0 = (whole(part[INITIAL].weight).float() for part in (module.lora_A, module.lora_B))
    return torch.cat([B - B0, B0], dim=1), torch.cat([A, A - A0])
