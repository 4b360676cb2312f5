"""What calibration promises: two numbers, fitted on other images than those they are judged on."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CPU, prepare, rows_of, write_folder
from torchvision import models

import data_training as training

TINY = ["--arch", "resnet18", "--image-size", "32", "--batch-size", "16", "--device", "cpu"]


def two_kinds(times: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, targets and the log shares of two classes, one of them four times as frequent.

    Images look like kind x or kind y, whose logits favour class 0 by 3 and by 1. Of class 0, 80 %
    look like x; of class 1, 30 %. As each class counts the same, the odds of class 0 are 8 : 3
    for x and 2 : 7 for y.
    """
    counts = {(0, 3.0): 32, (0, 1.0): 8, (1, 3.0): 3, (1, 1.0): 7}
    rows = [(target, by) for (target, by), count in counts.items() for _ in range(count * times)]
    logits = torch.tensor([[by, 0.0] for _, by in rows])
    return logits, torch.tensor([target for target, _ in rows]), torch.tensor([0.8, 0.2]).log()


def test_the_two_numbers_give_the_odds_of_classes_that_count_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "PRIOR", 0.0)
    scale, shift = training.fit_calibration(*two_kinds())
    # 3 scale - shift log 4 = log(8 / 3) and scale - shift log 4 = log(2 / 7)
    expected = (math.log(8 / 3) - math.log(2 / 7)) / 2
    assert scale == pytest.approx(expected, abs=1e-4)
    assert shift == pytest.approx((3 * expected - math.log(8 / 3)) / math.log(4), abs=1e-4)


def test_the_prior_counts_less_the_more_images_there_are() -> None:
    exact = (math.log(8 / 3) - math.log(2 / 7)) / 2
    scales = [training.fit_calibration(*two_kinds(times)).scale for times in (1, 10, 1000)]
    assert scales == sorted(scales) and scales[0] < 0.9 * exact
    assert scales[2] == pytest.approx(exact, abs=5e-3)


def test_where_the_probabilities_are_right_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "PRIOR", 0.0)
    _, targets, log_share = two_kinds()
    kind = two_kinds()[0][:, 0] == 3
    logits = torch.where(kind[:, None], torch.tensor([8.0, 3.0]), torch.tensor([2.0, 7.0])).log()
    fitted = training.fit_calibration(logits, targets, log_share)
    assert fitted == pytest.approx((1, 0), abs=1e-4)


@pytest.mark.parametrize("classes", [2, 1000])
def test_the_numbers_stay_near_1_and_0_where_everything_is_right(classes: int) -> None:
    targets = torch.arange(classes).repeat(3)
    logits = 20.0 * torch.nn.functional.one_hot(targets, classes)
    log_share = (torch.arange(classes) + 1.0).log()
    assert training.fit_calibration(logits, targets, log_share) == pytest.approx((1, 0), abs=0.05)


@pytest.mark.parametrize("images", [0, 1, 2])
def test_hardly_an_image_changes_hardly_anything(images: int) -> None:
    logits, targets, log_share = two_kinds()
    logits, targets = logits[:images], targets[:images]
    scale, shift = training.fit_calibration(logits, targets, log_share)
    assert abs(scale - 1) < 0.3 and abs(shift) < 0.3
    if images:
        last = training.assess(logits, targets, log_share, True)
        assert last.predicted.tolist() == [0] * images and math.isfinite(last.loss)


def test_a_network_that_is_mostly_wrong_is_not_turned_round() -> None:
    targets = torch.tensor([0, 1] * 500)
    logits = 5.0 * torch.nn.functional.one_hot(1 - targets)
    scale, _ = training.fit_calibration(logits, targets, torch.tensor([0.8, 0.2]).log())
    assert scale == training.LEAST_SCALE > 0


def test_a_shift_that_would_lower_the_mean_recall_is_not_made() -> None:
    """Class 3 is far from right and gains by a shift, though no answer; class 0 would lose its own.

    Classes 0 and 2 look alike, as do 1 and 3; 0 and 1 are frequent.
    """
    rows = [[1.0, -9.0, 0.0, -9.0], [-9.0, 9.0, -9.0, 0.0], [0.0, -9.0, 4.0, -9.0]]
    rows += [[-9.0, 5.0, -9.0, 0.0]]
    logits = torch.tensor(rows).repeat_interleave(25, 0)
    targets = torch.arange(4).repeat_interleave(25)
    log_share = (torch.tensor([50, 48, 10, 5]) / 113).log()
    weights = torch.full((100,), 0.01).double()
    numbers = logits.double(), targets, weights, log_share.double()
    scale, shift = training.minimise_cross_entropy(*numbers)
    answers = (scale * logits - shift * log_share).argmax(1)
    assert [(answers[targets == label] == label).float().mean() for label in range(4)] == [
        0,
        1,
        1,
        0,
    ]
    scale, shift = training.fit_calibration(logits, targets, log_share)
    assert shift == 0 and 0 < scale < 1


@pytest.mark.parametrize("images", [50, 200])
@pytest.mark.parametrize(("classes", "ratio", "apart"), [(2, 35, 2.0), (7, 20, 1.5), (40, 15, 2.0)])
def test_where_there_is_nothing_to_mend_it_does_no_harm(
    classes: int, ratio: int, apart: float, images: int
) -> None:
    """Normal distributions, whose logits are known, seen through few images of skewed classes.

    Over forty draws the mean recall on many other images falls by less than 0.2 points.
    """
    stream = torch.Generator().manual_seed(0)

    def make(val_counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        targets = torch.repeat_interleave(torch.arange(classes), val_counts)
        points = apart * torch.eye(classes)[targets]
        points += torch.randn(points.shape, generator=stream)
        return apart * points, targets

    def recall(logits: torch.Tensor) -> float:
        confusion = training.confusion_matrix(targets, logits.argmax(1), classes)
        return training.recall_by_class(confusion).mean().item()

    share = torch.logspace(0, -math.log10(ratio), classes)
    share /= share.sum()
    whole, targets = make(torch.full((classes,), 20_000 // classes))
    before, after = recall(whole), []
    for _ in range(40):
        few = make((images * share).round().long().clamp(min=1))
        scale, shift = training.fit_calibration(*few, share.log())
        after.append(recall(scale * whole - shift * share.log()))
    assert sum(after) / 40 > before - 0.002


def test_classes_nearly_as_frequent_as_each_other_are_hardly_shifted() -> None:
    """So that the saved head keeps its digits in half precision."""
    logits, targets, _ = two_kinds()
    labels, train = torch.tensor([0] * 1000 + [1] * 1001), torch.arange(2001)
    data = training.Data([*"ab"], [], [], labels, train, train[:0], [], 0, [])
    log_share = data.log_share()
    assert log_share.sum() == 0 and abs(log_share[0]) < 0.001
    scale, shift = training.fit_calibration(logits, targets, log_share)
    assert 0 < scale < 2 and (shift * log_share).abs().max() < 0.1


def test_logits_that_overflow_or_are_no_numbers_do_not_spread(folder: Path) -> None:
    batch = [torch.tensor([[math.inf, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])]
    logits, targets = training.predict(torch.nn.Identity(), [batch], CPU)
    last = training.assess(logits, targets, torch.tensor([0.5, -0.5]), True)
    assert math.isfinite(last.loss) and last.as_trained.tolist() == [0, 1]
    with pytest.raises(training.DataError, match="no numbers"):
        training.predict(torch.nn.Identity(), [[batch[0] * math.nan, batch[1]]], CPU)


def test_classes_as_frequent_as_each_other_are_not_shifted() -> None:
    logits, targets, _ = two_kinds()
    scale, shift = training.fit_calibration(logits, targets, torch.tensor([0.5, 0.5]).log())
    assert shift == 0 and 0 < scale < 1


def test_a_class_without_validation_images_may_still_be_predicted() -> None:
    logits = torch.tensor([[1.0, 0.0, 5.0]]).repeat(8, 1)
    targets = torch.tensor([0, 1] * 4)
    last = training.assess(logits, targets, torch.tensor([0.5, 0.4, 0.1]).log(), True)
    assert last.confusion.shape == (3, 3) and last.confusion[2].sum() == 0
    assert math.isfinite(last.loss) and all(map(math.isfinite, last.calibration))


def test_a_part_of_very_many_logits_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "PRIOR", 0.0)
    scale, shift = training.fit_calibration(*two_kinds(100))
    monkeypatch.setattr(training, "MOST_FITTED", 1000)  # 500 of 5,000 images
    seen, entropy = [], torch.nn.functional.cross_entropy

    def noting(logits: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        seen.append(len(logits))
        return entropy(logits, *args, **kwargs)

    monkeypatch.setattr(training.F, "cross_entropy", noting)
    part = training.fit_calibration(*two_kinds(100))
    assert part.scale == pytest.approx(scale, abs=0.1)
    assert part.shift == pytest.approx(shift, abs=0.2)
    assert set(seen) == {500}


def test_each_class_is_halved() -> None:
    targets = torch.tensor([0] * 7 + [1] * 4 + [2])
    half = training.pick_half(targets)
    first, second = (torch.bincount(targets[part], minlength=3) for part in (half, ~half))
    assert (first - second).abs().tolist() == [1, 0, 1] and first.sum() == second.sum()
    assert torch.equal(half, training.pick_half(targets))


def test_no_image_is_judged_by_numbers_that_were_fitted_on_it() -> None:
    logits, targets, log_share = two_kinds(4)
    half = training.pick_half(targets)
    before = training.assess(logits, targets, log_share, True)
    # Other logits, too, so that every number fitted on this half is another one.
    changed = torch.where(half[:, None], logits.flip(1), logits)
    after = training.assess(changed, targets, log_share, True)
    other = training.fit_calibration(logits[~half], targets[~half], log_share)
    expected = (other.scale * changed - other.shift * log_share).softmax(1).max(1)
    torch.testing.assert_close(after.probability[half], expected[0][half])
    assert torch.equal(after.predicted[half], expected[1][half])
    assert not torch.isclose(after.probability[~half], before.probability[~half]).any()


def test_an_evaluation_is_the_same_whole_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets, log_share = two_kinds()
    whole = training.assess(logits, targets, log_share, True)
    monkeypatch.setattr(training, "BLOCK", 7)
    blocks = training.assess(logits, targets, log_share, True)
    for name, value in vars(whole).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(blocks, name), value)
    assert blocks.loss == pytest.approx(whole.loss)


def test_without_calibration_logits_are_taken_as_they_are() -> None:
    logits, targets, log_share = two_kinds()
    last = training.assess(logits, targets, log_share, False)
    assert last.calibration == (1.0, 0.0)
    assert torch.equal(last.predicted, last.as_trained) and not last.predicted.any()
    torch.testing.assert_close(last.probability, logits.softmax(1)[:, 0])


def test_as_trained_and_natural_predictions_stand_beside_the_calibrated_ones() -> None:
    logits, targets, log_share = two_kinds(100)
    last = training.assess(logits, targets, log_share, True)
    looks_like_x = logits[:, 0] == 3
    assert not last.as_trained.any()  # both kinds favour class 0
    assert torch.equal(last.predicted == 0, looks_like_x)
    # With shares of 0.8 and 0.2 the odds of class 0 are 32 : 3 and 8 : 7.
    assert not last.natural.any()
    counts = torch.tensor([800, 200])
    measures = training.measure_all(last, counts)
    assert measures["as_trained_balanced_accuracy"] == pytest.approx(0.5)
    assert measures["balanced_accuracy"] == pytest.approx(0.75)
    assert measures["natural_accuracy"] == pytest.approx(0.8)
    assert measures["calibration_error"] == pytest.approx(0, abs=0.02)
    # As trained class 0 has 0.95 for x, 0.73 for y; weighed, 55 % look like x and 40 are right.
    x, y = (1 / (1 + math.exp(-by)) for by in (3, 1))
    gaps = (0.55 * x - 0.4) + (0.45 * y - 0.1)
    assert measures["as_trained_calibration_error"] == pytest.approx(gaps, abs=1e-4)


def test_natural_accuracy_weighs_recalls_by_the_classes_of_training() -> None:
    """Whatever the skew of the validation images: recalls 3/4 and 1/2, a third class unknown."""
    last = training.assess(
        torch.zeros(6, 3), torch.tensor([0, 0, 0, 0, 1, 1]), torch.ones(3), False
    )
    last = dataclasses.replace(last, natural=torch.tensor([0, 0, 0, 1, 1, 2]))
    counts = torch.tensor([90, 10, 50])
    assert training.natural_accuracy(last, counts) == pytest.approx(0.9 * 0.75 + 0.1 * 0.5)


def test_calibration_error_is_the_gap_between_probability_and_being_right() -> None:
    """Two classes of 4 and 2: in one bin of 0.95, right 3 of 4; in one of 0.55, right 2 of 2."""
    targets = torch.tensor([0, 0, 0, 0, 1, 1])
    predicted = torch.tensor([0, 0, 0, 1, 1, 1])
    error = training.calibration_error(targets, predicted, torch.tensor([0.95] * 4 + [0.55] * 2))
    assert error == pytest.approx((0.95 - 0.75) / 2 + (1 - 0.55) / 2)


# ------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs of one epoch from random weights, each made once."""
    root = tmp_path_factory.mktemp("runs")
    folder = write_folder(root / "src", {"ape": 60, "bee": 24, "cat": 8})

    def run(*flags: str) -> Path:
        output = root / "-".join(["run", *map(str, flags)]).replace("/", "_")
        if not output.exists():
            command = [str(folder), "--weights", "none", "--epochs", "2", *TINY, *flags]
            assert training.main([*command, "--output", str(output)]) == 0
        return output

    return run


def test_what_is_saved_gives_the_calibrated_logits(runs: Callable[..., Path]) -> None:
    output = runs()
    content = torch.load(output / "last.pt", weights_only=True)
    assert content["train_images"] == [48, 19, 6]
    plain = torch.load(output / "resume.pt", weights_only=True)["model"]
    row = rows_of(output / "history.csv")[-1]
    scale, shift = float(row["logit_scale"]), float(row["logit_shift"])
    assert scale != 1 and shift != 0
    images = torch.randn(4, 3, 32, 32)
    answers = []
    for state in (plain, content["state_dict"]):
        model = models.resnet18(num_classes=3).eval()
        model.load_state_dict(state)
        with torch.no_grad():
            answers.append(model(images))
    log_share = (torch.tensor([48, 19, 6]) / 73).log()
    expected = scale * answers[0] - shift * log_share
    torch.testing.assert_close(answers[1].softmax(1), expected.softmax(1), atol=1e-5, rtol=1e-4)


def test_training_goes_on_without_calibration(runs: Callable[..., Path]) -> None:
    with_it, without = runs(), runs("--no-calibration")
    states = [
        torch.load(each / "resume.pt", weights_only=True)["model"] for each in (with_it, without)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for ours, theirs in zip(
        *(rows_of(each / "history.csv") for each in (with_it, without)), strict=True
    ):
        for name in training.MEASURES:
            assert ours[f"as_trained_{name}"] == theirs[name] == theirs[f"as_trained_{name}"]
        assert (theirs["logit_scale"], theirs["logit_shift"]) == ("1", "0")


def test_given_weights_are_judged_as_they_are(runs: Callable[..., Path]) -> None:
    """A test folder must not tune what it tests."""
    weights = runs() / "last.pt"
    output = runs("--epochs", "0", "--weights", str(weights))
    row = rows_of(output / "history.csv")[-1]
    assert (row["logit_scale"], row["logit_shift"]) == ("1", "0")
    state, given = (
        torch.load(path, weights_only=True)["state_dict"] for path in (output / "last.pt", weights)
    )
    assert all(torch.equal(state[name], given[name]) for name in given)


def test_the_summary_says_what_calibration_did(
    runs: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = json.loads((runs() / "config.json").read_text())["settings"]
    command = [settings["out"], "--weights", "none", "--epochs", "1", *TINY]
    for flags, said in (([], True), (["--no-calibration"], False)):
        assert training.main([*command, *flags, "--output", str(tmp_path / str(said))]) == 0
        out = capsys.readouterr().out
        assert ("fitted on validation images" in out) is said


def test_the_search_compares_calibrated_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "src", {"ape": 30, "bee": 12})
    given, progress = prepare(folder, "--weights", "none", *TINY)
    reader, data, model = training.Reader(given), given.data, progress.model
    targets = data.labels[data.val]
    logits = torch.tensor([[3.0, 0.0], [1.0, 0.0]])[targets]
    monkeypatch.setattr(training, "predict", lambda *_: (logits, targets))
    monkeypatch.setattr(training, "PRIOR", 1e-6)
    assert torch.equal(training.evaluate(given, model, reader, data.val).predicted, targets)
    given.args.no_calibration = True
    assert not training.evaluate(given, model, reader, data.val).predicted.any()
