"""Find every attention of a graph, and bring each into one form.

An attention is
1. an attention operator (attention_operator.py), or
2. a softmax between two matmuls (softmax_attention.py).
"""

from collections.abc import Iterator

from swacompile.attention import Attention, Refutation
from swacompile.passes.attention_operator import read_operator
from swacompile.passes.index_tensor import Unreadable
from swacompile.passes.logits import UnreadableLogits
from swacompile.passes.read_masks import Reading
from swacompile.passes.site import NotReadable
from swacompile.passes.softmax_attention import read_softmax

READERS = {"attention": read_operator, "softmax": read_softmax}


def detect_attention(reading: Reading) -> tuple[Attention | Refutation, ...]:
    """Every attention in execution order; a Refutation stands for one whose form cannot be read."""
    return tuple(_detect(reading))


def _detect(reading: Reading) -> Iterator[Attention | Refutation]:
    for node in reading.graph.nodes:
        read = READERS.get(node.op)
        if read is None:
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
