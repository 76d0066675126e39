"""Dropout is a function of (seed, b, h, i, j): the same everywhere, drawn again by the backward."""

from __future__ import annotations

import pytest
import torch
from oracles import Case, assert_matches_reference, call
from torch import Tensor

from kvt_compile.kernels import dropout


def philox4x32_10(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """As the paper prints it, in Python's integers."""
    low = 0xFFFFFFFF
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (b >> 32) ^ x1 ^ k0, b & low, (a >> 32) ^ x3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return x0, x1, x2, x3


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_the_oracle_gives_random123_s_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, int, int, int]
) -> None:
    assert philox4x32_10(counter, key) == words


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 5, 2**63 - 1, -1, -(2**63)])
def test_first_word_is_philox_s(seed: int) -> None:
    offsets = [0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 17, 2**62]
    words = dropout.philox_first_word(torch.tensor(offsets), torch.tensor([seed]))
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    assert words.tolist() == [philox4x32_10((o & 0xFFFFFFFF, o >> 32, 0, 0), key)[0] for o in offsets]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate(p: float) -> None:
    n = 200_000
    share = dropout.dropped(torch.arange(n), torch.tensor([7]), p).double().mean().item()
    assert abs(share - p) < 5 * (p * (1 - p) / n) ** 0.5  # five standard deviations


def weights(lowering: str, seed: int, p: float, topk: int = 11) -> Tensor:
    """Weights of uniform attention, `[B, H, Nq, Nk]`: 1/Nk where kept, before dropout."""
    q, k = torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 11, 4)
    values = torch.eye(11).expand(2, 3, 11, 11)
    return torch.ops.kvt.attention(q, k, values, [], "s", "p", topk, [], p, torch.tensor([seed]), lowering)[0]


@pytest.mark.parametrize("lowering", ["aten", "reference", "auto"])
def test_the_mask_is_the_documented_one(lowering: str) -> None:
    drop = torch.empty(2, 3, 5, 11, dtype=torch.bool)
    for position, _ in enumerate(drop.flatten()):
        drop.view(-1)[position] = philox4x32_10((position, 0, 0, 0), (42, 0))[0] < int(0.3 * 2**32)
    expected = torch.where(drop, 0.0, 1 / 11 / 0.7)
    torch.testing.assert_close(weights(lowering, 42, 0.3), expected)


def test_another_seed_is_another_mask_and_the_same_is_the_same() -> None:
    assert torch.equal(weights("aten", 1, 0.5), weights("aten", 1, 0.5))
    assert not torch.equal(weights("aten", 1, 0.5), weights("aten", 2, 0.5))


@pytest.mark.parametrize("lowering", ["aten", "reference"])
def test_all_or_nothing(lowering: str) -> None:
    assert torch.equal(weights(lowering, 1, 1.0), torch.zeros(2, 3, 5, 11))
    torch.testing.assert_close(weights(lowering, 1, 0.0), torch.full((2, 3, 5, 11), 1 / 11))


def test_the_mask_does_not_depend_on_topk() -> None:
    q, k = torch.randn(1, 1, 6, 4), torch.randn(1, 1, 9, 4)
    values, seed = torch.eye(9).expand(1, 1, 9, 9), torch.tensor([3])
    few, all_ = (torch.ops.kvt.attention(q, k, values, [], "s", "p", n, [], 0.5, seed, "aten")[0] != 0 for n in (4, 9))
    kept = torch.ops.kvt.attention(q, k, values, [], "s", "p", 4, [], 0.0, None, "aten")[0] != 0
    assert torch.equal(few, all_ & kept)


CASES = [
    Case("plain", dropout_p=0.3),
    Case("weight", dropout_p=0.3, weight="p*sigmoid(c0[h])", captured=lambda case: [torch.randn(case.heads)]),
    Case("gqa", heads=4, kv_heads=2, dropout_p=0.5),
    Case("bfloat16", dtype=torch.bfloat16, dropout_p=0.2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_backward_draws_the_forward_s_mask(case: Case) -> None:
    assert_matches_reference(case, "aten")


def test_gradcheck_with_a_fixed_seed() -> None:
    case = Case("float64", dtype=torch.float64, dropout_p=0.4, queries=5, keys=6, topk=3, head_dim=3, value_dim=2)
    q, k, v, _ = case.tensors()
    assert torch.autograd.gradcheck(lambda *x: call(case, "aten", x)[0], (q, k, v))


@pytest.mark.parametrize("lowering", ["aten", "reference", "auto"])
@pytest.mark.parametrize(
    ("rows", "first"),
    [((slice(1, 2), slice(None), slice(None)), 165), ((slice(None), slice(1, 3), slice(2, 5)), 55 + 22)],
    ids=["batch", "heads and rows"],
)
def test_a_part_of_a_call_draws_the_mask_of_the_whole(lowering: str, rows: tuple[slice, ...], first: int) -> None:
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 11, 4), torch.randn(2, 3, 11, 6)
    grad = torch.randn(2, 3, 5, 6)

    def run(rows: tuple[slice, ...], draw: list[int] | None) -> tuple[Tensor, Tensor]:
        mine = [q[rows], k[rows[:2]], v[rows[:2]]]
        leaves = [x.clone().requires_grad_() for x in mine]
        out = torch.ops.kvt.attention(
            *leaves, [], "0.5*s", "p", 6, [], 0.4, torch.tensor([9]), lowering, 0.0, draw
        )[0]  # fmt: skip
        out.backward(grad[rows])
        assert leaves[0].grad is not None
        return out.detach(), leaves[0].grad

    whole = run((slice(None),) * 3, None)
    for part, expected in zip(run(rows, [first, 165, 55, 11]), whole, strict=True):
        torch.testing.assert_close(part, expected[rows])
    assert not torch.equal(run(rows, None)[0], whole[0][rows])


def test_a_part_is_four_numbers() -> None:
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match=r"draw is .*expected four numbers"):
        torch.ops.kvt.attention(q, q, q, [], "s", "p", 2, [], 0.5, torch.tensor([1]), "aten", 0.0, [0, -1, 3, 3])
