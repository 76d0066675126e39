"""The operators as torch sees them: schema, fakes, autograd, vmap, autocast, FLOPs, compile, export, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracles import Case, call
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kvt_compile.kernels import lowerings
from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.spec import CapturedSpec, KernelSpec, SoftmaxSpec, SpecError
from kvt_compile.kernels.plain.aten import AtenLowering

kvt = torch.ops.kvt
SCALE = "0.35*s"
LOWERINGS = ["aten", "reference", "auto"]


def qkv(*, grad: bool = True, dtype: torch.dtype = torch.float32, keys: int = 7) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(2, 4, 5, 8), (2, 2, keys, 8), (2, 2, keys, 6)]
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for shape in shapes]


def arguments(*, grad: bool = True, captured: bool = True, dropout: bool = False, lowering: str = "aten") -> tuple:
    score = "0.35*s*c0[h] + c1[i % n0, j]" if captured else SCALE
    tensors = [torch.rand(4), torch.randn(3, 7)] if captured else []
    return (
        *qkv(grad=grad), [x.requires_grad_(grad) for x in tensors], score, "p", 3, [3] if captured else [],
        0.3 if dropout else 0.0, torch.tensor([5]) if dropout else None, lowering,
    )  # fmt: skip


def without_lists(args: tuple) -> tuple:
    """None for both, as a call arrives from an AOTInductor package."""
    return (*args[:3], None, *args[4:7], None, *args[8:])


def backward_arguments(lowering: str = "aten") -> tuple:
    args = arguments(grad=False, lowering=lowering)
    out, logsumexp, threshold = kvt.attention(*args)
    q, k, v, captured, *rest = args
    return (torch.ones(()).expand_as(out), q, k, v, captured, out, logsumexp, threshold, *rest[:-1],
            [True, False, True, True, False], lowering)  # fmt: skip


SAMPLES: dict[str, Any] = {
    "attention": (kvt.attention, lambda: arguments()),
    "attention, reference": (kvt.attention, lambda: arguments(lowering="reference")),
    "attention, nothing captured": (kvt.attention, lambda: arguments(captured=False)),
    "attention, None for nothing": (kvt.attention, lambda: without_lists(arguments(captured=False))),
    "attention, dropout": (kvt.attention, lambda: arguments(dropout=True)),
    "attention, tolerance": (kvt.attention, lambda: (*arguments(), 0.25)),
    "attention, no gradient": (kvt.attention, lambda: arguments(grad=False)),
    "attention_backward": (kvt.attention_backward, backward_arguments),
    "topk_softmax": (kvt.topk_softmax, lambda: (torch.randn(3, 4, 5).requires_grad_(), 1, 2, torch.float32, "aten")),
    "topk_softmax, tolerance": (
        kvt.topk_softmax,
        lambda: (torch.randn(3, 4, 5).requires_grad_(), 1, 2, torch.float32, "aten", 0.25),
    ),
    "topk_softmax_backward": (
        kvt.topk_softmax_backward,
        lambda: (torch.randn(3, 4), torch.rand(3, 4), 1, torch.bfloat16, "aten"),
    ),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(sample: str) -> None:
    op, make = SAMPLES[sample]
    torch.library.opcheck(op.default, make())


def test_none_is_an_empty_list() -> None:
    given = arguments(captured=False)
    for args in (given, without_lists(given)):
        out = kvt.attention(*args)[0]
        found = (out, *torch.autograd.grad(out.sum(), args[:3]))
        if args is given:
            expected = found
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    q, *rest = without_lists(arguments(captured=False, grad=False))
    mapped = torch.vmap(lambda x: kvt.attention(x, *rest)[0])(torch.stack([q, 2 * q]))
    torch.testing.assert_close(mapped[1], kvt.attention(2 * q, *rest)[0])


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("transpose", [False, True], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_results_are_contiguous_and_the_fake_says_so(lowering: str, transpose: bool, dtype: torch.dtype) -> None:
    tensors = qkv(grad=False, dtype=dtype)
    if transpose:
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    tail = ([], SCALE, "p", 3, [], 0.0, None, lowering)
    real, fake = kvt.attention(*tensors, *tail), kvt.attention(*(x.to("meta") for x in tensors), *tail)
    gradients = kvt.attention_backward(real[0], *tensors, [], *real, SCALE, "p", 3, [], 0.0, None, [True] * 3, lowering)
    metas = [x.to("meta") for x in (*tensors, *real)]
    fakes = kvt.attention_backward(
        fake[0], *metas[:3], [], *metas[3:], SCALE, "p", 3, [], 0.0, None, [True] * 3, lowering
    )
    for mine, theirs in zip((*real, *gradients[:3]), (*fake, *fakes[:3]), strict=True):
        assert (mine.shape, mine.stride(), mine.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
        assert mine.is_contiguous()


def test_what_needs_no_gradient_comes_back_empty() -> None:
    dq, dk, dv, dcaptured = kvt.attention_backward(*backward_arguments())
    assert [x.numel() for x in (dq, dk, dv, *dcaptured)] == [2 * 4 * 5 * 8, 0, 2 * 2 * 7 * 6, 4, 0]


# --- autograd ---------------------------------------------------------------------------------------------------------


def test_rows_are_not_differentiable() -> None:
    out, logsumexp, threshold = kvt.attention(*arguments())
    assert out.requires_grad
    assert not logsumexp.requires_grad
    assert not threshold.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    args = arguments()
    with mode():
        out = kvt.attention(*args)[0]
    assert not out.requires_grad
    torch.testing.assert_close(out.clone(), kvt.attention(*args)[0].detach())


@pytest.mark.parametrize(
    ("run", "leaf"),
    [
        (lambda x: kvt.attention(x, x, x, [], SCALE, "p", 2, [], 0.0, None, "aten")[0], (1, 1, 3, 4)),
        (lambda x: kvt.topk_softmax(x, -1, 2, torch.float32, "aten"), (3, 4)),
    ],
    ids=["attention", "topk_softmax"],
)
def test_a_second_derivative_says_that_there_is_none(run: Any, leaf: tuple[int, ...]) -> None:
    x = torch.randn(leaf, requires_grad=True)
    (dx,) = torch.autograd.grad((run(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative.*exclude"):
        dx.sum().backward()


def test_create_graph_alone_is_no_error() -> None:
    args = arguments()
    first = torch.autograd.grad(kvt.attention(*args)[0].sum(), args[0], create_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(kvt.attention(*args)[0].sum(), args[0]))


def test_an_integer_captured_tensor_next_to_a_learned_one() -> None:
    q, k, v = qkv()
    table, index = torch.randn(9, 4, requires_grad=True), torch.randint(9, (5, 7))
    out = kvt.attention(q, k, v, [index, table], "0.35*s + c1[c0[i, j], h]", "p", 3, [], 0.0, None, "aten")[0]
    bias = table[index].permute(2, 0, 1)
    same = kvt.attention(q, k, v, [bias], "0.35*s + c0[h, i, j]", "p", 3, [], 0.0, None, "aten")[0]
    mine, theirs = (torch.autograd.grad(x.square().sum(), (q, table), retain_graph=True) for x in (out, same))
    torch.testing.assert_close(out, same)
    torch.testing.assert_close(mine, theirs)


# --- vmap -------------------------------------------------------------------------------------------------------------

MAPS = {
    "q, k, v": ((0, 0, 0), None, SCALE, 0.0),
    "other dims": ((1, 2, 3), None, SCALE, 0.0),
    "only q": ((0, None, None), None, SCALE, 0.0),
    "unmapped bias": ((0, 0, 0), None, SCALE + " + c0[h, i, j]", 0.0),
    "bias of a batch": ((0, 0, 0), None, SCALE + " + c0[b, i, j]", 0.0),
    "mapped bias": ((0, 0, 0), 0, SCALE + " + c0[h, i, j]", 0.0),
    "dropout": ((0, 0, 0), None, SCALE, 0.4),
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(
    ("gradient", "learned"),
    [(False, False), (True, False), (True, True)],
    ids=["forward", "backward", "backward, learned bias"],
)
def test_vmap_is_a_loop(name: str, gradient: bool, learned: bool) -> None:
    in_dims, bias_dim, score, p = MAPS[name]
    torch.manual_seed(0)
    count, shapes = 3, [(2, 2, 5, 4), (2, 2, 7, 4), (2, 2, 7, 4)]
    tensors = [
        torch.randn(shape) if dim is None else torch.randn(count, *shape).movedim(0, dim)
        for shape, dim in zip(shapes, in_dims, strict=True)
    ]
    bias = torch.randn(*([count] if bias_dim == 0 else []), 2, 5, 7)
    seed = torch.tensor([9])

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
        captured = [bias] if "c0" in score else []
        rest = (score, "p", 3, [], p, seed if p else None)
        results = kvt.attention(q, k, v, captured, *rest, "aten")
        if not gradient:
            return results
        needs_grad = [True, False, True, *[learned] * len(captured)]
        *grads, dcaptured = kvt.attention_backward(
            results[0].cos(), q, k, v, captured, *results, *rest, needs_grad, "aten"
        )
        return (*grads, *dcaptured)

    mapped = torch.vmap(run, in_dims=(*in_dims, bias_dim))(*tensors, bias)
    slices = [
        [x if dim is None else x.select(dim, n) for x, dim in zip((*tensors, bias), (*in_dims, bias_dim), strict=True)]
        for n in range(count)
    ]
    looped = tuple(torch.stack(x) for x in zip(*(run(*x) for x in slices), strict=True))
    torch.testing.assert_close(mapped, looped)


def test_vmap_folds_into_one_call_only_where_nothing_reads_b(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    original = AtenLowering.forward

    def spy(self: AtenLowering, call: AttentionCall) -> Any:
        calls.append(tuple(call.q.shape))
        return original(self, call)

    monkeypatch.setattr(AtenLowering, "forward", spy)
    x, bias = torch.randn(3, 2, 2, 5, 4), torch.randn(2, 5)
    for score in ("s + c0[h, j]", "s + c0[b, j]"):
        torch.vmap(lambda x, score=score: kvt.attention(x, x, x, [bias], score, "p", 2, [], 0.0, None, "aten")[0])(x)
    assert calls == [(6, 2, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4)]


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_vmap_of_topk_softmax(dim: int, in_dim: int) -> None:
    scores = torch.randn(3, 4, 5)

    def run(x: Tensor) -> Tensor:
        weights = kvt.topk_softmax(x, dim, 2, torch.float32, "aten")
        return kvt.topk_softmax_backward(x.cos(), weights, dim, torch.float32, "aten")

    looped = torch.stack([run(x) for x in scores.unbind(in_dim)])
    torch.testing.assert_close(torch.vmap(run, in_dims=in_dim)(scores), looped)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize(("shape", "dim"), [((2, 3, 4), -1), ((2, 3, 4), 1), ((3, 1), 0), ((), 0)])
def test_what_an_operator_gave_may_be_written_to(lowering: str, shape: tuple[int, ...], dim: int) -> None:
    """As what softmax gives; autograd refuses to write to a view that an operator made of its own."""
    scores = torch.randn(shape, requires_grad=True)
    weights = kvt.topk_softmax(scores, dim, 2, torch.float32, lowering)
    kept = weights.detach().clone()
    assert torch.equal(weights.mul_(0.5), kept * 0.5)
    out = kvt.attention(*arguments(lowering=lowering))[0]
    kept = out.detach().clone()
    assert torch.equal(out.mul_(0.5), kept * 0.5)


def test_vmap_of_topk_softmax_over_single_scores() -> None:
    weights = torch.vmap(lambda x: kvt.topk_softmax(x, 0, 2, torch.float32, "aten"))(torch.randn(4))
    assert torch.equal(weights, torch.ones(4))


# --- autocast, FLOPs --------------------------------------------------------------------------------------------------


def test_autocast_does_not_reach_inside() -> None:
    args = arguments()
    expected = kvt.attention(*args)[0]
    expected_grad = torch.autograd.grad(expected.sum(), args[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = kvt.attention(*args)[0]
        gradient = torch.autograd.grad(out.sum(), args[0])
        weights = kvt.topk_softmax(args[0], -1, 3, torch.float32, "aten")
    assert torch.equal(out, expected)
    assert torch.equal(gradient[0], expected_grad[0])
    assert torch.equal(weights, kvt.topk_softmax(args[0], -1, 3, torch.float32, "aten"))


def test_flops_are_sdpa_s() -> None:
    q, k, v = qkv()
    args = (q, k, v, [], SCALE, "p", 3, [], 0.0, None, "aten")
    rows = 2 * 2 * 4 * 5 * 7  # 2 * B * Hq * Nq * Nk
    with FlopCounterMode(display=False) as forward:
        out = kvt.attention(*args)[0]
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    with FlopCounterMode(display=False) as dense:
        repeated = [x.detach().repeat_interleave(4 // x.shape[1], 1).requires_grad_() for x in (q, k, v)]
        expected = repeated[0] @ repeated[1].transpose(-1, -2) @ repeated[2]
    assert forward.get_total_flops() == dense.get_total_flops() == rows * (8 + 6)
    assert expected.shape == out.shape
    assert backward.get_total_flops() == rows * (8 * 3 + 6 * 2)


@pytest.mark.parametrize(
    ("select", "share"),
    [
        ("sinks(2)", 2 / 7),
        ("keys(3)", 3 / 7),
        ("window(3) | prefix", (7 + 6 * 4) / 49),
        ("regions(1, 3) | prefix", (7 + 6 * 4) / 49),
        ("topk(3, ties=lowest)", 1.0),
    ],
)
def test_flops_of_a_selection_are_of_what_it_allows(select: str, share: float) -> None:
    q, k, v = (torch.randn(2, 4, 7, 8, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        out = torch.ops.kvt.attention(
            q, k, v, [], "s", "p", 7, [], 0.0, None, "aten", 0.0, None, select, [6], 1
        )[0]  # fmt: skip
        forward = counter.get_total_flops()
        out.sum().backward()
    dense = 2 * 2 * 4 * 7 * 7 * 8
    assert forward == round(2 * dense * share)
    assert counter.get_total_flops() - forward == round(5 * dense * share)


def test_flops_of_what_is_not_needed_are_not_counted() -> None:
    q, k, v = qkv()
    with FlopCounterMode(display=False) as counter:
        out = kvt.attention(q.detach(), k.detach(), v, [], SCALE, "p", 3, [], 0.0, None, "aten")[0]
        forward = counter.get_total_flops()
        out.sum().backward()
    assert counter.get_total_flops() - forward == 2 * 2 * 4 * 5 * 7 * (8 + 6)  # the scores again, and dV
    with FlopCounterMode(display=False) as counter:
        kvt.topk_softmax(q, -1, 2, torch.float32, "aten")
    assert counter.get_total_flops() == 0


# --- compile, export --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A use of the op with a learned bias, sizes and a symbolic topk."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.rand(2))
        self.project = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(x).unflatten(-1, (2, 4)).transpose(1, 2)
        tokens = x.shape[1]
        score = "0.5*s*c0[h] + where(lt(i, n0 - 1), 0.0, 0.1)"
        out, _, _ = kvt.attention(
            heads, heads, heads, [self.scale], score, "p", (tokens + 1) // 2, [tokens], 0.0, None, "aten"
        )
        return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_trains_with_dynamic_shapes(backend: str) -> None:
    block = Block()
    compiled = torch.compile(copy.deepcopy(block), backend=backend, fullgraph=True, dynamic=True)
    for tokens in (5, 9):
        x = torch.randn(2, tokens, 8)
        expected, actual = block(x), compiled(x)
        torch.testing.assert_close(actual, expected)
        parameters = [list(m.parameters()) for m in (block, compiled)]
        gradients = [
            torch.autograd.grad(y.square().sum(), p) for y, p in zip((expected, actual), parameters, strict=True)
        ]
        torch.testing.assert_close(gradients[1], gradients[0])


def test_export_keeps_the_op_and_its_dynamic_sizes() -> None:
    block = Block()
    tokens = torch.export.Dim("tokens", min=3, max=64)
    program = torch.export.export(block, (torch.randn(2, 6, 8),), dynamic_shapes={"x": {1: tokens}})
    assert [n.target for n in program.graph.nodes].count(kvt.attention.default) == 1
    x = torch.randn(2, 11, 8)
    torch.testing.assert_close(copy.deepcopy(program.module())(x), block(x))


# --- errors -----------------------------------------------------------------------------------------------------------

t = torch.zeros
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"q": t(5, 8)}, "q, k, v have 2, 4, 4 dimensions"),
    "batch": ({"q": t(3, 4, 5, 8)}, "batch size B differs: q has 3, k has 2"),
    "heads": ({"q": t(2, 3, 5, 8)}, "Hq=3 heads, which is no multiple of the Hk=2"),
    "key heads": ({"v": t(2, 4, 7, 6)}, "number of heads Hk differs: k has 2, v has 4"),
    "keys": ({"v": t(2, 2, 9, 6)}, "number of keys Nk differs: k has 7, v has 9"),
    "head size": ({"q": t(2, 4, 5, 9)}, "head size D differs: q has 9, k has 8"),
    "dtype": ({"q": t(2, 4, 5, 8).half()}, "dtype differs: q is torch.float16, k is torch.float32"),
    "integers": ({"v": t(2, 2, 7, 6).int()}, "v is torch.int32"),
    "topk": ({"topk": 0}, "topk is 0, expected at least 1"),
    "dropout": ({"dropout_p": 1.5}, "dropout_p is 1.5, expected a probability"),
    "no seed": ({"dropout_p": 0.5}, "needs a seed"),
    "seed": ({"dropout_p": 0.5, "seed": t(2)}, "seed is torch.float32 of shape (2,)"),
    "unknown name": ({"score": "s*x"}, "unknown name 'x'"),
    "p in the score": ({"score": "s*p"}, "uses p, which it does not have"),
    "s in the weight": ({"weight": "p*s"}, "uses s, which it does not have"),
    "missing size": ({"score": "s*n1", "sizes": [3]}, "uses n1, but 1 sizes were given"),
    "missing tensor": ({"score": "s*c1", "captured": [t(())]}, "reads c1, but 1 captured tensors were given"),
    "indices": ({"score": "s*c0[h]", "captured": [t(4, 5)]}, "with 1 indices, but captured tensor 0 has 2"),
    "lowering": ({"lowering": "aaten"}, "did you mean 'aten'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_what_is_wrong(name: str) -> None:
    changes, message = WRONG[name]
    q, k, v = qkv(grad=False)
    usual = {"q": q, "k": k, "v": v, "captured": [], "score": "s", "weight": "p", "topk": 3, "sizes": [],
             "dropout_p": 0.0, "seed": None, "lowering": "aten"}  # fmt: skip
    kvt.attention(**usual)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        kvt.attention(**(usual | changes))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: t(2, 4, 5, 7)}, "grad_out has shape (2, 4, 5, 7), expected (2, 4, 5, 6)"),
        ({6: t(2, 4, 4)}, "logsumexp has shape (2, 4, 4), expected (2, 4, 5)"),
        ({14: [True]}, "needs_grad has 1 entries, expected one for each of q, k, v and 2 captured"),
        ({4: [t(4).int(), t(3, 7)]}, "captured tensor 0 is torch.int32, which cannot have a gradient"),
    ],
    ids=["grad_out", "logsumexp", "needs_grad", "captured"],
)
def test_backward_errors_name_what_is_wrong(change: dict[int, Any], message: str) -> None:
    args = [change.get(n, x) for n, x in enumerate(backward_arguments())]
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        kvt.attention_backward(*args)
    assert message in str(error.value)


def test_topk_softmax_errors() -> None:
    with pytest.raises(IndexError, match="dim is 2"):
        kvt.topk_softmax(t(3, 4), 2, 1, torch.float32, "aten")
    with pytest.raises(ValueError, match="topk is 0"):
        kvt.topk_softmax(t(3, 4), 1, 0, torch.float32, "aten")
    with pytest.raises(ValueError, match="must be floating point"):
        kvt.topk_softmax(t(3, 4).int(), 1, 1, torch.float32, "aten")


# --- lowerings and specs ----------------------------------------------------------------------------------------------


class Picky(AtenLowering):
    """Refuses float64."""

    name = "picky"

    def supports(self, spec: KernelSpec | SoftmaxSpec) -> str | None:
        return "float64 is not generated" if spec.dtype == "float64" else None


def test_a_lowering_can_be_added_and_says_what_it_does_not_do() -> None:
    undo = lowerings.register("picky", Picky())
    try:
        case = Case("picky")
        torch.testing.assert_close(call(case, "picky")[0], call(case, "aten")[0])
        with pytest.raises(lowerings.LoweringError, match="'picky' cannot run this node: float64 is not generated"):
            call(case.but(dtype=torch.float64), "picky")
    finally:
        undo()
    assert "picky" not in lowerings.names()
    with pytest.raises(lowerings.LoweringError, match="unknown lowering 'picky'"):
        call(case, "picky")


def test_a_lowering_is_held_to_its_devices() -> None:
    spec = KernelSpec("float32", "float32", 8, 8)
    picky = Picky()
    picky.devices = ("cuda",)
    undo = lowerings.register("picky", picky)
    try:
        with pytest.raises(lowerings.LoweringError, match="runs on cuda, not on cpu"):
            lowerings.choose("picky", spec, "cpu")
        assert lowerings.choose("picky", spec, "cuda") is picky
    finally:
        undo()


def test_auto_never_takes_the_reference() -> None:
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        assert lowerings.choose("auto", KernelSpec(dtype, dtype, 8, 8), "cpu").name != "reference"
        assert lowerings.choose("auto", SoftmaxSpec(dtype, dtype), "cpu").name != "reference"
    assert lowerings.choose("auto", KernelSpec("float32", "float32", 8, 8), "xpu").name == "aten"


def test_specs_of_like_calls_are_one() -> None:
    q, k, v = qkv()
    spec = KernelSpec.of(q, k, v, [torch.zeros(3, dtype=torch.bool)], "where(c0[h], s, -oo)", "p", 0, 0.1, [True] * 4)
    assert spec == KernelSpec(
        "float32", "float32", 8, 6, "where(c0[h], s, -oo)", "p", (CapturedSpec("bool", 1),), 0, (True,) * 4, True
    )
    assert hash(spec) == hash(copy.deepcopy(spec))
    assert spec is KernelSpec.of(*qkv(), [torch.ones(5).bool()], "where(c0[h], s, -oo)", "p", 0, 0.9, (True,) * 4)
    assert not spec.captured[0].is_float
    assert spec.accumulate == torch.float32


def test_a_spec_checks_itself() -> None:
    with pytest.raises(SpecError, match="needs_grad has 2 entries, expected 3"):
        KernelSpec("float32", "float32", 8, 8, needs_grad=(True, False))
    with pytest.raises(SpecError, match="dtype 'int8'"):
        KernelSpec("int8", "float32", 8, 8)
