"""An operator packet -> the overload that a call of it runs, in place.

    torch.ops.aten.mT(x)        ->  torch.ops.aten.mT.default(x)
    torch.ops.mylib.op(x, out)  ->  torch.ops.mylib.op.default(x, out), whose schema says what it writes to

Dynamo keeps a packet where a model calls one, and from torch 2.14 on writes some attributes (`x.mT`) as one.  A packet
has no schema: nothing says what it writes to, and no table of overloads knows it.  So this is the first of the passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from kvt_compile.passes.canonical.values import meta_value


def resolve_packets(gm: fx.GraphModule) -> None:
    """Replaces every packet that a node calls, wherever its overload can be told."""
    resolved = False
    for node in gm.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, OpOverloadPacket):
            overload = _overload_of(node)
            if overload is not None:
                node.target, resolved = overload, True
    if resolved:
        gm.recompile()


def _overload_of(node: fx.Node) -> OpOverload | None:
    packet: Any = node.target
    names = packet.overloads()
    if len(names) > 1:
        args, kwargs = fx.map_arg((node.args, node.kwargs), meta_value)
        try:  # what calling the packet does
            name = torch._C._jit_resolve_packet(packet._qualified_op_name, *args, **kwargs)
        except (RuntimeError, AttributeError):  # arguments without known values
            return None
        names = [str(name)]
    found = getattr(packet, names[0], None) if names else None
    return found if isinstance(found, OpOverload) else None
