"""Random valid and invalid arguments of the four operators, through generated C under sanitizers.

    python tests/faults/op_fuzz.py --seconds 3600 --seed 0        all of it is told in one line at the end

Whatever an operator accepts is memory-safe and gives the same bits whatever the strides of its arguments; whatever it
refuses it refuses with an error of the listed kinds.  A parent starts a process with the sanitizers' libraries, which
draws programs (a score text, dtypes, head sizes: one build) and many calls of each.  A call is drawn from (seed,
program, call) alone; before it runs it is written down, so that a crash names it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "helpers")]
from strewn import strewn  # noqa: E402

CALLS = 400
"""Calls of one program; building it takes as long as a hundred of them."""
PROGRAMS = 10
"""Programs of one process."""
REFUSALS = (
    "ValueError",
    "RuntimeError",
    "IndexError",
    "TypeError",
    "NotImplementedError",
    "MemoryError",
    "OverflowError",
)
FLOATS = ("float32", "float32", "float32", "float64", "bfloat16", "float16")
CAPTURED = ("float32", "float32", "float16", "bfloat16", "float64", "bool", "uint8", "int8", "int16", "int32", "int64")
EXTREMES = (0, 1, -1, 2, 7, 2**31, -(2**31), 2**62, 2**63 - 1, -(2**63))


# --- programs ---------------------------------------------------------------------------------------------------------


class Texts:
    """Random texts of the score language over given captured tensors."""

    def __init__(self, rng: random.Random, captured: Sequence[tuple[str, int]], sizes: int) -> None:
        self.rng, self.captured, self.sizes = rng, captured, sizes

    def whole(self, depth: int) -> str:
        """A whole number."""
        rng = self.rng
        if depth <= 0 or rng.random() < 0.35:
            leaves = ["b", "h", "i", "j"] * 3 + [str(rng.choice((0, 1, 2, 3, 5, 64, 1000, 2**31, 2**62, 2**63 - 1)))]
            leaves += [f"n{rng.randrange(self.sizes)}"] * 2 if self.sizes else []
            text = rng.choice(leaves)
            return f"-{text}" if rng.random() < 0.1 else text
        x, y = self.whole(depth - 1), self.whole(depth - 1)
        kind = rng.randrange(12)
        if kind < 4:
            return f"({x} {rng.choice('+-*')} {y})"
        if kind < 8:
            return f"({x} {rng.choice(('//', '%'))} {y})"
        if kind == 8:
            return f"where({self.truth(depth - 1)}, {x}, {y})"
        if kind == 9:
            return f"{rng.choice(('maximum', 'minimum'))}({x}, {y})"
        if kind == 10:
            return rng.choice((f"abs({x})", f"relu({x})", f"clamp({x}, {y}, {self.whole(0)})", f"({x})**2"))
        return self.load(depth - 1, whole=True) or x

    def truth(self, depth: int) -> str:
        rng = self.rng
        if depth > 0 and rng.random() < 0.3:
            return f"{rng.choice(('logical_and', 'logical_or'))}({self.truth(depth - 1)}, {self.truth(depth - 1)})"
        return f"{rng.choice(('lt', 'le', 'gt', 'ge', 'eq', 'ne'))}({self.whole(depth)}, {self.whole(depth)})"

    def load(self, depth: int, whole: bool) -> str | None:
        slots = [n for n, (dtype, _) in enumerate(self.captured) if not whole or "float" not in dtype]
        if not slots:
            return None
        slot = self.rng.choice(slots)
        index = [
            self.rng.choice("bhij") if self.rng.random() < 0.5 else self.whole(depth)
            for _ in range(self.captured[slot][1])
        ]
        return f"c{slot}" + (f"[{', '.join(index)}]" if index else "")

    def real(self, symbol: str, depth: int) -> str:
        rng = self.rng
        if depth <= 0 or rng.random() < 0.2:
            leaf = rng.choice((symbol, symbol, "0.5", "2.5", "1e-05", "-1e+38", "i", "load", "load"))
            return (self.load(2, whole=False) or symbol) if leaf == "load" else leaf
        x, y = self.real(symbol, depth - 1), self.real(symbol, depth - 1)
        kind = rng.randrange(10)
        if kind < 5:
            return f"({x} {rng.choice('+-**/')} {y})"
        if kind == 5:
            return f"where({self.truth(2)}, {x}, {rng.choice((y, '-oo'))})"
        if kind == 6:
            return f"{rng.choice(('exp', 'log', 'sqrt', 'sin', 'cos', 'tanh', 'sigmoid', 'erf', 'abs', 'relu'))}({x})"
        if kind == 7:
            return f"{rng.choice(('maximum', 'minimum', 'floordiv', 'mod'))}({x}, {y})"
        if kind == 8:
            return f"({x})**{rng.choice(('2', '3', '0.5', '-1', '2.5'))}"
        return f"({self.whole(3)}*{x})"


def program(rng: random.Random) -> dict[str, Any]:
    """What decides the generated code."""
    captured = [(rng.choice(CAPTURED), rng.choice((0, 1, 1, 2, 2, 3))) for _ in range(rng.choice((0, 1, 1, 2, 3)))]
    sizes = rng.choice((0, 0, 1, 2))
    texts = Texts(rng, captured, sizes)
    dtype = rng.choice(FLOATS)
    kind = rng.random()
    score = "0.25*s" if kind < 0.15 else f"{texts.real('s', 3)} + 0.25*s"
    return {
        "dtype": dtype,
        "value_dtype": dtype if rng.random() < 0.8 else rng.choice(FLOATS),
        "head_dim": rng.choice((1, 3, 8, 16, 19)),
        "value_dim": rng.choice((1, 4, 8, 16, 21)),
        "captured": captured,
        "sizes": sizes,
        "score": score,
        "weight": "p" if rng.random() < 0.7 else f"p*{texts.real('p', 2)}",
        "dropout": rng.random() < 0.2,
    }


# --- tensors ----------------------------------------------------------------------------------------------------------


def numbers(rng: random.Random, shape: Sequence[int], dtype: Any) -> Any:
    """Values, strange ones among them."""
    import torch

    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    if dtype.is_floating_point:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if rng.random() < 0.1 and x.numel():
            x.view(-1)[rng.randrange(x.numel())] = rng.choice((math.nan, math.inf, -math.inf, 1e30, 0.0))
        return x.to(dtype)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.7
    x = torch.randint(-4, 12, shape, generator=generator, dtype=torch.int64)
    if rng.random() < 0.3 and x.numel():
        x.view(-1)[rng.randrange(x.numel())] = rng.choice(EXTREMES)
    return x.to(dtype)


# --- calls ------------------------------------------------------------------------------------------------------------


def attention_call(rng: random.Random, p: dict[str, Any]) -> dict[str, Any]:
    """Arguments that fit, mostly."""
    import torch

    dtype, value_dtype = getattr(torch, p["dtype"]), getattr(torch, p["value_dtype"])
    few = (0, 1, 1, 2, 3)
    batch, kv_heads, group = rng.choice(few), rng.choice(few), rng.choice((1, 1, 2, 3))
    queries, keys = (rng.choice((0, 1, 2, 7, 16, 17, 33, 40, 70)) for _ in range(2))
    heads = kv_heads * group
    near = (1, batch, heads, queries, keys, keys, rng.randrange(1, 9), 70)
    captured = [
        strewn(
            rng,
            numbers(rng, [max(0 if rng.random() < 0.02 else 1, rng.choice(near)) for _ in range(n)], getattr(torch, d)),
        )
        for d, n in p["captured"]
    ]
    return {
        "q": strewn(rng, numbers(rng, (batch, heads, queries, p["head_dim"]), dtype)),
        "k": strewn(rng, numbers(rng, (batch, kv_heads, keys, p["head_dim"]), dtype)),
        "v": strewn(rng, numbers(rng, (batch, kv_heads, keys, p["value_dim"]), value_dtype)),
        "captured": captured,
        "score": p["score"],
        "weight": p["weight"],
        "topk": rng.choice((1, 2, 5, max(1, keys), 2**63 - 1)),
        "sizes": [rng.choice((1, 2, 3, 7, 7, 64, 2**40)) for _ in range(p["sizes"])],
        "dropout_p": rng.choice((0.1, 0.5, 1.0)) if p["dropout"] else 0.0,
        "seed": torch.tensor([rng.choice((*EXTREMES, rng.randrange(2**62)))]) if p["dropout"] else None,
    }


def broken(rng: random.Random, call: dict[str, Any]) -> str:
    """Makes one argument of a call wrong, or strange; says which."""
    import torch

    tensors = [name for name, x in call.items() if isinstance(x, torch.Tensor)]
    what = rng.choice(("tensor", "tensor", "tensor", "captured", "captured", "number", "number", "text", "length"))
    if what == "tensor" or (what == "captured" and not call["captured"]):
        name = rng.choice(tensors)
        how, call[name] = spoiled(rng, call[name])
        return f"{name}: {how}"
    if what == "captured":
        slot = rng.randrange(len(call["captured"]))
        how, call["captured"][slot] = spoiled(rng, call["captured"][slot])
        return f"captured {slot}: {how}"
    if what == "number":
        name, values = rng.choice(
            [
                ("topk", (0, -1, -(2**63), 2**63 - 1)),
                ("dropout_p", (math.nan, math.inf, -0.1, 1.5, 0.3, -0.0)),
                ("sizes", ([rng.choice(EXTREMES) for _ in call["sizes"]],)),
                ("seed", (None, torch.zeros(2, dtype=torch.int64), torch.zeros(1), torch.zeros((), dtype=torch.int64))),
            ]
        )
        call[name] = rng.choice(values)
        return f"{name} = {call[name]}"
    if what == "text":
        name = rng.choice(("score", "weight"))
        text = call[name]
        put = rng.choice(
            ("# */", "c9", "n9", "c0[-1]", "[", "**9999", "//0", "oo", "\n", "é", "c0", "9" * 30, "(" * 60, " + i//0")
        )
        place = rng.randrange(len(text) + 1)
        call[name] = text[:place] + put + text[place:]
        return f"{name} = {call[name]!r}"
    for name in rng.sample(["captured", "sizes", "needs_grad"], 3):
        if name in call:
            extra = torch.ones(3) if name == "captured" else 1 if name == "sizes" else True
            call[name] = call[name][:-1] if rng.random() < 0.5 else [*call[name], extra]
            return f"{name} has {len(call[name])}"
    return "nothing"


def spoiled(rng: random.Random, x: Any) -> tuple[str, Any]:
    import torch

    kinds = ["fewer", "more", "dims", "unsqueezed", "meta", "sparse", "negative", "complex", "grad", "huge"]
    # another dtype is another program where it is accepted, which takes its time to build
    how = rng.choice(kinds if rng.random() < 0.9 else ["dtype", "half"])
    if how == "dtype":
        return how, x.to(
            rng.choice((torch.float64, torch.float32, torch.int32, torch.bool, torch.uint8, torch.float8_e5m2))
        )
    if how == "half":
        return how, x.to(torch.float16)
    if how in ("fewer", "more") and x.dim():
        dim = rng.randrange(x.dim())
        return how, x.narrow(dim, 0, max(0, x.shape[dim] - 1)) if how == "fewer" else torch.cat([x, x], dim)
    if how == "dims" and x.dim():
        return how, x.sum(0).to(x.dtype)
    if how == "unsqueezed":
        return how, x.unsqueeze(0)
    if how == "meta":
        return how, x.to("meta")
    if how == "sparse" and x.dim():
        return how, x.to_sparse()
    if how == "negative" and x.is_floating_point():
        return how, torch._neg_view(x)
    if how == "complex":
        return how, x.to(torch.complex64)
    if how == "huge" and x.dim() == 4 and x.numel():
        return how, x[:, :, :1].expand(-1, -1, rng.choice((2**33, 2**45, 2**58)), -1)
    return "requires grad", x.clone().requires_grad_() if x.is_floating_point() else x


class WrongError(Exception):
    """An accepted call with another result than its contiguous copy."""


def same(x: Any, y: Any) -> bool:
    import torch

    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())


def agree(what: str, run: Any, arguments: list[Any]) -> list[Any]:
    """Results of `run` on the arguments, the same bits as on their contiguous copies."""
    import torch

    def plain(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return x.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
        return [plain(y) for y in x] if isinstance(x, list) else x

    def flat(results: Any) -> list[Any]:
        return [y for x in results for y in (x if isinstance(x, (list, tuple)) else [x])]

    results, expected = flat(run(*arguments)), flat(run(*map(plain, arguments)))
    for n, (x, y) in enumerate(zip(results, expected, strict=True)):
        if x.device.type != "meta" and (x.shape != y.shape or not x.is_contiguous() or not same(x, y)):
            raise WrongError(f"{what}: result {n} differs from that of contiguous arguments")
    return results


def run_attention(rng: random.Random, p: dict[str, Any], note: Any) -> None:
    import torch

    ops = torch.ops.kvt
    torch.set_num_threads(rng.choice((1, 2, 3)))
    call = attention_call(rng, p)
    wrong = [broken(rng, call) for _ in range(rng.choice((1, 1, 2)))] if rng.random() < 0.35 else []
    note({"program": p, "wrong": wrong, "call": described(call)})
    forward = [call[x] for x in ("q", "k", "v", "captured", "score", "weight", "topk", "sizes", "dropout_p", "seed")]
    with torch.no_grad():
        out, logsumexp, threshold = agree("attention", lambda *x: ops.attention(*x, "c"), forward)
    saved = {
        "grad_out": strewn(rng, numbers(rng, out.shape, out.dtype)) if out.device.type == "cpu" else out,
        "out": out,
    }
    saved |= {"logsumexp": logsumexp, "threshold": threshold}
    if out.device.type == "cpu":
        for name in ("out", "logsumexp", "threshold"):
            saved[name] = strewn(rng, saved[name], expand=rng.random() < 0.3)
    needs = [rng.random() < 0.7 for _ in range(3)] + [
        c.is_floating_point() and rng.random() < 0.7 for c in call["captured"]
    ]
    call |= saved | {"needs_grad": needs}
    if rng.random() < 0.35:
        wrong.append(broken(rng, call))
    note({"program": p, "wrong": wrong, "call": described(call)})
    backward = [
        call[x] for x in ("grad_out", "q", "k", "v", "captured", "out", "logsumexp", "threshold", "score", "weight")
    ]
    backward += [call[x] for x in ("topk", "sizes", "dropout_p", "seed", "needs_grad")]
    with torch.no_grad():
        agree("attention_backward", lambda *x: ops.attention_backward(*x, "c"), backward)


def run_softmax(rng: random.Random, p: dict[str, Any], note: Any) -> None:
    import torch

    ops = torch.ops.kvt
    dtype, out_dtype = getattr(torch, p["dtype"]), getattr(torch, p["value_dtype"])
    shape = [rng.choice((0, 1, 2, 5, 17, 33)) for _ in range(rng.choice((0, 1, 2, 3, 4)))]
    scores = strewn(rng, numbers(rng, shape, dtype))
    dim = rng.choice((0, -1, rng.randrange(-5, 5)))
    topk = rng.choice((1, 2, 5, 2**63 - 1, 0, -1))
    how = ""
    if rng.random() < 0.2:
        how, scores = spoiled(rng, scores)
    note({"softmax": p, "shape": shape, "dim": dim, "topk": topk, "wrong": how})
    with torch.no_grad():
        (weights,) = agree("topk_softmax", lambda *x: [ops.topk_softmax(*x, "c")], [scores, dim, topk, out_dtype])
    if weights.device.type != "cpu":
        return
    grad, weights = strewn(rng, numbers(rng, weights.shape, out_dtype)), strewn(rng, weights, expand=False)
    if rng.random() < 0.3:
        how, grad = spoiled(rng, grad)
    note({"softmax backward": p, "shape": shape, "dim": dim, "wrong": how})
    with torch.no_grad():
        agree("topk_softmax_backward", lambda *x: [ops.topk_softmax_backward(*x, "c")], [grad, weights, dim, dtype])


def described(call: dict[str, Any]) -> dict[str, Any]:
    import torch

    def one(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            strides = list(x.stride()) if x.layout is torch.strided else str(x.layout)
            return f"{x.dtype} {x.device} {list(x.shape)} {strides}"
        return [one(y) for y in x] if isinstance(x, list) else x if isinstance(x, (str, int, float)) else str(x)

    return {name: one(x) for name, x in call.items()}


# --- processes --------------------------------------------------------------------------------------------------------


def child(seconds: float, seed: int, first: int, programs: int, calls: int, place: Path) -> None:
    """Programs from `first` on; the last line of standard output is what was counted."""
    import warnings

    import kvt_compile.kernels.op.ops  # noqa: F401 - registers the ops
    from kvt_compile.kernels.c import toolchain

    warnings.simplefilter("ignore")
    # ATen in the place of a kernel would be judged instead, and owes nobody the same bits for all strides
    warnings.filterwarnings("error", message="kvt_compile could not build a C kernel")
    toolchain.LIMIT_S = 900.0  # such builds take a minute of a busy machine
    toolchain.FLAGS += ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0", "-w")
    end, counts, reasons = time.monotonic() + seconds, Counter(), Counter()
    for number in range(first, first + programs):
        if time.monotonic() > end:
            break
        p = program(random.Random(f"{seed}/{number}"))
        counts["programs"] += 1
        for n in range(calls):
            if time.monotonic() > end:
                break
            rng = random.Random(f"{seed}/{number}/{n}")
            run = run_softmax if rng.random() < 0.05 else run_attention

            def note(what: dict[str, Any], at: str = f"{seed}/{number}/{n}") -> None:
                place.write_text(json.dumps({"at": at, **what}, default=str))

            try:
                run(rng, p, note)
            except WrongError:
                raise
            except Exception as error:
                if type(error).__name__ not in REFUSALS and not isinstance(error, (ValueError, RuntimeError)):
                    raise
                counts["refused"] += 1
                reasons[str(error).split("\n")[0][:60]] += 1
            else:
                counts["accepted"] += 1
    print(json.dumps({**counts, "reasons": reasons.most_common(25)}), flush=True)


def sanitizers() -> list[str] | None:
    """Paths of the sanitizers' libraries; None where the compiler has none."""
    from kvt_compile.kernels.c.toolchain import find_compiler

    compiler = find_compiler(None, "native").command[0]
    ask = [[compiler, f"-print-file-name={x}"] for x in ("libasan.so", "libubsan.so")]
    found = [subprocess.run(x, capture_output=True, text=True, check=True).stdout.strip() for x in ask]
    return found if all(Path(x).is_absolute() for x in found) else None


def fuzz(
    cache: Path, seed: int = 0, seconds: float = math.inf, programs: int = 2**31, calls: int = CALLS
) -> Counter[str]:
    """Runs children one after the other, a few programs each, until the time or the programs are used up.

    Raises AssertionError with the call in which one ended, and what it said."""
    libraries = sanitizers()
    assert libraries, "this compiler has no sanitizer libraries"
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=3000",
        "OMP_WAIT_POLICY": "passive",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "KVT_CACHE_DIR": str(cache),
        "PYTHONPATH": str(ROOT),
    }
    totals: Counter[str] = Counter()
    end, place = time.monotonic() + seconds, cache / "call.json"
    while (left := end - time.monotonic()) > 0 and totals["programs"] < programs:
        command = [sys.executable, __file__, "--child", "--seed", str(seed), "--first", str(totals["programs"])]
        command += ["--programs", str(min(PROGRAMS, programs - totals["programs"])), "--calls", str(calls)]
        command += ["--seconds", str(left), "--place", str(place)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            what = place.read_text() if place.exists() else "no call"
            raise AssertionError(f"a call ended the process ({done.returncode}): {what}\n{done.stderr[:6000]}")
        counted = json.loads(done.stdout.splitlines()[-1])
        for reason, number in counted.pop("reasons"):
            totals[f"  {reason}"] += number
        totals.update(counted)
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--programs", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--calls", type=int, default=CALLS, help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.seconds, options.seed, options.first, options.programs, options.calls, options.place)
    with tempfile.TemporaryDirectory() as folder:
        totals = fuzz(Path(folder), options.seed, options.seconds)
    print("\n".join(f"{name} {number}" for name, number in totals.most_common()))


if __name__ == "__main__":
    main()
