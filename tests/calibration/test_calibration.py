"""`calibrate`: what it measures, that its promise holds on inputs it has not seen, that it leaves nothing behind."""

from __future__ import annotations

import gc
import io
import itertools
import json
import math
import weakref
from collections import defaultdict
from pathlib import Path
from typing import Any

import digits
import pytest
import torch
from models import timm_swin
from nets import Branching, Net
from torch import Tensor, nn

import kvt_compile
from kvt_compile.calibration.choose import Unit, _student, first_that_meets, lower_bound, path
from kvt_compile.calibration.data import as_batches, split
from kvt_compile.calibration.policy import CalibratedPolicy
from kvt_compile.config import split_options
from kvt_compile.observe import SiteCall, observe
from kvt_compile.passes.pipeline import run_passes

BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, digits.Digits]:
    with torch.random.fork_rng():
        return digits.trained()


@pytest.fixture(scope="module")
def policies(trained: Any) -> dict[str, CalibratedPolicy]:
    model, data = trained
    images = data.calibrate[0][:120]
    budgets: list[dict[str, float]] = [{"mass": 0.9}, {"cosine": 0.99}, {"ratio": 0.5}]
    return {next(iter(budget)): kvt_compile.calibrate(model, images, **budget, batch_size=60) for budget in budgets}


def scores_by_hand(model: digits.DigitsViT, images: Tensor, topk: dict[str, int]) -> tuple[dict[str, Tensor], Tensor]:
    """Mean mass inside the k largest weights of each block, and the output: the model with k-NN attention, by hand."""
    x = model.patches(images).flatten(2).transpose(1, 2)
    x = torch.cat([model.class_token.expand(len(images), -1, -1), x], 1) + model.positions
    mass = {}
    for name, block in model.blocks.named_children():
        k = topk[f"blocks.{name}"]
        q, key, v = block.qkv(block.norm1(x)).reshape(*x.shape[:2], 3, block.heads, -1).permute(2, 0, 3, 1, 4)  # type: ignore[operator]
        t = q @ key.mT * q.shape[-1] ** -0.5
        mass[f"blocks.{name}"] = t.softmax(-1).topk(k, -1).values.sum(-1).mean()
        weights = t.masked_fill(t < t.topk(k, -1).values[..., -1:], -torch.inf).softmax(-1)
        x = x + block.proj((weights @ v).transpose(1, 2).flatten(2))  # type: ignore[operator]
        x = x + block.mlp(block.norm2(x))  # type: ignore[operator]
    return mass, model.head(model.norm(x[:, 0]))


def keys(policy: CalibratedPolicy) -> dict[str, int]:
    return {name: -(-round(1000 * float(k)) * 17 // 1000) for name, k in policy.items()}


class TestPromise:
    """On 497 images that calibration never saw, by code that shares nothing with it."""

    @torch.no_grad()
    def test_mass(self, trained: Any, policies: dict[str, CalibratedPolicy]) -> None:
        model, data = trained
        policy = policies["mass"]
        mass, _ = scores_by_hand(model, data.test[0], keys(policy))
        assert list(mass) == list(policy) == BLOCKS
        for site in policy.sites:
            assert site.checked_mass_bound >= 0.9
            assert mass[site.path] >= 0.9
        # and it is not met by keeping everything: the next smaller k would have been too little somewhere
        assert policy.ratio < 1
        assert all(site.mass[max(policy.grid.index(site.topk) - 1, 0)] < 0.91 for site in policy.sites)

    @torch.no_grad()
    def test_cosine(self, trained: Any, policies: dict[str, CalibratedPolicy]) -> None:
        model, data = trained
        policy = policies["cosine"]
        _, found = scores_by_hand(model, data.test[0], keys(policy))
        assert policy.check.cosine >= policy.check.cosine_bound >= 0.99
        assert nn.functional.cosine_similarity(found, model(data.test[0])).mean() >= 0.99
        assert policy.ratio < 0.95

    @torch.no_grad()
    def test_ratio_is_spent_where_it_hurts_least(self, trained: Any, policies: dict[str, CalibratedPolicy]) -> None:
        """Nearer to the dense model than the same number of keys everywhere."""
        model, data = trained
        policy = policies["ratio"]
        assert sum(keys(policy).values()) / (3 * 17) == pytest.approx(policy.ratio)
        assert policy.ratio <= 0.5
        same = dict.fromkeys(BLOCKS, sum(keys(policy).values()) // 3)
        dense = model(data.test[0])
        spent, spread = (scores_by_hand(model, data.test[0], k)[1] for k in (keys(policy), same))
        assert (spent - dense).norm() < (spread - dense).norm()

    @torch.no_grad()
    def test_the_rewritten_model_is_the_one_that_was_checked(
        self, trained: Any, policies: dict[str, CalibratedPolicy]
    ) -> None:
        """Straight into `topk`, and into `set_topk` of a module that was rewritten before."""
        model, data = trained
        x = data.test[0][:8]
        policy = policies["ratio"]
        _, expected = scores_by_hand(model, x, keys(policy))
        result = kvt_compile.rewrite(model, x, topk=policy, force_rewrite=True)
        assert [site.topk for site in result.report.sites] == list(keys(policy).values())
        torch.testing.assert_close(result.module(x), expected, rtol=1e-3, atol=1e-4)
        other = kvt_compile.rewrite(model, x, topk=1.0, force_rewrite=True).module
        kvt_compile.set_topk(other, policy)
        torch.testing.assert_close(other(x), expected, rtol=1e-3, atol=1e-4)

        def passes_alone(gm: torch.fx.GraphModule, _: Any) -> Any:  # backend="kvt" without Inductor
            assert run_passes(gm, split_options({"topk": policy})[0].policy).changed
            return gm.forward

        torch.testing.assert_close(torch.compile(model, backend=passes_alone)(x), expected, rtol=1e-3, atol=1e-4)


def test_the_margin_is_there_because_it_is_needed() -> None:
    """Of 2000 samples of 24 errors as skewed as those of real outputs, the bound holds for at least nine in ten, and
    the plain mean of the sample for less than half."""
    normal = torch.randn(24, 2000, dtype=torch.float64)
    missing, true = 0.01 * (1.2 * normal).exp(), 0.01 * math.exp(0.72)
    assert (lower_bound(1 - missing, 0.95) <= 1 - true).double().mean() >= 0.9
    assert (1 - missing.mean(0) <= 1 - true).double().mean() < 0.5
    # without skewness it is Student's interval, which is exact
    held = (lower_bound(0.9 + 0.01 * normal, 0.95) <= 0.9).double().mean()
    assert 0.935 <= held <= 0.985


def test_all_of_the_mass_is_all_of_it() -> None:
    assert lower_bound(torch.ones(8, dtype=torch.float64), 0.95) == 1.0
    assert lower_bound(torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64), 0.95) < 0.8


@pytest.mark.parametrize(
    ("confidence", "freedom", "quantile"),
    [(0.95, 1, 6.3138), (0.95, 3, 2.3534), (0.95, 8, 1.8595), (0.99, 15, 2.6025), (0.95, 1000, 1.6464)],
)
def test_students_quantiles(confidence: float, freedom: int, quantile: float) -> None:
    """Tabulated values."""
    assert _student(confidence, freedom) == pytest.approx(quantile, abs=5e-5)


def unit(name: str, errors: list[float], gain: float = 1.0) -> Unit:
    ones = (1.0,) * len(errors)
    shares = tuple((n + 1) / len(errors) for n in range(len(errors)))
    return Unit(name, 10, shares, shares, ones, ones, tuple(errors), gain)


def test_the_path_is_nested_and_spends_where_it_hurts_least() -> None:
    units = [unit("hurts", [1.0, 0.2, 0.0]), unit("does not", [0.01, 0.001, 0.0]), unit("late", [1.0, 0.2, 0.0], 0.1)]
    points = path(units)
    assert points[0] == (0, 0, 0)
    assert points[1] == (1, 0, 0)
    assert points[-1] == (2, 2, 2)
    assert all(all(a <= b for a, b in zip(p, q, strict=True)) for p, q in itertools.pairwise(points))
    within = path(units, limit=0.6)
    assert sum(units[n].costs[level] for n, level in enumerate(within[-1])) <= 1.8 + 1e-9
    assert within[-1][0] == 2


@pytest.mark.parametrize("first", [0, 1, 5, 9])
def test_bisection_finds_the_first_point_that_meets(first: int) -> None:
    points = [(n,) for n in range(10)]
    asked: list[Any] = []
    assert first_that_meets(points, lambda p: bool(asked.append(p)) or p[0] >= first) == (first,)
    assert len(asked) <= 4
    assert first_that_meets(points, lambda p: False) == (9,)


def test_measured_and_checked_examples_are_not_the_same() -> None:
    data = torch.arange(40.0).view(40, 1)
    measured, checked = split(as_batches(data), 0.5, 8)
    seen = [torch.cat([batch.args[0] for batch in part]).flatten().tolist() for part in (measured, checked)]
    assert sorted(seen[0] + seen[1]) == list(range(40))
    assert (len(seen[0]), len(seen[1])) == (20, 20)
    singles = split(as_batches([data[n : n + 1] for n in range(10)]), 0.5, 8)
    assert [len(part) for part in singles] == [5, 5]
    with_mask = split(as_batches((data, torch.zeros(3, 3))), 0.5, 8)[0][0]
    assert with_mask.args[1].shape == (3, 3)  # belongs to all examples


def test_curves_are_what_the_scores_say(trained: Any, policies: dict[str, CalibratedPolicy]) -> None:
    model, data = trained
    (batch,), _ = split(as_batches(data.calibrate[0][:120]), 0.5, 60)
    found: defaultdict[str, list[float]] = defaultdict(list)

    def look(call: SiteCall) -> None:
        t = torch.cat([rows.t for rows in call.scores()], 2).double()
        exact = call.output(17).double()
        for k in (1, 9, 17):
            mass = t.softmax(-1).topk(k, -1).values.sum(-1).mean()
            error = (call.output(k) - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
            found[call.where.module] += [float(mass), float(error.square().mean().sqrt())]

    observe(model, batch.args, look, topk=1.0, force_rewrite=True)
    for site in policies["ratio"].sites:
        n = [policies["ratio"].grid.index(share) for share in (0.05, 0.5, 1.0)]
        expected = [value for at in n for value in (site.mass[at], site.error[at])]
        assert found[site.path] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert list(site.mass) == sorted(site.mass)
        assert (site.mass[-1], site.error[-1]) == (1.0, 0.0)


def test_no_scores_are_left_behind(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = trained
    seen: list[weakref.ref[Tensor]] = []
    real = SiteCall.scores

    def scores(self: SiteCall, *args: Any, **kwargs: Any) -> Any:
        for rows in real(self, *args, rows=4):
            seen.append(weakref.ref(rows.t))
            assert sum(ref() is not None for ref in seen) <= 2  # a few rows of one attention at a time
            yield rows

    monkeypatch.setattr(SiteCall, "scores", scores)
    policy = kvt_compile.calibrate(model, data.calibrate[0][:16], mass=0.8, batch_size=8)
    gc.collect()
    assert len(seen) >= 3 * 5
    assert not any(ref() is not None for ref in seen)
    assert policy.met


def test_a_model_of_several_graphs_and_numbers_of_keys() -> None:
    model = Branching(on_data=True).train()
    model.net.first.eval()
    policy = kvt_compile.calibrate(model, torch.randn(16, 10, 32), mass=0.7, grid=[3, 6, 9], batch_size=8)
    assert list(policy) == ["net.first", "net.second"]
    assert all(k in (3, 6, 9, 1.0) for k in policy.values())
    assert policy.met
    assert model.training
    assert not model.net.first.training


@pytest.mark.parametrize(
    "way", [lambda x: [x[:10], x[10:]], lambda x: (x,), lambda x: {"x": x}, lambda x: iter([(x, None)])]
)
def test_ways_to_give_data(way: Any) -> None:
    x = torch.randn(16, 10, 32)
    batches = as_batches(way(x))
    given = [y for batch in batches for y in (*batch.args, *batch.kwargs.values()) if y is not None]
    assert torch.equal(torch.cat(given), x)


def test_windows_belong_to_their_image() -> None:
    """Swin's attention runs on batch x windows; the curves are per image all the same, and both kinds are found."""
    model, _, _ = timm_swin(False)
    policy = kvt_compile.calibrate(model.eval(), torch.randn(8, 3, 56, 56), mass=0.9, batch_size=4, grid=[0.5, 0.9])
    assert len(policy) == 2
    assert all(site.keys == 49 for site in policy.sites)
    assert policy.met


class TestFile:
    def test_round_trip(self, policies: dict[str, CalibratedPolicy], tmp_path: Path) -> None:
        for name, policy in policies.items():
            policy.save(tmp_path / f"{name}.json")
            again = CalibratedPolicy.load(tmp_path / f"{name}.json")
            assert again == policy
            assert dict(again) == dict(policy)
            assert again.met
        assert json.loads((tmp_path / "mass.json").read_text())["topk"] == dict(policies["mass"])
        assert sorted(file.name for file in tmp_path.iterdir()) == ["cosine.json", "mass.json", "ratio.json"]

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("{", "it is not JSON"),
            ("[1]", "it is no calibrated policy"),
            ('{"topk": {}}', "is no calibrated policy"),
            ('{"kvt_calibration": 99}', "format 99"),
            ('{"kvt_calibration": 1, "sites": [{"path": "a"}]}', "it has no entry 'grid'"),
        ],
    )
    def test_a_file_that_is_something_else(self, tmp_path: Path, text: str, says: str) -> None:
        file = tmp_path / "policy.json"
        file.write_text(text)
        with pytest.raises(kvt_compile.CalibrationError, match=rf"policy\.json.*{says}"):
            CalibratedPolicy.load(file)

    def test_a_missing_folder_leaves_nothing(self, policies: dict[str, CalibratedPolicy], tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            policies["mass"].save(tmp_path / "nowhere" / "policy.json")
        assert list(tmp_path.iterdir()) == []


def test_table_and_plot(policies: dict[str, CalibratedPolicy]) -> None:
    text = str(policies["cosine"])
    assert all(name in text for name in BLOCKS)
    assert text.splitlines()[-2].startswith("cosine 0.99: ")
    figure = policies["cosine"].plot()
    assert [axes.get_title() for axes in figure.axes][2] == "model output, on the checked examples"
    assert len(figure.axes[0].lines) == 6  # a curve and a dot for each block
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")


X = torch.randn(16, 10, 32)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "one budget of mass, cosine and ratio"),
        ({"mass": 0.9, "ratio": 0.5}, "found mass and ratio"),
        ({"mass": 0}, "mass is 0, expected"),
        ({"mass": 1.5}, "mass is 1.5"),
        ({"mass": True}, "mass is True"),
        ({"cosine": float("nan")}, "cosine is nan"),
        ({"ratio": "half"}, "ratio is 'half'"),
        ({"ratio": 0.01}, "less than the grid can give"),
        ({"mass": 0.9, "data": X[:6]}, "too few: give at least 8"),
        ({"mass": 0.9, "data": []}, "no batches"),
        ({"mass": 0.9, "data": ["a", "b"]}, "a batch of the data is str"),
        ({"mass": 0.9, "data": 3}, "data is int"),
        ({"mass": 0.9, "data": ({"x": 1},)}, "no tensor"),
        ({"mass": 0.9, "data": X * torch.inf}, "not finite"),
        ({"mass": 0.9, "grid": []}, "grid is"),
        ({"mass": 0.9, "grid": [1, 0.5]}, "mixes shares and numbers"),
        ({"mass": 0.9, "grid": [0]}, "topk is 0"),
        ({"mass": 0.9, "holdout": 1.0}, "holdout is 1.0"),
        ({"mass": 0.9, "batch_size": 0}, "batch_size is 0"),
        ({"mass": 0.9, "topk": 3}, "topk is what calibrate chooses"),
        ({"mass": 0.9, "lowerin": "c"}, "did you mean 'lowering'"),
        ({"mass": 0.9, "exclude": ["*"]}, "no attention to calibrate in Net"),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x) or "nothing",
)
def test_mistakes_say_what_to_do(arguments: dict[str, Any], says: str) -> None:

    with pytest.raises((ValueError, TypeError), match=says):
        kvt_compile.calibrate(Net(), arguments.pop("data", X), **{"grid": [0.5], **arguments})
