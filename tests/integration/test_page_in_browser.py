"""The report in a real, headless Chromium: it draws, says nothing on the console and asks nothing of the network.

Skipped where there is no Chromium on the path ($CHROMIUM names another one).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from corda.report.page import write_page
from tests.unit.test_report import make_run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (apt-get install chromium)")
WIDE, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run with candidates and dynamic ranks, three runs compared, and a run of 560 layers."""
    folder = tmp_path_factory.mktemp("runs")
    single = with_candidates(make_run(folder / "single", "kpm", blocks=4))
    runs = [make_run(folder / mode, mode, seed=i) for i, mode in enumerate(("lora", "kpm", "ipm"))]
    large = with_candidates(make_run(folder / "large", "kpm", blocks=80, size=256, rank=32))
    found = {"single": folder / "single.html", "compared": folder / "compared.html", "large": folder / "large.html"}
    write_page([single], found["single"])
    write_page(runs, found["compared"])
    write_page([large], found["large"])
    return found


def with_candidates(run: Path) -> Path:
    """Scores of five candidates, ranks that differ, and a compactness, as CorDA++ leaves them."""
    results = json.loads((run / "results.json").read_text())
    for i, layer in enumerate(results["plan"]["layers"]):
        layer |= {"scores": [50.0 + (i * 7 + k * 3) % 11 for k in range(5)], "log_pi": 6 + i % 5, "rank": 4 + i % 9}
        layer |= {"chosen": layer["scores"].index(min(layer["scores"])), "floor_decided": i % 6 == 0}
    (run / "results.json").write_text(json.dumps(results))
    return run


def opened(browser: Any, page: Path, *, width: Any = WIDE, scheme: str = "light") -> tuple[Any, list[str], list[str]]:
    """The page once it is drawn, what the console said, and what was asked of a network."""
    context = browser.new_context(viewport=width, color_scheme=scheme, has_touch=width is PHONE)
    tab = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri(), wait_until="load")
    tab.wait_for_function("document.querySelectorAll('[data-figure]').length > 0")
    tab.wait_for_function("[...document.querySelectorAll('[data-figure]')].every(p => p.querySelector('.main-svg'))")
    remote = [url for url in asked if not url.startswith((page.as_uri(), "data:", "blob:"))]
    return tab, said, remote


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, PHONE], ids=["wide", "phone"])
@pytest.mark.parametrize("name", ["single", "compared"])
def test_it_draws_alone_and_fits(browser, pages, name, width, scheme):
    tab, said, remote = opened(browser, pages[name], width=width, scheme=scheme)
    assert said == []
    assert remote == []
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    figures = tab.locator("[data-figure]")
    assert figures.count() >= 4
    for i in range(figures.count()):
        box = figures.nth(i).bounding_box()
        assert box["height"] > 100
        assert box["width"] <= width["width"]
    paper, ink = tab.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert (brightness(paper) > brightness(ink)) == (scheme == "light")
    assert abs(brightness(paper) - brightness(ink)) > 150
    if shots := os.environ.get("SCREENSHOTS"):
        tab.screenshot(path=Path(shots) / f"{name}-{width['width']}-{scheme}.png", full_page=True)
    tab.context.close()


def brightness(colour: str) -> float:
    values = [float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    return sum(values) / 3


def test_picking_a_layer_redraws_its_spectrum(browser, pages):
    tab, said, _ = opened(browser, pages["single"])
    drawn = "document.getElementById('spectrum').data.map(t => [...t.y])"
    first = tab.evaluate(drawn)
    assert sum(len(trace) for trace in first) > 10
    tab.select_option("#layer", index=5)
    tab.wait_for_function(f"JSON.stringify({drawn}) !== {json.dumps(json.dumps(first, separators=(',', ':')))}")
    tab.check("#log-components")
    tab.wait_for_function("document.getElementById('spectrum').layout.xaxis.type === 'log'")
    assert "adapted" in tab.inner_text("#layer-facts")
    assert said == []
    tab.context.close()


def test_a_large_model_is_drawn_in_seconds_and_weighs_little(browser, pages):
    assert pages["large"].stat().st_size <= 4_000_000
    tab, said, remote = opened(browser, pages["large"])
    assert said == []
    assert remote == []
    assert tab.evaluate("document.getElementById('layer').options.length") == 560
    assert tab.evaluate("performance.now()") < 60_000  # about 3 s on an idle machine
    tab.context.close()


def test_every_part_that_was_promised_is_there(browser, pages):
    tab, _, _ = opened(browser, pages["single"])
    headings = tab.locator("h2").all_inner_texts()
    for wanted in ("Scores", "Training", "Spectra", "Adapted layers", "Answers", "Warnings", "What was asked"):
        assert wanted in headings
    assert {"Time and peak memory", "Provenance"} <= set(headings)
    for figure in (
        "errors-answer_loss",
        "errors-exact_match",
        "rank0",
        "energy0",
        "compactness0",
        "round0",
        "scores0",
        "training",
        "spectrum",
    ):
        assert tab.locator(f"#{figure} .main-svg").count() >= 1, figure
    assert "corda run recipe.yaml" in tab.inner_text("body")
    tab.context.close()
