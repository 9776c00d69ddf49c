"""The README's numbers are those of the committed result file."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tables_are_the_result_files(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = runpy.run_path(str(ROOT / "benchmarks" / "readme_table.py"))
    readme, read = (ROOT / "README.md").read_text(), module["read"]
    assert module["table"](read("demo-seeds")) in readme
    assert module["kept"]({name: read(name) for name in module["KEPT"]}) in readme


def test_the_speeds_are_the_result_files():
    readme = " ".join((ROOT / "README.md").read_text().split())
    results = ROOT / "benchmarks" / "results"
    whole, small, large = (
        json.loads((results / f"{name}.json").read_text())
        for name in ("init-smollm2", "decompose-small-4096-r128", "decompose-large-4096-r128")
    )
    memory = whole["extra_memory"]["ratio"]
    assert f"SmolLM2-135M is {whole['ratio']:.1f} times as fast with {memory:.2f} of the extra memory" in readme
    assert f"{small['ratio']:.1f} times as fast for the smallest" in readme
    assert f"and {large['ratio']:.1f} times for the largest" in readme


def test_results_say_where_they_come_from():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        result = json.loads(path.read_text())
        assert result["name"] == path.stem
        assert result["device"]
        assert result["provenance"]["packages"]["torch"]
        assert "/work" not in path.read_text()
        assert "/root" not in path.read_text()
