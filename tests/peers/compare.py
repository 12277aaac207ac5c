"""Runs Lowrank and its peers on the same shapes in turn, and prints a table of ratios (Markdown).

    pip install -r tests/peers/requirements.txt
    cargo build --release
    python tests/peers/compare.py [--model DIR_OF_SMOLLM2] [--rounds 3]

Each row runs ours and theirs alternately, `--rounds` times; a figure is the median of the rounds. The machine should have nothing else to do.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOWRANK = ROOT / "target" / "release" / "lowrank"
SHAPES = {
    "llama-9m": {"layers": 4, "hidden": 128, "intermediate": 352, "heads": 4},
    "llama-60m": {"layers": 8, "hidden": 512, "intermediate": 1376, "heads": 8},
    "llama-130m": {"layers": 12, "hidden": 768, "intermediate": 2048, "heads": 12},
}
VOCABULARY = 8192


def peer(*arguments):
    command = [sys.executable, str(Path(__file__).with_name("peer.py")), *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def steps_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tokens = [line["tokens"] for line in lines]
    seconds = [(now - before) / line["tokens_per_second"] for before, now, line in zip([0, *tokens], tokens, lines)]
    # The first steps make the optimizer's state and warm the caches.
    seconds = seconds[3:]
    # Saving is no part of a step.
    return {
        "step_seconds": statistics.median(seconds),
        "data_seconds": statistics.median(line["data_seconds"] for line in lines[3:]),
        "peak_bytes": lines[-1]["peak_rss_bytes"],
    }


def ours(command, *arguments, steps=10):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        line = [LOWRANK, command, "--out", out, "--steps", steps, "--set", "log.every=1", "--set", "eval.batches=1"]
        line += ["--set", "log.sample_tokens=0", "--set", "log.tensorboard=false", *arguments]
        subprocess.run([str(word) for word in line], check=True, capture_output=True, cwd=folder)
        return steps_of(out)


def pretrain(shape, *arguments, threads=0):
    common = ["--model", shape, "--set", f"tokenizer.vocab_size={VOCABULARY}", "--batch", 4, "--seq-len", 256]
    cache = ["--set", f"data.cache={ROOT / 'target' / 'peers-cache'}", "--set", f"train.threads={threads}"]
    # The evaluation at the end is no part of a step either.
    short = ["--set", "data.validation_fraction=0.001"]
    return ours("pretrain", *common, *cache, *short, *arguments)


def shaped(shape):
    sizes = SHAPES[shape] | {"vocab": VOCABULARY}
    return [word for name, value in sizes.items() for word in (f"--{name}", value)]


def finetune(model, *rule):
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        text = "The quick brown fox jumps over the lazy dog while rain falls on the roofs of the town. " * 12
        data.write_text("".join(json.dumps({"text": f"{number}. {text}"}) + "\n" for number in range(64)))
        arguments = ["--model", model, "--data", data, "--adapter", "lora", "--rank", 16, "--batch", 2, "--seq-len", 256]
        return ours("finetune", *arguments, *rule)


def generate(model, tokens=64):
    speeds = []
    for count in (tokens, 1):
        begin = time.perf_counter()
        line = [LOWRANK, "generate", "--model", model, "--prompt", "The capital of France is", "--greedy"]
        line += ["--tokens", count]
        subprocess.run([str(word) for word in line], check=True, capture_output=True)
        speeds.append(time.perf_counter() - begin)
    # Loading the model is no part of generating.
    return {"tokens_per_second": (tokens - 1) / (speeds[0] - speeds[1])}


def optimizer_step():
    bench = ["cargo", "bench", "--quiet", "-p", "lowrank-optim", "--features", "flex", "--bench", "step", "--", "whole"]
    subprocess.run(bench, check=True, capture_output=True, cwd=ROOT)
    found = ROOT / "target" / "criterion" / "whole" / "dct-adamw-rank-128" / "new" / "estimates.json"
    return {"step_seconds": json.loads(found.read_text())["median"]["point_estimate"] / 1e9}


def alternately(rounds, left, right):
    pairs = [(left(), right()) for _ in range(rounds)]
    return tuple({key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "torch"}
                 for runs in zip(*pairs))


def row(name, figure, left, right, unit, digits=None):
    scale, usual = {"ms": (1e3, 0), "MiB": (1 / 2**20, 0), "tokens/s": (1, 1)}[unit]
    digits = usual if digits is None else digits
    a, b = left[figure] * scale, right[figure] * scale
    print(f"| {name} | {a:,.{digits}f} {unit} | {b:,.{digits}f} {unit} | {a / b:.{2 if digits < 3 else 5}f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of SmolLM2-135M, for fine-tuning and generation")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="rows whose name contains this")
    options = parser.parse_args()
    if not LOWRANK.exists():
        sys.exit(f"{LOWRANK} is missing: cargo build --release")
    from importlib.metadata import version

    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "galore-torch"))
    print(f"{platform.machine()},{cpu.partition(':')[2]}, {versions}, {time.strftime('%Y-%m-%d')}\n")
    print("| work | Lowrank | peer | ratio |\n|---|---|---|---|", flush=True)
    rounds, wanted = options.rounds, lambda name: not options.only or options.only in name

    for shape in SHAPES:
        name = f"{shape}, AdamW, batch 4 x 256, against PyTorch"
        if wanted(name):
            a, b = alternately(rounds, lambda: pretrain(shape), lambda: peer("pretrain", *shaped(shape)))
            row(f"{name}: step", "step_seconds", a, b, "ms")
            row(f"{name}: peak memory", "peak_bytes", a, b, "MiB")
    name = "llama-9m, reading data, against its whole step"
    if wanted(name):
        run = pretrain("llama-9m")
        row(name, "seconds", {"seconds": run["data_seconds"]}, {"seconds": run["step_seconds"]}, "ms", digits=3)
    name = "llama-60m, SLTrain rank 128, against the layer in PyTorch"
    if wanted(name):
        sltrain = ["--parameterization", "sltrain", "--set", "model.parameterization.options.rank=128"]
        a, b = alternately(rounds, lambda: pretrain("llama-60m", *sltrain),
                           lambda: peer("pretrain", "--layer", "sltrain", *shaped("llama-60m")))
        row(f"{name}: step", "step_seconds", a, b, "ms")
    name = "llama-60m, optimizer step with renewal, DCT-AdamW against galore-torch, rank 128"
    if wanted(name):
        a, b = alternately(1, optimizer_step, lambda: peer("galore", "--steps", 6, *shaped("llama-60m")))
        row(name, "step_seconds", a, b, "ms")
    name = "llama-60m, two threads against one"
    if wanted(name):
        a, b = alternately(rounds, lambda: pretrain("llama-60m", threads=2), lambda: pretrain("llama-60m", threads=1))
        row(name, "step_seconds", a, b, "ms")
    if options.model:
        name = "SmolLM2-135M, LoRA rank 16 on all linear, batch 2 x 256, against peft"
        if wanted(name):
            a, b = alternately(rounds, lambda: finetune(options.model),
                               lambda: peer("peft", "--model", options.model, "--batch", 2, "--steps", 8))
            row(f"{name}: step", "step_seconds", a, b, "ms")
            row(f"{name}: peak memory", "peak_bytes", a, b, "MiB")
        name = "SmolLM2-135M, LoRA rank 16, batch 2 x 256, LoRA-Pro efficient against plain LoRA"
        if wanted(name):
            pro = ["--rule", "lora-pro", "--set", "rule.options.mode=efficient"]
            a, b = alternately(rounds, lambda: finetune(options.model, *pro), lambda: finetune(options.model))
            row(f"{name}: step", "step_seconds", a, b, "ms")
        name = "SmolLM2-135M, generation, against transformers"
        if wanted(name):
            a, b = alternately(rounds, lambda: generate(options.model),
                               lambda: peer("generate", "--model", options.model))
            row(name, "tokens_per_second", a, b, "tokens/s")


main()
