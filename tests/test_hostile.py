"""Both scripts against names, files and disks that nobody would wish for."""

import io
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import load, network_of, png, prepare, rows_of, run, write_folder
from PIL import Image

import data_creation as creation
import data_training as training

Said = pytest.CaptureFixture[str]
TINY = ["--weights", "none", "--image-size", "32", "--device", "cpu", "--epochs", "1"]
linux = pytest.mark.skipif(sys.platform != "linux", reason="names are any bytes, /proc, mount")

NAMES = [
    *("with space", "quo\"te'", "new\nline", "carriage\rreturn", "-dash", os.fsdecode(b"caf\xe9")),
    *("x" * 255, "\u05e9\u05dc\u05d5\u05dd e\u0301", "Cat", "cat"),  # right to left; combining
]


def main(*arguments: object) -> int:
    return training.main([*map(str, arguments)])


def one_error(capsys: Said, script: str = "data_training.py") -> str:
    """The last line on stderr, which is the only one that is an error, without a traceback."""
    error = capsys.readouterr().err.replace("\r", "\n")
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith(f"{script}: error: ")]
    assert len(lines) == 1 and error.rstrip().endswith(lines[0])
    return lines[0]


@linux
def test_names_survive_copying_training_splitting_and_predicting(tmp_path: Path) -> None:
    plain = write_folder(tmp_path / "plain", {str(index): 6 for index in range(len(NAMES))})
    for index, name in enumerate(NAMES):
        (tmp_path / "src" / name).mkdir(parents=True)
        for number, path in enumerate(sorted((plain / str(index)).iterdir())):
            path.rename(tmp_path / "src" / name / f"{name[:200]}{number}.jpg")
    src, out, first, second = (tmp_path / name for name in ("src", "out", "run", "next"))
    assert creation.main([str(src), str(out), "--step", "0", "--manifest", f"{out}.csv"]) == 0
    listed = [row["path"] for row in rows_of(Path(f"{out}.csv"))]
    assert len(listed) == 60 and all((out / path).is_file() for path in listed)
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


def jpeg_bomb() -> bytes:
    """A small JPEG that claims 65,000 x 65,000 pixels."""
    stream = io.BytesIO()
    Image.new("RGB", (64, 64)).save(stream, "JPEG")
    content = bytearray(stream.getvalue())
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", 65_000, 65_000)
    return bytes(content)


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


FILES: dict[str, Callable[[Path], object]] = {
    "a PNG that claims too much": lambda path: path.write_bytes(BOMB),
    "a JPEG that claims too much": lambda path: path.write_bytes(jpeg_bomb()),
    "an empty file": lambda path: path.write_bytes(b""),
    "a text": lambda path: path.write_text("no image"),
    "the first half of an image": lambda path: path.write_bytes(
        Path("ape/ape_000.jpg").read_bytes()[:-100]
    ),
    "a pipe": os.mkfifo,
    "a socket": bind_socket,
}


@linux
@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_image_is_left_out_or_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    src = write_folder(tmp_path / "src", {"ape": 6, "bee": 6})
    monkeypatch.chdir(src)  # the path of a socket must be short
    FILES[kind](Path("ape/x.jpg"))
    data = load(src)
    assert "ape/x.jpg" not in data.names and data.unreadable == [str(src / "ape/x.jpg")]
    warnings = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(warnings) == 1 and warnings[0].count("ape/x.jpg: ") == 1
    with pytest.raises(training.DataError, match="ape/x.jpg: "):
        training.read_image(str(src / "ape/x.jpg"), {})


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_breaks_after_the_check_ends_the_run_in_one_line(
    workers: int, tmp_path: Path, capsys: Said
) -> None:
    src, output = write_folder(tmp_path / "src", {"ape": 6, "bee": 6}), tmp_path / "run"
    given, _ = prepare(src, *TINY, "--output", str(output))
    path = Path(given.data.paths[3])
    path.write_bytes(BOMB.ljust(path.stat().st_size, b"\0"))  # no other size: that is noticed
    assert main("--resume", output, "--workers", workers) == 2
    assert f"error: {path}: cannot be decoded" in one_error(capsys)


def test_a_folder_named_like_an_image_is_a_folder(tmp_path: Path) -> None:
    src = write_folder(tmp_path / "src", {"ape": 6, "bee": 6})
    (src / "ape/y.jpg").mkdir()
    (src / "ape/ape_003.jpg").rename(src / "ape/y.jpg/z.jpg")
    assert creation.main([str(src), str(tmp_path / "out"), "--step", "0"]) == 0
    assert (tmp_path / "out/ape/y.jpg/z.jpg").is_file()
    data = load(tmp_path / "out")
    assert "ape/y.jpg/z.jpg" in data.names and len(data.names) == 12


@linux
@pytest.mark.parametrize("parent", ["/proc", "/proc/none"])
def test_a_parent_that_cannot_be_written_is_named(
    parent: str, tmp_path: Path, capsys: Said
) -> None:
    src = write_folder(tmp_path / "src", {"ape": 6, "bee": 6})
    assert creation.main([str(src), f"{parent}/out", "--step", "0"]) == 2
    assert "/proc" in one_error(capsys, "data_creation.py")
    assert main(src, *TINY, "--output", f"{parent}/run") == 2
    assert "/proc" in one_error(capsys)


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
def test_a_disk_that_fills_up_during_training_leaves_whole_files(
    small_disk: Callable[[str], Path], tmp_path: Path, capsys: Said
) -> None:
    src = write_folder(tmp_path / "src", {"ape": 6, "bee": 6})
    disk = small_disk("size=150m")  # the start, the first state and one network fit
    assert main(src, *TINY, "--output", disk / "run") == 2
    error = one_error(capsys)
    assert "No space left on device" in error and ".pt: " in error and "--resume" in error
    assert not list((disk / "run").glob(".*"))
    for path in (disk / "run").glob("*.pt"):
        torch.load(path, weights_only=True)
    small_disk("remount,size=600m")
    assert main("--resume", disk / "run") == 0
    assert len(rows_of(disk / "run/history.csv")) == 1


@linux
def test_a_disk_that_fills_up_during_copying_is_left_empty(
    small_disk: Callable[[str], Path], tmp_path: Path, capsys: Said
) -> None:
    src = write_folder(tmp_path / "src", {"ape": 6, "bee": 6})
    disk = small_disk("size=9m,nr_inodes=10")  # room for the bytes, not for the files
    assert creation.main([str(src), str(disk / "out"), "--step", "0"]) == 2
    error = one_error(capsys, "data_creation.py")
    assert "No space left on device" in error and ".jpg" in error
    assert not list(disk.iterdir())


def test_a_thousand_classes_and_as_many_links_to_one_image(tmp_path: Path, capsys: Said) -> None:
    src = write_folder(tmp_path / "src", {"ape": 6, "bee": 6})
    for number in range(1000):
        (tmp_path / f"many/class {number}").mkdir(parents=True)
        os.link(src / "ape/ape_000.jpg", tmp_path / f"many/class {number}/0.jpg")
        os.link(src / "ape/ape_000.jpg", src / f"ape/link{number}.jpg")
    out = tmp_path / "out"
    assert creation.main([str(tmp_path / "many"), str(out), "--step", "0", "--link"]) == 0
    assert "kept 1000 of 1000 images in 1000 classes" in capsys.readouterr().out
    data = load(src)
    assert len(data.paths) == 1012
    assert not any("link" in data.names[index] for index in data.val(0).tolist())


def test_a_head_on_features_ten_times_as_large_comes_to_the_same_predictions(
    animals: Path, pretrained: Path, tmp_path: Path
) -> None:
    """Weights for the same function in another scale."""
    state, tables = torch.load(pretrained, weights_only=True), []
    for _ in range(2):
        torch.save(state, tmp_path / "w.pth")
        output = tmp_path / f"run {len(tables)}"
        flags = ["--weights", tmp_path / "w.pth", "--epochs", 1, "--frozen-epochs", 1, "--no-amp"]
        run(animals, *flags, "--image-size", 32, "--device", "cpu", "--output", output)
        tables.append(rows_of(output / "predictions.csv"))
        for norm in ("layer4.0.bn2", "layer4.0.downsample.1", "layer4.1.bn2"):
            state[f"{norm}.weight"] *= 10
            state[f"{norm}.bias"] *= 10
        state["layer4.1.conv1.weight"] /= 10
    for one, other in zip(*tables, strict=True):
        assert one["predicted"] == other["predicted"]
        said = [float(row["true_probability"]) for row in (one, other)]
        assert said[0] == pytest.approx(said[1], abs=0.01)
