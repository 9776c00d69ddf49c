"""The parts that pages are made of: sections, tables, figures, and the self-contained document around them."""

from __future__ import annotations

import base64
import gzip
import os
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from corda import artifact


def write_document(path: Path, title: str, body: Sequence[str]) -> None:
    """Write one HTML file with style, script and plotly in it; it appears whole or not at all.

    Args:
        path: The file.
        title: Escaped already.
        body: HTML, part by part.

    Raises:
        ResourceError: no space, or the folder cannot be made.
    """
    template, style, script = (
        files("corda.report").joinpath(name).read_text(encoding="utf-8")
        for name in ("page.html", "style.css", "page.js")
    )
    text = Template(template).substitute(
        title=title, style=style, body="\n".join(body), plotly=_packed(get_plotlyjs()), script=script
    )
    artifact.need_disk(path.parent, len(text))
    artifact.make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _packed(script: str) -> str:
    """gzip in base64: a good third of the size; page.js unpacks it."""
    return base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode()


def section(title: str, *parts: str) -> str:
    """A heading and what belongs to it."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def table(head: Sequence[str], rows: Sequence[str], *, numbers: bool = True) -> str:
    """A table that scrolls where it is too wide; `numbers` right-aligns all heads but the first.

    Args:
        head: Titles of the columns.
        rows: From `row`.
        numbers: Whether they are numbers.
    """
    kind = ' class="number"' if numbers else ""
    cells = "".join(f"<th{kind if i else ''}>{escape(text)}</th>" for i, text in enumerate(head))
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def row(name: str, cells: Sequence[str]) -> str:
    """A row of `table`.

    Args:
        name: Its head.
        cells: HTML of the others.
    """
    return f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>"


def cell(content: str) -> str:
    """A right-aligned cell of HTML."""
    return f'<td class="number">{content}</td>'


def figure(name: str, drawn: go.Figure, caption: str) -> str:
    """A plotly figure under an id of its own; page.js draws it.

    Args:
        name: The id.
        drawn: What to draw.
        caption: Text below it.
    """
    plot = f'<div id="{name}" data-figure="{name}-data" style="min-height:{drawn.layout.height}px"></div>'
    return f"<figure>{plot}<figcaption>{escape(caption)}</figcaption></figure>{data(f'{name}-data', drawn.to_json())}"


def data(name: str, text: str) -> str:
    """JSON for page.js.

    Args:
        name: The id.
        text: JSON.
    """
    safe = text.replace("<", "\\u003c")  # so that no content can end the script element
    return f'<script type="application/json" id="{name}">{safe}</script>'
