"""corda: context-oriented decomposition adapters (CorDA, CorDA++) on the Hugging Face stack.

The names below are loaded on first use, so that `import corda` and `corda --help` do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corda.adapter import attach as attach
    from corda.context.collect import collect as collect
    from corda.exporting.convert import convert as convert
    from corda.exporting.export import export as export
    from corda.pipeline import run as run
    from corda.plan.make import make_plan as make_plan
    from corda.recipe import Recipe as Recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "attach", "collect", "convert", "export", "make_plan", "run"]

_HOMES = {
    "Recipe": "corda.recipe",
    "attach": "corda.adapter",
    "collect": "corda.context.collect",
    "convert": "corda.exporting.convert",
    "export": "corda.exporting.export",
    "make_plan": "corda.plan.make",
    "run": "corda.pipeline",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'corda' has no attribute {name!r}")
