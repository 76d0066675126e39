"""A rewritten trace refuses inputs of sizes it was not read with: never another k, never a number of another length."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kvt_compile

OF_ANY_SIZE = pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="torch 2.11 makes a dynamic size a number where a trace reshapes"
)


class Plain(nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return (q @ q.mT).softmax(-1) @ q


class ScaledByLength(nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return (q @ q.mT * q.shape[-2] ** -0.5).softmax(-1) @ q


class TokensFirst(nn.Module):
    """[N, B, C]: the first dimension is that of the tokens, and may differ."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.transpose(0, 1)
        return (q @ q.mT).softmax(-1) @ q


def q_of(batch: int, tokens: int) -> Tensor:
    return torch.randn(batch, 2, tokens, 4, dtype=torch.float64)


def rewritten(model: nn.Module, x: Tensor, topk: float | int = 1.0) -> nn.Module:
    return kvt_compile.rewrite(model, x, topk=topk, force_rewrite=True).module


@pytest.mark.parametrize("topk", [1.0, 0.5, 4])
@pytest.mark.parametrize(("read", "called"), [(6, 9), (9, 6), (3, 6), (0, 6)])
@pytest.mark.parametrize("build", [Plain, ScaledByLength])
def test_another_number_of_tokens_is_an_error(
    build: Callable[[], nn.Module], read: int, called: int, topk: float | int
) -> None:
    if build is ScaledByLength and not read:
        return  # 0 ** -0.5 is no number
    module = rewritten(build(), q_of(2, read), topk)
    what = rf"input q has shape \(2, 2, {called}, 4\).* rewritten for \(\*, 2, {read}, 4\)"
    with pytest.raises(ValueError, match=what):
        module(q_of(2, called))


@pytest.mark.parametrize("build", [Plain, ScaledByLength])
@pytest.mark.parametrize(("read", "called"), [(2, 5), (5, 1), (1, 1)])
def test_the_first_dimension_may_differ(build: Callable[[], nn.Module], read: int, called: int) -> None:
    model, x = build(), q_of(called, 6)
    torch.testing.assert_close(rewritten(model, q_of(read, 6))(x), model(x), rtol=1e-9, atol=1e-9)


class WeightsToo(nn.Module):
    def forward(self, q: Tensor) -> tuple[Tensor, Tensor]:
        w = (q @ q.mT).softmax(-1)
        return w @ q, w


def test_an_example_of_one_shows_no_batch() -> None:
    with pytest.raises(ValueError, match=r"rewritten for \(1, 2, 6, 4\)"):
        rewritten(Plain(), q_of(1, 6))(q_of(4, 6))
    model, x = WeightsToo(), q_of(4, 6)  # scores kept: a row is a row
    torch.testing.assert_close(rewritten(model, q_of(1, 6))(x), model(x), rtol=1e-9, atol=1e-9)


def test_a_mask_for_all_does_not_become_one_for_each() -> None:
    """It was read as the same for the whole batch."""

    class Masked(nn.Module):
        def forward(self, q: Tensor, mask: Tensor) -> Tensor:
            return (q @ q.mT + mask).softmax(-1) @ q

    model, one, each = Masked(), torch.randn(1, 1, 6, 6).double(), torch.randn(3, 1, 6, 6).double()
    module = kvt_compile.rewrite(model, q_of(2, 6), one, topk=1.0, force_rewrite=True).module
    torch.testing.assert_close(module(q_of(3, 6) * 0, one), model(q_of(3, 6) * 0, one))
    with pytest.raises(ValueError, match="input mask has shape"):
        module(q_of(3, 6), each)


@OF_ANY_SIZE
@pytest.mark.parametrize("tokens", [3, 9])
def test_a_share_of_tokens_that_come_first_is_that_of_the_call(tokens: int) -> None:
    model, x = TokensFirst(), torch.randn(tokens, 2, 4, dtype=torch.float64)
    module = rewritten(model, torch.randn(6, 2, 4, dtype=torch.float64))
    torch.testing.assert_close(module(x), model(x), rtol=1e-9, atol=1e-9)


@OF_ANY_SIZE
def test_a_number_of_keys_is_at_most_what_there_is() -> None:
    model, x = TokensFirst(), torch.randn(3, 2, 4, dtype=torch.float64)
    module = rewritten(model, torch.randn(6, 2, 4, dtype=torch.float64), topk=5)
    torch.testing.assert_close(module(x), model(x), rtol=1e-9, atol=1e-9)


def test_an_exported_module_checks_by_itself() -> None:
    program = torch.export.export(Plain(), (q_of(2, 6),))
    module = kvt_compile.rewrite(program, topk=1.0, force_rewrite=True).module
    with pytest.raises(Exception, match=r"shape\[2\]|size"):
        module(q_of(2, 9))


def test_the_check_is_copied_and_compiled_with_the_module() -> None:
    module = rewritten(Plain(), q_of(2, 6))
    with pytest.raises(ValueError, match="rewritten for"):
        copy.deepcopy(module)(q_of(2, 9))
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q_of(2, 6)).shape, torch.Size((2, 2, 6, 4)))
    torch.testing.assert_close(rewritten(module, q_of(2, 6))(q_of(3, 6)).shape, torch.Size((3, 2, 6, 4)))
    assert list(module.state_dict()) == []


def test_a_model_that_is_left_as_it_is_is_not_checked() -> None:
    model, x = Plain(), q_of(2, 9)
    module = kvt_compile.rewrite(model, q_of(2, 6), topk=None).module
    torch.testing.assert_close(module(x), model(x))
