"""What attention keeps, as numbers and as figures, and `kvt look`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_result import Result
from factories import stack, vision
from PIL import Image
from places import FACTORIES
from torch import Tensor, nn

import kvt_compile
from kvt_compile.cli.errors import UserError
from kvt_compile.cli.look import parse_query
from kvt_compile.look import draw
from kvt_compile.look.picture import ImageError, open_image, picture, prepare
from kvt_compile.look.tokens import Tokens, infer_tokens

VISION = f"{FACTORIES}:vision"


class Places(nn.Module):
    """Attention over patches of 1 pixel, whose scores are what the test says: q = rows of a table, k = identity."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.register_buffer("scores", scores)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, image: Tensor) -> Tensor:
        patches = image.flatten(2).transpose(1, 2).unsqueeze(1)  # [B, 1, H*W, C]
        count = patches.shape[2]
        zero = patches.sum(-1, keepdim=True) * 0
        q, k = self.scores + zero, torch.eye(count) + zero
        return (q @ k.transpose(-1, -2)).softmax(-1) @ (patches + self.bias)


@pytest.fixture(scope="module")
def seen() -> kvt_compile.look.Figures:
    torch.manual_seed(0)
    model, (images,) = vision()
    return kvt_compile.visualize(model.eval(), images, topk=5, query=["cls", "center", 3, (0, 1)])


class TestTokens:
    @pytest.mark.parametrize(
        ("count", "aspect", "expected"),
        [
            (196, 1.0, Tokens(0, 14, 14)),
            (197, 1.0, Tokens(1, 14, 14)),  # ViT
            (198, 1.0, Tokens(2, 14, 14)),  # distilled DeiT
            (201, 1.0, Tokens(5, 14, 14)),  # four registers
            (1374, 1.0, Tokens(5, 37, 37)),  # DINOv2 with registers at 518
            (61, 96 / 160, Tokens(1, 6, 10)),
            (61, 160 / 96, Tokens(1, 10, 6)),
            (77, None, Tokens(0, 1, 77)),
            (300, 1.0, Tokens(11, 17, 17)),
            (320, 1.0, Tokens(0, 1, 320)),  # 31 more than 17 x 17: no image
        ],
        ids=str,
    )
    def test_read_off_the_number(self, count: int, aspect: float | None, expected: Tokens) -> None:
        assert infer_tokens(count, aspect) == expected
        assert expected.count == count

    def test_given(self) -> None:
        assert infer_tokens(20, 1.0, prefix=4) == Tokens(4, 4, 4)
        assert infer_tokens(20, None, grid=(2, 9)) == Tokens(2, 2, 9)
        assert infer_tokens(20, 1.0, prefix=1) == Tokens(1, 1, 19)  # no square: a line

    @pytest.mark.parametrize(
        "given",
        [{"prefix": 3, "grid": (4, 4)}, {"grid": (5, 5)}, {"grid": (0, 4)}, {"prefix": 20}, {"prefix": -1}],
        ids=str,
    )
    def test_that_does_not_add_up(self, given: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="20"):
            infer_tokens(20, 1.0, **given)

    def test_names_and_places(self) -> None:
        tokens = Tokens(2, 3, 4)
        assert [tokens.name(n) for n in (0, 1, 2, 7)] == ["CLS", "prefix 1", "patch (0, 0)", "patch (1, 1)"]
        assert Tokens(0, 1, 9).name(4) == "token 4"
        assert tokens.coordinates()[5].tolist() == [1.5, 1.5]
        assert Tokens(0, 2, 2).coordinates(like=Tokens(0, 4, 4)).tolist() == [[1, 1], [1, 3], [3, 1], [3, 3]]


class TestNumbers:
    """On 3 x 3 patches with scores that are known."""

    def look(self, scores: Tensor, **more: Any) -> Any:
        (site,) = kvt_compile.visualize(Places(scores), torch.rand(1, 3, 3, 3), **more).sites
        return site

    def test_mass_inside_the_largest(self) -> None:
        weights = torch.tensor([0.4, 0.3, 0.1, 0.05, 0.05, 0.04, 0.03, 0.02, 0.01])
        site = self.look(weights.log().expand(9, 9), topk=2)
        torch.testing.assert_close(site.mass[0], weights.cumsum(0))

    def test_kept_keys_and_their_weights(self) -> None:
        scores = torch.zeros(9, 9)
        scores[4, [0, 8]] = torch.tensor([1.0, 2.0])
        kept = self.look(scores, topk=2, query="center").kept["center"]
        assert kept.query == 4
        expected = torch.zeros(9)
        expected[[0, 8]] = torch.tensor([1.0, 2.0]).softmax(0)
        torch.testing.assert_close(kept.weights[0], expected)

    def test_distance_of_the_nearest_and_of_all(self) -> None:
        near = self.look(torch.eye(9) * 5, topk=1)
        assert (near.topk, near.distance.tolist()) == (1, [0.0])
        points = Tokens(0, 3, 3).coordinates()
        distance = torch.cdist(points, points)
        assert near.distance_of_all == pytest.approx(float(distance.mean()))
        far = self.look(distance, topk=1)  # the farthest alone, ties kept
        expected = [row[row == row.max()] for row in distance]
        assert float(far.distance) == pytest.approx(float(torch.cat(expected).mean()))

    def test_ties_are_all_drawn(self) -> None:
        assert self.look(torch.zeros(9, 9), topk=3, query=0).kept["0"].weights.count_nonzero() == 9

    @pytest.mark.parametrize(
        ("text", "kept"),
        [
            ("window(2)", [0, 1, 3, 4]),
            ("halo(2, 0) & window(3)", [0, 1, 3, 4]),
            ("shifted(3)", [2, 3, 4]),
            ("sinks(2)", [0, 1]),
            ("prefix(1)", [0]),
            ("regions(1, 2) | sinks(1)", [0, 2, 5]),
            ("window((3, 1)) & topk(2)", [4, 7]),
            ("topk(3, ties=lowest)", [2, 4, 5]),
            ("mass(0.5)", [2]),
        ],
    )  # fmt: skip
    def test_what_a_selection_keeps(self, text: str, kept: list[int]) -> None:
        scores = torch.zeros(9, 9)
        scores[4, [2, 4, 5, 7]] = torch.tensor([3.0, 1.0, 1.0, 1.0])
        site = self.look(scores, select=text, grid=(3, 3), prefix=0)
        assert site.kept["center"].weights[0].nonzero().flatten().tolist() == kept
        assert site.select
        assert draw._rule(site).startswith(site.select)
        weights = scores.softmax(-1)[4]
        held = float(weights[kept].sum())
        assert 0 < site.held <= 1
        torch.testing.assert_close(site.kept["center"].weights[0][kept], weights[kept] / held)

    def test_where_tokens_stand_is_taken_from_the_selection(self) -> None:
        model, (images,) = vision()
        figures = kvt_compile.visualize(model.eval(), images, select="window(2) | prefix", query=["cls", (0, 1)])
        site = figures.sites[0]
        assert (site.keys, site.select, site.topk) == (Tokens(1, 4, 4), "window(2) | prefix", 17)
        assert site.kept["cls"].weights.count_nonzero(dim=-1).tolist() == [17] * 3
        expected = [0, 1, 2, 5, 6]
        assert site.kept["0, 1"].weights[0].nonzero().flatten().tolist() == expected
        assert site.share == pytest.approx((17 + 16 * 5) / 17**2)
        assert len(list(figures)) == 4

    def test_prefix_tokens_have_no_distance(self, seen: kvt_compile.look.Figures) -> None:
        site = seen.sites[0]
        assert (site.keys, site.topk, site.name) == (Tokens(1, 4, 4), 5, "blocks.0.attn")
        assert site.kept["cls"].weights.shape == (3, 17)
        assert all(site.kept[x].weights.count_nonzero(dim=-1).tolist() == [5, 5, 5] for x in site.kept)
        assert {text: kept.query for text, kept in site.kept.items()} == {"cls": 0, "center": 11, "3": 3, "0, 1": 2}
        assert ((site.distance > 0) & (site.distance < 2**0.5 * 3)).all()

    def test_a_line_of_tokens(self) -> None:
        model, inputs = stack()
        figures = kvt_compile.visualize(model, inputs, topk=1.0)
        assert [s.keys for s in figures.sites] == [Tokens(0, 1, 10)] * 2
        assert figures.sites[0].topk == 10  # every key is kept, and looked at all the same
        mean = sum(abs(i - j) for i in range(10) for j in range(10)) / 100
        assert figures.sites[0].distance.tolist() == pytest.approx([mean] * 2)

    def test_windows_are_square_and_their_own(self) -> None:
        import timm

        model = timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=56, depths=(2,), num_heads=(3,), embed_dim=24
        )
        sites = kvt_compile.visualize(model.eval(), torch.randn(1, 3, 56, 56), topk=9).sites
        assert [(s.windows, s.keys) for s in sites] == [(4, Tokens(0, 7, 7))] * 2

    def test_same_as_a_rewritten_model(self, seen: kvt_compile.look.Figures) -> None:
        torch.manual_seed(0)
        model, (images,) = vision()
        result = kvt_compile.rewrite(model.eval(), images, topk=5, lowering="aten")
        again = kvt_compile.visualize(result, images)
        for a, b in zip(seen.sites, again.sites, strict=True):
            torch.testing.assert_close(a.mass, b.mass)
            assert torch.equal(a.kept["center"].weights > 0, b.kept["center"].weights > 0)


class TestFigures:
    def test_a_row_a_site_and_a_column_a_head(self, seen: kvt_compile.look.Figures) -> None:
        assert list(seen.kept) == ["cls", "center", "3", "0, 1"]
        figure = seen.kept["center"]
        assert len(figure.axes) == 2 * 3
        assert [ax.get_title() for ax in figure.axes[:3]] == ["head 0", "head 1", "head 2"]
        assert "blocks.1.attn" in figure.axes[3].get_ylabel()
        assert figure.get_suptitle() == "Keys kept by the query patch (2, 2)"
        drawn = figure.axes[0].images[0].get_array()
        kept = seen.sites[0].kept["center"].weights[0, 1:].view(4, 4) > 0
        brightness = torch.from_numpy(drawn.copy()).amax(-1).view(4, 16, 4, 16).amax((1, 3))
        assert brightness[kept].min() > draw.DIM >= brightness[~kept].max()

    def test_a_curve_a_site_and_a_dot_at_its_k(self, seen: kvt_compile.look.Figures) -> None:
        lines = seen.mass.axes[0].lines
        assert len(lines) == 4
        assert lines[1].get_xdata() == [pytest.approx(5 / 17)]
        assert lines[1].get_ydata() == [pytest.approx(float(seen.sites[0].mass[:, 4].mean()))]
        assert seen.distance is not None
        assert len(seen.distance.axes[0].lines) == 4

    def test_files(self, seen: kvt_compile.look.Figures, tmp_path: Path) -> None:
        paths = seen.save(tmp_path, dpi=20)
        names = ["kept_cls", "kept_center", "kept_3", "kept_0_1", "mass", "distance"]
        assert [path.name for path in paths] == [f"{name}.png" for name in names]
        assert sorted(tmp_path.iterdir()) == sorted(paths)
        for path in paths:
            with Image.open(path) as image:
                image.verify()
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            seen.save(tmp_path / "nowhere")

    def test_only_the_sites_asked_for(self) -> None:
        model, inputs = stack()
        figures = kvt_compile.visualize(model, inputs, topk=3, site="blocks.1")
        assert [s.module for s in figures.sites] == ["blocks.1"]


class TestImages:
    def test_a_photograph_is_cropped_and_normalised(self, tmp_path: Path) -> None:
        Image.new("RGBA", (300, 100), (255, 0, 0, 255)).save(tmp_path / "red.png")
        model, _ = vision()
        x = prepare(open_image(tmp_path / "red.png"), model)
        assert x.shape == (1, 3, 64, 64)
        assert x.flatten(2).std(-1).max() == 0
        assert x[0, :, 0, 0].tolist() == pytest.approx([(1 - 0.5) / 0.5, -1, -1])  # timm's configuration of this ViT

    def test_a_model_that_says_nothing(self) -> None:
        assert prepare(Image.new("RGB", (50, 80)), nn.Identity()).shape == (1, 3, 224, 224)

    def test_a_path_will_do(self, tmp_path: Path) -> None:
        Image.effect_noise((70, 70), 50).save(tmp_path / "noise.jpg")
        model, _ = vision()
        assert kvt_compile.visualize(model.eval(), tmp_path / "noise.jpg", topk=4).sites[0].topk == 4

    def test_picture_is_between_black_and_white(self) -> None:
        shown = picture(torch.randn(3, 5, 4) * 7)
        assert shown.shape == (5, 4, 3)
        assert (shown.min(), shown.max()) == (0.0, 1.0)
        assert picture(torch.zeros(1, 2, 2)).shape == (2, 2, 3)

    def test_that_cannot_be_read(self, tmp_path: Path) -> None:
        (tmp_path / "text.jpg").write_text("no image")
        Image.effect_noise((200, 200), 50).save(tmp_path / "cut.png")
        (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:999])
        for name, says in (
            ("no.png", "there is no image"),
            ("text.jpg", "is not an image"),
            ("cut.png", "cannot be read"),
        ):
            with pytest.raises(ImageError, match=says):
                open_image(tmp_path / name)


class TestMistakes:
    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ({"site": "layers.*"}, "matches no attention site; the sites are: blocks.0.attn, blocks.1.attn"),
            (
                {"query": 17},
                "no site has the query 17: blocks.0.attn has 1 prefix token, 4 x 4 patches, tokens 0 to 16",
            ),
            ({"query": (4, 0)}, "no site has the query 4, 0"),
            ({"query": "middle"}, "query is 'middle', expected"),
            ({"prefix": 40}, "prefix=40"),
            ({"grid": (5, 5)}, "grid="),
            ({"topk": 0}, "at least 1"),
        ],
        ids=str,
    )
    def test_says_what_there_is(self, given: dict[str, Any], says: str) -> None:
        model, inputs = vision()
        with pytest.raises(ValueError, match=re.escape(says)):
            kvt_compile.visualize(model.eval(), inputs, **given)

    def test_a_model_without_attention(self) -> None:
        with pytest.raises(ValueError, match="has no attention"):
            kvt_compile.visualize(nn.Linear(3, 3), (torch.randn(2, 3),))

    @pytest.mark.parametrize("given", [3, None, {"x": 1}], ids=str)
    def test_no_image(self, given: Any) -> None:
        with pytest.raises(TypeError, match="expected an image"):
            kvt_compile.visualize(nn.Linear(3, 3), given)

    def test_without_matplotlib(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match="pip install matplotlib"):
            kvt_compile.visualize(nn.Linear(3, 3), (torch.randn(2, 3),))


class TestCommand:
    def test_writes_the_figures(self, kvt: Callable[..., Result], tmp_path: Path) -> None:
        Image.effect_noise((70, 90), 50).save(tmp_path / "photo.jpg")
        out, weights = tmp_path / "out", tmp_path / "weights.pt"
        torch.save({"model": vision()[0].state_dict()}, weights)
        asked = f"--image {tmp_path}/photo.jpg --out {out} --weights {weights} --query 0,0 --query cls"
        asked += " --select window(3)|prefix"
        result = kvt("look", VISION, *asked.split())
        assert result.code == 0, result.err
        names = ["kept_0_0.png", "kept_cls.png", "mass.png", "distance.png"]
        assert result.out.splitlines() == [str(out / name) for name in names]
        assert sorted(path.name for path in out.iterdir()) == sorted(names)

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--image", "nowhere.jpg"], "--image: there is no image 'nowhere.jpg'"),
            (["--image", FACTORIES], "is not an image"),
            (["--query", "middle"], "--query 'middle'"),
            (["--query", "99"], "no site has the query 99"),
            (["--site", "layers.*"], "the sites are: blocks.0.attn"),
            (["--topk", "half"], "'half' is not a count"),
            (["--select", "windw(3)"], "did you mean 'window'"),
            (["--select", "window(3) | prefix", "--topk", "3"], "both given"),
            (["--weights", "nowhere.pt"], "--weights: there is no file"),
            (["--weights", FACTORIES], "cannot be read"),
            (["--prefix", "17"], "prefix=17"),
        ],
        ids=str,
    )
    def test_mistake(self, kvt: Callable[..., Result], tmp_path: Path, arguments: list[str], says: str) -> None:
        result = kvt("look", VISION, "--out", str(tmp_path / "out"), *arguments)
        assert (result.code, result.out) == (2, "")
        (sentence,) = result.err.strip().splitlines()
        assert sentence.startswith("kvt: ")
        assert says in sentence
        assert list(tmp_path.iterdir()) == []

    def test_weights_of_another_model(self, kvt: Callable[..., Result], tmp_path: Path) -> None:
        torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
        result = kvt("look", VISION, "--out", str(tmp_path / "out"), "--weights", str(tmp_path / "w.pt"))
        assert result.code == 2
        assert "does not fit VisionTransformer" in result.err

    @pytest.mark.parametrize("out", ["nowhere/out", "file"], ids=str)
    def test_folder(self, kvt: Callable[..., Result], tmp_path: Path, out: str) -> None:
        (tmp_path / "file").touch()
        result = kvt("look", VISION, "--out", str(tmp_path / out))
        assert result.code == 2
        assert "--out" in result.err

    @pytest.mark.parametrize(
        ("text", "query"), [("cls", "cls"), ("center", "center"), ("7", 7), ("3,4", (3, 4)), ("3, 4", (3, 4))], ids=str
    )
    def test_query(self, text: str, query: Any) -> None:
        assert parse_query(text) == query

    @pytest.mark.parametrize("text", ["", "-1", "1.5", "1,2,3", "CLS "], ids=repr)
    def test_no_query(self, text: str) -> None:
        with pytest.raises(UserError, match="--query"):
            parse_query(text)
