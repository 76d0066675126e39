"""train() and eval() of a module that torch.export captured: torch refuses both, as its graph has one mode in it.

Where nothing in the graph depends on the mode, both are allowed; elsewhere only the mode of the capture.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import fx, nn

aten = torch.ops.aten

_MODE: dict[Any, int] = {
    # operator -> position of the argument that says whether it trains
    aten.dropout.default: 2,
    aten.dropout_.default: 2,
    aten.feature_dropout.default: 2,
    aten.alpha_dropout.default: 2,
    aten.batch_norm.default: 5,
    aten.instance_norm.default: 5,
    aten.rrelu.default: 3,
}


def allow_modes(module: fx.GraphModule, captured: bool | None) -> None:
    """Replaces the `train` and `eval` of what `ExportedProgram.module()` returned; `captured` is what `mode_of` said
    before anything was rewritten."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        if captured is not None and mode != captured:
            raise NotImplementedError(
                f"this module was captured by torch.export in {'training' if captured else 'evaluation'} mode, which "
                "is written into its graph (dropout or batch norm): rewrite the model in the mode you need, or use "
                'torch.compile(model, backend="kvt"), which follows the mode'
            )
        return nn.Module.train(self, mode)

    module.train = types.MethodType(train, module)  # type: ignore[method-assign]
    module.eval = types.MethodType(lambda self: self.train(False), module)  # type: ignore[method-assign]


def mode_of(graph: fx.Graph) -> bool | None:
    """True: something in the graph trains; False: something would, in the other mode; None: nothing depends on it.

    Dropout inside `scaled_dot_product_attention` is a number, which is 0 in evaluation: there it cannot be seen.
    """
    found: set[bool] = set()
    for node in graph.nodes:
        if node.target in _MODE and not _drops_nothing(node):
            position = _MODE[node.target]
            found.add(bool(node.args[position] if len(node.args) > position else node.kwargs.get("train", False)))
        elif node.target is aten.scaled_dot_product_attention.default and _dropout_of_sdpa(node) != 0.0:
            found.add(True)
    return any(found) if found else None


def _drops_nothing(node: fx.Node) -> bool:
    return bool("dropout" in str(node.target) and len(node.args) > 1 and node.args[1] == 0.0)


def _dropout_of_sdpa(node: fx.Node) -> Any:
    return node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
