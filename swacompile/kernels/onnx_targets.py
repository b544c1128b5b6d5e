"""BandedAttention in other operators' words: standard Attention of opset 25, and ONNX Runtime's GroupQueryAttention.

Each function takes one BandedAttention node and gives the nodes that say the same, or the reason why it cannot.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from onnx import NodeProto, TensorProto, helper

from swacompile.kernels.onnx_function import INPUTS

ATTENTION_OPSET = 25
"""First opset whose Attention has left_window_size and right_window_size."""
MICROSOFT_DOMAIN = "com.microsoft"
MICROSOFT_VERSION = 1
UNBOUNDED = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A BandedAttention node, and what is known of its operands. `same_length`: S == T in every run."""

    node: NodeProto
    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    elem_type: int
    same_length: bool

    def attribute(self, name: str) -> Any:
        """An attribute's value; text as str."""
        value = next(helper.get_attribute_value(found) for found in self.node.attribute if found.name == name)
        return value.decode() if isinstance(value, bytes) else value

    def operand(self, name: str) -> str:
        """The node's input of that name, '' where it is absent."""
        place = INPUTS.index(name)
        return self.node.input[place] if place < len(self.node.input) else ""

    @property
    def heads_first(self) -> bool:
        return bool(self.attribute("layout") == "BHSD")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsupported:
    """Why an operator cannot express a node. `reason` says what it would take and what the node has."""

    reason: str


Lowering = tuple[NodeProto, ...] | Unsupported


def onnx_attention(site: Site, opset: int) -> Lowering:
    """The node as standard Attention, for a model of this opset. A query that sees no key gives 0 there too."""
    refused = _first(
        (
            opset < ATTENTION_OPSET,
            f"Attention has windows from opset {ATTENTION_OPSET} on, the model has opset {opset}",
        ),
        *_not_a_window(site, "Attention"),
        (site.operand("sinks"), "Attention has no sinks"),
        (site.operand("segments") and not site.same_length, "segments with as many queries as keys only"),
    )
    if refused:
        return refused
    builder = _Builder(site.node)
    masks = [builder.mask_of_padding(site), builder.mask_of_segments(site)]
    inputs = [*builder.flat_operands(site), builder.attention_mask(site, [mask for mask in masks if mask])]
    if site.attribute("alignment") == "bottom_right" and not site.same_length:
        inputs += ["", "", builder.key_counts(site, less=0, elem_type=TensorProto.INT64)]
    flat: dict[str, Any] = {} if site.heads_first else {"q_num_heads": site.heads, "kv_num_heads": site.kv_heads}
    attended = builder.add(
        "Attention",
        *_without_trailing_gaps(inputs),
        scale=site.attribute("scale"),
        softcap=site.attribute("softcap"),
        left_window_size=site.attribute("left_window_size"),
        right_window_size=site.attribute("right_window_size"),
        **flat,
    )
    if site.heads_first:
        return builder.finish(attended)
    return builder.finish(builder.add("Reshape", attended, builder.ints(0, 0, site.heads, site.value_size)))


def ort_group_query_attention(site: Site) -> Lowering:
    """The node as com.microsoft.GroupQueryAttention on (B,S,H*D), which is causal and takes whole sequences here."""
    name = "GroupQueryAttention"
    refused = _first(
        *_not_a_window(site, name),
        (site.attribute("right_window_size") != 0, f"{name} is causal, the window reaches to the right"),
        (
            not site.same_length,
            f"{name} without a cache wants as many queries as keys, which is not known of this node",
        ),
        (
            site.value_size != site.head_size,
            f"{name} wants one head size, found {site.head_size} and {site.value_size}",
        ),
        (site.elem_type not in (TensorProto.FLOAT, TensorProto.FLOAT16), f"{name} takes float32 and float16 on a CPU"),
        (site.operand("key_padding"), f"{name} knows padding at the end of a sequence only, the node has any"),
        (site.operand("segments"), f"{name} has no segments"),
        (site.attribute("scale") == 0, f"{name} takes a scale of 0 for its default"),
    )
    if refused:
        return refused
    builder = _Builder(site.node)
    operands = [builder.flat(site, name, heads) for name, heads in _head_counts(site)]
    last_key = builder.key_counts(site, less=1, elem_type=TensorProto.INT32)
    total = builder.add("Cast", builder.length(site, "key"), to=TensorProto.INT32)
    left = site.attribute("left_window_size")
    attended = builder.add(
        name,
        *_without_trailing_gaps(
            [*operands, "", "", last_key, total, "", "", "", site.operand("bias"), site.operand("sinks")]
        ),
        outputs=3,
        domain=MICROSOFT_DOMAIN,
        num_heads=site.heads,
        kv_num_heads=site.kv_heads,
        scale=site.attribute("scale"),
        softcap=site.attribute("softcap"),
        local_window_size=UNBOUNDED if left == UNBOUNDED else left + 1,
    )
    split = builder.add("Reshape", attended, builder.ints(0, 0, site.heads, site.head_size))
    return builder.finish(builder.add("Transpose", split, perm=[0, 2, 1, 3]) if site.heads_first else split)


def _not_a_window(site: Site, name: str) -> Iterator[tuple[object, str]]:
    """What neither operator knows."""
    yield site.attribute("kind") != "hidden", f"{name} hides keys, it does not multiply scores by zero"
    yield site.attribute("chunk_size") != 0, f"{name} has no chunks"
    yield site.operand("alibi_slopes"), f"{name} has no ALiBi slopes"
    yield site.operand("offset"), f"{name} takes no offset of the queries at run time"


def _first(*conditions: tuple[object, str]) -> Unsupported | None:
    """The reason of the first condition that holds."""
    return next((Unsupported(reason=reason) for holds, reason in conditions if holds), None)


def _head_counts(site: Site) -> tuple[tuple[str, int], ...]:
    return (("query", site.heads), ("key", site.kv_heads), ("value", site.kv_heads))


def _without_trailing_gaps(names: Sequence[str]) -> list[str]:
    kept = list(names)
    while kept and not kept[-1]:
        kept.pop()
    return kept


@dataclass(slots=True)
class _Builder:
    """Collects nodes whose names start with the replaced node's output."""

    replaced: NodeProto
    nodes: list[NodeProto] = field(default_factory=list)

    def add(self, op_type: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> str:
        """One more node; gives its first output."""
        stem = f"{self.replaced.output[0]}_{len(self.nodes)}_{op_type}"
        names = [stem if place == 0 else f"{stem}_{place}" for place in range(outputs)]
        self.nodes.append(helper.make_node(op_type, inputs, names, name=stem, domain=domain, **attributes))
        return names[0]

    def finish(self, result: str) -> tuple[NodeProto, ...]:
        """All nodes; `result`, which the last one makes, takes the replaced output's name."""
        last = self.nodes[-1]
        last.output[list(last.output).index(result)] = self.replaced.output[0]
        return tuple(self.nodes)

    def ints(self, *values: int) -> str:
        return self.add("Constant", value=helper.make_tensor("", TensorProto.INT64, [len(values)], values))

    def length(self, site: Site, operand: str) -> str:
        """S or T as int64 of shape (1,)."""
        axis = 2 if site.heads_first else 1
        return self.add("Gather", self.add("Shape", site.operand(operand)), self.ints(axis))

    def key_counts(self, site: Site, *, less: int, elem_type: int) -> str:
        """T - less for every sequence of the batch, (B,)."""
        count = self.add("Sub", self.length(site, "key"), self.ints(less)) if less else self.length(site, "key")
        batch = self.add("Gather", self.add("Shape", site.operand("query")), self.ints(0))
        return self.add("Cast", self.add("Expand", count, batch), to=elem_type)

    def flat_operands(self, site: Site) -> list[str]:
        """Query, key and value as Attention takes them: (B,H,S,D), or (B,S,H*D)."""
        if site.heads_first:
            return [site.operand(name) for name, _ in _head_counts(site)]
        return [self.flat(site, name, heads) for name, heads in _head_counts(site)]

    def flat(self, site: Site, operand: str, heads: int) -> str:
        """An operand as (B,S,H*D)."""
        value = site.operand(operand)
        if site.heads_first:
            value = self.add("Transpose", value, perm=[0, 2, 1, 3])
        size = site.value_size if operand == "value" else site.head_size
        return self.add("Reshape", value, self.ints(0, 0, heads * size))

    def mask_of_padding(self, site: Site) -> str:
        """(B,1,1,T), true where the key may be seen; '' where all may."""
        padding = site.operand("key_padding")
        return self.add("Unsqueeze", padding, self.ints(1, 2)) if padding else ""

    def mask_of_segments(self, site: Site) -> str:
        """(B,1,S,T), true within a segment; '' where there are none."""
        segments = site.operand("segments")
        if not segments:
            return ""
        of_queries, of_keys = (self.add("Unsqueeze", segments, self.ints(1, axis)) for axis in (3, 2))
        return self.add("Equal", of_queries, of_keys)

    def attention_mask(self, site: Site, masks: list[str]) -> str:
        """Attention's one mask: a condition, or the bias with -inf where the condition fails; '' where neither is."""
        bias = site.operand("bias")
        condition = self.add("And", *masks) if len(masks) == 2 else "".join(masks)
        if not bias or not condition:
            return bias or condition
        hidden = helper.make_tensor("", site.elem_type, [], [float("-inf")])
        return self.add("Where", condition, bias, self.add("Constant", value=hidden))
