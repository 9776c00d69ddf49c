"""A plan on the terminal: every layer is drawn, nothing is wider than the terminal."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from corda.report.heatmap import plan_overview, shaded

MODULES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")


def make_plan(blocks: int, prefixes: tuple[str, ...] = ("model",), rounds: int = 3) -> dict[str, Any]:
    layers = []
    for prefix in prefixes:
        for b in range(blocks):
            for m, module in enumerate(MODULES):
                scores = [20.0 + (k + b + m) % rounds for k in range(rounds)] if rounds else []
                layer = {"name": f"{prefix}.layers.{b}.{module}", "rank": 1 + 2 * b + m, "scores": scores}
                layer |= {"log_pi": 7.0 - 0.1 * b if rounds else None, "floor_decided": b == 0 and rounds > 0}
                layer |= {"chosen": scores.index(min(scores)) if scores else 0, "edited": False}
                layers.append(layer)
    return {"mode": "kpm", "trainable_parameters": 123456, "layers": layers}


def drawn(what: Any, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), force_terminal=False, color_system=None)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def glyphs(lines: list[str]) -> str:
    maps = [line for line in lines if re.match(r"[a-z]\S+( \d)? +[▁-█●·]", line)]
    return "".join(re.sub(r"^\S+( \d)? +", "", line) for line in maps)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("blocks", [3, 30, 80])
def test_every_layer_is_drawn_within_the_width(blocks: int, width: int) -> None:
    plan = make_plan(blocks)
    lines = drawn(plan_overview(plan), width)
    assert max(map(len, lines)) <= width
    assert lines[0] == f"Plan: CorDA-KPM, {4 * blocks} layers, 123,456 trainable parameters"
    shown = glyphs(lines)
    assert len(re.findall("● ?", shown)) == 4 * blocks
    assert "·" not in shown
    bars = len(re.findall("[▁-█]", shown))
    assert bars in {4 * blocks * (1 + 1 + 2), 2 * 4 * blocks * (1 + 1 + 2)}  # rank, log π, candidates not taken
    assert f"{blocks * 4 // 3}" in "".join(line for line in lines if line.startswith("Taken:"))


def test_heights_follow_the_values_and_ranges_are_printed() -> None:
    lines = drawn(shaded("title", [(f"h.{b}.q", 8.0 * b) for b in range(8)], "{:.0f}"), 80)
    assert lines[0] == "title"
    assert lines[1].split() == ["0", "5"]
    assert lines[1].index("5") - lines[1].index("0") == 10
    assert lines[2] == "q ▁▁▂▂▃▃▄▄▅▅▆▆▇▇██ 0–56"
    assert lines[3] == "0 ▁▂▃▄▅▆▇█ 56"


def test_one_value_everywhere_is_said() -> None:
    assert drawn(shaded("rank", [(f"h.{b}.q", 16.0) for b in range(3)], "{:.0f}"), 80)[-1].endswith("16 everywhere")


def test_towers_of_a_vision_language_model_keep_their_names() -> None:
    lines = drawn(plan_overview(make_plan(4, ("model.vision_tower", "model.language_model"), rounds=0)), 80)
    assert max(map(len, lines)) <= 80
    names = [line.split()[0] for line in lines if re.match(r"[a-z]\S+ +[▁-█]", line)]
    assert names == [f"{tower}.layers.{m}" for tower in ("vision_tower", "language_model") for m in MODULES]


def test_floors_and_hand_edits_are_named() -> None:
    plan = make_plan(3)
    for layer in plan["layers"][:7]:
        layer["edited"] = True
    plan["layers"][0]["chosen"] = None
    text = " ".join(drawn(plan_overview(plan), 120))
    assert "In 4 of 12 layers more than half" in text
    assert "all pooled in 1" in text
    assert "Set by hand: model.layers.0.self_attn.q_proj" in text
    assert "and 2 more." in text


def test_plain_lora_has_ranks_alone() -> None:
    lines = drawn(plan_overview(make_plan(3, rounds=0)), 80)
    assert any("Rank" in line for line in lines)
    assert not any("log π" in line or "Scores" in line for line in lines)
