"""What `data_training.py` promises of large images: shrunk once, and their copies read after that.

Training crops of 24 pixels need 40 pixels a side: an image of over twice the pixels of 40 x 40 is
shrunk, from 57 pixels a side on.
"""

import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Process, prepare, run, torchrun, tree, write_folder
from PIL import Image
from test_resume import assert_same_run

import data_training as training

SMALL = ["--weights", "none", "--image-size", "24", "--batch-size", "12", "--epochs", "2"]
SMALL += ["--arch", "resnet18", "--device", "cpu", "--no-amp"]


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for temporary files, of processes that are started, too.

    Its path is short: workers make sockets below it, whose names have 107 characters at most.
    """
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 images: in each class 3 large JPEGs, 2 small ones, and of every other kind one large."""
    root = tmp_path_factory.mktemp("large") / "src"
    write_folder(root, {"ape": 3, "bee": 3}, size=250)
    for small in write_folder(root.parent / "small", {"ape": 5, "bee": 5}).rglob("*_00[34].jpg"):
        small.rename(root / small.relative_to(root.parent / "small"))
    stream = np.random.default_rng(0)
    for name in ("ape", "bee"):
        cells = stream.integers(256, size=(9, 12, 4), dtype=np.uint8).repeat(20, 0).repeat(20, 1)
        Image.fromarray(cells).save(root / name / "transparent.png")
        deep = cells[..., 0].astype(np.uint16) * 16
        Image.fromarray(deep).save(root / name / "deep.png")
        exif = Image.Exif()
        exif[274] = 6
        Image.fromarray(cells[..., :3]).save(root / name / "turned.jpg", exif=exif)
    return root


def kept(folder: Path) -> list[str]:
    """The copies that there are."""
    return sorted(path.name for path in folder.rglob("*.npy"))


SIDES = {(40, 40): 40, (56, 90): 56, (57, 90): 40, (90, 57): 40, (300, 400): 40, (20, 999): 20}


@pytest.mark.parametrize("sides", SIDES)
def test_an_image_of_over_twice_the_pixels_is_shrunk_smoothly_and_no_other_changes(
    sides, temporary
):
    least = training.least_side(training.parse_args(["x", "--image-size", "24"]))
    cells = np.random.default_rng(0).integers(256, size=(*sides, 3), dtype=np.uint8)
    picture, shorter = Image.fromarray(cells), SIDES[sides]
    picture.save(temporary / "x.png")
    shrunk = training.read_image(str(temporary / "x.png"), {}, least)
    height, width = (int(side * shorter / min(sides)) for side in sides)
    assert least == 40 and shrunk.shape == (3, height, width) and shrunk.dtype == torch.uint8
    expected = picture.resize((width, height), Image.Resampling.BILINEAR)  # of all it covers
    error = np.abs(shrunk.permute(1, 2, 0).numpy().astype(int) - np.array(expected)).max()
    assert error <= (1 if shorter < min(sides) else 0)


def views(reader: training.Reader) -> torch.Tensor:
    """Views of all images in training, and then in evaluation: (2N, 24, 24, 3)."""
    every = torch.arange(16)
    drawn = training.cut_batches(every, 5, training.seeded("augment", 0, 1))
    passes = (drawn, training.cut_batches(every, 5))
    return torch.cat([images for batches in passes for images, _ in reader.read(batches, "")])


def fill_disk(monkeypatch: pytest.MonkeyPatch, folder: Path, room: int) -> None:
    """A disk below `folder` with so many bytes free as long as no copy is there."""
    real = shutil.disk_usage

    def usage(path: str) -> Any:
        used = sum(file.stat().st_size for file in folder.rglob("*.npy"))
        below = Path(path).is_relative_to(folder)
        return real(path)._replace(free=room - used) if below else real(path)

    monkeypatch.setattr(shutil, "disk_usage", usage)


def test_a_large_grey_image_is_shrunk_as_one_of_three_equal_channels(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (90, 70), dtype=np.uint8)
    for name, picture in (("one", values), ("three", np.stack([values] * 3, 2))):
        Image.fromarray(picture).save(tmp_path / f"{name}.tif")
    grey, colour = (
        training.read_image(str(tmp_path / f"{x}.tif"), {}, 30) for x in ("one", "three")
    )
    assert grey.shape == (3, 38, 30) and torch.equal(grey, colour)
    assert grey.stride() == colour.stride()


def test_copies_change_no_pixel_and_are_read_instead_of_the_originals(
    large, temporary, tmp_path, monkeypatch
):
    """Whatever the number of workers, and where there is no room for copies."""
    folder = shutil.copytree(large, tmp_path / "src")
    seen = []
    for workers in ("0", "2"):
        flags = ["--workers", workers, "--output", str(tmp_path / f"run{workers}")]
        given, _ = prepare(folder, *SMALL, *flags)
        reader = training.Reader(given)
        seen += [views(reader), views(reader)]
        assert len(kept(temporary)) == 12
        del reader
        assert not list(temporary.iterdir())
    reader = training.Reader(given)
    with monkeypatch.context() as patch:
        fill_disk(patch, temporary, 0)
        seen.append(views(training.Reader(given)))
        assert not kept(temporary)
    for again in seen[1:]:
        assert torch.equal(seen[0], again)
    views(reader)
    shrunk = [int(name.partition(".")[0]) for name in kept(temporary)]
    for index in shrunk:
        Path(given.data.paths[index]).unlink()
    assert torch.equal(seen[0], views(reader))
    small = next(path for path in given.data.paths if "_003" in path)
    Path(small).unlink()
    with pytest.raises(training.DataError, match=f"{re.escape(small)}: no regular file"):
        views(reader)


def test_copies_take_a_quarter_of_the_free_disk_at_most(large, temporary, tmp_path, monkeypatch):
    given, _ = prepare(large, *SMALL, "--output", str(tmp_path / "run"))
    fill_disk(monkeypatch, temporary, 4 * 30_000)
    reader = training.Reader(given)
    views(reader)
    sizes = [path.stat().st_size for path in temporary.rglob("*.npy")]
    assert 20_000 < sum(sizes) <= 30_000 and len(sizes) < 12


def test_a_run_says_how_many_copies_it_reads_and_ends_alike_without_room(
    large, pretrained, temporary, tmp_path, monkeypatch
):
    command = [large, *SMALL, "--weights", pretrained, "--frozen-epochs", 1, "--output"]
    usual = run(*command, tmp_path / "usual")
    start = f"copies of 12 images so far, 0.0 GB, in {temporary}/data_training-copies-"
    assert usual.err.count("copies of") == usual.err.count(start) == 1
    fill_disk(monkeypatch, temporary, 0)
    full = run(*command, tmp_path / "full")
    assert "copies of" not in full.err
    assert_same_run(usual.path, full.path)
    assert not list(temporary.iterdir())


def test_two_processes_share_copies(large, temporary, tmp_path):
    flags = ["--epochs", 1, "--workers", 1, "--output", tmp_path / "run"]
    done = torchrun(large, *SMALL, *flags)
    assert len(re.findall(r"copies of \d+ images so far, 0.0 GB, in ", done.stderr)) == 1
    assert not list(temporary.glob("data_training*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_copies_go_with_the_run_and_after_kill_at_the_next_start(
    number, large, temporary, tmp_path
):
    """Also while workers are writing or the run is removing them; those of a live run stay."""
    workers = "0" if number == signal.SIGKILL else "3"
    flags = ["--workers", workers, "--output", str(tmp_path / "run")]
    process = Process(large, *SMALL, *flags)
    process.wait_for(lambda: kept(temporary))
    (temporary / "data_training-copies-").mkdir()  # of no run
    training.make_copies()
    assert len(list(temporary.glob("data_training*"))) == 3  # not what workers talk through
    process.kill(number)
    process.end(-9 if number == signal.SIGKILL else 128 + number)
    assert bool(kept(temporary)) is (number == signal.SIGKILL)
    for folder in temporary.glob("*/kept"):
        folder.rename(folder.with_name("removed"))
    training.remove_leftovers.cache_clear()
    training.remove_leftovers(str(temporary))
    assert [path.name for path in temporary.glob("data_training*")] == ["data_training-copies-"]


def test_where_no_folder_can_be_made_originals_are_read(large, tmp_path, monkeypatch):
    given, _ = prepare(large, *SMALL, "--output", str(tmp_path / "run"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    before = tree(tmp_path)
    views(training.Reader(given))
    assert tree(tmp_path) == before
