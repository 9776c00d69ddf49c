"""Covariances that are not kept are collected again, with the bits of those that are."""

from __future__ import annotations

import json
import time

import pytest
import torch

from corda import artifact, pipeline
from corda.context import keeping, store, stream
from corda.context.keeping import WORTH, Keeping
from corda.errors import ArtifactError, ModelError, RecipeError, ResourceError
from corda.inputs import refuse_several
from corda.plan import plan as plans
from corda.reading import parse_recipe

PLUS = {"rounds": 3, "selection": "dynamic", "samples": 4}


def planned(raw, folder, covariances, **changes):
    raw = json.loads(json.dumps(raw)) | {"output_dir": str(folder)}
    for section, values in changes.items():
        raw[section] |= values
    raw["context"]["covariances"] = covariances
    recipe = parse_recipe(raw)
    with pipeline.opened(recipe) as stages:
        stages.plan()
        drift = stages.yardsticks()
    return artifact.read(folder / "context", "context"), plans.load(artifact.read(folder / "plan", "plan")), drift


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("kpm", {"context": PLUS, "adapter": {"allocation": "dynamic"}}),
        ("ipm", {"context": {"rounds": 2, "samples": 4, "selection": "pooled", "offload": True}}),
        ("contrast", {"context": PLUS}),
    ],
)
def test_a_plan_is_the_same_bytes_either_way(raw_recipe, tmp_path, mode, changes, threads):
    changes = changes | {"adapter": changes.get("adapter", {}) | {"mode": mode}}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kept, one, meters = planned(raw_recipe, tmp_path / "kept", "disk", **changes)
        dropped, two, others = planned(raw_recipe, tmp_path / "dropped", "recollect", **changes)
    finally:
        torch.set_num_threads(before)
    assert kept.manifest["files"]
    assert not dropped.manifest["files"]
    assert kept.manifest["tokens"] == dropped.manifest["tokens"]
    assert one.layers == two.layers
    for name, (A, B) in one.factors.items():
        assert torch.equal(A, two.factors[name][0])
        assert torch.equal(B, two.factors[name][1])
        assert float(A.abs().max()) > 0
    assert len(meters) == len(others) == (0 if mode == "ipm" else 2)


def test_each_pass_of_the_plan_goes_through_the_blocks_once(raw_recipe, tmp_path, monkeypatch):
    ran: list[int] = []
    original = stream._March.through

    def through(self, index, round_, capture):
        ran.append(index)
        original(self, index, round_, capture)

    monkeypatch.setattr(stream._March, "through", through)
    changes = {"context": PLUS | {"held_out": 0}, "adapter": {"allocation": "dynamic"}}
    planned(raw_recipe, tmp_path / "run", "recollect", **changes)
    once = [0, 0, 0, 1, 1, 1]  # 2 blocks, 3 rounds
    assert ran == once * 4  # collect, survey, factorise, drift meter
    raw = raw_recipe | {"context": PLUS | {"held_out": 0}, "adapter": {"mode": "kpm", "allocation": "dynamic"}}
    assert keeping.readings(parse_recipe(raw)) == 3


def test_a_context_without_covariances_says_so(raw_recipe, tmp_path, corda, write_recipe):
    found, _, _ = planned(raw_recipe, tmp_path / "run", "recollect")
    context = store.load(found)
    with pytest.raises(ArtifactError, match=r"not kept.*context\.covariances: disk"):
        context.covariance(context.layers[0].name)
    with pytest.raises(KeyError):
        context.packed["nothing"]
    code, out, _ = corda("collect", write_recipe(raw_recipe | {"context": {"samples": 16, "covariances": "recollect"}}))
    assert code == 0
    assert "covariances not kept" in " ".join(out.split())
    planned(raw_recipe, tmp_path / "run", "disk")
    assert artifact.read(tmp_path / "run" / "context", "context").manifest["files"]


def test_the_cheaper_one_is_chosen_and_said(raw_recipe, tmp_path, corda, write_recipe):
    slow_disk, slow_model = Keeping("auto", readings=2), Keeping("auto", readings=2)
    assert slow_disk.weigh(0.001, lambda: _slowly(0.02), 10 * WORTH / 0.02) is None
    assert slow_disk.kept is False
    assert slow_model.weigh(1.0, lambda: _slowly(0.02), 10 * WORTH / 0.02) is not None
    assert slow_model.kept
    assert "collecting again" in slow_model.why
    code, out, _ = corda("collect", write_recipe(raw_recipe), "--json")
    said = json.loads(out)["kept"]
    assert code == 0
    assert said["on_disk"]
    assert said["why"].startswith("writing and reading them takes about")


def test_what_does_not_fit_on_the_disk_is_collected_again(raw_recipe, tmp_path, monkeypatch):
    original = artifact.need_disk

    def full(folder, size, otherwise=""):
        if "rounds" in otherwise:
            raise ResourceError("not enough disk space", got="0.01 GB free", expected="about 5 GB")
        original(folder, size, otherwise)

    monkeypatch.setattr(artifact, "need_disk", full)
    found, plan, _ = planned(raw_recipe, tmp_path / "run", "auto")
    assert "do not fit on the disk (0.01 GB free" in found.manifest["again"]["why"]
    assert not found.manifest["files"]
    assert plan.factors
    with pytest.raises(ResourceError):
        planned(raw_recipe, tmp_path / "other", "disk")


def test_where_it_cannot_be_done(raw_recipe, tmp_path):
    with pytest.raises(ModelError, match=r"context\.covariances"):
        planned(raw_recipe, tmp_path / "run", "recollect", adapter={"target_modules": ["q_proj", "lm_head"]})
    with pytest.raises(RecipeError, match=r"context\.covariances"):
        refuse_several(parse_recipe(raw_recipe | {"context": {"covariances": "recollect"}}))


def _slowly(seconds):
    time.sleep(seconds)
    return object()
