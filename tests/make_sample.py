"""Write a small data set of drawn "dog breeds", for trying the scripts without a download.

    python tests/make_sample.py DEST

DEST gets four class folders of 128 x 128 JPEGs: 124, 104, 84 and 64 images, 376 in all. The last
breed has its coat in common with the first, its ears with the second: where it is rare, it is taken
for one of those. Size, place, tilt, shades, light and background vary from image to image. The same
images come out every time.
"""

import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

SIZE, FINE = 128, 2  # pixels a side, and how many times finer an image is drawn
SPARE = 0.2  # of a side, drawn around an image so that it can be tilted
RED, GREY = (190, 130, 70), (128, 134, 146)
BREEDS = {  # images, coat, ears
    "akita": (124, RED, "pricked"),
    "weimaraner": (104, GREY, "hanging"),
    "husky": (84, GREY, "pricked"),
    "spaniel": (64, RED, "hanging"),
}
Colour = tuple[int, ...]


def shade(colour: Colour, by: float) -> Colour:
    """The colour, darker for `by` below 1 and lighter above."""
    return tuple(min(255, int(channel * by)) for channel in colour)


def draw_dog(coat: Colour, ears: str, stream: random.Random) -> Image.Image:
    """A portrait of a dog with such a coat and such ears; all else is left to chance."""
    side, vary = int(SIZE * FINE * (1 + 2 * SPARE)), stream.uniform
    wall = shade(tuple(stream.randrange(90, 256) for _ in "rgb"), vary(0.8, 1))
    image = Image.new("RGB", (side, side), wall)
    draw = ImageDraw.Draw(image)
    draw.rectangle([0, side * vary(0.55, 0.75), side, side], shade(wall, vary(0.65, 0.85)))
    for _ in range(8):
        x, y, r = side * vary(0, 1), side * vary(0, 1), side * vary(0.02, 0.07)
        draw.ellipse([x - r, y - r, x + r, y + r], shade(wall, vary(0.7, 1.2)))
    unit = SIZE * FINE / 100 * vary(0.85, 1.15)
    left, top = (side / 2 + vary(-8, 8) * unit for _ in "xy")
    coat = shade(tuple(channel + stream.randint(-12, 12) for channel in coat), vary(0.85, 1.15))
    dark, pale = shade(coat, 0.6), tuple((channel + 510) // 3 for channel in coat)

    def dot(x: float, y: float, wide: float, high: float, colour: Colour) -> None:
        box = [x - wide, y - high, x + wide, y + high]
        draw.ellipse([(left, top)[at % 2] + unit * end for at, end in enumerate(box)], colour)

    def spike(*corners: tuple[float, float], colour: Colour) -> None:
        draw.polygon([(left + unit * x, top + unit * y) for x, y in corners], colour)

    dot(0, 66, 31, 46, coat)  # body
    dot(0, 66, 14, 38, pale)
    for way in (-1, 1) if ears == "pricked" else ():
        x, y = way * vary(25, 30), vary(-50, -43)
        spike((way * 7, -20), (x, y), (way * 28, -6), colour=dark)
        spike((way * 13, -20), (x * 0.95, y * 0.85), (way * 25, -10), colour=pale)
    dot(0, 0, 27, 28, coat)  # head
    for way in (-1, 1) if ears == "hanging" else ():
        dot(way * vary(26, 30), vary(5, 12), 9, 24, dark)
    for way in (-1, 1):
        dot(way * 11, -6, 4.5, 5, (255, 255, 255))
        dot(way * 11, -5, 3, 3.6, (20, 16, 14))
    if stream.random() < 0.6:
        dot(0, 24, 4.5, 8, (226, 110, 120))  # tongue
    dot(0, 13, 13, 11, pale)
    dot(0, 7, 5, 3.6, (20, 16, 14))  # nose
    ends = [side * at / (1 + 2 * SPARE) for at in (SPARE, SPARE, 1 + SPARE, 1 + SPARE)]
    tilted = image.rotate(vary(-14, 14), Image.Resampling.BILINEAR)
    return tilted.resize((SIZE, SIZE), Image.Resampling.LANCZOS, ends)


def main(dest: Path) -> None:
    """Write all images under `dest`, which must not exist."""
    dest.mkdir(parents=True)
    for name, (images, coat, ears) in BREEDS.items():
        (dest / name).mkdir()
        for number in range(images):
            image = draw_dog(coat, ears, random.Random(f"{name}/{number}"))
            image.save(dest / name / f"{name}_{number:03}.jpg", quality=90)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/make_sample.py DEST")
    try:
        main(Path(sys.argv[1]))
    except FileExistsError as error:
        sys.exit(f"make_sample.py: error: {error.filename} exists; name a new folder")
