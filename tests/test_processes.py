"""What `data_training.py` promises of devices, and of runs in or beside several processes."""

import copy
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CPU,
    TINY,
    Process,
    as_trained,
    assert_moved_alike,
    begin,
    network_of,
    open_run,
    prepare,
    refused,
    rows_of,
    run,
)

import data_training as training


def test_two_processes_train_the_heads_of_folds_as_one_does(animals, others, pretrained, tmp_path):
    """To within rounding: of all layers they do not, as BatchNorm sees half of each batch.

    There is one image to test with, so that one of them has none.
    """
    (tmp_path / "one/bee").mkdir(parents=True)
    shutil.copy(next((others / "bee").iterdir()), tmp_path / "one/bee")
    command = [animals, "--weights", pretrained, "--epochs", 1, *TINY]
    command += ["--folds", 3, "--val", tmp_path / "one"]
    printed, _ = Process(*command, "--output", tmp_path / "two", processes=2).end()
    assert printed.count("imbalance ratio") == 1  # only one of them prints
    several, alone = tmp_path / "two", run(*command, "--output", tmp_path / "alone").path
    assert (alone / "split.csv").read_bytes() == (several / "split.csv").read_bytes()
    tables = [
        [row for row in rows_of(path / "history.csv") if row["stage"] == "head"]
        for path in (alone, several)
    ]
    assert [row["fold"] for row in tables[0]] == ["1", "2", "3"]
    for ours, theirs in zip(*tables, strict=True):
        for name in ("train_loss", "val_loss", "balanced_accuracy"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-3), name
        assert ours["fewest_draws"] == theirs["fewest_draws"]
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
    """An epoch of all layers, by two processes."""
    output = tmp_path_factory.mktemp("two") / "run"
    command = [animals, "--weights", pretrained, "--epochs", 1, *TINY, "--output", output]
    Process(*command, processes=2).end()
    return output


def test_two_processes_train_all_layers_as_a_loop_that_is_written_by_hand(
    two, animals, pretrained, tmp_path
):
    """Each takes every other image of a batch, and the gradient is the mean over all images."""
    command = [animals, "--weights", pretrained, "--epochs", 1, *TINY]
    given, progress = prepare(*command, "--output", tmp_path / "other")
    trainer, model, data = begin(given, progress, 1), given.model, given.data
    learnt, stream = data.learns(0), training.seeded("draw", 0, 0, 1)
    drawn = training.draw_epoch(data.labels, learnt, 1.0, 1, stream)
    batches = training.cut_batches(drawn, 12, training.seeded("augment", 0, 0, 1))
    assert [len(batch) for batch in batches] == [11, 10, 10]  # 6 and 5 images, 5 and 5, 5 and 5
    for batch in batches:
        losses, twin = [], copy.deepcopy(model)
        for part, network in ((batch[::2], model), (batch[1::2], twin)):
            [[pixels, targets]] = given.reader.read([part], "")
            logits = network(training.to_device(pixels, CPU))
            losses.append(F.cross_entropy(logits, targets, reduction="sum") / len(batch))
        losses[1].backward()
        model.zero_grad()
        gradients = [weight.grad for weight in twin.parameters()]
        # The sum of the gradients of both, by a loss that has that of the second one.
        pairs = zip(model.parameters(), gradients, strict=True)
        trainer.step(losses[0] + sum((weight * slope).sum() for weight, slope in pairs))
    # Statistics are those of the first process.
    assert_moved_alike(as_trained(two)["networks"][0], model, progress.start)


@pytest.mark.parametrize("picked", ["float32 bfloat16", "bfloat16 float32"])
def test_unlike_devices_compute_in_the_precision_of_the_first(
    picked, two, animals, pretrained, tmp_path, monkeypatch
):
    names = picked.split()
    monkeypatch.setattr(training, "pick_precision", lambda *_: names[int(os.environ["RANK"])])
    command = [animals, "--weights", pretrained, "--epochs", 1, *TINY]
    printed, _ = Process(*command, "--output", tmp_path / "run", processes=2).end()
    assert f"; cpu, {names[0]}, processes: 2;" in printed
    tables = [(path / "predictions.csv").read_bytes() for path in (two, tmp_path / "run")]
    assert (tables[0] == tables[1]) is (names[0] == "float32")


def test_bad_input_is_told_by_one_process(animals, tmp_path):
    command = [animals, "--weights", "nothing", "--device", "cpu", "--output", tmp_path / "run"]
    out, error = Process(*command, processes=2).end(2)
    assert (
        out == "" and error.count("data_training.py: error: --weights nothing: no such file") == 1
    )
    assert "Traceback" not in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("flag", "processes", "size"), [(9, 2, 10), (64, 1, 64), (5, 8, 8)])
def test_a_batch_is_rounded_up_to_a_multiple_of_the_processes(flag, processes, size, animals):
    args = training.parse_args([str(animals), "--weights", "none", "--batch-size", str(flag)])
    settings, *_ = training.open_run(args, CPU._replace(world_size=processes))
    assert settings.batch_size == size
    assert open_run(animals, "--weights", "none")[0].batch_size == 32  # few images


def test_of_several_processes_each_starts_its_workers_before_they_talk(animals):
    paths = sorted(map(str, animals.rglob("*.jpg")))
    images = training.Images(paths, torch.arange(len(paths)), 255, 32)
    before = len(multiprocessing.active_children())
    reader = training.Reader(images, CPU._replace(world_size=2), 1, 2)
    assert len(multiprocessing.active_children()) == before + 1
    read = reader.read(training.cut_batches(torch.tensor([3, 1, 2]), 2), "")
    assert torch.cat([labels for _, labels in read]).tolist() == [3, 1, 2]


def test_nobody_touches_a_run_that_is_alive(animals, pretrained, default_run, tmp_path, capsys):
    """Neither who would go on with it nor who would begin there; after its end it is as alone."""
    command = [animals, "--weights", pretrained, *TINY, "--output", tmp_path / "run"]
    process = Process(*command, "--epochs", 2, rest=0.3)
    process.wait_for(lambda: "\n 1/1    1/2 " in process.printed()[0])
    process.kill(signal.SIGSTOP)
    try:
        [error] = refused(["--resume", tmp_path / "run"], capsys)
        assert f"{tmp_path / 'run'}: another process is at work there" in error
        assert "not empty" in refused(command, capsys, tmp_path)[-1]
    finally:
        process.kill(signal.SIGCONT)
    process.end()
    for name in ("predictions.csv", "classes.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (default_run.path / name).read_bytes()
    assert network_of(tmp_path / "run").keys() == network_of(default_run.path).keys()


# ------------------------------------------------------------------------- devices and workers


def test_a_device_that_cannot_be_used_is_told_with_one_that_can(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("hpu"))
    for name in ("auto", "gpu", "meta"):
        with pytest.raises(training.DataError, match=f"^--device {name}: .*; try cpu or hpu$"):
            training.pick_compute(name, None)


@pytest.mark.parametrize(
    ("capability", "bfloat16", "amp", "precision"),
    [
        ((6, 0), False, None, "float32"),
        ((6, 0), False, True, "float16"),
        ((7, 5), False, None, "float16"),
        ((8, 0), True, None, "bfloat16"),
        ((8, 0), True, False, "float32"),
    ],
)
def test_mixed_precision_is_for_gpus_that_gain_from_it(
    capability, bfloat16, amp, precision, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bfloat16)
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
