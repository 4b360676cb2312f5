"""What `data_training.py` promises of runs that are stopped or moved, and of copies they keep."""

import math
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, Process, interrupt_after, prepare, refused, rows_of, run
from PIL import Image

import data_training as training

TIMES = ("images_per_second", "seconds")
FOLDS = ["--folds", "3", "--epochs", "1", "--val", "all"]
# Flags, and the seconds between two times that the state of an unfinished fold is stored.
KINDS = {"default": (["--epochs", "2"], 0.0), "folds": (FOLDS, 0.0), "seldom": (FOLDS, math.inf)}
# The kind of run, the file that is being written, and for which time.
MOMENTS = {
    "default resume.pt 2": "nothing is trained",
    "default network.pt 1": "the linear probe is stored, its files are not",
    "default resume.pt 3": "the first epoch is done, but the state is of the linear probe",
    "default network.pt 2": "the first epoch is stored, its files are not",
    "default fold-1.pt 1": "all epochs are stored, the fold is not",
    "default resume.pt 5": "the fold is stored, but the state is of the last epoch",
    "default network.pt 4": "so is the state, but the network is of the last epoch",
    "default report.html 4": "all is stored, but for the page",
    "folds fold-1.pt 1": "all epochs of the first fold are stored, the fold is not",
    "folds network.pt 3": "the first fold is stored, its files are not",
    "folds resume.pt 5": "between the first fold and the second",
    "folds resume.pt 6": "the second fold had its epoch, but the state is of its linear probe",
    "folds resume.pt 7": "the second fold is stored, but the state is of its last epoch",
    "folds resume.pt 10": "all folds are stored, but the state is of the last epoch",
    "folds test_predictions.csv 1": "all folds are stored, the result is not",
    "seldom fold-1.pt 1": "the first fold is trained, but the state is of the beginning",
    "seldom resume.pt 2": "so it is, but the fold is stored",
    "seldom resume.pt 3": "the second fold is stored, but the state is of the end of the first",
}


def assert_same_run(one: Path, other: Path) -> None:
    """The same files, to the last byte, but for times and what depends on the folder's name."""
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    for path in one.iterdir():
        if path.name == "network.pt" or path.suffix == ".csv" and path.name != "history.csv":
            assert path.read_bytes() == (other / path.name).read_bytes(), path.name
    histories = [
        [{k: v for k, v in row.items() if k not in TIMES} for row in rows_of(each / "history.csv")]
        for each in (one, other)
    ]
    assert histories[0] == histories[1]


@pytest.fixture(scope="module")
def recorded(animals, others, pretrained, tmp_path_factory):
    """Runs of all kinds; in "kept" their folders as a kill at each moment would leave them."""
    root, seen = tmp_path_factory.mktemp("recorded"), Counter[Path]()

    def keep(_: int) -> None:
        for unfinished in root.glob("*/.*.partial"):
            seen[unfinished] += 1
            name = unfinished.name[1:].removesuffix(".partial")
            moment = f"{unfinished.parent.name} {name} {seen[unfinished]}"
            if moment in MOMENTS:
                kept = root / "kept" / moment
                shutil.copytree(unfinished.parent, kept, copy_function=os.link)
                (kept / unfinished.name).unlink()
                (kept / unfinished.name).write_bytes(b"half of it")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", keep)
        patch.chdir(animals.parent)
        for kind, (flags, seconds) in KINDS.items():
            patch.setattr(training, "WRITE_EVERY", seconds)
            run("animals", "--weights", pretrained, *flags, *TINY, "--output", root / kind)
    return root


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_goes_on_from_any_moment_to_the_same_bytes(moment, recorded, tmp_path, monkeypatch):
    copy = tmp_path / "moved"
    shutil.copytree(recorded / "kept" / moment, copy, copy_function=os.link)
    # On a CPU that would take bfloat16, from another folder, and in another.
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": 1}, raising=False)
    monkeypatch.chdir(tmp_path)
    printed = run("--resume", "moved").out
    assert "cpu, float32, processes: 1" in printed  # as --no-amp had said
    kind = moment.partition(" ")[0]
    rows = 3 if kind == "default" else 6  # what was there before is shown as well
    assert sum(line.startswith((" 1/", " 2/", " 3/")) for line in printed.splitlines()) == rows
    assert_same_run(recorded / kind, copy)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_stopped_leaves_a_run_that_goes_on(
    number, default_run, animals, pretrained, tmp_path
):
    """A worker may live on for a while, and does not hold the folder."""
    command, output = [animals, "--weights", pretrained, "--epochs", 2, *TINY], tmp_path / "run"
    process = Process(*command, "--workers", 1, "--output", output, rest=0.5)
    process.wait_for(lambda: "\n 1/1    1/2 " in process.printed()[0])
    process.kill(number)
    _, error = process.end(130 if number == signal.SIGINT else -9)
    last = f"data_training.py: interrupted; go on with --resume {output}\n"
    assert error == (last if number == signal.SIGINT else "")
    run("--resume", output)
    assert_same_run(default_run.path, output)


def test_a_linear_probe_that_fails_costs_nothing_that_is_stored(
    folds_run, animals, others, pretrained, tmp_path, monkeypatch, capsys
):
    """The features of the second fold are no numbers, and then they are."""
    fit_probe, calls = training.fit_probe, Counter[str]()

    def fit_or_fail(features, labels, weights):
        calls["probe"] += 1
        return fit_probe(features * (math.nan if calls["probe"] == 2 else 1), labels, weights)

    flags = ["--folds", 3, "--val", others, "--epochs", 1, *TINY]
    with monkeypatch.context() as patch:
        patch.setattr(training, "fit_probe", fit_or_fail)
        command = [animals, "--weights", pretrained, *flags, "--output", tmp_path / "run"]
        error = refused(command, capsys)[-1]
    text = "the loss of the linear probe became nan; try --no-amp or other weights; go on with"
    assert error.endswith(f"error: {text} --resume {tmp_path / 'run'}")
    assert len(torch.load(tmp_path / "run/network.pt")["networks"]) == 1
    run("--resume", tmp_path / "run")
    assert_same_run(folds_run.path, tmp_path / "run")


@pytest.fixture
def begun(animals: Path, tmp_path: Path) -> Path:
    """A run that has just begun, on images that may be changed."""
    shutil.copytree(animals, tmp_path / "animals")
    command = ["--weights", "none", "--epochs", "2", *TINY]
    return interrupt_after(1, [str(tmp_path / "animals"), *command], tmp_path / "run")


@pytest.mark.parametrize("change", ["gone", "changed", "new"])
def test_an_image_that_is_gone_changed_or_new_is_named(change, begun, capsys):
    name = rows_of(begun / "split.csv")[-1]["path"]
    image = begun.parent / "animals" / name
    if change == "gone":
        image.unlink()
    elif change == "changed":
        image.write_bytes(image.read_bytes() + b" ")
    else:
        name = f"{name.partition('/')[0]}/a.jpg"
        Image.new("RGB", (32, 32)).save(image.with_name("a.jpg"))
    [error] = refused(["--resume", begun], capsys, begun)
    assert (
        f"animals: {name} is gone, new or changed since the run began; restore it as it was"
        in error
    )


@pytest.mark.parametrize("name", [training.STATE, training.START])
def test_a_damaged_state_and_one_of_another_version_are_named(name, begun, capsys):
    content = (begun / name).read_bytes()
    (begun / name).write_bytes(content[: len(content) // 2])
    [error] = refused(["--resume", begun], capsys, begun)
    damaged = "this file is damaged, or was not written by torch.save; pass another"
    assert f"--resume {begun / name}: {damaged}" in error
    torch.save({"format": training.FORMAT + 1, "version": "9.1"}, begun / training.STATE)
    [error] = refused(["--resume", begun], capsys, begun)
    versions = "this was written by version 9.1 of the script, and this is version "
    versions += f"{training.__version__}; use that one, or train again"
    assert f"--resume {begun / training.STATE}: {versions}" in error


def test_a_run_that_another_process_has_finished_is_not_gone_on_with(begun, monkeypatch, capsys):
    lock = training.lock_folder
    monkeypatch.setattr(
        training, "lock_folder", lambda x, flag: lock(x, flag) or (x / training.STATE).unlink()
    )
    [error] = refused(["--resume", begun], capsys)
    told = "there is no stopped run in it, or the run is complete; name the folder of a run that"
    assert error.endswith(f"error: --resume {begun}: {told} was stopped")


def test_a_folder_that_another_run_has_filled_meanwhile_stays_as_it_is(
    animals, default_run, tmp_path, monkeypatch, capsys
):
    load_model, output = training.load_model, tmp_path / "run"

    def load_and_fill(*arguments):
        shutil.copytree(default_run.path, output)
        return load_model(*arguments)

    monkeypatch.setattr(training, "load_model", load_and_fill)
    [error] = refused([animals, "--weights", "none", *TINY, "--output", output], capsys)
    told = "this is not an empty folder; name a new one, or go on with the run in it by --resume"
    assert error.endswith(f"error: --output {output}: {told}")
    (output / training.LOCK).unlink()
    assert_same_run(default_run.path, output)


def test_what_is_said_beside_resume_holds_and_moments_follow_the_layout_of_weights(begun):
    """The optimizer's kernels read weights and moments in the order of memory."""
    setup, progress, model = prepare("--resume", begun)
    stored = progress.trainer["optimizer"]["state"]
    for state in stored.values():
        state["exp_avg"] = state["exp_avg"].contiguous()  # as from where that is the layout
    optimizer, differ = training.begin_fine_tuning(setup, progress, model, 0).optimizer, 0
    for weight, before in zip(optimizer.state, stored.values(), strict=True):
        after = optimizer.state[weight]["exp_avg"]
        assert after.stride() == weight.stride()
        assert torch.equal(after, before["exp_avg"])
        differ += before["exp_avg"].stride() != weight.stride()
    assert differ
    assert "cpu, bfloat16" in run("--resume", begun, "--workers", "1", "--amp").out.splitlines()[0]


# Crops of 24 pixels need 40 a side: what has over twice the pixels of 40 x 40 is shrunk.
SIDES = {(40, 40): 40, (56, 90): 56, (57, 90): 40, (90, 57): 40, (300, 400): 40, (20, 999): 20}
SMALL = ["--weights", "none", "--image-size", "24", "--batch-size", "12", "--epochs", "2"]
SMALL += ["--power", "0", "--arch", "resnet18", "--device", "cpu", "--no-amp"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sides", SIDES)
def test_an_image_of_over_twice_the_pixels_is_shrunk_smoothly(sides, channels, tmp_path):
    cells = np.random.default_rng(0).integers(256, size=(*sides, channels), dtype=np.uint8)
    picture, shorter = Image.fromarray(cells.squeeze()), SIDES[sides]
    picture.save(tmp_path / "x.png")
    shrunk = training.read_image(str(tmp_path / "x.png"), 255, training.least_side(24))
    height, width = (int(side * shorter / min(sides)) for side in sides)
    assert shrunk.shape == (3, height, width)
    expected = picture.resize((width, height), Image.Resampling.BILINEAR)  # of all it covers
    difference = shrunk.permute(1, 2, 0).int().numpy() - np.array(expected.convert("RGB"), int)
    assert np.abs(difference).max() <= (1 if shorter < min(sides) else 0)


def test_copies_change_no_pixel_are_read_again_and_go_at_the_end(
    make_folder, tmp_path, monkeypatch
):
    """In each of two classes there are three large images and two small ones."""
    large = make_folder({"ape": 3, "bee": 3}, size=250)
    for image in make_folder({"ape": 5, "bee": 5}, "small").rglob("*_00[34].jpg"):
        image.rename(large / image.parent.name / image.name)
    usual = run(large, *SMALL, "--output", tmp_path / "usual", "--workers", 2).path
    assert not (usual / training.COPIES).exists()
    output = interrupt_after(1, [str(large), *SMALL], tmp_path / "run")
    copies = {path.name for path in (output / training.COPIES).iterdir()}
    assert copies == {f"{index}.npy" for index in (0, 1, 2, 5, 6, 7)}
    opened: list[str] = []
    cut, empty = (output / training.COPIES / f"{at}.npy" for at in (0, 1))
    cut.write_bytes(cut.read_bytes()[:-1])  # they are read from the originals
    empty.write_bytes(b"")
    read_image = training.read_image
    monkeypatch.setattr(training, "read_image", lambda *x: opened.append(x[0]) or read_image(*x))
    monkeypatch.setattr(training, "make_page", lambda _: b"")  # which shows the originals
    run("--resume", output, "--workers", 0)
    small = {f"{name}_00{at}.jpg" for name in ("ape", "bee") for at in (3, 4)}
    assert {Path(path).name for path in opened} == {"ape_000.jpg", "ape_001.jpg", *small}
    assert_same_run(usual, output)


def test_an_image_that_went_from_one_folder_to_another_is_named(
    animals, others, pretrained, tmp_path, capsys
):
    """From DATA to `--val`, under its name: it was trained on and would be validated on."""
    data, val = (Path(shutil.copytree(each, tmp_path / each.name)) for each in (animals, others))
    command = [str(data), "--weights", str(pretrained), "--val", str(val), "--epochs", "2", *TINY]
    output = interrupt_after(1, command, tmp_path / "run")
    (data / "ape/ape_000.jpg").rename(val / "ape/ape_000.jpg")
    error = refused(["--resume", output], capsys, output)[-1]
    assert "ape/ape_000.jpg is gone, new or changed since the run began" in error


def test_a_fold_that_is_gone_is_named(animals, pretrained, tmp_path, capsys):
    """Else the network of the second fold, in training, would stand for the first."""
    command = [str(animals), "--weights", str(pretrained), "--folds", "3", "--epochs", "2", *TINY]
    output = interrupt_after(1, command, tmp_path / "run", fold=2)
    (output / "fold-1.pt").unlink()
    [error] = refused(["--resume", output], capsys, output)
    assert f"{output / 'fold-1.pt'}: this file is gone" in error


def test_a_resumed_run_still_says_that_its_weights_know_the_validation_images(
    animals, default_run, tmp_path
):
    command = [
        str(animals),
        "--weights",
        str(default_run.path),
        "--seed",
        "1",
        "--epochs",
        "2",
        *TINY,
    ]
    output = interrupt_after(1, command, tmp_path / "run")
    run("--resume", output)
    assert "The result is too good: the network of --weights was trained on" in (
        output / "report.html"
    ).read_text(encoding="utf-8")
