"""Models that ask what their inputs are: a proxy answers otherwise than a tensor, and a trace would go another way."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx._symbolic_trace import is_fx_tracing

import kvt_compile
from kvt_compile.capture.capture import capture

N, D = 8, 4
Scores = Callable[[Tensor], Tensor]


def tried(s: Tensor) -> Tensor:
    try:
        return s * 0.5 if s.dtype == torch.float32 else s
    except Exception:
        return s


def unpacked(s: Tensor) -> Tensor:
    a, b = s.chunk(2)
    return torch.cat([a, b * 2.0])


def known_by_name(s: Tensor) -> Tensor:
    return s * {"torch.float32": 0.5}.get(str(s.dtype), 1.0)


@functools.singledispatch
def of_its_class(s: object) -> Tensor:
    return s * 0.5  # type: ignore[operator, no-any-return]


of_its_class.register(nn.Parameter, lambda s: s)
of_its_class.register(Tensor, lambda s: s * 2.0 if s.__class__ is Tensor else s)


ASKING: dict[str, Scores] = {
    "isinstance": lambda s: s if isinstance(s, Tensor) else s * 0.5,
    "type": lambda s: s if type(s) is Tensor else s * 0.5,
    "type in a set": lambda s: s if type(s) in {Tensor, nn.Parameter} else s.tanh(),
    "type, where a trace gives up": lambda s: s if type(s) is Tensor and s.dim() > 2 else s * 0.5,
    "__class__": lambda s: s if s.__class__ is Tensor else s * 0.5,
    "the name of its class": lambda s: s * 0.5 if type(s).__name__ == "Tensor" else s,
    "its class, by functools": of_its_class,
    "is_fx_tracing": lambda s: s * 0.5 if is_fx_tracing() else s,
    "is_tensor": lambda s: s if torch.is_tensor(s) else s * 0.5,
    "hasattr": lambda s: s * 0.5 if hasattr(s, "lengths") else s,
    "getattr": lambda s: s if getattr(s, "lengths", None) is None else s.tanh(),
    "dtype is": lambda s: s * 0.5 if s.dtype is torch.float32 else s,
    "dtype as a key": lambda s: s * {torch.float32: 0.5}.get(s.dtype, 1.0),
    "dtype as a text": known_by_name,
    "try": tried,
    "callable": lambda s: s.exp() if callable(s) else s,
    "finfo": lambda s: s.masked_fill(s > 1.0, torch.finfo(s.dtype).min),
    "finfo of what is made of no input": lambda s: s + torch.full((N, N), torch.finfo(s.dtype).eps * 1e6).tril(),
    "iinfo": lambda s: s * (torch.iinfo(s.long().dtype).bits / 8),
}
PLAIN: dict[str, Scores] = {
    "a number": lambda s: s * 0.5,
    "its own size": lambda s: s / s.shape[-1] ** 0.5,
    "a tensor of its size": lambda s: s + torch.zeros((s.shape[-2], s.shape[-1]), device=s.device),
    "a constant": lambda s: s.masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf),
    "unpacked": unpacked,
    "its first part": lambda s: torch.cat([s.unbind(0)[0][None], s[1:] * 2.0]),
    "another dtype": lambda s: s.double().float(),
    "its dtype's name": lambda s: s.to(s.dtype),
    "dropout": lambda s: nn.functional.dropout(s, 0.0, training=True),
    "a class that is not used": lambda s: s * float(type(s.shape[-1]) is not str),
    "what is not used": lambda s: (s.dtype, s.device, s.shape, s)[-1],
}


class Attention(nn.Module):
    def __init__(self, scores: Scores) -> None:
        super().__init__()
        self.scores = scores
        self.out = nn.Linear(D, D)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.out(self.scores(q @ k.mT).softmax(-1) @ v)


class Iterated(Attention):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = torch.stack([q, k, v])
        return super().forward(q, k, v)


class Remembering(Attention):
    """Keeps what its first call made."""

    table: Tensor | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0.0, 1.0, N)
        return super().forward(q + self.table[:, None], k, v)


def inputs() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, N, D) for _ in range(3)]


@pytest.mark.parametrize("name", ASKING)
def test_what_a_tensor_answers(name: str) -> None:
    model, tensors = Attention(ASKING[name]), inputs()
    rewritten = kvt_compile.rewrite(model, *tensors, topk=1.0, force_rewrite=True)
    torch.testing.assert_close(rewritten.module(*tensors), model(*tensors), rtol=1e-5, atol=1e-5)
    assert capture(model, tensors, {}).how == "torch.export"


@pytest.mark.parametrize("name", PLAIN)
def test_nothing_is_asked(name: str) -> None:
    assert capture(Attention(PLAIN[name]), inputs(), {}).how == "torch.fx.symbolic_trace"


@pytest.mark.parametrize("model", [Iterated, Remembering])
def test_a_model_that_runs_as_it_is_traced(model: type[Attention]) -> None:
    made = model(lambda s: s)
    assert capture(made, inputs(), {}).how == "torch.fx.symbolic_trace"
    assert type(getattr(made, "table", None)) in (type(None), Tensor)


def test_a_model_that_has_no_copy_is_run() -> None:
    model = Attention(lambda s: s if isinstance(s, Tensor) else s * 0.5)
    model.kept = model.out.weight * 1.0  # type: ignore[assignment]  # a tensor with a history cannot be copied
    assert capture(model, inputs(), {}).how == "torch.export"


def test_hooks_are_not_run() -> None:
    model, calls = Attention(lambda s: s), list[int]()
    model.out.register_forward_hook(lambda *_: calls.append(1))
    assert capture(model, inputs(), {}).how == "torch.fx.symbolic_trace"
    assert not calls
    model(*inputs())
    assert calls
