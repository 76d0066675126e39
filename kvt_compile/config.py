"""What a user may ask for -> checked, frozen `Options`.  Nothing else in the library reads configuration.

options={"topk": 64, "exclude": ["head.*"], "max_autotune": True}
  ->  Options(topk=64, exclude=("head.*",), ...)  and  {"max_autotune": True}, which is Inductor's
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from kvt_compile.kernels.op import lowerings
from kvt_compile.kernels.tune import Mode
from kvt_compile.passes.batch import BatchDim, validate_batch_dim
from kvt_compile.passes.decide import DEFAULT_TOPK, Policy, Rule, validate_rule
from kvt_compile.passes.selecting import GridRule, PrefixRule, SelectRule, validate_places, validate_select
from kvt_compile.passes.site import Axis
from kvt_compile.select.values import SelectionError
from kvt_compile.topk import validate_tolerance

OnRefusal = Literal["ignore", "warn", "error"]
OtherAxis = Literal["dense", "rewrite"]
Then = str | Callable[..., Callable[..., Any]]


class OptionError(ValueError):
    """An option that does not exist or has a value it cannot have."""


@dataclass(frozen=True)
class Options:
    """Every option of every way in (`torch.compile(options=...)`, `rewrite`, `explain`)."""

    topk: Rule = DEFAULT_TOPK
    """Keys kept per query: int >= 1 (clamped to the number of keys), float in (0, 1] (share of the keys), None (leave
    dense), a mapping from module-path pattern to any of these (first match wins, no match leaves dense), or a callable
    that takes an `AttentionSite` and returns one of them.  A site that selects keys by itself keeps its own k, unless a
    pattern of a mapping matches it."""
    select: SelectRule = None
    """Which keys are kept, in place of topk: a value of `kvt_compile.select` or its text (`"(window(13) | prefix) &
    topk(64)"`), a mapping from module-path pattern to one, or a callable that takes an `AttentionSite`.  A value
    may hold functions (`given`)."""
    grid: GridRule = None
    """How tokens are laid out, where the graph does not say it: sizes of 1 to 3 axes, one of them -1 for whatever is
    left, or a mapping from module-path pattern to such."""
    prefix: PrefixRule = None
    """How many tokens stand before the grid, where the graph does not say it, or a mapping as above."""
    include: tuple[str, ...] = ()
    """Only rewrite sites whose module path matches one of these patterns (`fnmatch` style); empty means all."""
    exclude: tuple[str, ...] = ()
    """Do not rewrite sites whose module path matches one of these patterns."""
    force_rewrite: bool = False
    """Rewrite also where k >= Nk, so that the rewritten path can be compared with the dense one."""
    lowering: str = "auto"
    """How the new nodes are computed: "auto", or the name of one lowering."""
    on_refusal: OnRefusal = "ignore"
    """What to do about a softmax or SDPA call that is left as it is: nothing, a warning, or an error."""
    channel_attention: OtherAxis = "dense"
    """What to do with attention over channels (XCiT, DaViT)."""
    batch_attention: OtherAxis = "dense"
    """What to do with attention over the batch."""
    batch_dim: BatchDim = None
    """Which axis of the model's inputs is the batch: an axis counted from 0, of every input, or a mapping from the name
    of an input to its own.  An attention whose keys come from it is one over the batch.  None: not said; then an axis
    of an input that only linear layers have touched counts as tokens, whichever it is."""
    unknown_attention: OtherAxis = "dense"
    """What to do with attention over an axis that is lost behind an operation that is not understood (a custom operator
    that changes the shape, say): it may be tokens, and it may be channels."""
    topk_tolerance: float = 0.0
    """How far from k the number of keys a row keeps may be, as a share of k in [0, 1).  0: exactly the keys that are at
    least the k-th largest.  A lowering may use the freedom to select faster, or keep exactly k all the same."""
    autotune: Mode = "cached"
    """Block sizes of the kernels that have any: "off" the defaults, "cached" what was measured before (the defaults
    where nothing was), "on" measured at the first call and kept.  Results differ by rounding at most."""
    then: Then = "inductor"
    """What compiles the rewritten graph, of `torch.compile` only: "inductor", the name of any backend that
    `torch.compiler.list_backends` has ("eager", "aot_eager", "openvino", ...; also those it leaves out as experimental
    or for debugging), or a backend itself: a function that takes a graph and its inputs and returns what runs.
    Options of such a backend are bound to it (`functools.partial`); Inductor's mode and options go with "inductor"
    alone."""

    @property
    def policy(self) -> Policy:
        """The part of the options that the passes decide by."""
        axes: set[Axis] = {"token"}
        axes |= {"channel"} if self.channel_attention == "rewrite" else set()
        axes |= {"batch"} if self.batch_attention == "rewrite" else set()
        axes |= {"unknown"} if self.unknown_attention == "rewrite" else set()
        rest = self.select, self.grid, self.prefix, self.batch_dim
        return Policy(self.topk, self.include, self.exclude, self.force_rewrite, frozenset(axes), *rest)


NAMES = tuple(field.name for field in fields(Options))


def make_options(given: Mapping[str, Any], compiling: bool = False) -> Options:
    """Checks every value.  Raises OptionError (a ValueError) or TypeError saying what was found and expected.

    compiling: for a way in that has a compiler behind it, so that `then` means something."""
    unknown = [name for name in given if name not in NAMES]
    if unknown:
        raise OptionError(_unknown(unknown[0], NAMES))
    values = dict(given)
    if "topk" in values:
        validate_rule(values["topk"])
    if values.get("select") is not None:
        if "topk" in values:
            raise OptionError("topk and select were both given; write select='... & topk(64)'")
        try:
            values["select"] = validate_select(values["select"])
        except SelectionError as error:
            raise OptionError(str(error)) from None
    validate_places(values.get("grid"), values.get("prefix"))
    validate_batch_dim(values.get("batch_dim"))
    for name in ("include", "exclude"):
        if name in values:
            values[name] = _patterns(name, values[name])
    if "then" in values:
        _check_then(values["then"], compiling)
    if "topk_tolerance" in values:
        try:
            values["topk_tolerance"] = validate_tolerance(values["topk_tolerance"])
        except (TypeError, ValueError) as error:
            raise OptionError(str(error)) from None
    for name, allowed in (
        ("on_refusal", get_args(OnRefusal)),
        ("channel_attention", get_args(OtherAxis)),
        ("batch_attention", get_args(OtherAxis)),
        ("unknown_attention", get_args(OtherAxis)),
        ("lowering", lowerings.names()),
        ("autotune", get_args(Mode)),
    ):
        if name in values and values[name] not in allowed:
            raise OptionError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {values[name]!r}")
    if not isinstance(values.get("force_rewrite", False), bool):
        raise OptionError(f"force_rewrite must be True or False, got {values['force_rewrite']!r}")
    return Options(**values)


def split_options(given: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """Our options, and the rest, which must be Inductor's own.  Raises OptionError for a name that is neither."""
    given = dict(given or {})
    ours = {name: value for name, value in given.items() if name in NAMES}
    rest = {name: value for name, value in given.items() if name not in NAMES}
    options = make_options(ours, compiling=True)
    if rest:
        from torch._inductor import list_options

        known = set(list_options())
        for name in rest:
            if name.replace("-", "_") not in known:
                raise OptionError(_unknown(name, (*NAMES, *sorted(known))))
        if options.then != "inductor":
            raise OptionError(
                f"{next(iter(rest))!r} is an option of Inductor, and the graph goes to {options.then!r}; options of "
                "another backend are bound to it with functools.partial"
            )
    return options, rest


def _check_then(then: Any, compiling: bool) -> None:
    if not compiling:
        raise OptionError(
            "then says what compiles the rewritten graph, and only torch.compile(model, backend='kvt', options={...}) "
            "compiles it"
        )
    if callable(then):
        return
    from torch._dynamo import list_backends

    known = sorted({"inductor", *list_backends(exclude_tags=())} - {"kvt"})
    if then not in known:
        near = difflib.get_close_matches(str(then), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise OptionError(f"then must be a backend or the name of one, {', '.join(known)}, got {then!r}{hint}")


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown option {name!r}{hint} (kvt's options are {', '.join(NAMES)}; Inductor's own pass through)"


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Sequence) and all(isinstance(pattern, str) for pattern in value):
        return tuple(value)
    raise OptionError(f"{name} must be a module-path pattern such as 'blocks.*.attn' or a list of them, got {value!r}")
