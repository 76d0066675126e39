"""k per attention by a rule of your own: a function of what is known about a site, or a mapping of module paths.

python examples/own_policy.py
"""

import re

import digits
import torch

import kvt_compile
from kvt_compile.passes.site import AttentionSite


def deeper_is_sparser(site: AttentionSite) -> float | None:
    """All keys in the first block, then fewer and fewer; short rows are left alone, for there is nothing to win.

    A site knows its module path, file and line (`site.where`), its sizes (`site.queries`, `site.keys`, `site.heads`,
    ...; the text of a symbol where they are dynamic), its score expression and its dtype.
    """
    if isinstance(site.keys, int) and site.keys < 8:
        return None  # leave it dense
    depth = int(re.search(r"blocks\.(\d+)", site.where.module)[1])
    return [1.0, 0.5, 0.25][depth]


def main() -> None:
    torch.manual_seed(0)
    model, images = digits.DigitsViT().eval(), digits.load().test[0][:2]

    report = kvt_compile.explain(model, images, topk=deeper_is_sparser)
    print(report)
    assert [site.topk for site in report.sites] == [None, 9, 5]  # of 17; the first keeps all and stays dense

    # a mapping does for the same, where the paths are known: the first pattern that matches counts
    same = kvt_compile.rewrite(model, images, topk={"blocks.0": None, "blocks.1": 0.5, "*": 0.25})
    other = kvt_compile.rewrite(model, images, topk=deeper_is_sparser)
    torch.testing.assert_close(same.module(images), other.module(images))

    # and a schedule: k may change on a rewritten module while it trains, without capturing it again
    for epoch, share in enumerate((0.75, 0.5, 0.25)):
        kvt_compile.set_topk(same.module, {"blocks.1": share})
        same.module(images)
        print(f"epoch {epoch}: blocks.1 keeps {share:.0%} of its keys")


if __name__ == "__main__":
    main()
