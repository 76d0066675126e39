"""The score language: text <-> algebra, its derivatives, and its value on a tile."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvt_compile.kernels.language import score as language
from kvt_compile.kernels.language.derivative import derivative
from kvt_compile.kernels.language.evaluate import compile_expression, compile_text, scatter, tile
from kvt_compile.kernels.language.grid import Environment, Grid
from kvt_compile.torch_versions import numbers

TEXTS = [
    "s",
    "0.125*s",
    "s/8.0",
    "0.1*s + c0[h, i, j]",
    "where(c0[b % 4, i, j], 0.125*s, -oo)",
    "3.0*tanh(s/3.0)",
    "s*c0[h] + c1",
    "0.5*s - c0[h]*(i - j)",
    "s + c0[c1[i, j], h]",
    "s + c0[b // n0 % n1, i // 7, i % 7]",
    "where(logical_and(le(j, i), lt(i - j, 5)), s, -oo)",
    "clamp(s, -2.0, 2.0)",
    "maximum(s, c0[j])*sigmoid(s)",
    "where(logical_not(c0[j]), s**2, abs(s))",
    "s*(1.0 + c0[i])**(-0.5)",
    "where(eq(i // (n0*2), j // (n0*2)), s, -oo)",
]


def environment(s: Tensor, captured: list[Tensor] | None = None, sizes: tuple[int, ...] = ()) -> Environment:
    batch, heads, queries, keys = s.shape
    grid = Grid(range(batch), range(heads), range(queries), range(keys), s.device, s.dtype)
    return Environment(grid, captured or [], sizes, s=s, p=s)


def value(text: str, s: Tensor, captured: list[Tensor] | None = None, sizes: tuple[int, ...] = ()) -> Tensor:
    return tile(compile_text(text), environment(s, captured, sizes))


def scores(seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(2, 3, 4, 5, dtype=torch.float64)


@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trips(text: str) -> None:
    expression = language.parse(text)
    assert language.parse(language.to_text(expression)) == expression
    assert language.to_text(language.parse(language.to_text(expression))) == language.to_text(expression)


@settings(max_examples=100, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_round_trip_bit_for_bit(x: float) -> None:
    expression = language.add(language.mul(sympy.Float(x), language.s), language.load(0))
    again = language.parse(language.to_text(expression))
    assert again == expression
    assert float(again.args[0].args[0]) == x


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("s +", "cannot be read"),
        ("foo(s)", "foo(s)"),
        ("x*s", "unknown name 'x'"),
        ("__import__('os')", "__import__"),
        ("s.real", "s.real"),
        ("s if i else j", "not part of"),
        ("'text'", "'text'"),
        ("d0[i]", "d0[i]"),
        ("tanh(s, s)", "tanh has 2 arguments, expected 1"),
        ("where(s)", "where has 1 arguments, expected 3"),
    ],
)
def test_what_is_not_in_the_language_is_named(text: str, part: str) -> None:
    with pytest.raises(language.ScoreSyntaxError) as error:
        language.parse(text)
    assert part in str(error.value)


def test_loads_are_distinct_and_ordered() -> None:
    expression = language.parse("c1[i] + c0[j] + c1[h] + c1[i]*s")
    assert [language.to_text(x) for x in language.loads(expression)] == ["c0[j]", "c1[h]", "c1[i]"]


POINTWISE = [
    "exp(s)", "log(abs(s) + 1.0)", "sqrt(s**2 + 0.5)", "sin(s)", "cos(s)", "tanh(2.0*s)", "sigmoid(s)", "erf(s)",
    "abs(s)", "relu(s)", "maximum(s, c0[j])", "minimum(s, c0[j])", "clamp(s, -0.5, 0.5)", "s**3", "1.0/(s**2 + 1.0)",
    "(s**2 + 1.0)**0.3", "where(gt(s, 0.0), s*c0[j], c0[j]**2)", "s/c0[j]", "c0[j]*tanh(s/c0[j])", "2*s - i*j/3",
]  # fmt: skip


@pytest.mark.parametrize("text", POINTWISE)
def test_derivative_is_autograd_s(text: str) -> None:
    s, c = scores().requires_grad_(), (torch.rand(5, dtype=torch.float64) + 0.5).requires_grad_()
    ds, dc = torch.autograd.grad(value(text, s, [c]).sum(), (s, c), materialize_grads=True)
    expression = language.parse(text)
    env = environment(s.detach(), [c.detach()])
    env.gradient = torch.ones_like(s)
    by_s = tile(compile_expression(derivative(expression, language.s)), env)
    torch.testing.assert_close(by_s, ds)
    by_c = torch.zeros_like(c)
    for load in language.loads(expression):
        scatter(load, tile(compile_expression(derivative(expression, load)), env), env, by_c)
    torch.testing.assert_close(by_c, dc)


@pytest.mark.parametrize(
    ("text", "at", "slope"),
    [
        ("abs(s)", 0.0, 0.0),
        ("relu(s)", 0.0, 0.0),
        ("maximum(s, 1.0)", 1.0, 0.5),
        ("minimum(1.0, s)", 1.0, 0.5),
        ("clamp(s, 0.0, 1.0)", 1.0, 1.0),
        ("clamp(s, 0.0, 1.0)", 1.5, 0.0),
        ("(-s**2)**2.0", 0.0, 0.0),  # as f * 4 / s it would be NaN
        ("(-s**2)**2.0", 1.5, 13.5),
    ],
)
def test_derivative_at_a_kink_is_torch_s(text: str, at: float, slope: float) -> None:
    program = compile_expression(derivative(language.parse(text), language.s))
    s = torch.full((1, 1, 1, 1), at, dtype=torch.float64)
    env = environment(s)
    env.gradient = torch.ones_like(s)
    assert tile(program, env).item() == slope


MET = [
    ("clamp(s, c0, c1)", torch.clamp),
    ("clamp(s, c0, oo)", lambda s, low, high: torch.clamp(s, min=low)),
    ("clamp(s, -oo, c1)", lambda s, low, high: torch.clamp(s, max=high)),
    ("maximum(s, c0) + minimum(c1, s)", lambda s, low, high: torch.maximum(s, low) + torch.minimum(high, s)),
    ("sqrt(s)*c0 + c1", lambda s, low, high: s.sqrt() * low + high),
    ("sqrt(abs(s - c0))", lambda s, low, high: (s - low).abs().sqrt()),
    ("sqrt(relu(s))", lambda s, low, high: s.relu().sqrt()),
    ("s**0.5", lambda s, low, high: s**0.5),
    ("sqrt(hardtanh(s, 0.0, 1.0))*c1", lambda s, low, high: F.hardtanh(s, 0.0, 1.0).sqrt() * high),
    ("where(gt(s, c0), sqrt(s), c0)", lambda s, low, high: torch.where(s > low, s.sqrt(), low)),
    ("sqrt(where(gt(s, c0), s, 0.0))", lambda s, low, high: torch.where(s > low, s, 0.0).sqrt()),
    ("sqrt(maximum(s, c0)*s)", lambda s, low, high: (torch.maximum(s, low) * s).sqrt()),
    ("maximum(s, c0)*minimum(s, c1)", lambda s, low, high: torch.maximum(s, low) * torch.minimum(s, high)),
    ("relu(s) + abs(c0)", lambda s, low, high: s.relu() + low.abs()),
    ("where(gt(c0, 0.0), -oo, 0.125*s + c1)", lambda s, low, high: (0.125 * s + high).masked_fill(low > 0, -torch.inf)),
    ("3.0*where(gt(c1, 0.0), 0.0, s - c0)", lambda s, low, high: 3.0 * torch.where(high > 0, 0.0, s - low)),
    ("where(gt(c0, 0.0), s, c1)*s + c0", lambda s, low, high: torch.where(low > 0, s, high) * s + low),
]


@pytest.mark.parametrize(("text", "function"), MET, ids=[text for text, _ in MET])
@pytest.mark.parametrize(
    "at",
    [(0.0, 0.0, 1.0), (1.0, 0.0, 1.0), (0.0, 0.0, 0.0), (0.0, 1.0, -1.0), (0.0, -1.0, 0.0), (math.nan, 0.5, 1.0)],
    ids=str,
)
@pytest.mark.parametrize("gradient", [1.0, 0.0, math.inf, math.nan])
def test_derivatives_are_torch_s_where_a_bound_or_a_zero_is_met(
    text: str, function: Callable[..., Tensor], at: tuple[float, float, float], gradient: float
) -> None:
    """s, c0 and c1 are equal, or zero, or not a number: infinite and undefined slopes and gradients too."""
    if text.startswith("clamp") and numbers(torch.__version__) >= (2, 14):
        pytest.skip("this torch splits ties with the bounds; such a clamp is not read there")
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in at]
    if "hardtanh" in text and at[0] != at[0]:
        pytest.skip("torch's own gradient of it beside NaN depends on the length of the tensor")
    expected = torch.autograd.grad(function(*leaves), leaves, torch.tensor(gradient).double(), allow_unused=True)
    expression = language.parse(text)
    env = environment(leaves[0].detach().view(1, 1, 1, 1), [x.detach() for x in leaves[1:]])
    env.gradient = torch.full_like(env.s, gradient)
    for by, slope in zip((language.s, language.load(0), language.load(1)), expected, strict=True):
        found = tile(compile_expression(derivative(expression, by)), env).reshape(())
        torch.testing.assert_close(found, torch.zeros_like(found) if slope is None else slope, equal_nan=True)


def grid_of(s: Tensor) -> list[Tensor]:
    return list(torch.meshgrid(*(torch.arange(n) for n in s.shape), indexing="ij"))


LOADS = {
    "c0[h, i, j]": ((3, 4, 5), lambda c, b, h, i, j: c[h, i, j]),
    "c0[i, h]": ((4, 3), lambda c, b, h, i, j: c[i, h]),
    "c0[j, b]": ((5, 2), lambda c, b, h, i, j: c[j, b]),
    "c0": ((), lambda c, b, h, i, j: c.expand(b.shape)),
    "c0[1, j]": ((3, 5), lambda c, b, h, i, j: c[1, j]),
    "c0[h, h]": ((3, 3), lambda c, b, h, i, j: c[h, h]),
    "c0[i // 2, j % 2, b]": ((2, 2, 2), lambda c, b, h, i, j: c[i // 2, j % 2, b]),
    "c0[i - j + 4, h]": ((8, 3), lambda c, b, h, i, j: c[i - j + 4, h]),
    "c0[b*3 + h]": ((6,), lambda c, b, h, i, j: c[b * 3 + h]),
    "c0[i]": ((9,), lambda c, b, h, i, j: c[i]),
    "c0[n0 - 1 - j]": ((5,), lambda c, b, h, i, j: c[4 - j]),
    "c0[j - 2]": ((2,), lambda c, b, h, i, j: c[(j - 2).clamp(0, 1)]),
}


@pytest.mark.parametrize("text", LOADS)
def test_load_and_its_adjoint(text: str) -> None:
    shape, expected = LOADS[text]
    s = scores()
    c = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    loaded = value(text, s, [c.detach()], (5,))
    torch.testing.assert_close(loaded, expected(c, *grid_of(s)), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(expected(c, *grid_of(s)), c, s)
    into = torch.zeros_like(c)
    scatter(language.parse(text), s, environment(s, [c.detach()], (5,)), into)
    torch.testing.assert_close(into, gradient)


def test_plain_load_is_a_view_and_a_general_one_is_not() -> None:
    c = torch.randn(3, 4, 5)
    env = environment(torch.randn(2, 3, 4, 5), [c])
    assert compile_text("c0[h, i, j]")(env).data_ptr() == c.data_ptr()
    assert compile_text("c0[h, i, j % 5]")(env).data_ptr() != c.data_ptr()


def test_a_load_that_indexes_with_a_load() -> None:
    table, index = torch.randn(7, 3, dtype=torch.float64), torch.randint(7, (4, 5))
    s = scores()
    _, h, i, j = grid_of(s)
    torch.testing.assert_close(value("s + c0[c1[i, j], h]", s, [table, index]), s + table[index[i, j], h])


TYPES = {
    "i // 2 * 2 + j": lambda s, b, h, i, j: (i // 2 * 2 + j).to(s.dtype),
    "(i - j) // 2": lambda s, b, h, i, j: ((i - j) // 2).to(s.dtype),
    "(i - j) % 3": lambda s, b, h, i, j: ((i - j) % 3).to(s.dtype),
    "0.1*(i - j)": lambda s, b, h, i, j: 0.1 * (i - j).to(s.dtype),
    "i/3": lambda s, b, h, i, j: i.to(s.dtype) / 3,
    "where(lt(i, j), 0.1, 0.2)": lambda s, b, h, i, j: (
        torch.where(i < j, 0.1, 0.2).to(s.dtype) * 0
        + torch.where(i < j, torch.tensor(0.1, dtype=s.dtype), torch.tensor(0.2, dtype=s.dtype))
    ),
    "s*sqrt(n0)": lambda s, b, h, i, j: s * math.sqrt(5),
    "where(lt(n0, 6), s, 0.0)": lambda s, b, h, i, j: s,
    "s*1e-300*1e300": lambda s, b, h, i, j: s,
    "-oo": lambda s, b, h, i, j: torch.full_like(s, -math.inf),
}


@pytest.mark.parametrize("text", TYPES)
def test_types_follow_the_values(text: str) -> None:
    s = scores()
    torch.testing.assert_close(value(text, s, sizes=(5,)), TYPES[text](s, *grid_of(s)))


def test_captured_half_precision_is_widened_before_arithmetic() -> None:
    s, c = scores().float(), torch.tensor(1 / 3, dtype=torch.bfloat16)
    torch.testing.assert_close(value("s*c0 + c0*c0", s, [c]), s * c.float() + c.float() * c.float(), rtol=0, atol=0)
