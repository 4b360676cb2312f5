"""Fine-tune a pretrained ResNet on an imbalanced image folder, balanced by weighted sampling.

    python data_training.py DATA --epochs N             # train, evaluate, fill a run folder
    python data_training.py DATA --folds 5              # five networks, an ensemble
    python data_training.py DATA --group '^(P[0-9]+)'   # no patient on both sides
    python data_training.py PHOTOS --predict RUN        # a CSV of classes and probabilities
    python data_training.py --resume RUN                # go on where a run was stopped
    from data_training import load_network              # in a program: a run's networks
    torchrun --nproc-per-node=K data_training.py DATA   # one run on several devices

DATA holds one folder per class; a fifth of each class is kept for validation. A network is trained
in three steps, the same for every data set:

1. linear probe: a new last layer is fitted to the features of the pretrained network;
2. fine-tuning: all layers are trained. A `WeightedRandomSampler` draws the images with weights
   1 / (training images of the class), so that every class is seen about equally often;
3. kept point: of a few points on the straight line between the weights of both, the one with the
   lowest validation loss is kept.

Two numbers, fitted on the validation images, then reduce the remaining bias towards frequent
classes (calibration). With `--folds K` each network is evaluated on the fold that it was not
trained on; together they answer, as an ensemble.

The records come first, each says what it holds. Then the story, from the top down; each section
uses only records and the sections below it: run, sampling, training, predicting, evaluation and
calibration, results, page, run folder, data, model, reading (of images), measures, devices, files.
The command line stands last and uses all.

Exit status: 0 done, 2 bad input (one line on stderr says where and what to do), 130 interrupted.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import csv
import hashlib
import html
import io
import json
import math
import os
import random
import re
import secrets
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from functools import cache
from multiprocessing.pool import ThreadPool
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Generator, Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler
from torchvision import models
from torchvision.transforms import v2
from tqdm import tqdm

from data_creation import (
    IMAGE_EXTENSIONS,
    DataError,
    OneLineParser,
    __version__,
    find_parts,
    format_table,
    printable,
    walk_files,
    write_file,
)

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

NETWORK = "network.pt"  # the networks of a run, in its folder
STATE = "resume.pt"  # what a stopped run goes on with; a finished run has none
LOCK = ".lock"  # is locked while a run works in the folder
COPIES = ".copies"  # a folder of shrunk copies of large images
FORMAT = 8  # version of these files; increase it when older ones can no longer be read
EVALUATED = -1  # given as the seed of an image that is evaluated, not augmented
# Accuracy, mean recall of all classes, and of those with many, medium or few training images.
MEASURES = ("accuracy", "balanced_accuracy", "many", "medium", "few")
ENSEMBLE_SCALE = 1.2  # the mean logits of several networks are too cautious by this factor
Z = 1.959964  # 95 % of a normal distribution lie within this many standard deviations
BATCH = 64  # images in a training step, by default
SMALL = 2000  # with fewer training images batches are half as large, for enough steps
# Pillow warns of images of 89 to 179 megapixels; larger ones it refuses to read.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
Table = list[dict[str, Any]]  # rows with the same columns
State = dict[str, Tensor]  # the state_dict of a network
Stored = Mapping[str, Any]  # the content of a file of a stopped run, or of weights; may be empty


# ---------------------------------------------------------------------------------------- records


@dataclass(frozen=True)
class Settings:
    """All that decides the result of a run; `open_run` fills in what was not typed."""

    data: Path
    folds: int
    val: Path | None
    source: Path | None
    group: str | None
    image_size: int
    flip: str
    arch: str
    weights: str
    epochs: int
    power: float
    batch_size: int
    output: Path
    baseline: Path | None
    seed: int
    precision: str  # "float32", or the lower one of mixed precision
    command: str  # the command line that started the run


@dataclass(frozen=True)
class Options:
    """The options of this call alone, which are not stored with the run."""

    predict: Path | None
    natural: bool
    resume: Path | None
    workers: int | None
    device: str
    amp: bool | None


class Compute(NamedTuple):
    """The device of this process, its precision, and its place among the processes of a run."""

    device: torch.device
    precision: str  # "float32", or the lower one of mixed precision
    rank: int = 0
    world_size: int = 1

    def autocast(self) -> torch.autocast:
        """Return the context for a forward pass."""
        dtype = getattr(torch, self.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not torch.float32)

    def to_device(self, tensors: Any) -> Any:
        """Move a network, or images, to the device and into its memory format."""
        # On MPS gradients of BatchNorm are wrong: https://github.com/pytorch/pytorch/issues/175189
        layout = torch.contiguous_format if self.device.type == "mps" else torch.channels_last
        return tensors.to(self.device, memory_format=layout)


class ImageFile(NamedTuple):
    """The place of an image, and its class."""

    path: str
    name: str  # class/file: its path below DATA, SRC or `--val`, with `/` on every system
    label: int  # -1: not known
    part: str  # "train", "val" or "source": it was found in DATA, `--val` or SRC


Listing = tuple[list[str], list[ImageFile]]  # the classes of DATA, and all images


class Opened(NamedTuple):
    """The settings of a run, its images, and what is read from files before it begins."""

    settings: Settings
    listing: Listing
    weights: Stored  # the content of the file that `--weights` names, if it names a file
    state: Stored  # the state of a stopped run; empty for a new run


class Data(NamedTuple):
    """All N images of a run, and for each of K folds those to train on and those to evaluate on.

    A family is a set of images that stay together: copies of one image, or a group of `--group`.
    """

    classes: list[str]  # C names
    files: list[ImageFile]
    labels: Tensor  # (N,) int64
    train_mask: Tensor  # (K, N) bool, the images that each network is trained on
    eval_mask: Tensor  # (K + 1, N) bool, those it is evaluated on; last, those of the ensemble
    families: Tensor  # (N,) int64, the same number for the images of a family
    digests: Tensor  # (N,) int64, see `digest_of`
    white: int  # the value of white in grey images of over 8 bits; 0 if there are none
    leaks: int  # number of validation images left out, since they are also training images
    unreadable: list[str]  # paths of files left out, since they cannot be read

    def train_indices(self, fold: int) -> Tensor:
        """Return the indices of the images that the network of a fold is trained on: int64."""
        return self.train_mask[fold].nonzero().flatten()

    def counts(self, indices: Tensor) -> Tensor:
        """Count the images of each class among `indices`: (C,) int64."""
        return torch.bincount(self.labels[indices], minlength=len(self.classes))

    def fold_counts(self) -> Tensor:
        """Count the training images of each class in each fold: (K, C) int64."""
        folds = range(len(self.train_mask))
        return torch.stack([self.counts(self.train_indices(fold)) for fold in folds])


class EvalSet(NamedTuple):
    """M images that networks are evaluated on."""

    indices: Tensor  # (M,) int64, of the images in `Data`
    targets: Tensor  # (M,) int64
    families: Tensor  # (M,) int64
    folds: Tensor  # (M,) int64, the fold whose network answers; K stands for the ensemble of all


class ClassShares(NamedTuple):
    """How frequent each class was in the training of the networks that answer for M images."""

    train_counts: Tensor  # (C,) float64, training images of each class, mean over networks
    log_share: Tensor  # (M, C) float32, the log of each class's share for the network that answers
    expected_shift: float  # how much of `log_share` training is expected to leave in the logits


class Calibration(NamedTuple):
    """The correction of logits: they become scale * logits - shift * log_share.

    Rare classes are recognised less often even if drawn as often: `shift` takes that back
    (arXiv:2007.07314, Menon et al. 2021); `scale` corrects confidence (arXiv:1706.04599, Guo 2017).
    """

    scale: float = 1.0
    shift: float = 0.0

    def of_networks(self, number: int) -> Calibration:
        """Return the calibration for the mean of several networks, from that of single ones."""
        factor = ENSEMBLE_SCALE if number > 1 else 1.0
        return Calibration(self.scale * factor, self.shift * factor)

    def apply(self, logits: Tensor, log_share: Tensor) -> Tensor:
        """Return the calibrated logits: (M, C) float32."""
        return self.scale * logits.float() - self.shift * log_share


class Evaluation(NamedTuple):
    """The answers of networks for the M images of an evaluation set, and how right they are."""

    eval_set: EvalSet
    shares: ClassShares
    calibration: Calibration  # fitted on all M images, for new images
    probabilities: Tensor  # (M, C) float32, calibrated
    predicted: Tensor  # (M,) int64
    losses: Tensor  # (M,) float32, minus the log of the probability of the true class
    confusion: Tensor  # (C, C) int64, rows true, columns predicted
    summary: dict[str, float]  # the columns of the history: loss, `MEASURES`, calibration ...


class FoldResult(NamedTuple):
    """A finished fold: linear probe, fine-tuned network, and validation logits between both."""

    head: State  # the last layer of the linear probe; its other layers are as loaded
    end: State  # the network after fine-tuning
    logits: Tensor  # (P, M, C), of its validation images at each of the P `POINTS`


class Kept(NamedTuple):
    """The networks that a run keeps, and their evaluation."""

    networks: list[State]
    evaluation: Evaluation
    point: float | None = None  # the kept point, the same in all folds; None during training
    line: Table = []  # the results at all points


@dataclass
class Progress:
    """How far a run has come: all that it needs to go on from there."""

    start: State  # the network of each fold before the linear probe
    seen: int  # number of validation images that the network of `--weights` was trained on
    draws: Tensor  # how often fine-tuning has drawn images of each class so far: (C,) int64
    history: Table = field(default_factory=list)  # a row for each epoch, 0 is the linear probe
    head: State = field(default_factory=dict)  # the last layer of the fold's linear probe
    trainer: dict[str, Any] = field(default_factory=dict)  # state of `Trainer` after the last epoch
    finished: list[FoldResult] = field(default_factory=list)
    stored_at: float = -math.inf  # when it was last stored, by the clock of this process

    def has_done(self, fold: int, epoch: int) -> bool:
        """Return whether this epoch of this fold, or a later one, is done."""
        return any((row["fold"], row["epoch"]) >= (fold + 1, epoch) for row in self.history)


class Setup(NamedTuple):
    """All that a run has before its first epoch and does not change."""

    settings: Settings
    data: Data
    compute: Compute
    baseline: Tensor  # (M,), classes that the run `--baseline` predicted; empty without one
    reader: Reader


class Outcome(NamedTuple):
    """All that the reports of a run are made from, after an epoch or at the end."""

    settings: Settings
    data: Data
    facts: dict[str, str]  # made by `describe_run`
    remarks: list[str]  # sentences that must be read with the result
    history: Table
    kept: Kept
    baseline: Tensor  # (M,), classes that the run `--baseline` predicted; empty without one
    changes: Table  # differences to that run
    classes: Table  # made by `list_classes`
    tested: Evaluation | None  # on images that no network is trained or validated on


# -------------------------------------------------------------------------------------------- run

WRITE_EVERY = 30.0  # seconds; on a fast GPU writing files can take longer than an epoch


def run(settings: Settings, options: Options) -> None:
    """Train a network, or one for each fold, evaluate it, and fill the run folder."""
    compute = join_processes(options)
    prepared = on_first_process(compute, prepare_run, settings, options, compute)
    settings, data, baseline, progress = prepared
    compute = compute._replace(precision=settings.precision)
    model = compute.to_device(build_model(settings.arch, data.classes, progress.start))
    setup = Setup(
        settings=settings,
        data=data,
        compute=compute,
        baseline=baseline,
        reader=make_reader(settings, options, data, compute),
    )
    if compute.rank == 0:
        save_tensors(settings.output / STATE, state_of(settings, progress))
        print_start(settings, describe_run(settings, data, compute), progress.history)
    for fold in range(len(progress.finished), settings.folds):
        train_fold(setup, progress, model, fold)
    finish(setup, progress)


def prepare_run(
    settings: Settings, options: Options, compute: Compute
) -> tuple[Settings, Data, Tensor, Progress]:
    """Read and check all that a run needs before its first epoch."""
    opened = open_run(settings, options, compute)
    settings = opened.settings
    data = load_data(settings, opened.listing)
    check_batches(settings, data, compute.world_size)
    baseline = load_baseline(settings.baseline, data)
    return settings, data, baseline, load_progress(opened, data)


def train_fold(setup: Setup, progress: Progress, model: Any, fold: int) -> None:
    """Train the network of a fold: linear probe, fine-tuning, and the line between both.

    What a stopped run has done already is skipped.
    """
    settings = setup.settings
    model.load_state_dict(progress.start)
    if not progress.has_done(fold, 0):
        row = make_probe(setup, progress, model, fold)
        end_epoch(setup, progress, model, row)
    trainer = begin_fine_tuning(setup, progress, model, fold)
    for epoch in range(1, settings.epochs + 1):
        if not progress.has_done(fold, epoch):
            row = fine_tune(setup, progress, trainer, fold, epoch)
            end_epoch(setup, progress, model, row)
    result = evaluate_line(setup, progress, model, fold)
    progress.finished.append(result)
    if setup.compute.rank == 0:
        save_tensors(settings.output / f"fold-{fold + 1}.pt", result._asdict())
        save_tensors(settings.output / STATE, state_of(settings, progress))
        if fold + 1 < settings.folds:  # after the last one `finish` writes them
            write_results(setup, progress, choose_point(setup, progress))


def make_probe(setup: Setup, progress: Progress, model: Any, fold: int) -> dict[str, Any]:
    """Give the network its linear probe; return the row of the history, but for the evaluation."""
    data = setup.data
    indices = data.train_indices(fold)
    started = time.perf_counter()
    features = compute_logits(without_head(model), setup.reader, indices)
    labels = data.labels[indices]
    weights = sample_weights(labels, setup.settings.power)
    progress.head, loss = on_first_process(setup.compute, fit_probe, features, labels, weights)
    model.load_state_dict(progress.start | progress.head)
    row = {"fold": fold + 1, "epoch": 0, "step": "linear probe", "train_loss": loss}
    row |= {"distinct_images": 1.0, "learning_rate": math.nan}
    return row | describe_pass(torch.bincount(labels), time.perf_counter() - started)


def begin_fine_tuning(setup: Setup, progress: Progress, model: Any, fold: int) -> Trainer:
    """Set up the training of all layers, or go on with a stored one."""
    settings = setup.settings
    steps = settings.epochs * math.ceil(len(setup.data.train_indices(fold)) / settings.batch_size)
    is_pretrained = settings.weights != "none"
    trainer = Trainer(model, is_pretrained, steps, setup.compute)
    if progress.has_done(fold, 1):
        trainer.load_state_dict(progress.trainer)
    else:
        first_head = {name: FIRST_HEAD * value for name, value in progress.head.items()}
        model.load_state_dict(progress.start | first_head)
    return trainer


def fine_tune(
    setup: Setup, progress: Progress, trainer: Trainer, fold: int, epoch: int
) -> dict[str, Any]:
    """Train all layers for an epoch; return its row of the history, but for the evaluation."""
    settings, data = setup.settings, setup.data
    indices = data.train_indices(fold)
    started = time.perf_counter()
    key = (settings.seed, fold, epoch)
    drawn = draw_epoch(data.labels, indices, settings.power, seeded("draw", *key))
    loss = train_epoch(trainer, setup.reader, drawn, seeded("augment", *key))
    counts = data.counts(drawn)
    progress.draws += counts
    progress.trainer = trainer.state_dict()
    row = {"fold": fold + 1, "epoch": epoch, "step": "fine-tuning", "train_loss": loss}
    row |= {"distinct_images": len(drawn.unique()) / len(indices)}
    row |= {"learning_rate": trainer.learning_rate}
    return row | describe_pass(counts, time.perf_counter() - started)


def describe_pass(counts: Tensor, seconds: float) -> dict[str, Any]:
    """Return columns of the history: (C,) images of each class that were trained on, and speed."""
    return {
        "fewest_draws": int(counts.min()),
        "most_draws": int(counts.max()),
        "images_per_second": int(counts.sum()) / seconds,
        "seconds": seconds,
    }


def end_epoch(setup: Setup, progress: Progress, model: Any, row: dict[str, Any]) -> None:
    """Evaluate an epoch and add its row to the history; store it, then show it."""
    started = time.perf_counter()
    eval_set = make_eval_set(setup.data, [row["fold"] - 1])
    logits = compute_logits(model, setup.reader, eval_set.indices)
    if setup.compute.rank > 0:
        progress.history.append(row)
        return
    shares = class_shares(setup.data, eval_set, setup.settings.power)
    evaluation = evaluate_cross_fitted(logits, eval_set, shares)
    seconds = row["seconds"] + time.perf_counter() - started
    progress.history.append(row | evaluation.summary | {"seconds": seconds})
    if time.perf_counter() - progress.stored_at >= WRITE_EVERY:
        save_tensors(setup.settings.output / STATE, state_of(setup.settings, progress))
        if not progress.finished:  # otherwise the files show the folds that are finished
            write_results(setup, progress, Kept([copy_state(model)], evaluation))
        progress.stored_at = time.perf_counter()
    # A logger of your own can take `progress.history[-1]` here, in one process alone. Epochs that
    # were not yet stored when a run was killed come once more after `--resume`.
    print(format_epoch(progress.history[-1], setup.settings), flush=True)


def evaluate_line(setup: Setup, progress: Progress, model: Any, fold: int) -> FoldResult:
    """Compute the logits of the fold's validation images at each point of the line."""
    end = copy_state(model)
    indices = make_eval_set(setup.data, [fold]).indices
    answers = []
    for point in POINTS:
        model.load_state_dict(interpolate(progress.start | progress.head, end, point))
        answers.append(compute_logits(model, setup.reader, indices))
    return FoldResult(progress.head, end, torch.stack(answers))


def choose_point(setup: Setup, progress: Progress) -> Kept:
    """Keep the point with the lowest validation loss over all finished folds, the same in each."""
    folds = range(len(progress.finished))
    eval_set = make_eval_set(setup.data, folds)
    shares = class_shares(setup.data, eval_set, setup.settings.power)
    evaluations = []
    for number in range(len(POINTS)):
        logits = torch.cat([result.logits[number] for result in progress.finished])
        evaluations.append(evaluate_cross_fitted(logits, eval_set, shares))
    losses = [evaluation.summary["val_loss"] for evaluation in evaluations]
    best = losses.index(min(losses))
    networks = [
        interpolate(progress.start | result.head, result.end, POINTS[best])
        for result in progress.finished
    ]
    line = [
        {"point": point, **evaluation.summary, "kept": int(number == best)}
        for number, (point, evaluation) in enumerate(zip(POINTS, evaluations, strict=True))
    ]
    return Kept(networks, evaluations[best], POINTS[best], line)


def finish(setup: Setup, progress: Progress) -> None:
    """Choose what is kept, test the ensemble if there are images for it, and write all results."""
    settings, data, compute = setup.settings, setup.data, setup.compute
    kept = on_first_process(compute, choose_point, setup, progress)
    tested = None
    eval_set = make_eval_set(data, [settings.folds])
    if len(eval_set.indices):
        shares = class_shares(data, eval_set, settings.power)
        calibration = kept.evaluation.calibration.of_networks(settings.folds)
        networks = [build_model(settings.arch, data.classes, state) for state in kept.networks]
        ensemble = Ensemble(networks, Calibration(), shares.log_share[0])
        logits = compute_logits(compute.to_device(ensemble), setup.reader, eval_set.indices)
        tested = evaluate(logits, calibration, eval_set, shares)
    if compute.rank == 0:
        print_end(write_results(setup, progress, kept, tested))
        remove_state(settings.output)


def write_results(
    setup: Setup, progress: Progress, kept: Kept, tested: Evaluation | None = None
) -> Outcome:
    """Write the networks, the tables and the page of a run; return what they are made from."""
    settings, data = setup.settings, setup.data
    save_tensors(settings.output / NETWORK, describe_networks(settings, data, kept))
    classes = list_classes(data.classes, progress.draws, kept.evaluation)
    outcome = Outcome(
        settings=settings,
        data=data,
        facts=describe_run(settings, data, setup.compute),
        remarks=list_remarks(settings.folds, progress, kept, classes),
        history=progress.history,
        kept=kept,
        baseline=setup.baseline,
        changes=compare(setup.baseline, kept.evaluation),
        classes=classes,
        tested=tested,
    )
    for name, content in make_tables(outcome).items():
        write_file(settings.output / name, content)
    write_file(settings.output / "report.html", make_page(outcome))
    return outcome


# ---------------------------------------------------------------------------------------- sampling


def sample_weights(labels: Tensor, power: float) -> Tensor:
    """Return a weight for each image, 1 / (images of its class) ** power: (N,) float64."""
    return torch.bincount(labels).double()[labels] ** -power


def draw_epoch(labels: Tensor, indices: Tensor, power: float, stream: Generator) -> Tensor:
    """Draw as many images as there are in `indices` for an epoch, by their weights: indices, int64.

    With a power of 0 there is no sampler: each image comes once, in random order.
    """
    if power > 0:
        weights = sample_weights(labels[indices], power)
        # As a list the draw is the same for any number of workers and processes.
        sampler = WeightedRandomSampler(weights.tolist(), len(indices), generator=stream)
        return indices[torch.tensor(list(sampler))]
    return indices[torch.randperm(len(indices), generator=stream)]


# ---------------------------------------------------------------------------------------- training

# The linear probe is a logistic regression. Its penalty is small: features should be separated.
PROBE_L2 = 3e-5  # times half the sum of squared weights, for features of unit length
# Fine-tuning begins with this part of the linear probe as its last layer. All of it fits the
# training images already and leaves the other layers little to learn; a layer of zeros forgets what
# they know (arXiv:2202.10054, Kumar et al. 2022; arXiv:2302.05779, Ren et al. 2023).
FIRST_HEAD = 0.25
# Points of the line from the linear probe (0) to the end of fine-tuning (1).
POINTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
LEARNING_RATE = 3e-4  # the highest one of AdamW, for pretrained weights
RANDOM_LEARNING_RATE = 1e-3  # the highest one for random weights
LAYER_DECAY = 0.7  # factor from a group of layers to the one below (arXiv:1801.06146, Howard 2018)
WARM_UP_PART = 0.1  # the part of the steps in which the learning rate rises


def fit_probe(features: Tensor, labels: Tensor, weights: Tensor) -> tuple[State, float]:
    """Fit a last layer to (N, D) features of images with weights, and return it with its loss.

    That is logistic regression. Computed on the CPU it is the same on all devices. Raises
    `DataError` where the features are no numbers.
    """
    weights = (weights / weights.sum()).float()
    features = features.float()
    length = (weights @ features.square().sum(1)).sqrt().clamp(min=1e-12)
    features = features / length  # so that the penalty means the same for all networks
    classes = int(labels.max()) + 1
    weight = torch.zeros(classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=300, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        losses = F.cross_entropy(F.linear(features, weight, bias), labels, reduction="none")
        value = weights @ losses + PROBE_L2 / 2 * weight.square().sum()
        check_numbers(value.item(), "the loss of the linear probe")
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
        penalty = PROBE_L2 / 2 * weight.square().sum()
        fitted = (loss() - penalty).item()  # the loss alone, as it is shown beside others
    return {"fc.weight": (weight / length).detach(), "fc.bias": bias.detach()}, fitted


def interpolate(probe: State, end: State, point: float) -> State:
    """Return the weights, and BatchNorm statistics, at a point of the line between two networks.

    On that line generalisation is often better than at both ends (arXiv:2109.01903, Wortsman et al.
    2022).
    """
    return {
        name: value.lerp(end[name], point) if value.is_floating_point() else end[name]
        for name, value in probe.items()
    }


class Trainer:
    """The model, optimizer, schedule and scaler of a fold's fine-tuning."""

    def __init__(self, model: Any, is_pretrained: bool, steps: int, compute: Compute):
        """Set up AdamW for all layers; pretrained ones take smaller steps the lower they are."""
        self.model = model
        self.compute = compute
        self.network: nn.Module = model.train()
        if compute.world_size > 1:  # `compute_logits` broadcasts the statistics of BatchNorm
            warnings.filterwarnings("ignore", ".broadcast_buffers. is deprecated", FutureWarning)
            self.network = DistributedDataParallel(model, broadcast_buffers=False)
        groups: list[dict[str, Any]] = []
        for depth, layers in zip((3, 2, 1, 0), LAYERS, strict=True):  # 0: the topmost layers
            weights = [
                weight for name, weight in model.named_parameters() if name.startswith(layers)
            ]
            rate = LEARNING_RATE * LAYER_DECAY**depth if is_pretrained else RANDOM_LEARNING_RATE
            groups.append({"params": weights, "lr": rate})
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        rates = [group["lr"] for group in groups]
        # OneCycleLR divides by zero where either part of the cycle has a single step.
        steps = max(4, steps)
        rising = max(WARM_UP_PART, 2 / steps)
        self.scheduler = OneCycleLR(
            self.optimizer, rates, steps, pct_start=rising, cycle_momentum=False
        )
        self.scaler = GradScaler(compute.device.type, enabled=compute.precision == "float16")

    def step(self, loss: Tensor) -> None:
        """Take one step of the optimizer and of the schedule."""
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.learning_rate = self.scheduler.get_last_lr()[-1]  # of this step, for the last layer
        self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs to continue exactly."""
        names = ("model", "optimizer", "scheduler", "scaler")
        return {name: getattr(self, name).state_dict() for name in names}

    def load_state_dict(self, state: Stored) -> None:
        """Continue from what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if state["scaler"]:  # an unused scaler stored nothing, and a used one refuses that
            self.scaler.load_state_dict(state["scaler"])
        for weight, moments in self.optimizer.state.items():
            for name, value in moments.items():  # kernels need them in the same memory layout
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    moments[name] = torch.empty_like(weight).copy_(value)


def train_epoch(trainer: Trainer, reader: Reader, drawn: Tensor, seeds: Generator) -> float:
    """Train on the drawn images; return their mean loss, or raise `DataError` if not finite."""
    compute = trainer.compute
    batches = cut_batches(drawn, reader.batch_size, seeds)
    own_parts = [batch[compute.rank :: compute.world_size] for batch in batches]
    total = torch.zeros((), device=compute.device)
    loaded = reader.read(own_parts, "fine-tuning")
    for groups, batch in zip(loaded, batches, strict=True):
        group = groups[0]  # crops for training have one shape
        targets = move_batch(group.labels, compute)
        with compute.autocast():
            logits = trainer.network(move_batch(group.images, compute))
        loss = F.cross_entropy(logits.float(), targets)
        # Gradients are averaged over processes, whose parts of a batch may differ by one image.
        trainer.step(loss * (len(targets) * compute.world_size / len(batch)))
        total += loss.detach() * len(targets)
    if compute.world_size > 1:
        dist.all_reduce(total)
    mean = total.item() / len(drawn)
    on_first_process(compute, check_numbers, mean, "the loss")
    return mean


# -------------------------------------------------------------------------------------- predicting


def load_network(path: str | Path) -> tuple[Ensemble, Preparation, list[str]]:
    """Return the networks of a run as one, a function that reads its input, and its classes.

        network, prepare, classes = load_network("runs/first")
        probabilities = network(prepare("photo.jpg")[None]).softmax(1)[0]  # one for each class

    `prepare` returns (3, H, W), and `[None]` makes a batch of that. `--predict` says the same; but
    for grey images of over 8 bits, if training had none: there the brightest pixel of a folder
    decides what is white, here that of each image. For `--natural` add `network.log_share` before
    the softmax.
    """
    return build_ensemble(read_run(Path(path)))


def build_ensemble(content: Stored) -> tuple[Ensemble, Preparation, list[str]]:
    """Return what `load_network` does, from the content of `NETWORK`."""
    classes = content["classes"]
    networks = [
        build_model(content["arch"], classes, state, "--predict") for state in content["networks"]
    ]
    calibration = Calibration(content["scale"], content["shift"])
    ensemble = Ensemble(networks, calibration, content["natural"]).eval().requires_grad_(False)
    return ensemble, Preparation(content["image_size"], content["white"]), classes


def predict(settings: Settings, options: Options) -> None:
    """Write the class that a run predicts for each image in DATA, as CSV."""
    if is_launched() and int(os.environ["RANK"]) > 0:
        return  # under torchrun one process predicts
    output = settings.output
    path = Path(str(options.predict))
    if output and (output.exists() or not output.parent.is_dir()):
        raise DataError(
            f"--output {output}: the file exists already, or its folder does not exist; name a new "
            "file in a folder that exists"
        )
    content = read_run(path)
    network, prepare, classes = build_ensemble(content)
    folder = path if path.is_dir() else path.parent
    if (folder / STATE).exists():
        print_warning(f"the run {folder} is not finished; finish it by --resume for better results")
    # In float32, as in a program: the answers are nearly the same on all machines.
    compute = pick_compute(replace(options, amp=bool(options.amp)))
    files, digests, brightest = list_photos(settings.data, classes)
    if prepare.white and brightest > prepare.white:
        print_warning(
            f"{settings.data}: grey values reach {brightest}; those above {prepare.white} are "
            "shown as white, as in training"
        )
    prepare = prepare._replace(white=prepare.white or find_white(brightest))
    labels = torch.tensor([file.label for file in files])
    images = Images([file.path for file in files], labels, prepare)
    workers = count_workers(options.workers, compute.device.type)
    reader = Reader(images, compute, workers, settings.batch_size or BATCH)
    logits = compute_logits(compute.to_device(network), reader, torch.arange(len(files)))
    if options.natural:
        logits = logits + content["natural"]
    probabilities = logits.softmax(1)
    probability, best = probabilities.max(1)
    columns: dict[str, Any] = {
        "path": images.paths,
        "class": [classes[label] for label in best.tolist()],
        "probability": probability,
    }
    is_labelled = bool(labels.min() >= 0)
    if is_labelled:
        columns["true"] = [classes[label] for label in labels.tolist()]
    table = format_table(to_rows(add_classes(columns, classes, probabilities)))
    if output:
        write_file(output, table)
    else:
        sys.stdout.buffer.write(table)
        sys.stdout.buffer.flush()
    print(f"{len(files)} images", file=sys.stderr)
    if is_labelled:
        print_recalls(content, files, digests, logits)


def print_recalls(content: Stored, files: list[ImageFile], digests: Tensor, logits: Tensor) -> None:
    """Print balanced accuracy and recalls on stderr, for images that were not trained on."""
    families = find_families(files, digests.tolist(), content["group"])
    is_trained = find_trained(files, digests, content)
    is_trained = torch.isin(families, families[is_trained])
    print(f"left out, since trained on: {is_trained.sum()} of them", file=sys.stderr)
    new = (~is_trained).nonzero().flatten()
    if not len(new):
        return
    targets = torch.tensor([file.label for file in files])[new]
    eval_set = EvalSet(
        indices=new, targets=targets, families=families[new], folds=torch.zeros_like(new)
    )
    train_counts = torch.tensor(content["train_images"], dtype=torch.float64)
    log_share = content["natural"].expand(len(new), -1)
    shares = ClassShares(train_counts, log_share, expected_shift=0.0)
    evaluation = evaluate(logits[new], Calibration(), eval_set, shares)
    print(f"balanced accuracy {format_range(evaluation.summary)}", file=sys.stderr)
    for row in list_classes(content["classes"], [0] * len(content["classes"]), evaluation):
        if row["val_images"]:
            print(printable(format_recall(row)), file=sys.stderr)


def list_photos(path: Path, classes: list[str]) -> tuple[list[ImageFile], Tensor, int]:
    """Return the images at or below `path`, their digests (N,), and the largest grey value.

    They are labelled by the folders that they are in, if all of these are classes, else by -1.
    """
    files: list[ImageFile] = []
    if path.is_dir():
        files, _ = list_images(path, classes, "")
    elif path.is_file() and path.name.lower().endswith(IMAGE_EXTENSIONS):
        files = [ImageFile(str(path), path.name, -1, "")]
    if not files:
        raise DataError(
            f"DATA {path}: there is no image; pass an image, or a folder that holds files of the "
            f"types {', '.join(IMAGE_EXTENSIONS)}"
        )
    checked, brightest = check_images([file.path for file in files])
    files = [file for file in files if file.path in checked]
    if not files:
        raise DataError(f"DATA {path}: none of the images can be read; pass other images")
    files.sort(key=lambda file: Path(file.path))
    if outside := [file for file in files if file.label < 0]:
        if len(outside) < len(files):
            print_warning(
                f"{len(outside)} images are in no class folder, the first is {outside[0].path}; "
                "therefore no recalls are computed"
            )
        files = [file._replace(label=-1) for file in files]
    return files, torch.tensor([checked[file.path] for file in files]), brightest


# ---------------------------------------------------------------------- evaluation and calibration
#
# `compute_logits` runs a network on images. `evaluate` measures calibrated logits, and
# `evaluate_cross_fitted` those of images that the calibration is fitted on, too. `summarise`, in
# the section of measures, turns a confusion matrix into a few numbers.

PRIOR = 2.0  # the weight of the expected calibration, in images
EXPECTED_SHIFT = 1.0  # balanced training leaves about this times the log share in the logits
LEAST_SCALE = 0.01
PARTS = 5  # each part is calibrated by the others; with two parts these would be too few images


def make_eval_set(data: Data, folds: Iterable[int]) -> EvalSet:
    """Return the images that the networks of these folds are evaluated on, fold by fold."""
    parts = {fold: data.eval_mask[fold].nonzero().flatten() for fold in folds}
    indices = torch.cat([*parts.values()])
    return EvalSet(
        indices=indices,
        targets=data.labels[indices],
        families=data.families[indices],
        folds=torch.cat([torch.full_like(part, fold) for fold, part in parts.items()]),
    )


def class_shares(data: Data, eval_set: EvalSet, power: float) -> ClassShares:
    """Return how frequent the classes were in training for the networks that answer."""
    counts = data.fold_counts().double()
    log_share = centred_log(counts)
    # The last row is that of all networks together: the mean of theirs.
    counts = torch.cat([counts, counts.mean(0, keepdim=True)])
    log_share = torch.cat([log_share, log_share.mean(0, keepdim=True)])
    return ClassShares(
        train_counts=counts[eval_set.folds.unique()].mean(0),
        log_share=log_share[eval_set.folds],
        expected_shift=EXPECTED_SHIFT + 1 - power,
    )


@torch.no_grad()
def compute_logits(model: nn.Module, reader: Reader, indices: Tensor) -> Tensor:
    """Compute the logits of images in evaluation mode, each process a part: (M, C) in all of them.

    Without its last layer a network computes features: (M, D). Raises `DataError` for NaN.
    """
    compute = reader.compute
    if compute.world_size > 1:  # BatchNorm has the statistics of its own process
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    was_training = model.training
    model.eval()
    order = []  # indices of the images, in the order of the outputs
    outputs = []
    batches = cut_batches(indices[compute.rank :: compute.world_size], reader.per_process)
    for groups in reader.read(batches, "evaluating"):
        for group in groups:
            with compute.autocast():
                outputs.append(model(move_batch(group.images, compute)))
            order.append(group.indices)
    model.train(was_training)
    part = (torch.cat(order), torch.cat([each.cpu() for each in outputs])) if order else None
    parts = [part] * compute.world_size
    if compute.world_size > 1:
        dist.all_gather_object(parts, part)
    # The images come by shape and by process; they go back to the order of `indices`.
    found = torch.cat([each[0] for each in parts if each])
    answers = torch.cat([each[1] for each in parts if each])
    rows = torch.empty(int(indices.max()) + 1, dtype=torch.int64)
    rows[indices] = torch.arange(len(indices))
    logits = torch.empty_like(answers)
    logits[rows[found]] = answers
    logits = logits.clamp(-1e4, 1e4)  # float16 overflows
    on_first_process(compute, check_numbers, logits.max().item(), "the network's outputs")
    return logits


def evaluate_cross_fitted(logits: Tensor, eval_set: EvalSet, shares: ClassShares) -> Evaluation:
    """Evaluate (M, C) logits, each calibrated by a fit to the other parts (cross-fitting)."""
    targets, log_share, expected = eval_set.targets, shares.log_share, shares.expected_shift
    parts = eval_set.folds  # each fold is calibrated by the images of the others
    if len(parts.unique()) < 2:
        parts = cut_parts(targets, eval_set.families)
    calibrated = torch.empty(logits.shape)
    for part in parts.unique():
        inside = parts == part
        outside = ~inside
        fitted = fit_calibration(logits[outside], targets[outside], log_share[outside], expected)
        calibrated[inside] = fitted.apply(logits[inside], log_share[inside])
    fitted = fit_calibration(logits, targets, log_share, expected)
    return evaluate(logits, fitted, eval_set, shares, calibrated)


def evaluate(
    logits: Tensor,
    calibration: Calibration,
    eval_set: EvalSet,
    shares: ClassShares,
    calibrated: Tensor | None = None,
) -> Evaluation:
    """Evaluate (M, C) logits as trained and calibrated, by `calibration` unless cross-fitted."""
    targets, train_counts = eval_set.targets, shares.train_counts
    if calibrated is None:
        calibrated = calibration.apply(logits, shares.log_share)
    log_probability = calibrated.log_softmax(1)
    predicted = log_probability.argmax(1)
    losses = -log_probability.gather(1, targets[:, None]).squeeze(1)
    confusion = confusion_matrix(targets, predicted, len(train_counts))
    before = logits.float().log_softmax(1).argmax(1)
    as_trained = confusion_matrix(targets, before, len(train_counts))
    factor = spanning_factor(predicted == targets, eval_set, torch.ones(len(train_counts)))
    effective = 1 + (effective_counts(eval_set, len(train_counts))[0] - 1) / factor
    summary = summarise(confusion, train_counts, effective)
    plain = summarise(as_trained, train_counts, as_trained.sum(1))
    return Evaluation(
        eval_set=eval_set,
        shares=shares,
        calibration=calibration,
        probabilities=log_probability.exp(),
        predicted=predicted,
        losses=losses,
        confusion=confusion,
        summary={
            "val_loss": (class_weights(targets) @ losses.double()).item(),
            **summary,
            **{f"as_trained_{name}": plain[name] for name in MEASURES},
            "logit_scale": calibration.scale,
            "logit_shift": calibration.shift,
        },
    )


def cut_parts(targets: Tensor, families: Tensor) -> Tensor:
    """Cut M images at random into `PARTS` with as many families of each class: (M,) int64.

    Families are sorted by their rarest class and dealt out like cards: of 7 families of "ape", then
    6 of "bee", part 0 gets the 1st and 6th of ape, then the 4th of bee.
    """
    names, family = families.unique(return_inverse=True)  # F families
    by_size = targets.bincount().argsort(stable=True)  # classes, the rarest first
    rank_of_class = by_size.argsort()
    rank = torch.full_like(names, len(by_size))
    rank = rank.scatter_reduce(0, family, rank_of_class[targets], "amin")  # of the rarest class
    shuffled = torch.randperm(len(names), generator=seeded("parts", 0, 0))
    order = shuffled[by_size[rank][shuffled].argsort(stable=True)]
    part = torch.zeros_like(names)
    part[order] = torch.arange(len(names)) % PARTS
    return part[family]


def class_weights(targets: Tensor) -> Tensor:
    """Return weights of M images by which each class counts the same: (M,) float64, sum 1."""
    weights = 1 / torch.bincount(targets)[targets].double()
    return weights / weights.sum()


def fit_calibration(
    logits: Tensor, targets: Tensor, log_share: Tensor, expected_shift: float
) -> Calibration:
    """Fit scale and shift by the lowest cross entropy of (M, C) logits, classes counting the same.

    A prior worth `PRIOR` images holds them near a scale of 1, and the expected shift times that.
    """
    if not len(targets):
        return Calibration(1.0, expected_shift)
    logits = logits.double()
    weights = class_weights(targets)
    # A class without images would best never be predicted: it counts as if it had half an image.
    counts = torch.bincount(targets, minlength=logits.shape[1]).clamp(min=0.5)
    prior = PRIOR * (1 / counts).mean() / len(counts)  # by the effective sample size (Kish 1965)
    share_std = max(log_share.double().std(correction=0).item(), 0.05)  # smaller ones shift little
    shares = log_share.double() / share_std
    parameters = torch.tensor(
        [1.0, expected_shift * share_std], dtype=torch.float64, requires_grad=True
    )
    optimizer = torch.optim.LBFGS([parameters], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        scale, shift = parameters
        losses = F.cross_entropy(scale * logits - shift * shares, targets, reduction="none")
        distance = (scale - 1) ** 2 + (shift - expected_shift * share_std * scale) ** 2
        value = weights @ losses + prior * distance
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    scale, shift = parameters.tolist()
    if scale < LEAST_SCALE:  # a network worse than chance is not inverted: it knows nothing
        return Calibration(LEAST_SCALE, expected_shift * LEAST_SCALE)
    return Calibration(scale, shift / share_std)


# ----------------------------------------------------------------------------------------- results


def describe_run(settings: Settings, data: Data, compute: Compute) -> dict[str, str]:
    """Return a description of a run, for config.json and the page."""
    counts = data.counts(data.train_indices(0))
    versions = [f"{each.__name__} {each.__version__}" for each in (torch, torchvision, np, PIL)]
    evaluated, tested = data.eval_mask[:-1].sum(), data.eval_mask[-1].sum()
    networks = f"{settings.folds} networks" if settings.folds > 1 else "the network"
    return {
        "network": f"{settings.folds} x {settings.arch}, from {settings.weights}",
        "device": f"{compute.device}, {settings.precision}, processes: {compute.world_size}",
        "training images": f"{counts.sum()} in {len(counts)} classes of {counts.max()} to "
        f"{counts.min()}, imbalance ratio {counts.max() / counts.min():.1f}"
        + ("; those of the first fold" if settings.folds > 1 else ""),
        "validation images": f"{evaluated}, each for a network that was not trained on it",
        "test images": f"{tested}, for the ensemble" if settings.folds > 1 else "none",
        "left out": f"{len(data.unreadable)} unreadable images, {data.leaks} leaks from training",
        "kept": f"{networks} at the point of lowest validation loss on the line from linear probe "
        "to fine-tuning",
        "versions": ", ".join([f"python {sys.version.split()[0]}", *versions]),
        **{name: str(value) for name, value in vars(settings).items()},
    }


def list_remarks(folds: int, progress: Progress, kept: Kept, classes: Table) -> list[str]:
    """Return sentences that must be read with the result: which point is kept, what is missing."""
    finished = len(progress.finished)
    remarks = []
    if progress.seen:
        remarks.append(
            f"The result is too good: the network of --weights was trained on {progress.seen} of "
            "the validation images"
        )
    if finished < folds:
        remarks.append(f"Unfinished: {finished} of {folds} networks are trained to the end")
    if kept.point is not None:
        images = len(kept.evaluation.eval_set.targets)
        remarks.append(
            f"Kept point: {kept.point:g} of the way from linear probe (0) to fine-tuning (1), by "
            f"the lowest validation loss on {images} images"
        )
    if folds > 1:
        remarks.append("These are results of single networks; the ensemble is usually better")
    if missing := [row["class"] for row in classes if not row["val_images"]]:
        remarks.append(
            f"Classes without a validation image: {len(missing)}, the first is {missing[0]}; "
            "nothing here says how well they are recognised"
        )
    return remarks


def make_tables(outcome: Outcome) -> dict[str, bytes]:
    """Return config.json and the tables of a run, by the names of their files."""
    data, kept = outcome.data, outcome.kept
    config: dict[str, Any] = {"settings": vars(outcome.settings), "classes": data.classes}
    config |= {"kept_point": kept.point, "facts": outcome.facts}
    config |= {"left_out": data.unreadable, "white": data.white, "version": __version__}
    sides = [("result", "", kept.evaluation, outcome.classes)]
    if outcome.tested:
        draws = [row["draws"] for row in outcome.classes]
        rows = list_classes(data.classes, draws, outcome.tested)
        sides.append(("test", "test_", outcome.tested, rows))
    tables = {
        "history.csv": outcome.history,
        "line.csv": kept.line,
        "comparison.csv": outcome.changes,
    }
    for name, prefix, evaluation, classes in sides:
        summary = evaluation.summary.items()
        config[name] = {key: None if math.isnan(x) else x for key, x in summary}
        tables[f"{prefix}classes.csv"] = classes
        tables[f"{prefix}predictions.csv"] = list_predictions(data, evaluation)
        confusion = add_classes({"class": data.classes}, data.classes, evaluation.confusion)
        tables[f"{prefix}confusion.csv"] = to_rows(confusion)
    files = {name: format_table(rows) for name, rows in tables.items() if rows}
    return files | {"config.json": json.dumps(config, indent=1, default=str).encode()}


def list_predictions(data: Data, evaluation: Evaluation) -> Table:
    """Return a row for each image, those first whose labels may be wrong: the least probable."""
    columns = {
        "path": [data.files[index].name for index in evaluation.eval_set.indices.tolist()],
        "class": [data.classes[label] for label in evaluation.eval_set.targets.tolist()],
        "predicted": [data.classes[label] for label in evaluation.predicted.tolist()],
        "probability": evaluation.probabilities.amax(1),
        "true_probability": (-evaluation.losses).exp(),
    }
    table = to_rows(add_classes(columns, data.classes, evaluation.probabilities))
    return sorted(table, key=lambda row: row["true_probability"])


def add_classes(columns: Mapping[str, Any], classes: list[str], values: Tensor) -> dict[str, Any]:
    """Add the columns of (M, C) values, called as the class, or "class NAME" if that is taken."""
    added = dict(columns)
    for name, column in zip(classes, values.T, strict=True):
        title = name
        while title in columns or (title != name and title in classes):
            title = f"class {title}"
        added[title] = column
    return added


def list_classes(names: list[str], draws: Any, evaluation: Evaluation) -> Table:
    """Return a row for each class, with NaN for what is not known."""
    eval_set, confusion = evaluation.eval_set, evaluation.confusion
    train_counts = evaluation.shares.train_counts
    effective, families = effective_counts(eval_set, len(names))
    recall = recall_by_class(confusion)
    _, low, high = mean_interval(recall, effective, torch.eye(len(names)))
    return to_rows({
        "class": names,
        "train_images": train_counts.round().long(),
        "val_images": confusion.sum(1),
        "draws": draws,
        "recall": recall,
        # With one image all is possible, 0 to 1; without any the factor keeps NaN.
        "low": low.where(effective > 1, 0.0 * recall),
        "high": high.where(effective > 1, 0.0 * recall + 1),
        "precision": recall_by_class(confusion.T) + 0.0 * recall,  # NaN if never predicted, too
        "auc": auc_by_class(evaluation.probabilities, eval_set.targets),
        "precision_in_use": precision_in_use(confusion, train_counts),
        "false_answers": confusion.sum(0) - confusion.diag(),
        "families": families,
        "effective_images": effective.round().long(),
    })  # fmt: skip


HEADER = (
    "fold   epoch  step          train loss  val loss  accuracy  balanced [95 %]       as trained"
    "    many  medium     few  images/s   left"
)


def print_start(settings: Settings, facts: dict[str, str], history: Table) -> None:
    """Print the description of a run, and the epochs that are done."""
    print(printable(f"{facts['network']}; {facts['device']}; {facts['training images']}"))
    names = ("validation images", "test images", "left out")
    print(printable("; ".join(f"{name}: {facts[name]}" for name in names)))
    print("", HEADER, *(format_epoch(row, settings) for row in history), sep="\n", flush=True)


def format_epoch(row: dict[str, Any], settings: Settings) -> str:
    """Return the line of an epoch, as wide as `HEADER`, with the time left if all take as long."""
    numbers = {key: value for key, value in row.items() if isinstance(value, float)}
    cells = {key: "-" if math.isnan(x) else f"{x:.1%}" for key, x in numbers.items()}
    epochs = settings.epochs * (settings.folds - row["fold"] + 1) - row["epoch"]
    hours, minutes = divmod(round(row["seconds"] * epochs / 60), 60)
    left = f"{hours}h{minutes:02}" if row["epoch"] else "-"  # the linear probe is no measure of it
    return (
        f"{row['fold']:2}/{settings.folds:<2} {row['epoch']:3}/{settings.epochs:<3} "
        f"{row['step']:12}  {row['train_loss']:10.3f}  {row['val_loss']:8.3f}  "
        f"{cells['accuracy']:>8}  {format_range(row):<20}  "
        f"{cells['as_trained_balanced_accuracy']:>10}  {cells['many']:>6}  {cells['medium']:>6}  "
        f"{cells['few']:>6}  {row['images_per_second']:8.1f}  {left:>5}"
    )


def format_recall(row: dict[str, Any]) -> str:
    """Return the recall of a class with its interval, its images, and its name."""
    text = f"{row['recall']:8.1%} [{row['low']:.0%}, {row['high']:.0%}] of {row['val_images']}"
    return f"{text:26} {row['class']}"


def print_end(outcome: Outcome) -> None:
    """Print the result, the classes of lowest recall, and where everything else is."""
    summary = outcome.kept.evaluation.summary
    lines = ["", "point  val loss  balanced [95 %]   from linear probe (0) to fine-tuning (1)"]
    for row in outcome.kept.line:
        end = "  kept" if row["kept"] else ""
        lines.append(f"{row['point']:5.2f}  {row['val_loss']:8.3f}  {format_range(row)}{end}")
    lines += ["", f"balanced accuracy {format_range(summary)}"]
    lines.append(f"as trained        {summary['as_trained_balanced_accuracy']:.1%}")
    if outcome.tested:
        lines.append(f"untouched test    {format_range(outcome.tested.summary)}")
    lines += [*outcome.remarks, "Lowest recall:"]
    validated = [row for row in outcome.classes if row["val_images"]]
    lines += map(format_recall, sorted(validated, key=lambda row: row["recall"])[:3])
    lines += [format_change(row, outcome.settings.baseline) for row in outcome.changes]
    lines.append(f"Everything else is in {outcome.settings.output}, see report.html there")
    print(*map(printable, lines), sep="\n")


def format_change(row: dict[str, Any], baseline: Path | None) -> str:
    """Return a sentence on how a measure has changed since the baseline."""
    points = [f"{100 * row[name]:+.1f}" for name in ("difference", "low", "high")]
    chance = "within the chance of these images"
    if row["more_than_chance"] == "yes":
        chance = "more than the chance of these images; another seed may change it as much"
    return (
        f"{row['measure']:17} {row['before']:.1%} in {baseline}, now {row['after']:.1%}: "
        f"{points[0]} points [{points[1]}, {points[2]}], {chance}"
    )


# -------------------------------------------------------------------------------------------- page

MISTAKES = 24  # images that are shown, at most
THUMBNAIL = 160  # pixels a side
TERMS = {
    "balanced accuracy": "The mean recall of the classes.",
    "many, medium, few": "The mean recall of the classes of over 100, of 20 to 100, and of under "
    "20 training images.",
    "intervals, bars": "95 %, over images. Another training can change a figure by more.",
    "kept point": "It is chosen on the validation images, so that their figures are a little too "
    "good.",
    "calibration": "Logits times a scale, minus a shift times the log of the class's share. Here "
    "both are fitted on other images than those that they are applied to. For --predict they are "
    "fitted on all, so that its probabilities differ a little.",
    "precision in use": "The precision where classes are as frequent as in training.",
    "AUC": "How often an image of the class has a higher probability of it than another image.",
}
STYLE = """:root{color-scheme:light dark;background:Canvas;color:CanvasText;font:16px/1.5 system-ui,
sans-serif}body{max-width:1150px;margin:auto;padding:8px 14px 64px;overflow-wrap:anywhere}h2{
margin-top:44px;border-top:1px solid #8884;padding-top:18px}p,dd{max-width:78ch}dt{font-weight:600}
small{opacity:.75}.tiles,.pairs{display:grid;gap:14px;margin:20px 0;
grid-template-columns:repeat(auto-fit,minmax(170px,1fr))}.tiles div{padding:10px 14px;
border-left:4px solid #3987c9;background:#8881}div>b,small{display:block}.tiles b{font-size:30px}
.pairs{grid-template-columns:repeat(auto-fill,minmax(290px,1fr))}figure{display:grid;margin:0;
gap:8px;grid-template-columns:1fr 1fr;break-inside:avoid}img{width:100%}.wide{overflow-x:auto}table{
border-collapse:collapse;font-size:14px}td{padding:5px 0 5px 14px;text-align:right;
white-space:nowrap;border-bottom:1px solid #8883}tr:first-child td{white-space:normal;
overflow-wrap:normal;vertical-align:bottom}td:first-child{text-align:left;white-space:normal;
min-width:12ch;max-width:40vw}td[style]{min-width:14ch;background:linear-gradient(90deg,
#0000 var(--low),#3987c966 0,#3987c966 var(--high),#0000 0)}svg{width:100%;max-width:800px;
overflow:visible}text{fill:currentColor;font-size:14px}polyline{fill:none;stroke:currentColor;
stroke-width:2;vector-effect:non-scaling-stroke}.old{color:#e08214}.new{color:#3987c9}"""


def make_page(outcome: Outcome) -> bytes:
    """Return the page of a run, which is one file without scripts."""
    evaluation = outcome.kept.evaluation
    notes = TERMS | outcome.facts
    facts = "".join(f"<dt>{show(name)}</dt><dd>{show(fact)}</dd>" for name, fact in notes.items())
    sections = {
        "Compared with the baseline": show_changes(outcome.changes),
        "Classes": show_rows(sorted(outcome.classes, key=lambda row: -row["train_images"])),
        "Mistakes": show_mistakes(outcome.data, evaluation),
        "Confusions": show_confusions(outcome.data.classes, evaluation.confusion),
        "Training": show_training(outcome.history),
        "From linear probe (0) to fine-tuning (1)": show_line(outcome.kept.line),
        "How this was measured": f"<dl>{facts}</dl>",
    }
    title = show(outcome.settings.data.name)
    page = '<!DOCTYPE html><html lang="en"><meta charset="utf-8">'
    page += '<meta name="viewport" content="width=device-width">'
    page += f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>{show_result(outcome)}"
    page += "".join(f"<h2>{name}</h2>{text}" for name, text in sections.items() if text)
    return f"{page}</html>\n".encode(errors="backslashreplace")


def show_result(outcome: Outcome) -> str:
    """Return the remarks, and tiles: the result, the most frequent, rarest and worst class."""
    summary = outcome.kept.evaluation.summary
    tiles = {"balanced accuracy": format_range(summary)}
    if outcome.tested:
        tiles["untouched test"] = format_range(outcome.tested.summary)
    tiles["as trained"] = f"{summary['as_trained_balanced_accuracy']:.1%} before calibration"
    validated = [row for row in outcome.classes if row["val_images"]]
    named = {
        "most frequent class": max(validated, key=lambda row: row["train_images"]),
        "rarest class": min(validated, key=lambda row: row["train_images"]),
        "lowest recall": min(validated, key=lambda row: row["recall"]),
    }
    for name, row in named.items():
        tiles[name] = f"{row['recall']:.1%} [{row['low']:.0%}, {row['high']:.0%}] {row['class']}"
    text = "".join(f"<p>{show(line)}.</p>" for line in outcome.remarks)
    text += '<div class="tiles">'
    for name, value in tiles.items():
        number, _, note = value.partition(" ")
        text += f"<div>{name}<b>{show(number)}</b><small>{show(note)}</small></div>"
    return f"{text}</div>"


def show(value: Any) -> str:
    """Return a fraction in per cent, NaN as a dash, and all else as escaped text."""
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{100 * value:.1f}\u00a0%"
    return html.escape(printable(str(value)))


def show_training(history: Table) -> str:
    """Return charts of loss and balanced accuracy by epoch, of which 0 is the linear probe."""
    loss = ("Loss (orange: training, blue: validation)", "train_loss", "val_loss")
    title = "Balanced accuracy (orange: as trained, blue: calibrated)"
    results = (title, "as_trained_balanced_accuracy", "balanced_accuracy")
    return curve_chart(history, *loss) + curve_chart(history, *results)


def show_line(line: Table) -> str:
    """Return a table of the results at the points of the line."""
    names = ("val_loss", "balanced_accuracy", "many", "medium", "few")
    rows = []
    for row in line:
        cells = {"point": f"{row['point']:g}", "val_loss": f"{row['val_loss']:.3f}"}
        cells |= {name: row[name] for name in names[1:]}
        rows.append(cells | {"": "kept" if row["kept"] else ""})
    return show_rows(rows)


def curve_chart(history: Table, title: str, before: str, after: str) -> str:
    """Return a chart of two columns by epoch, orange and blue, a line for each fold: SVG."""
    values = [row[key] for row in history for key in (before, after)]
    low, high = min(values), max(values) + 1e-9
    epochs = [row["epoch"] for row in history]
    width = max(1, max(epochs) - min(epochs))
    body = f'<text y="14">{title}: from {low:.3g} to {high:.3g}, epochs {min(epochs)} to '
    body += f'{max(epochs)}</text><svg y="24" height="160" preserveAspectRatio="none" '
    body += f'viewBox="{min(epochs)} {-high} {width} {high - low}">'
    for kind, key in (("old", before), ("new", after)):
        for fold in {row["fold"] for row in history}:
            rows = [row for row in history if row["fold"] == fold]
            points = " ".join(f"{row['epoch']},{-row[key]:.6g}" for row in rows[:1] + rows)
            body += f'<polyline class="{kind}" points="{points}"/>'
    return f'<svg height="210">{body}</svg></svg>'


def show_changes(changes: Table) -> str:
    """Return a table of what changed since the baseline, with differences in points."""
    rows = []
    for row in changes:
        points = {name: f"{100 * row[name]:+.1f} points" for name in ("difference", "low", "high")}
        rows.append(row | points)
    return show_rows(rows)


def show_rows(rows: Table) -> str:
    """Return a table of rows with the same columns, with a bar for the interval of a recall."""
    if not rows:
        return ""
    names = "".join(f"<td>{show(name.replace('_', ' '))}</td>" for name in rows[0])
    body = f"<tr>{names}</tr>"
    for row in rows:
        body += "<tr>"
        for name, cell in row.items():
            style = ""
            if name == "recall" and row["val_images"]:
                style = f' style="--low:{row["low"]:.1%};--high:{row["high"]:.1%}"'
            body += f"<td{style}>{show(cell)}</td>"
        body += "</tr>"
    return f'<div class="wide"><table>{body}</table></div>'


def show_confusions(classes: list[str], confusion: Tensor) -> str:
    """Return a table of the classes that are most often mistaken for each other."""
    wrong = confusion.clone().fill_diagonal_(-1).flatten()
    worst = wrong.argsort(descending=True, stable=True)[: int((wrong > 0).sum())]
    rows = []
    for pair in worst[:20].tolist():
        true, predicted = divmod(pair, len(classes))
        share = f"{wrong[pair]} of {confusion[true].sum()}"
        rows.append({"class": classes[true], "predicted": classes[predicted], "images": share})
    return show_rows(rows)


def show_mistakes(data: Data, evaluation: Evaluation) -> str:
    """Return the images that are wrong with the most confidence, each beside a training image."""
    wrong = (evaluation.predicted != evaluation.eval_set.targets).nonzero().flatten()
    confidence = evaluation.probabilities.amax(1)
    order = confidence[wrong].argsort(descending=True, stable=True)
    text = ""
    for row in wrong[order][:MISTAKES].tolist():
        index = int(evaluation.eval_set.indices[row])
        predicted = int(evaluation.predicted[row])
        trained = data.train_indices(int(evaluation.eval_set.folds[row]))
        examples = trained[data.labels[trained] == predicted]
        example = int(examples[len(examples) // 2])
        relation = f"predicted ({show(confidence[row].item())})"
        text += f"<figure>{show_image(data, index, 'is', int(data.labels[index]))}"
        text += f"{show_image(data, example, relation, predicted)}</figure>"
    title = "Wrong with the most confidence, beside a training image of the predicted class."
    return text and f'<p>{title}</p><div class="pairs">{text}</div>'


def show_image(data: Data, index: int, relation: str, label: int) -> str:
    """Return the image at an index of `data`, its relation to a class, and the class."""
    picture = ""
    with contextlib.suppress(DataError):  # the page is made without a picture that is gone
        image = read_image(data.files[index].path, data.white, THUMBNAIL)
        pixels = whole_image(image, THUMBNAIL)
        content = io.BytesIO()
        v2.functional.to_pil_image(pixels).save(content, "JPEG", quality=80)
        encoded = base64.b64encode(content.getvalue()).decode()
        picture = f'<img alt="" src="data:image/jpeg;base64,{encoded}">'
    return f"<div>{picture}<small>{relation}</small><b>{show(data.classes[label])}</b></div>"


# -------------------------------------------------------------------------------------- run folder

START = "start.pt"  # the network that all folds begin with
IN_STATE = (
    "seen",
    "draws",
    "history",
    "head",
    "trainer",
)  # fields of `Progress` in the file `STATE`
PATHS = ("data", "val", "source", "output", "baseline")  # fields of `Settings` that are paths


def open_run(settings: Settings, options: Options, compute: Compute) -> Opened:
    """Return the settings of a run, its images, and what is read from files before it begins."""
    if options.resume:
        return reopen_run(options.resume, compute.precision if options.amp is not None else None)
    check_paths(settings)
    listing = list_data(settings.data, settings.val, settings.source)
    weights = read_weights(settings.weights)
    default_arch = "resnet18" if compute.device.type == "cpu" else "resnet50"
    arch = settings.arch or weights.get("arch", default_arch)
    images = sum(file.part == "train" for file in listing[1])
    if settings.folds > 1:
        images -= round(images / settings.folds)
    elif not settings.val:
        images -= round(images * VAL_FRACTION)
    size = settings.batch_size or (BATCH if images >= SMALL else BATCH // 2)
    paths = {name: path.resolve() for name in PATHS if (path := getattr(settings, name))}
    settings = replace(
        settings,
        **paths,
        arch=arch,
        image_size=settings.image_size or weights.get("image_size", 224),
        weights=check_weights(settings.weights, weights, arch),
        batch_size=math.ceil(size / compute.world_size) * compute.world_size,
        precision=compute.precision,
    )
    return Opened(settings, listing, weights, state={})


def reopen_run(folder: Path, precision: str | None) -> Opened:
    """Return the same of a stopped run, which goes on in another `precision` if one is named."""
    if (folder / STATE).exists():
        lock_folder(folder, "--resume")
    if not (folder / STATE).exists():  # or no more: another process has finished the run
        raise DataError(
            f"--resume {folder}: there is no stopped run in it, or the run is complete; name the "
            "folder of a run that was stopped"
        )
    state = load_tensors(folder / STATE, "--resume")
    check_format(folder / STATE, state, "--resume")
    chosen = state["settings"] | {"output": folder}
    if precision:
        chosen["precision"] = precision
    chosen |= {name: Path(path).resolve() for name in PATHS if (path := chosen[name])}
    settings = Settings(**chosen)
    listing = list_data(settings.data, settings.val, settings.source)
    return Opened(settings, listing, weights={}, state=state)


def check_paths(settings: Settings) -> None:
    """Raise `DataError` where the paths of a command line cannot be used."""
    output, baseline = settings.output, settings.baseline
    check_output(output)
    if baseline and ((baseline / STATE).exists() or not (baseline / NETWORK).exists()):
        raise DataError(
            f"--baseline {baseline}: there is no finished run in it; name another folder"
        )
    sources = {"DATA": settings.data, "--source": settings.source, "--val": settings.val}
    for name, folder in sources.items():
        if folder and not folder.is_dir():
            raise DataError(
                f"{name} {folder}: this folder does not exist; pass one that holds class folders"
            )
        if folder and output.resolve().is_relative_to(folder.resolve()):
            raise DataError(
                f"--output {output}: this is inside {folder}, where it would be taken for a class; "
                "name a folder outside it"
            )


def check_output(output: Path) -> None:
    """Raise `DataError` unless a new run may begin in a folder.

    It may where another one ended before its first state: a lock is there, but nothing to go on.
    """
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    is_begun = LOCK in names and names <= {LOCK, COPIES, START, "split.csv"}
    is_empty = not any(name[0] != "." for name in names)
    if output.is_file() or not (is_empty or is_begun):
        raise DataError(
            f"--output {output}: this is not an empty folder; name a new one, or go on with the "
            "run in it by --resume"
        )


def load_progress(opened: Opened, data: Data) -> Progress:
    """Return how far a stopped run has come, or begin to store a new one."""
    settings, state = opened.settings, opened.state
    output = settings.output
    if not state:
        start = load_model(settings, data.classes, opened.weights).state_dict()
        lock_folder(output, "--output")
        check_output(output)  # again, since another run may have begun there meanwhile
        shutil.rmtree(output / COPIES, ignore_errors=True)  # a killed run may have left others
        write_file(output / "split.csv", format_table(list_split(data)))
        save_tensors(output / START, start)
        draws = torch.zeros(len(data.classes), dtype=torch.int64)
        return Progress(start, count_seen(settings, data, opened.weights), draws)
    # An image that went from one folder to another has its old name and digest.
    if changed := find_difference(list_split(data), read_table(output / "split.csv"), "part"):
        raise DataError(
            f"{settings.data}: {changed} is gone, new or changed since the run began; restore it "
            "as it was, or start a new run"
        )
    start = load_tensors(output / START, "--resume")
    progress = Progress(start, **{name: state[name] for name in IN_STATE})
    for fold in range(settings.folds):
        file = output / f"fold-{fold + 1}.pt"
        if progress.has_done(fold + 1, 0) and not file.exists():
            raise DataError(f"--resume {file}: this file is gone; restore it, or start a new run")
        if progress.has_done(fold, settings.epochs) and file.exists():
            progress.finished.append(FoldResult(**load_tensors(file, "--resume")))
    return progress


def count_seen(settings: Settings, data: Data, weights: Stored) -> int:
    """Count the validation images that the network of `--weights` was trained on, and warn."""
    evaluated = data.eval_mask.any(0)
    seen = evaluated & find_trained(data.files, data.digests, weights)
    if seen.any():
        print_warning(
            f"--weights {settings.weights}: this network was trained on {seen.sum()} of the "
            f"{evaluated.sum()} validation images, so that results are too good"
        )
    return int(seen.sum())


def state_of(settings: Settings, progress: Progress) -> dict[str, Any]:
    """Return the content of `STATE`; `START` and the files of folds hold the rest of a run."""
    stored: dict[str, Any] = {name: getattr(progress, name) for name in IN_STATE}
    chosen = vars(settings).items()
    stored["settings"] = {k: str(v) if isinstance(v, Path) else v for k, v in chosen}
    return stored | {"format": FORMAT, "version": __version__}


def remove_state(output: Path) -> None:
    """Remove from the folder of a finished run what it took to go on."""
    for name in (STATE, START, LOCK, "fold-*.pt"):
        for file in output.glob(name):
            with contextlib.suppress(PermissionError):  # Windows does not remove open files
                file.unlink()
    shutil.rmtree(output / COPIES, ignore_errors=True)


def describe_networks(settings: Settings, data: Data, kept: Kept) -> dict[str, Any]:
    """Return all that it takes to use the networks of a run: the content of `NETWORK`.

    The images and groups that they were trained on are stored as digests: names may be patients'.
    """
    trained = data.train_mask.any(0).nonzero().flatten()
    names = {group_name(data.files[index].name, settings.group) for index in trained.tolist()}
    digests = [digest_of(name.encode(errors="surrogateescape")) for name in names if name]
    calibration = kept.evaluation.calibration.of_networks(len(kept.networks))
    counts = data.fold_counts()[: len(kept.networks)].double()
    return {
        "format": FORMAT,
        "version": __version__,
        "arch": settings.arch,
        "classes": data.classes,
        "train_images": counts.mean(0).round().long().tolist(),
        "natural": centred_log(counts).mean(0),  # log shares, which `--natural` adds to logits
        "image_size": settings.image_size,
        "white": data.white,
        "group": settings.group,
        "trained_on": torch.cat([data.digests[trained], torch.tensor(digests).long()]).unique(),
        "scale": calibration.scale,
        "shift": calibration.shift,
        "networks": kept.networks,  # as trained, before calibration
    }


def list_split(data: Data) -> Table:
    """Return a row for each image: its class, its part of the data, 16 digits of its SHA-256."""
    folds = len(data.train_mask)
    names = [*(f"fold {fold}" for fold in range(1, folds + 1)), "test"]
    columns = data.files, data.digests.tolist(), data.eval_mask.T.tolist()
    table = []
    for file, digest, is_evaluated in zip(*columns, strict=True):
        part = file.part
        if any(is_evaluated) and folds > 1:
            part = names[is_evaluated.index(True)]
        elif any(is_evaluated) and part == "train":
            part = "val"
        row = {"path": file.name, "class": data.classes[file.label], "part": part}
        table.append(row | {"digest": f"{digest % 2**64:016x}"})
    return table


def load_baseline(folder: Path | None, data: Data) -> Tensor:
    """Return what an earlier run predicted for the same validation images: (M,) int64."""
    if not folder:
        return torch.empty(0)
    tables = [list_split(data), read_table(folder / "split.csv")]
    own, other = ([row for row in rows if row["part"] not in ("train", "test")] for rows in tables)
    if different := find_difference(own, other):
        raise DataError(
            f"--baseline {folder}: this run was evaluated on other images, the first is "
            f"{different}; give both runs the same DATA and flags"
        )
    labels = {name: label for label, name in enumerate(data.classes)}
    rows = read_table(folder / "predictions.csv")
    if unknown := {row["predicted"] for row in rows} - labels.keys():
        raise DataError(
            f"--baseline {folder}: this run predicts the class {min(unknown)}, which DATA lacks; "
            "give both runs the same DATA"
        )
    predicted = {row["path"]: labels[row["predicted"]] for row in rows}
    fold_by_fold = data.eval_mask[:-1].nonzero()[:, 1].tolist()
    return torch.tensor([predicted[data.files[index].name] for index in fold_by_fold])


def find_difference(one: Table, other: Table, *columns: str) -> str:
    """Return the path of the first image that only one of two splits has, "" if there is none.

    Images are the same if path and digest are, and what is in these further columns.
    """
    names = ("path", "digest", *columns)
    sides = [{tuple(row[name] for name in names) for row in rows} for rows in (one, other)]
    return min(sides[0] ^ sides[1], default=("",))[0]


# -------------------------------------------------------------------------------------------- data

VAL_FRACTION = 0.2  # part of each class that is kept for validation


def load_data(settings: Settings, listing: Listing) -> Data:
    """Read the listed images, split them into training and validation, and leave out leaks."""
    classes, files = listing
    checked, brightest = check_images([file.path for file in files])
    unreadable = [file.path for file in files if file.path not in checked]
    files = [file for file in files if file.path in checked]
    if not files:
        raise DataError(f"{settings.data}: none of the images can be read; pass other images")
    digests = torch.tensor([checked[file.path] for file in files])
    families = find_families(files, digests.tolist(), settings.group)
    if settings.group is not None:
        check_group(settings.group, files, families)
    train_mask, eval_mask = assign_images(settings, files, families)
    is_own = torch.tensor([file.part == "train" for file in files])
    leaks = ~is_own & torch.isin(families, families[train_mask.any(0)])
    if leaks.any():
        first = files[int(leaks.nonzero()[0])].path
        print_warning(
            f"{leaks.sum()} validation images are copies of training images, or of their group, "
            f"and are left out; the first is {first}"
        )
    remaining = (~leaks).nonzero().flatten()
    data = Data(
        classes=classes,
        files=[files[index] for index in remaining.tolist()],
        labels=torch.tensor([file.label for file in files])[remaining],
        train_mask=train_mask[:, remaining],
        eval_mask=eval_mask[:, remaining],
        families=families[remaining],
        digests=digests[remaining],
        white=find_white(brightest),
        leaks=int(leaks.sum()),
        unreadable=unreadable,
    )
    if pairs := list_contradictions(data):
        print_warning(
            f"{len(pairs)} images are copies of an image in another class, the first are "
            f"{' and '.join(pairs[0])}; all are used"
        )
    check_parts(settings, data)
    return data


def check_parts(settings: Settings, data: Data) -> None:
    """Raise `DataError` if there is nothing to train on, or to validate on."""
    for fold in range(settings.folds):
        absent = (data.counts(data.train_indices(fold)) == 0).nonzero().flatten().tolist()
        if absent:
            raise DataError(
                f"{settings.data}: {data.classes[absent[0]]}: this class has no readable image "
                "left to train on; add images, or remove the class"
            )
        if not data.eval_mask[fold].any():
            message = f"{settings.data}: no image is left to validate on; pass some by --val"
            if settings.folds > 1:
                message = f"--folds {settings.folds}: there are too few images; take fewer folds"
            elif settings.val:
                message = (
                    f"--val {settings.val}: it has no image to validate on; pass another folder"
                )
            raise DataError(message)


def list_contradictions(data: Data) -> list[tuple[str, str]]:
    """Return pairs of names of images that are the same, byte by byte, but in different classes."""
    first: dict[int, ImageFile] = {}
    pairs = []
    for file, digest in zip(data.files, data.digests.tolist(), strict=True):
        other = first.setdefault(digest, file)
        if other.label != file.label:
            pairs.append((other.name, file.name))
    return pairs


def check_batches(settings: Settings, data: Data, world_size: int) -> None:
    """Raise `DataError` if some process would train on too few images for BatchNorm."""
    images = data.train_mask.sum(1).tolist()  # of each fold
    smallest = min(n // math.ceil(n / settings.batch_size) for n in images) // world_size
    if smallest < (2 if settings.image_size <= STRIDE else 1):
        raise DataError(
            f"--batch-size {settings.batch_size}: a step has too few images a process for batch "
            "normalisation; choose a larger number, or fewer processes"
        )


def list_data(data: Path, val: Path | None, source: Path | None) -> Listing:
    """List the classes, and the images of DATA, `--val` and `--source`, each with its part."""
    classes = list_folders(data)
    files = list_class_images(data, classes, "train")
    subfolders = defaultdict(set)  # of each class, those that hold images; "" is the class itself
    for file in files:
        name, *below, _ = file.name.split("/")
        subfolders[name].add(below[0] if below else "")
    if len(parts := find_parts(subfolders)) > 1:
        raise DataError(
            f"{data}: {parts[0]} and {parts[1]} look like parts of a data set, not like classes; "
            f"run data_training.py {data / parts[0]} --val {data / parts[1]}"
        )
    empty = sorted(set(classes).difference(classes[file.label] for file in files))
    if empty or len(classes) < 2:
        advice = f"fill or remove {empty[0]}" if empty else "pass the folder that holds them"
        raise DataError(
            f"{data}: at least two class folders are needed, with images in each; {advice}"
        )
    names = {file.name for file in files}
    for part, folder in (("val", val), ("source", source)):
        if folder:
            if unknown := sorted(set(list_folders(folder)).difference(classes)):
                raise DataError(
                    f"--{part} {folder}: these folders are no classes of DATA: "
                    f"{', '.join(unknown)}; rename or remove them"
                )
            others = list_class_images(folder, classes, part)
            files += [file for file in others if part == "val" or file.name not in names]
    return classes, files


def list_class_images(root: Path, classes: list[str], part: str) -> list[ImageFile]:
    """List the images in the class folders of `root` as `ImageFolder` does; count other files."""
    files, others = list_images(root, classes, part)
    others += [file.name for file in files if file.label < 0]
    if others:
        print_warning(
            f"{root}: {len(others)} files are no images or in no class folder, and are left out; "
            f"the first is {min(others)}"
        )
    files = [file for file in files if file.label >= 0]
    return sorted(files, key=lambda file: (file.label, os.path.split(file.path)))


def list_images(root: Path, classes: list[str], part: str) -> tuple[list[ImageFile], list[str]]:
    """List the images below `root`, labelled by their folder, -1 in no class, and other files."""
    labels = {name: label for label, name in enumerate(classes)}
    files = []
    others = []
    for path, is_image in walk_files(str(root)):
        name = path.removeprefix(str(root)).replace(os.sep, "/").lstrip("/")
        folder, _, below = name.partition("/")
        if is_image:
            label = labels.get(folder, -1) if below else -1
            files.append(ImageFile(path, name, label, part))
        elif not os.path.basename(path).startswith("."):
            others.append(name)
    return files, others


def group_name(name: str, pattern: str | None) -> str:
    """Return what a pattern matches in the path of an image below its class, or ""."""
    match = re.search(pattern, name.partition("/")[2]) if pattern else None
    return (match[min(1, match.re.groups)] or "") if match else ""


def find_trained(files: list[ImageFile], digests: Tensor, weights: Stored) -> Tensor:
    """Return which images, or others of their group, a run's network was trained on: (N,) bool."""
    trained = weights.get("trained_on", digests[:0])
    names = [group_name(file.name, weights.get("group")) for file in files]
    groups = [digest_of(name.encode(errors="surrogateescape")) if name else 0 for name in names]
    return torch.isin(digests, trained) | torch.isin(torch.tensor(groups), trained)


def find_families(files: list[ImageFile], digests: Sequence[int], pattern: str | None) -> Tensor:
    """Return the number of each image's family: copies, and images of the same group."""
    parent: dict[Any, Any] = {}  # union-find: a forest in which each tree is a family

    def root(key: Any) -> Any:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    for file, digest in zip(files, digests, strict=True):
        if name := group_name(file.name, pattern):
            parent[root(digest)] = root(name)
    numbers: dict[Any, int] = {}
    return torch.tensor([numbers.setdefault(root(digest), len(numbers)) for digest in digests])


def check_group(pattern: str, files: list[ImageFile], families: Tensor) -> None:
    """Print what `--group` has matched, or raise `DataError` if that is of no use."""
    unmatched = [group_name(file.name, pattern) for file in files].count("")
    families_found = len(families.unique())
    found = f"--group {pattern}: {families_found} families; images that do not match: {unmatched}"
    if unmatched == len(files) or families_found == 1:
        raise DataError(f"{found}; match what differs in the paths below the class folders")
    print(printable(found), file=sys.stderr)


def assign_images(
    settings: Settings, files: list[ImageFile], families: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the images to train on, (K, N) bool, and to evaluate on, (K + 1, N).

    Images of `--val` and SRC are evaluated, with folds by the ensemble alone. Each fold evaluates
    its share of DATA; without folds that is a fifth. Families stay together.
    """
    folds = settings.folds
    is_own = torch.tensor([file.part == "train" for file in files])
    train_mask = is_own.repeat(folds, 1)
    eval_mask = torch.zeros(folds + 1, len(files), dtype=torch.bool)
    eval_mask[folds if folds > 1 else 0] = ~is_own
    if settings.val and folds == 1:
        return train_mask, eval_mask
    own = is_own.nonzero().flatten()
    candidates = [files[index] for index in own.tolist()]
    labels = np.array([file.label for file in candidates], dtype=np.int64)
    counts = np.bincount(labels).astype(float)
    wanted = np.tile(counts / folds, (folds, 1))
    if folds == 1:  # whole numbers: one image at least to validate, and to train on
        fifth = np.minimum((VAL_FRACTION * counts).round().clip(1), counts - 1)
        wanted = np.stack([counts - fifth, fifth])
    # The order of images depends on their names and the seed alone, not on other images.
    names = [f"{settings.seed}/{file.name}".encode(errors="surrogateescape") for file in candidates]
    order = [hashlib.sha256(name).digest() for name in names]
    parts = assign_parts(labels, families[own].tolist(), order, wanted)
    for fold in range(folds):
        held = own[torch.from_numpy(parts == (fold if folds > 1 else 1))]
        train_mask[fold, held] = False
        eval_mask[fold, held] = True
    return train_mask, eval_mask


def assign_parts(
    labels: np.ndarray, families: Sequence[int], order: Sequence[bytes], wanted: np.ndarray
) -> np.ndarray:
    """Return the part of each image, so that part p gets about `wanted[p, c]` images of class c.

    Families, largest first, then in `order`, go where they most reduce the sum of squared
    differences / wanted. Every part gets every class that has enough families; but for rare cases,
    where families span classes.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for index, family in enumerate(families):
        members[family].append(index)
    groups = sorted(members.values(), key=lambda each: (-len(each), min(order[i] for i in each)))
    left = np.zeros(wanted.shape[1])  # families of each class to come
    for group in groups:
        left[np.unique(labels[group])] += 1
    missing = wanted.copy()  # images of each class that each part still lacks
    parts = np.zeros(len(labels), dtype=int)
    turns = np.arange(len(wanted))
    for group in groups:
        classes, images = np.unique(labels[group], return_counts=True)
        want = wanted[:, classes]
        lack = missing[:, classes]
        # A part without any image of a class is due one, if no more families of the class are left
        # than there are such parts: of 3 families and 3 parts each part gets one.
        is_empty = (lack == want) & (want > 0)
        is_due = is_empty & (is_empty.cumsum(0) <= left[classes])
        is_due &= is_empty.sum(0) >= left[classes]
        with np.errstate(divide="ignore"):
            improvement = (images * (2 * lack - images) / want).sum(1)
        # Ties go to the parts by turns.
        turn = (classes[0] - turns) % len(turns) if len(turns) > 2 else -turns
        best = np.lexsort((turn, improvement, is_due.any(1)))[-1]
        missing[best, classes] -= images
        left[classes] -= 1
        parts[group] = best
    return parts


# ------------------------------------------------------------------------------------------- model

SUPPORTED = (
    "resnet",
    "resnext",
    "wide_resnet",
)  # names of networks begin so; others are unmeasured
# Beginnings of the names of a ResNet's layers, in four groups, the first layers first.
LAYERS = (("conv1.", "bn1.", "layer1."), ("layer2.",), ("layer3.",), ("layer4.", "fc."))
# AdamW changes a weight by about the learning rate, whatever its size, and the weights of different
# files differ a hundredfold. The learning rates are meant for these sizes:
CONV_SCALE = 0.5  # root mean square of the weights of a convolution, times sqrt(fan-in)
FEATURE_SCALE = 2.0  # and of the BatchNorms that add up to the features


class Head(nn.Linear):
    """The last layer, in float32 everywhere: in bfloat16 the best two of 120 logits often tie."""

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits of (B, D) features: (B, C) float32."""
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.float())


class Ensemble(nn.Module):
    """The networks of a run as one: its logits are the mean of theirs, calibrated."""

    def __init__(self, networks: list[Any], calibration: Calibration, log_share: Tensor):
        """Combine networks of the same classes."""
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.calibration = calibration
        self.log_share: Tensor
        self.register_buffer("log_share", log_share)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of (B, 3, H, W) images: (B, C)."""
        mean = torch.stack([network(images) for network in self.networks]).mean(0)
        return self.calibration.apply(mean, self.log_share)


def without_head(model: Any) -> nn.Module:
    """Return a copy of a network that computes features: (B, D)."""
    backbone = copy.deepcopy(model)
    backbone.fc = nn.Identity()
    return backbone


def copy_state(module: nn.Module) -> State:
    """Copy the state of a module into main memory."""
    return {key: value.to("cpu", copy=True) for key, value in module.state_dict().items()}


def build_model(
    arch: str, classes: list[str], state: State | None = None, flag: str = "--weights"
) -> Any:
    """Build a network for `classes`, at random or from a state; `DataError` where it misfits."""
    model: Any = models.get_model(arch, weights=None, num_classes=len(classes))
    model.fc = Head(model.fc.in_features, len(classes))
    if state is None:
        return model
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n\t")[1].split())[:200]
        raise DataError(
            f"{flag}: these are not the weights of a {arch}: {reason} ...; pass others, or change "
            "--arch"
        ) from None
    if not all(value.isfinite().all() for value in state.values()):
        raise DataError(f"{flag}: the weights are not finite numbers; pass others")
    return model


def load_model(settings: Settings, classes: list[str], weights: Stored) -> Any:
    """Build the network that a new run begins with: pretrained, with a new last layer."""
    torch.manual_seed(settings.seed)
    model = build_model(settings.arch, classes)
    if settings.weights != "none":
        head = {name: value for name, value in model.state_dict().items() if name[:3] == "fc."}
        state = (weights.get("networks") or [fetch_weights(settings.arch, settings.weights)])[0]
        body = {name: value for name, value in state.items() if name[:3] != "fc."}
        model = build_model(settings.arch, classes, body | head)
        rescale(model)
    return model


def fetch_weights(arch: str, name: str) -> State:
    """Return torchvision's weights of this name, downloaded if they are not on this machine."""
    weights = models.get_model_weights(arch)[name]
    try:
        return weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        raise DataError(
            f"--weights {name}: {weights.url} could not be downloaded or read ({error}); put that "
            f"file into {torch.hub.get_dir()}/checkpoints, or pass --weights FILE"
        ) from None


def read_weights(path: str, name: str = "--weights") -> dict[str, Any]:
    """Read the network of a run, or a state_dict as one of "networks"; {} for a name."""
    file = os.path.join(path, NETWORK) if os.path.isdir(path) else path
    if not os.path.isfile(file):
        return {}
    content = load_tensors(Path(file), name)
    state: Any = content if isinstance(content, dict) else {}
    if state.get("networks") and "classes" in state:
        check_format(Path(file), state, name)
        return state
    state = state.get("state_dict", state.get("model", state))
    items = state.items() if isinstance(state, dict) else ()
    if not (items and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in items)):
        raise DataError(
            f"{name} {file}: this file holds no weights; pass one with the state_dict of a network"
        )
    return {"networks": [{key.removeprefix("module."): value for key, value in items}]}


def read_run(path: Path) -> dict[str, Any]:
    """Read the networks of a run, by its folder or file, and all that it takes to use them."""
    content = read_weights(str(path), "--predict")
    if "classes" not in content:
        raise DataError(f"--predict {path}: this is not the folder of a finished run; name one")
    return content


def check_format(path: Path, content: Stored, name: str) -> None:
    """Raise `DataError` if a file is of a version that writes it otherwise."""
    if content.get("format") != FORMAT:
        raise DataError(
            f"{name} {path}: this was written by version {content.get('version', 'before 1.0')} of "
            f"the script, and this is version {__version__}; use that one, or train again"
        )


def check_weights(path: str, content: Stored, arch: str) -> str:
    """Return the full name of the weights; raises `DataError` where they do not fit."""
    supported = [name for name in models.list_models(models) if name.startswith(SUPPORTED)]
    if arch not in supported:
        raise DataError(f"--arch {arch}: not supported; choose one of {', '.join(supported)}")
    if content.get("arch", arch) != arch:
        raise DataError(f"--arch {arch}: --weights is a {content['arch']}; leave --arch out")
    if len(content.get("networks", ())) > 1:
        raise DataError(f"--weights {path}: this run has several networks; name a run of one")
    if content:
        return os.path.abspath(path)
    names = models.get_model_weights(arch).__members__
    if path not in ("none", *names):
        raise DataError(
            f"--weights {path}: this file does not exist; name one, or {', '.join(names)}, or none"
        )
    return "none" if path == "none" else names[path].name  # the meaning of DEFAULT may change


@torch.no_grad()
def rescale(model: Any) -> None:
    """Bring weights to the sizes that the learning rates are meant for; the outputs stay."""
    blocks = list(model.layer4)
    added = [getattr(block, "bn3", block.bn2) for block in blocks] + [blocks[0].downsample[1]]
    size = sum((norm.weight**2 + norm.bias**2).mean() for norm in added).sqrt()
    for norm in added:
        norm.weight *= FEATURE_SCALE / size
        norm.bias *= FEATURE_SCALE / size
    for layer in [block.conv1 for block in blocks[1:]] + [model.fc]:
        layer.weight *= size / FEATURE_SCALE
    layers: list[Any] = [x for x in model.modules() if isinstance(x, nn.Conv2d | nn.BatchNorm2d)]
    for conv, norm in zip(layers[::2], layers[1::2], strict=True):
        factor = CONV_SCALE / conv.weight.square().sum((1, 2, 3)).mean().sqrt().clamp(min=1e-12)
        conv.weight *= factor
        norm.running_mean *= factor
        norm.running_var.add_(norm.eps).mul_(factor**2).sub_(norm.eps)


# ----------------------------------------------------------------------------------------- reading

CROP_SCALE = 0.5  # a training crop shows at least this part of an image
EVAL_SCALE = 8 / 7  # evaluation enlarges images, as crops do (arXiv:1906.06423, Touvron 2019)
LONGEST = 3  # times the shorter side: longer images are cut
WHITE_LEVELS = (255, 1023, 4095, 16383, 65535)  # 8 to 16 bits; see `find_white`
STRIDE = 32  # pixels that a cell of the last feature map stands for, in all these networks


def check_images(paths: list[str]) -> tuple[dict[str, int], int]:
    """Return the digests of all files that can be decoded, by path, and the largest grey value."""
    digests: dict[str, int] = {}
    brightest = [0]
    several = []
    with ThreadPool() as pool:  # Pillow and hashlib let other threads run meanwhile
        found = pool.imap(check_image, paths, chunksize=16)
        bar = tqdm(found, "checking", len(paths), unit=" images", leave=False, disable=None)
        for path, result in zip(paths, bar, strict=True):
            if isinstance(result, str):
                tqdm.write(f"warning: {printable(f'{path}: {result}')}; left out", sys.stderr)
                continue
            digests[path], value, pages = result
            brightest.append(value)
            several += [path] if pages > 1 else []
    if several:
        print_warning(
            f"{len(several)} files have several pages, of which only the first is read; the first "
            f"of these files is {several[0]}"
        )
    return digests, max(brightest)


def check_image(path: str) -> tuple[int, int, int] | str:
    """Return a file's digest, largest grey value and number of pages, or what is wrong with it."""
    try:
        content = read_bytes(path)
        with Image.open(io.BytesIO(content)) as image:
            pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
            image.draft("RGB", (1, 1))  # JPEG: every byte is decoded, to an eighth of the size
            image.load()
            if image.mode == "F":  # which Pillow would cut to 0 and 255
                return "pixels are fractions; save whole numbers"
            is_grey = image.mode.startswith("I")  # of whole numbers of more than 8 bits
            if is_grey and np.asarray(image).min() < 0:  # all of them would become black
                return "pixels are below 0; add a number that makes all of them positive"
            brightest = int(np.asarray(image).max()) if is_grey else 0
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises nearly anything on a broken file
        return str(error).partition(" <_io")[0] or type(error).__name__
    return digest_of(content), brightest, pages


def digest_of(content: bytes) -> int:
    """Return 64 bits of the SHA-256 of a file, or of a name, as a signed number."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big", signed=True)


def find_white(brightest: int) -> int:
    """Return the value of white in grey images of over 8 bits: the first level not exceeded."""
    return next((white for white in WHITE_LEVELS if 0 < brightest <= white), brightest)


def read_bytes(path: str) -> bytes:
    """Return the content of a regular file. Opening a pipe would wait forever."""
    if not os.path.isfile(path):
        raise OSError("gone, or no regular file")
    return Path(path).read_bytes()


def read_image(path: str, white: int, least: int) -> Tensor:
    """Return an image upright, RGB on white, shrunk if large: (3, H, W) uint8; or `DataError`."""
    try:
        picture: Image.Image = Image.open(io.BytesIO(read_bytes(path)))
        is_large = 2 * least**2 < min(picture.size) ** 2
        if is_large:  # a JPEG is decoded to a half, quarter or eighth, no side shorter than `least`
            picture.draft(None, (least, least))
        picture.load()
        with contextlib.suppress(Exception):  # its tags may be broken
            ImageOps.exif_transpose(picture, in_place=True)
        image = to_pixels(picture, white)
        if is_large:  # each pixel is the mean of what it covers; a grey channel is shrunk once
            image = v2.functional.resize(image, [least])
        # Crops are taken faster where the colours of a pixel lie side by side.
        return image.expand(3, -1, -1).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises nearly anything on a broken file
        raise DataError(f"{path}: the image cannot be read ({error}); repair it") from None


def to_pixels(picture: Image.Image, white: int) -> Tensor:
    """Return the pixels of a picture, of 8 bits, in one or three channels: (1 or 3, H, W) uint8."""
    if picture.mode.startswith("I"):  # grey, of whole numbers
        values = np.asarray(picture).astype(np.float32)
        white = white or find_white(int(values.max())) or 1
        if getattr(picture, "tag_v2", {}).get(262) == 0:  # a TIFF in which white is zero
            values = white - values
        scaled = (values * (255 / white) + 0.5).clip(0, 255).astype(np.uint8)
        return torch.from_numpy(scaled)[None]
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return v2.functional.pil_to_tensor(picture if picture.mode == "L" else picture.convert("RGB"))


class Preparation(NamedTuple):
    """A function from an image file to the input of a network: `prepare(path)`, (3, H, W)."""

    image_size: int  # pixels a side of a training crop
    white: int  # see `Data`; with 0 the brightest pixel of each image decides

    def __call__(self, path: str | Path) -> Tensor:
        """Return the whole image, upright and normalised; raises `DataError` if it is broken."""
        image = whole_image(self.read(str(path)), eval_size(self.image_size))
        return normalise(image.permute(1, 2, 0)[None])[0]

    def read(self, path: str) -> Tensor:
        """Return an image, shrunk if it is larger than any crop of it needs: (3, H, W) uint8."""
        return read_image(path, self.white, least_side(self.image_size))


class Images(Dataset[tuple[Tensor, int, int]]):
    """The images of a run by (index, seed): the same pair gives the same pixels in any process."""

    def __init__(self, paths: list[str], labels: Tensor, prepare: Preparation, flip: str = "none"):
        """Read images, and for training cut and flip them, as `--flip` says."""
        size = prepare.image_size
        self.paths = paths
        self.labels = labels
        self.prepare = prepare
        self.copies: Path | None = None  # a folder for large images, shrunk
        self.reserve = 0.0  # bytes of its disk that stay free
        crop = v2.RandomResizedCrop(size, (CROP_SCALE, 1.0))
        mirror = v2.RandomHorizontalFlip(0.0 if flip == "none" else 0.5)
        self.training = v2.Compose([crop, mirror, turn] if flip == "all" else [crop, mirror])
        self.eval_size = eval_size(size)

    def __getitem__(self, item: Sequence[int]) -> tuple[Tensor, int, int]:
        """Return the image as (H, W, 3) uint8, its label and its index."""
        index, seed = map(int, item)
        image = self.read(index)
        if seed == EVALUATED:
            image = whole_image(image, self.eval_size)
        else:
            torch.default_generator.manual_seed(seed)  # which the transforms draw from
            image = self.training(image)
        return image.permute(1, 2, 0), int(self.labels[index]), index

    def keep_copies(self, folder: Path) -> None:
        """Keep copies of large images, shrunk; they may take a quarter of the disk that is free."""
        folder.mkdir(exist_ok=True)
        self.copies = folder
        self.reserve = 0.75 * shutil.disk_usage(folder).free

    def read(self, index: int) -> Tensor:
        """Return the image, shrunk, from its copy, of the same pixels, if there is one."""
        if not self.copies:
            return self.prepare.read(self.paths[index])
        saved = self.copies / f"{index}.npy"
        with contextlib.suppress(Exception):  # not there, cut short or empty
            return torch.from_numpy(np.load(saved)).permute(2, 0, 1)
        image = self.prepare.read(self.paths[index])
        if min(image.shape[1:]) == least_side(self.prepare.image_size):  # it was shrunk
            unfinished = self.copies / f"{secrets.token_hex(8)}.npy"
            with contextlib.suppress(OSError):  # a full disk
                if shutil.disk_usage(self.copies).free > self.reserve:
                    np.save(unfinished, image.permute(1, 2, 0).numpy())
                    unfinished.replace(saved)  # others see the whole file or none
        return image


class Group(NamedTuple):
    """The images of a batch that have the same shape, which a network can take at once."""

    images: Tensor  # (G, H, W, 3) uint8
    labels: Tensor  # (G,) int64
    indices: Tensor  # (G,) int64, of the images in `Data`


def group_by_shape(samples: list[tuple[Tensor, int, int]]) -> list[Group]:
    """Return the images of a batch by their shapes; crops for training are one group."""
    by_shape: dict[torch.Size, list[tuple[Tensor, int, int]]] = defaultdict(list)
    for sample in samples:
        by_shape[sample[0].shape].append(sample)
    groups = []
    for same_shape in by_shape.values():
        images, labels, indices = zip(*same_shape, strict=True)
        groups.append(Group(torch.stack(images), torch.tensor(labels), torch.tensor(indices)))
    return groups


class Reader:
    """A reader of images. Its worker processes live as long as it does, since they start slowly."""

    def __init__(self, images: Images, compute: Compute, workers: int, batch_size: int):
        """Read the images in batches of so many, over all processes."""
        self.compute = compute
        self.batch_size = batch_size
        self.per_process = math.ceil(batch_size / compute.world_size)
        if workers:
            try:
                get_temp_dir()  # workers make their sockets there; without it they would all fail
            except OSError as error:
                print_warning(f"images are read without worker processes: {error}")
                workers = 0
        self.batches: list[Any] = []  # `read` fills it for each pass of the loader
        self.loader = DataLoader(
            images,
            batch_sampler=self.batches,
            collate_fn=group_by_shape,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=leave_interrupts,
            pin_memory=compute.device.type == PINNED,
        )
        if workers and compute.world_size > 1:
            iter(self.loader)  # its workers start: once NCCL runs, a fork may hang (docs of DDP)

    def read(self, batches: Sequence[Tensor], title: str) -> Any:
        """Return the images of each batch: an iterable of lists of `Group`."""
        self.batches[:] = [batch.numpy() for batch in batches]
        hidden = self.compute.rank > 0 or None  # with None tqdm shows a bar in a terminal alone
        return tqdm(self.loader, title, len(batches), unit=" batches", leave=False, disable=hidden)


def cut_batches(indices: Tensor, batch_size: int, seeds: Generator | None = None) -> list[Tensor]:
    """Cut images into batches of (index, seed), (B, 2) int64; without `seeds`, to be evaluated."""
    drawn = torch.full_like(indices, EVALUATED)
    if seeds:
        drawn = torch.randint(2**62, (len(indices),), generator=seeds)
    pairs = torch.stack([indices, drawn], 1)
    # Their sizes differ by one at most: a last batch of a single image would break BatchNorm.
    return list(pairs.tensor_split(max(1, math.ceil(len(indices) / batch_size))))


def make_reader(settings: Settings, options: Options, data: Data, compute: Compute) -> Reader:
    """Make the reader of the images of a run."""
    paths = [file.path for file in data.files]
    prepare = Preparation(settings.image_size, data.white)
    images = Images(paths, data.labels, prepare, settings.flip)
    images.keep_copies(settings.output / COPIES)
    workers = count_workers(options.workers, compute.device.type)
    return Reader(images, compute, workers, settings.batch_size)


def leave_interrupts(_: int) -> None:
    """Leave Ctrl-C, which is sent to every process, to the first one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def turn(image: Tensor) -> Tensor:
    """Turn an image by 0, 90, 180 or 270 degrees, at random."""
    return image.rot90(int(torch.randint(4, ())), (-2, -1))


def whole_image(image: Tensor, size: int) -> Tensor:
    """Return a whole image (3, H, W), its shorter side resized to `size`; beyond 3 : 1 its middle.

    The longer side becomes a multiple of `STRIDE`, so that the network sees all of it.
    """
    side = min(image.shape[1:])
    if max(image.shape[1:]) > LONGEST * side:
        image = v2.functional.center_crop(image, [min(LONGEST * side, n) for n in image.shape[1:]])
    longer = max(size, round(size * max(image.shape[1:]) / side / STRIDE) * STRIDE)
    shape = [size if n == side else longer for n in image.shape[1:]]
    return v2.functional.resize(image, shape)


def least_side(size: int) -> int:
    """Return the pixels a side with which no training crop of `size` is enlarged."""
    # A crop shows `CROP_SCALE` of the area at least, in proportions up to 3 : 4.
    return math.ceil(size * math.sqrt(4 / 3 / CROP_SCALE))


def eval_size(size: int) -> int:
    """Return the shorter side of images that are evaluated, for crops of `size`: 256 for 224."""
    # A part of a cell more in the last feature map can ruin a small network.
    return max(size, int(EVAL_SCALE * size) // STRIDE * STRIDE)


def seeded(purpose: str, *numbers: int) -> Generator:
    """Return a random stream that only this purpose and these numbers have."""
    text = "/".join(map(str, (purpose, *numbers)))
    return Generator().manual_seed(random.Random(text).getrandbits(63))


# ---------------------------------------------------------------------------------------- measures


def confusion_matrix(targets: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Return how often each class was predicted for each: (C, C) int64, rows true."""
    pairs = torch.bincount(targets * classes + predicted, minlength=classes**2)
    return pairs.reshape(classes, classes)


def centred_log(counts: Tensor) -> Tensor:
    """Return the log of (K, C) counts less its mean over classes: log shares, float32."""
    return (counts.log() - counts.log().mean(1, keepdim=True)).float()


def recall_by_class(confusion: Tensor) -> Tensor:
    """Return the recall of each class: (C,) float64, NaN for a class without images."""
    return confusion.diag().double() / confusion.sum(1)


def precision_in_use(confusion: Tensor, frequency: Tensor) -> Tensor:
    """Return the precision of each class where classes have this `frequency`: (C,) float64."""
    rates = confusion.double() / confusion.sum(1, keepdim=True)
    called = frequency.double()[:, None] * rates
    return called.diag() / called.nansum(0)


def auc_by_class(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the area under the ROC curve of each class against all others: (C,) float64, or NaN.

    That is how often an image of the class has a higher one of (M, C) scores than another image.
    """
    areas = []
    for label, score in enumerate(scores.T.contiguous()):
        inside = score[targets == label]
        others = score[targets != label].sort().values
        lower = torch.searchsorted(others, inside)
        not_higher = torch.searchsorted(others, inside, right=True)
        areas.append((lower + not_higher).double().mean() / (2 * len(others)))
    return torch.stack(areas)


def effective_counts(eval_set: EvalSet, classes: int) -> tuple[Tensor, Tensor]:
    """Return each class's effective sample size (Kish 1965) and number of families: (C,) each."""
    width = int(eval_set.families.max()) + 1
    pairs, sizes = (eval_set.targets * width + eval_set.families).unique(return_counts=True)
    label = pairs // width
    images = torch.bincount(label, sizes.double(), classes)
    squares = torch.bincount(label, sizes.double() ** 2, classes)
    return (images**2 / squares).nan_to_num(), torch.bincount(label, minlength=classes)


def spanning_factor(values: Tensor, eval_set: EvalSet, weights: Tensor) -> float:
    """Return how much families that span classes enlarge the variance of a mean of C classes.

    The mean is that of (M,) `values`, by (C,) `weights` of the classes.
    """
    classes = len(weights)
    counts = eval_set.targets.bincount(minlength=classes).double()
    values = values.double()
    means = torch.bincount(eval_set.targets, values, classes) / counts
    errors = values - means[eval_set.targets]
    if not errors[weights[eval_set.targets] > 0].any():
        errors = torch.ones_like(errors)  # without errors a family counts as a single image
    errors = errors * (weights / counts)[eval_set.targets]
    together = torch.bincount(eval_set.families, errors).square().sum()
    _, pairs = (eval_set.families * classes + eval_set.targets).unique(return_inverse=True)
    apart = torch.bincount(pairs, errors).square().sum()
    return max(1.0, float(together / apart))


def mean_interval(recall: Tensor, counts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return means of C recalls by `weights` (K, C), and their 95 % score intervals: (K,) each."""
    recall = recall.nan_to_num()
    n = (counts - 1).clamp(min=0.3)  # n - 1 as in a sample's variance; 0.3 for a single image
    # Martin Andres et al. 2011, Statistical Methods in Medical Research 20
    below, above = (lowest_mean(part, n, weights) for part in (recall, 1 - recall))
    mean = (weights * recall).sum(1)
    return mean, mean - below, mean + above


def lowest_mean(recall: Tensor, n: Tensor, weights: Tensor) -> Tensor:
    """Return how far below the mean that was seen the true one may be: (K,) float64.

    It is the end of a score interval; of one class, Wilson's. Of all recalls p with a lower mean,
    the likeliest for the observed r solve r - p = t * w * p * (1 - p) / n, with a multiplier t that
    all classes share (of Lagrange). Their distance from the observed mean is Z standard errors
    where t * distance = Z^2: solved for t by bisection.
    """
    low = torch.full((len(weights), 1), Z**2, dtype=torch.float64)
    high = torch.full_like(low, 1e12)
    for _ in range(60):
        multiplier = (low * high).sqrt()
        odds = multiplier * weights / n
        root = ((1 - odds) ** 2 + 4 * odds * (1 - recall)).sqrt()
        distance = (weights * (recall - 2 * recall / (1 + odds + root))).sum(1, keepdim=True)
        is_too_large = multiplier * distance > Z**2
        low = torch.where(is_too_large, low, multiplier)
        high = torch.where(is_too_large, multiplier, high)
    return distance.squeeze(1)


def summarise(confusion: Tensor, train_counts: Tensor, effective: Tensor) -> dict[str, float]:
    """Return `MEASURES`, and the interval of balanced accuracy from (C,) `effective` images."""
    weights = measure_weights(confusion.sum(1), train_counts)
    values, low, high = mean_interval(recall_by_class(confusion), effective, weights)
    measures = dict(zip(MEASURES, values.tolist(), strict=True))
    return measures | {"low": low[1].item(), "high": high[1].item()}


def measure_weights(val_counts: Tensor, train_counts: Tensor) -> Tensor:
    """Return the weight of each class's recall in each of `MEASURES`: (5, C) float64, or NaN."""
    many = train_counts > 100
    few = train_counts < 20
    present = val_counts > 0
    rows = [val_counts, present, present & many, present & ~many & ~few, present & few]
    weights = torch.stack(rows).double()
    return weights / weights.sum(1, keepdim=True)


def compare(before: Tensor, evaluation: Evaluation) -> Table:
    """Return what changed since another run, by its answers `before` (M,): a row for a measure.

    The interval is for paired proportions, with 1/4 added to both cells of images that only one of
    the runs has right (Agresti, Min 2005).
    """
    eval_set = evaluation.eval_set
    targets = eval_set.targets
    if len(before) != len(targets):  # there is no other run, or this one is unfinished
        return []
    new = evaluation.confusion
    classes = len(new)
    old = confusion_matrix(targets, before, classes)
    weights = measure_weights(new.sum(1), evaluation.shares.train_counts)
    change = (evaluation.predicted == targets).long() - (before == targets).long()
    effective = effective_counts(eval_set, classes)[0]
    share = (effective / new.sum(1)).nan_to_num()  # of an image in them: 1 without families
    lost = share * torch.bincount(targets[change < 0], minlength=classes) + 0.25
    won = share * torch.bincount(targets[change > 0], minlength=classes) + 0.25
    n = effective + 0.5
    variance = ((won + lost) / n - ((won - lost) / n) ** 2) / (effective - 0.5)
    factors = torch.tensor([spanning_factor(change, eval_set, row) for row in weights])
    half = Z * (weights**2 @ variance * factors).sqrt()
    means = [(weights @ recall_by_class(each).nan_to_num()).tolist() for each in (old, new)]
    rows = []
    for name, one, two, margin in zip(MEASURES, *means, half.tolist(), strict=True):
        if math.isnan(one):  # no class is in this group
            continue
        low = max(two - one - margin, -1.0)
        high = min(two - one + margin, 1.0)
        rows.append({
            "measure": name.replace("_", " "),
            "before": one,
            "after": two,
            "difference": two - one,
            "low": low,
            "high": high,
            "more_than_chance": "no" if low <= 0 <= high else "yes",
        })  # fmt: skip
    return rows


def format_range(summary: Mapping[str, float]) -> str:
    """Return a balanced accuracy with its interval, in per cent."""
    ends = f"{100 * summary['low']:.1f}, {100 * summary['high']:.1f}"
    return f"{summary['balanced_accuracy']:.1%} [{ends}]"


# ----------------------------------------------------------------------------------------- devices

PINNED = "cuda"  # pinned memory is copied to this device without waiting

# Parts of what torch says if memory runs out, or if the system has killed a process for that.
NO_MEMORY = r"(?i)can't allocate memory|not enough memory|out of memory|killed by signal"


def is_launched() -> bool:
    """Return whether torchrun has started this process; some builds of torch lack that part."""
    return dist.is_available() and dist.is_torchelastic_launched()


def join_processes(options: Options) -> Compute:
    """Return the device and precision of this process; under torchrun, meet the others first."""
    compute = pick_compute(options)
    if is_launched():
        # The others wait for the first one, which may check a million images.
        dist.init_process_group(timeout=timedelta(days=1))
        compute = compute._replace(rank=dist.get_rank(), world_size=dist.get_world_size())
    return compute


def pick_compute(options: Options) -> Compute:
    """Return the device that is asked for, and its precision; raises `DataError` without it."""
    name = options.device
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    best = found or torch.device("cpu")
    try:
        device = best if name == "auto" else torch.device(name)
        if device.type != "cpu" and is_launched():
            index = int(os.environ["LOCAL_RANK"]) % max(1, torch.accelerator.device_count())
            device = torch.device(device.type, index)
        probe = torch.ones(1, device=device)
        probe.item()  # waits for a kernel, which torch may not have for an old GPU
    except (RuntimeError, AssertionError, ImportError) as error:  # a build lacks that device
        if re.search(NO_MEMORY, str(error)):
            raise
        raise DataError(
            f"--device {name}: this machine has none, or one that is too old; try --device cpu"
        ) from None
    if device.type == "cuda":
        torch.cuda.set_device(probe.device)  # what is asked of CUDA below is of this device
    return Compute(probe.device, pick_precision(probe.device, options.amp))


def pick_precision(device: torch.device, amp: bool | None) -> str:
    """Return the precision on `device`: mixed if `amp`, or if that is None and hardware gains."""
    mixed = "bfloat16"
    gains = False
    if device.type == "cuda":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            mixed = "float16"
        gains = torch.cuda.get_device_capability(device) >= (7, 0)  # tensor cores
    elif device.type == "cpu":  # `get_capabilities` came with torch 2.10
        units: Any = getattr(torch.cpu, "get_capabilities", dict)()
        gains = bool(units.get("avx512_bf16") or units.get("amx_bf16"))
    return mixed if amp or (amp is None and gains) else "float32"


def count_workers(asked: int | None, device: str) -> int:
    """Return the number of processes that read images: `--workers`, or what the cores allow."""
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    cores = len(affinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    best = min(4, cores // 2) if device == "cpu" else max(1, min(16, cores - 1))
    return best if asked is None else asked


@cache  # made once, since copying it waits for all the work of the device
def normalisation(device: torch.device) -> Tensor:
    """Return mean and deviation of ImageNet's pixels, 0 to 255, on `device`: (2, 3, 1, 1)."""
    parts = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return torch.tensor([[255 * x for x in part] for part in parts], device=device)[..., None, None]


def normalise(images: Tensor) -> Tensor:
    """Return images (B, H, W, 3) uint8 as the input of a network: (B, 3, H, W) float32."""
    mean, std = normalisation(images.device)
    return images.permute(0, 3, 1, 2).float().sub_(mean).div_(std)


def move_batch(batch: Tensor, compute: Compute) -> Tensor:
    """Return labels on the device; images (B, H, W, 3) uint8 as normalised input."""
    batch = batch.to(compute.device, non_blocking=compute.device.type == PINNED)
    return compute.to_device(normalise(batch)) if batch.dtype == torch.uint8 else batch


def on_first_process(compute: Compute, make: Callable[..., Any], *arguments: Any) -> Any:
    """Call `make` in process 0 and return its result in all; where it fails, all end."""
    made = [False, None]
    try:
        if compute.rank == 0:
            made = [True, make(*arguments)]
    finally:  # also if it fails: the others wait for this
        if compute.world_size > 1:
            dist.broadcast_object_list(made, 0)
    is_made, result = made
    return result if is_made else sys.exit(2)


def check_numbers(value: float, name: str) -> None:
    """Raise `DataError` if a number is not finite."""
    if not math.isfinite(value):
        raise DataError(f"{name} became {value}; try --no-amp or other weights")


# ------------------------------------------------------------------------------------------- files


def print_warning(text: str) -> None:
    """Print a warning on stderr, on one line."""
    print(f"warning: {printable(text)}", file=sys.stderr)


def lock_folder(folder: Path, name: str) -> None:
    """Make a folder and lock it until this process ends, or raise `DataError`."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR)
    try:
        if sys.platform == "win32":
            msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
        else:  # not `flock`, which forked workers would hold after the end of this process
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise DataError(
            f"{name} {folder}: another process is training in this folder; wait until it ends"
        ) from None


def list_folders(root: Path) -> list[str]:
    """List the names of the folders in `root`, sorted, without hidden ones."""
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != ".")


def save_tensors(path: Path, value: Any) -> None:
    """Write a value for `torch.load`. (`torch.save` alone does not report a full disk clearly.)"""
    content = io.BytesIO()
    torch.save(value, content)
    write_file(path, content.getbuffer())


def load_tensors(path: Path, name: str) -> Any:
    """Read tensors and plain values; `DataError` if the file is damaged or would run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception:  # a damaged file raises nearly anything
        raise DataError(
            f"{name} {path}: this file is damaged, or was not written by torch.save; pass another"
        ) from None


def read_table(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file that this script has written."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def to_rows(columns: Mapping[str, Sequence[Any] | Tensor]) -> Table:
    """Turn columns into rows."""
    lists = [x.tolist() if isinstance(x, Tensor) else x for x in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


# ------------------------------------------------------------------------------------ command line

WITH_RESUME = {"resume", "device", "workers", "amp"}  # flags that can be used with --resume
WITH_PREDICT = {"predict", "data", "output", "natural", "batch_size", "device", "workers", "amp"}


def make_parser() -> OneLineParser:
    """Return the parser of the command line."""
    parser = OneLineParser(
        prog="data_training.py",
        description=str(__doc__).partition("\n\nDATA")[0],  # with the commands
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    # fmt: off
    parser.add_argument("data", nargs="?", type=Path, metavar="DATA",
        help="folder with one folder per class, which is only read; or, with --predict, an image "
        "or a folder of images")

    add = parser.add_argument_group("data").add_argument
    add("--folds", type=number(int, 3, 10), default=1, metavar="K",
        help="train K networks, 3 to 10, each evaluated on a part of the images that it is not "
        "trained on; images of --val or --source test the ensemble")
    add("--val", type=Path, metavar="DIR",
        help="class folders to validate on, in place of a fifth of DATA")
    add("--source", type=Path, metavar="SRC",
        help="folder that DATA was made from: its other images validate, too")
    add("--group", metavar="PATTERN",
        help="regular expression for paths below the class folder: images with the same first "
        "group, or match, stay on one side, also across classes (patient, film)")
    add("--image-size", type=number(int, 1), metavar="PX",
        help="side of a training crop (default: that of --weights, or 224)")
    add("--flip", choices=("sides", "none", "all"), default="sides",
        help="mirror half of the training images (sides, the default), none (text, signs), or "
        "also turn them (all, from above)")

    add = parser.add_argument_group("model").add_argument
    add("--arch", metavar="NAME",
        help="a ResNet of torchvision (default: that of --weights, or resnet50, resnet18 on a CPU)")
    add("--weights", default="DEFAULT", metavar="NAME|PATH",
        help="name in torchvision, a file, a run, or none (default: DEFAULT, torchvision's best)")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1), default=10, metavar="N",
        help="of fine-tuning, each draws as many images as there are to train on (default: 10)")
    add("--power", type=number(float, 0, 10), default=1.0, metavar="P",
        help="draw by (images of class) ** -P; 0: no sampler (default: 1)")
    add("--batch-size", type=number(int, 2), metavar="N",
        help="images per step, rounded up to a multiple of the processes (default: "
        f"{BATCH}, half for under {SMALL:,} training images)")

    add = parser.add_argument_group("run").add_argument
    add("--output", type=Path, metavar="DIR",
        help="new folder for the results (default: runs/DATE-TIME)")
    add("--baseline", type=Path, metavar="RUN",
        help="earlier run evaluated on the same images, to compare with")
    add("--seed", type=number(int, 0), default=0, metavar="N",
        help="of split, draws, augmentation, random weights (default: 0)")
    add("--resume", type=Path, metavar="RUN", help="go on with the run in this folder")

    add = parser.add_argument_group("prediction").add_argument
    add("--predict", type=Path, metavar="RUN",
        help="predict the class of each image in DATA by a run (its folder, or network.pt); writes "
        "CSV (class: the answer, true: the folder) to stdout, or to --output FILE")
    add("--natural", action="store_true",
        help="predict for classes as frequent as in training, not for equally frequent ones")

    add = parser.add_argument_group("machine").add_argument
    add("--workers", type=number(int, 0), metavar="N",
        help="processes that read images (default: by the cores)")
    add("--device", default="auto", metavar="NAME",
        help="cpu, cuda, ... (default: auto, an accelerator, else cpu)")
    add("--amp", action=argparse.BooleanOptionalAction,
        help="mixed precision (default: in training, where the hardware gains from it)")
    # fmt: on
    return parser


def number(kind: type, least: float, most: float = 2**62) -> Callable[[str], Any]:
    """Return a function that reads a number from `least` to `most`."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            kind_name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {kind_name}") from None
        if not value >= least:
            raise argparse.ArgumentTypeError(f"{text} is not at least {least:g}")
        if not value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not at most {most:g}")
        return value

    return read


def parse_args(argv: list[str] | None) -> tuple[Settings, Options]:
    """Return what a command line says; exit with status 2 if that is wrong."""
    parser = make_parser()
    chosen = parser.parse_args(argv)
    typed = {name for name, value in vars(chosen).items() if value != parser.get_default(name)}
    clashes = {"resume": typed - WITH_RESUME, "predict": typed - WITH_PREDICT}
    clashes["val"] = typed & {"source"}  # their images may have the same names
    for name, others in clashes.items():
        if name in typed and others:
            other = min(others)
            flag = "DATA" if other == "data" else f"--{other.replace('_', '-')}"
            parser.error(f"{flag} and --{name} cannot be used together; drop one of them")
    if not (chosen.data or chosen.resume):
        parser.error("the following arguments are required: DATA")
    if chosen.natural and not chosen.predict:
        parser.error("--natural works only with --predict; drop it")
    try:
        re.compile(chosen.group or "")
    except (re.error, OverflowError) as error:
        parser.error(f"--group: this is no regular expression ({error}); correct it")
    if not (chosen.output or chosen.predict or chosen.resume):
        chosen.output = Path(time.strftime(f"runs/%Y-%m-%d_%H-%M-%S_{secrets.token_hex(2)}"))
    words = sys.argv if argv is None else ["data_training.py", *argv]
    chosen.command = shlex.join(["python", *words])
    chosen.precision = None  # `open_run` knows the device
    settings = Settings(**{each.name: getattr(chosen, each.name) for each in fields(Settings)})
    options = Options(**{each.name: getattr(chosen, each.name) for each in fields(Options)})
    return settings, options


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    settings, options = parse_args(argv)
    status = 2
    try:
        command = predict if options.predict else run
        command(settings, options)
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except KeyboardInterrupt:
        status = 130
        message = "interrupted"
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains
        message = "stdout was closed before all was written; write to --output FILE"
    except DataError as error:
        message = str(error).rstrip()
        if "Original Traceback" in message:  # from a process that reads images
            message = message.splitlines()[-1].partition(": ")[2]
    except OSError as error:
        if error.filename is None:
            raise
        message = f"{os.fsdecode(error.filename)}: {error.strerror}; repair that and try again"
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or re.search(NO_MEMORY, str(error))):
            raise
        message = "out of memory; try a smaller --batch-size or --image-size, fewer --workers, or "
        message += "--device cpu"
    folder = options.resume or settings.output
    is_of_flag = message.startswith("--")
    if folder and not (options.predict or is_of_flag) and os.path.exists(folder / STATE):
        message += f"; go on with --resume {shlex.quote(str(folder))}"
    kind = "error: " if status == 2 else ""
    print(f"data_training.py: {kind}{printable(message)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, closed by `>&-`
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main())
