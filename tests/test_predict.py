"""What a network says of new images: `data_training.py PHOTOS --predict RUN`."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, Process, by_hand, network_of, rows_of, run
from PIL import Image

import data_training as training

COLUMNS, CLASSES = ["path", "class", "probability"], ["ape", "bee", "cat"]
CPU = ["--device", "cpu"]  # predicts in float32, as a program would


def predict(photos: Path, network: Path, output: Path, *flags: str) -> list[dict[str, str]]:
    run(photos, "--predict", network, *CPU, "--output", output, *flags)
    return rows_of(output)


@pytest.mark.parametrize("name", ["default_run", "folds_run"])
def test_a_few_lines_of_torchvision_say_the_same(name, others, tmp_path, request):
    """Where classes are equally frequent, or as frequent as in training."""
    folder = request.getfixturevalue(name).path
    network = network_of(folder)
    for flags, natural in (([], torch.zeros(3)), (["--natural"], network["natural"])):
        rows = predict(others, folder, tmp_path / f"{len(flags)}.csv", *flags)
        assert list(rows[0]) == [*COLUMNS, "true", *CLASSES]
        paths = [row["path"] for row in rows]
        assert paths == sorted(map(str, others.rglob("*.jpg")))
        expected = (by_hand(network, paths) + natural).softmax(1)
        assert [row["class"] for row in rows] == [CLASSES[at] for at in expected.argmax(1)]
        said = torch.tensor([[float(row[name]) for name in CLASSES] for row in rows])
        torch.testing.assert_close(said, expected, rtol=0, atol=1e-5)
        assert [float(row["probability"]) for row in rows] == pytest.approx(said.amax(1).tolist())


def test_natural_is_the_log_of_the_classes_in_training_the_mean_over_networks(
    default_run, folds_run
):
    """Of 20, 12 and 6 images one network learns 16, 10 and 5; three learn two thirds each."""
    network = network_of(default_run.path)
    assert network["train_images"] == [16, 10, 5]
    assert network["natural"].softmax(0).tolist() == pytest.approx([16 / 31, 10 / 31, 5 / 31])
    networks = network_of(folds_run.path)
    assert networks["train_images"] == [13, 8, 4]  # 13 or 14 of 20
    apes = (13 * 13 * 14) ** (1 / 3)
    shares = [apes / (apes + 12), 8 / (apes + 12), 4 / (apes + 12)]
    assert networks["natural"].softmax(0).tolist() == pytest.approx(shares)


def test_images_in_folders_of_the_classes_give_recalls_but_for_those_that_were_learnt(
    animals, default_run, tmp_path
):
    """Of 20, 12 and 6 images a fifth was not learnt: 4, 2 and 1."""
    table = tmp_path / "x.csv"
    said = run(animals, "--predict", default_run.path, *CPU, "--output", table).err.splitlines()
    split = rows_of(default_run.path / "split.csv")
    new = {str(animals / row["path"]) for row in split if row["part"] == "val"}
    rows = [row for row in rows_of(table) if row["path"] in new]
    recalls = {}
    for label, number in (("ape", 4), ("bee", 2), ("cat", 1)):
        recalls[label] = sum(row["class"] == row["true"] == label for row in rows) / number
    count, learnt, balanced, *classes = said[-6:]
    assert count.endswith("38 images") and learnt == "left out, since trained on: 31 of them"
    assert balanced.startswith(f"balanced accuracy {sum(recalls.values()) / 3:.1%} [")
    for line, (label, recall), number in zip(classes, recalls.items(), "421", strict=True):
        assert line.split()[0] == f"{recall:.1%}"
        assert line.split()[-3:] == ["of", number, label]


def test_a_photo_outside_of_the_class_folders_is_told(others, default_run, tmp_path):
    photos = Path(shutil.copytree(others, tmp_path / "photos"))
    stray = next(photos.rglob("*.jpg")).rename(photos / "stray.jpg")
    rows = predict(photos, default_run.path, tmp_path / "x.csv")
    assert "true" not in rows[0]
    said = run(photos, "--predict", default_run.path, *CPU).err
    text = (
        f"1 images are in no class folder, the first is {stray}; therefore no recalls are computed"
    )
    assert f"warning: {text}\n" in said
    assert "accuracy" not in said


def test_copies_count_as_the_one_image_that_they_are_and_learnt_ones_do_not(
    animals, others, default_run, tmp_path
):
    """Twelve copies of one image in each class, and two of one that was learnt."""
    split, command = rows_of(default_run.path / "split.csv"), ["--predict", default_run.path]
    for label in CLASSES:
        old = next(x["path"] for x in split if (x["part"], x["class"]) == ("train", label))
        for folder, image, count in (
            (tmp_path / "new" / label, min((others / label).iterdir()), 12),
            (tmp_path / "old" / label, animals / old, 2),
        ):
            folder.mkdir(parents=True)
            for at in range(count):
                shutil.copy(image, folder / f"{at}.jpg")
    said = run(tmp_path / "new", *command, *CPU, "--output", tmp_path / "x.csv").err
    pairs = [(row["true"], row["class"]) for row in rows_of(tmp_path / "x.csv")]
    confusion = torch.tensor([[pairs.count((x, y)) for y in CLASSES] for x in CLASSES])
    summary = training.summarise(confusion, torch.tensor([16, 10, 5]), torch.ones(3))
    *_, balanced, ape, bee, cat = said.splitlines()
    assert balanced == f"balanced accuracy {training.format_range(summary)}"
    for line, label in zip((ape, bee, cat), CLASSES, strict=True):
        assert line.split()[1:] == ["[0%,", "100%]", "of", "12", label]
    said = run(tmp_path / "old", *command, *CPU).err
    assert said.endswith("6 images\nleft out, since trained on: 6 of them\n")


def test_new_images_of_families_that_were_learnt_are_left_out_and_a_new_family_counts_as_one_image(
    make_folder, tmp_path
):
    """The run knows three of four patients, by digests alone; three new ones are in each class."""
    patients = make_folder({"ape": 8, "bee": 8}, "patients")
    for number, path in enumerate(sorted(patients.rglob("*.jpg"))):
        path.rename(path.with_name(f"P{number % 4}_{number:02}.jpg"))
    flags = [*TINY, "--weights", "none", "--epochs", 1, "--group", "^(P[0-9])"]
    learnt = run(patients, *flags, "--output", tmp_path / "run").path
    known = {row["path"][4:6] for row in rows_of(learnt / "split.csv") if row["part"] == "train"}
    assert len(known) == 3
    new = make_folder({"ape": 9, "bee": 9}, "new", 40)
    names = {"ape": [*sorted(known)[:2], "P7"], "bee": [*sorted(known)[1:], "P5"]}
    for number, path in enumerate(sorted(new.rglob("*.jpg"))):
        path.rename(path.with_name(f"{names[path.parent.name][number % 3]}_{number}.jpg"))
    *_, left_out, balanced, ape, bee = run(new, "--predict", learnt, *CPU).err.splitlines()
    assert left_out == "left out, since trained on: 12 of them"
    assert balanced.startswith("balanced accuracy ")
    for line, label in ((ape, "ape"), (bee, "bee")):
        assert line.split()[1:] == ["[0%,", "100%]", "of", "3", label]


def test_photos_are_found_at_any_depth_and_the_table_is_the_same_on_stdout_and_by_a_file(
    others, default_run, tmp_path
):
    """Behind links too, but not hidden. What cannot be read is named. A photo may be alone."""
    photos = tmp_path / "photos"
    (photos / ".trash").mkdir(parents=True)
    (tmp_path / "far/deep/er.jpg").mkdir(parents=True)
    (photos / "b").symlink_to(tmp_path / "far")
    names = ["b/A.JPG", "b/deep/er.jpg/x.png", "z.jpg", ".trash/x.jpg", "b/._A.jpg"]
    for image, name in zip(sorted(others.rglob("*.jpg")), names, strict=False):
        shutil.copy(image, photos / name)
    for name in ("b/notes.txt", "b/text.png"):
        (photos / name).write_text("not a photo")
    said = run(photos, "--predict", default_run.path, *CPU, "--output", tmp_path / "x.csv").err
    assert said.endswith("3 images\n") and said.count("; left out\n") == 1
    assert f"warning: {photos / 'b/text.png'}: " in said
    rows = rows_of(tmp_path / "x.csv")
    assert [Path(row["path"]).relative_to(photos).as_posix() for row in rows] == names[:3]
    assert list(rows[0]) == [*COLUMNS, *CLASSES]
    printed = run(photos, "--predict", default_run.path / "network.pt", *CPU).out
    assert (tmp_path / "x.csv").read_text() == printed
    shutil.copy(default_run.path / "network.pt", tmp_path / "renamed.pth")
    single = run(photos / "b/A.JPG", "--predict", tmp_path / "renamed.pth", *CPU).out
    [head, line] = [line.split(",")[:2] for line in single.splitlines()]
    assert (head, line) == (COLUMNS[:2], [str(photos / "b/A.JPG"), rows[0]["class"]])


@pytest.mark.parametrize("white", [0, 4095])  # as of a run that saw 8 bits alone, or 12
def test_a_photo_of_more_bits_is_as_bright_as_the_same_of_8(white, default_run, tmp_path):
    """Though it has no white in it. What is brighter than white is told."""
    torch.save(network_of(default_run.path) | {"white": white}, tmp_path / "run.pt")
    grey = np.random.default_rng(0).integers(0, 90, (32, 32))
    (tmp_path / "new").mkdir()
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "new/8.png")
    deep = (grey * (white or 65535) // 255).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "new/deep.png")
    plain, other = predict(tmp_path / "new", tmp_path / "run.pt", tmp_path / "x.csv")
    for name in CLASSES:
        assert float(other[name]) == pytest.approx(float(plain[name]), abs=1e-6)
    Image.fromarray(np.uint16([[7000]])).save(tmp_path / "new/bright.png")
    said = run(tmp_path / "new", "--predict", tmp_path / "run.pt", *CPU).err
    text = "grey values reach 7000; those above 4095 are shown as white, as in training"
    assert (f"warning: {tmp_path / 'new'}: {text}\n" in said) is (white > 0)


def test_a_program_gets_the_probabilities_of_the_table(default_run, tmp_path):
    """Of a photograph that is turned, transparent, deep, or so large that it is shrunk."""
    noise = np.random.default_rng(0).integers(256, size=(3, 4, 4), dtype=np.uint8)
    picture, exif = Image.fromarray(noise[..., :3]).resize((48, 36)), Image.Exif()
    exif[274] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(noise, "RGBA").resize((48, 36)).save(tmp_path / "clear.png")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 200).save(tmp_path / "deep.tif")
    picture.resize((480, 360)).save(tmp_path / "large.jpg")
    network, prepare, classes = training.load_network(default_run.path)
    rows = predict(tmp_path, default_run.path, tmp_path / "x.csv")
    assert len(rows) == 4 and classes == CLASSES
    for row in rows:
        said = network(prepare(row["path"])[None]).softmax(1)[0].tolist()
        assert [float(row[name]) for name in CLASSES] == pytest.approx(said, abs=1e-5)


def test_a_table_that_nobody_reads_to_the_end_is_one_line(default_run, others):
    """As in `... | true`."""

    def close_and_predict(command: list[str]) -> int:
        end, start = os.pipe()
        os.close(end)
        os.dup2(start, 1)
        return training.main(command)

    process = Process(others, "--predict", default_run.path, *CPU, main=close_and_predict)
    line = "data_training.py: error: stdout was closed before all was written; write to --output "
    assert process.end(2)[1] == f"{line}FILE\n"
