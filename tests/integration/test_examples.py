"""The Python examples and the README's code run as they stand."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]


def test_kpm_in_python(pico, tmp_path, capsys):
    example = runpy.run_path(str(ROOT / "examples" / "kpm_in_python.py"))
    example["main"](str(pico), str(tmp_path / "adapter"), rank=4, steps=3)
    assert "loss" in capsys.readouterr().out
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico), str(tmp_path / "adapter"))


def test_trl_in_python(pico, tmp_path, capsys):
    example = runpy.run_path(str(ROOT / "examples" / "trl_in_python.py"))
    example["main"](str(pico), str(tmp_path / "adapter"), rank=4, steps=3)
    said = capsys.readouterr().out
    before, after = map(float, re.search(r"eval_task_loss: (\S+) before, (\S+) after", said).groups())
    assert after < before
    assert "eval_knowledge_loss" in said
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico), str(tmp_path / "adapter"))
    assert loaded.peft_config["default"].r == 4


def test_examples_are_short():
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60


def test_readme_example_is_short():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 1
    assert len(blocks[0].strip().splitlines()) <= 20


def test_readme_tree_names_what_there_is():
    readme = (ROOT / "README.md").read_text()
    tree = re.search(r"```text\n(.*?)```", readme, re.S)
    assert tree
    for name in re.findall(r"^ {2}([a-z_0-9]+(?:\.py|/))", tree.group(1), re.M):
        assert (ROOT / "src" / "corda" / name).exists(), name
    modules = {p.name + ("/" if p.is_dir() else "") for p in (ROOT / "src" / "corda").iterdir()}
    listed = set(re.findall(r"^ {2}([a-z_0-9]+(?:\.py|/))", tree.group(1), re.M))
    assert {m for m in modules if not m.startswith("__")} == listed
