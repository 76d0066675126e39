"""`kvt calibrate`: its inputs, what it writes, and that a user's mistake is one sentence and exit code 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import skimage.io
import torch
from cli_result import Result
from factories import many
from places import FACTORIES

from kvt_compile import CalibratedPolicy
from kvt_compile.cli.data import read
from kvt_compile.cli.spec import load
from kvt_compile.cli.subject import Subject, Wanted

MANY = f"{FACTORIES}:many"
Kvt = Callable[..., Result]


def test_policy_table_and_plot(kvt: Kvt, tmp_path: Path) -> None:
    out, plot = tmp_path / "policy.json", tmp_path / "curves.png"
    result = kvt("calibrate", MANY, "--mass", "0.9", "--batch-size", "12", "--out", str(out), "--plot", str(plot))
    assert result.code == 0, result.err
    assert "blocks.0" in result.out
    assert "mass 0.9: " in result.out
    policy = CalibratedPolicy.load(out)
    assert list(policy) == ["blocks.0", "blocks.1"]
    assert policy.met
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_weights_and_json(kvt: Kvt, tmp_path: Path) -> None:
    model, (x,) = many()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    numpy.savez(tmp_path / "data.npz", x=x.double().numpy())
    more = ("--weights", f"{tmp_path}/weights.pt", "--data", f"{tmp_path}/data.npz", "--examples", "16", "--json")
    result = kvt("calibrate", MANY, "--ratio", "0.5", *more)
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert data["budget"] == "ratio"
    assert data["check"]["examples"] == 8


class TestData:
    def subject(self) -> Subject:
        return load(f"{FACTORIES}:tiny_images", Wanted())

    def folder(self, path: Path) -> Path:
        for n, shape in enumerate([(8, 12, 3), (20, 9, 3), (16, 16)]):
            skimage.io.imsave(path / f"{n}.png", numpy.full(shape, 255, numpy.uint8), check_contrast=False)
        (path / "notes.txt").write_text("not an image")
        return path

    def test_folder_of_images_of_any_size(self, tmp_path: Path) -> None:
        ((x,), kwargs) = read(str(self.folder(tmp_path)), self.subject(), 64)
        assert x.shape == (3, 3, 8, 8)
        assert kwargs == {}
        white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
        torch.testing.assert_close(x, white.view(1, 3, 1, 1).expand(3, 3, 8, 8))
        assert read(str(tmp_path), self.subject(), 2)[0][0].shape[0] == 2

    def test_arrays(self, tmp_path: Path) -> None:
        x = numpy.zeros((5, 3, 8, 8))
        file = tmp_path / "data.npz"
        numpy.savez(file, pixels=x)
        assert list(read(str(file), self.subject(), 4)[1]) == ["pixels"]
        assert read(str(file), self.subject(), 4)[1]["pixels"].dtype == torch.float32
        numpy.savez(file, x)
        assert read(str(file), self.subject(), 4)[0][0].shape == (4, 3, 8, 8)


MISTAKES: list[tuple[str, list[str], str]] = [
    ("no budget", [MANY], "one budget of mass, cosine and ratio"),
    ("two budgets", [MANY, "--mass", "0.9", "--ratio", "0.5"], "found mass and ratio"),
    ("mass out of range", [MANY, "--mass", "1.5"], "(0, 1]"),
    ("mass nan", [MANY, "--mass", "nan"], "(0, 1]"),
    ("too few examples", [f"{FACTORIES}:stack", "--mass", "0.9"], "give at least 8"),
    ("named model without data", ["timm:vit_tiny_patch16_224", "--mass", "0.9"], "--data is missing"),
    ("data is not there", [MANY, "--mass", "0.9", "--data", "nowhere"], "no file or folder 'nowhere'"),
    ("data of another kind", [MANY, "--mass", "0.9", "--data", FACTORIES], "neither a folder of images nor an .npz"),
    ("images for a model without", [MANY, "--mass", "0.9", "--data", str(Path(FACTORIES).parent)], "takes no image"),
    ("no images", [f"{FACTORIES}:tiny_images", "--mass", "0.9", "--data", str(Path(FACTORIES).parent)], "no image in"),
    ("out in no folder", [MANY, "--mass", "0.9", "--out", "nowhere/policy.json"], "--out: there is no folder"),
    ("plot in no folder", [MANY, "--mass", "0.9", "--plot", "nowhere/a.png"], "--plot: there is no folder"),
    ("no such weights", [MANY, "--mass", "0.9", "--weights", "nowhere.pt"], "no file 'nowhere.pt'"),
    ("weights that are none", [MANY, "--mass", "0.9", "--weights", FACTORIES], "--weights: "),
    ("pattern", [MANY, "--mass", "0.9", "--include", "layers.*"], "matches no attention site"),
]


@pytest.mark.parametrize(("arguments", "says"), [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES])
def test_mistake_is_one_sentence_and_exit_code_2(kvt: Kvt, arguments: list[str], says: str) -> None:
    result = kvt("calibrate", *arguments)
    assert result.code == 2
    assert result.out == ""
    sentence = result.err.strip().splitlines()[-1]
    assert sentence.startswith("kvt: ")
    assert says in sentence


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: (path / "a.png").write_bytes(b"no picture"), "a.png' cannot be read as an image"),
        (lambda path: numpy.savez(path.parent / "x.npz", strange=[1], other=[2]), "no argument of the model: pixels"),
        (lambda path: (path.parent / "x.npz").write_bytes(b"no archive"), "cannot be read"),
    ],
    ids=["image", "names", "archive"],
)
def test_unreadable_data_is_named(kvt: Kvt, tmp_path: Path, write: Any, says: str) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    write(folder)
    data = folder if list(folder.iterdir()) else tmp_path / "x.npz"
    result = kvt("calibrate", f"{FACTORIES}:tiny_images", "--mass", "0.9", "--data", str(data))
    assert result.code == 2
    assert says in result.err
    assert "Traceback" not in result.err
