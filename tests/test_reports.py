"""What `data_training.py` says of a run: the epoch line, charts, mistakes, progress and help."""

import dataclasses
import email.message
import io
import math
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CPU, Terminal, rows_of
from PIL import Image
from torchvision import models

import data_training as training

BLUE, ORANGE, WHITE, BLACK = (0x2F, 0x6F, 0xB0), (0xD9, 0x82, 0x2B), (255, 255, 255), (0, 0, 0)
COLOURS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "cyan": (0, 255, 255)}


# ------------------------------------------------------------------------ measures, by hand


def test_f1_and_its_mean_by_hand() -> None:
    confusion = torch.tensor([[8, 1, 1, 0], [1, 3, 0, 0], [3, 0, 1, 0], [0, 0, 0, 0]])
    f1 = training.f1_by_class(confusion)
    # recall 0.8, 0.75, 0.25 and precision 8/12, 0.75, 0.5; nobody asked for the last
    expected = [2 / (1 / 0.8 + 12 / 8), 0.75, 2 / (4 + 2)]
    assert f1[:3].tolist() == pytest.approx(expected) and f1[3].isnan()
    result = training.measure(confusion, torch.tensor([50, 50, 50, 50]))
    assert result["macro_f1"] == pytest.approx(sum(expected) / 3)


def test_a_class_that_is_never_predicted_counts_0_in_macro_f1() -> None:
    confusion = torch.tensor([[3, 0], [2, 0]])  # precision 3/5, recall 1
    assert training.measure(confusion, torch.tensor([9, 9]))["macro_f1"] == pytest.approx(0.375)


def test_a_class_without_images_has_no_f1_though_others_are_taken_for_it() -> None:
    confusion = torch.tensor([[1, 1], [0, 0]])
    assert training.f1_by_class(confusion)[1].isnan()
    assert training.measure(confusion, torch.tensor([9, 9]))["macro_f1"] == pytest.approx(2 / 3)


def test_evaluation_knows_the_probability_of_the_true_class() -> None:
    logits, targets = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0])
    result = training.assess(logits, targets, torch.zeros(2), False)
    sure = 1 / (1 + math.exp(-2))
    assert result.probability.tolist() == pytest.approx([sure, sure])
    assert result.true_probability.tolist() == pytest.approx([sure, 1 - sure])


# --------------------------------------------------------------------------- the epoch line


def row(epoch: int, **others: object) -> dict[str, object]:
    """A row of a history."""
    return {
        **{"epoch": epoch, "phase": "full", "train_loss": 1.5, "val_loss": 123.456},
        **{"accuracy": 1.0, "balanced_accuracy": 0.9, "half_width": 0.1234, "macro_f1": 0.765},
        **{"many": math.nan, "medium": 1.0, "few": 0.5, "fewest_draws": 1234, "most_draws": 56789},
        **{"as_trained_balanced_accuracy": 0.765, "natural_accuracy": 1.0},
        **{"distinct_images": 0.57, "images_per_second": 12345.6, "seconds": 60.0, **others},
    }


@pytest.mark.parametrize("phase", ["head", "full", "given"])
def test_the_line_of_an_epoch_stands_under_its_header(phase: str) -> None:
    line = training.format_epoch(row(7, phase=phase), 100)
    assert len(line) == len(training.HEADER) <= 136
    end = training.HEADER.index("as trained") + len("as trained")
    assert line[:end].endswith(" 76.5%") and "90.0% ±12.3" in line


@pytest.mark.parametrize(
    ("epoch", "phase", "seconds", "left"),
    [
        *((6, "full", 1500.0, "1h40"), (9, "full", 29.0, "0h00"), (10, "full", 1500.0, "0h00")),
        *((1, "full", 9600.0, "24h00"), (2, "head", 1500.0, "-")),  # the full ones take longer
    ],
)
def test_the_time_left_is_what_the_rest_takes_at_the_pace_of_the_epoch(
    epoch: int, phase: str, seconds: float, left: str
) -> None:
    line = training.format_epoch(row(epoch, phase=phase, seconds=seconds), 10)
    assert line.split()[-1] == left


# -------------------------------------------------------------------------------- the charts


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 252, [0, 50, 100, 150, 200, 250]),
        (0.753, 0.861, [0.74, 0.76, 0.78, 0.8, 0.82, 0.84, 0.86]),
        (0, 0, [0]),
        (0, 3e38, [0, 5e37, 1e38, 1.5e38, 2e38, 2.5e38, 3e38]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert training.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "top"),
    [
        ([30.0, 2.5, 2.4, 2.3, 2.2, 2.1], 2.5),
        ([4.8, 3.0, 2.4, 2.0, 1.8, 1.6], 4.8),  # an ordinary start
        ([math.nan, math.inf, 1.0, 1.5], 1.5),
        ([math.nan], 1.0),
        ([0.0, 0.0], 1.0),
    ],
)
def test_the_top_of_the_losses_leaves_out_what_would_squeeze_the_rest(
    values: list[float], top: float
) -> None:
    assert training.robust_top(values) == top


def history() -> list[dict[str, object]]:
    """Two epochs of the head and three of everything; the first validation loss is huge."""
    losses = (250.0, 2.4, 2.2, 2.0, 1.8)
    phases = ("head", "head", "full", "full", "full")
    return [
        row(at + 1, phase=phase, val_loss=loss, balanced_accuracy=0.75 + at / 50, accuracy=0.82)
        for at, (phase, loss) in enumerate(zip(phases, losses, strict=True))
    ]


def test_the_curves_mark_phases_and_a_value_above_the_picture() -> None:
    losses, accuracies = training.curve_panels(history())
    assert losses.labels == ["1", "2", "3", "4", "5"]
    assert losses.phases == accuracies.phases == {"head": 0, "full": 2}
    assert losses.title == "loss by epoch (values above the picture: 1)" and losses.top == 2.4
    assert losses.levels()[0] == 0 and accuracies.title == "accuracy by epoch"
    picture = training.draw_chart([losses, accuracies]).crop((0, 0, 1600, 640))
    places = [round(130 + 1430 * (at + 0.4) / 5) for at in range(5)]
    for at, x in enumerate(places):
        value = min(2.4, (250.0, 2.4, 2.2, 2.0, 1.8)[at])
        assert picture.getpixel((x, round(440 - 360 * value / 2.4))) == BLUE
    corners = [picture.getpixel((x - 5, 75)) for x in places[:2]]
    assert corners == [WHITE, BLUE]  # of a triangle that points up, and of a square
    grey = (0x99,) * 3
    edges = [x for x in range(130, 1560) if picture.getpixel((x, 60)) == grey]
    assert {round((x - 130) / 286) for x in edges} == {0, 2}  # 286 pixels an epoch


def test_the_accuracy_axis_begins_at_a_round_number_below_the_lowest_value() -> None:
    accuracies = training.curve_panels(history())[1]
    assert accuracies.levels() == pytest.approx([0.74, 0.76, 0.78, 0.8, 0.82])
    assert accuracies.spot(0, 0.74)[1] == pytest.approx(440)
    assert accuracies.spot(0, 0.83)[1] == pytest.approx(80)


def test_a_run_that_is_always_wrong_has_curves_too() -> None:
    rows = [row(0, train_loss=math.nan, accuracy=0.0, balanced_accuracy=0.0, val_loss=math.inf)]
    losses, accuracies = training.curve_panels(rows)
    assert (accuracies.levels()[0], accuracies.top) == (0, 1) and "picture: 1" in losses.title
    training.draw_chart([losses, accuracies])


def data_of(classes: list[str], labels: torch.Tensor, train: int, **known: Any) -> training.Data:
    """Images with these labels, the first `train` of them to train on."""
    parts = torch.arange(len(labels)).tensor_split([train])
    other = {"paths": [], "names": [], "parts": [], "copies": 0, "unreadable": []} | known
    return training.Data(classes=classes, labels=labels, train=parts[0], val=parts[1], **other)


def said(targets: torch.Tensor, predicted: torch.Tensor, sure: torch.Tensor) -> training.Evaluation:
    """What a network says, of any class as sure as this."""
    classes = int(torch.cat([targets, predicted]).max()) + 1
    return training.Evaluation(
        loss=1.0,
        targets=targets,
        predicted=predicted,
        probability=sure,
        true_probability=sure,
        as_trained=predicted,
        trained_probability=sure,
        natural=predicted,
        confusion=training.confusion_matrix(targets, predicted, classes),
        calibration=training.Calibration(),
    )


def run_of(names: list[str], baseline: bool = False) -> tuple[training.Given, training.Evaluation]:
    """Classes of 1, 2, 3, ... training images and four for validation, of which two are right."""
    classes = len(names)
    train = torch.arange(classes).repeat_interleave(torch.arange(classes) + 1)
    targets = torch.arange(classes).repeat_interleave(4)
    predicted = torch.where(torch.arange(len(targets)) % 4 < 2, targets, (targets + 1) % classes)
    given = training.Given(
        args=SimpleNamespace(baseline=Path("runs/plain")),
        data=data_of(names, torch.cat([train, targets]), len(train)),
        baseline=targets if baseline else None,
        origin="",
        compute=CPU,
    )
    return given, said(targets, predicted, torch.full((len(targets),), 0.5))


def test_up_to_thirty_classes_have_a_bar_each_and_more_stand_in_ten_groups() -> None:
    names = [f"class {number}" for number in range(30)]
    recalls, images = training.class_panels(*run_of(names))
    assert recalls.labels == images.labels == names[::-1]
    assert images.series["images"] == [[30 - place] for place in range(30)]
    recalls, images = training.class_panels(*run_of(["x"] * 40))
    assert recalls.labels[:2] == ["40 to 37", "36 to 33"] and len(recalls.labels) == 10
    assert images.series["images"][:2] == [[38.5], [34.5]]
    # Four classes of which two of four are right: variance 1/12 each, of the mean 1/48.
    half = 1.959964 / 48**0.5
    assert recalls.series["recall"] == [pytest.approx([0.5, 0.5 - half, 0.5 + half])] * 10
    assert "40 classes" in recalls.title


def test_a_group_knows_nothing_of_classes_that_are_not_validated() -> None:
    confusion = torch.tensor([[4, 0, 0], [0, 0, 0], [2, 0, 2]])
    mean, low, high = training.group_recall(confusion, torch.tensor([0, 1, 2]))
    assert mean == pytest.approx(0.75) and 0 < low < mean < high <= 1
    assert all(map(math.isnan, training.group_recall(confusion, torch.tensor([1]))))


def test_each_recall_carries_the_whisker_of_its_interval() -> None:
    low, high = 0.15004, 0.84996  # Wilson, 2 of 4
    recalls, images = training.class_panels(*run_of(["ape", "bee"], baseline=True))
    assert list(recalls.series) == ["plain", "this run"]
    assert recalls.series["this run"] == [pytest.approx([0.5, low, high], abs=1e-5)] * 2
    assert recalls.series["plain"][0] == pytest.approx([1.0, 0.51011, 1.0], abs=1e-5)
    picture = training.draw_chart([recalls, images])
    x = round(130 + 1430 * 0.6 / 2)  # the second of two bars that share 0.8 of a place
    column = {y: picture.getpixel((x, y)) for y in (*range(100, 388), 400)}
    black = [y for y, colour in column.items() if colour == BLACK]
    assert black == list(range(black[0], black[-1] + 1))
    assert [black[0], black[-1]] == pytest.approx([440 - 360 * high, 440 - 360 * low], abs=1)
    assert column[400] == BLUE and picture.getpixel((x + 40, 250)) == WHITE
    assert picture.getpixel((x + 40, 270)) == BLUE


def lowest_ink(names: list[str]) -> int:
    """How far below the axis names reach, in pixels."""
    picture = training.draw_chart(training.class_panels(*run_of(names))[:1])
    pixels = picture.crop((0, 444, 1600, picture.height)).convert("L")
    return pixels.point(lambda value: 255 * (value < 128)).getbbox()[3]


def test_names_are_slanted_where_they_do_not_fit_side_by_side_and_cut_where_too_long() -> None:
    assert lowest_ink(["ape", "bee"]) < 40
    assert 100 < lowest_ink([f"Siberian_husky_{number}" for number in range(20)]) < 180
    assert lowest_ink(["W" * 255] * 3) < 190


# ------------------------------------------------------------------------------ the mistakes


def evaluation(targets: list[int], predicted: list[int], sure: list[float]) -> training.Evaluation:
    return said(torch.tensor(targets), torch.tensor(predicted), torch.tensor(sure))


def test_mistakes_are_sorted_by_confidence_and_right_answers_are_none() -> None:
    last = evaluation([0, 0, 1, 1, 1], [1, 0, 0, 1, 0], [0.6, 0.99, 0.9, 0.7, 0.6])
    assert training.find_mistakes(last) == [2, 0, 4]  # of equals the first comes first
    many = evaluation([0] * 40, [1] * 40, [number / 40 for number in range(40)])
    assert training.find_mistakes(many) == list(range(39, 15, -1))


def coloured(folder: Path, names: list[str]) -> tuple[training.Given, training.Progress]:
    """A run after its only epoch, with an image of each colour for validation."""
    folder.mkdir(exist_ok=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (60, 20), colour).save(folder / f"{name}.png")
    paths = [str(folder / f"{name}.png") for name in COLOURS]
    labels = torch.tensor([0, 1, 0, 0, 1, 1])
    given = training.Given(
        args=SimpleNamespace(output=folder, epochs=1),
        data=data_of(names, labels, 2, paths=[*paths[:2], *paths], names=[*"abcdef"]),
        baseline=None,
        origin="",
        compute=CPU,
    )
    draws = torch.zeros(2, dtype=torch.int64)
    return given, training.Progress(models.resnet18(), [row(1)], draws, shares={}, stored={})


SOME = evaluation([0, 0, 1, 1], [1, 0, 1, 0], [0.7, 0.99, 0.98, 0.8])  # red and cyan are wrong
NONE = evaluation([0, 0, 1, 1], [0, 0, 1, 1], [0.7, 0.99, 0.98, 0.8])


def test_the_sheet_shows_the_wrong_images_the_most_confident_first(tmp_path: Path) -> None:
    training.write_pictures(*coloured(tmp_path, ["ape", "bee"]), SOME)
    sheet = Image.open(tmp_path / "mistakes.png")
    tiles = [sheet.getpixel((20 + 263 * number + 122, 192)) for number in range(3)]
    assert tiles == [COLOURS["cyan"], COLOURS["red"], WHITE] and sheet.height == 400
    for number in range(2):  # its class in black, what it is taken for in orange
        left = 20 + 263 * number
        lines = [sheet.crop((left, y, left + 244, y + 30)) for y in (320, 350)]
        inks = [{colour for _, colour in line.getcolors(2**16)} for line in lines]
        assert BLACK in inks[0] and ORANGE in inks[1] and ORANGE not in inks[0]


def test_the_sheet_says_how_sure_the_network_was(tmp_path: Path) -> None:
    given, _ = coloured(tmp_path, ["ape", "bee"])
    surer = dataclasses.replace(SOME, probability=SOME.probability + 0.1)
    one, two = (training.draw_mistakes(given.data, last, [3, 0]) for last in (SOME, surer))
    different = [one.crop(box) != two.crop(box) for box in ((0, 0, 1600, 350), (0, 350, 1600, 400))]
    assert different == [False, True]


def test_of_a_name_too_long_for_its_tile_the_end_is_shown() -> None:
    font = SimpleNamespace(getlength=lambda text: 10 * len(text))
    assert training.shorten("beagle", font, 60) == "beagle"
    assert training.shorten("n02088364-beagle", font, 90) == "...beagle"
    assert training.shorten("n02088364-beagle", font, 95) == "...beagle"


def test_a_name_too_long_for_its_tile_is_cut(tmp_path: Path) -> None:
    given, _ = coloured(tmp_path, ["W" * 255, "new\nline" * 30])
    sheet = training.draw_mistakes(given.data, SOME, [3, 0])
    assert sheet.crop((264, 70, 283, 400)).getcolors() == [(19 * 330, WHITE)]
    assert sheet.crop((20, 385, 1600, 400)).getcolors() == [(1580 * 15, WHITE)]


def test_mistakes_are_drawn_after_the_last_epoch_and_only_where_there_are_any(
    tmp_path: Path,
) -> None:
    run, sheet = coloured(tmp_path, ["ape", "bee"]), tmp_path / "mistakes.png"
    run[0].args.epochs = 2
    training.write_pictures(*run, SOME)
    assert not sheet.exists() and (tmp_path / "curves.png").exists()
    run[1].history.append(row(2))
    training.write_pictures(*run, SOME)
    assert sheet.exists()
    training.write_pictures(*run, NONE)
    assert not sheet.exists()


def test_the_tables_have_precision_f1_and_the_probability_of_the_true_class(tmp_path: Path) -> None:
    last = evaluation([0, 0, 1, 1], [0, 1, 1, 1], [0.7, 0.99, 0.98, 0.8])
    last = dataclasses.replace(last, true_probability=torch.tensor([0.7, 0.01, 0.98, 0.8]))
    training.write_tables(*coloured(tmp_path, ["ape", "bee"]), last)
    rows = [
        [float(row[name]) for name in ("recall", "precision", "f1")]
        for row in rows_of(tmp_path / "classes.csv")
    ]
    assert rows == [pytest.approx([1 / 2, 1, 2 / 3], 1e-5), pytest.approx([1, 2 / 3, 0.8], 1e-5)]
    shares = [row["true_probability"] for row in rows_of(tmp_path / "predictions.csv")]
    assert shares == ["0.7", "0.01", "0.98", "0.8"]


def test_the_summary_says_what_was_kept_on_which_images_and_what_came_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, progress = coloured(tmp_path, ["ape", "bee"])
    given.args.source = given.args.val = given.args.split = None
    given.args.no_calibration = True
    progress.history[-1]["phase"] = "gentle"
    progress.shares["trial"] = {1.0: 0.5, 0.0: 0.75, 0.75: 0.4}
    training.print_summary(given, progress, SOME)
    lines = capsys.readouterr().out.splitlines()
    assert (
        "of what phase trial changed, 0% was kept and gentle came next, by balanced accuracy "
        "on 4 validation images: 50.0% at 100%, 75.0% at 0%, 40.0% at 75%"
    ) in lines
    progress.shares = {"firm": {1.0: 0.5, 0.0: 0.25, 0.75: 0.4}}
    training.print_summary(given, progress, SOME)
    assert "of what phase firm changed, 100% was kept, by" in capsys.readouterr().out


# ------------------------------------------------------------------------------ the progress


@pytest.mark.parametrize(
    ("screen", "rank", "shown"),
    [(Terminal, 0, True), (Terminal, 1, False), (io.StringIO, 0, False)],
)
def test_only_a_terminal_shows_bars_and_only_those_of_the_first_process(
    screen: type, rank: int, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", screen())
    shown_by = training.show_progress([[], []], "training, head", CPU._replace(rank=rank))
    assert len(list(shown_by)) == 2
    assert ("training, head: " in sys.stderr.getvalue()) is shown


@pytest.mark.parametrize(("screen", "shown"), [(Terminal, True), (io.StringIO, False)])
def test_the_check_of_the_images_shows_a_bar_in_a_terminal_and_names_the_broken_anywhere(
    screen: type, shown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", screen())
    (tmp_path / "a.jpg").write_text("no image")
    assert training.check_images([str(tmp_path / "a.jpg")]) == {}
    assert ("checking: " in sys.stderr.getvalue()) is shown
    assert "a.jpg: not an image; left out\n" in sys.stderr.getvalue()


@pytest.mark.parametrize(("screen", "shown"), [(Terminal, True), (io.StringIO, False)])
def test_a_download_shows_a_bar_in_a_terminal_alone(
    screen: type, shown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reply(io.BytesIO):
        def info(self) -> email.message.Message:
            return email.message.Message()

    monkeypatch.setattr("torch.hub.urlopen", lambda *_, **__: Reply(b"not the weights"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stderr", screen())
    with pytest.raises(training.DataError, match="could not be fetched"):
        training.load_weights(training.parse_args(["x", "--arch", "resnet18"]))
    assert ("15.0" in sys.stderr.getvalue()) is shown  # bytes


@pytest.mark.parametrize("content", [b"", b"<html>no weights</html>"])
def test_weights_in_the_cache_that_cannot_be_read_are_told_with_their_place(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth").write_bytes(content)
    with pytest.raises(training.DataError, match="IMAGENET1K_V1.*or read.*checkpoints"):
        training.load_weights(training.parse_args(["x", "--arch", "resnet18"]))


# ---------------------------------------------------------------------------------- the help


def test_the_help_shows_no_empty_defaults_and_ends_with_commands_that_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        training.parse_args(["--help"])
    text, _, examples = capsys.readouterr().out.partition("\nexamples:\n")
    assert "DATA  " in text and "OUT" not in text
    assert "default: False" not in text and "default: None" not in text
    assert "none with --weights none (default: auto)" in " ".join(text.split())
    assert len(examples.splitlines()) == 3
    for line in examples.splitlines():
        python, script, *arguments = shlex.split(line)
        assert (python, script) == ("python", "data_training.py")
        args = training.parse_args(arguments)
        assert (args.no_flip, args.resume, args.source) == (False, False, None)
