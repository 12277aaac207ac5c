"""Compares allocations of ranks with plain LoRA on one model and one file of examples, and prints tables (Markdown).

    cargo build --release
    python tests/demos/allocation.py --model DIR_OR_GGUF_OF_SMOLLM2 --work FOLDER [--data ITEMS.jsonl] [--steps 200] [--seeds 0 1 2] [--jobs 2]

Without --data the examples are documented items of the Rust sources below ~/.cargo. Each side is trained at several learning rates with the first
seed, and at the best of them with the others; a difference that is not larger than the spread over the seeds of either side is called so. Results are
kept in FOLDER: a run that was done is not repeated, so that the work may be stopped at any time and go on later. With --jobs several sides are trained
at once, each on its share of the cores. With --times nothing is compared but seconds a step and peaks of memory, in short runs one after the other, on
a machine that does nothing else.
"""

import argparse
import json
import random
import re
import statistics
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path
from threading import Lock

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
        "lora r=8": ["--rank", 8],
        "lora r=2": ["--rank", 2],
        "sora r=8": ["--allocation", "sora", "--rank", 8],
        "sora r=8, threshold 5e-4": ["--allocation", "sora", "--rank", 8, "--set", "allocation.options.threshold=5e-4"],
        "sora r=8, threshold 2e-3": ["--allocation", "sora", "--rank", 8, "--set", "allocation.options.threshold=2e-3"],
        "adalora 3 to 2": [
            *("--allocation", "adalora", "--rank", 3, "--set", "allocation.options.target_rank=2"),
            *("--set", f"allocation.options.t_init={steps // 10}", "--set", f"allocation.options.t_final={steps // 3}"),
        ],
        "increlora to 2": ["--allocation", "increlora", "--set", "allocation.options.target_rank=2", *growth],
        "dylora r=8": ["--allocation", "dylora", "--rank", 8, "--set", "adapter.options.update=all"],
        "dylora r=8, frozen": ["--allocation", "dylora", "--rank", 8],
        "diffora r=8": ["--allocation", "diffora", "--rank", 8, "--set", "allocation.options.sharing=none"],
        # The defaults are made for runs of thousands of steps: here gates move faster, and the prior is as much weaker.
        "bayesian r=8": [
            *("--allocation", "bayesian", "--rank", 8, "--set", "allocation.options.lr_gate=0.1"),
            *("--set", "adapter.options.mu_q=3e-5", "--set", "adapter.options.mu_r=3e-5"),
        ],
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
        self.sides = sides(args.time_steps if args.times else args.steps)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.train, self.held, self.results = (self.folder / name for name in ("train.jsonl", "held.jsonl", "results.json"))
        if not self.train.exists():
            lines = Path(args.data).read_text().splitlines() if args.data else rust_items(args.examples + args.held)
            self.held.write_text("\n".join(lines[args.examples : args.examples + args.held]))
            self.train.write_text("\n".join(lines[: args.examples]))
        self.done = json.loads(self.results.read_text()) if self.results.exists() else {}
        self.writing = Lock()

    def keep(self, key, compute):
        """The result of an earlier run, or a new one."""
        if key not in self.done:
            result = compute()
            with self.writing:
                self.done[key] = result
                beside = self.results.with_suffix(".new")
                beside.write_text(json.dumps(self.done, indent=1))
                beside.rename(self.results)
        return self.done[key]

    def lowrank(self, *words):
        return lowrank(self.args.program, *words, folder=self.folder, threads=max(1, cpu_count() // self.args.jobs))

    def finetune(self, name, settings, lr, seed):
        return self.keep(f"{name}, {lr}, {seed}", lambda: self.train_one(name, settings, lr, seed))

    def train_one(self, name, settings, lr, seed, steps=None):
        out = self.folder / f"{name}-{lr}-{seed}".replace(" ", "-").replace("=", "").replace(",", "")
        self.lowrank(
            *("finetune", "--quiet", "--model", self.args.model, "--data", self.train, "--out", out, "--overwrite"),
            *("--steps", steps or self.args.steps, "--lr", lr, "--seq-len", self.args.seq_len, "--batch", self.args.batch, "--seed", seed),
            *("--set", f"data.validation={self.held}", "--set", "eval.every=0", "--set", "log.sample_tokens=0"),
            *("--set", "log.tensorboard=false", "--set", "data.packing=true", "--set", "data.learn_prompt=true"),
            *("--base", "f32", *settings),
        )
        summary = json.loads((out / "summary.json").read_text())
        rank = out / "rank.json"
        layers = json.loads(rank.read_text())["layers"].values() if rank.exists() else []
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        apart = [after["seconds"] - before["seconds"] for before, after in zip(lines, lines[1:])]
        bops = [layer["relative_bops"] for layer in layers if "relative_bops" in layer]
        return {
            "loss": summary["final_validation_loss"],
            "seconds": summary["seconds"],
            "peak": summary["peak_rss_bytes"],
            "step": statistics.median(apart),
            "mean step": statistics.mean(apart),
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


def components(run):
    """What is left of the adapter, as a cell."""
    ranks = run["ranks"]
    return f"{sum(ranks):,} (ranks {min(ranks)} to {max(ranks)})" if ranks else ""


def compare_losses(place, pool, named):
    """Prints the losses of all sides, and then of all ranks."""
    args = place.args
    results = {name: pool.submit(best, place, name, settings) for name, settings in named.items()}
    plain_ranks = {rank: f"lora r={rank}" for rank in sorted({8, *args.ranks})}
    trained = {
        rank: results[name] if name in results else pool.submit(best, place, name, ["--rank", rank])
        for rank, name in plain_ranks.items()
    }
    halves = {}
    if "diffora r=8" in named:
        # LoRA on the selected layers and on random ones, all at the learning rate that was the best for the search.
        lr, chosen = results["diffora r=8"].result()
        files = {"selected half": Path(chosen[0]["out"]) / "modules.json"}
        files |= {f"random half {number + 1}": file for number, file in random_halves(place, chosen[0])}
        for half, file in files.items():
            for seed in args.seeds:
                settings = ["--rank", 8, "--targets", f"@{file}"]
                halves.setdefault((f"lora r=8, {half}", lr), []).append(
                    pool.submit(place.finetune, f"lora r=8, {half}", settings, lr, seed)
                )
    row("side", "learning rate", "held-out loss", "against lora r=8", "values trained", "components left", "relative bit operations")
    row(*["---"] * 7)

    def line(name, lr, runs):
        losses = [run["loss"] for run in runs]
        against = verdict(losses, [run["loss"] for run in plain]) if plain is not runs else ""
        bops = [run["bops"] for run in runs if run["bops"] is not None]
        row(name, lr, shown(losses), against, f"{runs[0]['parameters']:,}", components(runs[0]), shown(bops) if bops else "")

    _, plain = trained[8].result()
    for name, result in results.items():
        line(name, *result.result())
    for (name, lr), runs in halves.items():
        line(name, lr, [run.result() for run in runs])

    if "dylora r=8" in named:
        compare_ranks(place, pool, {rank: trained[rank].result()[1] for rank in args.ranks}, plain)


def compare_ranks(place, pool, trained, plain):
    """Prints the losses of one DyLoRA, of a LoRA that is cut, and of a LoRA trained at each rank."""
    sides = {name: best(place, name, place.sides[name])[1] for name in ("dylora r=8", "dylora r=8, frozen")}
    print()
    row("rank", *sides, "lora r=8, cut", "lora trained at the rank")
    row(*["---"] * 5)
    for rank, runs in trained.items():
        nested = [list(pool.map(lambda run: place.loss(run["adapter"], "--rank", rank), runs)) for runs in sides.values()]
        cut = [truncated(run["adapter"], rank, Path(run["out"]) / f"cut-{rank}") for run in plain]
        losses = list(pool.map(place.loss, cut))
        row(rank, *map(shown, nested), shown(losses), shown([run["loss"] for run in runs]))


def compare_times(place, named):
    """Prints seconds a step and peaks of memory as ratios to plain LoRA's, in rounds that alternate."""
    row("side", "step, median", "step, mean", "peak of memory")
    row(*["---"] * 4)
    rounds, lr = 3, place.args.lrs[0]
    for name, settings in named.items():
        ratios = {"step": [], "mean step": [], "peak": []}
        for number in range(rounds):
            plain, ours = (
                place.train_one(f"time of {side}", settings, lr, number, place.args.time_steps)
                for side, settings in (("lora", ["--rank", 8]), (name, settings))
            )
            for figure, values in ratios.items():
                values.append(ours[figure] / plain[figure])
        row(name, *(f"{statistics.median(values):.2f}" for values in ratios.values()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=path)
    parser.add_argument("--work", required=True, type=path)
    parser.add_argument("--data")
    add_program(parser)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2], help="learning rates, ascending")
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--held", type=int, default=100, help="examples for the held-out loss")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--only", nargs="+", help="names of sides, such as 'sora r=8'")
    parser.add_argument("--jobs", type=int, default=1, help="sides that are trained at once")
    parser.add_argument("--times", action="store_true", help="compare seconds a step and peaks of memory instead of losses")
    parser.add_argument("--time-steps", type=int, default=24)
    args = parser.parse_args()

    place = Workplace(args)
    named = {name: settings for name, settings in place.sides.items() if not args.only or name in args.only}
    if args.times:
        compare_times(place, named)
        return
    print(f"{args.steps} steps of {args.batch} x {args.seq_len} tokens, {args.examples} examples, seeds {args.seeds}\n")
    with ThreadPoolExecutor(args.jobs) as pool:
        compare_losses(place, pool, named)


if __name__ == "__main__":
    main()
