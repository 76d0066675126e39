"""The operators on DTensors give what one process gives, whatever the placements: results, gradients, kept keys."""

from __future__ import annotations

import importlib
import itertools
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import Case, call, floats
from torch import Tensor

from kvt_compile.parallel.when_imported import when_imported

Run = Callable[..., list[Any]]
D = torch.float64


def _whole(*shape: int, below: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % below


CASES = {
    case.id: case
    for case in (
        Case("plain", heads=4, queries=6, dtype=D),
        Case("ties", heads=4, queries=6, dtype=D, score="floordiv(4.0*s, 4.0)"),
        Case("selected", heads=4, queries=6, keys=6, dtype=D, topk=6, select="window(3) | sinks(1)", grid=(6,)),
        Case("selected by heads", heads=4, queries=6, keys=6, dtype=D, topk=2, select="shifted(2)", grid=(6,)),
        Case("grouped", batch=4, heads=8, kv_heads=4, queries=8, dtype=D),
        Case("grouped, one key head", heads=4, kv_heads=1, queries=6, dtype=D),
        Case("uneven", batch=3, heads=3, queries=7, dtype=D, dropout_p=0.3, score="where(le(j, i), s, -oo)"),
        Case("causal", heads=4, queries=17, dtype=D, score="where(le(j, i), 0.35*s, -oo)"),
        Case("bias", heads=4, queries=6, dtype=D, score="s + c0[h, i, j]", captured=floats("heads", "queries", "keys")),
        Case("bias of keys", heads=4, queries=6, dtype=D, score="s + c0[b, j]", captured=floats("batch", "keys")),
        Case("temperature", heads=4, queries=6, dtype=D, score="s*c0[h]", weight="p*c0[h]", captured=floats("heads")),
        Case("slope of heads", heads=4, queries=6, dtype=D, score="s + 0.01*(h + 1)*(j - i)"),
        Case(
            "read two ways", heads=4, queries=6, dtype=D, score="s + c0[h, i] + c0[i, h]", captured=floats(6, 6)
        ),
        Case(
            "windows", batch=4, heads=4, queries=6, keys=6, dtype=D, score="s + c0[b % n0, i, j]", sizes=(2,),
            captured=floats(2, "queries", "keys"),
        ),
        Case(
            "relative", heads=4, queries=6, keys=6, dtype=D, score="s + c0[c1[i, j], h]",
            captured=lambda case: [torch.randn(9, 4, dtype=D), _whole(6, 6, below=9)],
        ),
        Case("a table longer than its axis", heads=4, queries=6, dtype=D, score="s + c0[i]", captured=floats(20)),
        Case("dropout", batch=4, heads=4, queries=6, dtype=D, dropout_p=0.4, weight="p*2.0"),
        Case("numbers", heads=4, queries=6, dtype=D, score="s*c0", captured=lambda case: [torch.tensor(0.7, dtype=D)]),
    )
}  # fmt: skip


def _placements(kind: str, mesh_dims: int, dim: int) -> Any:
    from torch.distributed.tensor import Partial, Replicate, Shard

    kinds = [Replicate(), *map(Shard, range(dim)), *([Partial()] if kind == "float" else [])]
    return list(itertools.product(kinds, repeat=mesh_dims))


def _lies(x: Tensor, mesh: Any, placements: Sequence[Any]) -> Any:
    """The tensor with such placements; of a partial one each rank has its share."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    for place, ranks in zip(placements, mesh.shape, strict=True):
        if place.is_partial():
            x = x / ranks  # a power of two: exact
    shards = [Replicate() if place.is_partial() else place for place in placements]
    local = distribute_tensor(x, mesh, shards, src_data_rank=None).to_local()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=x.shape, stride=x.stride())


def _leaf(x: Any) -> Any:
    return x.detach().requires_grad_(x.is_floating_point())


def _agrees(case: Case, mesh: Any, placements: Sequence[Sequence[Any]], grad_at: Sequence[Any], lowering: str) -> None:
    leaves = [*case.tensors()[:3], *case.tensors()[3]]
    results = call(case, lowering, leaves)
    grad = case.grad_out(results[0])
    results[0].backward(grad)
    sharded = [_leaf(_lies(x.detach(), mesh, at)) for x, at in zip(leaves, placements, strict=True)]
    found = call(case, lowering, sharded)
    found[0].backward(_lies(grad, mesh, grad_at))
    for name, x, y in zip(("out", "logsumexp", "threshold"), results, found, strict=True):
        torch.testing.assert_close(y.full_tensor(), x, msg=lambda m, name=name: f"{name} at {placements}: {m}")
    for n, (x, y) in enumerate(zip(leaves, sharded, strict=True)):
        assert (x.grad is None) == (y.grad is None)
        if x.grad is not None:
            assert y.grad.shape == x.shape
            torch.testing.assert_close(
                y.grad.full_tensor(), x.grad, msg=lambda m, n=n: f"gradient {n} at {placements}: {m}"
            )


def check_placements(name: str, mesh_shape: tuple[int, ...], count: int, lowering: str = "aten") -> None:
    from torch.distributed.device_mesh import init_device_mesh

    import kvt_compile  # noqa: F401

    case, mesh, rng = CASES[name], init_device_mesh("cpu", mesh_shape), random.Random(name)
    tensors = [*case.tensors()[:3], *case.tensors()[3]]
    for _ in range(count):
        at = [
            rng.choice(_placements("float" if x.is_floating_point() else "whole", len(mesh_shape), x.dim()))
            for x in tensors
        ]
        _agrees(case, mesh, at, rng.choice(_placements("float", len(mesh_shape), 4)), lowering)


@pytest.mark.parametrize("name", CASES)
def test_any_placements_on_two_ranks(run: Run, name: str) -> None:
    run(2, check_placements, name, (2,), 12)


@pytest.mark.parametrize("name", ["grouped", "causal", "relative", "dropout", "uneven"])
def test_any_placements_on_a_mesh_of_two_by_two(run: Run, name: str) -> None:
    run(4, check_placements, name, (2, 2), 8)


@pytest.mark.parametrize("name", ["uneven", "bias"])
def test_the_lowering_of_this_machine(run: Run, name: str) -> None:
    run(2, check_placements, name, (2,), 3, "auto")


def check_softmax(mesh_shape: tuple[int, ...], count: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh, rng = init_device_mesh("cpu", mesh_shape), random.Random(7)
    x = torch.randn(3, 4, 6, 8, dtype=D, requires_grad=True)
    grad = torch.randn_like(x)
    for dim, _ in itertools.product((-1, 1), range(count)):
        x.grad = None
        out = torch.ops.kvt.topk_softmax(x, dim, 3, D, "aten")
        out.backward(grad)
        at, grad_at = (rng.choice(_placements("float", len(mesh_shape), 4)) for _ in range(2))
        lying = _leaf(_lies(x.detach(), mesh, at))
        found = torch.ops.kvt.topk_softmax(lying, dim, 3, D, "aten")
        found.backward(_lies(grad, mesh, grad_at))
        torch.testing.assert_close(found.full_tensor(), out)
        torch.testing.assert_close(lying.grad.full_tensor(), x.grad)


def test_weights_on_any_placements(run: Run) -> None:
    run(2, check_softmax, (2,), 10)


def check_what_moves() -> None:
    """Cut along batch, heads or rows nothing moves; and the result stays cut."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.debug import CommDebugMode

    case, mesh = CASES["bias"], init_device_mesh("cpu", (2,))
    leaves = [*case.tensors()[:3], *case.tensors()[3]]
    R = Replicate()  # noqa: N806 - as everybody writes it
    for q, k, v, bias, out, dk, dbias in (
        (R, R, R, R, R, R, R),
        (Shard(0), Shard(0), Shard(0), R, Shard(0), Shard(0), Partial()),
        (Shard(1), Shard(1), Shard(1), R, Shard(1), Shard(1), Shard(0)),
        (Shard(1), Shard(1), Shard(1), Shard(0), Shard(1), Shard(1), Shard(0)),
        (Shard(2), R, R, Shard(1), Shard(2), Partial(), Shard(1)),
    ):
        lying = [_leaf(_lies(x.detach(), mesh, [at])) for x, at in zip(leaves, (q, k, v, bias), strict=True)]
        with CommDebugMode() as moved:
            found = call(case, "aten", lying)[0]
            found.backward(_lies(case.grad_out(found), mesh, [out]))
        assert moved.get_total_counts() == 0, (q, k, v, bias)
        assert [x.placements for x in (found, lying[0].grad, lying[1].grad, lying[2].grad, lying[3].grad)] == [
            (out,), (out,), (dk,), (dk,), (dbias,),
        ]  # fmt: skip


def test_what_lies_well_does_not_move(run: Run) -> None:
    run(2, check_what_moves)


def check_errors() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.experimental import implicit_replication

    mesh, other = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
    case = CASES["bias of keys"]
    q, k, v, (bias,) = case.tensors()
    lying = [_lies(x.detach(), mesh, [Replicate()]) for x in (q, k, v)]
    with pytest.raises(RuntimeError, match=r"mixed torch.Tensor and DTensor: captured tensor 0 .* shape"):
        call(case, "aten", [*lying, bias])
    with implicit_replication():
        torch.testing.assert_close(
            call(case, "aten", [*lying, bias])[0].full_tensor(), call(case, "aten", [q, k, v, bias])[0]
        )
    with pytest.raises(RuntimeError, match=r"different meshes.*redistribute"):
        call(case, "aten", [*lying, _lies(bias.detach(), other, [Replicate(), Replicate()])])
    with pytest.raises(ValueError, match=r"number of keys Nk differs"):
        call(case, "aten", [*lying[:2], _lies(v.detach()[:, :, 1:], mesh, [Replicate()]), bias])


def test_what_does_not_fit_is_told(run: Run) -> None:
    run(2, check_errors)


def check_drifted_seeds() -> None:
    """Ranks that draw different seeds use the first one's."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    import kvt_compile

    mesh = init_device_mesh("cpu", (2,))
    q = torch.randn(2, 4, 6, 8)
    for at in (Replicate(), Shard(0), Shard(1), Shard(2)):
        torch.manual_seed(dist.get_rank())
        lying = _leaf(_lies(q, mesh, [at]))
        found = kvt_compile.topk_attention(lying, lying, lying, topk=3, dropout_p=0.5)
        found.sum().backward()
        torch.manual_seed(0)
        leaf = _leaf(q.clone())
        expected = kvt_compile.topk_attention(leaf, leaf, leaf, topk=3, dropout_p=0.5)
        expected.sum().backward()
        torch.testing.assert_close(found.full_tensor(), expected)
        torch.testing.assert_close(lying.grad.full_tensor(), leaf.grad)


def test_one_mask_is_drawn_whatever_the_ranks_generators_say(run: Run) -> None:
    run(2, check_drifted_seeds)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q.sin() @ k.transpose(-1, -2) * 0.35
    return (scores + bias.unsqueeze(1).unsqueeze(2)).softmax(-1) @ v


def operator(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    captured, topk = [bias], k.shape[2] // 2
    rest = 0.3, torch.tensor([11]), "aten"
    return torch.ops.kvt.attention(q.sin(), k, v, captured, "s + c0[b, j] + 0.01*i*h", "p", topk, [], *rest)[0]


def check_compiled(dynamic: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, R = init_device_mesh("cpu", (2,)), Replicate()  # noqa: N806 - as everybody writes it
    function = operator if dynamic else attention  # torch's own matmul of DTensors wants sizes it knows
    options = {"topk": 0.4, "lowering": "aten", "then": "aot_eager"}
    compiled, plain = (torch.compile(function, backend="kvt", dynamic=dynamic, options=options) for _ in range(2))
    for tokens in (12, 21) if dynamic else (12,):
        for at in ((R,) * 4, (*(Shard(1),) * 3, R), (Shard(0),) * 4, (Shard(2), R, R, R)):
            leaves = [_leaf(torch.randn(2, 4, tokens, 8)) for _ in range(3)] + [_leaf(torch.randn(2, tokens))]
            lying = [_leaf(_lies(x.detach(), mesh, [p])) for x, p in zip(leaves, at, strict=True)]
            expected, found = plain(*leaves), compiled(*lying)
            assert isinstance(found, DTensor)
            if not dynamic:
                assert not torch.allclose(expected, attention(*leaves))
            expected.square().sum().backward()
            found.square().sum().backward()
            torch.testing.assert_close(found.full_tensor(), expected)
            for x, y in zip(lying, leaves, strict=True):
                torch.testing.assert_close(x.grad.full_tensor(), y.grad)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_model_on_dtensors(run: Run, dynamic: bool) -> None:
    if not dynamic and torch.__version__ < (2, 13):
        pytest.skip(f"Dynamo of torch {torch.__version__} has no fake matmul of DTensors of four dimensions")
    run(2, check_compiled, dynamic)


CODE = """
import sys, torch
{first}
import kvt_compile
known = "torch.distributed.tensor" in sys.modules
assert ("kvt_compile.parallel.rules" in sys.modules) == known
import torch.distributed.tensor
assert "kvt_compile.parallel.rules" in sys.modules
"""


@pytest.mark.parametrize("first", ["", "import torch.distributed.tensor"])
def test_dtensors_have_rules_as_soon_as_somebody_imports_them(first: str) -> None:
    subprocess.run([sys.executable, "-c", CODE.format(first=first)], check=True)


def test_an_action_follows_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    done: list[str] = []
    (tmp_path / "kvt_tested_once.py").write_text("raise RuntimeError('not yet')")
    when_imported("kvt_tested_once", lambda: done.append("acted"))
    with pytest.raises(RuntimeError, match="not yet"):
        importlib.import_module("kvt_tested_once")
    assert not done
    (tmp_path / "kvt_tested_once.py").write_text("VALUE = 'now it can be'")
    importlib.invalidate_caches()
    for _ in range(2):
        assert importlib.import_module("kvt_tested_once").VALUE == "now it can be"
        assert done == ["acted"]
    when_imported("kvt_tested_once", lambda: done.append("at once"))
    assert done == ["acted", "at once"]
    when_imported("kvt_tested_never", done.clear)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("kvt_tested_never")
    assert done
