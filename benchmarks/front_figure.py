"""Draw a comparison's learning-forgetting fronts as docs/pictures/NAME.svg: python benchmarks/front_figure.py NAME.

A panel per group of retained sets, how much their loss per token rose on y. Every point is the mean over seeds of one
method at one learning rate, a line joins the points of a method that no other one of it beats on both sides. Where a
method learnt much less than on any such line its point is left out.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from harness import RESULTS

from corda import artifact
from corda.comparing.fronts import Point, front
from corda.comparing.fronts import points as found_points

Panels = tuple[tuple[str, tuple[str, ...]], ...]
PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
SHOWN = {
    "lora": ("LoRA", "#3f7fc1"),
    "lora_wd": ("LoRA + decay", "#5f9e2f"),
    "pissa": ("PiSSA", "#8a7d2c"),
    "milora": ("MiLoRA", "#7d7d7d"),
    "peft_corda_kpm": ("PEFT's CorDA", "#333333"),
    "ipm": ("CorDA-IPM", "#c14f6d"),
    "kpm": ("CorDA-KPM", "#d0642b"),
    "kpm_sigma": ("CorDA-KPM, sigma", "#e3b505"),
    "kpm_plus": ("CorDA++ KPM", "#a867a5"),
    "kpm_plus_decay": ("CorDA++ + decay", "#b08a52"),
    "kpm_plus_sigma": ("CorDA++ + d., sigma", "#c8102e"),
    "contrast": ("contrast", "#2a977b"),
    "contrast_wd": ("contrast + decay", "#2f9eb3"),
}
GROWN = (
    ("facts like those calibrated on", ("people/answer_loss",)),
    ("facts of other kinds", ("towns/answer_loss", "minerals/answer_loss")),
    ("stories", ("stories/perplexity",)),
)
REAL = (
    ("NQ-open, calibrated on", ("nq_open/answer_loss",)),
    ("TriviaQA", ("triviaqa/answer_loss",)),
    ("WikiText-2", ("wikitext/perplexity",)),
)
PANELS = {
    "grown-keep": (GROWN, "the grown model", 20.0),
    "grown-keep-b": (GROWN, "the grown model", 20.0),
    "keep-smollm2-cpu": (REAL, "SmolLM2-135M", 3.0),
    "keep-smollm2-cpu-code": (REAL, "SmolLM2-135M", 3.0),
}
PANEL, GAP, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 280, 52, 356, 44, 46, 54, 64
LEAST = 0.01  # nats per token


def main(name: str) -> None:
    """Read results/NAME.json, write the picture."""
    found = artifact.read_json(RESULTS / f"{name}.json")
    (PICTURES / f"{name}.svg").write_text(picture(found, *PANELS[name]), encoding="utf-8")


def series(found: dict[str, Any], keeps: tuple[str, ...]) -> dict[str, list[Point]]:
    """Method -> a point per learning rate: task loss, mean rise of the retained scores."""
    learn, points = found["study"]["learn"], {}
    for method in SHOWN:
        by_rate = defaultdict(list)
        for run in found["runs"]:
            if run["method"] == method and run["status"] == "done":
                rises = [found_points([run], learn, keep)[0] for keep in keeps]
                rise = sum(point.rise for point in rises) / len(keeps)
                by_rate[run["learning_rate"]].append((rises[0].learn, rise))
        points[method] = [Point(*(sum(v) / len(v) for v in zip(*some, strict=True)), r) for r, some in by_rate.items()]
    return {method: some for method, some in points.items() if some}


def picture(found: dict[str, Any], panels: Panels, model: str, most: float) -> str:
    """All panels side by side, the legend below; rises up to `most` nats per token."""
    width = LEFT + len(panels) * (PANEL + GAP)
    learn = found["study"]["learn"].partition("/")[0]
    style = "font:13px system-ui,sans-serif;fill:#6b6b6b"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT + LEGEND}" role="img" style="{style}">',
        f"<title>What is forgotten against what is learnt, by method; {learn} on {model}</title>",
    ]
    for number, (title, keeps) in enumerate(panels):
        parts += panel(LEFT + number * (PANEL + GAP), title, learn, series(found, keeps), most)
    shown = [one for method, one in SHOWN.items() if any(run["method"] == method for run in found["runs"])]
    for number, (label, colour) in enumerate(shown):
        place, y = LEFT + 165 * (number % 6), HEIGHT + 12 + 20 * (number // 6)
        parts.append(f'<circle cx="{place}" cy="{y - 4}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{place + 9}" y="{y}">{label}</text>')
    return "\n".join([*parts, "</svg>", ""])


def panel(x0: float, title: str, learn: str, some: dict[str, list[Point]], most: float) -> list[str]:
    """One panel, from its left edge on; rises on a logarithmic axis, what is beyond its ends is drawn there."""
    on_fronts = [point.learn for points in some.values() for point in front(points)]
    low, high = min(on_fronts), max(on_fronts)
    high += 0.1 * (high - low)
    height = HEIGHT - TOP - BOTTOM

    def x(value: float) -> float:
        return x0 + PANEL * (value - low) / (high - low)

    def y(value: float) -> float:
        return TOP + height * (1 - math.log(min(max(value, LEAST), most) / LEAST) / math.log(most / LEAST))

    parts = [f'<text x="{x0}" y="{TOP - 30}" style="font-weight:600">{title}</text>']
    for tick in (t for t in (0.01, 0.03, 0.1, 0.3, 1, 3, 10) if t <= most):
        parts.append(f'<line x1="{x0}" x2="{x0 + PANEL}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#9993"/>')
        parts.append(f'<text x="{x0 - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    across = next(s for s in (0.05, 0.1, 0.2, 0.5, 1) if (high - low) / s <= 6)
    below = [i * across for i in range(int(low / across) + 1, int(high / across) + 1)]
    foot = HEIGHT - BOTTOM + 20
    parts += [f'<text x="{x(one):.1f}" y="{foot}" text-anchor="middle">{one:g}</text>' for one in below]
    parts.append(f'<text x="{x0}" y="{TOP - 14}" style="font-size:11px">rise of the loss, nats per token</text>')
    parts.append(f'<text x="{x0 + PANEL / 2}" y="{foot + 20}" text-anchor="middle">loss on {learn}</text>')
    for method, points in some.items():
        colour = SHOWN[method][1]
        line = " ".join(f"{x(p.learn):.1f},{y(p.rise):.1f}" for p in front(points))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        near = [p for p in points if p.learn <= high]
        parts += [f'<circle cx="{x(p.learn):.1f}" cy="{y(p.rise):.1f}" r="3.5" fill="{colour}"/>' for p in near]
    return parts


if __name__ == "__main__":
    main(sys.argv[1])
