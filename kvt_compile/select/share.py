"""A selection and a geometry -> the share of all pairs of a query and a key that it allows, for people to read."""

from __future__ import annotations

import math

import torch

from kvt_compile.select.content import kept_regions
from kvt_compile.select.geometry import Geometry
from kvt_compile.select.maps import Places, allowed, region_counts
from kvt_compile.select.values import Regions, Selector, leaves

QUERIES = 256
"""Queries that are looked at, spread over all: exact for as many."""


def kept_share(x: Selector, geometry: Geometry, heads: int, queries: int, keys: int) -> float | None:
    """In [0, 1]; None where tensors decide (`regions` joined with others)."""
    if isinstance(x, Regions):
        total = math.prod(region_counts(x, geometry))
        return kept_regions(x, total) / total
    if any(isinstance(y, Regions) for y in leaves(x)) or not queries or not keys:
        return None
    with torch.device("cpu"):
        return _of_some(x, geometry, heads, queries, keys)


def _of_some(x: Selector, geometry: Geometry, heads: int, queries: int, keys: int) -> float:
    some = torch.linspace(0, queries - 1, min(queries, QUERIES)).round().long()
    shape = torch.arange(heads)[:, None, None], some[:, None], torch.arange(keys)
    found = allowed(x, Places(geometry, heads, torch.zeros((), dtype=torch.int64), *shape))
    return float(found.expand(heads, len(some), keys).double().mean())
