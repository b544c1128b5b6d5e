"""The ONNX Runtime library with a stand-in kernel: operands, threads, messages. TVM's kernels have their own tests."""

import ctypes
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from swacompile.errors import ArtifactError, ToolchainError
from swacompile.runtime import ort_library
from swacompile.target import TARGETS, TargetClass, host_targets
from tests.runtime.cases import BY_NAME, CASES, PLAIN, TOLERANCE, Case, error_of, model_of, session

Invalid = ort.capi.onnxruntime_pybind11_state.InvalidArgument
FailedLoad = ort.capi.onnxruntime_pybind11_state.RuntimeException


def run(case: Case, library: Path, threads: int = 2) -> np.ndarray:
    (output,) = session(case.model(), library, threads).run(None, case.operands)
    return output


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_reference(case: Case, stand_in_library: Path) -> None:
    before = ort_library.call_count(stand_in_library)
    assert error_of(run(case, stand_in_library), case) < TOLERANCE[case.dtype]
    assert ort_library.call_count(stand_in_library) == before + 1


@pytest.mark.parametrize("change", [{"left": 6}, {"left": 4}, {"right": 1}, {"offset": 1}, {"scale": 0.31}])
def test_another_window_is_another_result(change: dict[str, int], stand_in_library: Path) -> None:
    assert error_of(run(PLAIN.but(**change), stand_in_library), PLAIN) > 1e-2


NEUTRAL = {
    "key_padding": np.ones((1, 1), np.bool_),
    "segments": np.zeros((1, 1), np.int64),
    "sinks": np.zeros(0, np.float32),
    "bias": np.zeros((1, 1, 1, 1), np.float32),
    "alibi_slopes": np.zeros(0, np.float32),
}


def test_neutral_operands_count_as_absent(stand_in_library: Path) -> None:
    names = ["query", "key", "value", *NEUTRAL]
    node = helper.make_node("BandedAttention", names, ["output"], domain="swacompile", **PLAIN.attributes)
    given = [onnx.numpy_helper.from_array(array, name) for name, array in NEUTRAL.items()]
    graph = helper.make_graph([node], "neutral", PLAIN.inputs(dynamic=True), [PLAIN.output(dynamic=True)], given)
    (output,) = session(model_of(graph, (), 18), stand_in_library).run(None, PLAIN.operands)
    assert error_of(output, PLAIN) < TOLERANCE["float32"]


def test_a_single_hidden_key_stays_hidden(stand_in_library: Path) -> None:
    case = PLAIN.but(batch=1, queries=1, keys=1, key_padding=True)
    case.operands["key_padding"][...] = False
    assert not run(case, stand_in_library).any()
    case.operands["key_padding"][...] = True
    assert run(case, stand_in_library).any()


@pytest.mark.parametrize("empty", [{"batch": 0}, {"queries": 0}, {"keys": 0}, {"keys": 0, "sinks": True}])
def test_empty_tensors(empty: dict[str, int], stand_in_library: Path) -> None:
    case = PLAIN.but(**empty)
    (output,) = session(case.model(), stand_in_library).run(None, case.operands)
    np.testing.assert_array_equal(output, np.zeros_like(case.expected, np.float32))


def test_bfloat16(stand_in_library: Path) -> None:
    """Between casts, since numpy has no bfloat16. The reference sees the rounded operands."""
    case = PLAIN.but(name="bfloat16", sinks=True)
    rounded = {name: round_to_bfloat16(array) for name, array in case.operands.items()}
    case.operands.update(rounded)
    names = list(rounded)
    narrow = [helper.make_node("Cast", [name], [f"narrow_{name}"], to=onnx.TensorProto.BFLOAT16) for name in names]
    node = case.node(output="narrow_output", prefix="narrow_")
    widen = helper.make_node("Cast", ["narrow_output"], ["output"], to=onnx.TensorProto.FLOAT)
    graph = helper.make_graph([*narrow, node, widen], "bf16", case.inputs(dynamic=True), [case.output(dynamic=True)])
    (output,) = session(model_of(graph, (), 18), stand_in_library).run(None, case.operands)
    assert 1e-5 < error_of(output, case) < 2e-2


def round_to_bfloat16(array: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded: np.ndarray = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)
    return rounded


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_unaligned_inputs(dtype: str, stand_in_library: Path) -> None:
    """Views that start one element into their buffer; ORT hands them on as they are."""
    case = PLAIN.but(dtype=dtype)
    shifted = {}
    for name, array in case.operands.items():
        buffer = np.zeros(array.size + 1, array.dtype)
        shifted[name] = buffer[1:].reshape(array.shape)
        shifted[name][...] = array
        assert shifted[name].ctypes.data % 16 != 0
    (output,) = session(case.model(), stand_in_library).run(None, shifted)
    assert error_of(output, case) < TOLERANCE[dtype]


def test_any_number_of_threads_gives_the_same_bits(stand_in_library: Path) -> None:
    case = PLAIN.but(queries=150, keys=150, left=40, head_size=16)
    outputs = [run(case, stand_in_library, threads) for threads in (1, 2, 3, 8)]
    assert error_of(outputs[0], case) < TOLERANCE["float32"]
    assert all(np.array_equal(outputs[0], other) for other in outputs[1:])


def test_sessions_and_threads_at_once(stand_in_library: Path) -> None:
    cases = [PLAIN.but(seed=seed, left=seed + 3, queries=60, keys=60, sinks=seed % 2 == 0) for seed in range(4)]
    sessions = [session(case.model(), stand_in_library) for case in cases]

    def work(turn: int) -> float:
        case = cases[turn % 4]
        (output,) = sessions[turn % 4].run(None, case.operands)
        return error_of(output, case)

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(work, range(64))) < TOLERANCE["float32"]


BAD_OPERANDS = [
    ("causal", "key", np.zeros((2, 2, 37, 24)), "input key: expected shape (B, K, T, D) = (2, 2, 37, 16), found"),
    ("causal", "key", np.zeros((2, 3, 37, 16)), "(B, K, T, V) = (2, 3, 37, 16), found (2, 2, 37, 16)"),
    ("causal", "query", np.zeros((2, 5, 37, 16)), "query heads that the key heads divide, found 5 and 2"),
    ("key-padding", "key_padding", np.ones((2, 36)), "key_padding: expected shape (B, T) = (2, 37), found (2, 36)"),
    ("segments", "segments", np.ones((1, 37)), "segments: expected shape (B, T) = (2, 37), found (1, 37)"),
    ("sinks", "sinks", np.zeros(3), "sinks: expected shape (H,) = (4,), found (3,)"),
    ("alibi", "alibi_slopes", np.zeros((4, 1)), "alibi_slopes: expected shape (H,) = (4,), found (4, 1)"),
    ("bias-full", "bias", np.ones((1, 1, 1, 1)), "or (1, 1, 1, 1) of 0, found (1, 1, 1, 1)"),
    ("bias-full", "bias", np.ones((2, 3, 37, 37)), "(B, H, S, T) = (2, 4, 37, 37), or (1, 1, 1, 1) of 0, found (2, 3,"),
    ("offset", "offset", np.ones(1), "offset: expected shape () = (), found (1,)"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "name", "array", "message"), BAD_OPERANDS)
def test_operands_that_do_not_fit(
    base: str, name: str, array: np.ndarray, message: str, stand_in_library: Path
) -> None:
    case = BY_NAME[base]
    model = without_shapes(case.model())
    ready = session(model, stand_in_library)
    before = ort_library.call_count(stand_in_library)
    with pytest.raises(Invalid, match=re.escape(message)):
        ready.run(None, {**case.operands, name: array.astype(case.operands[name].dtype)})
    assert ort_library.call_count(stand_in_library) == before


def without_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    return model


BAD_ATTRIBUTES = [
    ("left_window_size", -2, r"attribute left_window_size: expected -1 \(unbounded\) or more, found -2"),
    ("layout", "SBHD", "attribute layout: expected BHSD or BSHD, found 'SBHD'"),
    ("alignment", "center", "attribute alignment: expected bottom_right or top_left, found 'center'"),
    ("kind", "masked", "attribute kind: expected zeroed or hidden, found 'masked'"),
    ("chunk_size", -1, r"attribute chunk_size: expected 0 \(none\) to 2147483647, found -1"),
    ("softcap", -1.0, r"attribute softcap: expected 0 \(none\) or more"),
    ("scale", None, "attribute scale is missing or has another type"),
    ("scale", 1, "attribute scale is missing or has another type"),
    ("layout", None, "node 'output_node': attribute layout is missing"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_ATTRIBUTES)
def test_attributes_that_do_not_fit(name: str, value: object, message: str, stand_in_library: Path) -> None:
    model = PLAIN.model()
    (node,) = model.graph.node
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(kept + ([] if value is None else [helper.make_attribute(name, value)]))
    with pytest.raises(FailedLoad, match=message):
        session(model, stand_in_library)


MISSING = (
    r"no kernel for float32 with head sizes D=32, V=32 on this CPU, which runs .*; this library was built for "
    r"float32 D=16 V=16 \(\w+\), .*Compile the model again"
)


def test_a_missing_head_size_is_reported_at_load(stand_in_library: Path) -> None:
    with pytest.raises(FailedLoad, match=MISSING):
        session(PLAIN.but(head_size=32, value_size=32).model(), stand_in_library)


def test_a_head_size_that_only_the_run_shows_is_reported_then(stand_in_library: Path) -> None:
    case = PLAIN.but(head_size=32, value_size=32)
    ready = session(without_shapes(case.model()), stand_in_library)
    with pytest.raises(Invalid, match=MISSING):
        ready.run(None, case.operands)


def test_library_names_its_version_and_knows_all_targets(stand_in_library: Path) -> None:
    supports = ctypes.CDLL(str(stand_in_library)).swacompile_supports
    answers = {
        target.name: supports(target.name.encode()) for target in TARGETS if target.target_class is TargetClass.CPU
    }
    usable = {target.name for target in host_targets()}
    assert answers == {name: int(name in usable) for name in answers}
    assert supports(b"riscv64") == -1
    assert ort_library.library_version(stand_in_library) == "0.1.0"


def test_library_asks_for_neither_tvm_nor_onnxruntime(stand_in_library: Path) -> None:
    listed = subprocess.run(
        ["readelf", "-d", "--dyn-syms", "-W", str(stand_in_library)], capture_output=True, text=True, check=True
    )
    needed = [line for line in listed.stdout.splitlines() if "(NEEDED)" in line]
    assert not any("tvm" in line or "onnxruntime" in line for line in needed)
    exported = {
        line.split()[-1] for line in listed.stdout.splitlines() if " GLOBAL DEFAULT " in line and " UND " not in line
    }
    assert exported == {"RegisterCustomOps", "swacompile_call_count", "swacompile_version", "swacompile_supports"}


def test_a_loaded_tvm_does_not_take_over(stand_in_library: Path) -> None:
    """In a process of its own: libtvm_ffi defines the error function that kernels call, and is loaded first."""
    program = (
        "import tvm_ffi, sys; from pathlib import Path; from tests.runtime.cases import *\n"
        "library = Path(sys.argv[1]); out, = session(PLAIN.model(), library).run(None, PLAIN.operands)\n"
        "assert error_of(out, PLAIN) < 2e-5"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, str(stand_in_library)], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_register_wants_a_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"gone.so: expected a kernel library, found no file"):
        ort_library.register(ort.SessionOptions(), tmp_path / "gone.so")


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainError, match=r"no C\+\+ compiler: .*apt install g\+\+"):
        ort_library.build_ort_library([], [], tmp_path / "lib.so")
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match=r"(?s)failed with status .*missing\.o"):
        ort_library.build_ort_library([tmp_path / "missing.o"], [], tmp_path / "lib.so")
    assert list(tmp_path.iterdir()) == []
