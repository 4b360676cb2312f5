"""Measure how long `data_training.py` takes, against a whole program as people write it.

    python tests/experiments/benchmark.py FOLDER [--arch NAME] [--device NAME] [--turns N]

FOLDER holds class folders. The two take turns in this one run; the ratio is the median of those of
the turns, between the lowest and the highest. Weights are random. Both train all layers for two
epochs; the script also fits its linear probe and evaluates the points of its line. The plain
program: ImageFolder, a DataLoader with 8 workers, AdamW, evaluation after each epoch, float32.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from torchvision import models
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

SCRIPT = Path(__file__).parents[2] / "data_training.py"
BATCH = 64  # images a step
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAST = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]


def train_plainly(chosen: argparse.Namespace) -> None:
    """The program people write; a fifth of the images validate."""
    augment = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), *LAST]
    train = ImageFolder(chosen.folder, v2.Compose(augment))
    val = ImageFolder(chosen.folder, v2.Compose([v2.Resize(256), v2.CenterCrop(224), *LAST]))
    order = torch.randperm(len(train)).tolist()
    cut = len(order) // 5
    batches = DataLoader(Subset(train, order[cut:]), BATCH, True, num_workers=8)
    held = DataLoader(Subset(val, order[:cut]), BATCH, num_workers=8)
    model = models.get_model(chosen.arch)
    model.load_state_dict(torch.load(chosen.weights, weights_only=True))
    model.fc = torch.nn.Linear(model.fc.in_features, len(train.classes))
    model.to(chosen.device)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4)
    for _ in range(chosen.epochs):
        model.train()
        for images, targets in batches:
            optimizer.zero_grad()
            logits = model(images.to(chosen.device))
            F.cross_entropy(logits, targets.to(chosen.device)).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            right = [model(x.to(chosen.device)).argmax(1).cpu() == y for x, y in held]
        print(torch.cat(right).float().mean().item())


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="of class folders")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=int, help=argparse.SUPPRESS)  # of the plain program
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--weights", help=argparse.SUPPRESS)  # too
    chosen = parser.parse_args()
    if chosen.weights:
        return train_plainly(chosen)
    seconds: list[list[float]] = []
    with tempfile.TemporaryDirectory() as work:
        weights = f"{work}/weights.pth"
        torch.save(models.get_model(chosen.arch).state_dict(), weights)
        for turn in range(chosen.turns + 1):
            seconds.append([])
            run = ["--output", f"{work}/{turn}", "--batch-size", str(BATCH)]
            for file, flags in ((SCRIPT, run), (__file__, [])):
                command = [sys.executable, file, chosen.folder, "--arch", chosen.arch, *flags]
                command += ["--epochs", "2", "--device", chosen.device, "--weights", weights]
                started = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                seconds[-1].append(time.perf_counter() - started)
    ours, plain = zip(*seconds[1:], strict=True)  # the first turn is no turn
    ratios = sorted(one / other for one, other in zip(ours, plain, strict=True))
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {chosen.arch}, {chosen.device}")
    print(f"data_training.py {median(ours):.1f} s, plain {median(plain):.1f} s")
    print(f"ratio {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
