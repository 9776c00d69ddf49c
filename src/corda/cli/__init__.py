"""The command line: one verb a stage, recipe file first."""

# Verbs stand in --help in the order of these imports.
from corda.cli import stages  # isort: skip
from corda.cli import exports, inspecting  # isort: skip
from corda.cli.app import app, main

__all__ = ["app", "exports", "inspecting", "main", "stages"]
