"""The drawings: which things, how they are rendered, and the captions that name them.

    python tools/nano/drawings.py WORK --packages PACKAGES      # -> WORK/drawings.npy, WORK/sheet.png

PACKAGES holds the npm packages of README.md, each unpacked into a folder of its own. `things.tsv` lists the things: our
name, emojibase's label, and "not drawn" for those that only the autoencoder and the text encoders learn from. Base styles are noto, flat and 3d; ink is rendered too, and only `ink.py` reads it.
"""

import functools
import io
import json
import re
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch.nn.functional import interpolate

from common import arguments

SIDE = 128  # of the renderings, in pixels
DRAWN_SIDE = 96  # of what the transformer draws
STYLES = ["noto", "flat", "3d"]  # what autoencoder and text encoders learn from
DRAWN_STYLES = ["flat", "3d"]  # what the transformer learns: the same shapes, so each thing is seen twice as often
INK = "ink"
BACKGROUNDS = {"white": "#ffffff", "blue": "#6fb1f2", "pink": "#f9b4c8", "green": "#a6d99a", "yellow": "#fbe08a"}
ROWS = [line.split("\t") for line in (Path(__file__).parent / "things.tsv").read_text().splitlines()]
THINGS = {row[0]: row[1] for row in ROWS}
NAMES = list(THINGS)
DRAWN = [i for i, row in enumerate(ROWS) if len(row) == 2]  # indices of the things that the transformer learns
SVG_PACKAGES = {"noto": "noto", "flat": "fluent-emoji-flat", "ink": "fluent-emoji-high-contrast"}


# ---------------------------------------------------------------- rendering


def slug(label):
    """An icon's name in the iconify packages."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower().replace("’", "")).strip("-")


class Packages:
    """The unpacked npm packages."""

    def __init__(self, folder):
        def find(package, file):
            return next(folder.glob(f"*{package}-[0-9]*/**/{file}"))

        self.svg = {style: json.loads(find(name, "icons.json").read_text()) for style, name in SVG_PACKAGES.items()}
        self.code = {e["label"]: e["hexcode"].lower().replace("-fe0f", "") for e in json.loads(find("emojibase-data", "en/data.json").read_text())}
        self.solid = {p.stem.lower().replace("-fe0f", ""): p for p in folder.glob("*fluent-emoji-3d*/**/*.webp")}

    def render(self, label, style):
        """RGBA picture, SIDE x SIDE."""
        if style == "3d":
            return Image.open(self.solid[self.code[label]]).convert("RGBA").resize((SIDE, SIDE), Image.LANCZOS)
        import resvg_py

        icons, name = self.svg[style], slug(label)
        icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
        box = " ".join(str(icon.get(key, icons.get(key, default))) for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16)))
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}" width="{SIDE}" height="{SIDE}">{icon["body"]}</svg>'
        png = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE)
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA").resize((SIDE, SIDE))


@functools.cache
def rgba(work):
    """uint8 [thing, style, 4, SIDE, SIDE], ink last."""
    return torch.from_numpy(numpy.load(work / "drawings.npy"))


def colour(background):
    """A "#rrggbb" as [3, 1, 1], 0 to 1."""
    return torch.tensor([int(background[i : i + 2], 16) / 255 for i in (1, 3, 5)]).view(3, 1, 1)


def picture(work, thing, style, background):
    """[3, SIDE, SIDE], 0 to 1, of a thing (index) in a style (name) on a background (name, or "#rrggbb")."""
    drawing = rgba(work)[thing, (STYLES + [INK]).index(style)].float() / 255
    return drawing[:3] * drawing[3:] + colour(BACKGROUNDS.get(background, background)) * (1 - drawing[3:])


def drawn(work, thing, style, background):
    """The same as [3, DRAWN_SIDE, DRAWN_SIDE]."""
    whole = picture(work, thing, style, background)[None]
    return interpolate(whole, size=DRAWN_SIDE, mode="bilinear", antialias=True)[0]


def sheet(pictures, columns, path):
    """Writes pictures ([3, height, width], 0 to 1) as one image."""
    rows = -(-len(pictures) // columns)
    _, height, width = pictures[0].shape
    image = Image.new("RGB", (columns * width, rows * height), "white")
    for i, p in enumerate(pictures):
        p = (p.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        image.paste(Image.fromarray(p), (i % columns * width, i // columns * height))
    image.save(path)


# ---------------------------------------------------------------- captions


def a(name):
    """With its article: "an owl", "grapes"."""
    name = name.lower()
    if name.endswith("s") and not name.endswith(("ss", "us", "os")) or name in ("fire", "lightning", "corn", "popcorn", "sushi", "bacon", "garlic", "yarn", "honey", "bread", "chocolate", "cheese", "coral"):
        return name
    return ("an " if name[0] in "aeiou" and name != "unicorn" else "a ") + name


def plain(name, style, background):
    """How a picture is asked for in checks."""
    return f"{a(name)}, {style} style, on a {background} background"


def caption(name, style, background, rng):
    """One way of many to say it; without a named background it is white."""
    way = rng.random()
    if way < 0.4 and not (background == "white" and way < 0.2):
        return plain(name, style, background)
    if background == "white" and way < 0.5:
        return f"{a(name)}, {style} style"
    if background == "white" and way < 0.6:
        return a(name)
    if way < 0.65:
        return f"{a(name)}, on a {background} background"
    if way < 0.8:
        return f"a {style} style drawing of {a(name)} on a {background} background"
    parts = [name.lower(), f"{style} style", f"{background} background"]
    rng.shuffle(parts)
    return ", ".join(parts)


def main():
    args = arguments(__doc__, packages=Path("."))
    args.work.mkdir(parents=True, exist_ok=True)
    packages = Packages(args.packages)
    drawn = [[numpy.asarray(packages.render(label, style)).transpose(2, 0, 1) for style in STYLES + [INK]] for label in THINGS.values()]
    numpy.save(args.work / "drawings.npy", numpy.stack(drawn))
    shown = [picture(args.work, i, style, list(BACKGROUNDS)[(i + j) % 5]) for i in range(len(NAMES)) for j, style in enumerate(STYLES + [INK])]
    sheet(torch.nn.functional.avg_pool2d(torch.stack(shown), 2), 36, args.work / "sheet.png")
    print(f"drawings: {len(NAMES)} things in {len(STYLES)} styles, and ink")


if __name__ == "__main__":
    main()
