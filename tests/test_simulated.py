"""What `data_training.py` promises of an accelerator, shown on one that is simulated.

It lives in a process of its own, as torch would find it in the other tests as well.
"""

import gc
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import simulated_device
import torch
from conftest import SCRIPT, TINY, rows_of, run, torchrun
from test_resume import Kept, assert_same_run, copy_run, record

import data_training as training

pytestmark = pytest.mark.skipif(not simulated_device.COMPILER, reason="needs g++ on Linux")
Simulate = Callable[..., SimpleNamespace]
QUICK = {"HEAD_STEPS": 100, "SURE": math.inf}  # as in `make_quick`
TRIAL = {"TRIAL_STEPS": 3, **QUICK}  # the trial is one epoch
PINNED = {"PINNED": ("cuda", "sim"), **QUICK}
STAGES = ["--epochs", "3", "--frozen-epochs", "1"]  # the head, and two epochs of all layers
STEPS = 3  # an epoch of all layers: 31 images in batches of 12
MOMENTS = {"history.csv 2": "an epoch of all layers is stored"}
UPPER_MOMENTS = {"history.csv 2": "the trial is stored", "history.csv 3": "so is an epoch of upper"}


def load_device() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.fsync = lambda _: None
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
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the runs of this file."""
    return tmp_path_factory.mktemp("simulated")


@pytest.fixture(scope="module")
def command(animals: Path, root: Path) -> list[str]:
    """What all runs have in common; the device is to be named."""
    torch.manual_seed(1)
    network = simulated_device.resnet_thin(num_classes=7)
    torch.save(network.state_dict(), root / "pretrained.pth")
    flags = ["--weights", str(root / "pretrained.pth"), "--arch", "resnet_thin", "--workers", "0"]
    return [str(animals), *flags, *TINY]


@pytest.fixture(scope="module")
def default_on_cpu(command: list[str], root: Path) -> Path:
    """The head, and two epochs of all layers."""
    return call(run, *command, *STAGES, "--output", root / "on_cpu", **PINNED).path


@pytest.fixture(scope="module")
def default(simulate: Simulate, command: list[str], root: Path) -> SimpleNamespace:
    """The same on the device that is found, at its moments, its images from pinned memory."""
    given = [*command, *STAGES, "--device", "auto"]
    return simulate(record, given, root / "default", MOMENTS, **PINNED)


@pytest.fixture(scope="module")
def upper_on_cpu(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """Five epochs on the CPU, of which the first one is a trial that fails, at their moments."""
    output = tmp_path_factory.mktemp("upper_on_cpu") / "run"
    flags = ["--epochs", "5", "--lr", "0.1"]
    kept = call(record, [*command, *flags], output, UPPER_MOMENTS, **TRIAL)
    phases = [row["phase"] for row in rows_of(output / "history.csv")]
    assert phases == ["head", "trial", *["upper"] * 4]
    return kept


@pytest.fixture(scope="module")
def upper(simulate: Simulate, upper_on_cpu: Kept, root: Path) -> SimpleNamespace:
    """All epochs of the upper half on the device."""
    copy = copy_run(upper_on_cpu["history.csv 2"], root)
    done = simulate(run, "--resume", copy, "--device", "sim", **TRIAL)
    done.result.path = copy
    return done


# What each of two processes does. The first time the last run is killed, and then gone on with.
SEVERAL = """
import functools, json, os, signal, sys
import simulated_device, data_training as training

def stop_at_second(*arguments, evaluate=training.evaluate, calls=[]):
    calls.append(0)
    if len(calls) == 2:  # of the second epoch; the first one is stored
        os.kill(os.getpid(), signal.SIGKILL)
    return evaluate(*arguments)

simulated_device.load()
training.HEAD_STEPS, training.SURE, os.fsync = 100, float("inf"), lambda _: None
pick_backend, meet = training.pick_backend, training.dist.init_process_group
training.pick_backend = lambda kind: "simulated" if kind == "sim" else pick_backend(kind)
folder, *commands = json.loads(sys.argv[1])
rank, restarted = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
assert training.pick_compute("auto", None).device == training.torch.device("sim", rank)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of torchrun, as soon as the other one is killed
if restarted:
    commands = [["--resume", commands[-1][-1], "--device", "sim", "--workers", "0"]]
for number, command in enumerate(commands, 10 * restarted):
    place = {"init_method": f"file://{folder}/met-{number}", "rank": rank, "world_size": 2}
    training.dist.init_process_group = functools.partial(meet, **place)
    if command is commands[-1] and not restarted:
        training.WRITE_EVERY = 0.0
        training.evaluate = stop_at_second if rank else training.evaluate
    if training.main(command):
        sys.exit(2)
"""


@pytest.fixture(scope="module")
def two(command: list[str], others: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes, each with a device of its own, and of two on the CPU."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "several.py").write_text(SEVERAL)
    kinds = {"folds": [*STAGES, "--folds", "3", "--val", str(others)]}
    kinds["default"] = ["--epochs", "2"]
    commands = [
        # Batches of 12 would be too small for BatchNorm, which is synchronised on a GPU alone.
        [*command, "--batch-size", "16", *flags, "--device", device, "--output", output]
        for kind, flags in kinds.items()
        for device in ("cpu", "sim")
        for output in [str(folder / f"{kind}_on_{device}")]
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{SCRIPT.parent}{os.pathsep}{Path(__file__).parent}")
        patch.setenv("PET_MAX_RESTARTS", "1")
        given = json.dumps([str(folder), *commands])
        done = torchrun(given, script=folder / "several.py")
    assert "exitcode: -9" in done.stderr and "Traceback" not in done.stderr
    ended = f"has ended; see what it says, then --resume {folder / 'default_on_sim'}"
    assert ended in done.stderr and "(as it was stopped); sim:0" in done.stdout
    return folder


# ------------------------------------------------------------------------------- the same results


def test_a_run_ends_with_the_bytes_of_the_cpu(default, default_on_cpu, upper, upper_on_cpu):
    assert_same_run(default_on_cpu, default.result["end"])
    assert_same_run(upper_on_cpu["end"], upper.result.path)


@pytest.mark.parametrize("kind", ["folds", "default"])
def test_two_processes_with_a_device_each_end_with_the_bytes_of_two_on_the_cpu(kind, two):
    """The sum of two gradients is the same in any order. One of the runs was killed on its way."""
    assert_same_run(two / f"{kind}_on_cpu", two / f"{kind}_on_sim")


def test_networks_judge_and_predict_as_on_the_cpu(simulate, command, two, others, tmp_path):
    network = ["--weights", two / "folds_on_sim"]
    for name, act in (("cpu", call), ("sim", simulate)):
        judged = [others, *command[1:], *network, "--epochs", 0, "--device", name]
        act(run, *judged, "--output", tmp_path / name)
        asked = [others, "--predict", network[1], "--no-amp", "--device", name]
        act(run, *asked, "--output", tmp_path / f"{name}.csv")
    assert_same_run(tmp_path / "cpu", tmp_path / "sim")
    assert (tmp_path / "cpu.csv").read_bytes() == (tmp_path / "sim.csv").read_bytes()


def test_a_run_goes_on_from_the_device_to_the_cpu(default, default_on_cpu, tmp_path):
    copy = copy_run(default.result["history.csv 2"], tmp_path)
    run("--resume", copy, "--device", "cpu")
    assert_same_run(default_on_cpu, copy)


def test_a_run_goes_on_from_the_cpu_to_the_device_in_the_middle_of_a_stage(
    simulate, upper_on_cpu, tmp_path
):
    copy = copy_run(upper_on_cpu["history.csv 3"], tmp_path)
    simulate(run, "--resume", copy, "--device", "sim", **TRIAL)
    assert_same_run(upper_on_cpu["end"], copy)


def test_bfloat16_is_near_float32(simulate, command, tmp_path):
    """In small steps: in large ones rounding adds up."""
    flags = [*STAGES, "--device", "sim", "--lr", 1e-5, "--output"]
    for name, amp in (("exact", "--no-amp"), ("rounded", "--amp")):
        simulate(run, *command, amp, *flags, tmp_path / name, **PINNED)
    tables = [rows_of(tmp_path / name / "history.csv") for name in ("exact", "rounded")]
    for exact, rounded in list(zip(*tables, strict=True))[:2]:
        for key in ("train_loss", "val_loss"):
            near = pytest.approx(float(rounded[key]), rel=5e-2, abs=2e-2)
            assert float(exact[key]) == near, key
            assert exact[key] != rounded[key]


# -------------------------------------------------------------------------- waiting and memory


@pytest.mark.parametrize(("kind", "epochs", "sent"), [("default", 2, 0), ("upper", 4, 2)])
def test_no_step_waits_for_the_device_and_nothing_on_it_grows_or_stays(kind, epochs, sent, request):
    """A step sends images and targets, and nothing more; it does not wait for pinned memory.

    An epoch waits twice: for its loss, and for what evaluation says. Of a run that is done, mean
    and deviation of images stay: six numbers a device.
    """
    done = request.getfixturevalue(kind)
    head = len(done.steps) - STEPS * epochs  # steps, all in one epoch
    assert (head > 0) == (kind == "default")
    ends = [0] * (head > 0) + [head + STEPS * epoch for epoch in range(epochs + 1)]
    parts = [done.steps[first:last] for first, last in pairwise(ends)]
    for steps in parts:
        for before, after in pairwise(steps):
            assert after.waits == before.waits and after.sent <= before.sent + sent
    for one, other in pairwise(parts):
        assert other[0].waits - one[0].waits <= 2
    assert len({steps[-1].live for steps in parts[-epochs:]}) == 1
    assert done.after.live <= 2 * 24
    assert done.after.torn == 0  # nothing was changed while it was being sent


def test_the_feature_pass_waits_once_for_all_its_batches(default):
    """And once more before the head's first step at most."""
    assert default.steps[0].waits - default.before.waits <= 2
