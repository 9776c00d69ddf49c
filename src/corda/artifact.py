"""Artifacts: a folder per stage with safetensors, JSON and a manifest, written whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from corda import disk
from corda.disk import TEMPORARY
from corda.errors import ArtifactError, ResourceError

SCHEMA = 1
MANIFEST = "manifest.json"
OWNER = "run.json"
_SEAL = "sha256"
_SPARE = 1 << 20  # bytes of disk left alone
_BY_HAND = {  # what a person who edited an artifact's file may have been after
    "plan": "to edit a plan, change what `corda plan RECIPE --save-ranks FILE` writes and set adapter.ranks: FILE",
}
_PACKAGES = ("corda-adapt", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "numpy")


@dataclass(frozen=True)
class Artifact:
    """A finished stage: its folder and manifest.

    Attributes:
        folder: Where its files lie.
        kind: Which stage wrote it, e.g. "context".
        fingerprint: Hash of everything the content depends on.
        manifest: The whole manifest (schema, kind, fingerprint, parents, files, provenance, and the stage's own).
    """

    folder: Path
    kind: str
    fingerprint: str
    manifest: Mapping[str, Any]

    def path(self, name: str) -> Path:
        """Full path of one of its files."""
        return self.folder / name


def fingerprint(*parts: Any) -> str:
    """Hash JSON-compatible parts; key order does not matter. 16 hex digits."""
    text = json.dumps([SCHEMA, *parts], sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def provenance(device: Any = None) -> dict[str, Any]:
    """Versions, machine and time that a result was made with; no path and no host name.

    Args:
        device: A torch.device that it was computed on; None: the GPU where there is one.
    """
    import torch

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available() and (device is None or device.type == "cuda")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": versions,
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
    }


@contextmanager
def claimed(folder: Path, identity: Mapping[str, Any]) -> Iterator[None]:
    """Hold a run's folder, locked against other processes.

    Args:
        folder: Created where it does not exist.
        identity: What makes it this run's; kept in its run.json.

    Raises:
        ArtifactError: the folder is another run's, holds something else, or is in use.
        ResourceError: no space, or it cannot be written.
    """
    owner = folder / OWNER
    _refuse_foreign(folder, identity)
    need_disk(folder, 1 << 20)
    make_folder(folder)
    with disk.explained(folder), (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(
                "output_dir is in use by another process",
                where=str(folder),
                fix="wait until that run has ended, or name another output_dir",
            ) from None
        _refuse_foreign(folder, identity)  # once more: it may have changed before the lock was ours
        for leftover in folder.glob(f"{TEMPORARY}*"):  # of killed processes
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
        if not owner.is_file() or read_json(owner) != dict(identity):
            write_json(owner, dict(identity))
        yield


def _refuse_foreign(folder: Path, identity: Mapping[str, Any]) -> None:
    owner = folder / OWNER
    if not folder.is_dir() or all(p.name == ".lock" or p.name.startswith(TEMPORARY) for p in folder.iterdir()):
        return
    if not owner.is_file():
        raise ArtifactError(
            "output_dir holds files that are not a run's", where=str(folder), fix="name another output_dir"
        )
    other = read_json(owner)
    changed = [key for key in identity if other.get(key) != identity[key]]
    if changed:
        raise ArtifactError(
            "output_dir belongs to another run",
            where=str(folder),
            got=", ".join(f"{key} {other.get(key)!r}" for key in changed),
            expected=", ".join(f"{key} {identity[key]!r}" for key in changed),
            fix="name another output_dir",
        )


def need_disk(folder: Path, size: int, otherwise: str = "") -> None:
    """Refuse early when a write of `size` bytes cannot fit; `otherwise` is one more way out, for the message.

    Args:
        folder: Where the write goes.
        size: Bytes.
        otherwise: One more way out, for the message.

    Raises:
        ResourceError: with the free and the needed space.
    """
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < size * 1.05 + _SPARE:
        raise ResourceError(
            "not enough disk space",
            where=str(folder),
            got=f"{free / 1e9:.2f} GB free",
            expected=f"about {size / 1e9:.2f} GB",
            fix="free some space or set output_dir to another disk" + (f", or {otherwise}" if otherwise else ""),
        )


@contextmanager
def writing(
    folder: Path,
    kind: str,
    fingerprint: str,
    parents: Mapping[str, str] | None = None,
    size: int = 0,
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Write an artifact atomically: yields (temporary folder, dict of manifest fields to add to).

    The folder appears under its own name only when the body ended without an exception, with every file hashed
    in its manifest and on disk; until then a reader sees the old artifact or none.

    Args:
        folder: Final place; an older artifact there is replaced at the end.
        kind: Stage name.
        fingerprint: Of everything the content depends on.
        parents: Fingerprints of the artifacts it was made from, by kind.
        size: Bytes expected, checked against the free disk first.

    Raises:
        ResourceError: no space, or the place cannot be written.
    """
    need_disk(folder, size)
    make_folder(folder.parent)
    with disk.explained(folder.parent):
        temporary = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{folder.name}.", dir=folder.parent))
    what = {"kind": kind, "fingerprint": fingerprint, "parents": dict(parents or {})}
    extra: dict[str, Any] = {}
    try:
        with disk.explained(folder):
            yield temporary, extra
            _finish(temporary, folder, what, extra)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _finish(temporary: Path, folder: Path, what: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
    files = sorted(p for p in temporary.rglob("*") if p.is_file())
    hashes = {str(p.relative_to(temporary)): {"bytes": p.stat().st_size, "sha256": file_hash(p)} for p in files}
    write_manifest(temporary, {"schema": SCHEMA, **what, "files": hashes, "provenance": provenance(), **extra})
    disk.sync_tree(temporary)
    _replace(temporary, folder)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write an artifact's manifest with a hash of its own content.

    Args:
        folder: The artifact's.
        manifest: All its entries.
    """
    content = {key: value for key, value in manifest.items() if key != _SEAL}
    write_json(folder / MANIFEST, {**content, _SEAL: seal(content)})


def seal(value: Any) -> str:
    """sha256 of a JSON value, as hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read(folder: Path, kind: str, *, verify: bool = True) -> Artifact:
    """Open an artifact and check that it is whole.

    Args:
        folder: Where it lies.
        kind: What it has to be.
        verify: Compare the files' hashes too.

    Raises:
        ArtifactError: none there, of another kind or schema, or a file that is missing or changed.
    """
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"there is no {kind} here", where=str(folder), fix=f"run the {kind} stage")
    manifest = read_json(folder / MANIFEST)
    sealed = manifest.pop(_SEAL, None)
    if sealed is not None and sealed != seal(manifest):
        raise _corrupt(folder / MANIFEST, "was changed after it was written", _BY_HAND.get(kind))
    whole = {"kind", "schema", "fingerprint", "files"} <= set(manifest)
    if not whole or manifest["kind"] != kind or manifest["schema"] != SCHEMA:
        raise ArtifactError(
            "a foreign artifact lies here",
            where=str(folder),
            got=f"{manifest.get('kind', 'nothing of ours')}, schema {manifest.get('schema')}",
            expected=f"{kind}, schema {SCHEMA}",
            fix="name another output_dir, or remove the folder",
        )
    if verify:
        for name, facts in manifest["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != facts["bytes"]:
                raise _corrupt(folder / name, "is missing or of another size", _BY_HAND.get(kind))
            if file_hash(path) != facts["sha256"]:
                raise _corrupt(folder / name, "was changed after it was written", _BY_HAND.get(kind))
    return Artifact(folder, kind, manifest["fingerprint"], manifest)


def reusable(folder: Path, kind: str, fingerprint: str) -> Artifact | None:
    """The artifact at `folder` if it is whole and has this fingerprint, None if there is none or it is outdated.

    Args:
        folder: Where it may lie.
        kind: What it has to be.
        fingerprint: Of all that it has to depend on.

    Raises:
        ArtifactError: the folder holds something corrupted or foreign, which is never silently overwritten.
    """
    if not folder.exists():
        return None
    artifact = read(folder, kind)
    return artifact if artifact.fingerprint == fingerprint else None


def make_folder(folder: Path) -> None:
    """Create a folder and its parents.

    Raises:
        ResourceError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            "the output folder cannot be written", where=str(folder), got=error, fix="set output_dir to another place"
        ) from None


def copy(found: Artifact, folder: Path) -> Artifact:
    """The same artifact at another place; on one disk its files are shared, not doubled: they never change.

    Args:
        found: What to copy.
        folder: Where to.
    """
    _replace(_beside(found, folder), folder)
    return read(folder, found.kind, verify=False)


def offer(found: Artifact, folder: Path) -> None:
    """`copy` to a place where others may be putting the same artifact at this moment: the first one stays.

    Args:
        found: What to copy.
        folder: Where to; its parent is made.
    """
    if folder.exists():
        return
    make_folder(folder.parent)
    temporary = _beside(found, folder)
    try:
        temporary.replace(folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.is_dir():
            raise
    disk.sync(folder.parent)


def _beside(found: Artifact, folder: Path) -> Path:
    """The artifact under a temporary name in the folder's parent, on disk."""
    temporary = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{folder.name}.", dir=folder.parent))
    shutil.copytree(found.folder, temporary, dirs_exist_ok=True, copy_function=_linked)
    disk.sync_tree(temporary)
    return temporary


def _linked(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, in one fixed layout, so that equal values are equal bytes.

    Args:
        path: The file.
        value: Anything that JSON can hold.
    """
    disk.write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read one of corda's own JSON files.

    Raises:
        ArtifactError: it is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise _corrupt(path, "is not JSON") from None
    if not isinstance(value, dict):
        raise _corrupt(path, "is not a JSON object")
    return value


def _corrupt(path: Path, what: str, otherwise: str | None = None) -> ArtifactError:
    stage = (path.parent / MANIFEST).is_file()
    fix = f"remove {path.parent.name} and run the stage again" if stage else f"remove {path.name} and run again"
    if path.name == OWNER:
        fix = "name another output_dir, or remove this one"
    fix += f"; {otherwise}" if otherwise else ""
    return ArtifactError(f"a corrupted artifact: {path.name} {what}", where=str(path.parent), fix=fix)


def _replace(temporary: Path, folder: Path) -> None:
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{folder.name}.old.", dir=folder.parent))
        folder.replace(old / folder.name)
        temporary.replace(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.replace(folder)
    disk.sync(folder.parent)
