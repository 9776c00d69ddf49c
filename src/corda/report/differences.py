"""Which settings of several runs are not the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from corda.report.figures import Run
from corda.report.html import row, section, table

_APART = {"output_dir"}  # always differs and says nothing
_LONG = 120  # characters of a value


def differences_section(runs: Sequence[Run]) -> str:
    """A table of the recipes' keys that differ; empty for one run."""
    if len(runs) < 2:
        return ""
    flat = [flatten(run.results["recipe"]) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one if key.partition(".")[0] not in _APART)
    differing = [key for key in keys if len({json.dumps(one.get(key), sort_keys=True) for one in flat}) > 1]
    if not differing:
        return section("What differs", "<p>The recipes are the same.</p>")
    rows = [row(key, [f"<td>{_shown(one.get(key))}</td>" for one in flat]) for key in differing]
    return section("What differs", table(["setting", *[run.label for run in runs]], rows, numbers=False))


def flatten(raw: Mapping[str, Any], inside: str = "") -> dict[str, Any]:
    """Dotted keys to values that are no mappings.

    Args:
        raw: Mappings in mappings.
        inside: Dotted key of `raw` itself.
    """
    found: dict[str, Any] = {}
    for key, value in raw.items():
        full = f"{inside}.{key}" if inside else key
        found |= flatten(value, full) if isinstance(value, Mapping) and value else {full: value}
    return found


def _shown(value: Any) -> str:
    text = "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return escape(text if len(text) <= _LONG else f"{text[:_LONG]} …")
