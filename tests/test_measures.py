"""What the measures and their intervals promise: by hand, by other formulas, by simulation."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import prepare
from torch import Tensor

import data_training as training

# ----------------------------------------------------------------------------------- by hand

# Ten images of class 0, four of class 1, two of class 2; nobody asks for the last class.
CONFUSION = torch.tensor([[8, 1, 1, 0], [1, 3, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])


def test_a_confusion_matrix_has_true_classes_in_rows_and_predicted_ones_in_columns() -> None:
    targets = torch.tensor([0] * 10 + [1] * 4 + [2] * 2)
    predicted = torch.tensor([0] * 8 + [1, 2] + [1, 1, 1, 0] + [0, 2])
    assert torch.equal(training.confusion_matrix(targets, predicted, 4), CONFUSION)


def test_recall_and_f1_of_each_class() -> None:
    recall, f1 = training.recall_by_class(CONFUSION), training.f1_by_class(CONFUSION)
    assert recall[:3].tolist() == [0.8, 0.75, 0.5] and recall[3].isnan() and f1[3].isnan()
    # precision 8 of 10, 3 of 4, 1 of 2
    assert f1[:3].tolist() == pytest.approx([0.8, 0.75, 0.5])
    never, unasked = torch.tensor([[3, 0], [2, 0]]), torch.tensor([[1, 1], [0, 0]])
    assert training.f1_by_class(never).tolist() == pytest.approx([0.75, 0])
    assert training.f1_by_class(unasked)[0].item() == pytest.approx(2 / 3)
    assert training.f1_by_class(unasked)[1].isnan()  # though an image was taken for it


def test_measures_are_means_of_recalls_and_nan_for_an_empty_group() -> None:
    result = training.measure(CONFUSION, torch.tensor([101, 100, 20, 500]))
    assert result["accuracy"] == 12 / 16
    assert result["balanced_accuracy"] == pytest.approx((0.8 + 0.75 + 0.5) / 3)
    assert result["many"] == 0.8  # the class that nobody asks for does not count
    assert result["medium"] == pytest.approx((0.75 + 0.5) / 2)
    assert math.isnan(result["few"])
    assert result["macro_f1"] == pytest.approx((0.8 + 0.75 + 0.5) / 3)
    few = training.measure(torch.tensor([[1, 1], [0, 4]]), torch.tensor([19, 20]))
    assert math.isnan(few["many"]) and (few["medium"], few["few"]) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17, table I, of one image less
        (81 / 263, 264, 0.2553, 0.3662),
        (15 / 148, 149, 0.0624, 0.1605),
        (0, 21, 0.0000, 0.1611),
        (1 / 29, 30, 0.0061, 0.1718),
        *((1, 1, 0, 1), (0, 1, 0, 1), (0, 0, 0, 1)),  # one image tells nothing, nor does none
        (1, 5, 4 / (4 + training.Z**2), 1),
    ],
)
def test_the_interval_of_a_recall_is_wilson_s_at_one_image_less(
    right: float, count: int, low: float, high: float
) -> None:
    counts = torch.tensor([float(count)])
    ends = training.wilson_interval(right * counts, counts)
    assert [end.item() for end in ends] == pytest.approx([low, high], abs=5e-5)
    if count > 1:  # of a single class a mean is as sure
        recall, one = torch.tensor([right]).double(), torch.ones(1, 1).double()
        mean, *ends = (x.item() for x in training.mean_interval(recall, counts, one))
        assert [mean, *ends] == pytest.approx([right, low, high], abs=5e-5)


def farthest(recall: list[float], counts: list[int], weights: list[float]) -> float:
    """The lowest mean that is not refused, found on a grid of all pairs of true recalls.

    A mean is refused if it is Z standard deviations away where its likeliest pair is the truth.
    """
    p, q = np.meshgrid(*[np.linspace(5e-4, 1 - 5e-4, 1000)] * 2)
    likelihood, variance = np.zeros(p.shape), np.zeros(p.shape)
    for part, r, n, w in zip((p, q), recall, (c - 1 for c in counts), weights, strict=True):
        likelihood += n * (r * np.log(part) + (1 - r) * np.log(1 - part))
        variance += w**2 * part * (1 - part) / n
    means, seen = weights[0] * p + weights[1] * q, np.dot(recall, weights)
    for mean in np.arange(0, seen, 5e-4):
        near = np.where(abs(means - mean) < 5e-4, likelihood, -np.inf)
        if seen - mean <= training.Z * variance.flat[near.argmax()] ** 0.5:
            return float(mean)
    return float(seen)


@pytest.mark.parametrize(
    ("recall", "counts", "weights"),
    [
        ([0.9, 0.7], [300, 10], [0.5, 0.5]),
        ([0.95, 2 / 3], [40, 3], [0.5, 0.5]),
        ([0.5, 0.25], [8, 12], [0.2, 0.8]),
    ],
)
def test_the_ends_of_a_mean_are_those_of_a_search_over_all_recalls(
    recall: list[float], counts: list[int], weights: list[float]
) -> None:
    given = (torch.tensor(x).double() for x in (recall, counts, [weights]))
    mean, low, high = (x.item() for x in training.mean_interval(*given))
    assert mean == pytest.approx(np.dot(recall, weights))
    assert low == pytest.approx(farthest(recall, counts, weights), abs=3e-3)
    below = farthest([1 - r for r in recall], counts, weights)
    assert high == pytest.approx(1 - below, abs=3e-3)


def test_intervals_of_means_of_nothing_and_of_sure_things() -> None:
    counts, weights = torch.tensor([0, 5, 1]), torch.tensor([[0, 1, 0], [0, 0.5, 0.5]]).double()
    recall = torch.tensor([math.nan, 1, 1]).double()
    mean, low, high = training.mean_interval(recall, counts, weights)
    assert mean.tolist() == high.tolist() == [1, 1]
    assert low[0] == pytest.approx(4 / (4 + training.Z**2)) and low[1] < low[0]
    empty = training.mean_interval(recall, counts, weights * math.nan)
    assert all(end.isnan().all() for end in empty)


def test_a_comparison_adds_a_quarter_of_an_image_to_both_who_won_and_who_lost() -> None:
    """Class 0: three of eight newly right, one newly wrong; class 1: nothing changed."""
    targets = torch.tensor([0] * 8 + [1] * 2)
    before = torch.tensor([1, 1, 1, 0, 0, 0, 0, 1, 1, 0])
    after = torch.tensor([0, 0, 0, 1, 0, 0, 0, 1, 1, 0])
    rows = training.compare(targets, before, after, torch.tensor([101, 5]))
    assert [row["measure"] for row in rows] == list(training.MEASURES)
    many, medium = rows[2], rows[3]
    won, lost, n = 3.25, 1.25, 8.5
    half = 1.959964 * (((won + lost) / n - ((won - lost) / n) ** 2) / 7.5) ** 0.5
    expected = [0.5, 0.75, 0.25, 0.25 - half, 0.25 + half]
    assert [*many.values()][1:] == pytest.approx(expected)
    assert all(map(math.isnan, [*medium.values()][1:]))  # no class is in between
    same = rows[4]  # two images tell little: 0.25 + 0.25 of 2.5, of n - 1/2
    half = 1.959964 * (0.5 / 2.5 / 1.5) ** 0.5
    assert [*same.values()][1:] == pytest.approx([0.5, 0.5, 0, -half, half])
    assert (rows[0]["before"], rows[0]["after"]) == (0.5, 0.7)
    assert (rows[1]["before"], rows[1]["after"]) == (0.5, 0.625)


# -------------------------------------------------------------------------------- simulation

SETTINGS = {
    "300 : 10": [300, 10],
    "300 : 3": [300, 3],
    "seven": [50, 31, 20, 12, 8, 5, 3],
    "24": [4 * (at % 12) + 3 for at in range(24)],
    "120": [round(50 * (3 / 50) ** (at / 119)) for at in range(120)],
    "120 of 4": [4] * 120,
}


def draw(counts: Tensor, part: Tensor, runs: int, seed: int = 0) -> Tensor:
    """How many images of each class have what a part of them has, in many runs: (runs, C)."""
    stream = torch.Generator().manual_seed(seed)
    wide = (each.expand(runs, len(counts)).contiguous().double() for each in (counts, part))
    return torch.binomial(*wide, generator=stream)


@pytest.mark.parametrize(("first", "last"), [(0.95, 0.6), (0.9, 0.9), (0.75, 0.75), (0.9, 0.4)])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_interval_of_balanced_accuracy_covers_the_truth(
    setting: str, first: float, last: float
) -> None:
    """In 93 to 98 % of runs; with three images of a class it may be more, but not less.

    Recalls fall evenly from the first class to the last. A class is a part of what is drawn alike,
    so runs share their classes: each is a row of weights, of its own columns.
    """
    counts, runs = torch.tensor(SETTINGS[setting]), 1500
    truth = torch.linspace(first, last, len(counts)).double()
    weights = torch.full((1, len(counts)), 1 / len(counts)).double()
    covered = 0
    for right in draw(counts, truth, runs):
        _, low, high = training.mean_interval(right / counts, counts, weights)
        covered += low.item() <= truth.mean() <= high.item()
    assert 0.93 <= covered / runs <= (1 if setting == "300 : 3" else 0.98)
