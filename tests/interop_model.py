"""Opens a model folder with transformers and compares its logits with those stored beside it, or writes a sharded folder to be read.

    python interop_model.py check DIR [TYPE]    DIR holds the folder, of weights of this type, and expected.safetensors (ids, logits)
    python interop_model.py write DIR           writes a small sharded model and its expected.safetensors
    python interop_model.py fetch DIR           puts SmolLM2-135M-Instruct there as a GGUF file
    python interop_model.py greedy DIR          DIR holds a folder and greedy.json (prompts with the tokens that must follow)
"""
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import smollm2


def logits_of(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


def check(folder, kind=None):
    expected = load_file(folder / "expected.safetensors")
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[keys], f"{keys}: {info[keys]}"
    config = json.loads((folder / "config.json").read_text())
    assert [type(model).__name__] == config["architectures"], type(model)
    if kind is not None:
        weights = load_file(folder / "model.safetensors")
        assert config["dtype"] == kind and {str(w.dtype) for w in weights.values()} == {f"torch.{kind}"}
    difference = (logits_of(model, expected["ids"]) - expected["logits"]).abs().max().item()
    assert difference < 1e-4, f"logits differ by {difference}"
    if (folder / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = (folder / "text.txt").read_text()
        ids = tokenizer(text).input_ids
        assert ids == expected["text_ids"].tolist(), "the tokenizer gives other ids"
        assert tokenizer.decode(ids, skip_special_tokens=True) == text, "the tokenizer does not give the text back"
    print(f"logits differ by {difference:.2e}")


def write(folder):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rope_theta=5e4, rms_norm_eps=1e-5, tie_word_embeddings=False,
        initializer_range=0.2, eos_token_id=5,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1, "the model was not sharded"
    ids = torch.randint(0, 97, (2, 11))
    save_file({"ids": ids, "logits": logits_of(model, ids)}, folder / "expected.safetensors")


def greedy(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "folder", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "folder")
    for prompt, expected in json.loads((folder / "greedy.json").read_text()).items():
        ids = torch.tensor([tokenizer(prompt).input_ids])
        settings = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": len(expected), "eos_token_id": None, "pad_token_id": 0}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :].tolist()
        assert made == expected, f"another text: {tokenizer.decode(made)!r} and {tokenizer.decode(expected)!r}"
        print(repr(tokenizer.decode(made)))


def fetch(folder):
    print(smollm2.file(folder))


{"check": check, "write": write, "greedy": greedy, "fetch": fetch}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
