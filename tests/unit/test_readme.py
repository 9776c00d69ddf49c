"""The README's numbers are those of the committed result file."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_is_the_result_files():
    module = runpy.run_path(str(ROOT / "benchmarks" / "readme_table.py"))
    results = json.loads((ROOT / "benchmarks" / "results" / "demo-seeds.json").read_text())
    assert module["table"](results) in (ROOT / "README.md").read_text()


def test_results_say_where_they_come_from():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        result = json.loads(path.read_text())
        assert result["name"] == path.stem
        assert result["device"]
        assert result["provenance"]["packages"]["torch"]
        assert "/work" not in path.read_text()
        assert "/root" not in path.read_text()
