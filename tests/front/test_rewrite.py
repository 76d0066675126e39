"""`rewrite` and `explain`: every kind of model they take, and what they promise about it."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from models import timm_swin, timm_vit
from nets import Branching, Classifier, Net
from torch import Tensor, fx, nn

import kvt_compile

FORCED: dict[str, Any] = {"topk": 1.0, "force_rewrite": True}


def test_a_module_keeps_its_parameters_and_its_batch_may_change() -> None:
    model, args, _ = timm_vit(True)
    model.eval()
    result = kvt_compile.rewrite(model, *args, **FORCED)
    assert list(result.module.state_dict()) == list(model.state_dict())
    assert all(p is q for p, q in zip(result.module.parameters(), model.parameters(), strict=True))
    assert result.report.counts["fused"] == 2
    for batch in (1, 3):
        x = torch.randn(batch, 3, 64, 64)
        torch.testing.assert_close(result.module(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_rewritten_module_switches_between_train_and_eval() -> None:
    model, x = Net(dropout=0.5), torch.randn(2, 10, 32)
    module = kvt_compile.rewrite(model, x, **FORCED).module
    assert not torch.equal(module.train()(x), module(x))
    torch.testing.assert_close(module.eval()(x), model.eval()(x))


def test_a_symbolic_trace_graph_is_copied_not_changed() -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    graph = fx.symbolic_trace(model)
    before = str(graph.graph)
    result = kvt_compile.rewrite(graph, x, topk=4)
    assert str(graph.graph) == before
    torch.testing.assert_close(result.module(x), model.by_hand(x, 4), rtol=1e-4, atol=1e-5)


def test_an_exported_program_stays_one_and_survives_saving() -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    program = torch.export.export(model, (x,))
    result = kvt_compile.rewrite(program, topk=4)
    assert result.program is not None
    expected = model.by_hand(x, 4)
    torch.testing.assert_close(result.module(x), expected, rtol=1e-4, atol=1e-5)
    file = io.BytesIO()
    torch.export.save(result.program, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), expected, rtol=1e-4, atol=1e-5)


def test_a_program_whose_attention_is_its_output_keeps_its_signature() -> None:
    class Bare(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT).softmax(-1) @ v

    inputs = tuple(torch.randn(2, 3, 5, 4) for _ in range(3))
    result = kvt_compile.rewrite(torch.export.export(Bare(), inputs), **FORCED)
    torch.testing.assert_close(result.module(*inputs), Bare()(*inputs))


def test_what_cannot_be_traced_symbolically_goes_through_export() -> None:
    model, x = Branching(on_data=False), torch.randn(2, 10, 32)
    result = kvt_compile.rewrite(model, x, topk=4)
    assert result.program is not None
    torch.testing.assert_close(result.module(x), model.net.by_hand(x, 4), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_captured_says_so_and_what_to_do() -> None:
    with pytest.raises(kvt_compile.CaptureError, match=r"torch\.compile"):
        kvt_compile.rewrite(Branching(on_data=True), torch.randn(2, 10, 32), topk=4)


def test_training_a_rewritten_module_is_training_the_dense_one() -> None:
    model, args, _ = timm_swin(False)
    other = copy.deepcopy(model)
    module = kvt_compile.rewrite(other, *args, **FORCED).module
    module(*args).square().sum().backward()
    model(*args).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_explain_changes_nothing() -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(32)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(super().forward(x).transpose(1, 2))

    model, x = Counting(), torch.randn(2, 10, 32)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = kvt_compile.explain(model, x)
    assert report.counts == {"sites": 2, "fused": 2, "scores-kept": 0, "dense": 0, "refusals": 0}
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, msg=name)


def test_swin_is_explained_with_its_bias_table_and_its_window_mask() -> None:
    import timm

    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, depths=(2,), num_heads=(3,), embed_dim=24, num_classes=10
    )
    report = kvt_compile.explain(model.eval(), torch.randn(2, 3, 56, 56))
    plain, shifted = report.sites
    assert "relative_position_bias" in plain.score
    assert "[h, i, j]" in plain.score
    assert "attn_mask" in shifted.score
    assert "[b % 4, i, j]" in shifted.score


def test_a_softmax_left_alone_has_a_reason() -> None:
    report = kvt_compile.explain(Classifier(), torch.randn(2, 10, 32))
    assert len(report.sites) == 2
    (refusal,) = report.refusals
    assert "not multiplied with values" in refusal.reason
    assert refusal.step == "values"


@pytest.mark.parametrize(
    ("options", "topk", "reason"),
    [
        ({"topk": 4}, [4, 4], ["", ""]),
        ({"topk": 0.25}, [3, 3], ["", ""]),
        ({"topk": 10}, [None, None], ["keeps all 10 keys"] * 2),
        ({"topk": 10, "force_rewrite": True}, [10, 10], ["", ""]),
        ({"topk": {"first": 2, "*": None}}, [2, None], ["", "None"]),
        ({"topk": lambda site: 3 if site.where.module == "second" else None}, [None, 3], ["None", ""]),
        ({"topk": 4, "include": "second"}, [None, 4], ["include", ""]),
        ({"topk": 4, "exclude": ["second"]}, [4, None], ["", "exclude"]),
        ({"topk": None}, [None, None], ["None", "None"]),
    ],
    ids=["count", "share", "all", "forced", "mapping", "callable", "include", "exclude", "none"],
)
def test_policies(options: dict[str, Any], topk: list[int | None], reason: list[str]) -> None:
    report = kvt_compile.explain(Net(), torch.randn(2, 10, 32), **options)
    assert [site.topk for site in report.sites] == topk
    assert [site.outcome for site in report.sites] == ["dense" if k is None else "fused" for k in topk]
    for site, expected in zip(report.sites, reason, strict=True):
        assert expected in site.reason


@pytest.mark.parametrize("options", [{"include": "blocks.*"}, {"exclude": "nope"}, {"topk": {"blocks.0": 3}}], ids=str)
def test_a_pattern_that_matches_nothing_is_an_error_that_names_the_sites(options: dict[str, Any]) -> None:
    with pytest.raises(kvt_compile.OptionError, match="the sites are: first, second"):
        kvt_compile.explain(Net(), torch.randn(2, 10, 32), **options)


def test_what_is_no_model_is_named() -> None:
    with pytest.raises(TypeError, match="got function"):
        kvt_compile.rewrite(lambda x: x, torch.randn(1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got str"):
        kvt_compile.explain("vit")  # type: ignore[arg-type]


def test_a_model_captured_by_export_takes_other_batches_where_it_lets_them() -> None:
    model, x = Branching(on_data=False), torch.randn(2, 10, 32)
    result = kvt_compile.rewrite(model, x, topk=4)
    assert result.program is not None
    for batch in (1, 3):
        x = torch.randn(batch, 10, 32)
        torch.testing.assert_close(result.module(x), model.net.by_hand(x, 4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_model_captured_by_export_knows_the_mode_in_its_graph(training: bool) -> None:
    x = torch.randn(2, 10, 32)
    plain = kvt_compile.rewrite(Branching(on_data=False).train(training), x, topk=4)
    assert plain.program is not None
    assert plain.module.eval().training is False  # nothing in it depends on the mode
    assert plain.module.train().training is True
    model = Branching(on_data=False)
    model.net = Net(dropout=0.5)
    module = kvt_compile.rewrite(model.train(training), x, topk=4).module
    module.train(training)
    with pytest.raises(NotImplementedError, match=f"in {'training' if training else 'evaluation'} mode"):
        module.train(not training)
    assert torch.equal(module(x), module(x)) is not training


class Unread(nn.Module):
    """Adds a tensor not at all, to which torch gives a gradient of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(2, 5, 5))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, other: Tensor) -> Tensor:
        first = torch.baddbmm(self.bias, q, k.mT, beta=0).softmax(-1) @ v
        return torch.baddbmm(other, first, k.mT, beta=0).softmax(-1) @ v


@pytest.mark.parametrize("trained", [False, True])
def test_who_has_a_gradient_is_known_of_inputs_and_parameters(trained: bool) -> None:
    tensors = [torch.randn(2, 5, n, requires_grad=trained or n == 4) for n in (4, 4, 4, 5)]
    model = Unread()
    module = kvt_compile.rewrite(model, *tensors, topk=1.0, force_rewrite=True, lowering="aten").module
    module(*tensors).sum().backward()
    assert model.bias.grad is not None
    assert (tensors[3].grad is not None) == trained
