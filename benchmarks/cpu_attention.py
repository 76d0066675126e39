# ruff: noqa: B023 - every lambda is called before its loop goes on
"""k-NN attention on a CPU against torch's dense SDPA, eager KVT and its torch.compile: time, memory, build time.

    python benchmarks/cpu_attention.py [--sections forward backward ...] [--threads 1 2] [--quick] [--json PATH]
    KVT_CPU=avx2 python benchmarks/cpu_attention.py ...         the same for another instruction set of this CPU

Every line is a ratio of medians measured in one run, the contestants taking turns, so that a busy machine slows all of
them; one thread is timed by its processor time.  Targets, which depend on the instruction set, stand beside the
results.  The record, benchmarks/results/cpu_<model>_<instruction set>.json, holds the milliseconds too, with CPU, torch
version and date: one file for each, and figures of two are never mixed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from _shared import dtype_name, eager_kvt, medians, sdpa, step
from rich.console import Console
from rich.table import Table
from torch import Tensor

import kvt_compile.kernels.op.ops  # noqa: F401 - registers the ops
from kvt_compile.functional import topk_attention
from kvt_compile.kernels.c import cache, source
from kvt_compile.kernels.c.settings import Settings, from_environment
from kvt_compile.kernels.c.toolchain import NEEDED, cpu_flags
from kvt_compile.kernels.op.spec import KernelSpec

TARGETS = {
    #             float32 k=N/2, N/8, bfloat16, fwd+bwd float32, bfloat16, Swin, eager at 197, 577, 1025
    "amx":        (0.95, 0.75, 1.0, 0.95, 0.9, 0.95, 12, 16, 20),
    "avx512bf16": (0.95, 0.75, 0.6, 0.95, 0.5, 0.95, 12, 16, 20),
    "avx512":     (0.95, 0.75, 0.6, 0.95, 0.5, 0.95, 12, 16, 20),
    "avx2":       (0.95, 0.75, 0.9, 0.95, 0.3, 1.0, 10, 12, 15),
}  # fmt: skip
SIZES = (197, 577, 1025, 4097)
BATCH, HEADS, DIM = 1, 12, 64
SCALE = repr(DIM**-0.5) + "*s"


@dataclass(frozen=True)
class Line:
    """One measured ratio: ours over theirs, smaller is better, except where it says times faster."""

    section: str
    what: str
    threads: int
    ratio: float
    target: str
    met: bool
    ours_ms: float = 0.0
    theirs_ms: float = 0.0


def knn(q: Tensor, k: Tensor, v: Tensor, topk: int) -> Tensor:
    return torch.ops.kvt.attention(q, k, v, [], SCALE, "p", topk, [], 0.0, None, "c")[0]


def inputs(n: int, dtype: torch.dtype, grad: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(BATCH, HEADS, n, DIM).to(dtype).requires_grad_(grad) for _ in range(3)]


def compare(
    section: str, what: str, limit: float, seconds: float, ours: Callable[[], object], theirs: Callable[[], object]
) -> Line:
    mine, other = medians(seconds, ours, theirs)
    ratio = mine / other
    return Line(section, what, torch.get_num_threads(), ratio, f"<= {limit:.2f}", ratio <= limit, mine, other)


def faster(
    section: str, what: str, limit: float, seconds: float, ours: Callable[[], object], theirs: Callable[[], object]
) -> Line:
    mine, other = medians(seconds, ours, theirs)
    return Line(
        section, what, torch.get_num_threads(), other / mine, f">= {limit:.0f} x", other / mine >= limit, mine, other
    )


def forward(quick: bool) -> Iterator[Line]:
    """k-NN against dense SDPA."""
    half, eighth, bfloat16 = targets()[:3]
    for dtype, limit in ((torch.float32, half), (torch.bfloat16, bfloat16)):
        for n in SIZES[: 3 if quick else 4]:
            q, k, v = inputs(n, dtype)
            name = f"{dtype_name(dtype)} N={n} k=N/2 / SDPA"
            yield compare("forward", name, limit, 2, lambda: knn(q, k, v, n // 2), lambda: sdpa(q, k, v))
    for n in SIZES[: 3 if quick else 4]:
        q, k, v = inputs(n, torch.float32)
        yield compare(
            "forward", f"float32 N={n} k=N/8 / SDPA", eighth, 2, lambda: knn(q, k, v, n // 8), lambda: sdpa(q, k, v)
        )


def backward(quick: bool) -> Iterator[Line]:
    """Forward and backward, against dense SDPA."""
    for dtype, limit in zip((torch.float32, torch.bfloat16), targets()[3:5], strict=True):
        for n in (197, 1025):
            q, k, v = leaves = inputs(n, dtype, grad=True)
            grad = torch.randn_like(q)
            ours = step(lambda: knn(q, k, v, n // 2), leaves, grad)
            theirs = step(lambda: sdpa(q, k, v), leaves, grad)
            yield compare("backward", f"{dtype_name(dtype)} N={n} k=N/2 fwd+bwd / SDPA", limit, 3, ours, theirs)


def eager(quick: bool) -> Iterator[Line]:
    """Against the official algorithm in eager mode, and compiled by torch."""
    for n, limit in list(zip(SIZES, targets()[6:], strict=False))[: 2 if quick else 3]:
        q, k, v = inputs(n, torch.float32)
        yield faster("eager", f"float32 N={n} forward, times faster than eager KVT", limit, 2,
                     lambda: knn(q, k, v, n // 2), lambda: eager_kvt(q, k, v, n // 2))  # fmt: skip
        q, k, v = leaves = inputs(n, torch.float32, grad=True)
        grad = torch.randn_like(q)
        yield faster("eager", f"float32 N={n} fwd+bwd, times faster than eager KVT", 8, 2,
                     step(lambda: knn(q, k, v, n // 2), leaves, grad),
                     step(lambda: eager_kvt(q, k, v, n // 2), leaves, grad))  # fmt: skip
    for n in SIZES[: 1 if quick else 3]:
        q, k, v = inputs(n, torch.float32)
        torch.compiler.reset()
        compiled = torch.compile(eager_kvt)
        yield faster("eager", f"float32 N={n} forward, times faster than torch.compile(eager KVT)", 8, 2,
                     lambda: knn(q, k, v, n // 2), lambda: compiled(q, k, v, n // 2))  # fmt: skip


def swin(quick: bool) -> Iterator[Line]:
    """Window attention with relative position bias and shifted-window mask."""
    windows, batch, heads, n, dim = 64, 1, 3, 49, 32
    torch.manual_seed(0)
    q, k, v = (torch.randn(windows * batch, heads, n, dim) for _ in range(3))
    bias = torch.randn(heads, n, n)
    mask = torch.where(torch.rand(windows, n, n) > 0.7, -100.0, 0.0)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attn = (q * dim**-0.5) @ k.transpose(-2, -1) + bias
        attn = attn.view(batch, windows, heads, n, n) + mask.unsqueeze(1).unsqueeze(0)
        return attn.view(-1, heads, n, n).softmax(-1) @ v

    def ours() -> Tensor:
        score = f"{dim**-0.5!r}*s + c0[h, i, j] + c1[b % {windows}, i, j]"
        return torch.ops.kvt.attention(q, k, v, [bias, mask], score, "p", 25, [], 0.0, None, "c")[0]

    yield compare("swin", "N=49 k=25 bias and mask / dense eager", targets()[5], 2, ours, lambda: dense(q, k, v))
    torch.compiler.reset()
    compiled = torch.compile(dense)
    yield compare("swin", "N=49 k=25 bias and mask / dense Inductor", targets()[5], 2, ours, lambda: compiled(q, k, v))


MEMORY = """
import sys, torch, kvt_compile.kernels.ops
sys.path.insert(0, sys.argv[4])
from cpu_attention import inputs, knn, sdpa
from pathlib import Path
which, n, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
run = {"ours": lambda q, k, v: knn(q, k, v, q.shape[2] // 2), "sdpa": sdpa}[which]
run(*inputs(64, torch.float32))
q, k, v = inputs(n, torch.float32)
def field(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(name))

Path("/proc/self/clear_refs").write_text("5")
before = field("VmRSS")
run(q, k, v)
print(field("VmHWM") - before)
"""


def memory(quick: bool) -> Iterator[Line]:
    """Peak memory of one forward beyond its inputs, each in a fresh process (kB from /proc, shown as ms columns)."""
    for n in (1025,) if quick else (4097, 16385):
        peaks = {}
        for which in ("ours", "sdpa"):
            command = [
                sys.executable,
                "-c",
                MEMORY,
                which,
                str(n),
                str(torch.get_num_threads()),
                str(Path(__file__).parent),
            ]
            peaks[which] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        ratio = peaks["ours"] / peaks["sdpa"]
        yield Line("memory", f"float32 N={n} peak extra memory (kB) / SDPA", torch.get_num_threads(), ratio, "<= 1.20",
                   ratio <= 1.2, peaks["ours"], peaks["sdpa"])  # fmt: skip


def build(quick: bool) -> Iterator[Line]:
    """Processor time to generate and build a kernel, forward and backward."""
    import tempfile

    best = 1e9
    for _ in range(3):
        source.cache_clear()
        with tempfile.TemporaryDirectory() as folder:
            before, start = os.times(), time.process_time()
            cache.load(source(KernelSpec("float32", "float32", DIM, DIM, score=SCALE)), Settings(Path(folder)))
            after = os.times()
        children = after.children_user + after.children_system - before.children_user - before.children_system
        best = min(best, time.process_time() - start + children)
    yield Line("build", "seconds to generate and build one kernel", 1, best, "<= 1.00", best <= 1.0, 1e3 * best, 0.0)


def model(quick: bool) -> Iterator[Line]:
    """DeiT-S, batch 8: backend="kvt" against dense backend="inductor"."""
    yield from deit("model", "", nullcontext)


def model_bfloat16(quick: bool) -> Iterator[Line]:
    """The same under autocast."""
    yield from deit("model_bfloat16", " bfloat16 autocast", lambda: torch.autocast("cpu", torch.bfloat16))


def deit(section: str, name: str, around: Callable[[], AbstractContextManager[object]]) -> Iterator[Line]:
    sys.path.append(str(Path(__file__).parents[1] / "examples"))
    import torchvision_cpu  # noqa: F401 - lets timm import beside a CPU-only torch

    import timm  # isort: skip

    images = torch.randn(8, 3, 224, 224)
    nets = {}
    for backend in ("kvt", "inductor"):
        torch.manual_seed(0)
        nets[backend] = torch.compile(timm.create_model("deit_small_patch16_224").eval(), backend=backend)

    def infer(backend: str) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad(), around():
                return nets[backend](images)

        return run

    def train(backend: str) -> Callable[[], object]:
        def run() -> None:
            with around():
                loss = nets[backend](images).square().mean()
            loss.backward()

        return run

    for what, run in (("inference", infer), ("training step", train)):
        yield compare(section, f"DeiT-S batch 8{name} {what} / Inductor dense", 1.0, 5, run("kvt"), run("inductor"))


def small(quick: bool) -> Iterator[Line]:
    """A call on eight tokens: what stands around the kernel.  Microseconds above SDPA's, in the column of ratios."""
    q, k, v = inputs(8, torch.float32)
    calls = {"the operator": lambda: knn(q, k, v, 4), "topk_attention": lambda: topk_attention(q, k, v, topk=4)}
    for name, ours in calls.items():
        mine, other = medians(2, ours, lambda: sdpa(q, k, v))
        above = 1e3 * (mine - other)
        yield Line("small", f"8 tokens, {name}: microseconds above SDPA", torch.get_num_threads(), above, "<= 15",
                   above <= 15, mine, other)  # fmt: skip


SECTIONS = {x.__name__: x for x in (forward, backward, eager, swin, small, memory, build, model, model_bfloat16)}


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {x.partition(":")[0].strip(): x.partition(":")[2].strip() for x in lines}
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    # clouds sell many models under one name: family and model tell them apart
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"


def instruction_set() -> str:
    """The one kernels are built for: forced by KVT_CPU, else the best of this CPU."""
    target = from_environment().target
    return best() if target == "native" else target


def best() -> str:
    """The best instruction set that this CPU says it has; a host may hide some from its guests."""
    return next((x for x, needed in NEEDED.items() if cpu_flags().issuperset(needed)), "portable")


def conditions() -> str:
    """The instruction set, and of which one it is a part that was forced."""
    return instruction_set() if instruction_set() == best() else f"{instruction_set()} of {best()}"


def targets() -> tuple[float, ...]:
    return TARGETS.get(instruction_set(), TARGETS["avx2"])


def cpu_name() -> str:
    return f"{cpu_model()}, {os.cpu_count()} cores, {conditions()}"


def record() -> Path:
    """Where the figures of this CPU model and instruction set are kept."""
    model = re.sub(r"[^a-z0-9]+", "_", re.sub(r"\((R|TM)\)|CPU|Processor", "", cpu_model()).lower()).strip("_")
    return Path(__file__).parent / "results" / f"cpu_{model}_{conditions().replace(' ', '_')}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    parser.add_argument("--json", type=Path, default=record(), help="the record to write or update (%(default)s)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    lines: list[Line] = []
    console = Console(width=120)
    for name in arguments.sections:
        for threads in arguments.threads if name != "build" else [1]:
            torch.set_num_threads(threads)
            for line in SECTIONS[name](arguments.quick):
                lines.append(line)
                console.print(f"{line.what}, {threads} threads: {line.ratio:.2f} ({line.target})", style="dim")
    table = Table(title=f"{cpu_name()}, torch {torch.__version__}, {date.today()}")
    for column in ("section", "what", "threads", "result", "target", "met", "ours ms", "theirs ms"):
        table.add_column(column)
    for x in lines:
        table.add_row(x.section, x.what, str(x.threads), f"{x.ratio:.2f}", x.target, "yes" if x.met else "NO",
                      f"{x.ours_ms:.2f}", f"{x.theirs_ms:.2f}")  # fmt: skip
    console.print(table)
    write(arguments.json, lines, arguments.threads)


def write(path: Path, lines: list[Line], threads: list[int]) -> None:
    """Lines measured now replace those of the same section and threads; the others stay."""
    old = json.loads(path.read_text())["lines"] if path.exists() else []
    now = {(x.section, x.threads) for x in lines}
    kept = [x for x in old if (x["section"], x["threads"]) not in now]
    load = os.getloadavg()[0]
    new = [asdict(x) | {"date": str(date.today()), "load": round(load, 1)} for x in lines]
    result = {"cpu": cpu_name(), "torch": torch.__version__, "lines": kept + new}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
