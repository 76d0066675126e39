"""What a calibration chose and measured, as facts: frozen dataclasses of text and numbers.

The views (show.py) take `Calibration`; `CalibratedPolicy` (policy.py) is that, as a mapping for `topk` and as a file.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvt_compile.topk import TopK, resolve


@dataclass(frozen=True)
class SiteCurve:
    """One attention: the k it got, and what every k of the grid would do to it, on the measured examples."""

    path: str
    keys: int
    """The most keys it had."""
    topk: TopK
    mass: tuple[float, ...]
    """Mean attention mass inside the k largest, along the grid."""
    error: tuple[float, ...]
    """Relative error of the attention's own output."""
    model_error: tuple[float, ...]
    """Predicted relative error of the model's output if this attention alone is reduced: error x what it was measured
    to make of an error here."""
    checked_mass: float
    """Mean mass at its k on the checked examples, with every other attention reduced as well."""
    checked_mass_bound: float
    """What that mean is at least, with the policy's confidence for all attentions together."""


@dataclass(frozen=True)
class Check:
    """The whole policy on examples that had no part in measuring."""

    examples: int
    cosine: float
    """Mean over examples of the cosine between the model's output with this policy and with all keys."""
    cosine_bound: float
    """What that mean is at least, with the policy's confidence."""
    cosine_worst: float
    error: float
    """Mean relative error of the model's output."""


class Checked:
    """What a calibration of any kind says of itself; its fields are those of the dataclasses below."""

    budget: str
    value: float
    sites: tuple[SiteCurve, ...] | tuple[SelectionCurve, ...]
    check: Check

    @property
    def ratio(self) -> float:
        """Average over attentions of the share of keys that is kept."""
        raise NotImplementedError

    @property
    def met(self) -> bool:
        """Whether the check found the budget met, margin included."""
        if self.budget == "mass":
            return all(site.checked_mass_bound >= self.value for site in self.sites)
        return self.check.cosine_bound >= self.value if self.budget == "cosine" else self.ratio <= self.value + 1e-9

    @property
    def summary(self) -> str:
        """One line: the budget, what the check found, and what it costs."""
        c = self.check
        return (
            f"{self.budget} {self.value:g}: {self.ratio:.1%} of the keys kept on average; on {c.examples} "
            f"examples not measured on, output cosine {c.cosine:.6f} "
            f"(at least {c.cosine_bound:.6f}, worst {c.cosine_worst:.6f})"
        )


@dataclass(frozen=True)
class Calibration(Checked):
    """A k per attention, the budget it was chosen for, and what was measured."""

    budget: str
    """"mass", "cosine" or "ratio"."""
    value: float
    confidence: float
    grid: tuple[TopK, ...]
    sites: tuple[SiteCurve, ...]
    check: Check
    trail: tuple[tuple[float, float, float], ...] = ()
    """Policies that were tried on the way: (average ratio, mean cosine, relative error), in rising order."""

    @property
    def ratio(self) -> float:
        """Average over attentions of the share of keys that is kept."""
        return sum(resolve(site.topk, site.keys) / site.keys for site in self.sites) / max(len(self.sites), 1)


@dataclass(frozen=True)
class SelectionCurve:
    """One attention: the selection it got, and what every selection that was tried would do to it.

    Tuples are along `choices`."""

    path: str
    keys: int
    """The most keys it had."""
    grid: str
    """Where its tokens stand: `64x64 + 1`."""
    select: str | None
    """None: it stays dense."""
    choices: tuple[str | None, ...]
    seconds: tuple[float, ...]
    """Of the attention itself, for the batch that was timed."""
    kept: tuple[float, ...]
    """Share of the keys."""
    mass: tuple[float, ...]
    """Mean attention mass of the kept keys."""
    error: tuple[float, ...]
    """Relative error of the attention's own output."""
    model_error: tuple[float, ...]
    """Predicted relative error of the model's output if this attention alone is reduced."""
    checked_mass: float
    """Mean mass at its selection on the checked examples, with every other attention reduced as well."""
    checked_mass_bound: float

    @property
    def chosen(self) -> int:
        """The number of its selection among the choices."""
        return self.choices.index(self.select)


@dataclass(frozen=True)
class Speed:
    """The whole model as it is captured, timed on the machine that calibrated it."""

    examples: int
    threads: int
    device: str
    dense: float
    """Seconds for so many examples."""
    saved: float
    """Seconds that its attentions save, by what each of them takes alone."""
    selected: float
    """Seconds with the policy."""

    @property
    def predicted(self) -> float:
        """How many times as fast it should be with the policy."""
        return self.dense / max(self.dense - self.saved, 1e-12)

    @property
    def measured(self) -> float:
        """How many times as fast it is."""
        return self.dense / max(self.selected, 1e-12)


@dataclass(frozen=True)
class SelectionCalibration(Checked):
    """A selection per attention, the budget it was chosen for, and what was measured."""

    budget: str
    """"mass", "cosine" or "ratio"."""
    value: float
    confidence: float
    sites: tuple[SelectionCurve, ...]
    check: Check
    speed: Speed | None = None
    """None where the model is no single graph."""
    left: tuple[tuple[str, str], ...] = ()
    """Attentions that stay dense whatever is chosen, and why."""
    trail: tuple[tuple[float, float, float], ...] = ()
    """Policies that were tried on the way: (average cost, mean cosine, relative error), in rising order."""

    @property
    def ratio(self) -> float:
        """Average over attentions of the share of keys that is kept."""
        return sum(site.kept[site.chosen] for site in self.sites) / max(len(self.sites), 1)

    @property
    def summary(self) -> str:
        """One line: the budget, what the check found, and what it gains."""
        times = "no single graph, so it was not timed as a whole"
        if (s := self.speed) is not None:
            times = (
                f"the model {s.measured:.2f} times as fast as dense ({s.predicted:.2f} predicted from its attentions; "
                f"{s.examples} examples, {s.device}, {s.threads} threads)"
            )
        return f"{super().summary}; {times}"
