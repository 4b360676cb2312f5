"""Fine-tune a pretrained ResNet on an imbalanced image folder, balanced by weighted sampling.

    python data_training.py DATA --epochs N                # train, judge, fill a run folder
    python data_training.py DATA --folds 5                 # five networks that vote
    python data_training.py DATA --group '^(P[0-9]+)'      # no patient on both sides
    python data_training.py DATA --weights RUN --epochs 0  # judge the network of a run
    python data_training.py PHOTOS --predict RUN           # a CSV of classes and probabilities
    python data_training.py --resume RUN                   # go on where a run was stopped
    torchrun --nproc-per-node=K data_training.py DATA      # one run on several devices

DATA holds one folder per class; a part of each is kept for validation. Training images are drawn by
a `WeightedRandomSampler` with weights 1 / (training images of the class), so that every class is
seen about equally often. The last layer of pretrained weights is trained first, then all layers. In
runs of one network both vote in the end, unless all layers did harm. The last layer answers alone
where it is surely better. Two numbers, fitted on the validation images, reduce the remaining bias
towards frequent classes (calibration). With `--folds K` each of K networks is judged by the part of
the images that it has not seen; together they vote. A run folder holds the networks, the settings,
the history, the predictions, the recall of each class with its interval, and a page that shows all
of that, `report.html`.

The sections of this file, in the order of the story:

    run                        settings, records, and the loop over folds, stages and epochs
    sampling                   weights 1 / count, `WeightedRandomSampler`, batches
    training                   stages, optimizers, a step, an epoch
    evaluation and calibration logits of the validation images, and what they say
    what is kept, the end      files after an epoch and at the end
    model                      weights, the network, its scale
    data                       listing, checking and splitting images
    reading                    decoding, augmenting and storing them
    measures                   recall, intervals, calibration error, comparisons
    records and going on       a new run, a stopped run, tables and other files
    console, page              what people read
    predicting                 `--predict`
    devices and processes      GPUs, torchrun, worker processes
    command line, main         flags, errors, exit status

Exit status: 0 done, 2 bad input (one line on stderr says where and what to do), 130 interrupted,
143 terminated, 129 the terminal was closed.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import csv
import errno
import hashlib
import heapq
import html
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import weakref
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cache, partial
from itertools import permutations
from multiprocessing import get_start_method
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler
from torchvision import models
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2
from tqdm import tqdm

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

EVERY = -1  # instead of the fold that holds an image out: every network learns it
TEST = -2  # no network learns it; it tests their vote
NETWORK = "network.pt"  # in a run folder
STATE = "resume.pt"  # of a stopped run, beside it
START = "start.pt"  # the networks before their first step
# The part of the images that is right, and the mean recall: of all classes, and of those with many,
# in between and few training images. NaN where there is no such class.
MEASURES = ("accuracy", "balanced_accuracy", "many", "medium", "few")
Z = 1.959964  # 95 % of a normal distribution lie within so many standard deviations
BATCH = 64  # images a step
PATHS = ("data", "val", "source", "split", "output", "baseline")  # settings that are paths
# Flags allowed with `--resume` (where it runs, not what comes out) and with `--predict`.
WITH_RESUME = ("device", "workers", "amp")
WITH_PREDICT = ("data", "output", "natural", "batch_size", *WITH_RESUME)
if not dist.is_available():  # this torch is built for one process only
    dist.is_initialized = dist.is_torchelastic_launched = lambda: False
Rows = list[dict[str, Any]]


class DataError(Exception):
    """Bad input, told in one line: where, what, what to do."""


# -------------------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class Settings:
    """Every setting of a run as it is used: "auto" is resolved, and nothing changes any more."""

    data: Path
    val_fraction: float
    folds: int
    val: Path | None
    split: Path | None
    source: Path | None
    group: str | None  # a regular expression
    image_size: int  # pixels per side of a training crop
    crop_scale: float
    flip: str
    workers: int
    arch: str
    weights: str
    epochs: int
    frozen_epochs: int  # of the head alone, the first ones
    rebalance: str  # "sampler" or "none"
    power: float  # 0 without balancing
    batch_size: int  # images a step, over all processes
    lr: float
    calibrate: bool
    output: Path
    baseline: Path | None
    seed: int
    device: str
    amp: bool  # mixed precision
    command: str  # that started the run


@dataclass(frozen=True)
class Given:
    """All that a run has before its first epoch; it stays the same until the last one."""

    settings: Settings
    data: Data
    known: Tensor  # (K,) int64, digests of the images that the network of `--weights` has learnt
    baseline: Tensor | None  # what the run `--baseline` predicted for the judged images: (M,)
    origin: str  # in words, where the network is from
    compute: Compute  # of this process
    recorded: dict[str, Any] = field(default_factory=dict)  # of a network that is only judged


class Fold(NamedTuple):
    """What is trained to the end."""

    networks: list[dict[str, Tensor]]  # one state, or two with the last layer trained alone
    logits: Tensor  # their mean, of the images it is judged by: (M, C)


@dataclass
class Progress:
    """How far a run has come: what is stored to go on from there."""

    start: dict[str, Tensor]  # the state of each fold's network before its first step
    model: Any  # in training, a ResNet
    history: Rows  # a row for each epoch, from the first one on
    draws: Tensor  # how often images of each class were drawn so far: (C,) int64
    head: dict[str, Tensor] = field(default_factory=dict)  # as the stage "head" left it
    logits: Tensor = torch.empty(0)  # of the images that judged the last epoch: (M, C)
    judged: Any = None  # the `Evaluation` of these
    finished: list[Fold] = field(default_factory=list)
    stored: dict[str, Any] = field(default_factory=dict)  # a trainer's state, to go on from once
    trainer: Any = None  # a `Trainer`, from the first stage on
    features: Tensor | None = None  # what the backbone at the start makes of all images
    written: float = -math.inf  # when the files were written last, by `time.perf_counter`

    def has_done(self, fold: int, epoch: int) -> bool:
        """Return whether this epoch of this fold, or a later one, is done."""
        last = self.history[-1] if self.history else {"fold": 0, "epoch": 0}
        return (fold + 1, epoch) <= (last["fold"], last["epoch"])


def run(args: Namespace) -> None:
    """Train a network, or one for each fold, judge it, and fill the run folder."""
    compute = join_processes(args.device, args.amp)
    given, progress = first_makes(partial(prepare, args, compute), compute)
    # A run that goes on keeps its precision, and all processes have the same.
    precision = pick_precision(compute.device, given.settings.amp)
    compute = compute._replace(amp=agree_precision(precision))
    given = replace(given, compute=compute)
    settings = given.settings
    if compute.rank > 0:
        args.output = settings.output  # of process 0, for what is said where a run ends early
    progress.model.to(compute.device, memory_format=memory_format(compute.device))
    reader = Reader(given)
    if compute.rank == 0:
        start_run(given, progress)
    if not settings.epochs:
        finish(given, progress, reader)
        return
    for fold in range(settings.folds):
        for stage in plan(given, progress, fold):
            if progress.has_done(fold, stage.epochs[-1]):
                continue
            inputs = begin(given, progress, stage, reader)
            for epoch in stage.epochs:
                if progress.has_done(fold, epoch):
                    continue
                drawn = draw_epoch(given, stage, epoch)
                trained = train_epoch(given, progress.trainer, drawn, epoch, inputs)
                judge_epoch(given, progress, inputs)
                if epoch == settings.epochs:
                    end_fold(given, progress, inputs)
                add_epoch(given, progress, epoch, trained)
                if compute.rank == 0:
                    store_epoch(given, progress, stage_ends=epoch == stage.epochs[-1])
                    print(format_epoch(progress.history[-1], settings), flush=True)
    finish(given, progress, reader)


def judge_epoch(given: Given, progress: Progress, inputs: Inputs) -> None:
    """Judge the network after an epoch by the validation images."""
    stage = progress.trainer.stage
    places = given.data.judges(stage.fold)
    progress.logits = evaluate(given, progress.trainer.evaluated, inputs, places)
    progress.judged = judge(given, {stage.fold: progress.logits})
    if stage.on_features:
        progress.head = copy_state(progress.model.fc)


def end_fold(given: Given, progress: Progress, inputs: Inputs) -> None:
    """Finish a fold: the last layer alone votes with all layers, or is kept in their place.

    On the backbone of the start it errs on other images than all layers do, so a weighted mean of
    the logits of both errs less. It is there already; to answer takes twice the time. Folds err on
    other images anyway, and gain nothing by it. Where the last layer alone is surely better it is
    kept: on photographs that the weights know already, further training does harm.
    """
    stage = progress.trainer.stage
    model = progress.model
    end = copy_state(model)
    networks = [end]
    if progress.head and not stage.on_features:
        return_to_head(progress)
        alone = copy_state(model)
        places = given.data.judges(stage.fold)
        logits = evaluate(given, model, inputs, places)
        judged = judge(given, {stage.fold: logits})
        is_better = partial(is_surely_better, judged, progress.judged, given.data.families[places])
        if first_makes(is_better, given.compute):
            networks = [alone]
            progress.logits = logits
            progress.judged = judged
            progress.trainer.stage = stage._replace(name=BACK)
        else:
            model.load_state_dict(end)
            if stage.joins_head:
                # A mean weighs both alike: what is to count for more has its last layer multiplied.
                networks = [
                    scale_head(end, 2 * (1 - HEAD_SHARE)),
                    scale_head(alone, 2 * HEAD_SHARE),
                ]
                progress.logits = progress.logits.lerp(logits, HEAD_SHARE)
                progress.judged = judge(given, {stage.fold: progress.logits})
    progress.finished.append(Fold(networks, progress.logits))


def add_epoch(given: Given, progress: Progress, epoch: int, trained: Trained) -> None:
    """Add an epoch to the progress of a run: its row of the history and its draws."""
    data = given.data
    stage = progress.trainer.stage
    counts = data.counts(trained.drawn)
    progress.draws += counts
    progress.history.append({
        "fold": stage.fold + 1,
        "epoch": epoch,
        "phase": stage.name,
        "train_loss": trained.loss,
        **progress.judged.measures,
        "fewest_draws": int(counts.min()),
        "most_draws": int(counts.max()),
        "distinct_images": len(trained.drawn.unique()) / len(data.learns(stage.fold)),
        "learning_rate": progress.trainer.rate(),
        "images_per_second": len(trained.drawn) / trained.seconds,
        "data_wait": trained.waited / trained.seconds,
        "seconds": time.perf_counter() - trained.started,
    })  # fmt: skip


# ---------------------------------------------------------------------------------------- sampling


EVALUATED = -1  # in the place of a seed: this image is evaluated, not augmented


def sample_weights(labels: Tensor, power: float) -> Tensor:
    """Return a weight for each image, 1 / (images of its class) ** power: (N,) float64."""
    return torch.bincount(labels).double()[labels] ** -power


def seeded(purpose: str, *numbers: int) -> torch.Generator:
    """Return a random stream that only this purpose and these numbers have."""
    text = "/".join(map(str, (purpose, *numbers)))
    return torch.Generator().manual_seed(random.Random(text).getrandbits(63))


def draw_images(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Draw N of N images by weight, with replacement: (N,) int64."""
    sampler = WeightedRandomSampler(weights.tolist(), len(weights), generator=generator)
    # A sampler inside of a DataLoader would draw anew in each process. As a list the draw is the
    # same for any number of workers and processes, and each process takes its part of it.
    return torch.tensor(list(sampler))


def draw_epoch(given: Given, stage: Stage, epoch: int) -> Tensor:
    """Draw the training images of an epoch, every class about equally often: indices, int64."""
    settings = given.settings
    learnt = given.data.learns(stage.fold)
    weights = sample_weights(given.data.labels[learnt], settings.power)
    stream = seeded("draw", settings.seed, stage.fold, epoch)
    drawn = []
    for _ in range(stage.passes):
        if settings.rebalance == "sampler":
            places = draw_images(weights, stream)
        else:
            places = torch.randperm(len(learnt), generator=stream)
        drawn.append(learnt[places])
    return torch.cat(drawn)


def cut_batches(
    indices: Tensor, batch_size: int, seeds: torch.Generator | None = None
) -> tuple[Tensor, ...]:
    """Cut images into batches of (index, seed of the augmentation), (B, 2) int64.

    Without `seeds` the images are to be evaluated. The sizes of the batches differ by one at most:
    a last batch of a few images would weigh too much, and one of a single image break BatchNorm.
    """
    if not len(indices):  # of a process that has no image to evaluate
        return ()
    drawn = torch.full_like(indices, EVALUATED)
    if seeds:
        drawn = torch.randint(2**62, (len(indices),), generator=seeds)
    pairs = torch.stack([indices, drawn], 1)
    return pairs.tensor_split(math.ceil(len(indices) / batch_size))


# ---------------------------------------------------------------------------------------- training


WARM_UP = 0.1  # part of the steps in which the learning rate rises
HEAD_STEPS = 1000  # at least, of training the head alone: on features they cost next to nothing
HEAD_RATE = 0.02  # of SGD, for features of squared length 512, as those of a ResNet-18
HEAD_DECAY = 0.002  # its weight decay
# On images like those that the weights were trained on, training all layers does more harm than
# good. A trial of this many steps shows it; it is made if that is at most a fifth of all steps.
TRIAL_STEPS = 190
TRIAL_FAILS = 1.1  # times the loss of the head alone; more steps would repair less harm
# Standard errors by which the loss of the head alone must be lower at the end for it to be kept
# alone: by chance it is in one of twenty runs, if the two are equally good.
SURE = 1.645
FEWEST_FAMILIES = 10  # or images, by which it can be sure: of fewer, chance decides more often
BACK = "back"  # the phase of an epoch after which it is kept alone
HEAD_SHARE = 0.25  # of the logits, where it votes with all layers; 0.15 to 0.35 do as well
# The layers of a ResNet from below. What the first ones see is in all photographs: pretrained ones
# have less to learn, and learn at this part of the next ones' rate (Howard & Ruder 2018,
# arXiv:1801.06146).
LAYERS = (("conv1.", "bn1.", "layer1."), ("layer2.",), ("layer3.",), ("layer4.", "fc."))
RATE_BELOW = 0.7
UPPER_FACTOR = 1 / 15  # times `--lr` for the upper half of a network that failed the trial
LOWER = LAYERS[0] + LAYERS[1]  # the half below


class Stage(NamedTuple):
    """Epochs in which a network is trained in one way; what differs between the ways."""

    name: str
    make_optimizer: Callable[[Given, Progress, int], Optimizer]  # of the fold
    on_features: bool  # trains the head on stored features, not the network on images
    updates_batch_norm: bool
    averages: bool = False  # ends as the mean of the weights after each step
    joins_head: bool = False  # ends as a vote with the head that was trained alone
    prepare: Callable[[Progress], None] | None = None  # brings the network to where it begins
    fold: int = 0
    epochs: range = range(0)
    passes: int = 1  # times an epoch draws as many images as there are
    steps: int = 0  # of the optimizer, in all epochs


def plan(given: Given, progress: Progress, fold: int) -> Iterator[Stage]:
    """Yield the stages of a fold in order: the head alone, then all layers from the start.

    An epoch 0 trains the head of pretrained weights, unless `--frozen-epochs` do so, from which all
    layers go on. In long runs the first epochs of all layers are a trial, from the head: if it does
    harm, the network goes back to its head, and only its upper half is trained. The other folds
    skip the trial and follow its outcome.
    """
    settings = given.settings
    images = len(given.data.learns(fold))
    steps = math.ceil(images / settings.batch_size)  # in an epoch
    epochs = range(1, settings.epochs + 1)
    head = epochs[: settings.frozen_epochs]
    others = epochs[settings.frozen_epochs :]
    tried = count_trial(given)
    if settings.weights != "none" and not head:
        head = range(0, 1)  # before all others
    if head:
        # Few images make few steps: they are drawn several times an epoch.
        passes = math.ceil(HEAD_STEPS * settings.batch_size / (len(head) * images))
        in_all = len(head) * math.ceil(passes * images / settings.batch_size)
        yield HEAD._replace(fold=fold, epochs=head, passes=passes, steps=in_all, prepare=start_over)
    if tried and fold == 0:
        trial = others[:tried]
        others = others[tried:]
        yield TRIAL._replace(fold=fold, epochs=trial, steps=tried * steps)
    failed = tried and first_makes(partial(trial_failed, progress), given.compute)
    prepare = None if tried or settings.frozen_epochs else start_over
    if failed and fold == 0:
        prepare = return_to_head
    if others:
        stage = UPPER if failed else WHOLE
        yield stage._replace(
            fold=fold,
            epochs=others,
            steps=len(others) * steps,
            prepare=prepare,
            joins_head=not failed and settings.folds == 1 and settings.weights != "none",
        )


def count_trial(given: Given) -> int:
    """Return the number of epochs that a trial takes; 0 if none is made."""
    settings = given.settings
    steps = math.ceil(len(given.data.learns(0)) / settings.batch_size)
    epochs = math.ceil(TRIAL_STEPS / steps)
    is_short = 5 * epochs <= settings.epochs - settings.frozen_epochs
    return epochs if is_short and settings.weights != "none" else 0


def trial_failed(progress: Progress) -> bool:
    """Return whether a trial made the first network clearly worse than its head alone."""
    losses = {row["phase"]: row["val_loss"] for row in progress.history if row["fold"] == 1}
    return TRIAL.name in losses and losses[TRIAL.name] > TRIAL_FAILS * losses[HEAD.name]


def is_surely_better(one: Evaluation, other: Evaluation, families: Tensor) -> bool:
    """Return whether the loss of `one` is lower by over `SURE` standard errors of the difference.

    Both are of the same M images, of `families` (M,) which count together.
    """
    if len(families.unique()) < FEWEST_FAMILIES:
        return False
    weights = class_weights(one.targets)
    least = torch.finfo(torch.float32).tiny
    gain = (one.true_probability / other.true_probability.clamp(min=least)).clamp(min=least).log()
    mean = weights @ gain.double()
    error = torch.bincount(families, weights * (gain - mean)).square().sum().sqrt()
    return bool(mean > SURE * error)


def start_over(progress: Progress) -> None:
    """Bring the network back to its state before the first step."""
    progress.model.load_state_dict(progress.start)


def return_to_head(progress: Progress) -> None:
    """Bring the network back to where the training of its head alone ended."""
    head = {f"fc.{name}": value for name, value in progress.head.items()}
    progress.model.load_state_dict(progress.start | head)


def begin(given: Given, progress: Progress, stage: Stage, reader: Reader) -> Inputs:
    """Set up the trainer of a stage, or go on with a stored one; return where its inputs are."""
    model = progress.model
    progress.trainer = None  # and with it what DistributedDataParallel holds of the network
    is_new = not progress.has_done(stage.fold, stage.epochs[0])
    if is_new and stage.prepare:
        stage.prepare(progress)
    inputs: Inputs = reader
    if stage.on_features:
        if progress.features is None:
            progress.features = extract_features(given, model, reader)
        inputs = Features(progress.features, given.data.labels, given.compute)
    optimizer = stage.make_optimizer(given, progress, stage.fold)
    progress.trainer = Trainer(model, stage, optimizer, given)
    if not is_new:
        progress.trainer.load_state_dict(progress.stored)
    progress.stored = {}
    return inputs


def head_optimizer(given: Given, progress: Progress, fold: int) -> Optimizer:
    """Make SGD for the head alone.

    The largest stable step depends on the norm of the features; `HEAD_RATE` is for a ResNet-18's.
    """
    lengths = torch.linalg.vector_norm(progress.features, dim=1, dtype=torch.float32)
    learnt = lengths[given.data.learns(fold)]
    square = max(learnt.square().mean().item() / 512, 1e-12)
    head = progress.model.fc
    groups = [
        {"params": [head.weight], "lr": HEAD_RATE / square, "weight_decay": HEAD_DECAY * square},
        {"params": [head.bias], "lr": HEAD_RATE, "weight_decay": HEAD_DECAY},
    ]
    return torch.optim.SGD(groups, momentum=0.9, fused=True)


def whole_optimizer(given: Given, progress: Progress, _: int) -> Optimizer:
    """Make AdamW for all layers; pretrained ones take smaller steps the lower they are."""
    settings = given.settings
    part = 1.0 if settings.weights == "none" else RATE_BELOW
    groups = []
    for above, layers in zip((3, 2, 1, 0), LAYERS, strict=True):
        weights = [w for name, w in progress.model.named_parameters() if name.startswith(layers)]
        groups.append({"params": weights, "lr": settings.lr * part**above})
    return torch.optim.AdamW(groups, fused=True)


def upper_optimizer(given: Given, progress: Progress, _: int) -> Optimizer:
    """Make AdamW for the upper half of the layers, in small steps."""
    upper = []
    for name, weight in progress.model.named_parameters():
        weight.requires_grad = not name.startswith(LOWER)
        if weight.requires_grad:
            upper.append(weight)
    return torch.optim.AdamW(upper, given.settings.lr * UPPER_FACTOR, fused=True)


HEAD = Stage("head", head_optimizer, on_features=True, updates_batch_norm=False)
WHOLE = Stage("whole", whole_optimizer, on_features=False, updates_batch_norm=True)
TRIAL = WHOLE._replace(name="trial")
UPPER = Stage("upper", upper_optimizer, on_features=False, updates_batch_norm=False, averages=True)


class Trainer:
    """A network in training and what moves with it. It knows no files, and no epoch's number."""

    def __init__(self, model: Any, stage: Stage, optimizer: Optimizer, given: Given):
        """Set up the beginning of a stage."""
        self.stage = stage
        self.optimizer = optimizer
        self.evaluated = model.fc if stage.on_features else model
        self.evaluated.train(stage.updates_batch_norm)
        self.network = wrap_ddp(self.evaluated, given)
        self.weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        peaks = [group["lr"] for group in optimizer.param_groups]
        # OneCycleLR divides by zero where either part of the cycle has a single step.
        steps = max(4, stage.steps)
        rising = max(WARM_UP, 2 / steps)
        self.scheduler = OneCycleLR(optimizer, peaks, steps, pct_start=rising, cycle_momentum=False)
        scales = given.compute.amp is torch.float16
        self.scaler = torch.amp.GradScaler(given.compute.device.type, enabled=scales)
        self.mean: list[Tensor] = []  # of the weights after each step so far

    def rate(self) -> float:
        """Return the learning rate of the next step: of the uppermost layer, the head's bias."""
        return float(self.scheduler.get_last_lr()[-1])

    def step(self, loss: Tensor) -> None:
        """Take a step against the gradient of `loss`."""
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        if self.stage.averages:
            self.average(self.scheduler.last_epoch)

    @torch.no_grad()
    def average(self, steps: int) -> None:
        """Add the weights after `steps` steps to their mean; after the last one, set them to it."""
        # `AveragedModel` does the same, but waits for the device at every step.
        if not self.mean:
            self.mean = [weight.detach().clone() for weight in self.weights]
        torch._foreach_lerp_(self.mean, self.weights, 1 / steps)
        if steps == self.stage.steps:
            torch._foreach_copy_(self.weights, self.mean)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on as if nothing had happened."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "mean": self.mean,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what was stored in this stage."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if state["scaler"]:  # an unused scaler stored nothing, and a used one refuses that
            self.scaler.load_state_dict(state["scaler"])
        for weight, kept in zip(self.weights, state["mean"], strict=False):
            self.mean.append(torch.empty_like(weight).copy_(kept))
        for weight, moments in self.optimizer.state.items():
            for name, value in moments.items():  # kernels need them in the same memory layout
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    moments[name] = torch.empty_like(weight).copy_(value)


class Trained(NamedTuple):
    """The result of an epoch of training."""

    drawn: Tensor  # the images, int64
    loss: float  # averaged over images
    started: float  # by `time.perf_counter`
    seconds: float
    waited: float  # seconds of these for images


def train_epoch(
    given: Given, trainer: Trainer, drawn: Tensor, epoch: int, inputs: Inputs
) -> Trained:
    """Train on the images that an epoch has drawn; each process takes its part of each batch.

    Raises `DataError` if the loss is not finite.
    """
    settings, compute, stage = given.settings, given.compute, trainer.stage
    started = time.perf_counter()
    seeds = seeded("augment", settings.seed, stage.fold, epoch)
    batches = cut_batches(drawn, settings.batch_size, seeds)
    waited = 0.0
    total = torch.zeros((), device=compute.device)
    epochs_left = settings.epochs * settings.folds - epoch + 1
    # The first fold tells the time left, in the first epoch of a stage that trains on images.
    time_told = compute.rank > 0 or stage.fold > 0 or stage.on_features or epoch > stage.epochs[0]
    ours = [batch[compute.rank :: compute.world_size] for batch in batches]
    loaded = iter(inputs.read(ours, f"training, {stage.name}"))
    for step, batch in enumerate(batches, 1):
        asked = time.perf_counter()
        images, targets = next(loaded)
        waited += time.perf_counter() - asked
        targets = to_device(targets, compute.device)
        with compute.autocast():
            logits = trainer.network(to_input(images, compute.device))
        loss = F.cross_entropy(logits.float(), targets)
        # Gradients are averaged over processes, whose parts of a batch may differ by one image.
        trainer.step(loss * (len(targets) * compute.world_size / len(batch)))
        total += loss.detach() * len(targets)
        seconds = time.perf_counter() - started
        time_told = time_told or tell_time_left(seconds, step / len(batches), epochs_left)
    next(loaded, None)  # which ends the progress bar
    if dist.is_initialized():
        dist.all_reduce(total)
    loss_sum = total.item()
    if not math.isfinite(loss_sum):
        cure = "--no-amp, or " if compute.amp is torch.float16 else ""
        cure += f"a tenth of {settings.lr:g}"
        raise DataError(f"--lr: the loss became {loss_sum}; try {cure}")
    seconds = time.perf_counter() - started
    return Trained(drawn, loss_sum / len(drawn), started, seconds, waited)


# ---------------------------------------------------------------------- evaluation and calibration


PRIOR = 2.0  # images: the weight of what is expected
CALIBRATION_PARTS = 5  # of the validation images; of two, one is too little to fit numbers on
LEFT = 1.0  # of the log class share: what balanced training leaves in the logits, on most sets
LEAST_SCALE = 0.01
LEAST_SPREAD = 0.05  # of log shares; what differs less in frequency is not shifted by much
MOST_FITTED = 2**22  # logits that calibration is fitted on: more would tell two numbers little new
HIGHEST = 1e4  # logit


@torch.no_grad()
def evaluate(
    given: Given, network: nn.Module, inputs: Inputs, places: Tensor, title: str = "validation"
) -> Tensor:
    """Compute the logits of the images at `places`, of which each process takes its part: (M, C).

    Raises `DataError` where they are NaN.
    """
    compute = given.compute
    was_training = network.training
    if dist.is_initialized():  # BatchNorm gathers its statistics in each process for itself
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)
    ours = places[compute.rank :: compute.world_size]
    batches = cut_batches(ours, math.ceil(given.settings.batch_size / compute.world_size))
    network.eval()
    outputs = []
    for images, _ in inputs.read(batches, title):
        with compute.autocast():
            outputs.append(network(to_input(images, compute.device)))
    network.train(was_training)
    outputs.append(torch.empty(0, len(given.data.classes)))  # of a process without an image
    logits = gather(torch.cat([output.cpu() for output in outputs]), compute)
    if logits.isnan().any():
        cure = "--no-amp, " if compute.amp is torch.float16 else ""
        cure += "other weights or a lower --lr"
        raise DataError(f"the network's outputs are no numbers; take {cure}")
    return logits.clamp(-HIGHEST, HIGHEST)  # float16 overflows


class Calibration(NamedTuple):
    """Two numbers, fitted on the validation images, reduce the bias towards frequent classes.

    Calibrated logits are scale * logits - shift * log_share. Although all classes are drawn equally
    often, a rare class is still recognised less often in the end: its few images are memorised and
    teach nothing more. `shift` takes back what frequent classes gained by that (logit adjustment,
    Menon et al. 2021, arXiv:2007.07314), and `scale` makes a network less sure that is too sure
    (temperature, Guo et al. 2017, arXiv:1706.04599).
    """

    scale: float = 1.0
    shift: float = 0.0

    def apply(self, logits: Tensor, log_share: Tensor) -> Tensor:
        """Return the calibrated logits: (M, C) float32."""
        return self.scale * logits.float() - self.shift * log_share


class Answer(NamedTuple):
    """The answers of a network for M images."""

    predicted: Tensor  # (M,) int64
    probability: Tensor  # (M,) float32, of the predicted class
    confusion: Tensor  # (C, C) int64, rows true, columns predicted


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of a network by M images of C classes that it has not learnt."""

    places: Tensor  # (M,) int64, where the images are in `Data`
    targets: Tensor  # (M,) int64
    loss: float  # calibrated, averaged over images, each class counting the same
    true_probability: Tensor  # (M,) float32, calibrated, of the true class
    auc: Tensor  # (C,) float64, calibrated, of each class against the others
    calibrated: Answer
    as_trained: Answer
    natural: Answer  # calibrated, where classes are as frequent as in training
    calibration: Calibration  # fitted on all images, for those to come
    measures: dict[str, float] = field(default_factory=dict)  # of `measure_all`

    @property
    def val_counts(self) -> Tensor:
        """Return the number of images of each class: (C,) int64."""
        return self.calibrated.confusion.sum(1)

    @property
    def recall(self) -> Tensor:
        """Return the recall of each class: (C,) float64, NaN for one without images."""
        return recall_by_class(self.calibrated.confusion)


def judge(given: Given, logits_of_folds: Mapping[int, Tensor]) -> Evaluation:
    """Evaluate the logits of one or more folds by the images that judge these.

    Calibration is cross-fitted: no image influences its own numbers. They are fitted on the images
    of the other folds, or, with one fold, of its other parts; families stay together.
    """
    settings, data = given.settings, given.data
    places = torch.cat([data.judges(fold) for fold in logits_of_folds])
    logits = torch.cat([*logits_of_folds.values()])
    targets = data.labels[places]
    if not (settings.epochs and settings.calibrate):
        return assess(given, places, logits, Calibration(), logits.float())
    parts = cut_parts(targets, data.families[places])
    if len(logits_of_folds) > 1:
        folds = [torch.full((len(part),), fold) for fold, part in logits_of_folds.items()]
        parts = torch.cat(folds)
    log_share = data.log_share()
    left = LEFT + 1 - settings.power
    calibrated = torch.empty(logits.shape)
    for part in parts.unique():
        ours = parts == part
        fitted = fit_calibration(logits[~ours], targets[~ours], log_share, left)
        calibrated[ours] = fitted.apply(logits[ours], log_share)
    calibration = fit_calibration(logits, targets, log_share, left)
    return assess(given, places, logits, calibration, calibrated)


def assess(
    given: Given, places: Tensor, logits: Tensor, calibration: Calibration, calibrated: Tensor
) -> Evaluation:
    """Evaluate (M, C) logits of images, as trained and `calibrated`."""
    data = given.data
    targets = data.labels[places]
    # The probabilities of the true and of the predicted class come from one table: where these are
    # the same class, so are the two numbers.
    log_probability = calibrated.log_softmax(1)
    losses = -log_probability.gather(1, targets[:, None]).squeeze(1)
    evaluation = Evaluation(
        places=places,
        targets=targets,
        loss=(class_weights(targets) @ losses.double()).item(),
        true_probability=(-losses).exp(),
        auc=auc_by_class(log_probability.exp(), targets),
        calibrated=answer(log_probability, targets),
        as_trained=answer(logits.float().log_softmax(1), targets),
        natural=answer((calibrated + natural_shift(given)).log_softmax(1), targets),
        calibration=calibration,
    )
    return replace(evaluation, measures=measure_all(evaluation, data))


def answer(log_probability: Tensor, targets: Tensor) -> Answer:
    """Answer with the class of the highest probability; (M, C) and (M,) go in."""
    best, predicted = log_probability.max(1)
    confusion = confusion_matrix(targets, predicted, log_probability.shape[1])
    return Answer(predicted, best.exp(), confusion)


def natural_shift(given: Given) -> Tensor:
    """Return what to add to logits where classes are as frequent as in training: (C,) float32.

    Without calibration, what the sampler did not take away is in them already. A network that is
    only judged brings its own.
    """
    settings = given.settings
    shift = given.data.log_share() * (1.0 if settings.calibrate else settings.power)
    return given.recorded.get("natural", shift)


def cut_parts(targets: Tensor, families: Tensor) -> Tensor:
    """Cut M images at random into parts with as many families of each class: (M,) int64."""
    unique, family = families.unique(return_inverse=True)
    labels = torch.zeros_like(unique).scatter(0, family, targets)  # the class of each family
    order = torch.randperm(len(unique), generator=seeded("parts", 0, 0))
    order = order[labels[order].argsort(stable=True)]
    part = torch.zeros_like(unique)
    part[order] = torch.arange(len(unique)) % CALIBRATION_PARTS
    return part[family]


def class_weights(targets: Tensor) -> Tensor:
    """Return weights of M images with which each class counts the same: (M,) float64, sum 1."""
    weights = 1 / torch.bincount(targets)[targets].double()
    return weights / weights.sum()


def fit_calibration(
    logits: Tensor, targets: Tensor, log_share: Tensor, left: float = LEFT
) -> Calibration:
    """Fit the numbers with the lowest cross entropy of (M, C) logits; each class counts the same.

    The problem is convex. Few images tell little, so a prior worth `PRIOR` images holds the numbers
    near what is usual: a scale of 1 and a shift of `left` times the scale, since balanced training
    leaves that many log shares in the logits. Images with weights w that sum to 1 tell as much as
    1 / sum(w^2) images of equal weight (Kish 1965). A class without images counts as half an image
    in this, otherwise never predicting it would be the optimum.
    """
    if not len(targets):
        return Calibration(1.0, left)
    picked = pick_evenly(targets, MOST_FITTED // len(log_share))
    logits = logits[picked].double()
    targets = targets[picked]
    log_share = log_share.double()
    weights = class_weights(targets)
    counts = torch.bincount(targets, minlength=len(log_share)).clamp(min=0.5)
    prior = PRIOR * (1 / counts).mean() / len(counts)
    spread = max(log_share.std(correction=0).item(), LEAST_SPREAD)
    steps = (log_share - log_share.mean()) / spread
    numbers = torch.tensor([1.0, left * spread], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([numbers], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        scale, shift = numbers
        losses = F.cross_entropy(scale * logits - shift * steps, targets, reduction="none")
        far = (scale - 1) ** 2 + (shift - left * spread * scale) ** 2
        value = weights @ losses + prior * far
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    scale, shift = numbers.tolist()
    if scale < LEAST_SCALE:  # worse than chance: it is not turned round, but knows nothing
        return Calibration(LEAST_SCALE, left * LEAST_SCALE)
    return Calibration(scale, shift / spread)


def pick_evenly(labels: Tensor, most: int) -> Tensor:
    """Choose an equal part of each class, `most` of M images, or one of each class: (M,) bool."""
    order = labels.argsort(stable=True)
    counts = labels.bincount()
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]  # in its class
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[order] = place % math.ceil(len(labels) / most) == 0
    return chosen


# --------------------------------------------------------------------------- what is kept, the end


WRITE_EVERY = 30.0  # seconds; on a fast GPU the files of an epoch take longer than the epoch


def copy_state(module: nn.Module) -> dict[str, Tensor]:
    """Copy the state of a module into main memory."""
    return {key: value.to("cpu", copy=True) for key, value in module.state_dict().items()}


def store_epoch(given: Given, progress: Progress, stage_ends: bool) -> None:
    """Write the files of a run after an epoch: where a stage ends, or the last time is long ago."""
    if not stage_ends and time.perf_counter() - progress.written < WRITE_EVERY:
        return
    output = given.settings.output
    finished = progress.finished
    fold = progress.history[-1]["fold"] - 1
    if len(finished) > fold:  # the network of this fold is trained to the end
        save_tensors(output / f"fold-{fold + 1}.pt", finished[fold]._asdict())
    evaluation = progress.judged
    if fold:  # figures and network are of the folds trained to the end
        evaluation = judge(given, {place: done.logits for place, done in enumerate(finished)})
    write_network(given, list_voters(progress), evaluation.calibration)
    save_state(given, progress)
    write_reports(given, progress, Result(evaluation))
    progress.written = time.perf_counter()


def list_voters(progress: Progress) -> list[dict[str, Tensor]]:
    """Return the states of the networks whose mean of logits is the answer."""
    finished = [network for done in progress.finished for network in done.networks]
    members = progress.model if isinstance(progress.model, Vote) else [progress.model]
    return finished or [copy_state(network) for network in members]


def head_votes(progress: Progress) -> bool:
    """Return whether the last layer alone votes with all layers."""
    return any(len(done.networks) > 1 for done in progress.finished)


def scale_head(state: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Return the state of a network whose logits are `factor` times as large."""
    return state | {name: state[name] * factor for name in ("fc.weight", "fc.bias")}


def finish(given: Given, progress: Progress, reader: Reader) -> None:
    """Judge the networks of a run, test their vote, and write what there is to say of them."""
    settings, data, compute = given.settings, given.data, given.compute
    logits = {fold: done.logits for fold, done in enumerate(progress.finished)}
    if not settings.epochs:  # the network was given
        logits = {0: evaluate(given, progress.model, reader, data.judges(0))}
    networks = list_voters(progress)
    evaluation = judge(given, logits)
    test = None
    images = data.judges(TEST)
    if len(images):
        content = {"networks": networks, "classes": data.classes}
        vote: Any = build_model(settings.arch, data.classes, content)[0]
        vote.to(compute.device, memory_format=memory_format(compute.device))
        answers = evaluate(given, vote, reader, images, "test")
        fitted = evaluation.calibration
        calibrated = fitted.apply(answers, data.log_share())
        test = assess(given, images, answers, fitted, calibrated)
    if compute.rank == 0:
        result = Result(evaluation, test, done=True)
        write_network(given, networks, evaluation.calibration)
        complete = write_reports(given, progress, result)
        print_end(given, progress, result)
        if complete:
            output = settings.output
            for file in (output / STATE, output / START, *output.glob("fold-*.pt")):
                file.unlink(missing_ok=True)
        elif settings.epochs:
            text = f"mend that, then --resume {quote(str(settings.output))} writes all reports"
            print(f"warning: {printable(text)}", file=sys.stderr)


# ------------------------------------------------------------------------------------------- model


# The scale of weights that the learning rates are for, see `rescale`.
CONV_SCALE = 0.5
FEATURE_SCALE = 2.0


def find_weights(asked: str) -> tuple[str, dict[str, Any]]:
    """Return the name or file that `--weights` means, and what the file holds, {} for a name."""
    path = os.path.join(asked, NETWORK) if os.path.isdir(asked) else asked
    return path, read_weights(path) if os.path.isfile(path) else {}


def load_pretrained(settings: Settings) -> dict[str, Any]:
    """Return torchvision's weights of this name as one of "networks", {} for "none"."""
    if settings.weights == "none":
        return {}
    weights = models.get_model_weights(settings.arch)[settings.weights]
    return {"networks": [download(weights, settings.weights)]}


def read_weights(path: str) -> dict[str, Any]:
    """Read a network file of this script, or another state_dict as one of "networks"."""
    content = load_tensors(Path(path), "--weights", "torch.save a state_dict there")
    state: Any = content if isinstance(content, dict) else {}
    if "networks" in state and "classes" in state:
        return state
    state = state.get("state_dict", state.get("model", state))
    if not (state and all(isinstance(value, Tensor) for value in state.values())):
        raise DataError(f"--weights {path}: no weights in it; torch.save a state_dict there")
    return {"networks": [{key.removeprefix("module."): value for key, value in state.items()}]}


def download(weights: models.WeightsEnum, name: str) -> dict[str, Tensor]:
    """Load weights from torch's cache folder, after downloading them if they are not there."""
    try:
        return weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
    except Exception as error:  # a damaged file raises nearly anything
        text = f"{weights.url} could not be fetched or read ({error}); put the file into "
        text += f"{torch.hub.get_dir()}/checkpoints, or take --weights PATH or --weights none"
        raise DataError(f"--weights {name}: {text}") from None


class Head(nn.Linear):
    """The last layer. It computes in float32 also where the others do not.

    bfloat16 has 8 bits: of 120 logits the best two would often be equal.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits of (B, D) features: (B, C) float32."""
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.float())


class Vote(nn.ModuleList):
    """Several networks that vote: the mean of their logits."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of (B, 3, H, W) images: (B, C)."""
        return torch.stack([network(images) for network in self]).mean(0)


def build_model(
    arch: str, classes: list[str], content: Mapping[str, Any]
) -> tuple[models.ResNet | Vote, str]:
    """Build the network for `classes`, or a vote of several; say what became of the weights.

    The head of the weights is kept if it has the right size and, as far as known, these classes.
    """
    built = []
    origin = "a new network"
    for state in content.get("networks", [{}]):
        model = models.get_model(arch, weights=None, num_classes=len(classes))
        model.fc = Head(model.fc.in_features, len(classes))
        nn.init.zeros_(model.fc.weight)
        nn.init.zeros_(model.fc.bias)
        built.append(model)
        if not state:
            continue
        old = len(state.get("fc.bias", ()))
        keep = old == len(classes) and content.get("classes") in (None, classes)
        origin = "head kept" if keep else f"head of {old} classes dropped for a new one"
        backbone = {key: value for key, value in state.items() if not key.startswith("fc.")}
        try:
            model.load_state_dict(state if keep else backbone | model.fc.state_dict(prefix="fc."))
        except RuntimeError as error:
            reason = " ".join(str(error).split("\n\t")[1].split())[:200]
            text = f"not of a {arch}: {reason} ...; pass their --arch"
            raise DataError(f"--weights: {text}") from None
        if not all(value.isfinite().all() for value in model.state_dict().values()):
            raise DataError("--weights: of a training that failed: not finite; take others")
    if len(built) == 1:
        return built[0], origin
    return Vote(built), f"{len(built)} networks, {origin}"


@torch.no_grad()
def rescale(model: Any) -> None:
    """Bring weights to the scale that the learning rates are for; the outputs do not change.

    AdamW changes a weight by about the learning rate, whatever its size, and weight files differ a
    hundredfold in size. BatchNorm undoes the scale of a convolution, so each convolution gets a
    root mean square of `CONV_SCALE` / sqrt(fan-in). The head undoes the scale of the features, so
    the BatchNorms that add up to these get a root mean square of `FEATURE_SCALE`.
    """
    blocks = list(model.layer4)
    added = [getattr(block, "bn3", block.bn2) for block in blocks] + [blocks[0].downsample[1]]
    size = sum((norm.weight**2 + norm.bias**2).mean() for norm in added).sqrt()
    for norm in added:
        norm.weight *= FEATURE_SCALE / size
        norm.bias *= FEATURE_SCALE / size
    for layer in [block.conv1 for block in blocks[1:]] + [model.fc]:
        layer.weight *= size / FEATURE_SCALE
    kinds = nn.Conv2d | nn.BatchNorm2d
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, kinds)]
    for conv, norm in zip(layers[::2], layers[1::2], strict=True):
        factor = CONV_SCALE / conv.weight.square().sum((1, 2, 3)).mean().sqrt().clamp(min=1e-12)
        conv.weight *= factor
        norm.running_mean *= factor
        norm.running_var.add_(norm.eps).mul_(factor**2).sub_(norm.eps)


# -------------------------------------------------------------------------------------------- data


# Names of the folders that hold the parts of a data set, and the order in which they are used.
PARTS = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "test": 2, "testing": 2}


class Row(NamedTuple):
    """An image of the folders that the command line names."""

    path: str
    name: str  # class/file: its path below DATA, SRC or `--val`, with `/` on every system
    label: int
    part: str  # "train", "val", or "source" for an image of SRC, which validates as well
    held: int = EVERY  # as in `Data`


class Data(NamedTuple):
    """A table of N images of C classes. `learns` and `judges` say which network takes which."""

    classes: list[str]
    paths: list[str]
    names: list[str]  # as in `Row`
    labels: Tensor  # (N,) int64
    parts: list[str]  # as in `Row`
    held: Tensor  # (N,) int64, the fold that does not learn it; `EVERY`: all learn it, `TEST`: none
    families: Tensor  # (N,) int64, the same for images that stay together: copies, or `--group`
    digests: Tensor  # (N,) int64, see `digest`
    white: dict[str, float]  # the value that is white in images of more than 8 bits, by kind
    related: int  # number of images left out: copies or relatives of what is, or was, learnt
    unreadable: list[str]  # paths left out
    learnt: Tensor | None = None  # (C,) int64, counts that a network says it has learnt

    @property
    def folds(self) -> int:
        """Return the number of networks."""
        return max(0, int(self.held.max())) + 1

    def learns(self, fold: int) -> Tensor:
        """Return the images that the network of a fold learns: indices, int64."""
        return ((self.held != fold) & (self.held != TEST)).nonzero().flatten()

    def judges(self, fold: int) -> Tensor:
        """Return the images that judge a fold, or with `TEST` all folds: indices, int64."""
        return (self.held == fold).nonzero().flatten()

    def trained(self) -> Tensor:
        """Return the images that at least one network learns: indices, int64."""
        learnt = torch.cat([self.learns(fold) for fold in range(self.folds)])
        return learnt.bincount().nonzero().flatten()

    def judged(self) -> Tensor:
        """Return the images that judge the folds, one fold after the other: indices, int64."""
        return torch.cat([self.judges(fold) for fold in range(self.folds)])

    def counts(self, indices: Tensor) -> Tensor:
        """Count the images of each class among `indices`: (C,) int64."""
        return torch.bincount(self.labels[indices], minlength=len(self.classes))

    def train_counts(self) -> Tensor:
        """Count the images of each class that at least one network learns: (C,) int64."""
        return self.counts(self.trained()) if self.learnt is None else self.learnt

    def log_share(self) -> Tensor:
        """Return the log of each class's share of the training images, less their mean: (C,)."""
        logs = self.train_counts().log()
        return logs - logs.mean()  # a constant changes nothing, but costs half precision digits

    def take(self, indices: Tensor) -> Data:
        """Return the table of the images at `indices` alone."""
        places = indices.tolist()
        return self._replace(
            paths=[self.paths[place] for place in places],
            names=[self.names[place] for place in places],
            parts=[self.parts[place] for place in places],
            labels=self.labels[indices],
            held=self.held[indices],
            families=self.families[indices],
            digests=self.digests[indices],
        )


def list_rows(settings: Settings) -> tuple[list[str], list[Row]]:
    """List the classes, and the images of DATA, `--val` and `--source`, each with its part."""
    classes, rows = list_images(settings.data)
    if settings.val:
        rows += list_others(settings.val, "val", classes, rows)
        if all(row.part == "train" for row in rows):
            text = f"no image in folders named as those of {settings.data}"
            raise DataError(f"--val {settings.val}: {text}")
    if settings.source:
        rows += list_others(settings.source, "source", classes, rows)
    if settings.split:
        rows = take_split(settings.split, rows)
    if sum(row.part == "train" for row in rows) > 2**24:
        text = "over 2^24 training images; torch.multinomial draws no more"
        raise DataError(f"{settings.data}: {text}")
    return classes, rows


def load_data(settings: Settings, classes: list[str], rows: list[Row], known: Tensor) -> Data:
    """Read the listed images for a new run and decide who learns and who judges.

    `known` are the digests of the images that the network has learnt before: neither these nor
    their families judge it. Broken images are named and left out.
    """
    checked = check_images([row.path for row in rows])
    unreadable = [row.path for row in rows if row.path not in checked]
    rows = [row for row in rows if row.path in checked]
    if not rows:
        raise DataError(f"{settings.data}: no image that can be read")
    digests = torch.tensor([checked[row.path].digest for row in rows])
    families = torch.tensor(find_families(settings, rows, digests.tolist()))
    seen = torch.isin(families, families[torch.isin(digests, known)])
    rows = hold_images(settings, rows, families.tolist(), seen.tolist())
    data = Data(
        classes=classes,
        paths=[row.path for row in rows],
        names=[row.name for row in rows],
        labels=torch.tensor([row.label for row in rows]),
        parts=[row.part for row in rows],
        held=torch.tensor([row.held for row in rows]),
        families=families,
        digests=digests,
        white=pick_whites(checked),
        related=0,
        unreadable=unreadable,
    )
    data = leave_relatives(data, seen, is_trained=settings.epochs > 0)
    check_parts(settings, data, bool(seen.any()))
    return data


def leave_relatives(data: Data, seen: Tensor, is_trained: bool) -> Data:
    """Leave out images that would judge a network that knows them.

    These are copies and relatives of training images, if a network is trained on these, and images
    that it has `seen` before, (N,) bool.
    """
    learnt = torch.zeros_like(seen)
    learnt[data.trained()] = True
    copies = ~learnt & ~seen & torch.isin(data.families, data.families[learnt]) & is_trained
    left_out = copies | (seen & ~learnt)
    if copies.any():
        text = f"{int(copies.sum())} images are copies of training images, or of their families"
        first = data.paths[int(copies.nonzero()[0])]
        print(f"warning: {text}: left out, {printable(first)} for one", file=sys.stderr)
    if seen.any():
        text = f"the network of --weights has learnt {int(seen.sum())} of {len(seen)} images, or "
        text += "others of their families; these do not judge"
        if count := int((seen & left_out).sum()):
            text += f", and {count} of them are left out"
        print(f"note: {text}", file=sys.stderr)
    kept = data.take((~left_out).nonzero().flatten())
    return kept._replace(related=int(left_out.sum()))


def check_parts(settings: Settings, data: Data, seen: bool) -> None:
    """Raise `DataError` if a network has no image of a class to learn, or none to be judged by.

    `seen` says that it had learnt some of them before.
    """
    for fold in range(settings.folds):
        if bare := (data.counts(data.learns(fold)) == 0).nonzero().flatten().tolist():
            text = "no image of this class to train on that can be read; "
            text += "add one or remove the class"
            if (data.labels == bare[0]).any():
                text = "all images of this class validate; leave some of them to train on"
            text = f"{data.classes[bare[0]]}: {text}; such classes: {len(bare)}"
            raise DataError(f"{settings.split or settings.data}: {text}")
        if not len(data.judges(fold)):
            text = "no image differs from those trained on; nothing to validate on"
            if seen:
                text = "the network of --weights has learnt all images, or copies or relatives of "
                text += "them; nothing to validate on: name other images by --val"
            elif settings.split and set(data.parts) == {"train"} and not data.related:
                text = "names no image to validate on, as part val or source"
            raise DataError(f"{settings.val or settings.split or settings.data}: {text}")


def take_split(table: Path, rows: list[Row]) -> list[Row]:
    """Return the rows that the table `--split` names, each with its part; count the others."""
    added = {row.name: row.part == "source" for row in rows}
    parts: dict[str, str] = {}
    wrong = []
    for line in read_table(table, "path", "part"):
        name = line["path"]
        part = line["part"]
        if part not in ("train", "val", "source"):
            wrong.append(f"{name}: no part {part!r}; write train, val or source")
        elif added.get(name) is not (part == "source"):
            where = "among what --source SRC adds to DATA" if part == "source" else "in DATA"
            wrong.append(f"{name}: not {where}; write class/file as there")
        elif name in parts:
            wrong.append(f"{name}: named before; leave one row of it")
        parts[name] = part
    if wrong:
        raise DataError(f"{table}: {wrong[0]}; such rows: {len(wrong)}")
    if left_out := len(rows) - len(parts):
        text = f"{table}: {left_out} images are not named there; left out"
        print(f"warning: {printable(text)}", file=sys.stderr)
    return [row._replace(part=parts[row.name]) for row in rows if row.name in parts]


def list_images(root: Path) -> tuple[list[str], list[Row]]:
    """List the classes of `root` and its images, all of part "train" for now."""
    classes = list_folders(root)
    if len(classes) < 2:
        raise DataError(f"{root}: fewer than two classes; pass the folder that holds the classes")
    rows, others = make_rows(root, classes, "train")
    refuse_parts(root, rows)
    empty = sorted(set(classes).difference(classes[row.label] for row in rows))
    if empty:
        text = f"no image in it, of {', '.join(IMG_EXTENSIONS)}; add some or remove the folder"
        raise DataError(f"{root / empty[0]}: {text}; such classes: {len(empty)}")
    tell_left_out(root, others)
    return classes, rows


def tell_left_out(root: Path, files: Collection[str]) -> None:
    """Print how many files are no images by their names, if any."""
    if files:
        kinds = ", ".join(sorted({Path(name).suffix or Path(name).name for name in files})[:9])
        text = f"{root}: {len(files)} files left out, whose names end in {kinds}"
        print(f"warning: {printable(text)}", file=sys.stderr)


def list_folders(root: Path) -> list[str]:
    """List the names of the folders in `root`, sorted, without hidden ones."""
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != ".")


def list_others(root: Path, part: str, classes: list[str], ours: list[Row]) -> list[Row]:
    """List the images of `--val`, or those of `--source` that have other names than `ours`."""
    if strange := ", ".join(sorted(set(list_folders(root)).difference(classes))):
        raise DataError(f"--{part} {root}: not classes of DATA: {strange}; rename or remove")
    rows, _ = make_rows(root, classes, part)
    known = {row.name for row in ours} if part == "source" else set()
    return [row for row in rows if row.name not in known]


def make_rows(root: Path, classes: list[str], part: str) -> tuple[list[Row], list[str]]:
    """List the images in the class folders of `root`, and the other files there.

    They come by class, and in a class by folder and name, as `torchvision.datasets.ImageFolder`
    lists them.
    """
    labels = {name: label for label, name in enumerate(classes)}
    rows = []
    others = []
    for path in walk_files(str(root)):
        name = path.removeprefix(str(root)).replace(os.sep, "/").lstrip("/")
        top, _, file = name.partition("/")
        if not file or top not in labels:
            continue
        if name.lower().endswith(IMG_EXTENSIONS):
            rows.append(Row(path, name, labels[top], part))
        else:
            others.append(path)
    return sorted(rows, key=lambda row: (row.label, os.path.split(row.path))), others


def walk_files(folder: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Yield the path of every file below `folder`; follow links, leave out what is hidden.

    Raises `DataError` for a link that leads back to one of the folders `above` it.
    """
    info = os.stat(folder)
    # The same folder, whatever its name. Some drives of Windows number nothing.
    here = info.st_dev, info.st_ino or hash(os.path.realpath(folder))
    if here in above:
        raise DataError(f"{folder}: this link leads back to a folder above it; remove it")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from walk_files(entry.path, (*above, here))
            else:
                yield entry.path


def refuse_parts(root: Path, rows: list[Row]) -> None:
    """Raise `DataError` if the folders are parts of a data set, as `data_creation.py` tells them.

    One is named for training, all its images in sub-folders, and another for validation or testing;
    or each is named a fold and has sub-folders alone.
    """
    tops = [row.name.split("/") for row in rows]
    words = {name: re.findall("[a-z]+", name.lower()) for name in sorted({top[0] for top in tops})}
    places = {name: PARTS[word] for name in words for word in words[name] if word in PARTS}
    flat = {top[0] for top in tops if len(top) == 2}
    nested = [name for name in words if name not in flat]
    if any(places.values()) and 0 in [places.get(name) for name in nested]:
        nested = sorted(places.keys() & nested, key=lambda name: (places[name], name))
    elif flat or not all({"fold", "split", "part"}.intersection(found) for found in words.values()):
        return
    train, *others = [root / name for name in nested]
    command = f"data_training.py {train}" + (f" --val {others[0]}" if others else "")
    names = " and ".join([train.name, others[0].name] if others else sorted(places))
    text = f"{names} look like parts of a data set, not classes (else move their images up to them)"
    raise DataError(f"{root}: {text}; run {command}")


def find_families(settings: Settings, rows: list[Row], digests: Sequence[int]) -> list[int]:
    """Return a number for each row, the same in a family: copies, and what `--group` matches."""
    parent: dict[int | str, int | str] = {}  # a forest (union-find), in which each tree is a family

    def root(key: int | str) -> int | str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    unmatched = 0
    for row, content in zip(rows, digests, strict=True):
        match = re.search(settings.group, row.name.partition("/")[2]) if settings.group else None
        name = match and match[min(1, match.re.groups)]
        unmatched += name is None
        parent[root(content)] = root(row.path if name is None else f"--group {name}")
    numbers: dict[int | str, int] = {}
    families = [numbers.setdefault(root(content), len(numbers)) for content in digests]
    if settings.group and unmatched == len(rows):
        raise DataError(f"--group {settings.group}: matches no image, by its path below its class")
    if settings.group and len(numbers) == 1:
        raise DataError(f"--group {settings.group}: makes all images one family; name what differs")
    if settings.group:
        text = f"--group: {len(numbers)} families of {len(rows)} images"
        text += f"; {unmatched} do not match and are one each" if unmatched else ""
        print(text, file=sys.stderr)
    elif settings.folds > 1 or not (settings.val or settings.split):
        suggest_group(rows)
    return families


def suggest_group(rows: list[Row]) -> None:
    """Print how to keep families together, if most classes have file names that suggest some."""
    stems: dict[int, Counter[str]] = defaultdict(Counter)
    for row in rows:
        stems[row.label][re.sub(r"[\W_]*\d+$", "", Path(row.name).stem)] += 1
    alike = sum(5 <= len(counts) <= counts.total() / 2 for counts in stems.values())
    if alike > len(stems) / 2:
        text = "note: file names differ in a last number alone; if those are images of one patient,"
        text += " film or object, keep them together: --group "
        print(text + quote(r"^(.+?)[\W_]*\d+\.\w+$"), file=sys.stderr)


def hold_images(
    settings: Settings, rows: list[Row], families: Sequence[int], seen: Sequence[bool]
) -> list[Row]:
    """Return the rows, each with the fold that holds it out; families stay together.

    With folds, images from elsewhere than DATA test the vote. Images that the network has `seen`
    before are not held out, unless the user has named them.
    """
    folds = settings.folds
    elsewhere = TEST if folds > 1 else 0
    held = [row._replace(held=EVERY if row.part == "train" else elsewhere) for row in rows]
    ours = [i for i, row in enumerate(rows) if row.part == "train"]
    settled = {families[i] for i in ours if seen[i]}
    shares = [1 - settings.val_fraction, settings.val_fraction]
    if folds > 1:
        ours = [i for i in ours if not seen[i]]
        check_folds(settings, rows, families, ours)
        shares = [1 / folds] * folds
    elif settings.val or settings.split:
        return held
    # Their order depends on their names and the seed alone, whatever else is there.
    names = [f"{settings.seed}/{rows[i].name}".encode(errors="surrogateescape") for i in ours]
    order = [hashlib.sha256(name).digest() for name in names]
    labels = [rows[i].label for i in ours]
    parts = deal(labels, [families[i] for i in ours], order, shares, settled)
    for index, part in zip(ours, parts, strict=True):
        if folds > 1:
            held[index] = rows[index]._replace(held=part)
        elif part == 1:
            held[index] = rows[index]._replace(part="val", held=0)
    return held


def check_folds(
    settings: Settings, rows: list[Row], families: Sequence[int], ours: list[int]
) -> None:
    """Raise `DataError` if the images at the indices `ours` cannot be cut into `--folds` parts."""
    if settings.split and any(row.part == "val" for row in rows):
        text = "names validation images, which folds choose themselves; name them train"
        raise DataError(f"--folds {settings.folds}: {settings.split} {text}")
    counts = Counter({row.name.split("/")[0]: 0 for row in rows if row.part == "train"})
    counts.update(name for name, _ in {(rows[i].name.split("/")[0], families[i]) for i in ours})
    # Of classes without any image `check_parts` tells.
    fewest, name = min(((count, name) for name, count in counts.items()), default=(0, ""))
    if name and fewest < settings.folds:
        text = f"the largest that fits is {fewest}" if fewest >= 3 else "add images, or drop it"
        kind = "families" if settings.group else "different images"
        if len(ours) < sum(row.part == "train" for row in rows):
            kind += " that the network of --weights has not learnt"
        raise DataError(f"--folds {settings.folds}: class {name} has {fewest} {kind}; {text}")


def deal(
    labels: Sequence[int],
    families: Sequence[Any],
    order: Sequence[bytes],
    shares: Sequence[float],
    settled: Collection[Any] = (),
) -> list[int]:
    """Return the part of each image, so that each part gets about its share of each class.

    The families that are `settled` go to the first part. The others, largest first and otherwise in
    `order`, go where they bring the counts closest to those wanted, by the sum over classes of
    squared differences / wanted. Every part gets every class that has enough families, the first
    of two parts (the one to train on) first.
    """
    counts = Counter(labels)
    members: dict[Any, list[int]] = defaultdict(list)
    for index, family in enumerate(families):
        members[family].append(index)
    wanted = share_out(counts, shares)
    missing = [dict(part) for part in wanted]
    groups = sorted(
        members.items(),
        key=lambda item: (item[0] not in settled, -len(item[1]), min(order[i] for i in item[1])),
    )
    insides = [Counter(labels[index] for index in group) for _, group in groups]
    left = Counter(label for inside in insides for label in inside)  # families to come
    bare = {label: [part for part, each in enumerate(wanted) if each[label]] for label in counts}

    def gain(part: int, inside: Counter[int]) -> tuple[bool, float, int]:
        needed = any(left[c] <= len(bare[c]) and part in bare[c][: left[c]] for c in inside)
        closer = sum(
            n * (2 * missing[part][c] - n) / wanted[part][c] if wanted[part][c] else -math.inf
            for c, n in inside.items()
        )
        return needed, closer, (min(inside) - part) % len(shares) if len(shares) > 2 else -part

    parts = [0] * len(labels)
    for (family, group), inside in zip(groups, insides, strict=True):
        best = 0
        if family not in settled:
            best = max(range(len(shares)), key=lambda part: gain(part, inside))
        for label in inside:
            left[label] -= 1
            bare[label] = [part for part in bare[label] if part != best]
        for index in group:
            parts[index] = best
            missing[best][labels[index]] -= 1
    return parts


def share_out(counts: Mapping[int, int], shares: Sequence[float]) -> list[dict[int, float]]:
    """Return how many images of each class each part should get; of two parts whole numbers."""
    wanted = [{label: share * count for label, count in counts.items()} for share in shares]
    if len(shares) == 2:
        for label, count in counts.items():
            wanted[1][label] = min(max(1, round(shares[1] * count)), count - 1)
            wanted[0][label] = count - wanted[1][label]
    return wanted


# ----------------------------------------------------------------------------------------- reading


# Crops of half to all of an image enlarge what they show, by a fifth on average; evaluation makes
# up for most of it by images up to so much larger (Touvron et al. 2019, arXiv:1906.06423).
EVAL_SCALE = 8 / 7
STRIDE = 32  # pixels a cell of a ResNet's last feature map
COPIES = "data_training-copies-"  # begins the name of a temporary folder
APART = 8  # largest values of images of over 8 bits that lie further apart get a warning
# Pillow keeps the upper half of colours of 16 bits, which is black where 12 bits are used.
DEEP_TIFF = "a TIFF with colours of over 8 bits"
CONVERT = (  # 16 bits stay 16 bits
    "import cv2, pathlib; [cv2.imwrite(f'{p}.png', i) for p in pathlib.Path('DATA').rglob('*.*') "
    "if p.suffix.lower() in ('.tif', '.tiff') and (i := cv2.imread(str(p), -1)) is not None "
    "and i.ndim == 3 and i.dtype == 'uint16']"
)
NO_ROOM = "out of memory as it was read; remove or shrink it, or close other programs"
COPIED_TOGETHER = 100  # batches of features


class Checked(NamedTuple):
    """A file that can be decoded."""

    digest: int
    kind: str  # as of `deep_pixels`
    peak: float  # its largest value, 0 for images of 8 bits
    pages: int  # in a TIFF


def check_images(paths: list[str]) -> dict[str, Checked]:
    """Decode every file: what is known of those that can be, by path.

    The others are named on stderr. Raises `DataError` for values that are negative or not finite.
    """
    checked: dict[str, Checked] = {}
    deep = 0
    with ThreadPool() as pool:  # Pillow and hashlib let other threads run meanwhile
        found = pool.imap(check_image, paths, chunksize=16)
        bar = tqdm(found, "checking", len(paths), unit=" images", leave=False, disable=None)
        for path, result in zip(paths, bar, strict=True):
            if isinstance(result, Checked):
                checked[path] = result
                continue
            deep += result == DEEP_TIFF
            tqdm.write(f"warning: {printable(f'{path}: {result}')}; left out", sys.stderr)
    if deep:
        text = f"{deep} TIFFs have colours of over 8 bits, which Pillow cannot read. This writes a "
        text += "PNG beside each below DATA: pip install opencv-python-headless && python -c "
        print(f'warning: {text}"{CONVERT}"', file=sys.stderr)
    if several := [path for path, result in checked.items() if result.pages > 1]:
        text = f"{len(several)} TIFFs have several pages, of which only the first is read"
        print(f"warning: {text}, {printable(several[0])} for one", file=sys.stderr)
    return checked


def check_image(path: str) -> Checked | str:
    """Decode a file and return what is known of it, or else why it cannot be decoded."""
    try:
        content = read_bytes(path)
        with Image.open(io.BytesIO(content)) as image:
            image.draft("RGB", (1, 1))  # JPEG: every byte is decoded, to an eighth of the size
            image.load()
            kind, values = deep_pixels(image, content)
            pages = 1
            if image.format == "TIFF":
                with contextlib.suppress(Exception):  # of a later page that is broken
                    pages = image.n_frames
    except Exception as error:  # Pillow raises nearly anything on a broken file
        if isinstance(error, MemoryError):
            raise DataError(f"{printable(path)}: {NO_ROOM}") from None
        if getattr(error, "errno", None) in FAILING:
            raise
        known = {UnidentifiedImageError: "not an image", DataError: "no regular file"}
        return known.get(type(error)) or str(error) or type(error).__name__
    peak = float(values.max(initial=0))
    if not 0 <= values.min(initial=0) <= peak < math.inf:
        text = "values below 0 or not finite; shift them, or remove the image"
        raise DataError(f"{printable(path)}: {text}")
    return Checked(digest(content), kind, peak, pages)


def read_bytes(path: str) -> bytes:
    """Return the content of a regular file; to open a pipe would wait for ever."""
    if not os.path.isfile(path):
        raise DataError(f"{printable(path)}: no regular file; remove it")
    try:
        return Path(path).read_bytes()
    except OSError as error:  # a disk that fails names no file
        raise OSError(error.errno, error.strerror, path) from None


def digest(content: bytes) -> int:
    """Return the first 64 bits of the SHA-256 of `content`, as a signed integer.

    That any of a million images has the digest of one of a million others is a chance of 1 in 18
    million.
    """
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big", signed=True)


def deep_pixels(picture: Image.Image, content: bytes) -> tuple[str, np.ndarray[Any, Any]]:
    """Return kind and values of an image of more than 8 bits a channel, else "" and none.

    "I" are whole numbers, "F" fractions; (height, width) or (height, width, 3).
    """
    if picture.mode.startswith(("I", "F")):
        return picture.mode[0], np.asarray(picture)
    if picture.format == "TIFF" and max(getattr(picture, "tag_v2", {}).get(258, (8,))) > 8:
        raise ValueError(DEEP_TIFF)
    if picture.format == "PNG" and picture.mode in ("RGB", "RGBA", "LA") and content[24] == 16:
        encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return "I", decode_image(encoded, ImageReadMode.RGB).permute(1, 2, 0).numpy()
    return "", np.empty(0)


def pick_whites(checked: Mapping[str, Checked]) -> dict[str, float]:
    """Return the value that is white in images of more than 8 bits, by kind.

    One for all images of a kind: it must be the same in training and in use, files rarely tell
    how many of their 16 bits are used, and a white of each image's own would make a dark image as
    bright as any other. So images of 12 bits are nearly black beside one of 16: that is said.
    """
    whites = {}
    for kind in sorted({result.kind for result in checked.values()} - {""}):
        peaks = {path: result.peak for path, result in checked.items() if result.kind == kind}
        whites[kind] = pick_white(kind, max(peaks.values()))
        dark = [path for path, peak in peaks.items() if APART * peak < max(peaks.values())]
        if dark:
            text = f"{len(dark)} of {len(peaks)} images of more than 8 bits are nearly black: "
            text += f"{dark[0]} has no value above {peaks[dark[0]]:g}, where {whites[kind]:g} is "
            text += "white for all; if they use fewer bits, scale them up, or train without them"
            print(f"warning: {printable(text)}", file=sys.stderr)
    return whites


def pick_white(kind: str, peak: float) -> float:
    """Return what is white if no pixel exceeds `peak`: the next usual value, else that itself."""
    usual = (255, 1023, 4095, 16383, 65535) if kind == "I" else (1, 255, 4095, 65535)
    return next((white for white in usual if peak <= white), peak)


def read_image(path: str, white: Mapping[str, float], least: int = 0) -> Tensor:
    """Decode an image upright and in RGB, over white where transparent: (3, H, W) uint8.

    With `least` an image of over twice the pixels of `least` x `least` is shrunk, for training,
    evaluation and `--predict` alike. Raises `DataError` if the file cannot be decoded.
    """
    content = read_bytes(path)
    try:
        # Reads the header alone, and raises if it claims too many pixels.
        picture: Image.Image = Image.open(io.BytesIO(content))
        size = picture.size
        large = 0 < 2 * least**2 < min(size) ** 2
        if large:  # a JPEG is decoded to a half, quarter or eighth, no side shorter than `least`
            picture.draft(None, (least, least))
        kind, values = deep_pixels(picture, content)
        plain = picture.size == size and not picture.has_transparency_data
        if kind:
            picture = to_8_bits(picture, values, white.get(kind) or pick_white(kind, values.max()))
        elif plain and picture.format in ("JPEG", "PNG"):
            with contextlib.suppress(RuntimeError):  # some rare files only Pillow reads
                encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                image = decode_image(encoded, ImageReadMode.RGB, apply_exif_orientation=True)
                return shrink(image, least) if large else image
        picture = ImageOps.exif_transpose(picture)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        if large and picture.mode == "L":  # one channel is shrunk in a third of the time
            return shrink(v2.functional.pil_to_tensor(picture), least)
        image = v2.functional.pil_to_tensor(picture.convert("RGB"))
        return shrink(image, least) if large else image
    except MemoryError:
        raise DataError(f"{printable(path)}: {NO_ROOM}") from None
    except Exception as error:  # Pillow raises nearly anything on a broken file
        known = str(error) if isinstance(error, ValueError) else type(error).__name__
        reason = f"cannot be decoded ({known}); remove it"
        raise DataError(f"{printable(path)}: {reason}") from None


def to_8_bits(picture: Image.Image, values: np.ndarray[Any, Any], white: float) -> Image.Image:
    """Return a picture of 8 bits with `values` scaled so that `white` is 255."""
    if not 0 <= values.min() <= values.max() < math.inf:
        raise ValueError("below 0 or not finite")
    with np.errstate(over="ignore"):  # of a photo to predict, which may be brighter than `white`
        scaled = np.multiply(values, 255 / white, dtype=np.float32)
    scaled += 0.5  # in place, as below: memory that is new takes longer than arithmetic
    np.minimum(scaled, 255, out=scaled)
    result = Image.fromarray(scaled.astype(np.uint8))
    result.getexif().update(picture.getexif())
    if "A" in picture.getbands():
        result.putalpha(picture.getchannel("A"))
    return result


def shrink(image: Tensor, least: int) -> Tensor:
    """Bring the shorter side to `least` pixels; each pixel is the mean of what it covers.

    The colours of a pixel lie side by side in memory, as decoders leave them: crops are taken
    faster from that. One channel becomes three.
    """
    small = v2.functional.resize(image, [least]).expand(3, -1, -1)
    return small.permute(1, 2, 0).contiguous().permute(2, 0, 1)


class Copies(NamedTuple):
    """Shrunk images in a temporary folder, a file each; all workers and processes share them.

    A copy changes no pixel. Where none can be kept, the original is read and shrunk again.
    """

    folder: str
    reserve: int = 0  # bytes of the disk that stay free
    lock: int | None = None  # of process 0, while it reads; None where there is no folder

    def load(self, index: int) -> Tensor | None:
        """Load the copy of an image, if there is one: (3, H, W) uint8."""
        try:
            return torch.from_numpy(np.load(f"{self.folder}/{index}.npy")).permute(2, 0, 1)
        except OSError:
            return None

    def keep(self, index: int, image: Tensor) -> None:
        """Write a copy if there is room; others see the whole file or none."""
        unfinished = f"{self.folder}/unfinished-{os.getpid()}.npy"
        with contextlib.suppress(OSError):  # a full disk, or a run that is just ending
            if shutil.disk_usage(self.folder).free - image.nbytes > self.reserve:
                np.save(unfinished, image.permute(1, 2, 0).numpy())
                os.replace(unfinished, f"{self.folder}/{index}.npy")

    def describe(self) -> bool:
        """Print how many copies there are, if any, and return whether there are."""
        sizes = [file.stat().st_size for file in Path(self.folder).glob("[0-9]*.npy")]
        if sizes:
            text = f"copies of {len(sizes):,} images so far, {sum(sizes) / 1e9:.1f} GB"
            print(f"{text}, in {self.folder}", file=sys.stderr)
        return bool(sizes)


def make_copies() -> Copies:
    """Make a folder for copies, at most a quarter of the free disk; remove those of killed runs."""
    try:
        remove_leftovers(tempfile.gettempdir())
        home = Path(tempfile.mkdtemp(prefix=COPIES))
        lock = lock_file(home / LOCK)
        (home / "kept").mkdir()
        return Copies(f"{home}/kept", shutil.disk_usage(home).free * 3 // 4, lock)
    except (OSError, DataError):  # nothing can be written
        return Copies(os.devnull)  # below which there is no file


@cache  # a process is not kept out by locks of its own
def remove_leftovers(root: str) -> None:
    """Remove the copies of processes that have ended."""
    for lock in Path(root).glob(f"{COPIES}*/{LOCK}"):
        with contextlib.suppress(OSError, DataError):  # of another user, or in use
            remove_copies(lock.parent, lock_file(lock))


def remove_copies(home: Path, lock: int) -> None:
    """Remove the copies and their lock, which goes last: until then they are leftovers."""
    with contextlib.suppress(OSError):  # renamed first, so that workers cannot add to it meanwhile
        (home / "kept").rename(home / "removed")
    shutil.rmtree(home / "removed", ignore_errors=True)
    os.close(lock)
    shutil.rmtree(home, ignore_errors=True)


@dataclass(frozen=True)
class Images(Dataset[tuple[Tensor, int]]):
    """Images by (index, seed): the same pair gives the same pixels in any process."""

    data: Data
    training: nn.Module  # draws its augmentation from torch's default generator
    evaluation: nn.Module
    least: int  # pixels a side that they need
    copies: Copies

    def __getitem__(self, item: Sequence[int]) -> tuple[Tensor, int]:
        """Return the image as (S, S, 3) uint8, and its label."""
        index, seed = map(int, item)
        transform = self.evaluation if seed == EVALUATED else self.training
        image = self.read(index)
        torch.default_generator.manual_seed(seed)
        return transform(image).permute(1, 2, 0), int(self.data.labels[index])

    def read(self, index: int) -> Tensor:
        """Return the image, shrunk, from its copy if there is one: (3, H, W) uint8."""
        copied = self.copies.load(index)
        if copied is not None:
            return copied
        image = read_image(self.data.paths[index], self.data.white, self.least)
        if min(image.shape[1:]) == self.least:  # shrunk
            self.copies.keep(index, image)
        return image


def leave_interrupts(_: int) -> None:
    """Leave Ctrl-C and the like, which may be sent to every process, to the first one."""
    for number in (signal.SIGINT, *STOPS):
        signal.signal(number, signal.SIG_IGN)


class Reader:
    """Reads images, by workers that live as long as it does.

    One loader does for the whole run: a spawned worker takes four seconds to its first batch.
    """

    def __init__(self, given: Given):
        """Read the images of a run."""
        settings, data = given.settings, given.data
        self.compute = given.compute
        self.copies = first_makes(make_copies, given.compute)
        self.described = self.compute.rank > 0
        if self.compute.rank == 0 and self.copies.lock is not None:
            # Removed with the reader, or at the end of the program.
            weakref.finalize(self, remove_copies, Path(self.copies.folder).parent, self.copies.lock)
        self.batches: list[Any] = []  # of a pass; the loader walks through them anew in each
        training, evaluation = transforms(settings)
        least = given.recorded.get("least_side", least_side(settings))
        self.loader = DataLoader(
            Images(data, training, evaluation, least, self.copies),
            batch_sampler=self.batches,
            num_workers=settings.workers,
            persistent_workers=settings.workers > 0,
            worker_init_fn=leave_interrupts,
            pin_memory=settings.device in PINNED,
            multiprocessing_context=start_method() if settings.workers else None,
        )
        if settings.workers and given.compute.world_size > 1:
            iter(self.loader)  # its workers start: once NCCL runs, a fork may hang (docs of DDP)

    def read(self, batches: Sequence[Tensor], title: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (B, S, S, 3) uint8 and labels (B,) of `batches`, behind a progress bar."""
        self.described = self.described or self.copies.describe()
        self.batches[:] = [batch.numpy() for batch in batches]
        loaded = iter(self.loader)
        for _ in show_progress(batches, title, self.compute):
            yield next(loaded)


class Features(NamedTuple):
    """A reader of features: what the backbone computed from every image."""

    table: Tensor  # (N, D) float16
    labels: Tensor
    compute: Compute

    def read(self, batches: Sequence[Tensor], title: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features (B, D) float32 and labels (B,) of `batches`, behind a progress bar."""
        for batch in show_progress(batches, title, self.compute):
            yield self.table[batch[:, 0]].float(), self.labels[batch[:, 0]]


Inputs = Reader | Features


@torch.no_grad()
def extract_features(given: Given, model: models.ResNet, reader: Reader) -> Tensor:
    """Compute what the backbone makes of each image, BatchNorm as in evaluation: (N, D) float16.

    Half precision is enough for the head, and each process holds the features of all images.
    """
    compute = given.compute
    backbone = copy.deepcopy(model).eval()
    backbone.fc = nn.Identity()
    ours = torch.arange(compute.rank, len(given.data.labels), compute.world_size)
    batches = cut_batches(ours, math.ceil(given.settings.batch_size / compute.world_size))
    rows: list[Tensor] = []
    on_device: list[Tensor] = []  # of the last batches: to copy each at once would wait for it
    for images, _ in reader.read(batches, "features"):
        with compute.autocast():
            on_device.append(backbone(to_input(images, compute.device)).half())
        if len(on_device) == COPIED_TOGETHER:
            rows.append(torch.cat(on_device).cpu())
            on_device.clear()
    rows += [features.cpu() for features in on_device]
    return gather(torch.cat(rows), compute)


def show_progress(batches: Sequence[Tensor], title: str, compute: Compute) -> Iterable[Tensor]:
    """Put `batches` behind a progress bar where stderr is a terminal, in process 0 alone."""
    hidden = compute.rank > 0 or None  # None: unless it is a terminal
    return tqdm(batches, title, unit=" batches", leave=False, disable=hidden)


def turn(image: Tensor) -> Tensor:
    """Turn an image by 0, 90, 180 or 270 degrees, at random."""
    return image.rot90(int(torch.randint(4, ())), (-2, -1))


def transforms(settings: Settings) -> tuple[nn.Module, nn.Module]:
    """Return the transforms for training (a random crop, mirrored or not) and for evaluation."""
    size = settings.image_size
    crop = v2.RandomResizedCrop(size, (settings.crop_scale, 1.0))
    flips = [v2.RandomHorizontalFlip(0.0 if settings.flip == "none" else 0.5)]
    turns = [turn] if settings.flip == "all" else []
    return v2.Compose([crop, *flips, *turns]), central_square(eval_size(size))


def central_square(size: int) -> nn.Module:
    """Return the transform of evaluation: the central square, `size` pixels a side."""
    return v2.Compose([v2.Resize(size), v2.CenterCrop(size)])


def least_side(settings: Settings) -> int:
    """Return the pixels a side that an image needs for its smallest crop not to be enlarged.

    A crop shows `--crop-scale` of the area at least, in proportions up to 3 : 4.
    """
    return math.ceil(settings.image_size * math.sqrt(4 / 3 / settings.crop_scale))


def eval_size(size: int) -> int:
    """Return the side of the images that are evaluated, for crops of `size`: 256 for 224.

    A last feature map with a part of a cell more, 3 x 3 for 2 x 2, can ruin a small network.
    """
    return max(size, int(EVAL_SCALE * size) // STRIDE * STRIDE)


# ---------------------------------------------------------------------------------------- measures


MANY = 100  # "many": more training images than that
FEW = 20  # "few": fewer
BINS = 15  # of probability, to measure calibration by
ONE_TELLS = 0.3  # in place of n - 1 for a class of one image, among many
PRIOR_FAMILIES = 2  # for which it counts that images of one family may all be alike


def confusion_matrix(targets: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Return how often each class was taken for each: (C, C) int64, rows true."""
    pairs = torch.bincount(targets * classes + predicted, minlength=classes**2)
    return pairs.reshape(classes, classes)


def recall_by_class(confusion: Tensor) -> Tensor:
    """Return the recall of each class: (C,) float64, NaN for a class without images."""
    return confusion.diag().double() / confusion.sum(1)


def f1_by_class(confusion: Tensor) -> Tensor:
    """Return the F1 of each class, 0 if never right: (C,) float64, NaN without images."""
    right = confusion.diag().double()
    val_counts = confusion.sum(1)
    return torch.where(val_counts > 0, 2 * right / (val_counts + confusion.sum(0)), math.nan)


def precision_in_use(confusion: Tensor, frequency: Tensor) -> Tensor:
    """Return the part of what would be called each class that is of it: (C,) float64.

    Where classes are as frequent as `frequency` (C,) says, whatever the skew of the images that
    judge. NaN for a class without images, or that nothing is taken for.
    """
    rates = confusion.double() / confusion.sum(1, keepdim=True)
    called = frequency.double()[:, None] * rates
    return called.diag() / called.nansum(0)


def auc_by_class(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return the area under the ROC curve of each class against the rest: (C,) float64.

    That is how often an image of the class has a higher probability of it than an image of another
    class, ties half; each other class counts the same. NaN for a class without images, or alone.
    `probabilities` are (M, C), `targets` (M,) int64.
    """
    counts = torch.bincount(targets, minlength=probabilities.shape[1])
    known = counts.nonzero().flatten().tolist()
    areas = torch.full((len(counts),), math.nan, dtype=torch.float64)
    for label in known:
        ours = targets == label
        weights = torch.where(ours, 0, 1 / counts[targets].double()) / (len(known) - 1)
        _, rank = probabilities[:, label].unique(return_inverse=True)
        others = torch.bincount(rank, weights)
        lower = others.cumsum(0) - others / 2
        areas[label] = lower[rank[ours]].mean()
    return areas


def effective_counts(
    values: Tensor, targets: Tensor, families: Tensor, classes: int
) -> tuple[Tensor, Tensor]:
    """Return as how many independent images those of each class tell, and of how many families.

    (C,) float64 and (C,) int64, of M images with `values` (1 where right, else 0), whose mean in
    the class is asked for. Images of one family (scans of one patient) may be alike: the variance
    of the mean is that between families, over what it would be without families the design effect
    (Kish 1965). As few families estimate it badly, `PRIOR_FAMILIES` are added which say that all
    images of a family are alike. Without families it is the number of images.
    """
    width = int(families.max()) + 1
    pairs, member = (targets * width + families).unique(return_inverse=True)
    label = pairs // width
    values = values.double()
    counts = torch.bincount(targets, minlength=classes).double()
    mean = torch.bincount(targets, values, classes) / counts
    square = torch.bincount(targets, values**2, classes) / counts - mean**2
    sizes = torch.bincount(member, minlength=len(label)).double()
    excess = torch.bincount(member, values, len(label)) - sizes * mean[label]
    groups = torch.bincount(label, minlength=classes)
    between = torch.bincount(label, excess**2, classes) / counts**2 * groups / (groups - 1)
    # Both are 1 / (images - 1): if all of a family are alike, and as it was seen.
    alike = 1 / (counts**2 / torch.bincount(label, sizes**2, classes) - 1)
    seen = torch.where(square > 1e-9, between / square, alike)
    mixed = ((groups - 1) * seen + PRIOR_FAMILIES * alike) / (groups - 1 + PRIOR_FAMILIES)
    tells = (1 + 1 / mixed.clamp(min=1 / (counts - 1))).where(groups > 1, 1.0)
    return torch.where(groups == counts, counts, tells), groups


def measure_weights(val_counts: Tensor, train_counts: Tensor) -> Tensor:
    """Return the weight of each class's recall in each of `MEASURES`: (5, C) float64, or NaN."""
    many = train_counts > MANY
    few = train_counts < FEW
    known = val_counts > 0
    rows = [val_counts, known, known & many, known & ~many & ~few, known & few]
    weights = torch.stack(rows).double()
    return weights / weights.sum(1, keepdim=True)


def wilson_interval(right: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ends of the 95 % interval for the part that is right of `counts` images.

    Those of Wilson 1927, with n - 1 in place of n, as the variance of a sample has it; of one image
    all is possible, and so of none.
    """
    part = (right.double() / counts).nan_to_num()
    n = (counts - 1).clamp(min=0)
    centre = 2 * n * part + Z**2
    half = Z * (Z**2 + 4 * n * part * (1 - part)).sqrt()
    low, high = (end / (2 * (n + Z**2)) for end in (centre - half, centre + half))
    return low.clamp(min=0), high.clamp(max=1)  # what rounding leaves would be shown as -0 %


def mean_interval(recall: Tensor, counts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return means of C recalls by `weights` (K, C), and the ends of their 95 % intervals: (K,).

    Score intervals (Martin Andres et al. 2011, Statistical Methods in Medical Research 20), which
    for one class are Wilson's, with n - 1 in place of n. To add each class's own limits as squares
    covers 86 % with 120 classes: most of those limits are lopsided, their mean is not.
    """
    recall = recall.nan_to_num()
    n = (counts - 1).clamp(min=ONE_TELLS)
    below, above = (lowest_mean(part, n, weights) for part in (recall, 1 - recall))
    mean = (weights * recall).sum(1)
    return mean, mean - below, mean + above


def lowest_mean(recall: Tensor, n: Tensor, weights: Tensor) -> Tensor:
    """Return how far below the mean that was seen the true one may be: (K,) float64.

    Of all recalls with a lower mean the likeliest ones are pulled down by r - p = pull * w * p *
    (1 - p) / n. The mean is then `pull` times its own variance lower, and that is Z of its standard
    deviations where pull * distance = Z^2.
    """
    low, high = (torch.full((len(weights), 1), end, dtype=torch.float64) for end in (Z**2, 1e12))
    for _ in range(60):
        pull = (low * high).sqrt()
        odds = pull * weights / n
        root = ((1 - odds) ** 2 + 4 * odds * (1 - recall)).sqrt()
        distance = (weights * (recall - 2 * recall / (1 + odds + root))).sum(1, keepdim=True)
        far = pull * distance > Z**2
        low, high = torch.where(far, low, pull), torch.where(far, pull, high)
    return distance.squeeze(1)


def measure(confusion: Tensor, train_counts: Tensor, effective: Tensor) -> dict[str, float]:
    """Return the measures of a confusion matrix, the interval of balanced accuracy, macro F1.

    `effective` (C,) are the images of each class that the interval counts.
    """
    weights = measure_weights(confusion.sum(1), train_counts)
    values, low, high = mean_interval(recall_by_class(confusion), effective, weights)
    f1 = f1_by_class(confusion).nanmean().item()
    measures = dict(zip(MEASURES, values.tolist(), strict=True))
    return measures | {"low": low[1].item(), "high": high[1].item(), "macro_f1": f1}


def measure_all(judged: Evaluation, data: Data) -> dict[str, float]:
    """Return what the history holds of an evaluation: its measures, calibrated and as trained."""
    trained = judged.as_trained.confusion
    train_counts = data.train_counts()
    right = judged.calibrated.predicted == judged.targets
    families = data.families[judged.places]
    effective, _ = effective_counts(right, judged.targets, families, len(train_counts))
    before = measure(trained, train_counts, trained.sum(1))
    return {
        "val_loss": judged.loss,
        **measure(judged.calibrated.confusion, train_counts, effective),
        **{f"as_trained_{name}": before[name] for name in MEASURES},
        "calibration_error": calibration_error(judged.targets, judged.calibrated),
        "logit_scale": judged.calibration.scale,
        "logit_shift": judged.calibration.shift,
    }


def calibration_error(targets: Tensor, answer: Answer) -> float:
    """Return the gap between probability and being right, each class counting the same.

    The expected calibration error of Guo et al. 2017 (arXiv:1706.04599), in `BINS` bins.
    """
    p = answer.probability.double()
    right = (answer.predicted == targets).double()
    gaps = class_weights(targets) * (p - right)
    bins = (p * BINS).long().clamp(max=BINS - 1)
    return torch.bincount(bins, gaps, BINS).abs().sum().item()


def compare(
    targets: Tensor, before: Tensor, after: Tensor, train_counts: Tensor, families: Tensor
) -> Rows:
    """Return what changed between two runs on the same images, by their answers: (M,) int64 each.

    A row for each of `MEASURES`: fractions before and after, their difference and the ends of its
    interval. Within a class an image is lost, as it was or won: -1, 0 or 1. To both the lost and
    the won a quarter is added for the interval (Agresti and Min 2005, Statistics in Medicine 24),
    since of few images none may differ. Images of one family count together.
    """
    classes = len(train_counts)
    old, new = (confusion_matrix(targets, predicted, classes) for predicted in (before, after))
    weights = measure_weights(new.sum(1), train_counts)
    change = (after == targets).double() - (before == targets).double()
    lost, won = (
        torch.bincount(targets[change == sign], minlength=classes).double() + 0.25
        for sign in (-1, 1)
    )
    effective, _ = effective_counts(change, targets, families, classes)
    n = new.sum(1) + 0.5
    variance = ((won + lost) / n - ((won - lost) / n) ** 2) / (effective - 0.5)
    one, two = (weights @ recall_by_class(matrix).nan_to_num() for matrix in (old, new))
    half = Z * (weights**2 @ variance).sqrt()
    low, high = (two - one - half).clamp(min=-1), (two - one + half).clamp(max=1)
    columns = {"before": one, "after": two, "difference": two - one, "low": low, "high": high}
    return to_rows({"measure": MEASURES, **columns})


# ---------------------------------------------------------------------------- records and going on


SMALL_FOLDER = 2500  # files; of fewer images, batches are smaller
RECORDED = ("train_images", "natural", "least_side", "folds")  # kept where nothing is trained
STATE_FORMAT = 4  # of the state of a stopped run, to be raised where another one cannot be read
RATE = 3e-4  # of AdamW, for pretrained weights
SCRATCH_RATE = 1e-3  # and for random ones


def prepare(args: Namespace, compute: Compute) -> tuple[Given, Progress]:
    """Read and build all that a run needs before its first epoch, or where it was stopped."""
    if args.resume:
        return load_run(args, compute)
    weights, content = find_weights(args.weights)
    settings = resolve_settings(args, compute, weights, content)
    if settings.epochs and len(content.get("networks", ())) == 2:  # without the head that votes
        network = scale_head(content["networks"][0], 0.5 / (1 - HEAD_SHARE))
        content = {**content, "networks": [network]}
    HELD.enter_context(hold_folder(settings.output))
    refuse_used(settings.output)  # once more: another run may just have ended there
    classes, rows = list_rows(settings)  # in no time, before weights may be downloaded
    content = content or load_pretrained(settings)
    known = content.get("learnt", torch.empty(0, dtype=torch.int64))
    data = load_data(settings, classes, rows, known)
    check_batches(settings, data, compute.world_size)
    baseline = load_baseline(settings.baseline, data) if settings.baseline else None
    torch.manual_seed(settings.seed)
    model, origin = build_model(settings.arch, data.classes, content)
    recorded: dict[str, Any] = {}
    if not settings.epochs:
        if "head kept" not in origin:
            text = "have no head for these classes; train one, or name folders as in its training"
            raise DataError(f"--epochs 0: the weights {settings.weights} {text}")
        data = data._replace(white=data.white | content.get("white", {}))
        recorded = {name: content[name] for name in RECORDED if name in content}
        if "train_images" in recorded:
            data = data._replace(learnt=torch.tensor(recorded["train_images"]))
    elif settings.weights != "none":
        rescale(model)
    given = Given(settings, data, known, baseline, origin, compute, recorded)
    draws = torch.zeros(len(data.classes), dtype=torch.int64)
    progress = Progress(copy_state(model), model, history=[], draws=draws)
    write_file(settings.output / "split.csv", format_table(list_split(data)))
    if settings.epochs:
        save_tensors(settings.output / START, progress.start)
        save_state(given, progress)
    return given, progress


def resolve_settings(
    args: Namespace, compute: Compute, weights: str, content: Mapping[str, Any]
) -> Settings:
    """Resolve what is "auto".

    The file of `--weights` may name the architecture and the image size; flags override it. Raises
    `DataError` where settings do not go together.
    """
    check_settings(args)
    arch = args.arch or content.get("arch")
    arch = arch or ("resnet18" if compute.device.type == "cpu" else "resnet50")
    image_size = args.image_size or content.get("train_size") or 224
    weights = check_weights(weights, content, arch, image_size, bool(args.epochs))
    known = weights != "none"
    chosen = {
        "arch": arch,
        "image_size": image_size,
        "weights": os.path.abspath(weights) if content else weights,
        "power": 0.0 if args.rebalance == "none" else args.power,
        "batch_size": args.batch_size or pick_batch_size(args.data, compute.world_size),
        "lr": args.lr or (RATE if known else SCRATCH_RATE),
        "calibrate": not args.no_calibration,
        "device": compute.device.type,
        "amp": compute.amp is not None,
        "workers": 0,
    }
    for name in PATHS:  # a run goes on from any folder
        path = getattr(args, name)
        chosen[name] = path and path.resolve()
    same = {name: value for name, value in vars(args).items() if name in Settings.__annotations__}
    settings = Settings(**same | chosen)
    return replace(settings, workers=count_workers(settings, args.workers))


def check_weights(
    weights: str, content: Mapping[str, Any], arch: str, image_size: int, trains: bool
) -> str:
    """Return the full name of the weights; raises `DataError` where they do not fit."""
    known = models.list_models(models, include=["resnet*", "resnext*", "wide_resnet*"])
    if arch not in known:
        raise DataError(f"--arch {arch}: unknown; choose from {', '.join(known)}")
    if content.get("arch", arch) != arch:
        raise DataError(f"--arch {arch}: the weights are of {content['arch']}; drop --arch")
    size = content.get("train_size", image_size)
    if size != image_size and not trains:  # which would ruin the result unseen
        raise DataError(f"--image-size {image_size}: the weights are of {size}; drop --image-size")
    if trains and len(content.get("networks", ())) > 1 and content.get("folds") != 1:
        text = f"{len(content['networks'])} networks that vote; judge them with --epochs 0"
        raise DataError(f"--weights {weights}: {text}, or train from one")
    if content or weights == "none":
        return weights
    named = models.get_model_weights(arch)
    if weights not in named.__members__:
        names = ", ".join(named.__members__)
        raise DataError(f"--weights {weights}: no such file; pass one, or {names}, or none")
    return named[weights].name  # what DEFAULT means may change


def pick_batch_size(folder: Path, processes: int) -> int:
    """Choose the images of a step: half as many in a small folder, so that enough steps are taken.

    Each process gets at least as many as BatchNorm needs.
    """
    files = sum(1 for _ in walk_files(str(folder)))
    size = BATCH if files >= SMALL_FOLDER else BATCH // 2
    share = max(SYNCHRONISED, math.ceil(size / processes))
    if processes > 1:
        text = f"{share} for each of {processes} processes; more may train faster"
        print(f"--batch-size: {share * processes} images, {text}", file=sys.stderr)
    return share * processes


def check_batches(settings: Settings, data: Data, processes: int) -> None:
    """Raise `DataError` where batches cannot be divided, or hold too little for BatchNorm."""
    images = min(len(data.learns(fold)) for fold in range(data.folds))
    smallest = images // math.ceil(images / settings.batch_size)
    size = settings.image_size
    trains_all = settings.frozen_epochs < settings.epochs
    text = ""
    if settings.batch_size % processes or smallest < processes:
        text = f"cannot be divided among {processes} processes; take a multiple, or fewer processes"
    elif trains_all and smallest // processes == 1 and size <= STRIDE:
        text = f"one image of --image-size {size} is no batch for BatchNorm; take more"
    if text:
        raise DataError(f"--batch-size {settings.batch_size}: {text}")


def read_table(path: Path, *columns: str) -> list[dict[str, str]]:
    """Read the rows of a CSV file; `DataError` if there are none, or not with all of `columns`."""
    reason = "no rows with these columns"
    try:
        # Spreadsheets begin UTF-8 with a mark, which is no part of the first name.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = list(csv.DictReader(file))
        if rows and rows[0].keys() >= set(columns):
            return rows
    except (OSError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
    raise DataError(f"{path}: {reason}; needed is a CSV file of {', '.join(columns)}")


def load_baseline(run: Path, data: Data) -> Tensor:
    """Return what an earlier run predicted for the validation images: (M,) int64.

    Images are compared by their digests, whatever their names; copies come in the order of these.
    """
    labels = {name: label for label, name in enumerate(data.classes)}
    try:
        split = read_table(run / "split.csv", "path", "class", "part", "digest")
        folds = [row for row in split if row["part"].startswith("fold ")]
        judging = folds or [row for row in split if row["part"] != "train"]
        digests = {(row["path"], row["class"]): row["digest"] for row in judging}
        theirs = []
        for row in read_table(run / "predictions.csv", "path", "class", "predicted"):
            image = digests.get((row["path"], row["class"]), "")
            theirs.append((image, row["class"], row["path"], labels[row["predicted"]]))
    except DataError as error:
        raise DataError(f"--baseline: {error}; name an earlier run") from None
    except KeyError as error:
        raise DataError(f"--baseline {run}: not of these classes: {error}") from None
    rows = list_split(data.take(data.judged()))
    ours = [(row["digest"], row["class"], row["path"], place) for place, row in enumerate(rows)]
    there, here = (Counter(row[:2] for row in side) for side in (theirs, ours))
    if there != here:
        name = min(row[2] for row in theirs + ours if there[row[:2]] != here[row[:2]])
        raise DataError(
            f"--baseline {run}: validated on other images: {(there - here).total()} only there and "
            f"{(here - there).total()} only here, {name} for one; give both runs the same DATA, "
            "--source, --val, --split, --val-fraction, --folds, --group and --seed"
        )
    predicted = torch.empty(len(ours), dtype=torch.int64)
    for one, two in zip(sorted(theirs), sorted(ours), strict=True):
        predicted[two[-1]] = one[-1]
    return predicted


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write or replace a file as a whole: who reads it sees the old one or the new one."""
    unfinished = path.with_name(f".{path.name}.partial")  # on the same file system
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        replace_file(unfinished, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        unfinished.unlink(missing_ok=True)


def save_tensors(path: Path, value: Any) -> None:
    """Write a value for `torch.load`; `torch.save` itself would not say that a disk is full."""
    content = io.BytesIO()
    torch.save(value, content)
    write_file(path, content.getbuffer())


def format_table(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Format rows with the same columns as CSV; fractions with six digits, names unaltered."""
    lines: list[str] = []
    # The writer quotes what is part of its line ends: with these every carriage return in a name.
    # It hands over a row at a time, whose own line end becomes "\n".
    sink: Any = SimpleNamespace(write=lines.append)
    writer = csv.DictWriter(sink, rows[0].keys())
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{x:.6g}" if isinstance(x, float) else x for k, x in row.items()})
    text = "".join(line.removesuffix("\r\n") + "\n" for line in lines)
    return text.encode(errors="surrogateescape")


def to_rows(columns: Mapping[str, Sequence[Any] | Tensor]) -> Rows:
    """Return a row for each place of the columns."""
    lists = [x.tolist() if isinstance(x, Tensor) else x for x in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


def list_split(data: Data) -> Rows:
    """Return a row for each image: its class, its part of the data, 16 digits of its SHA-256."""
    parts = list(data.parts)
    for place, fold in enumerate(data.held.tolist() if data.folds > 1 else []):
        if fold >= 0:
            parts[place] = f"fold {fold + 1}"
    classes = [data.classes[label] for label in data.labels.tolist()]
    digests = [f"{number % 2**64:016x}" for number in data.digests.tolist()]
    return to_rows({"path": data.names, "class": classes, "part": parts, "digest": digests})


def list_predictions(data: Data, judged: Evaluation) -> Rows:
    """Return a row for each judged image, the least probable first: their labels may be wrong."""
    predicted, probability, _ = judged.calibrated
    rows = to_rows({
        "path": [data.names[place] for place in judged.places.tolist()],
        "class": [data.classes[label] for label in judged.targets.tolist()],
        "predicted": [data.classes[label] for label in predicted.tolist()],
        "probability": probability,
        "true_probability": judged.true_probability,
    })  # fmt: skip
    return sorted(rows, key=lambda row: row["true_probability"])


def list_classes(data: Data, draws: Tensor, judged: Evaluation) -> Rows:
    """Return a row for each class; NaN where nothing is known.

    "in use" classes are as frequent as in training, "natural" are the answers for that. The last
    two columns are the interval of the recall, were there twice as many images.
    """
    confusion = judged.calibrated.confusion
    train_counts = data.train_counts()
    natural = judged.natural.confusion
    recall = judged.recall
    right = judged.calibrated.predicted == judged.targets
    kin = data.families[judged.places]
    effective, families = effective_counts(right, judged.targets, kin, len(data.classes))
    now = wilson_interval(recall * effective, effective)
    twice = wilson_interval(2 * recall * effective, 2 * effective)
    low, high, twice_low, twice_high = (end.where(effective > 0, math.nan) for end in now + twice)
    return to_rows({
        "class": data.classes,
        "train_images": train_counts,
        "val_images": judged.val_counts,
        "draws": draws,
        "recall": recall,
        "low": low,
        "high": high,
        "precision": recall_by_class(confusion.T),  # NaN for a class never predicted
        "f1": f1_by_class(confusion),
        "auc": judged.auc,
        "precision_in_use": precision_in_use(confusion, train_counts),
        "natural_recall": recall_by_class(natural),
        "natural_precision_in_use": precision_in_use(natural, train_counts),
        "families": families,
        "effective_images": effective.round().long(),
        "low_if_twice": twice_low,
        "high_if_twice": twice_high,
    })  # fmt: skip


def list_changes(given: Given, judged: Evaluation) -> Rows:
    """Return what changed since the run `--baseline`, where there is one of the same images."""
    data = given.data
    predicted = judged.calibrated.predicted
    if given.baseline is None or len(given.baseline) != len(predicted):
        return []
    families = data.families[judged.places]
    counts = data.train_counts()
    return compare(judged.targets, given.baseline, predicted, counts, families)


def write_reports(given: Given, progress: Progress, result: Result) -> bool:
    """Write the tables and the page of a run, and return whether all of them could be written.

    What the world can do, as to take an image away or to fill the disk, is a warning: no epoch is
    lost for it.
    """
    data, output = given.data, given.settings.output
    tables = {"history.csv": progress.history, "comparison.csv": list_changes(given, result.last)}
    for prefix, judged in (("", result.last), ("test_", result.tested)):
        if judged:
            tables[f"{prefix}predictions.csv"] = list_predictions(data, judged)
            tables[f"{prefix}classes.csv"] = list_classes(data, progress.draws, judged)
    try:
        write_config(given, progress, result)
        for name, rows in tables.items():
            if rows:
                write_file(output / name, format_table(rows))
        for name, text in make_page(given, progress, result).items():
            write_file(output / name, text.encode(errors="backslashreplace"))
    except (DataError, OSError) as error:
        text = f"{output}: not all reports could be written: {error}"
        print(f"warning: {printable(text)}", file=sys.stderr)
        return False
    return True


def write_network(given: Given, states: list[dict[str, Tensor]], fitted: Calibration) -> None:
    """Write all that it takes to use the network; its heads are calibrated."""
    settings, data = given.settings, given.data
    shift = fitted.shift * data.log_share()
    scaled = [scale_head(state, fitted.scale) for state in states]
    networks = [state | {"fc.bias": state["fc.bias"] - shift} for state in scaled]
    learnt = data.digests[data.trained()] if settings.epochs else given.known
    content = {
        "arch": settings.arch,
        "classes": data.classes,
        "train_images": data.train_counts().tolist(),
        "natural": natural_shift(given),
        "weights": settings.weights,
        "folds": settings.folds,
        "train_size": settings.image_size,
        "eval_size": eval_size(settings.image_size),
        "least_side": least_side(settings),  # what large images are shrunk to
        "white": data.white,
        "learnt": torch.cat([given.known, learnt]).unique(),  # digests of images, see `digest`
        "networks": networks,
    }
    if not settings.epochs:  # unless recorded
        del content["train_images"], content["natural"]
    save_tensors(settings.output / NETWORK, content | given.recorded)


def save_state(given: Given, progress: Progress) -> None:
    """Write what a run needs to go on."""
    settings = vars(given.settings)
    data = given.data._asdict()
    del data["paths"]  # which hang on where the folders are
    state = {
        "format": STATE_FORMAT,
        "settings": settings | {k: str(v) for k, v in settings.items() if v and k in PATHS},
        "data": data,
        "known": given.known,
        "baseline": given.baseline,
        "history": progress.history,
        "draws": progress.draws,
        "head": progress.head,
        "logits": progress.logits,
        "model": progress.model.state_dict(),
        "trainer": progress.trainer.state_dict() if progress.trainer else {},
    }
    save_tensors(given.settings.output / STATE, state)


def load_tensors(path: Path, flag: str, cure: str) -> Any:
    """Read tensors and plain values that `torch.save` wrote.

    Raises `DataError`, which names the flag and the cure, if the file is damaged or would run code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # a damaged file raises nearly anything
        raise DataError(f"{flag} {path}: damaged, or not of tensors alone; {cure}") from None


def load_run(args: Namespace, compute: Compute) -> tuple[Given, Progress]:
    """Take up the run in the folder `--resume` where it was stopped."""
    output = args.resume
    if not (output / STATE).exists():
        reason = "no run to go on with; name its folder"
        if (output / NETWORK).exists():
            reason = "complete, or judged by --epochs 0; nothing is left to do"
        raise DataError(f"--resume {output}: {reason}")
    HELD.enter_context(hold_folder(output))
    state = load_tensors(output / STATE, "--resume", "start a new run")
    if state.get("format") != STATE_FORMAT:
        text = "stopped by another version of this script; go on with that, or start a new run"
        raise DataError(f"--resume {output}: {text}")
    stored = {k: Path(v) if v and k in PATHS else v for k, v in state["settings"].items()}
    settings = Settings(**stored | {"output": output.resolve(), "device": compute.device.type})
    settings = replace(settings, workers=count_workers(settings, args.workers))
    if args.amp is not None:
        settings = replace(settings, amp=args.amp)
    data = find_again(settings, state["data"])
    check_batches(settings, data, compute.world_size)
    given = Given(
        settings=settings,
        data=data,
        known=state["known"],
        baseline=state["baseline"],
        origin="as it was stopped",
        compute=compute,
    )
    progress = Progress(
        start=load_tensors(output / START, "--resume", "start a new run"),
        model=build_model(settings.arch, data.classes, {"networks": [state["model"]]})[0],
        history=state["history"],
        draws=state["draws"],
        head=state["head"],
        logits=state["logits"],
        stored=state["trainer"],
    )
    for fold in range(settings.folds):
        if progress.has_done(fold, settings.epochs):
            finished = load_tensors(output / f"fold-{fold + 1}.pt", "--resume", "start a new run")
            progress.finished.append(Fold(**finished))
    return given, progress


def find_again(settings: Settings, stored: dict[str, Any]) -> Data:
    """Find the images of a stopped run; raises `DataError` if one is gone or has changed."""
    folders = {
        "train": settings.data,
        "val": settings.val or settings.data,
        "source": settings.source,
    }
    pairs = zip(stored["parts"], stored["names"], strict=True)
    paths = [str(folders[part] / name) for part, name in pairs]

    def find(path: str) -> int | None:
        return digest(read_bytes(path)) if os.path.isfile(path) else None

    with ThreadPool() as pool:  # to read all files costs a tenth of decoding them, or less
        found = pool.imap(find, paths, chunksize=16)
        for path, now, before in zip(paths, found, stored["digests"].tolist(), strict=True):
            if now != before:
                text = "gone" if now is None else "changed"
                text += " since the run began; put it back, or start a new run"
                raise DataError(f"{path}: {text}")
    return Data(**stored | {"paths": paths})


def write_config(given: Given, progress: Progress, result: Result | None = None) -> None:
    """Write every setting as used, what the run is made of, and the measures of its network."""
    settings, data, compute = given.settings, given.data, given.compute
    content = {
        "settings": vars(settings),
        "versions": versions(),
        "device": compute.name(),
        "processes": compute.world_size,
        "precision": compute.amp or torch.float32,
        "classes": data.classes,
        "train_images": data.train_counts().tolist(),
        "white": data.white,
        "left_out": data.unreadable,
        "facts": list_facts(given, progress, result),
    }
    judged = {"result": result.last, "test": result.tested} if result else {}
    for name, evaluation in judged.items():
        if evaluation:
            measures = evaluation.measures.items()
            content[name] = {k: None if math.isnan(x) else x for k, x in measures}
    text = json.dumps(content, indent=1, default=str)  # of paths and of the precision
    write_file(settings.output / "config.json", text.encode())


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries."""
    libraries = {library.__name__: library.__version__ for library in (torch, torchvision, np, PIL)}
    return {"python": sys.version.split()[0], **libraries}


# ----------------------------------------------------------------------------------------- console


FEW_JUDGED = 10  # validation images of a class; with fewer `--folds` is suggested
ADVISED = 5  # folds
KINDS = {"I": "whole numbers", "F": "fractions"}
HEADER = (
    "fold   epoch  phase  train loss  val loss  accuracy  balanced [95 %]       as trained    many "
    " medium     few  images/s   left"
)


class Result(NamedTuple):
    """The evaluations of a run's network, after an epoch or at the end."""

    last: Evaluation
    tested: Evaluation | None = None  # by images that no network has learnt or is judged by
    done: bool = False  # the run has come to its end


def list_facts(given: Given, progress: Progress, result: Result | None = None) -> dict[str, str]:
    """Return what is known of a run, by name; what does not apply is left out.

    The console, the page and config.json say of a run what is here.
    """
    last, tested, done = result or (None, None, False)
    data, settings = given.data, given.settings
    test = related = ""
    if tests := len(data.judges(TEST)):
        where = settings.val or settings.source
        test = f"all together by {tests} images of {where} that none has seen"
    elif data.folds > 1 and (where := settings.val or settings.source):
        test = f"none: {where} has no image that is neither learnt nor related to one that is"
    if data.related:
        related = f", {data.related} copies or relatives of training images"
    facts = {
        "unfinished": "" if done else describe_place(given, progress),
        "network": describe_network(given, progress),
        "images": describe_images(given),
        "judged by": describe_judges(given, last),
        "not judged": list_unjudged(data, last),
        "test": test,
        "not tested": list_unjudged(data, tested),
        "left out": f"{len(data.unreadable)} unreadable images{related}",
        **(describe_training(given, progress) if settings.epochs else {}),
        "calibration": describe_calibration(given, last),
        "intervals": "95 %: Wilson's for a class, score intervals for a mean; they say how far "
        "other images could move a figure, not how far another training could. Images of one "
        "family count together, as the variance between families tells",
    }
    return {name: fact for name, fact in facts.items() if fact}


def describe_place(given: Given, progress: Progress) -> str:
    """Return how far a run has come that is not done."""
    if not progress.history:
        return "before the first epoch"
    row = progress.history[-1]
    settings = given.settings
    return f"fold {row['fold']} of {settings.folds}, epoch {row['epoch']} of {settings.epochs}"


def describe_network(given: Given, progress: Progress) -> str:
    """Return the architecture, how many of them vote, and where their weights are from."""
    settings = given.settings
    networks = max([settings.folds, *(len(done.networks) for done in progress.finished)])
    if isinstance(progress.model, Vote):
        networks = len(progress.model)
    kind = settings.arch if networks == 1 else f"{networks} {settings.arch} that vote"
    if not settings.epochs:
        return f"{kind}, as in {settings.weights}, nothing trained"
    if settings.weights == "none":
        return f"{kind}, trained from random weights"
    return f"{kind}, fine-tuned from {settings.weights}"


def describe_images(given: Given) -> str:
    """Return how many images were learnt, in how many classes of which sizes."""
    counts = given.data.train_counts()
    if not given.settings.epochs and given.data.learnt is None:
        return f"{len(counts)} classes; what was learnt is not recorded"
    most = int(counts.max())
    fewest = int(counts.min())
    return (
        f"{int(counts.sum())} training images in {len(counts)} classes of {most} to {fewest}, "
        f"imbalance ratio {most / fewest:.1f}"
    )


def describe_judges(given: Given, last: Evaluation | None) -> str:
    """Return how many images the network is judged by, and where they are from."""
    settings, data = given.settings, given.data
    places = last.places if last else data.judged()
    if data.folds > 1:
        done = len(data.held[places].unique())
        so_far = f" ({done} so far)" if done < data.folds else ""
        text = f"{len(places)} images, each by the one of {data.folds} networks{so_far} that has "
        text += "not seen it"
    else:
        text = f"{data.parts.count('val')} validation images"
        if where := settings.val or settings.split:
            text += f" of {where}"
        if settings.source:
            text += f" and {data.parts.count('source')} of {settings.source.name} that DATA leaves"
            text += " out"
    families = len(data.families[places].unique())
    return text + (f", of {families} families" if families < len(places) else "")


def list_unjudged(data: Data, judged: Evaluation | None) -> str:
    """Return the classes that have no image among those of an evaluation, in words."""
    if judged is None:
        return ""
    bare = (judged.val_counts == 0).nonzero().flatten().tolist()
    names = ", ".join(data.classes[label] for label in bare[:3]) + (", ..." if bare[3:] else "")
    return f"{len(bare)} of {len(data.classes)} classes: no image of {names}" if bare else ""


def describe_training(given: Given, progress: Progress) -> dict[str, str]:
    """Return what was trained, in which order, and how an epoch chooses its images."""
    settings = given.settings
    rates = f"AdamW, {settings.lr:g}"
    if settings.weights != "none":
        rates += f" at the top, each stage of layers at {RATE_BELOW:g} of the next one's rate"
    layers = {
        "head": "the last layer alone (SGD)",
        "trial": f"all layers for a trial ({rates}), whose loss on the images that "
        f"judge, against {TRIAL_FAILS:g} times that of the last layer alone, chooses the rest",
        "whole": f"all layers ({rates})",
        "upper": f"from the last layer on, the upper half (AdamW, {settings.lr * UPPER_FACTOR:g})",
        BACK: "back to the last layer alone, whose loss on the images that judge was lower by "
        f"over {SURE:g} standard errors",
    }
    phases = {row["phase"] for row in progress.history}
    if BACK in phases and "upper" not in phases:
        phases.add("whole")  # it may have been the phase of that epoch alone
    training = f"{settings.epochs} epochs of images of {settings.image_size} pixels, in batches of "
    training += f"{settings.batch_size}, seed {settings.seed}: "
    training += " and then ".join(text for phase, text in layers.items() if phase in phases)
    if head_votes(progress):
        training += "; in the end the last layer alone, on the backbone of the start, makes "
        training += f"{100 * HEAD_SHARE:.0f} % of the logits and all layers the rest, and the last "
        training += "epoch is judged so"
    draws = "each image once an epoch"
    if settings.rebalance == "sampler":
        draws = "by a WeightedRandomSampler, weights 1 / (images of the class) ** "
        draws += f"{settings.power:g}; an epoch draws as many images as there are"
    if HEAD.name in phases:
        draws += f", for the last layer alone as often as it takes for {HEAD_STEPS:,} steps in all"
    groups = f"mean recall of classes of over {MANY}, of {FEW} to {MANY} and of under {FEW} "
    groups += "training images"
    training = training.removesuffix(": ")
    return {"training": training, "draws": draws, "many, medium, few": groups}


def describe_calibration(given: Given, last: Evaluation | None) -> str:
    """Return what was done to the logits."""
    if last is None or not is_calibrated(given):
        return ""
    return (
        "logits times {:.3f}, less {:.3f} times the log share of the class; each part of the "
        "images is judged with numbers fitted on the others".format(*last.calibration)
    )


def is_calibrated(given: Given) -> bool:
    """Return whether the run itself calibrates."""
    return given.settings.epochs > 0 and given.settings.calibrate


def start_run(given: Given, progress: Progress) -> None:
    """Clear the run folder of what a killed run left half-written, and print what comes."""
    data, settings, compute = given.data, given.settings, given.compute
    for unfinished in settings.output.glob(".*.partial"):
        unfinished.unlink()
    if not progress.history:  # else it tells of the last epoch, or the result
        write_config(given, progress)
    facts = list_facts(given, progress)
    precision = compute.amp or torch.float32
    print(printable(f"{facts['network']} ({given.origin}); {compute.name()}, {precision}"))
    print(printable("; ".join(facts[name] for name in ("images", "judged by", "left out"))))
    if "test" in facts:
        print(printable(facts["test"]))
    for kind, white in data.white.items():
        print(f"images of more than 8 bits ({KINDS[kind]}): a value of {white:g} is white")
    lines = [format_epoch(row, settings) for row in progress.history]
    print("", HEADER, *lines, sep="\n", flush=True)


def format_epoch(row: dict[str, Any], settings: Settings) -> str:
    """Return the line of an epoch, as wide as `HEADER`, with the time left if all take as long."""
    numbers = {key: value for key, value in row.items() if isinstance(value, float)}
    cells = {key: "-" if math.isnan(x) else f"{x:.1%}" for key, x in numbers.items()}
    epochs = settings.epochs * (settings.folds - row["fold"] + 1) - row["epoch"]
    hours, minutes = divmod(round(row["seconds"] * epochs / 60), 60)
    # The head's first epoch computes the features, and after its last one come slower ones.
    left = "-" if row["phase"] == "head" else f"{hours}h{minutes:02}"
    return (
        f"{row['fold']:2}/{settings.folds:<2} {row['epoch']:3}/{settings.epochs:<3} "
        f"{row['phase']:5}  "
        f"{row['train_loss']:10.3f}  {row['val_loss']:8.3f}  {cells['accuracy']:>8}  "
        f"{format_range(row):<20}  {cells['as_trained_balanced_accuracy']:>10}  "
        f"{cells['many']:>6}  {cells['medium']:>6}  {cells['few']:>6}  "
        f"{row['images_per_second']:8.1f}  {left:>5}"
    )


def format_range(measures: Mapping[str, float]) -> str:
    """Return a balanced accuracy with its interval, in per cent."""
    ends = f"{100 * measures['low']:.1f}, {100 * measures['high']:.1f}"
    return f"{measures['balanced_accuracy']:.1%} [{ends}]"


def print_end(given: Given, progress: Progress, result: Result) -> None:
    """Print, in one screen, the result, what is recognised least, and where the rest is."""
    settings = given.settings
    last = result.last
    facts = list_facts(given, progress, result)
    classes = list_classes(given.data, progress.draws, last)
    judges = printable(facts["judged by"])
    print(f"\nbalanced accuracy {format_range(last.measures)}  ({judges})")
    if kept := sum(row["phase"] == BACK for row in progress.history):
        text = f"of {kept} of {settings.folds} networks " if settings.folds > 1 else ""
        print(f"note: {text}the last layer alone is kept: its loss is surely lower")
    if head_votes(progress):
        print("note: all layers and the last layer alone vote; the last epoch is judged so")
    if is_calibrated(given):
        print(f"as trained        {last.measures['as_trained_balanced_accuracy']:.1%}")
    if result.tested:
        print(f"untouched test    {format_range(result.tested.measures)}, by vote")
    for name in ("not judged", "not tested"):
        if name in facts:
            print(printable(f"warning: {name}: {facts[name]}"))
    print_lowest(given.data, last)
    for change in show_changes(list_changes(given, last)):
        name, before, now, points, ends, sure = change.values()
        since = f"{before:.1%} in {printable(str(settings.baseline))}, now {now:.1%}"
        print(f"{name:17} {since}: {points} points, {ends}; more than chance? {sure}")
    print_precision(classes)
    print_advice(given, classes)
    print(f"everything else is in {printable(str(settings.output / 'report.html'))}")


def print_lowest(data: Data, last: Evaluation) -> None:
    """Print the classes that are recognised least, and what they are taken for most often."""
    print("lowest recall:")
    known = [label for label in last.recall.argsort(stable=True) if last.val_counts[label]]
    for label in known[:3]:
        text = printable(data.classes[label])
        wrong = last.calibrated.confusion[label].clone()
        wrong[label] = 0
        if wrong.any():
            text += f"; most often taken for {printable(data.classes[wrong.argmax()])}"
        print(f"{last.recall[label]:8.1%} of {last.val_counts[label]:4}  {text}")


def print_precision(classes: Rows) -> None:
    """Print it where most of what is called a class would not be of it in use."""
    low = [row for row in classes if row["precision_in_use"] < 0.5]
    if low:
        worst = min(low, key=lambda row: row["precision_in_use"])
        text = f"{100 * worst['precision_in_use']:.0f} of 100 images called {worst['class']} are"
        if len(low) > 1:
            text += f", and {len(low) - 1} more classes have under 50"
        if worst["natural_precision_in_use"] != worst["precision_in_use"]:
            text += "; predict with --natural there"
        print(printable(f"note: where classes are as frequent as in training, {text}"))


def print_advice(given: Given, classes: Rows) -> None:
    """Print it where the recall of the rarest class is known from few images or families alone."""
    data, settings = given.data, given.settings
    rarest = min(classes, key=lambda row: row["train_images"])
    judged = rarest["families"]
    if judged >= FEW_JUDGED or settings.folds > 1 or not settings.epochs:
        return
    one, many = ("image", "images") if judged == rarest["val_images"] else ("family", "families")
    text = f"known from {judged} {one if judged == 1 else many} alone"
    if judged:
        text += f" [{rarest['low']:.0%}, {rarest['high']:.0%}]"
    pairs = torch.stack([data.labels, data.families]).unique(dim=1)
    enough = pairs[0].bincount().min() >= ADVISED
    if enough and not (settings.val or settings.split or settings.source):
        text += f"; --folds {ADVISED} would tell it from all of its images in DATA, and takes "
        text += "five times as long"
    print(printable(f"note: the recall of {rarest['class']} is {text}"))


def show_changes(changes: Rows) -> Rows:
    """Return what `list_changes` found, in words; "undecided" where an interval holds 0."""
    return [
        {
            "measure": change["measure"].replace("_", " "),
            "before": change["before"],
            "now": change["after"],
            "points": f"{100 * change['difference']:+.1f}",
            "95 % interval": f"{100 * change['low']:+.1f} to {100 * change['high']:+.1f}",
            "more than chance?": "undecided" if change["low"] <= 0 <= change["high"] else "yes",
        }
        for change in changes
        if not math.isnan(change["before"])  # as of an empty group
    ]


# -------------------------------------------------------------------------------------------- page


MOST_CLASSES = 30  # with a matrix of confusions
MOST_LETTERS = 28  # of a class in the chart
MISTAKES = 24  # how many are shown
THUMBNAIL = 160  # pixels a side
PLOT = 'class="open" x="41%" width="41%"'  # beside names, before values
IN_USE = (
    "Precision: the part of the judged images called a class that is of it; F1: its harmonic mean "
    "with recall. Precision in use: the same where classes are as frequent as in training. "
    "“Natural”: the answers of --predict --natural, for classes so frequent. AUC: how often "
    "an image of the class has a higher probability of it than one of another class, each class "
    "counting the same. Effective images: so many independent images would tell as much as these, "
    "of which those of a family may be alike. If twice: the 95 % interval with twice as many "
    "effective images and the same recall."
)
STYLE = """:root{color-scheme:light dark;background:Canvas;color:CanvasText;font:16px/1.5 system-ui,
sans-serif}body{max-width:1040px;margin:auto;padding:8px 14px 64px;overflow-wrap:anywhere}h1,h2,b,
small{line-height:1.3}h2{margin-top:44px;border-top:1px solid #8884;padding-top:18px}p{
max-width:78ch}small,.soft{opacity:.75;font-size:12.5px}.tiles,.pairs{display:grid;gap:14px;
margin:20px 0;grid-template-columns:repeat(auto-fit,minmax(170px,1fr))}.tiles div{padding:10px 14px;
border-left:4px solid #3987c9;background:#8881}div>b,small{display:block}.tiles b{font-size:30px}
.pairs{gap:28px;grid-template-columns:repeat(auto-fill,minmax(290px,1fr))}figure{display:grid;
margin:0;gap:8px;grid-template-columns:1fr 1fr;break-inside:avoid}img{width:100%}.wide{
overflow-x:auto}table{border-collapse:collapse}td,th{padding:5px 0 5px 20px;text-align:right;
border-bottom:1px solid #8883;white-space:nowrap;font-weight:400}th{vertical-align:bottom}
th:first-child{text-align:left;white-space:normal;position:sticky;left:0;background:Canvas;
overflow-wrap:break-word;max-width:50vw;padding-left:0}.matrix td{padding:1px}span{display:block;
min-width:34px;padding:4px;text-align:center}.matrix tr:first-child td{writing-mode:vertical-rl;
padding:4px}dt{font-weight:600}dd{margin:0 0 10px;max-width:78ch}
pre{white-space:pre-wrap;padding:12px;background:#8882}body .chart{width:100%;
max-width:800px}.chart{font-size:14px}.open{overflow:visible}.chart *{fill:currentColor}.head{
font-weight:600}.end{text-anchor:end}.middle{text-anchor:middle}line,polyline{stroke:currentColor;
stroke-width:2;stroke-linecap:round;vector-effect:non-scaling-stroke}.chart polyline{fill:none}
.new{color:#3987c9}.old{color:#e08214}.grid{color:#8884;stroke-width:1}.bar{opacity:.4;
stroke-width:8}@media print{*{print-color-adjust:exact}.wide{overflow:visible}
details::details-content{block-size:auto;content-visibility:visible}}"""


def show(value: Any) -> str:
    """Return a fraction in per cent, NaN as a dash, all else as text that HTML does not obey."""
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{100 * value:.1f}\u00a0%"
    return html.escape(printable(str(value)))


def svg(body: str, height: int) -> str:
    """Return a chart for a page or a file: widths in parts of the whole, to be read on a phone."""
    start = f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" width="760" height="{height}">'
    return f"{start}<style>{STYLE}</style>{body}</svg>"


def write(text: str, x: float, y: float, kind: str = "") -> str:
    """Return text at a part of the width, in per cent, and a pixel of the height."""
    return f'<text class="{kind}" x="{x:g}%" y="{y:g}">{text}</text>'


def write_title(title: str, *names: str) -> str:
    """Return the title of a chart, and below it what is orange and what is blue."""
    kinds = zip(("old", "new"), names, strict=False)
    spots = (f'<tspan class="{kind}">●</tspan> {show(name)}' for kind, name in kinds)
    return write(title, 0, 14, "head") + write(" &#160; ".join(spots), 0, 34, "soft")


def draw_row(row: Mapping[str, Any], y: int) -> str:
    """Draw the recall of a class, its interval, and above it the recall before, if known."""
    marks = ""
    if not math.isnan(row.get("before", math.nan)):
        marks += f'<circle class="old" cx="{row["before"]:.2%}" cy="9" r="5.5"/>'
    if row["val_images"]:
        marks += f'<line class="new bar" x1="{row["low"]:.2%}" x2="{row["high"]:.2%}" y1="21" '
        marks += f'y2="21"/><circle class="new" cx="{row["recall"]:.2%}" cy="21" r="5.5"/>'
    name = row["class"]
    if len(name) > MOST_LETTERS:  # the middle goes: names often begin, or end, alike
        name = f"{name[: MOST_LETTERS // 2]}…{name[-MOST_LETTERS // 2 :]}"
    texts = write(show(name), 38, 14, "end") + write(show(row["recall"]), 100, 26, "end")
    images = f"{row['train_images']} / {row['val_images']} images"
    texts += write(images, 38, 29, "soft end")
    title = f"<title>{show(row['class'])}</title>"
    return f'<svg y="{y}" height="40">{title}{texts}<svg {PLOT}>{marks}</svg></svg>'


def recall_chart(classes: Rows, before_name: str = "") -> str:
    """Return a chart of the recall of each class, most training images first: SVG."""
    order = sorted(classes, key=lambda row: -row["train_images"])
    names = [f"before: {before_name}", "now"] if before_name else []
    title = "Recall, 95 % interval (training / validation images)"
    height = 62 + 40 * len(order)
    body = write_title(title, *names) + f"<svg {PLOT}>"
    for x in range(0, 101, 25):
        body += f'<line class="grid" x1="{x}%" x2="{x}%" y1="58" y2="{height}"/>'
        body += write(str(x), x, 52, "soft middle")
    rows = (draw_row(row, 60 + 40 * place) for place, row in enumerate(order))
    return svg(f"{body}</svg>{''.join(rows)}", height)


def draw_panel(history: Rows, keys: Sequence[str], scale: int) -> str:
    """Draw columns by epoch, a line for each fold; what is far above most values is cut off."""
    values = sorted(row[key] for row in history for key in keys if math.isfinite(row[key])) or [0]
    top = min(values[-1], 2 * values[len(values) * 9 // 10])
    low = math.floor(2 * values[0]) / 2
    height = max(1, math.ceil(2 * (top - low))) / 2  # often from 50 to 100 %
    epochs = [row["epoch"] for row in history]
    first = min(epochs)
    width = max(1, max(epochs) - min(epochs))
    body = ""
    for y in range(0, 101, 20):
        body += f'<line class="grid" x2="100%" y1="{y}%" y2="{y}%"/><text class="soft end" x="-8" '
        body += f'y="{y}%" dy="4">{scale * (low + height * (1 - y / 100)):g}</text>'
    for epoch in range(first, first + width + 1, math.ceil(width / 10)):
        body += write(str(epoch), 100 * (epoch - first) / width, 198, "soft middle")
    body += f'<svg viewBox="{first} {-low - height} {width} {height}" preserveAspectRatio="none">'
    for kind, key in zip(("old", "new"), keys, strict=False):
        for fold in {row["fold"] for row in history}:
            rows = [row for row in history if row["fold"] == fold and math.isfinite(row[key])]
            line = [f"{row['epoch']},{-row[key]:.6g}" for row in rows[:1] + rows]
            dot = " bar" if len(rows) == 1 else ""
            body += f'<polyline class="{kind}{dot}" points="{" ".join(line)}"/>'
    return f'<svg class="open" x="10%" y="52" width="86%" height="180">{body}</svg></svg>'


def curve_chart(history: Rows, calibrated: bool) -> str:
    """Return a chart of loss and balanced accuracy by epoch, before and after calibration: SVG."""
    names = ["as trained", "calibrated"] if calibrated else ["as trained"]
    judged = "validation, calibrated" if calibrated else "validation"
    body = write_title("Loss by epoch", "training", judged)
    body += draw_panel(history, ("train_loss", "val_loss"), 1) + '<svg y="270">'
    body += write_title("Balanced accuracy in % by epoch", *names)
    keys = ("as_trained_balanced_accuracy", "balanced_accuracy")
    body += draw_panel(history, keys[: len(names)], 100)
    return svg(f"{body}</svg>", 530)


def make_table(rows: Iterable[Iterable[str]]) -> str:
    """Return a table of safe text, its first column of names; it scrolls where it is too wide."""
    body = ""
    for name, *cells in rows:
        body += f"<tr><th>{name}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    return f'<div class="wide"><table>{body}</table></div>'


def show_rows(rows: Rows) -> str:
    """Return a table of rows with the same columns."""
    names = [name.replace("_", " ") for name in rows[0]]
    return make_table(map(show, row) for row in (names, *(row.values() for row in rows)))


def show_confusions(data: Data, last: Evaluation) -> str:
    """Return a matrix of what is taken for what, or of many classes the commonest mistakes."""
    names = [show(name) for name in data.classes]
    confusion = last.calibrated.confusion.tolist()
    order = data.train_counts().argsort(descending=True, stable=True).tolist()
    if len(names) > MOST_CLASSES:
        pairs = ((confusion[true][taken], true, taken) for true, taken in permutations(order, 2))
        rows = [["confusion", "images"]]
        for images, true, taken in heapq.nlargest(20, pairs):
            if images:
                name = f"{names[true]} taken for {names[taken]}"
                rows.append([name, f"{images} of {sum(confusion[true])}"])
        return make_table(rows)
    rows = [["is ↓ taken for →", *(names[label] for label in order)]]
    for true in order:
        rows.append([names[true]])
        for taken in order:
            images = confusion[true][taken]
            colour = "57,135,201" if true == taken else "224,130,20"
            shade = f"rgba({colour},{0.8 * images / max(1, sum(confusion[true])):.2f})"
            rows[-1].append(f'<span style="background:{shade}">{images or ""}</span>')
    return f'<div class="matrix">{make_table(rows)}</div>'


def show_mistakes(given: Given, last: Evaluation) -> str:
    """Return the images that are wrong with the most confidence, each beside a training image.

    It is of the class that the wrong one was taken for: the one in the middle of their names.
    """
    data = given.data
    predicted, probability, _ = last.calibrated
    wrong = (predicted != last.targets).nonzero().flatten()
    order = probability[wrong].argsort(descending=True, stable=True)
    text = ""
    for row in wrong[order][:MISTAKES].tolist():
        place = int(last.places[row])
        taken = int(predicted[row])
        learnt = data.learns(int(data.held[place]))
        alike = learnt[data.labels[learnt] == taken]
        middle = int(alike[len(alike) // 2]) if len(alike) else None
        relation = f"taken for ({show(probability[row].item())})"
        text += f"<figure>{show_image(data, place, 'is', int(last.targets[row]))}"
        text += f"{show_image(data, middle, relation, taken)}</figure>"
    kind = "training image" if given.settings.epochs else "image of DATA"
    return text and (
        f"<p>Wrong with the most confidence. Beside each image: a {kind} of the class it was taken "
        f'for.</p><div class="pairs">{text}</div>'
    )


def show_image(data: Data, place: int | None, relation: str, label: int) -> str:
    """Return the image at a place of `data`, if any, its relation to a class, and the class."""
    image = ""
    if place is not None:
        pixels = central_square(THUMBNAIL)(read_image(data.paths[place], data.white, THUMBNAIL))
        content = io.BytesIO()
        v2.functional.to_pil_image(pixels).save(content, "JPEG", quality=80)
        encoded = base64.b64encode(content.getvalue()).decode()
        image = f'<img alt="" src="data:image/jpeg;base64,{encoded}">'
    return f"<div>{image}<small>{relation}</small><b>{show(data.classes[label])}</b></div>"


def show_result(given: Given, result: Result, classes: Rows) -> str:
    """Return tiles: the result, the most frequent, the rarest and the worst class."""
    last = result.last
    tested = result.tested
    usual = max(classes, key=lambda row: row["train_images"])
    rarest = min(classes, key=lambda row: row["train_images"])
    worst = classes[int(last.recall.argsort(stable=True)[0])]  # NaN is last
    tiles = {}
    for name, judged in (("balanced accuracy", last), ("untouched test", tested)):
        if judged:
            _, ends = format_range(judged.measures).split(maxsplit=1)
            tiles[name] = (judged.measures["balanced_accuracy"], ends)
    if is_calibrated(given):
        before = last.measures["as_trained_balanced_accuracy"]
        tiles["as trained"] = (before, "balanced accuracy before calibration")
    tiles["most frequent class"] = (usual["recall"], f"recall of {usual['class']}")
    tiles["rarest class"] = (rarest["recall"], f"recall of {rarest['class']}{foresee(rarest)}")
    tiles["lowest recall"] = (worst["recall"], worst["class"])
    text = ""
    for name, (part, note) in tiles.items():
        text += f"<div>{name}<b>{show(part)}</b><small>{show(note)}</small></div>"
    return f'<div class="tiles">{text}</div>'


def foresee(row: Mapping[str, Any]) -> str:
    """Return the interval of a class's recall, and what it would be with twice as many images."""
    if not row["val_images"]:
        return ""
    low, high, least, most = (
        f"{100 * row[key]:.0f}" for key in ("low", "high", "low_if_twice", "high_if_twice")
    )
    return f" [{low}, {high}]; with twice as many independent images [{least}, {most}]"


def make_page(given: Given, progress: Progress, result: Result) -> dict[str, str]:
    """Return, by their files' names, the charts and the page, which is one file without scripts."""
    settings, data, last = given.settings, given.data, result.last
    changes = list_changes(given, last)
    facts = list_facts(given, progress, result)
    classes = list_classes(data, progress.draws, last)
    table = show_rows(classes)
    baseline = ""
    if changes and given.baseline is not None:
        baseline = settings.baseline.name if settings.baseline else ""
        before = confusion_matrix(last.targets, given.baseline, len(classes))
        for row, recall in zip(classes, recall_by_class(before).tolist(), strict=True):
            row["before"] = recall
    charts = {"recall.svg": recall_chart(classes, baseline)}
    if progress.history:
        charts["curves.svg"] = curve_chart(progress.history, is_calibrated(given))
    terms = "".join(f"<dt>{show(name)}</dt><dd>{show(fact)}</dd>" for name, fact in facts.items())
    sections = {
        f"Compared with {show(baseline)}, on the same images": changes
        and show_rows(show_changes(changes)),
        "Recall": f"{charts['recall.svg']}<details><summary>Images, draws, measures of each class"
        f"</summary>{table}<p>{IN_USE}</p></details>",
        "Mistakes": show_mistakes(given, last),
        "Confusions": show_confusions(data, last),
        "Training": charts.get("curves.svg"),
        "Make it again": show_command(given),
        "How this was measured": f"<dl>{terms}</dl>",
    }
    title = show(settings.data.name)
    lead = f"{facts['network']}; {facts['images']}. Judged by {facts['judged by']}."
    body = f"<h1>{title}</h1><p>{show(lead)}</p>"
    for name in ("unfinished", "not judged", "not tested"):
        if name in facts:
            body += f"<p><b>{name.capitalize()}: {show(facts[name])}.</b></p>"
    body += show_result(given, result, classes)
    body += "".join(f"<h2>{name}</h2>{text}" for name, text in sections.items() if text)
    page = (
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width='
        f'device-width"><title>{title}</title><style>{STYLE}</style>{body}</html>\n'
    )
    return charts | {"report.html": page}


def show_command(given: Given) -> str:
    """Return the command that makes the run again, to be pasted, and the versions it depends on.

    It names no run folder, which is there already, and as many processes as there were.
    """
    words = shlex.split(given.settings.command)
    processes = given.compute.world_size
    for place in reversed(range(len(words))):
        flag, _, value = words[place].partition("=")
        if len(flag) > 2 and "--output".startswith(flag):  # argparse takes its beginnings, too
            del words[place : place + (1 if value else 2)]
    if processes > 1:
        words[:1] = ["torchrun", f"--nproc-per-node={processes}"]
    made_with = " · ".join(f"{name} {version}" for name, version in versions().items())
    return f"<pre>{show(' '.join(map(quote, words)))}</pre><p><small>{made_with}</small></p>"


# -------------------------------------------------------------------------------------- predicting


def predict_photos(settings: Namespace) -> None:
    """Write what the network of a run says of each image below DATA, as CSV."""
    if dist.is_torchelastic_launched():  # each process would say it all
        raise DataError("--predict: takes one process; start it without torchrun")
    run = load_network(settings)
    out = settings.output
    if out and out.exists():
        raise DataError(f"--output {out}: there already; name a new file")
    if out and not out.parent.is_dir():
        raise DataError(f"--output {out}: no folder to write it in; make that first")
    compute = pick_compute(settings.device, settings.amp)
    paths = list_photos(settings.data)
    model: Any = build_model(run["arch"], run["classes"], run)[0].eval()
    model.to(compute.device, memory_format=memory_format(compute.device))
    if settings.natural and "natural" not in run:
        raise DataError("--natural: the network does not say how frequent classes were; drop it")
    natural = run["natural"] if settings.natural else 0.0
    rows: Rows = []
    for views, read in read_photos(paths, run, settings.batch_size or BATCH):
        with torch.no_grad(), compute.autocast():
            logits = model(to_input(views, compute.device)).float().cpu()
        if logits.isnan().any():
            raise DataError(f"--predict {settings.predict}: no numbers come out; try --no-amp")
        probability, best = (logits.clamp(-HIGHEST, HIGHEST) + natural).softmax(1).topk(2)
        for path, (p, q), (one, two) in zip(read, probability.tolist(), best.tolist(), strict=True):
            answer = {"path": path, "class": run["classes"][one], "probability": p}
            rows.append(answer | {"second": run["classes"][two], "second_probability": q})
    if not rows:
        raise DataError(f"{settings.data}: no image that can be read")
    print(f"{len(rows)} images", file=sys.stderr)
    if out:
        write_file(out, format_table(rows))
    else:
        sys.stdout.buffer.write(format_table(rows))


def load_network(settings: Namespace) -> dict[str, Any]:
    """Return what a run wrote of its network; raises `DataError` if there is none."""
    file = settings.predict / NETWORK if settings.predict.is_dir() else settings.predict
    if not file.is_file():
        raise DataError(f"--predict {settings.predict}: no network there; name a run that has one")
    with contextlib.suppress(DataError):
        run = read_weights(str(file))
        if run.keys() >= {"classes", "least_side"}:
            return run
    raise DataError(f"--predict {file}: not a network of this script; train one first")


def list_photos(place: Path) -> list[str]:
    """Return the images at or below `place`, sorted by name; hidden ones are left out."""
    if place.is_file():
        return [str(place)]
    files = {*walk_files(str(place))} if place.is_dir() else set()
    found = sorted((file for file in files if file.lower().endswith(IMG_EXTENSIONS)), key=Path)
    if not found:
        raise DataError(f"DATA {place}: no image there; known are {', '.join(IMG_EXTENSIONS)}")
    tell_left_out(place, files.difference(found))
    return found


def read_photos(
    paths: list[str], run: Mapping[str, Any], batch_size: int
) -> Iterator[tuple[Tensor, list[str]]]:
    """Yield batches of views (B, S, S, 3) uint8 and their paths; what cannot be read is named.

    While a batch is used the next one is read.
    """
    view = central_square(run["eval_size"])
    least = run["least_side"]

    def read(path: str) -> Tensor | str:
        try:
            return view(read_image(path, run["white"], least)).permute(1, 2, 0)
        except (DataError, PermissionError) as error:
            return str(error)

    parts = [paths[first : first + batch_size] for first in range(0, len(paths), batch_size)]
    bar = tqdm(total=len(paths), desc="predicting", unit=" images", leave=False, disable=None)
    with ThreadPool() as pool, bar:
        ahead = pool.map_async(read, parts[0])
        for part, following in zip(parts, [*parts[1:], []], strict=True):
            found = ahead.get()
            views: dict[str, Tensor] = {}
            ahead = pool.map_async(read, following)
            for path, image in zip(part, found, strict=True):
                if isinstance(image, Tensor):
                    views[path] = image
                else:
                    reason = image.removesuffix("; remove it")
                    tqdm.write(f"warning: {reason}; left out", sys.stderr)
            if views:
                yield torch.stack([*views.values()]), [*views]
            bar.update(len(part))


# --------------------------------------------------------------------------- devices and processes


LOCK = ".lock"  # in the folder of a run, while it is running
HELD = contextlib.ExitStack()  # what this process holds until its run ends: the run folder
REPLACE_TRIES = 11  # attempts to replace a file
REPLACE_PAUSE = 0.1  # seconds between them
TIME_TOLD_AFTER = 10.0  # seconds of training that tell how long all of it takes
TIME_WORTH_TELLING = 2.0  # minutes
# With fewer images than this per process and step, BatchNorm takes its statistics over all
# processes. That waits for the GPU 159 times a step of a ResNet-50 (torch's _functions.py).
SYNCHRONISED = 8
# Tensor cores came with this compute capability; float16 gains nothing on GPUs before it.
TENSOR_CORES = (7, 0)
WITHOUT_TENSOR_CORES = "GTX 16"  # Turing all the same, and float16 turns into NaN on them
PINNED = ("cuda",)  # devices to which pinned memory is copied while the host goes on
MOST_BESIDE = 4  # workers beside a CPU that trains
MOST_FORKED = 64  # workers of one process
MOST_SPAWNED = 8  # they take 2 GB
MOST_ON_WINDOWS = 4  # of one machine: each reserves gigabytes of the page file (pytorch 53695)
NCCL_SHARE = 2**25  # bytes of /dev/shm for each process: NCCL takes segments of 9.6 MB there
# A batch system ends a program by the first, a terminal that is closed by the second.
STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
# Sockets of workers lie in the folder for temporary files, by names of up to 34 bytes more; macOS
# allows 103 bytes, Linux 107.
LONGEST_TMPDIR = 69


class Compute(NamedTuple):
    """The device and precision a network runs in, and the rank of this process."""

    device: torch.device
    amp: torch.dtype | None  # of mixed precision; None: float32 alone
    rank: int = 0
    world_size: int = 1

    def autocast(self) -> torch.autocast:
        """Return the context for a forward pass."""
        return torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)

    def name(self) -> str:
        """Return the name of the device as it is sold, or its kind."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return str(self.device)


def join_processes(name: str, amp: bool | None) -> Compute:
    """Return the device and precision of this process; under torchrun, meet the others first."""
    compute = pick_compute(name, amp)
    if not dist.is_torchelastic_launched():
        return compute
    # Process 0 checks all images while the others wait; torchrun ends them where one has died.
    dist.init_process_group(pick_backend(compute.device.type), timeout=timedelta(days=7))
    return compute._replace(
        amp=agree_precision(compute.amp), rank=dist.get_rank(), world_size=dist.get_world_size()
    )


def pick_backend(kind: str) -> str:
    """Return the backend that processes on devices of this kind talk by.

    Raises `DataError` where there is none.
    """
    if kind == "cpu":
        return "gloo"
    backend = {"cuda": "nccl", "xpu": "xccl"}.get(kind)
    if backend is None:
        raise DataError(f"--device {kind}: serves one process alone; start without torchrun")
    # There is no nccl on Windows, and no xccl in some builds of torch; both refuse to share a GPU.
    available = getattr(dist, f"is_{backend}_available", lambda: False)()
    if available and int(os.environ["LOCAL_WORLD_SIZE"]) <= torch.accelerator.device_count():
        return f"cpu:gloo,{kind}:{backend}"
    if kind == "xpu":  # which gloo does not serve: github.com/intel/torch-xpu-ops/issues/5387
        text = "several processes need a GPU each, and a torch with xccl; start without torchrun"
        raise DataError(f"--device xpu: {text}")
    return "gloo"


def pick_compute(name: str, amp: bool | None) -> Compute:
    """Return the device called `name` ("auto": an accelerator, else the CPU) and its precision.

    `amp` None stands for mixed precision where the hardware gains from it. Raises `DataError` for
    a device that is not on this machine.
    """
    device = find_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # later questions are about the current device
        if sys.platform == "win32":  # its driver would spill into main memory and crawl, not fail
            free, total = torch.cuda.mem_get_info()
            torch.cuda.set_per_process_memory_fraction(free / total)
    return Compute(device, pick_precision(device, amp))


def find_device(name: str) -> torch.device:
    """Return the device called `name`; under torchrun each process gets its own."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    best = found or torch.device("cpu")
    try:
        device = best if name == "auto" else torch.device(name)
        if device.type != "cpu" and dist.is_torchelastic_launched():
            index = int(os.environ["LOCAL_RANK"]) % max(1, torch.accelerator.device_count())
            device = torch.device(device.type, index)
        probe = torch.ones(1, device=device)
        probe.item()  # waits for a kernel: torch may have none for an old GPU
        return probe.device
    except (RuntimeError, AssertionError, ImportError):  # from builds without that device
        text = "not on this machine, in use, or too old for this torch"
        cure = "cpu" if name in ("auto", best.type) else f"auto, or {best}"
        raise DataError(f"--device {name}: {text}; try {cure}") from None


def pick_precision(device: torch.device, amp: bool | None) -> torch.dtype | None:
    """Return the dtype of mixed precision on `device`, None for float32 alone."""
    dtype = torch.bfloat16
    gains = False
    if device.type == "cuda":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            dtype = torch.float16
        capable = torch.cuda.get_device_capability(device) >= TENSOR_CORES
        gains = capable and WITHOUT_TENSOR_CORES not in torch.cuda.get_device_name(device)
    elif device.type == "xpu":
        properties = torch.xpu.get_device_properties(device)
        gains = getattr(properties, "has_bfloat16_conversions", False)
    elif device.type == "cpu":  # `get_capabilities` came with torch 2.10
        units: Any = getattr(torch.cpu, "get_capabilities", dict)()
        gains = bool(units.get("avx512_bf16") or units.get("amx_bf16"))
    return dtype if amp or (amp is None and gains) else None


def agree_precision(precision: torch.dtype | None) -> torch.dtype | None:
    """Return the precision of all processes: the first of float32, float16, bfloat16 one picked.

    Unlike GPUs pick unlike ones. Then gradients would be scaled in some processes alone, and
    values sent from one to the other be read as another type.
    """
    if not dist.is_initialized():
        return precision
    picked: list[torch.dtype | None] = [None] * dist.get_world_size()
    dist.all_gather_object(picked, precision)
    return next(each for each in (None, torch.float16, torch.bfloat16) if each in picked)


def to_device(batch: Tensor, device: torch.device) -> Tensor:
    """Return `batch` on `device`, without waiting where copies from pinned memory are safe."""
    if device.type not in PINNED:
        return batch.to(device)
    return batch.pin_memory().to(device, non_blocking=True)


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the layout of images in memory: channels last, but on MPS contiguous."""
    # There gradients of BatchNorm are wrong: https://github.com/pytorch/pytorch/issues/175189
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


@cache  # made once, since that waits for all the work of the device
def normalisation(device: torch.device) -> Tensor:
    """Return mean and deviation of ImageNet's pixels, 0 to 255, on `device`: (2, 3, 1, 1)."""
    parts = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return torch.tensor([[255 * x for x in part] for part in parts], device=device)[..., None, None]


def to_input(batch: Tensor, device: torch.device) -> Tensor:
    """Return images (B, H, W, 3) uint8 as normalised (B, 3, H, W) float32 on `device`.

    Features, which are no bytes, stay as they are.
    """
    batch = to_device(batch, device)
    if batch.dtype != torch.uint8:
        return batch
    images = batch.permute(0, 3, 1, 2).to(torch.float32, memory_format=memory_format(device))
    mean, std = normalisation(device)
    return images.sub_(mean).div_(std)


def wrap_ddp(network: nn.Module, given: Given) -> nn.Module:
    """Return `network`, under torchrun with its gradients averaged over the processes."""
    compute = given.compute
    if compute.world_size == 1:
        return network
    small = given.settings.batch_size // compute.world_size < SYNCHRONISED
    if small and compute.device.type != "cpu":  # PyTorch has no synchronised BatchNorm for CPUs
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    # The statistics of BatchNorm matter in evaluation alone, which sends them round. The option has
    # another name from torch 2.13 on, which torch 2.6 does not know.
    warnings.filterwarnings("ignore", ".broadcast_buffers. is deprecated", FutureWarning)
    return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)


def first_makes(make: Callable[[], Any], compute: Compute) -> Any:
    """Call `make` in process 0 and return its result in every process.

    Where it fails, process 0 raises the error and the others exit with status 2.
    """
    made = [None]
    problem = None
    if compute.rank == 0:
        try:
            made = [make()]
        except Exception as error:  # the others would say that they have lost process 0
            problem = error
    if dist.is_initialized():
        dist.broadcast_object_list(made, 0)
    if problem:
        raise problem
    if made[0] is None:
        sys.exit(2)
    return made[0]


def gather(part: Tensor, compute: Compute) -> Tensor:
    """Return the rows of all processes; `part` of rank r are rows r, r + world_size, and so on."""
    if not dist.is_initialized():
        return part
    count = torch.tensor(len(part))
    dist.all_reduce(count)
    table = part.new_empty(int(count), *part.shape[1:])
    for rank in range(compute.world_size):  # one after the other, to need little memory
        rows = table[rank :: compute.world_size]
        sent = part if rank == compute.rank else rows.contiguous()
        dist.broadcast(sent, rank)
        rows.copy_(sent)
    return table


def start_method() -> str:
    """Return the way in which workers start: forked on Linux, as Python's default elsewhere."""
    # A forked worker takes 16 ms, a spawned one 4 s and 229 MB. Python 3.14 would take a fork
    # server, whose workers cost as much as spawned ones.
    return "fork" if sys.platform == "linux" else get_start_method()


def count_workers(settings: Settings, asked: int | None) -> int:
    """Return the number of processes that read images: `--workers`, or as many as fit."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = asked
    if workers is None:
        workers = pick_workers(settings.device, processes)
    shared = Path("/dev/shm")  # through which, where there is one, workers hand their batches over
    if workers and not has_room_for_sockets():
        text = f"with a path of at most {LONGEST_TMPDIR} bytes; set TMPDIR. Until then none reads"
        print(f"warning: workers need a folder for temporary files {text}", file=sys.stderr)
        return 0
    if workers and shared.is_dir():  # a worker that writes beyond its end is killed
        nccl = NCCL_SHARE * processes if processes > 1 and settings.device == "cuda" else 0
        batch = 3 * eval_size(settings.image_size) ** 2 * settings.batch_size
        # Each worker has two batches on the way, and one is in use.
        room = max(0, (shutil.disk_usage(shared).free - nccl) // batch - 1) // 2
        if room < workers:
            text = f"room for batches of {room} workers, not {workers}; docker run has --shm-size"
            print(f"warning: {shared}: {text}", file=sys.stderr)
            return room
    return workers


def has_room_for_sockets() -> bool:
    """Return whether workers can make sockets: without them one would wait for batches for ever."""
    try:
        return os.name != "posix" or len(os.fsencode(tempfile.gettempdir())) <= LONGEST_TMPDIR
    except OSError:  # no folder can be written
        return False


def pick_workers(device: str, processes: int) -> int:
    """Return how many workers one of the machine's `processes` has.

    Beside a CPU that trains they have half of the cores, else all but one.
    """
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    # Nothing here tells how many of the cores a container may use.
    cores = getattr(os, "process_cpu_count", lambda: len(affinity(0)))() or 1
    share = cores // processes
    most = MOST_FORKED if start_method() == "fork" else MOST_SPAWNED
    if sys.platform == "win32":
        most = MOST_ON_WINDOWS // processes
    if device == "cpu":
        return min(most, MOST_BESIDE, share // 2)
    return max(1, min(most, share - 1 if share > 2 else share))


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Make the folder of a run and hold it against other processes.

    What a run that fails before there is anything to go on with has written is removed again, so
    that the same `--output` can be used. Raises `DataError` if another process holds the folder.
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_file(folder / LOCK)
    try:
        yield
    except BaseException:
        if not (folder / STATE).exists() and not (folder / NETWORK).exists():
            for name in ("split.csv", "config.json", START):
                (folder / name).unlink(missing_ok=True)
        raise
    finally:
        unlock_file(lock, folder / LOCK)
        with contextlib.suppress(OSError):  # not empty: a run has come of it
            for parent in made:
                parent.rmdir()


def lock_file(path: Path) -> int:
    """Make and lock the file, and return its descriptor, which this process alone has.

    The operating system unlocks it as the process ends, however it does. Raises `DataError` if
    another process has locked it.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    taken = False
    try:
        if sys.platform == "win32":
            msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
        else:  # not `flock`: forked workers would hold that until they notice that we are killed
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Unlinked meanwhile? Windows unlinks no open file, and some of its drives change numbers.
        taken = not path.exists() or (
            sys.platform != "win32" and not os.path.samestat(os.fstat(lock), path.stat())
        )
    except (BlockingIOError, PermissionError):
        taken = True
    except OSError:  # a file system without locks
        pass
    if taken:
        os.close(lock)
        raise DataError(f"{path.parent}: another process is at work there; wait until it is done")
    return lock


def unlock_file(lock: int, path: Path) -> None:
    """Remove and unlock a file that this process has locked."""
    if sys.platform == "win32":  # which removes no file that is open, by this process or another
        os.close(lock)
    with contextlib.suppress(OSError):
        path.unlink()
    if sys.platform != "win32":  # the other way round it might be the lock of another process
        os.close(lock)


def replace_file(unfinished: Path, path: Path) -> None:
    """Move a file to where another may be; if that is in use, try again for a second."""
    for _ in range(REPLACE_TRIES - 1):
        with contextlib.suppress(PermissionError):  # on Windows, from a virus scanner for example
            return os.replace(unfinished, path)
        time.sleep(REPLACE_PAUSE)
    os.replace(unfinished, path)


def tell_time_left(seconds: float, part: float, epochs: int) -> bool:
    """Say how long training takes as soon as that can be told; return whether it could be.

    `part` (0 to 1) of the first of `epochs` took so many seconds. The first batches alone say
    little: workers start, and the device is set up.
    """
    if seconds < TIME_TOLD_AFTER or part < 0.1:
        return False
    minutes = (seconds / part * epochs - seconds) / 60
    if minutes >= TIME_WORTH_TELLING:
        tqdm.write(f"about {math.ceil(minutes)} min to go", sys.stderr)
    return True


# ------------------------------------------------------------------------------------ command line


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Print `message` on stderr and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {printable(message)}; see --help\n")


# fmt: off
def make_parser() -> OneLineParser:
    """Return the parser of all flags; it gives `None` for "auto"."""
    purpose = str(__doc__).partition("\n\nDATA")[0]  # with the commands
    raw = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(prog="data_training.py", description=purpose, formatter_class=raw)

    def add(flag: str, metavar: str, kind: Any, default: Any, text: str) -> None:
        parse = kind
        if default == "auto":
            parse = lambda word: None if word == "auto" else kind(word)  # noqa: E731
        if default is not None:
            text += f" (default: {default})"
        group.add_argument(flag, metavar=metavar, type=parse, default=default, help=text)

    not_negative = number(int, lambda n: n >= 0, "a whole number of at least 0")
    at_least_one = number(int, lambda n: n >= 1, "a whole number of at least 1")
    three_to_ten = number(int, lambda n: 3 <= n <= 10, "a whole number from 3 to 10")
    below_one = number(float, lambda x: 0 < x < 1, "a number between 0 and 1")
    at_most_one = number(float, lambda x: 0 < x <= 1, "a number above 0, at most 1")
    positive = number(float, lambda x: 0 < x < math.inf, "a number above 0")
    zero_to_ten = number(float, lambda x: 0 <= x <= 10, "a number from 0 to 10")
    of_64_bits = number(int, lambda n: -(2**63) <= n < 2**63, "a whole number of 64 bits")
    parser.add_argument("data", metavar="DATA", type=Path, nargs="?",
        help="folder with one folder per class; with --predict an image, or a folder of images")
    group = parser.add_argument_group("data")
    add("--val-fraction", "F", below_one, 0.2, "part of each class that is kept for validation")
    add("--folds", "K", three_to_ten, 1, "train K networks (3 to 10), each on all but one part of "
        "the images; together they vote, and images of --val or --source test the vote")
    add("--val", "DIR", Path, None, "folder with one folder per class to validate on, in place of "
        "a part of DATA")
    add("--split", "FILE", Path, None, "CSV file with columns path (class/file) and part (train, "
        "val, or source for images of SRC), like a run's split.csv; other images are left out")
    add("--source", "SRC", Path, None, "folder that DATA was made from: images that are only there "
        "are validated on, too")
    add("--group", "PATTERN", str, None, "regular expression for paths below the class folder: "
        "images with the same first group, or match, are of one family (patient, film) and stay "
        "together, in training or in validation")
    add("--image-size", "PX", at_least_one, "auto", "pixels per side of a training crop; images "
        "are evaluated at up to 8/7 of that, 256 for 224; auto: that of --weights, else 224")
    add("--crop-scale", "F", at_most_one, 0.5, "smallest part of an image that a training crop "
        "shows")
    group.add_argument("--flip", choices=("sides", "none", "all"), default="sides",
        help="sides (default): mirror half of the training images; none: for text, signs, left and "
        "right; all: also turn them by 90, 180 or 270 degrees, for microscopes and from above")
    add("--workers", "N", not_negative, "auto", "processes that read images; auto: on a CPU half "
        f"of the cores, at most {MOST_BESIDE}; else the number of cores minus 1, at most "
        f"{MOST_FORKED} ({MOST_SPAWNED} on macOS, {MOST_ON_WINDOWS} on Windows)")
    group = parser.add_argument_group("model")
    add("--arch", "NAME", str, "auto", "a ResNet of torchvision; auto: that of --weights, else "
        "resnet50 on an accelerator and resnet18 on a CPU")
    add("--weights", "NAME|PATH", str, "DEFAULT", "torchvision weights by name, a file, a run, or "
        "none")
    group = parser.add_argument_group("training")
    add("--epochs", "N", not_negative, 10, "each draws as many images as there are to train on; "
        "with 0 the given weights are evaluated")
    add("--frozen-epochs", "N", not_negative, 0, "first epochs, which train the last layer (the "
        "head) alone, and from which all layers go on; with 0 it is trained in an extra epoch, and "
        "in short runs all layers begin anew")
    group.add_argument("--rebalance", choices=("sampler", "none"), default="sampler",
        help="sampler (default): draw every class equally often; none: every image once")
    add("--power", "P", zero_to_ten, 1.0, "the sampler weighs by 1 / count ** P; 0.5: square root")
    add("--batch-size", "N", at_least_one, "auto", "images per step, over all processes; auto: 64, "
        f"or 32 where DATA has under {SMALL_FOLDER:,} files, and at least 8 for each process")
    add("--lr", "X", positive, "auto", "highest learning rate of AdamW, which trains all "
        f"layers, pretrained ones in smaller steps the lower they are; auto: {RATE:g}, with "
        f"--weights none {SCRATCH_RATE:g}")
    group.add_argument("--no-calibration", action="store_true",
        help="keep the outputs as trained, which favour frequent classes and are too sure")
    group = parser.add_argument_group("use")
    add("--predict", "RUN", Path, None, "predict the class of each image in DATA with the network "
        "of a run (its folder, or its network.pt); writes CSV to stdout, or to --output FILE")
    group.add_argument("--natural", action="store_true",
        help="predict for classes as frequent as in training, not for equally frequent ones")
    group = parser.add_argument_group("run")
    add("--output", "DIR", Path, "auto", "new folder for the results; auto: runs/DATE-TIME")
    add("--resume", "RUN", Path, None, "go on with the run in this folder")
    add("--baseline", "RUN", Path, None, "earlier run on the same validation images to compare "
        "with")
    add("--seed", "N", of_64_bits, 0, "of split, draws, augmentation and random weights")
    group.add_argument("--device", metavar="NAME", default="auto",
        help="auto (default): an accelerator, else cpu")
    group.add_argument("--amp", action=argparse.BooleanOptionalAction,
        help="mixed precision (default: where the hardware gains from it)")
    return parser
# fmt: on


def parse_args(argv: list[str] | None) -> Namespace:
    """Return the settings of a command line; exit with status 2 if they are wrong or clash."""
    parser = make_parser()
    defaults = vars(parser.parse_args([]))
    given = vars(parser.parse_args(argv, Namespace(**dict.fromkeys(defaults))))
    given = {name: value for name, value in given.items() if value is not None}
    clashes = {
        "resume": given.keys() - {"resume", *WITH_RESUME},
        "predict": given.keys() - {"predict", *WITH_PREDICT},
        "val_fraction": given.keys() & {"folds", "val", "split"},
        "val": given.keys() & {"source", "split"},  # whose names may be those of other images
    }
    for name, others in clashes.items():
        for other in sorted(others) if name in given else ():
            flag = "DATA" if other == "data" else f"--{other.replace('_', '-')}"
            parser.error(f"{flag}: not with --{name.replace('_', '-')}; drop one of them")
    if "data" not in given and "resume" not in given:
        parser.error("the following arguments are required: DATA")
    if "natural" in given and "predict" not in given:
        parser.error("--natural: only with --predict; drop it")
    if "power" in given and given.get("rebalance") == "none":
        parser.error("--power: of the sampler; drop it or --rebalance none")
    if not given.keys() & {"output", "predict", "resume"}:
        given["output"] = unused(Path(f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}"))
    words = sys.argv if argv is None else ["data_training.py", *argv]
    return Namespace(**defaults | given, command=shlex.join(["python", *words]))


def number(kind: type, accepts: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    """Return a parser of numbers for argparse, which refuses those that `accepts` does not take."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if accepts(kind(text)):
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")

    return parse


def check_settings(args: Namespace) -> None:
    """Raise `DataError` where settings do not go together."""
    if args.frozen_epochs > args.epochs:
        raise DataError(f"--frozen-epochs {args.frozen_epochs}: more than --epochs {args.epochs}")
    if args.folds > 1 and not args.epochs:
        raise DataError("--folds: nothing is trained with --epochs 0; drop one of them")
    try:
        re.compile(args.group or "")
    except re.error as error:
        raise DataError(f"--group {args.group}: no regular expression: {error}") from None
    refuse_used(args.output)
    folders = {"DATA": args.data, "--source": args.source, "--val": args.val}
    for flag, folder in folders.items():
        if folder and not folder.is_dir():
            raise DataError(f"{flag} {folder}: no such folder; pass one that holds class folders")
        if folder and args.output.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"--output {args.output}: would be a class of {folder}; move it out")


def unused(path: Path) -> Path:
    """Return `path`, or with the first number behind it that makes it new."""
    names = (path.with_name(f"{path.name}-{number}") for number in range(2, 10**6))
    return path if not path.exists() else next(name for name in names if not name.exists())


def refuse_used(output: Path) -> None:
    """Raise `DataError` if there is a file, or anything that is not hidden in a folder."""
    if output.exists() and not output.is_dir():
        raise DataError(f"--output {output}: a file; name a new folder")
    if output.exists() and any(path.name[0] != "." for path in output.iterdir()):
        raise DataError(f"--output {output}: not empty; name a new folder, or --resume a run")


def quote(word: str) -> str:
    """Return a word as a shell takes it; Windows' `cmd` knows double quotes alone."""
    if sys.platform == "win32":
        end = "\\" if word.endswith("\\") else ""  # one alone would escape the quote
        return word if re.fullmatch(r"[\w.:=\\/-]+", word) else f'"{word}{end}"'
    return shlex.quote(word)


def printable(text: str) -> str:
    """Return `text` on one line, with control characters and undecodable bytes as escapes."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


# -------------------------------------------------------------------------------------------- main


# What a RuntimeError says where memory is out: on CUDA, in main memory that is pinned for it and on
# MPS; in main memory of Unix and of Windows; in cuBLAS, cuDNN and others; on Intel GPUs. Only the
# first has a class of its own.
NO_MEMORY = (
    *("out of memory", "allocate memory", "not enough memory"),
    *("ALLOC_FAILED", "ALLOCATION_FAILED", "OUT_OF_DEVICE_MEMORY"),
)
# What an `OSError` says that a process which reads images had with a file.
READ_ELSEWHERE = r"Original Traceback[^\0]+\[Errno \d+\] .+: ['\"].+['\"]$"
KILLED = "DataLoader worker (pid"  # what torch says of a process that reads images, and is gone
LOST = "pair.cc"  # where gloo, by which processes talk, finds that another one is gone
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# What the world does to any program: disks, rights, other programs. With another number and no
# file's name an `OSError` is taken for a mistake in this one.
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
# The same, and no file is to blame.
FAILING = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
WORLDLY = (*DISK_FULL, *NO_ACCESS, *FAILING, errno.EPIPE)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = parse_args(argv)
    try:
        if args.predict:
            predict_photos(args)
        else:
            with HELD:
                run_cleanly(args)
        if dist.is_initialized():  # only now that `run` holds no network that would still use it
            dist.destroy_process_group()
        return 0
    except DataError as error:
        message = last_words(error)
    except OSError as error:
        is_worldly = error.filename is not None or error.errno in WORLDLY
        if not is_worldly and not re.search(READ_ELSEWHERE, str(error)):
            raise
        message = describe_os_error(error, args)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or any(text in str(error) for text in NO_MEMORY):
            message = describe_full_memory(args)
        elif KILLED in str(error):
            message = "a process that reads images was killed, or crashed; try fewer --workers"
            if flag := resume_flag(args):
                message += f", by {flag}"
        elif LOST in str(error):
            message = "another process of this run has ended; see what it says"
            if flag := resume_flag(args):
                message += f", then {flag}"
        else:
            raise
    except KeyboardInterrupt as error:
        if int(os.environ.get("RANK", 0)) == 0:
            flag = resume_flag(args)
            text = f"; go on with {flag}" if flag else "; start again"
            with contextlib.suppress(OSError):  # of a terminal that is closed
                print(f"\ndata_training.py: interrupted{printable(text)}", file=sys.stderr)
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    print(f"data_training.py: error: {printable(message)}", file=sys.stderr)
    return 2


def run_cleanly(args: Namespace) -> None:
    """Call `run`; where that fails, end the processes that read images."""
    try:
        run(args)
    except BaseException as error:
        # The frames of the traceback hold them, and Python would wait for them for ever: they leave
        # SIGTERM, by which it ends others, to this process.
        traceback.clear_frames(error.__traceback__)
        raise


def last_words(error: Exception) -> str:
    """Return what an error says; in a process that reads images, behind a traceback of its own."""
    message = str(error).rstrip()
    if "Original Traceback" in message:
        message = message.splitlines()[-1].partition(": ")[2]
    return message


def describe_os_error(error: OSError, args: Namespace) -> str:
    """Return in one line what went wrong with which file, and what to do."""
    text = error.strerror or last_words(error)
    if error.filename is not None:
        text = f"{os.fsdecode(error.filename)}: {text}"
    cure = "mend that"
    if error.errno in DISK_FULL:
        cure = "make room"
    elif error.errno in NO_ACCESS:
        cure = "allow access, or close what has it open"
    if flag := resume_flag(args):
        return f"{text}; what was written before is whole: {cure}, then {flag}"
    return f"{text}; {cure}, then start again"


def describe_full_memory(args: Namespace) -> str:
    """Return in one line that memory is out, and what may fit."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    cures = []
    if half := (args.batch_size or BATCH) // 2 // processes * processes:
        cures.append(f"--batch-size {half}" if args.batch_size else "a smaller --batch-size")
    if not args.predict:
        cures.append("a smaller --image-size, in a new run")
    text = f"out of memory on --device {args.device}"
    return f"{text}; try {' or '.join(cures) or '--device cpu'}"


def resume_flag(args: Namespace) -> str:
    """Return the flag that goes on with the run, as a shell reads it; "" without a state of it."""
    folder = args.resume or args.output
    if args.predict or not (folder / STATE).exists():
        return ""
    device = "" if args.device == "auto" else f" --device {args.device}"
    return f"--resume {quote(str(folder))}{device}"


def stop(signum: int, _: Any) -> NoReturn:
    """End as by Ctrl-C; a second such signal would stop the cleaning."""
    for each in STOPS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt(signum)


if __name__ == "__main__":
    for each in STOPS:
        if signal.getsignal(each) is signal.SIG_DFL:  # `nohup` has SIGHUP ignored
            signal.signal(each, stop)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main())
