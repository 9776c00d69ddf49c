"""What every verb owes its user: speed of --help, JSON, suggestions, completion, a clean end on Ctrl-C."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import corda as package
from corda.cli import app
from corda.cli.arguments import recipe_keys

CORDA = [sys.executable, "-m", "corda.cli"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(package.__file__).parents[1]), "COLUMNS": "100"}
SLOW_TO_IMPORT = ("torch", "transformers", "pydantic", "peft", "trl", "datasets", "rich", "plotly", "yaml")


def commands() -> Iterator[tuple[str, Any]]:
    def walk(path: str, command: Any) -> Iterator[tuple[str, Any]]:
        below = getattr(command, "commands", None)
        if below is None:
            yield path, command
        for name, one in (below or {}).items():
            yield from walk(f"{path} {name}".strip(), one)

    yield from walk("", typer.main.get_command(app))


def test_help_waits_for_no_library():
    script = (
        "import sys; sys.argv = ['corda', '--help']\nfrom corda.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    )
    script += f"print('loaded', [m for m in {SLOW_TO_IMPORT} if m in sys.modules])"
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert "init-recipe" in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded []"
    assert time.perf_counter() - started < 5  # 0.15 s on an idle machine


@pytest.mark.parametrize(("name", "command"), list(commands()), ids=lambda x: x if isinstance(x, str) else "")
def test_every_verb_has_json_and_help(name, command):
    options = {flag: option for option in command.params for flag in option.opts}
    assert "--json" in options, name
    assert command.help
    missing = [option.name for option in command.params if not getattr(option, "help", "") and option.name != "help"]
    assert not missing
    assert not command.get_short_help_str(limit=64).endswith("...")


def test_unknown_verbs_options_and_keys_come_with_a_suggestion(corda, raw_recipe, write_recipe):
    for call, hint in (
        (["colect", "x"], "'collect'"),
        (["inspect", "pln"], "'plan'"),
        (["run", "x", "--dyr-run"], "--dry-run"),
        (["run", write_recipe(raw_recipe), "--set", "adaptr.rank=3"], "did you mean 'adapter'"),
        (["run", write_recipe(raw_recipe), "--set", "training.learnin_rate=3"], "did you mean 'learning_rate'"),
    ):
        code, out, err = corda(*call)
        assert code == 2
        assert out == ""
        assert hint in err, err


def test_completion_knows_verbs_and_recipe_keys():
    def complete(words: str) -> list[str]:
        environment = ENVIRONMENT | {
            "_CORDA_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - (not words.endswith(" "))),
        }
        script = (
            "import sys; sys.argv = ['corda']; from corda.cli.app import app; import corda.cli; app(prog_name='corda')"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
        )
        return done.stdout.split()

    assert complete("corda in") == ["init-recipe", "inspect"]
    assert "adapter.rank=" in complete("corda run x.yaml --set adapter.ra")
    keys = dict(recipe_keys(""))
    assert {"output_dir=", "seed=", "training.learning_rate=", "context.samples="} <= set(keys)
    assert all(keys[f"adapter.{key}="] for key in ("rank", "mode", "damp"))


def test_ctrl_c_ends_with_one_line_and_the_command_goes_on_from_there(raw_recipe, write_recipe, tmp_path):
    raw_recipe["training"] |= {"max_steps": 100_000, "save_steps": 2}
    raw_recipe["evaluation"] = {}
    path = write_recipe(raw_recipe)
    begin = functools.partial(
        subprocess.Popen,
        [*CORDA, "train", str(path)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    )
    process = begin()
    for _ in range(1200):
        if (
            list((tmp_path / "run" / "checkpoints").glob("checkpoint-*/trainer_state.json"))
            or process.poll() is not None
        ):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "run the same command again to continue" in err
    assert f"train {path}" in err
    assert out == ""
    assert not (tmp_path / "run" / "train").exists()
    kept = {stage: (tmp_path / "run" / stage / "manifest.json").stat().st_mtime_ns for stage in ("context", "plan")}
    steps = max(int(p.name.split("-")[1]) for p in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    raw_recipe["training"]["max_steps"] = 100_000
    again = begin()
    for _ in range(1200):
        now = [int(p.name.split("-")[1]) for p in (tmp_path / "run" / "checkpoints").glob("checkpoint-*")]
        if max(now, default=0) > steps or again.poll() is not None:
            break
        time.sleep(0.1)
    again.send_signal(signal.SIGINT)
    again.communicate(timeout=60)
    assert max(now) > steps
    for stage, written in kept.items():
        assert (tmp_path / "run" / stage / "manifest.json").stat().st_mtime_ns == written


def test_no_bars_where_nobody_watches(corda, raw_recipe, write_recipe):
    code, out, err = corda("eval", write_recipe(raw_recipe), "--json")
    assert code == 0
    assert json.loads(out)
    assert "it/s" not in err
    assert "left" not in err
