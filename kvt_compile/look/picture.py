"""A photograph -> the tensor a model takes, and the picture to draw on; a tensor -> a picture.

Pillow and NumPy are needed for photographs alone; both come with torchvision and timm.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet: what vision models expect that do not say otherwise."""


class ImageError(ValueError):
    """An image that cannot be read or used; the message says which and why."""


def open_image(path: str | PathLike[str]) -> Any:
    """A PIL image in RGB.  Raises ImageError in one sentence."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImageError("reading photographs needs Pillow; install it with: pip install pillow") from error
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise ImageError(f"there is no image {str(path)!r}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{str(path)!r} is not an image that Pillow can read") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"the image {str(path)!r} cannot be read: {error}") from error


def prepare(image: Any, model: nn.Module, size: tuple[int, int] | None = None) -> Tensor:
    """A PIL image -> `[1, 3, height, width]`, scaled and cropped to `size` (default: the model's own, else 224 x 224)
    and normalised as timm's configuration of the model says (else as for ImageNet)."""
    import numpy

    height, width = size or model_size(model)
    scale = max(height / image.height, width / image.width)
    scaled = image.resize((max(width, round(image.width * scale)), max(height, round(image.height * scale))), 3)
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    pixels = numpy.array(scaled.crop((left, top, left + width, top + height)))
    mean, std = _normalisation(model)
    return ((torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - mean) / std).unsqueeze(0)


def model_size(model: nn.Module) -> tuple[int, int]:
    """(height, width) of the images a timm or transformers model was made for; 224 x 224 where it does not say."""
    config = _timm_config(model)
    if "input_size" in config:
        embed = getattr(getattr(model, "patch_embed", None), "img_size", None)  # img_size= overrides the configuration
        height, width = embed or config["input_size"][1:]
        return int(height), int(width)
    size = getattr(getattr(model, "config", None), "image_size", None) or getattr(model, "image_size", None)
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, tuple | list) else (224, 224)


def _timm_config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "pretrained_cfg", None)
    return config if isinstance(config, dict) else {}


def _normalisation(model: nn.Module) -> tuple[Tensor, Tensor]:
    config = _timm_config(model)
    mean, std = (torch.tensor(config.get(name, other)).view(-1, 1, 1) for name, other in (("mean", MEAN), ("std", STD)))
    return mean, std


def picture(image: Tensor) -> Any:
    """`[C, H, W]` in any range -> an array `[H, W, 3]` in [0, 1] to draw on."""
    x = image.detach().float().cpu()
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    x = (x - low) / (high - low).clamp_min(1e-12)
    x = x[:3] if x.shape[0] >= 3 else x[:1].expand(3, -1, -1)
    return x.permute(1, 2, 0).numpy()
