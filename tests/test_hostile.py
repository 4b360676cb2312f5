"""Both scripts against names, files and disks that nobody would wish for."""

import io
import os
import shutil
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import load, rows_of, write_folder
from PIL import Image

import data_creation as creation
import data_training as training

TINY = ["--arch", "resnet18", "--weights", "none", "--image-size", "32", "--device", "cpu"]
linux = pytest.mark.skipif(sys.platform != "linux", reason="names are any bytes, /proc, mount")

NAMES = [
    *("with space", "quo\"te'", "new\nline", "carriage\rreturn", "-dash", os.fsdecode(b"caf\xe9")),
    *("x" * 255, "\u05e9\u05dc\u05d5\u05dd e\u0301", "Cat", "cat"),  # right to left; combining
]


def train(folder: Path, *arguments: object) -> int:
    """The exit status of one epoch on a tiny network."""
    return training.main([str(folder), *TINY, "--epochs", "1", *map(str, arguments)])


def one_error(capsys: pytest.CaptureFixture[str], script: str = "data_training.py") -> str:
    """The last line on stderr, which is the only one that is an error, without a traceback."""
    error = capsys.readouterr().err.replace("\r", "\n")
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith(f"{script}: error: ")]
    assert len(lines) == 1 and error.rstrip().endswith(lines[0])
    return lines[0]


@linux
def test_names_survive_copying_training_and_resuming(tmp_path: Path) -> None:
    plain = write_folder(tmp_path / "plain", {str(index): 6 for index in range(len(NAMES))})
    for index, name in enumerate(NAMES):
        (tmp_path / "src" / name).mkdir(parents=True)
        for number, path in enumerate(sorted((plain / str(index)).iterdir())):
            path.rename(tmp_path / "src" / name / f"{name[:200]}{number}.jpg")
    src, out, run = (tmp_path / name for name in ("src", "out", "run"))
    assert creation.main([str(src), str(out), "--step", "0", "--manifest", f"{out}.csv"]) == 0
    listed = [row["path"] for row in rows_of(Path(f"{out}.csv"))]
    assert len(listed) == 60 and all((out / path).is_file() for path in listed)
    assert train(out, "--no-calibration", "--output", run) == 0
    predictions = rows_of(run / "predictions.csv")
    assert {row["class"] for row in predictions} == set(NAMES)
    assert all((out / row["path"]).is_file() for row in predictions)
    assert torch.load(run / "last.pt", weights_only=True)["classes"] == sorted(NAMES)
    weights = ["--weights", run / "last.pt", "--epochs", "0"]
    assert train(out, *weights, "--output", tmp_path / "next", "--baseline", run) == 0
    rows = rows_of(tmp_path / "next/comparison.csv")
    assert {row["difference"] for row in rows} <= {"0", "nan"}
    assert train(out, "--no-calibration", "--output", run, "--resume") == 0


def test_classes_that_a_disk_would_merge_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    src = write_folder(tmp_path / "src", {"Cat": 3, "cat": 2})

    def ignoring_case(path: Path) -> bool:
        return path.name.lower() in [each.lower() for each in os.listdir(path.parent)]

    monkeypatch.setattr(Path, "exists", ignoring_case)
    assert creation.main([str(src), str(tmp_path / "out"), "--step", "0"]) == 2
    error = one_error(capsys, "data_creation.py")
    assert "cat: another name differs only in case" in error
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def png_bomb() -> bytes:
    """A small PNG that claims 50,000 x 50,000 pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


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
    "a PNG that claims too much": lambda path: path.write_bytes(png_bomb()),
    "a JPEG that claims too much": lambda path: path.write_bytes(jpeg_bomb()),
    "an empty file": lambda path: path.write_bytes(b""),
    "a pipe": os.mkfifo,
    "a socket": bind_socket,
}


@linux
@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_image_is_left_out_or_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    src = write_folder(tmp_path / "src", {"ape": 6, "bee": 6})
    monkeypatch.chdir(src)  # the path of a socket must be short
    FILES[kind](Path("ape/x.jpg"))
    data = load(src)
    assert "ape/x.jpg" not in data.names and data.unreadable == [str(src / "ape/x.jpg")]
    warnings = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(warnings) == 1 and warnings[0].count("ape/x.jpg: ") == 1
    with pytest.raises(training.DataError, match="ape/x.jpg: "):
        training.read_image(str(src / "ape/x.jpg"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bomb_that_passed_the_check_ends_the_run_in_one_line(
    workers: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    src = write_folder(tmp_path / "src", {"ape": 6, "bee": 6})
    (src / "ape/x.jpg").write_bytes(png_bomb())
    monkeypatch.setattr(
        training, "check_images", lambda paths: dict(zip(paths, paths, strict=True))
    )
    assert train(src, "--output", tmp_path / "run", "--workers", workers) == 2
    assert f"error: {src}/ape/x.jpg: cannot be decoded" in one_error(capsys)


def test_a_folder_named_like_an_image_is_a_folder(tmp_path: Path) -> None:
    src = write_folder(tmp_path / "src", {"ape": 6, "bee": 6})
    (src / "ape/y.jpg").mkdir()
    (src / "ape/ape_003.jpg").rename(src / "ape/y.jpg/z.jpg")
    assert creation.main([str(src), str(tmp_path / "out"), "--step", "0"]) == 0
    assert (tmp_path / "out/ape/y.jpg/z.jpg").is_file()
    data = load(tmp_path / "out")
    assert "ape/y.jpg/z.jpg" in data.names and len(data.names) == 12


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_a_file_without_read_permission_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = write_folder(tmp_path / "src", {"ape": 6, "bee": 6})
    (src / "ape/ape_002.jpg").chmod(0)
    assert creation.main([str(src), str(tmp_path / "out"), "--step", "0"]) == 2
    assert "ape_002.jpg" in one_error(capsys, "data_creation.py")
    assert not (tmp_path / "out").exists()
    assert train(src, "--output", tmp_path / "run") == 0
    assert "ape_002.jpg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "workers"),
    [(Path.unlink, 1), (lambda path: path.write_bytes(path.read_bytes()[:200]), 0)],
)
def test_a_file_that_vanishes_or_shrinks_during_the_run_is_named(
    damage: Callable[[Path], object],
    workers: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    src, load_data = write_folder(tmp_path / "src", {"ape": 6, "bee": 6}), training.load_data

    def load_and_damage(*args: object) -> training.Data:
        data = load_data(*args)
        damage(Path(data.paths[data.val[0]]))
        damaged.append(data.paths[data.val[0]])
        return data

    damaged: list[str] = []
    monkeypatch.setattr(training, "load_data", load_and_damage)
    monkeypatch.setattr(training, "write_split", lambda *args: None)  # it would notice at once
    assert train(src, "--output", tmp_path / "run", "--workers", workers) == 2
    assert damaged[0] in one_error(capsys)


@linux
@pytest.mark.parametrize("parent", ["/proc", "/proc/none"])
def test_a_parent_that_cannot_be_written_is_named(
    parent: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = write_folder(tmp_path / "src", {"ape": 6, "bee": 6})
    assert creation.main([str(src), f"{parent}/out", "--step", "0"]) == 2
    assert "/proc" in one_error(capsys, "data_creation.py")
    assert train(src, "--output", f"{parent}/run") == 2
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
    small_disk: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = write_folder(tmp_path / "src", {"ape": 6, "bee": 6})
    disk = small_disk("size=100m")  # the first state and one network fit
    assert train(src, "--output", disk / "run") == 2
    error = one_error(capsys)
    assert "No space left on device" in error and ".pt: " in error and "--resume" in error
    assert not list((disk / "run").glob(".*"))
    for path in (disk / "run").glob("*.pt"):
        torch.load(path, weights_only=True)
    small_disk("remount,size=500m")
    assert train(src, "--output", disk / "run", "--resume") == 0
    assert len(rows_of(disk / "run/history.csv")) == 1


@pytest.fixture
def held_open(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`held_open("history.csv")`: as Windows does where a program has it open, from then on."""
    replace, names = Path.replace, []

    def refuse(self: Path, target: Path) -> Path:
        if target.name in names and target.exists():
            raise PermissionError(13, "Access is denied", str(self))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(training.time, "sleep", lambda _: None)
    monkeypatch.setattr(training, "WRITE_EVERY", 0.0)
    return names.append


def test_tables_and_pictures_that_are_open_elsewhere_are_left_alone_and_named_once(
    held_open: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = write_folder(tmp_path / "src", {"ape": 6, "bee": 6})
    for name in ("config.json", "history.csv", "curves.png"):
        held_open(name)
    assert train(src, "--output", tmp_path / "run", "--epochs", "3") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == 3
    assert "history.csv: may not be replaced and stays as it was; close what" in "".join(lines)
    assert not list((tmp_path / "run").glob(".*"))
    assert len(rows_of(tmp_path / "run/history.csv")) == 1


def test_a_state_that_is_open_elsewhere_ends_the_run_which_then_goes_on(
    held_open: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    src = write_folder(tmp_path / "src", {"ape": 6, "bee": 6})
    held_open("last.pt")
    assert train(src, "--output", tmp_path / "run", "--epochs", "2") == 2
    assert "last.pt: may not be replaced; close what has it open" in one_error(capsys)
    monkeypatch.undo()
    assert train(src, "--output", tmp_path / "run", "--epochs", "2", "--resume") == 0


def test_a_table_that_is_open_for_a_moment_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As by a scanner for viruses."""
    replace, pauses = Path.replace, []

    def refuse(self: Path, target: Path) -> Path:
        if len(pauses) < 3:
            raise PermissionError(13, "Access is denied", str(self))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(training.time, "sleep", pauses.append)
    training.write_table(tmp_path / "x.csv", {"a": [1, 2]})
    assert (tmp_path / "x.csv").read_text() == "a\n1\n2\n"


@linux
def test_a_disk_that_fills_up_during_copying_is_left_empty(
    small_disk: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = write_folder(tmp_path / "src", {"ape": 6, "bee": 6})
    disk = small_disk("size=9m,nr_inodes=10")  # room for the bytes, not for the files
    assert creation.main([str(src), str(disk / "out"), "--step", "0"]) == 2
    error = one_error(capsys, "data_creation.py")
    assert "No space left on device" in error and ".jpg" in error
    assert not list(disk.iterdir())


def test_five_thousand_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(5000):
        (tmp_path / "src" / f"class {number}").mkdir(parents=True)
        (tmp_path / "src" / f"class {number}" / "0.jpg").write_bytes(b"")
    assert creation.main([str(tmp_path / "src"), str(tmp_path / "out"), "--step", "0"]) == 0
    assert "kept 5000 of 5000 images in 5000 classes" in capsys.readouterr().out
    targets = torch.arange(5000)
    changes = training.compare(targets, targets, targets.flip(0), torch.full((5000,), 30))
    accuracy = [changes[name][0] for name in ("before", "after", "difference")]
    assert accuracy == pytest.approx([1, 0, -1])


@linux
def test_many_links_to_one_image_are_one_image(tmp_path: Path) -> None:
    src = write_folder(tmp_path / "src", {"ape": 6, "bee": 6})
    for number in range(20_000):
        os.link(src / "ape/ape_000.jpg", src / f"ape/link{number}.jpg")
    data = load(src)
    assert len(data.paths) == 20_012
    assert sum("link" in data.names[index] for index in data.val) == 0
