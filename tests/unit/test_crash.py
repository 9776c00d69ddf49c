"""Full disks, folders that cannot be written, leftovers of killed processes, flipped bytes."""

from __future__ import annotations

import errno
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from corda import artifact, disk
from corda.errors import ArtifactError, CordaError, ResourceError
from corda.journal import Journal

NOBODY = 65534


def made(folder: Path) -> artifact.Artifact:
    with artifact.writing(folder, "plan", "f" * 16, {"context": "c" * 16}) as (temporary, extra):
        (temporary / "one.bin").write_bytes(bytes(range(64)))
        artifact.write_json(temporary / "two.json", {"n": 12})
        extra["note"] = {"ranks": [3, 4], "share": 0.25}
    return artifact.read(folder, "plan")


def test_a_flipped_byte_anywhere_in_an_artifact_is_named(tmp_path):
    found = made(tmp_path / "plan")
    for name in (artifact.MANIFEST, "one.bin", "two.json"):
        content = (tmp_path / "plan" / name).read_bytes()
        for place in range(len(content)):
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            (tmp_path / "plan" / name).write_bytes(damaged)
            try:
                read = artifact.read(tmp_path / "plan", "plan")
            except ArtifactError as error:
                assert name in str(error) or "foreign artifact" in str(error)  # noqa: PT017
                continue
            # What is left: the name of the seal itself.
            assert {k: v for k, v in read.manifest.items() if k in found.manifest} == found.manifest
        (tmp_path / "plan" / name).write_bytes(content)


def test_a_flipped_byte_in_a_journal_makes_its_part_be_done_again(tmp_path, caplog):
    book = Journal(tmp_path / "j", "k")
    book.put("one", {"x": torch.arange(3.0)}, {"tokens": {"q": 123}})
    for name in ("one.json", "one.safetensors"):
        content = (tmp_path / "j" / name).read_bytes()
        for place in range(len(content)):
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            (tmp_path / "j" / name).write_bytes(damaged)
            caplog.clear()
            assert book.facts("one") in (None, {"tokens": {"q": 123}})
            if book.facts("one") is None:
                assert "one in" in caplog.text
                assert "done again" in caplog.text
        (tmp_path / "j" / name).write_bytes(content)
    assert book.facts("one") == {"tokens": {"q": 123}}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_named_and_leaves_the_old_artifact(tmp_path, monkeypatch, number):
    before = made(tmp_path / "plan").manifest
    sync = disk.sync

    def full(path):
        if path.name == "one.bin":
            raise OSError(number, os.strerror(number), str(path))
        sync(path)

    monkeypatch.setattr(disk, "sync", full)
    with pytest.raises(ResourceError, match=r"the disk is full.*one\.bin"):
        made(tmp_path / "plan")
    assert artifact.read(tmp_path / "plan", "plan").manifest == before
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_libraries_that_hide_the_systems_error_are_understood(tmp_path):
    for error in (
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0: file write failed"),
    ):
        with pytest.raises(ResourceError, match="the disk is full"), disk.explained(tmp_path):
            raise error
    with pytest.raises(ValueError, match="other"), disk.explained(tmp_path):
        raise ValueError("other")


def test_a_real_limit_on_the_size_of_files(tmp_path):
    """RLIMIT_FSIZE in a forked child, as a quota does it: safetensors writes in Rust."""

    values = torch.zeros(100_000)

    def attempt():
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        Journal(tmp_path / "j", "k").put("one", {"x": values}, {})

    assert "ResourceError: the disk is full" in forked(attempt)
    assert Journal(tmp_path / "j", "k").facts("one") is None


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    shut = tmp_path / "shut"
    shut.mkdir()
    shut.chmod(0o555)
    for folder in (shut, shut / "run"):

        def attempt(folder=folder):
            if os.getuid() == 0:
                for parent in tmp_path.parents:
                    with suppress(OSError):
                        parent.chmod(parent.stat().st_mode | 0o055)
                tmp_path.chmod(0o755)
                os.setuid(NOBODY)
            with artifact.claimed(folder, {"seed": 1}):
                pass

        said = forked(attempt)
        assert "ResourceError" in said
        assert str(shut) in said
    shut.chmod(0o755)


def test_leftovers_of_a_killed_process_neither_block_nor_stay(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").touch()
    (run / ".corda.run.json.77").write_text("{")  # killed while it claimed the folder
    (run / ".corda.plan.x7").mkdir()
    with artifact.claimed(run, {"seed": 1}):
        assert sorted(path.name for path in run.iterdir()) == [".lock", "run.json"]


def test_a_damaged_owner_is_refused_with_what_to_do(tmp_path):
    with artifact.claimed(tmp_path / "run", {"seed": 1}):
        pass
    (tmp_path / "run" / "run.json").write_text('{"seed" 1}')
    with (
        pytest.raises(ArtifactError, match=r"run\.json is not JSON.*name another output_dir"),
        artifact.claimed(tmp_path / "run", {"seed": 1}),
    ):
        pass


def test_an_outdated_artifact_that_was_moved_away_by_a_killed_process_is_made_again(tmp_path):
    made(tmp_path / "run" / "plan")
    old = tmp_path / "run" / ".corda.plan.old.x"
    old.mkdir()
    shutil.move(tmp_path / "run" / "plan", old / "plan")
    artifact.write_json(tmp_path / "run" / "run.json", {"seed": 1})
    with artifact.claimed(tmp_path / "run", {"seed": 1}):
        assert artifact.reusable(tmp_path / "run" / "plan", "plan", "f" * 16) is None
        assert not old.exists()


def test_a_cut_off_hash_of_a_checkpoint_is_not_believed(tmp_path, monkeypatch):
    from corda import models

    monkeypatch.setenv("CORDA_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "config.json"
    file.write_text("{}")
    right = models._known_hash(file)
    (noted,) = (tmp_path / "cache" / "hashes").iterdir()
    noted.write_text("")
    assert models._known_hash(file) == right == artifact.file_hash(file)
    assert noted.read_text() == right


def forked(attempt) -> str:
    """What an attempt in a forked child ended with: a CordaError's type and text, or 'fine'."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # the parent's threads are not in the child, which would wait for them
        said = "fine"
        try:
            attempt()
        except CordaError as error:
            said = f"{type(error).__name__}: {error}"
        except BaseException as error:
            said = json.dumps(["unexpected", repr(error)])
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        said = stream.read()
    os.waitpid(pid, 0)
    return said
