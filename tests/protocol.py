"""A protocol anyone can run: rare classes as people have them, judged by images nobody touched.

    python tests/protocol.py FOLDER ... --rare 20 --epochs 3 --seeds 5 --csv results.csv
    python tests/protocol.py FOLDER --ways default folds loop-1e-4 "default --lr 1e-4"
    python tests/protocol.py --csv results.csv                # the table of all that is there

Each FOLDER of class folders becomes staircases: one class has up to `--most` images, the rarest
`--rare` in all, the others geometrically between; each rotation gives the ranks to other classes.
Up to 200 other images of each class are the test: no run fits or chooses anything by it. Each
seed is another default split of the staircase, and another training, in each of these ways:

    default        `data_training.py` as it is; with more flags, if the way has some
    none           without balancing; calibrated in a row of its own, the same network
    folds          `--folds K`, whose networks vote
    loop, loop-X   what people write: a new head, every layer trained from the first step by AdamW
                   at 3e-4, or X, along a cosine, the end kept; the rest is as in the script
    weighted-loss  that loop without the sampler; an image's loss weighs 1 / images of its class
    loop-folds     that loop on the folds of `folds`, which vote
    balanced data  `default` on as many images in all, but of each class the same (`--reference`)

The table has means of sets, each the mean of its rotations and seeds, in % or points. Calibrated:
by two numbers fitted on the run's own validation images; by the test: fitted on the test itself,
what there is to gain. Rarest, most frequent, gap (rarest minus most frequent) and error (of
calibration) are those of calibrated networks. Differences to `default` are paired: same set,
rotation, seed. After ± is the spread of one over seeds, within set and rotation: how far off a
single training can be. Intervals (95 %, Student's t) are over the means of sets: how far off the
mean can be for other sets like these. Images of one patient may stand on both sides of the test.
"""

import argparse
import contextlib
import csv
import io
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean, stdev, variance
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import data_training as training  # noqa: E402

TEST, LEAST = 200, 50  # images of a class to test: most and fewest
WAYS = ("default", "none", "folds", "loop", "loop-1e-4", "weighted-loss", "loop-folds")
BALANCED, PLAIN = "balanced data", training.Calibration()
KEY = ("set", "rotation", "seed", "rare", "most", "epochs", "image_size", "weights", "flags", "way")
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # 97.5 %
DONE = "{set}, {rotation}, {seed}, {way}: {trained:.1f}, {calibrated:.1f}, {seconds:.0f} s"
Row = dict[str, Any]
# Logits of the test as trained (M, C), the log share of each class (C,), what calibrates them.
Answer = tuple[Tensor, Tensor, training.Calibration]


class Stairs(NamedTuple):
    """A staircase, and the images that its networks are tested on."""

    chosen: argparse.Namespace
    work: Path  # with the folders stairs, balanced and test
    test: training.Given
    reader: training.Reader  # of the test
    ends: tuple[int, int]  # the rarest and the most frequent class


def count_stairs(sizes: list[int], rare: int, most: int) -> list[int]:
    """Images of classes of these sizes, most frequent to rarest, those that validate among them."""
    most = min(most, sizes[0] - LEAST)
    if most < rare or min(sizes) < rare + LEAST:
        sys.exit(f"protocol.py: error: classes of {min(sizes)} images; take --rare, or other sets")
    stairs = [round(most * (rare / most) ** (at / (len(sizes) - 1))) for at in range(len(sizes))]
    return [min(count, size - LEAST) for count, size in zip(stairs, sizes, strict=True)]


def make_stairs(source: Path, rotation: int, chosen: argparse.Namespace, work: Path) -> Stairs:
    """The staircase of a set in which the class at the place `rotation` is the most frequent."""
    classes, rows = training.list_images(source)
    images = [sorted(row.path for row in rows if row.label == at) for at in range(len(classes))]
    order = [*range(rotation, len(classes)), *range(rotation)]
    counts = count_stairs([len(images[label]) for label in order], chosen.rare, chosen.most)
    for label, count in zip(order, counts, strict=True):
        paths, name = images[label], classes[label]
        random.Random(name).shuffle(paths)
        test = paths[max(count, len(paths) - TEST) :]
        equal = min(sum(counts) // len(counts), len(paths) - len(test))
        for part, its in (("stairs", paths[:count]), ("balanced", paths[:equal]), ("test", test)):
            (work / part / name).mkdir(parents=True)
            for at, path in enumerate(its):
                link = work / part / name / f"{at:05}_{Path(path).name}"
                (shutil.copyfile if os.name == "nt" else os.symlink)(os.path.abspath(path), link)
    # A reader keeps its images for all networks to come where at least one epoch is planned.
    test = prepare(chosen, work, ["--val", str(work / "test"), "--epochs", "1"])
    return Stairs(chosen, work, test, training.Reader(test), (order[-1], order[0]))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the script prints, unless it fails."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    except BaseException:
        print(said.getvalue()[-2000:], file=sys.stderr)
        raise


def command_of(chosen: argparse.Namespace, work: Path, flags: list[str], part: str) -> list[str]:
    """The command line of the script; of flags given twice the last one counts."""
    command = [str(work / part), "--output", str(work / "run"), "--weights", chosen.weights]
    command += ["--epochs", str(chosen.epochs), "--image-size", str(chosen.image_size)]
    return [*command, *chosen.flags.split(), *flags]


def prepare(chosen: argparse.Namespace, work: Path, flags: list[str]) -> training.Given:
    """What a run of the script is given, its split and batch size included."""
    with quiet():
        args = training.parse_args(command_of(chosen, work, flags, "stairs"))
        compute = training.pick_compute(args.device, args.amp)
        with training.HELD:
            given, _ = training.prepare(args, compute)
    shutil.rmtree(work / "run")
    return given


def ask(network: nn.Module, given: training.Given, reader: Any = None, fold: int = 0) -> Tensor:
    """The logits of the images that a fold is judged by."""
    device, reader = given.compute.device, reader or training.Reader(given)
    network.to(device, memory_format=training.memory_format(device))
    return training.evaluate(given, network, reader, given.data.judges(fold))


def run_script(stairs: Stairs, way: str, seed: int) -> list[Answer]:
    """What a run of the script says of the test; without balancing as trained as well, first."""
    chosen, run, name = stairs.chosen, stairs.work / "run", way.split()[0]
    flags = ["--seed", str(seed), *(way.split()[1:] if way != BALANCED else [])]
    flags += ["--rebalance", "none"] * (name == "none")
    flags += ["--folds", str(chosen.folds)] * (name == "folds")
    command = command_of(chosen, stairs.work, flags, "balanced" if way == BALANCED else "stairs")
    with quiet():
        if status := training.main(command):
            sys.exit(status)
    content = training.read_weights(str(run / training.NETWORK))
    result = json.loads((run / "config.json").read_text())["result"]
    shutil.rmtree(run)
    numbers = training.Calibration(result["logit_scale"], result["logit_shift"])
    logs = torch.tensor(content["train_images"]).log()
    log_share = logs - logs.mean()
    for state in content["networks"]:  # whose heads are calibrated
        state["fc.weight"] /= numbers.scale
        state["fc.bias"] = (state["fc.bias"] + numbers.shift * log_share) / numbers.scale
    network, _ = training.build_model(content["arch"], content["classes"], content)
    logits = ask(network, stairs.test, stairs.reader)
    as_trained = [(logits, log_share, PLAIN)] if name == "none" else []
    return [*as_trained, (logits, log_share, numbers)]


def train_loop(given: training.Given, fold: int, rate: float, weighted_loss: bool) -> nn.Module:
    """The network that the loop trains on the images of a fold."""
    settings, data, compute = given.settings, given.data, given.compute
    train, reader, device = data.learns(fold), training.Reader(given), compute.device
    weights = training.sample_weights(data.labels[train], 1.0)
    class_weights = data.counts(train).float().reciprocal().to(device) if weighted_loss else None
    torch.manual_seed(settings.seed)
    content = training.find_weights(settings.weights)[1] or training.load_pretrained(settings)
    model: Any = training.build_model(settings.arch, data.classes, content)[0]
    model.fc.reset_parameters()  # at random
    model.train().to(device, memory_format=training.memory_format(device))
    scaler = torch.amp.GradScaler(device.type, enabled=compute.amp is torch.float16)
    optimizer = torch.optim.AdamW(model.parameters(), rate, fused=True)
    steps = settings.epochs * math.ceil(len(train) / settings.batch_size)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(settings.epochs):
        stream = training.seeded("loop", settings.seed, fold, epoch)
        drawn = torch.randperm(len(train), generator=stream)
        if not weighted_loss:
            drawn = training.draw_images(weights, stream)
        batches = training.cut_batches(train[drawn], settings.batch_size, stream)
        for images, targets in reader.read(batches, "loop"):
            with compute.autocast():
                logits = model(training.to_input(images, device))
            loss = F.cross_entropy(logits.float(), targets.to(device), class_weights)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            cosine.step()
    return model


def run_loop(stairs: Stairs, way: str, seed: int) -> list[Answer]:
    """What the loop says of the test, trained on one split, or on folds which vote."""
    folds = ["--folds", str(stairs.chosen.folds)] * (way == "loop-folds")
    given, logits, own = prepare(stairs.chosen, stairs.work, ["--seed", str(seed), *folds]), [], {}
    rate = 3e-4 if way in WAYS and way != "loop-1e-4" else float(way.removeprefix("loop-"))
    for fold in range(given.data.folds):
        network = train_loop(given, fold, rate, way == "weighted-loss")
        own[fold] = ask(network, given, fold=fold)
        logits.append(ask(network, stairs.test, stairs.reader))
    numbers = training.judge(given, own).calibration
    return [(torch.stack(logits).mean(0), given.data.log_share(), numbers)]


def measure(stairs: Stairs, answer: Answer) -> dict[str, float]:
    """The measures of an answer on the test, in %: as trained, calibrated, calibrated on it."""
    logits, log_share, numbers = answer
    places, found = stairs.test.data.judges(0), dict[str, float]()
    best = training.fit_calibration(logits, stairs.test.data.labels[places], log_share)
    for name, fitted in {"trained": PLAIN, "calibrated": numbers, "by_test": best}.items():
        adjusted = fitted.apply(logits, log_share)
        last = training.assess(stairs.test, places, logits, fitted, adjusted)
        error = last.measures["calibration_error"]
        rare, frequent = (100 * last.recall[end].item() for end in stairs.ends)
        found |= {name: 100 * last.recall.mean().item(), f"{name}_error": 100 * error}
        ends = {"rarest": rare, "frequent": frequent, "gap": rare - frequent}
        found |= {f"{name}_{end}": value for end, value in ends.items()}
    return found | numbers._asdict()


def mean_of_sets(pairs: Iterable[tuple[Row, float]], spread: str = "") -> str:
    """The mean over sets, the spread if there is one, and an interval if there are two sets."""
    sets = defaultdict(list)
    for row, value in pairs:
        sets[row["set"]].append(value)
    means = [*map(mean, sets.values())]
    middle, df, z = mean(means), len(means) - 1, training.Z
    if not df:
        return f"{middle:+.1f}{spread}"
    t = STUDENT[df - 1] if df <= len(STUDENT) else z + (z**3 + z) / (4 * df)  # the series' start
    half = t * stdev(means) / math.sqrt(df + 1)
    return f"{middle:+.1f}{spread} [{middle - half:+.1f}, {middle + half:+.1f}]"


def compare(rows: list[Row], default: dict[tuple[str, ...], Row], name: str) -> str:
    """The mean difference to the default, its spread over seeds, and its interval."""
    pairs, groups = [], defaultdict(list)
    for row in rows:
        if (other := default.get(tuple(row[key] for key in KEY[:-1]))) and other is not row:
            pairs.append((row, float(row[name]) - float(other[name])))
            groups[tuple(row[key] for key in KEY if key != "seed")].append(pairs[-1][1])
    spreads = [variance(each) for each in groups.values() if len(each) > 1]
    spread = f" ± {math.sqrt(mean(spreads)):.1f}" if spreads else ""
    return mean_of_sets(pairs, spread) if pairs else ""


def make_table(rows: list[Row]) -> str:
    """The Markdown table of all results, a line for each way."""
    default = {tuple(r[key] for key in KEY[:-1]): r for r in rows if r["way"] == "default"}
    head = "way, results, as trained, calibrated, by the test, rarest, most frequent, error, s, gap"
    head += " [95 %], as trained minus default ± over seeds [95 %], calibrated minus default"
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


def fill(
    chosen: argparse.Namespace, source: Path, rotation: int, there: dict[Any, Row]
) -> list[Row]:
    """The results of a staircase: those that are `there`, and the others, made now."""
    asked, stairs = [], None
    with tempfile.TemporaryDirectory() as name:
        for seed, way in ((seed, way) for seed in range(chosen.seeds) for way in chosen.ways):
            title = way + f" ({chosen.folds})" * ("folds" in way)
            values = [source.resolve().name, rotation, seed, chosen.rare, chosen.most]
            values += [chosen.epochs, chosen.image_size, Path(chosen.weights).name, chosen.flags]
            key = dict(zip(KEY[:-1], map(str, values), strict=True))
            known = [(*key.values(), each) for each in (title, f"{title}, calibrated")]
            if known[0] not in there:
                stairs = stairs or make_stairs(source, rotation, chosen, Path(name))
                started = time.perf_counter()
                script = way.split()[0] in ("default", "none", "folds", "balanced")
                answers = (run_script if script else run_loop)(stairs, way, seed)
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


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows the description as it is written, and the default of each flag."""


def main(argv: list[str] | None = None) -> None:
    """Make all results that are asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("folders", metavar="FOLDER", type=Path, nargs="*", help="of class folders; none: the CSV's")
    add("--weights", metavar="NAME|PATH", default="DEFAULT", help="as of the script")
    add("--flags", metavar="TEXT", default="", help="of the script in all ways: --flags=--no-amp")
    add("--csv", metavar="FILE", type=Path, default=os.devnull, help="all results, to go on from")
    add("--ways", metavar="WAY", nargs="+", default=WAYS, help="names as above")
    add("--reference", action="store_true", help=f"{BALANCED}, too")
    numbers = {
        "rare": (20, "images of the rarest class, those that validate among them"),
        "most": (600, "images of the most frequent class, at most"),
        "epochs": (10, "as of the script"),
        "image-size": (64, "as of the script"),
        "seeds": (5, "trainings of each way on each staircase"),
        "rotations": (2, "staircases of each folder"),
        "folds": (5, "networks of the ways with folds"),
    }
    for name, (usual, text) in numbers.items():
        add(f"--{name}", metavar="N", type=int, default=usual, help=text)
    chosen = parser.parse_args(argv)
    chosen.ways = [*chosen.ways, *[BALANCED] * chosen.reference]
    if any("--image-size" in way or "--crop-scale" in way for way in chosen.ways):
        parser.error("--ways: the test is read as in all ways; pass --image-size, or --flags")
    lines = chosen.csv.read_text().splitlines() if chosen.csv.exists() else []
    there, asked = {tuple(row[key] for key in KEY): row for row in csv.DictReader(lines)}, []
    for source in chosen.folders:
        count = len(training.list_images(source)[0])
        for first in sorted({r * count // chosen.rotations for r in range(chosen.rotations)}):
            asked += fill(chosen, source, first, there)
    print(make_table(asked if chosen.folders else [*there.values()]))


if __name__ == "__main__":
    training.WRITE_EVERY, os.fsync = math.inf, lambda _: None  # no run's files are kept
    main()
