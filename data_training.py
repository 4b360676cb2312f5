"""Fine-tune a pretrained ResNet on an imbalanced image folder, its classes balanced by sampling.

    python data_training.py OUT --epochs N

OUT holds one folder per class. A share of each class is put aside for validation. Training images
are drawn by a `WeightedRandomSampler` with weights 1 / (training images of the class), so that every
class is seen about equally often. First the head is trained alone, on features computed once by the
frozen backbone; then everything, gently, and the weights of that phase are averaged. Each epoch is
evaluated on the untouched validation images and written to a run folder: settings, history, recall by
class, predictions, two checkpoints and two charts.

Exit status: 0 done, 2 bad input (one line on stderr says where and what to do), 130 interrupted.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import platform
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from multiprocessing.pool import ThreadPool
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, NoReturn

import numpy as np
import PIL
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, Sampler, WeightedRandomSampler
from torchvision import models
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2
from tqdm import tqdm

# The statistics that torchvision's ImageNet weights were trained with, for pixels from 0 to 255.
MEAN = [255 * channel for channel in (0.485, 0.456, 0.406)]
STD = [255 * channel for channel in (0.229, 0.224, 0.225)]
# Training crops magnify: smaller crops in training keep the size of things in evaluation
# (FixRes, Touvron et al. 2019, https://arxiv.org/abs/1906.06423; 176 for 224 pixels).
TRAIN_SIZE = 176 / 224
CROP_SCALE = (0.35, 1.0)  # share of the image's area that a training crop covers
# Learning rates of the full phase, as shares of the head's own before it.
HEAD_LR, BACKBONE_LR = 0.1, 0.1
CLIP_NORM = 1.0  # longest gradient that a step may follow; tames BatchNorm with tiny variances
MANY, FEW = 100, 20  # more training images than MANY: "many", fewer than FEW: "few"


class DataError(Exception):
    """Bad input, told in one line: where, what, what to do."""


# ---------------------------------------------------------------------------- command line


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Print `message` on stderr and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {printable(message)}; see --help\n")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The settings on the command line, each in its range; `None` stands for "auto"."""
    parser = OneLineParser(
        prog="data_training.py",
        description="fine-tune a pretrained ResNet on an imbalanced image folder",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="folder that holds a folder per class"
    )
    whole = number(int, lambda n: n >= 0, "a whole number of at least 0")
    some = number(int, lambda n: n >= 1, "a whole number of at least 1")
    share = number(float, lambda x: 0 < x < 1, "a number between 0 and 1")
    smoothing = number(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")
    positive = number(float, lambda x: 0 < x < math.inf, "a number above 0")
    decay = number(float, lambda x: 0 <= x < math.inf, "a number of at least 0")

    add = parser.add_argument_group("data").add_argument
    add("--val-fraction", metavar="F", type=share, default=0.2, help="part kept for validation")
    size_help = "height and width at which images are evaluated, in pixels"
    add("--image-size", metavar="PX", type=some, default=224, help=size_help)
    workers_help = "processes that read images; auto: none on a CPU, else at most 8"
    add("--workers", metavar="N", type=auto_or(whole), default="auto", help=workers_help)
    check_help = "trust the images: do not look for broken files and byte-identical copies first"
    add("--no-check", action="store_true", help=check_help)

    add = parser.add_argument_group("model").add_argument
    add("--arch", metavar="NAME", default="resnet50", help="a ResNet of torchvision")
    weights_help = "a torchvision weights name, a file of weights, or none"
    add("--weights", metavar="NAME|PATH", default="DEFAULT", help=weights_help)

    add = parser.add_argument_group("training").add_argument
    epochs_help = "epochs in all; 0 evaluates the given weights"
    add("--epochs", metavar="N", type=whole, default=10, help=epochs_help)
    frozen_help = "first epochs, head alone; auto: half of all, rounded up, 0 without weights"
    add("--frozen-epochs", metavar="N", type=auto_or(whole), default="auto", help=frozen_help)
    add("--batch-size", metavar="N", type=some, default=64, help="images a step")
    lr_help = "peak learning rate of the head; full fine-tuning goes gentler by fixed factors"
    add("--lr", metavar="X", type=positive, default=0.03, help=lr_help)
    decay_help = "weight decay of the head; the pretrained backbone has none"
    add("--weight-decay", metavar="X", type=decay, default=0.02, help=decay_help)
    smoothing_help = "part of the target spread over all classes"
    add("--label-smoothing", metavar="X", type=smoothing, default=0.1, help=smoothing_help)

    add = parser.add_argument_group("run").add_argument
    output_help = "new folder for the results; auto: runs/DATE-TIME"
    add("--output", metavar="DIR", type=auto_or(Path), default="auto", help=output_help)
    add("--seed", metavar="N", type=int, default=0, help="seed of split, draws and augmentation")
    add("--device", metavar="NAME", default="auto", help="auto: the accelerator, else cpu")
    amp_help = "mixed precision (default: where the hardware gains from it)"
    add("--amp", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=amp_help)
    return parser.parse_args(argv)


def number(kind: type, accepts: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    """A parser of numbers of `kind` that `accepts` takes, for argparse."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


def auto_or(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser that takes "auto" as `None` and leaves the rest to `parse`."""
    return lambda text: None if text == "auto" else parse(text)


def printable(text: str) -> str:
    """`text` on one line, with control characters and undecodable bytes as escapes."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def pick_device(name: str) -> torch.device:
    """The device called `name`, or for "auto" the accelerator where there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DataError(f"--device {name}: no such device; try auto, cpu or cuda") from None
    if device.type == "cpu":
        return device
    count = torch.accelerator.device_count() if accelerator else 0
    if not accelerator or device.type != accelerator.type or (device.index or 0) >= count:
        found = f"{count} of {accelerator.type}" if accelerator else "cpu alone"
        raise DataError(f"--device {name}: not on this machine, which has {found}; try auto")
    return device


def pick_amp(device: torch.device, wanted: bool | None) -> torch.dtype | None:
    """The type of mixed precision, `None` for float32; `wanted` overrides what the hardware says."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        kind = torch.bfloat16 if native else torch.float16
        return kind if wanted in (None, True) else None
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 and later
    gains = device.type == "cpu" and any(map(capabilities.get, ("avx512_bf16", "amx_bf16")))
    return torch.bfloat16 if wanted or (wanted is None and gains) else None


class Compute(NamedTuple):
    """Where and how precisely the network runs."""

    device: torch.device
    amp: torch.dtype | None  # of mixed precision, None for float32

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)


# ------------------------------------------------------------------------------------ data


class Data(NamedTuple):
    """N images of C classes, and which of them are for training and for validation."""

    root: Path
    classes: list[str]
    paths: list[str]
    labels: Tensor  # (N,) int64
    train: Tensor  # indices, int64
    val: Tensor
    broken: list[str]  # paths left out

    def counts(self, part: Tensor) -> Tensor:
        """Images of each class among the indices `part`: (C,) int64."""
        return torch.bincount(self.labels[part], minlength=len(self.classes))


class ClassFolders(ImageFolder):
    """An `ImageFolder` that passes over hidden folders, such as `.ipynb_checkpoints`."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """The sorted names of the class folders, and their indices."""
        names = [name for name in super().find_classes(directory)[0] if name[0] != "."]
        return names, {name: index for index, name in enumerate(names)}


def is_visible_image(path: str) -> bool:
    """Whether `path` is named like an image and not hidden."""
    name = os.path.basename(path)
    return name.lower().endswith(IMG_EXTENSIONS) and name[0] != "."


def load_data(root: Path, check: bool, fraction: float, seed: int) -> Data:
    """The images of `root`, split; unreadable ones are named and left out."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; pass the folder that holds the class folders")
    try:
        folder = ClassFolders(root, is_valid_file=is_visible_image)
    except FileNotFoundError as error:
        raise DataError(f"{root}: {error}; add images or remove the class") from None
    classes, samples = folder.classes, folder.samples
    if len(classes) < 2:
        raise DataError(f"{root}: fewer than two classes; pass the folder that holds the classes")
    digests, problems = [path for path, _ in samples], [""] * len(samples)
    if check:
        with ThreadPool() as pool:
            checks = pool.imap(check_image, digests, chunksize=16)
            bar = tqdm(checks, "checking", len(samples), unit=" images", leave=False)
            digests, problems = map(list, zip(*bar, strict=True))
    broken = [path for (path, _), problem in zip(samples, problems, strict=True) if problem]
    for path, problem in zip(broken, filter(None, problems), strict=True):
        print(f"warning: {printable(f'{path}: {problem}')}; left out", file=sys.stderr)
    sound = [index for index, problem in enumerate(problems) if not problem]
    paths, labels = [samples[i][0] for i in sound], torch.tensor([samples[i][1] for i in sound])
    for name in sorted(set(classes) - {classes[label] for label in set(labels.tolist())}):
        raise DataError(f"{root / name}: no readable image in this class; mend or remove it")
    train, val = split_images(labels, [digests[i] for i in sound], fraction, seed)
    if not len(val):
        raise DataError(f"{root}: no class has two different images; nothing to validate on")
    return Data(root, classes, paths, labels, train, val, broken)


def check_image(path: str) -> tuple[str, str]:
    """The file's SHA-256, and what keeps it from being decoded, "" if nothing does."""
    try:
        content = read_bytes(path)
        with Image.open(io.BytesIO(content)) as image:
            image.draft(
                "RGB", (1, 1)
            )  # JPEGs at an eighth of their size: every byte, a little work
            image.load()
    except Exception as error:  # Pillow's plugins raise nearly anything on a broken file
        return "", str(error) or type(error).__name__
    return hashlib.sha256(content).hexdigest(), ""


def read_bytes(path: str) -> bytes:
    """The content of the regular file `path`; opening a pipe would wait for ever."""
    if not os.path.isfile(path):
        raise OSError(f"{path}: not a regular file")
    return Path(path).read_bytes()


def read_image(path: str) -> Tensor:
    """The image upright and in RGB: (3, height, width) uint8."""
    content = read_bytes(path)
    if content.startswith((b"\xff\xd8", b"\x89PNG")):
        with contextlib.suppress(RuntimeError):  # a rare file that only Pillow reads
            encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            image = decode_image(encoded, ImageReadMode.RGB, apply_exif_orientation=True)
            if image.dtype == torch.uint8:
                return image
    with Image.open(io.BytesIO(content)) as picture:
        upright = ImageOps.exif_transpose(picture)
        if upright.mode.startswith("I"):  # 16 bits: `convert` would clip them to 8, not scale
            upright = Image.fromarray((np.asarray(upright).clip(0, 65535) // 257).astype(np.uint8))
        return v2.functional.pil_to_tensor(upright.convert("RGB"))


def split_images(
    labels: Tensor, digests: Sequence[str], fraction: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Indices for training and for validation, sorted; no file is in both, not even as a copy.

    Of each class, `fraction` goes to validation, but at least one image and never all. Copies stay
    together; an image that stands in several classes is for training alone.
    """
    copies, groups_of = defaultdict(list), defaultdict(list)
    label_of, counts = labels.tolist(), torch.bincount(labels).tolist()
    for index, digest in enumerate(digests):
        copies[digest].append(index)
    for group in copies.values():
        if len({label_of[index] for index in group}) == 1:
            groups_of[label_of[group[0]]].append(group)
    validation: list[int] = []
    for label, groups in groups_of.items():
        room = min(max(1, round(fraction * counts[label])), counts[label] - 1)
        stream = random.Random(f"split/{seed}/{label}")
        for group in sorted(groups, key=lambda _: stream.random()):
            if len(group) <= room:
                validation += group
                room -= len(group)
    is_validation = torch.zeros(len(labels), dtype=torch.bool)
    is_validation[validation] = True
    return (~is_validation).nonzero().flatten(), is_validation.nonzero().flatten()


class Images(Dataset[tuple[Tensor, int]]):
    """Images by (index, seed): the same pair gives the same augmentation in any process."""

    def __init__(self, paths: list[str], labels: Tensor, transform: nn.Module) -> None:
        """Keep the paths; nothing is read yet."""
        self.paths, self.labels, self.transform = paths, labels, transform

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        """The image as (3, size, size) uint8, and its label."""
        index, seed = item
        torch.default_generator.manual_seed(seed)  # what the transforms draw from
        return self.transform(read_image(self.paths[index])), int(self.labels[index])


class Features(Dataset[tuple[Tensor, int]]):
    """Rows of a table of features by (index, seed); they are not augmented."""

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        """Keep (N, D) `features` and (N,) `labels`."""
        self.features, self.labels = features, labels

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        """The features and the label of an image."""
        return self.features[item[0]], int(self.labels[item[0]])


def train_transform(size: int) -> v2.Compose:
    """Random crop and flip, for evaluation at `size` pixels."""
    crop = v2.RandomResizedCrop(round(TRAIN_SIZE * size), CROP_SCALE, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip()])


def eval_transform(size: int) -> v2.Compose:
    """The central square, `size` pixels high and wide."""
    return v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])


# -------------------------------------------------------------------------------- sampling


def sample_weights(labels: Tensor) -> Tensor:
    """A weight for each image, 1 / images of its class: (N,) float64."""
    return 1 / torch.bincount(labels).double()[labels]


def seeded(purpose: str, seed: int, epoch: int) -> torch.Generator:
    """A random stream of its own for each purpose, seed and epoch."""
    return torch.Generator().manual_seed(random.Random(f"{purpose}/{seed}/{epoch}").getrandbits(63))


def draw_images(weights: Tensor, seed: int, epoch: int) -> Tensor:
    """As many draws as there are weights, with replacement: positions, (N,) int64."""
    generator = seeded("draw", seed, epoch)
    return torch.tensor(list(WeightedRandomSampler(weights.tolist(), len(weights), generator=generator)))


class Batches(Sampler[list[tuple[int, int]]]):
    """Cuts `items` into batches of (index, seed) whose sizes differ by one at most.

    A short last batch would count too much, and one of a single image would break BatchNorm.
    """

    def __init__(self, batch_size: int, indices: Tensor) -> None:
        """Start with `indices` in their order, for evaluation: without seeds."""
        self.batch_size, self.indices, self.seeds = batch_size, indices, torch.zeros_like(indices)

    def assign(self, indices: Tensor, generator: torch.Generator) -> None:
        """Take the draws of an epoch, each with a seed for its augmentation."""
        self.indices = indices
        self.seeds = torch.randint(2**62, indices.shape, generator=generator)

    def __len__(self) -> int:
        """The number of batches."""
        return math.ceil(len(self.indices) / self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """The batches in order."""
        parts = (values.tensor_split(len(self)) for values in (self.indices, self.seeds))
        for indices, seeds in zip(*parts, strict=True):
            yield list(zip(indices.tolist(), seeds.tolist(), strict=True))


def make_loader(
    dataset: Dataset, batches: Batches, workers: int, device: torch.device
) -> DataLoader:
    """A loader of `batches`; its workers live as long as it does."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=device.type != "cpu",
        persistent_workers=workers > 0,
    )


# ---------------------------------------------------------------------------------- model


def check_arch(arch: str) -> None:
    """Raise `DataError` unless torchvision has a ResNet of that name."""
    known = models.list_models(include=["resnet*", "resnext*", "wide_resnet*"])
    known = [name for name in known if models.get_model_builder(name).__module__.endswith("resnet")]
    if arch not in known:
        raise DataError(f"--arch {arch}: unknown; choose from {', '.join(known)}")


def load_weights(arch: str, source: str) -> tuple[dict[str, Tensor] | None, list[str]]:
    """The state_dict that `source` names, and the classes of its head where they are recorded."""
    named = models.get_model_weights(arch)
    if source == "none":
        return None, []
    if source in named.__members__:
        return download(named[source], source), []
    if not os.path.isfile(source):
        names = ", ".join(named.__members__)
        raise DataError(
            f"--weights {source}: no such file, and no weights name; take {names}, none"
        )
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        reason = "holds more than weights" if isinstance(error, UnpicklingError) else "damaged"
        raise DataError(
            f"--weights {source}: {reason}; save a state_dict with torch.save"
        ) from None
    content = content if isinstance(content, dict) else {}
    state = next((content[key] for key in ("state_dict", "model") if key in content), content)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"--weights {source}: holds no state_dict; save one with torch.save")
    return {key.removeprefix("module."): value for key, value in state.items()}, content.get(
        "classes", []
    )


def download(weights: models.WeightsEnum, name: str) -> dict[str, Tensor]:
    """The weights from torch's cache folder, filled from their address where needed."""
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        cache = os.path.join(torch.hub.get_dir(), "checkpoints")
        raise DataError(
            f"--weights {name}: {weights.url} could not be fetched ({error}); put that file into "
            f"{cache}, or do without: --weights PATH, --weights none"
        ) from None


def build_model(
    arch: str, classes: list[str], state: dict[str, Tensor] | None, named: list[str]
) -> tuple[models.ResNet, str]:
    """The network with a head for `classes`, and in words where its head comes from.

    A head in `state` is kept where it has the right size and, if known, the same classes.
    """
    model = models.get_model(arch, weights=None, num_classes=len(classes))
    nn.init.zeros_(model.fc.weight)
    nn.init.zeros_(model.fc.bias)
    if state is None:
        return model, "random weights"
    head = state.get("fc.bias", torch.empty(0))
    fits = len(head) == len(classes) and named in ([], classes)
    if not fits:
        state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        problem = str(error).split("\n\t")[1]
        raise DataError(
            f"--weights: they do not fit {arch}: {problem}; name their --arch"
        ) from None
    wrong = [*unexpected, *(key for key in missing if fits or not key.startswith("fc."))]
    if wrong:
        raise DataError(f"--weights: they do not fit {arch}: {wrong[0]}; name their --arch")
    return model, "head kept" if fits else f"head of {len(head)} classes dropped"


# ------------------------------------------------------------------------------- training


def timed(loader: DataLoader, title: str, waits: list[float]) -> Iterator[list[Tensor]]:
    """The batches of `loader` with a progress bar; the seconds waited for each go to `waits`."""
    batches = iter(loader)
    for _ in tqdm(range(len(loader)), title, unit=" batches", leave=False):
        asked = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - asked)
        yield batch


def to_input(batch: Tensor, device: torch.device) -> Tensor:
    """Images as normalised channels_last float32 on `device`; features as they are."""
    batch = batch.to(device, non_blocking=True)
    if batch.dtype != torch.uint8:
        return batch
    batch = batch.contiguous(memory_format=torch.channels_last)
    return v2.functional.normalize(batch.float(), MEAN, STD, inplace=True)


@torch.inference_mode()
def extract_features(model: models.ResNet, images: Iterable[list[Tensor]], compute: Compute) -> Tensor:
    """What the backbone makes of each image, BatchNorm as in evaluation: (N, D) float32."""
    head, model.fc = model.fc, nn.Identity()
    model.eval()
    with compute.autocast():
        features = [model(to_input(batch, compute.device)).float() for batch, _ in images]
    model.fc = head
    return torch.cat(features)


class Phase(NamedTuple):
    """A stretch of epochs with one optimizer; `network` is trained, `evaluated` is measured."""

    name: str
    network: nn.Module
    evaluated: nn.Module
    average: AveragedModel | None  # of the weights of `network`, step by step
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler


def head_phase(args: argparse.Namespace, model: models.ResNet, steps: int, compute: Compute) -> Phase:
    """The head alone, for batches of features, `steps` an epoch."""
    group = {"params": list(model.fc.parameters()), "lr": args.lr}
    optimizer = torch.optim.SGD([group], momentum=0.9, weight_decay=args.weight_decay)
    return Phase(
        "head", model.fc, model.fc, None, *schedule(optimizer, args.frozen_epochs * steps, compute)
    )


def full_phase(args: argparse.Namespace, model: models.ResNet, steps: int, compute: Compute) -> Phase:
    """Everything, for batches of images, `steps` an epoch.

    A pretrained backbone goes gently: small steps, its BatchNorm statistics kept, and as the result
    the average of the weights from the start on (Izmailov et al. 2018, arXiv:1803.05407).
    """
    gentle = args.weights != "none"
    head = {"params": list(model.fc.parameters()), "lr": args.lr, "weight_decay": args.weight_decay}
    rest = [each for name, each in model.named_parameters() if not name.startswith("fc.")]
    backbone = {"params": rest, "lr": args.lr}
    if gentle:
        head["lr"], backbone["lr"] = HEAD_LR * args.lr, BACKBONE_LR * args.lr
    optimizer = torch.optim.SGD([head, backbone], momentum=0.9)
    average = AveragedModel(model) if gentle else None
    if average:
        average.update_parameters(model)
    network, evaluated = model.train(not gentle), average.module if average else model
    total = (args.epochs - args.frozen_epochs) * steps
    return Phase("full", network, evaluated, average, *schedule(optimizer, total, compute))


def schedule(
    optimizer: torch.optim.Optimizer, steps: int, compute: Compute
) -> tuple[torch.optim.Optimizer, LRScheduler, torch.amp.GradScaler]:
    """Warm-up over a tenth of the steps, then a cosine towards 0; gradients scaled for float16."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    # Two steps at least: with one, OneCycleLR divides by zero.
    scheduler = OneCycleLR(optimizer, peaks, max(2, steps), pct_start=0.1, cycle_momentum=False)
    enabled = compute.amp is torch.float16
    return optimizer, scheduler, torch.amp.GradScaler(compute.device.type, enabled=enabled)


def train_epoch(
    phase: Phase, batches: Iterable[list[Tensor]], smoothing: float, compute: Compute
) -> float:
    """Train on `batches`; the loss averaged over their images, label smoothing included."""
    total, images = torch.zeros((), device=compute.device), 0
    parameters = [each for group in phase.optimizer.param_groups for each in group["params"]]
    for inputs, targets in batches:
        targets = targets.to(compute.device, non_blocking=True)
        with compute.autocast():
            logits = phase.network(to_input(inputs, compute.device))
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        phase.optimizer.zero_grad()
        phase.scaler.scale(loss).backward()
        phase.scaler.unscale_(phase.optimizer)
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        phase.scaler.step(phase.optimizer)
        phase.scaler.update()
        phase.scheduler.step()
        if phase.average:
            phase.average.update_parameters(phase.network)
        total += loss.detach() * len(targets)
        images += len(targets)
    if not total.isfinite():
        raise DataError("--lr: the loss is no longer a number; try a tenth of the learning rate")
    return total.item() / images


class Evaluation(NamedTuple):
    """What the network says of M validation images, in their order."""

    loss: float  # averaged over images
    targets: Tensor  # (M,) int64
    predicted: Tensor  # (M,) int64
    probability: Tensor  # (M,) float32, of the predicted class


@torch.inference_mode()
def evaluate(network: nn.Module, batches: Iterable[list[Tensor]], compute: Compute) -> Evaluation:
    """What `network` makes of the batches, in evaluation mode."""
    was_training = network.training
    network.eval()
    parts = []
    for inputs, targets in batches:
        with compute.autocast():
            logits = network(to_input(inputs, compute.device))
        parts.append((logits.float().cpu(), targets))
    network.train(was_training)
    logits, targets = (torch.cat(each) for each in zip(*parts, strict=True))
    probability, predicted = logits.softmax(1).max(1)
    return Evaluation(F.cross_entropy(logits, targets).item(), targets, predicted, probability)


# ------------------------------------------------------------------------------- measures


class Measures(NamedTuple):
    """Shares of right answers from 0 to 1; NaN where there is no image to answer for."""

    accuracy: float
    balanced_accuracy: float  # the mean recall of the classes
    many: float  # the mean recall of the classes with over 100 training images
    medium: float  # 20 to 100
    few: float  # under 20


def confusion_matrix(targets: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """How often which class was taken for which: (C, C) int64, rows true, columns predicted."""
    pairs = torch.bincount(targets * classes + predicted, minlength=classes**2)
    return pairs.reshape(classes, classes)


def recall_by_class(confusion: Tensor) -> Tensor:
    """The share of each class that was recognised: (C,) float64, NaN for a class without images."""
    return confusion.diag().double() / confusion.sum(1)


def measure(confusion: Tensor, train_counts: Tensor) -> Measures:
    """The measures of a confusion matrix; the groups go by (C,) `train_counts`."""
    recall = recall_by_class(confusion)
    many, few = train_counts > MANY, train_counts < FEW
    groups = (torch.ones_like(many), many, ~many & ~few, few)
    accuracy = (confusion.diag().sum() / confusion.sum()).item()
    return Measures(accuracy, *(recall[group].nanmean().item() for group in groups))


# -------------------------------------------------------------------------------- records


def write_file(path: Path, content: bytes) -> None:
    """Write or replace the file as a whole: who reads it sees the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_table(path: Path, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([f"{x:.6g}" if isinstance(x, float) else x for x in row] for row in rows)
    write_file(path, table.getvalue().encode(errors="surrogateescape"))


class Panel(NamedTuple):
    """A chart over 0, 1, 2, ...: named series of (colour, values), NaN for a gap."""

    title: str
    x_title: str
    first: int  # what the leftmost place is called
    series: dict[str, tuple[str, list[float]]]
    bars: bool = False


def draw_chart(panels: list[Panel]) -> bytes:
    """A PNG picture of the panels, one below the other, with axes from 0."""
    picture = Image.new("RGB", (1600, 560 * len(panels)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(26)
    for row, panel in enumerate(panels):
        base, left = 560 * row + 460, 130
        series = [(name, *each) for name, each in panel.series.items()]
        top = max([x for *_, values in series for x in values if math.isfinite(x)], default=1.0)
        pitch = 1430 / len(series[0][2])
        y_scale = 370 / (top or 1.0)
        for tick in ticks(top):
            y = base - y_scale * tick
            draw.line([left, y, 1560, y], "#dddddd", 2)
            draw.text((left - 15, y), f"{tick:g}", "black", font, "rm")
        for tick in ticks(len(series[0][2]) - 1):
            if tick == int(tick):
                x = left + pitch * (tick + 0.5)
                draw.text((x, base + 10), str(int(tick) + panel.first), "black", font, "mt")
        for place, (name, colour, values) in enumerate(series):
            known = [(i, x) for i, x in enumerate(values) if math.isfinite(x)]
            if panel.bars:
                for i, x in known:
                    bar = [left + pitch * i, base - y_scale * x, left + pitch * (i + 0.8), base]
                    draw.rectangle(bar, colour)
            else:
                dots = [(left + pitch * (i + 0.5), base - y_scale * x) for i, x in known]
                draw.line(dots, colour, 4)
                for x, y in dots:
                    draw.ellipse([x - 5, y - 5, x + 5, y + 5], colour)
            x = 1560 - 260 * (len(series) - place)
            draw.rectangle([x, base - 428, x + 24, base - 404], colour)
            draw.text((x + 34, base - 416), name, "black", font, "lm")
        draw.text((20, base - 416), panel.title, "black", font, "lm")
        draw.text((left + 715, base + 50), panel.x_title, "black", font, "mt")
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def ticks(top: float) -> list[float]:
    """At most eight round numbers from 0 to `top`, 1, 2 or 5 times a power of ten apart."""
    steps = (digit * 10.0**power for power in range(-6, 18) for digit in (1, 2, 5))
    step = next(step for step in steps if top <= 7 * step)
    return [step * count for count in range(int(top / step + 1e-9) + 1)]


def write_reports(
    output: Path, data: Data, history: list[dict[str, Any]], draws: Tensor, evaluation: Evaluation
) -> None:
    """The tables and charts of a run; recall and predictions are those of its last epoch."""
    confusion = confusion_matrix(evaluation.targets, evaluation.predicted, len(data.classes))
    recall = recall_by_class(confusion).tolist()
    counts = [data.counts(part).tolist() for part in (data.train, data.val)]
    rows = list(zip(data.classes, *counts, draws.tolist(), recall, strict=True))
    header = ("class", "train_images", "val_images", "draws", "recall")
    write_table(output / "history.csv", list(history[0]), (row.values() for row in history))
    write_table(output / "classes.csv", header, rows)
    paths = [Path(data.paths[index]).relative_to(data.root).as_posix() for index in data.val]
    truth, guess = ([data.classes[i] for i in each] for each in evaluation[1:3])
    table = zip(paths, truth, guess, evaluation.probability.tolist(), strict=True)
    write_table(output / "predictions.csv", ("path", "class", "predicted", "probability"), table)

    def line(key: str, colour: str) -> tuple[str, list[float]]:
        return colour, [row[key] for row in history]

    first, blue, orange = history[0]["epoch"], "#2f6fb0", "#d9822b"
    losses = {"training": line("train_loss", blue), "validation": line("val_loss", orange)}
    shares = {"balanced": line("balanced_accuracy", blue), "plain": line("accuracy", orange)}
    panels = [Panel("loss", "epoch", first, losses), Panel("accuracy", "epoch", first, shares)]
    write_file(output / "curves.png", draw_chart(panels))
    rows.sort(key=lambda row: (-row[1], row[0]))
    rank = "classes, most training images first"
    bars = {"recall": (blue, 4), "training images": (orange, 1)}
    panels = [
        Panel(title, rank, 0, {title: (colour, [float(row[field]) for row in rows])}, bars=True)
        for title, (colour, field) in bars.items()
    ]
    write_file(output / "classes.png", draw_chart(panels))


def save_model(
    paths: list[Path], args: argparse.Namespace, data: Data, model: nn.Module, epoch: int
) -> None:
    """Write all that it takes to use the network, loadable with `weights_only=True`."""
    content = {
        "arch": args.arch,
        "classes": data.classes,
        "image_size": args.image_size,
        "epoch": epoch,
        "state_dict": {key: value.cpu() for key, value in model.state_dict().items()},
    }
    stream = io.BytesIO()
    torch.save(content, stream)
    for path in paths:
        write_file(path, stream.getvalue())


HEADER = (
    "  epoch  phase  train loss  val loss  accuracy  balanced    many  medium     few"
    "  draws/class  distinct  images/s  data wait"
)


def format_epoch(row: dict[str, Any], epochs: int) -> str:
    """The line of an epoch, as wide as `HEADER`."""
    cells = {key: f"{value:.1%}" for key, value in row.items() if isinstance(value, float)}
    cells = {key: "-" if "nan" in cell else cell for key, cell in cells.items()}
    draws = f"{row['fewest_draws']}-{row['most_draws']}"
    return (
        f"{row['epoch']:3}/{epochs:<3}  {row['phase']:5}  {row['train_loss']:10.3f}  "
        f"{row['val_loss']:8.3f}  {cells['accuracy']:>8}  {cells['balanced_accuracy']:>8}  "
        f"{cells['many']:>6}  {cells['medium']:>6}  {cells['few']:>6}  {draws:>11}  "
        f"{cells['distinct_images']:>8}  {row['images_per_second']:8.1f}  {cells['data_wait']:>9}"
    )


def summarise(data: Data, history: list[dict[str, Any]], evaluation: Evaluation) -> str:
    """What to know after a run: last and best epoch, weakest classes, commonest confusions."""
    last, best = history[-1], max(history, key=lambda row: row["balanced_accuracy"])
    confusion = confusion_matrix(evaluation.targets, evaluation.predicted, len(data.classes))
    recall, asked = recall_by_class(confusion), confusion.sum(1)
    names = [printable(name) for name in data.classes]
    lines = [
        f"last epoch {last['epoch']}: balanced accuracy {last['balanced_accuracy']:.1%}",
        f"best epoch {best['epoch']}: balanced accuracy {best['balanced_accuracy']:.1%} "
        "(picked on the validation images, so slightly optimistic)",
        "lowest recall, last epoch:",
    ]
    known = [index for index in recall.argsort(stable=True).tolist() if asked[index]]
    lines += [f"{recall[i]:8.1%} of {asked[i]:4}  {names[i]}" for i in known[:5]]
    lines.append("most frequent confusions, last epoch:")
    wrong = confusion - confusion.diag().diag()
    for pair in wrong.flatten().argsort(descending=True, stable=True)[:5].tolist():
        true, taken = divmod(pair, len(names))
        if wrong[true, taken]:
            share = f"{wrong[true, taken]:8} of {asked[true]:4}"
            lines.append(f"{share}  {names[true]} taken for {names[taken]}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ run


def check_settings(args: argparse.Namespace) -> None:
    """Put values for "auto", and raise `DataError` for settings that do not go together."""
    args.output = args.output or Path("runs", f"{datetime.now():%Y-%m-%d_%H-%M-%S}")
    if args.output.exists() and not args.output.is_dir():
        raise DataError(f"--output {args.output}: a file; name a new folder")
    if (args.output / "config.json").exists():
        raise DataError(f"--output {args.output}: already holds a run; name a new folder")
    if args.output.resolve().is_relative_to(args.out.resolve()):
        raise DataError(
            f"--output {args.output}: inside {args.out}, among its classes; move it out"
        )
    if args.frozen_epochs is None:
        args.frozen_epochs = 0 if args.weights == "none" else math.ceil(args.epochs / 2)
    if args.frozen_epochs > args.epochs:
        raise DataError(f"--frozen-epochs {args.frozen_epochs}: more than --epochs {args.epochs}")
    if args.workers is None:
        args.workers = 0 if args.device.type == "cpu" else min(8, os.cpu_count() or 1)


def start_run(args: argparse.Namespace, compute: Compute, data: Data, origin: str) -> None:
    """Make the run folder with the settings, and print what is about to happen."""
    cuda = compute.device.type == "cuda"
    device = torch.cuda.get_device_name(compute.device) if cuda else str(compute.device)
    train, val = data.counts(data.train), data.counts(data.val)
    versions = {each.__name__: each.__version__ for each in (torch, torchvision, np, PIL)}
    content = {
        "settings": {key: str(value) for key, value in vars(args).items()},
        "versions": {"python": platform.python_version(), **versions},
        "device": device,
        "precision": str(compute.amp or torch.float32),
        "classes": data.classes,
        "train_images": train.tolist(),
        "val_images": val.tolist(),
        "left_out": data.broken,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    write_file(args.output / "config.json", json.dumps(content, indent=1).encode())
    print(
        f"{len(data.train)} training images in {len(data.classes)} classes of {train.max()} to "
        f"{train.min()}, imbalance ratio {train.max() / train.min():.1f}; {len(data.val)} "
        f"validation images; {len(data.broken)} unreadable left out\n"
        f"{args.arch}, {origin}; {device}, {content['precision']}\n\n{HEADER}",
        flush=True,
    )


def run(args: argparse.Namespace) -> None:
    """Train and evaluate as `args` say, and fill the run folder."""
    args.device = pick_device(args.device)
    compute = Compute(args.device, pick_amp(args.device, getattr(args, "amp", None)))
    check_arch(args.arch)
    check_settings(args)
    state, named = load_weights(args.arch, args.weights)
    data = load_data(args.out, not args.no_check, args.val_fraction, args.seed)
    torch.manual_seed(args.seed)
    model, origin = build_model(args.arch, data.classes, state, named)
    model.to(compute.device, memory_format=torch.channels_last)
    start_run(args, compute, data, origin)

    images = Images(data.paths, data.labels, eval_transform(args.image_size))
    crops = Images(data.paths, data.labels, train_transform(args.image_size))
    drawn, held_out = Batches(args.batch_size, data.train), Batches(args.batch_size, data.val)
    weights = sample_weights(data.labels[data.train])
    draws = torch.zeros(len(data.classes), dtype=torch.int64)
    history: list[dict[str, Any]] = []
    for epoch in range(min(1, args.epochs), args.epochs + 1):
        started, train_loss, chosen = time.perf_counter(), math.nan, data.train[:0]
        waits: list[float] = []
        if epoch == 1 and args.frozen_epochs:
            phase = head_phase(args, model, len(drawn), compute)
            everything = Batches(args.batch_size, torch.arange(len(data.labels)))
            loader = make_loader(images, everything, args.workers, compute.device)
            features = extract_features(model, timed(loader, "features", waits), compute)
            table = Features(features, data.labels)
            train_loader, val_loader = (
                DataLoader(table, batch_sampler=batches) for batches in (drawn, held_out)
            )
        elif epoch in (0, args.frozen_epochs + 1):
            phase = full_phase(args, model, len(drawn), compute)
            train_loader = make_loader(crops, drawn, args.workers, compute.device)
            val_loader = make_loader(images, held_out, args.workers, compute.device)
        if epoch:
            chosen = data.train[draw_images(weights, args.seed, epoch)]
            drawn.assign(chosen, seeded("augment", args.seed, epoch))
            batches = timed(train_loader, f"training, {phase.name}", waits)
            train_loss = train_epoch(phase, batches, args.label_smoothing, compute)
        seconds = time.perf_counter() - started
        evaluation = evaluate(phase.evaluated, timed(val_loader, "validation", []), compute)
        confusion = confusion_matrix(evaluation.targets, evaluation.predicted, len(draws))
        row = {
            "epoch": epoch,
            "phase": phase.name if epoch else "given",
            "train_loss": train_loss,
            "val_loss": evaluation.loss,
            **measure(confusion, data.counts(data.train))._asdict(),
            "fewest_draws": data.counts(chosen).min().item(),
            "most_draws": data.counts(chosen).max().item(),
            "distinct_images": len(chosen.unique()) / len(data.train),
            "learning_rate": phase.scheduler.get_last_lr()[0],
            "images_per_second": len(chosen) / seconds,
            "data_wait": sum(waits) / seconds,
            "seconds": time.perf_counter() - started,
        }
        draws += data.counts(chosen)
        history.append(row)
        print(format_epoch(row, args.epochs), flush=True)
        best = row is max(history, key=lambda row: row["balanced_accuracy"])
        names = ["last.pt", "best.pt"] if best else ["last.pt"]
        result = model if phase.name == "head" else phase.evaluated
        save_model([args.output / name for name in names], args, data, result, epoch)
        write_reports(args.output, data, history, draws, evaluation)
    print(f"\n{summarise(data, history, evaluation)}\nresults in {printable(str(args.output))}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = parse_args(argv)
    try:
        run(args)
    except torch.OutOfMemoryError:
        smaller = max(1, args.batch_size // 2)
        message = f"--batch-size {args.batch_size}: out of memory on {args.device}; try {smaller}"
    except (DataError, OSError) as error:
        message = str(error)
    except KeyboardInterrupt:
        print("\ndata_training.py: interrupted; finished epochs are on disk", file=sys.stderr)
        return 130
    else:
        return 0
    print(f"data_training.py: error: {printable(message)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
