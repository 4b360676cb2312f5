"""What several tests need: a class folder of tiny images that can be told apart, and runs."""

import contextlib
import csv
import io
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# A network this small gains nothing from threads, and two tests at once would fight for the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models
from torchvision.transforms import v2

sys.path[:0] = [str(Path(__file__).parent / x) for x in ("..", "", "experiments", "simulated")]

import data_training as training  # noqa: E402

Run = SimpleNamespace  # a whole run: its folder, what it printed, its bars
COLOURS = ("red", "lime", "blue", "yellow", "magenta", "cyan", "white", "black")


class Narrow(models.ResNet):
    """A ResNet of an eighth of the width."""

    def __init__(self, *layers: Any, num_classes: int = 1000, **others: Any):
        super().__init__(*layers, **others)
        self.fc = nn.Linear(self.fc.in_features // 8, num_classes)

    def _make_layer(self, block: Any, planes: int, *others: Any, **more: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // 8, *others, **more)


@pytest.fixture(scope="session", autouse=True)
def quick() -> Iterator[None]:
    """No waiting for the disk, and narrow networks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(os, "sync", lambda: None, raising=False)
        patch.setattr(models.resnet, "ResNet", Narrow)  # what `models.resnet18` makes
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


CPU = training.Compute(torch.device("cpu"), "float32")
PLAIN = {"scale": 1.0, "shift": 0.0}  # in a network file: no calibration


def open_run(*command: object) -> training.Opened:
    """Settings, images and weights of a run with this command."""
    return training.open_run(*training.parse_args([*map(str, command)]), CPU)


def load(*command: object) -> training.Data:
    """The images of a run with this command; its network knows none of them."""
    opened = open_run(*command)
    return training.load_data(opened.settings, opened.listing)


def images(labels: list[int], held: list[Any], folds: int = 1, **others: Any) -> training.Data:
    """Images that are not there; `held`: the fold of each, None, or `folds`: tests the ensemble."""
    names = [f"{label}/{at}.jpg" for at, label in enumerate(labels)]
    files = [training.ImageFile(x, x, labels[at], "train") for at, x in enumerate(names)]
    eval_mask = torch.tensor([[fold == at for fold in held] for at in range(folds + 1)])
    numbers = torch.arange(len(labels))
    fields = {
        "classes": ["no", "yes"],
        "files": files,
        "white": 255,
        "leaks": 0,
        "unreadable": [],
    }
    fields |= {"labels": torch.tensor(labels), "families": numbers, "digests": numbers}
    fields |= {"train_mask": ~eval_mask[:-1] & ~eval_mask[-1], "eval_mask": eval_mask}
    return training.Data(**fields | others)


def eval_set_of(targets: list[int], families: list[int] | None = None) -> training.EvalSet:
    """Images of these classes that the network of one fold is evaluated on."""
    indices = torch.arange(len(targets))
    return training.EvalSet(
        indices=indices,
        targets=torch.tensor(targets),
        families=indices if families is None else torch.tensor(families),
        folds=torch.zeros_like(indices),
    )


def shares_of(train_counts: list[int], images: int) -> training.ClassShares:
    """The class shares for so many images of a network that learnt so many of each class."""
    counts = torch.tensor(train_counts, dtype=torch.float64)
    log_share = (counts.log() - counts.log().mean()).float()
    return training.ClassShares(counts, log_share.expand(images, -1), expected_shift=1.0)


def prepare(*command: object) -> tuple[training.Setup, training.Progress, Any]:
    """A run with this command, as it is before its first epoch, and its model."""
    opened = open_run(*command)
    data = training.load_data(opened.settings, opened.listing)
    progress = training.load_progress(opened, data)
    options = training.parse_args([*map(str, command), "--workers", "0"])[1]
    setup = training.Setup(
        settings=opened.settings,
        data=data,
        compute=CPU,
        baseline=torch.empty(0),
        reader=training.make_reader(opened.settings, options, data, CPU),
    )
    model = training.build_model(opened.settings.arch, data.classes, progress.start)
    return setup, progress, CPU.to_device(model)


class Terminal(io.StringIO):
    """A text that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def refused(command: list[object], capsys: Any, *unchanged: Path) -> list[str]:
    """The lines on stderr where something is wrong: status 2, one error, warnings at most before.

    Below the folders `unchanged` nothing is written, and then nothing is printed on stdout.
    """

    def tree() -> dict[Path, int]:
        found = [path for root in unchanged for path in root.rglob("*")]
        return {path: path.is_file() and path.stat().st_mtime_ns for path in found}

    before = tree()
    capsys.readouterr()
    try:
        status = training.main([*map(str, command)])
    except SystemExit as stopped:  # of argparse
        status = stopped.code
    printed = capsys.readouterr()
    assert status == 2 and tree() == before and not (unchanged and printed.out)
    *warnings, error = printed.err.splitlines()
    assert error.startswith("data_training.py: error: ")
    assert all(line.startswith(("warning: ", "--group ")) for line in warnings)
    return [*warnings, error]


def weights_file(path: Path, size: int = 7) -> Path:
    """A "pretrained" ResNet-18 with a head of `size` classes."""
    torch.manual_seed(1)
    torch.save(models.resnet18(num_classes=size).state_dict(), path)
    return path


class Process:
    """`main` in a process, or in several as under torchrun, with all that is patched here.

    With `rest` there are so many seconds before each epoch, in which to stop a run.
    """

    def __init__(
        self,
        *command: object,
        processes: int = 0,
        rest: float = 0.0,
        folder: str | Path = ".",
        main: Callable[[list[str]], Any] = training.main,
    ):
        self.files = [tempfile.TemporaryFile() for _ in "oe"]  # noqa: SIM115
        with socket.socket() as free:
            free.bind(("localhost", 0))
            alike = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        alike |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
        alike["TORCHELASTIC_RUN_ID"] = "none"
        train_epoch = training.train_epoch

        def execute(rank: str) -> None:
            for number, file in enumerate(self.files, 1):
                os.dup2(file.fileno(), number)
            outputs = (os.fdopen(n, "w", 1, errors="backslashreplace") for n in (1, 2))
            sys.stdout, sys.stderr = outputs
            # Tests run in the background may have been told to ignore SIGINT, and would pass it on.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ |= alike | {"RANK": rank, "LOCAL_RANK": rank} if processes else {}
            os.chdir(folder)
            training.train_epoch = lambda *args: time.sleep(rest) or train_epoch(*args)
            sys.exit(main([*map(str, command)]))

        fork = get_context("fork").Process
        self.all = [fork(target=execute, args=str(rank)) for rank in range(processes or 1)]
        for each in self.all:
            each.start()

    def printed(self) -> list[str]:
        return [os.pread(file.fileno(), 10**6, 0).decode() for file in self.files]

    def wait_for(self, seen: Callable[[], object]) -> None:
        while self.all[0].is_alive() and not seen():
            time.sleep(0.005)

    def kill(self, number: int) -> None:
        os.kill(self.all[0].pid or 0, number)

    def end(self, status: int = 0) -> list[str]:
        """All that was printed, once the processes have ended with this status."""
        for each in self.all:
            each.join(120)
            each.kill()
        assert {each.exitcode for each in self.all} == {status}, self.printed()
        return self.printed()


def interrupt_after(epochs: int, command: list[str], output: Path, fold: int = 1) -> Path:
    """The run, stopped by Ctrl-C once epoch number `epochs` of a fold is stored."""
    format_epoch = training.format_epoch

    def stop(row: dict[str, Any], settings: training.Settings) -> str:
        if (row["fold"], row["epoch"]) == (fold, epochs):
            raise KeyboardInterrupt
        return format_epoch(row, settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "WRITE_EVERY", 0.0)
        patch.setattr(training, "format_epoch", stop)
        assert training.main([*command, "--output", str(output)]) == 130
    (output / training.LOCK).read_bytes()  # to close it unlocks it, as the end of a process does
    return output


def assert_moved_alike(state: training.State, model: nn.Module, start: training.State) -> None:
    """The same way from the start, but for rounding, of which Adam makes much in a few weights."""
    for name, value in model.state_dict().items():
        way = (value - start[name]).float().norm()
        assert (state[name] - value).float().norm() <= 0.1 * way + 1e-6, name


# As few steps as make a run; float32, which is the same on every processor.
TINY = ["--image-size", "32", "--batch-size", "12", "--device", "cpu", "--no-amp"]


def run(*arguments: object) -> Run:
    """A run that succeeds: its folder (that behind `--output`), what it printed, its bars."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8", newline=""), Terminal()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = training.main([*map(str, arguments)])
    assert status == 0, err.getvalue()
    path = Path(arguments[arguments.index("--output") + 1]) if "--output" in arguments else None
    out.flush()
    return Run(path=path, out=out.buffer.getvalue().decode(), err=err.getvalue())


def network_of(run: Path) -> dict[str, Any]:
    """What is in the network file of a run."""
    return torch.load(run / "network.pt", weights_only=True)


def by_hand(network: dict[str, Any], paths: Iterable[Path | str]) -> torch.Tensor:
    """The calibrated mean logits of the networks for square images, by torchvision alone."""
    logits, scale = [], v2.ToDtype(torch.float32, scale=True)
    normalise = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    view = v2.Compose([v2.PILToTensor(), v2.Resize(network["image_size"]), scale, normalise])
    views = torch.stack([view(Image.open(path).convert("RGB")) for path in paths])
    model = models.get_model(network["arch"], num_classes=len(network["classes"])).eval()
    for state in network["networks"]:
        model.load_state_dict(state)
        logits.append(model(views).detach())
    mean = torch.stack(logits).mean(0)
    return network["scale"] * mean - network["shift"] * network["natural"]


@pytest.fixture(scope="session")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 apes, 12 bees and 6 cats; to look at, not to change."""
    root = tmp_path_factory.mktemp("session") / "animals"
    return write_folder(root, {"ape": 20, "bee": 12, "cat": 6})


@pytest.fixture(scope="session")
def others(animals: Path) -> Path:
    """6 apes, 4 bees and 2 cats that are not among `animals`, to test with."""
    root = write_folder(animals.parent / "all", {"ape": 26, "bee": 16, "cat": 8})
    for known in animals.rglob("*.jpg"):
        (root / known.relative_to(animals)).unlink()
    return root


@pytest.fixture(scope="session")
def pretrained(animals: Path) -> Path:
    """Weights of a ResNet-18 for seven classes without names."""
    return weights_file(animals.parent / "pretrained.pth")


@pytest.fixture(scope="session")
def default_run(animals: Path, pretrained: Path) -> Run:
    """A run with the defaults but for TINY: a linear probe and two epochs of fine-tuning."""
    output = animals.parent / "default"
    return run(animals, "--weights", pretrained, "--epochs", 2, *TINY, "--output", output)


@pytest.fixture(scope="session")
def folds_run(animals: Path, others: Path, pretrained: Path) -> Run:
    """Three folds of an epoch each, and `others` to test them together."""
    flags = ["--folds", 3, "--val", others, "--epochs", 1]
    output = animals.parent / "folds"
    return run(animals, "--weights", pretrained, *flags, *TINY, "--output", output)
