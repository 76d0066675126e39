"""transformers: text types, tiny."""

from __future__ import annotations

from typing import Any

import torch
import transformers as t

from benchmarks.zoo.tiny import Inputs, Tiny, ids, padding, tokens

ENCODER: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = ENCODER | {"num_key_value_heads": 2}
CAUSAL = tokens(use_cache=False)


def _pair(batch: int) -> Inputs:
    return {"input_ids": ids(batch, 24), "decoder_input_ids": ids(batch, 12), "attention_mask": padding(batch, 24),
            "use_cache": False}  # fmt: skip


TEXT: dict[str, Tiny] = {
    "bert": Tiny("BertModel", lambda: t.BertConfig(**ENCODER), tokens()),
    "bert_nomask": Tiny("BertModel", lambda: t.BertConfig(**ENCODER), tokens(masked=False)),
    "roberta": Tiny("RobertaModel", lambda: t.RobertaConfig(**ENCODER), tokens()),
    "albert": Tiny("AlbertModel", lambda: t.AlbertConfig(**ENCODER, embedding_size=16), tokens()),
    "distilbert": Tiny(
        "DistilBertModel",
        lambda: t.DistilBertConfig(vocab_size=100, dim=32, n_layers=2, n_heads=4, hidden_dim=64), tokens(),
    ),
    "gpt2": Tiny(
        "GPT2Model", lambda: t.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=64), CAUSAL
    ),
    "t5": Tiny(
        "T5Model", lambda: t.T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4), _pair
    ),
    "bart": Tiny(
        "BartModel",
        lambda: t.BartConfig(
            vocab_size=100, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
        ),
        _pair,
    ),
    "llama": Tiny("LlamaModel", lambda: t.LlamaConfig(**GROUPED), CAUSAL),
    "qwen3": Tiny("Qwen3Model", lambda: t.Qwen3Config(**GROUPED, head_dim=8), CAUSAL),
    "gemma2": Tiny(
        "Gemma2Model", lambda: t.Gemma2Config(**GROUPED, head_dim=8, sliding_window=8, query_pre_attn_scalar=8), CAUSAL
    ),
    "gpt_oss": Tiny(
        "GptOssModel",
        lambda: t.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=8),
        CAUSAL,
    ),
    "bloom": Tiny("BloomModel", lambda: t.BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4), CAUSAL),
    "gpt_neox": Tiny("GPTNeoXModel", lambda: t.GPTNeoXConfig(**ENCODER), CAUSAL),
    "deberta_v2": Tiny(
        "DebertaV2Model",
        lambda: t.DebertaV2Config(
            **ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8,
            max_relative_positions=16, norm_rel_ebd="layer_norm",
        ),
        tokens(),
    ),
    "modernbert": Tiny(
        "ModernBertModel",
        lambda: t.ModernBertConfig(
            **ENCODER, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
        ),
        tokens(),
    ),
    "xlnet": Tiny(
        "XLNetModel", lambda: t.XLNetConfig(vocab_size=100, d_model=32, n_layer=2, n_head=4, d_inner=64),
        tokens(masked=False),
    ),
    "mpt": Tiny(
        "MptModel", lambda: t.MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=100), CAUSAL
    ),
    "funnel": Tiny(
        "FunnelModel",
        lambda: t.FunnelConfig(
            vocab_size=100, block_sizes=[1, 1], num_decoder_layers=1, d_model=32, n_head=4, d_head=8, d_inner=64
        ),
        tokens(),
    ),
    "fnet": Tiny(
        "FNetModel",
        lambda: t.FNetConfig(**{key: value for key, value in ENCODER.items() if key != "num_attention_heads"}),
        tokens(masked=False),
    ),
    "squeezebert": Tiny(
        "SqueezeBertModel",
        lambda: t.SqueezeBertConfig(
            **ENCODER, embedding_size=32, q_groups=2, k_groups=2, v_groups=2, post_attention_groups=1,
            intermediate_groups=2, output_groups=2,
        ),
        tokens(),
    ),
    "longformer": Tiny(
        "LongformerModel",
        lambda: t.LongformerConfig(**ENCODER | {"max_position_embeddings": 130}, attention_window=8),
        lambda batch: {"input_ids": ids(batch, 32), "attention_mask": torch.ones(batch, 32, dtype=torch.long)},
    ),
}  # fmt: skip
"""Type -> model.  Padding is masked wherever the type takes a mask."""
