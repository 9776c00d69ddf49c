"""Typed errors that a person can act on: what is wrong, where, what was found, what was expected, what to do."""

from __future__ import annotations

from typing import ClassVar


class CordaError(Exception):
    """Base of every error that corda raises on purpose.

    Args:
        what: One clause naming the problem.
        where: The file, key, layer or argument concerned.
        got: What was found there.
        expected: What would have been right.
        fix: What to change.
    """

    exit_code: ClassVar[int] = 2
    shared: bool = False  # it was raised in all processes of a run, so that one of them prints it

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object | None = None,
        expected: object | None = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.expected, self.fix = what, where, got, expected, fix
        parts = [f"{what}."]
        for label, value in (("Where", where), ("Got", got), ("Expected", expected), ("To fix", fix)):
            if value is not None:
                parts.append(f"{label}: {str(value).rstrip('.')}.")
        super().__init__(" ".join(parts))


class RecipeError(CordaError):
    """The recipe, or a value set on the command line, is not valid."""


class DataError(CordaError):
    """A data file is missing, malformed, of no known format, or overlaps with another."""


class ModelError(CordaError):
    """The base model cannot be found or used."""


class TargetError(CordaError):
    """No layer, or not the intended layer, was matched."""


class CalibrationError(CordaError):
    """Covariances could not be collected: a layer without tokens, or activations that are not finite."""


class PlanError(CordaError):
    """A rank, budget or hand-edited plan that the layers do not allow."""


class AdapterError(CordaError):
    """Factors that do not fit the model they are attached to."""


class ArtifactError(CordaError):
    """A stage's folder is missing, corrupted, foreign, locked or of another run."""


class ResourceError(CordaError):
    """Not enough disk, or a folder that cannot be written."""


class CheckError(CordaError):
    """A result failed corda's own check (step 0, or an export compared after reload)."""

    exit_code: ClassVar[int] = 1
