"""Weight files differ in scale, where that changes nothing: what is trained must not hang on it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, rows_of, weights_file
from torchvision import models

import data_training as training

TINY = ["--arch", "resnet18", "--image-size", "32", "--batch-size", "16", "--device", "cpu"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """A network whose BatchNorms have statistics of their own."""
    path = weights_file(tmp_path_factory.mktemp("weights") / "weights.pth", size=3)
    state = torch.load(path, weights_only=True)
    for name, value in state.items():
        if "running" in name or "bn" in name and name.endswith(("weight", "bias")):
            value.add_(torch.rand(value.shape))
    return state


def scaled(state: dict[str, torch.Tensor], part: str, factor: float) -> dict[str, torch.Tensor]:
    """The same function with other weights: all convolutions, or all features, times `factor`."""
    state = {name: value.clone() for name, value in state.items()}
    convolutions = [name for name, value in state.items() if value.dim() == 4]
    if part == "convolutions":
        for name in convolutions:
            norm = name.removesuffix("weight").replace("conv", "bn").replace("sample.0", "sample.1")
            state[name] *= factor
            state[f"{norm}running_mean"] *= factor
            # The 1e-5 that BatchNorm adds to a variance is not scaled with it.
            state[f"{norm}running_var"].add_(1e-5).mul_(factor**2).sub_(1e-5)
    else:
        for norm in ("layer4.0.bn2", "layer4.0.downsample.1", "layer4.1.bn2"):
            state[f"{norm}.weight"] *= factor
            state[f"{norm}.bias"] *= factor
        state["layer4.1.conv1.weight"] /= factor
        state["fc.weight"] /= factor
    return state


def answers(state: dict[str, torch.Tensor], rescaled: bool) -> torch.Tensor:
    """Logits of some images."""
    model = models.resnet18(num_classes=3).eval()
    model.load_state_dict(state)
    if rescaled:
        training.rescale(model)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(images)


@pytest.mark.parametrize("part", ["convolutions", "features"])
@pytest.mark.parametrize("factor", [1.0, 10.0, 0.1])
def test_rescaling_does_not_change_what_a_network_computes(
    part: str, factor: float, given: dict[str, torch.Tensor]
) -> None:
    expected = answers(given, False)
    state = scaled(given, part, factor)
    torch.testing.assert_close(answers(state, False), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(answers(state, True), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_every_convolution_gets_the_scale_of_the_learning_rate(arch: str) -> None:
    model = models.get_model(arch, weights=None)
    training.rescale(model)
    for name, weight in model.named_parameters():
        if weight.dim() == 4:
            size = weight[0].numel() ** 0.5 * weight.square().mean().sqrt().item()
            assert size == pytest.approx(training.CONV_SCALE, rel=1e-4), name
    again = {name: value.clone() for name, value in model.state_dict().items()}
    training.rescale(model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, again[name], msg=name)


@pytest.mark.parametrize("part", ["convolutions", "features"])
@pytest.mark.parametrize("factor", [10.0, 0.1])
@pytest.mark.parametrize("way", ["head", "firm", "gentle"])
def test_the_same_network_in_two_scales_trains_to_the_same_predictions(
    way: str, part: str, factor: float, given: dict, folder: Path, tmp_path: Path
) -> None:
    flags = ["--frozen-epochs", "1"] if way == "head" else ["--finetune", way]
    tables = []
    for name, state in (("one", given), ("other", scaled(given, part, factor))):
        torch.save(state, tmp_path / f"{name}.pth")
        command = [str(folder), "--weights", str(tmp_path / f"{name}.pth"), "--no-amp", *TINY]
        command += ["--epochs", "1", "--output", str(tmp_path / name), *flags]
        assert training.main(command) == 0
        tables.append(rows_of(tmp_path / name / "predictions.csv"))
    probabilities = [[float(row["true_probability"]) for row in table] for table in tables]
    assert probabilities[0] == pytest.approx(probabilities[1], abs=0.01)
    assert [row["predicted"] for row in tables[0]] == [row["predicted"] for row in tables[1]]


def test_given_weights_that_are_only_judged_keep_their_scale(
    given: dict, folder: Path, tmp_path: Path
) -> None:
    torch.save(given, tmp_path / "given.pth")
    command = [str(folder), "--weights", str(tmp_path / "given.pth"), "--epochs", "0", *TINY]
    assert training.main([*command, "--output", str(tmp_path / "run")]) == 0
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(state[name], given[name]) for name in given)


@pytest.mark.parametrize(("name", "length"), [("head", 300.0), ("firm", 1.0)])
def test_the_gradient_of_the_head_alone_is_followed_to_its_full_length(
    name: str, length: float
) -> None:
    """A convex problem needs no clipping, which would hang on the scale of the features."""
    model = torch.nn.Module()
    model.fc = torch.nn.Linear(1, 1, bias=False)
    phase, given = training.Phase(name, range(1), cycle=10), SimpleNamespace(compute=CPU)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    trainer, before = training.Trainer(model, phase, optimizer, given), model.fc.weight.item()
    rate = trainer.rate()
    trainer.step(300 * model.fc.weight.sum())
    assert before - model.fc.weight.item() == pytest.approx(rate * length, rel=1e-4)
