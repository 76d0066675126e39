"""Entry -> how many of its attentions Inductor's own matcher turns into scaled_dot_product_attention.

The real compile_fx runs (AOTAutograd, decompositions, the joint-graph passes that hold the matcher); its last step,
which generates code and takes minutes, is replaced by one that hands the graph back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from benchmarks.zoo.catalogue import Entry
from benchmarks.zoo.models import build


def matched(entry: Entry) -> int:
    """CPU, float32, evaluation."""
    import torch._functorch.config
    import torch._inductor.config
    from torch._dynamo.utils import counters
    from torch._inductor.compile_fx import compile_fx

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        return compile_fx(gm, example_inputs, inner_compile=_as_it_is)

    counters.clear()
    caches = (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    )
    with caches[0], caches[1], torch.no_grad():
        model, args, kwargs = build(entry)
        torch.compile(model, backend=backend)(*args, **kwargs)
    return int(counters["inductor"]["fuse_attention"])


def _as_it_is(gm: fx.GraphModule, example_inputs: list[Any], **unused: Any) -> Callable[..., Any]:
    def call(inputs: list[Any]) -> Any:
        return gm.forward(*inputs)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call
