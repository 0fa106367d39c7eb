"""Writes the example photos: public-domain and CC0 photographs that ship inside the scikit-image package.

scikit-image 0.26.0, pillow 13.0.0. Licences are those of scikit-image's documentation of each image (skimage.data).
"""

import sys
from pathlib import Path

sys.dont_write_bytecode = True

import skimage  # noqa: E402
from PIL import Image  # noqa: E402

SOURCE = Path(skimage.__file__).parent / "data"
OUT = Path(__file__).resolve().parent.parent.parent / "examples" / "photos"
LONGER_SIDE = 512

# file, file in scikit-image, crop (left, top, right, bottom) or None, caption
PHOTOS = [
    ("astronaut", "astronaut.png", (20, 0, 404, 512), "a portrait photo of a smiling astronaut in an orange space suit in front of a flag"),
    ("camera", "camera.png", None, "a black and white photo of a man in a dark coat looking through a camera on a tripod in a park"),
    ("cat", "chelsea.png", None, "a close-up photo of a tabby cat with green eyes looking to the side"),
    ("coffee", "coffee.png", None, "a photo of a cup of espresso on a red saucer with a small spoon, on a wooden table"),
    ("galaxies", "hubble_deep_field.jpg", None, "a photo of deep space with hundreds of small colourful galaxies on black"),
    ("rocket", "rocket.jpg", None, "a photo of a white rocket on its launch pad at dusk, between lattice towers and bright lights"),
]


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    for name, file, crop, caption in PHOTOS:
        image = Image.open(SOURCE / file)
        image = image.crop(crop) if crop else image
        image.thumbnail((LONGER_SIDE, LONGER_SIDE), Image.Resampling.LANCZOS)
        image.save(OUT / f"{name}.jpg", quality=88, optimize=True)
        (OUT / f"{name}.txt").write_text(caption + "\n")
        print(f"{name}.jpg {image.width}x{image.height} {image.mode} {(OUT / f'{name}.jpg').stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
