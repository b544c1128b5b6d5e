"""ONNX models: read into the neutral graph, and splice rewritten attentions back.

The model is held as onnx-ir, which leaves weights on disk: reading costs memory for the graph, not for the data.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from swacompile.errors import ModelError
from swacompile.frontends.einsum import contraction
from swacompile.graph import Constant, Graph, Node, TensorType
from swacompile.index_expr import Expr, integer, size

OLDEST_OPSET = 13
MAX_STEPS = 4  # Operations between a softmax and the product that its weights go to, in graphs that are not read.

# ONNX operator -> op of the neutral graph, where attributes and operands carry over as they are.
SAME_MEANING = {
    "Abs": "abs", "Add": "add", "And": "and", "Concat": "concat", "CumSum": "cumsum", "Div": "div", "Equal": "eq", "Exp": "exp",
    "Expand": "expand", "Flatten": "flatten", "Gather": "gather", "GatherND": "gather_nd", "Greater": "gt", "GreaterOrEqual": "ge",
    "Identity": "identity", "IsNaN": "isnan", "Less": "lt", "LessOrEqual": "le", "MatMul": "matmul", "Max": "max", "Min": "min", "Mod": "mod",
    "Mul": "mul",
    "Neg": "neg", "Not": "not", "Or": "or", "Pow": "pow", "Range": "iota", "Reciprocal": "reciprocal", "Reshape": "reshape",
    "ScatterND": "scatter_nd", "Shape": "shape", "Size": "size", "Slice": "slice", "Softmax": "softmax", "Sqrt": "sqrt", "Squeeze": "squeeze",
    "Sub": "sub", "Tanh": "tanh", "Transpose": "transpose", "Trilu": "trilu", "Unsqueeze": "unsqueeze", "Where": "where", "Xor": "xor",
    "ReduceMax": "reduce_max", "ReduceMean": "reduce", "ReduceSum": "reduce_sum", "ReduceMin": "reduce", "ReduceL2": "reduce",
    "ReduceSumSquare": "reduce", "Attention": "attention", "GatherElements": "gather_elements", "Gemm": "gemm", "TopK": "top_k",
    "OneHot": "one_hot", "Tile": "tile", "ScatterElements": "scatter_nd",
    "LayerNormalization": "normalize", "RMSNormalization": "normalize", "SimplifiedLayerNormalization": "normalize",
    "Sigmoid": "activation", "Relu": "relu", "Gelu": "activation", "Erf": "activation", "Cos": "activation", "Sin": "activation",
    "Log": "log", "Softplus": "activation", "Swish": "activation", "Elu": "activation", "LeakyRelu": "activation",
    "Floor": "floor", "Ceil": "ceil", "Round": "round", "Sign": "sign", "IsInf": "isinf", "Pad": "pad",
    "BitwiseAnd": "bit_and", "BitwiseOr": "bit_or", "BitwiseXor": "bit_xor",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxModel:
    """An ONNX file that was read: the neutral graph, and the model it came from for splicing."""

    path: Path
    graph: Graph
    model: ir.Model

    @property
    def opset(self) -> int:
        return int(self.model.opset_imports[""])


def read(path: Path) -> OnnxModel:
    """Read an ONNX file. Weights stay on disk; that they are there is checked.

    Raises ModelError where the file is not a complete ONNX model of opset 13 or later.
    """
    model = _load(path)
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if opset is None or opset < OLDEST_OPSET:
        raise ModelError(
            f"{path}: expected opset {OLDEST_OPSET} or later, found {opset}. Export the model again with a newer opset_version, "
            "or convert it with onnx.version_converter."
        )
    _check_external_data(path, model)
    if model.functions:
        from onnx_ir.passes.common import InlinePass

        model = InlinePass()(model).model
    return OnnxModel(path=path, graph=_translate(path.name, model), model=model)


def _load(path: Path) -> ir.Model:
    if not path.is_file():
        raise ModelError(
            f"{path}: expected an ONNX file, found {'a folder' if path.is_dir() else 'nothing'}. Give the path of a .onnx file."
        )
    try:
        model = ir.load(path)
    except Exception as error:
        raise ModelError(f"{path}: expected an ONNX model, found {path.stat().st_size} bytes that do not parse as one ({_first_line(error)}). "
                         "The file is damaged, truncated, or of another format; export it again.") from error  # fmt: skip
    if not model.opset_imports or not len(model.graph) or not model.graph.outputs:
        raise ModelError(
            f"{path}: expected an ONNX model, found one without nodes, outputs or opset. The file is damaged or of another format."
        )
    _check_nodes(path, model)
    return model


def _check_nodes(path: Path, model: ir.Model) -> None:
    """Every operator of the standard domain exists, every value comes from somewhere."""
    import onnx

    known = {value for value in model.graph.inputs} | set(model.graph.initializers.values())
    for node in model.graph:
        if node.domain in ("", "ai.onnx") and not onnx.defs.has(node.op_type):
            raise ModelError(f"{path}: node {node.name!r} has operator {node.op_type!r}, which the standard does not know. Operators of your own "
                             "belong in a domain of their own.")  # fmt: skip
        for value in node.inputs:
            if value is not None and value.producer() is None and value not in known:
                raise ModelError(f"{path}: node {node.name!r} ({node.op_type}) reads {value.name!r}, which nothing produces. The file is damaged "
                                 "or truncated; export it again.")  # fmt: skip
    for output in model.graph.outputs:
        if output.producer() is None and output not in known:
            raise ModelError(
                f"{path}: nothing produces the model's output {output.name!r}. The file is damaged or truncated; export it again."
            )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
        for node in graph:
            for attr in node.attributes.values():
                if attr.type == ir.AttributeType.TENSOR and isinstance(attr.value, ir.ExternalTensor):
                    yield attr.value


def _check_external_data(path: Path, model: ir.Model) -> None:
    folder = path.parent.resolve()
    sizes: dict[str, int] = {}
    for tensor in external_tensors(model):
        location = str(tensor.location)
        if location not in sizes:
            sizes[location] = _external_size(path, folder, location, str(tensor.name))
        needed = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
        if needed > sizes[location]:
            raise ModelError(f"{path}: tensor {tensor.name!r} needs {needed} bytes of external data, but {location!r} has {sizes[location]}. "
                             "The data file is truncated or belongs to another model.")  # fmt: skip


def _external_size(path: Path, folder: Path, location: str, tensor: str) -> int:
    file = (folder / location).resolve()
    if not file.is_relative_to(folder):
        raise ModelError(f"{path}: tensor {tensor!r} keeps its data in {location!r}, outside the model's folder {folder}. "
                         "Move the data beside the model and save it with a relative location.")  # fmt: skip
    if not file.is_file():
        raise ModelError(f"{path}: tensor {tensor!r} keeps its data in {location!r}, which is missing from {folder}. "
                         "Copy the data file beside the model.")  # fmt: skip
    return file.stat().st_size


# ------------------------------------------------------------------------------------------------------ translation


def _translate(name: str, model: ir.Model) -> Graph:
    constants: dict[str, Constant] = {}
    types: dict[str, TensorType] = {}
    nodes: list[Node] = []
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            constants[str(value.name)] = _constant(value.const_value)
    inputs = tuple(str(v.name) for v in model.graph.inputs if str(v.name) not in constants)
    for value in model.graph.inputs:
        _note_type(types, value)
    for position, node in enumerate(model.graph):
        for value in node.outputs:
            _note_type(types, value)
        nodes.extend(_translate_node(node, position, constants))
    outputs = tuple(str(v.name) for v in model.graph.outputs)
    return Graph(name=name, nodes=tuple(nodes), inputs=inputs, outputs=outputs, constants=constants, types=types)


def _constant(tensor: ir.TensorProtocol) -> Constant:
    dtype = _dtype_name(tensor.dtype)
    widened = np.float32 if dtype == "bfloat16" else None
    return Constant(
        dtype=dtype, shape=tuple(tensor.shape.numpy()), load=lambda: np.asarray(tensor.numpy(), dtype=widened)
    )


def _dtype_name(dtype: ir.DataType | None) -> str:
    names = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16", "DOUBLE": "float64", "BOOL": "bool"}
    return "unknown" if dtype is None else names.get(dtype.name, dtype.name.lower())


def _note_type(types: dict[str, TensorType], value: ir.Value) -> None:
    if value.name and value.dtype is not None:
        dims = None if value.shape is None else tuple(_dim(d) for d in value.shape)
        if dims is not None and any(d == integer(0) for d in dims):
            dims = tuple(None if d == integer(0) else d for d in dims)  # exporters write 0 for "unknown"
        types[value.name] = TensorType(dtype=_dtype_name(value.dtype), dims=dims)


def _dim(dim: int | ir.SymbolicDim) -> Expr | None:
    if isinstance(dim, int):
        return integer(dim)
    return None if dim.value is None else size(str(dim.value))


def _translate_node(node: ir.Node, position: int, constants: dict[str, Constant]) -> Iterable[Node]:
    """Nodes that stand for parts of a source node have the attribute `made`: their results are no values of the source."""
    if node.op_type == "Einsum" and node.domain in ("", "ai.onnx"):
        return _einsum(node, position)
    name = node.name or f"{node.op_type}_{position}"
    inputs = tuple("" if value is None else str(value.name) for value in node.inputs)
    outputs = tuple(str(value.name) for value in node.outputs)
    attrs: dict[str, object] = {
        key: list(a.value) if isinstance(a.value, tuple) else a.value
        for key, a in node.attributes.items()
        if not a.is_ref()
    }
    if node.op_type == "Constant":
        constants[outputs[0]] = _constant(_constant_value(node))
        return ()
    if node.domain in ("", "ai.onnx") and (special := SPECIAL.get(node.op_type)):
        return special(Node(op=node.op_type, name=name, inputs=inputs, outputs=outputs, attrs=attrs), constants)
    if inside := tuple(_attentions_inside(node)):
        attrs["attentions_inside"] = inside
    if (node.domain, node.op_type) == ("com.microsoft", "FusedMatMul") and not (
        attrs.get("transBatchA") or attrs.get("transBatchB")
    ):
        return _fused_product(Node(op="matmul", name=name, inputs=inputs, outputs=outputs, attrs=attrs), constants)
    known = node.domain in ("", "ai.onnx") and SAME_MEANING.get(node.op_type)
    op = known or (f"{node.domain}::{node.op_type}" if node.domain else node.op_type)
    return (Node(op=op, name=name, inputs=inputs, outputs=outputs, attrs=attrs),)


def _fused_product(node: Node, constants: dict[str, Constant]) -> Iterable[Node]:
    """alpha * (A @ B), each with its last two axes exchanged where asked: ONNX Runtime's optimizer makes it."""
    operands = []
    for value, flag in zip(node.inputs, ("transA", "transB"), strict=True):
        turned = f"{node.outputs[0]}.{flag}"
        if node.attrs.get(flag):
            yield Node(
                op="transpose",
                name=node.name,
                inputs=(value,),
                outputs=(turned,),
                attrs={"last_two": True, "made": True},
            )
        operands.append(turned if node.attrs.get(flag) else value)
    product = f"{node.outputs[0]}.product"
    yield Node(op="matmul", name=node.name, inputs=tuple(operands), outputs=(product,), attrs={"made": True})
    alpha = np.asarray(node.attrs.get("alpha", 1.0), np.float32)
    factor = _inline_constant(constants, f"{node.outputs[0]}.alpha", alpha)
    yield Node(op="mul", name=node.name, inputs=(product, factor), outputs=node.outputs)


def _attentions_inside(node: ir.Node) -> Iterator[str]:
    """Names of nodes in a node's own graphs that are attentions by their looks: a softmax whose result is soon multiplied."""
    graphs = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    for inner in (inner for graph in graphs for inner in ir.traversal.RecursiveGraphIterator(graph)):
        if inner.op_type == "Attention" or (inner.op_type == "Softmax" and _is_multiplied(inner)):
            yield inner.name or inner.op_type


def _is_multiplied(node: ir.Node) -> bool:
    """Whether a node's result meets a product of two computed values after a few operations."""
    values = list(node.outputs)
    for _ in range(MAX_STEPS):
        users = [user for value in values for user in value.consumers()]
        if any(
            user.op_type in ("MatMul", "Einsum") and not any(v.is_initializer() for v in user.inputs if v)
            for user in users
        ):
            return True
        values = [value for user in users for value in user.outputs]
    return False


def _einsum(node: ir.Node, position: int) -> Iterable[Node]:
    """Two operands as a product between views; other sums keep their name."""
    name, outputs = node.name or f"Einsum_{position}", (str(node.outputs[0].name),)
    given = [value for value in node.inputs if value is not None]
    values = [str(value.name) for value in given]
    equation = str(node.attributes["equation"].value)
    steps = contraction(equation, tuple(_ranks(equation, given)))
    if steps is None:
        yield Node(op="Einsum", name=name, inputs=tuple(values), outputs=outputs)
        return
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        made = outputs if last else (f"{outputs[0]}.{number}",)
        attrs = dict(step.attrs) if last else {**step.attrs, "made": True}
        yield Node(op=step.op, name=name, inputs=tuple(values[i] for i in step.inputs), outputs=made, attrs=attrs)
        values.append(made[0])


def _ranks(equation: str, operands: Iterable[ir.Value]) -> Iterator[int]:
    """Numbers of axes, from the letters where there is no ellipsis, else from the file; -1 where it does not say."""
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    for term, operand in zip(terms, operands, strict=False):
        yield len(term) if "." not in term else len(operand.shape) if operand.shape is not None else -1


def _constant_value(node: ir.Node) -> ir.TensorProtocol:
    (attribute,) = node.attributes.values()
    if attribute.type == ir.AttributeType.TENSOR:
        return attribute.value  # type: ignore[no-any-return]
    dtype = ir.DataType.INT64 if attribute.name.startswith("value_int") else ir.DataType.FLOAT
    if attribute.name.startswith("value_string"):
        return ir.tensor(0, dtype=ir.DataType.INT64)
    return ir.tensor(list(attribute.value) if attribute.name.endswith("s") else attribute.value, dtype=dtype)


def _inline_constant(constants: dict[str, Constant], name: str, value: object) -> str:
    array = np.asarray(value)
    constants[name] = Constant(
        dtype={"bool": "bool", "float32": "float32"}.get(str(array.dtype), str(array.dtype)),
        shape=array.shape,
        load=lambda: array,
    )
    return name


def _constant_of_shape(node: Node, constants: dict[str, Constant]) -> Iterable[Node]:
    given = node.attrs.get("value")
    fill = f"{node.outputs[0]}.fill"
    if given is None:
        _inline_constant(constants, fill, np.zeros(1, np.float32))
    else:
        constants[fill] = _constant(given)  # type: ignore[arg-type]
    return (
        Node(
            op="full",
            name=node.name,
            inputs=(node.inputs[0], fill),
            outputs=node.outputs,
            attrs={"dtype": constants[fill].dtype},
        ),
    )


def _cast(node: Node, constants: dict[str, Constant]) -> Iterable[Node]:
    dtype = _dtype_name(ir.DataType(int(str(node.attrs["to"]))))
    return (Node(op="cast", name=node.name, inputs=node.inputs[:1], outputs=node.outputs, attrs={"dtype": dtype}),)


def _dropout(node: Node, constants: dict[str, Constant]) -> Iterable[Node]:
    """The identity at inference; a training-mode operand that is given makes it run-time data."""
    op = "Dropout" if node.input(2) else "identity"
    return (Node(op=op, name=node.name, inputs=node.inputs[:1], outputs=node.outputs),)


def _split(node: Node, constants: dict[str, Constant]) -> Iterable[Node]:
    """One slice an output, where the sizes are constant."""
    axis = node.attrs.get("axis", 0)
    sizes = constants[node.inputs[1]].load().tolist() if node.input(1) in constants else None
    if sizes is None:
        return (Node(op="Split", name=node.name, inputs=node.inputs, outputs=node.outputs, attrs=node.attrs),)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    axes = _inline_constant(constants, f"{node.name}.axes", np.asarray([axis]))
    return tuple(
        Node(
            op="slice",
            name=node.name,
            inputs=(
                node.inputs[0],
                _inline_constant(constants, f"{output}.start", np.asarray([start])),
                _inline_constant(constants, f"{output}.end", np.asarray([start + extent])),
                axes,
            ),
            outputs=(output,),
        )
        for output, start, extent in zip(node.outputs, starts, sizes, strict=True)
    )


def _reduce(node: Node, constants: dict[str, Constant]) -> Iterable[Node]:
    """Axes as an attribute, whichever way the opset gives them."""
    attrs = dict(node.attrs)
    if node.input(1) in constants:
        attrs["axes"] = constants[node.inputs[1]].load().tolist()
    return (Node(op=SAME_MEANING[node.op], name=node.name, inputs=node.inputs[:1], outputs=node.outputs, attrs=attrs),)


def _clip(node: Node, constants: dict[str, Constant]) -> Iterable[Node]:
    """A maximum, then a minimum, of the bounds that are given."""
    value = node.inputs[0]
    bounds = [(op, bound) for op, bound in (("max", node.input(1)), ("min", node.input(2))) if bound]
    for op, bound in bounds[:-1]:
        yield Node(
            op=op, name=node.name, inputs=(value, bound), outputs=(f"{node.outputs[0]}.{op}",), attrs={"made": True}
        )
        value = f"{node.outputs[0]}.{op}"
    op, inputs = (bounds[-1][0], (value, bounds[-1][1])) if bounds else ("identity", (value,))
    yield Node(op=op, name=node.name, inputs=inputs, outputs=node.outputs)


SPECIAL: dict[str, Callable[[Node, dict[str, Constant]], Iterable[Node]]] = {
    "ConstantOfShape": _constant_of_shape,
    "Cast": _cast,
    "Dropout": _dropout,
    "Split": _split,
    "Clip": _clip,
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceSum", "ReduceMin", "ReduceL2", "ReduceSumSquare"), _reduce),
}
