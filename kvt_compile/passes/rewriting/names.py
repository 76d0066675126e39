"""Makes a graph know the names its nodes have: new nodes are named by a graph, which must not give a name away twice.

torch.export renames the inputs of the bodies it cuts out (`with torch.no_grad():`) without telling the body's graph.
"""

from __future__ import annotations

from torch import fx


def know_names(graph: fx.Graph) -> None:
    """From here on no new node of the graph gets the name of another one."""
    # (no public name says which names a graph believes to be taken.)
    graph._graph_namespace._used_names.update(node.name for node in graph.nodes)
