"""Both scripts against names, files and disks that nobody would wish for."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from conftest import interrupt_after, load, network_of, refused, rows_of, run, write_folder

import data_creation as creation
import data_training as training

TINY = ["--weights", "none", "--image-size", "32", "--device", "cpu", "--epochs", "1"]
linux = pytest.mark.skipif(sys.platform != "linux", reason="names are any bytes, /proc")

NAMES = [
    *("with space", "quo\"te'", "new\nline", "car\rriage", "-dash", os.fsdecode(b"caf\xe9")),
    *("\u05e9\u05dc\u05d5\u05dd e\u0301", "x" * 255, "Cat", "cat", "path"),  # right to left
]


@pytest.fixture
def src(make_folder: Callable[..., Path]) -> Path:
    return make_folder({"ape": 6, "bee": 6})


@linux
def test_names_survive_copying_training_comparing_and_predicting(tmp_path, capsys):
    plain = write_folder(tmp_path / "plain", {str(index): 6 for index in range(len(NAMES))})
    src, out, first, second = (tmp_path / name for name in ("src", "out", "run", "next"))
    for index, name in enumerate(NAMES):
        (src / name).mkdir(parents=True)
        for number, path in enumerate(sorted((plain / str(index)).iterdir())):
            path.rename(src / name / f"{name[:200]}{number}.jpg")
    assert creation.main([str(src), str(out), "--step", "0", "--manifest", f"{out}.csv"]) == 0
    listed = rows_of(Path(f"{out}.csv"))
    assert len(listed) == 6 * len(NAMES) and all((out / row["path"]).is_file() for row in listed)
    report = capsys.readouterr().out
    assert r" new\nline " in report and r" caf\udce9 " in report
    run(out, *TINY, "--output", first)
    assert network_of(first)["classes"] == sorted(NAMES)
    interrupt_after(1, [str(out), *TINY, "--baseline", str(first)], second)
    run("--resume", second)
    assert {row["difference"] for row in rows_of(second / "comparison.csv")} == {"0"}
    said = run(out, "--predict", first, "--device", "cpu", "--output", tmp_path / "x.csv").err
    predicted = {row["path"]: row["true"] for row in rows_of(tmp_path / "x.csv")}
    assert predicted == {str(out / row["path"]): row["class"] for row in listed}
    assert r"new\nline" in said
    for name in ("predictions.csv", "confusion.csv"):
        assert {*NAMES} - {"path"} <= rows_of(first / name)[0].keys()


BOMB = b"P6 50000 50000 255\n"  # a small file that claims as many pixels

FILES: dict[str, Callable[[Path], object]] = {
    "an image that claims too much": lambda path: path.write_bytes(BOMB),
    "most of an image": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "a disk that fails": lambda path: path.unlink() or path.symlink_to("/proc/self/mem"),
}

NOT_FILES: dict[str, Callable[[Path], object]] = {
    "it has an image's name, but is no file; remove it": lambda path: os.mkfifo(path),
    "this link leads nowhere; repair or remove it": lambda path: path.symlink_to("none"),
}


@linux
@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_image_is_left_out_and_named(kind, src, capsys):
    path = src / "ape/ape_005.jpg"
    FILES[kind](path)
    data = load(src)
    assert len(data.files) == 11 and data.unreadable == [str(path)]
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {path}: ") and warning.endswith("; left out")
    with pytest.raises(training.DataError, match="ape_005.jpg: the image cannot be read "):
        training.read_image(str(path), 255, 32)


@linux
@pytest.mark.parametrize("text", NOT_FILES)
def test_pipes_and_links_that_lead_nowhere_end_a_run_before_it_begins(text, src, tmp_path, capsys):
    path = src / "ape/ape_005.jpg"
    path.unlink()
    NOT_FILES[text](path)
    [line] = refused([src, *TINY, "--output", tmp_path / "run"], capsys, tmp_path)
    assert line.endswith(f"error: {path}: {text}")
    with pytest.raises(
        training.DataError, match="the image cannot be read .gone, or no regular file"
    ):
        training.read_image(str(path), 255, 32)  # which opens no pipe, to wait for ever


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_breaks_after_the_check_ends_the_run_in_one_line(
    workers, src, tmp_path, monkeypatch, capsys
):
    def check_and_break(paths, check=training.check_images):
        checked = check(paths)
        (src / "ape/ape_003.jpg").write_bytes(BOMB)
        return checked

    monkeypatch.setattr(training, "check_images", check_and_break)
    output = tmp_path / "run"
    *_, error = refused([src, *TINY, "--output", output, "--workers", workers], capsys)
    assert f"error: {src / 'ape/ape_003.jpg'}: the image cannot be read (" in error
    assert error.endswith(f"; repair it; go on with --resume {output}")


def fail_with(problem: BaseException) -> Callable[..., NoReturn]:
    def fail(*_: object) -> NoReturn:
        raise problem

    return fail


NO_MEMORY = "error: out of memory; try a smaller --batch-size or --image-size, fewer --workers, or "
NO_MEMORY += "--device cpu"
OURS = None  # a mistake in the script, which keeps its traceback
SAID: list[tuple[Exception, str | None]] = [
    (
        FileNotFoundError(2, "No such file", "/a"),
        "error: /a: No such file; repair that and try again",
    ),
    (OSError(errno.EIO, "I/O error", b"/a"), "error: /a: I/O error; repair that and try again"),
    (MemoryError(), NO_MEMORY),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), NO_MEMORY),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), NO_MEMORY),
    (RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. "), NO_MEMORY),
    (training.DataError("x\ny"), r"error: x\ny"),
    (OSError(errno.EBADF, "Bad file descriptor"), OURS),
    (RuntimeError("CUDNN_STATUS_BAD_PARAM"), OURS),
]


@pytest.mark.parametrize(("problem", "line"), SAID)
def test_what_the_world_does_is_one_line_and_a_mistake_of_the_script_a_traceback(
    problem, line, src, monkeypatch, capsys
):
    monkeypatch.setattr(training, "run", fail_with(problem))
    if line is OURS:
        with pytest.raises(type(problem)):
            run(src, *TINY)
    else:
        assert line in refused([src, *TINY], capsys, src)[-1]


def test_an_image_that_memory_is_too_short_for_is_not_left_out(src, monkeypatch):
    monkeypatch.setattr(training.Image, "open", fail_with(MemoryError()))
    with pytest.raises(MemoryError):
        load(src)


@linux
@pytest.mark.parametrize("name", ["split.csv", training.STATE, training.NETWORK, "report.html"])
def test_a_full_disk_is_named_and_leaves_whole_files_and_a_way_on(
    name, src, tmp_path, monkeypatch, capsys
):
    def fsync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f".{name}.partial"):
            raise OSError(errno.ENOSPC, "No space left on device")

    output = tmp_path / "new/run"
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fsync)
        error = refused([src, *TINY, "--output", output], capsys)[-1]
    assert f"error: {output / name}: No space left on device; repair that and try again" in error
    assert not list(output.glob("*.partial")) and not (output / name).exists()
    for path in output.glob("*.pt"):
        torch.load(path, weights_only=True)
    is_begun = error.endswith(f"; go on with --resume {output}")
    assert is_begun is (name in (training.NETWORK, "report.html"))
    run(*(["--resume", output] if is_begun else [src, *TINY, "--output", output]))
    assert [row["epoch"] for row in rows_of(output / "history.csv")] == ["0", "1"]


def test_a_table_keeps_every_name_and_eight_digits_of_a_fraction():
    names = ["a,b", 'quo"te', "car\rriage", "new\nline", os.fsdecode(b"caf\xe9"), ""]
    table = creation.format_table([{"name": name, "share": 2 / 3, "count": 7} for name in names])
    cells = [b'"a,b"', b'"quo""te"', b'"car\rriage"', b'"new\nline"', b"caf\xe9", b""]
    rows = [cell + b",0.66666667,7\n" for cell in cells]
    assert table == b"name,share,count\n" + b"".join(rows)


def test_a_file_is_written_or_replaced_as_a_whole_and_nothing_else_stays(tmp_path):
    for content in (b"old and long", memoryview(b"new")):
        creation.write_file(tmp_path / "table.csv", content)
        assert (tmp_path / "table.csv").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_a_file_that_cannot_be_replaced_is_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", fail_with(PermissionError(13, "Permission denied")))
    (tmp_path / "table.csv").write_text("old")
    with pytest.raises(PermissionError, match=r"Permission denied: '.*/table.csv'"):
        creation.write_file(tmp_path / "table.csv", b"new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
