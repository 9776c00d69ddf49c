"""Every recipe that ships parses, and its first line is its launch line."""

from __future__ import annotations

from pathlib import Path

import pytest

from corda.reading import load_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
ABLATION = [
    ("corda", "first", "uniform"),
    ("selection", "dynamic", "uniform"),
    ("allocation", "first", "dynamic"),
    ("both", "dynamic", "dynamic"),
]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda p: p.stem)
def test_recipe(path):
    recipe = load_recipe(path)
    assert recipe.output_dir == Path("runs") / path.stem
    assert path.stem.endswith(recipe.adapter.mode)
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# corda run recipes/{path.name}")


@pytest.mark.parametrize(("name", "selection", "allocation"), ABLATION[1:])
def test_the_ablation_differs_in_two_lines(name, selection, allocation):
    """From plain CorDA; the launch line and output_dir name the recipe itself."""
    first, second = (lines_of(part) for part in (ABLATION[0][0], name))
    assert len(first) == len(second)
    changed = [(a, b) for a, b in zip(first, second, strict=True) if a != b]
    expected = [
        (f"  {key}: {was}", f"  {key}: {now}")
        for key, was, now in (("selection", "first", selection), ("allocation", "uniform", allocation))
        if was != now
    ]
    assert changed == expected
    recipe = load_recipe(FOLDER / f"smollm2-ablation-{name}-kpm.yaml")
    assert (recipe.context.selection, recipe.adapter.allocation) == (selection, allocation)


def test_the_ablation_draws_the_same_tokens():
    recipes = [load_recipe(FOLDER / f"smollm2-ablation-{name}-kpm.yaml") for name, *_ in ABLATION]
    assert len({recipe.context.model_dump_json(exclude={"selection"}) for recipe in recipes}) == 1
    assert {recipe.context.rounds for recipe in recipes} == {5}
    assert len({(str(recipe.data), recipe.seed) for recipe in recipes}) == 1


def lines_of(name):
    text = (FOLDER / f"smollm2-ablation-{name}-kpm.yaml").read_text()
    return text.replace(f"smollm2-ablation-{name}-kpm", "NAME").splitlines()
