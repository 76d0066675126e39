"""Looks at what would become of a model: the table, the data behind it, the generated code, a page to click through.

python examples/inspect_model.py          writes digits.html
"""

import json
import sys
from pathlib import Path

import digits

import kvt_compile


def main(small: bool = False, page: Path = Path("digits.html")) -> None:
    model, images = digits.DigitsViT(), digits.load().test[0][:2]

    # nothing is changed, compiled or rewritten by looking
    report = kvt_compile.explain(model, images, topk=0.5)
    print(report)

    # the same for programs
    first = report.to_dict()["sites"][0]
    print(json.dumps({key: first[key] for key in ("module", "location", "outcome", "topk", "score", "keys")}, indent=2))
    assert report.counts == {"sites": 3, "fused": 3, "scores-kept": 0, "dense": 0, "refusals": 0}

    # the code that will run a site
    source = report.kernel_source("blocks.0")
    print("\n".join(source.splitlines()[: 3 if small else 30]))

    report.to_html(page, title="a small vision transformer")
    print(f"everything else is in {page}")


if __name__ == "__main__":
    main(small="--small" in sys.argv)
