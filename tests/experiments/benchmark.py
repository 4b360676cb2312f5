"""Measure how fast `data_training.py` is, against its limits and against what people write.

    python tests/experiments/benchmark.py [FOLDER] [--arch NAME] [--device NAME] [--turns N]

FOLDER holds class folders; without it 1,000 drawn photographs of 500 x 375 pixels serve. The two
sides of a line take turns in this one run, so that what else the machine does hits both. A figure
is the median of the turns, a ratio the median of the ratios within them; behind it stand the lowest
and the highest. Weights are random. The table is Markdown; nothing here is asserted.

    bare step    forward, backward and optimizer of the same network on a batch that is there
    decoding     Pillow alone, on one core: no loader of these files is faster
    ImageFolder  torchvision's, in a DataLoader, with the same crops, on one core
    plain        a whole program as people write it: ImageFolder, DataLoader with 8 workers, AdamW,
                 all layers, evaluation after each epoch; float32
"""

import argparse
import itertools
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision import models
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

SCRIPT = Path(__file__).parents[2] / "data_training.py"
sys.path.insert(0, str(SCRIPT.parent))

import data_training as training  # noqa: E402

READ = 500  # images in a turn of a loader
STEPS = {"cpu": 4}  # in a turn of training; 50 elsewhere
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Measure = Callable[[], float]


def command_of(args: argparse.Namespace, work: str, *flags: object) -> list[str]:
    """The command line of the script, without its name."""
    command = [args.folder, "--arch", args.arch, "--device", args.device, "--output", f"{work}/run"]
    return [*map(str, [*command, "--batch-size", args.batch_size, *flags])]


def measure_training(args: argparse.Namespace, work: str) -> tuple[Measure, Measure]:
    """Images a second of the script's loop, from the files on, and of the bare step."""
    said, options = training.parse_args(command_of(args, work, "--weights", "none"))
    compute = training.pick_compute(options)
    settings, listing, stored = training.open_run(said, options, compute)
    data = training.load_data(settings, listing, stored)
    paths = [file.path for file in data.files]
    look = training.Preparation(settings.image_size, data.white)
    images = training.Images(paths, data.labels, look)
    workers = training.count_workers(options.workers, compute.device.type)
    reader = training.Reader(images, compute, workers, settings.batch_size)
    model = compute.to_device(training.load_model(settings, data.classes, stored))
    stage = training.WHOLE._replace(total_steps=10**6)
    trainer = training.Trainer(model, stage, training.whole_optimizer(model, True), compute)
    steps, learnt = STEPS.get(compute.device.type, 50), data.learnt(0)
    drawn = learnt.repeat(1 + steps * args.batch_size // len(learnt))[: steps * args.batch_size]
    noise = torch.randint(256, (args.batch_size, 224, 224, 3), dtype=torch.uint8)
    inputs = training.move_batch(noise, compute)
    targets = torch.zeros(args.batch_size, dtype=torch.int64, device=compute.device)

    def loop() -> float:
        training.train_epoch(trainer, reader, drawn, training.seeded("augment", 0))
        return len(drawn)

    def bare_step() -> float:
        for _ in range(steps):
            with compute.autocast():
                logits = trainer.network(inputs)
            loss = F.cross_entropy(logits.float(), targets)
            trainer.optimizer.zero_grad()
            loss.backward()
            trainer.optimizer.step()
        loss.item()  # waits for the device
        return len(drawn)

    return speed(loop), speed(bare_step)


def speed(work: Measure, threads: int = torch.get_num_threads()) -> Measure:
    """What `work` does in a second, where it returns what it has done."""

    def measure() -> float:
        torch.set_num_threads(threads)
        started = time.perf_counter()
        return work() / (time.perf_counter() - started)

    return measure


def measure_loaders(args: argparse.Namespace) -> tuple[Measure, Measure, Measure]:
    """Images a second on one core: of the script's reader, of decoding, and of `ImageFolder`."""
    crop = [v2.RandomResizedCrop(224, (training.CROP_SCALE, 1.0)), v2.RandomHorizontalFlip()]
    folder = ImageFolder(args.folder, v2.Compose([*crop, v2.PILToTensor()]))
    shuffled = random.Random(0).sample(range(len(folder)), len(folder))
    chosen = [*itertools.islice(itertools.cycle(shuffled), READ)]
    paths = [path for path, _ in folder.samples]
    look = training.Preparation(224, 255)
    images = training.Images(paths, torch.tensor(folder.targets), look, "sides")
    compute = training.Compute(torch.device("cpu"), "float32")
    reader = training.Reader(images, compute, 0, args.batch_size)

    def ours() -> float:
        seeds = training.seeded("augment", 0)
        batches = training.cut_batches(torch.tensor(chosen), args.batch_size, seeds)
        return sum(len(group.labels) for [group] in reader.read(batches, "ours"))

    def decoding() -> float:
        for index in chosen:
            Image.open(paths[index]).convert("RGB")
        return READ

    def usual() -> float:
        return sum(len(part[1]) for part in DataLoader(Subset(folder, chosen), args.batch_size))

    return speed(ours, 1), speed(decoding, 1), speed(usual, 1)


def measure_commands(args: argparse.Namespace, work: str) -> tuple[Measure, Measure]:
    """Seconds of whole commands: the script's, and the plain program's (`--plain`)."""
    weights = f"{work}/weights.pth"
    torch.save(models.get_model(args.arch).state_dict(), weights)
    flags = ["--weights", weights, "--epochs", args.epochs]

    def seconds(file: Path, *extra: object) -> float:
        with tempfile.TemporaryDirectory(dir=work) as place:
            command = [sys.executable, str(file), *command_of(args, place, *flags, *extra)]
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            return time.perf_counter() - started

    return lambda: seconds(SCRIPT), lambda: seconds(Path(__file__), "--plain")


def train_plainly(args: argparse.Namespace) -> None:
    """The program people write; a fifth of the images validate."""
    device = training.pick_compute(training.Options(device=args.device, amp=False)).device
    last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    augment = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), *last]
    train = ImageFolder(args.folder, v2.Compose(augment))
    val = ImageFolder(args.folder, v2.Compose([v2.Resize(256), v2.CenterCrop(224), *last]))
    order = random.Random(0).sample(range(len(train)), len(train))
    workers = min(8, os.cpu_count() or 1)
    cut = len(order) // 5
    batches = DataLoader(Subset(train, order[cut:]), args.batch_size, True, num_workers=workers)
    held = DataLoader(Subset(val, order[:cut]), args.batch_size, num_workers=workers)
    model = models.get_model(args.arch)
    model.load_state_dict(torch.load(args.weights, weights_only=True))
    model.fc = torch.nn.Linear(model.fc.in_features, len(train.classes))
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4)
    for _ in range(args.epochs):
        model.train()
        for images, targets in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images.to(device)), targets.to(device)).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            right = [model(x.to(device)).argmax(1).cpu() == targets for x, targets in held]
        print(torch.cat(right).float().mean().item())


def race(turns: int, unit: str, sides: dict[str, Measure]) -> list[str]:
    """Rows of the table: the first side against each of the others; the first turn is no turn."""
    figures = [{name: measure() for name, measure in sides.items()} for _ in range(turns + 1)][1:]
    ours, *others = sides
    rows = []
    for other in others:
        ratios = sorted(turn[ours] / turn[other] for turn in figures)
        medians = [f"{median(turn[name] for turn in figures):.3g}" for name in (ours, other)]
        ratio = f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        rows.append(f"| {ours} / {other}, {unit} | {' | '.join(medians)} | {ratio} |")
    return rows


def draw_photographs(folder: Path) -> None:
    """Write 20 classes of 50 smooth, grainy JPEGs of 500 x 375 pixels and about 45 kB."""
    stream = np.random.default_rng(0)
    for label in range(20):
        (folder / f"class_{label:02}").mkdir(parents=True)
        for number in range(50):
            small = Image.fromarray(stream.integers(256, size=(24, 32, 3), dtype=np.uint8))
            smooth = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC), np.float32)
            grainy = (smooth + stream.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(grainy).save(folder / f"class_{label:02}" / f"{number}.jpg", quality=85)


def main() -> None:
    """Measure, and print the table."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(formatter_class=formatter)
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, help="of class folders")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=64, help="images a step")
    parser.add_argument("--epochs", type=int, default=2, help="of the whole commands")
    parser.add_argument("--turns", type=int, default=5)
    for flag in ("--output", "--weights"):  # of the plain program
        parser.add_argument(flag, help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain:
        return train_plainly(args)
    with tempfile.TemporaryDirectory() as work:
        if not args.folder:
            args.folder = Path(work, "photographs")
            draw_photographs(args.folder)
        compute = training.pick_compute(training.Options(device=args.device))
        libraries = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
        print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {libraries};")
        print(f"{args.arch}, 224 px, batches of {args.batch_size}, {compute}\n")
        print("| what | this | other | ratio |\n|---|---|---|---|", flush=True)
        loop, bare_step = measure_training(args, work)
        sides = {"training loop": loop, "bare step": bare_step}
        print(*race(args.turns, "images/s", sides), sep="\n", flush=True)
        ours, decoding, usual = measure_loaders(args)
        sides = {"loader": ours, "decoding": decoding, "ImageFolder": usual}
        print(*race(args.turns, "images/s", sides), sep="\n", flush=True)
        script, plain = measure_commands(args, work)
        unit = f"{args.epochs} epochs, seconds"
        print(*race(args.turns, unit, {"data_training.py": script, "plain": plain}), sep="\n")


if __name__ == "__main__":
    main()
