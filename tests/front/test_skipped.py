"""Where torch drops a compilation in silence, the user hears it once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PRELUDE = """
import warnings
import torch
warnings.simplefilter("always")

class Net(torch.nn.Module):
    def forward(self, q, k, v):
        return (q @ k.mT).softmax(-1) @ v

net = Net()
q, k, v = torch.randn(3, 2, 5, 6, 4).unbind(0)
"""

CALLS = {
    "vmap": "torch.vmap(compiled)(q, k, v)",
    "grad": "torch.func.grad(lambda q: compiled(q, k, v).sum())(q)",
    "vjp": "torch.func.vjp(compiled, q, k, v)",
    "jvp": "torch.func.jvp(lambda q: compiled(q, k, v), (q,), (q,))",
    "after_a_plain_call": "compiled(q, k, v); torch.vmap(compiled)(q, k, v)",
}


def told(source: str, **environment: str) -> list[str]:
    program = f"""{PRELUDE}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
{chr(10).join("    " + line for line in source.splitlines())}
print("\\n".join(str(w.message).splitlines()[0] for w in caught if "dense" in str(w.message)))
"""
    run = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return [line for line in run.stdout.splitlines() if line]


COMPILE = 'compiled = torch.compile(net, backend="kvt", options={"topk": 2})\n'


@pytest.mark.parametrize("call", CALLS)
def test_transforms_of_a_compiled_function(call: str) -> None:
    found = told(f"{COMPILE}{CALLS[call]}\n{CALLS[call]}")
    assert len(found) == 1
    assert "torch.func" in found[0]


@pytest.mark.parametrize("name", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_switched_off(name: str) -> None:
    found = told(f"{COMPILE}compiled(q, k, v)\n{COMPILE}compiled(q, k, v)", **{name: "1"})
    assert len(found) == 1
    assert "switched off" in found[0]


def test_stance() -> None:
    found = told(f'torch.compiler.set_stance("force_eager")\n{COMPILE}compiled(q, k, v)')
    assert len(found) == 1
    assert "force_eager" in found[0]


def test_nothing_is_told_where_nothing_is_dropped() -> None:
    """The neighbours: a plain call, the transform inside, and another backend under a transform."""
    inside = 'torch.compile(lambda q: torch.vmap(net)(q, k, v), backend="kvt", options={"topk": 2})(q)'
    other = 'torch.vmap(torch.compile(lambda x: x.sin(), backend="eager"))(q)'
    assert told(f"{COMPILE}compiled(q, k, v)\n{inside}\n{other}") == []
