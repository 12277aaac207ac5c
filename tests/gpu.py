"""Trains on a GPU, or on a software Vulkan driver, and compares every loss and gradient norm with the CPU's.

    python tests/gpu.py                        # build with the feature `wgpu`, run on the default adapter
    python tests/gpu.py --software             # on the software driver SwiftShader, which Debian's package chromium-common carries
    python tests/gpu.py --program lowrank --device wgpu:1 --json losses.json

Runs a tiny LLaMA for a few steps with every optimizer, every parameterization, every adapter structure, every training rule and every
allocation, once with --device cpu and once with the other. Ends with 1 if a loss differs by more than 1e-4, or the norm of a gradient by more than a thousandth of it.
Every run compiles its kernels anew: half a minute on a card, one to two with --software; --jobs N runs several at a time, --only NAME
chooses some.
The operations themselves: BURN_DEVICE=flex cargo test --release -p lowrank-kernels --features flex,wgpu --lib ops
"""

import argparse
import concurrent.futures
import itertools
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
SWIFTSHADER = pathlib.Path("/usr/lib/chromium/vk_swiftshader_icd.json")
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-4, 1e-3
WIDTH = ["model.hidden_size=64", "model.intermediate_size=128", "model.num_hidden_layers=2", "model.num_attention_heads=4"]
# Settings that a run of a few steps on so narrow a model needs.
SPECIAL = {
    "loca": ["adapter.options.learn_location_iters=0"],
    "sorsa": ["adapter.rank=4"],
    "relora": ["model.parameterization.options.reset_every=3", "model.parameterization.options.restart_warmup=1"],
    "loro": ["model.parameterization.options.exact_every=3", "model.parameterization.options.restart_warmup=1"],
    # Of more directions some lie in the noise of f32, which differs between devices, and count in full.
    "dion": ["optimizer.options.rank=4"],
    **{name: ["optimizer.options.rank=16"] for name in ("galore", "galore-8bit", "q-galore", "fira")},
}


def built():
    """Program with the feature `wgpu`, in a target folder of its own so that other builds keep theirs."""
    # Host code of a GPU run needs no optimisation, and CubeCL takes long to optimise.
    environment = os.environ | {"CARGO_TARGET_DIR": str(ROOT / "target/gpu"), "CARGO_PROFILE_RELEASE_OPT_LEVEL": "0"}
    command = ["cargo", "build", "--release", "--package", "lowrank-train", "--features", "wgpu"]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    return ROOT / "target/gpu/release/lowrank"


def software(environment):
    """Environment that hides every Vulkan driver but SwiftShader, which is installed if it is missing."""
    if not SWIFTSHADER.exists():
        packages = ["chromium-common", "libvulkan1"]
        subprocess.run(["apt-get", "install", "-y", "--no-install-recommends", *packages], check=True)
    # Older loaders read the second name.
    return environment | {"VK_DRIVER_FILES": str(SWIFTSHADER), "VK_ICD_FILENAMES": str(SWIFTSHADER)}


def names(program, heading):
    """Names that `lowrank methods` lists below a heading."""
    text = subprocess.run([program, "methods"], check=True, capture_output=True, text=True).stdout
    section = text.split(heading, 1)[1].split("\n\n", 2)[1]
    return [line.split()[0] for line in section.splitlines()[1:]]


def material(folder):
    """Text and examples that are the same everywhere."""
    sources = sorted((ROOT / "optim/kernels/src").rglob("*.rs"))
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    (folder / "text.txt").write_text(text[:300_000], encoding="utf-8")
    examples = ({"prompt": f"number {i} is ", "completion": f"value {i * 7 % 13} and more"} for i in range(48))
    (folder / "examples.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))


def pretraining(label, *settings):
    flags = ["pretrain", "--model", "llama-9m", "--data", "text.txt", "--tokenizer", "bytes", "--steps", "6"]
    return label, flags, [*WIDTH, *settings]


def finetuning(label, flags, settings=(), steps=4):
    return label, ["finetune", "--model", "BASE", "--data", "examples.jsonl", "--steps", str(steps), *flags], settings


def runs(program):
    """Label, flags and settings of each run; the first one trains the base of the fine-tunings."""
    yield pretraining("adamw")
    yield pretraining("adamw checkpointed", "train.backward=checkpointed")
    yield pretraining("adamw per-layer", "train.backward=per-layer", "optimizer.clip=0")
    yield pretraining(
        "sltrain, adamw-8bit, per-layer",
        "model.parameterization.name=sltrain",
        "optimizer.name=adamw-8bit",
        "train.backward=per-layer",
        "optimizer.clip=0",
    )
    for name in names(program, "Optimizers"):
        if name != "adamw":
            yield pretraining(name, f"optimizer.name={name}", *SPECIAL.get(name, []))
    for name in names(program, "Parameterizations"):
        if name != "dense":
            yield pretraining(name, f"model.parameterization.name={name}", *SPECIAL.get(name, []))
    for name in names(program, "Adapters of"):
        yield finetuning(name, ["--adapter", name], SPECIAL.get(name, []))
    for name in names(program, "Training rules"):
        if name != "plain":
            yield finetuning(f"lora, {name}", ["--adapter", "lora", "--rule", name])
    for name in names(program, "Allocations"):
        if name == "increlora":
            continue  # its scores are collected on the CPU alone
        yield finetuning(f"allocation {name}", ["--allocation", name], SPECIAL.get(name, []), steps=12)


def figures(folder):
    """Losses and norms of gradients of a run, step by step."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [record[key] for record in records for key in ("loss", "validation_loss") if record.get(key) is not None],
        "norms": [record["grad_norm"] for record in records if record.get("grad_norm") is not None],
    }


def worst(ours, expected, relative):
    """Largest difference; infinite where one has values that the other lacks."""
    if len(ours) != len(expected) or not all(map(math.isfinite, [*ours, *expected])):
        return math.inf
    return max((abs(a - b) / (abs(b) + 1e-6 if relative else 1) for a, b in zip(ours, expected)), default=0.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=pathlib.Path, help="program with CPU and GPU support, instead of building one")
    parser.add_argument("--device", default="wgpu", help="device to compare with the CPU (default: wgpu)")
    parser.add_argument("--software", action="store_true", help="use the software driver SwiftShader")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="runs whose name contains TEXT; may be repeated")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--json", type=pathlib.Path, help="file for the losses and norms of all runs")
    parser.add_argument("--work", type=pathlib.Path, help="folder for the runs, kept (default: a temporary one)")
    args = parser.parse_args()

    environment = software(dict(os.environ)) if args.software else dict(os.environ)
    device = "wgpu:cpu" if args.software and args.device == "wgpu" else args.device
    program = (args.program or built()).resolve()
    work = args.work or pathlib.Path(tempfile.mkdtemp(prefix="lowrank-gpu-"))
    work.mkdir(parents=True, exist_ok=True)
    material(work)

    def train(flags, settings, on, out):
        flags = ["base/checkpoints/step-000006" if flag == "BASE" else flag for flag in flags]
        common = ["--batch", "4", "--seq-len", "64", "--overwrite", "--device", on, "--out", out]
        settings = [*settings, "schedule.warmup_steps=1", "log.every=1"]
        command = [str(program), *flags, *common, *(word for setting in settings for word in ("--set", setting))]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            return None, done.stderr.strip().splitlines()[-1]
        return figures(work / out), json.loads((work / out / "summary.json").read_text()).get("device")

    def compared(number, flags, settings):
        """Figures of both sides, name of the adapter or reason of the failure, worst differences."""
        cpu, error = train(flags, settings, "cpu", f"cpu-{number}" if number else "base")
        gpu, name = train(flags, settings, device, f"gpu-{number}") if cpu else (None, error)
        if not gpu:
            return {"cpu": cpu, "gpu": gpu}, name, [math.inf, math.inf]
        differences = [worst(gpu["losses"], cpu["losses"], False), worst(gpu["norms"], cpu["norms"], True)]
        return {"cpu": cpu, "gpu": gpu}, name, differences

    chosen = [
        (number, *run)
        for number, run in enumerate(runs(program))
        if number == 0 or not args.only or any(text in run[0] for text in args.only)
    ]
    results, failed, adapter = {}, 0, None
    print("worst difference from the CPU: of a loss, nats; of a gradient's norm, relative")
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        # The others start from the base that the first one trains.
        first = compared(chosen[0][0], *chosen[0][2:])
        adapter = first[1] if first[0]["gpu"] else None
        print(f"device {device}: {adapter}")
        others = [pool.submit(compared, number, flags, settings) for number, _, flags, settings in chosen[1:]]
        outcomes = itertools.chain([first], (other.result() for other in others))
        for (_, label, *_), (sides, name, (loss, norm)) in zip(chosen, outcomes):
            good = loss <= LOSS_TOLERANCE and norm <= NORM_TOLERANCE
            failed += not good
            note = "" if good else f"  FAILED {'' if sides['gpu'] else name}"
            print(f"{loss:8.1e} {norm:8.1e}  {label}{note}", flush=True)
            results[label] = sides | {"loss": f"{loss:.1e}", "norm": f"{norm:.1e}"}
    if args.json:
        args.json.write_text(json.dumps({"device": device, "adapter": adapter, "runs": results}, indent=1) + "\n")
    if not args.work:
        shutil.rmtree(work)
    print(f"{len(results) - failed} of {len(results)} runs agree")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
