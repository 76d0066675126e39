"""`verify(model, *inputs)`: is k-NN attention with every key the dense model?  The answer, and what is wrong if not.

dense      the model as it is                       exact      the same in float64: the judge
together   every attention at k = N                 alone      one attention after the other
float64    where the model's own precision cannot say: the rewritten model in float64, and the attention itself
           beside the reference, on the same inputs, in the model's own precision
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kvt_compile.capture.capture import through_dynamo
from kvt_compile.capture.outside import calls_outside
from kvt_compile.capture.skipped import disabled
from kvt_compile.config import NAMES, OptionError, Options, make_options
from kvt_compile.kernels.op import lowerings
from kvt_compile.passes.pipeline import unmet
from kvt_compile.passes.site import AttentionSite, Fused
from kvt_compile.report.facts import location_of
from kvt_compile.verification import copies
from kvt_compile.verification.beside import NAME, beside_the_reference
from kvt_compile.verification.compare import FLOAT64, LOOSE, compare, distance, settled, worst
from kvt_compile.verification.facts import Difference, Findings, SiteCheck
from kvt_compile.verification.outcome import Outcome, Run, VerificationError, first_line
from kvt_compile.verification.over_ranks import Whole, beside_the_whole
from kvt_compile.verification.reproduce import options_text, reproduce
from kvt_compile.verification.ways import EVERY, Rewrites, Way

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Verification(Findings):
    """What `verify` returns; prints as a table."""

    @property
    def summary(self) -> str:
        """The verdict, in a sentence or two."""
        from kvt_compile.verification.show import summary  # takes time to import, as rich does

        return summary(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; what is infinite is None."""
        plain: dict[str, Any] = pytree.tree_map(
            lambda x: None if isinstance(x, float) and not math.isfinite(x) else x, {"ok": self.ok, **asdict(self)}
        )
        return plain

    def __str__(self) -> str:
        from kvt_compile.verification.show import as_text

        return as_text(self)

    def __rich__(self) -> RenderableType:
        from kvt_compile.verification.show import render

        return render(self)


def verify(
    model: nn.Module,
    *inputs: Any,
    one_by_one: bool = True,
    reproduce_in: str | Path | Literal[False] | None = None,
    whole: Sequence[Any] | None = None,
    cut: Callable[[Tensor], Tensor] | None = None,
    **keywords: Any,
) -> Verification:
    """Checks on one set of inputs that with every key kept k-NN attention is the dense model.

    The model is captured as by `torch.compile(model, backend="kvt")` and run dense, with every attention at k = N, and
    with each alone at k = N.  Outputs, what is written to inputs and buffers, and the gradients of every parameter and
    floating-point input of a fixed random functional of the outputs (and which of them are None) are compared, with
    budgets from the model's own distance to its float64 result.  Inductor is left out: what is judged is the rewrite
    and the kernels.  Copies are run; the model, its gradients and the random state stay as they are.

    Args:
        model: an `nn.Module` in the mode it is to be verified in.  In training mode every dropout probability is 0 in
            the copies that run, for k-NN attention draws its own; other random draws are the same in every run.
            Under `torch.no_grad()` outputs alone are compared, of the graphs that inference has.
        inputs: inputs of the model; what is no tensor is passed on as it is.
        one_by_one: False: each attention is run alone only where all together are over the budget, which saves a run
            for each.
        reproduce_in: folder for the file that reproduces the first failure; a new one in the temporary folder by
            default; False: none is written.
        whole: where `inputs` are this rank's part of a sequence that several ranks share: the same inputs uncut.  The
            dense model runs on these, and its outputs alone are compared, as ...
        cut: ... this cuts them to this rank's rows, such as `lambda x: context.shard(x, 1)`.  All ranks call verify.
        keywords: options of `kvt_compile.config.Options` but for `topk`, `force_rewrite` and `then`; every other
            keyword is an input of the model.

    Returns a `Verification`: `.ok`, `.sites`, `.first`, `.dropped`, `.reproduction`.  It is not ok, either, where torch
    would run an attention dense without a word, because nothing is compiled or a graph break hides it.
    Raises VerificationError where the model cannot be judged (it fails itself, cannot be copied, does not run in
    float64, gives other results every time), OptionError for an option, TypeError for what is not a module.
    """
    options, kwargs = _split(keywords)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"verify takes an nn.Module, got {type(model).__name__}"
            f"{'; its module() is one' if hasattr(model, 'graph_signature') else ''}"
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise VerificationError("verify was called under a transform of torch.func, where torch compiles nothing")
    if reproduce_in is not None and reproduce_in is not False and not Path(reproduce_in).is_dir():
        raise VerificationError(f"reproduce_in: there is no folder {str(reproduce_in)!r}; make it first")
    if reason := disabled():
        return Verification((), None, dropped=(reason,))
    if (whole is None) != (cut is None):
        raise VerificationError("whole= (inputs uncut) and cut= (what cuts outputs to this rank's rows) go together")
    if whole is None and lowerings.inside().ranks > 1:
        raise VerificationError(
            "inside of context_parallel attention is over keys of other ranks, which the model by itself has not: give "
            "whole=, the inputs uncut, and cut=, what cuts an output to this rank's rows"
        )
    with torch.random.fork_rng():
        if whole is not None and cut is not None:
            with torch.no_grad():
                return Verification(**_fields(_Case(model, tuple(whole), kwargs, options).over_ranks(inputs, cut)))
        case = _Case(model, inputs, kwargs, options)
        return Verification(
            **_fields(
                case.verdict(None if reproduce_in is False else reproduce_in, reproduce_in is not False, one_by_one)
            )
        )


def _split(keywords: Mapping[str, Any]) -> tuple[Options, dict[str, Any]]:
    for name, why in (
        ("topk", "it keeps every key"),
        ("force_rewrite", "every site is rewritten"),
        ("then", "the graphs run as they are"),
    ):
        if name in keywords:
            raise OptionError(f"verify takes no {name}: {why}; leave it out")
    options = make_options({name: value for name, value in keywords.items() if name in NAMES})
    return options, {name: value for name, value in keywords.items() if name not in NAMES}


class _Case:
    """One model on one set of inputs, and what was computed of it so far."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options) -> None:
        self.name = type(model).__name__
        self.options = options
        self.training = any(module.training for module in model.modules())
        self.model = copies.plain(model)
        if self.training:
            copies.quiet(self.model)
        self.args, self.kwargs = args, kwargs
        tensors = [*self.model.parameters(), *(x for x in pytree.tree_leaves((args, kwargs)) if torch.is_tensor(x))]
        self.backward = torch.is_grad_enabled() and any(x.is_floating_point() for x in tensors)
        self.wide = copies.is_wide(self.model, args, kwargs)
        self.run, self.dense = self._dense()

    def _dense(self) -> tuple[Run, Outcome]:
        """The model itself.  One that writes to its inputs does not take inputs that get a gradient."""
        run = Run(self.model, self.args, self.kwargs, self.backward)
        try:
            dense = self._eager(run)
        except Exception as error:
            run = replace(run, inputs=False)
            try:
                dense = self._eager(run)
            except Exception:
                raise VerificationError(
                    f"the model itself fails on these inputs, before anything is rewritten: {first_line(error)}"
                ) from error
        numbers = [x for n, x in dense.outputs.items() if n.startswith("output") and torch.is_tensor(x)]
        if not numbers:
            raise VerificationError(
                f"{self.name} returns no tensor that can be compared: expected tensors in any nest of lists, tuples, "
                "dicts and dataclasses"
            )
        floats = [x for x in numbers if x.is_floating_point()]
        if floats and not any(x.isfinite().any() for x in floats if x.numel()) and any(x.numel() for x in floats):
            raise VerificationError("the dense model's outputs are all NaN or infinite, so there is nothing to compare")
        if distance(self._eager(run), dense) > LOOSE:
            raise VerificationError(
                "the dense model gives another result each time it runs on the same inputs and random numbers, so "
                "there is nothing to compare with"
            )
        return run, dense

    def _eager(self, run: Run) -> Outcome:
        with torch.compiler.set_stance("force_eager"):  # what the model compiles of itself as well
            return run()

    def _converted(self, dtype: torch.dtype) -> Run:
        model, args, kwargs = copies.converted(self.model, self.args, self.kwargs, dtype)
        return replace(self.run, model=model, args=args, kwargs=kwargs)

    @cached_property
    def exact(self) -> Outcome:
        if self.wide:
            return self.dense
        try:
            return self._eager(self._converted(torch.float64))
        except Exception as error:
            raise VerificationError(
                f"the model does not run in float64, and that is the measure of rounding: {first_line(error)}"
            ) from error

    @cached_property
    def short(self) -> Outcome:
        """What rounding does: the model in its own precision; in float32 where that is float64, if it runs in it."""
        if not self.wide:
            return self.dense
        with contextlib.suppress(Exception):
            return self._eager(self._converted(torch.float32))
        return self.dense

    # ---- the verdict -----------------------------------------------------------------------------------------------

    def verdict(self, folder: str | Path | None = None, write: bool = True, one_by_one: bool = True) -> Findings:
        with self.rewritten(self.run) as (call, rewrites):
            together = self.compared(call, rewrites, EVERY)
            sites = list(rewrites.sites())
            self._check_options(rewrites)
            self._check_dropout(site for _, site in sites)
            dropped, left = tuple(self._dropped(rewrites)), tuple(_left(rewrites))
            found = Findings((), None, dropped, left, self.backward, note=self._note())
            if not sites:
                return found if together.ok else replace(found, together=together)
            checks = self.settled({EVERY: together}, call, rewrites)
            if not one_by_one and checks[EVERY].ok:
                return replace(found, together=checks[EVERY])
            alone = {way: self.compared(call, rewrites, way) for way in (Way(only=key) for key, _ in sites)}
            checks |= self.settled(alone, call, rewrites)
            bite = None
            with rewrites.use(Way(1)), contextlib.suppress(Exception):
                bite = distance(self.run(call), self.dense)
            rows = tuple(_row(site, checks[Way(only=key)]) for key, site in sites)
            found = replace(found, sites=rows, together=checks[EVERY], bite=bite)
            if all(check.ok for check in checks.values()):
                return found
            if not write:
                return found
            wrong = next((key for key, _ in sites if not checks[Way(only=key)].ok), None)
            options = self._options()
            call_text = options_text(options, self.backward)
            path, note = reproduce(
                rewrites, lambda: self.run(call), wrong, found, folder, partial(_fails, options), call_text
            )
            return replace(found, reproduction=path, note="; ".join(filter(None, (found.note, note))))

    def over_ranks(self, inputs: tuple[Any, ...], cut: Callable[[Tensor], Tensor]) -> Findings:
        """`inputs`, this rank's part, beside the model on all of it, which is this case's."""
        part = replace(self.run, args=inputs)
        model, args, kwargs = copies.converted(self.model, inputs, self.kwargs, torch.float64)
        wide = replace(self.run, model=model, args=args, kwargs=kwargs)
        return beside_the_whole(
            Whole(self.short, self.exact, cut), part, wide, self.rewritten, FLOAT64 if self.wide else 1.0
        )

    def _options(self) -> dict[str, Any]:
        """What an attention that stands alone is rewritten with: whatever its axis is, it was."""
        axes = dict.fromkeys(("channel_attention", "batch_attention", "unknown_attention"), "rewrite")
        return {"lowering": self.options.lowering, **axes}

    @contextmanager
    def rewritten(self, run: Run) -> Iterator[tuple[Callable[..., Any], Rewrites]]:
        rewrites = Rewrites(self.options.policy, self.options.lowering)
        with through_dynamo(run.model, rewrites) as call:
            yield call, rewrites

    def compared(self, call: Callable[..., Any], rewrites: Rewrites, way: Way) -> Difference:
        """One way, in the model's own precision."""
        with rewrites.use(way):
            return _judged(self.run, call, self.short, self.exact, FLOAT64 if self.wide else 1.0)

    def settled(
        self, checks: dict[Way, Difference], call: Callable[..., Any], rewrites: Rewrites
    ) -> dict[Way, Difference]:
        """Has float64 say what the model's own precision cannot; where an attention is over on its own inputs in the
        model's own precision, that stands."""
        open_ = [way for way, check in checks.items() if not settled(check)]
        if self.wide or not open_:
            return checks
        wide = self._converted(torch.float64)
        with self.rewritten(wide) as (wide_call, wide_rewrites):
            _judged(wide, wide_call, self.dense, self.exact, FLOAT64)  # captures
            if [d.site.tier for d in _decided(wide_rewrites)] != [d.site.tier for d in _decided(rewrites)]:
                raise VerificationError(
                    "the model's own precision cannot say, and in float64 it has other attentions: "
                    f"{len(_decided(wide_rewrites))} of {len(_decided(rewrites))} are rewritten"
                )
            for way in open_:
                with wide_rewrites.use(way):
                    check = _judged(wide, wide_call, self.dense, self.exact, FLOAT64)
                with beside_the_reference(self.options.lowering) as site, rewrites.use(replace(way, lowering=NAME)):
                    self.run(call)
                checks[way] = worst([replace(check, bits=64), site.worst])
        return checks

    # ---- what else may be wrong ------------------------------------------------------------------------------------

    def _dropped(self, rewrites: Rewrites) -> Iterator[str]:
        results = rewrites.results
        if not results:
            yield "torch.compile compiled nothing of the model, without a word: it runs exactly dense"
        if len(results) != 1:
            args, kwargs = self.run.args, self.run.kwargs
            for name, where in calls_outside(self.model, args, kwargs, results):
                yield (
                    f"{name} in {where} runs outside every captured graph, and so exactly dense: a graph break hides "
                    "it (TORCH_LOGS=graph_breaks says which)"
                )

    def _check_options(self, rewrites: Rewrites) -> None:
        if wrong := unmet(self.options.policy, rewrites.results):
            raise OptionError(wrong)

    def _check_dropout(self, sites: Iterator[AttentionSite]) -> None:
        for site in sites:
            if isinstance(site.plan, Fused) and site.plan.dropout > 0:
                raise VerificationError(
                    f"the attention of {site.where} drops weights with a probability of {site.plan.dropout:g} that is "
                    "written into its code, and k-NN attention draws others: verify the model in eval() mode"
                )

    def _note(self) -> str:
        notes = ["in training mode, without dropout"] if self.training else []
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and (ranks := torch.distributed.get_world_size()) > 1:
            notes.append(f"one of {ranks} ranks, its inputs taken for all there is (whole= compares with more)")
        if not self.backward:
            notes.append("gradients were not compared: grad mode is off, or nothing has one")
        elif not self.run.inputs:
            notes.append("no gradients of inputs: the model writes to them")
        return "; ".join(notes)


def _judged(run: Run, call: Callable[..., Any], dense: Outcome, exact: Outcome, unit: float) -> Difference:
    """A run of the rewritten model; that it raises is a difference, too."""
    try:
        found = run(call)
    except Exception as error:
        return Difference("the run", math.inf, 0.0, first_line(error), "none: the model itself runs", certain=True)
    return compare(found, dense, exact, unit=unit)


def _fails(options: dict[str, Any], model: nn.Module, inputs: Sequence[Any]) -> bool:
    try:
        return not _Case(model, tuple(inputs), {}, make_options(options)).verdict(write=False).ok
    except VerificationError:
        return False


def _fields(found: Findings) -> dict[str, Any]:
    return {name: getattr(found, name) for name in Findings.__dataclass_fields__}


def _decided(rewrites: Rewrites) -> list[Any]:
    return [d for result in rewrites.results for d in result.decisions if d.topk is not None]


def _left(rewrites: Rewrites) -> Iterator[tuple[str, str]]:
    for result in rewrites.results:
        yield from ((d.site.where.module, d.reason) for d in result.decisions if d.topk is None)
        yield from ((r.where.module, r.reason) for r in result.refusals)


def _row(site: AttentionSite, check: Difference) -> SiteCheck:
    return SiteCheck(site.where.module, location_of(site.where), site.tier, site.keys, check)
