"""The crash harness at a fraction of its kills; benchmarks/crash.py runs it in full."""

from __future__ import annotations

import json
import subprocess
import sys
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
