"""Small ONNX models made in the tests."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

WINDOWED = """
<ir_version: 8, opset_import: ["" : {opset}]>
attention ({inputs}) => ({dtype}[{out_dims}] out)
<int64 zero = {{0}}, int64 one = {{1}}, int64 window = {{{window}}}, float hidden = {{{lowest}}}, float shown = {{0.0}}, float scale = {{{scale}}},
 int64[1] first = {{0}}, int64[1] last = {{1}}, int64 two = {{2}}{more}>
{{
  shape = Shape(query)
  length = Gather(shape, {axis})
  positions = Range(zero, length, one)
  q = Unsqueeze(positions, last)
  k = Unsqueeze(positions, first)
  edge = Sub(q, window)
  near = Greater(k, edge)
  past = LessOrEqual(k, q)
  seen = And(near, past)
  mask = Where(seen, shown, hidden)
  {body}
}}
"""
PLAIN_BODY = """kt = Transpose<perm = [0, 1, 3, 2]>(key)
  product = MatMul(query, kt)
  scores = Mul(product, scale)
  masked = Add(scores, mask)
  weights = Softmax<axis = -1>(masked)
  out = MatMul(weights, value)"""


def windowed(
    body: str = PLAIN_BODY,
    *,
    inputs: str,
    out_dims: str,
    window: int = 7,
    opset: int = 20,
    dtype: str = "float",
    lowest: str = "-3.4028235e38",
    scale: float = 8**-0.5,
    axis: str = "two",
    more: str = "",
) -> onnx.ModelProto:
    """A model whose `mask` is where(k > q - window and k <= q, 0, lowest) along the axis of query that the value `axis` names."""
    text = WINDOWED.format(
        body=body, inputs=inputs, out_dims=out_dims, window=window, opset=opset, dtype=dtype, lowest=lowest, scale=scale, axis=axis,
        more=more,
    )  # fmt: skip
    return onnx.parser.parse_model(text)


def three(dims: str, dtype: str = "float") -> str:
    """The inputs query, key and value of one shape."""
    return ", ".join(f"{dtype}[{dims}] {name}" for name in ("query", "key", "value"))


def causal_window(window: int, *, opset: int = 20, heads: int = 2, head_size: int = 8) -> onnx.ModelProto:
    """softmax(q k^T / sqrt(d) + mask) v, dynamic batch and length."""
    dims = f"batch,{heads},length,{head_size}"
    return windowed(inputs=three(dims), out_dims=dims, window=window, opset=opset, scale=head_size**-0.5)


def run(path: Path, feeds: dict[str, np.ndarray], library: Path | None = None) -> np.ndarray:
    """First output of a model in ONNX Runtime, with a kernel library where one is given."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, feeds)[0]
    return result


def with_external_weights(folder: Path, megabytes: int, layers: int = 1) -> Path:
    """A windowed attention behind `layers` large projections whose weights lie in a sparse file `weights.bin`."""
    width = 1024
    rows = megabytes * (1 << 20) // (4 * width * layers)
    model = causal_window(5, heads=1, head_size=width)
    data = folder / "weights.bin"
    with data.open("wb") as file:
        file.truncate(layers * rows * width * 4)
    hidden = "value"
    first = []
    for layer in range(layers):
        weight = TensorProto(
            name=f"weight_{layer}", data_type=TensorProto.FLOAT, dims=[rows, width], data_location=TensorProto.EXTERNAL
        )
        for key, value in (
            ("location", data.name),
            ("offset", str(layer * rows * width * 4)),
            ("length", str(rows * width * 4)),
        ):
            weight.external_data.add(key=key, value=value)
        model.graph.initializer.append(weight)
        first.append(
            helper.make_node("ReduceMax", [weight.name], [f"largest_{layer}"], keepdims=0, name=f"largest_{layer}")
        )
        first.append(helper.make_node("Add", [hidden, f"largest_{layer}"], [f"hidden_{layer}"], name=f"shift_{layer}"))
        hidden = f"hidden_{layer}"
    for node in model.graph.node:
        node.input[:] = [hidden if name == "value" else name for name in node.input]
    nodes = first + list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    path = folder / "large.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def save(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def array(name: str, values: np.ndarray) -> TensorProto:
    return numpy_helper.from_array(values, name)
