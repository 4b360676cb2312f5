"""What `data_training.py` promises of an accelerator, shown on one that is simulated.

It lives in a process of its own, as torch would find it in the other tests as well.
"""

import gc
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
from conftest import TINY, interrupt_after, run
from test_resume import assert_same_run

import data_training as training

pytestmark = pytest.mark.skipif(not simulated_device.COMPILER, reason="needs g++ on Linux")
Simulate = Callable[..., SimpleNamespace]
PINNED = {"PINNED": "sim", "WRITE_EVERY": 0.0}
KINDS = {"pinned": PINNED, "unpinned": {"WRITE_EVERY": 0.0}}
EPOCHS = 3
STEPS = 3  # an epoch of fine-tuning: 31 images in batches of 12


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
        yield lambda *args, **constants: pool.submit(call_counted, *args, **constants).result()


@pytest.fixture(scope="module")
def command(animals: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What all runs have in common."""
    torch.manual_seed(1)
    weights = tmp_path_factory.mktemp("simulated") / "pretrained.pth"
    torch.save(simulated_device.resnet_thin(num_classes=7).state_dict(), weights)
    flags = ["--weights", str(weights), "--arch", "resnet_thin", "--workers", "0", *TINY]
    return [str(animals), *flags]


@pytest.fixture(scope="module", params=KINDS)
def both(
    request: Any, simulate: Simulate, command: list[str], tmp_path_factory: Any
) -> SimpleNamespace:
    """A run on the CPU and on the device, which is found: with pinned memory, or without."""
    root, constants = tmp_path_factory.mktemp(request.param), KINDS[request.param]
    words = [*command, "--epochs", str(EPOCHS), "--output"]
    on_cpu = call(run, *words, root / "on_cpu", **constants).path
    done = simulate(run, *words, root / "on_sim", "--device", "auto", **constants)
    on_sim = done.result.path
    return SimpleNamespace(on_cpu=on_cpu, on_sim=on_sim, done=done, constants=constants)


def test_a_run_ends_with_the_bytes_of_the_cpu(both):
    assert_same_run(both.on_cpu, both.on_sim)


def test_networks_predict_as_on_the_cpu(both, simulate, others, tmp_path):
    for name, act in (("cpu", call), ("sim", simulate)):
        asked = [others, "--predict", both.on_sim, "--no-amp", "--device", name]
        act(run, *asked, "--output", tmp_path / f"{name}.csv")
    assert (tmp_path / "cpu.csv").read_bytes() == (tmp_path / "sim.csv").read_bytes()


def test_a_run_goes_on_from_one_device_to_the_other_in_the_middle_of_fine_tuning(
    both, simulate, command, tmp_path
):
    acts = [simulate, call] if both.constants is PINNED else [call, simulate]
    names = ["sim" if act is simulate else "cpu" for act in acts]
    words = [*command, "--epochs", str(EPOCHS), "--device", names[0]]
    folder = tmp_path / "run"
    acts[0](interrupt_after, EPOCHS - 1, words, folder, **both.constants)
    acts[1](run, "--resume", folder, "--device", names[1], **both.constants)
    assert_same_run(both.on_cpu, folder)


def test_no_step_waits_for_the_device_and_nothing_on_it_grows_or_stays(both):
    """A step sends images and targets, and nothing more; it does not wait for pinned memory.

    An epoch waits twice: for its loss, and for what evaluation says. Of a run that is done, mean
    and deviation of images stay: six numbers a device.
    """
    done = both.done
    sent = 0 if "PINNED" in both.constants else 2
    assert len(done.steps) == STEPS * EPOCHS  # the linear probe is fitted on the CPU
    parts = [done.steps[STEPS * epoch : STEPS * (epoch + 1)] for epoch in range(EPOCHS)]
    for steps in parts:
        for before, after in pairwise(steps):
            assert after.waits == before.waits
            assert after.sent <= before.sent + sent
    for one, other in pairwise(parts):
        assert other[0].waits - one[0].waits <= 2
    assert len({steps[-1].live for steps in parts[1:]}) == 1
    assert done.after.live <= 2 * 24
    assert done.after.torn == 0  # nothing was changed while it was being sent
    # Before the first step it waits for the features, and for the evaluation of the linear probe.
    assert done.steps[0].waits - done.before.waits <= 3
