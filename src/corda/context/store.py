"""The Context artifact: covariances by group, in memory or read lazily from disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from corda import artifact
from corda.context.accumulator import pack_upper, unpack_upper
from corda.errors import ArtifactError
from corda.targets import LayerSpec

_FILE = "covariances.safetensors"


@dataclass(frozen=True)
class Context:
    """What was collected: one second moment per distinct layer input.

    Attributes:
        layers: Every target layer that saw tokens, in module order.
        groups: Layer name -> group name; layers of a group share their input.
        tokens: Group name -> number of tokens.
        packed: Group name -> upper triangle of C = X Xᵀ / T, d(d+1)/2 fp32; empty when read from `folder`.
        folder: Artifact to read from lazily, or None.
        warnings: What a person should know of the calibration, e.g. too few tokens.
    """

    layers: tuple[LayerSpec, ...]
    groups: Mapping[str, str]
    tokens: Mapping[str, int]
    packed: Mapping[str, Tensor]
    folder: Path | None = None
    warnings: tuple[str, ...] = ()

    def covariance(self, layer: str) -> Tensor:
        """C of a layer's input, (d_in, d_in) fp32, symmetric.

        Raises:
            ArtifactError: the layer was not collected.
        """
        group = self.groups.get(layer)
        spec = next((s for s in self.layers if s.name == layer), None)
        if group is None or spec is None:
            raise ArtifactError("the context has no covariance for a layer", where=layer, fix="collect again")
        return unpack_upper(self._packed(group), spec.d_in)

    def members(self) -> dict[str, list[LayerSpec]]:
        """Group name -> its layers, both in module order."""
        members: dict[str, list[LayerSpec]] = {}
        for layer in self.layers:
            members.setdefault(self.groups[layer.name], []).append(layer)
        return members

    def _packed(self, group: str) -> Tensor:
        if self.folder is None:
            return self.packed[group]
        with safe_open(self.folder / _FILE, framework="pt") as stream:
            tensor = stream.get_tensor(group)
            assert isinstance(tensor, Tensor)
            return tensor


def packed_covariance(total: Tensor, tokens: int) -> Tensor:
    """Packed C = total / tokens on the CPU."""
    return (pack_upper(total) / tokens).cpu()


def save(context: Context, folder: Path, fingerprint: str, extra: Mapping[str, Any]) -> Context:
    """Write a context and return it as read from disk.

    Raises:
        ResourceError: not enough space.
    """
    size = sum(4 * tensor.numel() for tensor in context.packed.values())
    with artifact.writing(folder, "context", fingerprint, size=size) as (temporary, manifest):
        save_file(dict(context.packed), temporary / _FILE)
        manifest.update(
            layers=[layer.as_json() for layer in context.layers],
            groups=dict(context.groups),
            tokens=dict(context.tokens),
            warnings=list(context.warnings),
            **extra,
        )
    return load(artifact.read(folder, "context", verify=False))


def load(found: artifact.Artifact) -> Context:
    """A context that reads its covariances from disk when asked."""
    manifest = found.manifest
    layers: Sequence[LayerSpec] = [LayerSpec(**layer) for layer in manifest["layers"]]
    return Context(tuple(layers), manifest["groups"], manifest["tokens"], {}, found.folder, tuple(manifest["warnings"]))
