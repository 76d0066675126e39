"""An import-linter contract: no module imports, through whatever others, itself.

import-linter's own `acyclic_siblings` compares neighbours in a package; this one sees a package's `__init__.py` too,
which is nobody's neighbour: `kernels/__init__.py` imports op, op imports kernels.
"""

from __future__ import annotations

from grimp import ImportGraph
from importlinter.application import output
from importlinter.domain.contract import Contract, ContractCheck
from networkx import DiGraph, find_cycle, strongly_connected_components


class NoCircles(Contract):
    """Its only field is its name."""

    type_name = "no_circles"

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        imports: DiGraph[str] = DiGraph()
        for module in graph.modules:
            imports.add_edges_from((module, other) for other in graph.find_modules_directly_imported_by(module))
        rounds = [part for part in strongly_connected_components(imports) if len(part) > 1]
        circles = [[edge[0] for edge in find_cycle(imports.subgraph(part))] for part in rounds]
        return ContractCheck(kept=not circles, metadata={"circles": sorted(circles)})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for circle in check.metadata["circles"]:
            output.print_error(" -> ".join([*circle, circle[0]]))
            output.new_line()
