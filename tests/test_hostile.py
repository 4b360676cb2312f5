"""Both scripts against names, files and disks that nobody would wish for."""

import errno
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


@pytest.mark.parametrize(
    ("problem", "left_out"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), True),
        (OSError("image file is truncated"), True),
        (OSError(errno.EIO, "Input/output error"), False),
    ],
)
def test_no_image_is_left_out_for_what_is_the_matter_with_the_machine(
    problem, left_out, src, monkeypatch
):
    def fail(_: object) -> None:
        raise problem

    monkeypatch.setattr(training.Image, "open", fail)
    image = str(src / "ape/ape_000.jpg")
    if left_out:
        assert isinstance(training.check_image(image), str)
    else:
        with pytest.raises(type(problem)):
            training.check_images([image])


@pytest.mark.parametrize("read", [training.check_image, lambda path: training.read_image(path, {})])
def test_an_image_that_memory_is_too_short_for_is_named(read, src, monkeypatch):
    def fail(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(training.Image, "open", fail)
    with pytest.raises(training.DataError, match="ape_000.jpg: out of memory as it was read"):
        read(str(src / "ape/ape_000.jpg"))


@pytest.mark.skipif(sys.platform != "linux", reason="a file that fails to be read")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_fails_ends_the_run_in_one_line(workers, src, tmp_path, monkeypatch, capsys):
    def check_and_fail(paths, check=training.check_images):
        checked = check(paths)
        (src / "ape/ape_003.jpg").unlink()
        (src / "ape/ape_003.jpg").symlink_to("/proc/self/mem")
        return checked

    monkeypatch.setattr(training, "check_images", check_and_fail)
    run = tmp_path / "run"
    *_, error = refused([src, *TINY, "--output", run, "--workers", workers], capsys)
    assert "Input/output error" in error and f"{src / 'ape/ape_003.jpg'}" in error
    assert error.endswith(
        f"; what was written before is whole: mend that, then --resume {run} --device cpu"
    )


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
    disk = small_disk("size=2300k")  # the start, the first state and one network fit
    *_, error = refused([src, *TINY, "--output", disk / "run"], capsys)
    assert "No space left on device" in error and ".pt: " in error and "--resume" in error
    assert not list((disk / "run").glob(".*"))
    for path in (disk / "run").glob("*.pt"):
        torch.load(path, weights_only=True)
    assert f"make room, then --resume {disk / 'run'}" in error
    small_disk("remount,size=600m")
    assert main("--resume", disk / "run") == 0
    assert len(rows_of(disk / "run/history.csv")) == 1


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`full_disk("resume.pt")`: from now on there is no room for files of this name."""

    def fill(name: str) -> None:
        def fsync(descriptor: int) -> None:
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f".{name}.partial"):
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", fsync)

    return fill


@linux
@pytest.mark.parametrize("name", ["split.csv", training.START, training.STATE])
def test_a_disk_that_is_full_at_the_first_checkpoint_leaves_nothing_in_the_way(
    name, full_disk, src, tmp_path, capsys
):
    """So that the same command does, once there is room."""
    full_disk(name)
    output = tmp_path / "new/run"
    [error] = refused([src, *TINY, "--output", output], capsys, tmp_path)
    assert f"{output / name}: No space left on device; make room, then start again" in error


@linux
def test_predicting_on_a_full_disk_or_with_a_broken_network_advises_what_helps(
    full_disk, animals, default_run, tmp_path, capsys
):
    full_disk("x.csv")
    command = [animals, "--device", "cpu", "--output", tmp_path / "x.csv", "--predict"]
    assert main(*command, default_run.path) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("x.csv: No space left on device; make room, then start again")
    assert not any(tmp_path.iterdir())
    network = network_of(default_run.path)
    network["networks"][0]["bn1.running_var"] -= 9  # finite, but it has no square root
    torch.save(network, tmp_path / "broken.pt")
    error = refused([*command, tmp_path / "broken.pt"], capsys, tmp_path)[-1]
    assert "broken.pt: no numbers come out" in error


OURS = None  # a mistake in the script, which keeps its traceback
SAID: list[tuple[Exception, str | None]] = [
    (FileNotFoundError(2, "No such file", "/a"), "/a: No such file; mend that, then start again"),
    (PermissionError(13, "Permission denied", "/a"), "/a: Permission denied; allow access, or"),
    (OSError(errno.EIO, "Input/output error"), "error: Input/output error; mend that"),
    (OSError(errno.EBADF, "Bad file descriptor"), OURS),
    (OSError("no number"), OURS),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "out of memory on --device cpu; try "),
    (MemoryError(), "out of memory on --device cpu; try "),
    (RuntimeError("not enough memory"), "try --batch-size 4 or a smaller --image-size, in a new"),
    (RuntimeError("CUDNN_STATUS_BAD_PARAM"), OURS),
]


@pytest.mark.parametrize(("problem", "line"), SAID)
def test_what_the_world_does_is_one_line_and_a_mistake_of_the_script_a_traceback(
    problem, line, src, monkeypatch, capsys
):
    def fail(_: object) -> None:
        raise problem

    monkeypatch.setattr(training, "run", fail)
    if line is OURS:
        with pytest.raises(type(problem)):
            main(src, *TINY)
    else:
        assert line in refused([src, *TINY, "--batch-size", 9], capsys, src)[-1]


ENDS = {  # what happens to a run, its status, and the end of what is then said
    "training.F.cross_entropy = 'a mistake'": (1, "TypeError: 'str' object is not callable"),
    "break_later('no image')": (2, "cannot be decoded (UnidentifiedImageError); remove it"),
    "fail_later()": (1, "RuntimeError: a mistake"),
    "kill_later()": (
        2,
        "was killed, or crashed; try fewer --workers, by --resume {run} --device cpu",
    ),
}
PROGRAM = """import os, signal, sys
import data_training as training
class Images(training.Images):
    def read(self, index):
        os.kill(os.getpid(), signal.SIGKILL)
def kill_later():
    training.Images = Images
def fail_later():
    def read(self, index):
        raise RuntimeError("a mistake")
    training.Images.read = read
def break_later(text):
    check = training.check_images
    def check_and_break(paths):
        checked = check(paths)
        for path in paths:
            open(path, "w").write(text)
        return checked
    training.check_images = check_and_break
{what}
sys.exit(training.main(sys.argv[1:]))
"""


@linux
@pytest.mark.parametrize("what", ENDS)
def test_a_run_ends_though_its_workers_leave_signals_to_it(what, src, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-c", PROGRAM.replace("{what}", what), str(src), *map(str, TINY)]
    command += ["--workers", "1", "--output", str(run)]
    done = subprocess.run(
        command,
        cwd=Path(training.__file__).parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    status, said = ENDS[what]
    assert done.returncode == status
    assert done.stderr.rstrip().endswith(said.replace("{run}", str(run)))


@pytest.mark.parametrize("times", [3, 99])
def test_a_file_that_another_program_holds_for_a_moment_is_replaced(times, tmp_path, monkeypatch):
    """As a virus scanner does on Windows; for a second at most."""
    tries, replace = iter(range(times)), os.replace

    def held(*names: Path) -> None:
        if next(tries, None) is not None:
            raise PermissionError(13, "Permission denied", *map(str, names))
        replace(*names)

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr(training.time, "sleep", lambda _: None)
    (tmp_path / "table.csv").write_text("old")
    if times < 10:
        training.write_file(tmp_path / "table.csv", b"new")
        assert (tmp_path / "table.csv").read_text() == "new"
    else:
        with pytest.raises(PermissionError, match=r"Permission denied: '.*/table.csv'"):
            training.write_file(tmp_path / "table.csv", b"new")
        assert (tmp_path / "table.csv").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1
