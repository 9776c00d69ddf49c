"""Bars show time gone and left on a terminal, and nothing elsewhere."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import corda
from corda.progress import shown, silent


def test_items_pass_through():
    assert list(shown(iter("abc"), "train", 3)) == ["a", "b", "c"]
    assert list(silent([1, 2], "train", 2)) == [1, 2]


def test_nothing_is_shown_without_a_terminal(monkeypatch):
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    assert list(shown(range(4), "train", 4)) == [0, 1, 2, 3]
    assert err.getvalue() == ""


def test_a_terminal_sees_how_far_it_is_and_what_is_left():
    script = "import time\nfrom corda.progress import shown\n"
    script += "for _ in shown(range(4), 'collect', 4): time.sleep(0.3)\nprint('done')"
    leader, follower = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(Path(corda.__file__).parents[1]), "COLUMNS": "120", "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=follower, stdout=subprocess.PIPE)
    os.close(follower)
    seen = b""
    while True:
        try:
            piece = os.read(leader, 4096)
        except OSError:
            break
        if not piece:
            break
        seen += piece
    assert process.communicate()[0] == b"done\n"
    text = seen.decode()
    assert "collect" in text
    assert "/4" in text
    assert "left" in text
    assert "0:00:0" in text


def test_training_steps_are_items(model, tokenizer, tmp_path):
    from corda.adapter import attach
    from corda.data.batches import Encoded
    from corda.plan.make import make_plan
    from corda.reading import parse_adapter
    from corda.recipe import TrainingOptions
    from corda.targets import find_targets
    from corda.training import train

    plan = make_plan(model, find_targets(model, ["q_proj"]), parse_adapter({"mode": "lora", "rank": 2}))
    told: list[tuple[str, int]] = []
    drawn: list[int] = []

    def watch(items, what, total):
        told.append((what, total))
        for item in items:
            drawn.append(item)
            yield item

    rows = [Encoded(tuple(range(3, 9)), (True,) * 6)] * 8
    options = TrainingOptions(max_steps=3, per_device_train_batch_size=2)
    train(attach(model, plan), tokenizer, rows, options, folder=tmp_path / "c", fingerprint="f", progress=watch)
    assert told == [("train", 3)]
    assert drawn == [0, 1, 2]
