"""Fine-tune a pretrained ResNet on an imbalanced image folder, balanced by weighted sampling.

    python data_training.py DATA --epochs N
    torchrun --nproc-per-node=K data_training.py DATA --epochs N

DATA holds one folder per class; a part of each is kept for validation. Training images are drawn by
a `WeightedRandomSampler` with weights 1 / (training images of the class), so that every class is
seen about equally often; `--rebalance` names the alternatives. The head is trained first, on
features that the frozen backbone computes once; then everything, and of the way from the head alone
to there the network goes as far as it validates best. After each epoch two numbers are fitted on
the validation images, which take back what the network favours frequent classes by; what is judged,
reported and saved is calibrated so. After an epoch, or half a minute of short ones, a run folder
holds the settings, the history, the recall of each class with its interval, the predictions, the
last and the best network, two charts and, in the end, a sheet of the worst mistakes; with
`--baseline` also what changed since an earlier run, and how sure that is.

A run that was stopped goes on with `--resume` and ends as it would have.

Read `run` first, below the constants: each of its lines makes what the next one takes.

Exit status: 0 done, 2 bad input (one line on stderr says where and what to do), 130 interrupted,
143 terminated.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import hashlib
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import warnings
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cache, partial
from multiprocessing import get_start_method
from multiprocessing.pool import ThreadPool
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import get_swa_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, Dataset, Sampler, WeightedRandomSampler
from torchvision import models
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2
from tqdm import tqdm

# What torchvision's ImageNet weights were trained with, for pixels from 0 to 255.
MEAN = [255 * channel for channel in (0.485, 0.456, 0.406)]
STD = [255 * channel for channel in (0.229, 0.224, 0.225)]
# Crops of half to all of an image enlarge what they show, by a fifth on average; evaluation makes
# up for most of it by images up to so much larger (Touvron et al. 2019, arXiv:1906.06423).
EVAL_SCALE = 8 / 7
EVALUATED = -1  # in a seed's place: the view of evaluation
STRIDE = 32  # pixels a cell of a ResNet's last feature map
MOST_KEPT = 2**31  # bytes of images for evaluation in main memory, and at most a quarter of it
MOST_PINNED = 2**28  # features, 1 GB: what is pinned takes a power of two of bytes, and stays
HEAD_STEPS = 1000  # at least, of training the head alone: on features they cost next to nothing
HEAD_DECAY = 0.002  # weight decay, of the head alone and in the whole network
# The scale of weights that the learning rates are for, see `rescale`.
CONV_SCALE, FEATURE_SCALE = 0.5, 2.0
SOFTENED = 0.1  # what is left of the head's logits as the training of the whole network begins
TRIAL_STEPS = 50  # of the whole network, at least, before "auto" judges what they bought
SEEN_ANEW = 16  # batches that tell the BatchNorm of averaged weights its statistics
# With fewer images per process and step BatchNorm takes its statistics over all processes, which
# waits for the GPU three times a layer, 159 times a step of ResNet-50 (torch's _functions.py).
SYNCHRONISED = 8
FIRM_FROM = 0.5  # part of a trial's way; where a shorter one is best, firm loses more than it gains
SEARCHED = 2000  # validation images that "auto" looks at to choose, about; all of rare classes
average_weights = get_swa_multi_avg_fn()  # moves a first list of weights towards a second one
PRIOR = 6.0  # images for which "nothing to calibrate" counts
LEAST_SCALE = 0.01
LEAST_SPREAD = 0.05  # of log shares; what differs less in frequency is not shifted by much
MOST_FITTED = 2**22  # logits that calibration is fitted on: more would tell two numbers little new
HIGHEST = 1e4  # logit
BLOCK = 2**13  # images whose probabilities are held at once
CLIP_NORM = 1.0  # longest gradient followed; tiny BatchNorm variances can make it explode
MANY, FEW = 100, 20  # "many": more training images than that, "few": fewer
# The part of the images that is right, and the mean recall of all classes and of those with many,
# in between and with few training images; NaN where nothing was asked.
MEASURES = ("accuracy", "balanced_accuracy", "many", "medium", "few")
BINS = 15  # of probability, to measure calibration by
Z = 1.959964  # 95 % of a normal distribution lie within so many standard deviations
MOST_DRAWN = 2**24  # torch.multinomial takes no more weights
STATE = "resume.pt"  # in a run folder: all that it takes to go on
WRITE_EVERY = 30.0  # seconds; on a fast GPU the files of an epoch take longer than the epoch
if not dist.is_available():  # in a torch that is built for one process there is no more of it
    dist.is_initialized = dist.is_torchelastic_launched = lambda: False
# What several processes talk by; what is on the CPU goes by gloo in any case.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}
SHARED = Path("/dev/shm")  # through which, where there is one, workers hand their batches over
# What a RuntimeError says where memory is out: on CUDA, in main memory that is pinned for it and on
# MPS; in main memory of Unix and of Windows. Only the first has a class of its own.
NO_MEMORY = ("out of memory", "allocate memory", "not enough memory")
# Settings that may differ when a run goes on: they change where it runs, not what comes out.
OPTIONAL = ("source", "val", "split")  # but not whether these are given
MAY_DIFFER = (*OPTIONAL, "out", "workers", "output", "resume", "baseline", "device")
HEADER = (
    "  epoch  phase   train loss  val loss  accuracy     balanced  as trained    many  medium"
    "     few  draws/class  distinct  images/s   left"
)
BLUE, ORANGE = "#2f6fb0", "#d9822b"
MOST_LABELS, GROUPS = 30, 10  # that can be read below a chart; of more classes, bars in it
MISTAKES, TILE = 24, 244  # how many are shown, and pixels a side of each
EXAMPLES = """examples:
  python data_training.py dogs --epochs 10
  python data_training.py dogs --output runs/dogs --baseline runs/none
  python data_training.py photos --val others --weights runs/dogs/best.pt --epochs 0"""


class DataError(Exception):
    """Bad input, told in one line: where, what, what to do."""


# ------------------------------------------------------------------------------------ run


@dataclass(frozen=True)
class Given:
    """What a run is given: complete before its first epoch, and the same until its last."""

    args: Namespace  # every setting as used
    data: Data
    baseline: Tensor | None  # what the run `--baseline` predicted of the validation images: (M,)
    origin: str  # in words, where the network is from
    compute: Compute  # of this process

    def calibrated(self) -> bool:
        """Whether logits are calibrated: not those of weights that are only to be judged."""
        return self.args.epochs > 0 and not self.args.no_calibration


@dataclass
class Progress:
    """How far a run has come: what `resume.pt` holds beside the settings."""

    model: models.ResNet
    history: list[dict[str, Any]]  # a row an epoch, from the first one on
    draws: Tensor  # of each class so far: (C,) int64
    shares: dict[str, dict[float, float]]  # what `search_shares` found, for each phase
    stored: dict[str, Any]  # the trainer's state, where a run goes on; empty once used
    trainer: Any = None  # a `Trainer`, from the first phase on

    def last_epoch(self) -> int:
        """The number of the last epoch that is done, -1 before epoch 0."""
        return self.history[-1]["epoch"] if self.history else -1

    def add(self, row: dict[str, Any], draws: Tensor) -> None:
        """Note an epoch, and how often it drew each class."""
        self.history.append(row)
        self.draws += draws


def run(args: Namespace) -> None:
    """Train and evaluate as `args` say, and fill the run folder."""
    compute = join_processes(args.device, args.amp)
    given, progress = first_makes(partial(prepare, args, compute), compute)
    given, args = replace(given, compute=compute), given.args
    progress.model.to(compute.device, memory_format=memory_format(compute.device))
    reader, pending, last = Reader(given), Pending(), None
    if compute.rank == 0:
        start_run(given, progress)
    for phase in plan(given, progress.shares):  # the trial decides which one is the last
        left = [epoch for epoch in phase.epochs if epoch > progress.last_epoch()]
        started = time.perf_counter()
        reader.waited = 0.0
        source = begin_phase(given, progress, phase, reader) if left else reader
        for epoch in left:
            drawn = draw_epoch(given, phase, epoch)
            batches = cut_batches(drawn, args.batch_size, seeded("augment", args.seed, epoch))
            loss = train_epoch(given, progress.trainer, batches, source)
            seconds, waited = time.perf_counter() - started, reader.waited
            if phase.name == "trial":
                estimate_statistics(given, progress.trainer.average, batches, reader)
            last = None
            if progress.trainer.start and epoch == phase.epochs[-1]:
                last = choose(given, progress, reader)
            last = last or evaluate(given, progress.trainer.evaluated, source, given.data.val)
            row = {
                "epoch": epoch,
                "phase": phase.name,
                "train_loss": loss,
                "val_loss": last.loss,
                **measure_all(last, given.data.counts(given.data.train)),
                **count_draws(given.data, drawn),
                "learning_rate": progress.trainer.rate(),
                "images_per_second": len(drawn) / seconds,
                "data_wait": waited / seconds,
                "seconds": time.perf_counter() - started,
            }
            progress.add(row, given.data.counts(drawn))
            if compute.rank == 0:
                report(given, progress, last, pending, epoch == phase.epochs[-1])
            started, reader.waited = time.perf_counter(), 0.0
    if compute.rank == 0:
        print_end(given, progress, last)


# ---------------------------------------------------------------------------- command line


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults are shown where there are any, and examples as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Print `message` on stderr and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {printable(message)}; see --help\n")


def parse_args(argv: list[str] | None) -> Namespace:
    """The settings on the command line, each in its range; `None` stands for "auto"."""
    parser = OneLineParser(
        prog="data_training.py",
        description="fine-tune a pretrained ResNet on an imbalanced image folder",
        epilog=EXAMPLES,
        formatter_class=Help,
    )
    whole = number(int, lambda n: n >= 0, "a whole number of at least 0")
    some = number(int, lambda n: n >= 1, "a whole number of at least 1")
    inside = number(float, lambda x: 0 < x < 1, "a number between 0 and 1")
    fraction = number(float, lambda x: 0 < x <= 1, "a number above 0, at most 1")
    positive = number(float, lambda x: 0 < x < math.inf, "a number above 0")
    power = number(float, lambda x: 0 <= x <= 10, "a number from 0 to 10")
    bits = number(int, lambda n: -(2**63) <= n < 2**63, "a whole number of 64 bits")
    parser.add_argument("out", metavar="DATA", type=Path, help="folder of class folders")
    group = parser.add_argument_group("data")
    add = group.add_mutually_exclusive_group().add_argument
    add("--val-fraction", metavar="F", type=inside, default=0.2,
        help="part of each class that is kept for validation")  # fmt: skip
    add("--val", metavar="DIR", type=Path,
        help="folder of class folders to validate on; then nothing is split off")  # fmt: skip
    add("--split", metavar="FILE", type=Path,
        help="CSV file of path (class/file) and part (train, val, or source for images of SRC), "
        "like a run's split.csv; what it does not name is left out")  # fmt: skip
    add = group.add_argument
    add("--source", metavar="SRC", type=Path,
        help="folder that DATA was made from: its images that are not in DATA are validated on "
        "as well")  # fmt: skip
    add("--image-size", metavar="PX", type=auto_or(some), default="auto",
        help="pixels per side of a training crop; evaluation takes up to 8/7 of that, 256 for "
        "224; auto: that of --weights, else 224")  # fmt: skip
    add("--crop-scale", metavar="F", type=fraction, default=0.5,
        help="smallest part of an image's area that a training crop may show")  # fmt: skip
    add("--no-flip", action="store_true",
        help="never mirror a training image: for text, signs, left and right")  # fmt: skip
    add("--workers", metavar="N", type=auto_or(whole), default="auto",
        help="processes that read images; auto: 0 on a CPU, else the number of cores minus 1, "
        "at most 16, or 8 where processes are spawned")  # fmt: skip
    add = parser.add_argument_group("model").add_argument
    add("--arch", metavar="NAME", type=auto_or(str), default="auto",
        help="a ResNet of torchvision; auto: that of --weights, else resnet50")  # fmt: skip
    add("--weights", metavar="NAME|PATH", default="DEFAULT",
        help="name of torchvision weights, file of weights, or none")  # fmt: skip
    add = parser.add_argument_group("training").add_argument
    add("--epochs", metavar="N", type=whole, default=10,
        help="passes over the training images; 0 only evaluates the given weights")  # fmt: skip
    add("--frozen-epochs", metavar="N", type=auto_or(whole), default="auto",
        help="first epochs, in which the last layer (the head) alone is trained; auto: one epoch "
        "before all others, none with --weights none")  # fmt: skip
    add("--finetune", choices=("auto", "firm", "gentle"), default="auto",
        help="what follows the head: firm trains all layers, gentle the second half of them in "
        "small steps; auto: try firm for 50 steps or more, then keep it or change to gentle, by "
        "validation")  # fmt: skip
    add("--rebalance", choices=("sampler", "late", "loss", "none"), default="sampler",
        help="sampler: draw every class equally often; late: the same in the last quarter of each "
        "phase only; loss: balanced softmax; none: every image once per epoch")  # fmt: skip
    add("--power", metavar="P", type=power,
        help="the sampler's weights are 1 / count ** P; 0.5: square root (default: 1)")  # fmt: skip
    add("--batch-size", metavar="N", type=some, default=64,
        help="images per step, over all processes")  # fmt: skip
    add("--lr", metavar="X", type=positive, default=0.02,
        help="highest learning rate while the head alone is trained, by SGD, for features of "
        "squared length 512")  # fmt: skip
    add("--backbone-lr", metavar="X", type=auto_or(positive), default="auto",
        help="highest learning rate of all layers but the head, by AdamW; the head of a "
        "pretrained network gets 3 times that; auto: 3e-4, gentle 2e-5, from random weights 1e-3; "
        "--finetune auto takes half of X in its trial, 1/15 for gentle")  # fmt: skip
    add("--no-calibration", action="store_true",
        help="keep the logits as trained: they favour frequent classes and are too sure; else "
        "two numbers fitted on the validation images correct both")  # fmt: skip
    add = parser.add_argument_group("run").add_argument
    add("--output", metavar="DIR", type=auto_or(Path), default="auto",
        help="new folder for the results; auto: runs/DATE-TIME")  # fmt: skip
    add("--resume", action="store_true", help="continue the run in --output DIR")
    add("--baseline", metavar="RUN", type=Path,
        help="folder of an earlier run on the same validation images, to compare with")  # fmt: skip
    add("--seed", metavar="N", type=bits, default=0, help="of split, draws and augmentation")
    add("--device", metavar="NAME", default="auto", help="auto: an accelerator, else cpu")
    add("--amp", action=argparse.BooleanOptionalAction,
        help="mixed precision (default: where the hardware gains from it)")  # fmt: skip
    return parser.parse_args(argv)


def number(kind: type, accepts: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    """A parser for argparse of numbers that `accepts` takes."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if accepts(kind(text)):
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")

    return parse


def auto_or(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser that takes "auto" as `None` and leaves the rest to `parse`."""
    return lambda text: None if text == "auto" else parse(text)


def check_settings(args: Namespace) -> None:
    """Fill in what "auto" means; raise `DataError` where settings do not go together."""
    for flag, folder in (("DATA", args.out), ("--source", args.source), ("--val", args.val)):
        if folder and not folder.is_dir():
            raise DataError(f"{flag} {folder}: no such folder; pass one that holds class folders")
    if args.source and args.val:
        raise DataError("--source: not allowed with argument --val; drop one of them")
    if args.power is not None and args.rebalance != "sampler":
        raise DataError(f"--power: of the sampler; drop it or --rebalance {args.rebalance}")
    if (args.frozen_epochs or 0) > args.epochs:
        raise DataError(f"--frozen-epochs {args.frozen_epochs}: more than --epochs {args.epochs}")
    if args.weights == "none":
        if args.finetune != "auto":
            raise DataError(f"--finetune {args.finetune}: of pretrained weights; drop it, or none")
        args.finetune = "scratch"
    name = NAMES.get(args.finetune, args.finetune)
    args.backbone_lr = args.backbone_lr or RECIPES[name].rate
    args.power = 1.0 if args.power is None else args.power
    args.output = args.output or Path("runs", f"{datetime.now():%Y-%m-%d_%H-%M-%S}")
    if args.output.exists() and not args.output.is_dir():
        raise DataError(f"--output {args.output}: a file; name a new folder")
    held = any((args.output / name).exists() for name in (STATE, "config.json"))
    if held and not args.resume:
        raise DataError(f"--output {args.output}: already holds a run; name another, or --resume")
    if args.resume and not (args.output / STATE).exists():
        raise DataError(f"--resume: no run in --output {args.output}; name its folder")
    for folder in filter(None, (args.out, args.val)):
        if args.output.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"--output {args.output}: would be a class of {folder}; move it out")
    if args.split and not args.resume and args.split.resolve().parent == args.output.resolve():
        raise DataError(f"{args.split}: --output would write its own files there; move it out")


def count_workers(args: Namespace) -> int:
    """Processes that read images: as many as asked for, or one a core but one, if they fit."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    cores = getattr(os, "process_cpu_count", lambda: len(affinity(0)))() or 1
    workers = args.workers
    if workers is None:
        # Nothing here tells a container's share of the cores, and 8 spawned take 2 GB.
        most = 16 if get_start_method() == "fork" else 8
        workers = 0 if args.device == "cpu" else max(1, min(most, (cores - 1) // processes))
    if workers and SHARED.is_dir():  # to write beyond its end would kill a worker
        batch = 3 * eval_size(args.image_size) ** 2 * args.batch_size * processes
        # Each worker has two batches on the way, and one is in use.
        room = max(0, shutil.disk_usage(SHARED).free // batch - 1) // 2
        if room < workers:
            text = f"room for batches of {room} workers, not {workers}; docker run has --shm-size"
            print(f"warning: {SHARED}: {text}", file=sys.stderr)
            return room
    return workers


def printable(text: str) -> str:
    """`text` on one line, with control characters and undecodable bytes as escapes."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


# --------------------------------------------------------------------- devices, processes


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
    # Process 0 reads and checks all images while the others wait for it.
    dist.init_process_group(pick_backend(compute.device.type), timeout=timedelta(hours=3))
    return compute._replace(rank=dist.get_rank(), world_size=dist.get_world_size())


def pick_backend(kind: str) -> str:
    """What several processes on devices of this kind talk by; raises `DataError` if nothing."""
    if kind not in BACKENDS:
        raise DataError(f"--device {kind}: serves one process alone; start without torchrun")
    shared = int(os.environ["LOCAL_WORLD_SIZE"]) > torch.accelerator.device_count()
    lacking = kind == "cuda" and not dist.is_nccl_available()  # as on Windows
    return "gloo" if shared or lacking else BACKENDS[kind]  # nccl would refuse to share


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
    if device.type != "cuda":
        return batch.to(device)
    return batch.pin_memory().to(device, non_blocking=True)


def memory_format(device: torch.device) -> torch.memory_format:
    """How images lie in memory: channels last, but on MPS BatchNorm's gradients are then wrong."""
    # https://github.com/pytorch/pytorch/issues/175189
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


@cache  # made once, since that waits for all the work of the device
def normalisation(device: torch.device) -> Tensor:
    """`MEAN` and `STD` on `device`: (2, 3, 1, 1) float32."""
    return torch.tensor([MEAN, STD], device=device)[..., None, None]


def to_input(batch: Tensor, device: torch.device) -> Tensor:
    """(B, H, W, 3) bytes as normalised (B, 3, H, W) float32 on `device`; features as they are."""
    batch = to_device(batch, device)
    if batch.dtype != torch.uint8:
        return batch
    images = batch.permute(0, 3, 1, 2).to(torch.float32, memory_format=memory_format(device))
    mean, std = normalisation(device)
    return images.sub_(mean).div_(std)


def first_makes(make: Callable[[], Any], compute: Compute) -> Any:
    """What `make` returns in process 0, in every process; where it fails, the others end with it.

    Only process 0 tells what was wrong: the others would say that they have lost it.
    """
    made, problem = [None], None
    if compute.rank == 0:
        try:
            made = [make()]
        except Exception as error:
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


# ------------------------------------------------------------------------------------ data


class Row(NamedTuple):
    """An image: a row of `split.csv`."""

    path: str
    name: str  # its path below DATA, SRC or `--val`: class/file
    label: int
    part: str  # "train", "val", or "source": validated on as well


class Data(NamedTuple):
    """N images of C classes, and which of them are for training and for validation."""

    classes: list[str]
    paths: list[str]
    names: list[str]
    labels: Tensor  # (N,) int64
    train: Tensor  # indices, int64
    val: Tensor  # those of part "val", then of "source"
    parts: list[str]
    copies: int  # how many were left out of validation as copies of training images
    unreadable: list[str]  # paths left out

    def counts(self, part: Tensor) -> Tensor:
        """Images of each class among the indices `part`: (C,) int64."""
        return torch.bincount(self.labels[part], minlength=len(self.classes))

    def log_share(self) -> Tensor:
        """The logarithm of each class's share of the training images: (C,) float32.

        Less their mean: a constant changes no probability, but would cost half precision digits.
        """
        logs = self.counts(self.train).log()
        return logs - logs.mean()


def load_data(args: Namespace) -> Data:
    """The images of a new run: those of DATA, and of `--val` or `--source`, each in its part.

    What cannot be decoded is named and left out, and so is a copy of a training image elsewhere.
    """
    classes, rows = list_images(args.out)
    if args.val or args.source:
        rows += list_others(args, classes, rows)
    if args.split:
        rows = take_split(args, rows)
    fraction = 0.0 if args.val or args.split else args.val_fraction
    if (1 - fraction) * sum(row.part == "train" for row in rows) > MOST_DRAWN:
        raise DataError(f"{args.out}: over 2^24 training images; torch.multinomial draws no more")
    paths = [row.path for row in rows]
    digests = check_images(paths)
    rows = [row for row in rows if row.path in digests]
    if fraction:
        rows = split_images(rows, digests, fraction, args.seed)
    trained = {digests[row.path] for row in rows if row.part == "train"}
    copies = [row.path for row in rows if row.part != "train" and digests[row.path] in trained]
    for path in copies:
        print(f"warning: {printable(path)}: copy of a training image; left out", file=sys.stderr)
    kept = [row for row in rows if row.part == "train" or digests[row.path] not in trained]
    unreadable = [path for path in paths if path not in digests]
    return make_data(args, classes, kept, len(copies), unreadable)


def make_data(
    args: Namespace, classes: list[str], rows: list[Row], copies: int, unreadable: list[str]
) -> Data:
    """The images of a run; `DataError` if a class has none to train on, or none is validated on."""
    trained = torch.tensor([row.part == "train" for row in rows])
    if bare := sorted(set(classes) - {classes[row.label] for row in rows if row.part == "train"}):
        text = "no image of this class to train on that can be read; add one or remove the class"
        raise DataError(f"{args.split or args.out}: {bare[0]}: {text}; such classes: {len(bare)}")
    if trained.all():
        text = "no image differs from those trained on; nothing to validate on"
        if args.split and all(row.part == "train" for row in rows) and not copies:
            text = "names no image to validate on, as part val or source"
        raise DataError(f"{args.val or args.split or args.out}: {text}")
    paths, names, labels, parts = map(list, zip(*rows, strict=True))
    train, val = trained.nonzero().flatten(), (~trained).nonzero().flatten()
    return Data(
        classes=classes,
        paths=paths,
        names=names,
        labels=torch.tensor(labels),
        train=train,
        val=val,
        parts=parts,
        copies=copies,
        unreadable=unreadable,
    )


def take_split(args: Namespace, rows: list[Row]) -> list[Row]:
    """Those of `rows` that the table `--split` names, each in its part there; others are counted.

    Raises `DataError` for a part or an image that is not there, and for one that is named twice.
    """
    added, parts, wrong = {row.name: row.part == "source" for row in rows}, {}, []
    for line in read_table(args.split, "path", "part"):
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
        raise DataError(f"{args.split}: {wrong[0]}; such rows: {len(wrong)}")
    if left_out := len(rows) - len(parts):
        text = f"{printable(str(args.split))}: {left_out} images are not named there; left out"
        print(f"warning: {text}", file=sys.stderr)
    return [row._replace(part=parts[row.name]) for row in rows if row.name in parts]


def list_images(root: Path) -> tuple[list[str], list[Row]]:
    """The classes of `root`, and its images, for the time being all to train on."""
    try:
        folder = ImageFolder(root)
    except FileNotFoundError as error:
        raise DataError(f"{root}: {error}; add images or remove the class") from None
    if len(folder.classes) < 2:
        raise DataError(f"{root}: fewer than two classes; pass the folder that holds the classes")
    if hidden := [name for name in folder.classes if name.startswith(".")]:
        raise DataError(f"{root / hidden[0]}: hidden, but would count as a class; remove it")
    return folder.classes, make_rows(root, folder.samples, "train")


def make_rows(folder: Path, samples: list[tuple[str, int]], part: str) -> list[Row]:
    """Images of `folder` by path and label, their names with `/` on every system."""
    rows = []
    for path, label in samples:
        name = path.removeprefix(str(folder)).replace(os.sep, "/").lstrip("/")
        rows.append(Row(path=path, name=name, label=label, part=part))
    return rows


def list_others(args: Namespace, classes: list[str], ours: list[Row]) -> list[Row]:
    """The images of `--val`, or those of `--source` with other names than `ours`; no hidden one."""
    folder, part = (args.val, "val") if args.val else (args.source, "source")
    folders = {entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."}
    if strange := ", ".join(sorted(folders.difference(classes))):
        raise DataError(
            f"--{part} {folder}: not classes of {args.out}: {strange}; rename or remove"
        )
    labels = {name: label for label, name in enumerate(classes)}
    samples = make_dataset(folder, labels, IMG_EXTENSIONS, allow_empty=True)
    rows = make_rows(folder, samples, part)
    known = {row.name for row in ours if args.source}
    return [row for row in rows if row.name not in known and "/." not in row.name]


def check_images(paths: list[str]) -> dict[str, str]:
    """The SHA-256 of each file that can be decoded; the others are named on stderr."""

    def check(path: str) -> tuple[str, str]:
        try:
            content = read_bytes(path)
            with Image.open(io.BytesIO(content)) as image:
                image.draft("RGB", (1, 1))  # JPEG: every byte is decoded, to an eighth of the size
                image.load()
        except Exception as error:  # Pillow raises nearly anything on a broken file
            known = {UnidentifiedImageError: "not an image", DataError: "no regular file"}
            return "", known.get(type(error)) or str(error) or type(error).__name__
        return hashlib.sha256(content).hexdigest(), ""

    digests = {}
    with ThreadPool() as pool:  # Pillow and hashlib let other threads run meanwhile
        checked = pool.imap(check, paths, chunksize=16)
        bar = tqdm(checked, "checking", len(paths), unit=" images", leave=False, disable=None)
        for path, (digest, problem) in zip(paths, bar, strict=True):
            if problem:
                tqdm.write(f"warning: {printable(f'{path}: {problem}')}; left out", sys.stderr)
            else:
                digests[path] = digest
    return digests


def read_bytes(path: str) -> bytes:
    """The content of a regular file; to open a pipe would wait for ever."""
    if not os.path.isfile(path):
        raise DataError(f"{printable(path)}: no regular file; remove it")
    return Path(path).read_bytes()


def read_image(path: str, least: int = 0) -> Tensor:
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
        plain = picture.size == size and not picture.has_transparency_data
        if plain and picture.format in ("JPEG", "PNG"):
            with contextlib.suppress(RuntimeError):  # some rare files only Pillow reads
                encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                image = decode_image(encoded, ImageReadMode.RGB, apply_exif_orientation=True)
                if image.dtype == torch.uint8:
                    return image
        picture = ImageOps.exif_transpose(picture)
    except Exception as error:  # Pillow raises nearly anything on a broken file
        reason = f"cannot be decoded ({type(error).__name__}); remove it"
        raise DataError(f"{printable(path)}: {reason}") from None
    if picture.mode.startswith("I"):  # 16 bits, which `convert` would clip instead of scale
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return v2.functional.pil_to_tensor(picture.convert("RGB"))


def split_images(
    rows: list[Row], digests: Mapping[str, str], fraction: float, seed: int
) -> list[Row]:
    """`rows`, some of whose training images are for validation now, and none of their copies.

    Of each class, `fraction` goes to validation, at least one image and never all. Images with
    equal digests stay together; they are for training if they stand in several classes.
    """
    copies, groups_of, val = defaultdict(list), defaultdict(list), set()
    ours = [row for row in rows if row.part == "train"]
    counts = Counter(row.label for row in ours)
    for row in ours:
        copies[digests[row.path]].append(row)
    for group in copies.values():
        if len({row.label for row in group}) == 1:
            groups_of[group[0].label].append(group)
    for label, groups in groups_of.items():
        room = min(max(1, round(fraction * counts[label])), counts[label] - 1)
        stream = random.Random(f"split/{seed}/{label}")
        for group in sorted(groups, key=lambda _: stream.random()):
            if len(group) <= room:
                val.update(group)
                room -= len(group)
    return [row._replace(part="val") if row in val else row for row in rows]


@dataclass(frozen=True)
class Images(Dataset[tuple[Tensor, int]]):
    """Images by (index, seed): the same pair gives the same pixels in any process."""

    paths: list[str]
    labels: Tensor
    training: nn.Module  # draws its augmentation from torch's default generator
    evaluation: nn.Module
    least: int  # pixels a side that they need

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        """The image as (size, size, 3) uint8, and its label."""
        index, seed = item
        transform = self.evaluation if seed == EVALUATED else self.training
        torch.default_generator.manual_seed(seed)
        image = transform(read_image(self.paths[index], self.least))
        return image.permute(1, 2, 0), int(self.labels[index])


class Batches(Sampler[list[tuple[int, int]]]):
    """The batches that a loader reads next: those that were last `given`."""

    given: Sequence[Tensor] = ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Their pairs of index and seed."""
        return (batch.tolist() for batch in self.given)


class Reader:
    """Reads images, by workers that live as long as it does, and keeps what evaluation sees again.

    One loader does for the whole run: a spawned worker takes four seconds to its first batch.
    """

    def __init__(self, given: Given):
        """A reader of the images of a run."""
        args, data = given.args, given.data
        self.compute, self.labels = given.compute, data.labels
        self.again, self.views = evaluated_again(given), dict[int, Tensor]()
        self.waited = 0.0  # seconds for batches so far
        self.batches, views = Batches(), transforms(args)
        self.loader = DataLoader(
            Images(
                paths=data.paths,
                labels=data.labels,
                training=views[0],
                evaluation=views[1],
                least=least_side(args),
            ),
            batch_sampler=self.batches,
            num_workers=args.workers,
            persistent_workers=args.workers > 0,
            pin_memory=args.device == "cuda",
        )

    def read(self, batches: Sequence[Tensor], title: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, S, S, 3) uint8 and labels (B,) of `batches`, behind a progress bar."""
        pairs = torch.cat([torch.empty(0, 2, dtype=torch.int64), *batches])
        viewed = set(pairs[pairs[:, 1] == EVALUATED, 0].tolist())
        if viewed and viewed <= self.views.keys():
            loaded: Iterator[Any] = map(self.recall, batches)
        else:
            self.batches.given = batches
            loaded = iter(self.loader)
        kept = self.again & viewed
        for batch in show_progress(batches, title, self.compute):
            asked = time.perf_counter()
            images, labels = next(loaded)
            self.waited += time.perf_counter() - asked
            for index, image in zip(batch[:, 0].tolist(), images, strict=True):
                if index in kept and index not in self.views:
                    self.views[index] = image.clone()  # without the rest of its batch
            yield images, labels

    def recall(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """A batch of views that were kept, and its labels."""
        indices = batch[:, 0]
        return torch.stack([self.views[index] for index in indices.tolist()]), self.labels[indices]


class Features(NamedTuple):
    """What the backbone makes of every image, in a reader's place."""

    table: Tensor  # (N, D)
    labels: Tensor
    compute: Compute

    def read(self, batches: Sequence[Tensor], title: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (B, D) and labels (B,) of `batches`, behind a progress bar."""
        for batch in show_progress(batches, title, self.compute):
            yield self.table[batch[:, 0]], self.labels[batch[:, 0]]


Source = Reader | Features


def show_progress(batches: Sequence[Tensor], title: str, compute: Compute) -> Iterable[Tensor]:
    """`batches` behind a progress bar, where stderr is a terminal: that of process 0 alone."""
    hidden = compute.rank > 0 or None  # None: unless it is a terminal
    return tqdm(batches, title, unit=" batches", leave=False, disable=hidden)


def evaluated_again(given: Given) -> set[int]:
    """The images that this process evaluates after each epoch, if there is room for their views."""
    args, rank, world_size = given.args, given.compute.rank, given.compute.world_size
    parts = [each[rank::world_size] for each in (given.data.val, pick_searched(given.data))]
    images = set(torch.cat(parts).tolist())
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows does not tell
        memory = 2 * MOST_KEPT
    room = min(memory // 4, MOST_KEPT) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    fits = 3 * eval_size(args.image_size) ** 2 * len(images) <= room
    return images if fits and (args.frozen_epochs or 0) < args.epochs else set()


class RandomResizedCrop(v2.RandomResizedCrop):
    """torchvision's, to the same pixels in less time.

    Decoded images have their channels last, but torch does not notice that of a crop with three
    dimensions, which is only a view: it rearranges all pixels before it resizes them, and again
    afterwards.
    """

    def forward(self, image: Tensor) -> Tensor:
        """A random part of the image, resized."""
        crop = v2.functional.crop(image, **self.make_params([image]))
        rows = crop.permute(1, 2, 0)[None]  # a batch whose strides say that channels are last
        batch = rows.permute(0, 3, 1, 2)
        return F.interpolate(batch, self.size, mode="bilinear", antialias=True)[0]


def transforms(args: Namespace) -> tuple[nn.Module, nn.Module]:
    """For training a random crop, at random mirrored; for evaluation the central square, larger."""
    size, larger = args.image_size, eval_size(args.image_size)
    crop = RandomResizedCrop(size, (args.crop_scale, 1.0))
    train = v2.Compose([crop, v2.RandomHorizontalFlip(0.0 if args.no_flip else 0.5)])
    return train, v2.Compose([v2.Resize(larger), v2.CenterCrop(larger)])


def least_side(args: Namespace) -> int:
    """The pixels a side of an image whose smallest crop is not enlarged; evaluation takes fewer.

    A crop shows `--crop-scale` of the area at least, in proportions up to 3 : 4.
    """
    return math.ceil(args.image_size * math.sqrt(4 / 3 / args.crop_scale))


def eval_size(size: int) -> int:
    """The side of the images that are evaluated, for training crops of `size`: 256 for 224.

    A last feature map with a part of a cell more, 3 x 3 for 2 x 2, can ruin a small network.
    """
    return max(size, int(EVAL_SCALE * size) // STRIDE * STRIDE)


# -------------------------------------------------------------------------------- sampling


def sample_weights(labels: Tensor, power: float) -> Tensor:
    """A weight for each image, 1 / (images of its class) ** power: (N,) float64."""
    return torch.bincount(labels).double()[labels] ** -power


def is_weighted(rebalance: str, epoch: int, epochs: range) -> bool:
    """Whether `epoch`, one of a phase's `epochs`, draws by weight."""
    if rebalance == "late":  # the last quarter of them (Cao et al. 2019, arXiv:1906.07413)
        return epoch in epochs[-math.ceil(len(epochs) / 4) :]
    return rebalance == "sampler"


def seeded(purpose: str, seed: int, epoch: int) -> torch.Generator:
    """A random stream for this purpose, seed and epoch alone."""
    return torch.Generator().manual_seed(random.Random(f"{purpose}/{seed}/{epoch}").getrandbits(63))


def draw_images(weights: Tensor, weighted: bool, generator: torch.Generator) -> Tensor:
    """N random places in N `weights`, by weight with replacement or else each once: (N,) int64."""
    if not weighted:
        return torch.randperm(len(weights), generator=generator)
    sampler = WeightedRandomSampler(weights.tolist(), len(weights), generator=generator)
    return torch.tensor(list(sampler))


def draw_epoch(given: Given, phase: Phase, epoch: int) -> Tensor:
    """The indices of the training images that an epoch draws, int64."""
    args, train = given.args, given.data.train
    weights = sample_weights(given.data.labels[train], args.power)
    weighted = is_weighted(args.rebalance, epoch, phase.epochs)
    stream = seeded("draw", args.seed, epoch)
    drawn = [train[draw_images(weights, weighted, stream)] for _ in range(phase.passes)]
    return torch.cat([train[:0], *drawn])


def count_draws(data: Data, drawn: Tensor) -> dict[str, float]:
    """What a draw of images did: fewest and most of a class, and the part of the images seen."""
    counts = data.counts(drawn)
    return {
        "fewest_draws": int(counts.min()),
        "most_draws": int(counts.max()),
        "distinct_images": len(drawn.unique()) / len(data.train),
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


# ---------------------------------------------------------------------------------- model


def load_weights(args: Namespace) -> tuple[dict[str, Tensor], list[str]]:
    """The state_dict that `--weights` names, and its classes where they are recorded with it.

    So may be its `--arch` and `--image-size`: they are taken from there unless they are given.
    """
    source, content = args.weights, {}
    if os.path.isfile(source):
        content = read_weights(source)
        adopt(args, "arch", content.get("arch"))
        adopt(args, "image_size", content.get("crop_size"))
    args.arch, args.image_size = args.arch or "resnet50", args.image_size or 224
    known = models.list_models(models, include=["resnet*", "resnext*", "wide_resnet*"])
    if args.arch not in known:
        raise DataError(f"--arch {args.arch}: unknown; choose from {', '.join(known)}")
    if content or source == "none":
        return content.get("state_dict", {}), content.get("classes", [])
    named = models.get_model_weights(args.arch)
    if source in named.__members__:
        args.weights = named[source].name  # what DEFAULT means may change
        return download(named[source], args.weights), []
    names = ", ".join(named.__members__)
    raise DataError(f"--weights {source}: no such file; pass one, or {names}, or none")


def read_weights(path: str) -> dict[str, Any]:
    """A checkpoint of this script, or as "state_dict" what else there is in the file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state = content.get("state_dict", content.get("model", content))
        state = {key.removeprefix("module."): value for key, value in state.items()}
        if not state or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("no state_dict in it")
    except OSError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        reason = "more than weights in it" if isinstance(error, UnpicklingError) else "no weights"
        raise DataError(f"--weights {path}: {reason}; torch.save a state_dict there") from None
    return (content if "classes" in content else {}) | {"state_dict": state}


def adopt(args: Namespace, name: str, recorded: Any) -> None:
    """Take the setting from a checkpoint; raises `DataError` if another one is given.

    Another image size is an error only where nothing is trained: it would ruin the result unseen.
    """
    given = getattr(args, name)
    if given is None:
        setattr(args, name, recorded)
    elif recorded not in (None, given) and (name == "arch" or args.epochs == 0):
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


def build_model(
    arch: str, classes: list[str], state: dict[str, Tensor], named: list[str]
) -> tuple[models.ResNet, str]:
    """The network for `classes`, and in words what became of the weights.

    A head in `state` stays if it has the right size and, as far as known, the same classes.
    """
    model = models.get_model(arch, weights=None, num_classes=len(classes))
    nn.init.zeros_(model.fc.weight)
    nn.init.zeros_(model.fc.bias)
    if not state:
        return model, "a new network"
    old = len(state.get("fc.bias", ()))
    keep = old == len(classes) and named in ([], classes)
    backbone = {key: value for key, value in state.items() if not key.startswith("fc.")}
    try:
        model.load_state_dict(state if keep else backbone | model.fc.state_dict(prefix="fc."))
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n\t")[1].split())[:200]
        raise DataError(f"--weights: not of a {arch}: {reason} ...; pass their --arch") from None
    return model, "head kept" if keep else f"head of {old} classes dropped for a new one"


@torch.no_grad()
def rescale(model: models.ResNet) -> None:
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


# ------------------------------------------------------------------------------------ plan


class Recipe(NamedTuple):
    """How a phase trains. Where parts are `kept`, BatchNorm keeps its statistics too."""

    rate: float = 0.0  # of the backbone by AdamW, at its peak, if there is no --backbone-lr
    head_rate: float = 3.0  # times that, of the head
    warm_up: float = 0.1  # part of the steps in which the rates rise
    kept: tuple[str, ...] = ()  # not trained: what has names that begin so
    left_out: float | None = None  # first part of the steps, of the average that is judged
    softened: bool = False  # the head is, after a phase of its own


# A trial that is the warm-up of many epochs would not show what the full rate does. At the peak of
# its rate a network looks worse than it is going to be, and averaged about as if the rate had
# fallen to 0. "gentle" keeps what of a pretrained backbone is general, and two fifths of the time
# of a step; its weights are averaged from the start on (Izmailov et al. 2018, arXiv:1803.05407).
# What goes on after a trial is far from what the weights know, and gains by twice its rate; without
# a trial the mix at the end takes back what "firm" goes too far.
RECIPES = {
    "given": Recipe(),  # nothing is trained
    "head": Recipe(kept=("conv1.", "bn1.", "layer")),  # by SGD, on features, at --lr
    "trial": Recipe(1.5e-4, warm_up=0.0, left_out=0.5, softened=True),
    "firm": Recipe(3e-4, warm_up=0.0, softened=True),
    "gentle": Recipe(2e-5, kept=("conv1.", "bn1.", "layer1.", "layer2."), left_out=0.0),
    "full": Recipe(1e-3, head_rate=1.0),  # from random weights
}
NAMES = {"auto": "firm", "scratch": "full"}  # of recipes, where `--finetune` has another


class Phase(NamedTuple):
    """A stretch of epochs that trains by the recipe of its name."""

    name: str
    epochs: range
    passes: int = 1  # over as many images as there are, an epoch
    steps: int = 0
    cycle: int = 0  # steps in which the learning rate falls: a trial and "firm" share one


def plan(given: Given, shares: Mapping[str, Mapping[float, float]]) -> Iterator[Phase]:
    """The phases of a run in order; `shares` are read when the trial is over, and name the last.

    By default the head has epoch 0: on features it costs a third of an epoch. The trial takes
    `TRIAL_STEPS`, in whole epochs. Where that is more than half of what is left there is none: a
    shorter one says too little, and what is judged is the end.
    """
    args, images = given.args, len(given.data.train)
    steps, name = math.ceil(images / args.batch_size), NAMES.get(args.finetune, args.finetune)
    if not args.epochs:
        yield Phase("given", range(1), passes=0)
        return
    own = args.frozen_epochs is None and args.weights != "none"
    head = range(1) if own else range(1, 1 + (args.frozen_epochs or 0))
    if head:  # few images make few steps an epoch: they are passed over again
        passes = math.ceil(HEAD_STEPS * args.batch_size / (len(head) * images))
        length = len(head) * math.ceil(passes * images / args.batch_size)
        yield Phase("head", head, passes=passes, steps=length, cycle=length)
    rest = range(head.stop, args.epochs + 1)
    tried, cycle = math.ceil(TRIAL_STEPS / steps), len(rest) * steps
    if args.finetune == "auto" and tried <= len(rest) // 2:
        yield Phase("trial", rest[:tried], steps=tried * steps, cycle=cycle)
        rest = rest[tried:]
        if best_share(shares["trial"]) < FIRM_FROM:
            name, cycle = "gentle", len(rest) * steps
    if rest:
        yield Phase(name, rest, steps=len(rest) * steps, cycle=cycle)


# --------------------------------------------------------------------------------- trainer


class Trainer:
    """A network in training and what moves with it. It knows no files, and no epoch's number."""

    def __init__(self, model: models.ResNet, phase: Phase, optimizer: Optimizer, given: Given):
        """A phase at its beginning."""
        recipe, compute = RECIPES[phase.name], given.compute
        self.model, self.phase, self.optimizer = model, phase.name, optimizer
        # `left_out` of 0 counts the weights before the first step too.
        self.skipped = max(1, int(recipe.left_out * phase.steps)) if recipe.left_out else 0
        self.average = None if recipe.left_out is None else copy.deepcopy(model)
        self.start: Any = None  # the network before the first step, where that is compared
        trained = model.fc if phase.name == "head" else model.train(not recipe.kept)
        self.network = wrap_ddp(trained, given)
        groups = optimizer.param_groups
        self.weights = [weight for group in groups for weight in group["params"]]
        peaks = [group["lr"] for group in groups]
        # OneCycleLR divides by zero where either part of the cycle has a single step.
        steps = max(4, phase.cycle)
        rising = max(recipe.warm_up, 2 / steps)
        self.scheduler = OneCycleLR(optimizer, peaks, steps, pct_start=rising, cycle_momentum=False)
        scaled = compute.amp is torch.float16
        self.scaler = torch.amp.GradScaler(compute.device.type, enabled=scaled)

    @property
    def result(self) -> models.ResNet:
        """The whole network as it is judged and saved."""
        return self.average or self.model

    @property
    def evaluated(self) -> nn.Module:
        """What of it is measured: the head alone takes features."""
        return self.model.fc if self.phase == "head" else self.result

    def rate(self) -> float:
        """The learning rate of the next step, NaN where nothing is trained."""
        return float(self.scheduler.get_last_lr()[-1]) if self.phase != "given" else math.nan

    def step(self, loss: Tensor) -> None:
        """Take a step against the gradient of `loss`."""
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if self.phase != "head":  # the head alone is a convex problem
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.weights, CLIP_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        if self.average:
            # torch's `AveragedModel` would ask the device how many steps it has averaged.
            both = list(self.average.parameters()), list(self.network.parameters())
            average_weights(*both, max(0, self.scheduler.last_epoch - self.skipped))

    def go_on(self, phase: Phase) -> None:
        """Go on from a trial, in the middle of its cycle, at the rate of `phase`."""
        factor = RECIPES[phase.name].rate / RECIPES[self.phase].rate
        for group in self.optimizer.param_groups:  # where the scheduler looks up its cycle
            for rate in ("lr", "initial_lr", "max_lr", "min_lr"):
                group[rate] *= factor
        self.phase, self.average, self.start = phase.name, None, None

    def parts(self) -> dict[str, Any]:
        """What changes from step to step, and the start."""
        names = ("start", "average", "optimizer", "scheduler", "scaler")
        return {name: part for name in names if (part := getattr(self, name))}

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on as if nothing had happened."""
        return {name: part.state_dict() for name, part in self.parts().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was stored in this phase."""
        for name, part in self.parts().items():
            if state.get(name):  # a scaler that was not needed has none, and one that is refuses it
                part.load_state_dict(state[name])
        for weight, kept in self.optimizer.state.items():
            for name, value in kept.items():  # kernels read both as they lie, maybe elsewhere now
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    kept[name] = torch.empty_like(weight).copy_(value)


def wrap_ddp(network: nn.Module, given: Given) -> nn.Module:
    """`network` itself, or with its gradients averaged over the processes after each step."""
    compute = given.compute
    if compute.world_size == 1:
        return network
    few = given.args.batch_size // compute.world_size < SYNCHRONISED
    if few and compute.device.type != "cpu":  # PyTorch has no synchronised BatchNorm for CPUs
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    # The statistics of BatchNorm matter in evaluation alone, which sends them round. The option has
    # another name from torch 2.13 on, which torch 2.6 does not know.
    warnings.filterwarnings("ignore", ".broadcast_buffers. is deprecated", FutureWarning)
    return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)


def head_optimizer(model: models.ResNet, lengths: Tensor, lr: float) -> Optimizer:
    """SGD for the head alone, on features of these lengths.

    How far a step may go hangs on the length of the features; `lr` is for that of a ResNet-18.
    """
    square = max(lengths.square().mean().item() / 512, 1e-12)
    groups = [
        {"params": [model.fc.weight], "lr": lr / square, "weight_decay": HEAD_DECAY * square},
        {"params": [model.fc.bias], "lr": lr, "weight_decay": HEAD_DECAY},
    ]
    return torch.optim.SGD(groups, momentum=0.9, fused=True)


def whole_optimizer(model: models.ResNet, name: str, args: Namespace) -> Optimizer:
    """AdamW for what the recipe of this name trains; gradients are asked for that alone."""
    recipe, rate = RECIPES[name], args.backbone_lr
    if args.finetune == "auto":
        rate *= recipe.rate / RECIPES["firm"].rate
    backbone = []
    for key, weight in model.named_parameters():
        weight.requires_grad = not key.startswith(recipe.kept)
        if weight.requires_grad and not key.startswith("fc."):
            backbone.append(weight)
    head = {"params": list(model.fc.parameters()), "lr": rate * recipe.head_rate}
    rest = {"params": backbone, "lr": rate, "weight_decay": 0.0}
    return torch.optim.AdamW([head, rest], weight_decay=HEAD_DECAY, fused=True)


# ------------------------------------------------------------------------------- training


def begin_phase(given: Given, progress: Progress, phase: Phase, reader: Reader) -> Source:
    """Set up `progress.trainer` for a phase, or take up what was stored; where its inputs are.

    "firm" goes on with the trial's trainer, whose cycle it finishes.
    """
    args, model = given.args, progress.model
    before = progress.history[-1]["phase"] if progress.history else ""
    if (before, phase.name) == ("trial", "firm"):
        if not progress.trainer:  # the run was stopped between the two
            begin_phase(given, progress, phase._replace(name="trial"), reader)
        progress.trainer.go_on(phase)
        return reader
    source: Source = reader
    if phase.name == "head":
        table = extract_features(given, model, reader)
        source = Features(table, given.data.labels, given.compute)
        lengths = torch.linalg.vector_norm(table, dim=1)[given.data.train]
        optimizer = head_optimizer(model, lengths, args.lr)
    else:
        optimizer = whole_optimizer(model, phase.name, args)
    trainer = progress.trainer = Trainer(model, phase, optimizer, given)
    if args.finetune == "auto" and RECIPES[phase.name].softened and not progress.shares:
        trainer.start = copy.deepcopy(model)
    if before == phase.name:
        trainer.load_state_dict(progress.stored)
    elif before == "head" and RECIPES[phase.name].softened:
        # A confident head holds the backbone to the old features, a new one pulls it anywhere. With
        # a tenth of its logits it ended higher: dogs 76.5 % (75.1 zeroed, 74.8 as it was), textures
        # 81.1 (79.6, 77.7), MRI scans 95.5 (95.7, 94.5). ResNet-18, 112 pixels, 3e-4, one seed.
        for weight in model.fc.parameters():
            weight.data.mul_(SOFTENED)
    progress.stored = {}
    return source


@torch.no_grad()
def extract_features(given: Given, model: models.ResNet, reader: Reader) -> Tensor:
    """What the backbone makes of each image, BatchNorm as in evaluation: (N, D) float32."""
    compute = given.compute
    ours = torch.arange(compute.rank, len(given.data.labels), compute.world_size)
    batches = cut_batches(ours, math.ceil(given.args.batch_size / compute.world_size))
    backbone = copy.deepcopy(model).eval()
    backbone.fc = nn.Identity()
    backbone = fuse(backbone, inplace=True)  # BatchNorm becomes a part of the convolutions
    shape = len(ours), model.fc.in_features
    pinned = compute.device.type == "cuda" and math.prod(shape) < MOST_PINNED
    features = torch.empty(shape, pin_memory=pinned)
    views = reader.read(batches, "features")
    with compute.autocast():
        for rows, (inputs, _) in zip(features.split([*map(len, batches)]), views, strict=True):
            outputs = backbone(to_input(inputs, compute.device)).float()
            rows.copy_(outputs, non_blocking=pinned)
    if pinned:
        torch.cuda.synchronize()  # until all rows are there
    return gather(features, compute)


def train_epoch(given: Given, trainer: Trainer, batches: Sequence[Tensor], source: Source) -> float:
    """Train on `batches`, of which each process takes its part; the loss averaged over images."""
    data, compute = given.data, given.compute
    # Balanced softmax: with the log share added in training, logits learn the posterior of balanced
    # classes (Ren et al. 2020, arXiv:2007.10740; Menon et al. 2021, arXiv:2007.07314).
    prior = torch.zeros(len(data.classes))
    if given.args.rebalance == "loss":
        prior = data.log_share()
    prior, total = prior.to(compute.device), torch.zeros((), device=compute.device)
    ours = [batch[compute.rank :: compute.world_size] for batch in batches]
    loaded = source.read(ours, f"training, {trainer.phase}")
    for batch, (inputs, targets) in zip(batches, loaded, strict=True):
        targets = to_device(targets, compute.device)
        with compute.autocast():
            logits = trainer.network(to_input(inputs, compute.device))
        loss = F.cross_entropy(logits.float() + prior, targets)
        # Gradients are averaged over processes, whose parts of a batch may differ by one image.
        trainer.step(loss * (len(targets) * compute.world_size / len(batch)))
        total += loss.detach() * len(targets)
    if dist.is_initialized():
        dist.all_reduce(total)
    if not total.isfinite():
        rate = "--lr" if trainer.phase == "head" else "--backbone-lr"
        raise DataError(f"{rate}: the loss became {total.item()}; try a tenth of the learning rate")
    return total.item() / sum(map(len, batches)) if batches else math.nan


# ----------------------------------------------------------------------------- evaluation


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
    """What a network says of M images of C classes, in their order; calibrated, if not said."""

    loss: float  # averaged over images
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


def evaluate(
    given: Given, network: nn.Module, source: Source, places: Tensor, title: str = "validation"
) -> Evaluation:
    """What `network` says of the images at `places`, of which each process takes its part."""
    compute = given.compute
    ours = places[compute.rank :: compute.world_size]
    batches = source.read(cut_batches(ours, given.args.batch_size), title)
    logits, targets = predict(network, batches, compute)
    return assess(logits, targets, given.data.log_share(), given.calibrated())


@torch.no_grad()
def predict(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], compute: Compute
) -> tuple[Tensor, Tensor]:
    """Logits (M, C), of the type that `network` gives, and targets (M,) int64 of all processes.

    Raises `DataError` where they are NaN.
    """
    share_statistics(network)
    faster = fuse(copy.deepcopy(network).eval(), inplace=True)
    outputs = []
    for inputs, targets in batches:
        with compute.autocast():
            outputs.append((faster(to_input(inputs, compute.device)), targets))
    columns = ([each.cpu() for each in column] for column in zip(*outputs, strict=True))
    logits, targets = (gather(torch.cat(column), compute) for column in columns)
    if logits.isnan().any():
        raise DataError("the network's outputs are no numbers; take other weights or lower rates")
    return logits.clamp(-HIGHEST, HIGHEST), targets  # float16 overflows


def share_statistics(network: nn.Module) -> None:
    """Give all processes the statistics that BatchNorm has in the first; each gathers its own."""
    if dist.is_initialized():
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)


def assess(logits: Tensor, targets: Tensor, log_share: Tensor, calibrated: bool) -> Evaluation:
    """What (M, C) logits say; each half of the images is calibrated by what fits the other half."""
    half, numbers = pick_half(targets), torch.tensor([Calibration()] * 3)
    if calibrated:
        parts = half, ~half, slice(None)
        fits = [fit_calibration(logits[part], targets[part], log_share) for part in parts]
        numbers = torch.tensor(fits)
    if dist.is_initialized():  # another processor may round otherwise, and choose otherwise
        dist.broadcast(numbers, 0)
    answers = defaultdict(list)
    for rows in torch.arange(len(targets)).split(BLOCK):
        scale, shift = numbers[half[rows].long()].T[..., None]
        trained = logits[rows].float()
        adjusted = scale * trained - shift * log_share
        losses = F.cross_entropy(adjusted, targets[rows], reduction="none")
        trained_probability, as_trained = trained.softmax(1).max(1)
        probability, predicted = adjusted.softmax(1).max(1)
        answers["losses"].append(losses)
        answers["true_probability"].append((-losses).exp())
        answers["as_trained"].append(as_trained)
        answers["trained_probability"].append(trained_probability)
        answers["predicted"].append(predicted)
        answers["probability"].append(probability)
        answers["natural"].append((adjusted + log_share).argmax(1))
    whole = {name: torch.cat(parts) for name, parts in answers.items()}
    return Evaluation(
        loss=whole.pop("losses").mean().item(),
        targets=targets,
        confusion=confusion_matrix(targets, whole["predicted"], len(log_share)),
        calibration=Calibration(*numbers[2].tolist()),
        **whole,
    )


def pick_half(targets: Tensor) -> Tensor:
    """Which of M images are in the first half, at random, of every class half: (M,) bool."""
    order = torch.randperm(len(targets), generator=seeded("half", 0, 0))
    order = order[targets[order].argsort(stable=True)]
    half = torch.zeros(len(targets), dtype=torch.bool)
    half[order[::2]] = True
    return half


def fit_calibration(logits: Tensor, targets: Tensor, log_share: Tensor) -> Calibration:
    """The numbers that suit (M, C) logits best; no shift where it would lower the mean recall.

    Cross entropy may gain by a shift that costs right answers, where what rare classes lack does
    not follow their share.
    """
    if not len(targets):
        return Calibration()
    few = pick_evenly(targets, MOST_FITTED // len(log_share))
    logits, targets, log_share = logits[few].double(), targets[few], log_share.double()
    weights = 1 / torch.bincount(targets)[targets].double()
    weights /= weights.sum()
    scale, shift = minimise_cross_entropy(logits, targets, weights, log_share)
    right = [each.argmax(1) == targets for each in (logits, scale * logits - shift * log_share)]
    before, after = (weights @ each.double() for each in right)
    if after < before:
        scale, shift = minimise_cross_entropy(logits, targets, weights, 0 * log_share)
    return Calibration(scale, shift)


@torch.enable_grad()
def minimise_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, log_share: Tensor
) -> tuple[float, float]:
    """The scale and the shift with the lowest cross entropy, (M,) `weights` of images given.

    The problem is convex. A prior worth `PRIOR` images holds the numbers near 1 and 0 where there
    is little to go by, or all is right and ever larger logits would be better still. Images with
    weights w that sum to 1 tell as much as 1 / sum(w^2) of equal weight (Kish 1965).
    """
    spread = max(log_share.std(correction=0).item(), LEAST_SPREAD)
    steps = (log_share - log_share.mean()) / spread
    numbers = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([numbers], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        adjusted = numbers[0] * logits - numbers[1] * steps
        losses = F.cross_entropy(adjusted, targets, reduction="none")
        far = (numbers[0] - 1) ** 2 + numbers[1] ** 2
        value = weights @ losses + PRIOR * weights @ weights * far
        value.backward()
        return value

    optimizer.step(loss)
    scale, shift = numbers.tolist()
    # A network worse than chance is not turned round: it knows nothing.
    return max(scale, LEAST_SCALE), shift / spread


def pick_evenly(labels: Tensor, most: int) -> Tensor:
    """About `most` of M places, evenly spread, and all of a class it would miss: (M,) bool."""
    chosen = torch.arange(len(labels)) % math.ceil(len(labels) / most) == 0
    return chosen | ~torch.isin(labels, labels[chosen])


# ------------------------------------------------------------------------------- choosing


def estimate_statistics(
    given: Given, network: nn.Module, batches: Sequence[Tensor], reader: Reader
) -> None:
    """Tell the BatchNorm of averaged weights its statistics, on a part of what they trained on."""
    # Whole batches: a process's part would make other statistics, and another choice.
    loaded = reader.read(batches[:SEEN_ANEW], "statistics")
    with given.compute.autocast():
        update_bn((to_input(images, given.compute.device) for images, _ in loaded), network)
    share_statistics(network)


def choose(given: Given, progress: Progress, reader: Reader) -> Evaluation | None:
    """At the end of a phase, take the best of the way it went; what a trial gained names the next.

    "gentle" begins with the best of the trial, "firm" goes on where the trial has come to. Returned
    is what the best says of the validation images, if the search has looked at all of them.
    """
    trainer = progress.trainer
    heads = [row["balanced_accuracy"] for row in progress.history if row["phase"] == "head"]
    found, last = search_shares(given, trainer, reader, heads[-1] if heads else math.nan)
    progress.shares[trainer.phase] = found
    if trainer.phase == "trial" and best_share(found) < FIRM_FROM:
        progress.model.load_state_dict(trainer.result.state_dict())
    return last if last and len(last.targets) == len(given.data.val) else None


def search_shares(
    given: Given, trainer: Trainer, reader: Reader, head: float
) -> tuple[dict[float, float], Evaluation | None]:
    """Balanced accuracy after parts of the way from the phase's start to its end: all, none, 3/4...

    The result becomes the best of them (Wortsman et al. 2022, arXiv:2109.01903). On images like
    those that the weights know, the end has lost what a part of the way keeps; on others it has
    not. Each takes an evaluation, so the search ends where it gets worse. The start is the `head`
    alone: where all validation images are looked at, what it had of them is known. Returned with
    the numbers is what the best says of the images looked at, if it was looked at.
    """
    model, few = trainer.result, pick_searched(given.data)
    one, two = trainer.start.state_dict(), copy.deepcopy(model.state_dict())

    def go(share: float) -> None:
        parts = {key: torch.lerp(one[key].float(), two[key].float(), share) for key in two}
        model.load_state_dict(parts)

    said = {}

    def look(share: float) -> float:
        go(share)
        said[share] = evaluate(given, model, reader, few, f"choosing, {share:.0%}")
        return said[share].recall.nanmean().item()

    known = len(few) == len(given.data.val) and not math.isnan(head)
    found = {1.0: look(1.0), 0.0: head if known else look(0.0)}
    for share in (0.75, 0.5, 0.25):
        found[share] = look(share)
        if found[share] < found[share + 0.25]:
            break
    go(best_share(found))
    return found, said.get(best_share(found))


def pick_searched(data: Data) -> Tensor:
    """The validation images to choose by: about `SEARCHED`, evenly spread, of every class some."""
    return data.val[pick_evenly(data.labels[data.val], SEARCHED)]


def best_share(found: Mapping[float, float]) -> float:
    """The share of the way with the highest balanced accuracy, the first of equals."""
    return max(found, key=found.__getitem__)


# ------------------------------------------------------------------------------- measures


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


def wilson_interval(right: Tensor, val_counts: Tensor) -> tuple[Tensor, Tensor]:
    """Ends of the 95 % interval for the part that is right, NaN if none (Wilson 1927)."""
    part, extra = right / val_counts, Z**2 / val_counts
    centre = (part + extra / 2) / (1 + extra)
    half = (extra * (part * (1 - part) + extra / 4)).sqrt() / (1 + extra)
    return centre - half, centre + half


def measure(confusion: Tensor, train_counts: Tensor) -> dict[str, float]:
    """The measures of a confusion matrix, half the 95 % interval of balanced accuracy, macro F1."""
    recall, val_counts = recall_by_class(confusion), confusion.sum(1)
    weights = measure_weights(val_counts, train_counts)
    values = (weights @ recall.nan_to_num()).tolist()
    half = half_widths(recall_variance(recall, val_counts), weights)[1].item()
    f1 = f1_by_class(confusion).nanmean().item()
    return dict(zip(MEASURES, values, strict=True)) | {"half_width": half, "macro_f1": f1}


def measure_all(last: Evaluation, train_counts: Tensor) -> dict[str, float]:
    """What the history holds of an evaluation: its measures, those as trained, its calibration."""
    classes = len(train_counts)
    trained = measure(confusion_matrix(last.targets, last.as_trained, classes), train_counts)
    return {
        **measure(last.confusion, train_counts),
        **{f"as_trained_{name}": trained[name] for name in MEASURES},
        "natural_accuracy": natural_accuracy(last, train_counts),
        "calibration_error": calibration_error(last.targets, last.predicted, last.probability),
        "as_trained_calibration_error": calibration_error(
            last.targets, last.as_trained, last.trained_probability
        ),
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


def calibration_error(targets: Tensor, predicted: Tensor, probability: Tensor) -> float:
    """The gap between probability and being right in `BINS` bins, each class counting the same.

    The expected calibration error of Guo et al. 2017 (arXiv:1706.04599).
    """
    weights = 1 / torch.bincount(targets)[targets].double()
    gaps = weights / weights.sum() * (probability - (predicted == targets).float())
    bins = (probability * BINS).long().clamp(max=BINS - 1)
    return torch.bincount(bins, gaps, BINS).abs().sum().item()


def recall_variance(recall: Tensor, val_counts: Tensor) -> Tensor:
    """The variance of each class's recall, for other images of the kind: (C,) float64.

    r (1 - r) / (n - 1), unbiased (Cochran 1977, Sampling Techniques, 3.2). That of one image is
    not known: 1/4, the most. Where all n are right, or none, 0 would claim to be sure: there it is
    that of the posterior Beta(nr + 1/2, n - nr + 1/2), by Jeffreys' prior.
    """
    posterior = (recall * val_counts + 0.5) / (val_counts + 1)
    alike = posterior * (1 - posterior) / (val_counts + 2)
    mixed = recall * (1 - recall) / (val_counts - 1)
    variance = torch.where((recall == 0) | (recall == 1), alike, mixed)
    return torch.where(val_counts == 1, 0.25, variance)


def half_widths(variance: Tensor, weights: Tensor) -> Tensor:
    """Half the 95 % interval of each measure: (5,) float64, NaN for an empty group.

    Z * sqrt(sum of weight^2 * variance), for classes drawn apart from each other (Cochran 1977,
    5.6): `variance` (C,) is that of a class's mean, `weights` (5, C) what it counts in a measure.
    """
    return Z * (weights**2 @ variance.nan_to_num()).sqrt()


def compare(
    targets: Tensor, before: Tensor, after: Tensor, train_counts: Tensor
) -> dict[str, list[Any]]:
    """What changed between two runs on the same images, by what they predicted: (M,) int64 each.

    Columns by name with a row for each of `MEASURES`: fractions before and after, their difference
    and the ends of its interval. Within a class an image is lost, as it was or won: -1, 0 or 1. A
    measure's difference is the weighted sum of the classes' means, whose variance is (mean of
    squares - mean^2) / (n - 1), and of one image its square.
    """
    classes = len(train_counts)
    old, new = (confusion_matrix(targets, each, classes) for each in (before, after))
    val_counts = new.sum(1)
    outcome = (after == targets).double() - (before == targets).double()
    mean = torch.bincount(targets, outcome, classes) / val_counts
    square = torch.bincount(targets, outcome**2, classes) / val_counts
    variance = torch.where(val_counts == 1, square, (square - mean**2) / (val_counts - 1))
    weights = measure_weights(val_counts, train_counts)
    one, two = (weights @ recall_by_class(each).nan_to_num() for each in (old, new))
    gain, half = two - one, half_widths(variance, weights)
    return {
        "measure": [*MEASURES],
        "before": one.tolist(),
        "after": two.tolist(),
        "difference": gain.tolist(),
        "low": (gain - half).tolist(),
        "high": (gain + half).tolist(),
    }


# -------------------------------------------------------------------------------- records


def write_split(given: Given) -> None:
    """Write which image is in which part, so that a run that goes on need not split again."""
    data = given.data
    columns = {
        "path": data.names,
        "class": [data.classes[label] for label in data.labels.tolist()],
        "part": data.parts,
        "bytes": map(os.path.getsize, data.paths),
    }
    write_table(given.args.output / "split.csv", columns)


def load_split(args: Namespace, copies: int, unreadable: list[str]) -> Data:
    """The images of a run that goes on; raises `DataError` for one that is gone or has changed."""
    folders = {"train": args.out, "val": args.val or args.out, "source": args.source}
    rows, labels = list[Row](), dict[str, int]()
    for row in read_table(args.output / "split.csv", "path", "part", "bytes"):
        try:
            path, size = os.path.join(folders[row["part"]], row["path"]), int(row["bytes"])
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{args.output / 'split.csv'}: damaged; start a new run") from None
        there = os.path.isfile(path)
        if not there or os.path.getsize(path) != size:
            what = "changed" if there else "gone"
            raise DataError(f"{path}: {what} since the run began; put it back, or start a new run")
        label = labels.setdefault(row["path"].partition("/")[0], len(labels))
        rows.append(Row(path=path, name=row["path"], label=label, part=row["part"]))
    return make_data(args, list(labels), rows, copies, unreadable)


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
    except DataError as error:
        raise DataError(f"--baseline: {error}; name an earlier run") from None
    try:
        theirs = {(row["path"], row["class"]): labels[row["predicted"]] for row in rows}
    except KeyError as error:
        raise DataError(f"--baseline {run}: not of these classes: {error}") from None
    ours = [(data.names[index], data.classes[data.labels[index]]) for index in data.val.tolist()]
    if other := sorted(theirs.keys() ^ ours):
        there = sum(each in theirs for each in other)
        raise DataError(
            f"--baseline {run}: validated on other images: {there} only there and "
            f"{len(other) - there} only here, {other[0][0]} for one; give both runs the same DATA, "
            "--source, --val, --split, --val-fraction and --seed"
        )
    return torch.tensor([theirs[each] for each in ours])


def write_file(path: Path, save: Callable[[io.BytesIO], Any]) -> None:
    """Write or replace the file as a whole: a reader sees the old one or what `save` makes."""
    content = io.BytesIO()  # of a disk that is full `torch.save` would not say that it is
    save(content)
    unfinished = path.with_name(f".{path.name}.partial")  # on the same file system
    try:
        with open(unfinished, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        put(unfinished, path)
    except OSError as error:
        text = f"{error.strerror}; what was written before is whole: make room, then --resume"
        raise DataError(f"{path}: {text}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def put(unfinished: Path, path: Path) -> None:
    """Replace `path`, on Windows once no program has it open; what stays open stays as it was.

    Raises `DataError` for what a run cannot go on without.
    """
    for pause in (0.2, 0.5, 1.0, 2.0, 0.0):  # seconds
        try:
            unfinished.replace(path)
            return
        except PermissionError:
            time.sleep(pause)
    if path.suffix == ".pt" or not path.exists():
        raise DataError(f"{path}: may not be replaced; close what has it open, then --resume")
    warn_once(f"{path}: may not be replaced and stays as it was; close what has it open")


@cache
def warn_once(text: str) -> None:
    """Print a warning, the first time alone."""
    print(f"warning: {printable(text)}", file=sys.stderr)


def write_table(path: Path, columns: Mapping[str, Any]) -> None:
    """Write a CSV file of columns by name, tensors or others; numbers with six digits."""
    lines: list[str] = []
    writer = csv.writer(SimpleNamespace(write=lines.append))
    writer.writerow(columns)
    plain = (each.tolist() if isinstance(each, Tensor) else each for each in columns.values())
    rows = zip(*plain, strict=True)
    writer.writerows([f"{x:.6g}" if isinstance(x, float) else x for x in row] for row in rows)
    # With its own line ends the writer quotes a lone carriage return, which "\n" would leave bare.
    text = "".join(line.removesuffix("\r\n") + "\n" for line in lines)
    write_file(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def write_tables(given: Given, progress: Progress, last: Evaluation) -> None:
    """Write the tables of a run; recall and predictions are the last epoch's."""
    data, output, history = given.data, given.args.output, progress.history
    write_table(output / "history.csv", {key: [row[key] for row in history] for key in history[0]})
    predictions = {
        "path": [data.names[index] for index in data.val.tolist()],
        "class": [data.classes[label] for label in last.targets.tolist()],
        "predicted": [data.classes[label] for label in last.predicted.tolist()],
        "probability": last.probability,
        "true_probability": last.true_probability,
    }
    write_table(output / "predictions.csv", predictions)
    low, high = wilson_interval(last.confusion.diag(), last.val_counts)
    classes = {
        "class": data.classes,
        "train_images": data.counts(data.train),
        "val_images": last.val_counts,
        "draws": progress.draws,
        "recall": last.recall,
        "low": low,
        "high": high,
        "precision": recall_by_class(last.confusion.T),  # NaN for a class never predicted
        "f1": f1_by_class(last.confusion),
    }
    write_table(output / "classes.csv", classes)
    if given.baseline is not None:
        write_table(output / "comparison.csv", compare_to_baseline(given, last))


def compare_to_baseline(given: Given, last: Evaluation) -> dict[str, list[Any]]:
    """What changed from the last epoch of the run `--baseline`, which there is, to this one."""
    assert given.baseline is not None
    train_counts = given.data.counts(given.data.train)
    return compare(last.targets, given.baseline, last.predicted, train_counts)


def pack_model(given: Given, progress: Progress, calibration: Calibration) -> dict[str, Any]:
    """All that it takes to use the network, copied from the device; its head is calibrated."""
    args, data, network = given.args, given.data, progress.trainer.result
    state = {key: value.to("cpu", copy=True) for key, value in network.state_dict().items()}
    state["fc.weight"] *= calibration.scale
    state["fc.bias"] *= calibration.scale
    state["fc.bias"] -= calibration.shift * data.log_share()
    return {
        "arch": args.arch,
        "classes": data.classes,
        "train_images": data.counts(data.train).tolist(),
        "weights": args.weights,
        "crop_size": args.image_size,
        "image_size": eval_size(args.image_size),
        "epoch": progress.last_epoch(),
        "state_dict": state,
    }


def save_state(given: Given, progress: Progress) -> None:
    """Write what a run needs to go on."""
    state = {
        "settings": settings(given.args),
        "copies": given.data.copies,
        "unreadable": given.data.unreadable,
        "history": progress.history,
        "draws": progress.draws,
        "shares": progress.shares,
        "model": progress.model.state_dict(),
        "trainer": progress.trainer.state_dict() if progress.trainer else {},
    }
    write_file(given.args.output / STATE, partial(torch.save, state))


def load_state(args: Namespace) -> dict[str, Any]:
    """What the run in `--output` needs to go on; raises `DataError` if the settings are others."""
    try:
        state = torch.load(args.output / STATE, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # a damaged file raises nearly anything
        raise DataError(f"--resume: {args.output / STATE}: damaged; start a new run") from None
    for name in ("arch", "image_size"):  # as the weights had it that may be gone by now
        setattr(args, name, getattr(args, name) or state["settings"][name])
    named = models.get_model_weights(args.arch).__members__
    if args.weights == "DEFAULT" and state["settings"]["weights"] in named:
        args.weights = state["settings"]["weights"]
    old, new = state["settings"], settings(args)
    if other := [name for name in old if new.get(name) != old[name]]:
        flags = [f"--{name.replace('_', '-')} {old[name]} (not {new.get(name)})" for name in other]
        hint = "; the learning rates depend on --epochs" if "epochs" in " ".join(other) else ""
        raise DataError(f"--resume: the run was started with {', '.join(flags)}{hint}")
    return state


def settings(args: Namespace) -> dict[str, Any]:
    """The settings that decide what comes out of a run."""
    kept = {name: value for name, value in vars(args).items() if name not in MAY_DIFFER}
    return kept | {name: vars(args)[name] is not None for name in OPTIONAL}


def write_config(given: Given, progress: Progress) -> None:
    """Write every setting as used, and what the run is made of."""
    args, data, compute = given.args, given.data, given.compute
    versions = {library.__name__: library.__version__ for library in (torch, torchvision, np, PIL)}
    content = {
        "settings": vars(args),
        "versions": {"python": sys.version.split()[0], **versions},
        "device": compute.name(),
        "processes": compute.world_size,
        "precision": compute.amp or torch.float32,
        "classes": data.classes,
        "train_images": data.counts(data.train).tolist(),
        "val_images": data.counts(data.val).tolist(),
        "val_images_added": data.parts.count("source"),
        "phases": list(dict.fromkeys(row["phase"] for row in progress.history)),
        "validation_balanced_accuracy_by_share": progress.shares,
        "left_out": data.unreadable,
    }
    text = json.dumps(content, indent=1, default=str)  # of paths and of the precision
    write_file(args.output / "config.json", lambda file: file.write(text.encode()))


# -------------------------------------------------------------------------------- reports


def print_start(given: Given, progress: Progress) -> None:
    """Print what is about to happen, and the epochs that were there before."""
    data, args, compute = given.data, given.args, given.compute
    counts = data.counts(data.train)
    print(
        f"{len(data.train)} training images in {len(data.classes)} classes of {counts.max()} to "
        f"{counts.min()}, imbalance ratio {counts.max() / counts.min():.1f}; "
        f"{describe_val(given)}; {len(data.unreadable)} unreadable left out\n"
        f"{args.arch}, {printable(args.weights)}: {given.origin}; {compute.name()}, "
        f"{compute.amp or torch.float32}\n"
    )
    rows = [format_epoch(row, args.epochs) for row in progress.history]
    print(HEADER, *rows, sep="\n", flush=True)


def describe_val(given: Given) -> str:
    """How many validation images there are, and where they are from."""
    args, data = given.args, given.data
    text = f"{data.parts.count('val')} validation images"
    if where := args.val or args.split or (args.source and "DATA"):
        text += f" of {printable(str(where))}"
    if args.source:
        text += f" and {data.parts.count('source')} others of SRC"
    if data.copies:
        text += f" ({data.copies} copies of training images left out)"
    return text


def format_epoch(row: dict[str, Any], epochs: int) -> str:
    """The line of an epoch, as wide as `HEADER`, with the time left if all take as long."""
    numbers = {key: value for key, value in row.items() if isinstance(value, float)}
    cells = {key: "-" if math.isnan(x) else f"{x:.1%}" for key, x in numbers.items()}
    draws = f"{row['fewest_draws']}-{row['most_draws']}"
    balanced = f"{row['balanced_accuracy']:.1%} ±{100 * row['half_width']:.1f}"
    hours, minutes = divmod(round(row["seconds"] * (epochs - row["epoch"]) / 60), 60)
    # The head's first epoch computes the features, and after its last one come slower ones.
    left = "-" if row["phase"] == "head" else f"{hours}h{minutes:02}"
    return (
        f"{row['epoch']:3}/{epochs:<3}  {row['phase']:6}  {row['train_loss']:10.3f}  "
        f"{row['val_loss']:8.3f}  {cells['accuracy']:>8}  {balanced:>11}  "
        f"{cells['as_trained_balanced_accuracy']:>10}  "
        f"{cells['many']:>6}  {cells['medium']:>6}  {cells['few']:>6}  "
        f"{draws:>11}  {cells['distinct_images']:>8}  {row['images_per_second']:8.1f}  {left:>5}"
    )


def best_epoch(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of the epoch with the highest balanced accuracy, the first of several."""
    return max(history, key=lambda row: row["balanced_accuracy"])


def print_end(given: Given, progress: Progress, last: Evaluation | None) -> None:
    """Print what to know after the last epoch; `last` is missing where none was left to train."""
    if last:
        print_summary(given, progress, last)
        if given.baseline is not None:
            print_changes(given, last)
    said = "results" if last else "\nnothing is left to do"
    print(f"{said} in {printable(str(given.args.output))}")


def print_summary(given: Given, progress: Progress, last: Evaluation) -> None:
    """Print the last and the best epoch, the weakest classes, the commonest confusions."""
    row, best = progress.history[-1], best_epoch(progress.history)
    note = "(picked on the validation images, so slightly optimistic)"
    print(f"\nlast epoch {row['epoch']}: balanced accuracy {row['balanced_accuracy']:.1%}")
    if given.calibrated():
        print_calibration(row)
    print(f"best epoch {best['epoch']}: balanced accuracy {best['balanced_accuracy']:.1%} {note}")
    looked = len(pick_searched(given.data))
    for name, found in progress.shares.items():
        tried = ", ".join(f"{value:.1%} at {share:.0%}" for share, value in found.items())
        kept = f"of what phase {name} changed, {best_share(found):.0%} was kept"
        if name == "trial":
            kept += f" and {row['phase']} came next"
        print(f"{kept}, by balanced accuracy on {looked} validation images: {tried}")
    print_classes(given.data, last)
    print(f"measured on {describe_val(given)}")
    if left_out := len(given.data.unreadable):
        print(f"unreadable images, left out and listed in config.json: {left_out}")


def print_classes(data: Data, last: Evaluation) -> None:
    """Print the classes that are recognised least, and which are taken for which most often."""
    recall, val_counts = last.recall, last.val_counts
    names = [printable(name) for name in data.classes]
    known = [label for label in recall.argsort(stable=True).tolist() if val_counts[label]]
    print("lowest recall, last epoch:")
    for label in known[:5]:
        print(f"{recall[label]:8.1%} of {val_counts[label]:4}  {names[label]}")
    wrong = last.confusion - last.confusion.diag().diag()
    print("most frequent confusions, last epoch:")
    for pair in wrong.flatten().topk(min(5, wrong.numel())).indices.tolist():
        true, taken = divmod(pair, len(names))
        if count := wrong[true, taken]:
            print(f"{count:8} of {val_counts[true]:4}  {names[true]} taken for {names[taken]}")


def print_calibration(row: dict[str, Any]) -> None:
    """Print what the calibration of an epoch did."""
    print("measure            as trained  calibrated")
    for name in MEASURES:
        if not math.isnan(row[name]):  # as of an empty group
            label = name.replace("_", " ")
            print(f"{label:17}  {row[f'as_trained_{name}']:10.1%}  {row[name]:10.1%}")
    print(
        f"calibrated: logits times {row['logit_scale']:.2f}, minus {row['logit_shift']:.2f} x "
        "log(class share), what frequent classes are favoured by\n"
        "fitted on validation images, of which each half is judged by what fits the other half\n"
        f"expected calibration error {row['calibration_error']:.1%} "
        f"(as trained: {row['as_trained_calibration_error']:.1%})\n"
        f"with log(class share) added, for classes as frequent as in DATA: "
        f"accuracy {row['natural_accuracy']:.1%}"
    )


def print_changes(given: Given, last: Evaluation) -> None:
    """Print what changed since the baseline; "undecided" where the interval holds 0."""
    where, changes = printable(str(given.args.baseline)), compare_to_baseline(given, last)
    print(f"since {where}, last epochs, in points with a 95 % interval:")
    print("measure            before   after  difference    low    high")
    for name, before, after, *difference in zip(*changes.values(), strict=True):
        if not math.isnan(before):  # as of an empty group
            values = "  ".join(f"{100 * value:+6.1f}" for value in difference)
            undecided = "  undecided" if difference[1] <= 0 <= difference[2] else ""
            label = name.replace("_", " ")
            print(f"{label:17} {before:7.1%} {after:7.1%}      {values}{undecided}")


def write_pictures(given: Given, progress: Progress, last: Evaluation) -> None:
    """Write the charts and, after the last epoch, the worst mistakes: no file where there is none.

    A chart costs little, reading two dozen large photographs may take longer than an epoch.
    """
    args, pictures = given.args, {"curves.png": draw_chart(curve_panels(progress.history))}
    pictures["classes.png"] = draw_chart(class_panels(given, last))
    if progress.last_epoch() == args.epochs and (found := find_mistakes(last)):
        pictures["mistakes.png"] = draw_mistakes(given.data, last, found)
    with contextlib.suppress(PermissionError):  # Windows: it is open
        (args.output / "mistakes.png").unlink(missing_ok=True)
    for name, picture in pictures.items():
        write_file(args.output / name, partial(picture.save, format="PNG"))


class Panel(NamedTuple):
    """A chart with a place for each label: lines, or bars with whiskers."""

    title: str
    labels: list[str]
    series: dict[str, list[list[float]]]  # of each place its value, NaN for a gap, and an interval
    top: float  # what is higher stands on the upper edge
    low: float = 0.0
    phases: dict[str, int] | None = None  # of lines: the place where each begins

    def levels(self) -> list[float]:
        """The numbers beside the axis, which begins at the first."""
        return ticks(self.low, self.top)

    def spot(self, place: float, value: float) -> tuple[float, float]:
        """The pixel of a value, in 1600 x 640."""
        bottom = self.levels()[0]
        part = (min(value, self.top) - bottom) / (self.top - bottom)
        return 130 + 1430 * place / len(self.labels), 440 - 360 * part


def curve_panels(history: list[dict[str, Any]]) -> list[Panel]:
    """The losses and the accuracies by epoch."""
    epochs, names = [str(row["epoch"]) for row in history], [row["phase"] for row in history]
    phases = {name: names.index(name) for name in names}
    column = {key: [[row[key]] for row in history] for key in history[0]}
    losses = {"training": column["train_loss"], "validation": column["val_loss"]}
    right = {"balanced": column["balanced_accuracy"], "plain": column["accuracy"]}
    loss, part = ([x for line in each.values() for [x] in line] for each in (losses, right))
    low, high, top = max(0, min(part) - 0.01), max(part) or 1, robust_top(loss)
    above = sum(value > top for value in loss)
    title = f"loss by epoch (values above the picture: {above})" if above else "loss by epoch"
    return [
        Panel(title, epochs, losses, top=top, phases=phases),
        Panel("accuracy by epoch", epochs, right, top=high, low=low, phases=phases),
    ]


def robust_top(values: list[float]) -> float:
    """The largest value that is at most twice as large as one that nine of ten do not exceed."""
    ordered = sorted(filter(math.isfinite, values))
    usual = [x for x in ordered if x <= 2 * ordered[int(0.9 * (len(ordered) - 1))]]
    return max(usual, default=0) or 1


def class_panels(given: Given, last: Evaluation) -> list[Panel]:
    """Recall over training images, most first: of each class, or of `GROUPS` groups if many."""
    counts = given.data.counts(given.data.train)
    order = counts.argsort(descending=True, stable=True)
    groups, labels = order.split(1), [given.data.classes[label] for label in order]
    title = "recall, most training images first (lines: 95 % intervals)"
    if len(order) > MOST_LABELS:
        groups = order.tensor_split(GROUPS)
        labels = [f"{counts[group[0]]} to {counts[group[-1]]}" for group in groups]
        title = f"mean recall of {len(order)} classes by training images (lines: 95 % intervals)"
    predicted = {"recall": last.predicted}
    if given.baseline is not None:
        name = given.args.baseline.resolve().name
        predicted = {name: given.baseline, "this run": last.predicted}
    recalls = {}
    for name, answers in predicted.items():
        matrix = confusion_matrix(last.targets, answers, len(order))
        recalls[name] = [group_recall(matrix, group) for group in groups]
    images = [[counts[group].double().mean().item()] for group in groups]
    most = counts.max().item()
    return [
        Panel(title, labels, recalls, top=1),
        Panel("training images per class", labels, {"images": images}, top=most),
    ]


def group_recall(confusion: Tensor, group: Tensor) -> list[float]:
    """The mean recall of some classes and the ends of its interval; NaN where none is known."""
    right, val_counts = confusion.diag()[group], confusion.sum(1)[group]
    if len(group) == 1:
        return [
            (right / val_counts).item(),
            *(x.item() for x in wilson_interval(right, val_counts)),
        ]
    recall = recall_by_class(confusion)[group]
    known = val_counts > 0
    weights = known.double()[None] / known.sum()
    half = half_widths(recall_variance(recall, val_counts), weights).item()
    mean = recall.nanmean().item()
    return [mean, max(0.0, mean - half), min(1.0, mean + half)]


def draw_chart(panels: list[Panel]) -> Image.Image:
    """A picture of the panels, one below the other."""
    return Image.fromarray(np.vstack([np.asarray(draw_panel(panel)) for panel in panels]))


def draw_panel(panel: Panel) -> Image.Image:
    """A picture of one panel; labels that do not fit side by side are slanted."""
    chart, font = Image.new("RGB", (1600, 640), "white"), ImageFont.load_default(26)
    draw = ImageDraw.Draw(chart)
    draw.text((20, 24), panel.title, "black", font, "lm")
    for level in panel.levels():
        y = panel.spot(0, level)[1]
        draw.line([130, y, 1560, y], "#dddddd", 2)
        draw.text((115, y), f"{level:g}", "black", font, "rm")
    for name, place in (panel.phases or {}).items():
        x = panel.spot(place, 0)[0]
        draw.line([x, 44, x, 440], "#999999", 2)
        draw.text((x + 10, 54), name, "#777777", font, "lm")
    places = len(panel.labels)
    step = 1 if places <= MOST_LABELS else int(ticks(0, places)[1])  # of many epochs
    labels = {at: printable(panel.labels[at]) for at in range(0, places, step)}
    slanted = max(map(font.getlength, labels.values())) > 1300 / len(labels)
    for place, label in labels.items():
        mask = Image.new("L", (min(210, int(font.getlength(label)) + 2), 34))
        ImageDraw.Draw(mask).text((0, 0), label, "white", font)
        mask = mask.rotate(45 if slanted else 0, Image.Resampling.BICUBIC, expand=True)
        left = panel.spot(place + 0.4, 0)[0] - mask.width * (0.9 if slanted else 0.5)
        chart.paste("black", (int(left), 448), mask)
    draw_series(draw, panel)
    return chart if slanted else chart.crop((0, 0, 1600, 500))


def draw_series(draw: ImageDraw.ImageDraw, panel: Panel) -> None:
    """Draw the lines, or the bars side by side with whiskers, and which colour is which."""
    lines, count = panel.phases is not None, len(panel.series)
    font, colours = ImageFont.load_default(26), (ORANGE, BLUE)[-count:]  # what is new is blue
    for number, (name, places) in enumerate(panel.series.items()):
        label = shorten(printable(name), font, 230)
        draw.text((1560 - 250 * (count - number), 24), label, colours[number], font, "lm")
        half = 0.4 if lines else 0.4 / count  # of the width of a bar, or the place of a dot
        first = half if lines else half * (2 * number + 1)
        known = [(at + first, *each) for at, each in enumerate(places) if not math.isnan(each[0])]
        if lines:
            draw.line([panel.spot(middle, value) for middle, value in known], colours[number], 4)
        for middle, value, *ends in known:
            if lines:
                sides = 3 if value > panel.top else 4  # a triangle points up
                draw.regular_polygon((panel.spot(middle, value), 8), sides, fill=colours[number])
            else:
                corners = panel.spot(middle - half, value), panel.spot(middle + half, 0)
                draw.rectangle(corners, colours[number])
                draw.line([panel.spot(middle, end) for end in ends], "black")


def ticks(low: float, high: float) -> list[float]:
    """Round numbers up to `high` from the last one not over `low`, 1, 2 or 5 times 10^n apart."""
    steps = (digit * 10.0**power for power in range(-6, 39) for digit in (1, 2, 5))
    step = next(step for step in steps if high - low <= 7 * step)
    first, last = (math.floor(end / step + 1e-9) for end in (low, high))
    return [step * number for number in range(first, last + 1)]


def draw_mistakes(data: Data, last: Evaluation, found: list[int]) -> Image.Image:
    """A sheet of the validation images at the places `found`, in the square the network sees."""
    sheet = Image.new("RGB", (1600, 70 + 330 * math.ceil(len(found) / 6)), "white")
    font, view = ImageFont.load_default(22), v2.Compose([v2.Resize(TILE), v2.CenterCrop(TILE)])
    title = "wrong with the most confidence: what it is, and how surely it is taken for what"
    ImageDraw.Draw(sheet).text((20, 36), title, "black", font, "lm")
    for number, at in enumerate(found):
        tile = Image.new("RGB", (TILE, 330), "white")
        tile.paste(v2.functional.to_pil_image(view(read_image(data.paths[data.val[at]]))))
        true, taken = (printable(data.classes[each[at]]) for each in (last.targets, last.predicted))
        draw = ImageDraw.Draw(tile)
        sure = f"{last.probability[at]:.0%} "
        draw.text((0, TILE + 6), shorten(true, font, TILE), "black", font)
        room = TILE - font.getlength(sure)
        draw.text((0, TILE + 36), sure + shorten(taken, font, room), ORANGE, font)
        sheet.paste(tile, (20 + 263 * (number % 6), 70 + 330 * (number // 6)))
    return sheet


def shorten(name: str, font: Any, room: float) -> str:
    """As much of the end of `name` as `room` pixels hold; ImageNet's names begin with numbers."""
    shown = name
    while font.getlength(shown) > room:
        name = name[1:]
        shown = f"...{name}"
    return shown


def find_mistakes(last: Evaluation) -> list[int]:
    """The places of up to `MISTAKES` images that are wrong, most confident first."""
    wrong = (last.predicted != last.targets).nonzero().flatten()
    order = last.probability[wrong].argsort(descending=True, stable=True)
    return wrong[order][:MISTAKES].tolist()


# ----------------------------------------------------------------------- beginning and end


def prepare(args: Namespace, compute: Compute) -> tuple[Given, Progress]:
    """All that is read and built before the first epoch; fills in what `args` leave open."""
    args.device = compute.device.type
    check_settings(args)
    if args.resume:  # all of it is in the run's own folder
        state = load_state(args)
        data = load_split(args, state["copies"], state["unreadable"])
        weights, named = state["model"], data.classes
        state = {name: state[name] for name in ("history", "draws", "shares", "trainer")}
    else:
        weights, named = load_weights(args)
        data = load_data(args)
        draws = torch.zeros(len(data.classes), dtype=torch.int64)
        state = {"history": [], "draws": draws, "shares": {}, "trainer": {}}
    args.workers = count_workers(args)
    baseline = load_baseline(args.baseline, data) if args.baseline else None
    check_batches(args, data, compute.world_size)
    torch.manual_seed(args.seed)
    model, origin = build_model(args.arch, data.classes, weights, named)
    if args.epochs and args.weights != "none" and not args.resume:
        rescale(model)
    given = Given(args=args, data=data, baseline=baseline, origin=origin, compute=compute)
    return given, Progress(model, stored=state.pop("trainer"), **state)


def check_batches(args: Namespace, data: Data, processes: int) -> None:
    """Raise `DataError` where batches cannot be divided, or hold too little for BatchNorm."""
    smallest = len(data.train) // math.ceil(len(data.train) / args.batch_size)
    learns = args.finetune != "gentle" and (args.frozen_epochs or 0) < args.epochs
    text = ""
    if args.batch_size % processes or min(smallest, len(data.val)) < processes:
        text = f"cannot be divided among {processes} processes; take a multiple, or fewer processes"
    elif learns and smallest // processes == 1 and args.image_size <= STRIDE:
        text = f"one image of --image-size {args.image_size} is no batch for BatchNorm; take more"
    if text:
        raise DataError(f"--batch-size {args.batch_size}: {text}")


def start_run(given: Given, progress: Progress) -> None:
    """Make the run folder with the settings in it, and print what is about to happen."""
    output = given.args.output
    output.mkdir(parents=True, exist_ok=True)
    for unfinished in output.glob(".*.partial"):  # of a run that was killed
        unfinished.unlink()
    if not given.args.resume:
        write_split(given)
        save_state(given, progress)
    write_config(given, progress)
    print_start(given, progress)


@dataclass
class Pending:
    """What waits to be written to the run folder."""

    best: dict[str, Any] = field(default_factory=dict)  # the best network, empty once written
    since: float = field(default_factory=time.perf_counter)  # when the files were, last


def report(
    given: Given, progress: Progress, last: Evaluation, pending: Pending, done: bool
) -> None:
    """Print what there is to say after an epoch, and write it if it is time or a phase `done`.

    The state comes last, so that a run goes on from an epoch of which every file is there.
    """
    row, output = progress.history[-1], given.args.output
    print(format_epoch(row, given.args.epochs), flush=True)
    packed = {}
    if row is best_epoch(progress.history):
        packed = pending.best = pack_model(given, progress, last.calibration)
    if not done and time.perf_counter() - pending.since < WRITE_EVERY:
        return
    packed = packed or pack_model(given, progress, last.calibration)
    write_file(output / "last.pt", partial(torch.save, packed))
    if pending.best:
        write_file(output / "best.pt", partial(torch.save, pending.best))
        pending.best = {}
    write_tables(given, progress, last)
    write_pictures(given, progress, last)
    write_config(given, progress)
    save_state(given, progress)
    pending.since = time.perf_counter()


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = parse_args(argv)
    try:
        run(args)
        if dist.is_initialized():  # only now that `run` holds no network that would still use it
            dist.destroy_process_group()
    except RuntimeError as error:  # of a batch, in the feature pass and in evaluation too
        if not any(text in str(error) for text in NO_MEMORY):
            raise
        processes = int(os.environ.get("WORLD_SIZE", 1))
        half = args.batch_size // 2 // processes * processes
        other = f"{half} or a smaller --image-size" if half else "a smaller --image-size"
        message = f"--batch-size {args.batch_size}: out of memory on {args.device}; "
        message += f"try {other}, in a new run"
    except (DataError, OSError) as error:
        message = str(error).rstrip()
        if "Original Traceback" in message:  # from a process that reads images
            message = message.splitlines()[-1].partition(": ")[2]
    except KeyboardInterrupt as error:
        text = "interrupted before the first checkpoint"
        if args.output and (args.output / STATE).exists():
            where = printable(str(args.output))
            text = f"interrupted; go on with the same command and --output {where} --resume"
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"\ndata_training.py: {text}", file=sys.stderr)
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    else:
        return 0
    print(f"data_training.py: error: {printable(message)}", file=sys.stderr)
    return 2


def stop(signum: int, _: Any) -> NoReturn:
    """End as by Ctrl-C."""
    raise KeyboardInterrupt(signum)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main())
