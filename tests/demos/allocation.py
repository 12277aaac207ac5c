"""Compares allocations of ranks with plain LoRA on one model and one file of examples, and prints tables (Markdown).

    cargo build --release
    python tests/demos/allocation.py --model DIR_OF_SMOLLM2 --data ITEMS.jsonl [--steps 200] [--seeds 0 1 2] [--lrs 2e-4 5e-4 1e-3]

Every side is trained at each learning rate with each seed; its figure is that of the learning rate with the lowest mean loss. A difference that is
not larger than the spread over the seeds of either side is called so. The held-out part is the last tenth of the examples.
"""

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from safetensors import safe_open
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[2]


def sides(steps):
    """Name, rank, and settings of each side: all end with an average rank of 2, or with at most 8."""
    return {
        "lora r=2": ["--rank", 2],
        "lora r=8": ["--rank", 8],
        "sora r=8": ["--allocation", "sora", "--rank", 8, "--set", "allocation.options.threshold=1e-3"],
        "adalora 3 to 2": [
            *("--allocation", "adalora", "--rank", 3, "--set", "allocation.options.target_rank=2"),
            *("--set", f"allocation.options.t_init={steps // 10}", "--set", f"allocation.options.t_final={steps // 3}"),
        ],
        "increlora to 2": [
            *("--allocation", "increlora", "--set", "allocation.options.target_rank=2"),
            *("--set", f"allocation.options.init_warmup={steps // 10}"),
            *("--set", f"allocation.options.increment_interval={max(1, steps // 20)}", "--set", "allocation.options.top_h=24"),
        ],
        "dylora r=8": ["--allocation", "dylora", "--rank", 8, "--set", "adapter.options.update=all"],
    }


class Workplace:
    def __init__(self, args, folder):
        self.args, self.folder = args, folder
        lines = Path(args.data).read_text().splitlines()[: args.examples]
        held = max(1, len(lines) // 10)
        self.train, self.held = folder / "train.jsonl", folder / "held.jsonl"
        self.train.write_text("\n".join(lines[:-held]))
        self.held.write_text("\n".join(lines[-held:]))

    def lowrank(self, *words):
        done = subprocess.run([self.args.program, *map(str, words)], capture_output=True, text=True, cwd=self.folder)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(map(str, words))}\n{done.stderr}")
        return done.stdout

    def finetune(self, name, settings, lr, seed):
        out = self.folder / f"{name}-{lr}-{seed}".replace(" ", "-").replace("=", "")
        self.lowrank(
            *("finetune", "--quiet", "--model", self.args.model, "--data", self.train, "--out", out, "--seed", seed),
            *("--steps", self.args.steps, "--lr", lr, "--seq-len", self.args.seq_len, "--batch", self.args.batch),
            *("--set", f"data.validation={self.held}", "--set", "eval.every=0", "--set", "log.sample_tokens=0"),
            *("--set", "log.tensorboard=false", "--set", "data.packing=true", *settings),
        )
        summary = json.loads((out / "summary.json").read_text())
        rank = out / "rank.json"
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return {
            "loss": summary["final_validation_loss"],
            "seconds": summary["seconds"],
            "peak": summary["peak_rss_bytes"],
            "step": statistics.median(b["seconds"] - a["seconds"] for a, b in zip(lines, lines[1:])),
            "ranks": [layer["rank"] for layer in json.loads(rank.read_text())["layers"].values()] if rank.exists() else None,
            "adapter": sorted((out / "checkpoints").glob("step-*"))[-1],
        }

    def loss(self, adapter, *more):
        told = self.lowrank(
            *("eval", "--quiet", "--model", self.args.model, "--data", self.held, "--seq-len", self.args.seq_len),
            *("--adapter", adapter, *more),
        )
        return float(next(line for line in told.splitlines() if line.startswith("loss")).split()[1])


def truncated(adapter, rank, out):
    """The first components of a plain LoRA, at their scale."""
    out.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["lora_alpha"] = config["lora_alpha"] * rank / config["r"]
    config["r"] = rank
    (out / "adapter_config.json").write_text(json.dumps(config))
    with safe_open(adapter / "adapter_model.safetensors", "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    cut = lambda name, value: value[:rank] if "lora_A" in name else value[:, :rank]
    save_file({name: cut(name, value).copy() for name, value in tensors.items()}, out / "adapter_model.safetensors")
    return out


def best(place, name, settings):
    """Results over the seeds at the learning rate of the lowest mean loss."""
    tried = [
        [place.finetune(name, settings, lr, seed) for seed in place.args.seeds] for lr in place.args.lrs
    ]
    number = min(range(len(tried)), key=lambda i: statistics.mean(run["loss"] for run in tried[i]))
    return place.args.lrs[number], tried[number]


def spread(values):
    return max(values) - min(values)


def shown(values, digits=4):
    return f"{statistics.mean(values):.{digits}f} ± {spread(values) / 2:.{digits}f}"


def verdict(ours, theirs):
    apart = statistics.mean(ours) - statistics.mean(theirs)
    within = abs(apart) <= max(spread(ours), spread(theirs))
    return f"{apart:+.4f}{' (within the spread)' if within else ''}"


def row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=lambda path: Path(path).resolve())
    parser.add_argument("--data", required=True)
    parser.add_argument("--program", default=ROOT / "target" / "release" / "lowrank", type=lambda path: Path(path).resolve())
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lrs", type=float, nargs="+", default=[2e-4, 5e-4, 1e-3])
    parser.add_argument("--examples", type=int, default=480)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--only", nargs="+", help="names of sides, such as 'sora r=8'")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        place = Workplace(args, Path(folder))
        print(f"{platform.processor() or platform.machine()}, {time.strftime('%Y-%m-%d')}, {args.steps} steps, seeds {args.seeds}\n")
        row("side", "learning rate", "held-out loss", "against lora r=8", "components left", "seconds a step", "peak MiB")
        row(*["---"] * 7)
        found = {}
        for name, settings in sides(args.steps).items():
            if args.only and name not in args.only:
                continue
            lr, runs = best(place, name, settings)
            found[name] = runs
            losses = [run["loss"] for run in runs]
            against = verdict(losses, [run["loss"] for run in found["lora r=8"]]) if "lora r=8" in found else ""
            left = [sum(run["ranks"]) for run in runs if run["ranks"]]
            ranks = f"{statistics.mean(left):.0f} (ranks {min(runs[0]['ranks'])} to {max(runs[0]['ranks'])})" if left else ""
            step = statistics.median(run["step"] for run in runs)
            peak = statistics.mean(run["peak"] for run in runs) / 2**20
            row(name, lr, shown(losses), against, ranks, f"{step:.3f}", f"{peak:.0f}")

        if {"lora r=8", "dylora r=8"} <= found.keys():
            print()
            row("rank", "dylora", "lora r=8 truncated", "lora trained at the rank")
            row(*["---"] * 4)
            seconds = sum(run["seconds"] for run in found["dylora r=8"])
            apart = 0.0
            for rank in args.ranks:
                nested = [place.loss(run["adapter"], "--rank", rank) for run in found["dylora r=8"]]
                cut = [
                    place.loss(truncated(run["adapter"], rank, Path(folder) / f"cut-{rank}-{seed}"))
                    for seed, run in zip(args.seeds, found["lora r=8"])
                ]
                _, runs = best(place, f"lora-at-{rank}", ["--rank", rank])
                apart += sum(run["seconds"] for run in runs)
                row(rank, shown(nested), shown(cut), shown([run["loss"] for run in runs]))
            print(f"\nAll ranks took {seconds:.0f} s by dylora and {apart:.0f} s one by one, at the best learning rate of each.")


if __name__ == "__main__":
    main()
