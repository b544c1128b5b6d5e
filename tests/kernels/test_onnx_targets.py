"""The other operators, run by ONNX Runtime against the float64 reference, and what they refuse."""

import re
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper

from swacompile.kernels.onnx_targets import (
    MICROSOFT_DOMAIN,
    MICROSOFT_VERSION,
    Lowering,
    Site,
    Unsupported,
    onnx_attention,
    ort_group_query_attention,
)
from tests.runtime.cases import PLAIN, TENSOR_TYPES, TOLERANCE, Case, error_of, session

Lower = Callable[[Site], Lowering]


def attention(site: Site) -> Lowering:
    return onnx_attention(site, 25)


def site_of(case: Case, same_length: bool | None = None) -> Site:
    return Site(
        node=case.node(),
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_size=case.head_size,
        value_size=case.value_size,
        elem_type=TENSOR_TYPES[case.dtype],
        same_length=case.queries == case.keys if same_length is None else same_length,
    )


def run(case: Case, lower: Lower, opset: int) -> np.ndarray:
    nodes = lower(site_of(case))
    assert not isinstance(nodes, Unsupported), nodes.reason
    graph = helper.make_graph(nodes, case.name, case.inputs(dynamic=True), [case.output(dynamic=True)])
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT_DOMAIN, MICROSOFT_VERSION)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    if opset == 25:
        onnx.checker.check_model(model, full_check=True)
    (output,) = session(model).run(None, case.operands)
    return output


ATTENTIONS = {
    "causal": PLAIN,
    "two-sided": PLAIN.but(left=3, right=4, kv_heads=4),
    "unbounded left": PLAIN.but(left=-1),
    "one query, bottom right": PLAIN.but(queries=1, alignment="bottom_right"),
    "bottom right": PLAIN.but(queries=20, right=2, alignment="bottom_right"),
    "top left": PLAIN.but(queries=20, right=2),
    "rows without keys": PLAIN.but(queries=50, left=3),
    "value size": PLAIN.but(value_size=8),
    "softcap": PLAIN.but(softcap=2.0),
    "padding": PLAIN.but(key_padding=True),
    "segments": PLAIN.but(segments=True, right=3),
    "padding and segments": PLAIN.but(key_padding=True, segments=True, right=3),
    "bias": PLAIN.but(bias=(1, 4)),
    "bias and padding": PLAIN.but(bias=(2, 1), key_padding=True),
    "BSHD": PLAIN.but(layout="BSHD", value_size=8, key_padding=True),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_standard_attention_equals_the_reference(name: str) -> None:
    case = ATTENTIONS[name]
    assert error_of(run(case, attention, 25), case) < TOLERANCE[case.dtype]


GROUP_QUERIES = {
    "causal": PLAIN,
    "own key only": PLAIN.but(left=0),
    "unbounded": PLAIN.but(left=-1, kv_heads=4),
    "bottom right": PLAIN.but(alignment="bottom_right"),
    "softcap": PLAIN.but(softcap=2.0),
    "sinks": PLAIN.but(sinks=True),
    "bias": PLAIN.but(bias=(1, 4)),
    "BSHD": PLAIN.but(layout="BSHD"),
    "float16": PLAIN.but(dtype="float16"),
}


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("name", GROUP_QUERIES)
def test_group_query_attention_equals_the_reference(name: str, opset: int) -> None:
    case = GROUP_QUERIES[name]
    assert error_of(run(case, ort_group_query_attention, opset), case) < TOLERANCE[case.dtype]


@pytest.mark.parametrize(("lower", "opset"), [(attention, 25), (ort_group_query_attention, 21)])
@pytest.mark.parametrize("left", [4, 6])
def test_another_window_is_another_result(lower: Lower, opset: int, left: int) -> None:
    assert error_of(run(PLAIN.but(left=left), lower, opset), PLAIN) > 1e-2


REFUSED = [
    (attention, PLAIN.but(sinks=True), "Attention has no sinks"),
    (attention, PLAIN.but(kind="zeroed"), "hides keys, it does not multiply scores by zero"),
    (attention, PLAIN.but(chunk_size=8), "Attention has no chunks"),
    (attention, PLAIN.but(alibi=True), "Attention has no ALiBi slopes"),
    (attention, PLAIN.but(offset=2), "no offset of the queries at run time"),
    (attention, PLAIN.but(segments=True, queries=5), "segments with as many queries as keys only"),
    (ort_group_query_attention, PLAIN.but(right=1), "is causal, the window reaches to the right"),
    (ort_group_query_attention, PLAIN.but(right=-1), "is causal, the window reaches to the right"),
    (ort_group_query_attention, PLAIN.but(queries=5), "wants as many queries as keys"),
    (ort_group_query_attention, PLAIN.but(value_size=8), "wants one head size, found 16 and 8"),
    (ort_group_query_attention, PLAIN.but(key_padding=True), "padding at the end of a sequence only"),
    (ort_group_query_attention, PLAIN.but(segments=True), "has no segments"),
    (ort_group_query_attention, PLAIN.but(chunk_size=8), "has no chunks"),
    (ort_group_query_attention, PLAIN.but(kind="zeroed"), "does not multiply scores by zero"),
    (ort_group_query_attention, PLAIN.but(scale=0.0), "takes a scale of 0 for its default"),
]


@pytest.mark.parametrize(("lower", "case", "reason"), REFUSED)
def test_what_cannot_be_said_is_refused_with_a_reason(lower: Lower, case: Case, reason: str) -> None:
    refused = lower(site_of(case))
    assert isinstance(refused, Unsupported)
    assert re.search(reason, refused.reason)


def test_an_older_opset_is_refused() -> None:
    refused = onnx_attention(site_of(PLAIN), 24)
    assert refused == Unsupported(reason="Attention has windows from opset 25 on, the model has opset 24")


def test_bfloat16_is_refused_by_group_query_attention() -> None:
    site = site_of(PLAIN)
    refused = ort_group_query_attention(
        Site(
            node=site.node, heads=4, kv_heads=2, head_size=16, value_size=16, same_length=True,
            elem_type=onnx.TensorProto.BFLOAT16,
        )
    )  # fmt: skip
    assert isinstance(refused, Unsupported) and "takes float32 and float16" in refused.reason
