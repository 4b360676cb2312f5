"""Train what other people train on the split of a run, and compare the two.

    python tests/recipes.py RUN --lr 3e-4 --epochs 3                  # the loop that people write
    python tests/recipes.py RUN --lr 3e-4 --epochs 3 --timm FOLDER    # timm's train.py

RUN is a run folder of `data_training.py`, with the images where they were; its settings give the
others their weights, training and validation images, image sizes and batch size.

The loop differs from the script in its recipe alone: same weighted sampler, mixed precision and
crops; but a new head, every layer trained from the first step with AdamW at one rate that falls
along a cosine, BatchNorm in train mode, and the last weights taken as they are.

FOLDER is a clone of https://github.com/huggingface/pytorch-image-models, whose `train.py` runs with
its own augmentation, label smoothing and loader, and without rebalancing, in a Python that has what
timm needs (`pip install timm`). Its last weights are judged here, as the loop's are.

Printed are the balanced accuracy after the last epoch, what RUN has more, with 95 % intervals, and
the seconds of both, the loop evaluated after each epoch as the script is.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import WeightedRandomSampler
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).parents[1]))

import data_training as training  # noqa: E402


def load_run(run: Path) -> training.Given:
    """What a run was given: its settings and images; computed is here, by one process."""
    settings = json.loads((run / "config.json").read_text())["settings"]
    flags = [settings["out"], "--output", str(run)]
    flags += [f"--{key}={settings[key]}" for key in ("val", "source") if settings[key]]
    args = training.parse_args([*flags, "--device", settings["device"]])
    args.image_size, args.no_flip = settings["image_size"], settings["no_flip"]
    args.crop_scale, args.batch_size = settings["crop_scale"], settings["batch_size"]
    args.arch, args.weights, args.workers = (settings[k] for k in ("arch", "weights", "workers"))
    args.power = settings["power"]
    data = training.load_split(args, 0, [])
    return training.Given(
        args=args,
        data=data,
        baseline=training.load_baseline(run, data),
        origin="",
        compute=training.pick_compute(args.device, settings["amp"]),
    )


def new_model(given: training.Given) -> nn.Module:
    """The network of a run with a new head."""
    state, _ = training.load_weights(given.args)
    named = ["another head"]
    model, _ = training.build_model(given.args.arch, given.data.classes, state, named)
    torch.nn.init.normal_(model.fc.weight, 0, 0.01)
    device = given.compute.device
    return model.to(device, memory_format=training.memory_format(device))


def usual_loop(chosen: Namespace) -> tuple[nn.Module, float, float]:
    """The network that the usual loop trains, the seconds it takes, and those of evaluations.

    It is evaluated after each epoch, as the script is, on images that are read once.
    """
    given = load_run(chosen.run)
    args, data, compute = given.args, given.data, given.compute
    started = time.perf_counter()
    torch.manual_seed(chosen.seed)
    model, reader, evaluating = new_model(given), training.Reader(given), 0.0
    scaler = torch.amp.GradScaler(enabled=compute.amp is torch.float16)
    optimizer = torch.optim.AdamW(model.parameters(), chosen.lr, fused=True)
    steps = chosen.epochs * -(-len(data.train) // args.batch_size)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    weights = training.sample_weights(data.labels[data.train], args.power)
    for epoch in range(1, chosen.epochs + 1):
        model.train()
        drawn = data.train[list(WeightedRandomSampler(weights.tolist(), len(weights)))]
        stream = training.seeded("usual", chosen.seed, epoch)
        batches = training.cut_batches(drawn, args.batch_size, stream)
        for inputs, targets in reader.read(batches, f"epoch {epoch}"):
            with compute.autocast():
                logits = model(training.to_input(inputs, compute.device))
            loss = F.cross_entropy(logits.float(), targets.to(compute.device))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            cosine.step()
        trained = time.perf_counter()
        training.evaluate(given, model, reader, data.val)
        evaluating += time.perf_counter() - trained
    return model, time.perf_counter() - started - evaluating, evaluating


def timm_loop(chosen: Namespace) -> tuple[nn.Module, float, float]:
    """The network that timm's `train.py` trains, and the seconds it takes, evaluations included."""
    given = load_run(chosen.run)
    args, data, compute = given.args, given.data, given.compute
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, places in (("train", data.train), ("validation", data.val)):
            for at in places.tolist():
                # timm orders folders by another rule, and reads these kinds of files alone.
                image, place = Path(data.paths[at]), folder / part / f"{data.labels[at]:05}"
                place.mkdir(parents=True, exist_ok=True)
                if image.suffix.lower() in (".jpg", ".jpeg", ".png"):
                    (place / f"{at}{image.suffix}").symlink_to(image.resolve())
                else:
                    read = training.read_image(str(image))
                    to_pil_image(read).save(place / f"{at}.png")
        start, _ = training.load_weights(args)
        torch.save(start, folder / "start.pth")
        command = [
            *(sys.executable, "train.py", "--data-dir", name, "--output", name),
            *("--experiment", "run", "--model", args.arch),
            *(["--pretrained", "--pretrained-path", f"{name}/start.pth"] if start else []),
            *("--num-classes", str(len(data.classes)), "--img-size", str(args.image_size)),
            *("--opt", "adamw", "--lr", str(chosen.lr), "--weight-decay", "0.01"),
            *("--epochs", str(chosen.epochs), "--warmup-epochs", "0", "--sched-on-updates"),
            *("--batch-size", str(args.batch_size), "--hflip", "0" if args.no_flip else "0.5"),
            *("--workers", str(max(1, args.workers)), "--seed", str(chosen.seed)),
            *("--device", args.device, "--channels-last"),
            *(["--amp", "--amp-dtype", str(compute.amp).split(".")[1]] if compute.amp else []),
        ]
        started = time.perf_counter()
        timm = {**os.environ, "PYTHONPATH": str(chosen.timm.resolve())}
        subprocess.run(command, cwd=chosen.timm, env=timm, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        stored = torch.load(folder / "run" / "last.pth.tar", "cpu", weights_only=False)
    model = new_model(given)
    model.load_state_dict(stored["state_dict"])
    return model, seconds, 0.0


def judge(
    chosen: Namespace, name: str, model: nn.Module, training_seconds: float, evaluating: float
) -> str:
    """What there is to say of `model` on the validation images of the run, in a line."""
    given = load_run(chosen.run)
    data, compute = given.data, given.compute
    reader, batches = training.Reader(given), training.cut_batches(data.val, given.args.batch_size)
    logits, targets = training.predict(model, reader.read(batches, "judging"), compute)
    last = training.assess(logits, targets, data.log_share(), True)
    measures = training.measure_all(last, data.counts(data.train))
    change = training.compare(last.targets, last.predicted, given.baseline, data.counts(data.train))
    after, *difference = (100 * change[key][1] for key in ("after", "difference", "low", "high"))
    with open(chosen.run / "history.csv", newline="") as file:
        ours = sum(float(row["seconds"]) for row in csv.DictReader(file))
    return (
        f"{name}, AdamW {chosen.lr:g}, {chosen.epochs} epochs: balanced accuracy "
        f"{measures['as_trained_balanced_accuracy']:.1%} as trained, "
        f"{measures['balanced_accuracy']:.1%} ± {100 * measures['half_width']:.1f} calibrated, in "
        f"{training_seconds + evaluating:.0f} s, {evaluating:.0f} of them evaluations; "
        f"{chosen.run}: {after:.1f}% in {ours:.0f} s, "
        f"{difference[0]:+.1f} [{difference[1]:.1f}, {difference[2]:.1f}]"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder to compare with")
    parser.add_argument("--lr", metavar="X", type=float, default=3e-4, help="of AdamW, at its peak")
    parser.add_argument("--epochs", metavar="N", type=int, default=3, help="over all images")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of draws and head")
    parser.add_argument("--timm", metavar="FOLDER", type=Path, help="clone of timm, to run instead")
    chosen = parser.parse_args()
    if chosen.timm:
        print(judge(chosen, "timm's train.py", *timm_loop(chosen)))
    else:
        print(judge(chosen, "usual loop", *usual_loop(chosen)))
