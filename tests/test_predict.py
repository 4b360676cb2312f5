"""What a network says of new images: `data_training.py PHOTOS --predict RUN`."""

import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import by_hand, network_of, prepare, refused, rows_of, run, write_folder
from PIL import Image

import data_training as training

COLUMNS = ["path", "class", "probability", "second", "second_probability"]
FLOAT32 = ["--device", "cpu", "--no-amp"]


def predict(photos: Path, network: Path, output: Path, *flags: str) -> list[dict[str, str]]:
    run(photos, "--predict", network, *FLOAT32, "--output", output, *flags)
    return rows_of(output)


@pytest.fixture(scope="module")
def mixed(animals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 8 and of 12 bits that the default run has never seen, large and upright or not."""
    root = write_folder(
        tmp_path_factory.mktemp("mixed") / "new", {"ape": 5, "bee": 4, "cat": 3}, 90
    )
    exif = Image.Exif()
    exif[274] = 6
    stream = np.random.default_rng(0)
    for name in ("ape", "bee", "cat"):
        grey = stream.integers(0, 9, (5, 7)).repeat(16, 0).repeat(16, 1)
        for number, factor in enumerate((450, 30)):  # the second is dark beside the first
            Image.fromarray((grey * factor).astype(np.uint16)).save(
                root / name / f"deep{number}.png"
            )
        photograph = Image.fromarray(stream.integers(0, 255, (6, 8, 3), dtype=np.uint8))
        photograph.resize((800, 600)).save(root / name / "large.JPG", exif=exif)
    return root


@pytest.fixture(scope="module")
def judged(mixed: Path, animals: Path, default_run: SimpleNamespace) -> Path:
    """The default run's network, calibrated, judged on `mixed` without training."""
    output = mixed.parent / "judged"
    weights = ["--weights", default_run.path / "network.pt", "--epochs", 0]
    run(animals, "--val", mixed, *weights, *FLOAT32, "--output", output)
    return output


def test_the_table_says_what_a_run_predicted_of_the_same_images_and_folds_vote_as_they_did(
    judged, mixed, folds_run, others, tmp_path
):
    assert network_of(judged)["white"] == {"I": 4095}
    for photos, folder, table in ((mixed, judged, ""), (others, folds_run.path, "test_")):
        said = {row["path"]: row for row in rows_of(folder / f"{table}predictions.csv")}
        rows = predict(photos, folder, tmp_path / f"{table}x.csv")
        assert list(rows[0]) == COLUMNS
        assert [row["path"] for row in rows] == [str(photos / name) for name in sorted(said)]
        for row in rows:
            known = said[Path(row["path"]).relative_to(photos).as_posix()]
            assert row["class"] == known["predicted"]
            assert float(row["probability"]) == pytest.approx(float(known["probability"]), abs=2e-6)
        assert len({row["probability"] for row in rows}) > 10


@pytest.mark.parametrize("name", ["default_run", "folds_run"])
def test_a_few_lines_of_torchvision_say_the_same(name, others, tmp_path, request):
    """Where classes are equally frequent, or as frequent as in training."""
    folder = request.getfixturevalue(name).path
    network = network_of(folder)
    for flags, prior in (([], [1, 1, 1]), (["--natural"], network["train_images"])):
        rows = predict(others, folder, tmp_path / f"{len(flags)}.csv", *flags)
        logits = by_hand(network, [row["path"] for row in rows]) + torch.tensor(prior).log()
        probability, best = logits.softmax(1).topk(2)
        names = [[network["classes"][at] for at in pair] for pair in best.tolist()]
        assert [[row["class"], row["second"]] for row in rows] == names and len(rows) == 12
        for place, column in enumerate(("probability", "second_probability")):
            said = [float(row[column]) for row in rows]
            assert said == pytest.approx(probability[:, place].tolist(), abs=1e-5)


def test_the_network_that_is_written_is_calibrated(animals, tmp_path):
    """As scale * logits - shift * (log share of the class, less their mean)."""
    small = ["--weights", "none", "--image-size", "32", "--output", str(tmp_path / "run")]
    given, progress = prepare(animals, *small)
    torch.nn.init.normal_(progress.model.fc.weight)
    states = [training.copy_state(progress.model)]
    training.write_network(given, states, training.Calibration(2.0, 0.5))
    network, photos = network_of(tmp_path / "run"), sorted(animals.rglob("*.jpg"))[:3]
    share = torch.tensor([16.0, 10.0, 5.0]).log()
    expected = 2 * by_hand(network | {"networks": states}, photos) - (share - share.mean()) / 2
    torch.testing.assert_close(by_hand(network, photos), expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def photos(others: Path, tmp_path: Path) -> Path:
    """Three photos at several depths, one of them behind a link, and what is none."""
    root, images = tmp_path / "photos", sorted(others.rglob("*.jpg"))
    (root / ".trash").mkdir(parents=True)
    (tmp_path / "far/deep/er.jpg").mkdir(parents=True)
    (root / "b").symlink_to(tmp_path / "far")
    names = ["z.jpg", "b/A.JPG", "b/deep/er.jpg/x.png", ".trash/x.jpg", "b/._A.jpg"]
    for image, name in zip(images[: len(names)], names, strict=True):
        shutil.copy(image, root / name)
    (root / "b/notes.txt").write_text("not a photo")
    return root


def test_what_an_uncalibrated_network_knows_of_frequencies_counts_once(others, animals, tmp_path):
    """Trained without balancing, and not calibrated, it answers for them as it is."""
    flags = ["--weights", "none", "--arch", "resnet18", "--epochs", "1", "--no-calibration"]
    for power, factor in (("0", 0), ("0.5", 0.5)):
        balance = ["--power", power] if power != "0" else ["--rebalance", "none"]
        command = [animals, *flags, *balance, "--image-size", "32", *FLOAT32]
        folder = run(*command, "--output", tmp_path / power).path
        rows = [predict(others, folder, tmp_path / f"{power}{len(more)}.csv", *more)
                for more in ([], ["--natural"])]  # fmt: skip
        share = torch.tensor(network_of(folder)["train_images"]).log() * factor
        paths = [row["path"] for row in rows[1]]
        for each, prior in zip(rows, (torch.zeros(3), share), strict=True):
            expected = (by_hand(network_of(folder), paths) + prior).softmax(1).max(1).values
            said = [float(row["probability"]) for row in each]
            assert said == pytest.approx(expected.tolist(), abs=1e-5)


def test_photos_are_found_at_any_depth_and_the_table_is_the_same_on_stdout_and_by_a_file(
    photos, default_run, tmp_path
):
    """Behind links too, but not hidden; a network's file is named as people like, and a photo."""
    rows = predict(photos, default_run.path, tmp_path / "x.csv")
    found = [Path(row["path"]).relative_to(photos).as_posix() for row in rows]
    assert found == ["b/A.JPG", "b/deep/er.jpg/x.png", "z.jpg"]
    printed = run(photos, "--predict", default_run.path / "network.pt", *FLOAT32).out
    assert (tmp_path / "x.csv").read_text() == printed
    shutil.copy(default_run.path / "network.pt", tmp_path / "renamed.pth")
    single = run(photos / "b/A.JPG", "--predict", tmp_path / "renamed.pth", *FLOAT32).out
    [head, line] = [line.split(",")[:2] for line in single.splitlines()]
    assert (head, line) == (COLUMNS[:2], [str(photos / "b/A.JPG"), rows[0]["class"]])


def test_what_cannot_be_read_is_named_and_left_out(photos, default_run, tmp_path, capsys):
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "b/text.png").write_text("not an image")
    for name, value in (("nan", math.nan), ("below", -1.0)):
        values = np.full((32, 32), 0.5, np.float32)
        values[0, 0] = value
        Image.fromarray(values).save(photos / f"{name}.tif")
    command = [str(photos), "--predict", str(default_run.path), *FLOAT32]
    assert training.main([*command, "--output", str(tmp_path / "x.csv")]) == 0
    *said, number = capsys.readouterr().err.splitlines()
    assert len(said) == 5 and len(rows_of(tmp_path / "x.csv")) == 3
    assert number == "3 images"
    assert f"warning: {photos}: 1 files left out, whose names end in .txt" in said
    for name in ("empty.jpg", "b/text.png", "nan.tif", "below.tif"):
        (line,) = [line for line in said if f"{photos / name}: " in line]
        assert line.startswith("warning: ") and line.endswith("; left out")


def test_a_photo_that_may_not_be_read_is_named_and_left_out(
    photos, default_run, tmp_path, monkeypatch, capsys
):
    def read(path: str, real: Callable[[str], bytes] = training.read_bytes) -> bytes:
        if path.endswith("z.jpg"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(training, "read_bytes", read)
    command = [photos, "--predict", default_run.path, *FLOAT32, "--output", tmp_path / "x.csv"]
    assert training.main([*map(str, command)]) == 0
    assert len(rows_of(tmp_path / "x.csv")) == 2
    assert "z.jpg'; left out" in capsys.readouterr().err


def test_frequencies_that_nobody_knows_are_not_made_up(others, default_run, tmp_path, capsys):
    torch.save(network_of(default_run.path)["networks"][0], tmp_path / "state.pt")
    flags = ["--weights", tmp_path / "state.pt", "--epochs", 0, "--image-size", 32, *FLOAT32]
    judged = run(others, *flags, "--output", tmp_path / "run").path
    predict(others, judged, tmp_path / "x.csv")
    [error] = refused([others, "--predict", judged, "--natural"], capsys, others)
    assert "--natural: the network does not say how frequent classes were" in error


def test_the_next_photos_are_read_while_these_are_looked_at(photos, default_run, monkeypatch):
    real, paths = training.read_image, training.list_photos(photos)
    begun = {path: threading.Event() for path in paths}

    def read(path: str, *others: object) -> torch.Tensor:
        begun[path].set()
        return real(path, *others)

    monkeypatch.setattr(training, "read_image", read)
    run, last = network_of(default_run.path), paths[-1]
    for place, (views, names) in enumerate(training.read_photos(paths, run, 1)):
        assert names == [paths[place]] and views.shape == (1, 32, 32, 3)
        assert begun[paths[min(place + 1, 2)]].wait(60)
        assert begun[last].is_set() is (place > 0)  # one batch ahead, not all


def test_a_photo_of_12_bits_alone_is_as_bright_as_among_those_of_the_run(judged, mixed):
    table = run(mixed, "--predict", judged, *FLOAT32).out.splitlines()
    dark = mixed / "ape/deep1.png"
    alone = run(dark, "--predict", judged, *FLOAT32).out.splitlines()[1]
    (among,) = [line for line in table if line.startswith(f"{dark},")]
    assert alone.split(",")[1] == among.split(",")[1]
    assert float(alone.split(",")[2]) == pytest.approx(float(among.split(",")[2]), abs=2e-6)
    pixels = training.read_image(str(dark), network_of(judged)["white"])
    assert 0 < pixels.max() < 20


ERRORS = {
    "PHOTOS --predict young": "--predict young: no network there; name a run that has one",
    "PHOTOS --predict PRETRAINED": "pretrained.pth: not a network of this script; train one first",
    "PHOTOS --predict text.pth": "--predict text.pth: not a network of this script",
    "none --predict RUN": "DATA none: no image there; known are .jpg",
    "young --predict RUN": "DATA young: no image there; known are .jpg",
    "broken --predict RUN": "broken: no image that can be read",
    "text.pth --predict RUN": "text.pth: no image that can be read",
    "PHOTOS --predict RUN --output text.pth": "--output text.pth: there already; name a new file",
    "PHOTOS --predict RUN --output young": "--output young: there already",
    "PHOTOS --predict RUN --output no/x.csv": "--output no/x.csv: no folder to write it in",
    "PHOTOS --predict RUN --device abacus": "--device abacus: not on this machine",
}
FLAGS = ["--seed 0", "--weights none", "--arch resnet18", "--image-size 32", "--folds 3"]
FLAGS += ["--source x", "--no-calibration", "--flip none", "--epochs 10", "--val-fraction 0.1"]
for flag in FLAGS:
    said = f"{flag.split()[0]}: not with --predict; drop one of them"
    ERRORS[f"PHOTOS --predict RUN {flag}"] = said


@pytest.mark.parametrize("case", ERRORS)
def test_photos_or_networks_that_are_none_get_one_line_and_status_2(
    case, photos, pretrained, default_run, monkeypatch, capsys
):
    monkeypatch.chdir(photos.parent)
    for folder, name in (("young", "config.json"), ("broken", "x.jpg"), (".", "text.pth")):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, name).write_text("no image, no weights")
    places = {"PHOTOS": photos, "RUN": default_run.path, "PRETRAINED": pretrained}
    command = [places.get(each, each) for each in case.split()]
    assert ERRORS[case] in refused(command, capsys, photos.parent)[-1]
