"""A model -> rewritten -> exported -> a file -> another process that has never seen the model's code.

python examples/rewrite_and_export.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import digits
import torch

import kvt_compile

ELSEWHERE = """
import sys, torch
import kvt_compile  # registers the kvt:: operators the file refers to

folder = sys.argv[1]
module = torch.export.load(f"{folder}/model.pt2").module()
images, expected = torch.load(f"{folder}/case.pt")
torch.testing.assert_close(module(images), expected)
print("loaded in another process: the same result")
"""


def main(small: bool = False) -> None:
    model, data = digits.trained(epochs=1 if small else 5)
    images = data.test[0][:8]

    # rewriting: the result is a module like any other, with the parameters and the state_dict of the original
    result = kvt_compile.rewrite(model, images, topk=0.5)
    print(result.report)
    assert list(result.module.state_dict()) == list(model.state_dict())

    # exporting: the operators stay in the program as they are; the batch may have any size
    batch = torch.export.Dim("batch", min=1, max=1024)
    with torch.no_grad():
        program = torch.export.export(result.module, (images,), dynamic_shapes=({0: batch},))
        expected = result.module(images[:3])
    operators = [node.target for node in program.graph.nodes]
    print(f"the exported program has {operators.count(torch.ops.kvt.attention.default)} kvt::attention")

    with tempfile.TemporaryDirectory() as folder:
        torch.export.save(program, Path(folder) / "model.pt2")
        torch.save((images[:3], expected), Path(folder) / "case.pt")
        subprocess.run([sys.executable, "-c", ELSEWHERE, folder], check=True)


if __name__ == "__main__":
    main()
