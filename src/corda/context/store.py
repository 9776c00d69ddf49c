"""The Context artifact: covariances by group, in memory or read lazily from disk."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from corda import artifact
from corda.context.accumulator import unpack_upper
from corda.context.capture import candidate
from corda.context.keeping import NotKept
from corda.errors import ArtifactError
from corda.journal import LazyTensors
from corda.targets import LayerSpec

HELD_OUT = "held_out"  # the side of knowledge that is not calibrated on, for the drift meter alone


@dataclass(frozen=True)
class Context:
    """What was collected: one second moment per distinct layer input.

    Attributes:
        layers: Every target layer that saw tokens, in module order.
        groups: Layer name -> group name; layers of a group share their input.
        tokens: Candidate -> number of tokens; a group's candidate of round 0 has the group's name.
        packed: Candidate -> packed upper triangle of C = X Xᵀ / T, fp32, in memory or read when asked for.
        warnings: What a person should know of the calibration, e.g. too few tokens.
        rounds: Candidates per group.
        sides: Whose the candidates behind those are, e.g. ("learn", "held_out"); see `side`.
    """

    layers: tuple[LayerSpec, ...]
    groups: Mapping[str, str]
    tokens: Mapping[str, int]
    packed: Mapping[str, Tensor]
    warnings: tuple[str, ...] = ()
    rounds: int = 1
    sides: tuple[str, ...] = ()

    def covariance(self, layer: str, round_: int | None = 0) -> Tensor:
        """C of a layer's input, (d_in, d_in) fp32, symmetric.

        Args:
            layer: Full name.
            round_: Which candidate; None for all of them pooled.

        An expert that no token was routed to has C = 0; see `pooled`.

        Raises:
            ArtifactError: the layer was not collected.
        """
        spec = self._specs.get(layer)
        if spec is None or layer not in self.groups:
            raise ArtifactError("the context has no covariance for a layer", where=layer, fix="collect again")
        return self._mean([layer], spec.d_in, round_)

    def pooled(self, pool: str, round_: int | None = 0) -> Tensor:
        """C over the tokens of all collected experts of one projection, (d_in, d_in) fp32.

        For experts that see what the router sees, and all of which were collected, it is the covariance of the shared
        input, because every token goes to the same number of experts.

        Args:
            pool: Name of the pool.
            round_: Number of the round; None: all of them.
        """
        return self._pooled(pool, round_)

    def token_count(self, layer: str, round_: int | None = 0) -> int:
        """Tokens behind a layer's candidate, or behind all of them together.

        Args:
            layer: Full dotted name.
            round_: Number of the round; None: all of them.
        """
        return sum(self.tokens.get(key, 0) for key in self._candidates(layer, round_))

    def spec(self, layer: str) -> LayerSpec:
        """The layer of that name."""
        return self._specs[layer]

    @cached_property
    def _pooled(self) -> Callable[[str, int | None], Tensor]:
        """The last few are kept: experts of one projection ask for the same one after the other."""

        @lru_cache(maxsize=4)
        def pooled(pool: str, round_: int | None) -> Tensor:
            members = [layer for layer in self.layers if layer.pool == pool]
            return self._mean([layer.name for layer in members], members[0].d_in, round_)

        return pooled

    @cached_property
    def _specs(self) -> dict[str, LayerSpec]:
        return {layer.name: layer for layer in self.layers}

    def _candidates(self, layer: str, round_: int | None) -> list[str]:
        return [candidate(self.groups[layer], r) for r in (range(self.rounds) if round_ is None else [round_])]

    def _mean(self, layers: Sequence[str], width: int, round_: int | None) -> Tensor:
        """Σ T C / Σ T over the candidates of some layers, those without tokens left out."""
        keys = [key for layer in layers for key in self._candidates(layer, round_) if self.tokens.get(key, 0)]
        if len(keys) == 1:
            return unpack_upper(self.packed[keys[0]], width)
        total = sum(self.tokens[key] for key in keys)
        mean = torch.zeros(())
        for key in keys:
            mean = mean + self.tokens[key] / total * self.packed[key]
        return unpack_upper(mean, width) if keys else torch.zeros(width, width)

    def side(self, name: str) -> Context:
        """Another source's covariances, collected in the same run, as a context of its own; read when asked for.

        Raises:
            ArtifactError: there is no such source.
        """
        own = [self.rounds + i for i, one in enumerate(self.sides) if one == name]
        groups = dict.fromkeys(self.groups.values())
        names = {candidate(g, i): candidate(g, r) for g in groups for i, r in enumerate(own)}
        names = {new: old for new, old in names.items() if old in self.tokens}
        if not names:
            raise ArtifactError(
                "the context lacks a source",
                where=name,
                got=", ".join(dict.fromkeys(self.sides)) or "one source",
                fix="collect again, with both data.learn and data.keep",
            )
        layers = tuple(layer for layer in self.layers if layer.pool is not None or self.groups[layer.name] in names)
        of = {layer.name: self.groups[layer.name] for layer in layers}
        tokens = {new: self.tokens[old] for new, old in names.items()}
        return Context(layers, of, tokens, _Renamed(self.packed, names), (), len(own))

    def members(self) -> dict[str, list[LayerSpec]]:
        """Group name -> its layers, both in module order."""
        members: dict[str, list[LayerSpec]] = {}
        for layer in self.layers:
            members.setdefault(self.groups[layer.name], []).append(layer)
        return members


class _Renamed(Mapping[str, Tensor]):
    """Some tensors of another mapping under other names."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def save(
    context: Context,
    folder: Path,
    fingerprint: str,
    extra: Mapping[str, Any],
    seconds: float = 0.0,
    *,
    kept: bool = True,
) -> Context:
    """Write a context and return it as read from disk. Parts that are on disk already are linked, not copied.

    Args:
        context: What was collected.
        folder: Where to.
        fingerprint: Of everything it depends on.
        extra: More for the manifest.
        seconds: Spent on writing already, for the parts that are on disk.
        kept: Covariances are written too; without, what they were of is.

    Raises:
        ResourceError: not enough space.
    """
    lazy = context.packed if isinstance(context.packed, LazyTensors) else None
    size = 0 if lazy or not kept else sum(4 * tensor.numel() for tensor in context.packed.values())
    started = time.perf_counter()
    with artifact.writing(folder, "context", fingerprint, size=size) as (temporary, manifest):
        shards: dict[str, str] = {}
        if kept and lazy:
            for place in sorted(set(lazy.places.values())):
                _link(place, temporary / place.name)
            shards = {group: place.name for group, place in lazy.places.items()}
        elif kept:
            save_file(dict(context.packed), temporary / "covariances.safetensors")
            shards = dict.fromkeys(context.packed, "covariances.safetensors")
        manifest.update(
            layers=[layer.as_json() for layer in context.layers],
            groups=dict(context.groups),
            tokens=dict(context.tokens),
            shards=shards,
            warnings=list(context.warnings),
            rounds=context.rounds,
            sides=list(context.sides),
            kept=kept,
            write_seconds=seconds + time.perf_counter() - started,
            **extra,
        )
    return load(artifact.read(folder, "context", verify=False))


def load(found: artifact.Artifact) -> Context:
    """A context that reads its covariances from disk when asked; one that has none there says so when asked."""
    manifest = found.manifest
    layers = tuple(LayerSpec(**layer) for layer in manifest["layers"])
    packed: Mapping[str, Tensor] = NotKept(manifest["tokens"])
    if manifest.get("kept", True):
        packed = LazyTensors({group: found.path(name) for group, name in manifest["shards"].items()})
    return Context(
        layers,
        manifest["groups"],
        manifest["tokens"],
        packed,
        tuple(manifest["warnings"]),
        manifest["rounds"],
        tuple(manifest.get("sides", ())),
    )


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
