"""Train the loop that people write on the split of a run, and compare the two.

    python tests/recipes.py RUN --lr 3e-4 --epochs 3

RUN is a run folder of `data_training.py`, with the images where they were. The loop differs from
the script in its recipe alone: same weights, training and validation images, weighted sampler,
mixed precision, image sizes, crops and batch size; but a new head, every layer trained from the
first step with AdamW at one rate that falls along a cosine, BatchNorm in train mode, and the last
weights taken as they are. It prints the balanced accuracy after the last epoch, what RUN has more,
with 95 % intervals, and the seconds of both.
"""

import argparse
import csv
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, WeightedRandomSampler
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import data_training as training  # noqa: E402


def usual_loop(run: Path, lr: float, epochs: int, seed: int) -> None:
    """Train, evaluate and print."""
    settings = json.loads((run / "config.json").read_text())["settings"]
    flags = [settings["out"], "--output", str(run)]
    flags += [f"--{key}={settings[key]}" for key in ("val", "source") if settings[key]]
    args = training.parse_args([*flags, "--device", settings["device"]])
    args.image_size, args.no_flip = settings["image_size"], settings["no_flip"]
    args.crop_scale, args.batch_size = settings["crop_scale"], settings["batch_size"]
    args.arch, args.weights, args.workers = (settings[k] for k in ("arch", "weights", "workers"))
    data, compute = training.load_split(args, 0, []), training.pick_compute(args.device, None)
    started = time.perf_counter()
    torch.manual_seed(seed)
    state, _ = training.load_weights(args)
    model, _ = training.build_model(args.arch, data.classes, state, ["another head"])
    torch.nn.init.normal_(model.fc.weight, 0, 0.01)
    model.to(compute.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr, fused=True)
    steps = epochs * -(-len(data.train) // args.batch_size)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    weights = training.sample_weights(data.labels[data.train], 1.0)
    views = training.transforms(args)
    images = [training.Images(data.paths, data.labels, view) for view in views]
    for epoch in range(1, epochs + 1):
        model.train()
        drawn = data.train[list(WeightedRandomSampler(weights.tolist(), len(weights)))]
        batches = training.Batches(data.train, args.batch_size)
        batches.assign(drawn, training.seeded("usual", seed, epoch))
        loader = DataLoader(images[0], batch_sampler=batches, num_workers=args.workers)
        for inputs, targets in tqdm(loader, f"epoch {epoch}", leave=False, disable=None):
            with compute.autocast():
                logits = model(training.to_input(inputs, compute.device))
            loss = F.cross_entropy(logits.float(), targets.to(compute.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cosine.step()
    seconds = time.perf_counter() - started
    val = DataLoader(images[1], batch_sampler=training.Batches(data.val, args.batch_size))
    last = training.evaluate(model, val, compute)
    counts = data.counts(data.train)
    measures = training.measure(last.confusion, counts)
    theirs = training.load_baseline(run, data)
    change = training.compare(last.targets, last.predicted, theirs, counts)[1]
    with open(run / "history.csv", newline="") as file:
        ours = sum(float(row["seconds"]) for row in csv.DictReader(file))
    print(
        f"usual loop, AdamW {lr:g}, {epochs} epochs: balanced accuracy "
        f"{measures['balanced_accuracy']:.1%} ± {100 * measures['half_width']:.1f} "
        f"in {seconds:.0f} s; {run}: {change.after:.1%} in {ours:.0f} s with evaluations, "
        f"{100 * change.difference:+.1f} [{100 * change.low:.1f}, {100 * change.high:.1f}]"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder to compare with")
    parser.add_argument("--lr", metavar="X", type=float, default=3e-4, help="of AdamW, at its peak")
    parser.add_argument("--epochs", metavar="N", type=int, default=3, help="over all images")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of draws and head")
    given = parser.parse_args()
    usual_loop(given.run, given.lr, given.epochs, given.seed)
