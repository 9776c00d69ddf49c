"""A plan on the terminal: heat maps of module types by blocks, as wide as the terminal allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.text import Text

from corda.report.figures import excess, locate
from corda.report.table import own_parts, short_name

_LEVELS = "▁▂▃▄▅▆▇█"
_TAKEN = "●"
_NOTHING = "·"
_LOW, _HIGH = (0x3F, 0x7F, 0xC1), (0xD0, 0x64, 0x2B)  # both readable on light and on dark
_TICK = 5
_NAMED = 5


@dataclass(frozen=True)
class HeatMap:
    """One glyph for each row and column, in as many strips as the width asks for.

    Attributes:
        title: Printed above.
        rows: Labels.
        columns: Labels, of which every fifth is printed.
        cells: (row, column) -> glyph and colour; what is missing is drawn as a dot.
        legend: Printed below.
        ends: Row -> a text behind it, where there is room for all of them.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Mapping[tuple[str, str], tuple[str, str]]
    legend: Text
    ends: Mapping[str, str] = field(default_factory=dict)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        label = min(max(map(len, self.rows)), max(width // 2, 1))
        room = max(width - label - 1, 1)
        per = 2 if 2 * len(self.columns) <= room else 1
        strip = max(room // per, 1)
        end = max(map(len, self.ends.values()), default=0) + 1
        with_ends = per * len(self.columns) + end <= room
        yield Text(self.title, style="bold", no_wrap=True, overflow="fold")
        for start in range(0, len(self.columns), strip):
            part = self.columns[start : start + strip]
            yield Text(" " * (label + 1) + _ticks(part, per), style="dim", no_wrap=True)
            for row in self.rows:
                shown = row if len(row) <= label else "…" + row[len(row) - label + 1 :]
                line = Text(f"{shown:<{label}} ", no_wrap=True)
                for column in part:
                    glyph, colour = self.cells.get((row, column), (_NOTHING, ""))
                    line.append(
                        glyph.ljust(per) if glyph in {_TAKEN, _NOTHING} or glyph.isalnum() else glyph * per, colour
                    )
                if with_ends and row in self.ends:
                    line.append(f"{self.ends[row]:>{end}}", "dim")
                yield line
        yield self.legend

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)


def plan_overview(plan: Mapping[str, Any]) -> RenderableType:
    """A plan as JSON: ranks, log π and the candidates' scores of all layers, and what was set by hand."""
    layers = plan["layers"]
    name = short_name({"plan": plan})
    parts: list[RenderableType] = [
        Text(f"Plan: {name}, {len(layers)} layers, {plan['trainable_parameters']:,} trainable parameters")
    ]
    parts += ["", shaded("Rank, module type by block", [(layer["name"], layer["rank"]) for layer in layers], "{:.0f}")]
    surveyed = [(layer["name"], layer["log_pi"]) for layer in layers if layer["log_pi"] is not None]
    if surveyed:
        parts += ["", shaded("log π of the covariance taken, lower is more compact", surveyed, "{:.2f}")]
    if any(layer["scores"] for layer in layers):
        parts += ["", _candidates(layers), _rounds(layers)]
    floor = sum(layer["floor_decided"] for layer in layers)
    if floor:
        share = f"{floor} of {len(layers)} layers"
        parts.append(f"In {share} more than half of the smallest eigenvalue in π is damping: more tokens would help.")
    edited = [layer["name"] for layer in layers if layer["edited"]]
    if edited:
        more = f" and {len(edited) - _NAMED} more" if len(edited) > _NAMED else ""
        parts.append(f"Set by hand: {', '.join(edited[:_NAMED])}{more}.")
    return Group(*parts)


def shaded(title: str, values: Sequence[tuple[str, float]], form: str) -> HeatMap:
    """A heat map of one number for each layer.

    Args:
        title: Of the map.
        values: (full layer name, finite number) in module order.
        form: How a number is printed, e.g. "{:.2f}".
    """
    rows, columns, places = _grid([name for name, _ in values])
    low, high = min(v for _, v in values), max(v for _, v in values)
    cells = {place: _shade(value, low, high) for place, (_, value) in zip(places, values, strict=True)}
    ends = {}
    for row in rows:
        own = [value for (r, _), (_, value) in zip(places, values, strict=True) if r == row]
        least, most = form.format(min(own)), form.format(max(own))
        ends[row] = least if least == most else f"{least}–{most}"
    return HeatMap(title, rows, columns, cells, _scale(form.format(low), form.format(high)), ends)


def _candidates(layers: Sequence[Mapping[str, Any]]) -> HeatMap:
    rows, columns, places = _grid([layer["name"] for layer in layers])
    rounds = max(len(layer["scores"]) for layer in layers)
    above = {place: excess(layer["scores"]) for place, layer in zip(places, layers, strict=True) if layer["scores"]}
    high = max(max(values) for values in above.values())
    cells = {}
    for place, layer in zip(places, layers, strict=True):
        for k, value in enumerate(above.get(place, [])):
            taken = (_TAKEN, "bold")
            cells[f"{place[0]} {k}", place[1]] = taken if k == layer["chosen"] else _shade(value, 0, high)
    every = [f"{row} {k}" for row in rows for k in range(rounds)]
    legend = Text(f"{_TAKEN} taken  ")
    legend.append_text(_scale("0 %", f"{high:.1f} % above the layer's lowest score"))
    return HeatMap("Scores of the candidates, module type and round by block", every, columns, cells, legend)


def _rounds(layers: Sequence[Mapping[str, Any]]) -> Text:
    counts = Counter("all pooled" if layer["chosen"] is None else f"round {layer['chosen']}" for layer in layers)
    return Text("Taken: " + ", ".join(f"{name} in {counts[name]}" for name in sorted(counts)) + " layers.")


def _grid(names: Sequence[str]) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    """Module types, blocks, and the (module type, block) of every layer."""
    found = locate(names)
    modules, _ = own_parts([module for _, module in found])
    places = [(module, block) for module, (block, _) in zip(modules, found, strict=True)]
    blocks = sorted({block for _, block in places}, key=lambda b: (b == "-", int(b) if b != "-" else 0))
    return list(dict.fromkeys(module for module, _ in places)), blocks, places


def _shade(value: float, low: float, high: float) -> tuple[str, str]:
    share = (value - low) / (high - low) if high > low else 0.5
    colour = "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(_LOW, _HIGH, strict=True))
    return _LEVELS[min(int(share * len(_LEVELS)), len(_LEVELS) - 1)], colour


def _scale(low: str, high: str) -> Text:
    if low == high:
        glyph, colour = _shade(0, 0, 0)
        return Text.assemble((glyph, colour), f" {low} everywhere")
    text = Text()
    for level in range(len(_LEVELS)):
        text.append(*_shade(level, 0, len(_LEVELS) - 1))
    return Text.assemble(f"{low} ", text, f" {high}")


def _ticks(columns: Iterable[str], per: int) -> str:
    line = ""
    for i, column in enumerate(columns):
        numbered = not column.isdigit() or int(column) % _TICK == 0
        if numbered and len(line) <= i * per:
            line = line.ljust(i * per) + column + " "
    return line.rstrip()
