"""A protocol anyone can run: rare classes as people have them, judged by images nobody touched.

    python tests/protocol.py FOLDER ... --rare 20 --epochs 3 --seeds 5 --csv results.csv
    python tests/protocol.py FOLDER --ways default folds loop-1e-4 "default --power 0.5"
    python tests/protocol.py --csv results.csv                # the table of all that is there

Each FOLDER of class folders becomes staircases: one class has up to `--most` images, the rarest
`--rare` in all, the others geometrically between; each rotation gives the ranks to other classes.
Up to 200 other images of each class are the test: no run fits or chooses anything by it. Each
seed is another default split of the staircase, and another training, in each of these ways:

    default        `data_training.py` as it is; with more flags, if the way has some
    none           the same with `--power 0`: each image once an epoch
    folds          the same with `--folds K`, an ensemble
    loop, loop-X   what people write: a new head, every layer trained from the first step by AdamW
                   at 3e-4, or X, along a cosine, the end kept; sampler and images as in the script
    loop-none      that loop without the sampler: each image once an epoch
    weighted-loss  the same, where an image's loss weighs 1 / images of its class

The table has means of sets, each the mean of its rotations and seeds, in % or points. Calibrated:
by two numbers fitted on the run's own validation images; by the test: fitted on the test itself,
what there is to gain. Rarest, most frequent, gap (rarest minus most frequent) and error (of
calibration) are those of calibrated networks; `none` and `loop-none` have a row as trained and a
calibrated one of the same network. Differences to `default` are paired: same set, rotation, seed.
Intervals (95 %, Student's t) are over the means of sets: how far off the mean can be for other
sets like these. Images of one patient may stand on both sides of the test.
"""

import argparse
import contextlib
import csv
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import models

sys.path.insert(0, str(Path(__file__).parents[1]))

import data_training as training  # noqa: E402

TEST, LEAST = 200, 50  # images of a class to test: most and fewest
SCRIPT = ("default", "none", "folds")
LOOPS = ("loop", "loop-1e-4", "loop-none", "weighted-loss")
PLAIN = training.Calibration()
KEY = ("set", "rotation", "seed", "rare", "most", "epochs", "image_size", "weights", "flags", "way")
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # 97.5 %
DONE = "{set}, {rotation}, {seed}, {way}: {trained:.1f}, {calibrated:.1f}, {seconds:.0f} s"
BINS = 15  # of probabilities
Row = dict[str, Any]


class Answer(NamedTuple):
    """What a way says of the test."""

    logits: Tensor  # as trained: (M, C)
    log_share: Tensor  # of each class in training: (C,)
    calibration: training.Calibration  # fitted on the run's own validation images


class Prepared(NamedTuple):
    """A staircase as a run of the script reads and splits it."""

    settings: training.Settings
    data: training.Data
    reader: training.Reader

    def ask(self, network: Any) -> Tensor:
        """The logits of the images that judge."""
        network = self.reader.compute.place(network)
        return training.evaluate(network, self.reader, self.data.judges(0))


class Stairs(NamedTuple):
    """A staircase, and the images that its networks are tested on."""

    chosen: argparse.Namespace
    work: Path  # with the folders stairs and test
    test: Prepared
    ends: list[int]  # the rarest and the most frequent class


def count_stairs(sizes: list[int], rare: int, most: int) -> list[int]:
    """Images of classes of these sizes, most frequent to rarest, those that validate among them."""
    most = min(most, sizes[0] - LEAST)
    if most < rare or min(sizes) < rare + LEAST:
        sys.exit(f"protocol.py: error: classes of {min(sizes)} images; take --rare, or other sets")
    stairs = [round(most * (rare / most) ** (at / (len(sizes) - 1))) for at in range(len(sizes))]
    return [min(count, size - LEAST) for count, size in zip(stairs, sizes, strict=True)]


def make_stairs(source: Path, rotation: int, chosen: argparse.Namespace, work: Path) -> Stairs:
    """The staircase of a set in which the class at the place `rotation` is the most frequent."""
    classes, rows = training.list_data(source, None, None)
    images = [sorted(row.path for row in rows if row.label == at) for at in range(len(classes))]
    order = [*range(rotation, len(classes)), *range(rotation)]
    counts = count_stairs([len(images[label]) for label in order], chosen.rare, chosen.most)
    for label, count in zip(order, counts, strict=True):
        paths = images[label]
        random.Random(classes[label]).shuffle(paths)
        test = paths[max(count, len(paths) - TEST) :]
        for part, its in (("stairs", paths[:count]), ("test", test)):
            folder = work / part / classes[label]
            folder.mkdir(parents=True)
            for at, path in enumerate(its):
                link = folder / f"{at:05}_{Path(path).name}"
                (shutil.copyfile if os.name == "nt" else os.symlink)(os.path.abspath(path), link)
    test = prepare(chosen, work, ["--val", str(work / "test")])
    return Stairs(chosen, work, test, ends=[order[-1], order[0]])


def command_of(chosen: argparse.Namespace, work: Path, flags: list[str]) -> list[str]:
    """The command line of the script; of flags given twice the last one counts."""
    command = [str(work / "stairs"), "--output", str(work / "run"), "--weights", chosen.weights]
    command += ["--epochs", str(chosen.epochs), "--image-size", str(chosen.image_size)]
    return [*command, *chosen.flags.split(), *flags]


def prepare(chosen: argparse.Namespace, work: Path, flags: list[str]) -> Prepared:
    """What the script makes of a command line: settings, split and reader."""
    args = training.parse_args(command_of(chosen, work, flags))
    compute = training.pick_compute(args.device, args.amp)
    settings, listing, stored = training.open_run(args, compute)
    data = training.load_data(settings, listing, stored)
    size = settings.image_size
    images = training.Images(data.paths, data.labels, data.white, size, settings.flip)
    # Copies are named by places in the table, which is the same for all seeds.
    images.keep_copies(work / ("copies with test" if settings.val else "copies"))
    reader = training.Reader(images, compute, settings.workers, settings.batch_size)
    return Prepared(settings, data, reader)


def run_script(stairs: Stairs, way: str, seed: int) -> Answer:
    """What a run of the script says of the test."""
    chosen, run = stairs.chosen, stairs.work / "run"
    name, *flags = way.split()
    flags += ["--seed", str(seed)]
    flags += ["--power", "0"] * (name == "none")
    flags += ["--folds", str(chosen.folds)] * (name == "folds")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        if status := training.main(command_of(chosen, stairs.work, flags)):
            sys.exit(status)
    content = training.read_weights(str(run))
    result = json.loads((run / "config.json").read_text())["result"]
    shutil.rmtree(run)
    scale, shift = result["logit_scale"], result["logit_shift"]
    log_share = content["natural"]
    for state in content["networks"]:  # whose heads are calibrated
        state["fc.weight"] /= scale
        state["fc.bias"] = (state["fc.bias"] + shift * log_share) / scale
    ensemble = training.build_ensemble(content["arch"], content["classes"], content["networks"])
    return Answer(stairs.test.ask(ensemble), log_share, training.Calibration(scale, shift))


def load_plain(settings: training.Settings, classes: list[str]) -> models.ResNet:
    """The network of `--weights` as it is, with a new head."""
    torch.manual_seed(settings.seed)
    if stored := training.read_weights(settings.weights):
        state = stored["networks"][0]
    else:
        name = None if settings.weights == "none" else settings.weights
        state = models.get_model(settings.arch, weights=name).state_dict()
    model = training.build_model(settings.arch, classes, state, None)
    model.fc.reset_parameters()  # at random
    return model


def train_loop(prepared: Prepared, rate: float, is_weighted: bool) -> models.ResNet:
    """The network that the loop trains on the images that learn."""
    settings, data, reader = prepared
    compute, learnt = reader.compute, data.learns(0)
    weights = data.counts(learnt).float().reciprocal().to(compute.device) if is_weighted else None
    model = compute.place(load_plain(settings, data.classes)).train()
    is_float16 = compute.precision == "float16"
    scaler = torch.amp.GradScaler(compute.device.type, enabled=is_float16)
    optimizer = torch.optim.AdamW(model.parameters(), rate, fused=True)
    steps = settings.epochs * math.ceil(len(learnt) / settings.batch_size)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(settings.epochs):
        stream = training.seeded("loop", settings.seed, epoch)
        drawn = training.draw_epoch(data.labels, learnt, settings.power, 1, stream)
        batches = training.cut_batches(drawn, settings.batch_size, stream)
        for images, targets in reader.read(batches, "loop"):
            with compute.autocast():
                logits = model(training.to_device(images, compute))
            targets = training.to_device(targets, compute)
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(logits.float(), targets, weights)).backward()
            scaler.step(optimizer)
            scaler.update()
            cosine.step()
    return model


def run_loop(stairs: Stairs, way: str, seed: int) -> Answer:
    """What the loop says of the test."""
    is_weighted = way == "weighted-loss"
    flags = ["--seed", str(seed)]
    flags += ["--power", "0"] * (is_weighted or way == "loop-none")
    prepared = prepare(stairs.chosen, stairs.work, flags)
    rate = 3e-4 if way in LOOPS and way != "loop-1e-4" else float(way.removeprefix("loop-"))
    network = train_loop(prepared, rate, is_weighted)
    # A weighted loss leaves in the logits what the sampler does.
    power = 1.0 if is_weighted else prepared.settings.power
    exam = training.make_exam(prepared.data, [0], power)
    fitted = training.fit_calibration(prepared.ask(network), exam.targets, exam)
    return Answer(stairs.test.ask(network), exam.log_share, fitted)


def calibration_error(judged: training.Evaluation) -> float:
    """The gap between probability and being right (Guo et al. 2017); each class counts the same."""
    targets, probability = judged.exam.targets, judged.probability.double()
    gaps = probability - (judged.predicted == targets).double()
    bins = (probability * BINS).long().clamp(max=BINS - 1)
    weighted = training.class_weights(targets) * gaps
    return torch.bincount(bins, weighted, BINS).abs().sum().item()


def measure(stairs: Stairs, answer: Answer) -> dict[str, float]:
    """The measures of an answer on the test, in %: as trained, calibrated, calibrated on it."""
    logits, log_share, own = answer
    exam = training.make_exam(stairs.test.data, [0], 1.0)._replace(log_share=log_share)
    best = training.fit_calibration(logits, exam.targets, exam)
    found: dict[str, float] = {}
    for name, fitted in {"trained": PLAIN, "calibrated": own, "by_test": best}.items():
        judged = training.assess(logits, fitted, exam)
        recall = 100 * training.recall_by_class(judged.confusion)
        rarest, frequent = recall[stairs.ends].tolist()
        found |= {name: recall.mean().item(), f"{name}_error": 100 * calibration_error(judged)}
        ends = {"rarest": rarest, "frequent": frequent, "gap": rarest - frequent}
        found |= {f"{name}_{end}": value for end, value in ends.items()}
    return found | own._asdict()


def mean_of_sets(pairs: Iterable[tuple[Row, float]]) -> str:
    """The mean over sets, and an interval if there are two sets."""
    sets = defaultdict(list)
    for row, value in pairs:
        sets[row["set"]].append(value)
    means = [*map(mean, sets.values())]
    if not means:
        return ""
    middle, df, z = mean(means), len(means) - 1, training.Z
    if not df:
        return f"{middle:+.1f}"
    t = STUDENT[df - 1] if df <= len(STUDENT) else z + (z**3 + z) / (4 * df)  # the series' start
    half = t * stdev(means) / math.sqrt(df + 1)
    return f"{middle:+.1f} [{middle - half:+.1f}, {middle + half:+.1f}]"


def compare(rows: list[Row], default: dict[tuple[str, ...], Row], name: str) -> str:
    """The mean difference to the default, and its interval."""
    pairs = []
    for row in rows:
        if (other := default.get(tuple(row[key] for key in KEY[:-1]))) and other is not row:
            pairs.append((row, float(row[name]) - float(other[name])))
    return mean_of_sets(pairs)


def make_table(rows: list[Row]) -> str:
    """The Markdown table of all results, a line for each way."""
    default = {tuple(r[key] for key in KEY[:-1]): r for r in rows if r["way"] == "default"}
    head = "way, results, as trained, calibrated, by the test, rarest, most frequent, error, s, gap"
    head += " [95 %], as trained minus default [95 %], calibrated minus default"
    columns = "trained calibrated by_test calibrated_rarest calibrated_frequent calibrated_error"
    columns += " seconds"
    lines = [head.split(", "), ["---"] * len(head.split(", "))]
    for way in dict.fromkeys(row["way"] for row in rows):
        its = [row for row in rows if row["way"] == way]
        cells = [mean_of_sets((row, float(row[name])) for row in its) for name in columns.split()]
        cells = [way, str(len(its)), *(cell.split()[0].lstrip("+") for cell in cells)]
        cells.append(mean_of_sets((row, float(row["calibrated_gap"])) for row in its))
        lines.append([*cells, *(compare(its, default, name) for name in ("trained", "calibrated"))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(chosen: Any, source: Path, rotation: int, there: dict[Any, Row]) -> list[Row]:
    """The results of a staircase: those that are `there`, and the others, made now."""
    asked, stairs = [], None
    with tempfile.TemporaryDirectory() as name:
        for seed, way in ((seed, way) for seed in range(chosen.seeds) for way in chosen.ways):
            title = way + f" ({chosen.folds})" * (way.split()[0] == "folds")
            values = [source.resolve().name, rotation, seed, chosen.rare, chosen.most]
            values += [chosen.epochs, chosen.image_size, Path(chosen.weights).name, chosen.flags]
            key = dict(zip(KEY[:-1], map(str, values), strict=True))
            known = [(*key.values(), each) for each in (title, f"{title}, calibrated")]
            if known[0] not in there:
                stairs = stairs or make_stairs(source, rotation, chosen, Path(name))
                started = time.perf_counter()
                make = run_script if way.split()[0] in SCRIPT else run_loop
                answers = [make(stairs, way, seed)]
                if way in ("none", "loop-none"):
                    answers.insert(0, answers[0]._replace(calibration=PLAIN))
                seconds = {"seconds": time.perf_counter() - started}
                for at, answer in zip(known, answers, strict=False):
                    there[at] = row = key | {"way": at[-1]} | measure(stairs, answer) | seconds
                    print(DONE.format(**row), file=sys.stderr, flush=True)
                with open(chosen.csv, "a", newline="") as file:
                    writer = csv.DictWriter(file, row)
                    _ = file.tell() or writer.writeheader()
                    writer.writerows(there[at] for at in known if at in there)
            asked += [there[each] for each in known if each in there]
    return asked


def main(argv: list[str] | None = None) -> None:
    """Make all results that are asked for, and print the table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("folders", metavar="FOLDER", type=Path, nargs="*", help="of class folders; none: the CSV's")
    add("--weights", metavar="NAME|PATH", default="DEFAULT", help="as of the script")
    add("--flags", metavar="TEXT", default="", help="of the script in all ways: --flags=--no-amp")
    add("--csv", metavar="FILE", type=Path, default=os.devnull, help="all results, to go on from")
    add("--ways", metavar="WAY", nargs="+", default=[*SCRIPT, *LOOPS], help="names as above")
    add("--rare", type=int, default=20, help="images of the rarest class, validating ones included")
    add("--most", type=int, default=600, help="images of the most frequent class, at most")
    add("--epochs", type=int, default=10, help="as of the script")
    add("--image-size", type=int, default=64, help="as of the script")
    add("--seeds", type=int, default=5, help="trainings of each way on each staircase")
    add("--rotations", type=int, default=2, help="staircases of each folder")
    add("--folds", type=int, default=5, help="networks of the way `folds`")
    chosen = parser.parse_args(argv)
    if any("--image-size" in way for way in chosen.ways):
        parser.error("--ways: the test is read as in all ways; pass --image-size, or --flags")
    lines = chosen.csv.read_text().splitlines() if chosen.csv.exists() else []
    there, asked = {tuple(row[key] for key in KEY): row for row in csv.DictReader(lines)}, []
    for source in chosen.folders:
        count = len(training.list_folders(source))
        for first in sorted({r * count // chosen.rotations for r in range(chosen.rotations)}):
            asked += fill(chosen, source, first, there)
    print(make_table(asked if chosen.folders else [*there.values()]))


if __name__ == "__main__":
    training.WRITE_EVERY, os.fsync = math.inf, lambda _: None  # no run's files are kept
    main()
