"""Measure how fast `data_training.py` is, against its limit and against what people write.

    python tests/experiments/benchmark.py FOLDER [--arch NAME] [--device NAME] [--turns N]

FOLDER holds class folders. The two sides of a line take turns in this one run, so that what else
the machine does hits both. A figure is the median of the turns, a ratio the median of the ratios
within them; behind it stand the lowest and the highest. Weights are random. The table is Markdown;
nothing here is asserted.

    bare step    forward, backward and optimizer of the same network on a batch that is there
    plain        a whole program as people write it: ImageFolder, DataLoader with 8 workers, AdamW,
                 all layers, evaluation after each epoch; float32
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from torchvision import models
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

SCRIPT = Path(__file__).parents[2] / "data_training.py"
sys.path.insert(0, str(SCRIPT.parent))

import data_training as training  # noqa: E402

BATCH = 64  # images a step
STEPS = {"cpu": 4}  # in a turn of training; 50 elsewhere
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Measure = Callable[[], float]


def command_of(args: argparse.Namespace, work: str, weights: str) -> list[str]:
    """The command line of the script, or of the plain program, without its name."""
    command = [args.folder, "--arch", args.arch, "--device", args.device, "--weights", weights]
    command += ["--epochs", str(args.epochs), "--batch-size", str(BATCH), "--output", f"{work}/run"]
    return command


def measure_training(args: argparse.Namespace, work: str) -> tuple[Measure, Measure]:
    """Images a second of the script's loop, from the files on, and of the bare step."""
    said, options = training.parse_args(command_of(args, work, "none"))
    compute = training.pick_compute(options)
    settings, listing, stored = training.open_run(said, options, compute)
    settings.output.mkdir()
    data = training.load_data(settings, listing, stored)
    reader = training.make_reader(settings, options, data, compute)
    model = compute.to_device(training.load_model(settings, data.classes, stored))
    stage = training.WHOLE._replace(total_steps=10**6)
    trainer = training.Trainer(model, stage, training.whole_optimizer(model, True), compute)
    steps, learnt = STEPS.get(compute.device.type, 50), data.learnt(0)
    drawn = learnt.repeat(1 + steps * BATCH // len(learnt))[: steps * BATCH]
    noise = torch.randint(256, (BATCH, 224, 224, 3), dtype=torch.uint8)
    inputs = training.move_batch(noise, compute)
    targets = torch.zeros(BATCH, dtype=torch.int64, device=compute.device)

    def loop() -> float:
        started = time.perf_counter()
        training.train_epoch(trainer, reader, drawn, training.seeded("augment", 0))
        return len(drawn) / (time.perf_counter() - started)

    def bare_step() -> float:
        started = time.perf_counter()
        for _ in range(steps):
            with compute.autocast():
                logits = trainer.network(inputs)
            loss = F.cross_entropy(logits.float(), targets)
            trainer.optimizer.zero_grad()
            loss.backward()
            trainer.optimizer.step()
        loss.item()  # waits for the device
        return len(drawn) / (time.perf_counter() - started)

    return loop, bare_step


def measure_commands(args: argparse.Namespace, work: str) -> tuple[Measure, Measure]:
    """Seconds of whole commands: the script's, and the plain program's (`--plain`)."""
    weights = f"{work}/weights.pth"
    torch.save(models.get_model(args.arch).state_dict(), weights)

    def seconds(file: Path, *flags: str) -> float:
        with tempfile.TemporaryDirectory(dir=work) as place:
            command = [sys.executable, str(file), *command_of(args, place, weights), *flags]
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
    batches = DataLoader(Subset(train, order[cut:]), BATCH, True, num_workers=workers)
    held = DataLoader(Subset(val, order[:cut]), BATCH, num_workers=workers)
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


def race(turns: int, unit: str, sides: dict[str, Measure]) -> str:
    """A row of the table: the first side against the other; the first turn is no turn."""
    figures = [[measure() for measure in sides.values()] for _ in range(turns + 1)][1:]
    ratios = sorted(ours / other for ours, other in figures)
    medians = [f"{median(side):.3g}" for side in zip(*figures, strict=True)]
    ratio = f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    return f"| {' / '.join(sides)}, {unit} | {' | '.join(medians)} | {ratio} |"


def main() -> None:
    """Measure, and print the table."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(formatter_class=formatter)
    parser.add_argument("folder", metavar="FOLDER", help="of class folders")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--epochs", type=int, default=2, help="of the whole commands")
    parser.add_argument("--turns", type=int, default=5)
    for flag in ("--output", "--weights", "--batch-size"):  # of the plain program
        parser.add_argument(flag, help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain:
        return train_plainly(args)
    with tempfile.TemporaryDirectory() as work:
        compute = training.pick_compute(training.Options(device=args.device))
        print(f"{os.cpu_count()} cores, torch {torch.__version__}, {args.arch}, {compute}\n")
        print("| what | this | other | ratio |\n|---|---|---|---|", flush=True)
        loop, bare_step = measure_training(args, work)
        sides = {"training loop": loop, "bare step": bare_step}
        print(race(args.turns, "images/s", sides), flush=True)
        script, plain = measure_commands(args, work)
        sides = {"data_training.py": script, "plain": plain}
        print(race(args.turns, f"{args.epochs} epochs, seconds", sides))


if __name__ == "__main__":
    main()
