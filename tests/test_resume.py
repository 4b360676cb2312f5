"""What `data_training.py` promises of runs that are stopped or moved, and of copies they keep.

A process that is killed leaves its folder as it is at that moment. So a run is recorded once, its
folder kept at each of the moments below, and each of these goes on and must end as the run did.
"""

import math
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    TINY,
    Process,
    begin,
    interrupt_after,
    prepare,
    refused,
    rows_of,
    run,
    write_folder,
)
from PIL import Image

import data_training as training

TIMES = ("images_per_second", "seconds")
# The file that is being written, and for which time.
MOMENTS = {
    "resume.pt 2": "nothing is trained",
    "network.pt 1": "the head is stored, its files are not",
    "resume.pt 3": "the first epoch of all layers is trained, but the state is of the head",
    "fold-1.pt 1": "the network is trained, but the state is of the epoch before",
    "resume.pt 4": "so it is, but the network is stored",
    "network.pt 4": "all epochs are stored, the result is not",
    "report.html 4": "the result is stored, but for the page",
}
FOLD_MOMENTS = {
    "resume.pt 4": "between the first fold and the second",
    "fold-2.pt 1": "the second fold is trained, but the state is of its head",
    "resume.pt 7": "the last network is stored, but the state is of its head",
    "test_predictions.csv 1": "all epochs are stored, the result is not",
}
SETTINGS = {"default": (["--epochs", "2"], MOMENTS), "folds": (["--folds", "3"], FOLD_MOMENTS)}


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
def recorded(
    animals: Path, others: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Runs of both kinds, named by relative paths, and copies of their folders at each moment."""
    root, kept = tmp_path_factory.mktemp("recorded"), {}
    seen = Counter[Path]()

    def keep(_: int) -> None:
        for kind, (_, moments) in SETTINGS.items():
            for unfinished in (root / kind).glob(".*.partial"):
                seen[unfinished] += 1
                moment = f"{unfinished.name[1:].removesuffix('.partial')} {seen[unfinished]}"
                if moment in moments:
                    copy = kept[f"{kind} {moment}"] = root / f"{kind} {moment}"
                    shutil.copytree(root / kind, copy, copy_function=os.link)
                    (copy / unfinished.name).unlink()
                    (copy / unfinished.name).write_bytes(b"half of it")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "WRITE_EVERY", 0.0)
        patch.setattr(os, "fsync", keep)
        patch.chdir(animals.parent)
        for kind, (flags, _) in SETTINGS.items():
            flags = [*flags, "--val", others.name] if kind == "folds" else flags
            flags += [] if kind == "default" else ["--epochs", "1"]
            command = ["animals", "--weights", pretrained, *flags, *TINY]
            kept[kind] = run(*command, "--output", root / kind).path
    return kept


@pytest.mark.parametrize(
    "moment", [f"{kind} {each}" for kind in SETTINGS for each in SETTINGS[kind][1]]
)
def test_a_run_goes_on_from_any_moment_to_the_same_bytes(moment, recorded, tmp_path, monkeypatch):
    copy = shutil.copytree(recorded[moment], tmp_path / "moved", copy_function=os.link)
    # On a CPU that would take bfloat16, from another folder, and in another.
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": 1}, raising=False)
    monkeypatch.chdir(tmp_path)
    printed = run("--resume", "moved").out
    assert "; cpu, float32, " in printed  # as --no-amp had said
    kind, _, _ = moment.partition(" ")
    rows = 3 if kind == "default" else 6  # what was there before is shown as well
    assert sum(line.startswith((" 1/", " 2/", " 3/")) for line in printed.splitlines()) == rows
    assert_same_run(recorded[kind], copy)


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


@pytest.mark.parametrize("kept", ["all", "head"])
def test_a_failed_trial_and_a_head_kept_alone_are_remembered(
    kept, animals, pretrained, tmp_path, monkeypatch
):
    monkeypatch.setattr(training, "FEWEST_EFFECTIVE", 1)
    monkeypatch.setattr(training, "SURE", math.inf if kept == "all" else -math.inf)
    monkeypatch.setattr(training, "TRIAL_STEPS", 3)  # an epoch
    monkeypatch.setattr(training, "TRIAL_FAILS", 0.0)
    command = [str(animals), "--weights", str(pretrained), "--epochs", "5", *TINY]
    whole = run(*command, "--output", tmp_path / "whole").path
    stages = [row["stage"] for row in rows_of(whole / "history.csv")]
    assert stages == ["head", "trial", *["upper"] * 4]
    interrupt_after(2, command, tmp_path / "run")
    monkeypatch.setattr(training, "TRIAL_FAILS", 0.0)
    run("--resume", tmp_path / "run")
    assert_same_run(whole, tmp_path / "run")


@pytest.fixture
def begun(animals: Path, tmp_path: Path) -> Path:
    """A run that has just begun, on images that may be changed."""
    shutil.copytree(animals, tmp_path / "animals")
    command = ["--weights", "none", "--epochs", "2", *TINY]
    return interrupt_after(1, [str(tmp_path / "animals"), *command], tmp_path / "run")


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("change", ["gone", "changed", "new"])
def test_an_image_that_is_gone_changed_or_new_is_named(part, change, begun, capsys):
    name = next(row["path"] for row in rows_of(begun / "split.csv") if row["part"] == part)
    image = begun.parent / "animals" / name
    if change == "gone":
        image.unlink()
    elif change == "changed":
        image.write_bytes(image.read_bytes() + b" ")
    else:
        name = f"{name.partition('/')[0]}/a.jpg"
        Image.new("RGB", (32, 32)).save(image.with_name("a.jpg"))
    [error] = refused(["--resume", begun], capsys, begun)
    assert f"animals: {name}: gone, new or changed since the run began" in error


@pytest.mark.parametrize("name", [training.STATE, training.START])
def test_a_damaged_state_is_named_and_one_that_would_run_code_is_never_run(name, begun, capsys):
    content = (begun / name).read_bytes()
    (begun / name).write_bytes(content[: len(content) // 2])
    [error] = refused(["--resume", begun], capsys, begun)
    assert f"{name}: damaged, or not of tensors alone" in error

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(begun.parent / "sprung"),)

    torch.save({"settings": {}, "trap": Trap()}, begun / name)
    [error] = refused(["--resume", begun], capsys, begun.parent)
    assert f"{name}: damaged" in error
    torch.save({"format": training.STATE_FORMAT + 1}, begun / training.STATE)
    [error] = refused(["--resume", begun], capsys, begun)
    assert f"--resume {begun}: stopped by another version of this script" in error


def test_what_is_said_beside_resume_holds_and_moments_follow_the_layout_of_weights(begun):
    """The optimizer's kernels read weights and moments in the order of memory."""
    given, progress = prepare("--resume", begun)
    stored = progress.trainer["optimizer"]["state"]
    for state in stored.values():
        state["exp_avg"] = state["exp_avg"].contiguous()  # as from where that is the layout
    optimizer, differ = begin(given, progress, 2).optimizer, 0
    for weight, before in zip(optimizer.state, stored.values(), strict=True):
        after = optimizer.state[weight]["exp_avg"]
        assert after.stride() == weight.stride()
        assert torch.equal(after, before["exp_avg"])
        differ += before["exp_avg"].stride() != weight.stride()
    assert differ
    assert "cpu, bfloat16" in run("--resume", begun, "--workers", "1", "--amp").out.splitlines()[0]


# ----------------------------------------------------------- large images and their copies

# Crops of 24 pixels need 40 a side: what has over twice the pixels of 40 x 40 is shrunk.
SIDES = {(40, 40): 40, (56, 90): 56, (57, 90): 40, (90, 57): 40, (300, 400): 40, (20, 999): 20}
SMALL = ["--weights", "none", "--image-size", "24", "--batch-size", "12", "--epochs", "2"]
SMALL += ["--power", "0", "--arch", "resnet18", "--device", "cpu", "--no-amp", "--output"]


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


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In each of two classes three large images and two small ones."""
    root = tmp_path_factory.mktemp("large") / "src"
    write_folder(root, {"ape": 3, "bee": 3}, size=250)
    for small in write_folder(root.parent / "small", {"ape": 5, "bee": 5}).rglob("*_00[34].jpg"):
        small.rename(root / small.relative_to(root.parent / "small"))
    return root


def copies(run: Path) -> list[str]:
    """The copies that a run has kept."""
    return sorted(path.name for path in (run / training.COPIES).glob("*.npy"))


def test_copies_change_no_pixel_are_read_again_and_go_at_the_end(large, tmp_path, monkeypatch):
    folder, output = shutil.copytree(large, tmp_path / "src"), tmp_path / "run"
    usual = run(folder, *SMALL, tmp_path / "usual", "--workers", 2).path
    assert copies(usual) == []
    interrupt_after(1, [str(folder), *SMALL[:-1]], output)
    assert copies(output) == [f"{place}.npy" for place in (0, 1, 2, 5, 6, 7)]
    opened: list[str] = []
    cut = output / training.COPIES / "0.npy"
    cut.write_bytes(cut.read_bytes()[:-1])  # is read from the original
    read_image = training.read_image
    monkeypatch.setattr(training, "read_image", lambda *x: opened.append(x[0]) or read_image(*x))
    monkeypatch.setattr(training, "make_page", lambda _: b"")  # which shows the originals
    run("--resume", output, "--workers", 0)
    names = {Path(path).name for path in opened}
    assert names == {
        "ape_000.jpg",
        *(f"{name}_00{at}.jpg" for name in ("ape", "bee") for at in (3, 4)),
    }
    assert_same_run(usual, output)


@pytest.mark.parametrize(("room", "count"), [(0, 0), (4 * 9_000, 2)])
def test_copies_take_a_quarter_of_the_free_disk_at_most(room, count, large, tmp_path, monkeypatch):
    """Each takes about 5,000 bytes."""
    real = shutil.disk_usage

    def usage(path: Path) -> Any:
        used = sum(file.stat().st_size for file in path.glob("*.npy"))
        return real(path)._replace(free=room - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    output = interrupt_after(1, [str(large), *SMALL[:-1]], tmp_path / "run")
    assert len(copies(output)) == count
