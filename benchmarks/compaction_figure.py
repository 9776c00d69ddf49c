"""Draw results/compaction-smollm2.json as docs/pictures/compaction.svg and put its table into the README.

python benchmarks/compaction_figure.py
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from harness import RESULTS

from corda import artifact

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "pictures" / "compaction.svg"
MARK = "<!-- compaction -->"
SHOWN = (  # method, calibration, windows, label, colour, dash
    ("plain", None, None, "plain SVD of W", "#7d7d7d", ""),
    ("asvd", "wikitext", 256, "ASVD, WikiText-2", "#8a7d2c", ""),
    ("a=1/2", "wikitext", 256, "a = 1/2, WikiText-2", "#a867a5", ""),
    ("a=1", "wikitext", 256, "a = 1 (CorDA), WikiText-2", "#3f7fc1", ""),
    ("a=1", "wikitext", 32, "a = 1, 32 windows", "#3f7fc1", "2 3"),
    ("a=1", "nq_open", 256, "a = 1, NQ-open", "#d0642b", "6 4"),
    ("a=1", "gsm8k", 256, "a = 1, GSM8K", "#2a977b", "6 4"),
)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 800, 400, 106, 210, 16, 52


def main() -> None:
    """Both, from the one result file."""
    found = artifact.read_json(RESULTS / "compaction-smollm2.json")
    series = [(label, colour, dash, row) for *key, label, colour, dash in SHOWN if (row := row_of(found, *key))]
    PICTURE.write_text(picture(series), encoding="utf-8")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if text.count(MARK) == 2:
        before, _, after = text.split(MARK)
        readme.write_text(f"{before}{MARK}\n{table(series)}\n{MARK}{after}", encoding="utf-8")


def row_of(found: dict[str, Any], method: str, calibration: str | None, windows: int | None) -> dict[str, Any] | None:
    """The row of a method and calibration, or None where it was not run."""
    key = (method, calibration, windows)
    return next((r for r in found["rows"] if (r["method"], r["calibration"], r["windows"]) == key), None)


def picture(series: list[tuple[str, str, str, dict[str, Any]]]) -> str:
    """Perplexity over base against the number of discarded components, both axes logarithmic."""
    ranks = sorted(int(rank) for rank in series[0][3]["ranks"])
    top = max(cell["ratio_to_base"] for *_, row in series for cell in row["ranks"].values())
    decades = math.ceil(math.log10(top))

    def x(rank: float) -> float:
        low, high = math.log(ranks[0]), math.log(ranks[-1])
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log(rank) - low) / (high - low)

    def y(ratio: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * math.log10(max(ratio, 1.0)) / decades

    style = "font:13px system-ui,sans-serif;fill:#6b6b6b"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" style="{style}">',
        "<title>Perplexity on WikiText-2 over that of the base, by components discarded in every layer</title>",
    ]
    for decade in range(decades + 1):
        at = y(10.0**decade)
        label = "base" if decade == 0 else f"{10**decade:,} ×"
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#9993"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    below = HEIGHT - BOTTOM + 20
    parts += [f'<text x="{x(rank):.1f}" y="{below}" text-anchor="middle">{rank}</text>' for rank in ranks]
    middle = (LEFT + WIDTH - RIGHT) / 2
    what = "smallest components discarded in every layer"
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 10}" text-anchor="middle">{what}</text>')
    ends: list[float] = []
    for label, colour, dash, row in sorted(series, key=lambda one: -one[3]["ranks"][str(ranks[-2])]["ratio_to_base"]):
        places = [(x(rank), y(row["ranks"][str(rank)]["ratio_to_base"])) for rank in ranks]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"{dashed}/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in places]
        end = max(places[-1][1], ends[-1] + 16 if ends else TOP)
        ends.append(end)
        parts.append(f'<text x="{WIDTH - RIGHT + 10}" y="{end + 4:.1f}" style="fill:{colour}">{label}</text>')
    return "\n".join([*parts, "</svg>", ""])


def table(series: list[tuple[str, str, str, dict[str, Any]]]) -> str:
    """Perplexity over base, a row per method."""
    ranks = sorted(int(rank) for rank in series[0][3]["ranks"])
    lines = [f"| discarded per layer | {' | '.join(str(rank) for rank in ranks)} |", f"| --- |{' --- |' * len(ranks)}"]
    for label, _, _, row in series:
        cells = [_times(row["ranks"][str(rank)]) for rank in ranks]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _times(cell: dict[str, Any]) -> str:
    ratio, error = cell["ratio_to_base"], cell["ratio_stderr"]
    return f"{ratio:.3f} ± {error:.3f}" if ratio < 10 else f"{ratio:,.0f}"


if __name__ == "__main__":
    main()
