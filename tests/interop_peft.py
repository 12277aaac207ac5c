"""Opens adapter folders with peft and compares logits with those stored beside them, or writes adapter folders to be read.

    python interop_peft.py check DIR    DIR/model, DIR/<adapter> and DIR/merged/<adapter> hold folders and expected.safetensors (ids, logits)
    python interop_peft.py tuned MODEL ADAPTER MERGED FILE    the same for one adapter, the model below and the merged one; FILE holds ids,
                                        logits, and 16 tokens with what follows greedily
    python interop_peft.py combined DIR  DIR/composed/<combination> is what peft makes of the adapters DIR/one and DIR/two on DIR/model
    python interop_peft.py write DIR    writes adapters on DIR/model that differ from their start, and DIR/expected_more.safetensors
"""
import json
import re
import sys
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, MissConfig, PeftModel, RandLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM


def base(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits_of(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


def differs(model, expected):
    return (logits_of(model, expected["ids"]) - expected["logits"]).abs().max().item()


def complains(text):
    """Whether a warning names tensors that are missing or left over. What all layers share stands in our files once; peft asks for it once a layer.
    The masks of AdaLoRA, which are read, it takes for patterns of names too."""
    names = re.findall(r"'([^']+)'", text)
    shared = names and all(re.search(r"layers.*\.(randlora_[AB]\.default|lora_E)$", name) for name in names)
    return ("keys" in text or "Unexpected" in text) and not shared


def check(folder):
    adapters = sorted(path.parent for path in folder.glob("*/adapter_config.json"))
    assert adapters, "no adapters"
    told = []
    for adapter in adapters:
        expected = load_file(adapter / "expected.safetensors")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # Frozen projections are kept in the precision of the file; peft cannot shorten the parts of AdaLoRA that way.
            kept = json.loads((adapter / "adapter_config.json").read_text())["peft_type"] != "ADALORA"
            model = PeftModel.from_pretrained(base(folder / "model"), adapter, low_cpu_mem_usage=kept)
        texts = [str(warning.message) for warning in caught]
        assert not [text for text in texts if complains(text)], texts
        difference = differs(model, expected)
        assert difference < 1e-4, f"{adapter.name}: logits differ by {difference}"
        merged = differs(model.merge_and_unload(), expected)
        assert merged < 1e-4, f"{adapter.name}: merged by peft, logits differ by {merged}"
        whole = folder / "merged" / adapter.name
        ours = differs(base(whole), load_file(whole / "expected.safetensors"))
        assert ours < 1e-4, f"{adapter.name}: the merged folder differs by {ours}"
        told.append(f"{adapter.name} {difference:.1e}")
    print("logits differ by", ", ".join(told))


COMBINATIONS = {
    "linear": {},
    "cat": {},
    "svd": {"svd_rank": 4},
    "ties": {"density": 0.5},
    "magnitude_prune": {"density": 0.5},
}


def combined(folder):
    model = PeftModel.from_pretrained(base(folder / "model"), folder / "one", adapter_name="one")
    model.load_adapter(folder / "two", adapter_name="two")
    ids = torch.arange(26).reshape(2, 13) * 7 % model.config.vocab_size
    figures = []
    for name, options in COMBINATIONS.items():
        model.add_weighted_adapter(["one", "two"], [0.7, 0.4], name, combination_type=name, **options)
        model.set_adapter(name)
        theirs = logits_of(model, ids)
        ours = logits_of(PeftModel.from_pretrained(base(folder / "model"), folder / "composed" / name), ids)
        difference = (theirs - ours).abs().max().item() / theirs.abs().max().item()
        assert (theirs - logits_of(base(folder / "model"), ids)).abs().max().item() > 0.1, f"{name} does nothing"
        assert difference < 1e-5, f"{name}: logits differ by {difference} of the largest"
        figures.append(f"{name} {difference:.1e}")
    print("logits of compositions differ by", ", ".join(figures), "of the largest")


def tuned(model, adapter, merged, file):
    expected = load_file(file)
    below = logits_of(base(model), expected["ids"])
    assert (below - expected["logits"]).abs().max().item() > 0.1, "the adapter does nothing"
    opened = PeftModel.from_pretrained(base(model), adapter)
    greedy = expected["greedy"]
    settings = {"do_sample": False, "max_new_tokens": greedy.shape[1] - 16, "eos_token_id": None, "pad_token_id": 0}
    theirs = opened.eval().generate(input_ids=greedy[:, :16], attention_mask=torch.ones_like(greedy[:, :16]), **settings)
    assert theirs.equal(greedy), f"another text: {theirs.tolist()} and {greedy.tolist()}"
    figures = {
        "with the adapter": differs(opened, expected),
        "merged by peft": differs(opened.merge_and_unload(), expected),
        "the merged folder": differs(base(merged), expected),
    }
    largest = expected["logits"].abs().max().item()
    told = ", ".join(f"{name} {figure:.1e}" for name, figure in figures.items())
    assert max(figures.values()) < 1e-3, f"logits differ: {told}"
    print(f"{expected['ids'].numel()} tokens, logits up to {largest:.0f} differ by: {told}")


def write(folder):
    torch.manual_seed(7)
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    configs = {
        "miss": MissConfig(r=5, target_modules=linear, task_type="CAUSAL_LM"),
        "miss_bat": MissConfig(r=4, init_weights="bat", target_modules=linear, task_type="CAUSAL_LM"),
        "miss_mini": MissConfig(r=4, init_weights="mini", mini_r=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
        "pissa": LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=linear, task_type="CAUSAL_LM"),
        "olora": LoraConfig(r=4, lora_alpha=6, init_lora_weights="olora", target_modules=linear, task_type="CAUSAL_LM"),
        "lora_chosen": LoraConfig(r=4, target_modules="all-linear", exclude_modules=["k_proj"], task_type="CAUSAL_LM"),
        "lora_layers": LoraConfig(
            r=4, target_modules=["q_proj", "up_proj"], layers_to_transform=[1], layers_pattern="layers", task_type="CAUSAL_LM"
        ),
        "lora_regex": LoraConfig(r=4, target_modules=r".*\.1\..*(q|down)_proj", task_type="CAUSAL_LM"),
        "randlora": RandLoraConfig(r=4, randlora_alpha=20, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        "randlora_sparse": RandLoraConfig(
            r=4, randlora_alpha=20, sparse=True, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        ),
    }
    ids = torch.randint(0, 61, (2, 11))
    out = {"input_ids": ids, "base_logits": logits_of(base(folder / "model"), ids)}
    for name, config in configs.items():
        model = get_peft_model(base(folder / "model"), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn_like(parameter)
        model.peft_config["default"].base_model_name_or_path = "model"
        model.save_pretrained(folder / name)
        (folder / name / "README.md").unlink(missing_ok=True)
        # As others load it: the base is read anew.
        model = PeftModel.from_pretrained(base(folder / "model"), folder / name)
        out[f"{name}.logits"] = logits_of(model, ids)
        out[f"{name}.merged_logits"] = logits_of(model.merge_and_unload(), ids)
    save_file(out, folder / "expected_more.safetensors", metadata={"format": "pt"})


{"check": check, "combined": combined, "tuned": tuned, "write": write}[sys.argv[1]](*map(Path, sys.argv[2:]))
