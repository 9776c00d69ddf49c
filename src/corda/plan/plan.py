"""The Plan: which layers get which rank, and the initial factors that follow from it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from corda import artifact, linalg
from corda.context.store import Context
from corda.errors import PlanError
from corda.journal import Journal
from corda.metric import Metric, damping, full_precision
from corda.progress import Progress, silent
from corda.recipe import AdapterOptions, Mode, parse_adapter
from corda.targets import LayerSpec, weight_of

_END: dict[str, linalg.End] = {"kpm": "smallest", "ipm": "largest"}


@dataclass(frozen=True)
class LayerPlan:
    """One adapted layer.

    Attributes:
        name: Full dotted name.
        kind: See LayerSpec.
        d_out: Output features.
        d_in: Input features.
        rank: Components adapted, r.
        group: The distinct input it shares, or its own name.
        tokens: Tokens behind its covariance; 0 without one.
        damping: λ, the number added to C's diagonal.
        solver: What found the vectors: "gram", "lq", or "none" for plain LoRA.
        condition: Estimated condition of R (C + λI)^a.
        energy: Share of ‖W (C + λI)^a‖²_F held by the adapted components.
        dead: Directions of negligible ‖uᵀW‖, which start with a zero column of B.
        norm_ratio: ‖A‖_F / ‖B‖_F at the start.
    """

    name: str
    kind: str
    d_out: int
    d_in: int
    rank: int
    group: str = ""
    tokens: int = 0
    damping: float = 0.0
    solver: str = "none"
    condition: float = 1.0
    energy: float = 0.0
    dead: int = 0
    norm_ratio: float = 0.0

    @property
    def parameters(self) -> int:
        """Trainable parameters, (d_in + d_out) r."""
        return (self.d_in + self.d_out) * self.rank


@dataclass(frozen=True)
class Plan:
    """Ranks and initial factors of an adapter.

    Attributes:
        options: The adapter options it was made with.
        layers: One entry per adapted layer, in module order.
        factors: Layer name -> (A (r, d_in), B (d_out, r)), fp32, on the CPU; empty for plain LoRA.
        spectra: Layer name -> singular values of W (C + λI)^a, (n,) fp32 ascending; empty for plain LoRA.
        warnings: What a person should know.
    """

    options: AdapterOptions
    layers: tuple[LayerPlan, ...]
    factors: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    spectra: Mapping[str, Tensor] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def mode(self) -> Mode:
        """kpm, ipm or lora."""
        return self.options.mode

    @property
    def trainable_parameters(self) -> int:
        """Σ (d_in + d_out) r over the layers."""
        return sum(layer.parameters for layer in self.layers)

    def scaling(self, rank: int) -> float:
        """s that PEFT applies to a layer of this rank: alpha/r, the same for every layer."""
        return scaling(self.options, rank)

    def as_json(self) -> dict[str, Any]:
        """Everything but the tensors."""
        return {
            "mode": self.mode,
            "options": self.options.model_dump(mode="json"),
            "trainable_parameters": self.trainable_parameters,
            "layers": [asdict(layer) | {"shape": [layer.d_out, layer.d_in]} for layer in self.layers],
            "warnings": list(self.warnings),
        }


def scaling(options: AdapterOptions, rank: int) -> float:
    """s = alpha/r, or alpha/√r with rsLoRA. An alpha given for `options.rank` keeps s in layers of other ranks."""
    alpha = float(options.rank) if options.lora_alpha is None else options.lora_alpha
    return alpha / math.sqrt(options.rank) if options.use_rslora else alpha / options.rank


def make_plan(
    model: nn.Module,
    context: Context | Sequence[LayerSpec],
    options: AdapterOptions | None = None,
    *,
    journal: Journal | None = None,
    weights: Callable[[str], Tensor] | None = None,
    device: torch.device | None = None,
    progress: Progress = silent,
    **settings: Any,
) -> Plan:
    """Choose the components of every layer and build their factors (CorDA, eqs. 2-5).

    Args:
        model: The base model that the context was collected on; only read.
        context: Covariances, or the bare layers for mode "lora".
        options: Adapter options.
        journal: Where finished layers are kept, so that an interrupted decomposition continues.
        weights: For a model without weights: gives a parameter by its full name.
        device: To compute on; default: that of the model.
        progress: Shows how far it is.
        settings: Adapter options by name instead, e.g. mode="ipm", rank=32.

    Raises:
        PlanError: a rank that a layer does not allow, or a mode that needs a context and has none.
    """
    if options is not None and settings:
        raise PlanError("give adapter options or settings by name, not both", got=", ".join(settings))
    options = options or parse_adapter(settings)
    specs = context.layers if isinstance(context, Context) else tuple(context)
    check_ranks(specs, options.rank)
    if options.mode == "lora":
        plain = tuple(LayerPlan(s.name, s.kind, s.d_out, s.d_in, options.rank, s.name) for s in specs)
        return Plan(options, plain)
    if not isinstance(context, Context):
        raise PlanError("a mode that needs covariances got none", where=f"mode {options.mode}", fix="collect first")
    layers: dict[str, LayerPlan] = {}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    spectra: dict[str, Tensor] = {}
    groups = context.members()
    device = device or next(model.parameters()).device

    def weight(spec: LayerSpec) -> Tensor:
        given = weights(f"{spec.name}.weight") if weights is not None else None
        return weight_of(model, spec, given).to(device)

    for group, members in progress(groups.items(), "decompose", len(groups)):
        with torch.no_grad(), full_precision():
            parts = _group(weight, context, group, members, options, journal, device)
        for part in parts:
            name = part.layer.name
            layers[name], factors[name], spectra[name] = part.layer, (part.A, part.B), part.spectrum
    dead = sum(layer.dead for layer in layers.values())
    notes = [f"{dead} directions with negligible weight start with a zero column of B"] if dead else []
    ordered = tuple(layers[spec.name] for spec in specs)
    return Plan(options, ordered, factors, spectra, (*context.warnings, *notes))


def check_ranks(layers: Sequence[LayerSpec], rank: int) -> None:
    """Refuse a rank that some layer does not allow.

    Raises:
        PlanError: names the narrowest layer and the largest rank for all.
    """
    narrow = min(layers, key=lambda layer: layer.max_rank)
    if rank > narrow.max_rank:
        raise PlanError(
            "the rank is larger than a layer allows",
            where=f"{narrow.name} ({narrow.d_out}x{narrow.d_in})",
            got=rank,
            expected=f"at most {narrow.max_rank}",
            fix="lower adapter.rank or leave the layer out of target_modules",
        )


def save(
    plan: Plan, folder: Path, fingerprint: str, parents: Mapping[str, str], extra: Mapping[str, Any]
) -> artifact.Artifact:
    """Write plan.json, factors.safetensors and spectra.safetensors.

    Raises:
        ResourceError: not enough space.
    """
    tensors = {f"{name}.{part}": t for name, pair in plan.factors.items() for part, t in zip("AB", pair, strict=True)}
    size = sum(4 * t.numel() for t in [*tensors.values(), *plan.spectra.values()])
    with artifact.writing(folder, "plan", fingerprint, parents, size) as (temporary, manifest):
        manifest.update(extra)
        artifact.write_json(temporary / "plan.json", plan.as_json())
        save_file(tensors, temporary / "factors.safetensors")
        save_file(dict(plan.spectra), temporary / "spectra.safetensors")
    return artifact.read(folder, "plan", verify=False)


def load(found: artifact.Artifact) -> Plan:
    """Read a plan back."""
    raw = json.loads(found.path("plan.json").read_text(encoding="utf-8"))
    tensors = load_file(found.path("factors.safetensors"))
    layers = tuple(LayerPlan(**{k: v for k, v in layer.items() if k != "shape"}) for layer in raw["layers"])
    factors = {
        layer.name: (tensors[f"{layer.name}.A"], tensors[f"{layer.name}.B"])
        for layer in layers
        if f"{layer.name}.A" in tensors
    }
    spectra = load_file(found.path("spectra.safetensors"))
    return Plan(AdapterOptions(**raw["options"]), layers, factors, spectra, tuple(raw["warnings"]))


@dataclass(frozen=True)
class _Part:
    layer: LayerPlan
    A: Tensor
    B: Tensor
    spectrum: Tensor


def _group(
    weight: Callable[[LayerSpec], Tensor],
    context: Context,
    group: str,
    members: Sequence[LayerSpec],
    options: AdapterOptions,
    journal: Journal | None,
    device: torch.device,
) -> list[_Part]:
    """The layers that share an input, from the journal where they are done already."""
    facts = journal.facts(group) if journal else None
    if journal is not None and facts is not None:
        tensors = load_file(journal.path(group))
        return [
            _Part(LayerPlan(**layer), *(tensors[f"{layer['name']}.{part}"] for part in ("A", "B", "spectrum")))
            for layer in facts["layers"]
        ]
    C = context.covariance(members[0].name).to(device)
    metric = Metric(C, options.exponent, damping(C, options.damp))
    parts = [_factorise(spec, weight(spec), metric, context.tokens[group], group, options) for spec in members]
    if journal is not None:
        named = {
            f"{p.layer.name}.{part}": t for p in parts for part, t in (("A", p.A), ("B", p.B), ("spectrum", p.spectrum))
        }
        journal.put(group, named, {"layers": [asdict(p.layer) for p in parts]})
    return parts


def _factorise(spec: LayerSpec, W: Tensor, metric: Metric, tokens: int, group: str, options: AdapterOptions) -> _Part:
    rank = options.rank
    try:
        found = linalg.subspace(W, metric, rank, _END[options.mode])
    except ValueError as error:
        raise PlanError("a layer cannot be decomposed", where=spec.name, got=error) from None
    s = scaling(options, rank)
    A, B, dead = linalg.factors(W, found, scaling=s, balance=options.balance)
    values = found.spectrum if found.spectrum is not None else found.sigma
    total = float(metric.root(W).double().square().sum())
    layer = LayerPlan(
        spec.name,
        spec.kind,
        spec.d_out,
        spec.d_in,
        rank,
        group,
        tokens,
        metric.lam,
        found.path,
        found.condition if math.isfinite(found.condition) else -1.0,
        float(found.sigma.square().sum()) / total if total else 0.0,
        dead,
        float(A.norm()) / max(float(B.norm()), 1e-30),
    )
    return _Part(layer, A.cpu(), B.cpu(), values.float().cpu())
