"""Coordinates: where an element of one tensor comes from in another, exactly.

A dimension's coordinate is written in mixed radix over *atoms*, independent counters with known sizes:

    (B*nW, H, N, N)  ->  [(b, w), (h), (i), (j)]     value of the first coordinate = b*nW + w

Permuting moves coordinates, reshaping regroups the digits (splitting an atom where a border falls inside it),
broadcasting drops them, slicing adds a start.  Every atom is split globally, so two readings of different tensors in
one `Space` always speak of the same counters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sympy

from kvt_compile.kernels.language.score import floordiv, mod
from kvt_compile.passes.canonical.values import Dim, divide, product, same


@dataclass(frozen=True)
class Derived:
    """Why a derived atom exists: its value is (value(of) - start) // step, inside of a slice that was written to."""

    of: Coord
    start: Dim
    step: int = 1


@dataclass(frozen=True, eq=False)
class Atom:
    """A counter 0 <= value < size.  Identity is identity of the object."""

    name: str
    size: Dim
    derived: Derived | None = None
    fixed: int | None = None
    """Its value, for a coordinate that is a constant (`x[:, 0]`)."""

    def __repr__(self) -> str:
        return f"{self.name}<{self.size}>"


@dataclass(frozen=True)
class Coord:
    """start + step * (mixed-radix value of digits, most significant first); no digits and start 0 is a size-1 dim."""

    digits: tuple[Atom, ...] = ()
    start: int = 0
    step: int = 1

    @property
    def plain(self) -> bool:
        return self.start == 0 and self.step == 1


Coords = tuple[Coord, ...]
ZERO = Coord()


class Space:
    """The atoms of one reading and how they were split."""

    def __init__(self) -> None:
        self._split: dict[Atom, tuple[Atom, Atom]] = {}
        self._inside: dict[tuple[Coord, Dim, Dim, int], Coord] = {}
        self._constants: dict[tuple[Dim, int], Coord] = {}
        self._anywhere: dict[object, Coord] = {}

    def copy(self) -> Space:
        """A space that may be split further without this one noticing."""
        other = Space()
        other._split, other._inside = dict(self._split), dict(self._inside)
        other._constants, other._anywhere = dict(self._constants), dict(self._anywhere)
        return other

    def fresh(self, name: str, size: Dim) -> Coord:
        """A coordinate that runs over the whole of a dimension of this size."""
        return ZERO if size == 1 else Coord((Atom(name, size),))

    def anywhere(self, what: object, size: Dim) -> Coord:
        """The coordinate that stands for every element of a dimension `what`, the same one each time: a value that is
        reached on many ways through layers is then read once."""
        if what not in self._anywhere:
            self._anywhere[what] = self.fresh("any", size)
        return self._anywhere[what]

    def constant(self, size: Dim, value: int) -> Coord:
        """The coordinate that is always `value` in a dimension of this size."""
        if size == 1:
            return ZERO
        return self._constants.setdefault((size, value), Coord((Atom(f"#{value}", size, fixed=value),)))

    def known(self, coord: Coord) -> int | None:
        """The value of a coordinate that is constant."""
        total = 0
        for atom in self.resolve(coord).digits:
            if atom.fixed is None or not isinstance(atom.size, int):
                return None
            total = total * atom.size + atom.fixed
        return coord.start + coord.step * total

    def resolve(self, coord: Coord) -> Coord:
        """The coordinate in atoms that are not split any further."""
        if not any(a in self._split for a in coord.digits):
            return coord
        return Coord(tuple(self._leaves(coord.digits)), coord.start, coord.step)

    def resolve_all(self, coords: Iterable[Coord]) -> Coords:
        return tuple(self.resolve(c) for c in coords)

    def atoms_of(self, coords: Iterable[Coord]) -> set[Atom]:
        """Every atom that some of the coordinates run over."""
        return {a for c in self.resolve_all(coords) for a in c.digits}

    def _leaves(self, atoms: Iterable[Atom]) -> Iterable[Atom]:
        for atom in atoms:
            if atom in self._split:
                yield from self._leaves(self._split[atom])
            else:
                yield atom

    def size(self, coord: Coord) -> Dim:
        """How many values the coordinate takes."""
        return product(a.size for a in coord.digits)

    def covers(self, coord: Coord, size: Dim) -> bool:
        """Whether the coordinate runs over the whole of a dimension, in order."""
        whole = coord.plain and all(a.fixed is None for a in self.resolve(coord).digits)
        return whole and same(self.size(coord), size)

    def split(self, atom: Atom, low: Dim) -> bool:
        """Split an atom into (high, low) so that value = high*low_size + low; False when low does not divide it."""
        high = divide(atom.size, low)
        if high is None or atom in self._split:
            return False
        digits: tuple[int | None, int | None] = (None, None)
        if atom.fixed is not None:
            if not isinstance(low, int):
                return False
            digits = divmod(atom.fixed, low)
        self._split[atom] = (
            Atom(f"{atom.name}'", high, fixed=digits[0]),
            Atom(f"{atom.name}.", low, fixed=digits[1]),
        )
        return True

    def parent_of(self, atom: Atom) -> tuple[Atom, bool] | None:
        """(atom that was split, whether this is its high part), or None for a root."""
        for whole, (high, low) in self._split.items():
            if atom is high or atom is low:
                return whole, atom is high
        return None

    def root_of(self, atom: Atom) -> Atom:
        """The atom it was split from in the end, or itself."""
        while (parent := self.parent_of(atom)) is not None:
            atom = parent[0]
        return atom

    def parts(self, atom: Atom) -> tuple[Atom, Atom] | None:
        return self._split.get(atom)

    def regroup(self, coords: Sequence[Coord], sizes: Sequence[Dim]) -> Coords | None:
        """Row-major reshape: the same digits dealt out to dimensions of the given sizes, or None if a border does
        not fall on a whole number."""
        if not all(c.plain for c in coords):
            return None
        queue = [a for c in coords for a in self.resolve(c).digits]
        out: list[Coord] = []
        for size in reversed(sizes):
            digits: list[Atom] = []
            have: Dim = 1
            while not same(have, size):
                need = divide(size, have)
                if need is None or not queue:
                    return None
                atom = queue.pop()
                if divide(need, atom.size) is not None:
                    digits.insert(0, atom)
                    have = product((have, atom.size))
                elif self.split(atom, need):
                    queue.extend(self._split[atom])
                else:
                    return None
            out.append(Coord(tuple(digits)))
        return tuple(reversed(out)) if not queue else None

    def cut(self, coord: Coord, low: Dim) -> tuple[Coord, Coord] | None:
        """coordinate -> (coordinate // low, coordinate % low)."""
        high = divide(self.size(coord), low)
        grouped = None if high is None else self.regroup([coord], [high, low])
        return None if grouped is None else (grouped[0], grouped[1])

    def inside(self, coord: Coord, start: Dim, size: Dim, step: int = 1) -> Coord:
        """The coordinate inside a slice of so many elements from `start` on: valid only where the slice is."""
        if size == 1:
            return ZERO
        if start == 0 and step == 1 and same(self.size(coord), size) and coord.plain:
            return coord
        key = (self.resolve(coord), start, size, step)
        if key not in self._inside:
            self._inside[key] = Coord((Atom("w", size, Derived(coord, start, step)),))
        return self._inside[key]

    def shifted(self, coord: Coord, start: int, step: int) -> Coord | None:
        """start + step*coordinate: what reading through a slice does; undoes `inside` exactly."""
        if coord.plain and coord.digits:
            atom = self.root_of(coord.digits[0])
            derived = atom.derived
            same_place = derived is not None and (derived.start, derived.step) == (start, step)
            if derived and same_place and tuple(self._leaves((atom,))) == self.resolve(coord).digits:
                return derived.of
        if not coord.digits:
            return Coord((), start + step * coord.start)
        if coord.step != 1 and step != 1:
            return None
        return Coord(coord.digits, start + step * coord.start, step * coord.step)


class Axes:
    """Prints coordinates over the four axes of a site: which run of which axis's digits, as index arithmetic.

    [(w)] over B = (b, w)  ->  b % nW          [(ih)] over I = (ih, iw)  ->  i // W
    """

    def __init__(self, space: Space, axes: dict[str, tuple[Atom, ...]], symbols: dict[str, sympy.Symbol]) -> None:
        self._space = space
        self._place = {atom: (axis, position) for axis, atoms in axes.items() for position, atom in enumerate(atoms)}
        self._axes = axes
        self._symbols = symbols

    def knows(self, coord: Coord) -> bool:
        return all(
            self.knows(a.derived.of)
            if a.derived
            else a.fixed is not None or a in self._place or self._whole(a) is not None
            for a in self._space.resolve(coord).digits
        )

    def _whole(self, atom: Atom) -> Atom | None:
        """The derived atom this one was split from, if any."""
        parent = self._space.parent_of(atom)
        while parent is not None:
            if parent[0].derived is not None:
                return parent[0]
            parent = self._space.parent_of(parent[0])
        return None

    def text(self, coord: Coord) -> sympy.Expr:
        """The value of the coordinate as an expression over b, h, i, j."""
        coord = self._space.resolve(coord)
        total: sympy.Expr = sympy.Integer(0)
        for run in self._runs(coord.digits):
            total = total * sympy.sympify(product(a.size for a in run)) + self._run(run)
        return coord.start + coord.step * total

    def _runs(self, digits: tuple[Atom, ...]) -> list[tuple[Atom, ...]]:
        """Digits grouped into maximal runs that are neighbours on one axis."""
        runs: list[list[Atom]] = []
        for atom in digits:
            here = self._place.get(atom)
            before = self._place.get(runs[-1][-1]) if runs else None
            if here and before and here[0] == before[0] and here[1] == before[1] + 1:
                runs[-1].append(atom)
            else:
                runs.append([atom])
        return [tuple(run) for run in runs]

    def _run(self, run: tuple[Atom, ...]) -> sympy.Expr:
        if run[0].fixed is not None:
            return sympy.Integer(run[0].fixed)
        if run[0] not in self._place:
            return self._derived(run[0])
        axis, first = self._place[run[0]]
        atoms = self._axes[axis]
        last = first + len(run)
        return digits_of(
            self._symbols[axis],
            below=product(a.size for a in atoms[last:]),
            size=product(a.size for a in run),
            top=first == 0,
        )

    def _derived(self, atom: Atom) -> sympy.Expr:
        if atom.derived is not None:
            offset = self.text(atom.derived.of) - atom.derived.start
            return offset if atom.derived.step == 1 else floordiv(offset, sympy.Integer(atom.derived.step))
        parent = self._space.parent_of(atom)
        assert parent is not None, f"{atom} is not on any axis"
        whole, is_high = parent
        parts = self._space.parts(whole)
        assert parts is not None
        low = parts[1].size
        return digits_of(self._derived(whole), below=low if is_high else 1, size=atom.size, top=is_high)


def digits_of(value: sympy.Expr, *, below: Dim, size: Dim, top: bool) -> sympy.Expr:
    """value // below % size, leaving out what does nothing."""
    if below != 1:
        value = floordiv(value, sympy.sympify(below))
    return value if top else mod(value, sympy.sympify(size))
