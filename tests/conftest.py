"""One factory for all tests: a class folder of tiny images that a network can tell apart."""

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """`make_folder({"cat": 12, "dog": 5})` writes 12 + 5 JPEGs, all different, and returns SRC."""

    def make(counts: dict[str, int], name: str = "src", size: int = 32) -> Path:
        root = tmp_path / name
        for index, (label, count) in enumerate(counts.items()):
            (root / label).mkdir(parents=True)
            for number in range(count):
                stream = random.Random(f"{label}/{number}")
                image = Image.new("RGB", (size, size), tuple(stream.choices(range(256), k=3)))
                # The class is the place of a white square on the random background.
                place = (index % 4 * size // 4, index // 4 * size // 4)
                image.paste("white", (*place, place[0] + size // 4, place[1] + size // 4))
                image.save(root / label / f"{label}_{number:03}.jpg", quality=95)
        return root

    return make
