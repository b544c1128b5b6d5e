"""Rewritten ONNX models at sizes that their proofs do not speak of: the same result as the source's, or an error that says what is wrong.

Every axis of every input is set to 1, alone, where ONNX Runtime runs the source so, whatever the model calls that axis; and lengths are put
together in other ways than when the model was exported.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from swacompile import pipeline
from swacompile.attention import Refutation
from swacompile.passes.guards import Guards
from tests import models
from tests.conftest import Library
from tests.passes.masks import MaskModel
from tests.tolerances import MODEL_ATOL

pytestmark = pytest.mark.cpu
W3 = {"int64 w": "3"}
BAND = "edge = Sub(q, w) near = Greater(k, edge) past = LessOrEqual(k, q) band = And(near, past) "
PADDED = "p1 = Unsqueeze(pad, axis1) p2 = Unsqueeze(p1, axis1) seen = And(band, p2)"
OF_INPUT = """n_shape = Shape(ids) n = Gather(n_shape, i1) m_line = Range(i0, n, i1) m_q = Unsqueeze(m_line, axis1) m_k = Unsqueeze(m_line, axis0)
  edge = Sub(m_q, w) near = Greater(m_k, edge) past = LessOrEqual(m_k, m_q) band = And(near, past) """
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Sized:
    """A model, and lengths to run it at by the names of its axes. `alone`: inputs whose batch of 1 must work beside a batch of 2."""

    model: MaskModel
    sizes: tuple[Mapping[str, int], ...] = ({"B": 2, "S": 7, "T": 7},)
    alone: tuple[str, ...] = ()
    names: Mapping[str, int] = field(default_factory=dict)


def sized(body: str, *, inputs: str = "", constants: Mapping[str, str] = W3, arrays: Mapping[str, np.ndarray] | None = None,
          lengths: tuple[tuple[int, int], ...] = ((7, 7), (1, 1), (2, 2)), alone: tuple[str, ...] = (), form: str = "seen", result: str = "seen",
          queries: str = "S", keys: str = "S", **names: int) -> Sized:  # fmt: skip
    model = MaskModel(
        body=body,
        inputs=inputs,
        constants=constants,
        arrays=arrays or {},
        queries=queries,
        keys=keys,
        form=form,
        result=result,
    )
    return Sized(model=model, sizes=tuple({"B": 2, "S": s, "T": t} for s, t in lengths), alone=alone, names=names)


APART = ((7, 7), (3, 7), (7, 3), (1, 7), (7, 1))
LAST = "past_keys = Sub(T, S) q_moved = Add(q, past_keys) edge = Sub(q_moved, w) near = Greater(k, edge) past = LessOrEqual(k, q_moved) "
MODELS: Mapping[str, Sized] = {
    "plain": sized(BAND + "seen = Identity(band)"),
    "lengths apart": sized(BAND + "seen = Identity(band)", queries="S", keys="T", lengths=APART),
    "after a cache": sized(LAST + "seen = And(near, past)", keys="T", lengths=((3, 7), (1, 7), (7, 7), (1, 1))),
    "never before the first key": sized(
        "gap = Sub(T, S) first = Max(gap, i0) q_moved = Add(q, first) edge = Sub(q_moved, w) near = Greater(k, edge) "
        "past = LessOrEqual(k, q_moved) seen = And(near, past)", keys="T", lengths=APART),
    "padding": sized(BAND + PADDED, inputs="bool[B,S] pad", alone=("pad",)),
    "padding of other names": sized(BAND + PADDED, inputs="bool[C,P] pad", alone=("pad",), C=2, P=7, lengths=((7, 7),)),
    "padding of batch 1": sized(BAND + PADDED, inputs="bool[1,S] pad"),
    "padding of numbers": sized("valid = Cast<to = 9>(pad) " + BAND + PADDED.replace("pad,", "valid,"), inputs="int64[B,S] pad", alone=("pad",)),
    "padding that is longer": sized(
        "t1 = Unsqueeze(T, axis0) cut = Slice(pad, axis0, t1, axis1) " + BAND + PADDED.replace("pad,", "cut,"),
        inputs="bool[B,P] pad", P=9, lengths=((7, 7), (9, 9))),
    "padding that gives the lengths": sized(
        OF_INPUT.replace("ids", "pad") + PADDED, inputs="bool[B,P] pad", P=7, alone=("pad",), lengths=((7, 7),)),
    "segments": sized(
        BAND + "l1 = Unsqueeze(labels, axis1) l2 = Unsqueeze(l1, axis1) l3 = Unsqueeze(labels, axis2) l4 = Unsqueeze(l3, axis1) "
        "same = Equal(l2, l4) seen = And(band, same)", inputs="int64[B,S] labels", alone=("labels",)),
    "segments and padding": sized(
        BAND + "l1 = Unsqueeze(labels, axis1) l2 = Unsqueeze(l1, axis1) l3 = Unsqueeze(labels, axis2) l4 = Unsqueeze(l3, axis1) "
        "same = Equal(l2, l4) both = And(band, same) p1 = Unsqueeze(pad, axis1) p2 = Unsqueeze(p1, axis1) seen = And(both, p2)",
        inputs="int64[B,S] labels, bool[B,S] pad", alone=("labels", "pad")),
    "lengths of another input": sized(OF_INPUT + "seen = Identity(band)", inputs="int64[B,N] ids", N=7, lengths=((7, 7),)),
    "a buffer that is cut": sized(
        "end = Unsqueeze(S, axis0) rows = Slice(array, axis0, end, axis0) seen = Slice(rows, axis0, end, axis1)",
        constants={}, arrays={"array": np.tril(np.triu(np.ones((9, 9), bool), -2))}, lengths=((7, 7), (9, 9), (1, 1), (11, 11))),
    "a buffer of one length": sized(
        "seen = Identity(array)", constants={}, arrays={"array": np.tril(np.triu(np.ones((7, 7), bool), -2))}, lengths=((7, 7), (1, 1))),
    "float positions": sized(
        "qf = Cast<to = 1>(q) kf = Cast<to = 1>(k) d = Sub(qf, kf) near = Less(d, x) past = GreaterOrEqual(d, zero) seen = And(near, past)",
        constants={"float x": "3.0"}),
    "padding of (1 - mask) * lowest": sized(
        BAND + "m0 = Where(band, zero, lowest) p0 = Cast<to = 1>(pad) p1 = Sub(one, p0) p2 = Mul(p1, lowest) p3 = Unsqueeze(p2, axis1) "
        "p4 = Unsqueeze(p3, axis1) m = Add(m0, p4)", form="added", result="m", inputs="int64[B,S] pad", alone=("pad",)),
    "zeroed": sized(BAND + "factor = Cast<to = 1>(band) z = Mul(scores, factor)", form="scores", result="z"),
}  # fmt: skip


def declared(model: onnx.ModelProto) -> Iterator[tuple[str, list[str | int], int]]:
    for value in model.graph.input:
        kind = value.type.tensor_type
        yield value.name, [dim.dim_param or dim.dim_value for dim in kind.shape.dim], kind.elem_type


def shapes(case: Sized) -> Iterator[Shapes]:
    """Shapes of the inputs as the model means them, then with one axis of one input as 1, for each of the case's sizes."""
    for sizes in case.sizes:
        named = {**sizes, **case.names}
        meant = {
            name: tuple(named.get(str(dim), dim) for dim in dims) for name, dims, _ in declared(case.model.proto())
        }
        plain: Shapes = {name: tuple(int(extent) for extent in shape) for name, shape in meant.items()}
        yield plain
        for name, shape in plain.items():
            for axis in range(len(shape)):
                yield plain | {name: (*shape[:axis], 1, *shape[axis + 1 :])}


def feeds(case: Sized, given: Shapes) -> dict[str, np.ndarray]:
    """Random operands; one hidden key and two segments a row, so that every query sees a key."""
    made: dict[str, np.ndarray] = {}
    for seed, (name, _, kind) in enumerate(declared(case.model.proto())):
        shape, rng = given[name], np.random.default_rng(seed)
        if kind == onnx.TensorProto.FLOAT:
            made[name] = (2 * rng.standard_normal(shape)).astype(np.float32)
        elif name == "labels":
            made[name] = np.arange(np.prod(shape)).reshape(shape) % max(shape[-1], 1) // 4
        else:
            row, key = np.indices(shape)
            made[name] = (key != row + 2).astype(onnx.helper.tensor_dtype_to_np_dtype(kind))
    return made


def session(path: Path, library: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def result(of: onnxruntime.InferenceSession, given: dict[str, np.ndarray]) -> np.ndarray | str:
    """The first output, or what the error says."""
    try:
        found: np.ndarray = of.run(None, given)[0]
    except Exception as error:  # ONNX Runtime's own classes
        return str(error)
    return found


CLEAR = re.compile(
    r"expects |expected |requested shape|cannot broadcast|invalid expand shape|mismatch|should|must", re.IGNORECASE
)


def same(source: np.ndarray, rewritten: np.ndarray, value: np.ndarray) -> bool:
    """Equal, but for queries that see no key: the source gives them the mean of all values, the operator 0."""
    if source.shape != rewritten.shape:
        return False
    sees_none = (rewritten == 0).all(-1, keepdims=True) & (
        np.abs(source - value.mean(2, keepdims=True)) < MODEL_ATOL
    ).all(-1, keepdims=True)
    return bool((np.abs(source - rewritten) * ~sees_none).max(initial=0) < MODEL_ATOL)


def differing(
    case: Sized, source: onnxruntime.InferenceSession, rewritten: onnxruntime.InferenceSession
) -> list[Shapes]:
    """The shapes at which the source gives a result, and the rewritten model another one, or an error that nobody understands."""
    found = []
    for given in shapes(case):
        fed = feeds(case, given)
        expected = result(source, fed)
        if isinstance(expected, str):
            continue
        got = result(rewritten, fed)
        if not (CLEAR.search(got) if isinstance(got, str) else same(expected, got, fed["value"])):
            found.append(given)
    return found


def rewritten(case: Sized, folder: Path, emit: pipeline.Emit = pipeline.Emit.BANDED) -> tuple[Path, Path]:
    source, out = models.save(case.model.proto(), folder / "model.onnx"), folder / "out.onnx"
    done = pipeline.rewrite(source, out, emit=emit, force=True)
    if emit is pipeline.Emit.BANDED:
        assert done.replaced, done.outcomes
    return source, out if done.replaced else source


@pytest.mark.parametrize("name", MODELS)
def test_never_another_result(name: str, tmp_path: Path, cpu_library: Library) -> None:
    case = MODELS[name]
    path, out = rewritten(case, tmp_path)
    source, portable, fast = session(path), session(out), session(out, cpu_library.path)
    assert differing(case, source, portable) == []
    assert differing(case, source, fast) == []
    as_meant = next(shapes(case))
    for alone in (None, *case.alone):
        given = as_meant | ({alone: (1, *as_meant[alone][1:])} if alone else {})
        fed = feeds(case, given)
        expected = result(source, fed)
        for model in (portable, fast):
            got = result(model, fed)
            assert not isinstance(got, str) and not isinstance(expected, str), (given, got)
            assert same(expected, got, fed["value"]), given


OTHER_FORMS = ("plain", "after a cache", "padding", "padding of batch 1", "segments", "lengths of another input")


@pytest.mark.parametrize("emit", [pipeline.Emit.ONNX_ATTENTION, pipeline.Emit.ORT_GQA])
@pytest.mark.parametrize("name", OTHER_FORMS)
def test_other_operators_neither(name: str, emit: pipeline.Emit, tmp_path: Path) -> None:
    case = MODELS[name]
    path, out = rewritten(case, tmp_path, emit)
    assert differing(case, session(path), session(out)) == []


def test_these_sizes_find_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its conditions a model gives other results in silence; and a window that is off by one is seen at the sizes meant."""
    case = MODELS["lengths of another input"]
    path, out = rewritten(case, tmp_path)
    model = onnx.load(out)
    (node,) = (node for node in model.graph.node if node.op_type == "BandedAttention")
    next(attribute for attribute in node.attribute if attribute.name == "left_window_size").i += 1
    wider = models.save(model, tmp_path / "wider.onnx")
    assert next(shapes(case)) in differing(case, session(path), session(wider))
    monkeypatch.setattr(pipeline, "guard_rewrite", lambda reading, outcomes, **_: outcomes)
    path, out = rewritten(case, tmp_path)
    assert next(shapes(case)) not in differing(case, session(path), session(out))
    assert next(shapes(case)) | {"ids": (2, 1)} in differing(case, session(path), session(out))


def test_the_error_names_what_is_expected(tmp_path: Path) -> None:
    case = MODELS["lengths of another input"]
    _, out = rewritten(case, tmp_path)
    assert "axis 1 of ids == the number of queries" in str(
        result(session(out), feeds(case, next(shapes(case)) | {"ids": (2, 1)}))
    )


def test_a_runtime_whose_gather_forgives_its_index_stops_too(tmp_path: Path) -> None:
    case = MODELS["lengths of another input"]
    _, out = rewritten(case, tmp_path)
    model = onnx.load(out)
    (check,) = (node for node in model.graph.node if node.name.startswith("expects"))
    forgiving = helper.make_node("Mul", [check.input[0], check.input[0]], check.output)
    check.CopyFrom(forgiving)
    ran = session(models.save(model, tmp_path / "forgiving.onnx"))
    assert not isinstance(result(ran, feeds(case, next(shapes(case)))), str)
    assert "Reshape" in str(result(ran, feeds(case, next(shapes(case)) | {"ids": (2, 1)})))


def test_numbers_that_are_not_0_and_1(tmp_path: Path) -> None:
    case = MODELS["padding of (1 - mask) * lowest"]
    _, out = rewritten(case, tmp_path)
    given = feeds(case, next(shapes(case)))
    assert (
        "expects" in (said := str(result(session(out), given | {"pad": 2 * given["pad"]}))) and "pad in {0, 1}" in said
    )


def test_a_length_that_is_data_is_refused(tmp_path: Path) -> None:
    """Where n is 1, its mask is broadcast over all keys."""
    body = OF_INPUT.replace("n_shape = Shape(ids) n = Gather(n_shape, i1) ", "") + "seen = Identity(band)"
    case = sized(body, inputs="int64 n")
    (outcome,) = pipeline.rewrite(
        models.save(case.model.proto(), tmp_path / "model.onnx"), tmp_path / "out.onnx"
    ).outcomes
    assert isinstance(outcome, Refutation) and outcome.code in ("guarded", "data-dependent"), outcome


def test_no_conditions_where_sizes_are_fixed(tmp_path: Path) -> None:
    source = models.save(models.windowed(inputs=models.three("2,2,9,8"), out_dims="2,2,9,8"), tmp_path / "model.onnx")
    (replaced,) = pipeline.rewrite(source, tmp_path / "out.onnx").replaced
    assert replaced.guards == Guards()
    assert {node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node} == {"BandedAttention"}
