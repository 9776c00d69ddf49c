"""Coverage of retained data by the calibration set: exposed shares, the warning, the verb."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from corda.cli.app import app
from corda.context.accumulator import pack_upper
from corda.context.store import Context
from corda.covering import coverage, exposed_share
from corda.plan.plan import LayerPlan, Plan
from corda.recipe import AdapterOptions
from corda.targets import LayerSpec


def test_exposed_share_is_the_energy_in_the_rows_of_a():
    C = torch.diag(torch.tensor([50.0, 30.0, 15.0, 4.0, 1.0]))
    A = torch.zeros(2, 5)
    A[0, 4], A[1, 3] = 7.0, 0.01  # lengths do not matter
    assert exposed_share(A, C) == pytest.approx(0.05)
    assert exposed_share(A * 1e-6, 1e4 * C) == pytest.approx(0.05)


def test_rows_that_depend_on_each_other_count_once():
    C = torch.diag(torch.tensor([8.0, 1.0, 1.0]))
    A = torch.tensor([[0.0, 1.0, 0.0], [0.0, 3.0, 0.0]])
    assert exposed_share(A, C) == pytest.approx(0.1)


def context(C):
    spec = LayerSpec("block.up", "linear", d_out=6, d_in=4)
    return Context((spec,), {"block.up": "block.up"}, {"block.up": 100}, {"block.up": pack_upper(C)})


def test_a_set_that_the_calibration_does_not_cover_is_warned_about():
    A = torch.zeros(1, 4)
    A[0, 3] = 2.0
    plan = Plan(AdapterOptions(mode="kpm", rank=1), (LayerPlan("block.up", "linear", 6, 4, 1),), {"block.up": (A, A.T)})
    known = context(torch.diag(torch.tensor([60.0, 30.0, 9.0, 1.0])))
    near = context(torch.diag(torch.tensor([5.0, 4.0, 0.85, 0.15])))
    far = context(torch.diag(torch.tensor([60.0, 20.0, 10.0, 10.0])))
    facts = coverage(plan, known, {"near": near, "far": far})
    assert facts["sets"]["calibration"]["protected"] == pytest.approx(0.99)
    assert facts["sets"]["near"]["ratio"] == pytest.approx(1.5)
    assert facts["sets"]["far"]["ratio"] == pytest.approx(10)
    assert facts["layers"][0]["exposed"]["far"] == pytest.approx(0.1)
    assert facts["random"] == 0.25
    [warning] = facts["warnings"]
    assert "does not cover far" in warning
    assert "10.0 times" in warning
    assert "block.up" in warning


def test_the_verb_on_a_run(raw_recipe, write_recipe, data):
    shown = CliRunner().invoke(app, ["inspect", "coverage", str(write_recipe(raw_recipe)), "--json"])
    assert shown.exit_code == 0, shown.output
    facts = json.loads(shown.stdout)
    assert len(facts["layers"]) == 14
    assert set(facts["sets"]) == {"calibration", "things"}
    assert 0.5 < facts["sets"]["things"]["protected_median"] < 1
    table = CliRunner().invoke(app, ["inspect", "coverage", str(write_recipe(raw_recipe))])
    assert "times exposed" in table.output


def test_plain_lora_has_nothing_to_cover(raw_recipe, write_recipe):
    raw_recipe["adapter"]["mode"] = "lora"
    shown = CliRunner().invoke(app, ["inspect", "coverage", str(write_recipe(raw_recipe))])
    assert shown.exit_code != 0
    assert "no coverage to check" in str(shown.exception)
