"""What `data_training.py` promises of devices, and of runs in or beside several processes."""

import copy
import math
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import (
    CPU,
    TINY,
    Process,
    assert_moved_alike,
    interrupt_after,
    network_of,
    prepare,
    refused,
    rows_of,
    run,
)

import data_training as training


def test_two_processes_fit_the_linear_probes_of_folds_as_one_does(
    animals, others, pretrained, tmp_path
):
    """To within rounding. One has no image to test with, as there is only one such image."""
    shutil.copytree(others / "bee", tmp_path / "one/bee", ignore=lambda _, names: names[1:])
    command = [animals, "--weights", pretrained, "--epochs", 1, *TINY]
    command += ["--folds", 3, "--val", tmp_path / "one"]
    printed, _ = Process(*command, "--output", tmp_path / "two", processes=2).end()
    assert printed.count("imbalance ratio") == 1  # only one of them prints
    several, alone = tmp_path / "two", run(*command, "--output", tmp_path / "alone").path
    assert (alone / "split.csv").read_bytes() == (several / "split.csv").read_bytes()
    tables = [rows_of(path / "history.csv") for path in (alone, several)]
    pairs = [pair for pair in zip(*tables, strict=True) if pair[0]["epoch"] == "0"]
    assert [ours["fold"] for ours, _ in pairs] == ["1", "2", "3"]
    for ours, theirs in pairs:
        for name in ("train_loss", "val_loss", "balanced_accuracy"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-3)
        assert float(ours["balanced_accuracy"]) > 0.5  # any features tell colours apart
    draws = [[row["draws"] for row in rows_of(path / "classes.csv")] for path in (alone, several)]
    assert draws[0] == draws[1]
    # What they have evaluated together is what one process says of the networks that they wrote.
    again = tmp_path / "again.csv"
    run(tmp_path / "one", "--predict", several, "--device", "cpu", "--no-amp", "--output", again)
    [ours], [theirs] = rows_of(again), rows_of(several / "test_predictions.csv")
    assert float(ours["probability"]) == pytest.approx(float(theirs["probability"]), abs=1e-5)


@pytest.fixture(scope="module")
def two(animals: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An epoch of fine-tuning by two processes, of which the end is kept."""
    output = tmp_path_factory.mktemp("two") / "run"
    command = [animals, "--weights", pretrained, "--epochs", 1, *TINY, "--output", output]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "POINTS", (1.0,))
        Process(*command, processes=2).end()
    return output


def test_two_processes_train_all_layers_as_a_loop_that_is_written_by_hand(
    two, animals, pretrained, tmp_path
):
    """Each takes every other image of a batch, and the gradient is the mean over all images."""
    command = [animals, "--weights", pretrained, "--epochs", 1, *TINY]
    setup, progress, model = prepare(*command, "--output", tmp_path / "other")
    training.make_probe(setup, progress, model, 0)
    trainer, data = training.begin_fine_tuning(setup, progress, model, 0), setup.data
    start = training.copy_state(model)
    stream = training.seeded("draw", 0, 0, 1)
    drawn = training.draw_epoch(data.labels, data.train_indices(0), 1.0, stream)
    batches = training.cut_batches(drawn, 12, training.seeded("augment", 0, 0, 1))
    assert [len(batch) for batch in batches] == [11, 10, 10]  # 6 and 5 images, 5 and 5, 5 and 5
    for batch in batches:
        losses, twin = [], copy.deepcopy(model)
        for part, network in ((batch[::2], model), (batch[1::2], twin)):
            [[group]] = setup.reader.read([part], "")
            logits = network(training.move_batch(group.images, CPU))
            losses.append(F.cross_entropy(logits, group.labels, reduction="sum") / len(batch))
        losses[1].backward()
        model.zero_grad()
        # The sum of the gradients of both, by a loss that has that of the second one.
        pairs = zip(model.parameters(), twin.parameters(), strict=True)
        trainer.step(losses[0] + sum((weight * other.grad).sum() for weight, other in pairs))
    # Statistics are those of the first process.
    assert_moved_alike(network_of(two)["networks"][0], model, start)


def test_unlike_devices_compute_in_the_precision_of_the_first(
    two, animals, pretrained, tmp_path, monkeypatch
):
    picked = {"0": "float32", "1": "bfloat16"}
    monkeypatch.setattr(training, "POINTS", (1.0,))
    monkeypatch.setattr(training, "pick_precision", lambda *_: picked[os.environ["RANK"]])
    command = [animals, "--weights", pretrained, "--epochs", 1, *TINY]
    printed, _ = Process(*command, "--output", tmp_path / "run", processes=2).end()
    assert "cpu, float32, processes: 2;" in printed
    table = (two / "predictions.csv").read_bytes()
    assert (tmp_path / "run/predictions.csv").read_bytes() == table


@pytest.mark.parametrize("is_named", [True, False])
def test_of_several_processes_one_predicts_writes_and_prints(
    is_named, default_run, others, tmp_path
):
    command = [others, "--predict", default_run.path, "--device", "cpu"]
    alone, together = tmp_path / "alone.csv", tmp_path / "together.csv"
    run(*command, "--output", alone)
    output = ["--output", together] if is_named else []
    printed, error = Process(*command, *output, processes=2).end()
    written = together.read_text() if is_named else printed
    assert written == alone.read_text()
    assert is_named is (printed == "")
    assert error.count("12 images\n") == error.count("balanced accuracy") == 1


def test_all_works_with_a_torch_that_is_built_without_processes(
    default_run, animals, others, pretrained, tmp_path, monkeypatch
):
    """There `torch.distributed` says that it is not available, and has nothing else."""
    names = [name for name, value in vars(dist).items() if type(value) is FunctionType]
    assert {"is_initialized", "is_torchelastic_launched", "all_reduce"} < {*names}
    for name in names:
        monkeypatch.delattr(dist, name)
    monkeypatch.setattr(dist, "is_available", lambda: False, raising=False)
    command = [animals, "--weights", pretrained, "--epochs", 2, *TINY]
    output = interrupt_after(1, [*map(str, command)], tmp_path / "run")
    run("--resume", output)
    for name, path in (("here", output), ("there", default_run.path)):
        table = tmp_path / f"{name}.csv"
        run(others, "--predict", path, "--device", "cpu", "--output", table)
    assert (tmp_path / "here.csv").read_bytes() == (tmp_path / "there.csv").read_bytes()


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder in which another process begins a run."""
    folder = tmp_path / "locked"
    lock = lambda _: training.lock_folder(folder, "") or time.sleep(100)  # noqa: E731
    process = Process(main=lock)
    process.wait_for((folder / training.LOCK).exists)
    time.sleep(0.1)
    yield folder
    process.kill(signal.SIGKILL)
    process.end(-signal.SIGKILL)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--weights nothing", "--weights nothing: this file does not exist; name one, or "),
        (
            "--weights none --output LOCKED",
            "/locked: another process is training in this folder; wait until it ends",
        ),
        (
            "--weights none --batch-size 2",
            "--batch-size 2: a step has too few images a process for batch normalisation; choose",
        ),
        ("--weights none", " became nan; try --no-amp"),
    ],
)
def test_bad_input_is_told_by_one_process(
    flags, told, animals, pretrained, locked, tmp_path, monkeypatch
):
    monkeypatch.setattr(training, "RANDOM_LEARNING_RATE", math.nan)
    words = [*TINY, "--output", tmp_path / "run", *flags.replace("LOCKED", str(locked)).split()]
    _, error = Process(animals, *words, processes=2).end(2)
    assert error.count(told) == error.count("error: ") == 1 and "Traceback" not in error
    assert ("go on with --resume" in error) is ("nan" in told)


@pytest.mark.parametrize(("flag", "processes", "size"), [("9", 2, 10), ("5", 8, 8), (None, 3, 33)])
def test_a_batch_is_rounded_up_to_a_multiple_of_the_processes(flag, processes, size, animals):
    flags = ["--batch-size", flag] if flag else []  # else 32 for few images
    said, options = training.parse_args([str(animals), "--weights", "none", *flags])
    settings, *_ = training.open_run(said, options, CPU._replace(world_size=processes))
    assert settings.batch_size == size


def test_of_several_processes_each_starts_its_workers_before_they_talk(animals):
    paths = [str(path) for path in animals.rglob("*.jpg")]
    images = training.Images(paths, torch.arange(38), training.Preparation(32, 255))
    before = multiprocessing.active_children()
    reader = training.Reader(images, CPU._replace(world_size=2), 1, 2)
    assert len(multiprocessing.active_children()) == len(before) + 1
    read = reader.read(training.cut_batches(torch.tensor([3, 1, 2]), 2), "")
    assert torch.cat([group.labels for [group] in read]).tolist() == [3, 1, 2]


def test_nobody_touches_a_run_that_is_alive(animals, pretrained, default_run, tmp_path, capsys):
    """Neither who would go on with it nor who would begin there; after its end it is as alone."""
    command = [animals, "--weights", pretrained, *TINY, "--output", tmp_path / "run"]
    process = Process(*command, "--epochs", 2, rest=0.3)
    process.wait_for(lambda: "\n 1/1    1/2 " in process.printed()[0])
    process.kill(signal.SIGSTOP)
    try:
        [error] = refused(["--resume", tmp_path / "run"], capsys)
        assert f"{tmp_path / 'run'}: another process is training in this folder" in error
        assert error.endswith("; wait until it ends")  # not: go on with --resume
        assert (
            "run: this is not an empty folder; name a new one"
            in refused(command, capsys, tmp_path)[-1]
        )
    finally:
        process.kill(signal.SIGCONT)
    process.end()
    table = (default_run.path / "predictions.csv").read_bytes()
    assert (tmp_path / "run/predictions.csv").read_bytes() == table


def test_a_device_that_cannot_be_used_is_told_with_one_that_can(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("hpu"))
    for name in ("auto", "gpu", "meta"):
        with pytest.raises(training.DataError, match=f"^--device {name}: .*; try --device cpu$"):
            training.pick_compute(SimpleNamespace(device=name, amp=None))


def test_a_device_whose_memory_is_full_is_not_told_as_a_missing_one(
    animals, tmp_path, monkeypatch, capsys
):
    """What finds out whether a device works takes a little memory, which others may have taken."""
    asked = []

    def full(*_: object, device: torch.device) -> None:
        asked.append(str(device))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    command = [animals, "--weights", "none", "--device", "cpu"]
    with monkeypatch.context() as patch:
        for name in ("zeros", "ones", "empty"):  # by one of them
            patch.setattr(torch, name, full)
        [line] = refused([*command, "--output", tmp_path / "run"], capsys, tmp_path)
    advice = "try a smaller --batch-size or --image-size, fewer --workers, or --device cpu"
    assert line == f"data_training.py: error: out of memory; {advice}"
    assert asked == ["cpu"]


@pytest.mark.parametrize(
    ("capability", "amp", "precision"),
    [
        *(((6, 0), None, "float32"), ((6, 0), True, "float16"), ((7, 5), None, "float16")),
        *(((8, 0), None, "bfloat16"), ((8, 0), False, "float32")),
    ],
)
def test_mixed_precision_is_for_gpus_that_gain_from_it(capability, amp, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: capability >= (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert training.pick_precision(torch.device("cuda", 0), amp) == precision


@pytest.mark.parametrize(
    ("device", "cores", "processes", "workers"),
    [
        *(("cuda", 1, 1, 1), ("cuda", 4, 1, 3), ("cuda", 64, 1, 16), ("cuda", 64, 8, 7)),
        *(("cpu", 1, 1, 0), ("cpu", 2, 1, 1), ("cpu", 64, 1, 4), ("cpu", 12, 2, 3)),
    ],
)
def test_images_are_read_by_as_many_workers_as_there_are_cores_to_spare(
    device, cores, processes, workers, monkeypatch
):
    """Beside a CPU that trains by half of its cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert training.count_workers(None, device) == workers
    assert training.count_workers(5, device) == 5
