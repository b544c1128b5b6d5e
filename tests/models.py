"""Small ONNX models made in the tests."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def causal_window(window: int, *, opset: int = 20, heads: int = 2, head_size: int = 8) -> onnx.ModelProto:
    """softmax(q k^T / sqrt(d) + where(k > q - window and k <= q, 0, lowest)) v, dynamic batch and length."""
    dims = ["batch", heads, "length", head_size]
    text = f"""
    <ir_version: 8, opset_import: ["" : {opset}]>
    attention (float[batch,{heads},length,{head_size}] query, float[batch,{heads},length,{head_size}] key,
               float[batch,{heads},length,{head_size}] value) => (float[batch,{heads},length,{head_size}] out)
    <int64 zero = {{0}}, int64 one = {{1}}, int64 window = {{{window}}}, float hidden = {{-3.4028235e38}}, float shown = {{0.0}},
     float scale = {{{head_size**-0.5}}}, int64[1] first = {{0}}, int64[1] last = {{1}}>
    {{
      shape = Shape(query)
      two = Constant<value_int: int = 2>()
      length = Gather(shape, two)
      positions = Range(zero, length, one)
      q = Unsqueeze(positions, last)
      k = Unsqueeze(positions, first)
      edge = Sub(q, window)
      near = Greater(k, edge)
      past = LessOrEqual(k, q)
      seen = And(near, past)
      mask = Where(seen, shown, hidden)
      kt = Transpose<perm = [0, 1, 3, 2]>(key)
      product = MatMul(query, kt)
      scores = Mul(product, scale)
      masked = Add(scores, mask)
      weights = Softmax<axis = -1>(masked)
      out = MatMul(weights, value)
    }}
    """
    model = onnx.parser.parse_model(text)
    assert [d.dim_param or d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim] == dims
    return model


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
