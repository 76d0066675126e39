"""`attn_implementation="kvt"`: at k = N it is eager attention, forward and backward; below, it is k-NN attention."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import SMALL
from oracles import FACTOR
from torch import Tensor, nn

import kvt_compile
from kvt_compile.integrations.transformers import register
from kvt_compile.passes.decide import Policy
from kvt_compile.passes.pipeline import run_passes

register()
register()  # calling it again changes nothing

DROPOUT = {"hidden_dropout_prob", "attention_probs_dropout_prob"}
PLAIN = {name: value for name, value in SMALL.items() if name not in DROPOUT}


@dataclass(frozen=True)
class Case:
    """A model type, its inputs, and how many attentions it has."""

    id: str
    config: Callable[[], Any]
    inputs: Callable[[], dict[str, Tensor]]
    attentions: int
    valid: Callable[[dict[str, Tensor]], Tensor] | None = None
    """Which tokens of the output count, `[B, N]`; padding is nobody's business."""

    def __str__(self) -> str:
        return self.id

    def model(self, attention: str, **settings: Any) -> nn.Module:
        torch.manual_seed(0)
        config = self.config()
        for part in (config, getattr(config, "vision_config", None), getattr(config, "text_config", None)):
            for name, value in settings.items() if part is not None else ():
                setattr(part, name, value)
        model = transformers.AutoModel.from_config(config, attn_implementation=attention)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model.double().eval()


def images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, dtype=torch.float64)}


def words(pad: str) -> dict[str, Tensor]:
    mask = torch.ones(2, 12, dtype=torch.long)
    if pad:
        mask[0, slice(-4, None) if pad == "right" else slice(4)] = 0
    return {"input_ids": torch.randint(3, 50, (2, 12)), "attention_mask": mask}


def clip() -> Any:
    text = dict(PLAIN, vocab_size=50, max_position_embeddings=16, eos_token_id=49, bos_token_id=1)
    return transformers.CLIPConfig(
        text_config=text, vision_config=dict(PLAIN, image_size=32, patch_size=8), projection_dim=16
    )


def both() -> dict[str, Tensor]:
    inputs = {**images(), **words("right")}
    inputs["input_ids"][:, 6] = 49
    return inputs


def llama(**more: Any) -> Any:
    return transformers.LlamaConfig(vocab_size=50, max_position_embeddings=32, num_key_value_heads=2, **PLAIN, **more)


def t5() -> Any:
    return transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0
    )


def both_sides() -> dict[str, Tensor]:
    return {**words("right"), "decoder_input_ids": torch.randint(3, 50, (2, 7))}


def padding(inputs: dict[str, Tensor]) -> Tensor:
    return inputs["attention_mask"].bool()


CASES = (
    Case("vit", lambda: transformers.ViTConfig(image_size=32, patch_size=8, **SMALL), images, 2),
    Case("dinov2", lambda: transformers.Dinov2Config(image_size=32, patch_size=8, **SMALL), images, 2),
    Case("clip", clip, both, 4),
    Case(
        "bert",
        lambda: transformers.BertConfig(vocab_size=50, max_position_embeddings=32, **SMALL),
        lambda: words("right"),
        2,
        padding,
    ),
    Case("llama-gqa", llama, lambda: words(""), 2),
    Case("llama-left-padded", llama, lambda: words("left"), 2, padding),
    Case("llama-right-padded", llama, lambda: words("right"), 2, padding),
    Case(
        "mistral-window",
        lambda: transformers.MistralConfig(vocab_size=50, sliding_window=5, num_key_value_heads=2, **PLAIN),
        lambda: words(""),
        2,
    ),
    Case("t5-bias-cross", t5, both_sides, 6),
)


def outputs(case: Case, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    out = model(**inputs)
    if hasattr(out, "logits_per_image"):
        return torch.cat([out.image_embeds.flatten(), out.text_embeds.flatten(), out.logits_per_image.flatten()])
    hidden: Tensor = out.last_hidden_state
    return hidden if case.valid is None else hidden[case.valid(inputs)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_with_all_keys_it_is_eager_attention_forward_and_backward(case: Case) -> None:
    """As near to float64 as eager attention is.  (Its softmax is in float32 always, so SDPA's float64 is the judge.)"""
    inputs = case.inputs()
    exact, plain, ours = (
        outputs_and_gradients(case, attention, inputs, dtype)
        for attention, dtype in (("sdpa", torch.float64), ("eager", torch.float32), ("kvt", torch.float32))
    )
    assert exact.keys() == plain.keys() == ours.keys()
    # gradients that are zero but for rounding (a bias of the keys) are judged by the size of the others
    unit = torch.finfo(torch.float32).eps * max(float(x.abs().max()) for x in exact.values())
    for name, x in exact.items():
        budget = FACTOR * (float((plain[name] - x).abs().max()) + unit)
        assert float((ours[name] - x).abs().max()) <= budget, name


def outputs_and_gradients(
    case: Case, attention: str, inputs: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    model = case.model(attention, kvt_topk=None).to(dtype)
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    out = outputs(case, model, inputs)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: x.detach().double() for name, x in {"output": out, **grads}.items()}


@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[-1]], ids=str)
def test_every_attention_runs_the_op_with_the_k_of_the_config(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvt_compile.integrations import transformers as ours

    asked: list[Any] = []
    real = ours.topk_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        asked.append(kwargs["topk"])
        return real(*args, **kwargs)

    monkeypatch.setattr(ours, "topk_attention", spy)
    model = case.model("kvt", kvt_topk=3)
    with torch.no_grad():
        outputs(case, model, case.inputs())
        assert asked == [3] * case.attentions
        kvt_compile.set_topk(model, 4)
        outputs(case, model, case.inputs())
        assert asked[case.attentions :] == [4] * case.attentions
        with kvt_compile.options(topk=2):
            outputs(case, model, case.inputs())
        assert asked[2 * case.attentions :] == [2] * case.attentions


def passes_alone(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
    """backend="kvt" without Inductor."""
    assert run_passes(gm, Policy(0.3)).changed
    forward: Callable[..., Any] = gm.forward
    return forward


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_fewer_keys_is_what_the_rewrite_of_the_eager_model_gives(case: Case) -> None:
    """Two ways in, one meaning."""
    inputs = case.inputs()
    with torch.no_grad():
        ours = outputs(case, case.model("kvt", kvt_topk=0.3), inputs)
        theirs = outputs(case, torch.compile(case.model("eager"), backend=passes_alone), inputs)
        dense = outputs(case, case.model("eager"), inputs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert not torch.allclose(ours, dense, atol=1e-3)


def decoded(model: nn.Module, ids: Tensor, pieces: list[int], **more: Any) -> Tensor:
    """The hidden states of `ids`, given to the model piece by piece with a KV cache."""
    cache = None
    states = []
    for piece in ids.split(pieces, dim=1):
        out = model(input_ids=piece, past_key_values=cache, use_cache=True, **more)
        cache = out.past_key_values
        states.append(out.last_hidden_state)
    return torch.cat(states, 1)


@pytest.mark.parametrize("pieces", [[8, 1, 1, 1, 1], [5, 7]], ids=["prompt", "chunks"])
@pytest.mark.parametrize("topk", [None, 3], ids=["all-keys", "three-keys"])
def test_decoding_with_a_cache_equals_the_whole_sequence(topk: int | None, pieces: list[int]) -> None:
    """A number of keys means the same in both; a share would be of the keys there are so far."""
    case = CASES[4]
    model, ids = case.model("kvt", kvt_topk=topk), torch.randint(3, 50, (2, 12))
    with torch.no_grad():
        whole = model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(decoded(model, ids, pieces), whole, rtol=0, atol=1e-12 * float(whole.abs().max()))


def test_a_preallocated_cache_equals_the_whole_sequence() -> None:
    model, ids = CASES[4].model("kvt", kvt_topk=3), torch.randint(3, 50, (2, 12))
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        whole = model(input_ids=ids).last_hidden_state
        first = model(input_ids=ids[:, :8], past_key_values=cache, use_cache=True).last_hidden_state
        rest = model(input_ids=ids[:, 8:9], past_key_values=cache, use_cache=True).last_hidden_state
    torch.testing.assert_close(torch.cat([first, rest], 1), whole[:, :9], rtol=0, atol=1e-12)


def test_generation_is_what_eager_generates() -> None:
    texts = []
    for attention in ("eager", "kvt"):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(llama(kvt_topk=None), attn_implementation=attention)
        ids = torch.arange(3, 9).expand(2, -1)
        texts.append(model.eval().double().generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0))
    assert torch.equal(*texts)


def test_k_lives_in_the_config_and_is_saved_with_it(tmp_path: Path) -> None:
    config = transformers.ViTConfig(image_size=32, patch_size=8, kvt_topk=0.25, **SMALL)
    model = transformers.AutoModel.from_config(config, attn_implementation="kvt").eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["kvt_topk"] == 0.25
    again = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="kvt").eval()
    assert again.config.kvt_topk == 0.25
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(x).last_hidden_state, model(x).last_hidden_state)
        assert list(model.state_dict()) == list(transformers.AutoModel.from_config(config).state_dict())


def test_one_attention_can_have_its_own_k_and_its_neighbour_keeps_its_own() -> None:
    model = CASES[0].model("kvt", kvt_topk=None)
    eager = CASES[0].model("eager")
    x = images()
    paths = [name for name, part in eager.named_modules() if type(part).__name__ == "ViTAttention"]
    kvt_compile.set_topk(model, {paths[1]: 3})
    with torch.no_grad():
        mixed = kvt_compile.rewrite(
            eager, example_kwargs=x, topk={paths[0]: 1.0, paths[1]: 3}, force_rewrite=True
        ).module(**x)
        found, expected = model(**x).last_hidden_state, mixed["last_hidden_state"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_training_with_dropout_and_autocast() -> None:
    config = transformers.ViTConfig(image_size=32, patch_size=8, **{**SMALL, "attention_probs_dropout_prob": 0.5})
    model = transformers.AutoModel.from_config(config, attn_implementation="kvt").train()
    x = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, second = model(x).last_hidden_state, model(x).last_hidden_state
    assert not torch.equal(first, second)
    first.float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_it_compiles_as_one_graph() -> None:
    case = CASES[4]
    model, inputs = case.model("kvt", kvt_topk=3), case.inputs()
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).last_hidden_state
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**inputs, use_cache=False).last_hidden_state, expected)


@pytest.mark.parametrize("topk", [0, 1.5, "half", True, float("nan")], ids=str)
def test_a_config_that_cannot_be_meant_is_refused_in_words(topk: Any) -> None:
    model = CASES[0].model("kvt", kvt_topk=topk)
    with pytest.raises((TypeError, ValueError), match="topk is"):
        model(**images())


@pytest.mark.parametrize("unknown", ["softcap", "s_aux", "cache"])
def test_what_it_cannot_compute_says_what_can(unknown: str) -> None:
    from kvt_compile.integrations.transformers import attention

    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"attn_implementation=\"eager\""):
        attention(nn.Module(), q, q, q, None, **{unknown: torch.ones(2)})


def test_a_pattern_that_matches_no_attention_names_those_there_are() -> None:
    with pytest.raises(kvt_compile.OptionError, match=r"blocks.*the sites are: .*layer"):
        kvt_compile.set_topk(CASES[0].model("kvt"), {"blocks.*": 3})
    with pytest.raises(kvt_compile.OptionError, match="no k-NN attention"):
        kvt_compile.set_topk(copy.deepcopy(CASES[0].model("eager")), 3)
