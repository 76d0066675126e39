"""`given(function)` in a whole model: by torch.compile, `rewrite` and `set_select`, against `kvt_compile.attention` in
the place of the model's own attention."""

from __future__ import annotations

import copy
import functools
import pickle
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from vision import Transformer

import kvt_compile
from kvt_compile import select


def images(number: int) -> Tensor:
    """Of 36 tokens: one before a grid of 5 x 7."""
    return torch.randn(number, 3, 20, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(number))


IMAGE, OTHERS = images(2), [images(1), images(3)]


class Vit(Transformer):
    """What symbolic_trace takes too, with a batch of any size."""

    on = False

    def forward(self, image):  # type: ignore[no-untyped-def] - fx cannot pickle a type that is a text
        x = self.patch(image).flatten(2).transpose(1, 2) + self.place
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = x + self.attend(block, x)
            x = x + self.mlp(x)
        return x

    def attend(self, block: nn.Module, x: Tensor) -> Tensor:
        return block(x)


class Checkpointed(Vit):
    """Checkpoints its blocks where it is on."""

    on = True

    def attend(self, block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False) if self.on else block(x)


def vit(kind: type[Vit] = Vit) -> Vit:
    torch.manual_seed(0)
    return kind().double()


class Predictor(nn.Module):
    """Scores of rank 2."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.of_q, self.of_k = (nn.Linear(8, 2, bias=False).double() for _ in range(2))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return self.of_q(q) @ self.of_k(k).mT


class Regions(nn.Module):
    """Which of 3 x 4 regions see each other, by their means; each sees itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("itself", torch.eye(12, dtype=torch.bool))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        grids = (x[:, :, 1:].transpose(2, 3).unflatten(3, (5, 7)).flatten(0, 1) for x in (q, k))
        q, k = (F.adaptive_avg_pool2d(x, (3, 4)) for x in grids)
        near = (q.flatten(2).mT @ k.flatten(2)).unflatten(0, (-1, 2)) > 0
        return near | self.itself


def near(q: Tensor, k: Tensor) -> Tensor:
    """A map of all keys, without state, the same for every head and batch."""
    i = torch.arange(q.shape[2], device=q.device)
    return (i[:, None] - i).abs() < 5


FIRST, SECOND = Predictor(1), Predictor(2)
SELECTIONS: dict[str, select.Selector] = {
    "scores": select.given(FIRST) & select.topk(5),
    "scores within a window": (select.window(3) | select.prefix())
    & select.given(FIRST)
    & select.topk(0.1, ties="lowest"),
    "a map": select.given(near),
    "a map, ranked": select.given(near) & select.topk(3),
    "a map of a function that reads a module": select.given(lambda q, k: FIRST(q, k) > 0) | select.sinks(1),
    "a map of a method": select.given(FIRST.forward) & select.topk(4),
    "a map of a partial": select.given(functools.partial(lambda p, q, k: p(q, k), SECOND)) & select.topk(4),
    "regions": select.given(Regions(), size=2) | select.prefix(),
    "two functions": (select.given(FIRST) & select.given(near)) & select.topk(6),
}
ONE = SELECTIONS["scores"]


def expected(model: nn.Module, image: Tensor, *chosen: Any) -> Tensor:
    """The model with the op in each attention, in the order they run."""
    dense, left = F.scaled_dot_product_attention, list(chosen) * (2 if len(chosen) == 1 else 1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        one = left.pop(0)
        return dense(q, k, v) if one is None else kvt_compile.attention(q, k, v, select=one, grid=(5, 7), prefix=1)

    try:
        F.scaled_dot_product_attention = attend  # type: ignore[assignment]
        return model(image)
    finally:
        F.scaled_dot_product_attention = dense


def same(mine: Tensor, theirs: Tensor, model: nn.Module) -> None:
    """Equal, and in their gradients."""
    torch.testing.assert_close(mine, theirs)
    weight, parameters = torch.randn_like(mine), list(model.parameters())
    found, wanted = (torch.autograd.grad(x, parameters, weight) for x in (mine, theirs))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def by_compile(model: nn.Module, chosen: Any, **options: Any) -> Any:
    return torch.compile(model, backend="kvt", options={"select": chosen, "then": "aot_eager", **options})


def by_inductor(model: nn.Module, chosen: Any) -> Any:
    return torch.compile(model, backend="kvt", options={"select": chosen})


def by_rewrite(model: nn.Module, chosen: Any) -> Any:
    return kvt_compile.rewrite(model, IMAGE, select=chosen).module


def by_set_select(model: nn.Module, chosen: Any) -> Any:
    module = kvt_compile.rewrite(model, IMAGE, select="window(3) | prefix").module
    kvt_compile.set_select(module, chosen)
    return module


def in_the_passes_of_inductor(model: nn.Module, chosen: Any) -> Any:
    return torch.compile(model, options={"pre_grad_custom_pass": kvt_compile.inductor_pass(select=chosen)})


WAYS = [by_compile, by_rewrite, by_set_select]
Way = Callable[[nn.Module, Any], Any]


@pytest.mark.parametrize("chosen", SELECTIONS.values(), ids=list(SELECTIONS))
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_it_is_what_the_op_does_with_it(way: Way, chosen: select.Selector) -> None:
    model = vit()
    before = [x.clone() for x in (*FIRST.parameters(), *SECOND.parameters())]
    mine = way(model, chosen)
    for image in (IMAGE, *OTHERS):
        same(mine(image), expected(model, image, chosen), model)
    mine(IMAGE).sum().backward()
    for old, now in zip(before, (*FIRST.parameters(), *SECOND.parameters()), strict=True):
        assert now.grad is None
        assert torch.equal(old, now)


class Near(nn.Module):
    """Its width is in no text or number that a cache could go by."""

    width = 3

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        return (i[:, None] - i).abs() < self.width


@pytest.mark.parametrize("way", [by_inductor, in_the_passes_of_inductor], ids=lambda way: way.__name__)
@torch.no_grad()
def test_no_cache_takes_one_function_for_another(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process, and in what is on disk."""
    model, results = vit(), []
    for width in (3, 9, 3):
        monkeypatch.setattr(Near, "width", width)
        torch._dynamo.reset()  # what is on disk stays
        chosen = select.given(Near())
        results.append(way(model, chosen)(IMAGE))
        torch.testing.assert_close(results[-1], expected(model, IMAGE, chosen))
    assert torch.equal(results[0], results[2])
    assert not torch.allclose(results[0], results[1])


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_what_keeps_every_key_is_dense(way: Way) -> None:
    model = vit()
    for chosen in (select.given(lambda q, k: q.new_ones(1, dtype=torch.bool)), select.given(FIRST) & select.topk(1.0)):
        same(way(model, chosen)(IMAGE), model(IMAGE), model)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_each_site_has_its_own_by_its_path(way: Way) -> None:
    model, other = vit(), select.given(SECOND) & select.topk(7)
    mine = way(model, {"blocks.0": ONE, "blocks.1": other})
    same(mine(IMAGE), expected(model, IMAGE, ONE, other), model)


def test_a_callable_of_the_site_and_none() -> None:
    model = vit()

    def chosen(site: Any) -> Any:
        return ONE if site.where.module == "blocks.1" else None

    for mine in (by_compile(model, chosen), by_rewrite(model, chosen)):
        same(mine(IMAGE), expected(model, IMAGE, None, ONE), model)


def test_blocks_that_are_compiled_one_by_one_have_each_its_own() -> None:
    """One code serves them all."""
    model, other = vit(), select.given(SECOND) & select.topk(7)
    for block in model.blocks:
        block.compile(backend="kvt", options={"select": {"blocks.0": ONE, "blocks.1": other}, "then": "aot_eager"})
    torch.testing.assert_close(model(IMAGE), expected_of(model, ONE, other))


def expected_of(compiled: Vit, *chosen: Any) -> Tensor:
    model = vit()
    model.load_state_dict(compiled.state_dict())
    return expected(model, IMAGE, *chosen)


def test_a_model_that_is_checkpointed() -> None:
    model, other = vit(Checkpointed), select.given(lambda q, k: SECOND(q, k) > 0) | select.sinks(1)
    mine = by_compile(model, {"blocks.0": ONE, "blocks.1": other})(IMAGE)
    model.on = False
    same(mine, expected(model, IMAGE, ONE, other), model)


def test_a_size_of_the_batch_that_is_a_symbol() -> None:
    model, graphs = vit(), []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    for name in ("scores", "regions"):
        graphs.clear()
        options = {"select": SELECTIONS[name], "then": count, "grid": (5, 7), "prefix": 1}
        mine = torch.compile(model, backend="kvt", dynamic=True, options=options)
        for image in (IMAGE, images(5), images(3)):
            same(mine(image), expected(model, image, SELECTIONS[name]), model)
        assert len(graphs) == 1


def test_what_a_predictor_learns_and_another_mode_are_seen() -> None:
    """Its parameters are inputs of the graph; its mode and which parameters it has are guarded."""

    class Droppy(Predictor):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return super().forward(q, k) * (1.0 if self.training else -1.0)

    model, predictor = vit(), Droppy()
    chosen = select.given(predictor) & select.topk(5)
    mine, rewritten = by_compile(model, chosen), by_rewrite(model, chosen)

    def check() -> None:
        wanted = expected(model, IMAGE, chosen)
        torch.testing.assert_close(mine(IMAGE), wanted)
        torch.testing.assert_close(rewritten(IMAGE), wanted)

    check()
    with torch.no_grad():
        predictor.of_q.weight.mul_(torch.tensor([[1.0], [-3.0]]))
    check()
    predictor.eval()
    check()
    predictor.of_k.weight = nn.Parameter(torch.randn(2, 8, dtype=torch.float64))
    check()


class Sharing(nn.Module):
    """Predictors that others have as well, twice."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.first, self.again, self.own = shared, shared, Predictor(5)
        self.own.of_q.weight = self.own.of_k.weight

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return self.first(q, k) + self.again(k, q).mT + self.own(q, k)


@pytest.mark.parametrize("way", [*WAYS, by_inductor], ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", [Vit, Checkpointed])
def test_functions_that_share_modules_and_parameters(kind: type[Vit], way: Way) -> None:
    one, other = Sharing(FIRST), Sharing(FIRST)
    parameters = [x for module in (one, other) for x in module.parameters()]
    for a, b in (
        (select.given(one), select.given(other)),
        (select.given(FIRST), select.given(lambda q, k: FIRST(q, k))),
    ):
        a, b = a & select.topk(3), b & select.topk(7)
        model = vit(kind)
        model.on = way in (by_compile, by_inductor)
        mine = way(model, {"blocks.0": a, "blocks.1": b})(IMAGE)
        model.on = False
        same(mine, expected(model, IMAGE, a, b), model)
    now = [x for module in (one, other) for x in module.parameters()]
    assert all(x is y for x, y in zip(parameters, now, strict=True))


def test_its_state_is_that_of_the_module_once() -> None:
    model, other = vit(), select.given(FIRST) & select.topk(7)  # the same function twice
    module = by_rewrite(model, {"blocks.0": ONE, "blocks.1": other})
    mine = set(module.state_dict()) - set(model.state_dict())
    assert mine == {"kvt_given_0.of_q.weight", "kvt_given_0.of_k.weight"}
    assert module.kvt_given_0 is FIRST
    fresh = kvt_compile.rewrite(vit(), IMAGE, select=select.given(Predictor(9)) & select.topk(5)).module
    fresh.load_state_dict(by_rewrite(model, ONE).state_dict())
    torch.testing.assert_close(fresh(IMAGE), expected(model, IMAGE, ONE))


def test_a_predictor_that_is_a_part_of_the_model_stays_where_it_is() -> None:
    model = vit()
    model.predictor = Predictor(4)
    module = by_rewrite(model, select.given(model.predictor) & select.topk(5))
    assert set(module.state_dict()) == set(model.state_dict())
    same(by_compile(model, ONE)(IMAGE), expected(model, IMAGE, ONE), vit_part(model))


def vit_part(model: nn.Module) -> nn.Module:
    return nn.ModuleList([model.blocks, model.mlp])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_has_a_predictor_of_its_own(copied: Callable[[Any], Any]) -> None:
    for chosen in (ONE, SELECTIONS["regions"], select.given(FIRST.forward) & select.topk(5), select.given(near)):
        module = by_rewrite(vit(), chosen)
        again = copied(module)
        torch.testing.assert_close(again(IMAGE), module(IMAGE))
        assert not {id(x) for x in again.parameters()} & {id(x) for x in module.parameters()}
    module = by_rewrite(vit(), SELECTIONS["a map of a function that reads a module"])
    with pytest.raises((TypeError, AttributeError), match="of the code around it"):
        copied(module)


def test_what_was_rewritten_is_compiled_and_exported() -> None:
    model = vit()
    for name in ("scores", "regions", "a map of a function that reads a module"):
        module = by_rewrite(model, SELECTIONS[name])
        wanted = expected(model, IMAGE, SELECTIONS[name])
        torch.testing.assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(IMAGE), wanted)
        program = torch.export.export(module, (IMAGE,))
        torch.testing.assert_close(program.module()(IMAGE), wanted)


def test_a_program_of_torch_export_becomes_a_module_and_no_program() -> None:
    for model in (Transformer().double(), torch.export.export(Transformer().double(), (IMAGE,))):
        result = kvt_compile.rewrite(model, IMAGE, select=ONE)
        assert result.report.counts["fused"] == 2
        assert result.program is None
        original = model if isinstance(model, nn.Module) else model.module()
        assert set(result.module.state_dict()) == {
            *original.state_dict(),
            *(f"kvt_given_0.of_{x}.weight" for x in "qk"),
        }
        assert not torch.allclose(result.module(IMAGE), original(IMAGE))


def test_keys_and_values_that_heads_share() -> None:
    class Grouped(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(x.shape[0], 4, 36, 8) for x in (k, v))
            return (q * 0.5 @ k.mT).softmax(-1) @ v

    q, k, v = (torch.randn(2, heads, 36, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))

    def shared(q: Tensor, k: Tensor) -> Tensor:
        assert (q.shape[1], k.shape[1]) == (4, 2)
        return FIRST(q, k.repeat_interleave(2, 1))

    chosen = select.given(shared) & select.topk(4)
    theirs = kvt_compile.attention(q, k, v, select=chosen, enable_gqa=True, scale=0.5)
    for mine in (kvt_compile.rewrite(Grouped(), q, k, v, select=chosen).module, by_compile(Grouped(), chosen)):
        torch.testing.assert_close(mine(q, k, v), theirs)
        for one, other in zip(
            torch.autograd.grad(mine(q, k, v).sum(), (q, k, v)),
            torch.autograd.grad(theirs.sum(), (q, k, v), retain_graph=True), strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(one, other)


def test_autocast_lowers_what_the_function_gets() -> None:
    model, predictor = vit().float(), Predictor(1).float()
    chosen = select.given(predictor) & select.topk(5)
    with torch.autocast("cpu", torch.bfloat16):
        mine, wanted = by_compile(model, chosen)(IMAGE.float()), expected(model, IMAGE.float(), chosen)
        assert [x.outcome for x in kvt_compile.explain(model, IMAGE.float(), select=chosen).sites] == ["fused"] * 2
    torch.testing.assert_close(mine, wanted)


def test_a_report_says_what_is_kept_and_shows_the_calls() -> None:
    rewritten = kvt_compile.rewrite(vit(), IMAGE, select=ONE).report
    for report in (kvt_compile.explain(vit(), IMAGE, select=ONE), rewritten):
        assert [(x.outcome, x.select, x.kept, x.reason) for x in report.sites] == [
            ("fused", "given(Predictor) & topk(5)", None, "")
        ] * 2
        assert "keeps given(Predictor) & topk(5)" in str(report)
        after = [x.target for x in report.graphs[0].after]
        assert (after.count("Predictor"), after.count("ConditionTensors")) == (2, 2)
        assert "where(c0[b, h, i, j], " in str(report.sites[0].spec)
    placed = kvt_compile.explain(vit(), IMAGE, select=SELECTIONS["regions"]).sites[0]
    assert placed.selection == "given(Regions, size=2) | prefix on 5x7 + 1"


TABLE = torch.ones(36, 36, dtype=torch.bool)


def writes(q: Tensor, k: Tensor) -> Tensor:
    return q.mul_(2.0) @ k.mT


def decides_by_numbers(q: Tensor, k: Tensor) -> Tensor:
    scores = q @ k.mT
    return scores if scores.sum() > 0 else -scores


def hidden(predictors: Sequence[nn.Module]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda q, k: predictors[0](q, k)


class Counting(Predictor):
    calls, seen = 0, None

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        self.calls, self.seen = self.calls + 1, q
        return super().forward(q, k)


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        (select.given(Counting()) & select.topk(4), "changes '(calls|seen)' of its module"),
        (select.given(lambda q, k: TABLE), "no parameter or buffer of a module that it holds"),
        (select.given(lambda q, k: TABLE & True), "no parameter or buffer of a module that it holds"),
        (select.given(hidden([FIRST])) & select.topk(4), "no parameter or buffer of a module that it holds"),
        (select.given(decides_by_numbers) & select.topk(4), "no if, item.. or numpy.. may ask for their numbers"),
        (select.given(lambda q, k: torch.from_numpy(q.numpy())), "without numbers in its tensors"),
        (select.given(lambda q: q), "takes q .B, H, N, D. and k"),
        (select.given(writes) & select.topk(4), "writes to q or k"),
        (select.given(lambda q, k: q @ k.mT), "write given"),
        (select.given(lambda q, k: q.new_ones(3, 3, dtype=torch.bool)), "does not broadcast to"),
        (select.given(lambda q, k: q.new_ones(1, dtype=torch.int64)), "expected a bool map"),
        (select.given(lambda q, k: None), "returned NoneType"),
        (select.given(lambda q, k: q.new_ones(1, dtype=torch.bool, device="meta")), "on meta, expected one on cpu"),
        (select.given(near) | select.window(3) | select.prefix(), "let the function keep those keys too"),
        (select.given(near) & select.window(3), "keeps no key for the 1 tokens before the grid"),
        (select.given(near, size=2), "keeps no key for the 1 tokens before the grid"),
        (select.given(near, size=2) | select.prefix(), r"shape .36, 36., which does not broadcast to"),
        (select.given(nn.Linear(8, 8)), "takes q .B, H, N, D. and k"),
    ],
)
def test_where_it_cannot_be_the_site_stays_dense(chosen: select.Selector, reason: str) -> None:
    model = vit()
    for report in (
        kvt_compile.explain(model, IMAGE, select=chosen),
        kvt_compile.rewrite(model, IMAGE, select=chosen).report,
    ):
        assert len(report.sites) == 2
        assert all(x.outcome == "dense" and re.search(reason, x.reason) for x in report.sites)
    assert torch.equal(by_rewrite(model, chosen)(IMAGE), model(IMAGE))
    torch.testing.assert_close(by_compile(model, chosen)(IMAGE), model(IMAGE))
    module = by_rewrite(model, "topk(4)")
    before = module(IMAGE)
    with pytest.raises(kvt_compile.SelectionError, match=reason):
        kvt_compile.set_select(module, chosen, grid=(5, 7), prefix=1)
    assert torch.equal(module(IMAGE), before)


class Talking(nn.Module):
    """A convolution of the scores, which have to be kept."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2, 2, 1).double()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.mix(q @ k.mT).softmax(-1) @ v


class Branching(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

        return torch.cond(q.sum() > 0, attend, lambda q, k, v: v * 2.0, (q, k, v))  # type: ignore[return-value]


def test_a_branch_reads_its_inputs_alone() -> None:
    q = torch.rand(2, 2, 36, 8, dtype=torch.float64)
    program = torch.export.export(Branching(), (q, q, q))
    (site,) = kvt_compile.rewrite(program, select=ONE).report.sites
    assert "in the body of cond, whose inputs are all that it reads" in site.reason
    assert kvt_compile.rewrite(program, select="topk(4)").report.counts["fused"] == 1


def test_sites_and_ways_that_take_no_function() -> None:
    q = torch.randn(2, 2, 6, 8, dtype=torch.float64)
    (site,) = kvt_compile.explain(Talking(), q, q, q, select=ONE).sites
    assert re.search("cannot be fused .* is generated for fused sites only", site.reason)
    with pytest.raises(kvt_compile.SelectionError, match="which is no text: give its value in Python"):
        select.parse(str(ONE))
    with pytest.raises(ValueError, match="which is no text, and a policy is made of texts"):
        kvt_compile.calibrate(vit(), [IMAGE], mass=0.9, select=["window(3) | prefix", ONE])


def test_a_number_of_tokens_that_is_known_only_at_run_time() -> None:
    class AnyTokens(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

    q, other = (torch.randn(2, 2, n, 8, dtype=torch.float64) for n in (12, 20))
    sizes = {2: torch.export.Dim("tokens", min=2, max=64)}
    program = torch.export.export(AnyTokens(), (q, q, q), dynamic_shapes=(sizes,) * 3)
    for chosen in (select.given(FIRST) & select.topk(0.25), select.given(near) | select.sinks(2)):
        module = kvt_compile.rewrite(program, select=chosen).module
        for x in (q, other):
            torch.testing.assert_close(module(x, x, x), kvt_compile.attention(x, x, x, select=chosen))
    (site,) = kvt_compile.rewrite(program, select=select.given(FIRST) & select.window(3), grid=-1).report.sites
    assert "known only at run time" in site.reason


def test_a_function_that_changes_its_mind_is_told() -> None:
    class Either(nn.Module):
        bool = True

        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return near(q, k) if self.bool else near(q, k).expand(q.shape[0], 2, 36, 36)

    function = Either()
    module = by_rewrite(vit(), select.given(function))
    module(IMAGE)
    function.bool = False
    with pytest.raises(kvt_compile.SelectionError, match="when it was built in"):
        module(IMAGE)
