"""A study's finished cells as one file, so that another machine goes on where this one stopped.

python benchmarks/study_cells.py keep RUN_DIR NAME      writes benchmarks/cells/NAME.jsonl
python benchmarks/study_cells.py restore RUN_DIR NAME   writes RUN_DIR/cells, which `corda compare` takes over

One line a cell. `corda compare` takes a cell over only where its fingerprint still fits the study. Unlike the result
file this one has every retained record's influence, without which no limits can be computed. Numbers have 5 digits.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from corda import artifact

CELLS = Path(__file__).parent / "cells"


def keep(run: Path, name: str) -> int:
    """Write what has been trained, and return how many cells that is."""
    found = {file.stem: artifact.read_json(file) for file in sorted((run / "cells").glob("*.json"))}
    lines = [
        json.dumps({"id": key} | _rounded(cell), sort_keys=True)
        for key, cell in found.items()
        if cell["status"] != "unavailable"
    ]
    CELLS.mkdir(exist_ok=True)
    (CELLS / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)


def restore(run: Path, name: str) -> int:
    """Put kept cells where the study looks for them, unless there are some already; returns how many."""
    lines = (CELLS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    (run / "cells").mkdir(parents=True, exist_ok=True)
    added = 0
    for cell in map(json.loads, lines):
        place = run / "cells" / f"{cell.pop('id')}.json"
        if not place.exists():
            artifact.write_json(place, cell)
            added += 1
    return added


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["keep", "restore"])
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    given = parser.parse_args()
    print((keep if given.what == "keep" else restore)(given.run, given.name), "cells")
