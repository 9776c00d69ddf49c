"""What cache_file and covariance_file hold, and whether it was made for what is wanted now."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corda import artifact
from corda.errors import ArtifactError, ResourceError
from corda.recipe import AdapterOptions

Facts = Mapping[str, Mapping[str, Any]]

_SAMPLED = 4096


@dataclass(frozen=True)
class Kept:
    """One of the two, a folder of safetensors with a manifest.

    Attributes:
        option: Its name in CordaConfig.
        kind: Of the artifact in it.
        folder: Where the user wants it; None for nowhere.
        made_for: What its content has to agree with: facts that all layers have in common, and facts of each layer.
    """

    option: str
    kind: str
    folder: Path | None
    made_for: Facts

    @property
    def fingerprint(self) -> str:
        """Hash of `made_for`."""
        return artifact.fingerprint(self.kind, self.made_for)

    def found(self) -> artifact.Artifact | None:
        """What is there, None if nothing is.

        Raises:
            ArtifactError: a file, something foreign or corrupted, or made for something else.
        """
        folder = self.folder
        if folder is None or not folder.exists() or _empty(folder):
            return None
        if not (folder / artifact.MANIFEST).is_file():
            raise ArtifactError(
                f"{self.option} is something that corda did not write, and is not opened",
                where=str(folder),
                got="a file, perhaps one of torch.save, which can run code when loaded"
                if folder.is_file()
                else "a folder of other files",
                expected="a folder from an earlier call, or nothing yet",
                fix=f"name another {self.option}",
            )
        found = artifact.read(folder, self.kind)
        differences = list(_differences(found.manifest.get("made_for", {}), self.made_for))
        if differences:
            raise ArtifactError(
                f"{self.option} was made for something else",
                where=str(folder),
                got=_few([got for got, _ in differences]),
                expected=_few([expected for _, expected in differences]),
                fix=f"name another {self.option}, or remove this one to have it made again",
            )
        return found

    def prepare(self, size: int = 0) -> None:
        """Create its parent folders, and see before the work that `size` bytes can be written.

        Raises:
            ResourceError: they cannot.
        """
        if self.folder is None:
            return
        parent = self.folder.absolute().parent
        artifact.make_folder(parent)
        if not os.access(parent, os.W_OK):
            raise ResourceError(f"{self.option} cannot be written", where=str(parent), fix="name another place")
        artifact.need_disk(parent, size)


def of_covariances(weights: Mapping[str, str]) -> Facts:
    """What covariances depend on; which data they come from is not known.

    Args:
        weights: Layer name -> digest.
    """
    return {"common": {}, "layers": {name: {"weights": digest} for name, digest in weights.items()}}


def of_factors(weights: Mapping[str, str], ranks: Mapping[str, int], options: AdapterOptions) -> Facts:
    """What factors depend on besides covariances.

    Args:
        weights: Layer name -> digest.
        ranks: Layer name -> rank.
        options: Their mode is PEFT's corda_method.
    """
    common = {"corda_method": options.mode, "damp": options.damp, "exponent": options.exponent}
    layers = {name: {"rank": ranks[name], "weights": digest} for name, digest in weights.items()}
    return {"common": common | {"balance": options.balance}, "layers": layers}


def digest(weight: Tensor) -> str:
    """Hash of 4,096 entries of a weight of any shape, 16 hex digits; the same in every dtype that holds its values."""
    flat = weight.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, min(_SAMPLED, flat.numel()), dtype=torch.float64).long()
    values = flat[places.to(flat.device)].float().cpu().contiguous()
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]


def _empty(path: Path) -> bool:
    return path.stat().st_size == 0 if path.is_file() else not any(path.iterdir())


def _differences(other: Facts, wanted: Facts) -> Iterator[tuple[str, str]]:
    """(what was found, what is wanted) for each fact that does not agree; layers that are not wanted do not matter."""
    for key, value in wanted["common"].items():
        known = other.get("common", {}).get(key)
        if known != value:
            yield f"{key} {known!r}", f"{key} {value!r}"
    for name, facts in wanted["layers"].items():
        layer = other.get("layers", {}).get(name)
        if layer is None:
            yield f"no layer {name}", f"layer {name}"
            continue
        for key, value in facts.items():
            if layer.get(key) != value:
                yield f"{key} {layer.get(key)} in {name}", f"{key} {value}"


def _few(parts: Sequence[str]) -> str:
    return "; ".join(parts[:3]) + (f"; and {len(parts) - 3} more" if len(parts) > 3 else "")
