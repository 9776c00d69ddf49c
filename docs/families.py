"""The table of docs/families.md out of docs/families.json, which the tests write: python docs/families.py rewrites it.

CORDA_RECORD_FAMILIES=1 pytest tests/unit/test_families.py tests/unit/test_experts.py tests/unit/test_vlm.py notes anew
what was run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

HERE = Path(__file__).parent
MARK = re.compile(r"(<!-- families -->\n).*?(<!-- end -->)", re.S)
COLUMNS = ("collect", "stream", "KPM", "IPM", "++", "4-bit", "train", "export", "reload")


def table(families: dict[str, dict[str, str]]) -> str:
    """Markdown rows, one per family."""
    lines = [f"| family | {' | '.join(COLUMNS)} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    lines += [
        f"| {name} | {' | '.join(facts.get(c, 'not run') for c in COLUMNS)} |" for name, facts in families.items()
    ]
    return "\n".join(lines) + "\n"


def rendered(page: str, families: dict[str, dict[str, str]]) -> str:
    """The page with its table made anew."""
    return MARK.sub(lambda found: found[1] + table(families) + found[2], page)


if __name__ == "__main__":
    page = HERE / "families.md"
    facts = json.loads((HERE / "families.json").read_text(encoding="utf-8"))
    page.write_text(rendered(page.read_text(encoding="utf-8"), facts), encoding="utf-8")
