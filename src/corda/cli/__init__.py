"""The command line: one verb a stage, recipe file first."""

# Verbs stand in --help in the order of these imports.
from corda.cli import beginning  # isort: skip
from corda.cli import stages  # isort: skip
from corda.cli import comparing, exports, inspecting, chat  # isort: skip
from corda.cli import estimating  # isort: skip
from corda.cli.app import app, main

__all__ = ["app", "beginning", "chat", "comparing", "estimating", "exports", "inspecting", "main", "stages"]
