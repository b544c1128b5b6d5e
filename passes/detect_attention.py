"""Find every attention of a graph, and bring each into one form.

An attention is
1. an attention operator (attention_operator.py), or
2. a softmax between two matmuls (softmax_attention.py).

Named, but not read, are
3. attention operators of other libraries, and
4. attentions inside of a node that has graphs of its own: a branch, a loop.
"""

import re
from collections.abc import Iterator

from swacompile.attention import Attention, Refutation
from swacompile.graph import Node
from swacompile.passes.attention_operator import read_operator
from swacompile.passes.index_tensor import Unreadable
from swacompile.passes.logits import UnreadableLogits
from swacompile.passes.read_masks import Reading
from swacompile.passes.site import NotReadable
from swacompile.passes.softmax_attention import read_softmax

FOREIGN = re.compile("attention|attn", re.IGNORECASE)
READERS = {"attention": read_operator, "softmax": read_softmax}


def detect_attention(reading: Reading) -> tuple[Attention | Refutation, ...]:
    """Every attention in execution order; a Refutation stands for one whose form cannot be read."""
    return tuple(_detect(reading))


def _detect(reading: Reading) -> Iterator[Attention | Refutation]:
    for node in reading.graph.nodes:
        read = READERS.get(node.op)
        if read is None:
            yield from _unread(node)
            continue
        try:
            site = read(reading, node)
        except NotReadable as error:
            yield Refutation(code=error.code, reason=error.reason, node=error.node or node.name)
        except (Unreadable, UnreadableLogits) as error:
            yield Refutation(code="unreadable-mask", reason=f"the mask cannot be read: {error}", node=node.name)
        else:
            if site is not None:
                yield site


def _unread(node: Node) -> Iterator[Refutation]:
    inside = node.attrs.get("attentions_inside", ())
    assert isinstance(inside, tuple)
    for name in inside:
        reason = f"the attention lies inside of {node.name} ({node.op}), a node with graphs of its own: expected it in the model's main graph"
        yield Refutation(code="subgraph", reason=reason, node=name)
    if FOREIGN.search(node.op) and len(node.inputs) >= 3:
        reason = (
            f"expected products and a softmax, or a standard attention operator, found {node.op}: its mask is not read"
        )
        yield Refutation(code="foreign-operator", reason=reason, node=node.name)
