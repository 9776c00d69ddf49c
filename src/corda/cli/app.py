"""The application: its options, and how errors become messages and exit codes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from corda import __version__
from corda.errors import CordaError

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 100},
)
errors = Console(stderr=True, soft_wrap=True, highlight=False)
_debug = False
_INTERRUPTED = 130


def main() -> None:
    """Console script: exit code 0, 1 (failed), 2 (bad input) or 130 (interrupted)."""
    try:
        code = app(standalone_mode=False)
        if code == _INTERRUPTED:  # typer turns a KeyboardInterrupt into this
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except CordaError as error:
        if _debug:
            raise
        errors.print(f"[bold red]Error[/] {type(error).__name__}:", end=" ")
        errors.print(str(error), markup=False)
        sys.exit(error.exit_code)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        errors.print("Interrupted. Finished stages are kept: run the same command again to continue.")
        sys.exit(_INTERRUPTED)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            errors.print(f"[bold red]Error[/] {error.format_message()}")
            sys.exit(2)
        raise


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
