"""The passes over the layers of a plan: spectra and scores first, vectors for what was chosen."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from safetensors.torch import load_file
from torch import Tensor

from corda import linalg
from corda.context.store import Context
from corda.errors import PlanError
from corda.journal import Journal
from corda.metric import Metric, damping
from corda.plan.byhand import round_by_hand
from corda.plan.compactness import Compactness, compactness, extreme_eigenvalues, from_spectrum
from corda.plan.part import Part
from corda.plan.plan import LayerPlan, corrected, layer_from_json, scaling
from corda.plan.selection import candidate_score, choose
from corda.plan.shrinkage import covariance, pooled_share
from corda.plan.weigh import all_thetas, weigh
from corda.quantization import Factors, start
from corda.recipe import AdapterOptions, Selection
from corda.targets import LayerSpec

_END: dict[str, linalg.End] = {"kpm": "smallest", "ipm": "largest"}


@dataclass(frozen=True)
class Passes:
    """Both passes over the layers of a plan: a survey without vectors, and the factorisation.

    Attributes:
        context: Covariances of what is kept (or learnt, in mode ipm).
        options: Adapter options.
        selection: Which of a context's candidates a layer takes.
        weight: A layer's W, (d_out, d_in), on the device.
        device: To compute on.
        journal: Where finished layers are kept, or None.
        quantise: For a 4-bit model: W (d_out, d_in) -> Q(W) as numbers.
        learn: Covariances of the task, in the modes of two contexts.
        seed: Of random directions.
    """

    context: Context
    options: AdapterOptions
    selection: Selection
    weight: Callable[[LayerSpec], Tensor]
    device: torch.device
    journal: Journal | None
    quantise: Callable[[Tensor], Tensor] | None = None
    learn: Context | None = None
    seed: int = 0

    def metric(self, layer: str, round_: int | None) -> Metric:
        """(C + λI)^a of a layer's candidate.

        Args:
            layer: Its name.
            round_: Number of the candidate; None for all as one.
        """
        C = covariance(self.context, layer, round_, self.options.expert_prior).to(self.device)
        return Metric(C, self.options.exponent, damping(C, self.options.damp))

    def survey(self, group: str, members: Sequence[LayerSpec]) -> list[tuple[LayerPlan, Tensor]]:
        """Spectra, π and scores without vectors; the candidate of lowest score stays, one in memory besides it.

        Args:
            group: The input that the layers share.
            members: Those layers.
        """
        key = f"survey {group}"
        facts = self.journal.facts(key) if self.journal else None
        if self.journal is not None and facts is not None:
            spectra = load_file(self.journal.path(key))
            return [(layer_from_json(raw), spectra[raw["name"]]) for raw in facts["layers"]]
        candidates: list[int | None] = [0] if self.selection == "first" else [None]
        if self.selection == "dynamic":
            candidates = list(range(self.context.rounds))
        weights = {spec.name: linalg.same_spectrum(self.weight(spec)) for spec in members}
        scores: dict[str, list[float]] = {spec.name: [] for spec in members}
        best: dict[str, tuple[LayerPlan, Tensor]] = {}
        for round_ in candidates:
            metric = self.metric(members[0].name, round_)
            extremes = self._extremes(metric)
            for spec in members:
                spectrum = linalg.spectrum(weights[spec.name], metric)
                pi = self._compactness(spec, metric, spectrum, extremes)
                scores[spec.name].append(candidate_score(pi.log_pi, spectrum))
                if choose(scores[spec.name]) == len(scores[spec.name]) - 1:
                    layer = LayerPlan(spec.name, spec.kind, spec.d_out, spec.d_in, 0, group)
                    layer = replace(layer, chosen=round_, log_pi=pi.log_pi, floor_decided=pi.floor_decided)
                    best[spec.name] = (layer, spectrum.cpu())
        several = self.selection == "dynamic"
        found = [
            (replace(layer, scores=tuple(scores[name]) if several else ()), spectrum)
            for name, (layer, spectrum) in best.items()
        ]
        if self.journal is not None:
            self.journal.put(
                key, {layer.name: s for layer, s in found}, {"layers": [asdict(layer) for layer, _ in found]}
            )
        return found

    def with_round_by_hand(self, spec: LayerSpec, layer: LayerPlan) -> LayerPlan:
        """The layer with the round set by hand, if one is, and that round's π where the layers were surveyed.

        Args:
            spec: The layer in the model.
            layer: The layer as planned so far.
        """
        chosen = round_by_hand(self.options, layer.name, layer.chosen)
        if chosen == layer.chosen:
            return layer
        layer = replace(layer, chosen=chosen, edited=True)
        if layer.log_pi is None:
            return layer
        metric = self.metric(spec.name, chosen)
        pi = self._compactness(spec, metric, linalg.spectrum(self.weight(spec), metric), self._extremes(metric))
        return replace(layer, log_pi=pi.log_pi, floor_decided=pi.floor_decided)

    def factorise(self, group: str, members: Sequence[tuple[LayerSpec, LayerPlan]]) -> list[Part]:
        """Vectors for the chosen candidates and ranks; layers with one candidate share its metric.

        Args:
            group: The input that the layers share.
            members: Each layer in the model and as planned so far.
        """
        facts = self.journal.facts(group) if self.journal else None
        if self.journal is not None and facts is not None:
            tensors = load_file(self.journal.path(group))
            return [Part.noted(layer_from_json(raw), tensors) for raw in facts["layers"]]
        metrics: dict[int | None, Metric] = {}
        parts = []
        if self.learn is not None:
            return self._noted(group, [p for some in self._together(members) for p in self._weighed(group, some)])
        for spec, layer in members:
            if layer.chosen not in metrics:
                metrics = {layer.chosen: self.metric(spec.name, layer.chosen)}
            tokens = self.context.token_count(spec.name, layer.chosen)
            share = pooled_share(spec, tokens, self.options.expert_prior)
            planned = replace(layer, group=group, tokens=tokens, pooled=share)
            W, metric = self.weight(spec), metrics[layer.chosen]
            part = _factorise(spec, planned, W, metric, self.options)
            parts.append(part if self.quantise is None else _quantised(part, W, metric, self.options, self.quantise))
        return self._noted(group, parts)

    def thetas(self, group: str, members: Sequence[tuple[LayerSpec, LayerPlan]]) -> dict[str, Tensor]:
        """Layer name -> every θ, best first, of the chosen candidate.

        Args:
            group: The input that the layers share.
            members: Each layer in the model and as planned so far.
        """
        key = f"theta {group}"
        if self.journal is not None and self.journal.facts(key) is not None:
            return dict(load_file(self.journal.path(key)))
        found: dict[str, Tensor] = {}
        for some in self._together(members):
            specs = [spec for spec, _ in some]
            task, knowledge = self._both(some[0][1])
            values = all_thetas(specs, [self.weight(spec) for spec in specs], task, knowledge, self.options)
            found |= {spec.name: value.clone() for spec, value in zip(specs, values, strict=True)}
        if self.journal is not None:
            self.journal.put(key, found, {})
        return found

    def _together(self, members: Sequence[tuple[LayerSpec, LayerPlan]]) -> list[list[tuple[LayerSpec, LayerPlan]]]:
        """Members with one candidate, for each candidate."""
        chosen = dict.fromkeys(layer.chosen for _, layer in members)
        return [[member for member in members if member[1].chosen == one] for one in chosen]

    def _both(self, layer: LayerPlan) -> tuple[Tensor, Tensor]:
        """C_t, pooled unless the first round is asked for, and C_k of the chosen candidate."""
        assert self.learn is not None
        first, prior = 0 if self.selection == "first" else None, self.options.expert_prior
        task = covariance(self.learn, layer.name, first, prior)
        return task.to(self.device), covariance(self.context, layer.name, layer.chosen, prior).to(self.device)

    def _weighed(self, group: str, members: Sequence[tuple[LayerSpec, LayerPlan]]) -> list[Part]:
        """Parts of layers with one candidate, in dual and contrast."""
        tokens = self.context.token_count(members[0][0].name, members[0][1].chosen)
        share = pooled_share(members[0][0], tokens, self.options.expert_prior)
        planned = [(spec, replace(layer, group=group, tokens=tokens, pooled=share)) for spec, layer in members]
        weights = [self.weight(spec) for spec, _ in members]
        task, knowledge = self._both(planned[0][1])
        parts = []
        for one, W in zip(weigh(planned, weights, task, knowledge, self.options, self.seed), weights, strict=True):
            part = Part(one.layer, one.A, one.B, torch.empty(0), weighed=one.spectra)
            if self.quantise is not None:
                metric = Metric(knowledge, self.options.exponent, damping(knowledge, self.options.damp))
                part = _quantised(part, W, metric, self.options, self.quantise)
            parts.append(part)
        return parts

    def _noted(self, group: str, parts: list[Part]) -> list[Part]:
        if self.journal is not None:
            named = {key: tensor for part in parts for key, tensor in part.named().items()}
            self.journal.put(group, named, {"layers": [asdict(p.layer) for p in parts]})
        return parts

    def _extremes(self, metric: Metric) -> Callable[[], tuple[float, float]]:
        """Extreme eigenvalues of C, found when first asked for: layers with one input share them."""
        C, damp = metric.C, self.options.compactness_damp
        assert C is not None
        return functools.cache(lambda: extreme_eigenvalues(C.double(), damping(C, damp)))

    def _compactness(
        self, spec: LayerSpec, metric: Metric, spectrum: Tensor, extremes: Callable[[], tuple[float, float]]
    ) -> Compactness:
        options = self.options
        assert metric.C is not None
        try:
            if options.compactness_of == "WC":
                pi = from_spectrum(spectrum, spec.d_out)
            else:
                damp, scale = options.compactness_damp, options.compactness_scale
                pi = compactness(metric.C, spec.d_out, damp=damp, scale=scale, extremes=extremes())
        except ValueError as error:
            raise PlanError("the compactness of a layer cannot be had", where=spec.name, got=error) from None
        of_spectrum = options.compactness_of == "WC"
        if pi.log_pi <= 0:
            raise PlanError(
                "log π is not positive, so that scores cannot be compared",
                where=spec.name,
                got=f"log π = {pi.log_pi:.3g} "
                + ("of the spectrum of W C" if of_spectrum else f"at compactness_scale {options.compactness_scale}"),
                expected="log π > 0",
                fix=f"set adapter.compactness_{'of: C' if of_spectrum else 'scale: unit'}",
            )
        return pi


def _factorise(spec: LayerSpec, layer: LayerPlan, W: Tensor, metric: Metric, options: AdapterOptions) -> Part:
    try:
        found = linalg.subspace(W, metric, layer.rank, _END[options.mode])
    except ValueError as error:
        raise PlanError("a layer cannot be decomposed", where=spec.name, got=error) from None
    A, B, dead = linalg.factors(W, found, scaling=scaling(options, layer.rank), balance=options.balance)
    values = found.spectrum if found.spectrum is not None else found.sigma
    total = float(torch.linalg.vector_norm(values if found.spectrum is not None else metric.root(W))) ** 2
    layer = replace(
        layer,
        damping=metric.lam,
        solver=found.path,
        condition=found.condition if math.isfinite(found.condition) else -1.0,
        energy=float(found.sigma.square().sum()) / total if total else 0.0,
        dead=dead,
        norm_ratio=float(A.norm()) / max(float(B.norm()), 1e-30),
    )
    return Part(layer, A.cpu(), B.cpu(), values.float().cpu())


def _quantised(
    part: Part, W: Tensor, metric: Metric, options: AdapterOptions, quantise: Callable[[Tensor], Tensor]
) -> Part:
    s = scaling(options, part.layer.rank)
    begin = start(
        W,
        metric,
        (part.A.to(W.device), part.B.to(W.device)),
        scaling=s,
        quantise=quantise,
        residual=options.form(four_bit=True) == "residual",
        correction=corrected(options, four_bit=True),
        rank=options.correction_rank or options.rank,
        rounds=options.correction_rounds,
        balance=options.balance,
    )

    def home(pair: Factors | None) -> Factors | None:
        return (pair[0].cpu(), pair[1].cpu()) if pair else None

    A, B = begin.trained
    layer = replace(part.layer, quantised=begin.error)
    return Part(layer, A.cpu(), B.cpu(), part.spectrum, home(begin.removed), home(begin.correction), part.weighed)
