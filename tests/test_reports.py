"""What a run says of itself: tables, lines and page agree, and the page loads nothing."""

import contextlib
import dataclasses
import html
import json
import math
import re
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from conftest import (
    CPU,
    NOTHING,
    TINY,
    Run,
    Trigger,
    images,
    interrupt_after,
    load,
    network_of,
    prepare,
    refused,
    resolve,
    rows_of,
    run,
)
from PIL import Image
from torch import Tensor

import data_training as training


@pytest.fixture(scope="session")
def compared_run(scratch_run: Run, default_run: Run, animals: Path) -> Run:
    """The default run's network as it is, compared with the run from random weights."""
    flags = ["--weights", default_run.path / "network.pt", "--epochs", 0, *TINY]
    output = animals.parent / "compared"
    return run(animals, *flags, "--baseline", scratch_run.path, "--output", output)


@pytest.fixture(params=["scratch_run", "default_run", "folds_run", "compared_run"])
def any_run(request: pytest.FixtureRequest) -> Run:
    return request.getfixturevalue(request.param)


def near(value: float) -> object:
    """As near as six digits are."""
    return pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True)


def result_of(run: Run) -> dict[str, float]:
    """The measures that `config.json` names."""
    result = json.loads((run.path / "config.json").read_text())["result"]
    return {name: math.nan if x is None else x for name, x in result.items()}


def test_tables_agree_with_each_other(any_run):
    path, result = any_run.path, result_of(any_run)
    predictions, classes = rows_of(path / "predictions.csv"), rows_of(path / "classes.csv")
    assert "NaN" not in (path / "config.json").read_text()  # which is no JSON
    order = [float(row["true_probability"]) for row in predictions]
    assert order == sorted(order)  # so that labels which may be wrong come first
    right = Counter(row["class"] for row in predictions if row["class"] == row["predicted"])
    asked = Counter(row["class"] for row in predictions)
    taken = Counter(row["predicted"] for row in predictions)
    taken_for = Counter((row["class"], row["predicted"]) for row in predictions)
    recalls = []
    for row in classes:
        name = row["class"]
        assert int(row["val_images"]) == asked[name]
        recalls.append(right[name] / asked[name])
        assert float(row["recall"]) == near(recalls[-1])
        precision = right[name] / taken[name] if taken[name] else math.nan
        assert float(row["precision"]) == near(precision)
        assert float(row["f1"]) == near(2 * right[name] / (asked[name] + taken[name]))
        assert 0 <= float(row["low"]) <= float(row["recall"]) <= float(row["high"]) <= 1
        # Each class as frequent as in training, whatever there is to validate on.
        often = {other["class"]: int(other["train_images"]) for other in classes}
        called = sum(often[other] * taken_for[other, name] / asked[other] for other in often)
        ours = often[name] * recalls[-1]
        assert float(row["precision_in_use"]) == near(ours / called if called else math.nan)
        assert int(row["families"]) == int(row["effective_images"]) == asked[name]
        assert 0 <= float(row["auc"]) <= 1
        twice = float(row["high_if_twice"]) - float(row["low_if_twice"])
        assert twice < float(row["high"]) - float(row["low"])
    assert result["balanced_accuracy"] == near(sum(recalls) / 3)
    assert result["accuracy"] == near(right.total() / len(predictions))
    assert result["macro_f1"] == near(sum(float(row["f1"]) for row in classes) / 3)
    losses = {name: 0.0 for name in asked}
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
    lines, table = any_run.out.splitlines(), any_run.path / "history.csv"
    history = rows_of(table) if table.exists() else []
    start = lines.index(training.HEADER)
    assert len(lines[start]) <= 140
    column = training.HEADER.index("balanced")
    for line, row in zip(lines[start + 1 :], history, strict=False):
        assert len(line) == len(lines[start])
        ends = [f"{100 * float(row[end]):.1f}" for end in ("low", "high")]
        shown = f"{float(row['balanced_accuracy']):.1%} [{', '.join(ends)}]"
        assert line[column:].startswith(shown)
        trained = f"{float(row['as_trained_balanced_accuracy']):.1%}"
        assert line[: training.HEADER.index("as trained") + 10].endswith(trained)
    result, ending = result_of(any_run), lines[start + 1 + len(history) :]
    assert ending[0] == "" and len(ending) <= 24  # one screen
    ends = f"[{100 * result['low']:.1f}, {100 * result['high']:.1f}]"
    assert ending[1].startswith(f"balanced accuracy {result['balanced_accuracy']:.1%} {ends}")
    assert ending[-1] == f"everything else is in {any_run.path / 'report.html'}"
    worst = sorted(rows_of(any_run.path / "classes.csv"), key=lambda row: float(row["recall"]))
    lowest = ending[ending.index("lowest recall:") + 1 :]
    for row, line in zip(worst, lowest[:3], strict=True):
        assert line.startswith(f"{float(row['recall']):8.1%} of {int(row['val_images']):4}  ")


def test_a_comparison_has_both_runs_and_their_difference(compared_run, scratch_run):
    rows = rows_of(compared_run.path / "comparison.csv")
    before, after = result_of(scratch_run), result_of(compared_run)
    assert [row["measure"] for row in rows] == [*training.MEASURES]
    for row in rows:
        name = row["measure"]
        assert float(row["before"]) == near(before[name])
        assert float(row["after"]) == near(after[name])
        start = rf"{name.replace('_', ' ')} +\S+ in \S+/scratch, "
        lines = [line for line in compared_run.out.splitlines() if re.match(start, line)]
        if math.isnan(before[name]):
            assert lines == []
            continue
        difference, low, high = (float(row[key]) for key in ("difference", "low", "high"))
        assert difference == near(after[name] - before[name]) and low <= difference <= high
        [line] = lines
        assert line.endswith("undecided" if low <= 0 <= high else "yes")
        assert f"{100 * difference:+.1f} points, {100 * low:+.1f} to {100 * high:+.1f};" in line
    page = (compared_run.path / "report.html").read_text()
    assert "Compared with scratch" in page and "before: scratch" in page


BASELINES: dict[str, Callable[[list[str]], list[str]]] = {  # what is said of rows that changed
    "0 only there and 2 only here": lambda rows: rows[:-2],
    "1 only there and 0 only here": lambda rows: [*rows, "cat/new.jpg,cat,ape,0.5,0.5"],
    "not of these classes: 'eel'": lambda rows: [*rows[:-1], "cat/cat_000.jpg,cat,eel,0.5,0.5"],
    "predictions.csv: no rows with these columns": lambda rows: ["no", "table"],
}


@pytest.mark.parametrize("expected", BASELINES)
def test_a_baseline_on_other_images_is_refused_in_one_line(
    expected, scratch_run, animals, tmp_path, capsys
):
    lines = (scratch_run.path / "predictions.csv").read_text().splitlines()
    (tmp_path / "predictions.csv").write_text("\n".join(BASELINES[expected](lines)))
    shutil.copy(scratch_run.path / "split.csv", tmp_path)
    command = [animals, "--weights", "none", *TINY, "--output", tmp_path / "run"]
    [line] = refused([*command, "--baseline", tmp_path], capsys, tmp_path)
    assert expected in line


def test_a_baseline_knows_images_whatever_their_names(scratch_run, animals, tmp_path, capsys):
    """Those it was judged by, renamed, are the same; others by their names are not."""
    said = rows_of(scratch_run.path / "predictions.csv")
    for number, row in enumerate(said):
        for folder, name in (("same", f"{row['class']}/{number}.jpg"), ("other", row["path"])):
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(animals / row["path"], tmp_path / folder / name)
        with open(tmp_path / "other" / row["path"], "ab") as file:
            file.write(b" ")
    train = shutil.copytree(animals, tmp_path / "train")
    for row in said:
        (train / row["path"]).unlink()
    data = load(train, "--val", str(tmp_path / "same"))
    before = training.load_baseline(scratch_run.path, data).tolist()
    numbers = [int(Path(data.names[index]).stem) for index in data.judged()]
    assert [data.classes[label] for label in before] == [said[n]["predicted"] for n in numbers]
    command = [train, "--val", tmp_path / "other", "--weights", "none", *TINY]
    command += ["--output", tmp_path / "run", "--baseline", scratch_run.path]
    [line] = refused(command, capsys, tmp_path)
    assert f"on other images: {len(said)} only there and {len(said)} only here, " in line


def remove_images(output: Path) -> None:
    """Those that judge the network, which the page shows where it is wrong."""
    for row in rows_of(output / "split.csv"):
        if row["part"] == "val":
            (output.parent / "animals" / row["path"]).unlink()


@pytest.mark.parametrize(
    "harm",
    [lambda path: (path / "report.html").unlink() or (path / "report.html").mkdir(), remove_images],
)
def test_reports_that_cannot_be_written_are_a_warning_and_the_run_goes_on(
    harm, animals, tmp_path, capsys, monkeypatch
):
    """`write_reports` says that it did not succeed."""
    write, done = training.write_reports, []
    record = lambda *all: done.append(write(*all)) or done[-1]  # noqa: E731
    monkeypatch.setattr(training, "write_reports", record)
    folder, output = shutil.copytree(animals, tmp_path / "animals"), tmp_path / "run"
    command = [str(folder), "--weights", "none", "--epochs", "2", *TINY, "--output", str(output)]
    printed = Trigger("   2/2 ", lambda: harm(output))
    with contextlib.redirect_stdout(printed):
        assert training.main(command) == 0
    [*_, line, advice] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "not all reports could be written" in line
    assert advice == f"warning: mend that, then --resume {output} writes all reports"
    assert "report.html'" in line or ".jpg: no regular file" in line
    there = {path.name for path in output.iterdir()}  # to go on from, too
    assert there >= {"network.pt", "resume.pt"} and not list(output.glob(".*"))
    assert [row["epoch"] for row in rows_of(output / "history.csv")] == ["1", "2"]
    assert len(rows_of(output / "predictions.csv")) == 7
    assert len(rows_of(output / "classes.csv")) == 3
    assert printed.getvalue().rstrip().endswith("report.html") and done[-1] is False


def test_a_bug_in_a_report_is_a_traceback(default_run, animals, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "make_page", lambda *_: {}["a bug"])
    judge = [animals, "--weights", default_run.path, "--epochs", 0, "--device", "cpu"]
    with pytest.raises(KeyError, match="a bug"):
        training.main([*map(str, judge), "--output", str(tmp_path / "run")])


def test_who_knows_a_recall_from_few_images_is_told_so(any_run):
    notes = [line for line in any_run.out.splitlines() if line.startswith("note: the recall")]
    if any_run.path.name in ("folds", "compared"):
        assert notes == []
        return
    expected = "cat is known from 1 image alone [0%, 100%]; --folds 5 would tell it from all"
    assert len(notes) == 1 and expected in notes[0]


@pytest.mark.parametrize(
    ("classes", "flags", "families", "advised"),
    [
        ([6, 5], "", {}, True),
        ([6, 5], "", {8: 7}, False),  # a copy: 4 different images, which 5 folds cannot share
        ([30, 5], "--source y", {}, False),  # whose images may tell more than five folds would
        ([6, 8], "", {at: at // 2 for at in range(6, 14)}, False),  # 8 frames of four films
        ([12, 12], "", {at: at // 2 for at in range(24)}, True),
    ],
)
def test_folds_are_advised_where_they_fit_and_tell_more(classes, flags, families, advised, capsys):
    labels = [label for label, count in enumerate(classes) for _ in range(count)]
    held = [0 if at in (0, len(labels) - 1) else -1 for at in range(len(labels))]
    kin = torch.tensor([families.get(at, at) for at in range(len(labels))])
    data = images(labels, held, families=kin)
    given = SimpleNamespace(data=data, settings=resolve(""), recorded={})
    judged = training.judge(given, {0: torch.zeros(2, 2)})
    given.settings = dataclasses.replace(given.settings, source=flags or None)
    training.print_advice(given, training.list_classes(data, torch.zeros(2), judged))
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("note: the recall of ") and " is known from 1 image alone" in line
    assert ("--folds 5 would tell it from all of its images in DATA" in line) is advised


def test_classes_that_no_image_judges_or_tests_are_named(animals, tmp_path):
    (tmp_path / "val/ape").mkdir(parents=True)
    shutil.copy(animals / "ape/ape_000.jpg", tmp_path / "val/ape/x.jpg")
    (tmp_path / "val/ape/x.jpg").open("ab").write(b" ")  # another file, of the same pixels
    flags = ["--val", tmp_path / "val", "--weights", "none", "--epochs", 1, *TINY]
    bare = "2 of 3 classes: no image of bee, cat"
    done = run(animals, *flags, "--output", tmp_path / "run")
    assert f"\nwarning: not judged: {bare}\n" in done.out
    assert "--folds 5" not in done.out  # which would not judge that folder
    assert f"Not judged: {bare}." in (done.path / "report.html").read_text()
    done = run(animals, *flags, "--folds", 3, "--output", tmp_path / "folds")
    assert f"\nwarning: not tested: {bare}\n" in done.out and "not judged" not in done.out
    assert f"Not tested: {bare}." in (done.path / "report.html").read_text()


def facts_of(run: Path) -> dict[str, str]:
    return json.loads((run / "config.json").read_text())["facts"]


def test_an_unfinished_run_says_so(animals, pretrained, tmp_path):
    command = [str(animals), "--weights", str(pretrained), "--folds", "3", "--epochs", "2", *TINY]
    output = interrupt_after(1, command, tmp_path / "run")
    page, place = (output / "report.html").read_text(), "fold 1 of 3, epoch 1 of 2"
    assert f"<b>Unfinished: {place}.</b>" in page and facts_of(output)["unfinished"] == place
    assert "each by the one of 3 networks (1 so far) that has not seen it" in page
    run("--resume", output)
    facts, page = facts_of(output), (output / "report.html").read_text()
    assert "unfinished" not in facts and "Unfinished" not in page and "so far" not in page


def test_figures_and_network_of_an_unfinished_run_are_of_the_same_folds(
    animals, pretrained, tmp_path
):
    command = [str(animals), "--weights", str(pretrained), "--folds", "3", "--epochs", "2", *TINY]
    output = interrupt_after(1, command, tmp_path / "run", fold=" 2/3  ")
    assert facts_of(output)["unfinished"] == "fold 2 of 3, epoch 1 of 2"
    parts = {row["path"]: row["part"] for row in rows_of(output / "split.csv")}
    judged = {parts[row["path"]] for row in rows_of(output / "predictions.csv")}
    assert judged == {"fold 1"} and len(network_of(output)["networks"]) == 1


@pytest.mark.parametrize(("kind", "calibrated"), [("default_run", True), ("folds_run", False)])
def test_the_page_tells_of_calibration_only_where_there_is_one(kind, calibrated, request):
    page = (request.getfixturevalue(kind).path / "report.html").read_text()
    page = page.replace("--no-calibration", "")
    assert ("before calibration" in page) is ("calibrat" in page) is calibrated


def test_a_network_that_is_only_judged_keeps_what_it_knew(folds_run, others, tmp_path):
    """How frequent classes were in its training, and that three vote; nothing was trained."""
    judge = ["--weights", folds_run.path, "--epochs", 0, *TINY]
    judged = run(others, *judge, "--output", tmp_path / "run")
    facts, before = facts_of(judged.path), network_of(folds_run.path)
    for name in ("natural", "train_images", "least_side", "folds"):
        assert str(network_of(judged.path)[name]) == str(before[name])
    assert facts["network"].startswith("3 resnet18 that vote, as in ")
    assert facts["images"].startswith("38 training images in 3 classes of 20 to 6")
    assert not facts.keys() & {"training", "draws", "calibration"}
    assert "Training</h2>" not in (judged.path / "report.html").read_text()
    for row in rows_of(judged.path / "classes.csv"):
        assert int(row["train_images"]) == {"ape": 20, "bee": 12, "cat": 6}[row["class"]]


def test_a_network_that_is_only_judged_sees_images_as_in_its_training(
    default_run, others, tmp_path
):
    torch.save(network_of(default_run.path) | {"least_side": 99}, tmp_path / "network.pt")
    flags = ["--weights", str(tmp_path / "network.pt"), "--epochs", "0"]
    given, _ = prepare(others, *flags, "--output", str(tmp_path / "run"))
    assert training.Reader(given).loader.dataset.least == 99


def test_weights_that_say_not_what_they_have_learnt_are_judged_by_all_images(
    default_run, others, tmp_path
):
    torch.save(network_of(default_run.path)["networks"][0], tmp_path / "state.pt")
    flags = ["--weights", tmp_path / "state.pt", "--epochs", 0, *TINY]
    done = run(others, "--val", others, *flags, "--output", tmp_path / "run")
    every = {path.relative_to(others).as_posix() for path in others.glob("*/*")}
    assert {row["path"] for row in rows_of(done.path / "predictions.csv")} == every
    assert facts_of(done.path)["images"].endswith("what was learnt is not recorded")
    assert "train_images" not in network_of(done.path)


def command_of(page: str) -> list[str]:
    return shlex.split(html.unescape(re.findall("<pre>(.*?)</pre>", page, re.DOTALL)[0]))


def test_the_command_on_the_page_makes_the_run_again(default_run, two):
    words = command_of((default_run.path / "report.html").read_text())
    assert words[:2] == ["python", "data_training.py"]
    again = vars(training.parse_args(words[2:]))
    assert "--output" not in words
    assert (str(again["weights"]), again["epochs"], again["image_size"]) == (words[4], 2, 32)
    given, compute = two.given, CPU._replace(world_size=2)
    for output in ("--output run", "--outp 'a b'", "--o=run"):
        command = f"python data_training.py '--group=--o' x {output} --seed 1"
        settings = dataclasses.replace(given.settings, command=command)
        given = dataclasses.replace(given, settings=settings, compute=compute)
        expected = ["torchrun", "--nproc-per-node=2", "data_training.py", "--group=--o", "x"]
        assert command_of(training.show_command(given)) == [*expected, "--seed", "1"]


@pytest.mark.parametrize(
    ("stages", "flags", "name", "fact"),
    [
        ("head whole", "", "training", ": the last layer alone (SGD) and then all layers (A"),
        ("head back", "", "training", "next one's rate) and then back to the last layer alone, "),
        ("whole", "--weights none", "training", "batches of 4, seed 0: all layers (AdamW, 0.001)"),
        ("whole", "--weights none", "network", "resnet18, trained from random weights"),
        ("whole", "", "network", "resnet18, fine-tuned from IMAGENET1K_V1"),
        ("head", "", "draws", "WeightedRandomSampler, weights 1 / (images of the class) ** 1; an"),
        ("head whole", "", "draws", "for the last layer alone as often as it takes for 100 steps"),
        ("head", "--rebalance none", "draws", "each image once an epoch, for the last layer alone"),
        ("head trial upper", "", "training", "and then from the last layer on, the upper half"),
        ("head trial upper", "", "training", " at 0.7 of the next one's rate), whose loss on the"),
        ("head whole", "", "training", "then all layers (AdamW, 0.0003 at the top, each stage of"),
        ("given", "--epochs 0", "network", "resnet18, as in IMAGENET1K_V1, nothing trained"),
    ],
)  # fmt: skip
def test_facts_say_how_the_network_was_trained(stages, flags, name, fact, two):
    settings = resolve(f"--epochs 3 --batch-size 4 {flags}")
    given = dataclasses.replace(two.given, settings=settings)
    history = [{"fold": 1, "phase": stage, "val_loss": 1.0} for stage in stages.split()]
    done = SimpleNamespace(history=history, finished=[], model=None)
    facts = training.list_facts(given, done, training.Result(two.last, done=True))
    assert fact in facts[name]


def test_a_vote_that_no_image_can_test_says_so(two):
    settings = resolve(f"--folds 3 --val {Path(__file__).parent}")
    for test, said in ([], "none: "), ([training.TEST], "all together by 1 images of "):
        data = images([0, 1] * 3 + [0] * len(test), [0, 1, 2] * 2 + test, folds=3)
        given = dataclasses.replace(two.given, settings=settings, data=data)
        facts = training.list_facts(given, SimpleNamespace(history=[], finished=[], model=None))
        assert facts["test"].startswith(said)


def row(epoch: int, **others: object) -> dict[str, object]:
    """A row of a history, with the longest numbers that there are."""
    names = ("accuracy", "balanced_accuracy", "as_trained_balanced_accuracy", "medium", "high")
    return {
        **{"fold": 1, "epoch": epoch, "phase": "whole", "train_loss": 1.5, "val_loss": 123.456},
        **dict.fromkeys(names, 1.0),
        **{"low": 0.555, "many": math.nan, "few": 0.5, "images_per_second": 12345.6},
        **{"seconds": 60.0, **others},
    }


@pytest.mark.parametrize(
    ("epoch", "fold", "phase", "seconds", "left"),
    [
        *((6, 5, "whole", 1500.0, "1h40"), (9, 5, "whole", 29.0, "0h00")),
        *((10, 5, "whole", 1500.0, "0h00"), (1, 5, "whole", 9600.0, "24h00")),
        (10, 3, "whole", 60.0, "0h20"),  # two more folds of ten epochs
        (2, 5, "head", 1500.0, "-"),  # the others take longer
    ],
)
def test_the_time_left_is_what_the_rest_takes_at_the_pace_of_the_epoch(
    epoch, fold, phase, seconds, left
):
    args = SimpleNamespace(epochs=10, folds=5)
    others = {"fold": fold, "phase": phase, "seconds": seconds}
    line = training.format_epoch(row(epoch, **others), args)
    assert line.split()[-1] == left and len(line) == len(training.HEADER)


HOSTILE = ["<script>alert(1)</script>", "a\x00\u202eb\ud800", "&amp;", '"><img src="http://x.y">']
NAMES = {
    "two": ["healthy", "ill"],
    "hostile": [*HOSTILE, *(f"dog {at}" for at in range(8))],
    "folds": [f"n021{at:05}-Shetland_sheepdog_{at}" for at in range(30)],
    "many": [f"kind {at}" for at in range(120)],
}


def invent(case: str, folder: Path) -> Run:
    """A run of invented answers: classes of 252 to 14 images, the last but one not validated on."""
    names, folds = NAMES[case], 5 if case == "folds" else 1
    stream, classes = torch.Generator().manual_seed(0), len(names)
    counts = torch.logspace(2.4, 1.15, classes).long()
    labels = torch.arange(classes).repeat_interleave(counts)
    held = torch.arange(len(labels)) % 5
    held = held if folds > 1 else torch.where(held == 0, 0, training.EVERY)
    held[(labels == classes - 2) & (held >= 0)] = training.EVERY if classes > 2 else 0
    Image.effect_noise((200, 150), 90).convert("RGB").save(folder / "noise.jpg")
    paths = [str(folder / "noise.jpg")] * len(labels)
    data = images(labels.tolist(), held.tolist(), folds, classes=names, paths=paths)
    places = data.judged()
    flags = f"--batch-size 16 --baseline runs/plain{' --folds 5' * (folds > 1)}"
    settings = dataclasses.replace(resolve(flags), data=Path(case), output=folder)

    def answer(skill: float) -> Tensor:
        noise = torch.randn(len(places), classes, generator=stream)
        return noise + skill * torch.nn.functional.one_hot(labels[places], classes)

    before = answer(1.5).argmax(1) if case in ("hostile", "many") else None
    given = training.Given(settings, data, NOTHING, before, origin="", compute=CPU)
    cut = [len(data.judges(fold)) for fold in range(folds)]
    last = training.judge(given, dict(enumerate(answer(3.0).split(cut))))
    losses = [math.nan, *(3 / epoch for epoch in range(1, 11))]
    history = [row(epoch, **last.measures) | {"fold": fold + 1, "train_loss": loss, "val_loss": 1.0}
               for fold in range(folds) for epoch, loss in enumerate(losses)]  # fmt: skip
    draws = torch.full((classes,), 100)
    progress = SimpleNamespace(history=history, draws=draws, finished=[], model=None)
    files = training.make_page(given, progress, training.Result(last, last, done=True))
    rows = training.list_classes(data, draws, last)
    old = None
    if before is not None:
        was = training.confusion_matrix(last.targets, before, classes)
        old = training.recall_by_class(was).tolist()
    return SimpleNamespace(
        given=given, progress=progress, last=last, files=files, classes=rows, before=old
    )


@pytest.fixture(scope="module", params=NAMES)
def invented(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> object:
    return invent(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return invent("two", tmp_path_factory.mktemp("alone"))


class Parsed(HTMLParser):
    """The tags that are open, all text, and all that an attribute could load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.said: list[str] = []
        self.tags: set[str] = set()
        self.loaded: list[str | None] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        names = ("src", "href", "srcset", "xlink:href", "action", "data", "poster")
        self.loaded += [value for name, value in attrs if name in names]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.said.append(data)


def test_the_page_closes_every_tag_and_loads_nothing(invented):
    text = invented.files["report.html"]
    parsed = Parsed(text)
    assert not {"\x00", "\u202e"}.intersection(text)
    assert parsed.open == [] and not parsed.tags & {"script", "link", "iframe", "object", "base"}
    assert all(str(each).startswith("data:image/jpeg;base64,") for each in parsed.loaded)
    predicted = invented.last.calibrated.predicted
    wrong = int((predicted != invented.last.targets).sum())
    assert len(parsed.loaded) == 2 * min(wrong, training.MISTAKES) > 2
    outside = re.sub(r'base64,[^"]*|xmlns="http://www.w3.org/2000/svg"', "", text)
    known = re.findall(r"\S*(?:https?:|//)\S*", outside)
    assert all("http://x.y" in each for each in known)  # the name of a class, as text
    assert not re.search(r"@import|url\(|javascript:", outside)
    assert len(text.encode()) < 2e6


def as_shown(value: object) -> str:
    """Per cent with a digit, a dash for what is unknown, all else as one line."""
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{100 * value:.1f}\u00a0%"
    return training.printable(str(value))


def cells_of(text: str) -> list[list[str]]:
    """The rows of all tables in the text."""
    rows = re.findall(r"<tr><th>(.*?)</th>((?:<td>.*?</td>)*)</tr>", text, re.DOTALL)
    return [Parsed(f"<p>{name}</p>{cells}").said for name, cells in rows]


def test_the_page_names_every_class_with_its_numbers(invented):
    text, given, last = invented.files["report.html"], invented.given, invented.last
    columns = len(invented.classes[0])
    known = [row for row in cells_of(text) if len(row) == columns]
    for row in invented.classes:
        assert [as_shown(x) for x in row.values()] in known
    said = " ".join(Parsed(text).said)
    for name in ("balanced_accuracy", "as_trained_balanced_accuracy"):
        assert f"{100 * last.measures[name]:.1f}\u00a0%" in said
    facts = training.list_facts(given, invented.progress, training.Result(last, last, done=True))
    assert facts.keys() >= {"network", "images", "judged by", "training", "draws", "calibration"}
    assert all(training.printable(fact) in said for fact in facts.values())
    rarest = min(invented.classes, key=lambda row: row["train_images"])
    ends = [f"{100 * rarest[name]:.0f}" for name in ("low_if_twice", "high_if_twice")]
    assert f"with twice as many independent images [{', '.join(ends)}]" in said
    changes = training.show_changes(training.list_changes(given, last))
    assert bool(changes) is bool(invented.before)
    for change in changes:
        assert change["points"] in said and change["95 % interval"] in said
        low, high = map(float, change["95 % interval"].split(" to "))
        assert change["more than chance?"] == ("yes" if low * high > 0 else "undecided")


def test_confusions_are_a_matrix_or_the_commonest_of_many(invented):
    confusion = invented.last.calibrated.confusion.tolist()
    [_, *rows] = cells_of(training.show_confusions(invented.given.data, invented.last))
    if len(confusion) <= training.MOST_CLASSES:  # in the order of their training images
        matrix = [[str(n) for n in line if n] for line in confusion]
        assert [cells[1:] for cells in rows] == matrix
        return
    found = [n for a, line in enumerate(confusion) for b, n in enumerate(line) if a != b]
    assert [int(count.split()[0]) for _, count in rows] == sorted(found)[:-21:-1]
    for pair, count in rows:
        a, b = (NAMES["many"].index(name) for name in pair.split(" taken for "))
        assert count == f"{confusion[a][b]} of {sum(confusion[a])}"


def test_charts_are_files_of_their_own_that_say_the_same(invented):
    classes, before, chart = invented.classes, invented.before, invented.files["recall.svg"]
    for name in ("recall.svg", "curves.svg"):
        assert ElementTree.fromstring(invented.files[name]).tag.endswith("svg")
        assert invented.files[name] in invented.files["report.html"]
        assert "nan" not in invented.files[name]
    assert chart.count(" images</text>") == len(classes)
    # From the most training images to the fewest, before above now.
    order = sorted(range(len(classes)), key=lambda label: -classes[label]["train_images"])
    places = [chart.index(f">{training.show(classes[label]['class'])}<") for label in order]
    assert places == sorted(places)
    dots = []
    for label in order:
        dots += [f'"old" cx="{before[label]:.2%}"'] if before else []
        dots += [f'"new" cx="{classes[label]["recall"]:.2%}"']
    shown = re.findall(r'("\w+" cx="\S+") cy="\S+" r="5.5"', chart)
    assert shown == [dot for dot in dots if "nan" not in dot]


def test_the_page_shows_the_surest_mistakes(invented, monkeypatch):
    """Each beside an image that the network which was wrong has learnt."""
    last, data, places = invented.last, invented.given.data, []
    show = training.show_image
    record = lambda *given: places.append(given[1]) or show(*given)  # noqa: E731
    monkeypatch.setattr(training, "show_image", record)
    predicted, probability, _ = last.calibrated
    wrong = (predicted != last.targets).nonzero().flatten().tolist()
    order = sorted(wrong, key=lambda row: -probability[row].item())[: training.MISTAKES]
    text = training.show_mistakes(invented.given, last)
    figures = re.findall("<figure>(.*?)</figure>", text, re.DOTALL)
    pairs = zip(places[::2], places[1::2], strict=True)
    for row, figure, shown in zip(order, figures, pairs, strict=True):
        true, taken = (data.classes[labels[row]] for labels in (last.targets, predicted))
        sure = f"taken for ({as_shown(probability[row].item())})"
        said = [text for text in Parsed(figure).said if text]
        assert said == ["is", training.printable(true), sure, training.printable(taken)]
        assert shown[0] == last.places[row] and data.labels[shown[1]] == predicted[row]
        assert shown[1] in data.learns(int(data.held[shown[0]]))


def test_the_end_of_any_run_fits_one_screen(invented, capsys):
    given, progress, last = invented.given, invented.progress, invented.last
    training.print_end(given, progress, training.Result(last, last, done=True))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and any(line.startswith("untouched test") for line in lines)
    first = lines.index("lowest recall:") + 1
    recalls = [row["recall"] for row in invented.classes if not math.isnan(row["recall"])]
    shown = [line.split()[0] for line in lines[first : first + 3]]
    assert shown[: len(recalls)] == [f"{recall:.1%}" for recall in sorted(recalls)[:3]]
    low = [row for row in invented.classes if row["precision_in_use"] < 0.5]
    notes = [line for line in lines if "classes are as frequent as in training, " in line]
    assert len(notes) == bool(low)
    for note in notes:
        worst = min(low, key=lambda row: row["precision_in_use"])
        name = training.printable(worst["class"])
        assert f"{100 * worst['precision_in_use']:.0f} of 100 images called {name} are" in note
        assert note.endswith("; predict with --natural there")


KNOWN = {"class": "a", "train_images": 5, "val_images": 4}
KNOWN |= {"recall": 0.0, "low": 0.0, "high": 0.5}
UNKNOWN = {**KNOWN, "val_images": 0, **dict.fromkeys(("recall", "low", "high"), math.nan)}


def test_a_recall_of_0_has_a_dot_and_what_is_unknown_none():
    assert 'cx="0.00%"' in training.recall_chart([KNOWN])
    unknown = training.recall_chart([UNKNOWN])
    assert "circle" not in unknown and "nan" not in unknown and "–" in unknown


def test_a_long_name_loses_its_middle_in_the_chart_and_nothing_where_one_points_at_it():
    name = "00003_Plantae_Tracheophyta_Carya_cordiformis"
    chart = training.recall_chart([KNOWN | {"class": name}])
    assert ">00003_Plantae_…ya_cordiformis<" in chart and f"<title>{name}</title>" in chart


def test_commands_to_paste_are_quoted_as_the_shell_of_the_system_takes_them(monkeypatch):
    words = [r"runs\2026-11-29", "my images", r"^(P\d+)"]
    assert [*map(training.quote, words)] == [r"'runs\2026-11-29'", "'my images'", r"'^(P\d+)'"]
    monkeypatch.setattr(training.sys, "platform", "win32")
    assert [*map(training.quote, words)] == [r"runs\2026-11-29", '"my images"', r'"^(P\d+)"']


def test_curves_skip_what_is_not_finite_and_cut_off_what_is_far_above():
    rows = [{"epoch": at, "fold": 1, "a": x, "b": 0.5} for at, x in enumerate([1, math.inf, 2])]
    assert 'points="0,-1 0,-1 2,-2"' in training.draw_panel(rows, ("a", "b"), 1)
    rows = [{"epoch": at, "fold": 1, "a": x, "b": 1.0} for at, x in enumerate([250.0, *[2.0] * 20])]
    assert 'viewBox="0 -4.0 20 3.0"' in training.draw_panel(rows, ("a", "b"), 1)
    nothing = [{"epoch": 0, "fold": 1, "a": math.nan, "b": math.nan}]
    ElementTree.fromstring(training.svg(training.draw_panel(nothing, ("a", "b"), 1), 9))


@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium on this system")
def test_a_browser_shows_the_page(tmp_path):
    page = invent("hostile", tmp_path).files["report.html"]
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars"
    flags += " --disable-background-networking --disable-component-update --disable-sync"
    files = [f"--user-data-dir={tmp_path}/profile", f"--screenshot={tmp_path}/shot.png"]
    call = ["chromium", *flags.split(), *files, "--window-size=1280,900"]
    subprocess.run(
        [*call, f"file://{tmp_path}/report.html"], check=True, timeout=120, capture_output=True
    )
    with Image.open(tmp_path / "shot.png") as shot:
        colours = {colour for _, colour in shot.convert("RGB").getcolors(1280 * 900) or []}
        assert shot.size == (1280, 900) and (57, 135, 201) in colours
