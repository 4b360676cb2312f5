"""What the measures and their intervals promise: by hand, by other formulas, by simulation."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import prepare

import data_training as training

# Ten images of class 0, four of class 1, two of class 2; nobody asks for the last class.
CONFUSION = torch.tensor([[8, 1, 1, 0], [1, 3, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])


def test_measures_are_means_of_recalls_and_nan_for_an_empty_group():
    counts = CONFUSION.sum(1)
    result = training.measure(CONFUSION, torch.tensor([101, 100, 20, 500]), counts)
    assert result["accuracy"] == 12 / 16
    assert result["balanced_accuracy"] == pytest.approx((0.8 + 0.75 + 0.5) / 3)
    assert result["many"] == 0.8  # the class that nobody asks for does not count
    assert result["medium"] == pytest.approx((0.75 + 0.5) / 2)
    assert math.isnan(result["few"])
    assert result["macro_f1"] == pytest.approx((0.8 + 0.75 + 0.5) / 3)
    two = torch.tensor([[1, 1], [0, 4]])
    few = training.measure(two, torch.tensor([19, 20]), two.sum(1))
    assert math.isnan(few["many"]) and (few["medium"], few["few"]) == (1.0, 0.5)
    never, unasked = torch.tensor([[3, 0], [2, 0]]), torch.tensor([[1, 1], [0, 0]])
    assert training.f1_by_class(never).tolist() == pytest.approx([0.75, 0])
    assert training.f1_by_class(unasked)[0].item() == pytest.approx(2 / 3)
    assert training.f1_by_class(unasked)[1].isnan()  # though an image was taken for it


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
def test_the_interval_of_a_recall_is_wilson_s_at_one_image_less(right, count, low, high):
    counts = torch.tensor([float(count)])
    ends = training.wilson_interval(right * counts, counts)
    assert [end.item() for end in ends] == pytest.approx([low, high], abs=5e-5)
    if count > 1:  # of a single class a mean is as sure
        recall, one = torch.tensor([right]).double(), torch.ones(1, 1).double()
        mean, *ends = (x.item() for x in training.mean_interval(recall, counts, one))
        assert [mean, *ends] == pytest.approx([right, low, high], abs=5e-5)


@pytest.mark.parametrize(
    ("recall", "counts", "weights", "ends"),
    [
        ([0.9, 0.7], [300, 10], [0.5, 0.5], (0.641, 0.900)),
        ([0.95, 2 / 3], [40, 3], [0.5, 0.5], (0.551, 0.957)),
        ([0.5, 0.25], [8, 12], [0.2, 0.8], (0.145, 0.546)),
    ],
)
def test_the_ends_of_a_mean_are_those_of_a_search_over_all_recalls(recall, counts, weights, ends):
    """Over 1,000 x 1,000 pairs of true recalls, the likeliest pair of each mean.

    The ends are the farthest means from which what was seen is Z standard deviations away, the
    variance of a recall p being p * (1 - p) / (count - 1).
    """
    given = (torch.tensor(x).double() for x in (recall, counts, [weights]))
    mean, *found = (x.item() for x in training.mean_interval(*given))
    assert mean == pytest.approx(np.dot(recall, weights))
    assert found == pytest.approx(ends, abs=2e-3)


def test_intervals_of_means_of_nothing_and_of_sure_things():
    counts, weights = torch.tensor([0, 5, 1]), torch.tensor([[0, 1, 0], [0, 0.5, 0.5]]).double()
    recall = torch.tensor([math.nan, 1, 1]).double()
    mean, low, high = training.mean_interval(recall, counts, weights)
    assert mean.tolist() == high.tolist() == [1, 1]
    # Recalls are at most 4 / (pull / 2) and 0.3 / (pull / 2), pull * (1 - their mean) = Z^2.
    expected = [4 / (4 + training.Z**2), 4.3 / (4.3 + training.Z**2)]
    assert low.tolist() == pytest.approx(expected)
    empty = training.mean_interval(recall, counts, weights * math.nan)
    assert all(end.isnan().all() for end in empty)


def test_a_comparison_adds_a_quarter_of_an_image_to_both_who_won_and_who_lost():
    """Class 0: three of eight newly right, one newly wrong; class 1: nothing changed."""
    targets = torch.tensor([0] * 8 + [1] * 2)
    before = torch.tensor([1, 1, 1, 0, 0, 0, 0, 1, 1, 0])
    after = torch.tensor([0, 0, 0, 1, 0, 0, 0, 1, 1, 0])
    alone = torch.arange(len(targets))
    rows = training.compare(targets, before, after, torch.tensor([101, 5]), alone)
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
    assert (rows[0]["before"], rows[0]["after"]) == pytest.approx((0.5, 0.7))
    assert (rows[1]["before"], rows[1]["after"]) == (0.5, 0.625)
    # Twice each image, in one family, tells as much as once: 8 images and not 16.
    twice = (each.repeat_interleave(2) for each in (targets, before, after))
    many = training.compare(*twice, torch.tensor([101, 5]), alone.repeat_interleave(2))[2]
    variance = ((6.25 + 2.25) / 16.5 - ((6.25 - 2.25) / 16.5) ** 2) / 7.5
    assert many["high"] - many["low"] == pytest.approx(2 * 1.959964 * variance**0.5)


SETTINGS = {
    "300 : 10": [300, 10],
    "300 : 3": [300, 3],
    "seven": [50, 31, 20, 12, 8, 5, 3],
    "24": [4 * (at % 12) + 3 for at in range(24)],
    "120": [round(50 * (3 / 50) ** (at / 119)) for at in range(120)],
    "120 of 4": [4] * 120,
}


@pytest.mark.parametrize(("first", "last"), [(0.95, 0.6), (0.9, 0.9), (0.75, 0.75), (0.9, 0.4)])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_interval_of_balanced_accuracy_covers_the_truth(setting, first, last):
    """In 93 to 98 % of runs; with 300 and 3 images it may be more. Recalls fall evenly."""
    counts, runs = torch.tensor(SETTINGS[setting]), 2000
    truth = torch.linspace(first, last, len(counts)).double()
    weights = torch.full((runs, len(counts)), 1 / len(counts)).double()
    wide = (each.expand(runs, len(counts)).contiguous().double() for each in (counts, truth))
    recalls = torch.binomial(*wide, generator=torch.Generator().manual_seed(0)) / counts
    _, low, high = training.mean_interval(recalls, counts, weights)
    covered = ((low <= truth.mean()) & (truth.mean() <= high)).double().mean().item()
    assert 0.93 <= covered <= (1 if setting == "300 : 3" else 0.985)


@pytest.mark.parametrize(("won", "lost"), [(0.2, 0.1), (0.3, 0.1), (0.3, 0.2), (0.15, 0.15)])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_interval_of_a_difference_covers_the_truth(setting, won, lost):
    """In 93 to 98 % of runs on the same images; more where so few images tell the two apart."""
    counts, runs, covered = torch.tensor(SETTINGS[setting]), 400, 0
    targets = torch.arange(len(counts)).repeat_interleave(counts)
    fates = torch.rand((runs, len(targets)), generator=torch.Generator().manual_seed(1))
    wrong = (targets + 1) % len(counts)
    for fate in fates:
        before = torch.where(fate < won, wrong, targets)
        after = torch.where((fate >= won) & (fate < won + lost), wrong, targets)
        row = training.compare(targets, before, after, counts, torch.arange(len(targets)))[1]
        covered += row["low"] <= won - lost <= row["high"]
    few = setting == "300 : 3"  # whose three have ten outcomes
    assert (0.91 if few else 0.93) <= covered / runs <= (0.995 if few else 0.985)


def test_calibration_error_is_the_gap_between_probability_and_being_right():
    targets, predicted = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 1])
    probability = torch.tensor([0.95] * 4 + [0.55] * 2)
    answer = training.Answer(predicted, probability, torch.empty(0))
    error = training.calibration_error(targets, answer)
    assert error == pytest.approx((0.95 - 0.75) / 2 + (1 - 0.55) / 2)


def test_loss_counts_classes_alike_and_natural_answers_as_in_training(animals, tmp_path):
    flags = ["--weights", "none", "--no-calibration", "--output", str(tmp_path / "x")]
    given, progress = prepare(animals, *flags)
    data = given.data
    assert data.counts(data.judges(0)).tolist() == [4, 2, 1]
    targets = data.labels[data.judges(0)]
    logits = torch.tensor([[2.0, 0, 0], [0, 0, 0.6], [0, 0, 0.1]])[targets]
    judged = training.judge(given, {0: logits})
    a, b, c = math.exp(2), math.exp(0.6), math.exp(0.1)
    losses = math.log(a + 2) - 2, math.log(b + 2), math.log(c + 2) - 0.1
    assert judged.loss == pytest.approx(sum(losses) / 3)
    assert judged.calibrated.predicted.tolist() == [2 * (label > 0) for label in targets]
    assert judged.true_probability.tolist() == pytest.approx(
        [math.exp(-losses[label]) for label in targets]
    )
    # Classes as frequent as in training: bees and cats are taken for apes, log(16 / 5) ahead.
    assert judged.natural.predicted.tolist() == [0] * 7
    rows = training.list_classes(data, progress.draws, judged)
    assert [row["natural_recall"] for row in rows] == [1, 0, 0]
    assert rows[0]["natural_precision_in_use"] == pytest.approx(16 / 31)
    # Where the images of a class are of one family they tell no more than one would.
    kin = replace(given, data=data._replace(families=data.labels))
    alike = training.judge(kin, {0: logits})
    weights = torch.full((1, 3), 1 / 3).double()
    _, *ends = map(float, training.mean_interval(judged.recall, torch.ones(3), weights))
    assert [alike.measures[end] for end in ("low", "high")] == pytest.approx(ends)
    assert judged.measures["low"] > alike.measures["low"]
    facts = training.list_facts(kin, progress, training.Result(alike))
    assert facts["judged by"] == "7 validation images, of 3 families"


def test_precision_in_use_is_that_of_classes_as_frequent_as_in_training():
    """Of 8,000 images 1 % are rare: 57 of 80 are found, and 79 of the others called so."""
    confusion = torch.tensor([[99, 1, 0], [29, 71, 0], [0, 0, 0]])
    precision = training.precision_in_use(confusion, torch.tensor([7920, 80, 500]))
    called = 0.71 * 80 + 0.01 * 7920
    often = 0.99 * 7920 / (0.99 * 7920 + 0.29 * 80)
    assert precision[:2].tolist() == pytest.approx([often, 0.71 * 80 / called])
    assert precision[2].isnan()  # no image of it is known
    never = training.precision_in_use(torch.tensor([[4, 0], [2, 0]]), torch.tensor([9, 1]))
    assert never[0] == pytest.approx(0.9) and never[1].isnan()  # nothing is called so


def test_auc_is_how_often_an_image_of_the_class_is_ahead_of_one_of_another():
    """By all pairs, each other class counting the same, ties half; one of four has no image."""
    stream = torch.Generator().manual_seed(0)
    targets = torch.tensor([0] * 9 + [1] * 4 + [2] * 2)
    probabilities = torch.randint(6, (15, 4), generator=stream) / 6
    areas = training.auc_by_class(probabilities, targets)
    for label in range(3):
        p, parts = probabilities[:, label], []
        for other in {0, 1, 2} - {label}:
            ahead = p[targets == label][:, None] - p[targets == other]
            parts.append(((ahead > 0).double() + (ahead == 0).double() / 2).mean().item())
        assert areas[label].item() == pytest.approx(sum(parts) / 2)
    assert areas[3].isnan()
    assert training.auc_by_class(probabilities[:9], targets[:9]).isnan().all()
    sure = torch.nn.functional.one_hot(targets, 4).float()
    assert training.auc_by_class(sure, targets)[:3].tolist() == [1, 1, 1]


def families_of(sizes: list[int]) -> torch.Tensor:
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


@pytest.mark.parametrize(
    ("sizes", "right", "effective", "groups"),
    [
        ([1] * 6, [1, 1, 0, 1, 1, 1], 6, 6),  # without families the images
        ([3] * 4, [1] * 9 + [0] * 3, 4, 4),  # all of a family alike: the families
        ([3] * 4, [1] * 12, 4, 4),  # all right: nobody knows how alike
        ([5], [1, 1, 0, 1, 1], 1, 1),  # one film tells what one image does
        ([4, 2], [1] * 6, 36 / 20, 2),  # of families that differ in size fewer
        # Seen is (0.5^2 + 0.5^2) / 4^2 * 2 / 1 of 3/16, that is 1/3, and twice 1 is added.
        ([2, 2], [1, 1, 1, 0], 1 + 1 / ((1 / 3 + 2) / 3), 2),
    ],
)
def test_images_tell_as_much_as_their_families_let_them(sizes, right, effective, groups):
    values, families = torch.tensor(right), families_of(sizes)
    targets = torch.ones(len(right)).long()
    counts, told = training.effective_counts(values, targets, families, 3)
    assert counts.tolist() == pytest.approx([0, effective, 0]) and told.tolist() == [0, groups, 0]


@pytest.mark.parametrize(
    ("sizes", "recall", "alike", "classes"),
    [
        *(([10] * 5, 0.8, alike, 1) for alike in (0.0, 0.3, 1.0)),
        *(([5] * 10, 0.9, alike, 1) for alike in (0.0, 0.6, 1.0)),
        *(([20, 9, 9, 6, 3, 2, 1, 1], 0.8, alike, 1) for alike in (0.0, 0.3, 1.0)),
        *(([10] * 5, 0.8, alike, 8) for alike in (0.3, 1.0)),
    ],
)
def test_intervals_count_families(sizes, recall, alike, classes):
    """Of 5 families of 10 equal frames that of 50 images holds the truth in 41 % of runs.

    A family's images are right at a rate of its own, more or less `alike` (0: families say
    nothing, 1: all of one are right or wrong). Of several classes the mean is asked for.
    """
    stream, runs = np.random.default_rng(0), 400 if classes == 1 else 200
    families = families_of(sizes).repeat(classes)
    targets = torch.arange(classes).repeat_interleave(sum(sizes))
    families = families + len(sizes) * targets
    shape = (runs, len(sizes) * classes)
    rates = np.full(shape, recall)
    if alike:
        spread = (1 - alike) / alike or 1e-9
        rates = stream.beta(recall * spread, (1 - recall) * spread, shape)
    right = torch.tensor(stream.random((runs, len(targets))) < rates[:, families.numpy()])
    weights, held = torch.full((1, classes), 1 / classes).double(), {"families": 0, "images": 0}
    for values in right:
        found = torch.bincount(targets, values.double()) / sum(sizes)
        effective, _ = training.effective_counts(values, targets, families, classes)
        images = torch.full((classes,), sum(sizes)).double()
        for kind, counts in (("families", effective), ("images", images))[: 1 + (alike == 1)]:
            if classes > 1:
                _, low, high = training.mean_interval(found, counts, weights)
            else:
                low, high = training.wilson_interval(found * counts, counts)
            held[kind] += bool(low <= recall <= high)
    assert held["families"] >= 0.92 * runs
    if alike == 1:
        assert held["images"] <= (0.5 if sizes == [10] * 5 else 0.8) * runs
