"""The verb that talks to the base and the trained model side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from corda.cli.app import app, note
from corda.cli.arguments import AsJson, Overrides, RunOrRecipe
from corda.cli.output import load, quiet

if TYPE_CHECKING:
    from corda.chatting import Pair, Who

_NAMES: tuple[Who, ...] = ("base", "tuned")
_HELP = "/new: forget what was said; /quit or Ctrl-D: end."


@app.command()
def chat(
    run: RunOrRecipe,
    set_: Overrides = None,
    form: Annotated[str | None, typer.Option(help="chat, plain or raw; default: as trained")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens")] = 256,
    as_json: AsJson = False,
) -> None:
    """Talk to the base and the tuned model side by side.

    Prompts are typed, or read line by line from a pipe; then they do not belong together.
    """
    quiet()
    from corda.chatting import open_pair, recipe_of

    recipe = load(run, set_) if run.is_file() else recipe_of(run)
    pair = open_pair(recipe, form, None if run.is_file() else run)
    watched = sys.stdin.isatty() and not as_json
    if watched:
        note(f"Prompts in form {pair.form}. {_HELP}")
    told: dict[Who, list[tuple[str, str]]] = {who: [] for who in _NAMES}
    for said in _typed() if watched else _piped():
        if said == "/new" or not watched:  # lines of a pipe do not belong together
            told = {who: [] for who in _NAMES}
        if said == "/new":
            continue
        for turns in told.values():
            turns.append(("user", said))
        answers = (_columns if sys.stdout.isatty() and not as_json else _lines)(pair, told, max_new_tokens, as_json)
        for who, answer in answers.items():
            told[who].append(("assistant", answer))
        if as_json:
            typer.echo(json.dumps({"prompt": said, **answers}, ensure_ascii=False))


def _typed() -> Iterator[str]:
    import readline  # noqa: F401  (lines can be edited and called back)

    while True:
        try:
            said = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        if said == "/quit":
            return
        if said:
            yield said


def _piped() -> Iterator[str]:
    for line in sys.stdin:
        if line.strip():
            yield line.strip()


def _lines(pair: Pair, told: dict[Who, list[tuple[str, str]]], max_new_tokens: int, silent: bool) -> dict[Who, str]:
    """One answer after the other, as it comes."""
    from corda.chatting import reply

    if silent:
        return {who: reply(pair, who, told[who], max_new_tokens) for who in _NAMES}
    typer.echo(f"prompt: {told['base'][-1][1]}")
    answers: dict[Who, str] = {}
    for who in _NAMES:
        typer.echo(f"{who}: ", nl=False)
        answers[who] = reply(pair, who, told[who], max_new_tokens, lambda piece: typer.echo(piece, nl=False))
        typer.echo()
    return answers


def _columns(pair: Pair, told: dict[Who, list[tuple[str, str]]], max_new_tokens: int, silent: bool) -> dict[Who, str]:
    """Two columns that fill one after the other."""
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    from corda.chatting import reply

    answers: dict[Who, str] = dict.fromkeys(_NAMES, "")

    def drawn() -> Table:
        table = Table(expand=True, show_lines=False)
        for who in _NAMES:
            table.add_column(who, ratio=1, overflow="fold")
        table.add_row(*map(Text, answers.values()))
        return table

    with Live(drawn(), auto_refresh=False, vertical_overflow="visible") as live:
        for who in _NAMES:

            def say(piece: str, who: Who = who) -> None:
                answers[who] += piece
                live.update(drawn(), refresh=True)

            reply(pair, who, told[who], max_new_tokens, say)
    return answers
