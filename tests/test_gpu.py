"""What `data_training.py` promises of a GPU; skipped where there is none.

    python -m pytest tests/test_gpu.py

A minute on one GPU. On one that is not CUDA's folds alone are trained: the other tests ask CUDA
when it waits, or fill it.
"""

import gc
import os

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before the first product: to the same bits

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import interrupt_after, rows_of, weights_file
from test_resume import assert_same_run
from torchvision import models

import data_training as training

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of CUDA")
FOUND = torch.accelerator.is_available() and torch.accelerator.current_accelerator()


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
    """The linear probe and two epochs of fine-tuning; the device is to be added."""
    weights = weights_file(folder.parent / "pretrained.pth")
    command = [str(folder), "--arch", "resnet18", "--weights", str(weights), "--epochs", "2"]
    return [*command, "--image-size", "32", "--batch-size", "24", "--workers", "2", "--device"]


@pytest.fixture(scope="module")
def on_cpu(folder: Path, settings: list[str]) -> Path:
    """The run on a CPU in float32."""
    output = folder.parent / "on_cpu"
    assert training.main([*settings, "cpu", "--no-amp", "--output", str(output)]) == 0
    return output


def assert_near(one: Path, other: Path, tolerance: float) -> None:
    """Losses and probabilities of two runs differ by no more."""
    tables = [rows_of(run / "history.csv") for run in (one, other)]
    assert [row["step"] for row in tables[1]] == ["linear probe", "fine-tuning", "fine-tuning"]
    keys = ("train_loss", "val_loss")
    losses = [[float(row[key]) for row in rows for key in keys] for rows in tables]
    assert losses[0] == pytest.approx(losses[1], abs=tolerance)  # 1.1 at the start
    tables = [rows_of(run / "predictions.csv") for run in (one, other)]
    answers = [{row["path"]: float(row["true_probability"]) for row in rows} for rows in tables]
    assert answers[0] == pytest.approx(answers[1], abs=tolerance)


@cuda
@pytest.mark.parametrize(("amp", "tolerance"), [("--no-amp", 2e-3), ("--amp", 5e-2)])
def test_both_steps_and_evaluation_agree_with_the_cpu(amp, tolerance, settings, on_cpu, tmp_path):
    """Mixed precision against float32 within 0.05, float32 within 0.002."""
    assert training.main([*settings, "cuda", amp, "--output", str(tmp_path / "run")]) == 0
    assert_near(on_cpu, tmp_path / "run", tolerance)


@pytest.mark.skipif(not FOUND, reason="needs a GPU")
def test_folds_pass_through_all_steps_on_any_gpu(settings, tmp_path):
    output = tmp_path / "run"
    assert training.main([*settings, "auto", "--folds", "3", "--output", str(output)]) == 0
    steps = [row["step"] for row in rows_of(output / "history.csv")]
    assert steps == 3 * ["linear probe", "fine-tuning", "fine-tuning"]
    assert FOUND.type in (output / "report.html").read_text()


@cuda
@pytest.mark.parametrize("epochs", [0, 1])
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
    moved = interrupt_after(1, [*settings, "cpu", "--no-amp"], tmp_path / "moved")
    assert training.main(["--resume", str(moved), "--device", "cuda"]) == 0
    assert_near(on_cpu, moved, 2e-2)
    moved = interrupt_after(1, [*settings, "cuda", "--amp"], tmp_path / "scaled")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert training.pick_compute(SimpleNamespace(device="cuda", amp=None)).precision == "float16"
    assert training.main(["--resume", str(moved), "--amp"]) == 0
    assert_near(on_cpu, moved, 5e-2)


@cuda
@pytest.mark.parametrize("amp", ["--no-amp", "--amp"])
def test_nothing_waits_for_the_gpu_between_the_batches_of_a_pass(
    amp, settings, tmp_path, monkeypatch
):
    """In the pass for features, in fine-tuning, and in evaluation."""
    command, read, passes = [*settings, "cuda", amp, "--output"], training.Reader.read, []
    assert training.main([*command, str(tmp_path / "first")]) == 0  # makes what stays

    def read_watched(*arguments: Any) -> Iterator[Any]:
        loaded = list(read(*arguments))
        passes.append(arguments[2])
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield from loaded
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(training.Reader, "read", read_watched)
    assert training.main([*command, str(tmp_path / "second")]) == 0
    # Evaluated: features, the linear probe, two epochs, and the points of the line.
    evaluated = 4 + len(training.POINTS)
    assert Counter(passes) == {"fine-tuning": 2, "evaluating": evaluated}


@cuda
def test_a_full_gpu_gets_one_line_of_advice(settings, tmp_path, capsys):
    """45 images of 1,024 pixels, and 300 MB."""
    command = [*settings, "cuda", "--image-size", "1024", "--batch-size", "64"]
    gc.collect()
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 300e6
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    try:
        assert training.main([*command, "--output", str(tmp_path / "run")]) == 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    line = capsys.readouterr().err.splitlines()[-1]
    advice = "try a smaller --batch-size or --image-size, fewer --workers, or --device cpu"
    assert f"error: out of memory; {advice}; go on with --resume " in line
