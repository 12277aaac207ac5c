"""Renders letters and digits in all TrueType and OpenType fonts of the system, to pretrain a small vision transformer on.

    python tests/demos/glyphs.py glyphs
    lowrank pretrain --model vit-micro --data glyphs --batch 64 --minutes 10 --set data.images.rotate=10 --out runs/glyphs

Fonts come from packages such as `fonts-dejavu`, `fonts-liberation` and `fonts-freefont-ttf`. A glyph is 32 x 32 pixels, white on black, a little
moved and scaled; glyphs that a font does not have (it draws a box in their place) are left out.
"""

import argparse
import pathlib
import random
import string

from PIL import Image, ImageDraw, ImageFont

SIDE = 32

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("out", type=pathlib.Path)
parser.add_argument("--fonts", type=pathlib.Path, default=pathlib.Path("/usr/share/fonts"))
parser.add_argument("--variants", type=int, default=4, help="pictures of each glyph of a font")
args = parser.parse_args()

draws = random.Random(0)
fonts = sorted(path for end in ("ttf", "otf") for path in args.fonts.rglob(f"*.{end}"))
if not fonts:
    raise SystemExit(f"no font below {args.fonts}; install one, or name a folder with --fonts")
count = 0
for font in fonts:
    for glyph in string.ascii_uppercase + string.digits:
        for variant in range(args.variants):
            try:
                face = ImageFont.truetype(str(font), draws.randint(20, 27))
                left, top, right, bottom = face.getbbox(glyph)
                missing = bytes(face.getmask("\U0010fffe")) == bytes(face.getmask(glyph))
            except OSError:
                break
            if missing:
                break
            if right <= left or bottom <= top or right - left > SIDE or bottom - top > SIDE:
                continue
            picture = Image.new("L", (SIDE, SIDE))
            at = (draws.randint(0, SIDE - (right - left)) - left, draws.randint(0, SIDE - (bottom - top)) - top)
            ImageDraw.Draw(picture).text(at, glyph, fill=255, font=face)
            path = args.out / glyph / f"{font.stem}-{variant}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
            count += 1
print(f"{args.out}: {count} glyphs of {len(fonts)} fonts")
