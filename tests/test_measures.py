"""What the measures and their intervals promise: by hand, by other formulas, by simulation."""

import math

import pytest
import torch
from conftest import eval_set_of, shares_of

import data_training as training

# Ten images of class 0, four of class 1, two of class 2; nobody asks for the last class.
CONFUSION = torch.tensor([[8, 1, 1, 0], [1, 3, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])


def test_measures_are_means_of_recalls_and_nan_for_an_empty_group():
    result = training.summarise(CONFUSION, torch.tensor([101, 100, 20, 500]), CONFUSION.sum(1))
    assert result["accuracy"] == 12 / 16
    assert result["balanced_accuracy"] == pytest.approx((0.8 + 0.75 + 0.5) / 3)
    assert result["many"] == 0.8  # the class that nobody asks for does not count
    assert result["medium"] == pytest.approx((0.75 + 0.5) / 2)
    assert math.isnan(result["few"])
    two = torch.tensor([[1, 1], [0, 4]])
    few = training.summarise(two, torch.tensor([19, 20]), two.sum(1))
    assert math.isnan(few["many"])
    assert (few["medium"], few["few"]) == (1.0, 0.5)


def test_the_interval_of_a_recall_is_wilson_s_at_one_image_less():
    one = torch.ones(1, 1).double()
    for right, count, low, high in (
        # Newcombe 1998, Statistics in Medicine 17, table I, of one image less
        (81 / 263, 264, 0.2553, 0.3662),
        (15 / 148, 149, 0.0624, 0.1605),
        (0, 21, 0.0000, 0.1611),
        (1 / 29, 30, 0.0061, 0.1718),
        (1, 5, 4 / (4 + training.Z**2), 1),
    ):
        found = training.mean_interval(torch.tensor([right]).double(), torch.tensor([count]), one)
        assert [x.item() for x in found] == pytest.approx([right, low, high], abs=5e-5)


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


def evaluated(
    targets: list[int],
    predicted: list[int],
    train_counts: list[int],
    families: list[int] | None = None,
) -> training.Evaluation:
    """The evaluation of these answers, each with logits of 1 and 0."""
    eval_set = eval_set_of(targets, families)
    shares = shares_of(train_counts, len(targets))
    logits = torch.nn.functional.one_hot(torch.tensor(predicted), len(train_counts)).float()
    return training.evaluate(logits, training.Calibration(), eval_set, shares)


def test_a_comparison_adds_a_quarter_of_an_image_to_both_who_won_and_who_lost():
    """Class 0: three of eight newly right, one newly wrong; class 1: nothing changed."""
    targets = [0] * 8 + [1] * 2
    before = torch.tensor([1, 1, 1, 0, 0, 0, 0, 1, 1, 0])
    after = [0, 0, 0, 1, 0, 0, 0, 1, 1, 0]
    rows = training.compare(before, evaluated(targets, after, [101, 5]))
    names = ["accuracy", "balanced accuracy", "many", "few"]  # no class is in between
    assert [row["measure"] for row in rows] == names
    won, lost, n = 3.25, 1.25, 8.5
    half = 1.959964 * (((won + lost) / n - ((won - lost) / n) ** 2) / 7.5) ** 0.5
    expected = [0.5, 0.75, 0.25, 0.25 - half, 0.25 + half]
    assert [*rows[2].values()][1:6] == pytest.approx(expected)
    # Two images tell little: 0.25 + 0.25 of 2.5, of n - 1/2.
    half = 1.959964 * (0.5 / 2.5 / 1.5) ** 0.5
    assert [*rows[3].values()][1:6] == pytest.approx([0.5, 0.5, 0, -half, half])
    assert (rows[0]["before"], rows[0]["after"]) == pytest.approx((0.5, 0.7))
    assert (rows[1]["before"], rows[1]["after"]) == (0.5, 0.625)
    assert {row["more_than_chance"] for row in rows} == {"no"}
    clear = training.compare(1 - torch.tensor(targets), evaluated(targets, targets, [101, 5]))
    assert {row["more_than_chance"] for row in clear} == {"yes"}


def test_a_comparison_of_copies_in_families_says_what_one_of_each_does():
    targets, before = [0] * 8 + [1] * 2, [1, 1, 1, 0, 0, 0, 0, 1, 1, 0]
    after = [0, 0, 0, 1, 0, 0, 0, 1, 1, 0]
    once = training.compare(torch.tensor(before), evaluated(targets, after, [101, 5]))
    targets, before, after = (
        [x for x in each for _ in "0123456789"] for each in (targets, before, after)
    )
    families = [at // 10 for at in range(100)]
    tenfold = evaluated(targets, after, [101, 5], families)
    again = training.compare(torch.tensor(before), tenfold)
    for one, other in zip(once, again, strict=True):
        assert [*other.values()][1:6] == pytest.approx([*one.values()][1:6])


def test_the_interval_of_a_group_of_classes_depends_on_its_own_classes_alone():
    """Families span the two frequent classes, and two images of a rare one are by themselves."""
    targets, families = [0] * 8 + [1] * 8, [*range(8)] * 2
    before = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    after = [0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1]
    pair = evaluated(targets, after, [500, 500, 5], families)
    alone = training.compare(torch.tensor(before), pair)[2]
    more = evaluated([*targets, 2, 2], [*after, 0, 2], [500, 500, 5], [*families, 8, 9])
    together = training.compare(torch.tensor([*before, 2, 0]), more)[2]
    assert alone["measure"] == together["measure"] == "many"
    assert [*together.values()][1:6] == pytest.approx([*alone.values()][1:6])


def test_the_precision_of_a_class_without_images_is_not_known():
    evaluation = evaluated([0, 0, 1], [0, 2, 1], [9, 9, 9])
    precision = [
        row["precision"] for row in training.list_classes(["a", "b", "c"], [1, 1, 1], evaluation)
    ]
    assert precision[:2] == [1, 1] and math.isnan(precision[2])


@pytest.mark.parametrize(("first", "last"), [(0.95, 0.6), (0.9, 0.9), (0.75, 0.75), (0.9, 0.4)])
@pytest.mark.parametrize("images", [[300, 10], [50, 31, 20, 12, 8, 5, 3], [4] * 120])
def test_the_interval_of_balanced_accuracy_covers_the_truth(images, first, last):
    """In 93 to 98 % of runs. Recalls fall evenly."""
    counts, runs = torch.tensor(images), 2000
    truth = torch.linspace(first, last, len(counts)).double()
    weights = torch.full((runs, len(counts)), 1 / len(counts)).double()
    wide = (each.expand(runs, len(counts)).contiguous().double() for each in (counts, truth))
    recalls = torch.binomial(*wide, generator=torch.Generator().manual_seed(0)) / counts
    _, low, high = training.mean_interval(recalls, counts, weights)
    covered = ((low <= truth.mean()) & (truth.mean() <= high)).double().mean().item()
    assert 0.93 <= covered <= 0.985


def test_precision_in_use_is_that_of_classes_as_frequent_as_in_training():
    """Of 8,000 images 1 % are rare: 57 of 80 are found, and 79 of the others called so."""
    confusion = torch.tensor([[99, 1, 0], [29, 71, 0], [0, 0, 0]])
    precision = training.precision_in_use(confusion, torch.tensor([7920, 80, 500]))
    called = 0.71 * 80 + 0.01 * 7920
    often = 0.99 * 7920 / (0.99 * 7920 + 0.29 * 80)
    assert precision[:2].tolist() == pytest.approx([often, 0.71 * 80 / called])
    assert precision[2].isnan()  # no image of it is known


def test_auc_is_how_often_an_image_of_the_class_is_ahead_of_another_image():
    """By all pairs, ties half; one of four classes has no image."""
    targets = torch.tensor([0] * 18 + [1] * 8 + [2] * 4)
    scores = torch.randint(6, (30, 4), generator=torch.Generator().manual_seed(0)) / 6
    areas = training.auc_by_class(scores, targets)
    for label in range(3):
        own = scores[:, label]
        ahead = own[targets == label][:, None] - own[targets != label]
        share = ((ahead > 0).double() + (ahead == 0).double() / 2).mean().item()
        assert areas[label].item() == pytest.approx(share)
    assert areas[3].isnan()
    assert training.auc_by_class(scores[:9], targets[:9]).isnan().all()


def test_images_tell_as_much_as_their_families_let_them():
    """Class 1 shares the family 0, which counts in each class for itself; class 2 has no image."""
    for families, effective, groups in (
        ([0, 1, 2, 3], 4, 4),
        ([0, 0, 0, 1, 1, 1], 2, 2),
        ([7, 7, 7, 7, 7], 1, 1),  # one film tells what one image does
        ([0, 0, 0, 0, 1, 1], 6**2 / (4**2 + 2**2), 2),  # of families that differ in size fewer
    ):
        eval_set = eval_set_of([0] * len(families) + [1], [*families, 0])
        counts, told = training.effective_counts(eval_set, 3)
        assert counts.tolist() == pytest.approx([effective, 1, 0])
        assert told.tolist() == [groups, 1, 0]


def test_families_that_span_classes_widen_intervals_of_means_and_of_differences():
    """Each family has an image in both classes, and is right or lost as a whole.

    The errors of its images, each 1/2 by 4, add up: the variance is 4 * (2 / 8)^2 / (8 * (1 / 8)^2)
    times as large.
    """
    targets, wrong = [0, 0, 0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 1, 1]
    spanning = evaluated(targets, wrong, [9, 9], families=[0, 1, 2, 3] * 2)
    apart = evaluated(targets, wrong, [9, 9])
    right = spanning.predicted == spanning.eval_set.targets
    assert training.spanning_factor(right, spanning.eval_set, torch.ones(2)) == pytest.approx(2)
    assert training.spanning_factor(right, apart.eval_set, torch.ones(2)) == 1
    # Where all are right it is not known how alike families are: as if wholly so.
    assert training.spanning_factor(
        torch.ones(8), spanning.eval_set, torch.ones(2)
    ) == pytest.approx(2)
    half = torch.full((1, 2), 0.5).double()
    ends = training.mean_interval(half[0], torch.tensor([1 + 3 / 2] * 2), half)[1:]
    found = [spanning.summary[end] for end in ("low", "high")]
    assert found == pytest.approx([end.item() for end in ends])
    rows = [training.compare(torch.tensor(targets), each)[1] for each in (spanning, apart)]
    wide, narrow = (row["high"] - row["difference"] for row in rows)
    assert wide == pytest.approx(narrow * 2**0.5)


def test_loss_counts_classes_alike_and_of_one_image_all_is_possible():
    """Four images of one class, two of another, one of the last."""
    targets = [0, 0, 0, 0, 1, 1, 2]
    logits = torch.tensor([[2.0, 0, 0], [0, 0, 0.6], [0, 0, 0.1]])[targets]
    shares = shares_of([16, 10, 5], len(targets))
    result = training.evaluate(logits, training.Calibration(), eval_set_of(targets), shares)
    a, b, c = math.exp(2), math.exp(0.6), math.exp(0.1)
    losses = math.log(a + 2) - 2, math.log(b + 2), math.log(c + 2) - 0.1
    assert result.summary["val_loss"] == pytest.approx(sum(losses) / 3)
    assert result.predicted.tolist() == [2 * (label > 0) for label in targets]
    assert result.losses.tolist() == pytest.approx([losses[label] for label in targets])
    rows = training.list_classes(["ape", "bee", "cat"], [1, 2, 3], result)
    assert [row["recall"] for row in rows] == [1, 0, 1]
    assert (rows[2]["low"], rows[2]["high"]) == (0, 1)
