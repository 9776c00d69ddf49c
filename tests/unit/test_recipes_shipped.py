"""Every recipe that ships parses, and its first line is its launch line."""

from __future__ import annotations

from pathlib import Path

import pytest

from corda.recipe import load_recipe

FOLDER = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda p: p.stem)
def test_recipe(path):
    recipe = load_recipe(path)
    assert recipe.output_dir == Path("runs") / path.stem
    assert path.stem.endswith(recipe.adapter.mode)
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# corda run recipes/{path.name}")
