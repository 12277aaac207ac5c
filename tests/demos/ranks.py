"""Draws the ranks that allocations have given to the layers of a model, a panel for each run.

    pip install matplotlib
    python tests/demos/ranks.py --out ranks.svg "AdaLoRA=runs/one" "IncreLoRA=runs/two"

A run is a folder with rank.json. Rows are kinds of layers, columns the blocks of the model.
"""

import argparse
import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot


def ranks(run):
    """Rank of every kind of layer in every block."""
    layers = json.loads((Path(run) / "rank.json").read_text())["layers"]
    found = {}
    for name, layer in layers.items():
        block, kind = re.search(r"\.(\d+)\.(?:.*\.)?(\w+)$", name).groups()
        found.setdefault(kind, {})[int(block)] = layer["rank"]
    return {kind: [blocks[block] for block in sorted(blocks)] for kind, blocks in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="TITLE=RUN")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    panels = {title: ranks(run) for title, run in (entry.split("=", 1) for entry in args.runs)}
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    # Equal runs give equal bytes.
    matplotlib.rcParams["svg.hashsalt"] = "ranks"
    figure, axes = pyplot.subplots(len(panels), figsize=(9, 1.75 * len(panels)), squeeze=False, layout="constrained")
    for axis, (title, kinds) in zip(axes[:, 0], panels.items()):
        names = sorted(kinds, key=lambda kind: (order.index(kind) if kind in order else len(order), kind))
        values = [kinds[name] for name in names]
        image = axis.imshow(values, cmap="Blues", vmin=0, aspect="auto")
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.tick_params(axis="x", labelsize=7)
        axis.set_title(title, fontsize=9, loc="left")
        bar = figure.colorbar(image, ax=axis, pad=0.01)
        bar.ax.tick_params(labelsize=7)
        bar.ax.yaxis.get_major_locator().set_params(integer=True)
    axes[-1, 0].set_xlabel("block", fontsize=8)
    figure.savefig(args.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
