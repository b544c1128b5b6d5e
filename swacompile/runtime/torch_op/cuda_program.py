"""The CUDA kernels that a torch program calls: which there are, which there cannot be, and a library of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from swacompile.attention import Kind, Refutation
from swacompile.errors import ToolchainError
from swacompile.passes.plan_rewrite import Replacement
from swacompile.runtime.cuda.library import Kernel
from swacompile.runtime.torch_op.cuda_build import kernels_for
from swacompile.schedules.cuda.arch import CUDA_ARCHS, CudaArch
from swacompile.schedules.cuda.choose import Shape
from swacompile.schedules.cuda.spec import DTYPES, Features, KernelSpec
from swacompile.target import Target
from swacompile.tuning.kernel_choice import CudaKernelChoice, build_cuda_choices

OPERATOR = "swacompile::banded_attention"
LIBRARY_PREFIX = "libswacompile_cuda_"
Program = ExportedProgram | fx.GraphModule
# Operands and options of the operator that are features of a kernel, and the features' names.
_OPERANDS = {
    "key_padding": "key_padding",
    "segments": "segments",
    "sinks": "sinks",
    "bias": "bias",
    "alibi_slopes": "alibi",
}
_OPTIONS = {"softcap": "softcap", "chunk_size": "chunked", "zeroed": "zeroed"}


def is_on_cuda(module: fx.GraphModule) -> bool:
    """Whether a graph computes on a GPU."""
    values = (node.meta.get("val", node.meta.get("example_value")) for node in module.graph.nodes)
    return any(isinstance(value, Tensor) and value.device.type == "cuda" for value in values)


def without_kernel(outcome: Replacement | Refutation) -> Replacement | Refutation:
    """The outcome, refused where CUDA has no kernel for it."""
    if isinstance(outcome, Refutation):
        return outcome
    site, proof = outcome.site, outcome.proof
    code = "residual"
    try:
        features = Features(zeroed=proof.kind is Kind.ZEROED, segments=outcome.segments is not None)
        code = "head-size" if site.dtype in DTYPES else "dtype"
        KernelSpec(
            dtype=site.dtype, head_size=site.head_size or 0, value_size=site.value_head_size or 0, features=features
        )
    except ValueError as error:
        return Refutation(code=code, reason=str(error), node=site.node, kind=proof.kind, band=proof.mask)
    return outcome


def kernels_of(program: Program, arch: CudaArch) -> tuple[Kernel, ...]:
    """The kernels of all calls in a program, each once; tiles are those for the longest band of its calls.

    Raises ValueError where CUDA has no kernel for a call.
    """
    widest: dict[KernelSpec, Shape] = {}
    for spec, shape in map(_need, _calls(program)):
        known = widest.get(spec)
        if known is None or (known.band is not None and (shape.band is None or shape.band > known.band)):
            widest[spec] = shape
    return tuple(kernel for spec, shape in widest.items() for kernel in kernels_for(spec, arch, shape))


def build_libraries(
    program: Program,
    targets: Sequence[Target],
    folder: Path,
    choose: Callable[[Sequence[Kernel], Target], tuple[CudaKernelChoice, ...]],
) -> dict[Path, tuple[CudaKernelChoice, ...]]:
    """One library an architecture, in `folder`, with its kernels as they were built. `choose` gives kernels their tiles, for the
    first target of an architecture.

    Raises ToolchainError, ValueError.
    """
    from swacompile.kernels.build_cuda import CudaBuildError

    first = {target.cuda.arch: target for target in reversed(targets) if target.cuda is not None}
    libraries = {}
    for name in dict.fromkeys(target.cuda.arch for target in targets if target.cuda is not None):
        path = folder / f"{LIBRARY_PREFIX}{name}.so"
        choices = choose(kernels_of(program, CUDA_ARCHS[name]), first[name])
        try:
            libraries[path] = build_cuda_choices(choices, first[name], path)
        except CudaBuildError as error:
            raise ToolchainError(str(error)) from error
    return libraries


def _calls(program: Program) -> Iterator[fx.Node]:
    module = program.graph_module if isinstance(program, ExportedProgram) else program
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            yield from (node for node in part.graph.nodes if _is_call(node))


def _is_call(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name == OPERATOR


def _need(node: fx.Node) -> tuple[KernelSpec, Shape]:
    given = _arguments(node)
    query, key, value = (given[name].meta["val"] for name in ("query", "key", "value"))
    on = {feature for name, feature in _OPERANDS.items() if given.get(name) is not None}
    on |= {feature for name, feature in _OPTIONS.items() if given.get(name)}
    spec = KernelSpec(
        dtype=str(query.dtype).removeprefix("torch."),
        head_size=int(query.shape[3]),
        value_size=int(value.shape[3]),
        features=Features(**{feature: True for feature in on}),
    )
    return spec, Shape(group=int(query.shape[1]) // int(key.shape[1]), band=_band(given))


def _arguments(node: fx.Node) -> dict[str, Any]:
    assert isinstance(node.target, torch._ops.OpOverload)
    names: Iterable[str] = (argument.name for argument in node.target._schema.arguments)
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _band(given: dict[str, Any]) -> int | None:
    left, right = given.get("left_window_size", -1), given.get("right_window_size", -1)
    return None if left < 0 or right < 0 else left + right + 1
