"""The site's pages recipe.md, study.md and command-line.md, from the types and the command line: an mkdocs hook."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from corda.cli import app
from corda.comparing.study import Entry, Step, Study
from corda.recipe import Recipe
from corda.tasks import DataSource, EvaluationTask

INTRO = """# Recipe

Every key, its type and its default, from the types in `corda.recipe`. A recipe is a YAML file of these; any key can be
set on the command line by `--set section.key=value`. Unknown keys are errors, with the nearest known one named.

`corda init-recipe MODEL --learn FILE --keep FILE` writes one for a model and data; `recipes/` has complete ones. The
shortest:

```yaml
output_dir: runs/first
model: {model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct}
data: {learn: learn.jsonl, keep: keep.jsonl}
```
"""
STUDY = """# Study

Every key of a study for `corda compare`, from the types in `corda.comparing.study`. [Comparing methods](comparing.md)
says what it is for and has one to begin with; any key can be set on the command line by `--set key=value`.
"""
VERBS = """# Command line

Every verb and option, from the program itself. RECIPE is a YAML file, RUN the `output_dir` of one.

Exit codes: 0, 1 (failed: a check did not hold), 2 (bad input), 130 (interrupted). A mistake in the input is one
paragraph without a traceback, unless `corda --debug VERB` is used. Progress bars and notes go to stderr, and bars only
to a terminal; with `--json` stdout holds JSON alone.
"""


def recipe_page() -> str:
    """The reference of all recipe keys."""
    parts = [INTRO, "## Top level\n", table(Recipe, only_values=True)]
    for name, field in Recipe.model_fields.items():
        block = field.annotation
        if isinstance(block, type) and issubclass(block, BaseModel):
            parts += [f"## {name}\n", f"{inspect.getdoc(block)}\n", table(block)]
        if name == "data":
            parts += [
                "### A data set\n",
                f"{inspect.getdoc(DataSource)} A text alone is its `dataset`.\n",
                table(DataSource),
            ]
        if name == "evaluation":
            text = f"{inspect.getdoc(EvaluationTask)} Below `evaluation.tasks`, under a name of your choice.\n"
            parts += ["### A task\n", text, table(EvaluationTask)]
    return "\n".join(parts)


def study_page() -> str:
    """The reference of all keys of a study."""
    parts = [STUDY, table(Study)]
    for title, block in (("A method", Entry), ("A line of `priority`", Step)):
        parts += [f"## {title}\n", f"{inspect.getdoc(block)}\n", table(block)]
    return "\n".join(parts)


def table(block: type[BaseModel], *, only_values: bool = False) -> str:
    """Keys of one block."""
    rows = ["| key | type | default | |", "| --- | --- | --- | --- |"]
    hints = typing.get_type_hints(block)
    for name, field in block.model_fields.items():
        if only_values and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            continue
        default = "required" if field.is_required() else shown(field)
        rows.append(f"| `{name}` | {kind(hints[name])} | {default} | {prose(field.description or '')} |")
    return "\n".join(rows) + "\n"


def shown(field: Any) -> str:
    """A default as YAML has it."""
    value = field.default if field.default is not PydanticUndefined else field.default_factory()
    if value is None:
        return "–"
    text = {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        text = f"{value:f}".rstrip("0")
    return f"`{escape(repr(value) if isinstance(value, list) else text)}`"


def kind(hint: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is NoneType:
        return ""
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in {UnionType, typing.Union}:
        return " or ".join(part for part in map(kind, inner) if part)
    if origin is typing.Annotated:
        return kind(inner[0])
    if origin is list:
        return f"list of {kind(inner[0])}"
    if origin is dict:
        return f"mapping to {kind(inner[1])}"
    names = {str: "text", int: "whole number", float: "number", bool: "true, false", Path: "path"}
    names |= {DataSource: "[data set](#a-data-set)", EvaluationTask: "[task](#a-task)"}
    names |= {Entry: "[method](#a-method)", Step: "[line](#a-line-of-priority)", Any: "anything"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def command_page() -> str:
    """The reference of all verbs."""
    parts = [VERBS]
    for path, command in verbs("corda", typer.main.get_command(app)):
        names = " ".join(
            option.metavar or option.name.upper() for option in command.params if option.param_type_name == "argument"
        )
        parts += [
            f"## {path}\n",
            f"{inspect.cleandoc(command.help or '')}\n",
            f"```text\n{path} {names} [OPTIONS]\n```\n",
        ]
        rows = ["| option | default | |", "| --- | --- | --- |"]
        for option in command.params:
            flags = (
                ", ".join(f"`{flag}`" for flag in option.opts)
                if option.param_type_name == "option"
                else f"`{option.metavar or option.name.upper()}`"
            )
            default = (
                "required" if option.required else "" if option.default in (None, False, ()) else f"`{option.default}`"
            )
            rows.append(f"| {flags} | {default} | {escape(getattr(option, 'help', '') or '')} |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def verbs(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Every command with its full name, groups left out."""
    below = getattr(command, "commands", None)
    if below is None:
        yield path, command
        return
    for name, one in below.items():
        yield from verbs(f"{path} {name}", one)


def escape(text: str) -> str:
    """For a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", "\\n")


def prose(text: str) -> str:
    """The same outside of code, where a last part in braces would be taken for attributes of the cell."""
    return escape(text).replace("{", "&#123;")


PAGES = {"recipe.md": recipe_page, "study.md": study_page, "command-line.md": command_page}


def on_config(config: Any) -> Any:
    """Called by mkdocs: a page that the navigation does not name becomes a guide."""
    named = set(re.findall(r"[\w-]+\.md", str(config.nav)))
    guides = next(part["Guides"] for part in config.nav if "Guides" in part)
    guides += sorted(page.name for page in Path(config.docs_dir).glob("*.md") if page.name not in named)
    return config


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs: add the pages to those that are files."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        files.append(File.generated(config, name, content=page()))
    return files
