"""`calibrate(select=...)`: what is offered, that the cheapest policy that keeps the promise is taken, what is saved."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_result import Result
from torch import nn
from vision import Transformer

import kvt_compile
from kvt_compile import CalibratedSelection, select
from kvt_compile.calibration import timing
from kvt_compile.calibration.candidates import automatic
from kvt_compile.calibration.choose import Choice, Unit
from kvt_compile.calibration.facts import Speed
from kvt_compile.calibration.measure import masses, under
from kvt_compile.calibration.units import without_waste
from kvt_compile.observe import AttentionCall, SiteCall
from kvt_compile.select import Geometry

GRID = (8, 10)
FASTEST = timing.fastest


def by_keys(call: SiteCall, choices: tuple[Choice, ...]) -> tuple[float, ...]:
    """A clock without noise: what is kept takes time."""
    return tuple(0.1 + share for share in masses(call, choices)[1].tolist())


@pytest.fixture(scope="module", autouse=True)
def clock() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "seconds", by_keys)
        patch.setattr(timing, "fastest", lambda runs, device: [2.0 / (n + 1) for n, run in enumerate(runs)])
        yield


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Attention that looks near by: selections of different sizes err differently."""
    torch.manual_seed(0)
    found = Transformer(grid=GRID).double().eval()
    for block in found.blocks:
        block.qkv.weight.data *= 2.0
    return found


def images(count: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 32, 40, dtype=torch.float64, generator=generator)


@pytest.fixture(scope="module")
def policy(model: nn.Module) -> CalibratedSelection:
    return kvt_compile.calibrate(model, images(24), cosine=0.98, select="auto", batch_size=12)


def test_the_promise_holds_on_other_images(model: nn.Module, policy: CalibratedSelection) -> None:
    other = images(64, seed=2)
    module = kvt_compile.rewrite(model, other, select=policy).module
    with torch.no_grad():
        found, exact = module(other).flatten(1), model(other).flatten(1)
    assert policy.met
    assert policy.check.cosine >= policy.check.cosine_bound >= 0.98
    assert nn.functional.cosine_similarity(found, exact).mean() >= 0.98
    assert not torch.allclose(found, exact)
    assert list(policy) == ["blocks.0", "blocks.1"]


def test_a_cheaper_choice_of_any_attention_would_break_it(model: nn.Module, policy: CalibratedSelection) -> None:
    """Not of each by itself, for the path is greedy: of all of them together."""
    other = images(64, seed=2)
    cheapest = {
        site.path: site.choices[min(range(len(site.choices)), key=site.seconds.__getitem__)] for site in policy.sites
    }
    assert cheapest != dict(policy)
    module = kvt_compile.rewrite(model, other, select=cheapest).module
    with torch.no_grad():
        assert nn.functional.cosine_similarity(module(other).flatten(1), model(other).flatten(1)).mean() < 0.98


def test_what_is_measured_of_a_selection(model: nn.Module, policy: CalibratedSelection) -> None:
    site = policy.sites[0]
    assert (site.grid, site.keys, site.choices[-1]) == ("8x10 + 1", 81, None)
    assert (site.kept[-1], site.mass[-1], site.error[-1]) == (1.0, 1.0, 0.0)
    window = site.choices.index("window(3) | prefix")
    assert site.kept[window] == pytest.approx((81 + 80 * 10) / 81**2)
    assert 0 < site.mass[window] < 1
    assert site.error[window] > 0
    assert policy.speed is not None
    assert policy.speed.measured == 2.0
    saved = sum(site.seconds[-1] - site.seconds[site.chosen] for site in policy.sites)
    assert policy.speed.predicted == pytest.approx(2.0 / (2.0 - saved))


def test_mass_of_a_selection_is_that_of_its_keys(model: nn.Module) -> None:
    def look(call: SiteCall) -> None:
        assert isinstance(call, AttentionCall)
        choices = ("window(3) | prefix", "(window(3) | prefix) & topk(4)", 4, 1.0)
        found, share = masses(call, choices)
        (rows,) = call.scores()
        weights = rows.t.softmax(-1)
        for n, choice in enumerate(choices):
            kept = under(call, choice).kept(rows)
            torch.testing.assert_close(found[:, n], (weights * kept).sum(-1).mean((1, 2)))
            assert float(kept.double().mean()) == pytest.approx(float(share[n]))

    kvt_compile.observe.observe(model, (images(2),), look, select="window(99) | prefix", force_rewrite=True)


def test_budgets_of_mass_and_ratio(model: nn.Module) -> None:
    by_mass = kvt_compile.calibrate(model, images(16), mass=0.6, select="auto", batch_size=8)
    assert by_mass.met
    assert all(site.checked_mass_bound >= 0.6 for site in by_mass.sites)
    by_ratio = kvt_compile.calibrate(model, images(16), ratio=0.4, select="auto", batch_size=8)
    assert 0 < by_ratio.ratio <= 0.4


def test_selections_that_the_user_names(model: nn.Module) -> None:
    names = ["window(5) | prefix", select.halo(2, 2) | select.prefix(), "window((1, 2, 3)) | prefix"]
    found = kvt_compile.calibrate(model, images(16), cosine=0.5, select=names, batch_size=8)
    assert set(found.sites[0].choices) == {
        "window(5) | prefix",
        "halo(2, 2) | prefix",
        None,
    }  # 3 axes mean nothing here
    assert set(found.values()) <= set(found.sites[0].choices)


def test_where_nothing_is_faster_all_stays_dense(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds", lambda call, choices: (*[1.0] * (len(choices) - 1), 0.5))
    found = kvt_compile.calibrate(model, images(16), cosine=0.1, select="window(3) | prefix", batch_size=8)
    assert dict(found) == {"blocks.0": None, "blocks.1": None}
    assert kvt_compile.explain(model, images(2), select=found).counts["dense"] == 2


def test_attention_without_a_place_stays_dense_and_is_told() -> None:
    order = torch.randperm(80)
    moved = Transformer(grid=GRID, change=lambda x: x[:, order]).double()
    with pytest.raises(kvt_compile.CalibrationError, match=r"blocks\.0: where its tokens stand cannot be read"):
        kvt_compile.calibrate(moved, images(16), cosine=0.9, select="auto")
    told = kvt_compile.calibrate(
        moved, images(16), cosine=0.9, select="window(3) | prefix", grid={"blocks.1": GRID}, prefix=1, batch_size=8
    )
    assert list(told) == ["blocks.1"]
    assert [path for path, _ in told.left] == ["blocks.0"]
    assert "blocks.0 stays dense: where its tokens stand" in str(told)


class TestCandidates:
    def offered(self, geometry: Geometry, score: str = "s") -> list[str]:
        x = torch.empty(1, 1, 1, 1)
        call = AttentionCall(0, None, None, 1, "auto", x, x, x, (), score, "p", ())  # type: ignore[arg-type]
        return [str(x) for x in automatic(call, geometry)]

    def test_of_an_image(self) -> None:
        found = self.offered(Geometry((64, 64), 1))
        assert found[:2] == ["window(9) | prefix", "window(11) | prefix"]
        assert {"halo(8, 4) | prefix", "regions(0.125, 8) | prefix"} <= set(found)
        assert all(str(select.parse(text)) == text for text in found)
        assert len(found) == len(set(found)) < 16

    def test_of_little(self) -> None:
        assert self.offered(Geometry((3, 3))) == []
        assert self.offered(Geometry((7, 7))) == ["window(3)", "window(5)"]

    def test_behind_a_mask(self) -> None:
        found = self.offered(Geometry((1024,)), "where(le(j, i), s, -oo)")
        assert found[0] == "window(17, causal=True) | sinks(4)"
        assert all(text.startswith("window(") for text in found)


def test_choices_that_are_never_worth_their_cost_go() -> None:
    mass, error = (0.1, 0.9, 0.5, 0.3, 1.0), (0.1, 0.2, 0.5, 0.7, 0.0)
    unit = Unit("a", 9, ("slow", "best", "bad", "cheap", 1.0), (0.9, 0.3, 0.4, 0.1, 0.8), mass, mass, error)
    for by_mass in (False, True):
        assert without_waste(unit, by_mass).choices == ("cheap", "best", 1.0)


class TestFile:
    def test_round_trip(self, policy: CalibratedSelection, tmp_path: Path) -> None:
        policy.save(tmp_path / "policy.json")
        again = CalibratedSelection.load(tmp_path / "policy.json")
        assert again == policy
        assert dict(again) == dict(policy) == json.loads((tmp_path / "policy.json").read_text())["select"]
        assert again.speed == policy.speed

    @pytest.mark.parametrize(
        ("edit", "says"),
        [
            (lambda x: x.pop("sites"), "has no entry 'sites'"),
            (lambda x: x["sites"][0].update(select="window(4) | prefix"), "not one of the measured"),
            (lambda x: x["sites"][0]["choices"].__setitem__(0, "__import__('os').system('x')"), "no selector"),
            (lambda x: x["sites"][0]["choices"].__setitem__(0, "window(3)|prefix"), "as it is written out"),
            (lambda x: x["sites"][0]["choices"].__setitem__(0, "(" * 500), "choices"),
            (lambda x: x["sites"][0]["choices"].__setitem__(0, 7), "expected a text"),
            (lambda x: x["sites"][0]["choices"].__setitem__(-1, "sinks(1)"), "every key"),
            (lambda x: x["sites"][0]["seconds"].pop(), "as many as choices"),
            (lambda x: x["sites"][0]["seconds"].__setitem__(0, math.nan), "no JSON number"),
            (lambda x: x["sites"][0]["seconds"].__setitem__(0, "1"), "expected a number"),
            (lambda x: x["select"].update({"blocks.0": "sinks(1)"}), "edit both"),
            (lambda x: x["speed"].update(threads=0), "from 1 on"),
            (lambda x: x["left"].append("blocks.9"), "a module path and a reason"),
        ],
        ids=lambda x: x if isinstance(x, str) else "",
    )
    def test_an_edit_that_cannot_be_used_is_refused(
        self, policy: CalibratedSelection, tmp_path: Path, edit: Callable[[Any], Any], says: str
    ) -> None:
        data = json.loads(json.dumps(policy.to_dict()))
        edit(data)
        (tmp_path / "policy.json").write_text(json.dumps(data))
        with pytest.raises(kvt_compile.CalibrationError, match=rf"policy\.json cannot be used.*{says}"):
            CalibratedSelection.load(tmp_path / "policy.json")

    def test_a_policy_of_numbers_is_another_file(self, tmp_path: Path) -> None:
        (tmp_path / "policy.json").write_text('{"kvt_calibration": 1, "topk": {}}')
        with pytest.raises(kvt_compile.CalibrationError, match=r"CalibratedPolicy\.load"):
            CalibratedSelection.load(tmp_path / "policy.json")


def test_table_and_plot(policy: CalibratedSelection) -> None:
    text = str(policy)
    assert "blocks.0" in text
    assert "times as fast as dense" in " ".join(text.split())
    file = io.BytesIO()
    policy.plot().savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")


def test_the_real_clock_counts_the_shortest_run_but_the_first() -> None:
    ran: list[str] = []
    fast, slow = FASTEST([lambda: ran.append("a"), lambda: time.sleep(0.002)], torch.device("cpu"))
    assert 0 < fast < 0.002 <= slow
    assert len(ran) == timing.ROUNDS + 1


@pytest.mark.parametrize(("arguments", "says"), [
    ({"select": []}, "expected \"auto\""),
    ({"select": 3}, "expected \"auto\""),
    ({"select": [3]}, "which is no selection"),
    ({"select": "windw(3)"}, "did you mean 'window'"),
    ({"select": "auto", "topk": 3}, "topk is what calibrate chooses"),
])  # fmt: skip
def test_mistakes_say_what_to_do(model: nn.Module, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        kvt_compile.calibrate(model, images(8), cosine=0.9, **arguments)


FACTORY = """
import torch
from vision import Transformer


def factory():
    return Transformer(grid=(8, 10)), (torch.randn(8, 3, 32, 40),)
"""


def test_the_command_line(kvt: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(FACTORY)
    spec = f"{tmp_path / 'model.py'}:factory"
    result = kvt("calibrate", spec, "--cosine", "0.9", "--select", "window(3) | prefix", "--out", f"{tmp_path}/p.json")
    assert result.code == 0, result.err
    assert "blocks.0" in result.out
    assert CalibratedSelection.load(tmp_path / "p.json").budget == "cosine"
    wrong = kvt("calibrate", spec, "--cosine", "0.9", "--grid", "8x10")
    assert (wrong.code, "--grid goes with --select" in wrong.err) == (2, True)


def test_predicted_and_measured() -> None:
    assert Speed(1, 1, "cpu", dense=2.0, saved=1.0, selected=1.25).predicted == 2.0
    assert Speed(1, 1, "cpu", dense=2.0, saved=1.0, selected=1.25).measured == 1.6
