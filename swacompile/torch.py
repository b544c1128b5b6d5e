"""torch.ops.swacompile.banded_attention: importing this module registers it, with its fake kernel and its gradient.

docs/operator.md's BandedAttention on tensors of the order (batch, heads, length, size), with any strides:

    banded_attention(query, key, value, key_padding=None, segments=None, sinks=None, bias=None, alibi_slopes=None,
                     offset=None, *, scale, softcap=0.0, left_window_size=-1, right_window_size=-1,
                     bottom_right=False, chunk_size=0, zeroed=False, bshd_output=True)

`bshd_output` orders the result's memory (batch, length, heads, size), as torch's scaled_dot_product_attention does; its
shape is the same either way. Importing compiles the operator for this version of torch where that was not done before.
"""

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swacompile.runtime.torch_op.backward import Problem, backward
from swacompile.runtime.torch_op.build import operator_library
from swacompile.runtime.torch_op.library import OperatorLibrary

OPERATOR = "swacompile::banded_attention"
BACKWARD = f"{OPERATOR}_backward"

_library = OperatorLibrary(operator_library())


def backend(module: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
    """torch.compile's backend "swacompile" (torch_backend.py)."""
    from swacompile.torch_backend import swacompile

    return swacompile(module, inputs, **options)


def _register_backend() -> None:
    """Make the backend's name known to torch where no installed package does: in a source tree on the path."""
    if entry_points(group="torch_dynamo_backends", name="swacompile"):
        return
    from torch._dynamo import register_backend

    register_backend(backend, name="swacompile")


_register_backend()


def overload() -> torch._ops.OpOverload:
    """The operator as FX nodes name it."""
    found: torch._ops.OpOverload = torch.ops.swacompile.banded_attention.default
    return found


def add_kernels(path: str | Path) -> None:
    """Load a kernel library, so that its head sizes need not be built here. Raises ArtifactError."""
    _library.add_kernels(Path(path))


def add_cuda_kernels(path: str | Path, runtime: str | Path | None = None) -> None:
    """Load a library of CUDA kernels; TVM's runtime libraries from the folder `runtime` where TVM is not installed.

    Raises ArtifactError.
    """
    _library.add_cuda_kernels(Path(path), None if runtime is None else Path(runtime))


def call_count() -> int:
    """How many times the operator has run a kernel in this process, on a CPU or on a GPU."""
    return _library.call_count()


@torch.library.register_fake(OPERATOR)  # type: ignore[untyped-decorator]  # torch's
def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding: Tensor | None = None,
    segments: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    left_window_size: int = -1,
    right_window_size: int = -1,
    bottom_right: bool = False,
    chunk_size: int = 0,
    zeroed: bool = False,
    bshd_output: bool = True,
) -> Tensor:
    if any(operand.dim() != 4 for operand in (query, key, value)):
        raise ValueError(f"{OPERATOR}: expected 4 axes, found {query.dim()}, {key.dim()} and {value.dim()}")
    batch, heads, queries, _ = query.shape
    size = value.shape[3]
    if not bshd_output:
        return query.new_empty((batch, heads, queries, size))
    return query.new_empty((batch, queries, heads, size)).transpose(1, 2)


@torch.library.register_fake(BACKWARD)  # type: ignore[untyped-decorator]  # torch's
def _fake_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding: Tensor | None,
    segments: Tensor | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    offset: Tensor | None,
    *,
    output_mask: list[bool],
    **_: object,
) -> tuple[Tensor, ...]:
    operands = (query, key, value, sinks, bias, alibi_slopes)
    return tuple(
        operand.new_empty(operand.shape) if wanted and operand is not None else query.new_empty(0)
        for operand, wanted in zip(operands, output_mask, strict=True)
    )


@torch.library.impl(BACKWARD, ("CPU", "CUDA"))
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding: Tensor | None,
    segments: Tensor | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    offset: Tensor | None,
    *,
    scale: float,
    softcap: float,
    left_window_size: int,
    right_window_size: int,
    bottom_right: bool,
    chunk_size: int,
    zeroed: bool,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    first = int(offset) if offset is not None else key.shape[2] - query.shape[2] if bottom_right else 0
    problem = Problem(
        query=query,
        key=key,
        value=value,
        key_padding=key_padding,
        segments=segments,
        sinks=sinks,
        bias=bias,
        alibi_slopes=alibi_slopes,
        offset=first,
        scale=scale,
        softcap=softcap,
        left=left_window_size,
        right=right_window_size,
        chunk_size=chunk_size,
        zeroed=zeroed,
    )
    return backward(problem, grad, output_mask)
