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
seen about equally often. The head is trained first, on features that the frozen backbone computes
once; then all layers, or the upper half, where a trial shows that all would forget more than they
learn. Two numbers are fitted on the validation images, which take back what the network still
favours frequent classes by; what is judged, reported and saved is calibrated so.
With `--folds K` each of K networks is trained on all but one part of the images and judged on that
part; together they vote. A run folder holds the network, the settings, the history, the recall of
each class with its interval, the predictions, and `report.html`, which shows all of that.

Read `run` first, below the constants: each of its lines makes what the next one takes.

Exit status: 0 done, 2 bad input (one line on stderr says where and what to do), 130 interrupted,
143 terminated.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import csv
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
import warnings
import weakref
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cache, partial
from itertools import compress, permutations, product
from multiprocessing import get_start_method
from multiprocessing.pool import ThreadPool
from pathlib import Path
from pickle import UnpicklingError
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
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler
from torchvision import models
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2
from tqdm import tqdm

EVERY, TEST = -1, -2  # in a fold's place: an image that every network learns, or none ever sees
NETWORK, STATE, START = "network.pt", "resume.pt", "start.pt"  # in a run folder
# The part of the images that is right, and the mean recall of all classes and of those with many,
# in between and with few training images; NaN where nothing was asked.
MEASURES = ("accuracy", "balanced_accuracy", "many", "medium", "few")
Z = 1.959964  # 95 % of a normal distribution lie within so many standard deviations
BATCH = 64  # images a step
PATHS = ("data", "val", "source", "split", "output", "baseline")  # settings that are paths
# What may be said beside `--resume` and `--predict`: where it runs, not what comes out.
WITH_RESUME = ("device", "workers", "amp")
WITH_PREDICT = ("data", "output", "natural", "batch_size", *WITH_RESUME)
if not dist.is_available():  # in a torch that is built for one process there is no more of it
    dist.is_initialized = dist.is_torchelastic_launched = lambda: False
Rows = list[dict[str, Any]]


class DataError(Exception):
    """Bad input, told in one line: where, what, what to do."""


# --------------------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class Given:
    """What a run is given: complete before its first epoch, and the same until its last."""

    settings: Namespace  # every setting as used
    data: Data
    baseline: Tensor | None  # what the run `--baseline` predicted of the judged images: (M,)
    origin: str  # in words, where the network is from
    compute: Compute  # of this process


class Fold(NamedTuple):
    """A network that is trained to the end."""

    head: dict[str, Tensor]  # state of the last layer where the way of the whole network began
    end: dict[str, Tensor]  # state of the network
    way: Tensor  # logits of the images it is judged by after each of its `DISTANCES`: (S, M, C)


@dataclass
class Progress:
    """How far a run has come: what is stored to go on from there."""

    start: dict[str, Tensor]  # the state of each fold's network before its first step
    model: Any  # in training, or to be judged: a ResNet, or a `Vote`
    history: Rows  # a row an epoch, from the first one on
    draws: Tensor  # of each class so far: (C,) int64
    head: dict[str, Tensor]  # as in `Fold`, of the fold in training
    logits: Tensor  # of the images that the last epoch was judged by: (M, C)
    done: list[Fold] = field(default_factory=list)
    stored: dict[str, Any] = field(default_factory=dict)  # a trainer's state, to take up once
    trainer: Any = None  # a `Trainer`, from the first stage on
    features: Tensor | None = None  # what the backbone at the start makes of all images
    written: float = 0.0  # when the files were, last

    def at(self) -> tuple[int, int]:
        """The fold, from 0, and the epoch that were done last."""
        row = self.history[-1] if self.history else {"fold": 0, "epoch": 0}
        return row["fold"] - 1, row["epoch"]


def run(settings: Namespace) -> None:
    """Train and evaluate as `settings` say, and fill the run folder."""
    compute = join_processes(settings.device, settings.amp)
    settings.device = compute.device.type
    given, progress = first_makes(partial(prepare, settings, compute), compute)
    settings.batch_size = given.settings.batch_size
    # A run that goes on may have been told its precision before.
    compute = compute._replace(amp=pick_compute(str(compute.device), given.settings.amp).amp)
    given, data = replace(given, compute=compute), given.data
    progress.model.to(compute.device, memory_format=memory_format(compute.device))
    reader = Reader(given)
    if compute.rank == 0:
        start_run(given, progress)
    for stage in plan(given.settings, data):
        if stage.name == "whole" and first_makes(partial(trial_fails, progress), compute):
            stage = stage._replace(name="upper")
        left = [epoch for epoch in stage.epochs if (stage.fold, epoch) > progress.at()]
        inputs = begin(given, progress, stage, reader) if left else reader
        for epoch in left:
            started, reader.waited = time.perf_counter(), 0.0
            drawn = draw_epoch(given, stage, epoch)
            seeds = seeded("augment", given.settings.seed, stage.fold, epoch)
            batches = cut_batches(drawn, given.settings.batch_size, seeds)
            loss = train_epoch(given, progress.trainer, batches, inputs)
            seconds, waited = time.perf_counter() - started, reader.waited
            network, places = progress.trainer.evaluated, data.judges(stage.fold)
            progress.logits = evaluate(given, network, inputs, places)
            if epoch == stage.epochs[-1] and stage.last:
                progress.done.append(look_back(given, progress, stage, reader))
            row = {
                "fold": stage.fold + 1,
                "epoch": epoch,
                "phase": stage.name,
                "train_loss": loss,
                **measure_all(judge(given, {stage.fold: progress.logits}), data.train_counts()),
                **count_draws(data, stage.fold, drawn),
                "learning_rate": progress.trainer.rate(),
                "images_per_second": len(drawn) / seconds,
                "data_wait": waited / seconds,
                "seconds": time.perf_counter() - started,
            }
            progress.history.append(row)
            progress.draws += data.counts(drawn)
            if compute.rank == 0:
                report(given, progress, epoch == stage.epochs[-1])
    finish(given, progress, reader)


# ---------------------------------------------------------------------------------------- sampling


EVALUATED = -1  # in a seed's place: the view of evaluation


def sample_weights(labels: Tensor, power: float) -> Tensor:
    """A weight for each image, 1 / (images of its class) ** power: (N,) float64."""
    return torch.bincount(labels).double()[labels] ** -power


def seeded(purpose: str, *numbers: int) -> torch.Generator:
    """A random stream for this purpose and these numbers alone."""
    text = "/".join(map(str, (purpose, *numbers)))
    return torch.Generator().manual_seed(random.Random(text).getrandbits(63))


def draw_images(weights: Tensor, weighted: bool, generator: torch.Generator) -> Tensor:
    """N random places in N `weights`, by weight with replacement or else each once: (N,) int64."""
    if not weighted:
        return torch.randperm(len(weights), generator=generator)
    sampler = WeightedRandomSampler(weights.tolist(), len(weights), generator=generator)
    return torch.tensor(list(sampler))


def draw_epoch(given: Given, stage: Stage, epoch: int) -> Tensor:
    """The indices of the training images that an epoch draws, int64."""
    settings, train = given.settings, given.data.learns(stage.fold)
    weights = sample_weights(given.data.labels[train], settings.power)
    stream, weighted = (
        seeded("draw", settings.seed, stage.fold, epoch),
        settings.rebalance == "sampler",
    )
    drawn = [train[draw_images(weights, weighted, stream)] for _ in range(stage.passes)]
    return torch.cat([train[:0], *drawn])


def count_draws(data: Data, fold: int, drawn: Tensor) -> dict[str, float]:
    """What a draw of images did: fewest and most of a class, and the part of the images seen."""
    counts = data.counts(drawn)
    return {
        "fewest_draws": int(counts.min()),
        "most_draws": int(counts.max()),
        "distinct_images": len(drawn.unique()) / len(data.learns(fold)),
    }


def cut_batches(
    indices: Tensor, batch_size: int, seeds: torch.Generator | None = None
) -> tuple[Tensor, ...]:
    """Batches of (index, seed of its augmentation), (B, 2) int64; without `seeds` to evaluate.

    Their sizes differ by one at most: a last batch of a few images would weigh too much, and one of
    a single image break BatchNorm.
    """
    drawn = torch.full_like(indices, EVALUATED)
    if seeds:
        drawn = torch.randint(2**62, (len(indices),), generator=seeds)
    pairs = torch.stack([indices, drawn], 1)
    return pairs.tensor_split(math.ceil(len(indices) / batch_size)) if len(indices) else ()


# ---------------------------------------------------------------------------------------- training


HEAD_STEPS = 1000  # at least, of training the head alone: on features they cost next to nothing
HEAD_RATE = 0.02  # of SGD, for features of squared length 512, as those of a ResNet-18
HEAD_DECAY = 0.002  # weight decay, of the head alone and in the whole network
HEAD_FACTOR = 3.0  # times the rate of the other layers for the head of a pretrained network
# Of images like those that the weights know, training all layers forgets more than it learns. A
# trial of so many steps, where that is a fifth of all at most, tells before the time is spent: it
# fails where its loss is so many times that of the head, as more steps would win back a part.
TRIAL_STEPS, TRIAL_FAILS = 150, 1.2
UPPER_FACTOR = 1 / 15  # times `RATE` for the upper half of a network that fails the trial
LOWER = ("conv1.", "bn1.", "layer1.", "layer2.")  # the other half
SOFTENED = 0.1  # what is left of the head's logits as the training of the whole network begins
CLIP_NORM = 1.0  # longest gradient followed; tiny BatchNorm variances can make it explode
# With fewer images per process and step BatchNorm takes its statistics over all processes, which
# waits for the GPU three times a layer, 159 times a step of ResNet-50 (torch's _functions.py).
SYNCHRONISED = 8


class Stage(NamedTuple):
    """A stretch of epochs in which one network trains in one way."""

    name: str  # "head", "trial", "whole", "upper", or "given": nothing is trained
    fold: int
    epochs: range
    passes: int  # over as many images as there are, an epoch
    steps: int
    last: bool  # of its network


def plan(settings: Namespace, data: Data) -> list[Stage]:
    """The stages of a run in order: of each fold the head alone, and then all layers.

    By default the head has epoch 0: on features it costs a third of an epoch. The first epochs of
    all layers are a trial where they are enough for one; the other folds do as the first one did.
    """
    stages: list[Stage] = []
    own = settings.frozen_epochs is None and settings.weights != "none"
    head = range(1) if own else range(1, 1 + (settings.frozen_epochs or 0))
    whole = range(head.stop, settings.epochs + 1)
    for fold in range(settings.folds):
        images = len(data.learns(fold))
        if not settings.epochs:
            stages.append(Stage("given", fold, range(1), passes=0, steps=0, last=True))
            continue
        if head:  # few images make few steps an epoch: they are passed over again
            passes = math.ceil(HEAD_STEPS * settings.batch_size / (len(head) * images))
            steps = len(head) * math.ceil(passes * images / settings.batch_size)
            stages.append(Stage("head", fold, head, passes, steps, last=not whole))
        steps, rest = math.ceil(images / settings.batch_size), whole
        tried = math.ceil(TRIAL_STEPS / steps)
        if head and fold == 0 and tried <= len(whole) // 5:
            stages.append(Stage("trial", fold, whole[:tried], 1, tried * steps, last=False))
            rest = whole[tried:]
        if rest:
            stages.append(Stage("whole", fold, rest, 1, len(rest) * steps, last=True))
    return stages


def trial_fails(progress: Progress) -> bool:
    """Whether training all layers has made the first fold's network much worse than its head."""
    losses = {row["phase"]: row["val_loss"] for row in progress.history if row["fold"] == 1}
    return "trial" in losses and losses["trial"] > TRIAL_FAILS * losses["head"]


class Trainer:
    """A network in training and what moves with it. It knows no files, and no epoch's number."""

    def __init__(self, model: Any, stage: Stage, optimizer: Optimizer, given: Given):
        """A stage at its beginning."""
        self.stage, self.optimizer = stage, optimizer
        head_alone, upper = stage.name == "head", stage.name == "upper"
        self.evaluated = model.fc if head_alone else model.train(not upper)
        self.network = wrap_ddp(self.evaluated, given)
        groups = optimizer.param_groups
        self.weights = [weight for group in groups for weight in group["params"]]
        peaks = [group["lr"] for group in groups]
        # OneCycleLR divides by zero where either part of the cycle has a single step.
        steps = max(4, stage.steps)
        warm_up = 0.1 if head_alone or upper or given.settings.weights == "none" else 0.0
        rising = max(warm_up, 2 / steps)
        self.scheduler = OneCycleLR(optimizer, peaks, steps, pct_start=rising, cycle_momentum=False)
        scaled = given.compute.amp is torch.float16
        self.scaler = torch.amp.GradScaler(given.compute.device.type, enabled=scaled)
        self.average = AveragedModel(model) if upper else None

    def rate(self) -> float:
        """The learning rate of the next step, NaN where nothing is trained."""
        return math.nan if self.stage.name == "given" else float(self.scheduler.get_last_lr()[-1])

    def step(self, loss: Tensor) -> None:
        """Take a step against the gradient of `loss`."""
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if self.stage.name != "head":  # which is a convex problem
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.weights, CLIP_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        if self.average:  # which asks the device how many steps it has seen, and waits for that
            self.average.update_parameters(self.evaluated)
            if self.scheduler.last_epoch == self.stage.steps:
                self.evaluated.load_state_dict(self.average.module.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on as if nothing had happened."""
        parts = ("optimizer", "scheduler", "scaler", "average")
        return {name: part.state_dict() for name in parts if (part := getattr(self, name))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was stored in this stage."""
        for name, stored in state.items():
            if stored:  # a scaler that was not needed has none, and one that is refuses it
                getattr(self, name).load_state_dict(stored)
        for weight, kept in self.optimizer.state.items():
            for name, value in kept.items():  # kernels read both as they lie, maybe elsewhere now
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    kept[name] = torch.empty_like(weight).copy_(value)


def wrap_ddp(network: nn.Module, given: Given) -> nn.Module:
    """`network` itself, or with its gradients averaged over the processes after each step."""
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


def head_optimizer(model: models.ResNet, lengths: Tensor) -> Optimizer:
    """SGD for the head alone, on features of these lengths.

    How far a step may go hangs on the length of the features; `HEAD_RATE` is for a ResNet-18's.
    """
    square = max(lengths.square().mean().item() / 512, 1e-12)
    rate, decay = HEAD_RATE / square, HEAD_DECAY * square
    groups = [
        {"params": [model.fc.weight], "lr": rate, "weight_decay": decay},
        {"params": [model.fc.bias], "lr": HEAD_RATE, "weight_decay": HEAD_DECAY},
    ]
    return torch.optim.SGD(groups, momentum=0.9, fused=True)


def whole_optimizer(model: nn.Module, settings: Namespace, upper: bool) -> Optimizer:
    """AdamW for all layers, or for the `upper` half in small steps."""
    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, weight in model.named_parameters():
        weight.requires_grad = not (upper and name.startswith(LOWER))
        if weight.requires_grad:
            parts[name.startswith("fc.")].append(weight)
    rate = settings.lr * (UPPER_FACTOR if upper else 1.0)
    factor = 1.0 if settings.weights == "none" else HEAD_FACTOR
    head = {"params": parts[True], "lr": rate * factor}
    rest = {"params": parts[False], "lr": rate, "weight_decay": 0.0}
    return torch.optim.AdamW([head, rest], weight_decay=HEAD_DECAY, fused=True)


def begin(given: Given, progress: Progress, stage: Stage, reader: Reader) -> Inputs:
    """Set up `progress.trainer` for a stage, or take up what was stored; where its inputs are."""
    model, fold = progress.model, progress.at()[0]
    inputs: Inputs = reader
    before = progress.history[-1]["phase"] if fold == stage.fold else ""
    if fold != stage.fold and fold >= 0:  # a fold begins where the first one did
        model.load_state_dict(progress.start)
    if stage.name == "head":
        if progress.features is None:
            progress.features = extract_features(given, model, reader)
        inputs = Features(progress.features, given.data.labels, given.compute)
        table = progress.features[given.data.learns(stage.fold)].float()
        optimizer = head_optimizer(model, torch.linalg.vector_norm(table, dim=1))
    else:
        optimizer = whole_optimizer(model, given.settings, stage.name == "upper")
    progress.trainer = Trainer(model, stage, optimizer, given)
    if before == stage.name:
        progress.trainer.load_state_dict(progress.stored)
    elif before == "trial":
        if stage.name == "upper":  # back to where the trial began
            model.load_state_dict(at_start(progress, progress.head))
    elif stage.name not in ("head", "given"):
        progress.head = copy_state(model.fc)
        if before == "head" and stage.name != "upper":
            # A confident head holds the backbone to the old features, a new one pulls it anywhere.
            for weight in model.fc.parameters():
                weight.data.mul_(SOFTENED)
    progress.stored = {}
    return inputs


@torch.no_grad()
def extract_features(given: Given, model: models.ResNet, reader: Reader) -> Tensor:
    """What the backbone makes of each image, BatchNorm as in evaluation: (N, D) float16.

    In half the memory: logits of the head need no more digits, and each process holds them all.
    """
    compute = given.compute
    backbone = copy.deepcopy(model).eval()
    backbone.fc = nn.Identity()
    ours = torch.arange(compute.rank, len(given.data.labels), compute.world_size)
    batches = cut_batches(ours, math.ceil(given.settings.batch_size / compute.world_size))
    rows = []
    for inputs, _ in reader.read(batches, "features"):
        with compute.autocast():
            rows.append(backbone(to_input(inputs, compute.device)).half().cpu())
    return gather(torch.cat(rows), compute)


def train_epoch(given: Given, trainer: Trainer, batches: Sequence[Tensor], inputs: Inputs) -> float:
    """Train on `batches`, of which each process takes its part; the loss averaged over images."""
    settings, compute, started = given.settings, given.compute, time.perf_counter()
    total, tenth = torch.zeros((), device=compute.device), math.ceil(len(batches) / 10)
    ours = [batch[compute.rank :: compute.world_size] for batch in batches]
    loaded = inputs.read(ours, f"training, {trainer.stage.name}")
    for batch, (images, targets) in zip(batches, loaded, strict=True):
        targets = to_device(targets, compute.device)
        with compute.autocast():
            logits = trainer.network(to_input(images, compute.device))
        loss = F.cross_entropy(logits.float(), targets)
        # Gradients are averaged over processes, whose parts of a batch may differ by one image.
        trainer.step(loss * (len(targets) * compute.world_size / len(batch)))
        total += loss.detach() * len(targets)
        stage = trainer.stage
        if trainer.scheduler.last_epoch == tenth and stage.fold == 0 and stage.name != "head":
            epoch = (time.perf_counter() - started) * len(batches) / tenth
            if compute.rank == 0:
                epochs = settings.epochs * settings.folds - stage.epochs[0] + 1
                minutes = math.ceil(epoch * epochs / 60)
                tqdm.write(f"about {minutes} min to go", sys.stderr)
    if dist.is_initialized():
        dist.all_reduce(total)
    if not total.isfinite():
        raise DataError(f"--lr: the loss became {total.item()}; try a tenth of {settings.lr:g}")
    return total.item() / sum(map(len, batches)) if batches else math.nan


# ---------------------------------------------------------------------- evaluation and calibration


PRIOR = 2.0  # images for which what calibration expects counts
LEFT = 1.0  # log class shares that balanced training leaves in the logits, on most sets
LEAST_SCALE = 0.01
LEAST_SPREAD = 0.05  # of log shares; what differs less in frequency is not shifted by much
MOST_FITTED = 2**22  # logits that calibration is fitted on: more would tell two numbers little new
HIGHEST = 1e4  # logit
BLOCK = 2**13  # images whose probabilities are held at once


@torch.no_grad()
def evaluate(
    given: Given, network: nn.Module, inputs: Inputs, places: Tensor, title: str = "validation"
) -> Tensor:
    """The logits of the images at `places`, of which each process takes its part: (M, C).

    Raises `DataError` where they are NaN.
    """
    compute, training = given.compute, network.training
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
    network.train(training)
    logits = gather(torch.cat([each.cpu() for each in outputs]), compute)
    if logits.isnan().any():
        raise DataError("the network's outputs are no numbers; take other weights or a lower --lr")
    return logits.clamp(-HIGHEST, HIGHEST)  # float16 overflows


class Calibration(NamedTuple):
    """Two numbers that make calibrated logits of a network's: scale * logits - shift * log_share.

    Drawn equally often, a rare class is still recognised less often in the end: its few images are
    known by heart and teach nothing any more. `shift` gives back what frequent classes gained by
    that (logit adjustment, Menon et al. 2021, arXiv:2007.07314), and `scale` takes back confidence
    that is not earned (temperature, Guo et al. 2017, arXiv:1706.04599).
    """

    scale: float = 1.0
    shift: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """What is said of M images of C classes, in their order; calibrated, if not said."""

    places: Tensor  # (M,) int64, where they are in `Data`
    loss: float  # averaged over images, each class counting the same
    targets: Tensor  # (M,) int64
    predicted: Tensor  # (M,) int64
    probability: Tensor  # (M,) float32, of the predicted class
    true_probability: Tensor  # (M,) float32, of the true one
    as_trained: Tensor  # (M,) int64, predicted without calibration
    trained_probability: Tensor  # (M,) float32, of that
    natural: Tensor  # (M,) int64, predicted where classes are as frequent as in training
    confusion: Tensor  # (C, C) int64, rows true, columns predicted
    calibration: Calibration  # fitted on all images, for those to come

    @property
    def val_counts(self) -> Tensor:
        """The images of each class: (C,) int64."""
        return self.confusion.sum(1)

    @property
    def recall(self) -> Tensor:
        """The part of each class that was recognised: (C,) float64, NaN for one without images."""
        return recall_by_class(self.confusion)


def judge(given: Given, answers: Mapping[int, Tensor]) -> Evaluation:
    """What the logits of one or more folds say of the images that these are judged by.

    Numbers of calibration are fitted on other images than they are used for: on those of the other
    folds, or on the other half of those of one fold.
    """
    data, settings = given.data, given.settings
    places = torch.cat([data.judges(fold) for fold in answers])
    logits, targets = torch.cat([*answers.values()]), data.labels[places]
    part = torch.cat([torch.full((len(each),), fold) for fold, each in answers.items()])
    if len(answers) == 1:
        part = pick_half(targets).long()
    numbers, fitted = torch.tensor([Calibration()]).expand(len(targets), -1), Calibration()
    if settings.epochs and not settings.no_calibration:
        numbers, log_share = numbers.clone(), data.log_share()
        left = LEFT + 1 - settings.power
        for each in part.unique():
            others = part != each
            fit = fit_calibration(logits[others], targets[others], log_share, left)
            numbers[~others] = torch.tensor(fit)
        fitted = fit_calibration(logits, targets, log_share, left)
    return assess(given, places, logits, numbers, fitted)


def assess(
    given: Given, places: Tensor, logits: Tensor, numbers: Tensor, fitted: Calibration
) -> Evaluation:
    """What (M, C) logits say of the images at `places`, calibrated by (M, 2) `numbers`."""
    log_share, targets = given.data.log_share(), given.data.labels[places]
    natural, answers = natural_shift(given.settings, given.data), defaultdict(list)
    for rows in torch.arange(len(targets)).split(BLOCK):
        scale, shift = numbers[rows].T[..., None]
        trained = logits[rows].float()
        adjusted = scale * trained - shift * log_share
        answers["losses"].append(F.cross_entropy(adjusted, targets[rows], reduction="none"))
        trained_probability, as_trained = trained.softmax(1).max(1)
        probability, predicted = adjusted.softmax(1).max(1)
        answers["as_trained"].append(as_trained)
        answers["trained_probability"].append(trained_probability)
        answers["predicted"].append(predicted)
        answers["probability"].append(probability)
        answers["natural"].append((adjusted + natural).argmax(1))
    whole = {name: torch.cat(parts) for name, parts in answers.items()}
    losses = whole.pop("losses")
    return Evaluation(
        places=places,
        loss=(class_weights(targets) @ losses.double()).item(),
        targets=targets,
        true_probability=(-losses).exp(),
        confusion=confusion_matrix(targets, whole["predicted"], len(log_share)),
        calibration=fitted,
        **whole,
    )


def natural_shift(settings: Namespace, data: Data) -> Tensor:
    """What to add to logits where classes are as frequent as in training: (C,) float32.

    Without calibration, what the sampler did not take away is in them already.
    """
    return data.log_share() * (settings.power if settings.no_calibration else 1.0)


def pick_half(targets: Tensor) -> Tensor:
    """Which of M images are in the first half, at random, of every class half: (M,) bool."""
    order = torch.randperm(len(targets), generator=seeded("half", 0, 0))
    order = order[targets[order].argsort(stable=True)]
    half = torch.zeros(len(targets), dtype=torch.bool)
    half[order[::2]] = True
    return half


def class_weights(targets: Tensor) -> Tensor:
    """A weight for each of M images, so that each class counts the same: (M,) float64, sum 1."""
    weights = 1 / torch.bincount(targets)[targets].double()
    return weights / weights.sum()


def fit_calibration(
    logits: Tensor, targets: Tensor, log_share: Tensor, left: float = LEFT
) -> Calibration:
    """The numbers with the lowest cross entropy of (M, C) logits, each class counting the same.

    The problem is convex. A prior worth `PRIOR` images holds the numbers near what is usual where
    there is little to go by: near a scale of 1 and a shift of `left` times the scale, since that
    many log shares are left in the logits. Images with weights w that sum to 1 tell as much as
    1 / sum(w^2) of equal weight (Kish 1965); a class without images counts there as half an image,
    since without it the others are best told by never naming it.
    """
    if not len(targets):
        return Calibration(1.0, left)
    picked = pick_evenly(targets, MOST_FITTED // len(log_share))
    logits, targets, log_share = logits[picked].double(), targets[picked], log_share.double()
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
    """About `most` of M places, evenly spread, and all of a class it would miss: (M,) bool."""
    chosen = torch.arange(len(labels)) % math.ceil(len(labels) / most) == 0
    return chosen | ~torch.isin(labels, labels[chosen])


# --------------------------------------------------------------------------- what is kept, the end


DISTANCES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the way from the head alone to the end of training
WRITE_EVERY = 30.0  # seconds; on a fast GPU the files of an epoch take longer than the epoch


def copy_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module, copied into main memory."""
    return {key: value.to("cpu", copy=True) for key, value in module.state_dict().items()}


def list_distances(settings: Namespace) -> tuple[float, ...]:
    """The distances along the way from the head alone to the end that are compared, the end last.

    On images like those that the weights know, the end has lost what a part of the way keeps
    (Wortsman et al. 2022, arXiv:2109.01903); on others it has not.
    """
    head = settings.weights != "none" and settings.frozen_epochs != 0
    return DISTANCES if head and (settings.frozen_epochs or 0) < settings.epochs else DISTANCES[-1:]


def at_start(progress: Progress, head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a network where the training of all its layers begins."""
    return progress.start | {f"fc.{key}": value for key, value in head.items()}


def mix(progress: Progress, fold: Fold, distance: float) -> dict[str, Tensor]:
    """The state of a network after a distance of its way: weights between the start's and end's."""
    start = at_start(progress, fold.head)
    ends = {k: (start[k].float(), v.float(), v.dtype) for k, v in fold.end.items()}
    mixed = {k: torch.lerp(one, two, distance).to(kind) for k, (one, two, kind) in ends.items()}
    return fold.end if distance == 1 else mixed


def look_back(given: Given, progress: Progress, stage: Stage, reader: Reader) -> Fold:
    """The network of a fold at its end, and what it says after each distance of its way there."""
    model, places = progress.model, given.data.judges(stage.fold)
    fold = Fold(progress.head, copy_state(model), progress.logits[None])
    *earlier, _ = list_distances(given.settings)
    way = []
    for distance in earlier:
        model.load_state_dict(mix(progress, fold, distance))
        way.append(evaluate(given, model, reader, places, f"choosing, {distance:.0%}"))
    model.load_state_dict(fold.end)
    return fold._replace(way=torch.stack([*way, progress.logits]))


def choose_distance(given: Given, done: Sequence[Fold]) -> int:
    """The place in `list_distances` of what all folds keep of their ways.

    It is the end, unless another has a lower log loss by more than a standard error, calibrated on
    other images than it is judged by, each class counting the same: of few images the best of five
    is often best by chance, and to choose would then cost more than it gains.
    """
    losses = []
    for at in range(len(done[0].way)):
        judged = judge(given, {fold: each.way[at] for fold, each in enumerate(done)})
        losses.append(-judged.true_probability.double().clamp(min=1e-30).log())
    weights, end = class_weights(judged.targets), len(losses) - 1
    best = min(reversed(range(len(losses))), key=lambda at: (weights @ losses[at]).item())
    gains = losses[end] - losses[best]
    gain = weights @ gains
    error = (weights**2 @ (gains - gain) ** 2).sqrt()
    return best if gain > error else end


def finish(given: Given, progress: Progress, reader: Reader) -> None:
    """Choose the network of a run, judge it, and write what there is to say of it."""
    settings, data, compute, done = given.settings, given.data, given.compute, progress.done
    if not done:  # of a run that had come to its end before
        if compute.rank == 0:
            drop_leftovers(settings.output)
            print(f"\nnothing is left to do in {printable(str(settings.output))}")
        return
    at = first_makes(lambda: choose_distance(given, done), compute)
    distance = list_distances(settings)[at]
    last = judge(given, {fold: each.way[at] for fold, each in enumerate(done)})
    states = [mix(progress, fold, distance) for fold in done]
    if isinstance(progress.model, Vote):
        states = [copy_state(network) for network in progress.model.networks]
    test, tested = data.judges(TEST), None
    if len(test):
        networks = {"networks": states, "classes": data.classes}
        vote = build_model(settings.arch, data.classes, networks)[0].to(compute.device)
        logits = evaluate(given, vote, reader, test, "test")
        numbers = torch.tensor([last.calibration]).expand(len(test), -1)
        tested = assess(given, test, logits, numbers, last.calibration)
    if compute.rank == 0:
        write_network(given, states, last.calibration)
        report_end(given, progress, (last, tested), distance)


def report(given: Given, progress: Progress, done: bool) -> None:
    """Print what there is to say after an epoch, and write it if it is time or a stage `done`."""
    row, settings = progress.history[-1], given.settings
    print(format_epoch(row, settings), flush=True)
    if not settings.epochs or (not done and time.perf_counter() - progress.written < WRITE_EVERY):
        return
    fold = row["fold"] - 1
    answers = {at: each.way[-1] for at, each in enumerate(progress.done)}
    states = [each.end for each in progress.done] or [copy_state(progress.model)]
    if fold in answers:  # the network of this fold is done
        save_tensors(settings.output / f"fold-{fold + 1}.pt", progress.done[fold]._asdict())
    last = judge(given, answers | {fold: progress.logits})
    write_network(given, states, last.calibration)
    save_state(given, progress)
    write_reports(given, progress, last, None)
    progress.written = time.perf_counter()


def report_end(
    given: Given, progress: Progress, judged: tuple[Evaluation, Evaluation | None], distance: float
) -> None:
    """Write and print what there is to say of a run that is done, and drop what it went on from."""
    write_reports(given, progress, *judged)
    if given.settings.epochs:
        save_state(given, progress, done=True)
    drop_leftovers(given.settings.output)
    print_end(given, progress, *judged, distance)


def drop_leftovers(output: Path) -> None:
    """Remove what a run that is done would have gone on from."""
    for file in (output / START, *output.glob("fold-*.pt")):
        file.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------- model


# The scale of weights that the learning rates are for, see `rescale`.
CONV_SCALE, FEATURE_SCALE = 0.5, 2.0


def load_weights(settings: Namespace) -> dict[str, Any]:
    """What `--weights` names: "networks", a list of state_dicts, and what is recorded with them.

    So may be its `--arch` and `--image-size`: they are taken from there unless they are given.
    """
    asked, content = settings.weights, dict[str, Any]()
    if os.path.isdir(asked):
        asked = settings.weights = os.path.join(asked, NETWORK)
    if os.path.isfile(asked):
        content = read_weights(asked)
        adopt(settings, "arch", content.get("arch"))
        adopt(settings, "image_size", content.get("train_size"))
    settings.arch = settings.arch or ("resnet18" if settings.device == "cpu" else "resnet50")
    settings.image_size = settings.image_size or 224
    known = models.list_models(models, include=["resnet*", "resnext*", "wide_resnet*"])
    if settings.arch not in known:
        raise DataError(f"--arch {settings.arch}: unknown; choose from {', '.join(known)}")
    if settings.epochs and len(content.get("networks", ())) > 1:
        text = f"{len(content['networks'])} networks that vote; judge them with --epochs 0"
        raise DataError(f"--weights {asked}: {text}, or train from one")
    if content or asked == "none":
        return content
    named = models.get_model_weights(settings.arch)
    if asked in named.__members__:
        settings.weights = named[asked].name  # what DEFAULT means may change
        return {"networks": [download(named[asked], settings.weights)]}
    names = ", ".join(named.__members__)
    raise DataError(f"--weights {asked}: no such file; pass one, or {names}, or none")


def read_weights(path: str) -> dict[str, Any]:
    """A checkpoint of this script, or as one of "networks" what else there is in the file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if "networks" in content and "classes" in content:
            return content
        state = content.get("state_dict", content.get("model", content))
        state = {key.removeprefix("module."): value for key, value in state.items()}
        if not state or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("no state_dict in it")
    except OSError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        reason = "more than weights in it" if isinstance(error, UnpicklingError) else "no weights"
        raise DataError(f"--weights {path}: {reason}; torch.save a state_dict there") from None
    return {"networks": [state]}


def adopt(settings: Namespace, name: str, recorded: Any) -> None:
    """Take the setting from a checkpoint; raises `DataError` if another one is given.

    Another image size is an error only where nothing is trained: it would ruin the result unseen.
    """
    given = getattr(settings, name)
    if given is None:
        setattr(settings, name, recorded)
    elif recorded not in (None, given) and (name == "arch" or settings.epochs == 0):
        flag = f"--{name.replace('_', '-')}"
        raise DataError(f"{flag} {given}: the weights are of {recorded}; drop {flag}")


def download(weights: models.WeightsEnum, name: str) -> dict[str, Tensor]:
    """The weights from torch's cache folder, after filling it from their address if need be."""
    try:
        return weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
    except Exception as error:  # a damaged file raises nearly anything
        text = f"{weights.url} could not be fetched or read ({error}); put the file into "
        text += f"{torch.hub.get_dir()}/checkpoints, or take --weights PATH or --weights none"
        raise DataError(f"--weights {name}: {text}") from None


class Vote(nn.Module):
    """Networks of which each has a say: their mean logits."""

    def __init__(self, networks: Iterable[nn.Module]):
        """A vote of `networks`."""
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        """The logits of (B, 3, H, W) images: (B, C)."""
        return torch.stack([network(images) for network in self.networks]).mean(0)


def build_model(
    arch: str, classes: list[str], content: Mapping[str, Any]
) -> tuple[models.ResNet | Vote, str]:
    """The network for `classes`, or the vote of several, and in words what became of the weights.

    A head in the weights stays if it has the right size and, as far as known, the same classes.
    """
    built, said = [], "a new network"
    for state in content.get("networks", [{}]):
        model = models.get_model(arch, weights=None, num_classes=len(classes))
        nn.init.zeros_(model.fc.weight)
        nn.init.zeros_(model.fc.bias)
        built.append(model)
        if not state:
            continue
        old = len(state.get("fc.bias", ()))
        keep = old == len(classes) and content.get("classes") in (None, classes)
        said = "head kept" if keep else f"head of {old} classes dropped for a new one"
        backbone = {key: value for key, value in state.items() if not key.startswith("fc.")}
        try:
            model.load_state_dict(state if keep else backbone | model.fc.state_dict(prefix="fc."))
        except RuntimeError as error:
            reason = " ".join(str(error).split("\n\t")[1].split())[:200]
            raise DataError(
                f"--weights: not of a {arch}: {reason} ...; pass their --arch"
            ) from None
        if not all(value.isfinite().all() for value in model.state_dict().values()):
            raise DataError("--weights: of a training that failed: not finite; take others")
    return (built[0], said) if len(built) == 1 else (Vote(built), f"{len(built)} networks, {said}")


@torch.no_grad()
def rescale(model: Any) -> None:
    """Give weights the scale that the learning rates are for; what `model` computes stays.

    AdamW moves a weight by the rate whatever its size, and files differ a hundredfold in that.
    BatchNorm undoes the scale of a convolution: each gets a root mean square of `CONV_SCALE` /
    sqrt(fan-in). The scale of the features is undone by the head: the BatchNorms that add up to
    them get a root mean square of `FEATURE_SCALE`.
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
    layers: list[Any] = [each for each in model.modules() if isinstance(each, kinds)]
    for conv, norm in zip(layers[::2], layers[1::2], strict=True):
        factor = CONV_SCALE / conv.weight.square().sum((1, 2, 3)).mean().sqrt().clamp(min=1e-12)
        conv.weight *= factor
        norm.running_mean *= factor
        norm.running_var.add_(norm.eps).mul_(factor**2).sub_(norm.eps)


# -------------------------------------------------------------------------------------------- data


# What folders of a whole data set are named for, in the order of their use.
PARTS = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "test": 2, "testing": 2}


class Row(NamedTuple):
    """An image of the folders that are named on the command line."""

    path: str
    name: str  # its path below DATA, SRC or `--val`: class/file
    label: int
    part: str  # "train", "val", or "source": validated on as well
    fold: int = EVERY  # that is judged by it and does not learn it; or `TEST`


class Data(NamedTuple):
    """N images of C classes, and which network of how many folds learns and is judged by which."""

    classes: list[str]
    paths: list[str]
    names: list[str]
    labels: Tensor  # (N,) int64
    parts: list[str]  # as in `Row`
    held: Tensor  # (N,) int64, the fold as in `Row`
    folds: int
    white: dict[str, float]  # what is white in images of more than 8 bits, by kind
    related: int  # images left out as copies, or of the families, of those that are learnt
    unreadable: list[str]  # paths left out
    sizes: Sequence[int] = ()  # bytes of each file, to find out later that one has changed

    def learns(self, fold: int) -> Tensor:
        """The images that the network of a fold learns: indices, int64."""
        return ((self.held != fold) & (self.held != TEST)).nonzero().flatten()

    def judges(self, fold: int) -> Tensor:
        """The images that a fold is judged by, those of part "source" last; of `TEST`, the rest."""
        held = (self.held == fold).nonzero().flatten()
        return torch.tensor(sorted(held.tolist(), key=lambda at: self.parts[at] == "source")).long()

    def judged(self) -> Tensor:
        """The images that the folds are judged by, one fold after the other: (M,) int64."""
        return torch.cat([self.judges(fold) for fold in range(self.folds)])

    def counts(self, part: Tensor) -> Tensor:
        """Images of each class among the indices `part`: (C,) int64."""
        return torch.bincount(self.labels[part], minlength=len(self.classes))

    def train_counts(self) -> Tensor:
        """Images of each class that at least one network learns: (C,) int64."""
        learnt = self.held != TEST if self.folds > 1 else self.held == EVERY
        return self.counts(learnt.nonzero().flatten())

    def log_share(self) -> Tensor:
        """The logarithm of each class's share of the training images, less their mean: (C,)."""
        logs = self.train_counts().log()
        return logs - logs.mean()  # a constant changes nothing, but costs half precision digits


def list_rows(settings: Namespace) -> tuple[list[str], list[Row]]:
    """The classes, and the images of DATA and of `--val` or `--source`, each in its part."""
    classes, rows = list_images(settings.data)
    if settings.val or settings.source:
        rows += list_others(settings, classes, rows)
    if settings.split:
        rows = take_split(settings, rows)
    if sum(row.part == "train" for row in rows) > 2**24:
        raise DataError(
            f"{settings.data}: over 2^24 training images; torch.multinomial draws no more"
        )
    return classes, rows


def load_data(settings: Namespace, classes: list[str], rows: list[Row]) -> Data:
    """The images of a new run, of those that were listed.

    What cannot be decoded is named and left out, and so is what would judge a network that learns
    a copy of it, or an image of its family.
    """
    digests, white = check_images([row.path for row in rows])
    unreadable = [row.path for row in rows if row.path not in digests]
    rows = [row for row in rows if row.path in digests]
    families = find_families(settings, rows, digests)
    rows = hold_images(settings, rows, families)
    learns = [row.fold != TEST if settings.folds > 1 else row.fold == EVERY for row in rows]
    learnt = set(compress(families, learns))
    kept = [own or family not in learnt for own, family in zip(learns, families, strict=True)]
    if related := [row.path for row, keep in zip(rows, kept, strict=True) if not keep]:
        text = f"{len(related)} images are copies of training images, or of their families"
        print(f"warning: {text}: left out, {printable(related[0])} for one", file=sys.stderr)
    found = {"white": white, "related": len(related), "unreadable": unreadable}
    return make_data(settings, classes, [*compress(rows, kept)], **found)


def make_data(settings: Namespace, classes: list[str], rows: list[Row], **found: Any) -> Data:
    """The images of a run; `DataError` if a class has none to train on, or none is validated on."""
    data = Data(
        classes,
        paths=[row.path for row in rows],
        names=[row.name for row in rows],
        labels=torch.tensor([row.label for row in rows]).long(),
        parts=[row.part for row in rows],
        held=torch.tensor([row.fold for row in rows]).long(),
        folds=settings.folds,
        sizes=[os.path.getsize(row.path) for row in rows],
        **found,
    )
    for fold in range(settings.folds):
        if bare := (data.counts(data.learns(fold)) == 0).nonzero().flatten().tolist():
            text = "no image of this class to train on that can be read; add one or remove the"
            text = f"{classes[bare[0]]}: {text} class; such classes: {len(bare)}"
            raise DataError(f"{settings.split or settings.data}: {text}")
        if not len(data.judges(fold)):
            text = "no image differs from those trained on; nothing to validate on"
            if settings.split and set(data.parts) == {"train"} and not data.related:
                text = "names no image to validate on, as part val or source"
            raise DataError(f"{settings.val or settings.split or settings.data}: {text}")
    return data


def take_split(settings: Namespace, rows: list[Row]) -> list[Row]:
    """Those of `rows` that the table `--split` names, each in its part; the others are counted."""
    added, parts, wrong = {row.name: row.part == "source" for row in rows}, {}, []
    for line in read_table(settings.split, "path", "part"):
        name, part = line["path"], line["part"]
        if part not in ("train", "val", "source"):
            wrong.append(f"{name}: no part {part!r}; write train, val or source")
        elif added.get(name) is not (part == "source"):
            where = "among what --source SRC adds to DATA" if part == "source" else "in DATA"
            wrong.append(f"{name}: not {where}; write class/file as there")
        elif name in parts:
            wrong.append(f"{name}: named before; leave one row of it")
        parts[name] = part
    if wrong:
        raise DataError(f"{settings.split}: {wrong[0]}; such rows: {len(wrong)}")
    if left_out := len(rows) - len(parts):
        text = f"{settings.split}: {left_out} images are not named there; left out"
        print(f"warning: {printable(text)}", file=sys.stderr)
    return [row._replace(part=parts[row.name]) for row in rows if row.name in parts]


def list_images(root: Path) -> tuple[list[str], list[Row]]:
    """The classes of `root`, and its images, for the time being all to train on."""
    try:
        classes, labels = find_classes(root)
        rows = make_rows(root, labels, "train")
    except FileNotFoundError as error:
        raise DataError(f"{root}: {error}; add images or remove the class") from None
    if len(classes) < 2:
        raise DataError(f"{root}: fewer than two classes; pass the folder that holds the classes")
    if hidden := [name for name in classes if name.startswith(".")]:
        raise DataError(f"{root / hidden[0]}: hidden, but would count as a class; remove it")
    refuse_parts(root, rows)
    walk = os.walk(root, followlinks=True)
    names = [name for at, _, names in walk for name in names if at != str(root) and name[0] != "."]
    if others := [name for name in names if not name.lower().endswith(IMG_EXTENSIONS)]:
        kinds = ", ".join(sorted({Path(name).suffix or name for name in others})[:9])
        text = f"{root}: {len(others)} files left out, whose names end in {kinds}"
        print(f"warning: {printable(text)}", file=sys.stderr)
    return classes, rows


def list_others(settings: Namespace, classes: list[str], ours: list[Row]) -> list[Row]:
    """The images of `--val`, or those of `--source` with other names than `ours`; no hidden one."""
    folder, part = (settings.val, "val") if settings.val else (settings.source, "source")
    folders = {entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."}
    if strange := ", ".join(sorted(folders.difference(classes))):
        text = f"not classes of {settings.data}: {strange}; rename or remove"
        raise DataError(f"--{part} {folder}: {text}")
    rows = make_rows(folder, {name: label for label, name in enumerate(classes)}, part)
    if settings.val and not rows:
        raise DataError(f"--val {folder}: no image in folders named as those of {settings.data}")
    known = {row.name for row in ours if settings.source}
    return [row for row in rows if row.name not in known and "/." not in row.name]


def make_rows(folder: Path, labels: dict[str, int], part: str) -> list[Row]:
    """The images in folders named as the classes, their names with `/` on every system."""
    rows = []
    for path, label in make_dataset(folder, labels, IMG_EXTENSIONS, allow_empty=part != "train"):
        name = path.removeprefix(str(folder)).replace(os.sep, "/").lstrip("/")
        rows.append(Row(path, name, label, part))
    return rows


def refuse_parts(root: Path, rows: list[Row]) -> None:
    """Raise `DataError` where folders are parts of a data set, as `data_creation.py` tells them.

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
    elif flat or not all({"fold", "split", "part"}.intersection(each) for each in words.values()):
        return
    train, *others = [root / name for name in nested]
    command = f"data_training.py {train}" + (f" --val {others[0]}" if others else "")
    names = " and ".join([train.name, others[0].name] if others else sorted(places))
    text = f"{names} look like parts of a data set, not classes (else move their images up to them)"
    raise DataError(f"{root}: {text}; run {command}")


def find_families(settings: Namespace, rows: list[Row], digests: Mapping[str, str]) -> list[str]:
    """A key for each row, the same for those of one family: copies, and what `--group` binds."""
    above: dict[str, str] = {}  # a forest, of which each tree is a family

    def root(key: str) -> str:
        while above.setdefault(key, key) != key:
            above[key] = key = above[above[key]]
        return key

    strange = 0
    for row in rows:
        match = re.search(settings.group, row.name.partition("/")[2]) if settings.group else None
        name = match and match[min(1, match.re.groups)]
        strange += name is None
        above[root(digests[row.path])] = root(row.path if name is None else f"--group {name}")
    keys = [root(digests[row.path]) for row in rows]
    if settings.group and strange == len(rows):
        raise DataError(f"--group {settings.group}: matches no image, by its path below its class")
    if settings.group and len(set(keys)) == 1:
        raise DataError(f"--group {settings.group}: makes all images one family; name what differs")
    if settings.group:
        text = f"--group: {len(set(keys))} families of {len(rows)} images"
        text += f"; {strange} do not match and are one each" if strange else ""
        print(text, file=sys.stderr)
    elif settings.folds > 1 or not (settings.val or settings.split):
        suggest_group(rows)
    return keys


def suggest_group(rows: list[Row]) -> None:
    """Print how to keep families together, where most classes have names that look like some."""
    stems: dict[int, Counter[str]] = defaultdict(Counter)
    for row in rows:
        stems[row.label][re.sub(r"[\W_]*\d+$", "", Path(row.name).stem)] += 1
    alike = sum(5 <= len(each) <= each.total() / 2 for each in stems.values())
    if alike > len(stems) / 2:
        text = "note: file names differ in a last number alone; if those are images of one patient,"
        text += " film or object, keep them together: --group "
        print(text + shlex.quote(r"^(.+?)[\W_]*\d+\.\w+$"), file=sys.stderr)


def hold_images(settings: Namespace, rows: list[Row], families: list[str]) -> list[Row]:
    """The rows, each in the fold that is judged by it; families stay together."""
    if settings.folds == 1 and (settings.val or settings.split):
        return [row._replace(fold=EVERY if row.part == "train" else 0) for row in rows]
    shares = [1 - settings.val_fraction, settings.val_fraction]
    if settings.folds > 1:
        check_folds(settings, rows, families)
        shares = [1 / settings.folds] * settings.folds
    ours = [at for at, row in enumerate(rows) if row.part == "train"]
    labels, keys = [rows[at].label for at in ours], [families[at] for at in ours]
    keyed = [f"{settings.seed}/{rows[at].name}".encode(errors="surrogateescape") for at in ours]
    order = [hashlib.sha256(key).digest() for key in keyed]
    held = [row._replace(fold=TEST if settings.folds > 1 else 0) for row in rows]
    for at, part in zip(ours, deal(labels, keys, order, shares), strict=True):
        split_off = settings.folds == 1 and part == 1
        fold = part if settings.folds > 1 else EVERY + part
        held[at] = rows[at]._replace(fold=fold, part="val" if split_off else "train")
    return held


def check_folds(settings: Namespace, rows: list[Row], families: list[str]) -> None:
    """Raise `DataError` where images cannot be cut into `--folds` parts."""
    if settings.split and any(row.part == "val" for row in rows):
        text = "names validation images, which folds choose themselves; name them train"
        raise DataError(f"--folds {settings.folds}: {settings.split} {text}")
    images = zip(rows, families, strict=True)
    pairs = {(row.name.split("/")[0], family) for row, family in images if row.part == "train"}
    counts = Counter(name for name, _ in pairs).items()  # `make_data` tells of classes of none
    most, name = min(((count, name) for name, count in counts), default=(settings.folds, ""))
    if most < settings.folds:
        text = f"the largest that fits is {most}" if most >= 3 else "add images, or drop it"
        kind = "families" if settings.group else "different images"
        raise DataError(f"--folds {settings.folds}: class {name} has {most} {kind}; {text}")


def deal(
    labels: Sequence[int], families: Sequence[str], order: Sequence[bytes], shares: Sequence[float]
) -> list[int]:
    """The part that each image goes to, of which each gets its share of each class, about.

    Families, largest first and otherwise in `order`, go where that brings the counts closest to
    what is wanted, as a sum over classes of squared differences / wanted. No part stays without a
    class that has enough families; of two parts the first, to train on, goes before.
    """
    counts, members = Counter(labels), defaultdict(list)
    for at, family in enumerate(families):
        members[family].append(at)
    wanted = [{label: share * count for label, count in counts.items()} for share in shares]
    if len(shares) == 2:
        for label, count in counts.items():
            wanted[1][label] = min(max(1, round(shares[1] * count)), count - 1)
            wanted[0][label] = count - wanted[1][label]
    groups = sorted(members.values(), key=lambda each: (-len(each), min(order[at] for at in each)))
    insides = [Counter(labels[at] for at in group) for group in groups]
    left = Counter(label for inside in insides for label in inside)
    bare = {label: [part for part, each in enumerate(wanted) if each[label]] for label in counts}
    missing, parts = [dict(each) for each in wanted], [0] * len(labels)

    def gain(part: int, inside: Counter[int]) -> tuple[bool, float, int]:
        needed = any(left[c] <= len(bare[c]) and part in bare[c][: left[c]] for c in inside)
        closer = sum(
            n * (2 * missing[part][c] - n) / wanted[part][c] if wanted[part][c] else -math.inf
            for c, n in inside.items()
        )
        return needed, closer, (min(inside) - part) % len(shares) if len(shares) > 2 else -part

    for group, inside in zip(groups, insides, strict=True):
        best = max(range(len(shares)), key=lambda part: gain(part, inside))
        for label in inside:
            left[label] -= 1
            bare[label] = [part for part in bare[label] if part != best]
        for at in group:
            parts[at] = best
            missing[best][labels[at]] -= 1
    return parts


# ----------------------------------------------------------------------------------------- reading


# Crops of half to all of an image enlarge what they show, by a fifth on average; evaluation makes
# up for most of it by images up to so much larger (Touvron et al. 2019, arXiv:1906.06423).
EVAL_SCALE = 8 / 7
STRIDE = 32  # pixels a cell of a ResNet's last feature map
COPIES = "data_training-"  # begins the name of a temporary folder; its process's number follows


def check_images(paths: list[str]) -> tuple[dict[str, str], dict[str, float]]:
    """The SHA-256 of each file that can be decoded, and what is white in images of over 8 bits.

    The others are named on stderr; `DataError` for values that are negative or not finite.
    """

    def check(path: str) -> str | tuple[str, str, float]:
        try:
            content = read_bytes(path)
            with Image.open(io.BytesIO(content)) as image:
                image.draft("RGB", (1, 1))  # JPEG: every byte is decoded, to an eighth of the size
                image.load()
                kind, values = deep_pixels(image, content)
        except Exception as error:  # Pillow raises nearly anything on a broken file
            known = {UnidentifiedImageError: "not an image", DataError: "no regular file"}
            return known.get(type(error)) or str(error) or type(error).__name__
        peak = float(values.max(initial=0))
        if not 0 <= values.min(initial=0) <= peak < math.inf:
            text = "values below 0 or not finite; shift them, or remove the image"
            raise DataError(f"{printable(path)}: {text}")
        return hashlib.sha256(content).hexdigest(), kind, peak

    digests, peaks = {}, dict[str, float]()
    with ThreadPool() as pool:  # Pillow and hashlib let other threads run meanwhile
        checked = pool.imap(check, paths, chunksize=16)
        bar = tqdm(checked, "checking", len(paths), unit=" images", leave=False, disable=None)
        for path, found in zip(paths, bar, strict=True):
            if isinstance(found, str):
                tqdm.write(f"warning: {printable(f'{path}: {found}')}; left out", sys.stderr)
                continue
            digests[path], kind, peak = found
            peaks[kind] = max(peak, peaks.get(kind, 0.0))
    return digests, {kind: pick_white(kind, peak) for kind, peak in peaks.items() if kind}


def read_bytes(path: str) -> bytes:
    """The content of a regular file; to open a pipe would wait for ever."""
    if not os.path.isfile(path):
        raise DataError(f"{printable(path)}: no regular file; remove it")
    return Path(path).read_bytes()


def deep_pixels(picture: Image.Image, content: bytes) -> tuple[str, np.ndarray[Any, Any]]:
    """The kind and the values of an image of more than 8 bits a channel; "" and none of others.

    "I" are whole numbers, "F" fractions; (height, width) or (height, width, 3).
    """
    if picture.mode.startswith(("I", "F")):
        return picture.mode[0], np.asarray(picture)
    # Of colours of 16 bits Pillow keeps the upper half, which is black where 12 bits are used.
    if picture.format == "TIFF" and max(getattr(picture, "tag_v2", {}).get(258, (8,))) > 8:
        raise ValueError("a TIFF with colours of over 8 bits; save it as PNG")
    if picture.format == "PNG" and picture.mode in ("RGB", "RGBA", "LA") and content[24] == 16:
        encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return "I", decode_image(encoded, ImageReadMode.RGB).permute(1, 2, 0).numpy()
    return "", np.empty(0)


def pick_white(kind: str, peak: float) -> float:
    """The value that is white where no pixel exceeds `peak`: a usual one, or that itself."""
    usual = (255, 1023, 4095, 16383, 65535) if kind == "I" else (1, 255, 4095, 65535)
    return next((white for white in usual if peak <= white), peak)


def read_image(path: str, white: Mapping[str, float], least: int = 0) -> Tensor:
    """The image upright and in RGB, what is transparent over white: (3, height, width) uint8.

    With `least` a large JPEG is decoded to a half, quarter or eighth, its sides no shorter.
    """
    content = read_bytes(path)
    try:
        # Reads the header alone, and raises if it claims too many pixels.
        picture: Image.Image = Image.open(io.BytesIO(content))
        size = picture.size
        if least:
            picture.draft(None, (least, least))
        kind, values = deep_pixels(picture, content)
        plain = picture.size == size and not picture.has_transparency_data
        if kind:
            if not 0 <= values.min() <= values.max() < math.inf:
                raise ValueError("below 0 or not finite")
            top = white.get(kind) or pick_white(kind, float(values.max()))
            values = (values.clip(0, top) * (255 / top) + 0.5).astype(np.uint8)
            alpha = picture.getchannel("A") if "A" in picture.getbands() else None
            exif, picture = picture.getexif(), Image.fromarray(values)
            picture.getexif().update(exif)
            if alpha:
                picture.putalpha(alpha)
        elif plain and picture.format in ("JPEG", "PNG"):
            with contextlib.suppress(RuntimeError):  # some rare files only Pillow reads
                encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                return decode_image(encoded, ImageReadMode.RGB, apply_exif_orientation=True)
        picture = ImageOps.exif_transpose(picture)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return v2.functional.pil_to_tensor(picture.convert("RGB"))
    except Exception as error:  # Pillow raises nearly anything on a broken file
        known = str(error) if isinstance(error, ValueError) else type(error).__name__
        reason = f"cannot be decoded ({known}); remove it"
        raise DataError(f"{printable(path)}: {reason}") from None


def shrink(image: Tensor, least: int) -> Tensor:
    """An image of over twice the pixels with its shorter side brought to `least`; others as given.

    Training, evaluation and `--predict` all see it so. The colours of a pixel stay side by side in
    memory, as decoders leave them: crops are taken faster from that.
    """
    if min(image.shape[1:]) ** 2 <= 2 * least**2:
        return image
    return v2.functional.resize(image, [least]).permute(1, 2, 0).contiguous().permute(2, 0, 1)


class Copies(NamedTuple):
    """Shrunk images in a temporary folder, a file each; all workers and processes share them.

    A copy changes no pixel. Where none can be kept, the original is read and shrunk again.
    """

    folder: str
    reserve: int  # bytes of the disk that stay free

    def load(self, index: int) -> Tensor | None:
        """The copy of an image, if there is one: (3, height, width) uint8."""
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

    def describe(self) -> str:
        """A line that says how many copies there are; "" if none."""
        sizes = [file.stat().st_size for file in Path(self.folder).glob("[0-9]*.npy")]
        text = f"copies of {len(sizes):,} images, {sum(sizes) / 1e9:.1f} GB, in {self.folder}"
        return text if sizes else ""


def make_copies() -> Copies:
    """An empty folder for copies, at most a quarter of the free disk; those of killed runs go."""
    try:
        if os.name == "posix":  # on Windows `os.kill` would end the process that it asks for
            remove_leftovers(Path(tempfile.gettempdir()))
        folder = tempfile.mkdtemp(prefix=f"{COPIES}{os.getpid()}-")
        return Copies(folder, shutil.disk_usage(folder).free * 3 // 4)
    except OSError:  # nothing can be written
        return Copies("nowhere", 0)


def remove_leftovers(root: Path) -> None:
    """Remove the copies of processes that have ended."""
    for folder in root.glob(f"{COPIES}[0-9]*-*"):
        with contextlib.suppress(PermissionError, ValueError, OverflowError):  # of no run, or alive
            try:
                os.kill(int(folder.name.removeprefix(COPIES).partition("-")[0]), 0)
            except ProcessLookupError:
                shutil.rmtree(folder, ignore_errors=True)


def remove_copies(folder: str) -> None:
    """Remove the folder; it is renamed first, so that workers cannot add to it meanwhile."""
    with contextlib.suppress(OSError):
        os.rename(folder, f"{folder}-")
    shutil.rmtree(f"{folder}-", ignore_errors=True)


@dataclass(frozen=True)
class Images(Dataset[tuple[Tensor, int]]):
    """Images by (index, seed): the same pair gives the same pixels in any process."""

    data: Data
    training: nn.Module  # draws its augmentation from torch's default generator
    evaluation: nn.Module
    least: int  # pixels a side that they need
    copies: Copies

    def __getitem__(self, item: Sequence[int]) -> tuple[Tensor, int]:
        """The image as (size, size, 3) uint8, and its label."""
        index, seed = map(int, item)
        transform = self.evaluation if seed == EVALUATED else self.training
        image = self.read(index)
        torch.default_generator.manual_seed(seed)
        return transform(image).permute(1, 2, 0), int(self.data.labels[index])

    def read(self, index: int) -> Tensor:
        """The image, shrunk, from its copy if there is one: (3, height, width) uint8."""
        copied = self.copies.load(index)
        if copied is not None:
            return copied
        image = read_image(self.data.paths[index], self.data.white, 2 * self.least)
        shrunk = shrink(image, self.least)
        if shrunk is not image:
            self.copies.keep(index, shrunk)
        return shrunk


def leave_interrupts(_: int) -> None:
    """Leave Ctrl-C, which a terminal sends to every process, to the first one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Reader:
    """Reads images, by workers that live as long as it does.

    One loader does for the whole run: a spawned worker takes four seconds to its first batch.
    """

    def __init__(self, given: Given):
        """A reader of the images of a run."""
        settings, data = given.settings, given.data
        self.compute = given.compute
        self.waited = 0.0  # seconds for batches so far
        self.copies, self.described = first_makes(make_copies, given.compute), ""
        if self.compute.rank == 0:  # removed with the reader, or at the end of the program
            weakref.finalize(self, remove_copies, self.copies.folder)
        self.batches: list[Any] = []  # of a pass; the loader walks through them anew in each
        training, evaluation = transforms(settings)
        self.loader = DataLoader(
            Images(data, training, evaluation, least_side(settings), self.copies),
            batch_sampler=self.batches,
            num_workers=settings.workers,
            persistent_workers=settings.workers > 0,
            worker_init_fn=leave_interrupts,
            pin_memory=settings.device == "cuda",
        )

    def read(self, batches: Sequence[Tensor], title: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, S, S, 3) uint8 and labels (B,) of `batches`, behind a progress bar."""
        if not self.described and self.compute.rank == 0:
            self.described = self.copies.describe()
            if self.described:
                print(self.described, file=sys.stderr)
        self.batches[:] = [batch.numpy() for batch in batches]
        loaded = iter(self.loader)
        for _ in show_progress(batches, title, self.compute):
            asked = time.perf_counter()
            batch = next(loaded)
            self.waited += time.perf_counter() - asked
            yield batch


class Features(NamedTuple):
    """What the backbone makes of every image, in a reader's place."""

    table: Tensor  # (N, D) float16
    labels: Tensor
    compute: Compute

    def read(self, batches: Sequence[Tensor], title: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (B, D) float32 and labels (B,) of `batches`, behind a progress bar."""
        for batch in show_progress(batches, title, self.compute):
            yield self.table[batch[:, 0]].float(), self.labels[batch[:, 0]]


Inputs = Reader | Features


def show_progress(batches: Sequence[Tensor], title: str, compute: Compute) -> Iterable[Tensor]:
    """`batches` behind a progress bar, where stderr is a terminal: that of process 0 alone."""
    hidden = compute.rank > 0 or None  # None: unless it is a terminal
    return tqdm(batches, title, unit=" batches", leave=False, disable=hidden)


class RandomQuarterTurn(nn.Module):
    """Turns an image by 0, 90, 180 or 270 degrees."""

    def forward(self, image: Tensor) -> Tensor:
        """One of the four, at random."""
        return image.rot90(int(torch.randint(4, ())), (-2, -1))


def transforms(settings: Namespace) -> tuple[nn.Module, nn.Module]:
    """For training a random crop, at random mirrored; for evaluation the central square, larger."""
    size, larger = settings.image_size, eval_size(settings.image_size)
    crop = v2.RandomResizedCrop(size, (settings.crop_scale, 1.0))
    flips = [v2.RandomHorizontalFlip(0.0 if settings.flip == "none" else 0.5)]
    turns = [RandomQuarterTurn()] if settings.flip == "all" else []
    return v2.Compose([crop, *flips, *turns]), central_square(larger)


def central_square(size: int) -> nn.Module:
    """The view of evaluation."""
    return v2.Compose([v2.Resize(size), v2.CenterCrop(size)])


def least_side(settings: Namespace) -> int:
    """The pixels a side of an image whose smallest crop is not enlarged; evaluation takes fewer.

    A crop shows `--crop-scale` of the area at least, in proportions up to 3 : 4.
    """
    return math.ceil(settings.image_size * math.sqrt(4 / 3 / settings.crop_scale))


def eval_size(size: int) -> int:
    """The side of the images that are evaluated, for training crops of `size`: 256 for 224.

    A last feature map with a part of a cell more, 3 x 3 for 2 x 2, can ruin a small network.
    """
    return max(size, int(EVAL_SCALE * size) // STRIDE * STRIDE)


# ---------------------------------------------------------------------------------------- measures


MANY, FEW = 100, 20  # "many": more training images than that, "few": fewer
BINS = 15  # of probability, to measure calibration by
ONE_TELLS = 0.3  # in place of n - 1 for a class of one image, among many


def confusion_matrix(targets: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """How often each class was taken for each: (C, C) int64, rows true, columns predicted."""
    pairs = torch.bincount(targets * classes + predicted, minlength=classes**2)
    return pairs.reshape(classes, classes)


def recall_by_class(confusion: Tensor) -> Tensor:
    """The part of each class that was recognised: (C,) float64, NaN for a class without images."""
    return confusion.diag().double() / confusion.sum(1)


def f1_by_class(confusion: Tensor) -> Tensor:
    """The F1 of each class, 0 if never right: (C,) float64, NaN for a class without images."""
    right, val_counts = confusion.diag().double(), confusion.sum(1)
    return torch.where(val_counts > 0, 2 * right / (val_counts + confusion.sum(0)), math.nan)


def measure_weights(val_counts: Tensor, train_counts: Tensor) -> Tensor:
    """What each class's recall counts in each of `MEASURES`: (5, C) float64, NaN if nothing."""
    many, few, known = train_counts > MANY, train_counts < FEW, val_counts > 0
    rows = [val_counts, known, known & many, known & ~many & ~few, known & few]
    weights = torch.stack(rows).double()
    return weights / weights.sum(1, keepdim=True)


def wilson_interval(right: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Ends of the 95 % interval for the part that is right of `counts` images (Wilson 1927).

    With n - 1 in place of n, as the variance of a sample has it; of one image all is possible, and
    so of none.
    """
    part, n = (right.double() / counts).nan_to_num(), (counts - 1).clamp(min=0)
    centre, half = 2 * n * part + Z**2, Z * (Z**2 + 4 * n * part * (1 - part)).sqrt()
    low, high = (end / (2 * (n + Z**2)) for end in (centre - half, centre + half))
    return low.clamp(min=0), high.clamp(max=1)  # what rounding leaves would be shown as -0 %


def mean_interval(recall: Tensor, counts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means of C recalls by `weights` (K, C) and the ends of their 95 % intervals: (K,) each.

    Score intervals (Martin Andres et al. 2011, Statistical Methods in Medical Research 20), which
    for one class are Wilson's, with n - 1 in place of n. To add each class's own limits as squares
    covers 86 % with 120 classes: most of those limits are lopsided, their mean is not.
    """
    recall, n = recall.nan_to_num(), (counts - 1).clamp(min=ONE_TELLS)
    below, above = (lowest_mean(part, n, weights) for part in (recall, 1 - recall))
    mean = (weights * recall).sum(1)
    return mean, mean - below, mean + above


def lowest_mean(recall: Tensor, n: Tensor, weights: Tensor) -> Tensor:
    """How far below the mean that was seen the true one may be: (K,) float64.

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


def measure(confusion: Tensor, train_counts: Tensor) -> dict[str, float]:
    """The measures of a confusion matrix, the 95 % interval of balanced accuracy, macro F1."""
    weights = measure_weights(confusion.sum(1), train_counts)
    values, low, high = mean_interval(recall_by_class(confusion), confusion.sum(1), weights)
    f1 = f1_by_class(confusion).nanmean().item()
    measures = dict(zip(MEASURES, values.tolist(), strict=True))
    return measures | {"low": low[1].item(), "high": high[1].item(), "macro_f1": f1}


def measure_all(last: Evaluation, train_counts: Tensor) -> dict[str, float]:
    """What the history holds of an evaluation: its measures, those as trained, its calibration."""
    trained = confusion_matrix(last.targets, last.as_trained, len(train_counts))
    before = measure(trained, train_counts)
    error, floor = calibration_error(last.targets, last.predicted, last.probability)
    return {
        "val_loss": last.loss,
        **measure(last.confusion, train_counts),
        **{f"as_trained_{name}": before[name] for name in MEASURES},
        "natural_accuracy": natural_accuracy(last, train_counts),
        "calibration_error": error,
        "calibration_floor": floor,
        "as_trained_calibration_error": calibration_error(
            last.targets, last.as_trained, last.trained_probability
        )[0],
        "logit_scale": last.calibration.scale,
        "logit_shift": last.calibration.shift,
    }


def natural_accuracy(last: Evaluation, train_counts: Tensor) -> float:
    """The accuracy where classes are as frequent as in training, by `natural` predictions.

    Recalls weighted by class frequency: the validation images may have another skew.
    """
    recall = recall_by_class(confusion_matrix(last.targets, last.natural, len(train_counts)))
    weights = train_counts * ~recall.isnan()
    return (recall.nan_to_num() @ weights.double() / weights.sum()).item()


def calibration_error(
    targets: Tensor, predicted: Tensor, probability: Tensor
) -> tuple[float, float]:
    """The gap between probability and being right in `BINS` bins, each class counting the same.

    The expected calibration error of Guo et al. 2017 (arXiv:1706.04599), and its floor: what it
    would be, on average, were every probability exactly right. The sum of w * (p - right) in a bin
    is then about normal with the variance sum of w^2 * p * (1 - p).
    """
    weights, p = class_weights(targets), probability.double()
    bins = (p * BINS).long().clamp(max=BINS - 1)
    gaps = torch.bincount(bins, weights * (p - (predicted == targets).double()), BINS)
    variance = torch.bincount(bins, weights**2 * p * (1 - p), BINS)
    return gaps.abs().sum().item(), (variance * 2 / math.pi).sqrt().sum().item()


def compare(targets: Tensor, before: Tensor, after: Tensor, train_counts: Tensor) -> Rows:
    """What changed between two runs on the same images, by what they predicted: (M,) int64 each.

    A row for each of `MEASURES`: fractions before and after, their difference and the ends of its
    interval. Within a class an image is lost, as it was or won: -1, 0 or 1. To both the lost and
    the won a quarter is added for the interval (Agresti and Min 2005, Statistics in Medicine 24),
    since of few images none may differ.
    """
    classes = len(train_counts)
    old, new = (confusion_matrix(targets, each, classes) for each in (before, after))
    weights = measure_weights(new.sum(1), train_counts)
    right = before == targets, after == targets
    lost, won = (
        torch.bincount(targets[one & ~two], minlength=classes).double() + 0.25
        for one, two in (right, right[::-1])
    )
    n = new.sum(1) + 0.5
    variance = ((won + lost) / n - ((won - lost) / n) ** 2) / (n - 1)
    one, two = (weights @ recall_by_class(each).nan_to_num() for each in (old, new))
    half = Z * (weights**2 @ variance).sqrt()
    low, high = (two - one - half).clamp(min=-1), (two - one + half).clamp(max=1)
    columns = {"before": one, "after": two, "difference": two - one, "low": low, "high": high}
    return to_rows({"measure": MEASURES, **columns})


# ---------------------------------------------------------------------------- records and going on


SMALL_BATCH, STEPS = 32, 32  # images of a step where an epoch would have fewer steps


def prepare(settings: Namespace, compute: Compute) -> tuple[Given, Progress]:
    """All that is read and built before the first epoch; fills in what `settings` leave open."""
    if settings.resume:
        return load_run(settings, compute)
    check_settings(settings)
    with claim(settings.output):
        classes, rows = list_rows(settings)  # in no time, before weights may be fetched
        content = load_weights(settings)
        data = load_data(settings, classes, rows)
        settings.batch_size = settings.batch_size or pick_batch_size(data, compute.world_size)
        settings.workers = count_workers(settings)
        baseline = load_baseline(settings.baseline, data) if settings.baseline else None
        check_batches(settings, data, compute.world_size)
        torch.manual_seed(settings.seed)
        model, origin = build_model(settings.arch, data.classes, content)
        if settings.epochs and settings.weights != "none":
            rescale(model)
        if not settings.epochs:
            check_given(settings, content, origin)
            data = data._replace(white=data.white | content.get("white", {}))
        for name in PATHS:  # a run goes on from any folder
            setattr(settings, name, getattr(settings, name) and getattr(settings, name).resolve())
        given = Given(
            settings=settings, data=data, baseline=baseline, origin=origin, compute=compute
        )
        none = torch.zeros(len(data.classes), dtype=torch.int64)
        start = copy_state(model)
        progress = Progress(start, model, history=[], draws=none, head={}, logits=torch.empty(0))
        write_file(settings.output / "split.csv", format_table(list_split(data)))
        if settings.epochs:
            save_tensors(settings.output / START, start)
            save_state(given, progress)
    return given, progress


def check_given(settings: Namespace, content: Mapping[str, Any], origin: str) -> None:
    """Raise `DataError` where a network that is not trained knows no classes, or not these."""
    if "head kept" not in origin:
        text = "have no head for these classes; train one, or name folders as in its training"
        raise DataError(f"--epochs 0: the weights {settings.weights} {text}")
    if "classes" in content and not (settings.val or settings.split):
        text = "the network may have learnt some of the images that judge it; name others by --val"
        print(f"warning: --epochs 0: {text}", file=sys.stderr)


def pick_batch_size(data: Data, processes: int) -> int:
    """The images of a step: few where there are few, so that enough steps are taken."""
    size = BATCH if len(data.learns(0)) >= STEPS * BATCH else SMALL_BATCH
    return math.ceil(size / processes) * processes


def check_batches(settings: Namespace, data: Data, processes: int) -> None:
    """Raise `DataError` where batches cannot be divided, or hold too little for BatchNorm."""
    images = min(len(data.learns(fold)) for fold in range(data.folds))
    judged = min(len(data.judges(fold)) for fold in range(data.folds))
    smallest = images // math.ceil(images / settings.batch_size)
    learns = (settings.frozen_epochs or 0) < settings.epochs
    text = ""
    if settings.batch_size % processes or min(smallest, judged) < processes:
        text = f"cannot be divided among {processes} processes; take a multiple, or fewer processes"
    elif learns and smallest // processes == 1 and settings.image_size <= STRIDE:
        text = (
            f"one image of --image-size {settings.image_size} is no batch for BatchNorm; take more"
        )
    if text:
        raise DataError(f"--batch-size {settings.batch_size}: {text}")


def read_table(path: Path, *columns: str) -> list[dict[str, str]]:
    """The rows of a CSV file; `DataError` if there are none, or not with all of `columns`."""
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
    """What the run in the folder `run` predicted for the validation images: (M,) int64."""
    labels = {name: label for label, name in enumerate(data.classes)}
    try:
        rows = read_table(run / "predictions.csv", "path", "class", "predicted")
        theirs = {(row["path"], row["class"]): labels[row["predicted"]] for row in rows}
    except DataError as error:
        raise DataError(f"--baseline: {error}; name an earlier run") from None
    except KeyError as error:
        raise DataError(f"--baseline {run}: not of these classes: {error}") from None
    ours = [(data.names[at], data.classes[data.labels[at]]) for at in data.judged().tolist()]
    if other := sorted(theirs.keys() ^ ours):
        there = len(theirs.keys() - ours)
        raise DataError(
            f"--baseline {run}: validated on other images: {there} only there and "
            f"{len(other) - there} only here, {other[0][0]} for one; give both runs the same DATA, "
            "--source, --val, --split, --val-fraction and --seed"
        )
    return torch.tensor([theirs[each] for each in ours])


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write or replace the file as a whole: a reader sees the old one or the new one."""
    unfinished = path.with_name(f".{path.name}.partial")  # on the same file system
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        text = f"{error.strerror}; what was written before is whole: make room, then --resume"
        raise DataError(f"{path}: {text}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def save_tensors(path: Path, value: Any) -> None:
    """Write what `torch.load` reads; `torch.save` itself would not say that a disk is full."""
    content = io.BytesIO()
    torch.save(value, content)
    write_file(path, content.getbuffer())


def format_table(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows with the same columns as CSV; fractions with six digits."""
    file = io.StringIO(newline="")
    # With its own line ends the writer quotes a lone carriage return, which "\n" would leave bare.
    writer = csv.DictWriter(file, rows[0].keys())
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{x:.6g}" if isinstance(x, float) else x for k, x in row.items()})
    return file.getvalue().replace("\r\n", "\n").encode(errors="surrogateescape")


def to_rows(columns: Mapping[str, Sequence[Any] | Tensor]) -> Rows:
    """A row for each place of the columns."""
    lists = [x.tolist() if isinstance(x, Tensor) else x for x in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


def list_split(data: Data) -> Rows:
    """A row for each image: its class, and the part it is in."""
    parts = list(data.parts)
    for at, fold in enumerate(data.held.tolist() if data.folds > 1 else []):
        parts[at] = f"fold {fold + 1}" if fold >= 0 else parts[at]
    classes = [data.classes[label] for label in data.labels.tolist()]
    return to_rows({"path": data.names, "class": classes, "part": parts})


def list_predictions(data: Data, last: Evaluation) -> Rows:
    """A row for each image that is judged, the least probable first: their labels may be wrong."""
    rows = to_rows({
        "path": [data.names[at] for at in last.places.tolist()],
        "class": [data.classes[at] for at in last.targets.tolist()],
        "predicted": [data.classes[at] for at in last.predicted.tolist()],
        "probability": last.probability,
        "true_probability": last.true_probability,
    })  # fmt: skip
    return sorted(rows, key=lambda row: row["true_probability"])


def list_classes(data: Data, draws: Tensor, confusion: Tensor) -> Rows:
    """A row for each class; NaN where nothing is known."""
    counts = confusion.sum(1)
    low, high = wilson_interval(confusion.diag(), counts)
    return to_rows({
        "class": data.classes,
        "train_images": data.train_counts(),
        "val_images": counts,
        "draws": draws,
        "recall": recall_by_class(confusion),
        "low": low.where(counts > 0, math.nan),
        "high": high.where(counts > 0, math.nan),
        "precision": recall_by_class(confusion.T),  # NaN for a class never predicted
        "f1": f1_by_class(confusion),
    })  # fmt: skip


def list_changes(given: Given, last: Evaluation) -> Rows:
    """What changed since the run `--baseline`, where there is one of the same images."""
    if given.baseline is None or len(given.baseline) != len(last.targets):
        return []
    return compare(last.targets, given.baseline, last.predicted, given.data.train_counts())


def write_reports(
    given: Given, progress: Progress, last: Evaluation, tested: Evaluation | None
) -> None:
    """Write the tables and the page of a run. What goes wrong is a warning: no epoch is lost."""
    data, output = given.data, given.settings.output
    try:
        write_config(given, last, tested)
        tables = {"history.csv": progress.history, "comparison.csv": list_changes(given, last)}
        for prefix, each in (("", last), ("test_", tested)) if tested else (("", last),):
            tables[f"{prefix}predictions.csv"] = list_predictions(data, each)
            tables[f"{prefix}classes.csv"] = list_classes(data, progress.draws, each.confusion)
        for name, rows in tables.items():
            if rows:
                write_file(output / name, format_table(rows))
        for name, text in make_page(given, progress, last, tested).items():
            write_file(output / name, text.encode(errors="backslashreplace"))
    except Exception as error:  # of a picture that is gone, a disk that is full, a bug in a chart
        text = f"{output}: not all reports could be written: {type(error).__name__}: {error}"
        print(f"warning: {printable(text)}", file=sys.stderr)


def write_network(given: Given, states: list[dict[str, Tensor]], fitted: Calibration) -> None:
    """Write all that it takes to use the network; its heads are calibrated."""
    settings, data = given.settings, given.data
    networks, shift = [], fitted.shift * data.log_share()
    for state in states:
        weight, bias = (state[f"fc.{name}"] * fitted.scale for name in ("weight", "bias"))
        networks.append(state | {"fc.weight": weight, "fc.bias": bias - shift})
    content = {
        "arch": settings.arch,
        "classes": data.classes,
        "train_images": data.train_counts().tolist(),
        "natural": natural_shift(settings, data),
        "weights": settings.weights,
        "train_size": settings.image_size,
        "eval_size": eval_size(settings.image_size),
        "least_side": least_side(settings),  # large images were decoded to no less
        "white": data.white,
        "networks": networks,
    }
    save_tensors(settings.output / NETWORK, content)


def save_state(given: Given, progress: Progress, done: bool = False) -> None:
    """Write what a run needs to go on: all of it, or that it is `done`."""
    settings, fields = given.settings, given.data._asdict()
    state: dict[str, Any] = {
        "settings": vars(settings)
        | {k: str(v) for k, v in vars(settings).items() if v and k in PATHS},
        "data": {name: value for name, value in fields.items() if name != "paths"},
        "baseline": given.baseline,
        "history": progress.history,
        "draws": progress.draws,
    }
    if not done:
        state |= {
            "head": progress.head,
            "logits": progress.logits,
            "model": progress.model.state_dict(),
            "trainer": progress.trainer.state_dict() if progress.trainer else {},
        }
    save_tensors(settings.output / STATE, state)


def read_state(path: Path) -> Any:
    """What `torch.save` wrote; raises `DataError` if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # a damaged file raises nearly anything
        raise DataError(f"--resume: {path}: damaged; start a new run") from None


def load_run(settings: Namespace, compute: Compute) -> tuple[Given, Progress]:
    """The run in the folder `--resume`, where it was stopped."""
    output = settings.resume
    if not (output / STATE).exists():
        raise DataError(f"--resume {output}: no run to go on with; name its folder")
    state = read_state(output / STATE)
    said = {k: v for k, v in vars(settings).items() if k in WITH_RESUME and v is not None}
    stored = state["settings"] | said | {"output": output}
    paths = {k: Path(v) for k, v in stored.items() if k in PATHS and v}
    settings = Namespace(**stored | paths)
    settings.device, settings.workers = compute.device.type, count_workers(settings)
    data = find_again(settings, state["data"])
    given = Given(settings, data, state["baseline"], origin="as it was stopped", compute=compute)
    progress = Progress(
        start=read_state(output / START) if "model" in state else {},
        model=build_model(settings.arch, data.classes, {"networks": [state.get("model", {})]})[0],
        history=state["history"],
        draws=state["draws"],
        head=state.get("head", {}),
        logits=state.get("logits", torch.empty(0)),
        stored=state.get("trainer", {}),
    )
    for fold in range(settings.folds if "model" in state else 0):
        if (fold, settings.epochs) <= progress.at():
            progress.done.append(Fold(**read_state(output / f"fold-{fold + 1}.pt")))
    return given, progress


def find_again(settings: Namespace, stored: dict[str, Any]) -> Data:
    """The images of a run that goes on; raises `DataError` for one that is gone or has changed."""
    folders = {
        "train": settings.data,
        "val": settings.val or settings.data,
        "source": settings.source,
    }
    paths = []
    for part, name, size in zip(stored["parts"], stored["names"], stored["sizes"], strict=True):
        path = folders[part] / name
        if not path.is_file() or path.stat().st_size != size:
            what = "changed" if path.is_file() else "gone"
            raise DataError(f"{path}: {what} since the run began; put it back, or start a new run")
        paths.append(str(path))
    return Data(**stored | {"paths": paths})


def write_config(
    given: Given, last: Evaluation | None = None, tested: Evaluation | None = None
) -> None:
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
    }
    for name, each in (("result", last), ("test", tested)):
        if each:
            measures = measure_all(each, data.train_counts())
            content[name] = {k: None if math.isnan(x) else x for k, x in measures.items()}
    text = json.dumps(content, indent=1, default=str)  # of paths and of the precision
    write_file(settings.output / "config.json", text.encode())


def versions() -> dict[str, str]:
    """What the figures of a run may hang on."""
    libraries = {library.__name__: library.__version__ for library in (torch, torchvision, np, PIL)}
    return {"python": sys.version.split()[0], **libraries}


# ----------------------------------------------------------------------------------------- console


FEW_JUDGED = 10  # validation images of a class; with fewer `--folds` is suggested
KINDS = {"I": "whole numbers", "F": "fractions"}
HEADER = (
    "fold   epoch  phase  train loss  val loss  accuracy  balanced [95 %]       as trained    many "
    " medium     few  images/s   left"
)


def start_run(given: Given, progress: Progress) -> None:
    """Clear the run folder of what a killed run left half-written, and print what comes."""
    data, settings, compute = given.data, given.settings, given.compute
    for unfinished in settings.output.glob(".*.partial"):
        unfinished.unlink()
    if not progress.history:  # else it tells of the last epoch, or the result
        write_config(given)
    counts = data.train_counts()
    print(
        f"{settings.arch}, {printable(settings.weights)}: {given.origin}; {compute.name()}, "
        f"{compute.amp or torch.float32}\n"
        f"{int(counts.sum())} training images in {len(data.classes)} classes of {counts.max()} to "
        f"{counts.min()}, imbalance ratio {counts.max() / counts.min():.1f}; "
        f"{describe_val(given)}; {len(data.unreadable)} unreadable left out"
    )
    for kind, white in data.white.items():
        print(f"images of more than 8 bits ({KINDS[kind]}): a value of {white:g} is white")
    print(
        "", HEADER, *(format_epoch(row, settings) for row in progress.history), sep="\n", flush=True
    )


def describe_val(given: Given) -> str:
    """How many images the network is judged by, and where they are from."""
    settings, data = given.settings, given.data
    if data.folds > 1:
        text = f"{data.folds} networks, each judged by the fold of them it has not seen"
        if tests := len(data.judges(TEST)):
            others = printable(str(settings.val or settings.source))
            text += f", all together by {tests} images of {others}"
    else:
        text = f"{data.parts.count('val')} validation images"
        if where := settings.val or settings.split:
            text += f" of {printable(str(where))}"
        if settings.source:
            more, name = data.parts.count("source"), printable(settings.source.name)
            text += f" and {more} of {name} that were left out"
    if data.related:
        text += f" ({data.related} copies or relatives of training images left out)"
    return text


def format_epoch(row: dict[str, Any], settings: Namespace) -> str:
    """The line of an epoch, as wide as `HEADER`, with the time left if all take as long."""
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
    """A balanced accuracy with its interval."""
    ends = f"{100 * measures['low']:.1f}, {100 * measures['high']:.1f}"
    return f"{measures['balanced_accuracy']:.1%} [{ends}]"


def print_end(
    given: Given, progress: Progress, last: Evaluation, tested: Evaluation | None, distance: float
) -> None:
    """Print, in one screen, the result, what is recognised least, and where the rest is."""
    settings, data, counts = given.settings, given.data, given.data.train_counts()
    result, of = measure_all(last, counts), "validation"
    if data.folds > 1:
        of = f"{data.folds} networks, each on images it has not seen"
    print(f"\nbalanced accuracy {format_range(result)}  ({of})")
    if bare := int((last.val_counts == 0).sum()):
        print(f"warning: {bare} of {len(data.classes)} classes are not in it: no image judges them")
    if settings.epochs and not settings.no_calibration:
        print(f"as trained        {result['as_trained_balanced_accuracy']:.1%}, calibration error "
              f"{result['as_trained_calibration_error']:.1%}; calibrated "
              f"{result['calibration_error']:.1%} (of a perfect network "
              f"{result['calibration_floor']:.1%})")  # fmt: skip
    if data.folds > 1:
        folds = [x["balanced_accuracy"] for x in progress.history if x["epoch"] == settings.epochs]
        print(f"of single folds   {min(folds):.1%} to {max(folds):.1%}")
    if distance < 1:
        text = f"; --frozen-epochs {settings.epochs} is as good and faster" if not distance else ""
        print(f"kept              {distance:.0%} of what training changed after the head{text}")
    if tested:
        print(f"untouched test    {format_range(measure_all(tested, counts))}, by vote")
    print_lowest(data, last)
    for change in show_changes(list_changes(given, last)):
        name, before, now, points, ends, sure = change.values()
        since = f"{before:.1%} in {printable(settings.baseline.name)}, now {now:.1%}"
        print(f"{name:17} {since}: {points} points, {ends}; more than chance? {sure}")
    print_advice(given, last)
    print(f"everything else is in {printable(str(settings.output / 'report.html'))}")


def print_lowest(data: Data, last: Evaluation) -> None:
    """Print the classes that are recognised least, and what they are taken for most often."""
    print("lowest recall:")
    wrong = last.confusion - last.confusion.diag().diag()
    known = [at for at in last.recall.argsort(stable=True).tolist() if last.val_counts[at]]
    for at in known[:3]:
        text = printable(data.classes[at])
        if wrong[at].any():
            text += f"; most often taken for {printable(data.classes[int(wrong[at].argmax())])}"
        print(f"{last.recall[at]:8.1%} of {last.val_counts[at]:4}  {text}")


def print_advice(given: Given, last: Evaluation) -> None:
    """Say so where the recall of the rarest class is known from few images alone."""
    data, settings, rarest = given.data, given.settings, int(given.data.train_counts().argmin())
    judged = int(last.val_counts[rarest])
    if judged >= FEW_JUDGED or settings.folds > 1 or not settings.epochs:
        return
    low, high = wilson_interval(last.confusion.diag(), last.val_counts)
    images = "1 image" if judged == 1 else f"{judged} images"
    text = f"known from {images} alone [{low[rarest]:.0%}, {high[rarest]:.0%}]"
    own = [part != "source" for part in data.parts]
    if sum(data.labels[own] == rarest) >= 5 and not (
        settings.val or settings.split or settings.group
    ):
        text += "; --folds 5 would tell it from all of its images, and takes five times as long"
    print(f"note: the recall of {printable(data.classes[rarest])} is {text}")


def show_changes(changes: Rows) -> Rows:
    """What `list_changes` found, in words; "undecided" where an interval holds 0."""
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


MOST_CLASSES, GROUPS = 30, 10  # that the page shows one by one; groups of more
MISTAKES, THUMBNAIL = 24, 160  # how many are shown, and pixels a side


PLOT = 'class="open" x="41%" width="41%"'  # beside names, before values
NEW, OLD = ("recall", "low", "high"), ("before", "before_low", "before_high")
STYLE = """:root{color-scheme:light dark;background:Canvas;color:CanvasText;font:16px/1.5 system-ui,
sans-serif}body{max-width:1040px;margin:auto;padding:8px 14px 64px;overflow-wrap:anywhere}h1,h2,b,
small{line-height:1.3}h2{margin-top:44px;border-top:1px solid #8884;padding-top:18px}p{
max-width:78ch}small,.soft{opacity:.75;font-size:12.5px}.tiles,.pairs{display:grid;gap:14px;
margin:20px 0;grid-template-columns:repeat(auto-fit,minmax(150px,1fr))}.tiles div{padding:10px 14px;
border-left:4px solid #3987c9;background:#8881}div>b,small{display:block}.tiles b{font-size:30px}
.pairs{gap:28px;grid-template-columns:repeat(auto-fill,minmax(290px,1fr))}figure{display:grid;
margin:0;gap:8px;grid-template-columns:1fr 1fr;break-inside:avoid}img{width:100%}.wide{
overflow-x:auto}table{border-collapse:collapse}td,th{padding:5px 0 5px 20px;text-align:right;
border-bottom:1px solid #8883;white-space:nowrap;font-weight:400}th{vertical-align:bottom}
th:first-child{text-align:left;white-space:normal;position:sticky;left:0;background:Canvas;
overflow-wrap:break-word;max-width:50vw;padding-left:0}.matrix td{padding:1px}span{display:block;
min-width:34px;padding:4px;text-align:center}.matrix tr:first-child td{writing-mode:vertical-rl;
padding:4px}pre{white-space:pre-wrap;padding:12px;background:#8882}body .chart{width:100%;
max-width:800px}.chart{font-size:14px}.open{overflow:visible}.chart *{fill:currentColor}.head{
font-weight:600}.end{text-anchor:end}.middle{text-anchor:middle}line,polyline{stroke:currentColor;
stroke-width:2;stroke-linecap:round;vector-effect:non-scaling-stroke}.chart polyline{fill:none}
.new{color:#3987c9}.old{color:#e08214}.grid{color:#8884;stroke-width:1}.bar{opacity:.4;
stroke-width:8}@media print{*{print-color-adjust:exact}.wide{overflow:visible}
details::details-content{block-size:auto;content-visibility:visible}}"""


def show(value: Any) -> str:
    """A fraction in per cent, NaN as a dash, all else as text that HTML and SVG do not obey."""
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{100 * value:.1f}\u00a0%"
    return html.escape(printable(str(value)))


def svg(body: str, height: int) -> str:
    """A chart for a page or a file: widths in parts of the whole, text readable on a phone."""
    start = f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" width="760" height="{height}">'
    return f"{start}<style>{STYLE}</style>{body}</svg>"


def write(text: str, x: float, y: float, kind: str = "") -> str:
    """Text at a part of the width, in per cent, and a pixel of the height."""
    return f'<text class="{kind}" x="{x:g}%" y="{y:g}">{text}</text>'


def write_title(title: str, *names: str) -> str:
    """The title of a chart, and below it what is orange and what is blue."""
    kinds = zip(("old", "new"), names, strict=False)
    spots = (f'<tspan class="{kind}">●</tspan> {show(name)}' for kind, name in kinds)
    return write(title, 0, 14, "head") + write(" &#160; ".join(spots), 0, 34, "soft")


def mean_recall(rows: Rows, keys: tuple[str, ...]) -> tuple[float, ...]:
    """The mean recall of classes and the ends of its interval; NaN if none is known."""
    known = [row for row in rows if row["val_images"] and keys[0] in row]
    if len(known) < 2:
        return tuple(known[0][key] if known else math.nan for key in keys)
    pairs = [(row[keys[0]], row["val_images"]) for row in known]
    recall, counts = torch.tensor(pairs, dtype=torch.float64).T
    weights = torch.full((1, len(known)), 1 / len(known), dtype=torch.float64)
    return tuple(end.item() for end in mean_interval(recall, counts, weights))


def draw_row(rows: Rows, y: int) -> str:
    """The row of a class, or of several as a group; a recall of 0 has a dot like others."""
    new, old = mean_recall(rows, NEW), mean_recall(rows, OLD)
    half, marks = 0 if math.isnan(old[0]) else 8, ""
    name, images = show(rows[0]["class"]), str(rows[0]["train_images"])
    if len(rows) > 1:
        name, images = f"{len(rows)} classes", f"{images} to {rows[-1]['train_images']}"
        for recall in (row["recall"] for row in rows if row["val_images"]):
            marks += f'<circle class="new bar" cx="{recall:.2%}" cy="{20 + half}" r="3"/>'
    for age, at, (mean, low, high) in (("old", 20 - half, old), ("new", 20 + half, new)):
        if not math.isnan(mean):
            marks += f'<line class="{age} bar" x1="{low:.2%}" x2="{high:.2%}" y1="{at}" y2="{at}"/>'
            marks += f'<circle class="{age}" cx="{mean:.2%}" cy="{at}" r="5.5"/>'
    texts = write(name, 38, 14, "end") + write(f"{images} training", 38, 29, "soft end")
    judged = sum(row["val_images"] for row in rows)
    texts += write(f"{judged} validation images", 38, 43, "soft end")
    texts += write(show(new[0]), 100, 25 + half, "end")
    return f'<svg y="{y}" height="54">{texts}<svg {PLOT}>{marks}</svg></svg>'


def recall_chart(classes: Rows, before_name: str = "") -> str:
    """The recall of each class, or of groups if many, most training images first: SVG."""
    order, title = sorted(classes, key=lambda row: -row["train_images"]), "Recall, 95 % interval"
    cuts, names = len(order), [f"before: {before_name}", "now"] if before_name else []
    if cuts > MOST_CLASSES:
        cuts, title = GROUPS, "Mean recall, 95 % interval (dots: classes)"
    body, height, grid = write_title(title, *names), 62 + 56 * cuts, ""
    for cut in range(cuts):
        first, end = (len(order) * at // cuts for at in (cut, cut + 1))
        body += draw_row(order[first:end], 60 + 56 * cut)
    for x in range(0, 101, 25):
        grid += f'<line class="grid" x1="{x}%" x2="{x}%" y1="58" y2="{height}"/>'
        grid += write(str(x), x, 52, "soft middle")
    return svg(f"{body}<svg {PLOT}>{grid}</svg>", height)


def draw_panel(history: Rows, keys: tuple[str, str], scale: int) -> str:
    """Two columns by epoch, a line for each fold; what is far above most values is cut off."""
    values = sorted(row[key] for row in history for key in keys if math.isfinite(row[key])) or [0]
    top, low = min(values[-1], 2 * values[len(values) * 9 // 10]), math.floor(2 * values[0]) / 2
    height, body = max(1, math.ceil(2 * (top - low))) / 2, ""  # often from 50 to 100 %
    epochs = [row["epoch"] for row in history]
    first, width = min(epochs), max(1, max(epochs) - min(epochs))
    for y in range(0, 101, 20):
        body += f'<line class="grid" x2="100%" y1="{y}%" y2="{y}%"/><text class="soft end" x="-8" '
        body += f'y="{y}%" dy="4">{scale * (low + height * (1 - y / 100)):g}</text>'
    for epoch in range(first, first + width + 1, math.ceil(width / 10)):
        body += write(str(epoch), 100 * (epoch - first) / width, 198, "soft middle")
    body += f'<svg viewBox="{first} {-low - height} {width} {height}" preserveAspectRatio="none">'
    for key, fold in product(keys, {row["fold"] for row in history}):
        rows = [row for row in history if row["fold"] == fold and math.isfinite(row[key])]
        line = [f"{row['epoch']},{-row[key]:.6g}" for row in rows[:1] + rows]  # of one: a dot
        kind = "old" if key == keys[0] else "new"
        body += f'<polyline class="{kind}" points="{" ".join(line)}"/>'
    return f'<svg class="open" x="10%" y="52" width="86%" height="180">{body}</svg></svg>'


def curve_chart(history: Rows) -> str:
    """Loss and balanced accuracy by epoch: SVG."""
    body = write_title("Loss by epoch", "training", "validation")
    body += draw_panel(history, ("train_loss", "val_loss"), 1) + '<svg y="270">'
    body += write_title("Balanced accuracy in % by epoch", "as trained", "calibrated")
    body += draw_panel(history, ("as_trained_balanced_accuracy", "balanced_accuracy"), 100)
    return svg(f"{body}</svg>", 530)


def make_table(rows: Iterable[Iterable[str]]) -> str:
    """Rows of safe text, the first of names, in a box that scrolls where it is too wide."""
    body = ""
    for name, *cells in rows:
        body += f"<tr><th>{name}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    return f'<div class="wide"><table>{body}</table></div>'


def show_rows(rows: Rows) -> str:
    """A table of rows with the same columns."""
    return make_table(map(show, row) for row in (rows[0], *(row.values() for row in rows)))


def show_confusions(data: Data, last: Evaluation) -> str:
    """What is taken for what: a coloured matrix, or of many classes the commonest mistakes."""
    names, confusion = [show(name) for name in data.classes], last.confusion.tolist()
    order = data.train_counts().argsort(descending=True, stable=True).tolist()
    if len(names) > MOST_CLASSES:
        rows = [["confusion", "images"]]
        pairs = ((confusion[a][b], a, b) for a, b in permutations(order, 2))
        for n, a, b in heapq.nlargest(20, pairs):
            if n:
                rows.append([f"{names[a]} taken for {names[b]}", f"{n} of {sum(confusion[a])}"])
        return make_table(rows)
    rows = [["is ↓ taken for →", *(names[label] for label in order)]]
    for a in order:
        rows.append([names[a]])
        for b in order:
            colour, n = "57,135,201" if a == b else "224,130,20", confusion[a][b]
            shade = f"rgba({colour},{0.8 * n / max(1, sum(confusion[a])):.2f})"
            rows[-1].append(f'<span style="background:{shade}">{n or ""}</span>')
    return f'<div class="matrix">{make_table(rows)}</div>'


def show_mistakes(data: Data, last: Evaluation) -> str:
    """The images that are wrong with the most confidence, each beside one of the class it was
    taken for: the training image in the middle of their names."""
    wrong = (last.predicted != last.targets).nonzero().flatten()
    order = last.probability[wrong].argsort(descending=True, stable=True)
    text = ""
    for at in wrong[order][:MISTAKES].tolist():
        true, taken = last.targets[at], last.predicted[at]
        theirs = ((data.labels == taken) & (data.held != TEST)).nonzero().flatten()
        sure = f"taken for ({show(last.probability[at].item())}), as here"
        text += f"<figure>{show_image(data, last.places[at], 'is', true)}"
        text += f"{show_image(data, theirs[len(theirs) // 2], sure, taken)}</figure>"
    return text and (
        "<p>Wrong with the most confidence. Beside each image: a typical training image of the "
        f'class it was taken for.</p><div class="pairs">{text}</div>'
    )


def show_image(data: Data, place: Tensor, said: str, label: Tensor) -> str:
    """The image at a place of `data`, and below it what is said of it and the name of a class."""
    pixels = central_square(THUMBNAIL)(read_image(data.paths[place], data.white))
    content = io.BytesIO()
    v2.functional.to_pil_image(pixels).save(content, "JPEG", quality=80)
    encoded = base64.b64encode(content.getvalue()).decode()
    return (
        f'<div><img alt="" src="data:image/jpeg;base64,{encoded}">'
        f"<small>{said}</small><b>{show(data.classes[label])}</b></div>"
    )


def show_result(data: Data, last: Evaluation) -> str:
    """The result in large type, the rarest, the most frequent and the worst class."""
    counts, wrong = data.train_counts(), last.confusion - last.confusion.diag().diag()
    result, recall, names = measure_all(last, counts), last.recall.tolist(), data.classes
    usual, rare = int(counts.argmax()), int(counts.argmin())
    worst = int(last.recall.argsort(stable=True)[0])  # NaN comes last
    said, most = names[worst], int(wrong[worst].max())
    if most:
        said += f", {most} taken for {names[int(wrong[worst].argmax())]}"
    ends = format_range(result).split(maxsplit=1)[1]
    tiles = {
        "balanced accuracy": (result["balanced_accuracy"], ends),
        "as trained": (result["as_trained_balanced_accuracy"], "before calibration"),
        "most frequent class": (recall[usual], f"recall of {names[usual]}"),
        "rarest class": (recall[rare], f"recall of {names[rare]}"),
        "lowest recall": (recall[worst], said),
    }
    text = ""
    for name, (part, note) in tiles.items():
        text += f"<div>{name}<b>{show(part)}</b><small>{show(note)}</small></div>"
    return f'<div class="tiles">{text}</div>'


def make_page(
    given: Given, progress: Progress, last: Evaluation, tested: Evaluation | None
) -> dict[str, str]:
    """By their files' names, the charts and the page: one file without scripts, loading nothing."""
    settings, data, changes = given.settings, given.data, list_changes(given, last)
    classes = list_classes(data, progress.draws, last.confusion)
    if changes and given.baseline is not None:
        before = confusion_matrix(last.targets, given.baseline, len(classes))
        for row, old in zip(classes, list_classes(data, progress.draws, before), strict=True):
            row |= {was: old[now] for now, was in zip(NEW, OLD, strict=True)}
    baseline, title = settings.baseline.name if changes else "", show(settings.data.name)
    recall, curves = recall_chart(classes, baseline), curve_chart(progress.history)
    made_with = {k: v for k, v in vars(settings).items() if k != "command"} | versions()
    values = " · ".join(f"{show(name)}: {show(str(x))}" for name, x in made_with.items())
    sections = {
        f"Compared with {show(baseline)}, on the same images": changes
        and show_rows(show_changes(changes)),
        "Recall": f"{recall}<details><summary>Images, draws, measures of each class</summary>"
        f"{show_rows(classes)}</details>",
        "Mistakes": show_mistakes(data, last),
        "Confusions": show_confusions(data, last),
        "Training": curves,
        "Make it again": f"<pre>{show(settings.command)}</pre><p><small>{values}</small></p>",
        "How this was measured": f"<p>{show(describe_method(given, progress, last))}</p>",
    }
    body = f"<h1>{title}</h1><p>{show(describe_run(given, tested))}</p>{show_result(data, last)}"
    body += "".join(f"<h2>{name}</h2>{text}" for name, text in sections.items() if text)
    page = (
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width='
        f'device-width"><title>{title}</title><style>{STYLE}</style>{body}</html>\n'
    )
    return {"recall.svg": recall, "curves.svg": curves, "report.html": page}


def describe_run(given: Given, tested: Evaluation | None) -> str:
    """What was trained on what, and what judged it."""
    settings, counts, way = given.settings, given.data.train_counts(), "trained from random weights"
    if settings.weights != "none":
        way = f"fine-tuned from {Path(settings.weights).name}"
    text = (
        f"{settings.arch}, {way}, on {int(counts.sum())} images of {len(counts)} classes, "
        f"{counts.max()} of the most frequent and {counts.min()} of the rarest. "
        f"Judged by {describe_val(given)}."
    )
    if tested:
        result = format_range(measure_all(tested, counts))
        text += f" Voting on the untouched test they have {result}."
    return text


def describe_method(given: Given, progress: Progress, last: Evaluation) -> str:
    """How a run was measured, for a methods section."""
    settings, stages = given.settings, {row["phase"] for row in progress.history}
    layers = {
        "given": "was judged as it was given",
        "head": "the last layer alone (SGD)",
        "trial": f"all layers for a trial (AdamW, {settings.lr:g})",
        "whole": f"all layers (AdamW, {settings.lr:g})",
        "upper": f"from the last layer on, the upper half (AdamW, {settings.lr * UPPER_FACTOR:g})",
    }
    way = " and then ".join(text for name, text in layers.items() if name in stages)
    if settings.epochs:
        drawn = "each image once per epoch"
        if settings.rebalance == "sampler":
            weights = f"1 / (images of the class) ** {settings.power:g}"
            drawn = f"drawn by a WeightedRandomSampler, weights {weights}"
        way = (
            f"was trained for {settings.epochs} epochs "
            f"with images of {settings.image_size} pixels, "
            f"{drawn}: {way}, in batches of {settings.batch_size}, seed {settings.seed}"
        )
    text = f"A {settings.arch} ({settings.weights}) {way}. It was judged by {describe_val(given)}. "
    if settings.epochs and not settings.no_calibration:
        text += (
            f"Logits were multiplied by {last.calibration.scale:.3f} and lowered by "
            f"{last.calibration.shift:.3f} times the log share of the class; each part of the "
            "images was judged with numbers fitted on the others. "
        )
    return text + (
        "Balanced accuracy is the mean recall of the classes. Intervals (95 %) are Wilson's for a "
        "class and score intervals for a mean; they say how far other images could move a figure, "
        "not how far another training could."
    )


# -------------------------------------------------------------------------------------- predicting


def predict_photos(settings: Namespace) -> None:
    """Write what the network of a run says of each image below DATA, as CSV."""
    run, out = load_network(settings), settings.output
    if out and out.exists():
        raise DataError(f"--output {out}: there already; name a new file")
    if out and not out.parent.is_dir():
        raise DataError(f"--output {out}: no folder to write it in; make that first")
    compute, paths = pick_compute(settings.device, settings.amp), list_photos(settings.data)
    model: Any = build_model(run["arch"], run["classes"], run)[0].eval()
    model.to(compute.device, memory_format=memory_format(compute.device))
    natural = run["natural"] if settings.natural else 0.0
    rows, started = [], time.perf_counter()
    for views, read in read_photos(paths, run, settings.batch_size or BATCH):
        with torch.no_grad(), compute.autocast():
            logits = model(to_input(views, compute.device))
        probability, best = (logits.float().cpu() + natural).softmax(1).topk(2)
        for path, (p, q), (one, two) in zip(read, probability.tolist(), best.tolist(), strict=True):
            answer = {"path": path, "class": run["classes"][one], "probability": p}
            rows.append(answer | {"second": run["classes"][two], "second_probability": q})
    if not rows:
        raise DataError(f"{settings.data}: no image that can be read")
    speed = len(rows) / (time.perf_counter() - started)
    print(f"{len(rows)} images, {speed:.1f} a second", file=sys.stderr)
    if out:
        write_file(out, format_table(rows))
    else:
        sys.stdout.buffer.write(format_table(rows))


def load_network(settings: Namespace) -> dict[str, Any]:
    """What a run wrote of its network; raises `DataError` where `--predict` names no such run."""
    file = settings.predict / NETWORK if settings.predict.is_dir() else settings.predict
    if not file.is_file():
        raise DataError(f"--predict {settings.predict}: no network there; name a run that has one")
    with contextlib.suppress(DataError):
        run = read_weights(str(file))
        if run.keys() >= {"classes", "natural"}:
            return run
    raise DataError(f"--predict {file}: not a network of this script; train one first")


def list_photos(place: Path) -> list[str]:
    """The images at or below `place`, in the order of their names; hidden ones are left out."""
    if place.is_file():
        return [str(place)]
    if not place.is_dir():
        raise DataError(f"DATA {place}: no such folder or image")
    images = make_dataset(str(place), {"": 0}, IMG_EXTENSIONS, allow_empty=True)
    below = sorted(Path(path) for path, _ in images)
    found = [str(path) for path in below if "/." not in f"/{path.relative_to(place).as_posix()}"]
    if not found:
        raise DataError(f"DATA {place}: no image in it; known are {', '.join(IMG_EXTENSIONS)}")
    return found


def read_photos(
    paths: list[str], run: Mapping[str, Any], batch_size: int
) -> Iterator[tuple[Tensor, list[str]]]:
    """Batches of views (B, S, S, 3) uint8 and their paths; what cannot be read is named.

    While a batch is used the next one is read.
    """
    view, least = central_square(run["eval_size"]), run["least_side"]

    def read(path: str) -> Tensor | str:
        try:
            image = read_image(path, run["white"], 2 * least)
            return view(shrink(image, least)).permute(1, 2, 0)
        except DataError as error:
            return str(error)

    parts = [paths[first : first + batch_size] for first in range(0, len(paths), batch_size)]
    bar = tqdm(total=len(paths), desc="predicting", unit=" images", leave=False, disable=None)
    with ThreadPool() as pool, bar:
        ahead = pool.map_async(read, parts[0])
        for part, following in zip(parts, [*parts[1:], []], strict=True):
            found, views = ahead.get(), {}
            ahead = pool.map_async(read, following)
            for path, each in zip(part, found, strict=True):
                if isinstance(each, Tensor):
                    views[path] = each
                else:
                    tqdm.write(f"warning: {each.removesuffix('; remove it')}; left out", sys.stderr)
            if views:
                yield torch.stack([*views.values()]), [*views]
            bar.update(len(part))


# --------------------------------------------------------------------------- devices and processes


class Compute(NamedTuple):
    """Where the network runs, in what precision, and which of how many processes this one is."""

    device: torch.device
    amp: torch.dtype | None  # of mixed precision; None: float32 alone
    rank: int = 0
    world_size: int = 1

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)

    def name(self) -> str:
        """What people call the device."""
        cuda = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if cuda else str(self.device)


def join_processes(name: str, amp: bool | None) -> Compute:
    """What this process computes on; under torchrun, after it has met the others."""
    compute = pick_compute(name, amp)
    if not dist.is_torchelastic_launched():
        return compute
    # Process 0 checks all images while the others wait; torchrun ends them where one has died.
    dist.init_process_group(pick_backend(compute.device.type), timeout=timedelta(days=7))
    return compute._replace(rank=dist.get_rank(), world_size=dist.get_world_size())


def pick_backend(kind: str) -> str:
    """What several processes on devices of this kind talk by; raises `DataError` if nothing."""
    backends = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}
    if kind not in backends:
        raise DataError(f"--device {kind}: serves one process alone; start without torchrun")
    shared = int(os.environ["LOCAL_WORLD_SIZE"]) > torch.accelerator.device_count()
    lacking = kind == "cuda" and not dist.is_nccl_available()  # as on Windows
    return "gloo" if shared or lacking else backends[kind]  # nccl would refuse to share


def pick_compute(name: str, amp: bool | None) -> Compute:
    """The device called `name`, "auto" for the best there is; `amp` None: where it helps."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    best = found or torch.device("cpu")
    try:
        device = best if name == "auto" else torch.device(name)
        if device.type != "cpu" and dist.is_torchelastic_launched():  # to each process its own
            place = int(os.environ["LOCAL_RANK"]) % max(1, torch.accelerator.device_count())
            device = torch.device(device.type, place)
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError):  # the latter from builds without that device
        raise DataError(f"--device {name}: not on this machine; try auto, or {best}") from None
    kind = torch.bfloat16
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of which the next lines ask
        if sys.platform == "win32":  # whose driver would take main memory and crawl, not fail
            free, total = torch.cuda.mem_get_info()
            torch.cuda.set_per_process_memory_fraction(free / total)
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        helps, kind = True, torch.bfloat16 if native else torch.float16
    else:  # `get_capabilities` came with torch 2.10
        units: Any = getattr(torch.cpu, "get_capabilities", dict)()
        helps = device.type == "cpu" and bool(units.get("avx512_bf16") or units.get("amx_bf16"))
    return Compute(device, kind if amp or (amp is None and helps) else None)


def to_device(batch: Tensor, device: torch.device) -> Tensor:
    """`batch` on `device`, without waiting where that is safe: from pinned memory to CUDA."""
    cuda = device.type == "cuda"
    return (batch.pin_memory() if cuda else batch).to(device, non_blocking=cuda)


def memory_format(device: torch.device) -> torch.memory_format:
    """How images lie in memory: channels last, but on MPS BatchNorm's gradients are then wrong."""
    # https://github.com/pytorch/pytorch/issues/175189
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


@cache  # made once, since that waits for all the work of the device
def normalisation(device: torch.device) -> Tensor:
    """Mean and deviation that ImageNet weights were trained with, of bytes: (2, 3, 1, 1)."""
    parts = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return torch.tensor([[255 * x for x in part] for part in parts], device=device)[..., None, None]


def to_input(batch: Tensor, device: torch.device) -> Tensor:
    """(B, H, W, 3) bytes as normalised (B, 3, H, W) float32 on `device`; features as they are."""
    batch = to_device(batch, device)
    if batch.dtype != torch.uint8:
        return batch
    images = batch.permute(0, 3, 1, 2).to(torch.float32, memory_format=memory_format(device))
    mean, std = normalisation(device)
    return images.sub_(mean).div_(std)


def first_makes(make: Callable[[], Any], compute: Compute) -> Any:
    """What `make` returns in process 0, in every process; where it fails, all end with it."""
    made, problem = [None], None
    try:
        made = [make()] if compute.rank == 0 else made
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
    """The rows of all processes, of which process r has every `world_size`-th from r on."""
    if not dist.is_initialized():
        return part
    count = torch.tensor(len(part))
    dist.all_reduce(count)
    whole = part.new_empty(int(count), *part.shape[1:])
    for rank in range(compute.world_size):  # one after the other, to need little memory
        rows = whole[rank :: compute.world_size]
        sent = part if rank == compute.rank else rows.contiguous()
        dist.broadcast(sent, rank)
        rows.copy_(sent)
    return whole


# ------------------------------------------------------------------------------------ command line


RATE, SCRATCH_RATE = 3e-4, 1e-3  # of AdamW, for pretrained weights and for random ones


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Print `message` on stderr and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {printable(message)}; see --help\n")


# fmt: off
def make_parser() -> OneLineParser:
    """The flags; `None` stands for "auto"."""
    purpose = str(__doc__).partition("\n\nDATA")[0]  # with the commands
    raw = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(prog="data_training.py", description=purpose, formatter_class=raw)

    def add(flag: str, metavar: str, kind: Any, default: Any, text: str) -> None:
        parse = (lambda said: None if said == "auto" else kind(said)) if default == "auto" else kind
        text += "" if default is None else f" (default: {default})"
        group.add_argument(flag, metavar=metavar, type=parse, default=default, help=text)

    whole = number(int, lambda n: n >= 0, "a whole number of at least 0")
    some = number(int, lambda n: n >= 1, "a whole number of at least 1")
    folds = number(int, lambda n: 3 <= n <= 10, "a whole number from 3 to 10")
    inside = number(float, lambda x: 0 < x < 1, "a number between 0 and 1")
    fraction = number(float, lambda x: 0 < x <= 1, "a number above 0, at most 1")
    positive = number(float, lambda x: 0 < x < math.inf, "a number above 0")
    power = number(float, lambda x: 0 <= x <= 10, "a number from 0 to 10")
    bits = number(int, lambda n: -(2**63) <= n < 2**63, "a whole number of 64 bits")
    parser.add_argument("data", metavar="DATA", type=Path, nargs="?",
        help="folder of class folders; with --predict images, at any depth, or one")
    group = parser.add_argument_group("data")
    add("--val-fraction", "F", inside, 0.2, "part of each class that is kept for validation")
    add("--folds", "K", folds, 1, "train K networks (3 to 10), each on all but one part of the "
        "images, which vote; images of --val or --source then test the vote")
    add("--val", "DIR", Path, None, "class folders to validate on; then nothing is split off")
    add("--split", "FILE", Path, None, "CSV file of path (class/file) and part (train, val, or "
        "source for images of SRC), like a run's split.csv; other images are left out")
    add("--source", "SRC", Path, None, "folder DATA was made from: its other images validate, too")
    add("--group", "PATTERN", str, None, "regular expression: images whose paths below their class "
        "give the same first group, or match, are one family (patient, film), never split up")
    add("--image-size", "PX", some, "auto", "pixels per side of a training crop; evaluation takes "
        "up to 8/7 of that, 256 for 224; auto: that of --weights, else 224")
    add("--crop-scale", "F", fraction, 0.5, "smallest part of an image that a training crop shows")
    group.add_argument("--flip", choices=("sides", "none", "all"), default="sides",
        help="sides (default): mirror training images at random; none: for text, signs, left and "
        "right; all: turn them by quarters too, for microscopes and from above")
    group.add_argument("--no-flip", dest="flip", action="store_const", const="none",
        help=argparse.SUPPRESS)
    add("--workers", "N", whole, "auto", "processes that read images; auto: on a CPU half the "
        "cores, at most 4; else cores minus 1, at most 16, or 8 where processes are spawned")
    group = parser.add_argument_group("model")
    add("--arch", "NAME", str, "auto", "a ResNet of torchvision; auto: that of --weights, else "
        "resnet50 on an accelerator and resnet18 on a CPU")
    add("--weights", "NAME|PATH", str, "DEFAULT", "torchvision weights by name, a file, or none")
    group = parser.add_argument_group("training")
    add("--epochs", "N", whole, 10, "passes over the training images; 0 judges the given weights")
    add("--frozen-epochs", "N", whole, "auto", "first epochs, in which the last layer (the head) "
        "alone is trained; auto: one epoch before all others, none with --weights none")
    group.add_argument("--rebalance", choices=("sampler", "none"), default="sampler",
        help="sampler (default): draw every class equally often; none: every image once")
    add("--power", "P", power, 1.0, "the sampler weighs by 1 / count ** P; 0.5: square root")
    add("--batch-size", "N", some, "auto", "images per step, over all processes; auto: 64, or 32 "
        "where an epoch would have under 32 steps")
    add("--lr", "X", positive, "auto", "highest learning rate of all layers but the head, by "
        f"AdamW; auto: {RATE:g}, from random weights {SCRATCH_RATE:g}")
    group.add_argument("--no-calibration", action="store_true",
        help="keep the logits as trained, which favour frequent classes and are too sure")
    group = parser.add_argument_group("use")
    add("--predict", "RUN", Path, None, "a run folder or network file that says what the images "
        "below DATA are; a CSV file on stdout, or in --output FILE")
    group.add_argument("--natural", action="store_true",
        help="predict for classes as frequent as in training, not for equally frequent ones")
    group = parser.add_argument_group("run")
    add("--output", "DIR", Path, "auto", "new folder for the results; auto: runs/DATE-TIME")
    add("--resume", "RUN", Path, None, "go on with the run in this folder")
    add("--baseline", "RUN", Path, None, "run on the same validation images, to compare with")
    add("--seed", "N", bits, 0, "of split, draws and augmentation")
    group.add_argument("--device", metavar="NAME", default="auto",
        help="auto (default): an accelerator, else cpu")
    group.add_argument("--amp", action=argparse.BooleanOptionalAction,
        help="mixed precision (default: where the hardware gains from it)")
    return parser
# fmt: on


def parse_args(argv: list[str] | None) -> Namespace:
    """The settings on the command line, each in its range; exits with status 2 if they clash."""
    parser = make_parser()
    defaults = vars(parser.parse_args([]))
    said = vars(parser.parse_args(argv, Namespace(**dict.fromkeys(defaults))))
    said = {name: value for name, value in said.items() if value is not None}
    clashes = {
        "resume": said.keys() - {"resume", *WITH_RESUME},
        "predict": said.keys() - {"predict", *WITH_PREDICT},
        "val_fraction": said.keys() & {"folds", "val", "split"},
        "val": said.keys() & {"source", "split"},  # whose names may be those of other images
    }
    for name, others in clashes.items():
        for other in sorted(others) if name in said else ():
            flag = "DATA" if other == "data" else f"--{other.replace('_', '-')}"
            parser.error(f"{flag}: not with --{name.replace('_', '-')}; drop one of them")
    if "data" not in said and "resume" not in said:
        parser.error("the following arguments are required: DATA")
    if "natural" in said and "predict" not in said:
        parser.error("--natural: of --predict; drop it")
    if "power" in said and said.get("rebalance") == "none":
        parser.error("--power: of the sampler; drop it or --rebalance none")
    words = sys.argv if argv is None else ["data_training.py", *argv]
    return Namespace(**defaults | said, command=shlex.join(["python", *words]))


def number(kind: type, accepts: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    """A parser for argparse of numbers that `accepts` takes."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if accepts(kind(text)):
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")

    return parse


def check_settings(args: Namespace) -> None:
    """Fill in what "auto" means; raise `DataError` where settings do not go together."""
    if (args.frozen_epochs or 0) > args.epochs:
        raise DataError(f"--frozen-epochs {args.frozen_epochs}: more than --epochs {args.epochs}")
    if args.folds > 1 and not args.epochs:
        raise DataError("--folds: nothing is trained with --epochs 0; drop one of them")
    try:
        re.compile(args.group or "")
    except re.error as error:
        raise DataError(f"--group {args.group}: no regular expression: {error}") from None
    args.lr = args.lr or (SCRATCH_RATE if args.weights == "none" else RATE)
    args.power = 0.0 if args.rebalance == "none" else args.power
    output = args.output = args.output or unused(Path(f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}"))
    if output.exists() and not output.is_dir():
        raise DataError(f"--output {output}: a file; name a new folder")
    if output.exists() and any(each.name[0] != "." for each in output.iterdir()):
        raise DataError(f"--output {output}: not empty; name a new folder, or --resume a run")
    for flag, folder in (("DATA", args.data), ("--source", args.source), ("--val", args.val)):
        if folder and not folder.is_dir():
            raise DataError(f"{flag} {folder}: no such folder; pass one that holds class folders")
        if folder and output.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"--output {output}: would be a class of {folder}; move it out")


def unused(path: Path) -> Path:
    """`path`, or with the first number behind it that makes it new."""
    names = (path.with_name(f"{path.name}-{number}") for number in range(2, 10**6))
    return path if not path.exists() else next(name for name in names if not name.exists())


@contextlib.contextmanager
def claim(output: Path) -> Iterator[None]:
    """Hold the run folder against other runs; where no run comes of it, nothing is left of it."""
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    output.mkdir(parents=True, exist_ok=True)
    try:
        (output / "config.json").touch(exist_ok=False)
    except FileExistsError:
        raise DataError(f"--output {output}: another run has just begun there") from None
    try:
        yield
    except BaseException:
        (output / "config.json").unlink()
        with contextlib.suppress(OSError):  # somebody else writes there
            for folder in made:
                folder.rmdir()
        raise


def count_workers(args: Namespace) -> int:
    """Processes that read images: as many as asked for, or one a core but one, if they fit."""
    workers = args.workers
    if workers is None:
        affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
        cores = getattr(os, "process_cpu_count", lambda: len(affinity(0)))() or 1
        # Nothing here tells a container's share of the cores, and 8 spawned take 2 GB.
        most = 16 if get_start_method() == "fork" else 8
        cpu = args.device == "cpu"  # whose cores train, too
        own = (cores // 2 if cpu else cores - 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = min(4, own) if cpu else max(1, min(most, own))
    shared = Path("/dev/shm")  # through which, where there is one, workers hand their batches over
    if workers and shared.is_dir():  # to write beyond its end would kill a worker
        batch = 3 * eval_size(args.image_size) ** 2 * args.batch_size
        # Each worker has two batches on the way, and one is in use.
        room = max(0, shutil.disk_usage(shared).free // batch - 1) // 2
        if room < workers:
            text = f"room for batches of {room} workers, not {workers}; docker run has --shm-size"
            print(f"warning: {shared}: {text}", file=sys.stderr)
            return room
    return workers


def printable(text: str) -> str:
    """`text` on one line, with control characters and undecodable bytes as escapes."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


# -------------------------------------------------------------------------------------------- main


# What a RuntimeError says where memory is out: on CUDA, in main memory that is pinned for it and on
# MPS; in main memory of Unix and of Windows. Only the first has a class of its own.
NO_MEMORY = ("out of memory", "allocate memory", "not enough memory")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = parse_args(argv)
    try:
        if args.predict:
            predict_photos(args)
        else:
            run(args)
        if dist.is_initialized():  # only now that `run` holds no network that would still use it
            dist.destroy_process_group()
        return 0
    except RuntimeError as error:  # of a batch, in the feature pass and in evaluation too
        if not any(text in str(error) for text in NO_MEMORY):
            raise
        size, processes = args.batch_size or BATCH, int(os.environ.get("WORLD_SIZE", 1))
        half = size // 2 // processes * processes
        other = f"{half} or a smaller --image-size" if half else "a smaller --image-size"
        message = f"--batch-size {size}: out of memory on {args.device}; try {other}, in a new run"
    except (DataError, OSError) as error:
        message = str(error).rstrip()
        if "Original Traceback" in message:  # from a process that reads images
            message = message.splitlines()[-1].partition(": ")[2]
    except KeyboardInterrupt as error:
        output, text = args.resume or args.output, "interrupted before the first checkpoint"
        if output and (output / STATE).exists():
            text = f"interrupted; go on with --resume {shlex.quote(str(output))}"
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"\ndata_training.py: {printable(text)}", file=sys.stderr)
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    print(f"data_training.py: error: {printable(message)}", file=sys.stderr)
    return 2


def stop(signum: int, _: Any) -> NoReturn:
    """End as by Ctrl-C."""
    raise KeyboardInterrupt(signum)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main())
