"""Runs Lowrank and its peers on the same shapes in turn, and prints a table of ratios (Markdown).

    pip install -r tests/peers/requirements.txt
    cargo build --release
    python tests/peers/compare.py [--model DIR_OF_SMOLLM2] [--rounds 3] [--json docs/figures/NAME.json]
    python tests/peers/compare.py --table docs/figures/NAME.json

Each row runs ours and theirs alternately, `--rounds` times; a figure is the median of the rounds. Steps of PyTorch are measured eager and through
torch.compile, and the faster of the two counts. The machine should have nothing else to do; `LOWRANK_SIMD` forces our instruction set.
"""

import argparse
import functools
import json
import os
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
        done = subprocess.run([str(word) for word in line], capture_output=True, text=True, cwd=folder)
        if done.returncode:
            sys.exit(done.stderr)
        return steps_of(out)


def pretrain(shape, *arguments, threads=0, data=None):
    arguments = [*(["--data", data.resolve()] if data else []), *arguments]
    common = ["--model", shape, "--set", f"tokenizer.vocab_size={VOCABULARY}", "--batch", 4, "--seq-len", 256]
    cache = ["--set", f"data.cache={ROOT / 'target' / 'peers-cache'}", "--set", f"train.threads={threads}"]
    # The evaluation at the end is no part of a step either.
    short = ["--set", "data.validation_fraction=0.001"]
    return ours("pretrain", *common, *cache, *short, *arguments)


def shaped(shape):
    sizes = SHAPES[shape] | {"vocab": VOCABULARY}
    return [word for name, value in sizes.items() for word in (f"--{name}", value)]


def vision(batch=32):
    import numpy
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        draws = numpy.random.default_rng(0)
        for number in range(2 * batch):
            place = Path(folder) / f"class{number % 2}"
            place.mkdir(exist_ok=True)
            Image.fromarray(draws.integers(0, 256, (224, 224, 3), dtype="uint8")).save(place / f"{number}.png")
        return ours("pretrain", "--model", "vit-small", "--data", folder, "--batch", batch, steps=8)


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


# What the figures are of, and not figures themselves.
FACTS = ("torch", "instructions", "threads")


def alternately(rounds, *sides):
    """Medians over the rounds of each side."""
    turns = [[side() for side in sides] for _ in range(rounds)]
    return tuple({key: value if key in FACTS else statistics.median(run[key] for run in runs)
                  for key, value in runs[0].items()}
                 for runs in zip(*turns))


def against_torch(rounds, mine, what, *arguments):
    """Ours and the faster one of PyTorch eager and compiled, with its name."""
    a, eager, compiled = alternately(rounds, mine, lambda: peer(what, *arguments),
                                     lambda: peer(what, "--compile", *arguments))
    faster = min((eager, "eager"), (compiled, "compiled"), key=lambda side: side[0]["step_seconds"])
    return a, *faster


class Results:
    """The machine and the rows, as they are printed and as JSON."""

    UNITS = {"ms": (1e3, 0), "MiB": (1 / 2**20, 0), "tokens/s": (1, 1)}

    def __init__(self, machine, path=None):
        self.machine, self.rows, self.path = machine, [], path

    def head(self):
        print(", ".join(f"{key} {value}" for key, value in self.machine.items()) + "\n")
        print("| work | Lowrank | peer | ratio |\n|---|---|---|---|", flush=True)

    def row(self, name, figure, left, right, unit, digits=None):
        row = {"work": name, "unit": unit, "digits": digits, "lowrank": left[figure], "peer": right[figure]}
        row |= {key: right[key] for key in FACTS if key in right}
        self.rows.append(row)
        self.line(row)
        if self.path:
            # After every row, so that an interrupted measurement is not lost.
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"machine": self.machine, "rows": self.rows}, indent=1) + "\n")

    def line(self, row):
        (scale, usual), unit = self.UNITS[row["unit"]], row["unit"]
        digits = usual if row["digits"] is None else row["digits"]
        a, b = row["lowrank"] * scale, row["peer"] * scale
        ratio = f"{a / b:.{2 if digits < 3 else 5}f}"
        print(f"| {row['work']} | {a:,.{digits}f} {unit} | {b:,.{digits}f} {unit} | {ratio} |", flush=True)


def machine():
    from importlib.metadata import PackageNotFoundError, version

    info = Path("/proc/cpuinfo").read_text()
    cpu = next((line.partition(":")[2].strip() for line in info.splitlines() if "model name" in line), "unknown")
    facts = {"processor": cpu, "AVX-512": "yes" if " avx512f " in info else "no"}
    facts |= {"LOWRANK_SIMD": os.environ.get("LOWRANK_SIMD", "auto"), "cores": len(os.sched_getaffinity(0))}
    for name in ("torch", "transformers", "peft", "galore-torch"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "missing"
    return facts | {"date": time.strftime("%Y-%m-%d")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of SmolLM2-135M, for fine-tuning and generation")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="text to pretrain on; without it that of `lowrank pretrain`")
    parser.add_argument("--only", help="rows whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the rows there as well")
    parser.add_argument("--table", type=Path, metavar="FILE", help="prints the table of such a file and measures nothing")
    options = parser.parse_args()
    if options.table:
        kept = json.loads(options.table.read_text())
        results = Results(kept["machine"])
        results.head()
        return [results.line(row) for row in kept["rows"]]
    if not LOWRANK.exists():
        sys.exit(f"{LOWRANK} is missing: cargo build --release")
    results = Results(machine(), options.json)
    results.head()
    text = functools.partial(pretrain, data=options.data)
    row, rounds, wanted = results.row, options.rounds, lambda name: not options.only or options.only in name

    for shape in SHAPES:
        name = f"{shape}, AdamW, batch 4 x 256, against PyTorch"
        if wanted(name):
            a, b, way = against_torch(rounds, lambda: text(shape), "pretrain", *shaped(shape))
            row(f"{name} ({way}): step", "step_seconds", a, b, "ms")
            row(f"{name} ({way}): peak memory", "peak_bytes", a, b, "MiB")
    name = "llama-9m, reading data, against its whole step"
    if wanted(name):
        run = text("llama-9m")
        row(name, "seconds", {"seconds": run["data_seconds"]}, {"seconds": run["step_seconds"]}, "ms", digits=3)
    name = "llama-60m, SLTrain rank 128, against the layer in PyTorch"
    if wanted(name):
        sltrain = ["--parameterization", "sltrain", "--set", "model.parameterization.options.rank=128"]
        a, b, way = against_torch(rounds, lambda: text("llama-60m", *sltrain), "pretrain", "--layer", "sltrain",
                                  *shaped("llama-60m"))
        row(f"{name} ({way}): step", "step_seconds", a, b, "ms")
    name = "vit-small, AdamW, batch 32 of 224 x 224, against PyTorch"
    if wanted(name):
        a, b, way = against_torch(rounds, vision, "vit", "--batch", 32, "--steps", 7)
        row(f"{name} ({way}): step", "step_seconds", a, b, "ms")
        row(f"{name} ({way}): peak memory", "peak_bytes", a, b, "MiB")
    name = "llama-60m, optimizer step with renewal, DCT-AdamW against galore-torch, rank 128"
    if wanted(name):
        a, b = alternately(1, optimizer_step, lambda: peer("galore", "--steps", 6, *shaped("llama-60m")))
        row(name, "step_seconds", a, b, "ms")
    name = "llama-60m, two threads against one"
    if wanted(name):
        a, b = alternately(rounds, lambda: text("llama-60m", threads=2), lambda: text("llama-60m", threads=1))
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
