"""Calls of BandedAttention: operands, the float64 reference and a model of one node, all from one description."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from swacompile.kernels.onnx_function import Body, Optional
from swacompile.kernels.reference import UNBOUNDED, Call, banded_attention

Array = npt.NDArray[np.generic]

INPUTS = ("query", "key", "value", "key_padding", "segments", "sinks", "bias", "alibi_slopes", "offset")
TENSOR_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
TOLERANCE = {"float32": 2e-5, "float16": 4e-3}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes and features of one call, operands drawn from `seed`. `bias` gives the extents of its first two or three axes."""

    name: str
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    queries: int = 37
    keys: int = 37
    head_size: int = 16
    value_size: int = 16
    left: int = 5
    right: int = 0
    chunk_size: int = 0
    scale: float = 0.3
    softcap: float = 0.0
    kind: str = "hidden"
    alignment: str = "top_left"
    layout: str = "BHSD"
    dtype: str = "float32"
    key_padding: bool = False
    segments: bool = False
    sinks: bool = False
    bias: tuple[int, ...] | None = None
    alibi: bool = False
    offset: int | None = None
    seed: int = 0

    def but(self, **changes: object) -> "Case":
        return replace(self, **changes)  # type: ignore[arg-type]

    @cached_property
    def operands(self) -> dict[str, Array]:
        """The node's inputs by name, in the node's layout."""
        draw = np.random.default_rng(self.seed)
        made: dict[str, Array] = {
            "query": draw.standard_normal((self.batch, self.heads, self.queries, self.head_size)) * 1.5,
            "key": draw.standard_normal((self.batch, self.kv_heads, self.keys, self.head_size)) * 1.5,
            "value": draw.standard_normal((self.batch, self.kv_heads, self.keys, self.value_size)),
        }
        if self.key_padding:
            made["key_padding"] = draw.random((self.batch, self.keys)) < 0.7
            made["key_padding"][-1, :9] = False  # type: ignore[index]
        if self.segments:
            made["segments"] = np.sort(draw.integers(0, 4, (self.batch, self.keys)), axis=1)
        if self.sinks:
            made["sinks"] = draw.standard_normal(self.heads)
        if self.bias is not None:
            rows = self.bias[2] if len(self.bias) > 2 else self.queries
            made["bias"] = draw.standard_normal((*self.bias[:2], rows, self.keys))
        if self.alibi:
            made["alibi_slopes"] = draw.random(self.heads).astype(np.float32)
        if self.offset is not None:
            made["offset"] = np.asarray(self.offset, np.int64)
        return {name: self._placed(name, array) for name, array in made.items()}

    def _placed(self, name: str, array: Array) -> Array:
        if name in ("query", "key", "value") and self.layout == "BSHD":
            array = array.swapaxes(1, 2)
        return np.array(array, self.dtype if array.dtype == np.float64 else array.dtype, order="C")

    @property
    def call(self) -> Call:
        """The same call for the reference."""
        heads_first = {name: self._heads_first(self.operands[name]) for name in ("query", "key", "value")}
        more = {name: self.operands.get(name) for name in ("key_padding", "segments", "sinks", "bias", "alibi_slopes")}
        aligned = self.keys - self.queries if self.alignment == "bottom_right" else 0
        return Call(
            **heads_first,
            **more,
            left=UNBOUNDED if self.left < 0 else self.left,
            right=UNBOUNDED if self.right < 0 else self.right,
            offset=aligned if self.offset is None else self.offset,
            chunk_size=self.chunk_size,
            zeroed=self.kind == "zeroed",
            scale=float(np.float32(self.scale)),
            softcap=float(np.float32(self.softcap)),
        )

    def _heads_first(self, array: Array) -> Array:
        return array.swapaxes(1, 2) if self.layout == "BSHD" else array

    @cached_property
    def expected(self) -> npt.NDArray[np.float64]:
        """The reference's output in the node's layout."""
        output = banded_attention(self.call)
        return output.swapaxes(1, 2) if self.layout == "BSHD" else output

    @property
    def attributes(self) -> dict[str, str | int | float]:
        return {
            "layout": self.layout,
            "scale": float(self.scale),
            "softcap": float(self.softcap),
            "left_window_size": self.left,
            "right_window_size": self.right,
            "alignment": self.alignment,
            "chunk_size": self.chunk_size,
            "kind": self.kind,
        }

    def node(self, *, output: str = "output", prefix: str = "") -> onnx.NodeProto:
        given = [prefix + name if name in self.operands else "" for name in INPUTS]
        while not given[-1]:
            given.pop()
        return helper.make_node(
            "BandedAttention", given, [output], domain="swacompile", name=f"{output}_node", **self.attributes
        )

    def model(self, *functions: onnx.FunctionProto, opset: int = 18, dynamic: bool = True) -> onnx.ModelProto:
        graph = helper.make_graph(
            [self.node()], self.name, self.inputs(dynamic=dynamic), [self.output(dynamic=dynamic)]
        )
        return model_of(graph, functions, opset)

    def inputs(self, *, dynamic: bool, prefix: str = "") -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(
                prefix + name,
                helper.np_dtype_to_tensor_dtype(array.dtype),
                self._symbols(name, array.shape) if dynamic else array.shape,
            )
            for name, array in self.operands.items()
        ]

    def output(self, *, dynamic: bool, name: str = "output") -> onnx.ValueInfoProto:
        shape = (*self.operands["query"].shape[:3], self.value_size)
        return helper.make_tensor_value_info(
            name, TENSOR_TYPES[self.dtype], self._symbols("output", shape) if dynamic else shape
        )

    def _symbols(self, name: str, extents: tuple[int, ...]) -> list[str | int]:
        """Batch and lengths open, as exporters with dynamic shapes write them."""
        shape: list[str | int] = list(extents)
        if name in ("query", "key", "value", "output"):
            length = 2 if self.layout == "BHSD" else 1
            shape[0], shape[length] = "batch", "queries" if name in ("query", "output") else "keys"
        elif name in ("key_padding", "segments"):
            shape = ["batch", "keys"]
        elif name == "bias":
            shape[2:] = [1 if extents[2] == 1 else "queries", "keys"]
        return shape


def uses_of(case: Case) -> frozenset[Optional]:
    """What a function body must know of to serve this case."""
    uses = {Optional(name) for name in INPUTS[3:] if name in case.operands}
    if case.softcap:
        uses.add(Optional.SOFTCAP)
    if case.chunk_size:
        uses.add(Optional.CHUNKS)
    return frozenset(uses)


def body_of(*cases: Case, opset: int = 18) -> Body:
    """The function body for one model with all of these cases."""
    (first, *_) = cases
    return Body(
        opset=opset,
        elem_type=TENSOR_TYPES[first.dtype],
        uses=frozenset().union(*map(uses_of, cases)),
        layout=first.layout,
        alignment=first.alignment,
        kind=first.kind,
        grouped=any(case.heads != case.kv_heads for case in cases),
    )


def model_of(graph: onnx.GraphProto, functions: tuple[onnx.FunctionProto, ...], opset: int) -> onnx.ModelProto:
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("swacompile", 1)]
    return helper.make_model(graph, functions=list(functions), opset_imports=imports, ir_version=10)


def session(model: onnx.ModelProto, library: Path | None = None, threads: int = 2) -> ort.InferenceSession:
    """A CPU session, with the library where one is given."""
    from swacompile.runtime.ort_library import register

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if library is not None:
        register(options, library)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def error_of(output: Array, case: Case) -> float:
    """Largest absolute difference from the reference. A NaN counts as infinite."""
    assert output.shape == case.expected.shape and output.dtype == np.dtype(case.dtype)
    return float(np.nan_to_num(np.abs(output - case.expected), nan=np.inf).max(initial=0.0))


PLAIN = Case(name="causal")
CASES = (
    PLAIN,
    PLAIN.but(name="two-sided", left=3, right=4, kv_heads=4),
    PLAIN.but(name="one-key-head", kv_heads=1, left=0),
    PLAIN.but(name="unbounded-left", left=-1),
    PLAIN.but(name="unbounded", left=-1, right=-1),
    PLAIN.but(name="window-beyond-length", left=1000, right=1000),
    PLAIN.but(name="window-of-31-bits", left=2**31 - 2, right=2**31 - 2),
    PLAIN.but(name="one-query-bottom-right", queries=1, alignment="bottom_right"),
    PLAIN.but(name="more-queries-than-keys", queries=40, keys=29, alignment="bottom_right", left=3, right=1),
    PLAIN.but(name="offset", queries=11, offset=20, left=7),
    PLAIN.but(name="offset-before-keys", queries=11, offset=-5),
    PLAIN.but(name="offset-beyond-32-bits", queries=11, offset=2**32 + 20, left=7),
    PLAIN.but(name="offset-far-back", queries=11, offset=-(2**40), left=7, sinks=True),
    PLAIN.but(name="offset-beats-alignment", queries=11, offset=3, alignment="bottom_right"),
    PLAIN.but(name="value-size", head_size=24, value_size=8),
    PLAIN.but(name="softcap", softcap=2.0),
    PLAIN.but(name="sinks", sinks=True),
    PLAIN.but(name="key-padding", key_padding=True),
    PLAIN.but(name="segments", segments=True, right=3),
    PLAIN.but(name="segments-offset", segments=True, queries=20, offset=25, right=3),
    PLAIN.but(name="chunk", chunk_size=8, left=-1),
    PLAIN.but(name="chunk-offset", chunk_size=8, left=-1, right=-1, queries=20, offset=-3),
    PLAIN.but(name="bias-full", bias=(2, 4)),
    PLAIN.but(name="bias-shared", bias=(1, 1)),
    PLAIN.but(name="bias-per-head", bias=(1, 4), right=2),
    PLAIN.but(name="bias-per-sample", bias=(2, 1)),
    PLAIN.but(name="bias-per-key", bias=(2, 1, 1), right=2),
    PLAIN.but(name="alibi", alibi=True),
    PLAIN.but(name="zeroed", kind="zeroed", right=2),
    PLAIN.but(
        name="zeroed-operands", kind="zeroed", right=2, key_padding=True, sinks=True, bias=(1, 4), alibi=True,
    ),
    PLAIN.but(
        name="everything", left=9, right=3, chunk_size=16, softcap=3.0, key_padding=True, segments=True, sinks=True,
        bias=(1, 4), alibi=True, offset=2, queries=33,
    ),
    PLAIN.but(name="BSHD", layout="BSHD", left=3, right=1, queries=20, alignment="bottom_right", value_size=8),
    PLAIN.but(name="float16", dtype="float16"),
    PLAIN.but(
        name="float16-operands", dtype="float16", layout="BSHD", sinks=True, bias=(2, 4), alibi=True, softcap=4.0,
    ),
)  # fmt: skip
BY_NAME = {case.name: case for case in CASES}
