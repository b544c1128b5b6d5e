"""swacompile: find sliding-window attention in exported models, prove it, and run it with banded kernels."""

from swacompile.artifact import CompiledModel, load
from swacompile.pipeline import Emit, Inspection, Rewrite, compile, inspect, rewrite

__all__ = ["CompiledModel", "Emit", "Inspection", "Rewrite", "compile", "inspect", "load", "rewrite"]
