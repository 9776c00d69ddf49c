"""Artifacts appear whole or not at all, and nothing corrupted or foreign is trusted."""

from __future__ import annotations

import json
import os
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from corda import artifact
from corda.errors import ArtifactError, ResourceError


def make(folder, text="hello", key="k1"):
    with artifact.writing(folder, "plan", key, {"context": "c1"}) as (temporary, extra):
        (temporary / "a.txt").write_text(text)
        extra["more"] = 1
    return artifact.read(folder, "plan")


def test_written_and_read(tmp_path):
    found = make(tmp_path / "plan")
    assert found.fingerprint == "k1"
    assert found.manifest["parents"] == {"context": "c1"}
    assert found.manifest["more"] == 1
    assert found.manifest["files"]["a.txt"]["bytes"] == 5
    assert found.manifest["provenance"]["packages"]["torch"]
    assert str(tmp_path) not in json.dumps(dict(found.manifest))


def interrupted_write(folder, error):
    with artifact.writing(folder, "plan", "k2") as (temporary, _):
        (temporary / "a.txt").write_text("half")
        raise error


def test_an_exception_or_interrupt_leaves_the_old_one(tmp_path):
    make(tmp_path / "plan", "old")
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            interrupted_write(tmp_path / "plan", error)
    assert artifact.read(tmp_path / "plan", "plan").path("a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["plan"]


def test_reuse_needs_the_fingerprint(tmp_path):
    assert artifact.reusable(tmp_path / "plan", "plan", "k1") is None
    make(tmp_path / "plan")
    assert artifact.reusable(tmp_path / "plan", "plan", "k1") is not None
    assert artifact.reusable(tmp_path / "plan", "plan", "other") is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_corruption_is_found(tmp_path, damage):
    folder = tmp_path / "plan"
    make(folder)
    file = folder / "a.txt"
    if damage == "flip":
        file.write_text("hellp")
    elif damage == "truncate":
        file.write_text("hell")
    elif damage == "remove":
        file.unlink()
    else:
        (folder / artifact.MANIFEST).write_text("{")
    with pytest.raises(ArtifactError, match="corrupted artifact"):
        artifact.reusable(folder, "plan", "k1")


def test_a_changed_plan_shows_how_plans_are_edited(tmp_path):
    make(tmp_path / "plan")
    (tmp_path / "plan" / "a.txt").write_text("hellp")
    with pytest.raises(ArtifactError, match=r"changed after it was written.*--save-ranks FILE.*adapter\.ranks: FILE"):
        artifact.read(tmp_path / "plan", "plan")


def test_several_may_offer_the_same_artifact_at_once(tmp_path):
    found, together = make(tmp_path / "plan"), Barrier(4)

    def offer(place):
        together.wait()
        artifact.offer(found, place)

    with ThreadPoolExecutor(4) as pool:
        for number in range(20):
            place = tmp_path / f"shelf-{number}" / "plan"
            for future in [pool.submit(offer, place) for _ in range(4)]:
                future.result()
            assert artifact.read(place, "plan").fingerprint == "k1"
            assert [child.name for child in place.parent.iterdir()] == ["plan"]


def test_foreign_artifacts_are_refused(tmp_path):
    make(tmp_path / "plan")
    with pytest.raises(ArtifactError, match="foreign"):
        artifact.read(tmp_path / "plan", "context")
    (tmp_path / "x").mkdir()
    with pytest.raises(ArtifactError, match="there is no plan here"):
        artifact.read(tmp_path / "x", "plan")
    for content, message in (("[]", "not a JSON object"), ('{"kind": "plan", "schema": 1}', "foreign")):
        (tmp_path / "x" / artifact.MANIFEST).write_text(content)
        with pytest.raises(ArtifactError, match=message):
            artifact.read(tmp_path / "x", "plan")


def test_not_enough_disk_is_said_before_writing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(artifact.shutil, "disk_usage", lambda _: usage(10, 9, 5_000_000))
    with (
        pytest.raises(ResourceError, match=r"0\.01 GB free.*about 1\.00 GB"),
        artifact.writing(tmp_path / "plan", "plan", "k", size=10**9),
    ):
        raise AssertionError("not reached")
    assert not any(tmp_path.iterdir())


def claim(folder, identity):
    with artifact.claimed(folder, identity):
        raise AssertionError("not reached")


def test_a_run_folder_is_claimed_once(tmp_path):
    folder = tmp_path / "run"
    with (
        artifact.claimed(folder, {"mode": "kpm"}),
        pytest.raises(ArtifactError, match="in use"),
        artifact.claimed(folder, {"mode": "kpm"}),
    ):
        raise AssertionError("not reached")
    with (
        pytest.raises(ArtifactError, match=r"another run.*mode 'kpm'.*mode 'ipm'"),
        artifact.claimed(folder, {"mode": "ipm"}),
    ):
        raise AssertionError("not reached")
    (folder / ".git").mkdir()
    (folder / ".corda.context.abc").mkdir()
    with artifact.claimed(folder, {"mode": "kpm"}):
        assert (folder / ".git").exists()
        assert not (folder / ".corda.context.abc").exists()
    (folder / "run.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"run\.json is not JSON"):
        claim(folder, {"mode": "kpm"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(ArtifactError, match="not a run's"), artifact.claimed(tmp_path / "other", {}):
        raise AssertionError("not reached")
