"""Proven attentions as operators that others know: standard Attention of opset 25, or ONNX Runtime's GroupQueryAttention."""

from collections.abc import Callable

import onnx
import onnx_ir as ir
from onnx import helper

from swacompile.attention import Refutation
from swacompile.errors import ModelError
from swacompile.frontends.onnx import OnnxModel
from swacompile.frontends.onnx_emit import ELEM_TYPES, attributes, body_for, operands
from swacompile.frontends.onnx_guards import OnnxGuards
from swacompile.frontends.onnx_splice import Splicer
from swacompile.kernels.onnx_function import DOMAIN, NAME
from swacompile.kernels.onnx_targets import (
    ATTENTION_OPSET,
    MICROSOFT_DOMAIN,
    MICROSOFT_VERSION,
    Lowering,
    Site,
    Unsupported,
    onnx_attention,
    ort_group_query_attention,
)  # fmt: skip
from swacompile.passes.plan_rewrite import Replacement

OLDEST_CONVERTIBLE = 18  # onnxscript's converter starts here
Outcome = Replacement | Refutation


def splice_onnx_attention(source: OnnxModel, outcomes: tuple[Outcome, ...]) -> tuple[Outcome, ...]:
    """Standard Attention with window attributes; the model is converted to opset 25 where it is older.

    Raises ModelError where the model cannot be converted.
    """
    if source.opset < ATTENTION_OPSET and any(isinstance(outcome, Replacement) for outcome in outcomes):
        _convert(source)
    return _splice(source, outcomes, lambda site: onnx_attention(site, source.opset), {})


def splice_ort_gqa(source: OnnxModel, outcomes: tuple[Outcome, ...]) -> tuple[Outcome, ...]:
    """com.microsoft.GroupQueryAttention where it can express the attention; the rest is refused with the reason."""
    return _splice(source, outcomes, ort_group_query_attention, {MICROSOFT_DOMAIN: MICROSOFT_VERSION})


def _convert(source: OnnxModel) -> None:
    found = f"{source.path}: standard Attention has windows from opset {ATTENTION_OPSET} on, the model has opset {source.opset}"
    if source.opset < OLDEST_CONVERTIBLE:
        raise ModelError(f"{found}, which is too old to convert. Export it with opset {OLDEST_CONVERTIBLE} or later.")
    try:
        from onnxscript import version_converter
    except ImportError as error:
        raise ModelError(f"{found}. Converting it takes onnxscript: pip install 'swacompile[convert]'.") from error
    version_converter.convert_version(source.model, ATTENTION_OPSET)
    if source.opset != ATTENTION_OPSET:
        raise ModelError(f"{found}, and could not be converted. Export it with opset {ATTENTION_OPSET}.")


def _splice(
    source: OnnxModel, outcomes: tuple[Outcome, ...], lower: Callable[[Site], Lowering], opsets: dict[str, int]
) -> tuple[Outcome, ...]:
    splicer = Splicer(source)
    guards = OnnxGuards(splicer=splicer)
    replaced = splicer.in_graph_order([outcome for outcome in outcomes if isinstance(outcome, Replacement)])
    lowered = {replacement.site.node: _lowered(splicer, guards, replacement, lower) for replacement in replaced}
    done = tuple(lowered[outcome.site.node] if isinstance(outcome, Replacement) else outcome for outcome in outcomes)
    splicer.finish([], opsets)
    return done


def _lowered(
    splicer: Splicer, guards: OnnxGuards, replacement: Replacement, lower: Callable[[Site], Lowering]
) -> Outcome:
    site = replacement.site
    old = splicer.values[site.output]
    before = old.producer()
    assert before is not None
    body = body_for(splicer.source.opset, (replacement,))
    given = operands(splicer, guards, before, replacement, body, dense_bias=True)
    names = {str(value.name): value for value in given if value is not None}
    node = helper.make_node(
        NAME,
        ["" if value is None else str(value.name) for value in given],
        [f"{old.name}_banded"],
        domain=DOMAIN,
        **attributes(replacement, body),
    )
    lowering = lower(
        Site(
            node=node,
            heads=site.heads,
            kv_heads=site.kv_heads,
            head_size=site.head_size or 0,
            value_size=site.value_head_size or 0,
            elem_type=int(ELEM_TYPES[site.dtype]),
            same_length=site.axes.queries == site.axes.keys,
        )
    )
    if isinstance(lowering, Unsupported):
        return Refutation(
            code="emit",
            reason=lowering.reason,
            node=site.node,
            kind=replacement.proof.kind,
            band=replacement.proof.mask,
        )
    output = _insert(splicer, before, lowering, names, str(node.output[0]))
    splicer.replace(old, splicer.result(before, output, site))
    return replacement


def _insert(
    splicer: Splicer, before: ir.Node, nodes: tuple[onnx.NodeProto, ...], names: dict[str, ir.Value], result: str
) -> ir.Value:
    """The nodes before an existing one; `names` holds the values that they read and gains those that they make."""
    for proto in nodes:
        made = ir.Node(
            proto.domain, proto.op_type, [names[name] if name else None for name in proto.input],
            [ir.from_proto(attribute) for attribute in proto.attribute], num_outputs=len(proto.output), name=proto.name,
        )  # fmt: skip
        for value, name in zip(made.outputs, proto.output, strict=True):
            value.name = name
            names[name] = value
        splicer.graph.insert_before(before, made)
    return names[result]
