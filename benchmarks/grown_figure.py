"""Draw a comparison's learning-forgetting fronts as docs/pictures/NAME.svg: python benchmarks/grown_figure.py NAME.

A panel per group of retained sets. Every point is the mean over seeds of one method at one learning rate, a line joins
the points of a method that no other one of it beats on both sides.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from harness import RESULTS

from corda import artifact
from corda.comparing.fronts import Point, front

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
SHOWN = {
    "lora": ("LoRA", "#3f7fc1"),
    "lora_wd": ("LoRA + decay", "#5f9e2f"),
    "pissa": ("PiSSA", "#8a7d2c"),
    "milora": ("MiLoRA", "#7d7d7d"),
    "ipm": ("CorDA-IPM", "#c14f6d"),
    "kpm": ("CorDA-KPM", "#d0642b"),
    "kpm_plus": ("CorDA++ KPM", "#a867a5"),
    "contrast": ("contrast", "#2a977b"),
}
PANELS = (
    ("facts like those calibrated on", ("people/answer_loss",)),
    ("facts of other kinds", ("towns/answer_loss", "minerals/answer_loss")),
    ("stories", ("stories/perplexity",)),
)
PANEL, GAP, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 270, 58, 330, 56, 34, 58, 34


def main(name: str) -> None:
    """Read results/NAME.json, write the picture."""
    found = artifact.read_json(RESULTS / f"{name}.json")
    (PICTURES / f"{name}.svg").write_text(picture(found), encoding="utf-8")


def series(found: dict[str, Any], keeps: tuple[str, ...]) -> dict[str, list[Point]]:
    """Method -> a point per learning rate: task loss, mean rise of the retained scores."""
    learn, points = found["study"]["learn"], {}
    for method in SHOWN:
        by_rate = defaultdict(list)
        for run in found["runs"]:
            if run["method"] == method and run["status"] == "done":
                before, after = run["scores"]["before"], run["scores"]["after"]
                rise = sum(after[keep]["value"] - before[keep]["value"] for keep in keeps) / len(keeps)
                by_rate[run["learning_rate"]].append((after[learn]["value"], rise))
        points[method] = [Point(*(sum(v) / len(v) for v in zip(*some, strict=True)), r) for r, some in by_rate.items()]
    return {method: some for method, some in points.items() if some}


def picture(found: dict[str, Any]) -> str:
    """All panels side by side, the legend below."""
    width = LEFT + len(PANELS) * (PANEL + GAP)
    learn = found["study"]["learn"].partition("/")[0]
    style = "font:13px system-ui,sans-serif;fill:#6b6b6b"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT + LEGEND}" role="img" style="{style}">',
        f"<title>What is forgotten against what is learnt, by method; {learn} on the grown model</title>",
    ]
    for number, (title, keeps) in enumerate(PANELS):
        parts += panel(LEFT + number * (PANEL + GAP), title, learn, keeps, series(found, keeps))
    place = LEFT
    for method, (label, colour) in SHOWN.items():
        if any(run["method"] == method for run in found["runs"]):
            y = HEIGHT + LEGEND - 14
            parts.append(f'<circle cx="{place}" cy="{y - 4}" r="4" fill="{colour}"/>')
            parts.append(f'<text x="{place + 9}" y="{y}">{label}</text>')
            place += 30 + 7 * len(label)
    return "\n".join([*parts, "</svg>", ""])


def panel(x0: float, title: str, learn: str, keeps: tuple[str, ...], some: dict[str, list[Point]]) -> list[str]:
    """One panel, from its left edge on: points beyond the best-learnt LoRA's rise are cut off at the top."""
    known = [point for points in some.values() for point in points]
    low, high = min(p.learn for p in known), max(p.learn for p in known)
    best = min(some["lora"], key=lambda point: point.learn)
    top, bottom = 1.5 * best.rise, min(0.0, *(p.rise for p in known))
    high = min(high, max(2.2 * best.learn, best.learn + 0.4))
    height = HEIGHT - TOP - BOTTOM

    def x(value: float) -> float:
        return x0 + PANEL * (value - low) / (high - low)

    def y(value: float) -> float:
        return TOP + height * (1 - (value - bottom) / (top - bottom))

    unit = "perplexity" if keeps[0].endswith("perplexity") else "loss, nats per token"
    parts = [f'<text x="{x0}" y="{TOP - 16}" style="font-weight:600">{title}</text>']
    step = next(s for s in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if (top - bottom) / s <= 6)
    ticks = [i * step for i in range(int(bottom / step), int(top / step) + 1)]
    for tick in ticks:
        parts.append(f'<line x1="{x0}" x2="{x0 + PANEL}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#9993"/>')
        parts.append(f'<text x="{x0 - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    across = next(s for s in (0.05, 0.1, 0.2, 0.5, 1) if (high - low) / s <= 6)
    below = [i * across for i in range(int(low / across) + 1, int(high / across) + 1)]
    foot = HEIGHT - BOTTOM + 18
    parts += [f'<text x="{x(one):.1f}" y="{foot}" text-anchor="middle">{one:g}</text>' for one in below]
    middle = x0 + PANEL / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - BOTTOM + 38}" text-anchor="middle">loss on {learn}</text>')
    parts.append(f'<text x="{x0 + PANEL}" y="{TOP - 2}" text-anchor="end" style="font-size:11px">rise of {unit}</text>')
    clip = f"clip{x0:.0f}"
    parts.append(
        f'<clipPath id="{clip}"><rect x="{x0 - 4}" y="{TOP}" width="{PANEL + 8}" height="{height + 4}"/></clipPath>'
    )
    parts.append(f'<g clip-path="url(#{clip})">')
    for method, points in some.items():
        colour = SHOWN[method][1]
        line = " ".join(f"{x(p.learn):.1f},{y(p.rise):.1f}" for p in front(points))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(p.learn):.1f}" cy="{y(p.rise):.1f}" r="3.5" fill="{colour}"/>' for p in points]
    return [*parts, "</g>"]


if __name__ == "__main__":
    main(sys.argv[1])
