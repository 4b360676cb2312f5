"""What a network says of new images: `data_training.py PHOTOS --predict RUN`."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import by_hand, network_of, refused, rows_of, run
from PIL import Image

COLUMNS = ["path", "class", "probability", "second", "second_probability"]
FLOAT32 = ["--device", "cpu", "--no-amp"]


def predict(photos: Path, network: Path, output: Path, *flags: str) -> list[dict[str, str]]:
    run(photos, "--predict", network, *FLOAT32, "--output", output, *flags)
    return rows_of(output)


@pytest.fixture
def photos(others: Path, tmp_path: Path) -> Path:
    """Three photos at several depths, two of them behind a link, and what is none."""
    root, images = tmp_path / "photos", sorted(others.rglob("*.jpg"))
    (root / ".trash").mkdir(parents=True)
    (tmp_path / "far/deep/er.jpg").mkdir(parents=True)
    (root / "b").symlink_to(tmp_path / "far")
    names = ["z.jpg", "b/A.JPG", "b/deep/er.jpg/x.png", ".trash/x.jpg", "b/._A.jpg"]
    for image, name in zip(images[: len(names)], names, strict=True):
        shutil.copy(image, root / name)
    for name in ("b/notes.txt", "b/text.png"):
        (root / name).write_text("not a photo")
    return root


def test_the_table_says_what_an_ensemble_said_when_it_was_tested(folds_run, others, tmp_path):
    said = {row["path"]: row for row in rows_of(folds_run.path / "test_predictions.csv")}
    rows = predict(others, folds_run.path, tmp_path / "x.csv")
    assert list(rows[0]) == [*COLUMNS, "true"]
    assert [row["path"] for row in rows] == [str(others / name) for name in sorted(said)]
    for row in rows:
        known = said[Path(row["path"]).relative_to(others).as_posix()]
        assert (row["class"], row["true"]) == (known["predicted"], known["class"])
        assert float(row["probability"]) == pytest.approx(float(known["probability"]), abs=2e-6)


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
        for rank, column in enumerate(("probability", "second_probability")):
            said = [float(row[column]) for row in rows]
            assert said == pytest.approx(probability[:, rank].tolist(), abs=1e-5)


def test_images_in_folders_of_the_classes_are_judged_but_for_those_that_were_learnt(
    animals, default_run, tmp_path
):
    """Of 20, 12 and 6 images a fifth was not learnt: 4, 2 and 1."""
    table = tmp_path / "x.csv"
    said = run(animals, "--predict", default_run.path, *FLOAT32, "--output", table).err.splitlines()
    split = rows_of(default_run.path / "split.csv")
    new = {str(animals / row["path"]) for row in split if row["part"] == "val"}
    rows = [row for row in rows_of(table) if row["path"] in new]
    recalls = {}
    for label, number in (("ape", 4), ("bee", 2), ("cat", 1)):
        recalls[label] = sum(row["class"] == row["true"] == label for row in rows) / number
    count, learnt, balanced, *classes = said[-6:]
    assert count.endswith("38 images") and learnt.startswith("31 of them, or their families,")
    assert balanced.startswith(f"balanced accuracy {sum(recalls.values()) / 3:.1%} [")
    for line, (label, recall), number in zip(classes, recalls.items(), "421", strict=True):
        assert line.split()[0] == f"{recall:.1%}"
        assert line.split()[-3:] == ["of", number, label]


def test_photos_are_found_at_any_depth_and_the_table_is_the_same_on_stdout_and_by_a_file(
    photos, default_run, tmp_path
):
    """Behind links too, but not hidden. What cannot be read is named. A photo may be alone."""
    said = run(photos, "--predict", default_run.path, *FLOAT32, "--output", tmp_path / "x.csv").err
    assert said.endswith("3 images\n") and said.count("; left out\n") == 1
    assert f"warning: {photos / 'b/text.png'}: " in said
    rows = rows_of(tmp_path / "x.csv")
    found = [Path(row["path"]).relative_to(photos).as_posix() for row in rows]
    assert found == ["b/A.JPG", "b/deep/er.jpg/x.png", "z.jpg"] and list(rows[0]) == COLUMNS
    printed = run(photos, "--predict", default_run.path / "network.pt", *FLOAT32).out
    assert (tmp_path / "x.csv").read_text() == printed
    shutil.copy(default_run.path / "network.pt", tmp_path / "renamed.pth")
    single = run(photos / "b/A.JPG", "--predict", tmp_path / "renamed.pth", *FLOAT32).out
    [head, line] = [line.split(",")[:2] for line in single.splitlines()]
    assert (head, line) == (COLUMNS[:2], [str(photos / "b/A.JPG"), rows[0]["class"]])


def test_a_photo_of_12_bits_is_as_bright_as_the_run_has_seen_it(default_run, tmp_path):
    """As the same picture of 8 bits, though it has no white in it."""
    torch.save(network_of(default_run.path) | {"white": 4095}, tmp_path / "deep.pt")
    grey = np.random.default_rng(0).integers(0, 90, (32, 32))
    (tmp_path / "new").mkdir()
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "new/8.png")
    Image.fromarray((grey * 4095 // 255).astype(np.uint16)).save(tmp_path / "new/12.png")
    deep, plain = predict(tmp_path / "new", tmp_path / "deep.pt", tmp_path / "x.csv")
    assert float(deep["probability"]) == pytest.approx(float(plain["probability"]), abs=1e-6)


ERRORS = {
    "PHOTOS --predict young": "--predict young: no network of this version; train one first",
    "PHOTOS --predict BROKEN": "error: the network's outputs became nan; try --no-amp",
    "PHOTOS --predict text.pth": "text.pth: damaged, or not of tensors alone",
    "none --predict RUN": "DATA none: no image there; known are .jpg",
    "broken --predict RUN": "DATA broken: no image that can be read",
    "PHOTOS --predict RUN --output text.pth": "--output text.pth: there already, or no folder",
    "PHOTOS --predict RUN --device abacus": "--device abacus: not on this machine",
    "PHOTOS --predict RUN --image-size 32": "image-size and --predict: drop one of them",
    "PHOTOS --natural": "--natural: only with --predict; drop it",
}


@pytest.mark.parametrize("case", ERRORS)
def test_photos_or_networks_that_are_none_get_one_line_and_status_2(
    case, photos, default_run, monkeypatch, capsys
):
    monkeypatch.chdir(photos.parent)
    for folder, name in (("young", "config.json"), ("broken", "x.jpg"), (".", "text.pth")):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, name).write_text("no image, no weights")
    network = network_of(default_run.path)
    network["networks"][0]["bn1.running_var"] -= 9  # finite, but it has no square root
    torch.save(network, "broken.pt")
    places = {"PHOTOS": photos, "RUN": default_run.path, "BROKEN": "broken.pt"}
    command = [places.get(each, each) for each in case.split()]
    assert ERRORS[case] in refused(command, capsys, photos.parent)[-1]
