"""The function body in ONNX Runtime without the library, in onnx's own evaluator, and under the checker."""

import warnings

import numpy as np
import onnx
import onnx.inliner
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from swacompile.errors import ModelError
from swacompile.kernels.onnx_function import INPUTS, OPSETS, Body, Optional, banded_attention_function
from tests.runtime.cases import BY_NAME, CASES, PLAIN, TOLERANCE, Case, body_of, error_of, model_of, session


def model(case: Case, opset: int = 18) -> onnx.ModelProto:
    return case.model(banded_attention_function(body_of(case, opset=opset)), opset=opset)


def run(model: onnx.ModelProto, case: Case) -> np.ndarray:
    (output,) = session(model).run(None, case.operands)
    return output


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_reference(case: Case) -> None:
    made = model(case)
    onnx.checker.check_model(made, full_check=True)
    assert error_of(run(made, case), case) < TOLERANCE[case.dtype]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy reports infinities that the body makes on purpose
        (evaluated,) = ReferenceEvaluator(made).run(None, case.operands)
    assert error_of(evaluated, case) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", ["causal", "everything", "zeroed-operands", "float16-operands"])
def test_every_opset(name: str, opset: int) -> None:
    case = BY_NAME[name]
    made = model(case, opset)
    onnx.checker.check_model(made, full_check=True)
    assert error_of(run(made, case), case) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("name", ["causal", "everything", "BSHD"])
def test_strict_shape_inference_finds_the_output(name: str) -> None:
    case = BY_NAME[name]
    made = model(case)
    made.graph.output[0].type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(made, check_type=True, strict_mode=True)
    assert len(inferred.graph.output[0].type.tensor_type.shape.dim) == 4


@pytest.mark.parametrize("change", [{"left": 6}, {"left": 4}, {"right": 1}, {"offset": 1}, {"scale": 0.31}])
def test_another_window_is_another_result(change: dict[str, int]) -> None:
    other = PLAIN.but(**change)
    assert error_of(run(model(other), other), PLAIN) > 1e-2


@pytest.mark.parametrize(
    "case",
    [
        PLAIN.but(queries=60, left=3),
        PLAIN.but(offset=-9),
        PLAIN.but(key_padding=True, left=2),
        PLAIN.but(segments=True, offset=12),
        PLAIN.but(bias=(1, 1), queries=60, left=3),
        PLAIN.but(sinks=True, queries=60, left=3),
    ],
    ids=["more queries", "before keys", "padding", "segments", "bias", "sinks"],
)
def test_a_row_that_sees_no_key_is_zero(case: Case) -> None:
    output = run(model(case), case)
    empty = (case.expected == 0).all(axis=-1)
    assert empty.any() and not empty.all()
    assert not output[empty].any()


def test_a_bias_may_hide_all_keys() -> None:
    case = PLAIN.but(bias=(1, 4))
    case.operands["bias"][0, 1, 20:] = -np.inf  # type: ignore[index]
    output = run(model(case), case)
    assert error_of(output, case) < TOLERANCE["float32"]
    assert not output[:, 1, 20:].any()


LONG = PLAIN.but(queries=333, keys=333, head_size=8, value_size=8)
BLOCKED = (
    LONG,
    LONG.but(name="two-sided", left=31, right=17, kv_heads=4),
    LONG.but(name="one key", left=0),
    LONG.but(name="decode", queries=1, alignment="bottom_right"),
    LONG.but(name="many queries, few keys", keys=150, alignment="bottom_right", right=2),
    LONG.but(name="before and after the keys", offset=-70, right=3, keys=200),
    LONG.but(name="chunks", chunk_size=64, left=40, right=9),
    LONG.but(name="operands", key_padding=True, segments=True, sinks=True, alibi=True, softcap=3.0, right=6, offset=5),
    LONG.but(name="bias", bias=(1, 4), offset=-2),
    LONG.but(name="bias of samples", bias=(2, 1), right=4, queries=250, alignment="bottom_right"),
    LONG.but(name="bias of keys", bias=(2, 1, 1), key_padding=True),
    LONG.but(name="BSHD", layout="BSHD", key_padding=True, queries=257, alignment="bottom_right"),
    LONG.but(name="float16", dtype="float16", sinks=True),
)


def score_shape(case: Case) -> tuple[int, ...]:
    """Extents (B,H,N,C,L) of the scores that are really computed."""
    inlined = onnx.inliner.inline_local_functions(model(case))
    (score,) = (name for node in inlined.graph.node for name in node.output if name.split("__")[0] == "score")
    inlined.graph.output.append(helper.make_empty_tensor_value_info(score))
    return tuple(session(inlined).run([score], case.operands)[0].shape)


@pytest.mark.parametrize("case", BLOCKED, ids=lambda case: case.name)
def test_a_long_input_is_computed_in_blocks(case: Case) -> None:
    made = model(case)
    onnx.checker.check_model(made, full_check=True)
    assert score_shape(case)[-1] < 0.75 * case.keys
    assert error_of(run(made, case), case) < TOLERANCE[case.dtype]
    wider = case.but(left=case.left + 1)
    assert error_of(run(model(wider), wider), case) > 1e-2


@pytest.mark.parametrize("left", [0, 1, 63, 64, 65, 184, 185, 186, 187, 332, 333, 334])
@pytest.mark.parametrize("right", [0, 1])
def test_windows_around_the_block_and_the_length(left: int, right: int) -> None:
    case = LONG.but(left=left, right=right)
    assert error_of(run(model(case), case), case) < TOLERANCE[case.dtype]


def test_work_grows_with_length_times_window() -> None:
    batch, heads, blocks, block, width = score_shape(LONG.but(queries=8000, keys=8000, left=99))
    assert (batch, heads) == (2, 4)
    assert 8000 <= blocks * block < 8000 + block and width == block + 99 and block == 64


MIXED = (
    PLAIN,
    PLAIN.but(key_padding=True, left=3),
    PLAIN.but(segments=True, right=2),
    PLAIN.but(sinks=True, kv_heads=4),
    PLAIN.but(bias=(1, 4), softcap=2.0),
    PLAIN.but(alibi=True, chunk_size=8),
)


def neutral(name: str) -> np.ndarray:
    return {
        "key_padding": np.ones((1, 1), np.bool_),
        "segments": np.full((1, 1), 7),
        "sinks": np.zeros(0, np.float32),
        "bias": np.zeros((1, 1, 1, 1), np.float32),
        "alibi_slopes": np.zeros(0, np.float32),
    }[name]


def mixed_model() -> onnx.ModelProto:
    """One node for each case, one function for all: what a node lacks is neutral."""
    nodes, inputs, outputs, constants = [], [], [], {}
    for index, case in enumerate(MIXED):
        node = case.node(output=f"output_{index}", prefix=f"{index}_")
        names = list(node.input) + [""] * (8 - len(node.input))
        for place, name in enumerate(names):
            if not name:
                names[place] = f"no_{INPUTS[place]}"
                constants[names[place]] = onnx.numpy_helper.from_array(neutral(INPUTS[place]), names[place])
        node.input[:] = names
        nodes.append(node)
        inputs += case.inputs(dynamic=False, prefix=f"{index}_")
        outputs.append(case.output(dynamic=False, name=f"output_{index}"))
    graph = helper.make_graph(nodes, "mixed", inputs, outputs, list(constants.values()))
    return model_of(graph, (banded_attention_function(body_of(*MIXED)),), 18)


def test_one_function_serves_nodes_with_different_features() -> None:
    made = mixed_model()
    onnx.checker.check_model(made, full_check=True)
    feed = {f"{index}_{name}": array for index, case in enumerate(MIXED) for name, array in case.operands.items()}
    for output, case in zip(session(made).run(None, feed), MIXED, strict=True):
        assert error_of(output, case) < TOLERANCE["float32"]


def test_only_nodes_with_a_softcap_pay_for_it(tmp_path: object) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = f"{tmp_path}/optimized.onnx"
    options.log_severity_level = 3
    ort.InferenceSession(mixed_model().SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(f"{tmp_path}/optimized.onnx")
    kinds = [node.op_type for node in optimized.graph.node]
    assert (kinds.count("Tanh"), kinds.count("If")) == (1, 0)


def test_a_plain_band_costs_no_more_nodes_than_needed() -> None:
    """Once for each pair and head: MatMul, Mul (which ONNX Runtime joins to it), Add, Softmax, MatMul."""
    function = banded_attention_function(Body(opset=18, elem_type=TensorProto.FLOAT, grouped=False))
    kinds = [node.op_type for node in function.node]
    assert kinds.count("MatMul") == 2 and kinds.count("Softmax") == 1 and "Where" not in kinds[kinds.index("MatMul") :]
    produced = {name for node in function.node for name in node.output}
    used = {name for node in function.node for name in node.input} | set(function.output)
    assert produced <= used


def test_inputs_end_with_the_last_that_is_used() -> None:
    body = Body(opset=18, elem_type=TensorProto.FLOAT, uses=frozenset({Optional.SEGMENTS, Optional.SOFTCAP}))
    assert tuple(banded_attention_function(body).input) == INPUTS[:5]


@pytest.mark.parametrize("opset", [12, 29])
def test_an_unknown_opset_is_refused(opset: int) -> None:
    with pytest.raises(ModelError, match=f"expected opset 13 to 28, found {opset}"):
        Body(opset=opset, elem_type=TensorProto.FLOAT)


def test_an_element_type_without_attention_is_refused() -> None:
    with pytest.raises(ModelError, match="expected element type float32, float16 or bfloat16, found INT8"):
        Body(opset=18, elem_type=TensorProto.INT8)
