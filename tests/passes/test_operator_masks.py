"""The window and the mask of ONNX's Attention operator, opsets 23 to 25."""

import onnx
import onnx.parser
import pytest

from swacompile.attention import Attention, BandProof, Finding, Kind, MaskedRows, Refutation, ResidualKind
from swacompile.band import BandMask
from swacompile.passes.detect_attention import detect_attention
from swacompile.passes.plan_rewrite import Replacement, plan_rewrite
from swacompile.passes.prove_band import Prover
from swacompile.passes.read_masks import read_masks
from tests.passes.masks import graph_of

FOUR = ("float[B,4,S,8] query, float[B,2,T,8] key, float[B,2,T,8] value", "float[B,4,S,8] out")
THREE = ("float[B,S,32] query, float[B,T,16] key, float[B,T,16] value", "float[B,S,32] out")


Inspected = tuple[Attention | Refutation, BandProof | Refutation, Replacement | Refutation]


def inspected(
    attributes: str, *, opset: int = 25, inputs: str = "", more: str = "", shapes: tuple[str, str] = FOUR
) -> Inspected:
    """(site, verdict) of one operator with these attributes; `more` are its operands beyond query, key and value."""
    given, result = shapes
    model = onnx.parser.parse_model(f"""<ir_version: 11, opset_import: ["" : {opset}]>
      g ({given} {", " + inputs if inputs else ""}) => ({result}) {{ out = Attention<{attributes}>(query, key, value{more}) }}""")
    reading = read_masks(graph_of(model))
    (site,) = detect_attention(reading)
    if isinstance(site, Refutation):
        return site, site, site
    verdict = Prover(arrays=reading.arrays).prove(site)
    planned = plan_rewrite(reading, (Finding(node=site.node, attention=site, verdict=verdict),), full=True)
    return site, verdict, planned[0]


@pytest.mark.parametrize(
    ("attributes", "opset", "left", "right"),
    [
        ("is_causal = 1", 23, None, 0),
        ("is_causal = 1", 25, None, 0),
        ("is_causal = 0", 25, None, None),
        ("is_causal = 1, left_window_size = 3", 25, 3, 0),
        ("left_window_size = 3", 25, 3, None),
        ("left_window_size = 3, right_window_size = 2", 25, 3, 2),
        ("left_window_size = 3, right_window_size = 2, is_causal = 1", 25, 3, 0),
        ("left_window_size = 0, right_window_size = 0", 25, 0, 0),
        ("left_window_size = -1, right_window_size = 5", 25, None, 5),
    ],
)
def test_attributes(attributes: str, opset: int, left: int | None, right: int | None) -> None:
    site, proof, _ = inspected(attributes, opset=opset)
    assert isinstance(site, Attention) and isinstance(proof, BandProof)
    assert proof.mask == BandMask(left=left, right=right)
    assert (proof.kind is Kind.FULL) == (left is None and right in (None, 0))
    assert (site.scale, site.masked_rows) == (pytest.approx(8**-0.5), MaskedRows.ZERO)


def test_scale_and_softcap() -> None:
    site, _, _ = inspected("scale = 0.5, softcap = 30.0, left_window_size = 3")
    assert isinstance(site, Attention)
    assert (site.scale, site.softcap, site.heads, site.kv_heads) == (0.5, 30.0, 4, 2)


def test_a_mask_operand_composes_with_the_window() -> None:
    _, proof, planned = inspected("left_window_size = 3, is_causal = 1", inputs="bool[B,1,1,T] mask", more=", mask")
    assert isinstance(proof, BandProof)
    assert proof.mask == BandMask(left=3, right=0)
    assert [residual.kind for residual in proof.residuals] == [ResidualKind.KEY_PADDING]
    assert isinstance(planned, Replacement) and planned.key_padding is not None and planned.key_padding.value == "mask"


def test_a_float_mask_operand_is_a_bias() -> None:
    _, proof, planned = inspected("left_window_size = 3", inputs="float[B,1,S,T] mask", more=", mask")
    assert isinstance(proof, BandProof)
    assert (proof.mask, [residual.kind for residual in proof.residuals]) == (
        BandMask(left=3, right=None),
        [ResidualKind.BIAS],
    )
    assert isinstance(planned, Replacement) and planned.bias is not None and planned.bias.value == "mask"


@pytest.mark.parametrize(("inputs", "more"), [
    ("float[B,2,P,8] pk, float[B,2,P,8] pv", ", , pk, pv"),
    ("int64[B] valid", ", , , , valid"),
])  # fmt: skip
def test_a_cache_in_the_operator_is_refused(inputs: str, more: str) -> None:
    _, refusal, _ = inspected("is_causal = 1", opset=24, inputs=inputs, more=more)
    assert isinstance(refusal, Refutation) and refusal.code == "cache"


def test_flat_operands_are_read_and_not_rewritten() -> None:
    site, proof, planned = inspected("left_window_size = 3, q_num_heads = 4, kv_num_heads = 2", shapes=THREE)
    assert isinstance(site, Attention) and isinstance(proof, BandProof)
    assert (site.heads, site.kv_heads, site.head_size, site.query.flat) == (4, 2, 8, True)
    assert proof.mask == BandMask(left=3, right=None)
    assert isinstance(planned, Refutation) and planned.code == "rank"
