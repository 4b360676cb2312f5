"""What `data_training.py` promises, on tiny images, random weights and a CPU."""

import contextlib
import copy
import dataclasses
import io
import json
import math
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import CPU, begin, load, prepare, rows_of, train, weights_file, write_folder
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import models
from torchvision.transforms import v2

import data_training as training

PARTS = ("train", "val")
BLUE, ORANGE = (0x2F, 0x6F, 0xB0), (0xD9, 0x82, 0x2B)
TINY = ["--arch", "resnet18", "--image-size", "32", "--batch-size", "16", "--device", "cpu"]


# ---------------------------------------------------------------------- sampling, by hand


def test_an_image_weighs_one_over_the_images_of_its_class() -> None:
    weights = training.sample_weights(torch.tensor([0, 1, 0, 0, 1, 2, 0]), 1.0)
    assert weights.dtype == torch.float64
    assert weights.tolist() == [0.25, 0.5, 0.25, 0.25, 0.5, 1.0, 0.25]


def test_the_power_softens_the_weights_from_inverse_frequency_to_uniform() -> None:
    labels = torch.tensor([0, 1, 1, 1, 1])
    assert training.sample_weights(labels, 0.5).tolist() == [1.0, 0.5, 0.5, 0.5, 0.5]
    assert training.sample_weights(labels, 0.0).tolist() == [1.0] * 5


def draw(weights: torch.Tensor, weighted: bool, epoch: int, seed: int = 0) -> torch.Tensor:
    return training.draw_images(weights, weighted, training.seeded("draw", seed, epoch))


def test_unweighted_draws_take_each_image_once_in_another_order_each_epoch() -> None:
    weights = training.sample_weights(torch.tensor([0] * 90 + [1] * 10), 1.0)
    first, second = (draw(weights, False, epoch) for epoch in (1, 2))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(100))
    assert not torch.equal(first, second) and first.tolist() != list(range(100))


@pytest.mark.parametrize(
    ("first", "last", "weighted"),
    [(1, 4, [4]), (1, 8, [7, 8]), (1, 5, [4, 5]), (6, 9, [9]), (3, 3, [3]), (1, 2, [2])],
)
def test_late_switches_to_the_sampler_in_the_last_quarter_of_a_phase(
    first: int, last: int, weighted: list[int]
) -> None:
    epochs = range(first, last + 1)
    assert [e for e in epochs if training.is_weighted("late", e, epochs)] == weighted
    assert all(training.is_weighted("sampler", epoch, epochs) for epoch in epochs)
    assert not any(training.is_weighted("loss", epoch, epochs) for epoch in epochs)
    assert not any(training.is_weighted("none", epoch, epochs) for epoch in epochs)


def test_classes_are_drawn_equally_often_however_many_images_they_have() -> None:
    labels = torch.arange(8).repeat_interleave(torch.tensor([600, 300, 150, 75, 40, 20, 10, 5]))
    weights = training.sample_weights(labels, 1.0)
    drawn = torch.cat([draw(weights, True, epoch) for epoch in range(10)])
    assert len(drawn) == 10 * 1200
    observed = torch.bincount(labels[drawn], minlength=8).double()
    chi_square = ((observed - 1500) ** 2 / 1500).sum().item()
    assert chi_square < 24.32  # 0.1 % of uniform draws exceed it, 7 degrees of freedom


def test_a_draw_depends_on_seed_and_epoch_alone() -> None:
    weights = training.sample_weights(torch.tensor([0] * 90 + [1] * 10), 1.0)
    first = draw(weights, True, 1)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(draw(weights, True, 1), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(draw(weights, True, 2), first)
    assert not torch.equal(draw(weights, True, 1, seed=1), first)


@pytest.mark.parametrize(
    ("images", "batch_size", "sizes"),
    [(10, 4, [4, 3, 3]), (9, 4, [3, 3, 3]), (8, 4, [4, 4]), (5, 8, [5]), (17, 16, [9, 8])],
)
def test_batches_differ_by_one_image_at_most(
    images: int, batch_size: int, sizes: list[int]
) -> None:
    drawn = torch.arange(images) * 2
    cut = training.cut_batches(drawn, batch_size, training.seeded("augment", 0, 1))
    assert [len(batch) for batch in cut] == sizes
    assert torch.cat(cut)[:, 0].tolist() == list(range(0, 2 * images, 2))
    seeds = torch.cat(cut)[:, 1]
    assert len(seeds.unique()) == images and seeds.min() >= 0
    viewed = torch.cat(training.cut_batches(drawn, batch_size))
    assert torch.equal(viewed[:, 0], drawn) and set(viewed[:, 1].tolist()) == {training.EVALUATED}
    assert training.cut_batches(drawn[:0], batch_size) == ()


# ------------------------------------------------------------------------- split, by hand


def split_by(
    labels: list[int], digests: list[str], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """The places of the images for training and of those for validation."""
    rows = [training.Row(str(at), "", label, "train") for at, label in enumerate(labels)]
    digest_of = {row.path: digest for row, digest in zip(rows, digests, strict=True)}
    after = training.split_images(rows, digest_of, fraction, seed)
    assert [row._replace(part="train") for row in after] == rows
    return tuple([at for at, row in enumerate(after) if row.part == part] for part in PARTS)


def split(counts: list[int], fraction: float = 0.2, seed: int = 0) -> list[list[int]]:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    sides = split_by(labels, [str(i) for i in range(len(labels))], fraction, seed)
    return [[[labels[at] for at in side].count(label) for label in set(labels)] for side in sides]


@pytest.mark.parametrize(
    ("counts", "fraction", "validation"),
    [
        ([10, 5, 100], 0.2, [2, 1, 20]),
        ([1, 2, 3, 4], 0.2, [0, 1, 1, 1]),
        ([1, 2, 3, 4], 0.99, [0, 1, 2, 3]),
        ([14, 252], 0.2, [3, 50]),
    ],
)
def test_each_class_gives_its_part_and_keeps_a_training_image(
    counts: list[int], fraction: float, validation: list[int]
) -> None:
    train, val = split(counts, fraction)
    assert val == validation
    assert train == [count - part for count, part in zip(counts, validation, strict=True)]


def test_the_split_depends_on_the_seed() -> None:
    labels, digests = [0] * 50, [str(i) for i in range(50)]
    first = split_by(labels, digests, 0.2, 0)
    assert split_by(labels, digests, 0.2, 0) == first
    assert split_by(labels, digests, 0.2, 1) != first


def test_no_copy_of_a_training_image_is_validated() -> None:
    for seed in range(30):
        stream = random.Random(seed)
        labels = [stream.randrange(3) for _ in range(60)] + [0, 1, 2]
        digests = [str(stream.randrange(25)) for _ in range(63)]
        train, val = split_by(labels, digests, 0.3, seed)
        assert not {digests[i] for i in train} & {digests[i] for i in val}
        assert {labels[i] for i in train} == {0, 1, 2}


def test_an_image_that_stands_in_two_classes_is_for_training_alone() -> None:
    digests = ["both", *"abcdefg", "both", *"hijklmn"]
    for seed in range(20):
        train, val = split_by([0] * 8 + [1] * 8, digests, 0.5, seed)
        assert {0, 8} <= set(train) and len(val) == 8


def test_a_class_of_copies_of_one_image_is_for_training_alone() -> None:
    train, val = split_by([0, 0, 0, 1, 1], ["a", "a", "a", "b", "c"], 0.5, 0)
    assert train[:3] == [0, 1, 2] and len(val) == 1 and val[0] >= 3


# ---------------------------------------------------------------------- measures, by hand


def test_measures_of_a_hand_worked_confusion_matrix_with_an_empty_group() -> None:
    targets = torch.tensor([0] * 10 + [1] * 4 + [2] * 2)
    predicted = torch.tensor([0] * 8 + [1, 2] + [1, 1, 1, 0] + [0, 2])
    confusion = training.confusion_matrix(targets, predicted, 4)
    assert confusion.tolist() == [[8, 1, 1, 0], [1, 3, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    recall = training.recall_by_class(confusion)
    assert recall[:3].tolist() == [0.8, 0.75, 0.5] and recall[3].isnan()
    result = training.measure(confusion, torch.tensor([101, 100, 20, 500]))
    assert result["accuracy"] == 12 / 16
    assert result["balanced_accuracy"] == pytest.approx((0.8 + 0.75 + 0.5) / 3)
    assert result["many"] == 0.8  # the class that nobody was asked about does not count
    assert result["medium"] == pytest.approx((0.75 + 0.5) / 2)
    assert math.isnan(result["few"])
    variance = 0.8 * 0.2 / 9 + 0.75 * 0.25 / 3 + 0.5 * 0.5 / 1
    assert result["half_width"] == pytest.approx(1.96 * variance**0.5 / 3, rel=1e-4)


def test_nineteen_training_images_are_few() -> None:
    result = training.measure(torch.tensor([[1, 1], [0, 4]]), torch.tensor([19, 20]))
    assert math.isnan(result["many"]) and (result["medium"], result["few"]) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),  # Newcombe 1998, Statistics in Medicine 17, table I
    [
        *((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)),
        *((0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)),
    ],
)
def test_the_wilson_interval_is_the_published_one(
    right: int, asked: int, low: float, high: float
) -> None:
    ends = training.wilson_interval(torch.tensor([right]), torch.tensor([asked]))
    assert [end.item() for end in ends] == pytest.approx([low, high], abs=5e-5)


EQUAL = torch.full((1, 5), 0.2, dtype=torch.float64)


def test_the_variance_of_a_recall_by_hand() -> None:
    recall = torch.tensor([1 / 3, 0.9, 1.0, 1.0, 0.0, math.nan], dtype=torch.float64)
    variance = training.recall_variance(recall, torch.tensor([3, 10, 1, 3, 19, 0]))
    # 2/9 / 2; 0.09 / 9; one image; Beta(3.5, 0.5); Beta(0.5, 19.5)
    expected = [1 / 9, 0.01, 0.25, 0.875 * 0.125 / 5, 0.025 * 0.975 / 21]
    assert variance[:5].tolist() == pytest.approx(expected) and variance[5].isnan()
    weights = torch.tensor([[0.5, 0.25, 0.25, 0, 0, 0], [math.nan] * 6])
    half, empty = training.half_widths(variance, weights.double()).tolist()
    assert half == pytest.approx(1.96 * (1 / 36 + 0.01 / 16 + 1 / 64) ** 0.5, rel=1e-4)
    assert math.isnan(empty)


def test_three_images_that_are_right_do_not_make_sure() -> None:
    result = training.measure(torch.tensor([[3, 0], [0, 3]]), torch.tensor([9, 9]))
    assert result["balanced_accuracy"] == 1.0 and 0.15 < result["half_width"] < 0.3


def test_the_half_width_is_that_of_a_bootstrap_within_classes() -> None:
    stream = torch.Generator().manual_seed(0)
    counts, recall = torch.tensor([60, 80, 200, 40, 120]), torch.tensor([0.2, 0.5, 0.85, 0.95, 0.7])
    means = []
    for size, part in zip(counts.tolist(), recall.tolist(), strict=True):
        right = (torch.arange(size) < round(size * part)).double()
        means.append(right[torch.randint(size, (20000, size), generator=stream)].mean(1))
    low, high = torch.stack(means).mean(0).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    half = training.half_widths(training.recall_variance(recall.double(), counts), EQUAL).item()
    assert half == pytest.approx((high - low) / 2, rel=0.04)


@pytest.mark.parametrize(("lowest", "highest"), [(0.3, 0.9), (0.9, 1.0)])
def test_the_half_width_covers_the_truth_as_often_as_it_says(lowest: float, highest: float) -> None:
    """Where nearly all recalls are 1 it may cover it more often, never less."""
    stream = torch.Generator().manual_seed(0)
    counts = torch.arange(40) % 20 + 2  # 2 to 21 images a class
    truth = lowest + torch.rand(40, generator=stream).double() * (highest - lowest)
    weights, covered = torch.full((1, 40), 1 / 40).double(), 0
    for _ in range(2000):
        recall = torch.binomial(counts.double(), truth, generator=stream) / counts
        half = training.half_widths(training.recall_variance(recall, counts), weights).item()
        covered += bool((recall.mean() - truth.mean()).abs() <= half)
    assert 0.93 < covered / 2000 < (0.98 if highest < 1 else 1)


def changes(*arguments: torch.Tensor) -> list[SimpleNamespace]:
    """What `compare` says of each measure."""
    columns = training.compare(*arguments)
    rows = zip(*columns.values(), strict=True)
    return [SimpleNamespace(**dict(zip(columns, row, strict=True))) for row in rows]


def two_runs(stream: torch.Generator, sizes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """True classes of images, and what two runs predict that agree often: class -1 is wrong.

    Both are right with probability 0.4, the second alone with 0.2, the first alone with 0.1.
    """
    targets = torch.arange(len(sizes)).repeat_interleave(sizes)
    fate = torch.rand(len(targets), generator=stream)
    wrong = (targets + 1) % len(sizes)
    before = torch.where((fate < 0.4) | (fate >= 0.9), targets, wrong)
    return targets, before, torch.where(fate < 0.6, targets, wrong)


def test_the_interval_of_a_difference_is_that_of_a_paired_bootstrap() -> None:
    """Images are resampled within classes, and both runs are judged on the same ones."""
    sizes, stream = torch.tensor([1200, 600, 360]), torch.Generator().manual_seed(1)
    targets, before, after = two_runs(stream, sizes)
    change = ((after == targets).double() - (before == targets).double()).split(sizes.tolist())
    means = torch.stack(
        [part[torch.randint(len(part), (5000, len(part)), generator=stream)].mean(1)
         for part in change]
    )  # fmt: skip
    shares = {"accuracy": sizes.double() / 2160, "balanced_accuracy": torch.ones(3).double() / 3}
    for group, part in zip(("many", "medium", "few"), torch.eye(3).double(), strict=True):
        shares[group] = part
    rows = changes(targets, before, after, torch.tensor([300, 50, 5]))
    assert [row.measure for row in rows] == list(shares)
    for row in rows:
        ends = (shares[row.measure] @ means).quantile(torch.tensor([0.025, 0.975]).double())
        assert [row.low, row.high] == pytest.approx(ends.tolist(), abs=0.004)
        assert row.difference == pytest.approx(row.after - row.before, abs=1e-12)
        mean = sum(w * part.mean() for w, part in zip(shares[row.measure], change, strict=True))
        assert row.difference == pytest.approx(mean.item(), abs=1e-12)


def test_the_interval_of_a_difference_covers_the_truth_as_often_as_it_says() -> None:
    stream = torch.Generator().manual_seed(2)
    sizes, covered = torch.arange(24) % 12 * 4 + 3, 0  # 3 to 47 images a class
    for _ in range(1000):
        row = changes(*two_runs(stream, sizes), sizes)[1]
        covered += row.low <= 0.1 <= row.high  # 0.2 newly right less 0.1 newly wrong
    assert 0.92 < covered / 1000 < 0.98


def test_one_image_newly_right_is_no_certain_gain() -> None:
    targets = torch.tensor([0, 1, 1, 1])
    row = changes(targets, torch.tensor([1, 1, 1, 1]), targets, torch.tensor([5, 5]))[1]
    assert row.difference == 0.5 and row.low < 0 < row.high


def test_identical_runs_differ_by_exactly_0_and_an_empty_group_by_nothing() -> None:
    targets, before, _ = two_runs(torch.Generator().manual_seed(3), torch.tensor([9, 1, 30]))
    rows = changes(targets, before, before, torch.tensor([50, 30, 20, 500]))
    for row in rows[:2]:
        assert (row.difference, row.low, row.high) == (0.0, 0.0, 0.0)
    _, *many = vars(rows[2]).values()
    assert all(map(math.isnan, many))  # no image of such a class


class Answers(torch.nn.Module):
    """A network whose logits are its input."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs


def test_the_validation_loss_is_averaged_over_images_not_over_batches() -> None:
    sure, unsure = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    zero = torch.zeros(1, dtype=torch.int64)
    batches = [(sure.repeat(3, 1), zero.repeat(3)), (unsure, zero)]
    result = training.assess(*training.predict(Answers(), batches, CPU), torch.zeros(2), False)
    assert result.confusion.tolist() == [[4, 0], [0, 0]]
    assert result.loss == pytest.approx((3 * math.log(1 + math.exp(-2)) + math.log(2)) / 4)
    assert result.predicted.tolist() == [0, 0, 0, 0]
    assert result.probability.tolist() == pytest.approx([1 / (1 + math.exp(-2))] * 3 + [0.5])


def fit(
    network: torch.nn.Module,
    batches: list[tuple[torch.Tensor, torch.Tensor]],
    counts: list[int],
    rebalance: str,
    lr: float,
) -> float:
    """The loss of `train_epoch` by plain gradient descent; `counts`: training images a class."""
    weights = list(network.parameters())

    def step(loss: torch.Tensor) -> None:
        for weight, slope in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.data -= lr * slope

    share = torch.tensor(counts) / sum(counts)
    given = SimpleNamespace(
        args=SimpleNamespace(rebalance=rebalance),
        data=SimpleNamespace(classes=counts, log_share=share.log),
        compute=CPU,
    )
    trainer = SimpleNamespace(phase="head", network=network, step=step)
    source = SimpleNamespace(read=lambda *_: batches)
    indices = [targets[:, None] for _, targets in batches]  # of which the number alone counts
    return training.train_epoch(given, trainer, indices, source)


def test_balanced_softmax_by_hand() -> None:
    network = torch.nn.Linear(1, 2, bias=False)
    torch.nn.init.zeros_(network.weight)
    for label, loss in ((0, math.log(4 / 3)), (1, math.log(4))):  # equal logits: the prior alone
        batches = [(torch.ones(1, 1), torch.tensor([label]))]
        assert fit(network, batches, [3, 1], "loss", 0.0) == pytest.approx(loss)


def test_the_optimum_of_balanced_softmax_is_the_posterior_of_balanced_classes() -> None:
    counts = torch.tensor([[48, 24, 8], [2, 8, 10]])  # of 80 and 20 images, by what they look like
    seen = counts / counts.sum(1, keepdim=True)
    posterior = (seen / seen.sum(0)).T  # if both classes were as frequent
    images = torch.eye(3).repeat(2, 1).repeat_interleave(counts.flatten(), 0)
    labels = torch.arange(2).repeat_interleave(counts.sum(1))
    network = torch.nn.Linear(3, 2, bias=False)
    fit(network, [(images, labels)] * 1000, [80, 20], "loss", 0.5)
    assert torch.allclose(network(torch.eye(3)).softmax(1), posterior, atol=1e-3)
    fit(network, [(images, labels)] * 1000, [80, 20], "none", 0.5)
    assert torch.allclose(network(torch.eye(3)).softmax(1), (counts / counts.sum(0)).T, atol=1e-3)


# -------------------------------------------------------------------------- reading images

QUARTERS = np.zeros((40, 60, 3), np.uint8)
QUARTERS[:20, :30], QUARTERS[:20, 30:], QUARTERS[20:, :30] = (200, 40, 40), (40, 200, 40), 90
GREY = np.asarray(Image.fromarray(QUARTERS).convert("L"))


def corners(image: torch.Tensor) -> list[list[int]]:
    """The colours a little inside the four corners, clockwise from the upper left."""
    height, width = image.shape[1:]
    places = [(6, 6), (6, width - 7), (height - 7, width - 7), (height - 7, 6)]
    return [image[:, y, x].tolist() for y, x in places]


def write_modes(folder: Path) -> dict[str, Path]:
    """The same picture in every mode and format that matters."""
    picture, grey = Image.fromarray(QUARTERS), Image.fromarray(GREY)
    wide = GREY.astype(np.uint16) * 257
    sixteen = Image.fromarray(wide)
    images = {
        **{"rgb.jpg": picture, "rgb.png": picture, "rgb.webp": picture, "rgb.bmp": picture},
        **{"rgb.tif": picture, "rgb.ppm": picture, "cmyk.jpg": picture.convert("CMYK")},
        **{"rgba.png": picture.convert("RGBA"), "palette.png": picture.quantize(8)},
        **{"grey.jpg": grey, "grey.png": grey, "grey_alpha.png": grey.convert("LA")},
        **{"grey16.png": sixteen, "grey16.tif": sixteen},
    }
    for name, image in images.items():
        image.save(folder / name, **({"quality": 100} if name.endswith(("jpg", "webp")) else {}))
    picture.save(folder / "a_png.jpg", "PNG")
    (folder / "grey16.pgm").write_bytes(b"P5 60 40 65535\n" + wide.astype(">u2").tobytes())
    return {path.name: path for path in folder.iterdir()}


def test_every_mode_and_format_comes_out_as_rgb(tmp_path: Path) -> None:
    paths = write_modes(tmp_path)
    assert len(paths) == 16
    for name, path in paths.items():
        image = training.read_image(str(path))
        assert image.dtype == torch.uint8 and image.shape == (3, 40, 60), name
        expected = GREY[..., None].repeat(3, 2) if "grey" in name else QUARTERS
        wanted = corners(torch.from_numpy(expected).permute(2, 0, 1))
        tolerance = 12 if name == "cmyk.jpg" else 4
        difference = np.abs(np.array(corners(image)) - np.array(wanted)).max()
        assert difference <= tolerance, (name, corners(image), wanted)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize(
    ("orientation", "undo"),
    [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90), (2, 0)],
)
def test_images_come_out_upright(tmp_path: Path, suffix: str, orientation: int, undo: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(QUARTERS).transpose(undo)  # turned back by the orientation
    stored.save(tmp_path / f"x.{suffix}", exif=exif, **({"quality": 95} if suffix != "tif" else {}))
    image = training.read_image(str(tmp_path / f"x.{suffix}"))
    wanted = corners(torch.from_numpy(QUARTERS).permute(2, 0, 1))
    assert np.abs(np.array(corners(image)) - np.array(wanted)).max() < 25


@pytest.mark.parametrize("kind", ["RGBA.png", "LA.png", "P.png", "RGBA.webp", "RGBA.tif", "P.gif"])
def test_what_is_transparent_shows_white_not_the_colour_below(tmp_path: Path, kind: str) -> None:
    mode, path = kind.partition(".")[0], tmp_path / f"x.{kind}"
    picture = Image.new("LA", (24, 24), (0, 0))  # black, and nowhere to be seen
    picture.paste((100, 255), (0, 0, 12, 24))
    if mode == "P":
        picture = Image.new("P", (24, 24), 1)
        picture.putpalette([100] * 3 + [0] * 3)
        picture.paste(0, (0, 0, 12, 24))
    options = {"P": {"transparency": 1}, "RGBA": {"lossless": True}}.get(mode, {})
    (picture if mode == "P" else picture.convert(mode)).save(path, **options)
    image = training.read_image(str(path))
    assert image.shape == (3, 24, 24)
    assert (image[..., :12] == 100).all() and (image[..., 12:] == 255).all()


def write_photograph(path: Path, width: int, height: int, **options: object) -> Path:
    stream = np.random.default_rng(0).integers(256, size=(12, 16, 3), dtype=np.uint8)
    Image.fromarray(stream).resize((width, height), Image.Resampling.BICUBIC).save(path, **options)
    return path


@pytest.mark.parametrize(("least", "side"), [(300, 300), (301, 600), (600, 600), (149, 150)])
def test_a_large_jpeg_is_decoded_to_what_is_needed(tmp_path: Path, least: int, side: int) -> None:
    """A half, a quarter or an eighth of 1,200 pixels, upright."""
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    path = str(write_photograph(tmp_path / "x.jpg", 1600, 1200, quality=95, exif=exif))
    image, whole = training.read_image(path, least), training.read_image(path)
    assert whole.shape == (3, 1600, 1200) and image.shape == (3, side // 3 * 4, side)
    same = v2.functional.resize(whole, list(image.shape[1:])).float()
    assert (image.float() - same).abs().mean() < 1


@pytest.mark.parametrize("name", ["small.jpg", "x.png"])
def test_other_images_are_read_to_the_same_pixels_whatever_is_needed(
    tmp_path: Path, name: str
) -> None:
    size = (731, 400) if name == "small.jpg" else (1600, 1200)
    path = str(write_photograph(tmp_path / name, *size))
    assert torch.equal(training.read_image(path, 366), training.read_image(path))


@pytest.mark.parametrize("scale", ["0.08", "0.5", "1"])
def test_no_crop_of_what_is_decoded_is_enlarged(scale: str, tmp_path: Path) -> None:
    args = training.parse_args(["x", "--image-size", "32", "--crop-scale", scale])
    least = training.least_side(args)
    assert least >= training.eval_size(32)
    crop = training.RandomResizedCrop(32, (args.crop_scale, 1.0))
    image = torch.zeros(3, least, least, dtype=torch.uint8)
    parts = [crop.make_params([image]) for _ in range(500)]
    assert min(min(part["height"], part["width"]) for part in parts) >= 31  # they are rounded


def test_training_and_evaluation_decode_large_photographs_to_what_they_need(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, _ = prepare(folder, "--weights", "none", "--epochs", "1", "--image-size", "32")
    images, shapes = training.Reader(given).loader.dataset, []
    images.paths[0] = str(write_photograph(tmp_path / "x.jpg", 1600, 1200))
    decode = training.v2.functional.pil_to_tensor
    monkeypatch.setattr(
        training.v2.functional,
        "pil_to_tensor",
        lambda image: shapes.append(image.size) or decode(image),
    )
    for seed in (0, training.EVALUATED):
        images[0, seed]
    assert shapes == [(200, 150)] * 2  # 53 pixels were enough


def views(size: int, *arguments: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """How images are seen in training and in evaluation."""
    args = training.parse_args(["x", "--image-size", str(size), *arguments])
    return training.transforms(args)


def test_images_are_mirrored_unless_told_otherwise() -> None:
    left = torch.zeros(3, 32, 32, dtype=torch.uint8)
    left[:, :, :16] = 200
    shown = {"--no-flip": set(), "--crop-scale=1": set()}
    for flag, sides in shown.items():
        view = views(32, flag, "--crop-scale", "1")[0]
        sides.update(bool(view(left)[0, :, :8].float().mean() > 100) for _ in range(30))
    assert shown == {"--no-flip": {True}, "--crop-scale=1": {True, False}}


@pytest.mark.parametrize("scale", [0.1, 0.8])
def test_a_crop_shows_at_least_the_part_asked_for(scale: float) -> None:
    image = torch.arange(100.0).expand(3, 100, 100).byte()  # each column has its own shade
    view = views(32, "--no-flip", "--crop-scale", str(scale))[0]
    widths = [(crop := view(image))[0, 0, -1].item() - crop[0, 0, 0].item() for _ in range(200)]
    narrowest = 100 * (scale * 3 / 4) ** 0.5  # of a crop that is 3 wide and 4 high
    assert narrowest - 6 < min(widths) < narrowest + 12


def test_an_augmentation_depends_on_its_seed_alone(folder: Path) -> None:
    given, _ = prepare(folder, "--weights", "none", "--image-size", "24")
    images = training.Reader(given).loader.dataset
    first = images[3, 77][0]
    torch.manual_seed(5)
    images[4, 1]
    assert torch.equal(images[3, 77][0], first)
    assert not torch.equal(images[3, 78][0], first)
    train = given.data.train[:12]
    batches = training.cut_batches(train.repeat(2), 4, training.seeded("augment", 0, 1))
    loaded = []
    for workers in (0, 1, 4):
        given.args.workers = workers
        reader = training.Reader(given)
        loaded.append([pixels for pixels, _ in reader.read(batches, "")])
    for each in zip(*loaded, strict=True):
        assert torch.equal(each[0], each[1]) and torch.equal(each[0], each[2])


def test_one_loader_reads_the_batches_it_was_last_given_and_keeps_what_is_evaluated(
    folder: Path,
) -> None:
    given, _ = prepare(folder, "--weights", "none", "--epochs", "1", "--image-size", "32")
    given.args.workers = 2
    reader, train, val = training.Reader(given), given.data.train, given.data.val
    viewed = training.cut_batches(val, 8)
    first = list(reader.read(viewed, ""))
    workers = reader.loader._iterator._workers
    assert reader.views.keys() == set(val.tolist())
    drawn = training.cut_batches(train[:24], 8, training.seeded("augment", 0, 1))
    trained = list(reader.read(drawn, ""))
    assert (
        torch.cat([labels for _, labels in trained]).tolist()
        == given.data.labels[train[:24]].tolist()
    )
    assert reader.loader._iterator._workers is workers and len(workers) == 2
    reader.loader = None  # from here on nothing is read
    for (one, labels), (two, same) in zip(first, reader.read(viewed, ""), strict=True):
        assert torch.equal(one, two) and torch.equal(labels, same)


def test_crops_are_those_of_torchvision() -> None:
    image = torch.arange(40 * 30 * 3).remainder(251).byte().reshape(40, 30, 3).permute(2, 0, 1)
    ours = training.RandomResizedCrop(16, (0.5, 1.0))
    theirs = v2.RandomResizedCrop(16, (0.5, 1.0))
    for seed in range(20):
        crops = [torch.manual_seed(seed) and crop(image) for crop in (ours, theirs)]
        assert crops[0].shape == (3, 16, 16)
        assert (crops[0].int() - crops[1].int()).abs().max() <= 1  # 0 but for some processors


def test_images_are_normalised_by_the_statistics_of_imagenet() -> None:
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).reshape(1, 1, 1, 3)
    result = training.to_input(pixels, torch.device("cpu")).flatten().tolist()
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert result == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------ what reads images, and how many


@pytest.mark.parametrize(
    ("device", "start", "cores", "processes", "workers"),
    [
        ("cpu", "fork", 16, 1, 0),
        ("cuda", "fork", 16, 1, 15),
        ("cuda", "fork", 64, 4, 15),
        ("cuda", "fork", 8, 8, 1),
        ("cuda", "fork", 192, 1, 16),
        ("cuda", "forkserver", 16, 1, 8),
        ("cuda", "spawn", 24, 4, 5),
        ("mps", "spawn", 1, 1, 1),
    ],
)
def test_every_core_but_one_reads_images_for_an_accelerator_up_to_a_limit(
    device: str,
    start: str,
    cores: int,
    processes: int,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "process_cpu_count", lambda: cores, raising=False)
    monkeypatch.setattr(training, "get_start_method", lambda: start)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(training, "SHARED", Path("no", "such", "folder"))
    args = training.parse_args(["x", "--device", device])
    assert training.count_workers(args) == workers
    args.workers = 3
    assert training.count_workers(args) == 3


@pytest.mark.parametrize(
    ("size", "batches", "workers"), [(224, 9, 4), (224, 2.9, 0), (224, 0, 0), (224, 13, 6)]
)
def test_no_more_workers_than_have_room_for_their_batches(
    size: int,
    batches: float,
    workers: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two batches of each of six are on the way and one is in use; they are largest at 256 px."""
    free = int(batches * 64 * 256 * 256 * 3)
    monkeypatch.setattr(training.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setattr(training, "SHARED", tmp_path)
    args = training.parse_args(["x", "--image-size", str(size), "--workers", "6"])
    assert training.count_workers(args) == workers
    said = capsys.readouterr().err.splitlines()
    assert len(said) == (workers < 6)
    for line in said:
        assert f"room for batches of {workers} workers, not 6" in line


# --------------------------------------------------------------------------------- weights


def weights_of(path: Path, *arguments: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    command = ["x", "--weights", str(path), "--arch", "resnet18", *arguments]
    return training.load_weights(training.parse_args(command))


def test_a_head_of_another_size_is_dropped_and_the_rest_kept(tmp_path: Path) -> None:
    path = weights_file(tmp_path / "w.pth", 7)
    state, named = weights_of(path)
    model, said = training.build_model("resnet18", ["a", "b"], state, named)
    assert model.fc.weight.shape == (2, 512) and "head of 7 classes dropped" in said
    loaded = model.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in state.items() if not k.startswith("fc."))


@pytest.mark.parametrize(
    ("recorded", "kept"), [(["a", "b"], True), (["a", "c"], False), (None, True)]
)
def test_a_head_stays_where_size_and_known_classes_agree(
    tmp_path: Path, recorded: list[str] | None, kept: bool
) -> None:
    path = weights_file(tmp_path / "w.pth", 2, recorded)
    state, named = weights_of(path)
    model, said = training.build_model("resnet18", ["a", "b"], state, named)
    assert torch.equal(model.fc.weight, state["fc.weight"]) is kept
    assert ("head kept" in said) is kept


def test_half_precision_and_wrapped_weights_load(tmp_path: Path) -> None:
    state = models.resnet18(num_classes=3).state_dict()
    torch.save({"model": {f"module.{k}": v.half() for k, v in state.items()}}, tmp_path / "w.pth")
    loaded, _ = weights_of(tmp_path / "w.pth")
    model, _ = training.build_model("resnet18", ["a", "b"], loaded, [])
    assert model.conv1.weight.dtype == torch.float32
    assert torch.equal(model.conv1.weight, state["conv1.weight"].half().float())


def test_a_failed_download_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.urlopen", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    (tmp_path / "out" / "a").mkdir(parents=True)
    status = training.main([str(tmp_path / "out"), "--arch", "resnet18", "--weights", "DEFAULT"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert status == 2
    address = models.ResNet18_Weights.DEFAULT.url
    for part in (address, str(tmp_path / "cache"), "--weights PATH", "--weights none"):
        assert part in error


def test_default_weights_are_recorded_by_the_name_that_they_have_today(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    state = models.resnet18().state_dict()
    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", lambda *_, **__: state)
    folder = write_folder(tmp_path / "src", {"ape": 12, "bee": 8})
    command = [str(folder), "--epochs", "1", "--frozen-epochs", "1", *TINY]
    command += ["--weights", "DEFAULT", "--output", str(tmp_path / "run")]
    assert training.main(command) == 0
    assert "resnet18, IMAGENET1K_V1: head of 1000 classes dropped" in capsys.readouterr().out
    config = json.loads((tmp_path / "run/config.json").read_text())
    checkpoint = torch.load(tmp_path / "run/best.pt", weights_only=True)
    assert config["settings"]["weights"] == checkpoint["weights"] == "IMAGENET1K_V1"
    assert training.main([*command, "--resume"]) == 0


# ------------------------------------------------------------------------------ whole runs

SIZES = {"ape": 44, "bee": 30, "cat": 22, "dog": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "src", SIZES)


@pytest.fixture(scope="module")
def scratch_run(folder: Path) -> Path:
    """A run from random weights."""
    output = folder.parent / "scratch"
    command = [str(folder), "--weights", "none", "--epochs", "4", "--output", str(output), *TINY]
    assert training.main(command) == 0
    return output


def test_a_run_beats_chance_clearly(scratch_run: Path) -> None:
    last = rows_of(scratch_run / "history.csv")[-1]
    assert float(last["balanced_accuracy"]) > 0.8  # chance: 0.25
    assert float(last["train_loss"]) < 1.0  # log(4) = 1.39 at the start


def test_the_history_has_a_row_an_epoch_and_shows_what_the_sampler_did(scratch_run: Path) -> None:
    history = rows_of(scratch_run / "history.csv")
    assert list(history[0]) == [
        *("epoch", "phase", "train_loss", "val_loss", "accuracy", "balanced_accuracy", "many"),
        *("medium", "few", "half_width", "macro_f1", "as_trained_accuracy"),
        *("as_trained_balanced_accuracy", "as_trained_many", "as_trained_medium"),
        *("as_trained_few", "natural_accuracy", "calibration_error"),
        *("as_trained_calibration_error", "logit_scale", "logit_shift"),
        *("fewest_draws", "most_draws"),
        *("distinct_images", "learning_rate", "images_per_second", "data_wait", "seconds"),
    ]
    assert [row["epoch"] for row in history] == [str(epoch) for epoch in range(1, 5)]
    assert {row["phase"] for row in history} == {"full"}
    data = load(scratch_run.parent / "src")
    weights = training.sample_weights(data.labels[data.train], 1.0)
    drawn = draw(weights, True, 3)
    counts = Counter(data.labels[data.train][drawn].tolist()).values()
    assert int(history[2]["fewest_draws"]) == min(counts)
    assert int(history[2]["most_draws"]) == max(counts)
    distinct = len(set(drawn.tolist())) / len(drawn)
    assert float(history[2]["distinct_images"]) == pytest.approx(distinct, abs=1e-5)


def test_reports_agree_with_each_other(scratch_run: Path) -> None:
    predictions = rows_of(scratch_run / "predictions.csv")
    classes = rows_of(scratch_run / "classes.csv")
    last = rows_of(scratch_run / "history.csv")[-1]
    assert list(predictions[0]) == [
        *("path", "class", "predicted", "probability", "true_probability")
    ]
    assert list(classes[0]) == [
        *("class", "train_images", "val_images", "draws", "recall", "low", "high"),
        *("precision", "f1"),
    ]
    assert [int(row["val_images"]) for row in classes] == [9, 6, 4, 2]
    assert [int(row["train_images"]) for row in classes] == [35, 24, 18, 10]
    assert sum(int(row["draws"]) for row in classes) == 4 * (35 + 24 + 18 + 10)
    right = Counter(row["class"] for row in predictions if row["class"] == row["predicted"])
    for row in classes:
        recall = right[row["class"]] / int(row["val_images"])
        assert float(row["recall"]) == pytest.approx(recall, abs=1e-5)
        assert float(row["low"]) <= recall <= float(row["high"])
        taken = sum(each["predicted"] == row["class"] for each in predictions)
        assert float(row["precision"]) == pytest.approx(right[row["class"]] / taken, abs=1e-5)
        f1 = 2 / (1 / recall + taken / right[row["class"]])
        assert float(row["f1"]) == pytest.approx(f1, abs=1e-5)
    balanced = sum(float(row["recall"]) for row in classes) / 4
    assert float(last["balanced_accuracy"]) == pytest.approx(balanced, abs=1e-5)
    assert float(last["accuracy"]) == pytest.approx(right.total() / 21, abs=1e-5)
    macro = sum(float(row["f1"]) for row in classes) / 4
    assert float(last["macro_f1"]) == pytest.approx(macro, abs=1e-5)
    for row in predictions:
        same = row["true_probability"] == row["probability"]
        assert same is (row["predicted"] == row["class"])
        assert (scratch_run.parent / "src" / row["path"]).is_file()
        assert row["path"].startswith(row["class"] + "/")


def test_the_run_folder_holds_what_is_promised_and_nothing_else(scratch_run: Path) -> None:
    rows = rows_of(scratch_run / "predictions.csv")
    mistakes = ["mistakes.png"] * any(row["class"] != row["predicted"] for row in rows)
    assert sorted(path.name for path in scratch_run.iterdir()) == [
        *("best.pt", "classes.csv", "classes.png", "config.json", "curves.png", "history.csv"),
        *("last.pt", *mistakes, "predictions.csv", "resume.pt", "split.csv"),
    ]
    config = json.loads((scratch_run / "config.json").read_text())
    assert config["classes"] == list(SIZES) and config["train_images"] == [35, 24, 18, 10]
    assert config["settings"]["epochs"] == 4 and config["settings"]["device"] == "cpu"
    assert config["versions"]["torch"] == torch.__version__
    for name in ("curves.png", "classes.png"):
        colours = Image.open(scratch_run / name).convert("RGB").getcolors(2**20)
        shares = {colour: count for count, colour in colours}
        assert shares[BLUE] > 1000
        assert (shares.get(ORANGE, 0) > 1000) is (name == "curves.png")


def test_a_checkpoint_alone_gives_the_predictions_again(scratch_run: Path, folder: Path) -> None:
    """But for calibration, which judges each half of the images by what fits the other half."""
    one, output = scratch_run.parent / "plain", scratch_run.parent / "again"
    command = [str(folder), "--weights", "none", "--epochs", "2", "--no-calibration", *TINY]
    assert training.main([*command, "--output", str(one)]) == 0
    command = [str(folder), "--epochs", "0", "--weights", str(one / "last.pt"), *TINY]
    assert training.main([*command, "--output", str(output)]) == 0
    assert (output / "predictions.csv").read_text() == (one / "predictions.csv").read_text()
    history = rows_of(output / "history.csv")
    assert [row["phase"] for row in history] == ["given"] and history[0]["train_loss"] == "nan"
    content = torch.load(scratch_run / "best.pt", weights_only=True)
    model = models.get_model(content["arch"], num_classes=len(content["classes"]))
    model.load_state_dict(content["state_dict"])
    assert content["image_size"] == 32


def test_the_same_settings_give_the_same_run(scratch_run: Path, folder: Path) -> None:
    runs = []
    for name, seed in (("one", "4"), ("two", "4"), ("three", "5")):
        output = folder.parent / name
        command = [str(folder), "--weights", "none", "--epochs", "1", "--seed", seed, *TINY]
        assert training.main([*command, "--output", str(output)]) == 0
        history = rows_of(output / "history.csv")
        times = ("images_per_second", "data_wait", "seconds")
        runs.append([{k: v for k, v in row.items() if k not in times} for row in history])
    assert runs[0] == runs[1] != runs[2]
    assert (folder.parent / "one/predictions.csv").read_bytes() == (
        folder.parent / "two/predictions.csv"
    ).read_bytes()


@pytest.fixture(scope="module")
def pretrained_runs(folder: Path) -> dict[str, dict]:
    """The weights given, rescaled, and after the head alone and each way to train all layers."""
    path = weights_file(folder.parent / "pretrained.pth")
    model = models.resnet18(num_classes=7)
    model.load_state_dict(torch.load(path, weights_only=True))
    training.rescale(model)
    states = {"given": model.state_dict()}
    for way in ("head", "firm", "gentle", "auto"):
        output = folder.parent / way
        epochs = "1" if way in ("firm", "auto") else "2"
        command = [str(folder), "--weights", str(path), "--epochs", epochs, "--output", str(output)]
        command += ["--frozen-epochs", "2"] if way == "head" else ["--finetune", way]
        assert training.main([*command, *TINY]) == 0
        states[way] = torch.load(output / "last.pt", weights_only=True)["state_dict"]
    return states


def test_the_frozen_phase_trains_the_head_alone(pretrained_runs: dict[str, dict]) -> None:
    given, head = pretrained_runs["given"], pretrained_runs["head"]
    for name, value in given.items():
        if not name.startswith("fc."):
            assert torch.equal(head[name], value), name
    assert head["fc.weight"].abs().sum() > 0


def test_firm_fine_tuning_moves_everything(pretrained_runs: dict[str, dict]) -> None:
    for name, value in pretrained_runs["given"].items():
        if not name.startswith("fc."):
            assert not torch.equal(pretrained_runs["firm"][name], value), name


def test_gentle_fine_tuning_moves_the_second_half_but_no_batchnorm_statistics(
    pretrained_runs: dict[str, dict],
) -> None:
    gentle = pretrained_runs["gentle"]
    for name, value in pretrained_runs["given"].items():
        statistics = "running" in name or "tracked" in name
        if not name.startswith("fc."):
            moves = not statistics and name.startswith(("layer3.", "layer4."))
            assert torch.equal(gentle[name], value) is not moves, name


def test_auto_ends_where_it_says_on_the_line_from_the_head_to_firm(
    pretrained_runs: dict[str, dict], folder: Path
) -> None:
    config = json.loads((folder.parent / "auto/config.json").read_text())
    rows = rows_of(folder.parent / "auto/history.csv")
    assert [(row["epoch"], row["phase"]) for row in rows] == [("0", "head"), ("1", "firm")]
    assert config["phases"] == ["head", "firm"]
    values = config["validation_balanced_accuracy_by_share"]["firm"]
    found = {float(share): value for share, value in values.items()}
    assert list(found)[:3] == [1.0, 0.0, 0.75]
    share = max(found, key=found.get)
    assert float(rows[-1]["balanced_accuracy"]) == pytest.approx(found[share], abs=1e-6)
    given, firm, auto = (pretrained_runs[name] for name in ("given", "firm", "auto"))
    for name in ("conv1.weight", "layer4.1.bn2.running_var"):
        torch.testing.assert_close(auto[name], given[name] + share * (firm[name] - given[name]))


@pytest.mark.parametrize(
    ("flags", "phases"),
    [  # 87 training images in batches of 16 are 6 steps, so that 50 of them take 9 epochs
        ("--epochs 0", ([], [], [0])),
        ("--epochs 1", ([0], [], [1])),
        ("--epochs 17", ([0], [], list(range(1, 18)))),  # more than half of them: no trial
        ("--epochs 18", ([0], list(range(1, 10)), list(range(10, 19)))),
        ("--epochs 20 --frozen-epochs 2", ([1, 2], list(range(3, 12)), list(range(12, 21)))),
        ("--epochs 2 --frozen-epochs 2", ([1, 2], [], [])),
        ("--epochs 18 --frozen-epochs 0", ([], list(range(1, 10)), list(range(10, 19)))),
        ("--epochs 2 --finetune firm", ([0], [], [1, 2])),
        ("--epochs 2 --finetune gentle --frozen-epochs 1", ([1], [], [2])),
        ("--epochs 20 --batch-size 1", ([0], [1], list(range(2, 21)))),
        ("--epochs 2 --weights none", ([], [], [1, 2])),
    ],
)
def test_the_epochs_are_those_of_the_head_of_a_trial_and_of_the_rest(
    flags: str, phases: tuple[list[int], ...], folder: Path
) -> None:
    path = weights_file(folder.parent / "s.pth")
    given, _ = prepare(folder, "--weights", str(path), "--batch-size", "16", *flags.split())
    found = {phase.name: list(phase.epochs) for phase in training.plan(given, {"trial": {1.0: 1}})}
    rest = [epoch for name in found.keys() - {"head", "trial"} for epoch in found[name]]
    assert (found.get("head", []), found.get("trial", []), rest) == phases


@pytest.mark.usefixtures("short_trial")
@pytest.mark.parametrize(
    ("found", "flags", "name", "rates"),
    [
        ({1.0: 0.7, 0.0: 0.6, 0.75: 0.6}, [], "firm", [9e-4, 3e-4]),
        ({1.0: 0.5, 0.0: 0.6, 0.75: 0.6, 0.5: 0.7, 0.25: 0.6}, [], "firm", [9e-4, 3e-4]),
        ({1.0: 0.5, 0.0: 0.6, 0.75: 0.6, 0.5: 0.6, 0.25: 0.7}, [], "gentle", [6e-5, 2e-5]),
        ({1.0: 0.5, 0.0: 0.6, 0.75: 0.5}, [], "gentle", [6e-5, 2e-5]),
        ({1.0: 0.5, 0.0: 0.6, 0.75: 0.5}, ["--backbone-lr", "1.5e-3"], "gentle", [3e-4, 1e-4]),
    ],
)
def test_auto_goes_on_as_its_trial_found(
    found: dict[float, float], flags: list[str], name: str, rates: list[float], folder: Path
) -> None:
    path = weights_file(folder.parent / "s.pth")
    flags = ["--weights", str(path), "--epochs", "2", "--batch-size", "16", *flags]
    given, progress = prepare(folder, *flags)
    progress.shares["trial"] = found
    head = copy.deepcopy(progress.model.fc.state_dict())
    stage = begin(given, progress, 2)
    assert stage.phase.name == name and stage.trainer.start is None
    groups = stage.trainer.optimizer.param_groups
    assert [group["max_lr"] for group in groups] == pytest.approx(rates)
    assert progress.model.conv1.weight.requires_grad is (name == "firm")
    for key, value in progress.model.fc.state_dict().items():
        assert torch.equal(value, head[key])


class Trial(SimpleNamespace):
    """A run after its trial: given, progress, stage, batches and the weights after each step."""


def trial_of_six_steps(folder: Path, found: dict[float, float], batch_size: int = 16) -> Trial:
    """A trial, at the end of which this is `found`."""
    path = weights_file(folder.parent / "s.pth")
    small = ["--weights", str(path), "--epochs", "2", "--image-size", "32", "--no-flip"]
    given, progress = prepare(folder, *small, "--batch-size", str(batch_size), "--crop-scale", "1")
    stage, passed = begin(given, progress, 1), []
    stage.trainer.optimizer.register_step_post_hook(
        lambda *_: passed.append(copy.deepcopy(progress.model.state_dict()))
    )
    batches = train(given, stage, 1)
    training.estimate_statistics(given, stage.trainer.average, batches, stage.reader)
    with pytest.MonkeyPatch.context() as patch:
        said = SimpleNamespace(targets=())
        patch.setattr(training, "search_shares", lambda *_: (found, said))
        assert training.choose(given, progress, stage.reader) is None  # of images it did not see
    progress.history.append({"epoch": 1, "phase": "trial"})
    return Trial(given=given, progress=progress, stage=stage, batches=batches, passed=passed)


@pytest.mark.usefixtures("short_trial")
def test_a_trial_is_judged_by_the_average_of_its_second_half(folder: Path) -> None:
    run = trial_of_six_steps(folder, {1.0: 0.7, 0.0: 0.6})
    assert run.stage.phase.name == "trial" and len(run.passed) == 6
    judged = run.progress.trainer.evaluated.state_dict()
    for name, _ in run.progress.model.named_parameters():
        mean = torch.stack([weights[name] for weights in run.passed[2:]]).mean(0)
        torch.testing.assert_close(judged[name], mean)
        assert torch.equal(run.progress.model.state_dict()[name], run.passed[-1][name])


@pytest.mark.usefixtures("short_trial")
def test_batchnorm_of_a_trial_s_average_knows_the_images_that_were_drawn(folder: Path) -> None:
    run = trial_of_six_steps(folder, {1.0: 0.7, 0.0: 0.6})
    result = run.progress.trainer.result
    read = run.stage.reader.read(run.batches, "")
    inputs = [training.to_input(images, torch.device("cpu")) for images, _ in read]
    means = [result.conv1(batch).mean((0, 2, 3)) for batch in inputs]
    expected = torch.stack(means).mean(0)
    torch.testing.assert_close(result.bn1.running_mean, expected, atol=1e-5, rtol=1e-4)
    assert result.eval().bn1.momentum == 0.1


@pytest.mark.usefixtures("short_trial")
def test_a_trial_of_one_step_is_judged_by_the_weights_after_it(folder: Path) -> None:
    run = trial_of_six_steps(folder, {1.0: 0.7, 0.0: 0.6}, batch_size=87)
    assert run.stage.phase.name == "trial" and len(run.passed) == 1
    judged = run.progress.trainer.result.state_dict()
    for name, _ in run.progress.model.named_parameters():
        assert torch.equal(judged[name], run.passed[0][name]), name


def test_the_images_to_choose_by_are_spread_and_leave_no_class_out() -> None:
    labels = torch.tensor([0] * 3001 + [1] * 2 + [2] * 1000 + [3] * 999)
    data = training.Data(list("abcd"), [], [], labels, labels[:0], torch.arange(5002), [], 0, [])
    chosen = training.pick_searched(data)  # every third image, of which none is of class 1
    assert data.counts(chosen).tolist() == [1001, 2, 334, 333]
    assert chosen[:3].tolist() == [0, 3, 6] and (chosen.diff() > 0).all()
    few = data._replace(val=torch.arange(1500, 3500))
    assert torch.equal(training.pick_searched(few), few.val)


@pytest.mark.usefixtures("short_trial")
def test_processes_go_on_from_a_trial_with_the_statistics_of_the_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, sent = trial_of_six_steps(folder, {1.0: 0.5, 0.0: 0.6}), []
    monkeypatch.setattr(training.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(training.dist, "broadcast", lambda value, rank: sent.append(value + rank))
    monkeypatch.setattr(training, "update_bn", lambda *_: None)
    average = run.progress.trainer.average
    training.estimate_statistics(run.given, average, run.batches, run.stage.reader)
    for given, value in zip(sent, average.buffers(), strict=True):
        assert torch.equal(given, value)


@pytest.mark.usefixtures("short_trial")
def test_firm_goes_on_from_the_last_step_of_the_trial(folder: Path) -> None:
    run = trial_of_six_steps(folder, {1.0: 0.7, 0.0: 0.6})
    rate, stored = run.progress.trainer.rate(), run.progress.trainer.state_dict()
    gone_on = begin(run.given, run.progress, 2).trainer
    run.progress.trainer, run.progress.stored = None, copy.deepcopy(stored)
    resumed = begin(run.given, run.progress, 2).trainer
    for firm in (gone_on, resumed):
        assert firm.phase == "firm" and firm.result is run.progress.model and firm.start is None
        assert firm.scheduler.last_epoch == 6 and firm.scheduler.total_steps == 12
        assert firm.optimizer.param_groups[1]["lr"] == pytest.approx(2 * rate)  # of the next step
        for name, value in run.progress.model.named_parameters():
            assert torch.equal(value, run.passed[-1][name])
            assert firm.optimizer.state[value]["step"] == 6
        firm.scheduler.step()
        assert firm.rate() == pytest.approx(3e-4 * (1 + math.cos(math.pi * 6 / 10)) / 2, rel=1e-3)
    assert not run.progress.stored


@pytest.mark.usefixtures("short_trial")
def test_auto_that_goes_on_after_its_trial_ends_as_firm_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, states = weights_file(folder.parent / "s.pth"), []
    monkeypatch.setattr(training, "best_share", lambda found: 1.0)
    monkeypatch.setitem(training.RECIPES, "trial", training.RECIPES["trial"]._replace(rate=3e-4))
    for way in ("auto", "firm"):
        output = folder.parent / f"on_{way}"
        command = [str(folder), "--weights", str(path), "--epochs", "2", "--finetune", way]
        assert training.main([*command, "--output", str(output), *TINY]) == 0
        states.append(torch.load(output / "last.pt", weights_only=True)["state_dict"])
    assert [row["phase"] for row in rows_of(folder.parent / "on_auto/history.csv")][1:] == [
        "trial",
        "firm",
    ]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.parametrize(("way", "rising"), [("auto", 1), ("firm", 1), ("gentle", 11)])
def test_gentle_alone_warms_up_for_a_tenth_of_its_steps(
    way: str, rising: int, folder: Path
) -> None:
    path = weights_file(folder.parent / "s.pth")
    flags = ["--finetune", way, "--epochs", "20", "--batch-size", "16"]  # 120 steps
    given, progress = prepare(folder, "--weights", str(path), *flags)
    trainer, rates = begin(given, progress, 1).trainer, []
    for _ in range(20):
        rates.append(trainer.rate())
        trainer.optimizer.step()
        trainer.scheduler.step()
    assert rates.index(max(rates)) == rising
    assert max(rates) == pytest.approx({"auto": 1.5e-4, "firm": 3e-4, "gentle": 2e-5}[way])


@pytest.mark.usefixtures("short_trial")
def test_gentle_begins_after_the_trial_at_the_best_place_of_its_way(folder: Path) -> None:
    run = trial_of_six_steps(folder, {1.0: 0.5, 0.0: 0.6})
    found = copy.deepcopy(run.progress.trainer.result.state_dict())
    gentle = begin(run.given, run.progress, 2).trainer
    assert gentle.phase == "gentle" and gentle.scheduler.total_steps == 6
    assert gentle.scheduler.last_epoch == 0 and not gentle.optimizer.state
    for network in (run.progress.model, gentle.result):
        for name, value in network.state_dict().items():
            assert torch.equal(value, found[name]), name


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--finetune", "auto"], False),
        (["--finetune", "firm"], False),
        (["--finetune", "gentle"], True),
        (["--frozen-epochs", "0"], True),  # it may be the weights' own
        (["--frozen-epochs", "1", "--weights", "none"], True),
    ],
)
def test_the_head_is_less_sure_where_the_whole_network_begins_to_move(
    flags: list[str], kept: bool, folder: Path
) -> None:
    path = weights_file(folder.parent / "s.pth")
    given, progress = prepare(folder, "--epochs", "2", "--weights", str(path), *flags)
    torch.nn.init.ones_(progress.model.fc.bias)
    head = copy.deepcopy(progress.model.fc.state_dict())
    if "--frozen-epochs" not in flags:
        progress.history.append({"epoch": 0, "phase": "head"})
    start = begin(given, progress, 2 if "none" in flags else 1).trainer.start
    assert (start is None) is (not {"auto", "0"} & set(flags))
    for name, value in progress.model.fc.state_dict().items():
        torch.testing.assert_close(value, head[name] * (1 if kept else 0.1))
        assert start is None or torch.equal(start.fc.state_dict()[name], head[name])


@pytest.mark.parametrize(
    ("recalls", "searched", "head", "best"),
    [
        ({1.0: 5, 0.0: 1, 0.75: 9, 0.5: 9, 0.25: 8}, 21, math.nan, 0.75),  # the farther of equals
        ({1.0: 5, 0.0: 1, 0.75: 4}, 21, math.nan, 1.0),  # nothing is looked at after it got worse
        ({1.0: 5, 0.0: 6, 0.75: 4}, 21, math.nan, 0.0),
        ({1.0: 5, 0.0: 6, 0.75: 6, 0.5: 7, 0.25: 8}, 21, math.nan, 0.25),
        ({1.0: 5, 0.75: 4}, 21, 0.4, 1.0),  # of these images the head's result is known
        ({1.0: 5, 0.75: 4}, 21, 0.6, 0.0),
        ({1.0: 5, 0.0: 4, 0.75: 4}, 11, 0.6, 1.0),  # of all 21 it says little about these
    ],
)
def test_the_search_takes_the_best_place(
    recalls: dict[float, int],
    searched: int,
    head: float,
    best: float,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = weights_file(folder.parent / "s.pth")
    given, progress = prepare(folder, "--epochs", "1", "--weights", str(path))
    stage = begin(given, progress, 1)
    for weight in progress.model.parameters():
        torch.nn.init.ones_(weight)
        weight.requires_grad = False
    for weight in stage.trainer.start.parameters():
        torch.nn.init.zeros_(weight)
    places, asked = [], []

    def evaluate(_: object, model: torch.nn.Module, *rest: Any) -> SimpleNamespace:
        places.append(model.fc.bias[0].item())
        asked.append(len(rest[1]))
        return SimpleNamespace(recall=torch.full((4,), recalls[places[-1]] / 10))

    monkeypatch.setattr(training, "evaluate", evaluate)
    monkeypatch.setattr(training, "SEARCHED", searched)
    found, said = training.search_shares(given, stage.trainer, stage.reader, head)
    assert places == list(recalls)
    looked_at = {share: right / 10 for share, right in recalls.items()}
    assert found == pytest.approx({0.0: head} | looked_at)
    assert (said.recall[0] == found[best]) if best in recalls else (said is None)
    assert progress.model.fc.bias[0].item() == best == progress.model.conv1.weight.mean()
    assert set(asked) == {searched}


def test_what_the_head_had_is_not_measured_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where the search looks at all validation images, and it would be the same."""
    path = str(weights_file(tmp_path / "s.pth"))
    command = [str(folder), "--arch", "resnet18", "--weights", path, "--epochs", "1", "--no-flip"]
    evaluate, titles, found = training.evaluate, [], []

    def watch(*values: Any) -> training.Evaluation:
        titles.extend(values[4:])
        return evaluate(*values)

    monkeypatch.setattr(training, "evaluate", watch)
    for name, head in (("known", "auto"), ("new", "0")):  # without a head's phase nothing is known
        command = [*command, "--output", str(tmp_path / name), "--frozen-epochs", head]
        assert training.main([*command, "--image-size", "32", "--device", "cpu"]) == 0
        assert ("choosing, 0%" in titles) is (name == "new")
        config = json.loads((tmp_path / name / "config.json").read_text())
        found.append(config["validation_balanced_accuracy_by_share"]["firm"])
    head_row = rows_of(tmp_path / "known" / "history.csv")[0]
    assert found[0]["0.0"] == pytest.approx(float(head_row["balanced_accuracy"]), abs=1e-5)
    assert list(found[0])[:3] == list(found[1])[:3] == ["1.0", "0.0", "0.75"]


def test_the_head_takes_a_thousand_steps_however_few_images_and_epochs_there_are(
    folder: Path,
) -> None:
    path = str(weights_file(folder.parent / "steps.pth"))
    for epochs, batch_size, passes in ((1, 16, 184), (4, 16, 46), (1, 1, 12), (1000, 16, 1)):
        given, progress = prepare(
            folder, "--weights", path, "--epochs", str(epochs), "--frozen-epochs", str(epochs),
            "--batch-size", str(batch_size), "--image-size", "32",
        )  # fmt: skip
        stage = begin(given, progress, 1)
        drawn = training.draw_epoch(given, stage.phase, 1)
        assert stage.phase.passes == passes and len(drawn) == 87 * passes  # of 87 images
        steps = epochs * len(training.cut_batches(drawn, batch_size))
        assert steps == stage.trainer.scheduler.total_steps >= 1000


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 11, 19, 20, 300])
def test_the_learning_rate_rises_and_falls_in_any_number_of_steps(steps: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.5)
    phase, given = training.Phase("full", range(1), cycle=steps), SimpleNamespace(compute=CPU)
    trainer, rates = training.Trainer(torch.nn.Linear(1, 1), phase, optimizer, given), []
    for _ in range(steps):
        rates.append(trainer.rate())
        optimizer.step()
        trainer.scheduler.step()
    if steps >= 10:
        assert (
            max(rates) == pytest.approx(0.5)
            and rates.index(max(rates)) == max(2, steps / 10) // 1 - 1
        )
        assert rates[0] < 0.03 and rates[-1] < 0.05


def test_from_random_weights_every_layer_is_trained(folder: Path) -> None:
    given, progress = prepare(folder, "--epochs", "1", "--weights", "none", "--image-size", "64")
    before = {name: value.clone() for name, value in progress.model.state_dict().items()}
    torch.nn.init.normal_(progress.model.fc.weight)  # zeros give the layers below no gradient
    stage = begin(given, progress, 1)
    train(given, stage, 1)
    for name, value in stage.trainer.result.state_dict().items():
        assert not torch.equal(value, before[name]), name


def test_evaluation_is_larger_by_up_to_a_seventh_in_whole_cells_of_32_pixels() -> None:
    sizes = {1: 1, 32: 32, 64: 64, 100: 100, 112: 128, 128: 128, 223: 224, 224: 256, 448: 512}
    assert {size: training.eval_size(size) for size in sizes} == sizes


def test_a_checkpoint_records_the_size_it_was_evaluated_at(folder: Path) -> None:
    given, progress = prepare(folder, "--weights", "none")
    progress.history.append({"epoch": 1})
    progress.trainer = SimpleNamespace(result=progress.model)
    content = training.pack_model(given, progress, training.Calibration())
    assert content["image_size"] == 256


def test_evaluation_shows_objects_about_as_large_as_training_crops_do() -> None:
    """Of a square photograph: half to all of its area, against all of it; 22 % apart if not."""
    image = torch.zeros(3, 600, 600, dtype=torch.uint8)
    train, evaluation = views(224)
    assert train(image).shape == (3, 224, 224) and evaluation(image).shape == (3, 256, 256)
    torch.manual_seed(0)
    crop = training.RandomResizedCrop(224, (0.5, 1.0))
    parts = [crop.make_params([image]) for _ in range(500)]
    enlarged = [224 / (part["height"] * part["width"]) ** 0.5 for part in parts]
    assert np.mean(enlarged) == pytest.approx(256 / 600, rel=0.08)


def test_the_features_are_what_the_network_sees_in_evaluation(folder: Path) -> None:
    given, progress = prepare(folder, "--image-size", "32", "--weights", "none")
    model, reader = progress.model, training.Reader(given)
    torch.nn.init.normal_(model.fc.weight)
    features, images = training.extract_features(given, model, reader), reader.loader.dataset
    inputs = torch.stack([images[at, training.EVALUATED][0] for at in range(len(features))])
    expected = model.eval()(training.to_input(inputs, CPU.device))
    assert torch.allclose(model.fc(features), expected, atol=1e-4)


def test_the_result_of_full_fine_tuning_is_the_average_from_the_start_on(folder: Path) -> None:
    path = str(weights_file(folder.parent / "averaged.pth"))
    given, progress = prepare(folder, "--epochs", "1", "--frozen-epochs", "0", "--weights", path,
                              "--finetune", "gentle", "--batch-size", "44")  # fmt: skip
    torch.nn.init.normal_(progress.model.fc.weight)
    stage = begin(given, progress, 1)
    weight = progress.model.layer4[0].conv1.weight
    seen = [weight.detach().clone()]
    stage.trainer.optimizer.register_step_post_hook(lambda *_: seen.append(weight.detach().clone()))
    train(given, stage, 1)
    assert len(seen) == 3
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    mean = torch.stack(seen).mean(0)
    assert torch.allclose(stage.trainer.evaluated.layer4[0].conv1.weight, mean, atol=1e-7)


class Unanswered(TorchDispatchMode):
    """Refuses, while it is on, what would wait for a device: questions, tensors made of numbers.

    Counts the copies from one device to another.
    """

    on, copies = False, 0

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        names = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "equal")
        if self.on and op.overloadpacket.__name__ in names:
            raise AssertionError(f"{op} in a step")
        result = op(*args, **(kwargs or {}))
        devices = [each.device for each in (result, *args) if isinstance(each, torch.Tensor)]
        copied = op.overloadpacket.__name__ in ("_to_copy", "copy_") and len(set(devices)) > 1
        self.copies += self.on and copied
        return result


class WatchedSteps:
    """A source of batches; from the first one to the end, `mode` is on."""

    def __init__(self, loaded: Any, mode: Unanswered):
        self.loaded, self.mode = list(loaded), mode

    def read(self, *_: object) -> Iterator[Any]:
        self.mode.on = True
        try:
            yield from self.loaded
        finally:
            self.mode.on = False


def batch_of_noise(size: int) -> list[torch.Tensor]:
    return [torch.randint(256, (2, size, size, 3)).byte(), torch.tensor([0, 1])]


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_step_asks_no_value_and_copies_its_batch_alone(
    device: str, epoch: int, folder: Path
) -> None:
    """On a CPU, and on torch's device without values, where AdamW has to be another optimizer.

    What this cannot show: a kernel or a library that waits by itself, memory that is not pinned,
    and what only CUDA's code does. `test_gpu.py` shows that.
    """
    path = str(weights_file(folder.parent / "watched.pth"))
    small = ["--weights", path, "--epochs", "2", "--image-size", "32", "--batch-size", "48"]
    given, progress = prepare(folder, *small)
    if epoch == 2:  # a gentle one, with an average
        progress.shares["trial"] = {1.0: 0.5, 0.0: 0.6}
    stage, mode = begin(given, progress, epoch), Unanswered()
    batches = training.cut_batches(given.data.train, 48, training.seeded("augment", 0, 1))
    source = WatchedSteps(stage.source.read(batches, ""), mode)
    training.to_input(batch_of_noise(32)[0], torch.device(device))  # makes what is made once
    if device == "cpu":
        with mode:
            training.train_epoch(given, stage.trainer, batches, source)
        assert mode.copies == 0
        return
    for module in (progress.model, stage.trainer.result):
        module.to(device)
    weights = [weight for weight in progress.model.parameters() if weight.requires_grad]
    place, plain = torch.device(device), contextlib.nullcontext
    compute = SimpleNamespace(device=place, rank=0, world_size=1, autocast=plain)
    stage.trainer.optimizer, stage.trainer.weights = torch.optim.SGD(weights, 0.1), weights
    with mode, pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        given = dataclasses.replace(given, compute=compute)
        training.train_epoch(given, stage.trainer, batches, source)  # its end asks, in vain
    assert mode.copies == 2 * len(batches)  # images and targets


def test_a_frozen_phase_costs_one_pass_over_the_images(folder: Path, tmp_path: Path) -> None:
    output, path = tmp_path / "run", weights_file(tmp_path / "w.pth")
    calls: Counter[tuple[str, str]] = Counter()
    sys.setprofile(lambda frame, event, _: calls.update([(frame.f_code.co_name, event)]))
    try:
        command = [str(folder), "--weights", str(path), "--epochs", "3", "--frozen-epochs", "3"]
        assert training.main([*command, "--output", str(output), *TINY]) == 0
    finally:
        sys.setprofile(None)
    rows = rows_of(output / "predictions.csv")
    shown = min(24, sum(row["class"] != row["predicted"] for row in rows))  # as mistakes, later
    assert calls["read_image", "call"] == sum(SIZES.values()) + shown


def test_unreadable_images_are_named_left_out_and_counted(
    make_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder({"ape": 9, "bee": 9})
    whole = (root / "ape/ape_000.jpg").read_bytes()
    (root / "ape/ape_000.jpg").write_bytes(whole[:-100])  # its header is sound
    assert Image.open(root / "ape/ape_000.jpg").size == (32, 32)
    (root / "bee/bee_001.jpg").write_text("no image")
    (root / "bee/bee_002.jpg").write_bytes(b"")
    output = root.parent / "run"
    command = [str(root), "--weights", "none", "--epochs", "1", "--output", str(output), *TINY]
    assert training.main(command) == 0
    out, err = capsys.readouterr()
    for name in ("ape_000.jpg", "bee_001.jpg", "bee_002.jpg"):
        assert sum(line.startswith("warning: ") and name in line for line in err.splitlines()) == 1
    assert "3 unreadable left out" in out
    assert "unreadable images, left out and listed in config.json: 3" in out
    assert len(json.loads((output / "config.json").read_text())["left_out"]) == 3
    assert [row["train_images"] for row in rows_of(output / "classes.csv")] == ["6", "6"]


def test_byte_identical_images_never_stand_on_both_sides(
    make_folder: Callable[..., Path],
) -> None:
    root = make_folder({"ape": 20, "bee": 20})
    for number in range(15):
        content = (root / f"ape/ape_{number:03}.jpg").read_bytes()
        (root / f"ape/copy_{number:03}.jpg").write_bytes(content)
        (root / f"bee/copy_{number:03}.jpg").write_bytes(content if number < 5 else b"x" + content)
    data = load(root, "--val-fraction", "0.3")
    sides = [{Path(data.paths[i]).read_bytes() for i in part} for part in (data.train, data.val)]
    assert sides[1] and not sides[0] & sides[1]


# ------------------------------------------------------------- evaluation on what OUT left out


@pytest.fixture
def left_out(make_folder: Callable[..., Path]) -> tuple[Path, Path]:
    """SRC with 2 x 20 images, and OUT with 10 of the first class and 5 of the second."""
    source = make_folder({"ape": 20, "bee": 20})
    out = source.parent / "out"
    for name, kept in (("ape", 10), ("bee", 5)):
        (out / name).mkdir(parents=True)
        for path in sorted((source / name).iterdir())[:kept]:
            (out / name / path.name).write_bytes(path.read_bytes())
    return source, out


def test_source_validates_on_what_out_left_out_and_leaves_the_split_alone(
    left_out: tuple[Path, Path],
) -> None:
    source, out = left_out
    (source / "ape/._ape_000.jpg").write_bytes(b"what macOS writes beside a file")
    (source / ".cache").mkdir()
    alone = load(out)
    data = load(out, "--source", str(source))
    assert (
        data.parts.count("source") == 25
        and len(data.val) == len(alone.val) + 25
        and not data.unreadable
    )
    names = [[data.names[index] for index in part] for part in (data.train, data.val)]
    assert names[0] == [alone.names[index] for index in alone.train]
    assert names[1][:-25] == [alone.names[index] for index in alone.val]
    below = {path.relative_to(source).as_posix() for path in source.rglob("[ab]*.jpg")}
    assert set(names[0]) | set(names[1]) == below and len(names[0]) + len(names[1]) == 40
    for index in data.val[-25:].tolist():
        assert data.paths[index] == str(source / data.names[index])
        assert data.names[index].startswith(data.classes[data.labels[index]] + "/")
    half = load(out, "--source", str(source), "--val-fraction", "0.5")
    assert [half.parts.count(part) for part in ("train", "val", "source")] == [8, 7, 25]


def test_source_never_gives_a_training_image_by_path_or_by_bytes(
    left_out: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = left_out
    alone = load(out)
    for number, index in enumerate(alone.train.tolist()):
        content = Path(alone.paths[index]).read_bytes()
        for name in ("ape", "bee"):  # as another image, once of another class
            (source / name / f"copy_{number}.jpg").write_bytes(content)
    first = alone.names[alone.train[0]]
    other = sorted((source / "bee").iterdir())[12].read_bytes()
    (source / first).write_bytes(other)  # the same path with other bytes
    data = load(out, "--source", str(source))
    assert data.parts.count("source") == 25 and data.copies == 24
    assert capsys.readouterr().err.count("copy of a training image; left out") == 24
    train, val = ([data.paths[index] for index in part] for part in (data.train, data.val))
    assert not {Path(path).read_bytes() for path in train} & {Path(p).read_bytes() for p in val}
    names = [data.names[index] for index in torch.cat([data.train, data.val])]
    assert len(set(names)) == len(names) == 40 and str(source / first) not in val


def test_the_summary_says_how_many_images_came_from_where(
    left_out: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = left_out
    run, command = out.parent / "run", [str(out), "--epochs", "1", "--weights", "none", *TINY]
    assert training.main([*command, "--output", str(run), "--source", str(source)]) == 0
    assert capsys.readouterr().out.count("3 validation images of DATA and 25 others of SRC") == 2
    assert json.loads((run / "config.json").read_text())["val_images_added"] == 25
    paths = [row["path"] for row in rows_of(run / "predictions.csv")]
    assert len(set(paths)) == 28
    for path in paths:
        assert (source / path).is_file()


# ------------------------------------------------------------------ validation on another folder


@pytest.fixture
def own(make_folder: Callable[..., Path]) -> tuple[Path, Path]:
    """Ten images of each of three classes to train on, and others of two of them to validate on.

    The first of each class is a copy of a training image, under another name.
    """
    train = make_folder({"ape": 10, "bee": 10, "cat": 10})
    val = make_folder({"ape": 14, "bee": 14}, "val")
    for name in ("ape", "bee"):
        for path in sorted((val / name).iterdir())[1:10]:
            path.unlink()
        (val / name / f"{name}_000.jpg").rename(val / name / "copy.jpg")
    (val / "ape/ape_010.jpg").rename(val / "ape/ape_000.jpg")  # the name of a training image
    return train, val


def test_a_folder_to_validate_on_leaves_all_of_the_other_for_training(
    own: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = own
    data = load(train, "--val", str(val))
    assert data.counts(data.train).tolist() == [10, 10, 10]
    assert (
        data.counts(data.val).tolist() == [4, 4, 0] and data.parts == ["train"] * 30 + ["val"] * 8
    )
    assert all(Path(data.paths[index]).is_relative_to(val) for index in data.val)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "copy of a" in line]
    assert [line.split(": ")[1] for line in warnings] == [
        str(val / "ape/copy.jpg"),
        str(val / "bee/copy.jpg"),
    ]


def test_a_run_with_a_folder_to_validate_on_is_compared_and_goes_on(
    own: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = own
    command = [str(train), "--val", str(val), "--weights", "none", "--epochs", "1", *TINY]
    assert training.main([*command, "--output", str(tmp_path / "one")]) == 0
    said = f"8 validation images of {val} (2 copies of training images left out)"
    assert capsys.readouterr().out.count(said) == 2
    baseline = ["--baseline", str(tmp_path / "one")]
    assert training.main([*command, "--output", str(tmp_path / "two"), *baseline]) == 0
    assert rows_of(tmp_path / "two/comparison.csv")[1]["difference"] == "0"
    moved = val.rename(tmp_path / "moved")
    command[2] = str(moved)
    assert training.main([*command, "--output", str(tmp_path / "two"), "--resume"]) == 0
    assert f"of {moved} (2 copies of training images left out)" in capsys.readouterr().out
    rows = rows_of(tmp_path / "two/classes.csv")
    assert [row["recall"] == "nan" for row in rows] == [False, False, True]
    assert {row["part"] for row in rows_of(tmp_path / "two/split.csv")} == {"train", "val"}
    without = [*command[:1], *command[3:], "--output", str(tmp_path / "two"), "--resume"]
    assert training.main(without) == 2
    assert "--val True (not False)" in capsys.readouterr().err


# -------------------------------------------------------------------------- a split from a file


def write_parts(path: Path, parts: dict[str, str], encoding: str = "utf-8") -> Path:
    """A table as other tools write it: rows in any order, and a column more."""
    rows = [f"{name},{number},{part}" for number, (name, part) in enumerate(parts.items())]
    random.Random(0).shuffle(rows)
    path.write_text("\n".join(["path,patient,part", *rows, ""]), encoding)
    return path


@pytest.fixture
def six(make_folder: Callable[..., Path]) -> tuple[Path, dict[str, str]]:
    """Six images of each of two classes, and the parts of all but the last of each."""
    sides = ("train", "val", "train", "val", "train")
    names = ("ape", "bee")
    parts = {f"{x}/{x}_{at:03}.jpg": part for x in names for at, part in enumerate(sides)}
    return make_folder({"ape": 6, "bee": 6}), parts


def names_of(data: training.Data, part: torch.Tensor) -> list[str]:
    return [data.names[index] for index in part.tolist()]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_split_from_a_file_is_kept_to_and_what_it_does_not_name_is_counted(
    encoding: str, six: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, parts = six
    file = write_parts(folder.parent / "parts.csv", parts, encoding)
    for seed in ("0", "1"):
        data = load(folder, "--split", str(file), "--seed", seed)
        assert names_of(data, data.train) == [name for name in parts if parts[name] == "train"]
        assert names_of(data, data.val) == [name for name in parts if parts[name] == "val"]
        assert data.classes == ["ape", "bee"] and data.labels.tolist() == [0] * 5 + [1] * 5
        warning = f"warning: {file}: 2 images are not named there; left out"
        assert warning in capsys.readouterr().err.splitlines()


def test_a_split_from_a_file_that_names_every_image_leaves_none_out(
    six: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, parts = six
    parts |= {"ape/ape_005.jpg": "val", "bee/bee_005.jpg": "train"}
    data = load(folder, "--split", str(write_parts(folder.parent / "parts.csv", parts)))
    assert len(data.train) + len(data.val) == 12 and "left out" not in capsys.readouterr().err


def test_a_split_from_a_file_takes_from_the_source_what_it_names(
    left_out: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """20 images of each class, of which OUT has the first 10 and the first 5."""
    source, out = left_out
    parts = {"ape/ape_000.jpg": "train", "ape/ape_001.jpg": "val", "bee/bee_000.jpg": "train"}
    parts |= {"bee/bee_019.jpg": "source", "ape/ape_010.jpg": "source"}
    file = write_parts(out.parent / "parts.csv", parts)
    data = load(out, "--split", str(file), "--source", str(source))
    assert data.parts == ["train", "val", "train", "source", "source"]
    assert names_of(data, data.val) == ["ape/ape_001.jpg", "ape/ape_010.jpg", "bee/bee_019.jpg"]
    folders = [Path(path).parents[1] for path in data.paths]
    assert folders == [out] * 3 + [source] * 2
    assert f"{file}: 35 images are not named there" in capsys.readouterr().err


def test_copies_across_the_parts_of_a_file_are_named_and_not_validated(
    six: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, parts = six
    for name, copied in (
        ("ape/ape_001.jpg", "ape/ape_000.jpg"),
        ("bee/bee_003.jpg", "ape/ape_002.jpg"),
    ):
        (folder / name).write_bytes((folder / copied).read_bytes())
    data = load(folder, "--split", str(write_parts(folder.parent / "parts.csv", parts)))
    assert names_of(data, data.val) == ["ape/ape_003.jpg", "bee/bee_001.jpg"]
    assert len(data.train) == 6 and data.copies == 2
    warnings = [line for line in capsys.readouterr().err.splitlines() if "copy of a" in line]
    assert [line.split(": ")[1] for line in warnings] == [
        str(folder / "ape/ape_001.jpg"),
        str(folder / "bee/bee_003.jpg"),
    ]


def test_seeds_are_compared_on_the_split_of_a_run_which_may_be_gone_when_one_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(folder), "--weights", "none", "--epochs", "1", *TINY]
    assert training.main([*command, "--output", str(tmp_path / "one")]) == 0
    split = tmp_path / "one/split.csv"
    given = ["--split", str(split), "--seed", "1", "--baseline", str(tmp_path / "one")]
    command += [*given, "--output", str(tmp_path / "two")]
    assert training.main(command) == 0
    assert capsys.readouterr().out.count(f"validation images of {split}\n") == 1
    assert (tmp_path / "two/split.csv").read_bytes() == split.read_bytes()
    histories = [rows_of(tmp_path / run / "history.csv") for run in ("one", "two")]
    assert histories[0][0]["train_loss"] != histories[1][0]["train_loss"]
    assert len(rows_of(tmp_path / "two/comparison.csv")) == 5
    config = json.loads((tmp_path / "two/config.json").read_text())
    assert config["settings"]["split"] == str(split)
    split.unlink()
    assert training.main([*command, "--resume"]) == 0
    without = [argument for argument in command if argument not in given[:2]]
    assert training.main([*without, "--resume"]) == 2
    assert "--split True (not False)" in capsys.readouterr().err


def test_a_split_may_name_files_that_no_text_can_spell(
    six: tuple[Path, dict[str, str]],
) -> None:
    folder, parts = six
    name = os.fsdecode(b'ape/\xff, "\n.jpg')
    try:
        (folder / "ape/ape_000.jpg").rename(folder / name)
    except OSError:
        pytest.skip("not on this file system")
    columns = {"path": [name, *list(parts)[1:]], "part": parts.values()}
    training.write_table(folder.parent / "parts.csv", columns)
    data = load(folder, "--split", str(folder.parent / "parts.csv"))
    assert name in names_of(data, data.train) and len(data.train) == 6


GOOD = ["path,part", "ape/ape_000.jpg,train", "ape/ape_001.jpg,val", "bee/bee_000.jpg,train"]
SPLITS = {
    "an empty file": ([], "no rows with these columns; needed is a CSV file of path, part"),
    "a first line alone": (GOOD[:1], "no rows with these columns"),
    "no column of parts": (["path,fold", *GOOD[1:]], "no rows with these columns"),
    "semicolons": ([line.replace(",", ";") for line in GOOD], "no rows with these columns"),
    "an endless cell": ([*GOOD, '"' + 200_000 * "x"], "field larger than field limit"),
    "other words for the parts": (
        [*GOOD[:2], "ape/ape_001.jpg,Val", "ape/ape_002.jpg,test"],
        "ape/ape_001.jpg: no part 'Val'; write train, val or source; such rows: 2",
    ),
    "a row without a part": ([*GOOD, "ape/ape_002.jpg"], "ape/ape_002.jpg: no part None"),
    "images that are not there": (
        [*GOOD, "ape/none.jpg,train", "good/ape/ape_002.jpg,val", "./bee/bee_001.jpg,val"],
        "ape/none.jpg: not in DATA; write class/file as there; such rows: 3",
    ),
    "backslashes": (
        ["path,part", "ape\\ape_000.jpg,train"],
        "ape\\ape_000.jpg: not in DATA; write",
    ),
    "a part of a source that is not given": (
        [*GOOD, "ape/ape_002.jpg,source"],
        "ape/ape_002.jpg: not among what --source SRC adds to DATA; write",
    ),
    "an image named twice": (
        [*GOOD, GOOD[1]],
        "ape/ape_000.jpg: named before; leave one row of it; such rows: 1",
    ),
    "a class that is not trained": (
        [*GOOD[:3], "bee/bee_000.jpg,val"],
        "bee: no image of this class to train on that can be read; add one or remove the class; "
        "such classes: 1",
    ),
    "a class that is left out": (GOOD[:3], "bee: no image of this class to train on"),
    "nothing to validate on": (
        [line.replace("val", "train") for line in GOOD],
        "names no image to validate on, as part val or source",
    ),
    "a file that is none": (None, "No such file or directory; needed is a CSV file of path, part"),
}


@pytest.mark.parametrize("case", SPLITS)
def test_a_split_that_cannot_be_followed_gets_one_line_and_status_2(
    case: str, make_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder({"ape": 3, "bee": 3}, "good")
    file, (lines, expected) = folder.parent / "parts.csv", SPLITS[case]
    if lines is not None:
        file.write_text("".join(f"{line}\n" for line in lines))
    assert training.main([str(folder), "--weights", "none", "--split", str(file), *TINY]) == 2
    *warnings, error = capsys.readouterr().err.splitlines()
    assert error.startswith(f"data_training.py: error: {file}: ") and expected in error
    assert all(line.startswith("warning: ") for line in warnings)


def test_an_image_of_data_is_none_that_the_source_adds(
    left_out: tuple[Path, Path], tmp_path: Path
) -> None:
    source, out = left_out
    parts = {"ape/ape_000.jpg": "train", "bee/bee_000.jpg": "train", "ape/ape_001.jpg": "source"}
    for name, part in (("ape/ape_001.jpg", "source"), ("ape/ape_019.jpg", "val")):
        file = write_parts(tmp_path / "parts.csv", {**parts, "ape/ape_001.jpg": "val", name: part})
        with pytest.raises(training.DataError, match=f"parts.csv: {name}: not .*; such rows: 1"):
            load(out, "--split", str(file), "--source", str(source))


def test_a_checkpoint_brings_its_architecture_and_image_size(
    scratch_run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = ["--weights", str(scratch_run / "last.pt"), "--epochs", "0", "--device", "cpu"]
    command = [str(folder), *weights, "--output", str(tmp_path / "run")]
    for given, said in (
        (["--arch", "resnet50"], "--arch resnet50: the weights are of resnet18"),
        (["--image-size", "64"], "--image-size 64: the weights are of 32"),
    ):
        assert training.main([*command, *given]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert training.main([*command, "--image-size", "32"]) == 0
    (tmp_path / "other").mkdir()
    command = [str(folder), *weights, "--output", str(tmp_path / "other")]
    assert training.main(command) == 0
    one, other = (tmp_path / name / "predictions.csv" for name in ("run", "other"))
    assert one.read_bytes() == other.read_bytes()
    assert training.main([*command, "--resume"]) == 0


def test_a_checkpoint_is_trained_on_at_another_image_size(scratch_run: Path) -> None:
    path = str(scratch_run / "last.pt")
    for arguments, size in (([], 32), (["--image-size", "64"], 64)):
        args = training.parse_args(["x", "--weights", path, *arguments])
        training.load_weights(args)
        assert (args.arch, args.image_size) == ("resnet18", size)


# -------------------------------------------------------- the alternatives, and what they change


@pytest.mark.parametrize("rebalance", ["sampler", "late", "loss", "none"])
def test_every_way_works_in_both_phases_and_draws_as_it_says(
    rebalance: str, folder: Path, tmp_path: Path
) -> None:
    path, output = weights_file(tmp_path / "w.pth"), tmp_path / "run"
    command = [str(folder), "--weights", str(path), "--epochs", "5", "--frozen-epochs", "3"]
    command += ["--finetune", "firm", "--rebalance", rebalance, "--output", str(output), *TINY]
    assert training.main(command) == 0
    history = rows_of(output / "history.csv")
    assert [row["phase"] for row in history] == ["head", "head", "head", "firm", "firm"]
    passes = [62] * 3 + [1] * 2  # for 1,000 steps of 16 with the head, over 87 images
    counts = [(row["fewest_draws"], row["most_draws"]) for row in history]
    each_once = [
        draws == (str(10 * k), str(35 * k)) for draws, k in zip(counts, passes, strict=True)
    ]
    weighted = {"sampler": [1, 1, 1, 1, 1], "late": [0, 0, 1, 0, 1]}.get(rebalance, [0] * 5)
    assert each_once == [not each for each in weighted]


def test_balanced_softmax_finds_more_of_the_rare_class(tmp_path: Path) -> None:
    """Two classes of noise that overlap: without a correction the rare one is never answered."""
    root, stream = tmp_path / "src", np.random.default_rng(0)
    for name, count, shade in (("common", 200, 120), ("rare", 20, 130)):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = stream.normal(shade + stream.normal(0, 15), 5, (8, 8, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    recalls = {}
    for way in ("none", "loss"):
        command = [str(root), "--weights", str(weights_file(tmp_path / "w.pth")), *TINY]
        command += ["--rebalance", way, "--epochs", "4", "--frozen-epochs", "4", "--lr", "0.001"]
        command += ["--no-calibration"]
        assert training.main([*command, "--output", str(tmp_path / way)]) == 0
        recalls[way] = [float(row["recall"]) for row in rows_of(tmp_path / way / "classes.csv")]
    assert recalls["none"][1] < 0.3 < recalls["loss"][1]
    assert recalls["none"][0] > recalls["loss"][0]  # no miracle


@pytest.fixture(scope="module")
def compared_run(scratch_run: Path, folder: Path) -> tuple[Path, str]:
    """A shorter run that is compared with `scratch_run`, and what it printed."""
    output, printed = folder.parent / "compared", io.StringIO()
    command = [str(folder), "--weights", "none", "--epochs", "1", "--output", str(output), *TINY]
    with contextlib.redirect_stdout(printed):
        assert training.main([*command, "--baseline", str(scratch_run)]) == 0
    return output, printed.getvalue()


def test_a_comparison_has_the_measures_of_both_runs_and_their_difference(
    compared_run: tuple[Path, str], scratch_run: Path
) -> None:
    output, printed = compared_run
    rows = rows_of(output / "comparison.csv")
    assert list(rows[0]) == ["measure", "before", "after", "difference", "low", "high"]
    before, after = (rows_of(run / "history.csv")[-1] for run in (scratch_run, output))
    assert [row["measure"] for row in rows] == [
        *("accuracy", "balanced_accuracy", "many", "medium", "few")
    ]
    for row in rows:
        name = row["measure"]
        assert (row["before"], row["after"]) == (before[name], after[name])
        if name == "many":
            assert set(row.values()) == {"many", "nan"} and "\nmany" not in printed
            continue
        difference = float(after[name]) - float(before[name])
        assert float(row["difference"]) == pytest.approx(difference, abs=2e-6)
        low, high = float(row["low"]), float(row["high"])
        assert low <= difference <= high
        lines = [x for x in printed.splitlines() if x.startswith(name.replace("_", " ") + " ")]
        line = lines[-1]  # after those of the calibration
        assert ("undecided" in line) is (low <= 0 <= high)
        assert f"{100 * difference:+.1f}" in line
    assert float(rows[1]["high"]) < 0  # a quarter of the epochs is worse


def test_the_chart_of_classes_shows_the_baseline_beside_the_run(
    compared_run: tuple[Path, str],
) -> None:
    picture = Image.open(compared_run[0] / "classes.png").convert("RGB").crop((130, 80, 1560, 440))
    colours = {colour: count for count, colour in picture.getcolors(2**20)}
    assert colours[BLUE] > 1000 and colours[ORANGE] > 1000


def test_a_run_compared_with_itself_is_undecided_with_a_difference_of_exactly_0(
    scratch_run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(folder), "--weights", str(scratch_run / "last.pt"), "--epochs", "0", *TINY]
    output = tmp_path / "run"
    assert training.main([*command, "--output", str(output), "--baseline", str(scratch_run)]) == 0
    rows = [row for row in rows_of(output / "comparison.csv") if row["before"] != "nan"]
    assert len(rows) == 4
    assert {row[key] for row in rows for key in ("difference", "low", "high")} == {"0"}
    assert capsys.readouterr().out.count("undecided") == 4


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda rows: rows[:-2], "0 only there and 2 only here"),
        (lambda rows: [*rows, "dog/new.jpg,dog,cat,0.5"], "1 only there and 0 only here"),
        (lambda rows: [*rows[:-1], rows[-1].replace(",dog,", ",cat,", 1)], "1 only there and 1"),
        (lambda rows: [*rows[:-1], "dog/dog_000.jpg,dog,eel,0.5"], "eel"),
        (lambda rows: ["no", "table"], "predictions.csv: no rows with these columns"),
    ],
)
def test_a_baseline_on_other_images_is_refused_before_anything_is_trained(
    damage: Callable[[list[str]], list[str]],
    expected: str,
    scratch_run: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = (scratch_run / "predictions.csv").read_text().splitlines()
    (tmp_path / "before").mkdir()
    (tmp_path / "before/predictions.csv").write_text("\n".join(damage(rows)) + "\n")
    command = [str(folder), "--weights", "none", "--epochs", "1", *TINY]
    command += ["--output", str(tmp_path / "run"), "--baseline", str(tmp_path / "before")]
    assert training.main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("data_training.py: error: ") and expected in error
    assert str(tmp_path / "before") in error
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------- user errors


def test_weights_that_would_run_code_are_refused_and_never_run(
    make_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (trap,)

    root = make_folder({"ape": 3, "bee": 3})
    trap = root.parent / "trapped"
    torch.save({"fc.weight": Trap()}, root.parent / "w.pth")
    assert training.main([str(root), "--weights", str(root.parent / "w.pth"), *TINY]) == 2
    assert not trap.exists()
    assert "w.pth: more than weights in it" in capsys.readouterr().err


ERRORS = {
    "no such folder": (["{src}/none", "--weights", "none"], "none: no such folder"),
    "one class": (["{src}/one", "--weights", "none"], "fewer than two classes"),
    "empty class": (["{src}/hollow", "--weights", "none"], "hollow"),
    "hidden class": (["{src}/veiled", "--weights", "none"], "veiled/.bee: hidden"),
    "only broken images": (
        ["{src}/broken", "--weights", "none"],
        "broken: bee: no image of this class to train on",
    ),
    "one image a class": (["{src}/single", "--weights", "none"], "nothing to validate on"),
    "epochs below 0": (["{src}/good", "--epochs", "-1"], "--epochs"),
    "epochs in words": (["{src}/good", "--epochs", "ten"], "--epochs"),
    "fraction of 1": (["{src}/good", "--val-fraction", "1"], "--val-fraction"),
    "fraction of 0": (["{src}/good", "--val-fraction", "0"], "--val-fraction"),
    "crops of nothing": (["{src}/good", "--crop-scale", "0"], "--crop-scale"),
    "gentle with nothing": (
        ["{src}/good", "--weights", "none", "--finetune", "gentle"],
        "--finetune gentle: of pretrained weights",
    ),
    "learning rate of 0": (["{src}/good", "--lr", "0"], "--lr"),
    "not a number": (["{src}/good", "--lr", "nan"], "--lr"),
    "batches of 0": (["{src}/good", "--batch-size", "0"], "--batch-size"),
    "batches of one small image": (
        ["{src}/good", "--weights", "none", "--batch-size", "1", "--image-size", "32"],
        "--batch-size 1: one image",
    ),
    "a seed of 65 bits": (["{src}/good", "--seed", str(2**63)], "--seed"),
    "unknown flag": (["{src}/good", "--nonsense"], "--nonsense"),
    "no folder": ([], "DATA"),
    "unknown architecture": (["{src}/good", "--arch", "vgg16"], "choose from resnet"),
    "no such weights": (["{src}/good", "--weights", "none.pth"], "none.pth: no such file"),
    "weights that are a text": (["{src}/good", "--weights", "{src}/text.pth"], "text.pth"),
    "weights of another network": (
        ["{src}/good", "--weights", "{src}/other.pth"],
        "not of a resnet18",
    ),
    "weights without tensors": (["{src}/good", "--weights", "{src}/words.pth"], "words.pth"),
    "no such device": (["{src}/good", "--device", "abacus"], "--device abacus"),
    "device not there": (["{src}/good", "--device", "cuda:77"], "--device cuda:77"),
    "more frozen epochs than epochs": (
        ["{src}/good", "--epochs", "1", "--frozen-epochs", "2"],
        "--frozen-epochs 2",
    ),
    "no such source": (["{src}/good", "--source", "{src}/none"], "--source {src}/none: no such"),
    "source with other classes": (
        ["{src}/good", "--weights", "none", "--source", "{src}/more"],
        "not classes of {src}/good: cat, dog;",
    ),
    "validation of a class that is not there": (
        ["{src}/good", "--weights", "none", "--val", "{src}/more"],
        "--val {src}/more: not classes of {src}/good: cat, dog;",
    ),
    "validation on the training images": (
        ["{src}/good", "--weights", "none", "--val", "{src}/good"],
        "good: no image differs from those trained on; nothing to validate on",
    ),
    "no such folder to validate on": (["{src}/good", "--val", "{src}/none"], "--val {src}/none"),
    "two ways to validate": (
        ["{src}/good", "--val", "{src}/good", "--source", "{src}/more"],
        "not allowed with argument",
    ),
    "fraction of another folder": (
        ["{src}/good", "--val", "{src}/good", "--val-fraction", "0.5"],
        "not allowed with argument",
    ),
    "output in the folder to validate on": (
        ["{src}/good", "--val", "{src}/more", "--output", "{src}/more/run"],
        "would be a class",
    ),
    "split of another folder": (
        ["{src}/good", "--val", "{src}/more", "--split", "{src}/text.pth"],
        "not allowed with argument",
    ),
    "fraction of a split": (
        ["{src}/good", "--split", "{src}/text.pth", "--val-fraction", "0.2"],
        "not allowed with argument",
    ),
    "split where the run is to be": (
        ["{src}/good", "--split", "{src}/more/split.csv", "--output", "{src}/more"],
        "{src}/more/split.csv: --output would write",
    ),
    "power of the loss": (["{src}/good", "--rebalance", "loss", "--power", "1"], "--power"),
    "power when late": (["{src}/good", "--rebalance", "late", "--power", "0.5"], "--power"),
    "power below 0": (["{src}/good", "--power", "-1"], "--power"),
    "unknown way to rebalance": (["{src}/good", "--rebalance", "magic"], "--rebalance"),
    "baseline without predictions": (
        ["{src}/good", "--weights", "none", "--baseline", "{src}/taken"],
        "taken/predictions.csv: No such file or directory; needed is a CSV file of path, class,",
    ),
    "run already there": (["{src}/good", "--output", "{src}/taken"], "already holds a run"),
    "output is a file": (["{src}/good", "--output", "{src}/text.pth"], "a file"),
    "output among the classes": (["{src}/good", "--output", "{src}/good/run"], "would be a class"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_gets_one_line_and_status_2(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "good", {"ape": 3, "bee": 3})
    write_folder(tmp_path / "more", {"ape": 3, "bee": 3, "cat": 3, "dog": 1})
    write_folder(tmp_path / "one", {"ape": 3})
    write_folder(tmp_path / "single", {"ape": 1, "bee": 1})
    write_folder(tmp_path / "veiled", {"ape": 3, ".bee": 3})
    write_folder(tmp_path / "hollow", {"ape": 3, "bee": 0})
    write_folder(tmp_path / "broken", {"ape": 3, "bee": 1})
    (tmp_path / "broken/bee/bee_000.jpg").write_text("broken")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/config.json").write_text("{}")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"a": "b"}, tmp_path / "words.pth")
    torch.save({"fc.bias": torch.zeros(3)}, tmp_path / "other.pth")
    before = sorted(tmp_path.rglob("*"))
    command, expected = ERRORS[case]
    arguments = [each.format(src=tmp_path) for each in command]
    tiny = [] if "--arch" in command else ["--arch", "resnet18"]
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(training.main([*arguments, *tiny]))
    lines = capfd.readouterr().err.replace("\r", "\n").splitlines()
    assert stop.value.code == 2
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(lines) - len(warnings) == 1, lines
    assert (
        lines[-1].startswith("data_training.py: error: ")
        and expected.format(src=tmp_path) in lines[-1]
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_more_images_than_can_be_drawn_are_refused_before_any_is_read(
    make_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert training.MOST_DRAWN == 2**24
    monkeypatch.setattr(training, "MOST_DRAWN", 15)
    monkeypatch.delattr(training, "read_bytes")
    root = make_folder({"ape": 10, "bee": 9})  # four fifths of 19 are over 15
    assert training.main([str(root), "--weights", "none", *TINY]) == 2
    assert "torch.multinomial" in capsys.readouterr().err.splitlines()[-1]


def test_a_diverging_run_says_so_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(folder), "--weights", "none", "--epochs", "2", "--backbone-lr", "1e30"]
    assert training.main([*command, "--output", str(tmp_path / "run"), *TINY]) == 2
    assert "--backbone-lr: the loss became" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "raised",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 5.56 GB, max allowed: 6.80 GB)."),
        RuntimeError("CUDA error: out of memory"),  # of main memory that is to be pinned
        None,  # what torch raises of main memory
    ],
)
def test_running_out_of_memory_names_a_smaller_batch(
    raised: RuntimeError | None,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise raised or pytest.raises(RuntimeError, torch.empty, 2**50).value

    monkeypatch.setattr(torch.nn.Conv2d, "forward", full)  # what a full device raises
    command = [str(folder), "--weights", "none", "--epochs", "1", "--output", str(tmp_path / "run")]
    assert training.main([*command, *TINY]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("out of memory on cpu; try 8 or a smaller --image-size, in a new run")
    command[-1] = str(tmp_path / "smaller")
    assert training.main([*command, *TINY, "--batch-size", "1", "--image-size", "64"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("out of memory on cpu; try a smaller --image-size, in a new run")


@pytest.mark.parametrize("weights", ["given", "none"])
def test_an_image_for_evaluation_is_read_once_where_there_is_room(
    weights: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the feature pass, or where there is none before; with or without: the same results."""
    monkeypatch.setattr(training, "MISTAKES", 0)
    path = weights_file(tmp_path / "w.pth") if weights == "given" else "none"
    command = [str(folder), "--weights", str(path), "--epochs", "2", *TINY]
    read: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code is training.read_image.__code__:
            read[frame.f_locals["path"]] += 1

    for name, room in (("room", 2**31), ("none", 0)):
        monkeypatch.setattr(training, "MOST_KEPT", room)
        read.clear()
        sys.setprofile(note)
        try:
            assert training.main([*command, "--output", str(tmp_path / name)]) == 0
        finally:
            sys.setprofile(None)
        rows = rows_of(tmp_path / name / "split.csv")
        times = {read[str(folder / row["path"])] for row in rows if row["part"] == "val"}
        assert (times == {1}) == (name == "room"), times
    tables = ((tmp_path / name / "predictions.csv").read_bytes() for name in ("room", "none"))
    assert next(tables) == next(tables)


def test_views_that_fit_no_quarter_of_the_memory_are_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, _ = prepare(folder, "--weights", "none", "--epochs", "1", "--image-size", "32")
    assert training.evaluated_again(given) == set(given.data.val.tolist())
    count = len(given.data.val)
    size = count * 32 * 32 * 3
    for pages, kept in ((4 * size, count), (4 * size - 1, 0)):
        monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": pages, "SC_PAGE_SIZE": 1}.get)
        assert len(training.evaluated_again(given)) == kept
    monkeypatch.delattr(os, "sysconf")  # Windows
    assert len(training.evaluated_again(given)) == count
    given = dataclasses.replace(given, compute=CPU._replace(rank=1, world_size=2))
    assert training.evaluated_again(given) == set(given.data.val[1::2].tolist())


@pytest.mark.parametrize(("platform", "limits"), [("win32", [0.75]), ("linux", [])])
def test_on_windows_a_gpu_is_full_when_its_own_memory_is(
    platform: str, limits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver would go on in main memory; 6 of the 8 GB were free."""
    given: list[float] = []
    answers = {
        "set_device": lambda _: None,
        "mem_get_info": lambda: (6e9, 8e9),
        "set_per_process_memory_fraction": given.append,
        "is_bf16_supported": lambda **_: True,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch, "empty", lambda _, device: SimpleNamespace(device=device))
    monkeypatch.setattr(training.sys, "platform", platform)
    assert training.pick_compute("cuda", None).amp is torch.bfloat16
    assert given == limits


def test_another_error_of_torch_keeps_its_traceback(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.nn.Conv2d, "forward", broken)
    command = [str(folder), "--weights", "none", "--epochs", "1", "--output", str(tmp_path / "run")]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        training.main([*command, *TINY])
