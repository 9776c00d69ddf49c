"""README and docs/: every code block runs or is checked, and every link leads somewhere.

Python blocks of a page run in order in one namespace, on a pico model in the place of the named one. A block whose
first line is `# fails: ERROR` has to raise it. YAML blocks are parts of a recipe, or of a study where
they have methods, and have to be valid ones. In shell
blocks `corda` lines are parsed by the command line itself, `make` lines name targets, others have to be known here.
"""

from __future__ import annotations

import builtins
import json
import re
import runpy
import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from corda.cli import app
from corda.comparing.study import parse_study
from corda.reading import parse_recipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct",)
BASE = {
    "output_dir": "runs/x",
    "model": {"model_name_or_path": "m"},
    "data": {"learn": "learn.jsonl", "keep": "keep.jsonl"},
}
STUDY = {
    "output_dir": "runs/x",
    "learn": "task/answer_loss",
    "development": "dev/answer_loss",
    "keep": ["kept/answer_loss"],
    "unseen": ["kept"],
    "learning_rates": [1.0e-4, 1.0e-3],
}
HARMLESS = ("pip install", "$EDITOR", "source ", "git clone", "cd ")


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line, text) of the page's fenced blocks in a language; indentation of lists is taken off."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^([ ]*)```(\w+)[^\n]*\n(.*?)^\1```", text, re.S | re.M):
        if match[2] == language:
            body = re.sub(rf"^{match[1]}", "", match[3], flags=re.M)
            found.append((text[: match.start()].count("\n") + 1, body))
    return found


def with_language(language: str) -> list[Any]:
    return [pytest.param(page, id=page.name) for page in PAGES if blocks(page, language)]


@pytest.fixture
def start(pico: Path, tmp_path: Path, monkeypatch) -> Any:
    """A folder with the data and the run that pages speak of."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(pico), LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.save_pretrained("runs/recipe/adapter")
    return tmp_path


@pytest.mark.parametrize("page", with_language("python"))
def test_python_runs(page, pico, start):
    names: dict[str, Any] = {}
    for line, block in blocks(page, "python"):
        code = block
        for model in MODELS:
            code = code.replace(f'"{model}"', repr(str(pico)))
        code = re.sub(r"\b(rank|r)=\d{2,}", r"\1=4", code)
        compiled = compile("\n" * line + code, page.name, "exec")
        expected = re.match(r"# fails: (\w+)\n", block)
        with pytest.raises(getattr(builtins, expected[1])) if expected else nullcontext():
            exec(compiled, names)
    if page.name == "moving-from-peft.md":
        for folder in ("converted", "plain"):
            assert json.loads((start / folder / "adapter_config.json").read_text())["r"] == 8
    if page.name == "README.md":
        assert (start / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize("page", with_language("yaml"))
def test_yaml_is_a_valid_part_of_a_recipe(page):
    for line, block in blocks(page, "yaml"):
        raw = yaml.safe_load(block)
        assert isinstance(raw, dict), f"{page.name}:{line}"
        if "methods" in raw:
            parse_study(STUDY | raw | {"base": BASE}, f"{page.name}, line {line}")
            continue
        merged = {key: dict(value) if isinstance(value, dict) else value for key, value in BASE.items()}
        for key, value in raw.items():
            merged[key] = merged.get(key, {}) | value if isinstance(value, dict) else value
        parse_recipe(merged, f"{page.name}, line {line}")


@pytest.mark.parametrize("page", [*with_language("sh"), *with_language("bash")])
def test_shell_lines_are_commands_that_exist(page):
    for _, block in [*blocks(page, "sh"), *blocks(page, "bash")]:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_0-9]+=\S*", words[0]):
                words = words[1:]
            if not words:
                continue
            if words[0] in {"make"}:
                targets = {word for word in words[1:] if "=" not in word}
                assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)), line
            elif words[0].rpartition("/")[2] == "corda":
                check_command(words[1:], line)
            elif words[0].startswith("python") and words[1:2] and words[1].endswith(".py"):
                assert (ROOT / words[1]).is_file(), line
            elif words[0] in {"accelerate", "torchrun"}:
                check_launch(words, line)
            else:
                assert line.startswith(HARMLESS), f"{page.name}: {line}"


def check_launch(words: list[str], line: str) -> None:
    """`accelerate launch ... -m corda.cli VERB ...` and the like: what follows the module is a command of corda's."""
    assert "corda.cli" in words, line
    check_command(words[words.index("corda.cli") + 1 :], line)


def check_command(arguments: list[str], line: str) -> None:
    """Parse, without running, what stands behind `corda`; a recipe of this repository has to be there."""
    command: Any = typer.main.get_command(app)
    context = None
    while getattr(command, "commands", None) is not None:
        if arguments and arguments[0].startswith("-"):
            known = {flag for option in command.params for flag in option.opts}
            assert set(arguments) <= known | {"--help"}, line
            return
        assert arguments[0] in command.commands, line
        command, arguments = command.commands[arguments[0]], arguments[1:]
    try:
        context = command.make_context(command.name, list(arguments))
    except Exception as error:
        raise AssertionError(f"{line}: {error}") from error
    assert context is not None
    for word in arguments:
        if word.startswith("recipes/"):
            assert (ROOT / word).is_file(), line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    generated = runpy.run_path(str(ROOT / "docs" / "reference.py"))["PAGES"]
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            assert not re.search(r"\s|localhost|\d+\.\d+\.\d+\.\d+", target)
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else page.parent / path
        if file.name in generated and file.parent == ROOT / "docs":
            continue
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}
