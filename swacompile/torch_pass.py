"""Replacing attentions as a pass of inductor's, for programs that have other passes or options beside it.

    torch.compile(model, options={"pre_grad_custom_pass": swacompile.torch_pass.ReplaceAttention(), "post_grad_custom_pre_pass": other})

1. The pass runs before autograd. Later the forward half keeps its softmax for the backward half, and neither can be replaced alone;
   here the gradient is the operator's own.
2. The graph is edited in place: its inputs stay, all else becomes what the backend "swacompile" would hand to inductor. A graph
   in which nothing is proven is not touched.
3. Inductor's caches ask for `uuid`: it changes with every source file that decides what is replaced.
"""

from operator import attrgetter
from pathlib import Path
from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from swacompile.runtime.cache import fingerprint
from swacompile.runtime.torch_op.build import operator_name
from swacompile.torch_backend import rewrite_captured

_PACKAGE = Path(__file__).parent


class ReplaceAttention(CustomGraphPass):
    """For inductor's option `pre_grad_custom_pass`."""

    def __init__(self) -> None:
        # Some versions of torch pickle the pass for their cache's key instead of asking for `uuid`.
        self.version = fingerprint(_deciding_sources(), operator_name())

    def __call__(self, graph: fx.Graph) -> None:
        module = graph.owning_module
        rewritten = None if module is None else rewrite_captured(module)
        if module is not None and rewritten is not None:
            _refill(module, rewritten)

    def uuid(self) -> Any:
        return self.version


def _deciding_sources() -> list[Path]:
    folders = (_PACKAGE, _PACKAGE / "frontends", _PACKAGE / "passes", _PACKAGE / "passes" / "rules")
    return [path for folder in folders for path in folder.glob("*.py")]


def _refill(module: fx.GraphModule, rewritten: fx.GraphModule) -> None:
    """Give `module` the nodes and attributes of `rewritten`; its own placeholders stay, in their order."""
    graph = module.graph
    for node in reversed(list(graph.nodes)):
        if node.op != "placeholder":
            graph.erase_node(node)
    places = (part.find_nodes(op="placeholder") for part in (rewritten.graph, graph))
    copies = dict(zip(*places, strict=True))
    graph.output(graph.graph_copy(rewritten.graph, copies))
    for node in rewritten.graph.find_nodes(op="get_attr"):
        copies[node].target = _moved(module, rewritten, str(node.target))
    graph.lint()


def _moved(module: fx.GraphModule, rewritten: fx.GraphModule, name: str) -> str:
    """The attribute `name` of `rewritten` put into `module` under a free name, which is returned."""
    free = f"swacompile_{name.replace('.', '_')}"
    while hasattr(module, free):
        free += "_"
    setattr(module, free, attrgetter(name)(rewritten))
    return free
