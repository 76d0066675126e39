"""transformers:MODEL_TYPE -> `AutoModel` with random weights from the type's default configuration, and its inputs.

Inputs are read off the configuration: pixel_values, input_ids with attention_mask, input_values or input_features, and
decoder_input_ids for an encoder-decoder.  A default configuration can be a model of billions of parameters; such a one
is built with 2 layers, which are like all its others.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from kvt_compile.cli.errors import UserError, did_you_mean
from kvt_compile.cli.subject import DEFAULT_BATCH, Subject, Wanted, failure, library

LARGE = 1_000_000_000
"""Parameters a default configuration may have before it is built with FEW_LAYERS layers."""
FEW_LAYERS = 2
TOKENS = 64
"""Length of made-up text."""


def from_transformers(name: str, wanted: Wanted) -> Subject:
    transformers = library("transformers")
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    if name not in known:
        raise UserError(f"transformers has no model type {name!r}{did_you_mean(name, known)}")
    try:
        config, note = _config(transformers, name, wanted)
        with torch.device("cpu"):
            model = _model(transformers, config, wanted)
    except UserError:
        raise
    except Exception as error:
        what = f"transformers cannot build {name!r} from its default configuration"
        raise failure(what, error, "write a file with a factory that builds it and name that") from error
    return Subject(model, (), inputs(model, config, wanted), note)


def _config(transformers: Any, name: str, wanted: Wanted) -> tuple[Any, str]:
    """The type's default configuration, made small where it is large; and a note that says so."""
    settings = {} if wanted.image_size is None else {"image_size": wanted.image_size}
    config = transformers.AutoConfig.for_model(name, **settings)
    count = _parameters(transformers, config, wanted)
    if count <= LARGE:
        return config, ""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not hasattr(config, "num_hidden_layers") or layers is None:
        raise UserError(_too_large(name, count))
    config = transformers.AutoConfig.for_model(name, num_hidden_layers=FEW_LAYERS, **settings)
    if (still := _parameters(transformers, config, wanted)) > 2 * LARGE:
        raise UserError(_too_large(name, still))
    return (
        config,
        f"{name}: {count / 1e9:.1f} billion parameters by default; built with {FEW_LAYERS} of its {layers} layers",
    )


def _too_large(name: str, count: int) -> str:
    return (
        f"the default configuration of {name!r} has {count / 1e9:.1f} billion parameters, too many to build here; "
        "write a file with a factory that builds a smaller one and name that"
    )


def _parameters(transformers: Any, config: Any, wanted: Wanted) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in _model(transformers, config, wanted).parameters())


def _model(transformers: Any, config: Any, wanted: Wanted) -> nn.Module:
    chosen = {} if wanted.attention is None else {"attn_implementation": wanted.attention}
    model = transformers.AutoModel.from_config(config, **chosen)
    assert isinstance(model, nn.Module)
    return model


def inputs(model: nn.Module, config: Any, wanted: Wanted) -> dict[str, Tensor]:
    """Random inputs for `model.forward`, by name."""
    batch = wanted.batch or DEFAULT_BATCH
    taken = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    vision, text = getattr(config, "vision_config", None), config.get_text_config()
    made: dict[str, Tensor] = {}
    # two towers side by side (CLIP) want both; where images become tokens of the text, text alone will do
    towers = vision is not None and not any(hasattr(config, key) for key in ("image_token_id", "image_token_index"))
    if main == "pixel_values" or (towers and "pixel_values" in taken):
        made["pixel_values"] = _pixels(batch, vision or config)
    if main == "input_ids" or (towers and "input_ids" in taken):
        made["input_ids"] = _tokens(batch, text)
        if "attention_mask" in taken:
            made["attention_mask"] = torch.ones(batch, TOKENS, dtype=torch.long)
    if main in ("input_values", "input_features"):
        made[main] = _sound(batch, config)
    if config.is_encoder_decoder and "decoder_input_ids" in taken:
        made["decoder_input_ids"] = _tokens(batch, text)
    if not made:
        raise UserError(
            f"do not know how to make {main!r} for {type(model).__name__}; write a file with a factory and name that"
        )
    return made


def _pixels(batch: int, config: Any) -> Tensor:
    size = getattr(config, "image_size", None)
    height, width = (size if isinstance(size, list | tuple) else (size, size)) if size else (224, 224)
    frames = (config.num_frames,) if hasattr(config, "num_frames") else ()
    return torch.randn(batch, *frames, getattr(config, "num_channels", 3), height, width)


def _tokens(batch: int, config: Any) -> Tensor:
    """Ordinary words: the low numbers are special tokens in most vocabularies."""
    return torch.randint(min(1000, config.vocab_size // 2), config.vocab_size, (batch, TOKENS))


def _sound(batch: int, config: Any) -> Tensor:
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        return torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions)
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return torch.randn(batch, config.max_length, config.num_mel_bins)
    return torch.randn(batch, 16_000)
