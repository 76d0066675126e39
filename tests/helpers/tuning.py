"""What tests of the autotuner share: a candidate, a clock that tests set, a key."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvt_compile.kernels.tune import Key, ShapeClass, Tuner
from kvt_compile.kernels.tune.progress import Step
from kvt_compile.kernels.tune.store import Store


@dataclass(frozen=True)
class Block:
    """A candidate with one number."""

    rows: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Block:
        if not isinstance(data.get("rows"), int):
            raise ValueError(f"rows is {data.get('rows')!r}, expected a whole number")
        return cls(data["rows"])


@dataclass
class FakeClock:
    """Time passes only in runs: each returns how many milliseconds it took."""

    seconds: float = 0.0
    calls: list[float] = field(default_factory=list)

    def now(self) -> float:
        return self.seconds

    def milliseconds(self, run: Callable[[], object]) -> float:
        took = run()
        assert isinstance(took, float)
        self.calls.append(took)
        self.seconds += took / 1e3
        return took


KEY = Key("NVIDIA Test 9000", "9.0", "0123456789abcdef", "forward", "3.7.1", ShapeClass.of(197, 197, 24, 99), "0.125*s")
DEFAULT = Block(64)
CANDIDATES = (Block(16), Block(32), Block(64), Block(128))


def speed(candidate: Block) -> Callable[[], float]:
    """32 is the fastest: 1 ms; 64 takes 1.5, 16 2, 128 3."""
    took = {16: 2.0, 32: 1.0, 64: 1.5, 128: 3.0}[candidate.rows]
    return lambda: took


def tuner_of(store: Store, **options: Any) -> tuple[Tuner, list[Step]]:
    """A tuner over a store, and the steps it tells."""
    steps: list[Step] = []
    return Tuner(store, **{"progress": steps.append, "capturing": lambda: False, **options}), steps
