"""A selector that is learned: small predictors say which keys a query keeps, and are trained to say it well.

    python examples/learned_selector.py             ten seconds
    python examples/learned_selector.py --small     three epochs (what the tests run)

As in Sparsifiner (CVPR 2023), scores of rank 2 stand in for those of q and k, and of each row the keys with the best 4
of them are kept: `given(predictor) & topk(4)`.  The kept keys have the model's own scores.  No gradient flows through a
choice, so a predictor has a loss of its own: its scores, as weights, are to be the dense attention's.

At the end the predictors go into the dense model, which knows nothing of them: `rewrite(model, images, select=...)`, a
predictor for each block by its path.

This shows how a selector is trained and judged, on 17 tokens.  It is no faster than dense attention: a map of all pairs
is made, and decides after the scores are there.
"""

import copy
import sys

import digits
import torch
from torch import Tensor, nn

import kvt_compile
from kvt_compile import select

KEEP, RANK = 4, 2


class Predictor(nn.Module):
    """q, k [B, H, N, D] -> scores [B, H, N, N], by RANK features of each."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.of_q, self.of_k = (nn.Linear(features, RANK, bias=False) for _ in range(2))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return self.of_q(q) @ self.of_k(k).transpose(-2, -1)


class Selected(nn.Module):
    """A block of the dense model with another attention: which keys are kept is set from outside."""

    def __init__(self, block: digits.Block) -> None:
        super().__init__()
        self.block = block
        self.predictor = Predictor(block.qkv.in_features // block.heads)
        self.select: select.Selector | str = "topk(1.0)"
        self.seen: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        block, (batch, tokens, width) = self.block, x.shape
        qkv = block.qkv(block.norm1(x)).reshape(batch, tokens, 3, block.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        self.seen = q.detach(), k.detach()
        out = kvt_compile.attention(q, k, v, select=self.select)
        x = x + block.proj(out.transpose(1, 2).reshape(batch, tokens, width))
        return x + block.mlp(block.norm2(x))

    def weights(self) -> Tensor:
        """Those of dense attention, of the last call's queries and keys."""
        q, k = self.seen
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)

    def loss(self) -> Tensor:
        """How far the predicted weights are from those: their cross-entropy."""
        return -(self.weights() * self.predictor(*self.seen).log_softmax(-1)).sum(-1).mean()

    @torch.no_grad()
    def held(self) -> float:
        """Which share of the dense weights stands on the keys that the predictor would keep."""
        best = self.predictor(*self.seen).topk(KEEP, dim=-1).indices
        return self.weights().gather(-1, best).sum(-1).mean().item()


def judge(
    model: nn.Module, blocks: list[Selected], images: Tensor, labels: Tensor, learned: bool
) -> tuple[float, float]:
    """Accuracy with the best keys of a predictor or of the true scores, and the share of weights a predictor holds."""
    for block in blocks:
        block.select = select.given(block.predictor) & select.topk(KEEP) if learned else f"topk({KEEP})"
    accuracy = digits.accuracy(model, images, labels)
    return accuracy, sum(block.held() for block in blocks) / len(blocks)


def main(small: bool = False) -> None:
    model, data = digits.trained(epochs=3 if small else 15)
    dense, plain = digits.accuracy(model, *data.test), copy.deepcopy(model)
    blocks = [Selected(block) for block in model.blocks]
    model.blocks = nn.ModuleList(blocks)
    assert abs(digits.accuracy(model, *data.test) - dense) < 0.01  # topk(1.0) is dense attention

    exact, _ = judge(model, blocks, *data.test, learned=False)
    untrained, held_before = judge(model, blocks, *data.test, learned=True)

    for block in blocks:
        block.select = "topk(1.0)"  # predictors learn from the dense model
    predictors = nn.ModuleList(block.predictor for block in blocks)
    optimiser = torch.optim.AdamW(predictors.parameters(), lr=1e-2)
    for epoch in range(3 if small else 10):
        for batch in torch.randperm(len(data.train[0])).split(50):
            with torch.no_grad():
                model(data.train[0][batch])
            loss = sum(block.loss() for block in blocks)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        print(f"epoch {epoch}: loss {loss.item() / len(blocks):.3f}")

    trained, held_after = judge(model, blocks, *data.test, learned=True)
    print(f"{dense:6.1%} of the test images: dense, 17 keys")
    print(f"{exact:6.1%} the {KEEP} best keys by their scores")
    print(
        f"{untrained:6.1%} {KEEP} keys by predictors that learned nothing, which hold {held_before:.1%} of the weights"
    )
    print(f"{trained:6.1%} {KEEP} keys by trained predictors, which hold {held_after:.1%}")
    assert held_after > held_before + 0.1
    assert trained > untrained

    by_site = {f"blocks.{n}": select.given(block.predictor) & select.topk(KEEP) for n, block in enumerate(blocks)}
    result = kvt_compile.rewrite(plain, data.test[0][:2], select=by_site)
    print(result.report)
    rewritten = digits.accuracy(result.module.eval(), *data.test)
    print(f"{rewritten:6.1%} by trained predictors in the dense model, rewritten")
    assert abs(rewritten - trained) < 0.01


if __name__ == "__main__":
    main(small="--small" in sys.argv)
