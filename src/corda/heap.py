"""Memory that was freed goes back to the system, so that a peak does not grow with the number of layers."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def give_back() -> bool:
    """Let the C library return whole free pages; True if it could, as glibc can.

    Factors that are kept lie between workspaces that were freed, and glibc keeps the holes, more of them with every
    layer.
    """
    trim = _trim()
    return trim is not None and bool(trim(0))


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS; Windows
        return None
