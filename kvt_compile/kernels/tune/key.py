"""What a measured result holds for: GPU, kernel, Triton version, class of shapes.

    Nq = 197, Nk = 197, B*H = 128*12, k = 99   ->   queries 224, keys 224, heads 1024, kept 5 (eighths of the keys)

Sizes are rounded up so that neighbours share a result: Nq and Nk to a quarter of a power of two (at most 25 % more, so
that 197 and 256 stay apart), B*H to a power of two and at most 1024 (more of them only repeat what fills a GPU).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch

MOST_HEADS = 1024
SHARES = 8


def digest(*texts: str) -> str:
    """16 hexadecimal digits of SHA-256: a kernel's hash from its source, template or description."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def round_up(n: int) -> int:
    """n >= 0 to the next of 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ...: quarters of a power of two."""
    step = 1 << max((n - 1).bit_length() - 3, 0) if n > 0 else 1
    return -(-n // step) * step


@dataclass(frozen=True)
class ShapeClass:
    """Shapes that share a result; each number is the largest of its class."""

    queries: int
    keys: int
    heads: int
    """B * Hq, at most MOST_HEADS."""
    kept: int
    """Keys kept in eighths of all keys, 1 to 8."""

    @classmethod
    def of(cls, queries: int, keys: int, heads: int, topk: int) -> ShapeClass:
        """The class of Nq, Nk, B*Hq and k."""
        share = -(-SHARES * min(topk, keys) // max(keys, 1))
        power = 1 << max(heads - 1, 0).bit_length()
        return cls(round_up(queries), round_up(keys), min(power, MOST_HEADS), max(share, 1))

    def __str__(self) -> str:
        return f"Nq≤{self.queries} Nk≤{self.keys} B·H≤{self.heads} k≤{self.kept}/{SHARES}"


@dataclass(frozen=True)
class Key:
    """The whole key.  Everything is text or a number, so it stands in the file as it is."""

    device: str
    """The GPU's name as its driver tells it: "NVIDIA H200"."""
    capability: str
    """"9.0", or the architecture's name on ROCm: "gfx942"."""
    kernel: str
    """Hash of what the kernel is generated from (`digest`); no driver version, no path."""
    part: str
    """"forward", "backward_q", ..."""
    triton: str
    """Version of the compiler of kernels."""
    shape: ShapeClass
    description: str = field(default="", compare=False)
    """The kernel for a person who reads the file; not part of the key."""

    @classmethod
    def on(
        cls, device: torch.device, *, kernel: str, part: str, triton: str, shape: ShapeClass, description: str = ""
    ) -> Key:
        """The key on a device of this machine."""
        return cls(*_identity(device), kernel, part, triton, shape, description)

    @cached_property
    def folder(self) -> str:
        """The name of the GPU's folder: "nvidia-h200-9.0"."""
        return slug(f"{self.device} {self.capability}")

    @cached_property
    def name(self) -> str:
        """The file's name without its ending, readable as far as it goes: "forward-224x224-1f0c..."."""
        data = self.to_dict()
        data.pop("description")
        text = json.dumps(data, sort_keys=True)
        return f"{slug(self.part)}-{self.shape.queries}x{self.shape.keys}-{digest(text)}"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Key:
        """Raises ValueError naming the field that is missing or wrong."""
        values = checked(data, {f.name: str for f in dataclasses.fields(cls)} | {"shape": dict}, "key")
        shape = checked(values["shape"], {f.name: int for f in dataclasses.fields(ShapeClass)}, "key.shape")
        return cls(**{**values, "shape": ShapeClass(**shape)})


def checked(data: Any, types: Mapping[str, type], what: str) -> dict[str, Any]:
    """`data` as a dictionary with exactly these fields of these types.  Raises ValueError naming the field."""
    if not isinstance(data, dict):
        raise ValueError(f"{what} is {type(data).__name__}, expected an object")
    for name in data:
        if name not in types:
            raise ValueError(f"{what} has an unknown field {brief(name)}")
    for name, kind in types.items():
        if name not in data:
            raise ValueError(f"{what} has no field {name!r}")
        if not isinstance(data[name], kind) or isinstance(data[name], bool):
            raise ValueError(f"{what}.{name} is {brief(data[name])}, expected {_NAMES.get(kind, kind.__name__)}")
    return dict(data)


def brief(value: Any) -> str:
    """How a value looks, for a message: as much of it as fits into a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


_NAMES: dict[type, str] = {str: "text", int: "a whole number", dict: "an object", list: "a list"}


def slug(text: str) -> str:
    """For a file's name: lower case, everything but letters, digits, dots and underscores to hyphens."""
    return re.sub(r"[^a-z0-9._]+", "-", text.lower())[:80].strip("-.") or "unnamed"


@lru_cache(maxsize=64)
def _identity(device: torch.device) -> tuple[str, str]:
    if device.type != "cuda":
        return device.type, ""
    properties: Any = torch.cuda.get_device_properties(device)
    architecture = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
    return properties.name, architecture.split(":")[0] or f"{properties.major}.{properties.minor}"
