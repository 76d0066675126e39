"""Lets PyPI's torchvision import beside a CPU-only torch: import this before torchvision, timm or transformers.

PyPI's torchvision wheel is built for CUDA.  Beside a CPU-only torch its compiled part does not load, and then
`import torchvision` ends in "operator torchvision::nms does not exist", because it describes two operators that were
never declared.  Declaring them is all that `torchvision.models` and `torchvision.transforms` need; calling them still
fails, as it should.  Where the compiled part loads, nothing is done.
"""

from importlib.util import find_spec
from pathlib import Path

import torch


def compiled_part_loads() -> bool:
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # no torchvision: nothing to mend
    try:
        for file in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(file))
    except OSError:
        return False
    return True


if not compiled_part_loads():
    library = torch.library.Library("torchvision", "DEF")  # kept alive by this module: it undeclares when it goes
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
