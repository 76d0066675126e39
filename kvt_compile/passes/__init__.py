"""Graph -> graph: find every softmax(Q Kᵀ) V of a traced model and rewrite it.  Start at `pipeline.py`."""
