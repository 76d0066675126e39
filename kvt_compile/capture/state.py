"""A traced graph's module tree -> the same parameters and buffers, under the same names and in the same order, as the
model it was traced from: what checkpoints and optimisers go by.

torch.fx keeps what the graph reads, in its own order, and makes a saved buffer of every tensor it meets.
"""

from __future__ import annotations

from torch import fx, nn


def keep_state(graph: fx.GraphModule, model: nn.Module) -> None:
    """Gives `graph` the state of `model`: parts no node reads come back, constants stay out of the `state_dict`.

    Parameters, buffers and submodules are shared with the model, not copied.
    """
    _adopt(graph, model)


def _adopt(mine: nn.Module, theirs: nn.Module) -> None:
    if mine is theirs:
        return
    own_buffers = set(mine._buffers) - set(theirs._buffers)  # constants of the graph
    for kind in ("_parameters", "_buffers", "_modules"):
        have, want = getattr(mine, kind), getattr(theirs, kind)
        ordered = {name: have.get(name, value) for name, value in want.items()}
        ordered |= {name: value for name, value in have.items() if name not in want}
        have.clear()
        have.update(ordered)
    mine._non_persistent_buffers_set = set(theirs._non_persistent_buffers_set) | own_buffers
    for name, child in theirs._modules.items():
        other = mine._modules[name]
        if child is not None and other is not None:
            _adopt(other, child)
