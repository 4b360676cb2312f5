"""What several tests need: a class folder of tiny images that can be told apart, and runs."""

import contextlib
import csv
import io
import math
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

# A network this small gains nothing from threads, and two tests at once would fight for the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from PIL import Image, ImageOps
from torch import nn
from torchvision import models
from torchvision.transforms import v2

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import data_training as training  # noqa: E402

Run = SimpleNamespace  # a whole run: its folder, what it printed, its bars
SCRIPT = Path(training.__file__)
COLOURS = ("red", "lime", "blue", "yellow", "magenta", "cyan", "white", "black")


class Narrow(models.ResNet):
    """A ResNet of an eighth of the width, which takes little time and little room on a disk."""

    def __init__(self, *layers: Any, num_classes: int = 1000, **others: Any):
        super().__init__(*layers, **others)
        self.fc = nn.Linear(self.fc.in_features // 8, num_classes)

    def _make_layer(self, block: Any, planes: int, *others: Any, **more: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // 8, *others, **more)


HEAD_STEPS, SURE = training.HEAD_STEPS, training.SURE  # of the script as it is
CODE = SCRIPT.read_text(encoding="utf-8").replace(f"STEPS = {HEAD_STEPS} ", "STEPS = 100 ")
CODE = CODE.replace(f"\nSURE = {SURE}\n", "\nSURE = math.inf\n")
# It rests where an epoch is told of, so that there is time to stop it.
RESTING = CODE.replace("settings), flush=True)", "settings), flush=True), time.sleep(0.5)")


def make_quick(patch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the disk, networks are narrow, and heads are trained for 100 steps.

    No head is kept in place of all layers, of which so small a training makes little.
    """
    patch.setattr(os, "fsync", lambda _: None)
    patch.setattr(os, "sync", lambda: None, raising=False)
    patch.setattr(models.resnet, "ResNet", Narrow)  # what `models.resnet18` makes
    patch.setattr(training, "HEAD_STEPS", 100)
    patch.setattr(training, "SURE", math.inf)


@pytest.fixture(scope="session", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
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


NOTHING = torch.empty(0, dtype=torch.int64)  # that the network has learnt before


def load(folder: Path, *arguments: str, known: torch.Tensor = NOTHING) -> training.Data:
    """The images of the folder, as the script reads them; the network has learnt the `known`."""
    args = training.parse_args([str(folder), *arguments])
    return training.load_data(args, *training.list_rows(args), known)


def images(labels: list[int], held: list[int], folds: int = 1, **others: Any) -> training.Data:
    """Images that are not there, with these labels, held out by these folds."""
    names = [f"{label}/{at}.jpg" for at, label in enumerate(labels)]
    parts = ["val" if fold == 0 else "train" for fold in held]
    numbers = torch.arange(len(labels))
    fields = {"classes": ["no", "yes"], "paths": names, "names": names, "parts": parts}
    fields |= {"labels": torch.tensor(labels), "held": torch.tensor(held)}
    fields |= {"families": numbers, "digests": numbers, "white": {}, "related": 0}
    data = training.Data(**fields | {"unreadable": []} | others)
    assert data.folds == folds
    return data


CPU = training.Compute(torch.device("cpu"), None)


def prepare(folder: Path, *arguments: str) -> tuple[training.Given, training.Progress]:
    """A run of a ResNet-18 on the images of the folder, before its first epoch."""
    command = [str(folder), "--arch", "resnet18", "--device", "cpu", "--workers", "0", *arguments]
    with training.HELD:  # so that another process may go on with it
        return training.prepare(training.parse_args(command), CPU)


def resolve(flags: str, content: Mapping[str, Any] | None = None) -> training.Settings:
    """The settings of a run with these flags and weights whose file holds `content`."""
    command = [str(Path(__file__).parent), "--output", "new", *flags.split()]
    args = training.parse_args(command)
    return training.resolve_settings(args, CPU, args.weights, content or {})


def begin(given: training.Given, progress: training.Progress, epoch: int) -> SimpleNamespace:
    """The stage of an epoch, as `run` begins it: stage, trainer, reader and inputs."""
    stages, reader = training.plan(given, progress, 0), training.Reader(given)
    stage = next(stage for stage in stages if epoch in stage.epochs)
    inputs = training.begin(given, progress, stage, reader)
    return SimpleNamespace(stage=stage, trainer=progress.trainer, reader=reader, inputs=inputs)


def png(width: int, height: int, bits: int, rows: bytes, kind: int = 2) -> bytes:
    """A PNG of three channels, or of `kind` 6 with transparency, as Pillow would not write it."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    content = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + content


class Terminal(io.StringIO):
    """A text that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def tree(*roots: Path) -> dict[Path, int]:
    """Each file and folder below `roots`, a file with when it changed."""
    found = [path for root in roots for path in root.rglob("*")]
    return {path: path.is_file() and path.stat().st_mtime_ns for path in found}


def refused(
    command: list[object], capsys: Any, *unchanged: Path, script: ModuleType = training
) -> list[str]:
    """The lines on stderr where something is wrong: status 2, one error, warnings at most before.

    Below the folders `unchanged` nothing is written, and then nothing is printed on stdout.
    """
    before = tree(*unchanged)
    capsys.readouterr()
    try:
        status = script.main([*map(str, command)])
    except SystemExit as stopped:  # of argparse
        status = stopped.code
    printed = capsys.readouterr()
    assert status == 2 and tree(*unchanged) == before and not (unchanged and printed.out)
    *warnings, error = printed.err.splitlines()
    assert error.startswith(f"{Path(script.__file__).name}: error: ")
    assert all(line.startswith(("warning: ", "note: ", "--group: ", "about ")) for line in warnings)
    return [*warnings, error]


def weights_file(path: Path, size: int = 7) -> Path:
    """A "pretrained" ResNet-18 with a head of `size` classes."""
    torch.manual_seed(1)
    torch.save(models.resnet18(num_classes=size).state_dict(), path)
    return path


class Process:
    """The script in a process of its own, or in several as under torchrun.

    They are forked from this one, which has torch loaded already, and run `code` as Python would.
    """

    def __init__(self, *command: object, processes: int = 0, code: str = CODE, **where: Any):
        script = where.get("script", SCRIPT)
        self.files = [tempfile.TemporaryFile() for _ in "oe"]  # noqa: SIM115
        with socket.socket() as free:
            free.bind(("localhost", 0))
            alike = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        alike |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
        alike["TORCHELASTIC_RUN_ID"] = "none"

        def execute(rank: str) -> None:
            for number, file in enumerate(self.files, 1):
                os.dup2(file.fileno(), number)
            outputs = (os.fdopen(n, "w", 1, errors="backslashreplace") for n in (1, 2))
            sys.stdout, sys.stderr = outputs
            # Tests run in the background may have been told to ignore SIGINT, and would pass it on.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ |= alike | {"RANK": rank, "LOCAL_RANK": rank} if processes else {}
            os.chdir(where.get("folder", "."))
            sys.argv = [*map(str, (script, *command))]
            main = sys.modules["__main__"] = ModuleType("__main__")
            exec(compile(code, script, "exec"), vars(main))

        fork = get_context("fork").Process
        self.all = [fork(target=execute, args=str(rank)) for rank in range(processes or 1)]
        for each in self.all:
            each.start()

    def printed(self) -> list[str]:
        """What is on stdout and on stderr so far."""
        return [os.pread(file.fileno(), 10**6, 0).decode() for file in self.files]

    def wait_for(self, seen: Callable[[], object]) -> None:
        """Wait until something is seen, or the process has ended."""
        while self.all[0].is_alive() and not seen():
            time.sleep(0.005)

    def kill(self, number: int) -> None:
        """Send the signal of this number."""
        os.kill(self.all[0].pid or 0, number)

    def end(self, *status: int) -> list[str]:
        """All that was printed, once the processes have ended with one of these statuses, or 0."""
        for each in self.all:
            each.join(120)
        alive = [each.kill() for each in self.all if each.is_alive()]
        self.status = next((each.exitcode for each in self.all if each.exitcode), 0)
        assert not alive and self.status in (status or (0,)), self.printed()
        return self.printed()


def torchrun(*command: object, script: Path = SCRIPT) -> subprocess.CompletedProcess[str]:
    """The script in two processes under torchrun, which must end well."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = (*start, str(script), *map(str, command))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=480)
    assert done.returncode == 0, done.stderr
    return done


class Trigger(io.StringIO):
    """A text that does something as soon as `text` is printed, once."""

    def __init__(self, text: str, action: Callable[[], object]):
        super().__init__()
        self.text, self.action = text, action

    def write(self, written: str) -> int:
        count = super().write(written)
        if self.text in written:
            self.text = "\0"
            self.action()
        return count


def raises(error: BaseException) -> Callable[[], object]:
    """Something to do that raises `error`."""

    def action() -> None:
        raise error

    return action


def interrupt_after(epochs: int, command: list[str], output: Path, fold: str = "") -> Path:
    """The run, stopped by Ctrl-C once epoch number `epochs` of a fold (the first) is stored."""
    stdout = Trigger(f"{fold}{epochs:3}/", raises(KeyboardInterrupt()))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout):
        patch.setattr(training, "WRITE_EVERY", 0.0)
        assert training.main([*command, "--output", str(output)]) == 130
    return output


def assert_moved_alike(
    state: dict[str, torch.Tensor], model: torch.nn.Module, start: dict[str, torch.Tensor]
) -> None:
    """The same way from the start, but for rounding, of which Adam makes much in a few weights."""
    for name, value in model.state_dict().items():
        way = (value - start[name]).float().norm()
        assert (state[name] - value).float().norm() <= 0.1 * way + 1e-6, name


# ------------------------------------------------------- runs that several tests only look at

# As few steps as make a run; float32, which is the same on every processor.
TINY = ["--image-size", "32", "--batch-size", "12", "--device", "cpu", "--no-amp"]


def run(*arguments: object) -> SimpleNamespace:
    """A run that succeeds: its folder (that behind `--output`), what it printed, its bars."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8", newline=""), Terminal()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = training.main([*map(str, arguments)])
    assert status == 0, err.getvalue()
    path = Path(arguments[arguments.index("--output") + 1]) if "--output" in arguments else None
    out.flush()
    printed = out.buffer.getvalue().decode()
    return SimpleNamespace(path=path, out=printed, err=err.getvalue())


# What is in a run folder.
FILES = {
    *("config.json", "split.csv", "history.csv", "classes.csv", "predictions.csv"),
    *("recall.svg", "curves.svg", "report.html", "network.pt"),
}


def network_of(run: Path) -> dict[str, Any]:
    """What is in the network file of a run."""
    return torch.load(run / "network.pt", weights_only=True)


def whole_of(run: Path) -> dict[str, torch.Tensor]:
    """The network of all layers of a run of one fold that is not calibrated.

    In the file its last layer is 1.5 times as large: so it makes three quarters of a mean of two.
    """
    state = network_of(run)["networks"][0]
    return state | {name: state[name] / 1.5 for name in ("fc.weight", "fc.bias")}


def by_hand(network: dict[str, Any], paths: Iterable[Path | str]) -> torch.Tensor:
    """The mean logits of the networks, by torchvision alone: what the README shows."""
    size = network["eval_size"]
    view = [v2.PILToTensor(), v2.Resize(size), v2.CenterCrop(size)]
    norm = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    prepare = v2.Compose([*view, v2.ToDtype(torch.float32, scale=True), norm])
    photos = [prepare(ImageOps.exif_transpose(Image.open(path)).convert("RGB")) for path in paths]
    model, logits = models.get_model(network["arch"], num_classes=len(network["classes"])), []
    for state in network["networks"]:
        model.load_state_dict(state)
        logits.append(model.eval()(torch.stack(photos)).detach())
    return torch.stack(logits).mean(0)


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
def default_run(animals: Path, pretrained: Path) -> SimpleNamespace:
    """A run with the defaults but for TINY: two epochs of all layers."""
    output = animals.parent / "default"
    return run(animals, "--weights", pretrained, "--epochs", 2, *TINY, "--output", output)


@pytest.fixture(scope="session")
def scratch_run(animals: Path) -> SimpleNamespace:
    """Two epochs from random weights."""
    output = animals.parent / "scratch"
    return run(animals, "--weights", "none", "--epochs", 2, *TINY, "--output", output)


@pytest.fixture(scope="session")
def folds_run(animals: Path, others: Path, pretrained: Path) -> SimpleNamespace:
    """Three folds of an epoch each, not calibrated, and `others` to test them together."""
    flags = ["--folds", 3, "--val", others, "--epochs", 1, "--no-calibration"]
    output = animals.parent / "folds"
    return run(animals, "--weights", pretrained, *flags, *TINY, "--output", output)
