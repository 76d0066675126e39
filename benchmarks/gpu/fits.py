"""Exit code 0 where this Python runs `make gpu` as it is: a GPU, a torch built for one, and all that the project
imports.

Standard library only, and nothing heavy is imported: the environment of tools/python needs a network, and a machine
with a GPU may have none.
"""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

NEEDED = (
    "torch",
    "triton",
    "networkx",
    "sympy",
    "jinja2",
    "markupsafe",
    "pygments",
    "rich",
    "typer",
    "pip",
    "setuptools",
)


def complaint() -> str:
    """What is missing; empty where nothing is."""
    absent = [name for name in NEEDED if find_spec(name) is None]
    return f"{', '.join(absent)} cannot be imported" if absent else no_gpu()


def no_gpu() -> str:
    """Why no GPU is used; empty where one is."""
    if not Path("/dev/nvidiactl").exists() and not Path("/dev/nvidia0").exists():
        return "there is no NVIDIA GPU"
    spec = find_spec("torch")
    text = Path(spec.origin).with_name("version.py").read_text() if spec and spec.origin else ""
    return "" if re.search(r"^cuda\b.*= *['\"]\d", text, re.M) else "its torch is not built for CUDA"


if __name__ == "__main__":
    sys.exit(complaint() or 0)
