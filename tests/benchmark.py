"""Measure the two scripts against their limits and against the ways that people know.

    python tests/benchmark.py [OUT] [--arch NAME] [--device NAME] [--only PART ...]

OUT is a folder of class folders; without it 2,000 drawn photographs of 500 x 375 pixels serve. For
the whole job on an accelerator they become 15,960 images in 120 classes of 252 to 14. The
contenders take turns, each in a process of its own; the script's loop and its limit, the bare step
of the same network, share one. A figure is the median of the turns, a ratio the median of the
ratios within them; behind it stand the lowest and the highest. Peak memory is that of the largest
process. The tables are Markdown. Nothing here is asserted.
"""

import argparse
import functools
import itertools
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision import models
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import data_training as training  # noqa: E402

STEPS = defaultdict(lambda: 50, cpu=4)  # in a turn of training
READ = 512  # images in a turn of a loader
SIZES = (10_000, 100_000, 1_000_000)
DRAWN = "photographs"  # the folder of those that are drawn
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in the unit of `ru_maxrss`

Figure = tuple[float, float]  # what was measured, and the peak of memory in bytes


class Setting(NamedTuple):
    """What the contenders work on."""

    folder: Path
    arch: str
    device: str
    batch_size: int
    repetitions: int


# ----------------------------------------------------------------------------- taking turns


class Contender(NamedTuple):
    """A name, a function with its arguments that returns a figure, and the process it runs in."""

    name: str
    function: Callable[..., Figure]
    arguments: tuple[Any, ...]
    process: str = ""  # its own


class Turns(NamedTuple):
    """What a contender did in its turns."""

    name: str
    figures: list[float]
    memory: float


def take_turns(contenders: list[Contender], repetitions: int) -> list[Turns]:
    """The figures of all, one after the other, again and again; the first turn does not count.

    Each has a process that lives through all its turns; those of the same `process` share one.
    """
    turns = [Turns(each.name, [], 0.0) for each in contenders]
    processes = [each.process or each.name for each in contenders]
    pools = {name: ProcessPoolExecutor(1, get_context("spawn")) for name in processes}
    for repetition in range(repetitions + 1):
        for place, (process, each) in enumerate(zip(processes, contenders, strict=True)):
            figure, memory = pools[process].submit(each.function, *each.arguments).result()
            print(f"  {each.name}: {figure:.4g}", file=sys.stderr, flush=True)
            if repetition:
                turns[place].figures.append(figure)
                turns[place] = turns[place]._replace(memory=max(memory, turns[place].memory))
    for pool in pools.values():
        pool.shutdown()
    return turns


def own_peak() -> float:
    """The most memory that this process has had, in bytes; 0 on Windows, which does not say."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT if resource else 0.0


# Run in a small process of its own: a command is charged with the memory of the one that starts it.
CLOCK = """
import os, subprocess, sys, time
getattr(os, "sync", int)()
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
peak = 0
if hasattr(os, "wait4"):  # not on Windows
    _, status, usage = os.wait4(process.pid, 0)
    peak = usage.ru_maxrss
else:
    status = process.wait()
print(time.perf_counter() - started, peak)
sys.exit(bool(status))
"""


def run_command(command: list[str], remove: Path | None = None) -> Figure:
    """The seconds that a command takes; what it made at `remove` is removed afterwards."""
    clock = [sys.executable, "-c", CLOCK, *command]
    printed = subprocess.run(clock, check=True, capture_output=True, text=True).stdout
    if remove:
        shutil.rmtree(remove)
    seconds, peak = map(float, printed.split())
    return seconds, peak * RSS_UNIT


# -------------------------------------------------------------------- training and its limits


class Prepared(NamedTuple):
    """A stage of the script that trains all layers, and the draws of a turn."""

    given: training.Given
    trainer: training.Trainer
    reader: training.Reader
    drawn: Tensor


@functools.cache
def prepare(setting: Setting) -> Prepared:
    """What the script has made by the time that it trains everything, with random weights."""
    with tempfile.TemporaryDirectory() as work:
        command = [str(setting.folder), "--arch", setting.arch, "--device", setting.device]
        command += ["--weights", "none", "--output", f"{work}/run"]
        args = training.parse_args([*command, "--batch-size", str(setting.batch_size)])
        compute = training.join_processes(args.device, args.amp)
        with training.HELD:
            given, progress = training.prepare(args, compute)
    progress.model.to(compute.device, memory_format=training.memory_format(compute.device))
    reader, stage = training.Reader(given), next(training.plan(given, progress, 0))
    training.begin(given, progress, stage, reader)
    drawn = training.draw_epoch(given, stage, 1)
    images = STEPS[compute.device.type] * setting.batch_size
    drawn = drawn.repeat(1 + images // len(drawn))[:images]
    return Prepared(given, progress.trainer, reader, drawn)


def synchronise(device: torch.device) -> None:
    """Wait for the accelerator."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def bare_step(setting: Setting) -> Figure:
    """Images per second of forward, backward and optimizer, on a batch that is there already."""
    given, trainer, _, drawn = prepare(setting)
    compute = given.compute
    noise = torch.randint(256, (setting.batch_size, 224, 224, 3), dtype=torch.uint8)
    inputs = training.to_input(noise, compute.device)
    targets = torch.zeros(setting.batch_size, dtype=torch.int64, device=compute.device)
    synchronise(compute.device)
    started = time.perf_counter()
    for _ in range(len(drawn) // setting.batch_size):
        with compute.autocast():
            logits = trainer.network(inputs)
        trainer.optimizer.zero_grad()
        F.cross_entropy(logits.float(), targets).backward()
        trainer.optimizer.step()
    synchronise(compute.device)
    return len(drawn) / (time.perf_counter() - started), own_peak()


def epoch_loop(setting: Setting) -> Figure:
    """Images per second of the script's own loop, from the files on."""
    given, trainer, reader, drawn = prepare(setting)
    trainer.scheduler.last_epoch = 0  # the schedule may not end
    started = time.perf_counter()
    training.train_epoch(given, trainer, drawn, 1, reader)
    synchronise(given.compute.device)
    return len(drawn) / (time.perf_counter() - started), own_peak()


@functools.cache
def prepare_usual(setting: Setting) -> tuple[Any, ...]:
    """Dataset, network, optimizer, device and workers, as people write them."""
    device = training.pick_compute(setting.device, False).device
    steps = [
        v2.RandomResizedCrop(224),
        v2.RandomHorizontalFlip(),
        *(v2.ToImage(), v2.ToDtype(torch.float32, scale=True)),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    images = ImageFolder(setting.folder, v2.Compose(steps))
    model = models.get_model(setting.arch, num_classes=len(images.classes)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    return images, model, optimizer, device


def usual_loop(setting: Setting) -> Figure:
    """Images per second of the loop people write, from the files on."""
    images, model, optimizer, device = prepare_usual(setting)
    count = STEPS[device.type] * setting.batch_size
    order = itertools.islice(itertools.cycle(random.sample(range(len(images)), len(images))), count)
    workers = min(8, os.cpu_count() or 1)
    part = Subset(images, list(order))
    started = time.perf_counter()
    loader = DataLoader(part, setting.batch_size, shuffle=True, num_workers=workers)
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs.to(device)), targets.to(device))
        loss.backward()
        optimizer.step()
        loss.item()
    return count / (time.perf_counter() - started), own_peak()


def race_training(setting: Setting) -> list[str]:
    """Rows: the loop against its limit, on the same network, and against the loop people write."""
    contenders = [
        Contender("bare step", bare_step, (setting,), "script"),
        Contender("data_training.py", epoch_loop, (setting,), "script"),
        Contender("usual loop", usual_loop, (setting,)),
    ]
    bare, ours, usual = take_turns(contenders, setting.repetitions)
    goals = "0.95; 0.9 with ResNet-18 on a GPU", "2.5 with bfloat16, 3 on a GPU"
    return [
        row("epoch loop / bare step", ours, bare, "images/s", goals[0]),
        row("epoch loop / loop people write", ours, usual, "images/s", goals[1]),
    ]


# ----------------------------------------------------------------------------------- loader


def our_loader(setting: Setting) -> Figure:
    """Images per second that the script decodes, augments and batches on one core."""
    torch.set_num_threads(1)
    given, _, _, drawn = prepare(setting)
    given = replace(given, settings=replace(given.settings, workers=0))
    drawn = drawn.repeat(1 + READ // len(drawn))[:READ]
    batches = training.cut_batches(drawn, setting.batch_size, training.seeded("augment", 0, 1))
    started = time.perf_counter()
    for _ in training.Reader(given).read(batches, "loader"):
        pass
    return READ / (time.perf_counter() - started), own_peak()


@functools.cache
def pillow_images(folder: Path) -> Subset[tuple[Tensor, int]]:
    """The same number of images, in the same crops, read by Pillow."""
    crop = v2.RandomResizedCrop(224, (0.5, 1.0))
    images = ImageFolder(folder, v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()]))
    chosen = random.sample(range(len(images)), len(images))
    return Subset(images, list(itertools.islice(itertools.cycle(chosen), READ)))


def pillow_loader(setting: Setting) -> Figure:
    """Images per second of Pillow and `RandomResizedCrop` on one core, as bytes too."""
    torch.set_num_threads(1)
    loader = DataLoader(pillow_images(setting.folder), setting.batch_size)
    started = time.perf_counter()
    for _ in loader:
        pass
    return READ / (time.perf_counter() - started), own_peak()


def race_loaders(setting: Setting) -> list[str]:
    """A row: reading, cropping and batching against Pillow."""
    ours, pillow = take_turns(
        [Contender("ours", our_loader, (setting,)), Contender("Pillow", pillow_loader, (setting,))],
        setting.repetitions,
    )
    return [row("loader / Pillow + RandomResizedCrop, a core", ours, pillow, "images/s", "2")]


# ---------------------------------------------------------------------------------- copying


def race_copying(setting: Setting) -> list[str]:
    """Rows: `data_creation.py`, which flushes what it wrote, against `cp -r`, and linking."""
    with tempfile.TemporaryDirectory(prefix=".benchmark-", dir=setting.folder.parent) as work:
        target = Path(work, "target")
        create = [sys.executable, str(ROOT / "data_creation.py"), str(setting.folder), str(target)]
        copy = ["cp", "-r", str(setting.folder), str(target)]
        commands = {
            "data_creation.py": [*create, "--step", "0"],
            "cp -r": copy,
            "cp -r, sync": ["sh", "-c", 'cp -r "$1" "$2" && sync', "sh", *copy[2:]],
            "--link": [*create, "--step", "0", "--link"],
        }
        contenders = [
            Contender(*item[:1], run_command, (item[1], target)) for item in commands.items()
        ]
        ours, plain, synced, linked = take_turns(contenders, setting.repetitions)
    return [
        row("data_creation.py / cp -r", ours, plain, "s", "at most 1.1"),
        row("data_creation.py / cp -r and sync", ours, synced, "s", ""),
        row("copying / --link", ours, linked, "s", "10"),
    ]


# ------------------------------------------------------------------------------------ start

FIRST_BATCH = """
import sys
sys.path.insert(0, {root!r})
import data_training
read = data_training.Reader.read
def first_batch(*arguments):
    next(read(*arguments))
    sys.exit()
data_training.Reader.read = first_batch
data_training.main({arguments!r})
"""


def race_start(setting: Setting) -> list[str]:
    """Rows: `--help` against bare imports, and the seconds until a first step begins."""
    python = sys.executable
    with tempfile.TemporaryDirectory() as work:
        arguments = [str(setting.folder), "--arch", setting.arch, "--device", setting.device]
        arguments += ["--weights", "none", "--output", f"{work}/run"]
        first = FIRST_BATCH.format(root=str(ROOT), arguments=arguments)
        commands = {
            "data_creation.py --help": [python, str(ROOT / "data_creation.py"), "--help"],
            "import argparse": [python, "-c", "import argparse"],
            "data_training.py --help": [python, str(ROOT / "data_training.py"), "--help"],
            "import torch, torchvision": [python, "-c", "import torch, torchvision"],
        }
        contenders = [Contender(name, run_command, (each,)) for name, each in commands.items()]
        started = Contender("first batch", run_command, ([python, "-c", first], Path(work, "run")))
        turns = take_turns([*contenders, started], setting.repetitions)
    images = sum(len(files) for _, _, files in os.walk(setting.folder))
    return [
        row("data_creation.py --help / import argparse", *turns[:2], "s", "at most 2"),
        row("data_training.py --help / import torch, torchvision", *turns[2:4], "s", "at most 1.2"),
        row(f"first step begins, {images:,} images", turns[4], None, "s", "15 s for 15,000"),
    ]


# ---------------------------------------------------------------------------- the whole job

PARTS_OF_JOB = {
    "start": "prepare",
    "features": "extract_features",
    "training": "train_epoch",
    "evaluation": "evaluate",
    "files": "store_epoch",
    "end and report": "finish",
}


def follow_job(command: list[str]) -> dict[str, float]:
    """Seconds of each part of a run, of those of training the ones that it waited for images."""
    seconds = dict.fromkeys([*PARTS_OF_JOB, "training's wait for images"], 0.0)

    def follow(part: str, name: str) -> None:
        function = getattr(training, name)

        def followed(*args: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **named)
            seconds[part] += time.perf_counter() - started
            if isinstance(result, training.Trained):
                seconds["training's wait for images"] += result.waited
            return result

        setattr(training, name, followed)

    for part, name in PARTS_OF_JOB.items():
        follow(part, name)
    if training.main(command):
        sys.exit("benchmark.py: the job failed")
    return seconds | {"peak": own_peak() / 1e6}


def multiply(photographs: Path, folder: Path) -> None:
    """A staircase of 120 classes of 252 to 14 images, no two the same in all bytes."""
    contents = [path.read_bytes() for path in sorted(photographs.rglob("*.jpg"))]
    for label in range(120):
        (folder / f"class_{label:03}").mkdir(parents=True)
        for number in range(252 - 2 * label):
            content = contents[(252 * label + number) % len(contents)]
            path = folder / f"class_{label:03}" / f"{number}.jpg"
            path.write_bytes(content + f"{label}/{number}".encode())  # after the end of the image


def measure_job(setting: Setting) -> list[str]:
    """A row: the seconds from the command to the report, and where they went."""
    cpu = training.pick_compute(setting.device, None).device.type == "cpu"
    with tempfile.TemporaryDirectory() as work:
        folder, epochs = setting.folder, 2 if cpu else 10
        if not cpu and folder.name == DRAWN:
            folder = Path(work, "job")
            multiply(setting.folder, folder)
        torch.save(models.get_model(setting.arch).state_dict(), Path(work, "weights.pth"))
        command = [str(folder), "--arch", setting.arch, "--weights", f"{work}/weights.pth"]
        command += ["--device", setting.device, "--batch-size", str(setting.batch_size)]
        command += ["--epochs", str(epochs), "--output", f"{work}/run"]
        images = sum(len(files) for _, _, files in os.walk(folder))
        started = time.perf_counter()
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # imports are a part of it
            values = pool.submit(follow_job, command).result()
        total = time.perf_counter() - started
    peak = values.pop("peak")
    head = [f"`--epochs {epochs}`, {images:,} images", "all, s", *values, "peak, MB"]
    shares = [f"{each:.3g} s, {each / total:.1%}" for each in values.values()]
    cells = ["from the command to the report", f"{total:.3g}", *shares, f"{peak:,.0f}"]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", f"| {' | '.join(cells)} |"]


# ----------------------------------------------------------------------------------- growth


def grow(images: int, folder: Path) -> dict[str, float]:
    """Seconds of each step around training for so many made-up images, and bytes an image."""
    before, seconds = own_peak(), {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name] = time.perf_counter() - clock
        clock = time.perf_counter()

    command = [str(folder), "--output", f"{folder.parent}/run", "--weights", "none"]
    compute = training.Compute(torch.device("cpu"), None)
    settings = training.resolve_settings(training.parse_args(command), compute, "none", {})
    classes, found = training.list_images(folder)
    lap("scan")
    checked = {row.path: training.Checked(at, "", 0.0, 1) for at, row in enumerate(found)}
    training.check_images = lambda _: checked  # as if these files had been decoded
    data = training.load_data(settings, classes, found, torch.empty(0, dtype=torch.int64))
    train, val = data.learns(0), data.judges(0)
    lap("split")
    weights = training.sample_weights(data.labels[train], 1.0)
    lap("weights")
    drawn = train[training.draw_images(weights, training.seeded("draw", 0, 1))]
    lap("draw")
    training.cut_batches(drawn, 64, training.seeded("augment", 0, 1))
    lap("batches")
    given = training.Given(
        settings, data, known=train[:0], baseline=None, origin="", compute=compute
    )
    logits = F.one_hot(data.labels[val].roll(1), len(classes)).float()
    last = training.judge(given, {0: logits})
    data.counts(drawn)
    table = training.format_table(training.list_predictions(data, last))
    training.write_file(folder.parent / "predictions.csv", table)
    lap("evaluation")
    return {"images": images, **seconds, "bytes": (own_peak() - before) / images}


def measure_growth() -> list[str]:
    """Rows: seconds and memory by number of images."""
    rows = []
    for images in SIZES:
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work, "made-up")
            for label in range(100):  # the largest class has 199 times the images of the smallest
                (folder / f"class_{label:02}").mkdir(parents=True)
                for number in range(max(2, images * (2 * label + 1) // 10_000)):
                    (folder / f"class_{label:02}" / f"image_{number:06}.jpg").touch()
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                values = pool.submit(grow, images, folder).result()
        names = list(values)
        print(f"  growth: {values}", file=sys.stderr, flush=True)
        per_image = values["draw"] / (0.8 * images)
        cells = [f"{values[name]:.3f}" for name in names[1:-1]]
        speed = f"{0.01 / per_image:,.0f}"
        rows.append(
            "| " + " | ".join([f"{images:,}", *cells, speed, f"{values['bytes']:.0f}"]) + " |"
        )
    head = ["images", *(f"{name}, s" for name in names[1:-1])]
    head += ["the draw is 1 % of an epoch at, images/s", "peak bytes an image"]
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *rows]


# ----------------------------------------------------------------------------------- report


def row(title: str, ours: Turns, other: Turns | None, unit: str, goal: str) -> str:
    """A row of the table: medians, the ratio with its lowest and highest, memory."""

    def show(turns: Turns | None) -> tuple[str, str]:
        if turns is None:
            return "", ""
        return f"{median(turns.figures):.3g} {unit}", f"{turns.memory / 1e6:,.0f}"

    ratio = ""
    if other:
        pairs = zip(ours.figures, other.figures, strict=True)
        ratios = sorted(one / two for one, two in pairs)
        ratio = f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    (left, left_memory), (right, right_memory) = show(ours), show(other)
    cells = [title, left, right, ratio, goal, left_memory, right_memory]
    return "| " + " | ".join(cells) + " |"


def describe(setting: Setting) -> str:
    """The machine, the versions and the settings."""
    compute = training.pick_compute(setting.device, None)
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), name)
    if compute.device.type == "cuda":
        name += f", {torch.cuda.get_device_name()}"
    libraries = (torch, torchvision, PIL, np)
    versions = ", ".join(f"{each.__name__} {each.__version__}" for each in libraries)
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.system()}; "
        f"Python {platform.python_version()}, {versions}; {setting.arch}, 224 px, batches of "
        f"{setting.batch_size}, {compute.amp or torch.float32} on {compute.device.type}; "
        f"median of {setting.repetitions} turns (lowest to highest)"
    )


def draw_photographs(folder: Path) -> None:
    """Write 20 classes of 100 smooth, grainy JPEGs of 500 x 375 pixels and about 45 kB."""
    stream = np.random.default_rng(0)
    for label in range(20):
        (folder / f"class_{label:02}").mkdir(parents=True)
        for number in range(100):
            small = Image.fromarray(stream.integers(256, size=(24, 32, 3), dtype=np.uint8))
            smooth = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC), np.float32)
            grainy = (smooth + stream.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(grainy).save(folder / f"class_{label:02}" / f"{number}.jpg", quality=85)


def parse_args() -> argparse.Namespace:
    """The settings on the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("out", metavar="OUT", nargs="?", type=Path, help="folder of class folders")
    add("--arch", default="resnet18")
    add("--device", default="auto")
    add("--batch-size", type=int, default=64, help="images a step")
    add("--repetitions", type=int, default=5, help="turns that count")
    add(
        "--only",
        nargs="+",
        choices=[*PARTS, "job", "growth"],
        default=[*PARTS, "job", "growth"],
        help="these parts alone",
    )
    return parser.parse_args()


PARTS: dict[str, Callable[[Setting], list[str]]] = {
    "training": race_training,
    "loader": race_loaders,
    "copying": race_copying,
    "start": race_start,
}


def main() -> None:
    """Run the parts and print their tables."""
    args = parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = (args.out or Path(work, DRAWN)).resolve()
        if not args.out:
            draw_photographs(folder)
        setting = Setting(folder, args.arch, args.device, args.batch_size, args.repetitions)
        print(describe(setting), end="\n\n")
        print("| what | ours | other | ratio | goal | our peak, MB | other's, MB |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for name, race in PARTS.items():
            there = name != "copying" or shutil.which("cp")  # Windows has none
            if name in args.only and there:
                print(*race(setting), sep="\n", flush=True)
        if "job" in args.only:
            print("", *measure_job(setting), sep="\n", flush=True)
        if "growth" in args.only:
            print("", *measure_growth(), sep="\n")


if __name__ == "__main__":
    main()
