"""Maps the embeddings of one vision transformer into the space of another at several distances from orthogonality (Markdown).

    python tests/demos/alignment.py --old OLD_MODEL --new NEW_MODEL --data digits --other glyphs [--lambdas 0 0.5 .. inf]

The maps learn from DIR/train and are measured on DIR/test: a mapped new item finds an old one of its class ("across"), or a mapped new one ("within").
On images of other classes, which the maps have not seen, "other" is how much of the new model's own rate of right nearest items is lost by mapping.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy
from program import add_program, lowrank, mean_and_deviation, path, row
from safetensors.numpy import load_file


def nearest(embeddings, labels):
    """Share of items whose nearest other item by cosine is of their class."""
    unit = embeddings / numpy.linalg.norm(embeddings, axis=1, keepdims=True)
    close = unit @ unit.T
    numpy.fill_diagonal(close, -2.0)
    return float((labels[close.argmax(1)] == labels).mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--old", "--new", "--data", "--other"):
        parser.add_argument(name, required=True, type=path)
    add_program(parser)
    parser.add_argument("--lambdas", nargs="+", default=["0", "0.5", "1", "2", "4", "8", "16", "inf"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)

        def embedded(model, data, name):
            lowrank(args.program, "embed", "--quiet", "--model", model, "--data", data, "--out", folder / name)
            return folder / name

        files = {
            (which, part): embedded(getattr(args, which), args.data / part, f"{which}-{part}")
            for which in ("old", "new")
            for part in ("train", "test")
        }
        other = load_file(embedded(args.new, args.other, "other"))
        some = numpy.random.default_rng(0).permutation(len(other["labels"]))[:3000]
        other, labels = other["embeddings"][some], other["labels"][some]
        own = nearest(other, labels)
        print(f"The new model's own rate on the other images is {own:.4f}.\n")
        row("lambda", "across, top 1", "across, mAP", "within, top 1", "area while the gallery is embedded again", "other, lost")
        row(*["---"] * 6)
        for strength in args.lambdas:
            columns = [[] for _ in range(5)]
            for seed in args.seeds:
                out = folder / f"map-{strength}-{seed}"
                lowrank(
                    *(args.program, "align", "--quiet", "--old", files["old", "train"], "--new", files["new", "train"]),
                    *("--test-old", files["old", "test"], "--test-new", files["new", "test"]),
                    *("--lambda", strength, "--seed", seed, "--out", out),
                )
                report, weights = json.loads((out / "report.json").read_text()), load_file(out / "map.safetensors")
                mapped = other @ weights["backward.weight"].T + weights["backward.bias"]
                across, within = report["retrieval"]["mapped new in old"], report["retrieval"]["mapped new in mapped new"]
                found = across["top_1"], across["map"], within["top_1"], report["backfilling"]["area"], own - nearest(mapped, labels)
                for column, value in zip(columns, found):
                    column.append(value)
            row(strength, *map(mean_and_deviation, columns))


if __name__ == "__main__":
    main()
