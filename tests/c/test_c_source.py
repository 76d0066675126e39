"""The generated C itself: readable and deterministic text, no undefined behaviour, no access outside its tensors."""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles import Case, call
from places import HELPERS

from kvt_compile.kernels.c import source
from kvt_compile.kernels.c.generate import block_size
from kvt_compile.kernels.c.settings import from_environment
from kvt_compile.kernels.c.toolchain import FLAGS, find_compiler
from kvt_compile.kernels.op.spec import CapturedSpec, KernelSpec, SoftmaxSpec

FULL = KernelSpec(
    "bfloat16", "float16", 24, 40, score="where(c0[b % n0, i, j], 3.0*tanh(s*c1[h]) + c2[h, i, j], -oo)",
    weight="p*c1[h]", sizes=1, dropout=True,
    captured=(CapturedSpec("bool", 3), CapturedSpec("float32", 1), CapturedSpec("float64", 3)),
)  # fmt: skip
SPECS = {"plain": KernelSpec("float32", "float32", 64, 64, score="0.125*s"), "full": FULL,
         "double": KernelSpec("float64", "float64", 8, 8), "rows": SoftmaxSpec("float16", "float32")}  # fmt: skip


def test_the_text_depends_on_the_spec_alone() -> None:
    first = source(FULL)
    source.cache_clear()
    assert source(FULL) == first
    program = (
        "from kvt_compile.kernels.c import source\n"
        "from kvt_compile.kernels.op.spec import CapturedSpec, KernelSpec\n"
        f"print(source({FULL!r}), end='')"
    )
    other_order = os.environ | {"PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", program], env=other_order, capture_output=True, text=True, check=True)
    assert other.stdout == first


@pytest.mark.parametrize("name", SPECS)
def test_the_text_is_tidy(name: str) -> None:
    text = source(SPECS[name])
    lines = text.splitlines()
    assert all(line == line.rstrip() and "\t" not in line for line in lines)
    assert not any(x == y == "" for x, y in itertools.pairwise(lines))
    assert not any(mark in text for mark in ("{{", "{%", "{#"))


def test_the_text_says_what_it_computes() -> None:
    text = source(FULL)
    assert "t = where(c0[b % n0, i, j], 3.0*tanh(s*c1[h]) + c2[h, i, j], -oo)" in text
    assert "#define HEAD_DIM 24" in text
    assert "dropout_factors" in text
    assert "dropout_factors" not in source(SPECS["plain"])
    assert "vtanh" not in source(SPECS["plain"])


DERIVED = [
    "where(lt(i, 2), 2.0*s, s)",
    "2.0*s*c0[j] + s",
    "s*(c0[j] - 2.0*c0[i])",
    "where(lt(i, 2), s, -s*3.0) - 1.0",
]


@pytest.mark.parametrize("score", [*DERIVED, "abs(c0[i]) + clamp(c0[j], -1.0, 1.0)*s", "maximum(s, relu(c0[i]))"])
def test_every_function_that_is_called_is_there(score: str, tmp_path: Path) -> None:
    """A score that is linear in s is computed from a factor and a summand, which are texts of their own."""
    captured = (CapturedSpec("float64", 1),) if "c0" in score else ()
    for dtype in ("float32", "float64"):
        text = source(KernelSpec(dtype, dtype, 4, 4, score=score, captured=captured))
        compile_text(text, tmp_path, "-Werror=implicit-function-declaration", "-Wl,-z,defs")


@pytest.mark.parametrize(("dim", "keys"), [(1, 192), (64, 96), (256, 24), (1000, 24)])
def test_a_block_of_keys_fits_in_the_first_level_cache(dim: int, keys: int) -> None:
    assert block_size(KernelSpec("float32", "float32", dim, 1)) == keys


@pytest.mark.parametrize("name", SPECS)
def test_it_compiles_without_a_warning(name: str, tmp_path: Path) -> None:
    compile_text(source(SPECS[name]), tmp_path, "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter",
                 "-Wno-unused-variable", "-Wno-unused-function", "-fopenmp", "-O1")  # fmt: skip


def compile_text(text: str, folder: Path, *flags: str, command: str | None = None) -> Path:
    path = folder / "kernel.c"
    path.write_text(text)
    settings = from_environment()
    compiler = [command] if command else list(find_compiler(settings.compiler, settings.target).command)
    compiler += [*FLAGS, *flags, str(path), "-o", str(folder / "kernel.so"), "-lm"]
    done = subprocess.run(compiler, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "kernel.so"


@pytest.mark.parametrize("compiler", ["aarch64-linux-gnu-gcc", "clang", "gcc"])
@pytest.mark.parametrize("name", ["full", "rows"])
def test_other_compilers_and_processors_take_the_same_source(compiler: str, name: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    flags = ("-march=skylake-avx512",) if compiler == "gcc" else ()
    compile_text(source(SPECS[name]), tmp_path, *flags, command=compiler)


SANITIZED = """
import torch
from oracles import Case, call
from kvt_compile.kernels.c import toolchain
toolchain.FLAGS += ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
for case in CASES:
    tensors = case.tensors()
    out, *_ = call(case, "c", (*tensors[:3], *tensors[3]))
    wanted = [x for x in (*tensors[:3], *tensors[3]) if x.requires_grad]
    torch.autograd.grad(out, wanted, torch.ones_like(out), allow_unused=True)
for n in (1, 31, 200):
    torch.ops.kvt.topk_softmax(torch.randn(7, n), 1, max(1, n // 2), torch.float32, "c")
print("clean")
"""
SANITIZED_CASES = """[
    Case("plain", queries=37, keys=203, topk=90, value_dim=64),
    Case("ragged", queries=3, keys=5, head_dim=13, value_dim=19, topk=2, dtype=torch.bfloat16),
    Case("everything", queries=33, keys=35, head_dim=8, value_dim=8, dropout_p=0.2, heads=4, kv_heads=2, batch=3,
         score="where(c0[b % 2, i + j - 3, j], s*c1[h], -oo) + c2[c3[i, j], h]", weight="p*c1[h]",
         captured=lambda case: [torch.rand(2, 30, 35) > 0.3, torch.rand(4), torch.randn(9, 4),
                                torch.randint(-3, 12, (33, 35))]),
    Case("integers", queries=20, keys=40, score="s", topk=7, dtype=torch.float64),
]"""


def test_address_and_undefined_behaviour_sanitizers_find_nothing(tmp_path: Path) -> None:
    compiler = find_compiler(None, "native").command[0]
    ask = [[compiler, f"-print-file-name={x}"] for x in ("libasan.so", "libubsan.so")]
    found = [subprocess.run(x, capture_output=True, text=True, check=True).stdout.strip() for x in ask]
    if not all(Path(x).is_absolute() for x in found):
        pytest.skip("this compiler has no sanitizer libraries")
    environment = os.environ | {
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "KVT_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(HELPERS),
        "OMP_NUM_THREADS": "2",
    }
    program = SANITIZED.replace("CASES", SANITIZED_CASES)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "clean", done.stderr[-3000:]


class GuardedPages:
    """Memory whose last byte is followed by a page that may not be touched."""

    def __init__(self, size: int) -> None:
        page = mmap.PAGESIZE
        self.length = math.ceil(size / page) * page
        self.map = mmap.mmap(-1, self.length + page)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(self.address + self.length), page, 0) == 0

    def tensor(self, x: torch.Tensor) -> torch.Tensor:
        """A copy of a contiguous tensor that ends where the forbidden page begins."""
        size = x.numel() * x.element_size()
        view = torch.frombuffer(self.map, dtype=x.dtype, count=x.numel(), offset=self.length - size).view(x.shape)
        return view.copy_(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_read_past_the_end(dtype: torch.dtype) -> None:
    # 203 keys: ragged blocks; 16 values: rows read where they lie, 19: packed; a read past the end kills the process
    for value_dim in (16, 19):
        case = Case("guarded", queries=19, keys=203, head_dim=8, value_dim=value_dim, dtype=dtype, topk=50,
                    score="s + c0[j]", captured=lambda case: [torch.randn(203)])  # fmt: skip
        plain = [x.detach() for x in (*case.tensors()[:3], *case.tensors()[3])]
        pages = [GuardedPages(x.numel() * x.element_size()) for x in plain]
        guarded = [page.tensor(x).requires_grad_() for page, x in zip(pages, plain, strict=True)]
        out = call(case, "c", guarded)[0]
        assert torch.equal(out, call(case, "c", plain)[0])
        grad = GuardedPages(out.numel() * out.element_size()).tensor(torch.ones_like(out))
        assert all(g.isfinite().all() for g in torch.autograd.grad(out, guarded, grad))
