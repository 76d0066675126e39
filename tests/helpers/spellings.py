"""Small modules that spell attention, or something like it, in every known way: one object each.

    @spelling("fused", score="0.5*s")
    def matmul(m, q, k, v):
        return (q @ k.mT * 0.5).softmax(-1) @ v

The table is filled by the `spellings_*` files.  `fates` says what has to become of each softmax, in the order in which
they run; every parameter is random, so that no gate hides an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, H, N, D = 2, 3, 5, 4
CLAMP = "hardtanh" if torch.__version__ >= (2, 14) else "clamp"
"""What a clamp is in a score: torch 2.14 took its gradient at a bound away."""
"""Sizes of the modules: batch, heads, tokens, features of a head.  All different."""
C = H * D

FATES = ("fused", "scores-kept", "dense", "refused")


class Spelled(nn.Module):
    """The module of one spelling.  Parameters come into being when first asked for, with random values."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling
        self.tell: list[str] = []
        self.softmax_module = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(0.0)
        self.qkv = nn.Linear(C, 3 * C)
        self.out = nn.Linear(C, C)

    def p(self, name: str, *shape: int) -> Tensor:
        """A parameter."""
        if name not in self._parameters:
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        found: Tensor = getattr(self, name)
        return found

    def b(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A buffer."""
        if name not in self._buffers:
            self.register_buffer(name, make())
        found: Tensor = getattr(self, name)
        return found

    def layer(self, name: str, make: Callable[[], nn.Module]) -> Any:
        """A submodule."""
        if name not in self._modules:
            self.add_module(name, make())
        return getattr(self, name)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, H, N, D] of tokens [B, N, C]."""
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def merge(self, x: Tensor) -> Tensor:
        """[B, H, N, D] -> [B, N, C] and the output projection."""
        merged: Tensor = self.out(x.transpose(1, 2).flatten(2))
        return merged


@dataclass(frozen=True)
class Spelling:
    """One way to write attention, or a look-alike."""

    id: str
    function: Callable[..., Any]
    fates: tuple[str, ...]
    inputs: Callable[[], tuple[Tensor, ...]]
    score: str | None = None
    """The score expression of the first site, captured tensors as c0, c1, ...; None where it is not stable."""
    weight: str | None = None
    reason: str = ""
    """A part of the reason the first softmax that is not fused gives."""
    traceable: bool = True
    """Whether symbolic_trace can follow it."""
    trainable: bool = True
    """Whether autograd allows its writes."""
    topk: int = 2

    def __str__(self) -> str:
        return self.id

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        """The module with its own forward, all parameters random."""
        names = ", ".join(list(inspect.signature(self.function).parameters)[1:])
        forward = eval(f"lambda self, {names}: function(self, {names})", {"function": self.function})
        torch.manual_seed(seed)
        module: nn.Module = type("Spelled", (Spelled,), {"forward": forward})(self)
        with torch.no_grad():
            module(*self.tensors(torch.float32))  # parameters come into being
            for parameter in module.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape))
        return module.to(dtype)

    def tensors(self, dtype: torch.dtype = torch.float64, *, grad: bool = False) -> list[Tensor]:
        """Its inputs: the same numbers each time, whatever the dtype."""
        torch.manual_seed(7)
        made = [x.to(dtype) if x.is_floating_point() else x for x in self.inputs()]
        return [x.requires_grad_(grad and x.is_floating_point()) for x in made]

    @property
    def positive(self) -> bool:
        return any(fate in ("fused", "scores-kept") for fate in self.fates)


TABLE: dict[str, Spelling] = {}


def tokens() -> tuple[Tensor, ...]:
    return (torch.randn(B, N, C),)


def qkv() -> tuple[Tensor, ...]:
    return tuple(torch.randn(B, H, N, D) for _ in range(3))


def spelling(*fates: str, inputs: Callable[[], tuple[Tensor, ...]] | None = None, **more: Any) -> Callable[..., Any]:
    """Puts a function into the table.  Its inputs are tokens `x`, or `q, k, v`, unless given."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        assert function.__name__ not in TABLE, f"two spellings are called {function.__name__}"
        assert set(fates) <= set(FATES), fates
        names = list(inspect.signature(function).parameters)[1:]
        make = inputs or (qkv if names[:3] == ["q", "k", "v"] else tokens)
        TABLE[function.__name__] = Spelling(function.__name__, function, fates, make, **more)
        return function

    return register


def cases(chosen: Callable[[Spelling], bool]) -> Any:
    """A parametrisation over some spellings."""
    return pytest.mark.parametrize("spelling", [pytest.param(s, id=s.id) for s in TABLE.values() if chosen(s)])


def from_file(*modules: ModuleType) -> Callable[[Spelling], bool]:
    """Whether a spelling stands in one of these files."""
    names = {module.__name__ for module in modules}
    return lambda spelling: spelling.function.__module__ in names


def spelling_of(name: str) -> Spelling:
    return TABLE[name]


# ---- the independent oracle ------------------------------------------------------------------------------------------


class Hand:
    """Softmaxes written by hand, in one place so that the oracle can replace them."""

    @staticmethod
    def stable(s: Tensor, dim: int = -1) -> Tensor:
        e = (s - s.amax(dim, keepdim=True)).exp()
        return e / e.sum(dim, keepdim=True)

    @staticmethod
    def short(s: Tensor, dim: int = -1) -> Tensor:
        e = torch.exp(s)
        return e / torch.sum(e, dim=dim, keepdim=True)

    @staticmethod
    def detached(s: Tensor, dim: int = -1) -> Tensor:
        e = torch.exp(s - s.max(dim, keepdim=True)[0].detach())
        return e.div(e.sum(dim=dim, keepdim=True))

    @staticmethod
    def unsqueezed(s: Tensor, dim: int = -1) -> Tensor:
        e = s.exp()
        return e / e.sum(dim).unsqueeze(dim)


def knn_softmax(scores: Tensor, dim: int, topk: int) -> Tensor:
    """Softmax over the topk largest along a dimension; ties at the threshold are all kept."""
    tau = scores.detach().topk(min(topk, scores.shape[dim]), dim).values.amin(dim, keepdim=True)
    return scores.masked_fill(scores < tau, -torch.inf).softmax(dim)


@contextmanager
def knn_attention(fates: Sequence[str], topk: int) -> Iterator[None]:
    """Inside, the softmaxes that are sites are k-NN softmaxes, by plain eager code in place of torch's own."""
    order = iter(fates)
    softmax = torch.Tensor.softmax
    inside = [False]

    def replaced(scores: Tensor, dim: Any = -1, *args: Any, dtype: torch.dtype | None = None, **more: Any) -> Tensor:
        if inside[0]:
            return softmax(scores, dim, dtype=dtype)
        inside[0] = True
        try:
            scores = scores if dtype is None else scores.to(dtype)
            if next(order) in ("fused", "scores-kept"):
                return knn_softmax(scores, dim, topk)
            return softmax(scores, dim)
        finally:
            inside[0] = False

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
                  is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        if attn_mask is not None:
            boolean = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if boolean else scores + attn_mask
        return replaced(scores, -1) @ v

    with (
        mock.patch.object(torch, "softmax", replaced),
        mock.patch.object(F, "softmax", replaced),
        mock.patch.object(torch.Tensor, "softmax", replaced),
        mock.patch.object(F, "scaled_dot_product_attention", attention),
        mock.patch.multiple(Hand, **{n: staticmethod(replaced) for n in vars(Hand) if not n.startswith("_")}),
    ):
        yield
    assert next(order, None) is None, "fewer softmaxes ran than the spelling says"
