"""Hugging Face transformers: `attn_implementation="kvt"`, in eager code, with nothing captured.

    attention_interface(module, query, key, value, mask, ...)  ->  kvt::attention

transformers is imported by `register`, not by importing this module.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvt_compile.adjust import FINDERS, Adjustable, Choice, keep
from kvt_compile.functional import topk_attention
from kvt_compile.passes.decide import DEFAULT_TOPK

NAME = "kvt"
_ATTRIBUTE = "kvt_topk"


def register() -> None:
    """Makes `attn_implementation="kvt"` known to transformers (5.0 or newer); calling it again changes nothing.

        kvt_compile.integrations.transformers.register()
        model = AutoModel.from_config(config, attn_implementation="kvt")

    How many keys each query keeps is `config.kvt_topk` (an int, a share in (0, 1], None for all; default 0.5), which is
    saved and loaded with the config; a model of several towers has a config for each.  `kvt_compile.set_topk(model, k)`
    changes it on a model, for one attention or all, and `with kvt_compile.options(topk=k)` for a while.

    Masks are SDPA's: boolean, left out where `is_causal` says it all.  A row without a valid key gives zeros.
    Raises ImportError when transformers is not installed or has no AttentionInterface.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ImportError(
            f"attn_implementation={NAME!r} needs transformers 5.0 or newer, which does not import here: {error}"
        ) from error
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if _attentions not in FINDERS:
        FINDERS.append(_attentions)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function transformers calls.

    Args:
        module: the attention that asks; its `config.kvt_topk` (or its own `kvt_topk`) says how many keys are kept.
        query: `[B, Hq, Nq, D]`; key `[B, Hk, Nk, D]` and value `[B, Hk, Nk, Dv]` with Hq a multiple of Hk.
        attention_mask: broadcastable to `[B, Hq, Nq, Nk]`, bool (True = may attend) or added; what is beyond Nk is cut.
        position_bias: added to the scores, `[B or 1, Hq, Nq, Nk]`.

    Returns `[B, Nq, Hq, Dv]` and no weights.
    Raises ValueError for what it cannot compute: soft-capped scores, attention sinks, a paged cache.
    """
    for name, meaning in (("softcap", "soft-capped scores"), ("s_aux", "attention sinks"), ("cache", "a paged cache")):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"attn_implementation={NAME!r} does not compute {meaning} ({name}); build the model with "
                'attn_implementation="eager" and use torch.compile(model, backend="kvt") instead'
            )
    if kwargs.get("output_attentions"):
        warnings.warn(f'attn_implementation={NAME!r} returns no attention weights; "eager" does', stacklevel=2)
    queries, keys = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and queries > 1
    if causal and keys > queries:  # a preallocated cache, while it is filled for the first time
        key, value = key[:, :, :queries], value[:, :, :queries]
        keys = queries
    if attention_mask is not None:
        attention_mask = attention_mask[..., :keys]
    if position_bias is not None:
        attention_mask = _with_bias(position_bias[..., :keys], attention_mask, causal)
        causal = False
    out = topk_attention(
        query,
        key,
        value,
        topk=keep(_own(module), keys),
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None


def _own(module: nn.Module) -> Choice:
    fallback = getattr(getattr(module, "config", None), _ATTRIBUTE, DEFAULT_TOPK)
    choice: Choice = getattr(module, _ATTRIBUTE, fallback)
    return choice


def _with_bias(bias: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """One tensor to add: the bias, and minus infinity where a query may not look."""
    if mask is None and causal:
        mask = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).tril()
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


def _attentions(model: nn.Module) -> Iterator[Adjustable]:
    """The modules of a model that look up an attention function, where their config says it is ours."""
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        code = getattr(type(module).forward, "__code__", None)
        if getattr(config, "_attn_implementation", None) == NAME and "ALL_ATTENTION_FUNCTIONS" in getattr(
            code, "co_names", ()
        ):
            yield Adjustable(path, partial(setattr, module, _ATTRIBUTE))
