"""What `data_training.py` promises of a GPU; skipped where there is none.

    python -m pytest tests/test_gpu.py

A minute on one GPU. One test of two processes: they share a GPU, or have one each. On a GPU that is
not CUDA's the default run alone: most of the others ask CUDA when it waits, or fill it.
"""

import dataclasses
import gc
import os

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before the first product: to the same bits

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import begin, interrupt_after, rows_of, torchrun, weights_file
from test_resume import assert_same_run
from torchvision import models

import data_training as training

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of CUDA")
FOUND = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
PHASES = ["head", "head", "whole", "whole"]


@pytest.fixture(scope="module", autouse=True)
def every_epoch_is_written() -> Iterator[None]:
    """And networks are of full width, and float32 is float32: convolutions would take TF32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "WRITE_EVERY", 0.0)
        patch.setattr(models.resnet, "ResNet", models.ResNet)
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield


@pytest.fixture(scope="module")
def settings(folder: Path) -> list[str]:
    """Two epochs of the head and two of everything; the device is to be added."""
    weights = weights_file(folder.parent / "pretrained.pth")
    command = [str(folder), "--arch", "resnet18", "--weights", str(weights), "--epochs", "4"]
    command += ["--frozen-epochs", "2", "--image-size", "32", "--batch-size", "24"]
    return [*command, "--workers", "2", "--device"]


@pytest.fixture(scope="module")
def on_cpu(folder: Path, settings: list[str]) -> Path:
    """The run on a CPU in float32."""
    output = folder.parent / "on_cpu"
    assert training.main([*settings, "cpu", "--no-amp", "--output", str(output)]) == 0
    return output


def assert_near(one: Path, other: Path, tolerance: float) -> None:
    """Losses and probabilities of two runs differ by no more, and their draws not at all."""
    tables = [rows_of(run / "history.csv") for run in (one, other)]
    assert [row["phase"] for row in tables[1]] == PHASES
    for rows in zip(*tables, strict=True):
        for key in ("train_loss", "val_loss"):  # 1.1 at the start
            assert float(rows[0][key]) == pytest.approx(float(rows[1][key]), abs=tolerance), key
    tables = [rows_of(run / "predictions.csv") for run in (one, other)]
    for rows in zip(*tables, strict=True):
        values = [float(row["true_probability"]) for row in rows]
        assert values[0] == pytest.approx(values[1], abs=tolerance)
    draws = [[row["draws"] for row in rows_of(run / "classes.csv")] for run in (one, other)]
    assert draws[0] == draws[1]


@cuda
@pytest.mark.parametrize(("amp", "tolerance"), [("--no-amp", 2e-3), ("--amp", 5e-2)])
def test_both_stages_and_evaluation_agree_with_the_cpu(amp, tolerance, settings, on_cpu, tmp_path):
    """Mixed precision against float32 within 0.05, float32 within 0.002."""
    assert training.main([*settings, "cuda", amp, "--output", str(tmp_path / "run")]) == 0
    assert_near(on_cpu, tmp_path / "run", tolerance)


@pytest.mark.skipif(not FOUND, reason="needs a GPU")
@pytest.mark.parametrize("folds", [1, 3])
def test_a_default_run_and_folds_pass_through_all_stages_on_any_gpu(folds, settings, tmp_path):
    """What all layers learn may differ from the CPU's by rounding, what the head learns not."""
    command = [*settings[:5], "--epochs", "2", "--frozen-epochs", "1", "--image-size", "32"]
    command += ["--batch-size", "24"]
    command += ["--folds", str(folds)] if folds > 1 else []
    tables = []
    for device in ("cpu", FOUND.type):
        output = tmp_path / f"on_{device}"
        assert training.main([*command, "--device", device, "--output", str(output)]) == 0
        tables.append(rows_of(output / "history.csv"))
        assert (output / training.NETWORK).exists()
    assert [row["phase"] for row in tables[1]] == folds * ["head", "whole"]
    losses = [float(rows[0]["val_loss"]) for rows in tables]
    assert losses[0] == pytest.approx(losses[1], abs=5e-2)


def begin_on(
    device: str, settings: list[str], epoch: int, output: Path
) -> tuple[training.Given, training.Progress, SimpleNamespace]:
    """A run in float32 at the start of this epoch, with the same network on any device."""
    args = training.parse_args([*settings, device, "--no-amp", "--output", str(output)])
    compute = training.join_processes(args.device, args.amp)
    with training.HELD:
        given, progress = training.prepare(args, compute)
    stream = training.seeded("head", 0, 0)
    torch.nn.init.normal_(progress.model.fc.weight, std=0.01, generator=stream)
    progress.model.to(compute.device, memory_format=training.memory_format(compute.device))
    return given, progress, begin(given, progress, epoch)


@cuda
@pytest.mark.parametrize("epochs", [1, 3])
def test_a_run_goes_on_to_the_bit_where_algorithms_are_deterministic(epochs, settings, tmp_path):
    command = [*settings, "cuda"]
    torch.use_deterministic_algorithms(True)
    try:
        assert training.main([*command, "--output", str(tmp_path / "whole")]) == 0
        output = interrupt_after(epochs, command, tmp_path / "run")
        assert training.main(["--resume", str(output)]) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(tmp_path / "whole", output)


@cuda
def test_a_run_goes_from_one_device_to_another_and_to_other_precision(
    settings, on_cpu, tmp_path, monkeypatch
):
    """From the CPU to the GPU, and there from bfloat16 to the float16 of GPUs before Ampere."""
    moved = interrupt_after(2, [*settings, "cpu", "--no-amp"], tmp_path / "moved")
    assert training.main(["--resume", str(moved), "--device", "cuda"]) == 0
    assert_near(on_cpu, moved, 2e-2)
    moved = interrupt_after(3, [*settings, "cuda", "--amp"], tmp_path / "scaled")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert training.pick_compute("cuda", None).amp is torch.float16
    assert training.main(["--resume", str(moved)]) == 0
    assert_near(on_cpu, moved, 5e-2)
    whole = interrupt_after(3, [*settings, "cuda", "--amp"], tmp_path / "whole")
    state = torch.load(whole / training.STATE, weights_only=True)
    assert state["trainer"]["scaler"]["scale"] >= 1


class Loaded:
    """A source of batches that are there; if `watched`, to wait between first and last raises."""

    def __init__(self, loaded: Iterable[Any], watched: bool = False):
        self.loaded, self.watched = list(loaded), watched

    def read(self, *_: object) -> Iterator[Any]:
        try:
            torch.cuda.set_sync_debug_mode("error" if self.watched else "default")
            yield from self.loaded
        finally:
            torch.cuda.set_sync_debug_mode("default")


@cuda
@pytest.mark.parametrize("epoch", [1, 3])
@pytest.mark.parametrize("pinned", [True, False])
def test_no_step_waits_for_the_gpu(epoch, pinned, settings, tmp_path):
    """In float32 and in bfloat16, once what is made in the first steps is there."""
    given, _, begun = begin_on("cuda", settings, epoch, tmp_path / "run")
    drawn = training.draw_epoch(given, begun.stage, epoch)
    batches = training.cut_batches(drawn, given.settings.batch_size, training.seeded("", 0, 0))
    loaded = [
        [each.pin_memory() if pinned else each.clone() for each in pair]
        for pair in begun.inputs.read(batches, "")
    ]
    for amp in (None, torch.bfloat16):
        given = dataclasses.replace(given, compute=given.compute._replace(amp=amp))
        for watched in (False, True):
            begun.trainer.scheduler.last_epoch = 0  # the schedule may not end
            source = Loaded(loaded, watched)
            training.train_epoch(given, begun.trainer, drawn, epoch, source)


@cuda
def test_neither_evaluation_nor_the_feature_pass_waits_for_the_gpu_in_between(settings, tmp_path):
    given, progress, begun = begin_on("cuda", settings, 3, tmp_path / "run")
    network, val, size = begun.trainer.evaluated, given.data.judges(0), given.settings.batch_size
    loaded = list(begun.reader.read(training.cut_batches(val, size), ""))
    expected = training.evaluate(given, network, begun.reader, val)
    result = training.evaluate(given, network, Loaded(loaded, watched=True), val)
    torch.testing.assert_close(result, expected)
    features = training.extract_features(given, progress.model, begun.reader)
    everything = torch.arange(len(given.data.labels))
    loaded = list(begun.reader.read(training.cut_batches(everything, size), ""))
    again = training.extract_features(given, progress.model, Loaded(loaded, watched=True))
    torch.testing.assert_close(again, features)


@cuda
@pytest.mark.parametrize("frozen", ["1", "0", "none"])
def test_a_full_gpu_gets_one_line_of_advice(frozen, settings, folder, tmp_path, capsys):
    """In the feature pass, in a step, and in evaluation: 45 images of 1,024 pixels, 300 MB."""
    epochs = ["--epochs", "1", "--frozen-epochs", frozen]
    if frozen == "none":
        given = weights_file(tmp_path / "given.pth", sum(1 for _ in folder.iterdir()))
        epochs = ["--weights", str(given), "--epochs", "0"]
    command = [*settings, "cuda", *epochs, "--image-size", "1024", "--batch-size", "64"]
    gc.collect()
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 300e6
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    try:
        assert training.main([*command, "--output", str(tmp_path / "run")]) == 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    line = capsys.readouterr().err.splitlines()[-1]
    advice = "try --batch-size 32 or a smaller --image-size, in a new run"
    assert line.endswith(f"out of memory on --device cuda; {advice}")


@cuda
@pytest.mark.parametrize("weights", ["given", "none"])
def test_two_processes_share_a_gpu_or_have_one_each(weights, settings, on_cpu, tmp_path):
    scratch = ["--weights", "none", "--epochs", "1"]
    command = [*settings, "cuda", "--no-amp", *(scratch if weights == "none" else [])]
    torchrun(*command, "--output", tmp_path / "run")
    if weights == "given":
        assert_near(on_cpu, tmp_path / "run", 2e-2)  # convolutions by TF32
