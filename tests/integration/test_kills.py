"""The crash harness at a fraction of its kills; benchmarks/crash.py runs it in full."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "crash.py"


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bytes(tmp_path):
    output = tmp_path / "crash.json"
    arguments = ["--kills", "4", "--every", "9", "--flips", "1", "--output", str(output)]
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(output.read_text())
    assert found["wrong"] == 0, done.stdout[-3000:]
    assert all(stage["killed_at_random"]["killed"] == 4 for stage in found["stages"].values())
    assert sum(stage["killed_at_operations"]["killed"] for stage in found["stages"].values()) > 30


WORKERS = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from corda.comparing.compare import end_with_parent

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(600)
"""


@pytest.mark.slow
def test_workers_of_a_killed_comparison_end(tmp_path):
    script = tmp_path / "workers.py"
    script.write_text(WORKERS, encoding="utf-8")
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        os.kill(worker, 0)  # it is there
        parent.kill()
    ended = time.monotonic() + 60
    while time.monotonic() < ended:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker went on")
