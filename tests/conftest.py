"""What several tests need: a class folder of tiny images that can be told apart, and runs."""

import csv
import io
import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

# A network this small gains nothing from threads, and two tests at once would fight for the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from PIL import Image
from torchvision import models

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import data_training as training  # noqa: E402

SCRIPT = Path(training.__file__)
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, 57 images; one folder for all tests of a file."""
    return write_folder(tmp_path_factory.mktemp("data") / "src", {"ape": 30, "bee": 18, "cat": 9})


def load(folder: Path, *arguments: str) -> training.Data:
    """The images of the folder, as the script reads them."""
    return training.load_data(training.parse_args([str(folder), *arguments]))


CPU = training.Compute(torch.device("cpu"), None)


def prepare(folder: Path, *arguments: str) -> tuple[training.Given, training.Progress]:
    """A run of a ResNet-18 on the images of the folder, before its first epoch."""
    command = [str(folder), "--arch", "resnet18", "--device", "cpu", "--workers", "0", *arguments]
    return training.prepare(training.parse_args(command), CPU)


def begin(given: training.Given, progress: training.Progress, epoch: int) -> SimpleNamespace:
    """The phase of an epoch, as `run` begins it: phase, trainer, reader and source of inputs."""
    phases = training.plan(given, progress.shares)
    phase = next(phase for phase in phases if epoch in phase.epochs)
    reader = training.Reader(given)
    source = training.begin_phase(given, progress, phase, reader)
    trainer = progress.trainer
    return SimpleNamespace(phase=phase, trainer=trainer, reader=reader, source=source)


def train(given: training.Given, stage: SimpleNamespace, epoch: int) -> tuple[torch.Tensor, ...]:
    """Train an epoch; the batches that it trained on."""
    drawn = training.draw_epoch(given, stage.phase, epoch)
    stream = training.seeded("augment", given.args.seed, epoch)
    batches = training.cut_batches(drawn, given.args.batch_size, stream)
    training.train_epoch(given, stage.trainer, batches, stage.source)
    return batches


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


@pytest.fixture
def short_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if one step told enough: with so few images fifty would be most of a run."""
    monkeypatch.setattr(training, "TRIAL_STEPS", 1)


def start(*arguments: str, processes: int = 0, script: Path = SCRIPT) -> subprocess.Popen[str]:
    """The script in a process of its own, or in several under torchrun."""
    command = [sys.executable, str(script)]
    if processes:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, f"--nproc-per-node={processes}", str(SCRIPT)]
    return subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests run in the background may have been told to ignore SIGINT, and would pass it on.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def interrupt_after(epochs: int, command: list[str], output: Path) -> Path:
    """The run, stopped when so many epochs are written."""
    save_state, calls = training.save_state, itertools.count()

    def interrupt(*args: object) -> None:
        save_state(*args)
        if next(calls) == epochs:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "save_state", interrupt)
        assert training.main([*command, "--output", str(output)]) == 130
    return output
