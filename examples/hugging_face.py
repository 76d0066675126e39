"""Hugging Face transformers, two ways: k-NN attention by name in eager code, or through the compiler.

python examples/hugging_face.py
"""

import torchvision_cpu  # noqa: F401, I001 - first: lets torchvision import beside a CPU-only torch

import copy

import torch
import transformers

import kvt_compile
from kvt_compile.integrations.transformers import register

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def by_name() -> None:
    """attn_implementation="kvt": no compiler; k lives in the config and is saved with it."""
    register()
    config = transformers.ViTConfig(image_size=64, patch_size=8, kvt_topk=0.5, **SIZES)
    # (a model keeps the config it is given, and what is written into it: each gets its own)
    model = transformers.AutoModel.from_config(copy.deepcopy(config), attn_implementation="kvt").eval()
    dense = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    dense.load_state_dict(model.state_dict())  # the same checkpoint, whatever the attention
    images = torch.randn(2, 3, 64, 64)

    with torch.no_grad():
        exact = dense(images).last_hidden_state

        def difference() -> float:
            return ((model(images).last_hidden_state - exact).norm() / exact.norm()).item()

        print(f"half of the keys:       {difference():.1e} from dense")
        kvt_compile.set_topk(model, 8)  # another k, for good
        print(f"8 of 65 keys:           {difference():.1e}")
        with kvt_compile.options(topk=None):  # all keys, while this is open
            print(f"all keys:               {difference():.1e}")
            assert difference() < 1e-5


def generate() -> None:
    """A causal model with grouped queries and a key-value cache.  A number of keys, unlike a share, means the same
    while the cache grows: decoding gives what the whole sequence gives."""
    config = transformers.LlamaConfig(vocab_size=100, num_key_value_heads=2, kvt_topk=6, **SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="kvt").eval()
    prompt = torch.randint(3, 100, (1, 12))
    text = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        at_once = model(text[:, :-1]).logits[:, 11:].argmax(-1)
    print(f"generated {text[0, 12:].tolist()}, each token looking at 6 keys")
    assert torch.equal(at_once, text[:, 12:])


def through_the_compiler() -> None:
    """The model as it is; works for every attention transformers has, also for those that "kvt" does not compute."""
    config = transformers.BertConfig(vocab_size=100, **SIZES)
    model = transformers.AutoModel.from_config(config).eval()
    report = kvt_compile.explain(model, input_ids=torch.randint(0, 100, (2, 32)), topk=0.5)
    print(report.summary)
    assert report.counts["fused"] == 2
    # torch.compile(model, backend="kvt", options={"topk": 0.5}) is all there is to it


def main() -> None:
    torch.manual_seed(0)
    by_name()
    generate()
    through_the_compiler()


if __name__ == "__main__":
    main()
