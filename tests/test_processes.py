"""What `data_training.py` promises of runs that are spread over several processes."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SCRIPT, interrupt_after, rows_of, start, weights_file

import data_training as training


@pytest.fixture(scope="module")
def settings(folder: Path) -> list[str]:
    """With the statistics of BatchNorm kept: on CPUs each process would have its own.

    Not calibrated, so that the saved network gives the predictions again.
    """
    weights = weights_file(folder.parent / "pretrained.pth")
    command = [str(folder), "--arch", "resnet18", "--weights", str(weights), "--epochs", "6"]
    command += ["--frozen-epochs", "2", "--finetune", "gentle", "--no-calibration"]
    return [*command, "--image-size", "32", "--batch-size", "24", "--device", "cpu"]


def test_a_device_that_serves_one_process_is_refused_under_torchrun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
    kind: str, gpus: int, nccl: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    assert training.pick_backend(kind) == backend


BARE = """
import sys
import torch.distributed as dist
for name in [name for name in vars(dist) if name.startswith("is_")]:
    delattr(dist, name)
dist.is_available = lambda: False
import data_training
sys.exit(data_training.main(sys.argv[1:]))
"""


def test_a_torch_built_without_distributed_trains(settings: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", BARE, *settings, "--epochs", "2", "--frozen-epochs", "1"]
    command += ["--finetune", "auto", "--output", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(rows_of(tmp_path / "run/history.csv")) == 2


@pytest.fixture(scope="module")
def alone(settings: list[str], folder: Path) -> Path:
    """A run on one process."""
    assert training.main([*settings, "--output", str(folder.parent / "alone")]) == 0
    return folder.parent / "alone"


@pytest.fixture(scope="module")
def spread(settings: list[str], folder: Path) -> Path:
    """The same run, the first epoch on one process, the others on two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "WRITE_EVERY", 0.0)
        output = interrupt_after(1, settings, folder.parent / "spread")
    process = start(*settings, "--output", str(output), "--resume", processes=2)
    printed, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert printed.count("training images in 3 classes") == 1  # only one of them prints
    return output


def test_two_processes_draw_and_split_as_one_does(spread: Path, alone: Path) -> None:
    assert (spread / "split.csv").read_bytes() == (alone / "split.csv").read_bytes()
    keys = ("epoch", "phase", "fewest_draws", "most_draws", "distinct_images", "learning_rate")
    one, two = (rows_of(run / "history.csv") for run in (alone, spread))
    assert [[row[key] for key in keys] for row in one] == [
        [row[key] for key in keys] for row in two
    ]
    draws = [[row["draws"] for row in rows_of(run / "classes.csv")] for run in (alone, spread)]
    assert draws[0] == draws[1]
    for ours, theirs in zip(one, two, strict=True):  # the same run but for rounding
        assert float(ours["train_loss"]) == pytest.approx(float(theirs["train_loss"]), abs=0.02)


def test_two_processes_keep_to_the_split_of_a_file(
    alone: Path, settings: list[str], tmp_path: Path
) -> None:
    command = [*settings, "--epochs", "0", "--frozen-epochs", "0", "--seed", "1"]
    command += ["--split", str(alone / "split.csv"), "--output", str(tmp_path / "two")]
    process = start(*command, processes=2)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert (tmp_path / "two/split.csv").read_bytes() == (alone / "split.csv").read_bytes()
    paths = [
        [row["path"] for row in rows_of(run / "predictions.csv")]
        for run in (alone, tmp_path / "two")
    ]
    assert paths[0] == paths[1]


def test_two_processes_evaluate_as_one_does(
    spread: Path, settings: list[str], tmp_path: Path
) -> None:
    weights = ["--weights", str(spread / "last.pt")]
    command = [*settings, "--epochs", "0", "--frozen-epochs", "0", *weights]
    assert training.main([*command, "--output", str(tmp_path / "one")]) == 0
    tables = [rows_of(run / "predictions.csv") for run in (tmp_path / "one", spread)]
    for one, two in zip(*tables, strict=True):
        assert all(one[key] == two[key] for key in ("path", "class", "predicted"))
        assert float(one["probability"]) == pytest.approx(float(two["probability"]), abs=1e-4)
    one, last = (rows_of(run / "history.csv")[-1] for run in (tmp_path / "one", spread))
    for key in ("accuracy", "balanced_accuracy", "medium", "few", "half_width"):
        assert one[key] == last[key]
    assert float(one["val_loss"]) == pytest.approx(float(last["val_loss"]), rel=1e-4)


def test_the_statistics_of_batchnorm_are_the_first_process_s_own(
    folder: Path, tmp_path: Path
) -> None:
    """Each process has seen other batches; what is evaluated is what is saved."""
    command = [str(folder), "--arch", "resnet18", "--image-size", "32", "--device", "cpu"]
    scratch = [*command, "--weights", "none", "--epochs", "1", "--batch-size", "16"]
    scratch += ["--no-calibration"]
    process = start(*scratch, "--output", str(tmp_path / "two"), processes=2)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    given = [*command, "--weights", str(tmp_path / "two/last.pt"), "--epochs", "0"]
    assert training.main([*given, "--output", str(tmp_path / "one")]) == 0
    for one, two in zip(
        *(rows_of(tmp_path / name / "predictions.csv") for name in ("one", "two")), strict=True
    ):
        assert float(one["probability"]) == pytest.approx(float(two["probability"]), abs=1e-4)


def test_bad_input_is_told_by_one_process_alone(settings: list[str]) -> None:
    process = start(*settings, "--frozen-epochs", "9", processes=2)
    _, said = process.communicate(timeout=120)
    lines = [line for line in said.splitlines() if "data_training.py: error: " in line]
    assert len(lines) == 1 and "--frozen-epochs 9: more than --epochs 6" in lines[0]
    assert f'File "{SCRIPT}"' not in said  # no traceback of the other


def test_a_process_that_dies_takes_the_others_down(settings: list[str], tmp_path: Path) -> None:
    long = ["--epochs", "400", "--frozen-epochs", "0", "--output", str(tmp_path / "x")]
    process = start(*settings, *long, processes=2)
    for line in process.stdout:
        if line.startswith("  1/400"):
            break
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0


END_OF_TRIAL = """
import dataclasses, functools, sys, torch
import data_training as training
from conftest import begin
path, *command = sys.argv[1:]
training.TRIAL_STEPS = 1
args = training.parse_args(command)
compute = training.join_processes(args.device, args.amp)
make = functools.partial(training.prepare, args, compute)
given, progress = training.first_makes(make, compute)
given = dataclasses.replace(given, compute=compute)
stage = begin(given, progress, 1)
drawn = training.draw_epoch(given, stage.phase, 1)
batches = training.cut_batches(drawn, 24, training.seeded("augment", 0, 1))
training.estimate_statistics(given, stage.trainer.average, batches, stage.reader)
if compute.rank == compute.world_size - 1:
    torch.save(stage.trainer.result.state_dict(), path)
progress.trainer = stage = None  # nothing may use the group that ends
if training.dist.is_initialized():
    training.dist.destroy_process_group()
"""


def test_averaged_weights_get_the_statistics_of_the_same_images_in_two_processes(
    settings: list[str], tmp_path: Path
) -> None:
    (tmp_path / "end.py").write_text(END_OF_TRIAL)
    command = [*settings, "--frozen-epochs", "0", "--finetune", "auto"]
    path = os.pathsep.join(map(str, (SCRIPT.parent, Path(__file__).parent)))
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, way in (("one", []), ("two", several)):
        line = [sys.executable, *way, str(tmp_path / "end.py"), str(tmp_path / name), *command]
        subprocess.run(line, check=True, env=os.environ | {"PYTHONPATH": path})
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    assert one["bn1.num_batches_tracked"] == 2  # 46 images, 24 a batch
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("device", "batch_size", "synchronised"),
    [("cuda", 64, False), ("cuda", 60, True), ("xpu", 8, True), ("cpu", 8, False)],
)
def test_batchnorm_is_synchronised_where_a_gpu_has_fewer_than_eight_images(
    device: str, batch_size: int, synchronised: bool, tmp_path: Path
) -> None:
    compute = training.Compute(torch.device(device), None, 0, 8)
    given = SimpleNamespace(args=SimpleNamespace(batch_size=batch_size), compute=compute)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/met", rank=0, world_size=1)
    refused = pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules")
    try:
        with refused if synchronised else contextlib.nullcontext():  # there is no GPU to put it on
            training.wrap_ddp(network, given)
    finally:
        torch.distributed.destroy_process_group()
    assert synchronised == isinstance(network[1], torch.nn.SyncBatchNorm)


def test_a_step_is_that_of_the_whole_batch_when_parts_differ_in_size() -> None:
    """Five images over two processes, three and two: the mean of their gradients."""
    stream = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(5, 2, generator=stream) / 10, torch.tensor([0, 1, 1, 0, 1])

    def step(rank: int, world_size: int) -> torch.Tensor:
        head = torch.nn.Linear(2, 2)
        for weight in head.parameters():
            torch.nn.init.zeros_(weight)

        def descend(loss: torch.Tensor) -> None:
            (slope,) = torch.autograd.grad(loss, [head.weight])
            head.weight.data -= slope

        given = SimpleNamespace(
            args=SimpleNamespace(rebalance="none"),
            data=SimpleNamespace(classes=["no", "yes"]),
            compute=training.Compute(torch.device("cpu"), None, rank, world_size),
        )
        trainer = SimpleNamespace(phase="head", network=head, step=descend)
        ours = [[inputs[rank::world_size], targets[rank::world_size]]]
        source = SimpleNamespace(read=lambda *_: ours)
        training.train_epoch(given, trainer, [torch.zeros(5, 2)], source)
        return head.weight.detach()

    torch.testing.assert_close((step(0, 2) + step(1, 2)) / 2, step(0, 1))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_parts_of_the_processes_make_up_what_one_draws_in_order(world_size: int) -> None:
    """Of each batch of ten a process reads its part, and weighs it by its images."""
    drawn = torch.arange(50).flip(0)
    batches = training.cut_batches(drawn, 12, training.seeded("augment", 0, 1))
    assert [*map(len, batches)] == [10] * 5
    parts = []
    for rank in range(world_size):
        read: list[torch.Tensor] = []
        given = SimpleNamespace(
            args=SimpleNamespace(rebalance="none"),
            data=SimpleNamespace(classes=["no", "yes"]),
            compute=training.Compute(torch.device("cpu"), None, rank, world_size),
        )
        source = SimpleNamespace(read=lambda ours, _, read=read: read.extend(ours) or [])
        with contextlib.suppress(ValueError):  # nothing comes of what it asked for
            training.train_epoch(given, SimpleNamespace(phase="head"), batches, source)
        parts.append(read)
    for step, batch in enumerate(batches):
        for place, item in enumerate(batch):
            assert torch.equal(parts[place % world_size][step][place // world_size], item)
        assert sum(len(part[step]) for part in parts) == len(batch)


@pytest.mark.parametrize(
    ("batch_size", "processes", "divides"),
    [(9, 2, False), (9, 3, True), (4, 4, False), (12, 12, False), (64, 1, True)],
)
def test_a_batch_must_divide_among_the_processes(
    batch_size: int, processes: int, divides: bool, settings: list[str], tmp_path: Path
) -> None:
    """There are 46 images, so batches of 4 have 3 or 4; and 11 to validate on."""
    command = [*settings, "--batch-size", str(batch_size), "--output", str(tmp_path / "x")]
    args = training.parse_args(command)
    with (
        contextlib.nullcontext()
        if divides
        else pytest.raises(
            training.DataError, match=f"--batch-size {batch_size}: .* {processes} processes"
        )
    ):
        training.prepare(args, training.Compute(torch.device("cpu"), None, 0, processes))
