"""The Plan: which layers get which rank, and the initial factors that follow from it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from corda import artifact
from corda.errors import PlanError
from corda.quantization import QuantisationError, totals
from corda.recipe import AdapterOptions, Correction, Mode
from corda.targets import LayerSpec

WEIGHED = "weighed.safetensors"


@dataclass(frozen=True)
class LayerPlan:
    """One adapted layer.

    Attributes:
        name: Full dotted name.
        kind: See LayerSpec.
        d_out: Output features.
        d_in: Input features.
        rank: Components adapted, r; 0 only before ranks are allocated.
        group: The distinct input it shares, or its own name.
        tokens: Tokens behind its covariance; 0 without one.
        pooled: Share of the pooled covariance of all experts in its own, see `plan.shrinkage`; 0 for other layers.
        damping: λ, the number added to C's diagonal.
        solver: What found the vectors: "gram", "lq", or "none" for plain LoRA.
        condition: Estimated condition of R (C + λI)^a.
        energy: Share of ‖W (C + λI)^a‖²_F held by the adapted components.
        dead: Directions of negligible ‖uᵀW‖, which start with a zero column of B; in contrast and dual those in which
            the task has nothing.
        norm_ratio: ‖A‖_F / ‖B‖_F at the start.
        chosen: The calibration round whose covariance was taken; None for all of them pooled.
        log_pi: log π of that covariance; None where nothing depended on it.
        floor_decided: More than half of its smallest eigenvalue inside π is damping.
        scores: Score of every candidate, the lowest of which was taken unless a round was set by hand; empty without
            dynamic selection.
        edited: `adapter.ranks` gave it another rank or round than selection and allocation.
        quantised: What 4 bits cost the layer; None in a model of higher precision.
        task_energy: In dual and contrast, the task's share along the adapted components; `energy` is the knowledge's.
        theta: In dual and contrast, the largest and the smallest value that a component was chosen by.
        train_a: A is trained too.
    """

    name: str
    kind: str
    d_out: int
    d_in: int
    rank: int
    group: str = ""
    tokens: int = 0
    pooled: float = 0.0
    damping: float = 0.0
    solver: str = "none"
    condition: float = 1.0
    energy: float = 0.0
    dead: int = 0
    norm_ratio: float = 0.0
    chosen: int | None = 0
    log_pi: float | None = None
    floor_decided: bool = False
    scores: tuple[float, ...] = ()
    edited: bool = False
    quantised: QuantisationError | None = None
    task_energy: float = 0.0
    theta: tuple[float, ...] = ()
    train_a: bool = True

    @property
    def parameters(self) -> int:
        """Trainable parameters, (d_in + d_out) r, or d_out r where A is frozen."""
        return (self.d_out + (self.d_in if self.train_a else 0)) * self.rank


@dataclass(frozen=True)
class Plan:
    """Ranks and initial factors of an adapter.

    Attributes:
        options: The adapter options it was made with.
        layers: One entry per adapted layer, in module order.
        factors: Layer name -> (A (r, d_in), B (d_out, r)), fp32, on the CPU; empty for plain LoRA.
        spectra: Layer name -> singular values of W (C + λI)^a, (n,) fp32 ascending; empty for plain LoRA.
        warnings: What a person should know.
        removed: Layer name -> (A, B) whose product is taken out of a 4-bit layer before it is quantised, where
            that is not the adapter's start.
        corrections: Layer name -> (A, B) of the frozen correction of a 4-bit layer.
        weighed: In dual and contrast, "LAYER.theta", "LAYER.task" and "LAYER.knowledge" -> see `weigh.Weighed`.
    """

    options: AdapterOptions
    layers: tuple[LayerPlan, ...]
    factors: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    spectra: Mapping[str, Tensor] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    removed: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    corrections: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    weighed: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def mode(self) -> Mode:
        """kpm, ipm, dual, contrast or lora."""
        return self.options.mode

    @property
    def trainable_parameters(self) -> int:
        """Σ (d_in + d_out) r over the layers, or Σ d_out r where A is frozen."""
        return sum(layer.parameters for layer in self.layers)

    def scaling(self, rank: int) -> float:
        """s that PEFT applies to a layer of this rank: alpha/r, the same for every layer."""
        return scaling(self.options, rank)

    def as_json(self) -> dict[str, Any]:
        """Everything but the tensors."""
        errors = [layer.quantised for layer in self.layers if layer.quantised]
        return {
            "mode": self.mode,
            "options": self.options.model_dump(mode="json"),
            "trainable_parameters": self.trainable_parameters,
            "quantisation": totals(errors) if errors else None,
            "layers": [asdict(layer) | {"shape": [layer.d_out, layer.d_in]} for layer in self.layers],
            "warnings": list(self.warnings),
        }


def scaling(options: AdapterOptions, rank: int) -> float:
    """s = alpha/r, or alpha/√r with rsLoRA. An alpha given for `options.rank` keeps s in layers of other ranks."""
    alpha = float(options.rank) if options.lora_alpha is None else options.lora_alpha
    return alpha / math.sqrt(options.rank) if options.use_rslora else alpha / options.rank


def corrected(options: AdapterOptions, four_bit: bool) -> Correction:
    """What is done about the error of 4 bits: as asked, else by mode where a residual base is quantised.

    Args:
        options: Of the adapter.
        four_bit: Whether the base is held in 4 bits.
    """
    quantised = four_bit and options.has_start and options.form(four_bit) == "residual"
    return options.correction or ("none" if not quantised else "fit" if options.mode == "ipm" else "frozen")


def layer_from_json(raw: Mapping[str, Any]) -> LayerPlan:
    """Inverse of asdict, after JSON."""
    fields = {key: value for key, value in raw.items() if key != "shape"}
    quantised = QuantisationError(**raw["quantised"]) if raw["quantised"] else None
    return LayerPlan(
        **(fields | {"scores": tuple(raw["scores"]), "theta": tuple(raw["theta"]), "quantised": quantised})
    )


def check_ranks(layers: Sequence[LayerSpec], ranks: Mapping[str, int]) -> None:
    """Refuse ranks that some layer does not allow.

    Args:
        layers: The layers.
        ranks: Layer name -> rank.

    Raises:
        PlanError: names the layer that is furthest off and its largest rank.
    """
    narrow = min(layers, key=lambda layer: layer.max_rank - ranks[layer.name], default=None)
    if narrow is not None and ranks[narrow.name] > narrow.max_rank:
        raise PlanError(
            "the rank is larger than a layer allows",
            where=f"{narrow.name} ({narrow.d_out}x{narrow.d_in})",
            got=ranks[narrow.name],
            expected=f"at most {narrow.max_rank}",
            fix="lower the rank or leave the layer out of target_modules",
        )


def save(
    plan: Plan, folder: Path, fingerprint: str, parents: Mapping[str, str], extra: Mapping[str, Any]
) -> artifact.Artifact:
    """Write plan.json, factors.safetensors, spectra.safetensors and, in dual and contrast, weighed.safetensors.

    Args:
        plan: What to write.
        folder: Where to.
        fingerprint: Of all that it depends on.
        parents: Stage -> fingerprint of what it was made from.
        extra: More entries of the manifest.

    Raises:
        ResourceError: not enough space.
    """
    tensors = {
        f"{name}.{kind}{part}": tensor.contiguous()
        for kind, pairs in (("", plan.factors), ("removed_", plan.removed), ("correction_", plan.corrections))
        for name, pair in pairs.items()
        for part, tensor in zip("AB", pair, strict=True)
    }
    size = sum(4 * t.numel() for t in [*tensors.values(), *plan.spectra.values(), *plan.weighed.values()])
    with artifact.writing(folder, "plan", fingerprint, parents, size) as (temporary, manifest):
        manifest.update(extra)
        artifact.write_json(temporary / "plan.json", plan.as_json())
        save_file(tensors, temporary / "factors.safetensors")
        save_file(dict(plan.spectra), temporary / "spectra.safetensors")
        if plan.weighed:
            save_file(dict(plan.weighed), temporary / WEIGHED)
    return artifact.read(folder, "plan", verify=False)


def load(found: artifact.Artifact) -> Plan:
    """Read a plan back."""
    raw = json.loads(found.path("plan.json").read_text(encoding="utf-8"))
    tensors = load_file(found.path("factors.safetensors"))
    layers = tuple(layer_from_json(layer) for layer in raw["layers"])

    def pairs(kind: str) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            layer.name: (tensors[f"{layer.name}.{kind}A"], tensors[f"{layer.name}.{kind}B"])
            for layer in layers
            if f"{layer.name}.{kind}A" in tensors
        }

    spectra = load_file(found.path("spectra.safetensors"))
    options = AdapterOptions(**raw["options"])
    notes = tuple(raw["warnings"])
    weighed = load_file(found.path(WEIGHED)) if found.path(WEIGHED).is_file() else {}
    return Plan(options, layers, pairs(""), spectra, notes, pairs("removed_"), pairs("correction_"), weighed)
