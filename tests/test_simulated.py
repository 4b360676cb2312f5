"""What `data_training.py` promises of an accelerator, shown on one that is simulated.

It lives in a process of its own, as torch would find it in the other tests as well.
"""

import gc
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import simulated_device
from conftest import TINY, make_quick, rows_of, run
from simulated_device import Counts
from test_resume import Kept, assert_same_run, copy_run, record

import data_training as training

pytestmark = pytest.mark.skipif(not simulated_device.COMPILER, reason="needs g++ on Linux")
Simulate = Callable[..., SimpleNamespace]
SMALL = ["--arch", "resnet18", "--workers", "0"]  # as is the default on a CPU alone
TRIAL = {"TRIAL_STEPS": 3}  # the trial is one epoch
STEPS = 3  # an epoch of all layers: 31 images in batches of 12
MOMENTS = {"history.csv 1": "the head is stored", "history.csv 2": "an epoch of all layers is"}
UPPER_MOMENTS = {"history.csv 2": "the trial is stored", "history.csv 3": "so is an epoch of upper"}


def load_device() -> None:
    make_quick(pytest.MonkeyPatch())
    simulated_device.load()


def call(action: Callable[..., Any], *arguments: object, **constants: object) -> Any:
    """What `action` returns, while these constants of the script have these values."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in constants.items():
            patch.setattr(training, name, value)
        return action(*arguments)


def call_counted(*arguments: Any, **constants: object) -> SimpleNamespace:
    """The result, and what was counted before it, after each step, and after it."""
    before = simulated_device.count()
    with simulated_device.watch_steps() as steps:
        result = call(*arguments, **constants)
    gc.collect()
    after = simulated_device.count()
    return SimpleNamespace(result=result, before=before, steps=steps, after=after)


@pytest.fixture(scope="module")
def simulate() -> Iterator[Simulate]:
    """`simulate(action, *arguments, CONSTANT=1)` does it in a process that has the device."""
    simulated_device.build()  # where a failure is told of
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, load_device) as pool:
        yield lambda *given, **constants: pool.submit(call_counted, *given, **constants).result()


@pytest.fixture(scope="module")
def default(
    simulate: Simulate, animals: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """`default_run` on the device that is found, at its moments."""
    command = [str(animals), "--weights", str(pretrained), "--epochs", "2", *TINY]
    command += ["--arch", "resnet18", "--device", "auto"]
    return simulate(record, command, tmp_path_factory.mktemp("default") / "run", MOMENTS)


@pytest.fixture(scope="module")
def upper_command(animals: Path, pretrained: Path) -> list[str]:
    """Five epochs, of which the first one is a trial that fails."""
    command = [str(animals), "--weights", str(pretrained), "--epochs", "5", "--lr", "0.1", *TINY]
    return [*command, *SMALL, "--device"]


@pytest.fixture(scope="module")
def upper(
    simulate: Simulate, upper_command: list[str], tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    output = tmp_path_factory.mktemp("upper") / "run"
    done = simulate(run, *upper_command, "sim", "--output", output, **TRIAL)
    phases = [row["phase"] for row in rows_of(output / "history.csv")]
    assert phases == ["head", "trial", *["upper"] * 4]
    return done


@pytest.fixture(scope="module")
def upper_on_cpu(upper_command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Kept:
    output = tmp_path_factory.mktemp("upper_on_cpu") / "run"
    return call(record, [*upper_command, "cpu"], output, UPPER_MOMENTS, **TRIAL)


# ------------------------------------------------------------------------------- the same results


def test_a_run_ends_with_the_bytes_of_the_cpu(default, default_run, upper, upper_on_cpu):
    assert_same_run(default_run.path, default.result["end"])
    assert_same_run(upper_on_cpu["end"], upper.result.path)


def test_folds_on_a_second_device_end_with_the_bytes_of_the_cpu(
    simulate, folds_run, animals, others, pretrained, tmp_path
):
    command = [animals, "--weights", pretrained, "--folds", 3, "--val", others, "--epochs", 1]
    command += ["--no-calibration", *TINY, *SMALL, "--device", "sim:1"]
    simulate(run, *command, "--output", tmp_path / "run")
    assert_same_run(folds_run.path, tmp_path / "run")


def test_a_network_is_judged_and_predicts_as_on_the_cpu(simulate, default_run, animals, tmp_path):
    network = default_run.path / training.NETWORK
    for name, act in (("cpu", call), ("sim", simulate)):
        judged = [animals, "--weights", network, "--epochs", 0, *TINY, *SMALL, "--device", name]
        act(run, *judged, "--output", tmp_path / name)
        asked = [animals, "--predict", network, "--no-amp", "--device", name]
        act(run, *asked, "--output", tmp_path / f"{name}.csv")
    assert_same_run(tmp_path / "cpu", tmp_path / "sim")
    assert (tmp_path / "cpu.csv").read_bytes() == (tmp_path / "sim.csv").read_bytes()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_goes_on_from_the_device_to_the_cpu(moment, default, default_run, tmp_path):
    copy = copy_run(default.result[moment], tmp_path)
    run("--resume", copy, "--device", "cpu")
    assert_same_run(default_run.path, copy)


@pytest.mark.parametrize("moment", UPPER_MOMENTS)
def test_a_run_goes_on_from_the_cpu_to_the_device(moment, simulate, upper_on_cpu, tmp_path):
    copy = copy_run(upper_on_cpu[moment], tmp_path)
    simulate(run, "--resume", copy, "--device", "sim", **TRIAL)
    assert_same_run(upper_on_cpu["end"], copy)


def test_bfloat16_is_near_float32(simulate, default_run, animals, pretrained, tmp_path):
    command = [animals, "--weights", pretrained, "--epochs", 2, *TINY, *SMALL]
    simulate(run, *command, "--device", "sim", "--amp", "--output", tmp_path / "run")
    tables = [rows_of(path / "history.csv") for path in (default_run.path, tmp_path / "run")]
    for exact, rounded in zip(*tables, strict=True):
        for key in ("train_loss", "val_loss"):
            assert float(exact[key]) == pytest.approx(float(rounded[key]), abs=5e-2), key
            assert exact[key] != rounded[key]


# -------------------------------------------------------------------------- waiting and memory


def epochs_of(done: SimpleNamespace) -> list[list[Counts]]:
    """What was counted after each step of the epochs: those of the head, then of all layers."""
    folder = done.result["end"] if isinstance(done.result, dict) else done.result.path
    start = len(done.steps) - STEPS * (len(rows_of(folder / "history.csv")) - 1)
    later = [done.steps[at : at + STEPS] for at in range(start, len(done.steps), STEPS)]
    return [done.steps[:start], *later]


@pytest.mark.parametrize("kind", ["default", "upper"])
def test_no_step_waits_for_the_device_and_nothing_on_it_grows_or_stays(kind, request):
    """A step sends images and targets, and nothing more.

    An epoch waits three times: for its loss, for what evaluation says, and for what is written,
    here after each. Of a run that is done, mean and deviation of images stay: six numbers a device.
    """
    done = request.getfixturevalue(kind)
    epochs = epochs_of(done)
    for steps in epochs:
        assert len(steps) >= STEPS
        for before, after in pairwise(steps):
            assert after.waits == before.waits and after.sent <= before.sent + 2
    for one, other in pairwise(epochs):
        assert other[0].waits - one[0].waits <= 3
    stage = epochs[2 if kind == "upper" else 1 :]  # in which all epochs are alike
    assert len({steps[-1].live for steps in stage}) == 1
    assert done.after.live <= 2 * 24


def test_the_feature_pass_waits_once_for_all_its_batches(default):
    """And once more before the head's first step at most."""
    assert default.steps[0].waits - default.before.waits <= 2
