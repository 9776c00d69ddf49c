"""The application: its options, and how errors become messages and exit codes."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from corda import __version__
from corda.errors import CordaError

app = typer.Typer(
    add_completion=True,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 100},
)
_debug = False
_INTERRUPTED = 130


def main() -> None:
    """Console script: exit code 0, 1 (failed), 2 (bad input) or 130 (interrupted)."""
    if _silent():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says at import which of its kernels are missing
    try:
        code = app(standalone_mode=False)
        if code == _INTERRUPTED:  # typer turns a KeyboardInterrupt into this
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except CordaError as error:
        if _debug:
            raise
        if not error.shared or not _silent():
            complain(f"{type(error).__name__}: {error}")
        sys.exit(error.exit_code)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        note("Interrupted. What is finished is kept: run the same command again to continue.")
        note(f"  {command}")
        sys.exit(_INTERRUPTED)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            complain(error.format_message())
            sys.exit(2)
        raise


def _silent() -> bool:
    """Whether this is one of several processes that a launcher has started, and not the one that prints."""
    return os.environ.get("RANK", "0") != "0"


def note(text: str) -> None:
    """A line for people, on stderr."""
    typer.echo(text, err=True)


def complain(text: str) -> None:
    """What went wrong, on stderr."""
    typer.echo(f"{typer.style('Error', fg='red', bold=True)} {text}", err=True)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks")] = False,
) -> None:
    """Fine-tune language models without making them forget."""
    global _debug  # noqa: PLW0603
    _debug = debug
    if version:
        typer.echo(__version__)
        raise typer.Exit
