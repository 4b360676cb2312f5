"""What a run says of itself: tables, lines and page agree, and the page loads nothing."""

import dataclasses
import json
import math
import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
import torch
from conftest import (
    CPU,
    TINY,
    Run,
    images,
    interrupt_after,
    network_of,
    open_run,
    refused,
    rows_of,
    run,
)
from PIL import Image
from torch import Tensor

import data_training as training


@pytest.fixture(scope="session")
def compared_run(scratch_run: Run, pretrained: Path, animals: Path) -> Run:
    """An epoch from pretrained weights, compared with the run from random ones."""
    flags = ["--weights", pretrained, "--epochs", 1, *TINY, "--baseline", scratch_run.path]
    return run(animals, *flags, "--output", animals.parent / "compared")


@pytest.fixture(params=["scratch_run", "default_run", "folds_run", "compared_run"])
def any_run(request: pytest.FixtureRequest) -> Run:
    return request.getfixturevalue(request.param)


def near(value: float) -> object:
    """As near as six digits are."""
    return pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True)


def config_of(run: Path) -> dict[str, dict[str, float]]:
    """What is in `config.json`, which has null where a number is unknown."""
    text = (run / "config.json").read_text()
    assert "NaN" not in text  # which is no JSON
    config = json.loads(text)
    config["result"] = {k: math.nan if x is None else x for k, x in config["result"].items()}
    return config


def test_tables_agree_with_each_other(any_run):
    path, result = any_run.path, config_of(any_run.path)["result"]
    predictions, classes = rows_of(path / "predictions.csv"), rows_of(path / "classes.csv")
    order = [float(row["true_probability"]) for row in predictions]
    assert order == sorted(order)  # so that labels which may be wrong come first
    asked = Counter(row["class"] for row in predictions)
    taken = Counter(row["predicted"] for row in predictions)
    taken_for = Counter((row["class"], row["predicted"]) for row in predictions)
    often = {row["class"]: int(row["train_images"]) for row in classes}
    recalls = []
    for row in classes:
        name = row["class"]
        right = taken_for[name, name]
        recalls.append(right / asked[name])
        assert int(row["val_images"]) == asked[name]
        assert int(row["families"]) == int(row["effective_images"]) == asked[name]
        assert float(row["recall"]) == near(recalls[-1])
        assert float(row["precision"]) == near(right / taken[name] if taken[name] else math.nan)
        assert 0 <= float(row["low"]) <= float(row["recall"]) <= float(row["high"]) <= 1
        # Each class as frequent as in training, whatever there is to validate on.
        called = sum(often[other] * taken_for[other, name] / asked[other] for other in often)
        in_use = often[name] * recalls[-1] / called if called else math.nan
        assert float(row["precision_in_use"]) == near(in_use)
        assert 0 <= float(row["auc"]) <= 1
    assert result["balanced_accuracy"] == near(sum(recalls) / 3)
    right = sum(taken_for[name, name] for name in often)
    assert result["accuracy"] == near(right / len(predictions))
    losses = dict.fromkeys(asked, 0.0)
    for row in predictions:
        if row["predicted"] == row["class"]:  # one value for one thing, on any machine
            assert row["true_probability"] == row["probability"]
        assert float(row["true_probability"]) <= float(row["probability"])
        losses[row["class"]] -= math.log(float(row["true_probability"])) / asked[row["class"]]
    assert result["val_loss"] == pytest.approx(sum(losses.values()) / 3, rel=1e-3)
    if path.name in ("scratch", "default"):  # the last row describes the network
        *_, last = rows_of(path / "history.csv")
        assert all(float(last[name]) == near(x) for name, x in result.items())


def test_lines_stand_under_their_header_and_say_what_the_tables_do(any_run):
    lines, history = any_run.out.splitlines(), rows_of(any_run.path / "history.csv")
    start = lines.index(training.HEADER)
    column, after = training.HEADER.index("balanced"), training.HEADER.index("as trained") + 10
    assert len(lines[start]) <= 140
    for line, row in zip(lines[start + 1 :], history, strict=False):
        ends = [f"{100 * float(row[end]):.1f}" for end in ("low", "high")]
        shown = f"{float(row['balanced_accuracy']):.1%} [{', '.join(ends)}]"
        assert len(line) == len(lines[start]) and line[column:].startswith(shown)
        trained = f"{float(row['as_trained_balanced_accuracy']):.1%}"
        assert line[:after].endswith(trained)
    result, ending = config_of(any_run.path)["result"], lines[start + 1 + len(history) :]
    ends = f"[{100 * result['low']:.1f}, {100 * result['high']:.1f}]"
    assert ending[:2] == ["", f"balanced accuracy {result['balanced_accuracy']:.1%} {ends}"]
    assert str(any_run.path) in ending[-1] and len(ending) <= 24  # one screen


def test_a_comparison_has_both_runs_and_their_difference(compared_run, scratch_run):
    rows = rows_of(compared_run.path / "comparison.csv")
    before, after = (config_of(run.path)["result"] for run in (scratch_run, compared_run))
    known = [name for name in training.MEASURES if not math.isnan(before[name])]
    assert [row["measure"] for row in rows] == [name.replace("_", " ") for name in known]
    for name, row in zip(known, rows, strict=True):
        difference, low, high = (float(row[key]) for key in ("difference", "low", "high"))
        assert float(row["before"]) == near(before[name])
        assert difference == near(after[name] - before[name]) and low <= difference <= high
        assert (row["more than the chance of these images?"] == "undecided") is (low <= 0 <= high)
        [line] = re.findall(rf"^{row['measure']} .*in .*/scratch, now.*$", compared_run.out, re.M)
        assert f"{100 * difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]" in line
    assert "Compared with the baseline" in (compared_run.path / "report.html").read_text()


@pytest.mark.parametrize("flags", [["--seed", "1"], ["--folds", "3"]])
def test_a_baseline_on_other_images_is_refused_in_one_line(
    flags, scratch_run, animals, tmp_path, capsys
):
    command = [animals, "--weights", "none", *TINY, "--output", tmp_path / "run", *flags]
    [line] = refused([*command, "--baseline", scratch_run.path], capsys, tmp_path)
    assert f"--baseline {scratch_run.path}: judged by other images, " in line


def test_figures_and_network_of_an_unfinished_run_are_of_the_same_folds(
    animals, pretrained, tmp_path
):
    command = [str(animals), "--weights", str(pretrained), "--folds", "3", "--epochs", "2", *TINY]
    output = interrupt_after(1, command, tmp_path / "run", fold=2)
    assert "Unfinished: fold 2 of 3, epoch 1" in (output / "report.html").read_text()
    parts = {row["path"]: row["part"] for row in rows_of(output / "split.csv")}
    judged = {parts[row["path"]] for row in rows_of(output / "predictions.csv")}
    assert judged == {"fold 1"} and len(network_of(output)["networks"]) == 1
    run("--resume", output)
    assert "Unfinished" not in (output / "report.html").read_text()


def row(epoch: int, **others: object) -> dict[str, object]:
    """A row of a history, with the longest numbers that there are."""
    whole = ("accuracy", "balanced_accuracy", "as_trained_balanced_accuracy", "medium", "high")
    return {
        **{"fold": 1, "epoch": epoch, "stage": "whole", "train_loss": 1.5, "val_loss": 123.456},
        **dict.fromkeys(whole, 1.0),
        **{"low": 0.555, "many": math.nan, "few": 0.5, "images_per_second": 12345.6},
        **{"seconds": 60.0, **others},
    }


@pytest.fixture(scope="module")
def settings(animals: Path) -> training.Settings:
    """Of five folds of ten epochs."""
    return open_run(animals, "--folds", 5, "--output", "new", "--baseline", "runs/plain")[0]


@pytest.mark.parametrize(
    ("epoch", "fold", "seconds", "left"),
    [
        *((6, 5, 1500.0, "1h40"), (10, 5, 1500.0, "0h00"), (1, 5, 9600.0, "24h00")),
        (10, 3, 60.0, "0h20"),  # two more folds of ten epochs
        (0, 5, 1500.0, "-"),  # the others take longer
    ],
)
def test_the_time_left_is_what_the_rest_takes_at_the_pace_of_the_epoch(
    epoch, fold, seconds, left, settings
):
    line = training.format_epoch(row(epoch, fold=fold, seconds=seconds), settings)
    assert line.split()[-1] == left and len(line) == len(training.HEADER)


HOSTILE = ["<script>alert(1)</script>", "a\x00\u202eb\ud800", "&amp;", '"><img src="http://x.y">']
NAMES = {
    "two": ["healthy", "ill"],
    "hostile": [*HOSTILE, *(f"dog {at}" for at in range(8))],
    "folds": [f"n021{at:05}-Shetland_sheepdog_{at}" for at in range(30)],
    "many": [f"kind {at}" for at in range(120)],
}


@pytest.fixture(scope="module", params=NAMES)
def invented(
    request: pytest.FixtureRequest, settings: training.Settings, tmp_path_factory
) -> training.Outcome:
    """A run of invented answers: classes of 252 to 14 images, the last but one not validated on."""
    names, folds = NAMES[request.param], 5 if request.param == "folds" else 1
    folder = tmp_path_factory.mktemp(request.param)
    stream, classes = torch.Generator().manual_seed(0), len(names)
    labels = torch.arange(classes).repeat_interleave(torch.logspace(2.4, 1.15, classes).long())
    held = torch.arange(len(labels)) % 5
    held = held if folds > 1 else torch.where(held == 0, 0, training.EVERY)
    held[(labels == classes - 2) & (held >= 0)] = training.EVERY if classes > 2 else 0
    Image.effect_noise((200, 150), 90).convert("RGB").save(folder / "noise.jpg")
    paths = [str(folder / "noise.jpg")] * len(labels)
    data = images(labels.tolist(), held.tolist(), classes=names, paths=paths)
    exam = training.make_exam(data, range(folds), 1.0)

    def answer(skill: float) -> Tensor:
        noise = torch.randn(len(exam.places), classes, generator=stream)
        return noise + skill * torch.nn.functional.one_hot(exam.targets, classes)

    before = answer(1.5).argmax(1)
    last = training.judge(answer(3.0), exam)
    settings = dataclasses.replace(settings, data=Path(request.param), output=folder, folds=folds)
    return training.Outcome(
        settings=settings,
        data=data,
        facts=training.describe_run(settings, data, CPU),
        history=[row(epoch, **last.measures) for epoch in range(11)],
        kept=["head", *["all"] * 4] if folds > 1 else ["all"],
        baseline=before,
        changes=training.compare(before, last),
        classes=training.list_classes(names, torch.full((classes,), 100), last),
        last=last,
        tested=last,
    )


def parse(page: str) -> Element:
    """A page, or a part of it, as a tree: XML, in which every tag is closed."""
    closed = re.sub("<((?:meta|img) [^>]*)>", r"<\1/>", page.removeprefix("<!DOCTYPE html>"))
    return ElementTree.fromstring(f"<all>{closed}</all>")


def cells_of(page: str) -> list[list[str]]:
    """The rows of all tables."""
    return [["".join(cell.itertext()) for cell in row] for row in parse(page).iter("tr")]


def test_the_page_closes_every_tag_and_loads_nothing(invented):
    text = training.make_page(invented).decode()
    tags = [*parse(text).iter()]
    assert not {"script", "link", "iframe", "object", "base"}.intersection(tag.tag for tag in tags)
    assert not {"\x00", "\u202e"}.intersection(text) and len(text) < 2e6
    names = ("src", "href", "srcset", "xlink:href", "action", "data", "poster")
    loaded = [tag.attrib[name] for tag in tags for name in names if name in tag.attrib]
    assert all(each.startswith("data:image/jpeg;base64,") for each in loaded)
    wrong = int((invented.last.predicted != invented.last.exam.targets).sum())
    assert len(loaded) == 2 * min(wrong, training.MISTAKES) > 2
    outside = re.sub('base64,[^"]*', "", text)
    links = re.findall(r"\S*(?:https?:|//)\S*", outside)
    assert all("http://x.y" in each for each in links)  # the name of a class, as text
    assert not re.search(r"@import|url\(|javascript:| on\w+=", outside.replace("onerror=x", ""))


def as_shown(value: object) -> str:
    """Per cent with a digit, a dash for what is unknown, all else as one line."""
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{100 * value:.1f}\u00a0%"
    return training.printable(str(value))


def test_page_and_console_say_the_same_of_every_class_and_fact(invented, capsys):
    text, last = training.make_page(invented).decode(), invented.last
    said, cells = " ".join(parse(text).itertext()), cells_of(text)
    before = training.confusion_matrix(last.exam.targets, invented.baseline, len(last.confusion))
    for row, recall in zip(invented.classes, before.diag() / before.sum(1), strict=True):
        assert [as_shown(x) for x in (*row.values(), recall.item())] in cells
    assert all([as_shown(x) for x in change.values()] in cells for change in invented.changes)
    assert all(training.printable(fact) in said for fact in invented.facts.values())
    ends = f"[{100 * last.measures['low']:.1f}, {100 * last.measures['high']:.1f}]"
    result = [f"{last.measures['balanced_accuracy']:.1%}", ends]
    trained = f"{last.measures['as_trained_balanced_accuracy']:.1%}"
    assert all(shown in said for shown in (*result, trained))
    training.print_end(invented)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24  # one screen
    assert lines[1:3] == [f"balanced accuracy {' '.join(result)}", f"as trained        {trained}"]
    assert lines[3] == f"untouched test    {' '.join(result)}"
    states = []
    if "head" in invented.kept:
        states.append("In 1 of 5 networks the head alone is kept: it is better")
    if bare := [row["class"] for row in invented.classes if not row["val_images"]]:
        states.append(f"Classes without an image to judge them by: 1, as {bare[0]}")
    assert all(state in lines and state in said for state in states)


def test_the_page_shows_the_commonest_confusions(invented):
    names, confusion = invented.data.classes, invented.last.confusion.tolist()
    [_, *rows] = cells_of(training.show_confusions(names, invented.last.confusion))
    found = [n for a, line in enumerate(confusion) for b, n in enumerate(line) if a != b]
    assert [int(count.split()[0]) for *_, count in rows] == sorted(found)[:-21:-1]
    places = {training.printable(name): at for at, name in enumerate(names)}
    for true, taken, count in rows:
        line = confusion[places[true]]
        assert count == f"{line[places[taken]]} of {sum(line)}"


def test_the_page_shows_the_surest_mistakes(invented, monkeypatch):
    """Each beside an image that the network which was wrong has learnt."""
    last, data, places = invented.last, invented.data, []
    show = training.show_image
    record = lambda *given: places.append(given[1]) or show(*given)  # noqa: E731
    monkeypatch.setattr(training, "show_image", record)
    wrong = (last.predicted != last.exam.targets).nonzero().flatten().tolist()
    order = sorted(wrong, key=lambda at: -last.probability[at].item())[: training.MISTAKES]
    figures = parse(training.show_mistakes(data, last)).iter("figure")
    pairs = zip(places[::2], places[1::2], strict=True)
    for at, figure, (shown, beside) in zip(order, figures, pairs, strict=True):
        true, taken = last.exam.targets[at], last.predicted[at]
        sure = f"taken for ({as_shown(last.probability[at].item())})"
        names = [training.printable(data.classes[label]) for label in (true, taken)]
        assert [*figure.itertext()] == ["is", names[0], sure, names[1]]
        assert shown == last.exam.places[at] and data.labels[beside] == taken
        assert beside in data.learns(int(data.held[shown]))


KNOWN = {"class": "a", "train_images": 5, "val_images": 4, "recall": 0.0, "low": 0.0, "high": 0.5}
UNKNOWN = {**KNOWN, "val_images": 0, **dict.fromkeys(("recall", "low", "high"), math.nan)}


def test_charts_show_recalls_by_training_images_and_nothing_of_what_is_unknown():
    more = {**KNOWN, "class": "b", "train_images": 9, "recall": 0.25, "before": 0.75}
    chart = training.recall_chart([{**KNOWN, "before": math.nan}, more])
    dots = re.findall(r'circle class="(\w+)".*?cx="(\S+?)%"', chart)
    assert dots == [("old", "75.00"), ("new", "25.00"), ("new", "0.00")]  # first the larger class
    unknown = training.recall_chart([UNKNOWN])
    assert "circle" not in unknown and "bar" not in unknown and "nan" not in unknown


def test_curves_go_through_their_values_a_line_for_each_fold():
    rows = [{"epoch": at, "fold": 1, "a": x, "b": 0.5} for at, x in enumerate([1.0, 2.5, 2.0])]
    rows.append({"epoch": 1, "fold": 2, "a": 1.0, "b": 0.75})
    chart = training.curve_chart(rows, "title", "a", "b")
    old = ["0,-1 0,-1 1,-2.5 2,-2", "1,-1 1,-1"]
    new = ["0,-0.5 0,-0.5 1,-0.5 2,-0.5", "1,-0.75 1,-0.75"]
    assert re.findall('class="old" points="(.*?)"', chart) == old
    assert re.findall('class="new" points="(.*?)"', chart) == new
    assert "title: from 0.5 to 2.5, epochs 0 to 2" in chart
