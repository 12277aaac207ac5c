"""Compares allocations of ranks with plain LoRA on one model and one file of examples, and prints tables (Markdown).

    cargo build --release
    python tests/demos/allocation.py --model DIR_OR_GGUF_OF_SMOLLM2 --work FOLDER [--data ITEMS.jsonl] [--steps 200] [--seeds 0 1 2] [--lrs 3e-4 1e-3 3e-3]

Without --data the examples are documented items of the Rust sources below ~/.cargo. Each side is trained at each learning rate with the first seed, and
at the best of them with the others; a difference that is not larger than the spread over the seeds of either side is called so. Results are kept in
FOLDER: a run that was done is not repeated, so that the work may be stopped at any time and go on later. Times and peaks of memory are compared only
where the machine did nothing else (--times).
"""

import argparse
import json
import random
import re
import statistics
from pathlib import Path

from program import add_program, at_best_rate, lowrank, path, row
from safetensors import safe_open
from safetensors.numpy import save_file


def sides(steps):
    """Name and settings of each side."""
    growth = [
        *("--set", f"allocation.options.init_warmup={steps // 10}", "--set", "allocation.options.top_h=24"),
        *("--set", f"allocation.options.increment_interval={max(1, steps // 20)}"),
    ]
    return {
        "lora r=2": ["--rank", 2],
        "lora r=8": ["--rank", 8],
        "sora r=8": ["--allocation", "sora", "--rank", 8],
        "sora r=8, threshold 1e-3": ["--allocation", "sora", "--rank", 8, "--set", "allocation.options.threshold=1e-3"],
        "adalora 3 to 2": [
            *("--allocation", "adalora", "--rank", 3, "--set", "allocation.options.target_rank=2"),
            *("--set", f"allocation.options.t_init={steps // 10}", "--set", f"allocation.options.t_final={steps // 3}"),
        ],
        "increlora to 2": ["--allocation", "increlora", "--set", "allocation.options.target_rank=2", *growth],
        "dylora r=8": ["--allocation", "dylora", "--rank", 8, "--set", "adapter.options.update=all"],
        "dylora r=8, frozen": ["--allocation", "dylora", "--rank", 8],
        "diffora r=8": ["--allocation", "diffora", "--rank", 8, "--set", "allocation.options.sharing=none"],
        "bayesian r=8": ["--allocation", "bayesian", "--rank", 8],
        "snella r=8": ["--allocation", "snella", "--rank", 8],
    }


def rust_items(count):
    """Documented items of the crates that Cargo has downloaded, as texts."""
    item = re.compile(r"((?:^[ ]*///.*\n)+)(?:^[ ]*#\[.*\]\n)*(^[ ]*pub (?:const |unsafe |async )*(?:fn|struct|enum|trait) [^\n{;]*)", re.M)
    found = []
    for path in sorted((Path.home() / ".cargo/registry/src").glob("*/*/src/**/*.rs")):
        for docs, signature in item.findall(path.read_text(errors="ignore")):
            docs = "\n".join(line.strip() for line in docs.splitlines())
            if 40 < len(docs) < 400 and len(signature) < 200:
                found.append(f"{docs}\n{signature.strip()}\n")
    random.Random(0).shuffle(found)
    return [json.dumps({"text": text}) for text in found[:count]]


class Workplace:
    def __init__(self, args):
        self.args, self.folder = args, args.work
        self.folder.mkdir(parents=True, exist_ok=True)
        self.train, self.held, self.results = (self.folder / name for name in ("train.jsonl", "held.jsonl", "results.json"))
        if not self.train.exists():
            lines = Path(args.data).read_text().splitlines()[: args.examples] if args.data else rust_items(args.examples)
            held = max(1, len(lines) // 10)
            self.held.write_text("\n".join(lines[-held:]))
            self.train.write_text("\n".join(lines[:-held]))
        self.done = json.loads(self.results.read_text()) if self.results.exists() else {}

    def keep(self, key, compute):
        """The result of an earlier run, or a new one."""
        if key not in self.done:
            self.done[key] = compute()
            beside = self.results.with_suffix(".new")
            beside.write_text(json.dumps(self.done, indent=1))
            beside.rename(self.results)
        return self.done[key]

    def lowrank(self, *words):
        return lowrank(self.args.program, *words, folder=self.folder)

    def finetune(self, name, settings, lr, seed):
        return self.keep(f"{name}, {lr}, {seed}", lambda: self.train_one(name, settings, lr, seed))

    def train_one(self, name, settings, lr, seed):
        out = self.folder / f"{name}-{lr}-{seed}".replace(" ", "-").replace("=", "").replace(",", "")
        self.lowrank(
            *("finetune", "--quiet", "--model", self.args.model, "--data", self.train, "--out", out, "--overwrite"),
            *("--steps", self.args.steps, "--lr", lr, "--seq-len", self.args.seq_len, "--batch", self.args.batch, "--seed", seed),
            *("--set", f"data.validation={self.held}", "--set", "eval.every=0", "--set", "log.sample_tokens=0"),
            *("--set", "log.tensorboard=false", "--set", "data.packing=true", "--set", "data.learn_prompt=true"),
            *("--base", "f32", *settings),
        )
        summary = json.loads((out / "summary.json").read_text())
        rank = out / "rank.json"
        layers = json.loads(rank.read_text())["layers"].values() if rank.exists() else []
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        bops = [layer["relative_bops"] for layer in layers if "relative_bops" in layer]
        return {
            "loss": summary["final_validation_loss"],
            "seconds": summary["seconds"],
            "peak": summary["peak_rss_bytes"],
            "step": statistics.median(b["seconds"] - a["seconds"] for a, b in zip(lines, lines[1:])),
            "parameters": summary["parameters"],
            "ranks": [layer["rank"] for layer in layers],
            "bops": statistics.mean(bops) if bops else None,
            "adapter": str(sorted((out / "checkpoints").glob("step-*"))[-1]),
            "out": str(out),
        }

    def loss(self, adapter, *more):
        return self.keep(f"loss of {adapter} {' '.join(map(str, more))}", lambda: self.measure(adapter, more))

    def measure(self, adapter, more):
        told = self.lowrank(
            *("eval", "--quiet", "--model", self.args.model, "--data", self.held, "--seq-len", self.args.seq_len),
            *("--adapter", adapter, *more),
        )
        return float(next(line for line in told.splitlines() if line.startswith("loss")).split()[1])


def truncated(adapter, rank, out):
    """The first components of a plain LoRA, at their scale."""
    adapter = Path(adapter)
    out.mkdir(exist_ok=True)
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
    return at_best_rate(lambda lr, seed: place.finetune(name, settings, lr, seed), place.args.lrs, place.args.seeds)


def spread(values):
    return max(values) - min(values)


def shown(values, digits=4):
    return f"{statistics.mean(values):.{digits}f} ± {spread(values) / 2:.{digits}f}"


def verdict(ours, theirs):
    apart = statistics.mean(ours) - statistics.mean(theirs)
    within = abs(apart) <= max(spread(ours), spread(theirs))
    return f"{apart:+.4f}{' (within the spread)' if within else ''}"


def random_halves(place, chosen):
    """Files with random layers, as many in each block as the search has selected."""
    run = Path(chosen["out"])
    selected = json.loads((run / "modules.json").read_text())["modules"]
    blocks = {}
    for layer in json.loads((run / "rank.json").read_text())["layers"]:
        blocks.setdefault(layer.rsplit(".", 2)[0], []).append(layer)
    for number in range(3):
        draws = random.Random(number)
        picked = [layer for layers in blocks.values() for layer in sorted(draws.sample(layers, len(set(layers) & set(selected))))]
        file = place.folder / f"random-{number}.json"
        file.write_text(json.dumps({"step": 0, "modules": picked}))
        yield number, file


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=path)
    parser.add_argument("--work", required=True, type=path)
    parser.add_argument("--data")
    add_program(parser)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lrs", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--examples", type=int, default=330)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--only", nargs="+", help="names of sides, such as 'sora r=8'")
    parser.add_argument("--times", action="store_true", help="also print seconds a step and peaks of memory")
    args = parser.parse_args()

    place = Workplace(args)
    print(f"{args.steps} steps of {args.batch} x {args.seq_len} tokens, {args.examples} examples, seeds {args.seeds}\n")
    timed = ["seconds a step", "peak MiB"] if args.times else []
    row("side", "learning rate", "held-out loss", "against lora r=8", "values trained", "components left", "relative bit operations", *timed)
    row(*["---"] * (7 + len(timed)))
    found = {}

    def line(name, lr, runs):
        losses = [run["loss"] for run in runs]
        against = verdict(losses, [run["loss"] for run in found["lora r=8"]]) if "lora r=8" in found and name != "lora r=8" else ""
        left = [sum(run["ranks"]) for run in runs if run["ranks"]]
        ranks = f"{statistics.mean(left):.0f} (ranks {min(runs[0]['ranks'])} to {max(runs[0]['ranks'])})" if left else ""
        bops = [run["bops"] for run in runs if run["bops"] is not None]
        figures = [f"{statistics.median(run['step'] for run in runs):.3f}", f"{statistics.mean(run['peak'] for run in runs) / 2**20:.0f}"]
        row(name, lr, shown(losses), against, f"{runs[0]['parameters']:,}", ranks, shown(bops) if bops else "", *figures[: len(timed)])

    for name, settings in sides(args.steps).items():
        if args.only and name not in args.only:
            continue
        lr, found[name] = best(place, name, settings)
        line(name, lr, found[name])
        if name == "diffora r=8":
            # LoRA on the selected layers and on random ones, all at one learning rate.
            halves = {"selected half": Path(found[name][0]["out"]) / "modules.json"}
            halves |= {f"random half {number + 1}": file for number, file in random_halves(place, found[name][0])}
            for half, file in halves.items():
                other = f"lora r=8, {half}"
                runs = [place.finetune(other, ["--rank", 8, "--targets", f"@{file}"], lr, seed) for seed in args.seeds]
                line(other, lr, runs)

    if {"lora r=8", "dylora r=8"} <= found.keys():
        print()
        row("rank", "dylora", "lora r=8 truncated", "lora trained at the rank")
        row(*["---"] * 4)
        seconds = sum(run["seconds"] for run in found["dylora r=8"])
        apart = 0.0
        for rank in args.ranks:
            nested = [place.loss(run["adapter"], "--rank", rank) for run in found["dylora r=8"]]
            cut = [
                place.loss(truncated(run["adapter"], rank, place.folder / f"cut-{rank}-{seed}"))
                for seed, run in zip(args.seeds, found["lora r=8"])
            ]
            _, runs = best(place, f"lora r={rank}", ["--rank", rank])
            apart += sum(run["seconds"] for run in runs)
            row(rank, shown(nested), shown(cut), shown([run["loss"] for run in runs]))
        if args.times:
            print(f"\nAll ranks took {seconds:.0f} s by dylora and {apart:.0f} s one by one, at the best learning rate of each.")


if __name__ == "__main__":
    main()
