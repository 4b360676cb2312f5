"""One factory for all tests: a class folder of tiny images that a network can tell apart."""

import csv
import io
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# A network this small gains nothing from threads, and two tests at once would fight for the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from PIL import Image
from torchvision import models

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import data_training as training  # noqa: E402

COLOURS = ("red", "lime", "blue", "yellow", "magenta", "cyan", "white", "black")


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Flushing hundreds of megabytes to a busy disk would take most of the time of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(os, "sync", lambda: None, raising=False)
        yield


def write_folder(root: Path, counts: dict[str, int], size: int = 32) -> Path:
    """Write images of the classes under `root`; the class is the colour of a square on grey."""
    for index, (label, count) in enumerate(counts.items()):
        (root / label).mkdir(parents=True)
        for number in range(count):
            stream = random.Random(f"{label}/{number}")
            shade = stream.randrange(60, 200)
            image = Image.new("RGB", (size, size), (shade, shade, shade))
            x, y = (stream.randrange(size // 2) for _ in range(2))
            image.paste(COLOURS[index % 8], (x, y, x + size // 2, y + size // 2))
            image.putpixel((number % size, number // size % size), (number % 256, 9, 9))  # unique
            image.save(root / label / f"{label}_{number:03}.jpg", quality=95)
    return root


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """`make_folder({"cat": 12, "dog": 5})` writes 12 + 5 JPEGs, all different, and returns SRC."""
    return lambda counts, name="src", size=32: write_folder(tmp_path / name, counts, size)


def load(folder: Path, *arguments: str) -> training.Data:
    """The images of the folder, as the script reads them."""
    return training.load_data(training.parse_args([str(folder), *arguments]))


class Terminal(io.StringIO):
    """A text that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def weights_file(path: Path, size: int = 7, classes: list[str] | None = None) -> Path:
    """A "pretrained" ResNet-18 with a head of `size` classes, named or not."""
    torch.manual_seed(1)
    state = models.resnet18(num_classes=size).state_dict()
    torch.save({"state_dict": state, "classes": classes} if classes else state, path)
    return path
