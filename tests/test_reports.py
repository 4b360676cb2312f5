"""What a run says of itself: tables, lines and page agree, and the page loads nothing."""

import html
import json
import math
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
import torch
from conftest import CPU, TINY, Run, images, interrupt_after, open_run, refused, rows_of, run
from PIL import Image

import data_training as training

GROUPS = ("many", "medium", "few")  # of classes, by their training images


@pytest.fixture(scope="session")
def compared_run(default_run: Run, animals: Path) -> Run:
    """An epoch from random weights, compared with two from pretrained ones."""
    flags = ["--weights", "none", "--epochs", 1, *TINY, "--baseline", default_run.path]
    return run(animals, *flags, "--output", animals.parent / "compared")


@pytest.fixture(params=["default_run", "folds_run", "compared_run"])
def any_run(request: pytest.FixtureRequest) -> Run:
    return request.getfixturevalue(request.param)


def near(value: float) -> object:
    """As near as six digits are."""
    return pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True)


def result_of(run: Path) -> dict[str, float]:
    """The result in `config.json`, which has null where a number is unknown."""
    text = (run / "config.json").read_text()
    assert "NaN" not in text  # which is no JSON
    return {k: math.nan if x is None else x for k, x in json.loads(text)["result"].items()}


def test_tables_agree_with_each_other(any_run):
    path, result = any_run.path, result_of(any_run.path)
    predictions, classes = rows_of(path / "predictions.csv"), rows_of(path / "classes.csv")
    order = [float(row["true_probability"]) for row in predictions]
    assert order == sorted(order)  # so that labels which may be wrong come first
    asked = Counter(row["class"] for row in predictions)
    taken = Counter(row["predicted"] for row in predictions)
    taken_for = Counter((row["class"], row["predicted"]) for row in predictions)
    recalls = []
    for row in classes:
        name = row["class"]
        right = taken_for[name, name]
        recalls.append(right / asked[name])
        assert int(row["val_images"]) == int(row["effective_images"]) == asked[name]
        assert float(row["recall"]) == near(recalls[-1])
        assert float(row["precision"]) == near(right / taken[name] if taken[name] else math.nan)
        assert 0 <= float(row["low"]) <= float(row["recall"]) <= float(row["high"]) <= 1
        aheads = [
            (float(one[name]) > float(other[name])) + (one[name] == other[name]) / 2
            for one in predictions
            for other in predictions
            if one["class"] == name != other["class"]
        ]
        assert float(row["auc"]) == pytest.approx(sum(aheads) / len(aheads), abs=1e-6)
    for row in predictions:
        probabilities = {name: float(row[name]) for name in asked}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-6)
        said = [probabilities[row["predicted"]], probabilities[row["class"]]]
        assert said == [float(row["probability"]), float(row["true_probability"])]
        assert max(probabilities.values()) == said[0]
    for row in rows_of(path / "confusion.csv"):
        counts = {name: taken_for[row["class"], name] for name in sorted(asked)}
        assert row == {"class": row["class"]} | {name: str(x) for name, x in counts.items()}
    assert result["balanced_accuracy"] == near(sum(recalls) / 3)
    right = sum(taken_for[name, name] for name in asked)
    assert result["accuracy"] == near(right / len(predictions))
    losses = [
        -math.log(float(row["true_probability"])) / asked[row["class"]] for row in predictions
    ]
    assert result["val_loss"] == pytest.approx(sum(losses) / 3, rel=1e-3)
    lines = rows_of(path / "line.csv")
    assert [float(row["point"]) for row in lines] == [*training.POINTS]
    [kept] = [row for row in lines if row["kept"] == "1"]  # describes the network
    assert all(float(kept[name]) == near(x) for name, x in result.items())
    assert result["val_loss"] == near(min(float(row["val_loss"]) for row in lines))
    assert json.loads((path / "config.json").read_text())["kept_point"] == float(kept["point"])


def test_the_ends_of_the_line_are_linear_probe_and_fine_tuning(default_run):
    """One network: the line begins at the first row of the history and ends at the last."""
    first, *_, last = rows_of(default_run.path / "history.csv")
    probe, *_, end = rows_of(default_run.path / "line.csv")
    assert (first["step"], last["step"]) == ("linear probe", "fine-tuning")
    for row, point in ((first, probe), (last, end)):
        for name in ("val_loss", "balanced_accuracy", "low", "high", "logit_scale", "logit_shift"):
            assert float(row[name]) == near(float(point[name]))


def test_each_class_has_a_column_of_its_own_whatever_it_is_called():
    names = ["class", "class path", "path", "class class path"]
    columns = training.add_classes({"path": [""], "class": [""]}, names, torch.arange(4)[None])
    titles = ["class class", "class path", "class class class path", "class class path"]
    assert [(title, int(columns[title])) for title in titles] == [
        *zip(titles, range(4), strict=True)
    ]
    assert len(columns) == 6


def test_lines_stand_under_their_header_and_say_what_the_tables_do(any_run):
    lines, history = any_run.out.splitlines(), rows_of(any_run.path / "history.csv")
    start = lines.index(training.HEADER)
    column, after = training.HEADER.index("balanced"), training.HEADER.index("as trained") + 10
    for line, row in zip(lines[start + 1 :], history, strict=False):
        ends = [f"{100 * float(row[end]):.1f}" for end in ("low", "high")]
        shown = f"{float(row['balanced_accuracy']):.1%} [{', '.join(ends)}]"
        assert len(line) == len(lines[start]) and line[column:].startswith(shown)
        trained = f"{float(row['as_trained_balanced_accuracy']):.1%}"
        assert line[:after].endswith(trained)
    *_, last = lines
    assert str(any_run.path) in last


def test_a_comparison_has_both_runs_and_their_difference(compared_run, default_run):
    rows = rows_of(compared_run.path / "comparison.csv")
    before, after = (result_of(run.path) for run in (default_run, compared_run))
    known = [name for name in training.MEASURES if not math.isnan(before[name])]
    assert [row["measure"] for row in rows] == [name.replace("_", " ") for name in known]
    for name, row in zip(known, rows, strict=True):
        difference, low, high = (float(row[key]) for key in ("difference", "low", "high"))
        assert float(row["before"]) == near(before[name])
        assert difference == near(after[name] - before[name]) and low <= difference <= high
        assert row["more_than_chance"] == ("no" if low <= 0 <= high else "yes")
        [line] = re.findall(rf"^{row['measure']} .*in .*/default, now.*$", compared_run.out, re.M)
        assert f"{100 * difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]" in line
        assert ("within the chance of these images" in line) is (low <= 0 <= high)


def test_a_baseline_on_other_images_or_of_other_classes_is_refused(
    default_run, animals, tmp_path, capsys
):
    shutil.copytree(default_run.path, tmp_path / "odd")
    table = tmp_path / "odd/predictions.csv"
    table.write_text(table.read_text().replace(",ape,", ",dog,").replace(",bee,", ",dog,"))
    odd = "this run predicts the class dog, which DATA lacks; give both runs the same DATA"
    for seed, baseline, told in (
        (1, default_run.path, "this run was evaluated on other images, the first is "),
        (0, tmp_path / "odd", odd),
    ):
        command = [animals, "--weights", "none", *TINY, "--seed", seed, "--baseline", baseline]
        [line] = refused([*command, "--output", tmp_path / "run"], capsys, tmp_path)
        assert f"--baseline {baseline}: {told}" in line


def test_an_unfinished_run_shows_figures_of_its_own_networks(animals, pretrained, tmp_path):
    command = [str(animals), "--weights", str(pretrained), "--folds", "3", "--epochs", "2", *TINY]
    output = interrupt_after(1, command, tmp_path / "run", fold=2)
    page = output / "report.html"
    assert "Unfinished: 1 of 3 networks are trained to the end" in page.read_text()
    parts = {row["path"]: row["part"] for row in rows_of(output / "split.csv")}
    evaluated = {parts[row["path"]] for row in rows_of(output / "predictions.csv")}
    assert evaluated == {"fold 1"} and len(training.read_weights(str(output))["networks"]) == 1
    predict = [animals, "--device", "cpu", "--predict"]
    warning = (
        f"warning: the run {output} is not finished; finish it by --resume for better results\n"
    )
    for path in (output, output / "network.pt"):
        assert run(*predict, path).err.startswith(warning)
    run("--resume", output)
    assert "Unfinished" not in page.read_text() and "warning" not in run(*predict, output).err


def row(epoch: int, fold: int = 1, seconds: float = 60.0, **others: object) -> dict[str, object]:
    """A row of a history, with the longest numbers that there are."""
    known = dict.fromkeys((*training.MEASURES, "as_trained_balanced_accuracy", "high"), 1.0)
    known |= {"fold": fold, "epoch": epoch, "step": "linear probe", "train_loss": 1.5, "low": 0.555}
    known |= {"val_loss": 123.456, "many": math.nan, "images_per_second": 12345.6}
    return known | {"seconds": seconds} | others


HOSTILE = ["<script>alert(1)</script>", "a\x00\u202eb\ud800", "&amp;", '"><img src="http://x.y">']
NAMES = [*HOSTILE, *(f"n021{at:05}-Shetland_sheepdog_{at}" for at in range(26))]


@pytest.fixture(scope="module")
def invented(animals: Path, tmp_path_factory: pytest.TempPathFactory) -> training.Outcome:
    """Five folds of ten epochs, and invented answers; none for the last class but one."""
    noise = tmp_path_factory.mktemp("invented") / "noise.jpg"
    Image.effect_noise((200, 150), 90).convert("RGB").save(noise)
    settings = open_run(animals, "--folds", 5, "--output", "new").settings
    settings = replace(settings, baseline=Path("runs/plain").resolve())
    classes = len(NAMES)
    labels = torch.arange(classes).repeat_interleave(torch.logspace(2.4, 1.15, classes).long())
    held = [None if label == classes - 2 else at % 5 for at, label in enumerate(labels)]
    data = images(labels.tolist(), held, 5, classes=NAMES)
    data = data._replace(files=[file._replace(path=str(noise)) for file in data.files])
    eval_set = training.make_eval_set(data, range(5))
    shares = training.class_shares(data, eval_set, 1.0)
    truth = torch.nn.functional.one_hot(eval_set.targets, classes)
    chance = torch.randn(2, *truth.shape, generator=torch.Generator().manual_seed(0))
    before = (1.5 * truth + chance[0]).argmax(1)
    evaluation = training.evaluate_cross_fitted(3.0 * truth + chance[1], eval_set, shares)
    line = [{"point": x, **evaluation.summary, "kept": int(x == 0.35)} for x in training.POINTS]
    kept = training.Kept([], evaluation, 0.35, line)
    listed = training.list_classes(NAMES, torch.full((classes,), 100), evaluation)
    progress = training.Progress({}, seen=0, draws=labels, finished=[None] * 4)
    return training.Outcome(
        settings=settings,
        data=data,
        facts=training.describe_run(settings, data, CPU),
        remarks=training.list_remarks(5, progress, kept, listed),
        history=[row(epoch, **evaluation.summary) for epoch in range(11)],
        kept=kept,
        baseline=before,
        changes=training.compare(before, evaluation),
        classes=listed,
        tested=evaluation,
    )


def parse(page: str) -> Element:
    """A page, or a part of it, as a tree: XML, in which every tag is closed."""
    closed = re.sub("<((?:meta|img) [^>]*)>", r"<\1/>", page.removeprefix("<!DOCTYPE html>"))
    return ElementTree.fromstring(f"<all>{closed}</all>")


def cells_of(page: str) -> list[list[str]]:
    """The rows of all tables."""
    return [["".join(cell.itertext()) for cell in row] for row in parse(page).iter("tr")]


def test_the_time_left_is_what_the_rest_takes_at_the_pace_of_the_epoch(invented):
    show = lambda *about: training.format_epoch(row(*about), invented.settings)  # noqa: E731
    assert show(6, 5, 1500.0).endswith(" 1h40")
    assert show(10, 3, 60.0).endswith(" 0h20")  # two more folds of ten epochs
    assert show(0, 5, 1500.0).endswith(" -")  # the others take longer
    assert len(show(10)) == len(training.HEADER)


def test_the_page_closes_every_tag_and_loads_nothing(invented):
    text = training.make_page(invented).decode()
    tags = [*parse(text).iter()]
    assert not {"script", "link", "iframe", "object", "base"}.intersection(tag.tag for tag in tags)
    assert not {"\x00", "\u202e"}.intersection(text) and len(text) < 2e6
    names = ("src", "href", "srcset", "xlink:href", "action", "data", "poster")
    loaded = [tag.attrib[name] for tag in tags for name in names if name in tag.attrib]
    assert all(each.startswith("data:image/jpeg;base64,") for each in loaded)
    assert len(loaded) == 2 * training.MISTAKES
    outside = re.sub('base64,[^"]*', "", text)
    links = re.findall(r"\S*(?:https?:|//)\S*", outside)
    assert all("http://x.y" in each for each in links)  # the name of a class, as text
    assert not re.search(r"@import|url\(|javascript:| on\w+=", outside)


def test_page_and_console_say_the_same_of_every_class_and_fact(invented, capsys):
    text, evaluation = training.make_page(invented).decode(), invented.kept.evaluation
    said, cells = " ".join(parse(text).itertext()), cells_of(text)
    listed = [[*row.values()] for row in invented.classes]
    for name, old, new, *ends, sure in map(dict.values, invented.changes):
        listed.append([name, old, new, *(f"{100 * x:+.1f} points" for x in ends), sure])
    for values in listed:
        assert [html.unescape(training.show(value)) for value in values] in cells
    for row in invented.kept.line:
        fractions = [training.show(row[name]) for name in ("balanced_accuracy", *GROUPS)]
        end = "kept" if row["point"] == 0.35 else ""
        assert [f"{row['point']:g}", f"{row['val_loss']:.3f}", *fractions, end] in cells
    assert all(training.printable(fact) in said for fact in invented.facts.values())
    training.print_end(invented)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 28  # one screen, even if all there is to say is said
    result = training.format_range(evaluation.summary)
    trained = f"{evaluation.summary['as_trained_balanced_accuracy']:.1%}"
    assert all(shown in said for shown in (*result.split(" ", 1), trained))
    points = [f"{x:5.2f}  {evaluation.summary['val_loss']:8.3f}  {result}" for x in training.POINTS]
    points[3] += "  kept"
    assert lines[2:9] == points
    assert lines[10:12] == [f"balanced accuracy {result}", f"as trained        {trained}"]
    assert lines[12] == f"untouched test    {result}"
    images = len(evaluation.eval_set.targets)
    for remark in (
        "Unfinished: 4 of 5 networks are trained to the end",
        "Kept point: 0.35 of the way from linear probe (0) to fine-tuning (1), by the lowest "
        f"validation loss on {images} images",
        "These are results of single networks; the ensemble is usually better",
        f"Classes without a validation image: 1, the first is {NAMES[-2]}; nothing here says how "
        "well they are recognised",
    ):
        assert remark in lines and f"{remark}." in said and remark in invented.remarks


def test_the_page_has_a_section_for_each_table(invented, default_run):
    titles = re.findall("<h2>(.*?)</h2>", training.make_page(invented).decode())
    first, *others = titles
    assert first == "Compared with the baseline"
    assert others == [
        "Classes",
        "Mistakes",
        "Confusions",
        "Training",
        "From linear probe (0) to fine-tuning (1)",
        "How this was measured",
    ]
    page = (default_run.path / "report.html").read_text()
    assert set(re.findall("<h2>(.*?)</h2>", page)) <= set(others)


def test_the_page_shows_the_commonest_confusions():
    confusion = torch.tensor([[5, 2, 0], [1, 9, 3], [0, 0, 3]])
    rows = cells_of(training.show_confusions(["a", "b", "c"], confusion))
    assert rows[1:4] == [["b", "c", "3 of 13"], ["a", "b", "2 of 7"], ["b", "a", "1 of 13"]]


def test_the_page_shows_the_surest_mistakes_each_beside_what_it_was_taken_for(invented):
    evaluation, wrong = invented.kept.evaluation, []
    answers = evaluation.eval_set.targets, evaluation.predicted, evaluation.probabilities.amax(1)
    for true, taken, sure in zip(*answers, strict=True):
        names = [training.printable(NAMES[label]) for label in (true, taken)]
        relation = f"predicted ({training.show(sure.item())})"
        if true != taken:
            wrong.append((-sure, ["is", names[0], relation, names[1]]))
    figures = parse(training.show_mistakes(invented.data, evaluation)).iter("figure")
    first = sorted(wrong, key=lambda pair: pair[0])[: training.MISTAKES]
    assert [[*figure.itertext()] for figure in figures] == [said for _, said in first]


def test_recalls_have_bars_for_their_intervals_and_unknown_ones_a_dash():
    known = {"class": "a", "val_images": 4, "recall": 0.25, "low": 0.0625, "high": 0.5}
    unknown = {"class": "b", "val_images": 0, **dict.fromkeys(("recall", "low", "high"), math.nan)}
    table = training.show_rows([known, unknown])
    assert re.findall('style="(.*?)"', table) == ["--low:6.2%;--high:50.0%"]
    assert cells_of(table)[2] == ["b", "0", "–", "–", "–"]


def test_curves_go_through_their_values_a_line_for_each_fold():
    rows = [{"epoch": at, "fold": 1, "a": x, "b": 0.5} for at, x in enumerate([1.0, 2.5, 2.0])]
    rows.append({"epoch": 1, "fold": 2, "a": 1.0, "b": 0.75})
    chart = training.curve_chart(rows, "title", "a", "b")
    old = ["0,-1 0,-1 1,-2.5 2,-2", "1,-1 1,-1"]
    new = ["0,-0.5 0,-0.5 1,-0.5 2,-0.5", "1,-0.75 1,-0.75"]
    assert re.findall('class="old" points="(.*?)"', chart) == old
    assert re.findall('class="new" points="(.*?)"', chart) == new
    assert "title: from 0.5 to 2.5, epochs 0 to 2" in chart
