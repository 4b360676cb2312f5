"""What `data_training.py` promises of runs that are stopped or moved.

A process that is killed leaves its folder as it is at that moment. So a run is recorded once, its
folder kept at each of the moments below, and each of these goes on and must end as the run did.
"""

import contextlib
import math
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    CPU,
    RESTING,
    TINY,
    Process,
    Run,
    Trigger,
    begin,
    interrupt_after,
    network_of,
    prepare,
    raises,
    refused,
    rows_of,
    run,
    write_folder,
)

import data_training as training

Kept = dict[str, Path]  # folders of a run, by the moment they were copied at
TIMES = ("images_per_second", "data_wait", "seconds")


def assert_same_run(one: Path, other: Path) -> None:
    """The same files, to the last byte, but for times and what depends on the folder's name."""
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    for path in one.iterdir():
        if path.name == "network.pt" or path.suffix == ".csv" and path.name != "history.csv":
            assert path.read_bytes() == (other / path.name).read_bytes(), path.name
    histories = [
        [{k: v for k, v in row.items() if k not in TIMES} for row in rows_of(each / "history.csv")]
        for each in (one, other)
        if (each / "history.csv").exists()  # a run that only judges has none
    ]
    assert histories[:1] == histories[1:]
    for each in (one, other):  # the command that makes it again
        assert "--resume" not in (each / "report.html").read_text()


# The file that is being written, and for which time.
MOMENTS = {
    "config.json 1": "nothing is trained",
    "network.pt 1": "the network of the head waits, but nothing of it is stored",
    "history.csv 1": "the head is stored",
    "network.pt 2": "the network of the first epoch waits, but the state is of the head",
    "history.csv 2": "the first epoch of all layers is stored",
    "network.pt 3": "the trained network waits, but the state is of the epoch before",
    "network.pt 4": "all epochs are stored, the result is not",
    "report.html 4": "the result is stored, but for the page",
}
FOLD_MOMENTS = {
    "network.pt 4": "between the first fold and the second",
    "network.pt 6": "the second network waits, but the state is of its head",
    "network.pt 8": "one of two epochs of the last head",
    "network.pt 10": "all epochs are stored, the result is not",
}


def record(command: list[str], output: Path, moments: dict[str, str]) -> Kept:
    """The run, and copies of its folder at these moments; every epoch is written."""
    seen, kept = Counter[str](), {"end": output}

    def keep(_: int) -> None:
        for unfinished in output.glob(".*.partial"):
            name = unfinished.name[1:].removesuffix(".partial")
            seen[name] += 1
            if (moment := f"{name} {seen[name]}") in moments:
                kept[moment] = output.parent / moment
                shutil.copytree(output, kept[moment], copy_function=os.link)
                (kept[moment] / unfinished.name).unlink()
                (kept[moment] / unfinished.name).write_bytes(b"half of it")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "WRITE_EVERY", 0.0)
        patch.setattr(os, "fsync", keep)
        run(*command, "--output", str(output))
    assert kept.keys() - {"end"} == moments.keys()
    return kept


@pytest.fixture(scope="module")
def recorded(animals: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """`default_run`, at its moments."""
    command = [str(animals), "--weights", str(pretrained), "--epochs", "2", *TINY]
    return record(command, tmp_path_factory.mktemp("default") / "run", MOMENTS)


@pytest.fixture(scope="module")
def recorded_folds(
    animals: Path, others: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory
) -> Kept:
    """Three folds with two epochs of the head and one of all layers, named by relative paths."""
    root = tmp_path_factory.mktemp("folds")
    shutil.copytree(animals, root / "animals")
    shutil.copytree(others, root / "others")
    command = ["animals", "--val", "others", "--weights", str(pretrained), "--folds", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        flags = ["--epochs", "3", "--frozen-epochs", "2", *TINY]
        kept = record([*command, *flags], root / "run", FOLD_MOMENTS)
    write_folder(root / "animals/ape/more", {"new": 3})  # what comes later changes nothing
    (root / "animals/dog").mkdir()
    return kept


def copy_run(source: Path, tmp_path: Path) -> Path:
    return shutil.copytree(source, tmp_path / "moved", copy_function=os.link)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_goes_on_from_any_moment_to_the_same_bytes(
    moment, recorded, default_run, tmp_path, monkeypatch
):
    copy = copy_run(recorded[moment], tmp_path)
    # On a CPU that would take bfloat16, from another folder, and in another.
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": 1}, raising=False)
    monkeypatch.chdir(tmp_path)
    printed = run("--resume", "moved").out
    assert "(as it was stopped); cpu, torch.float32\n" in printed  # as --no-amp had said
    assert printed.count("\n 1/1 ") == 3  # what was there before is shown as well
    assert_same_run(default_run.path, copy)


@pytest.mark.parametrize("moment", FOLD_MOMENTS)
def test_folds_go_on_from_any_moment_to_the_same_bytes(
    moment, recorded_folds, tmp_path, monkeypatch
):
    copy = copy_run(recorded_folds[moment], tmp_path)
    run("--resume", copy)
    assert_same_run(recorded_folds["end"], copy)


@pytest.mark.parametrize(
    ("number", "status", "kind", "line"),
    [
        (signal.SIGINT, 130, "default_run", " 1/1    1/2 "),
        (signal.SIGTERM, 143, "default_run", " 1/1    1/2 "),
        (signal.SIGHUP, 129, "default_run", " 1/1    1/2 "),
        (signal.SIGKILL, -9, "folds_run", " 2/3    1/1 "),
    ],
)
def test_a_process_that_is_stopped_leaves_a_run_that_goes_on(
    number, status, kind, line, pretrained, animals, others, tmp_path, request
):
    whole: Run = request.getfixturevalue(kind)
    command, output = [str(animals), "--weights", str(pretrained), *TINY], tmp_path / "run"
    command += ["--epochs", "2"] if kind == "default_run" else ["--epochs", "1", "--folds", "3"]
    if kind == "folds_run":  # a worker lives on for a while, and does not hold the folder
        command += ["--val", str(others), "--no-calibration", "--workers", "1"]
    process = Process(*command, "--output", output, code=RESTING)
    process.wait_for(lambda: f"\n{line}" in process.printed()[0])
    process.kill(number)
    sent = time.monotonic()
    _, error = process.end(status)
    assert "Traceback" not in error and time.monotonic() - sent < 20
    if number != signal.SIGKILL:
        last = error.splitlines()[-1]
        assert last.endswith(f"interrupted; go on with --resume {output} --device cpu")
        assert not list(output.glob(".*"))
        # What comes after the head would be written at the end, or half a minute later.
        assert [row["epoch"] for row in rows_of(output / "history.csv")] == ["0"]
    run("--resume", output)
    assert_same_run(whole.path, output)


def test_a_run_that_is_stopped_before_its_state_is_written_leaves_nothing(animals, tmp_path):
    folder = shutil.copytree(animals, tmp_path / "animals")
    (folder / "ape/broken.jpg").write_text("no image")
    command = [str(folder), "--weights", "none", *TINY, "--output", str(tmp_path / "runs/new")]
    stderr = Trigger("left out", raises(KeyboardInterrupt()))
    with contextlib.redirect_stderr(stderr):
        assert training.main(command) == 130
    assert stderr.getvalue().endswith("\ndata_training.py: interrupted; start again\n")
    assert not (tmp_path / "runs").exists()


def test_a_trial_that_failed_is_remembered(animals, pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "TRIAL_STEPS", 3)  # an epoch
    command = [str(animals), "--weights", str(pretrained), "--epochs", "5", "--lr", "0.1", *TINY]
    whole = run(*command, "--output", tmp_path / "whole").path
    stages = [row["phase"] for row in rows_of(whole / "history.csv")]
    assert stages == ["head", "trial", *["upper"] * 4]
    start = prepare(animals, *command[1:], "--output", str(tmp_path / "other"))[1].start
    [end] = network_of(whole)["networks"]
    moved = [key for key in start if not torch.equal(start[key], end[key])]
    assert {key.split(".")[0] for key in moved} <= {"layer3", "layer4", "fc"}
    assert not any("running" in key for key in moved)
    interrupt_after(2, command, tmp_path / "run")
    run("--resume", tmp_path / "run")
    assert_same_run(whole, tmp_path / "run")


def test_a_run_that_keeps_its_head_alone_has_the_backbone_it_began_with(
    animals, pretrained, tmp_path, monkeypatch
):
    monkeypatch.setattr(training, "SURE", -math.inf)
    monkeypatch.setattr(training, "FEWEST_FAMILIES", 1)
    command = [str(animals), "--weights", str(pretrained), "--epochs", "2", *TINY]
    done = run(*command, "--output", tmp_path / "whole")
    assert "\nnote: the last layer alone is kept" in done.out
    whole = done.path
    head, _, last = rows_of(whole / "history.csv")
    assert [head["phase"], last["phase"]] == ["head", "back"]
    # What is said is said of the head. Its stage saw features of half the precision.
    assert float(last["val_loss"]) == pytest.approx(float(head["val_loss"]), rel=1e-2)
    assert "and then back to the last layer alone" in (whole / "report.html").read_text()
    start = prepare(animals, *command[1:], "--output", str(tmp_path / "other"))[1].start
    [end] = network_of(whole)["networks"]
    assert all(torch.equal(end[key], start[key]) for key in start if not key.startswith("fc."))
    judged = run(animals, "--weights", whole, "--epochs", 0, *TINY, "--output", tmp_path / "again")
    tables = [rows_of(path / "predictions.csv") for path in (whole, judged.path)]
    answers = [{row["path"]: row["predicted"] for row in table} for table in tables]
    assert answers[0] == answers[1]
    interrupt_after(2, command, tmp_path / "run")
    run("--resume", tmp_path / "run")
    assert_same_run(whole, tmp_path / "run")


@pytest.fixture
def begun(animals: Path, tmp_path: Path) -> Path:
    """A run that has just begun, on images that may be changed."""
    shutil.copytree(animals, tmp_path / "animals")
    command = ["--weights", "none", *TINY, "--output", str(tmp_path / "run")]
    prepare(tmp_path / "animals", *command)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (Path.unlink, "gone since the run began"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b" "), "changed since the run"),
    ],
)
@pytest.mark.parametrize("part", ["train", "val"])
def test_an_image_that_is_gone_or_changed_is_named(part, damage, expected, begun, capsys):
    name = next(row["path"] for row in rows_of(begun / "split.csv") if row["part"] == part)
    image = begun.parent / "animals" / name
    damage(image)
    [error] = refused(["--resume", begun], capsys, begun)
    assert str(image) in error and expected in error


@pytest.mark.parametrize("name", [training.STATE, training.START])
def test_a_damaged_state_is_named_and_one_that_would_run_code_is_never_run(name, begun, capsys):
    content = (begun / name).read_bytes()
    (begun / name).write_bytes(content[: len(content) // 2])
    [error] = refused(["--resume", begun], capsys, begun)
    assert f"{name}: damaged, or not of tensors alone; start a new run" in error

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(begun.parent / "sprung"),)

    torch.save({"settings": {}, "trap": Trap()}, begun / name)
    [error] = refused(["--resume", begun], capsys, begun.parent)
    assert f"{name}: damaged" in error


def test_a_state_of_another_version_is_named_as_one(begun, capsys):
    state = torch.load(begun / training.STATE, weights_only=True)
    del state["format"]
    for other in (state, state | {"format": training.STATE_FORMAT + 1}):
        torch.save(other, begun / training.STATE)
        [error] = refused(["--resume", begun], capsys, begun)
        assert f"--resume {begun}: stopped by another version of this script" in error


def test_what_is_said_beside_resume_holds(recorded, tmp_path):
    copy = copy_run(recorded["network.pt 3"], tmp_path)
    done = run("--resume", copy, "--device", "cpu", "--workers", "1", "--amp")
    assert "cpu, torch.bfloat16" in done.out.splitlines()[0]


def test_a_run_goes_on_where_weights_are_laid_out_in_another_way(recorded, tmp_path):
    """The optimizer's kernels read weights and moments in the order of memory."""
    copy = str(copy_run(recorded["history.csv 2"], tmp_path))
    command = ["--resume", copy, "--workers", "0", "--device", "cpu"]
    with training.HELD:
        given, progress = training.prepare(training.parse_args(command), CPU)
    progress.model.to(memory_format=torch.channels_last)
    stored = progress.stored["optimizer"]["state"]
    for state in stored.values():
        state["exp_avg"] = state["exp_avg"].contiguous()  # as from where that is the layout
    optimizer, differ = begin(given, progress, 2).trainer.optimizer, 0
    for weight, before in zip(optimizer.state, stored.values(), strict=True):
        after = optimizer.state[weight]["exp_avg"]
        assert after.stride() == weight.stride() and torch.equal(after, before["exp_avg"])
        differ += before["exp_avg"].stride() != weight.stride()
    assert differ
