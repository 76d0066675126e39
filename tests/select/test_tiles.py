"""Lists of tiles: they name what a selection allows and nothing else, each query once, and few keys besides."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kvt_compile.kernels.language.evaluate import compile_text, tile
from kvt_compile.kernels.language.grid import Environment, Grid
from kvt_compile.kernels.op.selection import Selection, selection_of
from kvt_compile.kernels.tiles import TileLists, Walk, Walks, tile_lists
from kvt_compile.kernels.tiles.conditions import Tables, condition
from kvt_compile.kernels.tiles.order import patch_sizes

HEADS = 4
BY_TABLES = [
    ("keys(6)", (5, 7), 2),
    ("keys(6) | prefix", (5, 7), 2),
    ("keys(0.2, by=mean_query) & (window(3) | prefix)", (5, 7), 2),
    ("heads(1)", (50,), 0),
    ("heads(2) | window((3, 4), dilation=(1, 2)) | prefix", (5, 7), 2),
    ("heads(3) & (keys(7) | halo(2, 1) | prefix)", (11, 10), 1),
    ("regions(2, (2, 3)) | window(3) | sinks(4)", (5, 7), 2),
    ("regions(0.1, 4, heads=all) & shifted(3) | prefix", (5, 7), 2),
]
"""What tensors choose: lists name all of it, and the condition of the score says which pairs."""
CASES = [
    ("window(3) | prefix", (5, 7), 2),
    ("window((3, 4), dilation=(1, 2), stride=(2, 1)) | sinks(4)", (5, 7), 2),
    ("window(4, causal=True) | sinks(3)", (50,), 0),
    ("window(3, dilation=3)", (11, 10), 0),
    ("window(99) | prefix", (5, 7), 2),
    ("window(4) | prefix(9)", (3, 4, 5), 1),
    ("halo(2, 1) | prefix", (5, 7), 2),
    ("halo((7, 7), 2)", (15, 16), 0),
    ("shifted(3) | prefix", (5, 7), 2),
    ("regions(3, (2, 3)) | prefix", (5, 7), 2),
    ("regions(0.4, (6, 6), heads=all)", (15, 13), 0),
    ("regions(0.4, 3, heads=2)", (20,), 0),
    ("prefix(3) | window(2) & halo(3, 1)", (5, 7), 2),
    ("sinks(2) & window(2)", (40,), 0),
    ("prefix(5) | sinks(9)", (40,), 0),
]


def listed(lists: TileLists, keys: int) -> Tensor:
    """`[B, H, N, N]` of what the lists say, in the way a kernel reads them."""
    found = torch.zeros(2, HEADS, keys, keys, dtype=torch.bool)
    for b in range(2):
        for h in range(HEADS):
            for x, count in enumerate((lists.count[b, h] if lists.own_lanes else lists.count).tolist()):
                number = b * lists.per_batch + h * lists.per_head + x
                query = lists.query[b, h, x] if lists.own_lanes else lists.query[x]
                some: list[int] = []
                for block in lists.block[lists.list_start[number] : lists.list_start[number + 1]].tolist():
                    for first, many, bits in lists.run[
                        lists.block_start[block] : lists.block_start[block + 1]
                    ].tolist():
                        some += range(first, first + many)
                        for y in range(many):
                            lanes = -1 if bits < 0 else int(lists.bits[bits + y])
                            kept = [lane for lane in range(count) if lanes >> lane & 1]
                            found[b, h, query[kept].long(), first + y] = True
                assert len(some) == len(set(some)) <= lists.longest, "a key is listed twice, or too many are"
    return found


def made(text: str, grid: tuple[int, ...], prefix: int, lanes: int) -> tuple[Selection, Tensor, Tensor, TileLists]:
    torch.manual_seed(0)
    tokens = math.prod(grid) + prefix
    selection = selection_of(text, grid, prefix, tokens, tokens)
    assert selection is not None
    q, k = torch.randn(2, HEADS, tokens, 4), torch.randn(2, 2, tokens, 4)
    return selection, q, k, tile_lists(selection, q, k, lanes)


@pytest.mark.parametrize("lanes", [4, 32])
@pytest.mark.parametrize(("text", "grid", "prefix"), CASES, ids=[text for text, *_ in CASES])
def test_lists_say_what_the_selection_allows(text: str, grid: tuple[int, ...], prefix: int, lanes: int) -> None:
    selection, q, k, lists = made(text, grid, prefix, lanes)
    tokens = q.shape[2]
    assert torch.equal(listed(lists, tokens), expected_of(selection, q, k))
    queries = [q for tile, count in zip(lists.query.tolist(), lists.count.tolist(), strict=True) for q in tile[:count]]
    assert sorted(queries) == list(range(tokens))


def expected_of(selection: Selection, q: Tensor, k: Tensor) -> Tensor:
    tokens = q.shape[2]
    at = torch.meshgrid(*map(torch.arange, (2, HEADS, tokens, tokens)), indexing="ij")
    found = selection.map(HEADS, at, selection.tables(q, k))
    assert found is not None
    return found.expand(2, HEADS, tokens, tokens)


@pytest.mark.parametrize("lanes", [4, 32])
@pytest.mark.parametrize(("text", "grid", "prefix"), BY_TABLES, ids=[text for text, *_ in BY_TABLES])
def test_lists_name_all_that_tensors_choose(text: str, grid: tuple[int, ...], prefix: int, lanes: int) -> None:
    selection, q, k, lists = made(text, grid, prefix, lanes)
    assert not (expected_of(selection, q, k) & ~listed(lists, q.shape[2])).any()
    rows = zip(lists.query.flatten(0, -2).tolist(), lists.count.flatten().tolist(), strict=True)
    queries = sorted(x for tile, count in rows for x in tile[:count])
    assert queries == sorted([*range(q.shape[2])] * (2 * HEADS if lists.own_lanes else 1))


@pytest.mark.parametrize(("text", "grid", "prefix"), BY_TABLES, ids=[text for text, *_ in BY_TABLES])
def test_the_condition_of_a_score_says_what_the_selection_allows(text: str, grid: tuple[int, ...], prefix: int) -> None:
    selection, q, k, _ = made(text, grid, prefix, 32)
    tables, tokens = Tables(selection, q, k), q.shape[2]
    assert selection.allowed is not None
    holds, needed = condition(selection.allowed)
    found = tables.in_order()
    assert [(str(x.dtype), x.dim()) for x in found] == [(f"torch.{x.dtype}", x.ndim) for x in needed]
    grid_of = Grid(range(2), range(HEADS), range(tokens), range(tokens), torch.device("cpu"), torch.float32)
    scores = tile(
        compile_text(f"where({holds.format(*(f'c{n}' for n in range(len(found))))}, s, -oo)"),
        Environment(grid_of, found, (), s=torch.zeros(2, HEADS, tokens, tokens)),
    )
    assert torch.equal(scores == 0, expected_of(selection, q, k))


def walked(walk: Walk, tokens: int, turned: bool) -> Tensor:
    """The same of what a GPU's kernels walk."""
    found = torch.zeros(2, HEADS, tokens, tokens, dtype=torch.bool)
    start = walk.start.tolist()
    every = walk.token if walk.block is None else walk.token.reshape(-1, walk.width)[walk.block.long()].flatten()
    for b in range(2):
        for h in range(HEADS):
            head = (b * 2 + h // 2) if turned else b * HEADS + h  # of the lanes, where heads have their own
            at = torch.arange(walk.tiles) * walk.lane.shape[-1] + head * walk.head_lanes
            lanes = walk.lane.flatten()[at[:, None] + torch.arange(walk.lane.shape[-1])]
            for x, lane in enumerate(lanes.tolist()):
                number = int(walk.list_of[x + h * walk.head_tiles]) + (b * HEADS + h) * walk.head_lists
                places = torch.arange(start[number], start[number + 1])
                places = places[every[places] < tokens]
                some = every[places].long()
                assert len(some) == len(some.unique()) <= walk.longest, "a token is listed twice, or too many are"
                for n, token in enumerate(lane):
                    if token < tokens:
                        kept = some if walk.may is None else some[(walk.may[places] >> n & 1).bool()]
                        found[(b, h, kept, token) if turned else (b, h, token, kept)] = True
    return found


@pytest.mark.parametrize("lanes", [4, 64])
@pytest.mark.parametrize("turned", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize(("text", "grid", "prefix"), CASES, ids=[text for text, *_ in CASES])
def test_a_gpu_walks_what_the_selection_allows(
    text: str, grid: tuple[int, ...], prefix: int, turned: bool, lanes: int
) -> None:
    selection, q, k, _ = made(text, grid, prefix, 32)
    tokens = q.shape[2]
    walk = Walks(selection, q, k).of(lanes, turned)
    assert torch.equal(walked(walk, tokens, turned), expected_of(selection, q, k))
    assert walk.lane[walk.lane < tokens].sort().values.tolist() == list(range(tokens))


@pytest.mark.parametrize("lanes", [4, 64])
@pytest.mark.parametrize("turned", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize(("text", "grid", "prefix"), BY_TABLES, ids=[text for text, *_ in BY_TABLES])
def test_a_gpu_walks_all_that_tensors_choose(
    text: str, grid: tuple[int, ...], prefix: int, turned: bool, lanes: int
) -> None:
    selection, q, k, _ = made(text, grid, prefix, 32)
    tokens = q.shape[2]
    walk = Walks(selection, q, k).of(lanes, turned)
    assert not (expected_of(selection, q, k) & ~walked(walk, tokens, turned)).any()
    heads = walk.lane.reshape(-1, walk.tiles * lanes)
    assert len(heads) == (1 if walk.lane.dim() == 2 else 4 if turned else 2 * HEADS)
    for lane in heads:
        assert lane[lane < tokens].sort().values.tolist() == list(range(tokens))


@pytest.mark.parametrize("text", ["window(99)", "halo(8, 0)"])
def test_lists_that_say_the_same_are_one(text: str) -> None:
    selection = selection_of(text, (32, 32), 0, 1024, 1024)
    assert selection is not None
    q = torch.zeros(1, HEADS, 1024, 1)
    for turned in (False, True):
        walk = Walks(selection, q, q).of(64, turned)
        assert walk.token.numel() == 1024
        assert walk.may is None


def share(text: str, grid: tuple[int, ...], prefix: int = 0) -> float:
    _, q, _, lists = made(text, grid, prefix, 32)
    return lists.listed / q.shape[2] ** 2


@pytest.mark.parametrize(
    ("text", "grid", "at_most"),
    [
        ("window(13)", (64, 64), 0.08),  # 16 x 20 keys for 4 x 8 queries, of which each keeps 13 x 13: 4.1 %
        ("window(13, dilation=4)", (64, 64), 0.08),
        ("halo(8, 3)", (64, 64), 0.05),
        ("regions(1/8, 8)", (64, 64), 0.126),
        ("window(256, causal=True) | sinks(4)", (4096,), 0.08),
        ("shifted(16)", (4096,), 0.075),
        ("keys(64)", (4096,), 64 / 4096),
        ("heads(1)", (4096,), 0.252),
        ("heads(1) & window(13)", (64, 64), 0.08),
        ("keys(64) | window(13)", (64, 64), 0.16),  # blocks of 4 x 8 keys, whole
        ("keys(64) & window(13)", (64, 64), 64 / 4096),
        ("regions(1/16, 8) | window(13)", (64, 64), 0.2),
    ],
)
def test_cost_follows_what_is_kept(text: str, grid: tuple[int, ...], at_most: float) -> None:
    assert share(text, grid) <= at_most


def test_memory_does_not_grow_with_the_square() -> None:
    small, large = (made("window(13)", (n, n), 0, 32)[3] for n in (32, 64))
    for name in ("run", "bits", "block"):
        assert getattr(large, name).numel() <= 6 * getattr(small, name).numel()  # 4 times the tokens; borders differ
    assert made("window(99)", (64, 64), 0, 32)[3].run.shape == (128, 3)  # every key: one run a tile, no bits


def test_more_keys_than_a_list_can_count_are_refused() -> None:
    selection = selection_of("sinks(4)", None, 0, 3, 2**31)
    assert selection is not None
    q, k = torch.zeros(1, 1, 3, 1), torch.zeros(1).expand(1, 1, 2**31, 1)
    with pytest.raises(MemoryError, match="2147483648 keys"):
        tile_lists(selection, q, k, 32)


def test_patches_are_as_square_as_the_room_lets_them_be() -> None:
    assert patch_sizes([64, 64], 32) == [4, 8]
    assert patch_sizes([1, 64], 32) == [1, 32]
    assert patch_sizes([7, 7], 32) == [4, 8]
    assert patch_sizes([8, 14, 14], 32) == [2, 4, 4]
    assert patch_sizes([3], 32) == [4]
