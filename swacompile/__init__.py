"""swacompile: find sliding-window attention in exported models, prove it, and run it with banded kernels.

Names are loaded when they are first used: a machine that only runs kernels needs none of the compiler's packages.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swacompile.artifact import CompiledModel, load
    from swacompile.pipeline import Emit, Inspection, Rewrite, compile, inspect, rewrite

__all__ = ["CompiledModel", "Emit", "Inspection", "Rewrite", "compile", "inspect", "load", "rewrite"]

_HOMES = {"CompiledModel": "artifact", "load": "artifact"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'pipeline')}"), name)
