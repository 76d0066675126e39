"""A selection and a geometry -> the share of all pairs of a query and a key that it allows, for people to read."""

from __future__ import annotations

import math

import torch

from kvt_compile.select.content import how_many
from kvt_compile.select.geometry import Geometry
from kvt_compile.select.maps import Places, allowed, region_counts
from kvt_compile.select.values import Heads, Keys, Selector, by_content, routed

QUERIES = 256
"""Queries that are looked at, spread over all: exact for as many."""


def kept_share(x: Selector, geometry: Geometry, heads: int, queries: int, keys: int) -> float | None:
    """In [0, 1]; None where tensors decide (what q and k choose, joined with others)."""
    if not queries or not keys:
        return None
    if isinstance(x, Keys):
        return how_many(x.k, keys) / keys
    if isinstance(x, Heads):
        return how_many(x.keep, heads) / heads
    if (route := routed(x)) is not None:
        total, before = math.prod(region_counts(route, geometry)), geometry.prefix if route is not x else 0
        on_grid = how_many(route.keep, total) / total * (keys - before)
        return (before * keys + (queries - before) * (before + on_grid)) / (queries * keys)
    if by_content(x):
        return None
    with torch.device("cpu"):
        return _of_some(x, geometry, heads, queries, keys)


def _of_some(x: Selector, geometry: Geometry, heads: int, queries: int, keys: int) -> float:
    some = torch.linspace(0, queries - 1, min(queries, QUERIES)).round().long()
    shape = torch.arange(heads)[:, None, None], some[:, None], torch.arange(keys)
    found = allowed(x, Places(geometry, heads, torch.zeros((), dtype=torch.int64), *shape))
    return float(found.expand(heads, len(some), keys).double().mean())
