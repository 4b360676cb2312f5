"""What `data_training.py` promises of runs that are spread over several processes."""

import contextlib
import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, SCRIPT, TINY, assert_moved_alike, network_of, prepare, rows_of, run, start
from torch import Tensor, nn

import data_training as training


def spread(*command: object, status: int = 0, script: Path = SCRIPT) -> tuple[str, str]:
    """What two processes under torchrun print: stdout and stderr."""
    process = start(*map(str, command), processes=2, script=script)
    printed, error = process.communicate(timeout=240)
    assert (process.returncode == 0) == (status == 0), error
    return printed, error


def test_two_processes_train_the_heads_of_folds_as_one_does_on_one_backbone(
    animals, others, pretrained, tmp_path, monkeypatch
):
    """To within rounding: of all layers they do not, as BatchNorm sees half of each batch."""
    script, code = tmp_path / "data_training.py", SCRIPT.read_text(encoding="utf-8")
    script.write_text(code.replace("HEAD_STEPS = 1000", "HEAD_STEPS = 100"), encoding="utf-8")
    monkeypatch.setattr(training, "HEAD_STEPS", 100)
    command = [animals, "--weights", pretrained, "--epochs", 1, "--frozen-epochs", 1, *TINY]
    command += ["--folds", 3, "--val", others]
    printed, _ = spread(*command, "--output", tmp_path / "two", script=script)
    one, two = run(*command, "--output", tmp_path / "one").path, tmp_path / "two"
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
    command = ["--weights", str(pretrained), "--epochs", "1", "--frozen-epochs", "0", *TINY]
    command += ["--no-calibration", "--output"]
    spread(animals, *command, tmp_path / "two")
    given, progress = prepare(animals, *command, str(tmp_path / "other"))
    [stage] = training.plan(given, progress, 0)
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
    [state] = network_of(tmp_path / "two")["networks"]
    assert_moved_alike(state, model, progress.start)  # statistics are those of the first process
    # What was evaluated is what was saved, in both processes.
    flags = ["--weights", tmp_path / "two/network.pt", "--epochs", 0, *TINY]
    alone = run(animals, *flags, "--output", tmp_path / "one").path
    tables = [rows_of(path / "predictions.csv") for path in (alone, tmp_path / "two")]
    for ours, theirs in zip(*tables, strict=True):
        assert (ours["path"], ours["predicted"]) == (theirs["path"], theirs["predicted"])
        assert float(ours["probability"]) == pytest.approx(float(theirs["probability"]), abs=1e-4)


@pytest.mark.parametrize(
    ("flags", "said", "most"),
    [
        ("--batch-size 9", "--batch-size 9: cannot be divided among 2 processes", 1),
        ("--image-size 20000000", "--batch-size: out of memory; try half of it or a smaller", 2),
    ],
)
def test_bad_input_is_told_by_one_process_and_where_memory_is_out_by_each(
    flags, said, most, animals, tmp_path
):
    command = [animals, "--weights", "none", *flags.split(), "--device", "cpu"]
    _, error = spread(*command, "--output", tmp_path / "run", status=2)
    lines = [each for each in error.splitlines() if each.startswith("data_training.py: error: ")]
    assert 1 <= len(lines) <= most and all(said in line for line in lines)
    assert f'File "{SCRIPT}"' not in error and (tmp_path / "run").exists() == (most == 2)


BARE = """
import sys
import torch.distributed as dist
for name in [name for name in vars(dist) if name.startswith("is_")]:
    delattr(dist, name)
dist.is_available = lambda: False
import data_training
sys.exit(data_training.main(sys.argv[1:]))
"""


def test_a_torch_built_without_distributed_trains(animals, pretrained, tmp_path):
    command = [sys.executable, "-c", BARE, str(animals), "--weights", str(pretrained), *TINY]
    command += ["--epochs", "1", "--output", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
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
            return ((torch.zeros(len(batch), 512), batch[:, 0]) for batch in batches)

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
    with contextlib.nullcontext() if processes < 4 else refused:
        training.prepare(args, CPU._replace(world_size=processes))


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


def test_a_device_that_serves_one_process_is_refused_under_torchrun(monkeypatch):
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(training.DataError, match="--device meta: .* without torchrun"):
        training.join_processes("meta", None)


@pytest.mark.parametrize(
    ("kind", "gpus", "nccl", "backend"),
    [
        ("cuda", 2, True, "cpu:gloo,cuda:nccl"),
        ("cuda", 1, True, "gloo"),  # two processes share it
        ("cuda", 2, False, "gloo"),  # Windows
        ("cpu", 0, False, "gloo"),
    ],
)
def test_processes_talk_by_gloo_where_nccl_is_not_there_or_would_refuse(
    kind, gpus, nccl, backend, monkeypatch
):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    assert training.pick_backend(kind) == backend
