"""torch.compile(model, backend="swacompile"): attentions whose window is proven become banded kernels, inductor compiles the rest.

1. The captured graph is traced to ATen operators with the fake tensors that it was captured with, before autograd: the
   gradient is the operator's own.
2. What is proven is replaced. Where nothing is, inductor gets the captured graph as if this backend were not there.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from swacompile import torch_pipeline
from swacompile.attention import Refutation

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]
REWRITES_NOT = ("_enter_autocast", "_exit_autocast")
"""Calls that tracing to ATen would resolve at the wrong time."""


def swacompile(
    module: fx.GraphModule, inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Compiled:
    """The backend. `mode` and `options` are inductor's."""
    rewritten = rewrite_captured(module)
    return _inductor(module if rewritten is None else rewritten, inputs, mode, options)


def rewrite_captured(module: fx.GraphModule) -> fx.GraphModule | None:
    """A graph that dynamo captured, with its proven attentions replaced; None where there is none, or it cannot be traced."""
    if any(getattr(node.target, "__name__", "") in REWRITES_NOT for node in module.graph.nodes):
        log.info("not rewritten: the graph switches autocast on and off")
        return None
    traced = _traced(module)
    if traced is None:
        return None
    done = torch_pipeline.rewrite(traced, sizes_checked=True)  # by dynamo
    for outcome in done.outcomes:
        verdict = (
            f"kept: {outcome.reason}" if isinstance(outcome, Refutation) else f"replaced, band {outcome.proof.mask}"
        )
        log.info("%s", verdict)
    return done.program if done.replaced and isinstance(done.program, fx.GraphModule) else None


def _traced(module: fx.GraphModule) -> fx.GraphModule | None:
    """The graph in ATen operators, None where it cannot be had."""
    fakes = [node.meta.get("example_value") for node in module.graph.nodes if node.op == "placeholder"]
    # The fakes' own mode: dynamo has a new one for its backends by now.
    mode = next((fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor)), None)
    if mode is None or any(fake is None for fake in fakes):
        log.info("not rewritten: the captured graph has no fake inputs")
        return None
    try:
        with _tracing_with(mode), mode, enable_python_dispatcher():
            traced: fx.GraphModule = make_fx(fx.Interpreter(module).run, pre_dispatch=True)(*fakes)
    except Exception as error:  # whatever tracing cannot do, inductor still can
        log.info("not rewritten: the graph cannot be traced to ATen operators (%s)", error)
        return None
    return traced


def _tracing_with(mode: FakeTensorMode) -> AbstractContextManager[None]:
    """Tracing that finds this mode where it asks for the current one, as torch up to 2.9 does at a tensor literal."""
    return nullcontext() if TracingContext.try_get() is None else TracingContext.patch(fake_mode=mode)


def _inductor(
    module: fx.GraphModule, inputs: Sequence[Any], mode: str | None, options: dict[str, Any] | None
) -> Compiled:
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = (list_mode_options(mode) if mode and mode != "default" else {}) | (options or {})
    compiled = compile_fx(module, list(inputs), config_patches=patches or None)
    assert callable(compiled)  # text only where the graph is compiled ahead of time
    return compiled


__all__ = ["rewrite_captured", "swacompile"]
