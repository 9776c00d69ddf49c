"""Studies: parsing, the order of cells, their recipes, and every refusal of an unfair comparison."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import yaml

from corda.comparing.compare import labels
from corda.comparing.fairness import _set, check, refuse_calibrated, refuse_narrow, refuse_tasks, refuse_unshared
from corda.comparing.methods import METHODS
from corda.comparing.null_space import null_factors
from corda.comparing.smoke import smoke_study
from corda.comparing.study import Cell, cells, load_study, parse_study, recipe_of
from corda.errors import RecipeError

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"


@pytest.fixture
def raw(tmp_path):
    """A study of two methods that is fair, as a mapping."""
    study = smoke_study(tmp_path / "smoke", ["lora", "kpm"])
    raw = study.model_dump(mode="json")
    raw["methods"] = {"lora": {}, "kpm": {}}
    return raw


def test_the_smoke_study_is_fair(raw):
    assert check(parse_study(raw)) == {"cells": 6, "layers": 14, "trainable_parameters": 3712}


def test_unknown_keys_and_methods_come_with_a_suggestion(raw):
    with pytest.raises(RecipeError, match="unknown key 'learning_rate', did you mean 'learning_rates'"):
        parse_study(raw | {"learning_rate": [1e-3]})
    with pytest.raises(RecipeError, match="did you mean 'lora_wd'"):
        parse_study(raw | {"methods": {"lora": {}, "lora_vd": {}}})
    with pytest.raises(RecipeError, match=r"unknown key 'methods\.kpm\.setting', did you mean 'settings'"):
        parse_study(raw | {"methods": {"lora": {}, "kpm": {"setting": {}}}})


def test_the_base_is_read_relative_to_the_study(raw, tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(raw["base"]))
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(raw | {"base": "base.yaml", "learning_rates": ["1e-4", 0.01]}))
    study = load_study(path, ["overrides.adapter.rank=2", "minutes=5"])
    assert study.base == raw["base"]
    assert study.learning_rates == [1e-4, 0.01]
    assert study.minutes == 5
    assert recipe_of(study, cells(study)[0]).adapter.rank == 2


def test_the_priority_list_comes_first_and_every_cell_once(raw):
    raw["seeds"] = [0, 1]
    raw["priority"] = [{"methods": ["kpm"], "learning_rates": [0.004], "seeds": [1]}, {"methods": ["lora"]}]
    study = parse_study(raw)
    order = cells(study)
    assert order[0] == Cell("kpm", 0.004, 1)
    assert [c.name for c in order[1:7]] == ["lora"] * 6
    assert [c.seed for c in order[1:7]] == [0, 0, 0, 1, 1, 1]
    assert len(order) == len(set(order)) == 12
    with pytest.raises(RecipeError, match="priority list names a method"):
        parse_study(raw | {"priority": [{"methods": ["pissa"]}]})
    with pytest.raises(RecipeError, match=r"a seed that the study has not.*7"):
        parse_study(raw | {"priority": [{"seeds": [7]}]})


def test_a_cell_has_the_shared_recipe_and_its_own_settings(raw):
    raw["methods"]["kpm"] = {"settings": {"adapter.exponent": 0.5}, "grid": {"adapter.damp": [0.1, 0.01]}}
    study = parse_study(raw)
    cell = cells(study)[-1]
    recipe = recipe_of(study, cell)
    assert (recipe.adapter.mode, recipe.adapter.exponent, recipe.adapter.damp) == ("kpm", 0.5, 0.01)
    assert recipe.training.learning_rate == cell.learning_rate == 0.03
    assert recipe.export.format == "none"
    assert cell.id == "kpm-damp-0.01-lr0.03-seed0"
    assert len(cells(study)) == 9


def test_a_method_under_another_name_is_told_apart_on_pages(raw):
    raw["methods"]["kpm_strong"] = {"method": "kpm", "settings": {"adapter.damp": 0.1}}
    assert labels(parse_study(raw)) == {"lora": "LoRA", "kpm": "CorDA-KPM", "kpm_strong": "CorDA-KPM (kpm_strong)"}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_has_a_valid_recipe(raw, name):
    raw["methods"][name] = {}
    study = parse_study(raw)
    assert recipe_of(study, Cell(name, 1e-3, 0)).seed == 0


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_are_valid_and_their_grids_wide_enough(path):
    study = load_study(path)
    for name in study.methods:
        refuse_narrow(name, study.rates(name))
        refuse_unshared(name, [*study.methods[name].settings, *study.methods[name].grid])
    recipes = {cell.name: recipe_of(study, cell) for cell in cells(study)}
    refuse_tasks(study, recipes[study.reference])
    refuse_calibrated(study, recipes[study.reference])
    assert set(recipes) == set(study.methods)


def changed(raw, **keys):
    new = copy.deepcopy(raw)
    for key, value in keys.items():
        node = new
        *parents, last = key.split("__")
        for parent in parents:
            node = node[parent]
        node[last] = value
    return new


TEST = "data/learn_test.jsonl"
UNFAIR = {
    "narrow grid": ({"learning_rates": [1e-4, 2e-3]}, "a factor of 20", "factor of 30"),
    "narrow grid of one method": ({"methods__kpm": {"learning_rates": [1e-4, 1e-3]}}, "methods.kpm", "widen the grid"),
    "own steps": ({"methods__kpm": {"settings": {"training.max_steps": 9}}}, "all methods have to share", "max_steps"),
    "own data": ({"methods__kpm": {"settings": {"data.max_length": 9}}}, "all methods have to share", "max_length"),
    "own schedule": (
        {"methods__kpm": {"grid": {"training.lr_scheduler_type": ["linear"]}}},
        "all methods have to share",
        "lr_scheduler_type",
    ),
    "own targets": (
        {"methods__kpm": {"settings": {"adapter.target_modules": ["q_proj"]}}},
        "all methods have to share",
        "target_modules",
    ),
    "own rank": ({"methods__kpm": {"settings": {"adapter.rank": 8}}}, "all methods have to share", "adapter.rank"),
    "no reference": ({"reference": "pissa"}, "not among the methods", "pissa"),
    "compared with nothing": ({"also_against": ["pissa"]}, "not among the methods", "pissa"),
    "timed against nothing": ({"methods__kpm": {"against": "qlora"}}, "not among the methods", "qlora"),
    "not measured": ({"keep": ["facts/accuracy"]}, "does not measure", "facts/accuracy"),
    "wrong side": ({"learn": "facts/answer_loss"}, "other side of the bargain", "measures keep"),
    "chosen on test": ({"development": "problems/answer_loss"}, "chosen on the test data", "part"),
    "splits overlap": (
        {"base__evaluation__tasks__problems_dev__dataset": {"dataset": TEST, "part": [10, 20]}},
        "shares records with the test",
        "6 of 10",
    ),
    "nothing unseen": ({"unseen": ["facts"]}, "set that was calibrated on", "data/keep_heldout.jsonl"),
    "unseen not kept": ({"unseen": ["problems"]}, "not in keep", "problems"),
    "calibrated on test": (
        {"base__evaluation__tasks__facts__dataset": {"dataset": "data/keep_calibration.jsonl", "part": [0, 9]}},
        "evaluation records are also in the calibration data",
        "facts",
    ),
}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("nq_open/train.jsonl", "nq_open/dev.jsonl", True),
        ("keep.jsonl", "keep_test.jsonl", True),
        ("data/keep.jsonl", "data/keep-held_out.parquet", True),
        ("data/keep.jsonl", "data/other.jsonl", False),
        ("data/latest.jsonl", "data/la.jsonl", False),
        ("people/calibration.jsonl", "towns/heldout.jsonl", False),
        ("openai/gsm8k", "google-research-datasets/nq_open", False),
    ],
)
def test_files_of_one_set_are_known_by_folder_and_name(one, other, same):
    assert (_set(one) == _set(other)) is same


@pytest.mark.parametrize("case", UNFAIR)
def test_unfair_comparisons_are_refused_before_anything_runs(raw, case):
    change, *messages = UNFAIR[case]
    with pytest.raises(Exception, match=messages[0]) as caught:
        check(parse_study(changed(raw, **change)))
    for message in messages:
        assert message in str(caught.value)


def test_unequal_numbers_of_trainable_parameters_are_refused(raw):
    raw["methods"]["kpm"] = {"settings": {"adapter.ranks": {"model.layers.0.mlp.up_proj": 1}}}
    with pytest.raises(RecipeError, match=r"another number of trainable parameters.*Got: 3,472"):
        check(parse_study(raw | {"parameter_tolerance": 0.05}))
    assert check(parse_study(raw | {"parameter_tolerance": 0.07}))


def test_null_factors_are_the_weight_on_the_inputs_quietest_directions():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(10, 7, generator=generator) * 3
    X = torch.randn(7, 50, generator=generator) * torch.tensor([5.0, 4, 3, 2, 1, 0.1, 0.01])[:, None]
    C = X @ X.T / 50
    A, B = null_factors(W, C, 2, scale=2.0)
    Q = torch.linalg.eigh(C.double())[1][:, :2]
    expected = W.double() @ Q @ Q.T
    assert A.shape == (2, 7)
    assert B.shape == (10, 2)
    assert torch.allclose(2.0 * B.double() @ A.double(), expected, atol=1e-5)
    assert float((B @ A @ X).norm()) < 0.01 * float((W @ X).norm())
