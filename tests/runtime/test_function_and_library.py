"""A model with both: the function without the library, the library's kernel with it, the same numbers."""

from pathlib import Path

import onnx
import pytest

from swacompile.kernels.onnx_function import banded_attention_function
from swacompile.runtime.ort_library import call_count
from tests.runtime.cases import BY_NAME, TOLERANCE, body_of, error_of, session


@pytest.mark.parametrize("opset", [13, 17, 21, 28])
@pytest.mark.parametrize("name", ["causal", "everything", "BSHD", "float16-operands"])
def test_a_registered_library_takes_the_functions_place(name: str, opset: int, stand_in_library: Path) -> None:
    case = BY_NAME[name]
    model = case.model(banded_attention_function(body_of(case, opset=opset)), opset=opset)
    before = call_count(stand_in_library)
    (plain,) = session(model).run(None, case.operands)
    assert call_count(stand_in_library) == before
    (compiled,) = session(model, stand_in_library).run(None, case.operands)
    assert call_count(stand_in_library) == before + 1
    for output in (plain, compiled):
        assert error_of(output, case) < TOLERANCE[case.dtype]


def test_inputs_may_be_missing_before_given_ones(stand_in_library: Path) -> None:
    """Nodes as other tools write them: '' for an absent operand."""
    case = BY_NAME["offset"]
    model = case.model()
    assert list(model.graph.node[0].input[3:]) == ["", "", "", "", "", "offset"]
    onnx.checker.check_model(model)
    (output,) = session(model, stand_in_library).run(None, case.operands)
    assert error_of(output, case) < TOLERANCE["float32"]
