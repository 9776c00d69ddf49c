"""A planned layer with its factors, and how it is kept in a journal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from corda.plan.plan import LayerPlan
from corda.quantization import Factors


@dataclass(frozen=True)
class Part:
    """A layer of the plan with its tensors, as the journal keeps it; see `Plan` and `weigh.Weighed`."""

    layer: LayerPlan
    A: Tensor
    B: Tensor
    spectrum: Tensor
    removed: Factors | None = None
    correction: Factors | None = None
    weighed: Mapping[str, Tensor] = field(default_factory=dict)

    def named(self) -> dict[str, Tensor]:
        """Every tensor by a name of its own: A (r, d_in), B (d_out, r), spectrum (n,) and what else there is."""
        tensors = {"A": self.A, "B": self.B, "spectrum": self.spectrum}
        tensors |= {f"weighed_{kind}": tensor.clone() for kind, tensor in self.weighed.items()}
        for kind, pair in (("removed", self.removed), ("correction", self.correction)):
            if pair is not None:
                tensors |= {f"{kind}_A": pair[0].contiguous(), f"{kind}_B": pair[1].contiguous()}
        return {f"{self.layer.name}.{key}": tensor for key, tensor in tensors.items()}

    @classmethod
    def noted(cls, layer: LayerPlan, tensors: Mapping[str, Tensor]) -> Part:
        """Inverse of `named`.

        Args:
            layer: What is known of it.
            tensors: As `named` gives them, with their shapes.
        """

        def pair(kind: str) -> Factors | None:
            key = f"{layer.name}.{kind}"
            return (tensors[f"{key}_A"], tensors[f"{key}_B"]) if f"{key}_A" in tensors else None

        A, B, spectrum = (tensors[f"{layer.name}.{part}"] for part in ("A", "B", "spectrum"))
        begin = f"{layer.name}.weighed_"
        weighed = {key.removeprefix(begin): t for key, t in tensors.items() if key.startswith(begin)}
        return cls(layer, A, B, spectrum, pair("removed"), pair("correction"), weighed)
