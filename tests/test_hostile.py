"""Both scripts against names, files and disks that nobody would wish for."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import load, network_of, png, refused, rows_of, write_folder

import data_creation as creation
import data_training as training

TINY = ["--weights", "none", "--image-size", "32", "--device", "cpu", "--epochs", "1"]
linux = pytest.mark.skipif(sys.platform != "linux", reason="names are any bytes, /proc, mount")

NAMES = [
    *("with space", "quo\"te'", "new\nline", "carriage\rreturn", "-dash", os.fsdecode(b"caf\xe9")),
    *("x" * 255, "\u05e9\u05dc\u05d5\u05dd e\u0301", "Cat", "cat"),  # right to left; combining
]


def main(*arguments: object) -> int:
    return training.main([*map(str, arguments)])


@pytest.fixture
def src(make_folder: Callable[..., Path]) -> Path:
    return make_folder({"ape": 6, "bee": 6})


@linux
def test_names_survive_copying_training_splitting_and_predicting(tmp_path, capsys):
    plain = write_folder(tmp_path / "plain", {str(index): 6 for index in range(len(NAMES))})
    for index, name in enumerate(NAMES):
        (tmp_path / "src" / name).mkdir(parents=True)
        for number, path in enumerate(sorted((plain / str(index)).iterdir())):
            path.rename(tmp_path / "src" / name / f"{name[:200]}{number}.jpg")
    src, out, first, second = (tmp_path / name for name in ("src", "out", "run", "next"))
    assert creation.main([str(src), str(out), "--step", "0", "--manifest", f"{out}.csv"]) == 0
    listed = rows_of(Path(f"{out}.csv"))
    assert len(listed) == 60 and all((out / row["path"]).is_file() for row in listed)
    assert {row["class"] for row in listed} == set(NAMES)
    report = capsys.readouterr().out.splitlines()
    assert len(report) == len(NAMES) + 4
    assert all(any(name in line for line in report) for name in (r"new\nline ", r"caf\udce9 "))
    assert main(out, *TINY, "--no-calibration", "--output", first) == 0
    said = rows_of(first / "predictions.csv")
    assert {row["class"] for row in said} == set(NAMES)
    assert all((out / row["path"]).is_file() for row in said)
    assert network_of(first)["classes"] == sorted(NAMES)
    again = ["--weights", first / "network.pt", "--epochs", "0", "--device", "cpu"]
    again += ["--split", first / "split.csv", "--baseline", first, "--output", second]
    assert main(out, *again) == 0
    assert {row["difference"] for row in rows_of(second / "comparison.csv")} <= {"0", "nan"}
    assert main(out, "--predict", first, "--device", "cpu", "--output", tmp_path / "x.csv") == 0
    predicted = {row["path"]: row["class"] for row in rows_of(tmp_path / "x.csv")}
    assert len(predicted) == 60
    assert all(predicted[str(out / row["path"])] == row["predicted"] for row in said)


BOMB = png(50_000, 50_000, 8, b"0")  # a small file that claims as many pixels


def bind_socket(path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


FILES: dict[str, Callable[[Path], object]] = {
    "an image that claims too much": lambda path: path.write_bytes(BOMB),
    "an empty file": lambda path: path.write_bytes(b""),
    "a text": lambda path: path.write_text("no image"),
    "most of an image": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "a pipe": lambda path: path.unlink() or os.mkfifo(path),
    "a socket": bind_socket,
}


@linux
@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_image_is_left_out_or_named(kind, src, monkeypatch, capsys):
    monkeypatch.chdir(src)  # the path of a socket must be short
    FILES[kind](Path("ape/ape_005.jpg").rename("ape/x.jpg"))
    data = load(src)
    assert "ape/x.jpg" not in data.names and data.unreadable == [str(src / "ape/x.jpg")]
    warnings = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(warnings) == 1 and warnings[0].count("ape/x.jpg: ") == 1
    with pytest.raises(training.DataError, match="ape/x.jpg: "):
        training.read_image(str(src / "ape/x.jpg"), {})


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_breaks_after_the_check_ends_the_run_in_one_line(
    workers, src, tmp_path, monkeypatch, capsys
):
    def check_and_break(paths, check=training.check_images):
        checked = check(paths)
        (src / "ape/ape_003.jpg").write_bytes(BOMB)
        return checked

    monkeypatch.setattr(training, "check_images", check_and_break)
    *_, error = refused([src, *TINY, "--output", tmp_path / "run", "--workers", workers], capsys)
    assert f"error: {src / 'ape/ape_003.jpg'}: cannot be decoded" in error


def test_a_folder_named_like_an_image_is_a_folder(src, tmp_path):
    (src / "ape/y.jpg").mkdir()
    (src / "ape/ape_003.jpg").rename(src / "ape/y.jpg/z.jpg")
    assert creation.main([str(src), str(tmp_path / "out"), "--step", "0"]) == 0
    assert (tmp_path / "out/ape/y.jpg/z.jpg").is_file()
    data = load(tmp_path / "out")
    assert "ape/y.jpg/z.jpg" in data.names and len(data.names) == 12


@linux
@pytest.mark.parametrize("parent", ["/proc", "/proc/none"])
def test_a_parent_that_cannot_be_written_is_named(parent, src, capsys):
    command = [src, f"{parent}/out", "--step", "0"]
    assert "/proc" in refused(command, capsys, script=creation)[-1]
    assert "/proc" in refused([src, *TINY, "--output", f"{parent}/run"], capsys)[-1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`small_disk("size=9m")` mounts a file system in memory; only root may."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(disk)]
        if shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
            pytest.skip("only root may mount a small disk")
        return disk

    yield mount
    subprocess.run(["umount", str(disk)], check=False, stderr=subprocess.DEVNULL)


@linux
def test_a_disk_that_fills_up_during_training_leaves_whole_files(small_disk, src, capsys):
    disk = small_disk("size=150m")  # the start, the first state and one network fit
    *_, error = refused([src, *TINY, "--output", disk / "run"], capsys)
    assert "No space left on device" in error and ".pt: " in error and "--resume" in error
    assert not list((disk / "run").glob(".*"))
    for path in (disk / "run").glob("*.pt"):
        torch.load(path, weights_only=True)
    small_disk("remount,size=600m")
    assert main("--resume", disk / "run") == 0
    assert len(rows_of(disk / "run/history.csv")) == 1
