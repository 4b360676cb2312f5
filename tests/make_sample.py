"""Write a small data set of drawn "dog breeds", for trying the scripts without a download.

    python tests/make_sample.py DEST

DEST gets twelve class folders of 96 x 96 JPEGs, 60 down to 38 images each, 588 in all. A breed is a
coat colour, ears, spots and a tail; colours overlap between breeds, size, place, pose, light and
background vary from image to image. The same images come out every time.
"""

import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 96
COATS = ((196, 142, 82), (92, 64, 48), (214, 206, 192), (120, 118, 124))
BREEDS = (
    *("akita", "beagle", "corgi", "dingo", "eurasier", "foxhound"),
    *("greyhound", "husky", "iceland", "jindo", "kelpie", "labrador"),
)


def draw_dog(breed: int, stream: random.Random) -> Image.Image:
    """One image of the breed: coat = breed % 4, ears = breed // 4, spots on every second one."""

    def vary(value: float, by: float) -> float:
        return value + stream.uniform(-by, by)

    background = tuple(stream.randrange(60, 230) for _ in range(3))
    image = Image.new("RGB", (SIZE, SIZE), background)
    draw = ImageDraw.Draw(image)
    for _ in range(8):  # clutter
        x, y, r = stream.uniform(0, SIZE), stream.uniform(0, SIZE), stream.uniform(2, 9)
        draw.ellipse([x - r, y - r, x + r, y + r], tuple(stream.randrange(60, 230) for _ in "rgb"))
    light = stream.uniform(0.85, 1.12)
    coat = tuple(min(255, int(vary(channel, 14) * light)) for channel in COATS[breed % 4])
    dark = tuple(channel * 2 // 5 for channel in coat)
    x, y, s = vary(SIZE / 2, 9), vary(SIZE / 2, 7), vary(1.0, 0.2)
    body = [x - 26 * s, y - 4 * s, x + 20 * s, y + 20 * s]
    for leg in (-20, -12, 8, 15):
        draw.line([x + leg * s, y + 10 * s, x + vary(leg, 3) * s, y + 36 * s], coat, int(5 * s))
    draw.ellipse(body, coat)
    tail = -34 if breed % 3 else -24
    draw.line([x - 24 * s, y, x + tail * s, y + vary(-18, 5) * s], coat, int(5 * s))
    head = (x + 22 * s, y - 12 * s)
    r = 12 * s
    draw.ellipse([head[0] - r, head[1] - r, head[0] + r, head[1] + r], coat)
    draw.ellipse([head[0] + 6 * s, head[1] - 1 * s, head[0] + 17 * s, head[1] + 8 * s], coat)
    for side in (-7, 5):
        ear_x, ear_y = head[0] + side * s, head[1] - 8 * s
        if breed // 4 == 0:  # pricked
            tip = (ear_x + 2 * s, ear_y - 20 * s)
            draw.polygon([(ear_x - 5 * s, ear_y), tip, (ear_x + 7 * s, ear_y)], dark)
        elif breed // 4 == 1:  # hanging
            draw.ellipse([ear_x - 5 * s, ear_y, ear_x + 5 * s, ear_y + 24 * s], dark)
        else:  # round
            draw.ellipse([ear_x - 7 * s, ear_y - 10 * s, ear_x + 7 * s, ear_y + 4 * s], dark)
    if breed % 2:
        for _ in range(6):
            px, py = x + stream.uniform(-20, 14) * s, y + stream.uniform(0, 14) * s
            draw.ellipse([px - 4 * s, py - 4 * s, px + 4 * s, py + 4 * s], dark)
    draw.ellipse([head[0] + 2 * s, head[1] - 4 * s, head[0] + 5 * s, head[1] - 1 * s], "black")
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if stream.random() < 0.5 else image


def main(dest: Path) -> None:
    """Write all images under `dest`, which must not exist."""
    dest.mkdir(parents=True)
    for breed, name in enumerate(BREEDS):
        (dest / name).mkdir()
        for number in range(60 - 2 * breed):
            image = draw_dog(breed, random.Random(f"{name}/{number}"))
            image.save(dest / name / f"{name}_{number:03}.jpg", quality=90)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/make_sample.py DEST")
    try:
        main(Path(sys.argv[1]))
    except FileExistsError as error:
        sys.exit(f"make_sample.py: error: {error.filename} exists; name a new folder")
