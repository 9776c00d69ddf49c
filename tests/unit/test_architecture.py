"""Imports follow the data flow; modules stay readable; nothing is unpickled."""

from __future__ import annotations

import ast
from pathlib import Path

import corda

ROOT = Path(corda.__file__).parent
# A module may import from its own rank and from lower ones only.
RANKS = [
    {"errors", "__init__"},
    {"disk"},
    {"ranks", "options"},
    {"tasks"},
    {"recipe", "artifact", "metric", "progress", "metering", "distributed", "heap"},
    {"reading", "commenting", "advice"},
    {"krylov", "journal"},
    {"linalg", "compress", "tradeoff"},
    {"architectures", "experts", "processing", "sharding"},
    {"towers"},
    {"targets", "models"},
    {"quantization"},
    {"offload"},
    {"data"},
    {"context"},
    {"plan"},
    {"adapter", "compat", "forms", "heads", "lora_config", "parameters"},
    {"checkpoints"},
    {"drift"},
    {"training", "evaluation", "exporting", "inspecting"},
    {"report"},
    {"kinds"},
    {"inputs"},
    {"bases", "results", "estimate"},
    {"pipeline", "drafting", "chatting"},
    {"demo", "comparing", "covering"},
    {"cli"},
]


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def part(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "corda":
            tail = node.module.split(".")[1:]
            names |= {tail[0]} if tail else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("corda.")}
    return names


def test_every_module_has_a_rank():
    known = set().union(*RANKS)
    assert {part(p) for p in modules()} <= known


def test_imports_follow_the_data_flow():
    rank = {name: i for i, names in enumerate(RANKS) for name in names}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules()
        if part(path) != "__init__"
        for name in imported(path)
        if name in rank and rank[name] > rank[part(path)]
    ]
    assert not wrong


def test_mathematics_imports_torch_alone():
    for name in ("linalg.py", "krylov.py", "metric.py", "compress.py", "tradeoff.py"):
        tree = ast.parse((ROOT / name).read_text())
        roots = {
            (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else node.names[0].name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert roots <= {
            "__future__",
            "math",
            "dataclasses",
            "typing",
            "collections",
            "functools",
            "itertools",
            "contextlib",
            "torch",
            "corda",
        }


def test_no_drawers_for_leftovers():
    assert not {p.stem for p in modules()} & {"utils", "helpers", "common", "manager", "misc"}


def test_modules_stay_readable():
    long = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in modules()}
    assert not {name: n for name, n in long.items() if n > 400}


def test_nothing_is_unpickled():
    for path in modules():
        source = path.read_text()
        assert "torch.load(" not in source
        assert "pickle" not in source
