"""YAML of options with their own help, and notes of why, as comments."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel

_WIDTH = 120


def commented(
    values: Mapping[str, Any], block: type[BaseModel], notes: Mapping[str, str], *, inside: str = "", indent: int = 0
) -> list[str]:
    """Lines of YAML with the recipe's own help, and notes of why, behind each key.

    Args:
        values: What to write, in this order.
        block: The options that they belong to, for their descriptions.
        notes: Full dotted key -> why it has this value.
        inside: The dotted key of `values` itself.
        indent: Spaces in front of each line.
    """
    lines: list[str] = []
    pad = " " * indent
    for key, value in values.items():
        full = f"{inside}.{key}" if inside else key
        field = block.model_fields[key]
        below = _block_of(field.annotation) if isinstance(value, dict) else None
        help_ = field.description
        if below is None:
            note = notes.get(full)
            comment = f"{help_} ({note})" if help_ and note else help_ or note
            lines += _line(f"{pad}{key}: {_flow(value)}", comment, pad)
        elif get_origin(field.annotation) is dict:  # of tasks, each under its name
            lines.append(f"{pad}{key}:")
            for name, options in value.items():
                lines += _line(f"{pad}  {name}:", notes.get(f"{full}.{name}"), pad)
                lines += commented(options, below, notes, inside=f"{full}.{name}", indent=indent + 4)
        elif indent:
            lines += _line(f"{pad}{key}: {_flow(value)}", notes.get(full), pad)
        else:
            doc = (below.__doc__ or "").splitlines()[0]
            lines += ["", *_line(f"{key}:", doc, "")]
            lines += commented(value, below, notes, inside=full, indent=2)
    return lines


def _block_of(annotation: Any) -> type[BaseModel] | None:
    parts = [annotation, *get_args(annotation)]
    return next((one for one in parts if isinstance(one, type) and issubclass(one, BaseModel)), None)


def _line(text: str, comment: str | None, pad: str) -> list[str]:
    if not comment:
        return [text]
    if len(text) + len(comment) + 4 <= _WIDTH:
        return [f"{text}  # {comment}"]
    return [*textwrap.wrap(comment, _WIDTH, initial_indent=f"{pad}# ", subsequent_indent=f"{pad}#   "), text]


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
