"""Changing k on a rewritten module: what changes, what does not, and what is compiled again."""

from __future__ import annotations

import copy
import io
from functools import cache
from typing import Any

import pytest
import torch
from models import timm_vit
from nets import Branching, Net
from torch import Tensor, nn

import kvt_compile


class TalkingHeads(nn.Module):
    """Heads are mixed before the softmax, so scores are kept and only the selection is one node."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.mix = nn.Linear(32, 96), nn.Linear(4, 4)

    def forward(self, x: Tensor, topk: int | None = None) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        scores = self.mix((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if topk is not None:
            scores = scores.masked_fill(scores < scores.topk(topk, -1).values[..., -1:], -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)


def rewritten(model: nn.Module, **options: Any) -> nn.Module:
    return kvt_compile.rewrite(model, torch.randn(2, 10, 32), **options).module


@cache
def a_rewritten_module() -> nn.Module:
    """For mistakes, which change nothing."""
    return rewritten(Net(), topk=0.5)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("topk", [0.3, 7], ids=str)
def test_every_site_changes(topk: float) -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    module = rewritten(model, topk=0.5)
    close(module(x), model.by_hand(x, 5))
    kvt_compile.set_topk(module, topk)
    close(module(x), model.by_hand(x, 7 if topk == 7 else 3))


def test_none_is_all_keys() -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    module = rewritten(model, topk=2)
    kvt_compile.set_topk(module, None)
    close(module(x), model(x))


def test_one_site_changes_and_its_neighbour_does_not() -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    module = rewritten(model, topk=0.5)
    kvt_compile.set_topk(module, {"first": 2})
    close(module(x), model.second(model.first(x, 2), 5))
    kvt_compile.set_topk(module, {"first": 4, "*": 3})
    close(module(x), model.second(model.first(x, 4), 3))


def test_scores_kept_sites_change_too() -> None:
    model, x = TalkingHeads(), torch.randn(2, 10, 32)
    result = kvt_compile.rewrite(model, x, topk=2)
    assert result.report.counts["scores-kept"] == 1
    close(result.module(x), model(x, 2))
    kvt_compile.set_topk(result.module, 0.4)
    close(result.module(x), model(x, 4))


def test_a_model_captured_by_export_changes_too() -> None:
    model, x = Branching(on_data=False), torch.randn(2, 10, 32)
    result = kvt_compile.rewrite(model, x, topk=4)
    assert result.program is not None
    kvt_compile.set_topk(result.module, 2)
    close(result.module(x), model.net.by_hand(x, 2))


def test_a_loaded_program_changes_too() -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    file = io.BytesIO()
    torch.export.save(torch.export.export(rewritten(model, topk=4), (x,)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    close(loaded(x), model.by_hand(x, 4))
    kvt_compile.set_topk(loaded, {"first": 2})
    close(loaded(x), model.second(model.first(x, 2), 4))


def test_a_share_follows_the_number_of_keys_until_it_is_changed() -> None:
    program = torch.export.export(
        Net(), (torch.randn(2, 10, 32),), dynamic_shapes=({1: torch.export.Dim("tokens", min=4, max=64)},)
    )
    model = Net()
    module = kvt_compile.rewrite(program, topk=0.5).module
    module.load_state_dict(model.state_dict())
    for tokens in (10, 16):
        x = torch.randn(2, tokens, 32)
        close(module(x), model.by_hand(x, tokens // 2))
    kvt_compile.set_topk(module, 0.25)
    x = torch.randn(2, 16, 32)
    close(module(x), model.by_hand(x, 4))


def test_options_hold_inside_and_nest() -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    module = rewritten(model, topk=5)
    kvt_compile.set_topk(module, 4)
    with kvt_compile.options(topk=3):
        close(module(x), model.by_hand(x, 3))
        with kvt_compile.options(topk=None):
            close(module(x), model(x))
        close(module(x), model.by_hand(x, 3))
    close(module(x), model.by_hand(x, 4))
    with pytest.raises(RuntimeError, match="inside"), kvt_compile.options(topk=1):
        raise RuntimeError("inside")
    close(module(x), model.by_hand(x, 4))


def test_a_backward_pass_keeps_the_keys_of_its_forward() -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    other = copy.deepcopy(model)
    module = rewritten(other, topk=0.5)
    with kvt_compile.options(topk=2):
        out = module(x)
    out.square().sum().backward()
    model.by_hand(x, 2).square().sum().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        close(q.grad, p.grad)  # type: ignore[arg-type]


def test_under_torch_compile_each_new_k_is_compiled_once() -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    module = rewritten(model, topk=5)
    graphs: list[Any] = []

    def count(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    compiled = torch.compile(module, backend=count, fullgraph=True)
    for topk, compiles in ((5, 1), (3, 2), (5, 2), (3, 2)):
        kvt_compile.set_topk(module, topk)
        close(compiled(x), model.by_hand(x, topk))
        assert len(graphs) == compiles
    with kvt_compile.options(topk=2):
        close(compiled(x), model.by_hand(x, 2))
    close(compiled(x), model.by_hand(x, 3))


def test_annealing_trains_through_every_k() -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    module = rewritten(model, topk=1.0, force_rewrite=True)
    optimiser = torch.optim.SGD(module.parameters(), lr=1e-2)
    for topk in (None, 8, 4):
        kvt_compile.set_topk(module, topk)
        expected = model(x) if topk is None else model.by_hand(x, topk)
        found = module(x)
        close(found, expected)
        optimiser.zero_grad()
        found.square().mean().backward()
        optimiser.step()


def test_the_checkpoint_does_not_know_about_k() -> None:
    model, args, _ = timm_vit(True)
    keys = list(model.state_dict())
    module = kvt_compile.rewrite(model, *args).module
    kvt_compile.set_topk(module, 3)
    assert list(module.state_dict()) == keys


@pytest.mark.parametrize("topk", [0, -1, 1.5, float("nan"), True, "half"], ids=str)
def test_a_topk_that_is_none_is_refused(topk: Any) -> None:
    module = a_rewritten_module()
    for attempt in (lambda: kvt_compile.set_topk(module, topk), lambda: kvt_compile.set_topk(module, {"first": topk})):
        with pytest.raises((TypeError, ValueError), match="topk is"):
            attempt()
    with pytest.raises((TypeError, ValueError), match="topk is"), kvt_compile.options(topk=topk):
        pass


def test_mistakes_say_what_to_do() -> None:
    module = a_rewritten_module()
    with pytest.raises(kvt_compile.OptionError, match=r"'blocks.*' matches no attention site.*first, second"):
        kvt_compile.set_topk(module, {"blocks.*": 3})
    with pytest.raises(kvt_compile.OptionError, match=r"no k-NN attention in Net.*kvt_compile\.rewrite"):
        kvt_compile.set_topk(Net(), 3)
    with pytest.raises(kvt_compile.OptionError, match="function of an AttentionSite"):
        kvt_compile.set_topk(module, lambda site: 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="set_topk"), kvt_compile.options(topk={"first": 3}):  # type: ignore[arg-type]
        pass
