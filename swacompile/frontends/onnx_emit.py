"""BandedAttention nodes in the place of proven attentions, with the function that gives them their meaning."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from swacompile.attention import Kind, Refutation
from swacompile.frontends.onnx import OnnxModel
from swacompile.frontends.onnx_guards import OnnxGuards
from swacompile.frontends.onnx_operands import OnnxOperands
from swacompile.frontends.onnx_splice import Splicer
from swacompile.kernels.onnx_function import DOMAIN, NAME, VERSION, Body, Optional, banded_attention_function
from swacompile.passes.plan_rewrite import Replacement

ELEM_TYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}


def splice_banded(
    source: OnnxModel, outcomes: tuple[Replacement | Refutation, ...]
) -> tuple[Replacement | Refutation, ...]:
    """Put a BandedAttention in the place of every Replacement, and its function into the model. Gives the outcomes as they then are.

    One function serves the whole model, so kind and data type follow the first replacement; sites that differ are kept.
    """
    outcomes = _alike(outcomes)
    replaced = [outcome for outcome in outcomes if isinstance(outcome, Replacement)]
    if not replaced:
        return outcomes
    body = body_for(source.opset, replaced)
    splicer = Splicer(source)
    guards = OnnxGuards(splicer=splicer)
    for replacement in splicer.in_graph_order(replaced):
        _splice(splicer, guards, replacement, body)
    function = ir.from_proto(banded_attention_function(body))
    assert isinstance(function, ir.Function)
    splicer.finish([function], {DOMAIN: VERSION})
    return outcomes


def body_for(opset: int, replaced: Sequence[Replacement]) -> Body:
    """What these nodes have in common, and the union of what they use."""
    uses = {use for replacement in replaced for use in _uses(replacement)}
    if len({replacement.proof.mask.alignment for replacement in replaced}) > 1:
        uses.add(Optional.OFFSET)  # each node then says where it stands
    return Body(
        opset=opset,
        elem_type=int(ELEM_TYPES[replaced[0].site.dtype]),
        uses=frozenset(uses),
        alignment=str(replaced[0].proof.mask.alignment),
        kind="zeroed" if replaced[0].proof.kind is Kind.ZEROED else "hidden",
        grouped=any(replacement.site.heads != replacement.site.kv_heads for replacement in replaced),
    )


def _alike(outcomes: tuple[Replacement | Refutation, ...]) -> tuple[Replacement | Refutation, ...]:
    """Refuses the sites that one function body cannot serve together with the first."""
    first = next((outcome for outcome in outcomes if isinstance(outcome, Replacement)), None)

    def checked(outcome: Replacement | Refutation) -> Replacement | Refutation:
        if isinstance(outcome, Refutation) or first is None or _common(outcome) == _common(first):
            return outcome
        return Refutation(
            code="mixed-sites", node=outcome.site.node, kind=outcome.proof.kind, band=outcome.proof.mask,
            reason=f"expected {' and '.join(_common(first))} as in {first.site.node}, found {' and '.join(_common(outcome))}: one function "
                   "serves all nodes of a model",
        )  # fmt: skip

    return tuple(checked(outcome) for outcome in outcomes)


def _common(replacement: Replacement) -> tuple[str, str]:
    return ("zeroed scores" if replacement.proof.kind is Kind.ZEROED else "hidden scores", replacement.site.dtype)


def _uses(replacement: Replacement) -> set[Optional]:
    present = {
        Optional.KEY_PADDING: replacement.key_padding,
        Optional.SEGMENTS: replacement.segments,
        Optional.SINKS: replacement.site.sinks,
        Optional.BIAS: replacement.bias,
        Optional.ALIBI: replacement.alibi_slopes,
        Optional.OFFSET: replacement.offset,
        Optional.SOFTCAP: replacement.site.softcap,
    }
    return {use for use, operand in present.items() if operand is not None}


def _splice(splicer: Splicer, guards: OnnxGuards, replacement: Replacement, body: Body) -> None:
    site = replacement.site
    old = splicer.values[site.output]
    before = old.producer()
    assert before is not None
    output = splicer.add(
        before, NAME, operands(splicer, guards, before, replacement, body), attributes(replacement, body), domain=DOMAIN
    )
    output.dtype = ELEM_TYPES[site.dtype]
    splicer.replace(old, splicer.result(before, output, site))


def operands(
    splicer: Splicer,
    guards: OnnxGuards,
    before: ir.Node,
    replacement: Replacement,
    body: Body,
    *,
    dense_bias: bool = False,
) -> list[ir.Value | None]:
    """The inputs of a BandedAttention node, as many as the body has. `dense_bias`: with a row for every query."""
    site = replacement.site
    found = [splicer.operand(before, operand) for operand in (site.query, site.key, site.value)]
    others = OnnxOperands(
        splicer=splicer, guards=guards, before=before, replacement=replacement, values=found, dense=dense_bias
    )
    return [
        *guards.operands(before, replacement, found),
        *(others.operand(Optional(name)) if name in body.uses else None for name in body.inputs()[len(found) :]),
    ]


def attributes(replacement: Replacement, body: Body) -> dict[str, Any]:
    """The attributes of a BandedAttention node, all of them."""
    site = replacement.site
    return {
        "layout": body.layout,
        "scale": float(site.scale),
        "softcap": float(site.softcap or 0.0),
        "left_window_size": replacement.left_window_size,
        "right_window_size": replacement.right_window_size,
        "alignment": str(replacement.proof.mask.alignment),
        "chunk_size": 0,
        "kind": body.kind,
    }
