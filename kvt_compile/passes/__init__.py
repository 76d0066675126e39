"""Graph -> graph: find every softmax(Q Kᵀ) V of a traced model and rewrite it.  Start at `pipeline.py`.

canonical/  nodes -> values        reading/    values -> index functions, expressions
finding/    -> sites, refusals     rewriting/  sites -> graph
"""
