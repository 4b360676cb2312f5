"""A protocol anyone can run: rare classes as people have them, tested on images nobody touched.

    python tests/experiments/protocol.py FOLDER ... --rare 20 --epochs 3 --seeds 5 --csv results.csv
    python tests/experiments/protocol.py FOLDER --ways default loop-1e-4 "default --folds 5"
    python tests/experiments/protocol.py --csv results.csv    # the table of all that is there

Each FOLDER of class folders becomes staircases: one class has up to `--most` images, the rarest
`--rare` in all, the others geometrically between; each rotation gives the ranks to other classes.
Up to 200 other images of each class are the test: no run fits or chooses anything by it. Each
seed is another default split of the staircase, and another training, in each of these ways:

    default        `data_training.py` as it is; with more flags, if the way has some
    none           the same with `--power 0`: each image once an epoch
    loop, loop-X   what people write: a new head, every layer trained from the first step by AdamW
                   at 3e-4, or X, along a cosine, the end kept; sampler and images as in the script
    loop-none      that loop without the sampler: each image once an epoch
    fastai         the defaults of another library, which must be installed for this way alone:
                   `vision_learner(...).fine_tune(epochs)`, images as in its own examples

The table has means of sets, each the mean of its rotations and seeds, in % or points. Calibrated:
by two numbers fitted on the run's own validation images; `none`, `loop-none` and `fastai` have a
row as trained, too. Rarest and frequent are the recalls of the rarest and the most frequent class;
natural (in the CSV alone) is the accuracy where classes are as frequent as in training.
Differences to `default` are paired: same set, rotation, seed. Intervals (95 %, Student's t) are
over the means of sets. Images of one patient may stand on both sides of the test.
"""

import argparse
import contextlib
import itertools
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import models

sys.path.insert(0, str(Path(__file__).parents[2]))

import data_training as training  # noqa: E402

TEST, LEAST = 200, 50  # images of a class to test: most and fewest
SCRIPT = ("default", "none")
LOOPS = ("loop", "loop-none")
UNCORRECTED = ("none", "loop-none", "fastai")  # also shown as trained
PLAIN = training.Calibration()
KEY = ("set", "rotation", "seed", "rare", "most", "epochs", "image_size", "weights", "flags", "way")
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # 2 to 11 sets
SHOWN = ("trained", "calibrated", "calibrated_rarest", "calibrated_frequent")
COMPARED = ("trained", "calibrated", "calibrated_rarest")
HEAD = ["way", "results", "as trained", "calibrated", "its rarest class", "its most frequent class"]
HEAD += ["`default` minus it, as trained", "calibrated", "its rarest class"]
DONE = "{set}, {rotation}, {seed}, {way}: {trained:.1f}, {calibrated:.1f}, {seconds:.0f} s"
Key = tuple[str, ...]  # the values of `KEY`
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
        """The logits of the images that networks are evaluated on."""
        network = self.reader.compute.to_device(network)
        indices = self.data.eval_mask[0].nonzero().flatten()
        return training.compute_logits(network, self.reader, indices)


class Stairs(NamedTuple):
    """A staircase, and the images that its networks are tested on."""

    chosen: argparse.Namespace  # on the command line
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
    classes, files = training.list_data(source, None, None)
    images = [sorted(file.path for file in files if file.label == at) for at in range(len(classes))]
    order = [*range(rotation, len(classes)), *range(rotation)]
    counts = count_stairs([len(images[label]) for label in order], chosen.rare, chosen.most)
    for label, count in zip(order, counts, strict=True):
        paths = images[label]
        random.Random(classes[label]).shuffle(paths)
        others = paths[max(count, len(paths) - TEST) :]
        for part, its in (("stairs", paths[:count]), ("test", others)):
            folder = work / part / classes[label]
            folder.mkdir(parents=True)
            for at, path in enumerate(its):
                shutil.copyfile(path, folder / f"{at:05}_{Path(path).name}")
    test = prepare(chosen, work, ["--val", str(work / "test")])
    return Stairs(chosen, work, test, ends=[order[-1], order[0]])


def command_of(chosen: argparse.Namespace, work: Path, flags: list[str]) -> list[str]:
    """The command line of the script; of flags given twice the last one counts."""
    command = [str(work / "stairs"), "--output", str(work / "run"), "--weights", chosen.weights]
    command += ["--epochs", str(chosen.epochs), "--image-size", str(chosen.image_size)]
    return [*command, *chosen.flags.split(), *flags]


def prepare(chosen: argparse.Namespace, work: Path, flags: list[str]) -> Prepared:
    """What the script makes of a command line: settings, split and reader."""
    chosen_settings, options = training.parse_args(command_of(chosen, work, flags))
    compute = training.pick_compute(options)
    opened = training.open_run(chosen_settings, options, compute)
    data = training.load_data(opened.settings, opened.listing)
    settings = opened.settings
    # Copies are named by indices of `Data`, which is the same for all seeds.
    settings = replace(settings, output=work / ("copies with test" if settings.val else "copies"))
    settings.output.mkdir(exist_ok=True)
    return Prepared(settings, data, training.make_reader(settings, options, data, compute))


def run_script(stairs: Stairs, way: str, seed: int) -> Answer:
    """What a run of the script says of the test."""
    chosen, run = stairs.chosen, stairs.work / "run"
    name, *flags = way.split()
    flags += ["--seed", str(seed), *["--power", "0"] * (name == "none")]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        if status := training.main(command_of(chosen, stairs.work, flags)):
            sys.exit(status)
    content = training.read_run(run)
    shutil.rmtree(run)
    fitted = training.Calibration(content["scale"], content["shift"])
    networks = [
        training.build_model(content["arch"], content["classes"], state)
        for state in content["networks"]
    ]
    ensemble = training.Ensemble(networks, PLAIN, content["natural"])
    return Answer(stairs.test.ask(ensemble), content["natural"], fitted)


def load_plain(settings: training.Settings, classes: list[str]) -> models.ResNet:
    """The network of `--weights` as it is, with a new head, at random."""
    torch.manual_seed(settings.seed)
    model = training.build_model(settings.arch, classes)
    if settings.weights == "none":
        return model
    [state] = training.read_weights(settings.weights).get("networks") or [
        training.fetch_weights(settings.arch, settings.weights)
    ]
    body = {key: value for key, value in state.items() if not key.startswith("fc.")}
    model.load_state_dict(body, strict=False)
    return model


def train_loop(prepared: Prepared, rate: float) -> models.ResNet:
    """The network that the loop trains on the images that learn."""
    settings, data, reader = prepared
    compute, learnt = reader.compute, data.train_indices(0)
    model = compute.to_device(load_plain(settings, data.classes)).train()
    optimizer = torch.optim.AdamW(model.parameters(), rate, fused=True)
    steps = settings.epochs * math.ceil(len(learnt) / settings.batch_size)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(settings.epochs):
        stream = training.seeded("loop", settings.seed, epoch)
        drawn = training.draw_epoch(data.labels, learnt, settings.power, stream)
        batches = training.cut_batches(drawn, settings.batch_size, stream)
        for [group] in reader.read(batches, "loop"):
            with compute.autocast():
                logits = model(training.move_batch(group.images, compute))
            targets = training.move_batch(group.labels, compute)
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), targets).backward()
            optimizer.step()
            cosine.step()
    return model


def train_fastai(prepared: Prepared, paths: list[str]) -> tuple[Tensor, Tensor]:
    """Train as fastai's examples do; return the logits of its validation images and of `paths`.

    https://docs.fast.ai/tutorial.vision.html: `Resize` to about twice the size of a crop,
    `aug_transforms` with `min_scale=0.75`, batches of 64, one epoch of the new layers alone before
    the others. Only the device's mixed precision and memory format are those of the script.
    """
    from fastai.vision.all import ImageDataLoaders, Resize, aug_transforms, noop, set_seed
    from fastai.vision.learner import model_meta, vision_learner

    settings, data, reader = prepared
    compute, validating = reader.compute, training.make_eval_set(data, [0]).indices
    indices = torch.cat([data.train_indices(0), validating]).tolist()
    set_seed(settings.seed)

    def load_arch(weights: object) -> models.ResNet:
        return load_plain(settings, data.classes)

    arch = models.resnet18 if settings.arch == "resnet18" else models.resnet50
    model_meta[load_arch] = model_meta[arch]
    split = len(data.train_indices(0))
    loaders = ImageDataLoaders.from_lists(
        "/",
        [data.files[index].path for index in indices],
        [data.classes[data.labels[index]] for index in indices],
        item_tfms=Resize(2 * settings.image_size),
        batch_tfms=aug_transforms(size=settings.image_size, min_scale=0.75),
        splitter=lambda items: (range(split), range(split, len(items))),
        num_workers=0,
        device=compute.device,
    )
    assert [*loaders.vocab] == data.classes
    learner = vision_learner(loaders, load_arch)
    model = compute.to_device(learner.model)
    forward = compute.autocast()(model.forward)  # fastai's own mixed precision is for CUDA alone
    model.forward = lambda images: forward(images).float()
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(settings.epochs)
        lists = ([data.files[index].path for index in validating.tolist()], paths)
        own, others = (
            learner.get_preds(dl=loaders.test_dl(each), act=noop)[0].float() for each in lists
        )
    return own, others


def run_fastai(stairs: Stairs, way: str, seed: int) -> Answer:
    """What fastai's defaults say of the test."""
    prepared = prepare(stairs.chosen, stairs.work, ["--seed", str(seed), "--power", "0"])
    asked = stairs.test.data.eval_mask[0].nonzero().flatten().tolist()
    paths = [stairs.test.data.files[index].path for index in asked]
    own, logits = train_fastai(prepared, paths)
    return fit_answer(prepared, own, logits)


def fit_answer(prepared: Prepared, own: Tensor, logits: Tensor) -> Answer:
    """An answer calibrated by the logits of the `own` validation images."""
    eval_set = training.make_eval_set(prepared.data, [0])
    shares = training.class_shares(prepared.data, eval_set, prepared.settings.power)
    fitted = training.fit_calibration(
        own, eval_set.targets, shares.log_share, shares.expected_shift
    )
    return Answer(logits, shares.log_share[0], fitted)


def run_loop(stairs: Stairs, way: str, seed: int) -> Answer:
    """What the loop says of the test."""
    flags = ["--seed", str(seed), *["--power", "0"] * (way == "loop-none")]
    prepared = prepare(stairs.chosen, stairs.work, flags)
    network = train_loop(prepared, 3e-4 if way in LOOPS else float(way.removeprefix("loop-")))
    return fit_answer(prepared, prepared.ask(network), stairs.test.ask(network))


def measure(stairs: Stairs, answer: Answer) -> dict[str, float]:
    """The measures of an answer on the test, in %, as trained and calibrated."""
    logits, log_share, own = answer
    eval_set = training.make_eval_set(stairs.test.data, [0])
    shares = training.ClassShares(
        train_counts=stairs.test.data.fold_counts()[0].double(),
        log_share=log_share.expand(len(logits), -1),
        expected_shift=1.0,
    )
    found: dict[str, float] = {}
    for name, fitted in {"trained": PLAIN, "calibrated": own}.items():
        confusion = training.evaluate(logits, fitted, eval_set, shares).confusion
        recall = 100 * training.recall_by_class(confusion)
        rarest, frequent = recall[stairs.ends].tolist()
        found[name] = recall.mean().item()
        found |= {f"{name}_rarest": rarest, f"{name}_frequent": frequent}
    natural_logits = logits if own == PLAIN else own.apply(logits, log_share) + log_share
    confusion = training.evaluate(natural_logits, PLAIN, eval_set, shares).confusion
    natural = log_share.double().softmax(0) @ training.recall_by_class(confusion)
    return found | {"natural": 100 * natural.item()} | own._asdict()


def mean_of_sets(pairs: Iterable[tuple[Row, float]]) -> str:
    """The mean over sets, and an interval if there are two sets."""
    sets = defaultdict(list)
    for row, value in pairs:
        sets[row["set"]].append(value)
    means = [*map(mean, sets.values())]
    if not means:
        return ""
    middle = mean(means)
    if len(means) == 1:
        return f"{middle:+.1f}"
    t = STUDENT[min(len(means) - 1, len(STUDENT)) - 1]  # of more sets: somewhat too wide
    half = t * stdev(means) / math.sqrt(len(means))
    return f"{middle:+.1f} [{middle - half:+.1f}, {middle + half:+.1f}]"


def make_table(results: dict[Key, Row]) -> str:
    """The Markdown table of these results, a line for each way."""
    lines = [HEAD, ["---"] * len(HEAD)]
    for way in dict.fromkeys(key[-1] for key in results):
        its = {key: row for key, row in results.items() if key[-1] == way}
        cells = [way, str(len(its))]
        for name in SHOWN:
            middle = mean_of_sets((row, float(row[name])) for row in its.values())
            cells.append(middle.split()[0].lstrip("+"))
        pairs = [(row, results.get((*key[:-1], "default"), row)) for key, row in its.items()]
        for name in COMPARED:
            changes = [(a, float(b[name]) - float(a[name])) for a, b in pairs if a is not b]
            cells.append(mean_of_sets(changes))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(chosen: Any, source: Path, rotation: int, there: dict[Key, Row]) -> dict[Key, Row]:
    """The results of a staircase: those that are `there`, and the others, made now."""
    asked: dict[Key, Row] = {}
    stairs: Stairs | None = None
    with tempfile.TemporaryDirectory() as name:
        for seed, way in itertools.product(range(chosen.seeds), chosen.ways):
            values = [source.resolve().name, rotation, seed, chosen.rare, chosen.most]
            values += [chosen.epochs, chosen.image_size, Path(chosen.weights).name, chosen.flags]
            keys: list[Key] = [(*map(str, values), each) for each in (way, f"{way}, calibrated")]
            if keys[0] not in there:
                stairs = stairs or make_stairs(source, rotation, chosen, Path(name))
                started = time.perf_counter()
                make = run_script if way.split()[0] in SCRIPT else run_loop
                make = run_fastai if way == "fastai" else make
                answers = [make(stairs, way, seed)]
                if way in UNCORRECTED:
                    answers.insert(0, answers[0]._replace(calibration=PLAIN))
                seconds = {"seconds": time.perf_counter() - started}
                for key, answer in zip(keys, answers, strict=False):
                    named = dict(zip(KEY, key, strict=True))
                    there[key] = named | measure(stairs, answer) | seconds
                    print(DONE.format(**there[key]), file=sys.stderr, flush=True)
                if chosen.csv:
                    training.write_file(chosen.csv, training.format_table([*there.values()]))
            asked |= {key: there[key] for key in keys if key in there}
    return asked


def main(argv: list[str] | None = None) -> None:
    """Make all results that are asked for, and print the table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("folders", metavar="FOLDER", type=Path, nargs="*", help="of class folders; none: the CSV's")
    add("--weights", metavar="NAME|PATH", default="DEFAULT", help="as of the script")
    add("--flags", metavar="TEXT", default="", help="of the script in all ways: --flags=--no-amp")
    add("--csv", metavar="FILE", type=Path, help="all results; those there are not made again")
    add("--ways", metavar="WAY", nargs="+", default=[*SCRIPT, *LOOPS], help="names as above")
    add("--rare", type=int, default=20, help="images of the rarest class, validating ones included")
    add("--most", type=int, default=600, help="images of the most frequent class, at most")
    add("--epochs", type=int, default=10, help="as of the script")
    add("--image-size", type=int, default=64, help="as of the script")
    add("--seeds", type=int, default=5, help="trainings of each way on each staircase")
    add("--rotations", type=int, default=2, help="staircases of each folder")
    chosen = parser.parse_args(argv)
    rows = training.read_table(chosen.csv) if chosen.csv and chosen.csv.exists() else []
    there = {tuple(row[name] for name in KEY): row for row in rows}
    asked: dict[Key, Row] = {}
    for source in chosen.folders:
        count = len(training.list_folders(source))
        for first in sorted({r * count // chosen.rotations for r in range(chosen.rotations)}):
            asked |= fill(chosen, source, first, there)
    print(make_table(asked if chosen.folders else there))


if __name__ == "__main__":
    training.WRITE_EVERY, os.fsync = math.inf, lambda fd: None  # no run's files are kept
    main()
