"""Finished parts of a stage that is under way, so that an interrupted stage continues at the next part."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from corda import artifact, disk

_log = logging.getLogger(__name__)


class Journal:
    """A folder of parts, each a safetensors file with facts beside it, valid for one fingerprint.

    A part counts once its facts are there, which are written last and hold their own hash and the tensors'. A part
    that was cut off is done again, as is one that was changed, which is logged. Parts of another fingerprint are
    removed.

    Args:
        folder: Where the parts are.
        fingerprint: What they depend on.
        made: Another process of the run has made the journal.

    Attributes:
        folder: Where the parts are.
        seconds: Time that this process has spent on writing them.
    """

    def __init__(self, folder: Path, fingerprint: str, *, made: bool = False) -> None:
        self.folder = folder
        self.seconds = 0.0
        if made:
            return
        owner = folder / "journal.json"
        known = artifact.read_json(owner) if owner.is_file() else None
        if known != {"fingerprint": fingerprint}:
            shutil.rmtree(folder, ignore_errors=True)
            artifact.make_folder(folder)
            artifact.write_json(owner, {"fingerprint": fingerprint})
        for leftover in folder.glob(f"{disk.TEMPORARY}*"):  # of a killed process
            leftover.unlink(missing_ok=True)

    def facts(self, key: str, *, verify: bool = True) -> dict[str, Any] | None:
        """What was noted with a finished part, None if it is not finished; without `verify` its tensors are trusted.

        Args:
            key: The part's name.
            verify: Compare the hash of its tensors too.
        """
        book = self.folder / f"{key}.json"
        if not book.is_file():
            return None
        try:
            noted = json.loads(book.read_text(encoding="utf-8"))
            sealed = noted.pop("seal")
            whole = sealed == artifact.seal(noted)
            whole = whole and (not verify or noted["sha256"] == artifact.file_hash(self.path(key)))
        except (OSError, ValueError, KeyError, AttributeError):
            whole = False
        if not whole:
            _log.warning("%s in %s was changed after it was written: this part is done again", key, self.folder)
            return None
        facts: dict[str, Any] = noted["facts"]
        return facts

    def path(self, key: str) -> Path:
        """The part's tensors."""
        return self.folder / f"{key}.safetensors"

    def put(self, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Note a finished part.

        Args:
            key: The part's name.
            tensors: Name -> tensor.
            facts: What to note with it, as JSON.

        Raises:
            ResourceError: not enough space, or the folder cannot be written.
        """
        started = time.perf_counter()
        artifact.need_disk(self.folder, sum(t.numel() * t.element_size() for t in tensors.values()))
        with disk.explained(self.folder):
            temporary = self.folder / f"{disk.TEMPORARY}{key}.{os.getpid()}"
            save_file(dict(tensors), temporary)
            disk.sync(temporary)
            temporary.replace(self.path(key))
            noted = {"sha256": artifact.file_hash(self.path(key)), "facts": dict(facts)}
            artifact.write_json(self.folder / f"{key}.json", {**noted, "seal": artifact.seal(noted)})
        self.seconds += time.perf_counter() - started

    def remove(self) -> None:
        """Drop what is left, the stage being finished."""
        shutil.rmtree(self.folder, ignore_errors=True)


def discard(folder: Path) -> None:
    """Remove the journal of a stage that was finished by a process that was killed before it could."""
    shutil.rmtree(folder, ignore_errors=True)


class LazyTensors(Mapping[str, Tensor]):
    """Tensors of several safetensors files, each read when asked for.

    Attributes:
        places: Name -> file.
    """

    def __init__(self, places: Mapping[str, Path]) -> None:
        self.places = dict(places)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.places[name], framework="pt") as stream:
            tensor = stream.get_tensor(name)
            assert isinstance(tensor, Tensor)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def merged(parts: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """One mapping of tensors of any shape out of several with distinct names; lazy if all of them are."""
    if all(isinstance(part, LazyTensors) for part in parts):
        return LazyTensors({n: p for part in parts if isinstance(part, LazyTensors) for n, p in part.places.items()})
    return {name: part[name] for part in parts for name in part}
