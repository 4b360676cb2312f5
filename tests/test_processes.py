"""What `data_training.py` promises of devices, and of runs in or beside several processes."""

import contextlib
import copy
import errno
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import (
    CODE,
    CPU,
    RESTING,
    SCRIPT,
    TINY,
    Process,
    assert_moved_alike,
    network_of,
    prepare,
    refused,
    rows_of,
    run,
    whole_of,
)
from test_resume import assert_same_run
from torch import Tensor, nn

import data_training as training


def test_two_processes_train_the_heads_of_folds_as_one_does_on_one_backbone(
    animals, others, pretrained, tmp_path
):
    """To within rounding: of all layers they do not, as BatchNorm sees half of each batch.

    There is one image to test with, so that one of them has none.
    """
    (tmp_path / "one/bee").mkdir(parents=True)
    shutil.copy(next((others / "bee").iterdir()), tmp_path / "one/bee")
    command = [animals, "--weights", pretrained, "--epochs", 1, "--frozen-epochs", 1, *TINY]
    command += ["--folds", 3, "--val", tmp_path / "one"]
    printed, _ = Process(*command, "--output", tmp_path / "two", processes=2).end()
    one, two = run(*command, "--output", tmp_path / "alone").path, tmp_path / "two"
    assert printed.count("training images in 3 classes") == 1  # only one of them prints
    assert (one / "split.csv").read_bytes() == (two / "split.csv").read_bytes()
    networks = [network_of(path)["networks"] for path in (one, two)]
    assert len(networks[0]) == len(networks[1]) == 3
    for ours, theirs in zip(*networks, strict=True):
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)
            assert ("fc." in name) or torch.equal(value, networks[0][0][name])
    assert not torch.equal(networks[0][0]["fc.weight"], networks[0][1]["fc.weight"])
    phases = [(row["fold"], row["phase"]) for row in rows_of(one / "history.csv")]
    assert phases == [(fold, "head") for fold in "123"]
    classes = rows_of(one / "classes.csv")
    assert [row["val_images"] for row in classes] == ["20", "12", "6"]
    assert min(float(row["recall"]) for row in classes) > 0.5  # any features tell colours apart
    for table in ("predictions.csv", "test_predictions.csv"):
        for ours, theirs in zip(rows_of(one / table), rows_of(two / table), strict=True):
            assert all(ours[key] == theirs[key] for key in ("path", "class", "predicted"))
            sure = [float(row["probability"]) for row in (ours, theirs)]
            assert sure[0] == pytest.approx(sure[1], abs=1e-3)
    draws = [[row["draws"] for row in rows_of(path / "classes.csv")] for path in (one, two)]
    assert draws[0] == draws[1]


def test_two_processes_train_all_layers_as_a_loop_that_is_written_by_hand(
    animals, pretrained, tmp_path
):
    """Each takes every other image of a batch, and the gradient is the mean over all images."""
    command = ["--weights", str(pretrained), "--epochs", "1", *TINY]
    command += ["--no-calibration", "--output"]
    Process(animals, *command, tmp_path / "two", processes=2).end()
    given, progress = prepare(animals, *command, str(tmp_path / "other"))
    _, stage = training.plan(given, progress, 0)
    model, reader = progress.model.train(), training.Reader(given)
    optimizer = training.whole_optimizer(given, progress, 0)
    trainer = training.Trainer(model, stage, optimizer, given)
    seeds = training.seeded("augment", 0, 0, 1)
    batches = training.cut_batches(training.draw_epoch(given, stage, 1), 12, seeds)
    assert [len(batch) for batch in batches] == [11, 10, 10]  # 6 and 5 images, 5 and 5, 5 and 5
    for batch in batches:
        losses, twin = [], copy.deepcopy(model)
        for part, network in ((batch[::2], model), (batch[1::2], twin)):
            [[pixels, targets]] = reader.read([part], "")
            logits = network(training.to_input(pixels, CPU.device))
            losses.append(F.cross_entropy(logits, targets, reduction="sum") / len(batch))
        losses[1].backward()
        model.zero_grad()
        gradients = [weight.grad for weight in twin.parameters()]
        # The sum of the gradients of both, by a loss that has that of the second one.
        pairs = zip(model.parameters(), gradients, strict=True)
        trainer.step(losses[0] + sum((weight * slope).sum() for weight, slope in pairs))
    # Statistics are those of the first process.
    assert_moved_alike(whole_of(tmp_path / "two"), model, progress.start)
    # What was evaluated is what was saved, in both processes.
    flags = ["--weights", tmp_path / "two/network.pt", "--epochs", 0, *TINY]
    alone = run(animals, *flags, "--output", tmp_path / "one").path
    tables = [rows_of(path / "predictions.csv") for path in (alone, tmp_path / "two")]
    for ours, theirs in zip(*tables, strict=True):
        assert (ours["path"], ours["predicted"]) == (theirs["path"], theirs["predicted"])
        assert float(ours["probability"]) == pytest.approx(float(theirs["probability"]), abs=1e-4)


def test_two_processes_do_not_predict_twice(default_run, animals):
    out, error = Process(animals, "--predict", default_run.path, processes=2).end(2)
    assert out == "" and "--predict: takes one process; start it without torchrun" in error


@pytest.mark.parametrize(
    ("flags", "said", "most"),
    [
        ("--batch-size 9", "--batch-size 9: cannot be divided among 2 processes", 1),
        ("--image-size 20000000", "out of memory on --device cpu; try a smaller --batch-size", 2),
    ],
)
def test_bad_input_is_told_by_one_process_and_where_memory_is_out_by_each(
    flags, said, most, animals, tmp_path
):
    command = [animals, "--weights", "none", *flags.split(), "--device", "cpu"]
    _, error = Process(*command, "--output", tmp_path / "run", processes=2).end(2)
    lines = [each for each in error.splitlines() if each.startswith("data_training.py: error: ")]
    assert 1 <= len(lines) <= most and all(said in line for line in lines)
    assert f'File "{SCRIPT}"' not in error and (tmp_path / "run").exists() == (most == 2)


def test_a_torch_built_without_distributed_trains(animals, pretrained, tmp_path, monkeypatch):
    for name in [name for name in vars(dist) if name.startswith("is_")]:
        monkeypatch.delattr(dist, name)
    monkeypatch.setattr(dist, "is_available", lambda: False, raising=False)
    command = [animals, "--weights", pretrained, *TINY, "--epochs", 1]
    Process(*command, "--output", tmp_path / "run").end()
    assert len(rows_of(tmp_path / "run/history.csv")) == 2


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_processes_share_the_images_that_are_judged_and_the_batches(
    world_size, animals, tmp_path
):
    """Each evaluates batch / processes images at once, and all of them every image once."""
    flags = ["--weights", "none", *TINY, "--output", str(tmp_path / "run")]
    given, progress = prepare(animals, *flags)
    places, parts = given.data.learns(0), []
    for rank in range(world_size):
        read: list[Tensor] = []

        def answer(batches: list[Tensor], _: str, read: list[Tensor] = read):  # noqa: ANN202
            read += batches
            return ((torch.zeros(len(batch), 64), batch[:, 0]) for batch in batches)

        ours = training.replace(given, compute=CPU._replace(rank=rank, world_size=world_size))
        source = SimpleNamespace(read=answer)
        logits = training.evaluate(ours, progress.model.fc, source, places)
        assert max(map(len, read)) <= 12 // world_size
        assert len(read) == -(-len(places[rank::world_size]) // (12 // world_size))
        parts.append(torch.cat(read)[:, 0])
        assert len(logits) == len(parts[-1])
    for place, index in enumerate(places.tolist()):
        assert parts[place % world_size][place // world_size] == index


@pytest.mark.parametrize(("batch_size", "processes"), [(9, 3), (64, 1), (4, 4), (12, 12)])
def test_a_batch_must_divide_among_the_processes(batch_size, processes, animals, tmp_path):
    """There are 31 images, so batches of 4 have 3 or 4; and 7 to validate on."""
    command = [str(animals), "--weights", "none", *TINY, "--batch-size", str(batch_size)]
    args = training.parse_args([*command, "--output", str(tmp_path / "run")])
    args.workers, said = 0, f"--batch-size {batch_size}: .* {processes} processes"
    refused = pytest.raises(training.DataError, match=said)
    with training.HELD, contextlib.nullcontext() if processes < 4 else refused:
        training.prepare(args, CPU._replace(world_size=processes))
        again = training.parse_args(["--resume", str(tmp_path / "run"), "--workers", "0"])
        with pytest.raises(training.DataError, match=f"--batch-size {batch_size}: .* 10 processes"):
            training.prepare(again, CPU._replace(world_size=10))


@pytest.mark.parametrize(
    ("device", "batch_size", "synchronised"),
    [("cuda", 64, False), ("cuda", 60, True), ("xpu", 8, True), ("cpu", 8, False)],
)
def test_batchnorm_is_synchronised_where_a_gpu_has_fewer_than_eight_images(
    device, batch_size, synchronised, tmp_path
):
    compute = training.Compute(torch.device(device), None, 0, 8)
    given = SimpleNamespace(settings=SimpleNamespace(batch_size=batch_size), compute=compute)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/met", rank=0, world_size=1)
    refused = pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules")
    try:
        with refused if synchronised else contextlib.nullcontext():  # there is no GPU to put it on
            training.wrap_ddp(network, given)
    finally:
        torch.distributed.destroy_process_group()
    assert synchronised == isinstance(network[1], nn.SyncBatchNorm)


@pytest.mark.parametrize(
    ("kind", "gpus", "built", "backend"),
    [
        ("cuda", 2, True, "cpu:gloo,cuda:nccl"),
        ("cuda", 1, True, "gloo"),  # two processes share it
        ("cuda", 2, False, "gloo"),  # Windows
        ("cpu", 0, False, "gloo"),
        ("xpu", 2, True, "cpu:gloo,xpu:xccl"),
        ("xpu", 2, False, None),  # gloo serves no GPU of Intel's
        ("xpu", 1, True, None),
        ("mps", 1, True, None),  # serves one process
    ],
)
def test_processes_talk_by_gloo_where_nccl_is_not_there_or_would_refuse(
    kind, gpus, built, backend, monkeypatch
):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: gpus)
    for name in ("is_nccl_available", "is_xccl_available"):
        monkeypatch.setattr(torch.distributed, name, lambda: built, raising=False)
    said = f"--device {kind}: .* start without torchrun"
    refused = pytest.raises(training.DataError, match=said)
    with contextlib.nullcontext() if backend else refused:
        assert training.pick_backend(kind) == backend


def test_a_device_that_cannot_be_used_is_told_with_one_that_can(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("hpu"))
    cures = {"auto": "cpu", "hpu": "cpu", "gpu": "auto, or hpu", "meta": "auto, or hpu"}
    for name, cure in cures.items():
        with pytest.raises(training.DataError, match=f"^--device {name}: .*; try {cure}$"):
            training.find_device(name)


# ----------------------------------------------------------------- one run, one process at a time


def test_nobody_touches_a_run_that_is_alive(animals, pretrained, default_run, tmp_path, capsys):
    """Neither who would go on with it nor who would begin there; after its end it is as alone."""
    command = [animals, "--weights", pretrained, *TINY, "--output", tmp_path / "run"]
    process = Process(*command, "--epochs", 2, code=RESTING)
    process.wait_for(lambda: "\n 1/1    1/2 " in process.printed()[0])
    process.kill(signal.SIGSTOP)
    try:
        [error] = refused(["--resume", tmp_path / "run"], capsys, tmp_path)
        assert f"{tmp_path / 'run'}: another process is at work there" in error
        assert "not empty" in refused(command, capsys, tmp_path)[-1]
        with pytest.raises(training.DataError, match="at work"):
            training.hold_folder(tmp_path / "run").__enter__()
    finally:
        process.kill(signal.SIGCONT)
    process.end()
    assert_same_run(default_run.path, tmp_path / "run")


def test_a_lock_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """Its owner has ended between our opening and our locking it, and a third may have begun."""
    lock = training.lock_file(tmp_path / ".lock")
    monkeypatch.setattr(training.fcntl, "lockf", lambda *_: (tmp_path / ".lock").unlink())
    with pytest.raises(training.DataError, match="at work"):
        training.lock_file(tmp_path / ".lock")
    os.close(lock)


def test_where_the_file_system_has_no_locks_a_run_does_without(tmp_path, monkeypatch):
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(training.fcntl, "lockf", lockf)
    with training.hold_folder(tmp_path / "new/run"):
        assert (tmp_path / "new/run").is_dir()
    assert not any(tmp_path.iterdir())  # no run has come of it


# -------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("picked", "agreed"),
    [("bfloat16 bfloat16", "bfloat16"), ("bfloat16 float16", "float16"), ("float16 None", "None")],
)
def test_unlike_gpus_agree_on_one_precision(picked, agreed, animals, default_run, tmp_path):
    """Process 0 prints what is used; the answers are those of one process."""
    names = f"getattr(torch, {picked.split()}[int(os.environ['RANK'])], None)"
    code = CODE.replace("\nif __name__", f"\npick_precision = lambda *_: {names}\nif __name__")
    command = [animals, "--weights", default_run.path / "network.pt", "--epochs", 0]
    command += ["--batch-size", 12, "--device", "cpu", "--output"]
    printed, _ = Process(*command, tmp_path / "two", processes=2, code=code).end()
    assert f"; cpu, torch.{agreed.replace('None', 'float32')}\n" in printed
    one = run(*command, tmp_path / "one", "--no-amp").path
    answers = [
        {row["path"]: float(row["true_probability"]) for row in rows_of(path / "predictions.csv")}
        for path in (one, tmp_path / "two")
    ]
    assert answers[0] == pytest.approx(answers[1], abs=0.02)


@pytest.mark.parametrize(
    ("gpu", "capability", "bfloat16", "amp", "precision"),
    [
        ("Tesla P100", (6, 0), False, None, None),
        ("NVIDIA GeForce GTX 1660 Ti", (7, 5), False, None, None),
        ("NVIDIA GeForce GTX 1660 Ti", (7, 5), False, True, torch.float16),
        ("Tesla V100", (7, 0), False, None, torch.float16),
        ("Tesla T4", (7, 5), False, None, torch.float16),
        ("NVIDIA A100", (8, 0), True, None, torch.bfloat16),
        ("NVIDIA A100", (8, 0), True, False, None),
    ],
)
def test_mixed_precision_is_for_gpus_that_gain_from_it(
    gpu, capability, bfloat16, amp, precision, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: gpu)
    assert training.pick_precision(torch.device("cuda", 0), amp) is precision
    properties = SimpleNamespace(has_bfloat16_conversions=bfloat16)  # of a GPU of Intel's
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda _: properties)
    picked = training.pick_precision(torch.device("xpu", 0), None)
    assert picked is (torch.bfloat16 if bfloat16 else None)


# ---------------------------------------------------------------------------------------- workers


@pytest.mark.parametrize(
    ("system", "device", "cores", "processes", "workers"),
    [
        *(("linux", "cuda", 1, 1, 1), ("linux", "cuda", 2, 1, 2), ("linux", "cuda", 4, 1, 3)),
        *(("linux", "cuda", 64, 1, 63), ("linux", "cuda", 256, 2, 64), ("linux", "cuda", 64, 8, 7)),
        *(("linux", "cuda", 2, 4, 1), ("darwin", "mps", 64, 1, 8)),
        *(("win32", "cuda", 16, 1, 4), ("win32", "cuda", 16, 2, 2)),
        *(("linux", "cpu", 1, 1, 0), ("linux", "cpu", 2, 1, 1), ("linux", "cpu", 64, 1, 4)),
        *(("linux", "cpu", 12, 2, 3), ("linux", "cpu", 2, 2, 0), ("win32", "cpu", 16, 2, 2)),
    ],
)
def test_images_are_read_by_as_many_workers_as_there_are_cores_to_spare(
    system, device, cores, processes, workers, monkeypatch
):
    """Beside a CPU that trains by half of its cores."""
    monkeypatch.setattr(os, "process_cpu_count", lambda: cores, raising=False)
    monkeypatch.setattr(training, "get_start_method", lambda: "spawn")
    monkeypatch.setattr(sys, "platform", system)
    assert training.pick_workers(device, processes) == workers


@pytest.mark.parametrize(
    ("free", "processes", "workers"), [(2**26, 1, 2), (2**26, 2, 0), (2**27, 2, 2), (2**33, 2, 8)]
)
def test_workers_leave_room_in_shared_memory_for_nccl(free, processes, workers, monkeypatch):
    """A batch has 12.6 million bytes; docker gives 64 MB unless told otherwise."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setattr(Path, "is_dir", lambda _: True)
    settings = SimpleNamespace(device="cuda", image_size=224, batch_size=64)
    assert training.count_workers(settings, 8) == workers


@pytest.mark.parametrize(("length", "workers"), [(69, 1), (70, 0)])
def test_workers_need_room_for_the_names_of_their_sockets(length, workers, monkeypatch, capsys):
    """Of 107 characters 34 are theirs; where a worker cannot make one, a run would never end."""
    monkeypatch.setattr(tempfile, "tempdir", "/".ljust(length, "x"))
    settings = SimpleNamespace(device="cpu", image_size=24, batch_size=1)
    assert training.count_workers(settings, 1) == workers
    assert capsys.readouterr().err.startswith("warning: workers need") is (workers == 0)


def test_of_several_processes_each_starts_its_workers_before_they_talk(animals, tmp_path):
    flags = ["--weights", "none", *TINY, "--output", str(tmp_path / "run"), "--workers", "1"]
    given, _ = prepare(animals, *flags)
    before = len(multiprocessing.active_children())
    ours = training.replace(given, compute=CPU._replace(world_size=2))
    reader = training.Reader(ours)
    assert len(multiprocessing.active_children()) == before + 1
    batches = training.cut_batches(torch.tensor([3, 1, 2]), 2)
    read = [each[1] for each in reader.read(batches, "")]
    assert torch.cat(read).tolist() == given.data.labels[[3, 1, 2]].tolist()


# ------------------------------------------------------------------------------------- what is said


def test_the_time_that_is_left_is_told_once_it_is_known_and_worth_it(capsys):
    assert not training.tell_time_left(9, 0.5, 10) and not training.tell_time_left(50, 0.05, 10)
    assert training.tell_time_left(10, 0.9, 10)  # under two minutes
    assert capsys.readouterr().err == ""
    assert training.tell_time_left(10, 0.5, 10)  # 10 epochs of 20 s, less 10 s: 190 seconds
    assert capsys.readouterr().err == "about 4 min to go\n"
