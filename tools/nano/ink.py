"""The ink drawings that a LoRA learns: pictures and captions for `examples/ink`, and the thumbnails that tests compare with.

    python tools/nano/ink.py WORK       # -> examples/ink/*.png, *.txt; examples/nano/gallery.png, things.txt

The gallery is one picture of 16 x 16 tiles: a row a thing (named in things.txt), the columns noto, flat, 3d and ink, on white.
"""

from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d

from common import arguments
from drawings import INK, NAMES, STYLES, a, drawn, picture, sheet

LEARNT = [
    "rabbit", "elephant", "koala", "mouse", "chick", "swan", "fish", "snail", "butterfly", "frog", "tulip", "strawberry",
    "pear", "carrot", "mushroom", "pizza", "cheese", "house", "train", "truck", "crown", "bell", "gift", "alarm clock",
]  # fmt: skip


def main():
    args = arguments(__doc__, out=Path("examples"))
    folder = args.out / "ink"
    folder.mkdir(parents=True, exist_ok=True)
    for name in LEARNT:
        ink = (drawn(args.work, NAMES.index(name), INK, "white").mean(0) * 255).round().byte().numpy()
        Image.fromarray(ink).save(folder / f"{name.replace(' ', '-')}.png", optimize=True)
        (folder / f"{name.replace(' ', '-')}.txt").write_text(f"{a(name)}, ink style\n")

    folder = args.out / "nano"
    folder.mkdir(exist_ok=True)
    tiles = torch.stack([picture(args.work, i, style, "white") for i in range(len(NAMES)) for style in STYLES + [INK]])
    sheet(list(adaptive_avg_pool2d(tiles, 16)), 4, folder / "gallery.png")
    (folder / "things.txt").write_text("".join(f"{name}\n" for name in NAMES))


if __name__ == "__main__":
    main()
