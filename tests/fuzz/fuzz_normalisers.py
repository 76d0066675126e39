"""Random ways to normalise the rows of a map -> source text, and whether it is a softmax.

    numerator        exp(x), exp2, 3**x, expm1 + 1, products of them, with a mask, a bias, something subtracted from the row
    normaliser       division by the sum, by a sum with more in it, of something else, detached; before or after the product

The generator knows by construction what it wrote: a row over its own sum is a softmax of the logarithm of its numerator,
and everything else is none.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st


@dataclass(frozen=True)
class Normalised:
    """Text of a function body of `s`, `v`, `bias`, `gain`, `mask`; what it returns is `out`."""

    source: str
    log: str
    """The scores it is the softmax of, as text; empty where it is none."""


_SHIFTS = ("", " - s.amax(-1, True)", " - s.mean(-1, True)", " - s.amax(-1, True).detach()", " - gain[:, None]")
_NUMERATORS = (
    ("({x}).exp()", "{x}"), ("torch.exp({x})", "{x}"), ("torch.exp2({x})", "({x}) * 0.6931471805599453"),
    ("3.0 ** ({x})", "({x}) * 1.0986122886681098"), ("(torch.expm1({x}) + 1)", "{x}"), ("1 / (-({x})).exp()", "{x}"),
    ("({x}).exp().square()", "2 * ({x})"), ("(({x}) / 2).exp() ** 2", "{x}"), ("(0.5 * ({x})).exp()", "0.5 * ({x})"),
    ("({x}).softmax(-1)", "{x}"), ("F.log_softmax({x}, -1).exp()", "{x}"), ("({x}).sigmoid()", "({x}).sigmoid().log()"),
)  # fmt: skip
_FACTORS = (
    ("", ""), ("", ""), (" * bias.exp()", " + bias"), (" * mask", " + mask.double().log()"), (" * 2.5", ""),
    (" * gain.sigmoid()", " + gain.sigmoid().log()"), (" * mask.to(s.dtype) * bias.exp()", " + mask.double().log() + bias"),
)  # fmt: skip
_OVER = (
    "{e} / {t}.sum(-1, keepdim=True)", "{e} / {t}.sum(-1)[..., None]", "{e} * (1 / {t}.sum(-1, True))",
    "{e} * {t}.sum(-1, True).reciprocal()", "{e} / ({t}.mean(-1, True) * 5)", "F.normalize({e}, p=1, dim=-1)",
    "{e} / torch.einsum('bhij->bhi', {t}).unsqueeze(-1)", "({e}.log() - {t}.sum(-1, True).log()).exp()",
    "{e} / ({t} @ torch.ones_like({t}[..., :1, :]).mT)",
)  # fmt: skip
_OTHERWISE = (
    "{e} / (1 + {e}.sum(-1, True))", "{e} / ({e}.sum(-1, True) + 1e-3)", "{e} / {e}.sum(-1, True).clamp(min=3.0)",
    "{e} / {e}.sum(-1, True).detach()", "{e} / {e}.sum(-2, True)", "{e} / {e}.square().sum(-1, True).sqrt()",
    "{e} / {e}.sum(-1, True).sqrt()", "{e} / ({e} * 0.5 + bias.exp()).sum(-1, True)", "{e} / {e}[..., :3].sum(-1, True)",
    "{e}", "{e} / {e}.amax(-1, True)", "{e} / {e}.sum((-1, -2), True)",
)  # fmt: skip


@st.composite
def normalised(draw: st.DrawFn) -> Normalised:
    """A normalised map between two products."""
    shift = draw(st.sampled_from(_SHIFTS))
    x = f"s{shift}"
    exact = draw(st.integers(0, 3)) > 0
    # a row that sums to 1 already is a softmax over anything
    numerators = _NUMERATORS if exact else [x for x in _NUMERATORS if "softmax" not in x[0]]
    numerator, log = draw(st.sampled_from(numerators))
    factor, more = draw(st.sampled_from(_FACTORS))
    e, log = f"{numerator.format(x=x)}{factor}", f"{log.format(x=x)}{more}"
    twice = draw(st.booleans()) and exact
    total = f"({e})" if twice else "e"
    if exact and draw(st.integers(0, 2)) == 0:
        form = draw(st.sampled_from(("(e @ v) / {t}.sum(-1, True)", "(e @ v) * (1 / {t}.sum(-1)).unsqueeze(-1)",
                                     "torch.einsum('bhij,bhjd->bhid', e, v) / {t}.sum(-1, True)")))  # fmt: skip
        return Normalised(f"e = {e}\nout = {form.format(t=total)}", log)
    form = draw(st.sampled_from(_OVER if exact else _OTHERWISE))
    return Normalised(f"e = {e}\nw = {form.format(e='e', t=total)}\nout = w @ v", log if exact else "")
