"""What calibration promises: two numbers, fitted on other images than those they are judged on."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import FILES, TINY, network_of, prepare, rows_of, run
from torch import Tensor
from torch.nn import functional

import data_training as training

PLAIN = ("--weights", "none", "--image-size", "32")


def two_kinds(times: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of images of two kinds, targets, log shares of a frequent class and a rare one."""
    counts = {(0, 3.0): 32, (0, 1.0): 8, (1, 3.0): 3, (1, 1.0): 7}
    rows = [(target, by) for (target, by), count in counts.items() for _ in range(count)]
    logits = torch.tensor([[by, 0.0] for _, by in rows]).repeat(times, 1)
    targets = torch.tensor([target for target, _ in rows]).repeat(times)
    return logits, targets, torch.tensor([0.8, 0.2]).log()


def best_on_a_grid(logits: Tensor, targets: Tensor, log_share: Tensor, left: float) -> list[float]:
    """The numbers with the lowest penalised loss, by ever finer grids in numpy."""
    z, y, share = logits.double().numpy(), targets.numpy(), log_share.double().numpy()
    weights = 1 / np.bincount(y)[y]
    weights /= weights.sum()
    # 2 / (the images that tell as much), a class without any as half an image
    penalty = 2 * np.mean(1 / np.maximum(np.bincount(y, minlength=len(share)), 0.5)) / len(share)
    best, width = [1.0, left], 4.0
    for _ in range(12):
        found = []
        for scale, shift in itertools.product(
            *(np.linspace(x - width, x + width, 9) for x in best)
        ):
            moved = scale * z - shift * share
            lost = np.log(np.exp(moved).sum(1)) - moved[np.arange(len(y)), y]
            far = (scale - 1) ** 2 + ((shift - left * scale) * share.std()) ** 2
            found.append((weights @ lost + penalty * far, scale, shift))
        best, width = [*min(found)[1:]], width / 3
    return best


@pytest.mark.parametrize("left", [0.0, 1.0, 2.0])
@pytest.mark.parametrize(
    ("classes", "images", "missing"), [(2, 12, 0), (2, 300, 0), (7, 60, 0), (7, 60, 2)]
)
def test_the_numbers_are_those_of_a_search_over_a_grid(classes, images, missing, left):
    stream = torch.Generator().manual_seed(classes + images)
    targets = torch.randint(classes, (images,), generator=stream)
    targets = targets % max(2, classes - missing)
    logits = 1.5 * torch.randn(images, classes, generator=stream)
    logits += functional.one_hot(targets, classes) + torch.linspace(2, 0, classes)
    log_share = torch.logspace(0, -1.3, classes).log()
    log_share -= log_share.mean()
    fitted = training.fit_calibration(logits, targets, log_share, left)
    assert [*fitted] == pytest.approx(best_on_a_grid(logits, targets, log_share, left), abs=2e-3)


def make(counts: Tensor, apart: float, left: float, stream: torch.Generator) -> tuple[Tensor, ...]:
    """Logits twice as sure as they should be that favour frequent classes by `left`; targets."""
    classes = len(counts)
    targets = torch.arange(classes).repeat_interleave(counts)
    points = apart * torch.eye(classes)[targets]
    points += torch.randn(points.shape, generator=stream)
    share = torch.logspace(0, -1.3, classes).log()
    return 2 * (apart * points + left * share), targets, share


def recall_with(
    numbers: tuple[float, float], logits: Tensor, targets: Tensor, share: Tensor
) -> Tensor:
    """The recall of each class by calibrated logits."""
    predicted = (numbers[0] * logits - numbers[1] * share).argmax(1)
    return training.recall_by_class(training.confusion_matrix(targets, predicted, len(share)))


@pytest.mark.parametrize("left", [0.0, 1.0])
@pytest.mark.parametrize("classes", [2, 7])
def test_the_prior_is_not_felt_with_many_images(classes, left):
    stream = torch.Generator().manual_seed(0)
    fitted = training.fit_calibration(*make(torch.full((classes,), 2000), 1.5, left, stream))
    assert [*fitted] == pytest.approx([0.5, left], abs=0.1)
    logits, targets, share = make(torch.full((classes,), 20_000), 1.5, left, stream)
    ours, best = (
        recall_with(numbers, logits, targets, share).mean() for numbers in (fitted, (0.5, left))
    )
    assert ours > best - 0.002


def test_without_images_shift_is_what_is_usual():
    logits, targets, log_share = two_kinds()
    assert training.fit_calibration(logits[:0], targets[:0], log_share, 2.0) == (1.0, 2.0)


@pytest.mark.parametrize("rare", [0, 1])
@pytest.mark.parametrize("classes", [2, 7])
def test_a_class_missing_where_numbers_are_fitted_is_still_found(classes, rare):
    stream = torch.Generator().manual_seed(0)
    counts = torch.full((classes,), 100)
    counts[-1] = rare
    fitted = training.fit_calibration(*make(counts, 2.0, 1.0, stream))
    others = make(torch.full((classes,), 1000), 2.0, 1.0, stream)
    assert recall_with(fitted, *others).min() > 0.5 and fitted.scale > 0.3


@pytest.mark.parametrize("classes", [2, 1000])
def test_perfect_logits_are_believed(classes):
    targets = torch.arange(classes).repeat(3)
    logits = 20.0 * functional.one_hot(targets, classes)
    log_share = (torch.arange(classes) + 1.0).log()
    scale, shift = training.fit_calibration(logits, targets, log_share - log_share.mean())
    assert (scale, shift) == pytest.approx((1, 1), abs=0.05)
    assert torch.equal((scale * logits - shift * log_share).argmax(1), targets)


def test_a_network_worse_than_chance_is_not_turned_round():
    targets = torch.tensor([0, 1] * 500)
    logits = 5.0 * functional.one_hot(1 - targets)
    fitted = training.fit_calibration(logits, targets, torch.tensor([0.8, 0.2]).log())
    assert fitted == (0.01, 0.01)  # nor is one class favoured by what it says


@pytest.mark.parametrize("share", [0.5, 1000 / 2001])
def test_classes_about_as_frequent_as_each_other_are_hardly_shifted(share):
    """So that the saved head keeps its digits in half precision."""
    logits, targets, _ = two_kinds()
    log_share = torch.tensor([share, 1 - share]).log()
    log_share -= log_share.mean()
    scale, shift = training.fit_calibration(logits, targets, log_share)
    assert 0 < scale < 2 and (shift * log_share).abs().max() < 0.1


def test_a_part_of_very_many_logits_is_enough_and_misses_no_class(monkeypatch):
    logits, targets, log_share = two_kinds(100)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    given = logits[order], targets[order], log_share
    whole = training.fit_calibration(*given)
    monkeypatch.setattr(training, "MOST_FITTED", 2000)  # 1,000 of 5,000 images
    part = training.fit_calibration(*given)
    assert part != whole and [*part] == pytest.approx([*whole], abs=0.2)
    labels = torch.tensor([0] * 995 + [1, 1, 1, 0, 0])
    chosen = training.pick_evenly(labels, 10)
    assert [labels[chosen].eq(label).sum() for label in (0, 1)] == [10, 1]  # of 997 and 3
    assert training.pick_evenly(torch.arange(5), 2).all()  # none can go
    assert training.pick_evenly(labels, 1000).all()


def test_each_class_is_cut_at_random_into_five_parts():
    targets = torch.tensor([0] * 100 + [1] * 7 + [2] + [0] * 100)
    alone = torch.arange(len(targets))
    part = training.cut_parts(targets, alone)
    assert torch.bincount(part[targets == 0]).tolist() == [40] * 5
    assert sorted(torch.bincount(part[targets == 1], minlength=5).tolist()) == [1, 1, 1, 2, 2]
    assert torch.equal(part, training.cut_parts(targets, alone))
    assert 5 < (part[:100] == 0).sum() < 35 and len(set(part[:20].tolist())) == 5
    part = training.cut_parts(torch.tensor([0] * 50 + [1] * 100), torch.arange(150) // 10)
    assert all(len(set(family)) == 1 for family in part.reshape(15, 10).tolist())
    assert torch.bincount(part[:50]).tolist() == [10] * 5
    assert torch.bincount(part[50:]).tolist() == [20] * 5


def answers_of(data: training.Data) -> dict[int, Tensor]:
    """Logits of the images that judge each fold, of a network that knows a little."""
    stream, answers = torch.Generator().manual_seed(0), {}
    for fold in range(data.folds):
        targets = data.labels[data.judges(fold)]
        noise = torch.randn(len(targets), len(data.classes), generator=stream)
        answers[fold] = 2 * functional.one_hot(targets, len(data.classes)) + noise
    return answers


@pytest.mark.parametrize("flags", [(), ("--folds", "3")])
def test_no_image_is_judged_by_numbers_that_were_fitted_on_it(flags, animals, tmp_path):
    given, _ = prepare(animals, *PLAIN, "--output", str(tmp_path / "x"), *flags)
    data, share = given.data, given.data.log_share()
    answers = answers_of(data)
    judged = training.judge(given, answers)
    logits, targets = torch.cat([*answers.values()]), data.labels[data.judged()]
    part = training.cut_parts(targets, data.families[data.judged()])
    if flags:
        part = data.held[data.judged()]
    for each in part.unique():
        own, others = part == each, part != each
        scale, shift = training.fit_calibration(logits[others], targets[others], share)
        probability, predicted = (scale * logits[own] - shift * share).softmax(1).max(1)
        torch.testing.assert_close(judged.calibrated.probability[own], probability)
        assert torch.equal(judged.calibrated.predicted[own], predicted)
    assert judged.calibration == training.fit_calibration(logits, targets, share)
    assert torch.equal(judged.as_trained.predicted, logits.argmax(1))
    torch.testing.assert_close(judged.as_trained.probability, logits.softmax(1).max(1).values)


@pytest.mark.parametrize(
    ("flags", "left"),
    [("", 1), ("--power 0.5", 1.5), ("--power 0", 2), ("--rebalance none", 2), ("--power 2", 0)],
)
def test_what_the_sampler_does_not_balance_is_expected_in_the_logits(
    flags, left, animals, tmp_path
):
    given, _ = prepare(animals, *PLAIN, "--output", str(tmp_path / "x"), *flags.split())
    answers, targets = answers_of(given.data), given.data.labels[given.data.judges(0)]
    expected = training.fit_calibration(answers[0], targets, given.data.log_share(), left)
    assert training.judge(given, answers).calibration == expected


def test_logits_that_overflow_are_bounded_and_no_numbers_refused(animals, tmp_path):
    given, _ = prepare(animals, *PLAIN, "--output", str(tmp_path / "x"))

    def logits_of(value: float) -> list[list[float]]:
        table = torch.tensor([[value, 0.0, 0.0], [0.0, 1.0, -math.inf]])
        inputs = training.Features(table, given.data.labels, given.compute)
        return training.evaluate(given, torch.nn.Identity(), inputs, torch.arange(2)).tolist()

    assert logits_of(math.inf) == [[1e4, 0, 0], [0, 1, -1e4]]
    with pytest.raises(training.DataError, match="no numbers"):
        logits_of(math.nan)


def test_training_is_the_same_without_calibration(default_run, animals, pretrained, tmp_path):
    flags = ("--weights", pretrained, "--epochs", 2, "--no-calibration", *TINY)
    plain = run(animals, *flags, "--output", tmp_path / "run")
    for ours, theirs in zip(
        *(rows_of(each.path / "history.csv") for each in (default_run, plain)), strict=True
    ):
        assert ours["train_loss"] == theirs["train_loss"]
        assert (theirs["logit_scale"], theirs["logit_shift"]) == ("1", "0")
        assert (ours["logit_scale"], ours["logit_shift"]) != ("1", "0")
        for name in training.MEASURES:
            assert ours[f"as_trained_{name}"] == theirs[name] == theirs[f"as_trained_{name}"]
    assert "\nas trained " in default_run.out and "\nas trained " not in plain.out


def test_given_weights_are_judged_as_they_are_by_their_architecture_and_image_size(
    default_run, animals, others, tmp_path
):
    """Images to test on must not tune what they test."""
    flags = ["--weights", default_run.path, "--epochs", 0, "--val", others]
    judged = run(animals, *flags, "--device", "cpu", "--no-amp", "--output", tmp_path / "run")
    result = json.loads((judged.path / "config.json").read_text())["result"]
    assert (result["logit_scale"], result["logit_shift"]) == (1, 0)
    content, before = network_of(judged.path), network_of(default_run.path)["networks"]
    assert (content["arch"], content["train_size"]) == ("resnet18", 32)
    assert judged.out.startswith("2 resnet18 ") and "head kept" in judged.out.splitlines()[0]
    for ours, theirs in zip(content["networks"], before, strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    files = {path.name for path in judged.path.iterdir()}
    assert files == FILES - {"history.csv", "curves.svg"}  # nothing was trained
    assert ", nothing trained; " in (judged.path / "report.html").read_text()
