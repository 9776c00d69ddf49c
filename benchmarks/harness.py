"""Both sides measured alternately in one run: medians, spread, ratio, and where it was done."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corda import artifact

RESULTS = Path(__file__).parent / "results"


def summary(values: list[float], unit: str) -> dict[str, Any]:
    """Median and spread."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values), "unit": unit}


def paired(ours: Callable[[], Any], peer: Callable[[], Any], repetitions: int) -> tuple[list[float], list[float]]:
    """Seconds of each side, taken in turn."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repetitions):
        for side, call in zip(seconds, (ours, peer), strict=True):
            start = time.perf_counter()
            call()
            side.append(time.perf_counter() - start)
    return seconds


def child(script: str, *arguments: str) -> dict[str, Any]:
    """Run one side in a process of its own; it prints one JSON object as its last line."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def record(name: str, ours: dict[str, Any], peer: dict[str, Any], **more: Any) -> None:
    """Write benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    where = artifact.provenance()
    result = {
        "name": name,
        "device": where["device"],
        "ours": ours,
        "peer": peer,
        "ratio": peer["median"] / ours["median"] if ours["median"] else None,
        **more,
        "provenance": where,
    }
    artifact.write_json(RESULTS / f"{name}.json", result)
    print(name, "ratio", round(result["ratio"] or 0, 3), "ours", ours["median"], "peer", peer["median"], flush=True)
