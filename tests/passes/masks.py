"""ONNX models around a mask that is written as text, and the mask's cells as another program computes them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnx.parser
from onnx.reference import ReferenceEvaluator

from swacompile.attention import Attention, BandProof, Refutation, Witness
from swacompile.band import Alignment, BandMask
from swacompile.frontends import onnx as frontend
from swacompile.graph import Graph
from swacompile.passes.detect_attention import detect_attention
from swacompile.passes.prove_band import Prover
from swacompile.passes.read_masks import read_masks

HEADS, HEAD_SIZE = 2, 8
LOWEST = "-3.4028235e38"
POSITIONS = """
  q_shape = Shape(query)
  k_shape = Shape(key)
  B = Gather(q_shape, i0)
  S = Gather(q_shape, i2)
  T = Gather(k_shape, i2)
  q_line = Range(i0, S, i1)
  k_line = Range(i0, T, i1)
  q = Unsqueeze(q_line, axis1)
  k = Unsqueeze(k_line, axis0)
"""
NUMBERS = (
    """int64 i0 = {0}, int64 i1 = {1}, int64 i2 = {2}, int64[1] axis0 = {0}, int64[1] axis1 = {1}, int64[1] axis2 = {2},
  int64[1] axis01 = {0}, float zero = {0.0}, float one = {1.0}, float lowest = {%s}, float minus_inf = {-inf},
  bool yes = {1}, bool no = {0}"""
    % LOWEST
)


@dataclass(frozen=True, kw_only=True)
class MaskModel:
    """An attention whose mask is computed by `body`, in the ONNX text format.

    The body may use q (S,1) and k (1,T), int64 positions; S, T, B, int64 scalars; i0, i1, i2, zero, one, lowest, yes, no. It gives
    `result`: where `form` is "seen" a bool that is put into where(seen, 0, lowest); where "added" a float that is added to the scores; where
    "scores" what the softmax takes, made from `scores`.
    """

    body: str
    result: str = "seen"
    form: str = "seen"
    queries: str = "S"
    keys: str = "T"
    batch: str = "B"
    inputs: str = ""
    constants: Mapping[str, str] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    opset: int = 20

    def proto(self) -> onnx.ModelProto:
        after = {
            "seen": f"mask = Where({self.result}, zero, lowest)\n masked = Add(scores, mask)",
            "added": f"masked = Add(scores, {self.result})",
            "scores": f"masked = Identity({self.result})",
        }[self.form]
        tail = f"""
          kt = Transpose<perm = [0, 1, 3, 2]>(key)
          product = MatMul(query, kt)
          scores = Mul(product, scale)
          {self.body}
          {after}
          weights = Softmax<axis = -1>(masked)
          out = MatMul(weights, value)
        """
        return self._model(tail, f"float[{self.batch},{HEADS},{self.queries},{HEAD_SIZE}] out")

    def _model(self, tail: str, output: str, scores: str = "") -> onnx.ModelProto:
        declared = ", ".join(f"{name} = {{{value}}}" for name, value in self.constants.items())
        b, s, t = self.batch, self.queries, self.keys
        text = f"""<ir_version: 8, opset_import: ["" : {self.opset}]>
        attention (float[{b},{HEADS},{s},{HEAD_SIZE}] query, float[{b},{HEADS},{t},{HEAD_SIZE}] key, float[{b},{HEADS},{t},{HEAD_SIZE}] value
          {", " + self.inputs if self.inputs else ""} {scores}) => ({output})
        <{NUMBERS}, float scale = {{{HEAD_SIZE**-0.5}}} {", " + declared if declared else ""}>
        {{ {POSITIONS} {tail} }}"""
        model = onnx.parser.parse_model(text)
        model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in self.arrays.items())
        return model

    @cached_property
    def _evaluator(self) -> ReferenceEvaluator:
        """The mask alone."""
        sort = {"seen": "bool", "added": "float", "scores": "float"}[self.form]
        given = f", float[{self.batch},{HEADS},{self.queries},{self.keys}] scores" if self.form == "scores" else ""
        model = self._model(self.body, f"{sort}[] {self.result}", given)
        model.graph.output[0].type.tensor_type.ClearField("shape")
        return ReferenceEvaluator(model)

    def cells(self, queries: int, keys: int, *, batch: int = 1, **feeds: np.ndarray) -> np.ndarray:
        """The mask as booleans (batch, heads, queries, keys), computed by onnx's reference evaluator."""
        found = self.values(queries, keys, batch=batch, **feeds)[self.result]
        shown = found if self.form == "seen" else found > -1e30
        return np.broadcast_to(shown, (batch, HEADS, queries, keys))

    def values(self, queries: int, keys: int, *, batch: int = 1, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        """Every value on the way to the mask, by name."""
        feeds |= {
            "query": np.zeros((batch, HEADS, queries, HEAD_SIZE), np.float32),
            "key": np.zeros((batch, HEADS, keys, HEAD_SIZE), np.float32),
            "value": np.zeros((batch, HEADS, keys, HEAD_SIZE), np.float32),
        }
        if self.form == "scores":
            feeds["scores"] = np.ones((batch, HEADS, queries, keys), np.float32)
        return dict(self._evaluator.run(None, feeds, intermediate=True))


def graph_of(model: onnx.ModelProto) -> Graph:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return frontend.read(path).graph


def verdict_on(model: MaskModel | onnx.ModelProto) -> BandProof | Refutation:
    """The verdict on the only attention of a model."""
    graph = graph_of(model.proto() if isinstance(model, MaskModel) else model)
    reading = read_masks(graph)
    (site,) = detect_attention(reading)
    return Prover(arrays=reading.arrays).prove(site) if isinstance(site, Attention) else site


def site_of(model: MaskModel) -> Attention:
    """The only attention of a model, which must be readable."""
    (site,) = detect_attention(read_masks(graph_of(model.proto())))
    assert isinstance(site, Attention), site
    return site


def band_cells(band: BandMask, queries: int, keys: int) -> np.ndarray:
    """The band as booleans (queries, keys), from its definition."""
    offset = keys - queries if band.alignment is Alignment.BOTTOM_RIGHT else 0
    distance = np.arange(keys)[None, :] - (np.arange(queries)[:, None] + offset)
    left, right = -np.inf if band.left is None else -band.left, np.inf if band.right is None else band.right
    return np.asarray((distance >= left) & (distance <= right))


def assert_is(model: MaskModel, band: BandMask, sizes: tuple[tuple[int, int], ...], **feeds: np.ndarray) -> None:
    """The mask's cells at these (queries, keys) are those of the band."""
    for queries, keys in sizes:
        cells = model.cells(queries, keys, **feeds)
        assert np.array_equal(cells, np.broadcast_to(band_cells(band, queries, keys), cells.shape)), (
            band,
            queries,
            keys,
        )


def size_of(witness: Witness, name: str, default: int) -> int:
    return dict(witness.sizes).get(name, default)
