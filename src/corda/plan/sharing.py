"""Layers shared out over processes, and the weights of a model that may be spread over them itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from corda.distributed import Processes, world
from corda.heap import give_back
from corda.plan.parallel import Form, each_shared
from corda.plan.part import Part
from corda.plan.plan import LayerPlan, layer_from_json
from corda.progress import Progress
from corda.sharding import is_sharded, refuse_partitioned
from corda.targets import LayerSpec, weight_of

Result = TypeVar("Result")

# From this d_in on, workspaces are many times what is kept of a layer, and giving back costs little beside it.
_WIDE = 1024

SURVEYED: Form[list[tuple[LayerPlan, Tensor]]] = Form(
    lambda found: ({layer.name: spectrum for layer, spectrum in found}, [asdict(layer) for layer, _ in found]),
    lambda spectra, layers: [(layer_from_json(raw), spectra[raw["name"]]) for raw in layers],
)
PARTS: Form[list[Part]] = Form(
    lambda parts: (
        {name: tensor for part in parts for name, tensor in part.named().items()},
        [asdict(part.layer) for part in parts],
    ),
    lambda tensors, layers: [Part.noted(layer_from_json(raw), tensors) for raw in layers],
)
THETAS: Form[dict[str, Tensor]] = Form(lambda found: (found, None), lambda tensors, _: dict(tensors))


class Weights:
    """W of a layer, (d_out, d_in) fp32, on the device that is computed on.

    Args:
        model: Where the layers are; its weights may be in memory, off-loaded, or sharded by FSDP2.
        given: For a model without weights: gives a parameter by its full name.
        device: To compute on.

    Attributes:
        sharded: Weights lie with all processes, which have to ask for the same ones together.

    Raises:
        ModelError: DeepSpeed partitioned the model.
    """

    def __init__(self, model: nn.Module, given: Callable[[str], Tensor] | None, device: torch.device) -> None:
        refuse_partitioned(model)
        self.model, self.given, self.device = model, given, device
        self.sharded = is_sharded(model)
        self._kept: dict[str, Tensor] = {}

    def __call__(self, spec: LayerSpec) -> Tensor:
        """W of that layer."""
        if spec.name in self._kept:
            return self._kept[spec.name]
        stored = self.given(spec.stored[0]) if self.given is not None else None
        return weight_of(self.model, spec, stored).to(self.device)

    def bring(self, layers: Sequence[LayerSpec], own: bool) -> None:
        """All processes gather the weights of one input's layers; the one whose `own` they are keeps them."""
        if own:
            self._kept.clear()
        for spec in layers:
            gathered = weight_of(self.model, spec).to(self.device)
            if own:
                self._kept[spec.name] = gathered

    def forget(self) -> None:
        """From here to the next sharing out, all processes ask for the same layers."""
        self._kept.clear()


@dataclass(frozen=True)
class Shared:
    """How the inputs of a plan, each with its layers, are shared out.

    Attributes:
        weights: Of the model.
        processes: Who shares; all there are where the model is sharded.
        side_by_side: Several layers at once in this process.
        in_order: But for layers whose covariances come one after the other only.
        progress: Shows how far it is.
    """

    weights: Weights
    processes: Processes
    side_by_side: bool
    in_order: bool
    progress: Progress

    def each(
        self, work: Callable[..., Result], items: Sequence[tuple[str, Sequence[Any]]], what: str, form: Form[Result]
    ) -> list[Result]:
        """work(input, layers) of all items, in order; `layers` are LayerSpecs or pairs that begin with one.

        Args:
            work: What to do with an input.
            items: (input, layers).
            what: Named beside the bar.
            form: How results travel between processes.

        Raises:
            CordaError: what work raised in any process.
        """
        layers = {group: [m if isinstance(m, LayerSpec) else m[0] for m in members] for group, members in items}

        def bring(item: tuple[str, Sequence[Any]], own: bool) -> None:
            self.weights.bring(layers[item[0]], own)

        def one(item: tuple[str, Sequence[Any]]) -> Result:
            done = work(*item)
            if self.weights.device.type == "cpu" and layers[item[0]][0].d_in >= _WIDE:
                give_back()
            return done

        found = each_shared(
            one,
            items,
            costs=[cost(members) for members in layers.values()],
            form=form,
            processes=world() if self.weights.sharded else self.processes,
            side_by_side=self.side_by_side,
            in_order=self.in_order,
            progress=self.progress,
            what=what,
            bring=bring if self.weights.sharded else None,
        )
        self.weights.forget()
        return found


def cost(members: Sequence[LayerSpec]) -> float:
    """What the layers of one input cost: d_out d_in² each, as W C does; recorded seconds are in proportion to it."""
    return float(sum(s.d_out * s.d_in**2 for s in members))
