"""What a verification found, as facts: a `Difference` for each comparison, a `SiteCheck` for each attention.

The views (show.py) take `Findings`; `Verification` (verify.py) is that with all views of it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """The tensor that came nearest to its budget, or went furthest over it."""

    name: str
    """`output['logits']`, `gradient of blocks.0.attn.qkv.weight`, `buffer norm.running_mean afterwards`."""
    error: float
    """Largest difference from float64, relative to the largest value of the tensor; infinite where the shape, the
    dtype, an integer, an infinity or the presence of a gradient differs."""
    budget: float
    """How far it may be: a few times as far as the dense model itself is from float64."""
    found: str = ""
    """The value where it is worst, or what else is wrong, with ..."""
    expected: str = ""
    """... what should be there."""
    at: tuple[int, ...] = ()
    """The element that is worst."""
    bits: int = 32
    """64 where only float64 could say: rounding sends the model another way (a choice, a kink), or the dtype is a short
    one.  The site itself was then compared in the model's own dtype with float64 on the same inputs."""

    certain: bool = False
    """Whether no rounding explains it: names, dtypes, which gradients there are."""

    @property
    def ok(self) -> bool:
        return self.error <= self.budget

    def __str__(self) -> str:
        place = f"{list(self.at)}" if self.at else ""
        return (
            f"{self.name}{place}: expected {self.expected}, found {self.found} "
            f"(error {self.error:.1e}, budget {self.budget:.1e})"
        )


@dataclass(frozen=True)
class SiteCheck:
    """One attention at k = N, everything else dense."""

    module: str
    """Module path; empty at the top level."""
    location: str
    """`file:line` of the model."""
    outcome: str
    """"fused" or "scores-kept"."""
    keys: int | str
    worst: Difference

    @property
    def ok(self) -> bool:
        return self.worst.ok


@dataclass(frozen=True)
class Findings:
    """One model on one set of inputs."""

    sites: tuple[SiteCheck, ...]
    """In the order the model runs them."""
    together: Difference | None
    """Every site at k = N at once; None where no attention is rewritten."""
    dropped: tuple[str, ...] = ()
    """What torch.compile would run dense without a word: one sentence each."""
    left: tuple[tuple[str, str], ...] = ()
    """(module path, reason) of every softmax and attention that stays as it is."""
    gradients: bool = False
    """Whether gradients were compared as well."""
    bite: float | None = None
    """How far the outputs move when each query keeps one key, relative: what the comparison is able to notice."""
    reproduction: str | None = None
    """Path of the file that reproduces the first failure."""
    note: str = ""
    """What a reader should know about how it was run."""

    @property
    def ok(self) -> bool:
        """Whether everything that is rewritten is within its budget, and nothing was dropped."""
        return not self.dropped and (self.together is None or self.together.ok) and all(site.ok for site in self.sites)

    @property
    def first(self) -> SiteCheck | None:
        """The first attention that is over its budget."""
        return next((site for site in self.sites if not site.ok), None)
