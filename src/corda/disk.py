"""What is on the disk for good, and what a disk's own errors mean."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from corda.errors import CordaError, ResourceError

TEMPORARY = ".corda."
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_BARRED = {errno.EACCES, errno.EPERM, errno.EROFS}
# Libraries that write through C++ or Rust put the system's message into errors of their own.
_FULL_WORDS = ("No space left", "File too large", "quota exceeded", "PytorchStreamWriter failed")
_BARRED_WORDS = ("Permission denied", "Read-only file system", "Operation not permitted")


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until every file and folder below `folder`, and its own entries, are on the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content; whatever happens, the old or the new content is there, whole.

    Args:
        path: The file.
        text: Its new content.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Inside, a full disk or a file that cannot be written is a ResourceError, whatever library met it.

    Args:
        folder: Named where the error itself names no file.

    Raises:
        ResourceError: see above.
    """
    try:
        yield
    except CordaError:
        raise
    except Exception as error:
        found = _meaning(error, folder)
        if found is None:
            raise
        raise found from error


def _meaning(error: BaseException | None, folder: Path) -> ResourceError | None:
    seen = 0
    while error is not None and seen < 10:
        number = getattr(error, "errno", None) if isinstance(error, OSError) else None
        where = str(getattr(error, "filename", None) or folder)
        text = str(error).partition("\n")[0]
        if number in _FULL or any(words in text for words in _FULL_WORDS):
            return ResourceError(
                "the disk is full", where=where, got=text, fix="free some space and run the same command again"
            )
        if number in _BARRED or any(words in text for words in _BARRED_WORDS):
            return ResourceError(
                "a file cannot be read or written",
                where=where,
                got=text,
                fix="change the permissions, or set output_dir to another place",
            )
        hidden = None if error.__suppress_context__ else error.__context__
        error, seen = error.__cause__ or hidden, seen + 1
    return None
