"""What calibration promises: two numbers, fitted on other images than they are evaluated on."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import images, prepare
from torch import Tensor
from torch.nn import functional

import data_training as training


def fit(logits: Tensor, targets: Tensor, log_share: Tensor, left: float = 1.0) -> list[float]:
    """Scale and shift by the script, which expects `left` of the log shares in the logits."""
    log_share = log_share.expand(len(targets), -1)
    return [*training.fit_calibration(logits, targets, log_share, left)]


def best_on_a_grid(logits: Tensor, targets: Tensor, log_share: Tensor, left: float) -> list[float]:
    """The numbers with the lowest penalised loss, by ever finer grids in numpy."""
    z, y, share = logits.double().numpy(), targets.numpy(), log_share.double().numpy()
    weights = 1 / np.bincount(y)[y]
    weights /= weights.sum()
    # 2 / (the images that tell as much), a class without any as half an image
    penalty = 2 * np.mean(1 / np.maximum(np.bincount(y, minlength=len(share)), 0.5)) / len(share)
    best, width = [1.0, left], 4.0
    for _ in range(12):
        found, sides = [], [np.linspace(x - width, x + width, 9) for x in best]
        for scale, shift in itertools.product(*sides):
            moved = scale * z - shift * share
            lost = np.log(np.exp(moved).sum(1)) - moved[np.arange(len(y)), y]
            far = (scale - 1) ** 2 + ((shift - left * scale) * share.std()) ** 2
            found.append((weights @ lost + penalty * far, scale, shift))
        best, width = [*min(found)[1:]], width / 3
    return best


@pytest.mark.parametrize("left", [0.0, 1.0, 2.0])
@pytest.mark.parametrize(
    ("classes", "count", "missing"), [(2, 12, 0), (2, 300, 0), (7, 60, 0), (7, 60, 2)]
)
def test_the_numbers_are_those_of_a_search_over_a_grid(classes, count, missing, left):
    stream = torch.Generator().manual_seed(classes + count)
    targets = torch.randint(classes, (count,), generator=stream)
    targets = targets % max(2, classes - missing)
    logits = 1.5 * torch.randn(count, classes, generator=stream)
    logits += functional.one_hot(targets, classes) + torch.linspace(2, 0, classes)
    log_share = torch.logspace(0, -1.3, classes).log()
    log_share -= log_share.mean()
    fitted = fit(logits, targets, log_share, left)
    assert fitted == pytest.approx(best_on_a_grid(logits, targets, log_share, left), abs=2e-3)


def test_extreme_logits_get_sensible_numbers():
    share = torch.tensor([0.8, 0.2]).log()
    targets = torch.tensor([0, 1] * 500)
    assert fit(torch.empty(0, 2), targets[:0], share, 2.0) == [1, 2]  # what is usual
    right = 20.0 * functional.one_hot(targets)
    assert fit(right, targets, share) == pytest.approx([1, 1], abs=0.05)
    # A network that is worse than chance is not turned round, nor is a class favoured.
    assert fit(-right, targets, share) == [0.01, 0.01]
    # Classes about as frequent as each other are hardly shifted: the head keeps its digits.
    even = torch.tensor([1000 / 2001, 1001 / 2001]).log()
    even -= even.mean()
    scale, shift = fit(right + torch.tensor([3.0, 0]), targets, even)
    assert 0 < scale < 2
    assert (shift * even).abs().max() < 0.1


def test_each_class_is_cut_at_random_into_five_parts():
    targets = torch.tensor([0] * 100 + [1] * 7 + [2] + [0] * 100)
    part = training.cut_parts(targets, torch.arange(len(targets)))
    assert torch.bincount(part[targets == 0]).tolist() == [40] * 5
    assert sorted(torch.bincount(part[targets == 1], minlength=5).tolist()) == [1, 1, 1, 2, 2]
    assert 5 < (part[:100] == 0).sum() < 35
    part = training.cut_parts(torch.tensor([0] * 50 + [1] * 100), torch.arange(150) // 10)
    assert all(len(set(family)) == 1 for family in part.reshape(15, 10).tolist())
    assert torch.bincount(part[:50]).tolist() == [10] * 5
    # Families with an image of the rarest class, among others: one in each part.
    part = training.cut_parts(torch.tensor([0, 1] * 5 + [0, 0] * 15), torch.arange(40) // 2)
    assert sorted(part[1:10:2].tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("folds", [1, 3])
def test_no_image_is_evaluated_by_numbers_that_were_fitted_on_it(folds):
    held = [at % 3 if folds == 3 else (0, None)[at % 2] for at in range(120)]
    data = images([0, 0, 0, 1] * 30, held, folds, families=torch.arange(120) // 4)
    eval_set = training.make_eval_set(data, range(folds))
    shares = training.class_shares(data, eval_set, 1.0)
    targets, log_share = eval_set.targets, shares.log_share
    noise = torch.randn(len(targets), 2, generator=torch.Generator().manual_seed(0))
    logits = 2 * functional.one_hot(targets, 2) + noise
    evaluation = training.evaluate_cross_fitted(logits, eval_set, shares)
    part = eval_set.folds if folds == 3 else training.cut_parts(targets, eval_set.families)
    for each in part.unique():
        own, others = part == each, part != each
        scale, shift = fit(logits[others], targets[others], log_share[others])
        probabilities = (scale * logits[own] - shift * log_share[own]).softmax(1)
        torch.testing.assert_close(evaluation.probabilities[own], probabilities)
        assert torch.equal(evaluation.predicted[own], probabilities.argmax(1))
    assert [*evaluation.calibration] == fit(logits, targets, log_share)
    confusion = training.confusion_matrix(targets, logits.argmax(1), 2)
    expected = training.summarise(confusion, shares.train_counts, confusion.sum(1))
    found = {name: evaluation.summary[f"as_trained_{name}"] for name in training.MEASURES}
    assert found == pytest.approx({name: expected[name] for name in found}, rel=0, nan_ok=True)


@pytest.mark.parametrize(("power", "left"), [(1, 1), (0.5, 1.5), (0, 2), (2, 0)])
def test_what_the_sampler_does_not_balance_is_expected_in_the_logits(power, left):
    data = images([0, 0, 0, 1, 0, 1], [None] * 4 + [0] * 2)
    shares = training.class_shares(data, training.make_eval_set(data, [0]), power)
    assert shares.expected_shift == left
    assert shares.train_counts.tolist() == [3, 1]
    half = pytest.approx([math.log(3) / 2, -math.log(3) / 2])
    assert shares.log_share.tolist() == [half, half]


def test_each_network_has_its_own_class_shares_and_the_ensemble_their_mean():
    """Fold 1 learns 2 and 1 images, fold 2 learns 4 and 1, and the last image tests both."""
    data = images([0, 0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 0, 1, 2], 2)
    networks = training.make_eval_set(data, [0, 1])
    ensemble = training.make_eval_set(data, [2])
    assert networks.folds.tolist() == [0] * 5 + [1] * 3
    assert ensemble.indices.tolist() == [8]
    shares = training.class_shares(data, networks, 1.0)
    assert shares.train_counts.tolist() == [3, 1]
    rows = [math.log(2) / 2] * 5 + [math.log(4) / 2] * 3
    assert shares.log_share[:, 0].tolist() == pytest.approx(rows)
    assert shares.log_share[:, 1].tolist() == pytest.approx([-x for x in rows])
    together = training.class_shares(data, ensemble, 1.0)
    assert together.train_counts.tolist() == [3, 1]
    assert together.log_share.tolist() == [pytest.approx([math.log(8) / 4, -math.log(8) / 4])]


class Constant(torch.nn.Module):
    """A network that says the same of two images, whatever they show."""

    def __init__(self, said: list[list[float]]):
        super().__init__()
        self.said = torch.tensor(said)

    def forward(self, _: Tensor) -> Tensor:
        return self.said


def test_logits_that_overflow_are_bounded_and_nan_is_refused(animals, tmp_path):
    reader = prepare(animals, "--weights", "none", "--output", tmp_path / "x")[0].reader

    def logits_of(value: float) -> list[list[float]]:
        network = Constant([[value, 0.0, 0.0], [0.0, 1.0, -math.inf]])
        return training.compute_logits(network, reader, torch.arange(2)).tolist()

    assert logits_of(math.inf) == [[1e4, 0, 0], [0, 1, -1e4]]
    with pytest.raises(training.DataError, match="outputs became nan"):
        logits_of(math.nan)
