"""Trains on digits turned by some angles and measures on an angle that was left out: PEGO, LoRA and all weights (Markdown).

    python tests/demos/digits.py digits --rotate
    python tests/demos/glyphs.py glyphs
    lowrank pretrain --model vit-micro --data glyphs --batch 64 --minutes 10 --set data.images.rotate=10 --out runs/glyphs
    python tests/demos/domains.py --model runs/glyphs/checkpoints/LAST --data digits --glyphs glyphs --leave-out 90 [--seeds 0 1 2]

Each side is trained at each learning rate with the first seed, and at the rate of the lowest loss on held-out images of the angles that it learns from
with the others. The drift is the mean distance that the embeddings of the glyphs move, as a share of their lengths.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy
from program import add_program, at_best_rate, lowrank, mean_and_deviation, path, row
from safetensors.numpy import load_file

TARGETS = "q_proj,k_proj,v_proj,o_proj,fc1,fc2"
# Adapters of a group, and their rank.
GROUP, RANK = 4, 4
LORA_RATES, FULL_RATES = [1e-3, 3e-3, 1e-2], [3e-4, 1e-3, 3e-3]


def sides(width):
    """Settings and learning rates. PEGO's default strength belongs to a width of 768: its terms are sums over d_out x d_out entries."""
    strength = 1e-3 * (768 / width) ** 2
    lora = lambda rank: ["--adapter", "lora", "--rank", rank, "--alpha", rank, "--targets", TARGETS]
    pego = ["--adapter", "pego", "--rank", RANK, "--alpha", RANK, "--targets", TARGETS]
    with_strength = lambda value: pego + ["--set", f"adapter.options.lambda={value}"]
    return {
        "all weights": (["--adapter", "none"], FULL_RATES),
        f"LoRA of rank {RANK}": (lora(RANK), LORA_RATES),
        f"LoRA of rank {GROUP * RANK}": (lora(GROUP * RANK), LORA_RATES),
        f"PEGO {GROUP} x {RANK}, without its terms": (with_strength(0), LORA_RATES),
        f"PEGO {GROUP} x {RANK}": (with_strength(1e-3), LORA_RATES),
        f"PEGO {GROUP} x {RANK}, strength by width": (with_strength(strength), LORA_RATES),
    }


class Workplace:
    def __init__(self, args, folder):
        self.args, self.folder = args, folder
        self.before = self.embeddings(args.model, [], "before")

    def embeddings(self, model, more, name):
        out = self.folder / f"{name}.safetensors"
        lowrank(self.args.program, "embed", "--quiet", "--model", model, *more, "--data", self.args.glyphs, "--out", out)
        return load_file(out)["embeddings"]

    def chosen(self, out):
        """The checkpoint of the lowest loss on what is held out of the angles that are learned."""
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses = {line["step"]: line["validation_loss"] for line in lines if line.get("validation_loss") is not None}
        kept = list((out / "checkpoints").glob("step-*"))
        return min(kept, key=lambda path: (losses.get(int(path.name[5:]), float("inf")), path.name))

    def run(self, name, settings, lr, seed):
        out = self.folder / f"{name}-{lr}-{seed}".replace(" ", "-").replace(",", "")
        lowrank(
            *(self.args.program, "finetune", "--quiet", "--model", self.args.model, "--data", self.args.data / "train.jsonl", "--out", out),
            *("--leave-out", self.args.leave_out, "--steps", self.args.steps, "--batch", 30, "--lr", lr, "--seed", seed),
            *("--set", "data.images.balance_domains=true", "--set", f"eval.every={self.args.steps // 4}"),
            *("--set", f"checkpoint.every={self.args.steps // 4}", "--set", "log.tensorboard=false", *settings),
        )
        best = json.loads((out / "summary.json").read_text())["best_validation_loss"]
        checkpoint = self.chosen(out)
        whole = (checkpoint / "config.json").exists()
        model, more = (checkpoint, []) if whole else (self.args.model, ["--adapter", checkpoint])
        told = lowrank(self.args.program, "eval", "--quiet", "--model", model, *more, "--data", self.args.data / "test.jsonl")
        domains = {}
        for line in told.splitlines():
            words = line.split()
            if words[:1] == ["domain"]:
                domains[words[1]] = float(words[2])
        after = self.embeddings(model, more, out.name)
        moved = numpy.linalg.norm(after - self.before, axis=1) / numpy.linalg.norm(self.before, axis=1)
        seen = [value for angle, value in domains.items() if angle != self.args.leave_out]
        return {
            "loss": best,
            "seen": statistics.mean(seen),
            "unseen": domains[self.args.leave_out],
            "drift": float(moved.mean()),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=path)
    parser.add_argument("--data", required=True, type=path)
    parser.add_argument("--glyphs", required=True, type=path)
    parser.add_argument("--leave-out", default="90")
    add_program(parser)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()

    width = json.loads((args.model / "config.json").read_text())["hidden_size"]
    with tempfile.TemporaryDirectory() as folder:
        place = Workplace(args, Path(folder))
        row("trained", "learning rate", "learned angles, %", "left-out angle, %", "drift on glyphs")
        row(*["---"] * 5)
        for name, (settings, rates) in sides(width).items():
            lr, runs = at_best_rate(lambda lr, seed: place.run(name, settings, lr, seed), rates, args.seeds)
            shown = lambda key, digits=1: mean_and_deviation([run[key] for run in runs], digits)
            row(name, lr, shown("seen"), shown("unseen"), shown("drift", 3))


if __name__ == "__main__":
    main()
