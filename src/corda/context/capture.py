"""Hooks that feed layer inputs to accumulators, undone on any exit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from corda import experts
from corda.context.accumulator import Accumulator, pack_upper
from corda.distributed import ALONE, Processes
from corda.errors import CalibrationError
from corda.journal import Journal, LazyTensors
from corda.metric import full_precision
from corda.targets import LayerSpec


def candidate(group: str, round_: int) -> str:
    """Name of a group's covariance from one calibration round; the first round's is the group's own name.

    Args:
        group: Name of the distinct input.
        round_: Number of the round, from 0.
    """
    return f"{group}#{round_}" if round_ else group


@dataclass(frozen=True)
class Captured:
    """What was collected for some layers.

    Attributes:
        packed: Candidate -> packed upper triangle of C = X Xᵀ / T, fp32, on the CPU or still on disk.
        tokens: Candidate -> T.
        groups: Layer name -> group name, for every layer that was reached.
    """

    packed: Mapping[str, Tensor]
    tokens: Mapping[str, int]
    groups: Mapping[str, str]

    @property
    def bytes(self) -> int:
        """Size of the covariances."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.packed.values())

    def facts(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON."""
        return {"tokens": dict(self.tokens), "groups": dict(self.groups)}

    @classmethod
    def noted(cls, journal: Journal, key: str, *, verify: bool = True) -> Captured | None:
        """A finished part of a journal, its tensors left on disk; None if it is not finished.

        Args:
            journal: Where finished parts are.
            key: The part's name.
            verify: Compare the hash of its tensors too.
        """
        facts = journal.facts(key, verify=verify)
        if facts is None:
            return None
        places = dict.fromkeys(facts["tokens"], journal.path(key))
        return cls(LazyTensors(places), facts["tokens"], facts["groups"])


class Capture:
    """Accumulators for the distinct inputs of a set of layers.

    Layers that are handed the very same tensor one after the other (q/k/v, gate/up) form a group with one
    accumulator under the first one's name. Groups are fixed by the first forward pass that reaches a layer and
    verified on every later one.

    Args:
        layers: Whose inputs.
        device: Where the sums of an input are that this process has not seen and others have.

    Attributes:
        groups: Layer name -> group name, for every layer that was reached.
        accumulators: Group name -> its sums.
    """

    def __init__(self, layers: Sequence[LayerSpec], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.layers = {layer.name: layer for layer in layers}
        self.groups: dict[str, str] = {}
        self.accumulators: dict[str, Accumulator] = {}
        self._counts: list[Tensor | None] = []  # of the batches that are open, innermost last
        self._last: Tensor | None = None  # a strong reference: the id of a freed tensor may return
        self._last_group = ""

    @contextmanager
    def batch(self, counts: Tensor | None) -> Iterator[None]:
        """Say which tokens count, (B, L) bool or None for every input, for the forward passes inside."""
        self.begin(counts)
        try:
            yield
        finally:
            self.end()

    def begin(self, counts: Tensor | None) -> None:
        """Open a batch, inside of the one that is open; `batch` where a `with` can be used."""
        self._counts.append(counts)

    def end(self) -> None:
        """Close the innermost batch."""
        self._counts.pop()
        self._last = None

    @property
    def counts(self) -> Tensor | None:
        """What counts in the innermost batch; None for every input."""
        return self._counts[-1]

    def see(self, name: str, x: Tensor) -> None:
        """Take the input x of layer `name`, (..., d_in).

        Raises:
            CalibrationError: its leading shape is not the batch's, or the layer changed its group.
        """
        group = self._last_group if x is self._last else name
        self._set_group(name, group)
        if group != name:
            return
        self._last, self._last_group = x, name
        self._accumulate(name, self._counted(name, x))

    def see_experts(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take the inputs of the experts of `name`, a module of stacked parameters, each from the tokens routed to it.

        Args:
            name: Full dotted name of the module.
            module: Holds the stacked parameters.
            args: Positional arguments of its forward.
            kwargs: Keyword arguments of its forward.

        Raises:
            CalibrationError: it is not called with hidden states and chosen experts of the batch's shape.
        """
        hidden, index = experts.routed(module, args, kwargs, name)
        counts = self._mask(name, hidden)
        for stack in experts.stacks(module):
            wanted = f"{name}.{stack.parameter}"
            for expert, x in experts.by_expert(hidden, index, counts, stack.experts):
                layer = f"{wanted}.{expert}"
                if layer in self.layers:
                    self.groups.setdefault(layer, layer)
                    self._accumulate(layer, experts.between(module, expert, x) if stack.last else x)

    def _accumulate(self, name: str, x: Tensor) -> None:
        accumulator = self.accumulators.get(name)
        if accumulator is None:
            accumulator = self.accumulators[name] = Accumulator(self.layers[name].d_in, x.device)
        accumulator.add(x)

    def check_finite(self) -> None:
        """Raise if any sum is not finite.

        Raises:
            CalibrationError: names the layers that take the offending input.
        """
        _refuse([group for group, a in self.accumulators.items() if not a.finite()])

    def captured(self, round_: int = 0, processes: Processes = ALONE) -> Captured:
        """The covariances so far, of every input that saw a token, as candidates of a round.

        Args:
            round_: Which round.
            processes: Those whose sums are added up; each has seen tokens of its own.

        Raises:
            CalibrationError: activations are not finite, or layers share an input in some processes only.
        """
        tokens = self._tokens(processes)
        packed: dict[str, Tensor] = {}
        for group in tokens:
            own = self.accumulators.get(group) or Accumulator(self.layers[group].d_in, self._device)
            packed[group] = pack_upper(own.total)
        processes.add_up(list(packed.values()))
        if processes.size > 1:
            _refuse([group for group, sums in packed.items() if not bool(torch.isfinite(sums).all())])
        covariances = {candidate(group, round_): packed[group].div_(count).cpu() for group, count in tokens.items()}
        return Captured(covariances, {candidate(g, round_): count for g, count in tokens.items()}, dict(self.groups))

    def _tokens(self, processes: Processes) -> dict[str, int]:
        """Group -> tokens in all processes, of groups that saw any; every process then knows every layer's group."""
        own = {group: a.tokens for group, a in self.accumulators.items()}
        total: Counter[str] = Counter()
        for tokens, groups in processes.hear([own, self.groups]):
            for name, group in groups.items():
                self._set_group(name, group)
            total.update(tokens)
        return {group: total[group] for group in self.layers if total[group]}

    @property
    def _device(self) -> torch.device:
        return next((a.total.device for a in self.accumulators.values()), self.device)

    def _set_group(self, name: str, group: str) -> None:
        if self.groups.setdefault(name, group) != group:
            raise CalibrationError(
                "a layer shares its input with others in some forward passes only",
                where=name,
                got=f"the input of {group}",
                expected=f"the input of {self.groups[name]}",
                fix="leave the layer out of target_modules",
            )

    def _counted(self, name: str, x: Tensor) -> Tensor:
        flat = x.detach().reshape(-1, x.shape[-1])
        mask = self._mask(name, flat)
        return flat if mask is None else flat[mask]

    def _mask(self, name: str, flat: Tensor) -> Tensor | None:
        """(tokens,) bool of the rows of `flat` (tokens, d) that count; None for all of them."""
        if not self._counts:
            raise CalibrationError("a forward pass outside of a batch", where=name)
        counts = self.counts
        if counts is None or (self._is_routed(name) and bool(counts.all())):
            return None
        if flat.shape[0] == counts.shape[0] != counts.numel():
            counts = counts.any(dim=1)  # a pooler sees one place of each record
        if flat.shape[0] != counts.numel():
            raise CalibrationError(
                "cannot tell which of a layer's inputs are tokens",
                where=name,
                got=f"{flat.shape[0]} inputs",
                expected=f"one for each position of a batch of shape {tuple(counts.shape)}",
                fix="leave the layer out of target_modules",
            )
        mask = counts.reshape(-1).to(flat.device)
        return None if bool(mask.all()) else mask

    def _is_routed(self, name: str) -> bool:
        """Whether the layer is an expert of its own, which is handed the tokens routed to it and no others."""
        layer = self.layers.get(name)
        return layer is not None and layer.pool is not None


def _refuse(bad: Sequence[str]) -> None:
    if bad:
        raise CalibrationError(
            "activations are not finite",
            where=f"the input of {bad[0]}" + (f" and {len(bad) - 1} more" if len(bad) > 1 else ""),
            got="NaN or Inf",
            fix="load the model in float32 or bfloat16, and check the data and the weights",
        )


@contextmanager
def hooked(model: nn.Module, capture: Capture) -> Iterator[nn.Module]:
    """Hook the layers of `capture`, put the model in eval mode without gradients, undo both on any exit."""
    modes = [(module, module.training) for module in model.modules()]
    handles = []

    def hook_of(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            capture.see(name, args[0] if args else next(iter(kwargs.values())))

        return hook

    def experts_hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            capture.see_experts(name, module, args, kwargs)

        return hook

    try:
        stacked = {
            layer.stored[0].rpartition(".")[0] for layer in capture.layers.values() if layer.stored[1] is not None
        }
        handles += [
            model.get_submodule(name).register_forward_pre_hook(experts_hook_of(name), with_kwargs=True)
            for name in sorted(stacked)
        ]
        for name in (layer.name for layer in capture.layers.values() if layer.stored[1] is None):
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(hook_of(name), with_kwargs=True))
        model.eval()
        with torch.no_grad(), full_precision():
            yield model
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
