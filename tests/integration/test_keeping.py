"""Covariances that are not kept are collected again, with the bits of those that are."""

from __future__ import annotations

import json
import time

import pytest
import torch

from corda import artifact, journal, models, pipeline
from corda.context import keeping, store, stream
from corda.context.again import Recollected
from corda.context.capture import Captured
from corda.context.keeping import WORTH, Keeping, keeping_of
from corda.errors import ArtifactError, ModelError, RecipeError, ResourceError
from corda.inputs import Inputs, refuse_several
from corda.plan import plan as plans
from corda.reading import parse_recipe
from tests.vlms import recipe

PLUS = {"rounds": 3, "selection": "dynamic", "samples": 4}


def planned(raw, folder, covariances, **changes):
    raw = json.loads(json.dumps(raw)) | {"output_dir": str(folder)}
    for section, values in changes.items():
        raw[section] |= values
    raw["context"]["covariances"] = covariances
    raw["training"]["drift_meter"] = False
    with pipeline.opened(parse_recipe(raw)) as stages:
        stages.plan()
    return artifact.read(folder / "context", "context"), plans.load(artifact.read(folder / "plan", "plan"))


def interrupted(raw, folder, covariances, monkeypatch):
    """The same, cut off behind the first block."""
    original = stream._March.through

    def through(self, index, round_, layers):
        if index == 1:
            raise KeyboardInterrupt
        return original(self, index, round_, layers)

    with monkeypatch.context() as patch:
        patch.setattr(stream._March, "through", through)
        with pytest.raises(KeyboardInterrupt):
            planned(raw, folder, covariances)


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
        kept, one = planned(raw_recipe, tmp_path / "kept", "disk", **changes)
        dropped, two = planned(raw_recipe, tmp_path / "dropped", "recollect", **changes)
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


def test_images_are_collected_again_as_they_were(tmp_path):
    raw = recipe(tmp_path) | {"context": {"rounds": 2, "samples": 3, "selection": "dynamic", "held_out": 0}}
    kept, one = planned(raw, tmp_path / "kept", "disk")
    dropped, two = planned(raw, tmp_path / "dropped", "recollect")
    assert kept.manifest["files"]
    assert not dropped.manifest["files"]
    assert one.layers == two.layers
    assert all(torch.equal(A, two.factors[name][0]) for name, (A, _) in one.factors.items())


@pytest.mark.parametrize(("mode", "correction"), [("ipm", "fit"), ("kpm", "frozen")])
def test_a_4bit_base_is_corrected_from_covariances_collected_again(raw_recipe, tmp_path, mode, correction):
    pytest.importorskip("bitsandbytes")
    raw_recipe["model"]["load_in_4bit"] = True
    adapter = {"mode": mode, "correction": correction, "correction_rounds": 2}
    _, one = planned(raw_recipe, tmp_path / "kept", "disk", adapter=adapter)
    dropped, two = planned(raw_recipe, tmp_path / "dropped", "recollect", adapter=adapter)
    assert not dropped.manifest["files"]
    assert one.layers == two.layers
    for name, (A, B) in one.factors.items():
        assert torch.equal(A, two.factors[name][0])
        assert torch.equal(B, two.factors[name][1])
    assert one.as_json()["quantisation"] == two.as_json()["quantisation"]
    assert bool(one.corrections) == (correction == "frozen")
    assert all(torch.equal(A, two.corrections[name][0]) for name, (A, _) in one.corrections.items())


def test_each_pass_of_the_plan_goes_through_the_blocks_once(raw_recipe, tmp_path, monkeypatch):
    ran: list[int] = []
    original = stream._March.through

    def through(self, index, round_, layers):
        ran.append(index)
        return original(self, index, round_, layers)

    monkeypatch.setattr(stream._March, "through", through)
    changes = {"context": PLUS, "adapter": {"allocation": "dynamic"}}
    planned(raw_recipe, tmp_path / "run", "recollect", **changes)
    once = [0, 0, 0, 1, 1, 1]  # 2 blocks, 3 rounds
    assert ran == once * 3  # collect, survey, factorise
    raw = raw_recipe | {"context": PLUS, "adapter": {"mode": "kpm", "allocation": "dynamic"}}
    assert keeping.readings(parse_recipe(raw)) == 2


def test_a_whole_run_without_covariances(raw_recipe, monkeypatch):
    raw_recipe["context"]["covariances"] = "recollect"
    raw_recipe["training"]["drift_meter"] = False
    loads = []
    original = models.load
    monkeypatch.setattr(models, "load", lambda *a, **k: (loads.append(1), original(*a, **k))[1])
    results = pipeline.run(parse_recipe(raw_recipe))
    assert results["step0"]["max_relative_logit_difference"] <= 1e-5
    assert len(loads) == 2  # the base, and once more to compare the export


def test_a_context_without_covariances_says_so(raw_recipe, tmp_path, corda, write_recipe):
    found, _ = planned(raw_recipe, tmp_path / "run", "recollect")
    context = store.load(found)
    with pytest.raises(ArtifactError, match=r"not kept.*context\.covariances: disk"):
        context.covariance(context.layers[0].name)
    with pytest.raises(KeyError):
        context.packed["nothing"]
    raw = raw_recipe | {"context": {"samples": 16, "covariances": "recollect"}}
    raw["training"]["drift_meter"] = False
    code, out, _ = corda("collect", write_recipe(raw))
    assert code == 0
    assert "covariances not kept" in " ".join(out.split())
    code, out, _ = corda("inspect", "context", tmp_path / "run", "--json")
    assert code == 0
    facts = json.loads(out)
    assert not facts["kept"]["on_disk"]
    assert facts["inputs"][0]["tokens"][0] > 0
    assert facts["inputs"][0]["effective_rank"] == []
    code, out, _ = corda("inspect", "context", tmp_path / "run")
    assert code == 0
    assert "not kept" in out
    raw["context"]["covariances"] = "disk"
    assert corda("collect", write_recipe(raw))[0] == 0
    assert artifact.read(tmp_path / "run" / "context", "context").manifest["files"]


def test_the_cheaper_one_is_chosen_and_said(raw_recipe, tmp_path, corda, write_recipe):
    book = journal.Journal(tmp_path / "partial", "key")
    slow_disk, slow_model = Keeping("auto", readings=2), Keeping("auto", readings=2)
    parts = 10 * WORTH / 0.02
    assert slow_disk.weigh(0.001, lambda: None, lambda: _slowly(0.02), parts, book) is None
    assert slow_disk.kept is False
    resumed = Keeping("auto")
    resumed.resume(book)
    assert (resumed.kept, resumed.why) == (False, slow_disk.why)
    assert slow_model.weigh(1.0, lambda: None, lambda: _slowly(0.02), parts, book) is not None
    assert slow_model.kept
    assert "collecting again" in slow_model.why
    raw_recipe["training"]["drift_meter"] = False
    code, out, _ = corda("collect", write_recipe(raw_recipe), "--json")
    said = json.loads(out)["kept"]
    assert code == 0
    assert said["on_disk"]
    assert said["why"].startswith("writing and reading them takes about")


@pytest.mark.parametrize("slow", [True, False])
def test_an_interrupted_collection_keeps_to_its_choice(raw_recipe, tmp_path, monkeypatch, slow):
    monkeypatch.setattr(keeping, "WORTH", -1e9 if slow else 1e9)
    interrupted(raw_recipe, tmp_path / "run", "auto", monkeypatch)
    monkeypatch.setattr(keeping, "WORTH", 1e9 if slow else -1e9)
    found, plan = planned(raw_recipe, tmp_path / "run", "auto")
    assert bool(found.manifest["files"]) is not slow
    straight, other = planned(raw_recipe, tmp_path / "straight", "disk")
    assert straight.manifest["tokens"] == found.manifest["tokens"]
    assert plan.layers == other.layers
    assert not list((tmp_path / "run").glob("*.partial"))


def test_a_collection_that_was_kept_in_part_and_is_not_any_more(raw_recipe, tmp_path, monkeypatch):
    interrupted(raw_recipe, tmp_path / "run", "disk", monkeypatch)
    asked = []
    need = artifact.need_disk
    monkeypatch.setattr(artifact, "need_disk", lambda f, size, *a: (asked.append((f.name, size)), need(f, size, *a))[1])
    found, plan = planned(raw_recipe, tmp_path / "run", "recollect")
    assert not found.manifest["files"]
    assert plan.factors
    assert max(size for name, size in asked if "context" in name) == 0


def test_what_does_not_fit_on_the_disk_is_collected_again(raw_recipe, tmp_path, monkeypatch):
    original = artifact.need_disk

    def full(folder, size, otherwise=""):
        if "rounds" in otherwise:
            raise ResourceError("not enough disk space", got="0.01 GB free", expected="about 5 GB")
        original(folder, size, otherwise)

    monkeypatch.setattr(artifact, "need_disk", full)
    found, plan = planned(raw_recipe, tmp_path / "run", "auto")
    assert "do not fit on the disk (0.01 GB free" in found.manifest["again"]["why"]
    assert not found.manifest["files"]
    assert plan.factors
    with pytest.raises(ResourceError):
        planned(raw_recipe, tmp_path / "other", "disk")


def test_a_march_that_failed_starts_anew(raw_recipe, tmp_path, monkeypatch):
    tries = []

    def march():
        tries.append(1)
        yield Captured({"a": torch.ones(3)}, {"a": 1}, {})
        if len(tries) == 1:
            raise RuntimeError("CUDA out of memory")
        yield Captured({}, {}, {})  # a block in which nothing was seen
        yield Captured({"b": torch.ones(2)}, {"b": 1}, {})

    again = Recollected(["a", "b"], march, rounds=1, threads=torch.get_num_threads())
    assert torch.equal(again["a"], torch.ones(3))
    with pytest.raises(RuntimeError, match="CUDA"):
        again["b"]
    assert torch.equal(again["b"], torch.ones(2))
    assert torch.equal(again["a"], torch.ones(3))
    assert len(tries) == 3


@pytest.mark.parametrize(
    ("context", "meter", "message"),
    [({"stream": False}, False, r"context\.stream: true"), ({}, True, r"training\.drift_meter: false")],
)
def test_recollecting_is_refused_where_it_would_be_missed(raw_recipe, context, meter, message):
    raw_recipe["context"] |= context | {"covariances": "recollect"}
    raw_recipe["training"]["drift_meter"] = meter
    with pytest.raises(RecipeError, match=message):
        Inputs(parse_recipe(raw_recipe)).check()
    raw_recipe["context"]["covariances"] = "auto"
    found = keeping_of(parse_recipe(raw_recipe), 1)
    assert found.kept
    assert found.why


def test_where_it_cannot_be_done(raw_recipe, tmp_path):
    targets = {"target_modules": ["q_proj", "lm_head"]}
    with pytest.raises(ModelError, match=r"one list of blocks.*context\.covariances"):
        planned(raw_recipe, tmp_path / "run", "recollect", adapter=targets)
    found, _ = planned(raw_recipe, tmp_path / "other", "auto", adapter=targets)
    assert "one list of blocks" in found.manifest["again"]["why"]
    assert found.manifest["files"]
    with pytest.raises(RecipeError, match=r"context\.covariances"):
        refuse_several(parse_recipe(raw_recipe | {"context": {"covariances": "recollect"}}), 2)
    assert keeping_of(parse_recipe(raw_recipe), 2).kept


def _slowly(seconds):
    time.sleep(seconds)
    return object()
