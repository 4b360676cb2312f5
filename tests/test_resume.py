"""What `data_training.py` promises of runs that are stopped or moved."""

import dataclasses
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    CPU,
    begin,
    interrupt_after,
    load,
    rows_of,
    start,
    weights_file,
    write_folder,
)

import data_training as training

SCRIPT = Path(training.__file__)
TIMES = ("images_per_second", "data_wait", "seconds")


@pytest.fixture(scope="module", autouse=True)
def every_epoch_is_written() -> Iterator[None]:
    """As where an epoch takes longer than half a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "WRITE_EVERY", 0.0)
        yield


@pytest.fixture(scope="module", autouse=True)
def trial_of_two_epochs() -> Iterator[None]:
    """Of two steps each: with so few images fifty would be more than the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "TRIAL_STEPS", 4)
        yield


@pytest.fixture(scope="module")
def settings(folder: Path) -> list[str]:
    """Two epochs of the head, two on trial, and two of what it speaks for."""
    weights = weights_file(folder.parent / "pretrained.pth")
    command = [str(folder), "--arch", "resnet18", "--weights", str(weights), "--epochs", "6"]
    command += ["--frozen-epochs", "2"]
    return [*command, "--image-size", "32", "--batch-size", "24", "--device", "cpu"]


@pytest.fixture(scope="module")
def whole(folder: Path, settings: list[str]) -> Path:
    """The run that nothing stops."""
    output = folder.parent / "whole"
    assert training.main([*settings, "--output", str(output)]) == 0
    return output


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights, history but for times, and predictions, to the last bit."""
    states = [torch.load(run / "last.pt", weights_only=True)["state_dict"] for run in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name
    histories = [
        [{k: v for k, v in row.items() if k not in TIMES} for row in rows_of(run / "history.csv")]
        for run in (one, other)
    ]
    assert histories[0] == histories[1]
    for name in ("predictions.csv", "classes.csv", "split.csv"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    best = [torch.load(run / "best.pt", weights_only=True) for run in (one, other)]
    assert best[0]["epoch"] == best[1]["epoch"]


# ----------------------------------------------------------------------------------- resume


def assert_goes_on(command: list[str], output: Path, whole: Path) -> None:
    """The run in `output` goes on and ends as the whole one."""
    assert training.main([*command, "--output", str(output), "--resume"]) == 0
    assert_same_run(whole, output)


def test_a_run_that_is_killed_at_random_moments_ends_as_the_whole_one(
    settings: list[str], whole: Path, tmp_path: Path
) -> None:
    output, stream, kills = tmp_path / "run", random.Random(0), 0
    script, code = tmp_path / "data_training.py", SCRIPT.read_text(encoding="utf-8")
    script.write_text(code.replace("TRIAL_STEPS = 50", "TRIAL_STEPS = 4"), encoding="utf-8")
    while True:
        resume = ["--resume"] if (output / training.STATE).exists() else []
        process = start(*settings, "--output", str(output), *resume, script=script)
        try:
            process.communicate(timeout=stream.uniform(4.0, 8.0) if kills < 3 else 60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert_same_run(whole, output)
    assert not list(output.glob(".*"))


@pytest.mark.parametrize("number", [2, 30])
def test_a_run_goes_on_from_the_middle_of_writing_a_file(
    number: int,
    settings: list[str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped in its write of this number, of 3 at the start and 8 or 9 an epoch."""
    output, numbers = tmp_path / "run", itertools.count(1)

    def interrupt(_: int) -> None:
        if next(numbers) == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    assert training.main([*settings, "--output", str(output)]) == 130
    monkeypatch.undo()
    assert not list(output.glob(".*"))
    moved = shutil.move(output, tmp_path / "moved")
    if number == 2:  # there is no state yet, but a table
        assert training.main([*settings, "--output", str(moved)]) == 0
        assert_same_run(whole, moved)
    else:
        assert_goes_on(settings, moved, whole)


@pytest.mark.parametrize(("step", "number"), [("training", 4), ("training", 5), ("validation", 2)])
def test_a_run_goes_on_from_the_middle_of_an_epoch(
    step: str,
    number: int,
    settings: list[str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped after half of the batches, in the head phase and in the full one."""
    output, calls, show = tmp_path / "run", itertools.count(1), training.show_progress

    def interrupt(batches: list[torch.Tensor], title: str, *rest: Any) -> Iterator[torch.Tensor]:
        batches = list(show(batches, title, *rest))
        yield from batches[: len(batches) // 2]
        if title.startswith(step) and next(calls) == number:
            raise KeyboardInterrupt
        yield from batches[len(batches) // 2 :]

    monkeypatch.setattr(training, "show_progress", interrupt)
    assert training.main([*settings, "--output", str(output)]) == 130
    assert len(rows_of(output / "history.csv")) == number - 1
    monkeypatch.undo()
    assert_goes_on(settings, output, whole)


def test_a_run_that_stopped_after_the_head_s_own_epoch_goes_on(
    settings: list[str], tmp_path: Path
) -> None:
    command = [*settings, "--frozen-epochs", "auto", "--epochs", "1"]
    assert training.main([*command, "--output", str(tmp_path / "whole")]) == 0
    assert_goes_on(command, interrupt_after(1, command, tmp_path / "run"), tmp_path / "whole")


@pytest.mark.parametrize(
    ("share", "phase", "stops"), [(1.0, "firm", (2, 3)), (0.0, "gentle", (1,))]
)
def test_a_run_goes_on_from_its_trial_and_after_it(
    share: float,
    phase: str,
    stops: tuple[int, ...],
    settings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "best_share", lambda found: share)
    command = [*settings, "--frozen-epochs", "0", "--epochs", "4"]
    assert training.main([*command, "--output", str(tmp_path / "whole")]) == 0
    phases = [row["phase"] for row in rows_of(tmp_path / "whole/history.csv")]
    assert phases == ["trial", "trial", phase, phase]
    for epoch in stops:
        run = interrupt_after(epoch, command, tmp_path / f"run_{epoch}")
        assert_goes_on(command, run, tmp_path / "whole")


def test_a_finished_run_has_nothing_left_to_do(
    settings: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = shutil.copytree(whole, tmp_path / "run")
    (output / ".last.pt.partial").write_text("of a killed run")
    assert training.main([*settings, "--output", str(output), "--resume"]) == 0
    assert not list(output.glob(".*"))
    printed = capsys.readouterr().out
    assert "nothing is left to do" in printed and "  4/6    trial " in printed
    assert_same_run(whole, output)
    configs = [json.loads((run / "config.json").read_text()) for run in (whole, output)]
    shares = [config["validation_balanced_accuracy_by_share"] for config in configs]
    assert shares[0] == shares[1] and shares[0]["trial"]["1.0"] > 0
    phases = list(dict.fromkeys(row["phase"] for row in rows_of(whole / "history.csv")))
    assert phases[:2] == ["head", "trial"] and [each["phases"] for each in configs] == [phases] * 2


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_in_one_line_how_to_go_on(
    number: int, status: int, settings: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    process = start(*settings, "--output", str(output))
    for line in process.stdout:
        if line.startswith("  1/6"):
            break
    process.send_signal(number)
    sent = time.monotonic()
    _, error = process.communicate(timeout=30)
    assert process.returncode == status and time.monotonic() - sent < 10
    last = error.splitlines()[-1]
    assert last.startswith("data_training.py: interrupted; ") and "Traceback" not in error
    assert f"--output {output} --resume" in last
    assert not list(output.glob(".*"))


def test_scratch_training_goes_on_as_well(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [str(folder), "--arch", "resnet18", "--weights", "none", "--image-size", "32"]
    command += ["--batch-size", "16", "--device", "cpu"]
    command += ["--epochs", "2"]
    assert training.main([*command, "--output", str(tmp_path / "whole")]) == 0
    save_state, calls = training.save_state, itertools.count()

    def interrupt(*args: object) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt
        save_state(*args)

    monkeypatch.setattr(training, "save_state", interrupt)
    assert training.main([*command, "--output", str(tmp_path / "run")]) == 130
    monkeypatch.undo()
    assert_goes_on(command, tmp_path / "run", tmp_path / "whole")


def test_the_split_is_part_of_the_run(
    settings: list[str], whole: Path, folder: Path, tmp_path: Path
) -> None:
    rows = rows_of(whole / "split.csv")
    assert list(rows[0]) == ["path", "class", "part", "bytes"] and len(rows) == 57
    for row in rows:
        assert (folder / row["path"]).stat().st_size == int(row["bytes"])
        assert row["path"].startswith(row["class"] + "/")
    validated = {row["path"] for row in rows_of(whole / "predictions.csv")}
    assert {row["path"] for row in rows if row["part"] == "val"} == validated
    args = training.parse_args([*settings, "--output", str(whole)])
    data = training.load_split(args, 0, [])
    fresh = load(folder)
    assert torch.equal(data.labels, fresh.labels) and torch.equal(data.val, fresh.val)
    assert data[:3] == fresh[:3] and torch.equal(data.train, fresh.train)


# ------------------------------------------------------------------- where epochs are short


@pytest.fixture
def short_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a minute is never over."""
    monkeypatch.setattr(training, "WRITE_EVERY", math.inf)


def test_short_epochs_are_written_at_the_end_of_a_phase_alone(
    settings: list[str], whole: Path, tmp_path: Path, short_epochs: None
) -> None:
    output = interrupt_after(1, settings, tmp_path / "run")
    assert [row["epoch"] for row in rows_of(output / "history.csv")] == ["1", "2"]
    assert torch.load(output / "last.pt", weights_only=True)["epoch"] == 2
    assert_goes_on(settings, output, whole)


@pytest.mark.parametrize("number", [6, 14])
def test_short_epochs_go_on_from_the_middle_of_writing_a_file(
    number: int,
    settings: list[str],
    whole: Path,
    tmp_path: Path,
    short_epochs: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped in any write of the first two ends of a phase; a table is never of another epoch."""
    output, numbers = tmp_path / "run", itertools.count(1)

    def interrupt(_: int) -> None:
        if next(numbers) == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    assert training.main([*settings, "--output", str(output)]) == 130
    monkeypatch.setattr(os, "fsync", lambda _: None)
    assert_goes_on(settings, output, whole)


def test_the_best_network_is_kept_until_it_is_written(
    settings: list[str], tmp_path: Path, short_epochs: None
) -> None:
    """Three epochs of 50, 70 and 60 %, told apart by a bias, of which only the last is written."""
    command = [*settings, "--epochs", "3", "--frozen-epochs", "3", "--output", str(tmp_path / "x")]
    args = training.parse_args([*command, "--workers", "0"])
    given, progress = training.prepare(args, CPU)
    training.start_run(given, progress)
    stage, pending = begin(given, progress, 1), training.Pending()
    data, network = given.data, stage.trainer.evaluated
    last = training.evaluate(given, network, stage.source, data.val)
    last = dataclasses.replace(last, calibration=training.Calibration())
    row = training.measure_all(last, data.counts(data.train))
    row |= training.count_draws(data, data.train)
    names = ("train_loss", "val_loss", "learning_rate", "images_per_second", "data_wait", "seconds")
    row |= dict.fromkeys(names, 1.0) | {"phase": "head"}
    for epoch, balanced in enumerate((0.5, 0.7, 0.6), 1):
        torch.nn.init.constant_(progress.model.fc.bias, epoch)
        progress.history.append(row | {"epoch": epoch, "balanced_accuracy": balanced})
        assert not (tmp_path / "x/history.csv").exists()
        training.report(given, progress, last, pending, epoch == 3)
    for name, epoch in (("best.pt", 2), ("last.pt", 3)):
        content = torch.load(tmp_path / "x" / name, weights_only=True)
        assert content["epoch"] == epoch
        assert content["state_dict"]["fc.bias"].tolist() == [epoch] * 3
    assert not pending.best


# ---------------------------------------------------------- another device, another precision


@pytest.fixture(scope="module")
def in_full_phase(settings: list[str], folder: Path) -> Path:
    """The run, stopped after the first epoch of what followed the trial."""
    return interrupt_after(5, settings, folder.parent / "in_full_phase")


@pytest.fixture
def resumed(settings: list[str], in_full_phase: Path, tmp_path: Path) -> list[str]:
    """The command that goes on with a copy of it."""
    shutil.copytree(in_full_phase, tmp_path / "run")
    return [*settings, "--workers", "0", "--output", str(tmp_path / "run"), "--resume"]


def test_a_run_goes_on_in_float16_and_back_without_it(resumed: list[str]) -> None:
    half = CPU._replace(amp=torch.float16)
    given, progress = training.prepare(training.parse_args(resumed), half)
    assert not progress.stored["scaler"]  # it was not needed
    stage = begin(given, progress, 6)
    batches = training.cut_batches(given.data.train[:4], 4, training.seeded("augment", 0, 6))
    loss = training.train_epoch(given, stage.trainer, batches, stage.source)
    scale = stage.trainer.scaler.get_scale()
    assert math.isfinite(loss) and scale > 1
    progress.history.append(progress.history[-1] | {"epoch": 6})
    training.save_state(given, progress)
    given, progress = training.prepare(training.parse_args(resumed), CPU)
    assert progress.stored["scaler"]["scale"] == scale
    assert not begin(given, progress, 6).trainer.scaler.is_enabled()


@pytest.mark.parametrize("units", [True, False])
def test_a_run_goes_on_where_the_precision_is_another(
    units: bool, resumed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a processor with bfloat16 units and on one without."""
    answer = {"avx512_bf16": units}  # from torch 2.10 on
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: answer, raising=False)
    assert training.main(resumed) == 0


def test_a_run_goes_on_where_weights_are_laid_out_in_another_way(resumed: list[str]) -> None:
    """The optimizer's kernels read weights and moments in the order of memory."""
    given, progress = training.prepare(training.parse_args(resumed), CPU)
    progress.model.to(memory_format=torch.channels_last)
    stored = progress.stored["optimizer"]["state"]
    for state in stored.values():
        state["exp_avg"] = state["exp_avg"].contiguous()  # as from where that is the layout
    optimizer, differ = begin(given, progress, 6).trainer.optimizer, 0
    for weight, before in zip(optimizer.state, stored.values(), strict=True):
        after = optimizer.state[weight]["exp_avg"]
        assert after.stride() == weight.stride() and torch.equal(after, before["exp_avg"])
        differ += before["exp_avg"].stride() != weight.stride()
    assert differ


# ------------------------------------------------------------------------------ what is refused


@pytest.fixture
def stopped(settings: list[str], whole: Path, folder: Path, tmp_path: Path) -> list[str]:
    """The command that would go on with a copy of the run, in a copy of the folder."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(folder, tmp_path / "src")
    return [str(tmp_path / "src"), *settings[1:], "--output", str(tmp_path / "run"), "--resume"]


def refusal(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that ends with status 2 and changes nothing."""
    output = Path(command[command.index("--output") + 1])
    before = {path: path.read_bytes() for path in output.glob("*")}
    assert training.main(command) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("data_training.py: error: ")
    assert {path: path.read_bytes() for path in output.glob("*")} == before
    return lines[0]


def test_settings_that_change_the_result_are_listed_in_one_error(
    stopped: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*stopped, "--epochs", "7", "--lr", "0.1", "--seed", "3", "--rebalance", "loss"]
    error = refusal(command, capsys)
    for part in ("--epochs 6 (not 7)", "--lr 0.02 (not 0.1)", "--seed 0 (not 3)"):
        assert part in error
    assert "--rebalance sampler (not loss)" in error and "depend on --epochs" in error
    assert "--batch-size" not in error
    error = refusal([*stopped, "--source", stopped[0]], capsys)
    assert "--source False (not True)" in error and "--epochs" not in error
    assert "--amp None (not False)" in refusal([*stopped, "--no-amp"], capsys)


def test_settings_that_change_nothing_may_differ(stopped: list[str]) -> None:
    assert training.main([*stopped, "--workers", "1"]) == 0


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (Path.unlink, "gone since the run began"),
        (lambda path: path.write_bytes(path.read_bytes() + b" "), "changed since the run began"),
        (lambda path: path.rename(path.with_name("z.jpg")), "gone since the run began"),
    ],
)
@pytest.mark.parametrize("part", ["train", "val"])
def test_an_image_that_is_gone_or_changed_is_named(
    part: str,
    damage: Callable[[Path], object],
    expected: str,
    stopped: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = Path(stopped[stopped.index("--output") + 1])
    name = next(row["path"] for row in rows_of(output / "split.csv") if row["part"] == part)
    damage(Path(stopped[0], name))
    error = refusal(stopped, capsys)
    assert str(Path(stopped[0], name)) in error and expected in error


def test_images_that_came_later_change_nothing(
    stopped: list[str], settings: list[str], whole: Path
) -> None:
    write_folder(Path(stopped[0], "ape", "more"), {"new": 3})
    (Path(stopped[0]) / "dog").mkdir()
    assert training.main(stopped) == 0
    assert_same_run(whole, Path(stopped[stopped.index("--output") + 1]))


def test_resume_wants_a_run_and_a_new_run_wants_none(
    stopped: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "already holds a run" in refusal(stopped[:-1], capsys)
    (tmp_path / "empty").mkdir()
    command = [*stopped[:-2], str(tmp_path / "empty"), "--resume"]
    assert "no run in --output" in refusal(command, capsys)
    output = Path(stopped[-2])
    content = (output / training.STATE).read_bytes()
    (output / training.STATE).write_bytes(content[: len(content) // 2])
    assert "damaged" in refusal(stopped, capsys)


def test_a_state_that_would_run_code_is_refused(
    stopped: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"settings": {}, "trap": Trap()}, Path(stopped[-2]) / training.STATE)
    assert "damaged" in refusal(stopped, capsys)
    assert not (tmp_path / "sprung").exists()
