"""Benchmarks that need a device which is not here: their code runs, small, on a CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


def script(name, *arguments):
    return subprocess.run(
        [sys.executable, str(FOLDER / name), *arguments], capture_output=True, text=True, check=False, cwd=FOLDER
    )


def test_the_gpu_benchmark_runs_small():
    before = sorted((FOLDER / "results").iterdir())
    done = script("gpu.py", "--smoke")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("gpu-")] == [
        "gpu-decompose-small-32-r4",
        "gpu-decompose-large-32-r4",
        "gpu-decompose-small-48x32-r4",
        "gpu-decompose-large-48x32-r4",
        "gpu-decompose-small-32x48-r4",
        "gpu-decompose-large-32x48-r4",
        "gpu-collect-overhead",
        "gpu-init-llama2-7b",
        "gpu-init-llama2-7b-offload",
    ]
    assert sorted((FOLDER / "results").iterdir()) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = script("gpu.py")
    assert done.returncode == 1
    assert "there is no CUDA here" in done.stderr
