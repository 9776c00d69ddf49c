"""Public functions say what they take, give and raise.

The rule, for every public function and method of the package (a name without underscore, in a module that is no private
one): a docstring; each parameter told, under Args or by name in the text; a shape for each tensor taken and given, such
as "(d_out, d_in)" or "1-D"; and under Raises each of corda's errors that the body raises itself. The line of a verb of
the command line has its help in its options instead.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import corda
from corda import errors

ROOT = Path(corda.__file__).parent
ERRORS = {name for name in vars(errors) if name.endswith("Error")}
SHAPE = re.compile(r"\([^()]*[\w.][^()]*,[^()]*\)|\b\d-D\b|\bscalar|\bshape|\bof any shape|\([\w²+\- ]+,\)", re.I)
# A name that says all there is to say, and needs no line of its own.
PLAIN = {
    "model",
    "tokenizer",
    "progress",
    "folder",
    "path",
    "records",
    "record",
    "recipe",
    "options",
    "plan",
    "run",
    "runs",
}


def functions() -> Iterator[tuple[str, ast.FunctionDef, ast.ClassDef | None]]:
    for path in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            inside = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else []
            for one in [node, *inside]:
                if isinstance(one, ast.FunctionDef) and not one.name.startswith("_"):
                    owner = node if one is not node and isinstance(node, ast.ClassDef) else None
                    yield f"{path.relative_to(ROOT)}:{one.lineno} {one.name}", one, owner


def parameters(function: ast.FunctionDef) -> list[ast.arg]:
    given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [one for one in given if one.arg not in {"self", "cls"}]


def is_verb(function: ast.FunctionDef) -> bool:
    return any("command" in ast.unparse(one) or "callback" in ast.unparse(one) for one in function.decorator_list)


def raised(function: ast.FunctionDef) -> set[str]:
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            found |= {node.exc.func.id} & ERRORS
    return found


def test_public_functions_have_docstrings_and_tell_their_parameters():
    wrong = []
    for where, function, _ in functions():
        text = ast.get_docstring(function) or ""
        if not text:
            wrong.append(f"{where}: no docstring")
            continue
        if is_verb(function) or function.name.startswith("on_"):  # what a trainer's callback gets is the trainer's
            continue
        untold = [
            one.arg
            for one in parameters(function)
            if not re.search(rf"\b{re.escape(one.arg)}\b", text) and one.arg not in PLAIN
        ]
        if untold and len(parameters(function)) > 1:
            wrong.append(f"{where}: {', '.join(untold)}")
    assert not wrong, "\n".join(wrong)


def test_errors_raised_are_told():
    wrong = []
    for where, function, _ in functions():
        text = (ast.get_docstring(function) or "").partition("Raises:")[2]
        if is_verb(function):
            continue
        untold = [name for name in sorted(raised(function)) if name not in text and "CordaError" not in text]
        if untold:
            wrong.append(f"{where}: {', '.join(untold)}")
    assert not wrong, "\n".join(wrong)


def test_tensors_have_shapes():
    wrong = []
    for where, function, owner in functions():
        told = f"{ast.get_docstring(function) or ''} {ast.get_docstring(owner) if owner else ''}"
        takes = any(
            re.fullmatch(r"Tensor|torch\.Tensor", ast.unparse(one.annotation))
            for one in parameters(function)
            if one.annotation
        )
        gives = function.returns is not None and re.search(r"\bTensor\b", ast.unparse(function.returns))
        if (takes or gives) and not SHAPE.search(told):
            wrong.append(where)
    assert not wrong, "\n".join(wrong)


def test_the_type_checker_is_overruled_for_libraries_without_types_alone():
    """A class of an untyped library may be subclassed and an untyped function of torch's called; nothing else."""
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if "type: ignore" not in line:
                continue
            subclass = line.lstrip().startswith("class ") and "type: ignore[misc]" in line
            if not (subclass or "type: ignore[no-untyped-call]" in line):
                wrong.append(f"{path.relative_to(ROOT)}:{number} {line.strip()}")
    assert not wrong, "\n".join(wrong)
