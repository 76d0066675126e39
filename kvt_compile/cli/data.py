"""--data -> one batch of inputs for a model.

folder of images   resized to the model's own size and normalised as it was trained, [n, C, H, W]
file.npz           arrays named as the arguments of `forward`, or a single array, or arr_0, arr_1, ... in order
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvt_compile.cli.errors import UserError, in_one_line
from kvt_compile.cli.subject import Subject, library

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"})
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def read(name: str, subject: Subject, examples: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) with at most so many examples.  Raises UserError that names the file and what is wrong with it."""
    path = Path(name)
    if path.is_dir():
        return _images(path, subject, examples)
    if not path.is_file():
        raise UserError(f"--data: there is no file or folder {name!r}")
    if path.suffix != ".npz":
        raise UserError(f"--data: {name!r} is neither a folder of images nor an .npz file")
    return _arrays(path, subject, examples)


def _images(folder: Path, subject: Subject, examples: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    names, samples = ["", *subject.kwargs], [subject.args[0] if subject.args else None, *subject.kwargs.values()]
    at = next((n for n, x in enumerate(samples) if isinstance(x, Tensor) and x.dim() == 4), None)
    if at is None:
        raise UserError("--data is a folder of images, but the model takes no image [batch, channels, height, width]")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)[:examples]
    if not files:
        raise UserError(f"--data: there is no image in {str(folder)!r} (looked for {', '.join(sorted(SUFFIXES))})")
    sample = samples[at]
    assert isinstance(sample, Tensor)
    _, channels, height, width = sample.shape
    mean, std = (torch.tensor(values) for values in _normalisation(subject.model, channels))
    pixels = torch.stack([_image(file, channels, height, width) for file in files])
    batch = ((pixels - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)).to(sample.dtype)
    return ((batch,), {}) if at == 0 else ((), {names[at]: batch})


def _image(file: Path, channels: int, height: int, width: int) -> Tensor:
    """[C, H, W] in [0, 1]: the shorter side is scaled to fit, the middle is cut out."""
    image = library("PIL.Image")
    numpy = library("numpy")
    try:
        with image.open(file) as opened:
            picture = opened.convert("L" if channels == 1 else "RGB")
    except Exception as error:
        raise UserError(f"--data: {str(file)!r} cannot be read as an image: {in_one_line(error)}") from error
    scale = max(height / picture.height, width / picture.width)
    size = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    picture = picture.resize(size).crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(numpy.asarray(picture).copy()).float() / 255
    return pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1)


def _normalisation(model: nn.Module, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """timm's models say how they were trained; ImageNet's mean and deviation otherwise."""
    config = getattr(model, "pretrained_cfg", None) or {}
    mean, std = config.get("mean", IMAGENET[0]), config.get("std", IMAGENET[1])
    return (tuple(mean), tuple(std)) if len(mean) == channels else ((0.5,) * channels, (0.5,) * channels)


def _arrays(path: Path, subject: Subject, examples: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    numpy = library("numpy")
    try:
        with numpy.load(path) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    except Exception as error:
        raise UserError(f"--data: {str(path)!r} cannot be read: {in_one_line(error)}") from error
    if not arrays:
        raise UserError(f"--data: {str(path)!r} holds no array")
    count = next(iter(arrays.values())).shape[0] if next(iter(arrays.values())).dim() else 0
    known = inspect.signature(subject.model.forward).parameters
    samples = [x for x in (*subject.args, *subject.kwargs.values()) if isinstance(x, Tensor)]
    wide = any(x.dtype == torch.float64 for x in samples)

    def fit(x: Tensor) -> Tensor:
        x = x[:examples] if x.dim() and x.shape[0] == count else x
        return x.float() if x.dtype == torch.float64 and not wide else x

    if all(name in known for name in arrays):
        return (), {name: fit(x) for name, x in arrays.items()}
    if len(arrays) == 1 or list(arrays) == [f"arr_{n}" for n in range(len(arrays))]:
        return tuple(fit(x) for x in arrays.values()), {}
    strange = next(name for name in arrays if name not in known)
    raise UserError(
        f"--data: {str(path)!r} has an array {strange!r}, which is no argument of the model: {', '.join(known)}"
    )
