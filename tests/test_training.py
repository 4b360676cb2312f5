"""What `data_training.py` promises of its command line, of training, and of whole runs."""

import contextlib
import copy
import dataclasses
import math
import os
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CPU,
    FILES,
    HEAD_STEPS,
    SURE,
    TINY,
    Run,
    assert_moved_alike,
    begin,
    by_hand,
    images,
    network_of,
    prepare,
    refused,
    resolve,
    rows_of,
    run,
    whole_of,
)
from torch import Tensor, nn
from torchvision import models

import data_training as training
from data_training import EVERY, TEST

# ---------------------------------------------------------------------------- the command line


ERRORS = {
    # what argparse sees by itself
    "": "arguments are required: DATA",
    "DATA --epochs -1": "'-1' is not a whole number of at least 0",
    "DATA --val-fraction 1": "'1' is not a number between 0 and 1",
    "DATA --folds 2": "'2' is not a whole number from 3 to 10",
    "DATA --folds 3 --val-fraction 0.3": "--folds: not with --val-fraction; drop one of them",
    "DATA --lr 0": "'0' is not a number above 0",
    "DATA --lr nan": "'nan' is not a number above 0",
    "DATA --lr inf": "'inf' is not a number above 0",
    "DATA --power 11": "'11' is not a number from 0 to 10",
    "DATA --crop-scale 0": "'0' is not a number above 0, at most 1",
    "DATA --batch-size 0": "'0' is not a whole number of at least 1",
    "DATA --seed 9223372036854775808": "is not a whole number of 64 bits",
    "DATA --no-such-flag": "unrecognized arguments: --no-such-flag",
    # flags of another use
    "--resume RUN --arch resnt18": "--arch: not with --resume",
    "--resume RUN DATA": "DATA: not with --resume",
    "--resume RUN --epochs 10": "--epochs: not with --resume",  # the default, but said
    "--resume RUN --predict RUN": "--predict: not with --resume",
    "--predict RUN": "arguments are required: DATA",
    "DATA --natural": "--natural: only with --predict; drop it",
    "DATA --val OTHERS --val-fraction 0.3": "--val: not with --val-fraction",
    "DATA --split FILE --val-fraction 0.3": "--split: not with --val-fraction",
    # settings that do not go together
    "NOWHERE": "DATA NOWHERE: no such folder",
    "DATA --val NOWHERE": "--val NOWHERE: no such folder",
    "DATA --source NOWHERE": "--source NOWHERE: no such folder",
    "DATA --split FILE --val OTHERS": "--split: not with --val; drop one of them",
    "DATA --source DATA --val OTHERS": "--source: not with --val; drop one of them",
    "DATA --power 1 --rebalance none": "--power: of the sampler",
    "DATA --epochs 2 --frozen-epochs 3": "--frozen-epochs 3: more than --epochs 2",
    "DATA --folds 3 --epochs 0": "--folds: nothing is trained with --epochs 0",
    "DATA --group (": "--group (: no regular expression",
    "DATA --output FILE": "--output FILE: a file",
    "DATA --output RUN": "--output RUN: not empty; name a new folder, or --resume a run",
    "DATA --output TABLES": "--output TABLES: not empty",
    "DATA --output DATA/new/run": "--output DATA/new/run: would be a class of",
    "DATA --val OTHERS --output OTHERS/run": "--output OTHERS/run: would be a class of",
    "DATA --source OTHERS --output OTHERS/run": "--output OTHERS/run: would be a class of",
    "DATA --device tpu": "--device tpu: not on this machine",
    # weights and images
    "DATA --arch resnt18": "--arch resnt18: unknown; choose from resnet101",
    "DATA --weights NOWHERE": "--weights NOWHERE: no such file; pass one, or IMAGENET1K_V1",
    "DATA --weights FILE": "--weights FILE: damaged",
    "DATA --weights TRAP": "--weights TRAP: damaged, or not of tensors alone",
    "DATA --weights NUMBERS": "--weights NUMBERS: no weights",
    "DATA --weights NAN --epochs 0": "--weights: of a training that failed: not finite",
    "DATA --weights PRETRAINED --arch resnet50": "--weights: not of a resnet50",
    "DATA --weights RUN/network.pt --arch resnet50": "--arch resnet50: the weights are of resnet18",
    "DATA --weights RUN/network.pt --epochs 0 --image-size 64": "--image-size 64: the weights are",
    "DATA --weights VOTE/network.pt": "3 networks that vote; judge them with --epochs 0",
    "DATA --weights PRETRAINED --epochs 0": "have no head for these classes",
    "DATA --weights none --epochs 0": "have no head for these classes",
    "DATA --weights none --group ZZZ": "--group ZZZ: matches no image",
    "DATA --weights none --val TABLES": "/TABLES: no image in folders named as those of",
    "DATA --weights none --image-size 32 --batch-size 1": "is no batch for BatchNorm",
    "DATA --weights none --baseline NOWHERE": "/NOWHERE/split.csv: No such file",
    "DATA --weights none --folds 7": "--folds 7: class cat has 6 different images",
    # going on
    "--resume NOWHERE": "--resume NOWHERE: no run to go on with",
    "--resume RUN": "--resume RUN: complete, or judged by --epochs 0; nothing is left to do",
}


@pytest.fixture(scope="session")
def places(
    animals: Path, others: Path, pretrained: Path, default_run: Run, folds_run: Run,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:  # fmt: skip
    """What the names in capital letters stand for."""
    root = tmp_path_factory.mktemp("places")

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(root / "sprung"),)

    (root / "TABLES").mkdir()
    (root / "TABLES/t.csv").write_text("path,part\n")
    (root / "FILE").write_text("something")
    torch.save({"state_dict": Trap()}, root / "TRAP")
    torch.save({"state_dict": {"fc.bias": 1}}, root / "NUMBERS")
    state = torch.load(pretrained, weights_only=True)
    torch.save(state | {"bn1.bias": state["bn1.bias"] / 0}, root / "NAN")
    made = {path.name: path for path in root.iterdir()}
    made |= {"DATA": animals, "OTHERS": others, "PRETRAINED": pretrained}
    return made | {"RUN": default_run.path, "VOTE": folds_run.path}


@pytest.mark.parametrize("line", ERRORS)
def test_bad_input_gets_one_line_and_status_2_and_nothing_is_written(
    line, places, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name, path in places.items():
        (tmp_path / name).symlink_to(path)
    command = line.split()
    if command and "--resume" not in command and "--device" not in command:
        command += ["--device", "cpu"]
    if not {"--resume", "--predict", "--output"}.intersection(command):
        command += ["--output", "some/new/run"]
    unchanged = (tmp_path, places["FILE"].parent, places["DATA"].parent)
    [error] = refused(command, capsys, *unchanged)
    assert ERRORS[line] in error


def test_a_new_run_asks_for_data_alone_and_one_that_goes_on_or_predicts_for_its_own():
    assert training.parse_args(["photos"]).output.parent == Path("runs")
    where = ["--device", "cpu", "--workers", "2", "--no-amp"]
    args = training.parse_args(["--resume", "run", *where])
    assert (args.resume, args.device, args.workers, args.amp) == (Path("run"), "cpu", 2, False)
    args = training.parse_args(["x", "--predict", "run", "--natural", "--batch-size", "8", *where])
    assert (args.predict, args.natural, args.batch_size) == (Path("run"), True, 8)
    assert training.parse_args(["x", "--batch-size", "auto", "--arch", "auto"]).batch_size is None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", "resnet18 224 IMAGENET1K_V1 1.0 0.0003 True"),
        ("--weights none --no-calibration", "resnet18 224 none 1.0 0.001 False"),
        ("--weights none --lr 1 --power 0.5", "resnet18 224 none 0.5 1.0 True"),
        ("--rebalance none --image-size 64", "resnet18 64 IMAGENET1K_V1 0.0 0.0003 True"),
        ("--weights FILE", "resnet34 96 FILE 1.0 0.0003 True"),
    ],
)
def test_what_is_auto_is_settled_once_by_the_weights_and_the_device(flags, expected):
    content = {"arch": "resnet34", "train_size": 96, "networks": [{}]} if "FILE" in flags else {}
    used = resolve(flags, content)
    found = [used.arch, used.image_size, Path(used.weights).name]
    found += [used.power, used.lr, used.calibrate]
    assert " ".join(map(str, found)) == expected
    assert used.data.is_absolute() and used.output.is_absolute()
    with pytest.raises(dataclasses.FrozenInstanceError):
        used.lr = 1.0


# ------------------------------------------------------------------------ sampling, by hand


def test_images_weigh_one_over_their_class_which_balances_draws():
    for power, few in ((1.0, 1 / 4), (0.5, 1 / 2), (0.0, 1.0)):
        weights = training.sample_weights(torch.tensor([0, 0, 0, 0, 1]), power)
        assert weights.tolist() == [few] * 4 + [1.0] and weights.dtype == torch.float64
    labels = torch.tensor([0] * 900 + [1] * 100)
    weights = training.sample_weights(labels, 1.0)
    drawn = training.draw_images(weights, training.seeded("draw", 0))
    assert len(drawn) == 1000
    assert abs((labels[drawn] == 1).sum() - 500) < 4 * math.sqrt(250)  # 4 standard deviations
    assert len(drawn.unique()) < 700  # of 900, a frequent image is left out with 1 - e^-0.56


def test_each_seed_fold_and_epoch_draws_its_own_images_the_same_again_and_none_held_out():
    # Each fold learns 24 images of one class and then 6 of the other.
    data = images([0] * 32 + [1] * 12, [*range(4)] * 10 + [TEST] * 4, folds=4)

    def draw(fold: int = 0, epoch: int = 1, **other: object) -> list[int]:
        args = SimpleNamespace(**{"seed": 0, "power": 1.0, "rebalance": "sampler"} | other)
        stage = training.WHOLE._replace(fold=fold, passes=2)
        drawn = training.draw_epoch(SimpleNamespace(settings=args, data=data), stage, epoch)
        assert len(drawn) == 60 and torch.isin(drawn, data.learns(fold)).all()
        return torch.searchsorted(data.learns(fold), drawn).tolist()

    first = draw()
    assert draw() == first
    for other in ({"seed": 1}, {"fold": 1}, {"fold": 3}, {"epoch": 2}):
        assert draw(**other) != first, other
    for fold in range(4):
        assert set(data.held[data.learns(fold)].tolist()) == {0, 1, 2, 3} - {fold}
    once_each = draw(rebalance="none")
    assert sorted(once_each[:30]) == sorted(once_each[30:]) == [*range(30)] != once_each[:30]


@pytest.mark.parametrize(
    ("images", "batch_size", "sizes"),
    [(10, 4, [4, 3, 3]), (9, 3, [3, 3, 3]), (3, 8, [3]), (65, 64, [33, 32])],
)
def test_batches_differ_by_one_image_at_most(images, batch_size, sizes):
    batches = training.cut_batches(torch.arange(images), batch_size, training.seeded("augment", 0))
    assert [len(batch) for batch in batches] == sizes
    pairs = [pair for batch in batches for pair in batch.tolist()]
    assert [index for index, _ in pairs] == list(range(images))
    assert len({seed for _, seed in pairs}) == images  # each draw is augmented in its own way
    judged = training.cut_batches(torch.arange(images), batch_size)
    assert all((batch[:, 1] == training.EVALUATED).all() for batch in judged)


@pytest.mark.parametrize(
    ("files", "processes", "size"),
    [(4, 1, 64), (3, 1, 32), (9, 3, 66), (1, 3, 33), (1, 8, 64)],
)
def test_batches_are_halved_in_a_small_folder(files, processes, size, make_folder, monkeypatch):
    monkeypatch.setattr(training, "SMALL_FOLDER", 4)
    folder = make_folder({"ape": files})
    assert training.pick_batch_size(folder, processes) == size


def test_weights_are_found_in_whatever_people_save(tmp_path):
    state = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}
    prefixed = {f"module.{key}": value for key, value in state.items()}
    for saved in (state, {"state_dict": state, "epoch": 3}, {"model": state}, prefixed):
        torch.save(saved, tmp_path / "x.pt")
        content = training.read_weights(str(tmp_path / "x.pt"))
        [found] = content.pop("networks")
        assert content == {} and found.keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in found.items())


@pytest.mark.parametrize(
    ("size", "classes", "kept"),
    [(2, None, True), (2, ["no", "yes"], True), (2, ["yes", "no"], False), (3, None, False)],
)
def test_a_head_stays_where_size_and_known_classes_agree_and_else_is_zero(size, classes, kept):
    state = models.resnet18(num_classes=size).state_dict()
    content = {"networks": [state]} | ({"classes": classes} if classes else {})
    model, said = training.build_model("resnet18", ["no", "yes"], content)
    expected = state["fc.weight"] if kept else torch.zeros(2, 64)
    assert torch.equal(model.fc.weight, expected)
    assert torch.equal(model.conv1.weight, state["conv1.weight"])
    assert said == ("head kept" if kept else f"head of {size} classes dropped for a new one")


def test_the_head_answers_in_float32_also_under_mixed_precision():
    model, _ = training.build_model("resnet18", ["no", "yes"], {})
    nn.init.normal_(model.fc.weight)
    features = torch.randn(4, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.fc(features)
        assert model.eval()(torch.randn(1, 3, 32, 32)).dtype is torch.float32
    assert torch.equal(logits, features.float() @ model.fc.weight.T)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_weights_of_any_scale_begin_with_the_one_that_rates_are_for(arch):
    """What they compute stays."""
    torch.manual_seed(0)
    model = models.get_model(arch, weights=None, num_classes=3)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for value, low in ((layer.weight, 0.5), (layer.bias, -0.2), (layer.running_mean, -0.2)):
                nn.init.uniform_(value, low, low + 0.4)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    model.eval()
    twin, inputs = copy.deepcopy(model), torch.randn(2, 3, 64, 64)
    kinds = (nn.Conv2d, nn.BatchNorm2d)
    layers = [layer for layer in twin.modules() if isinstance(layer, kinds)]
    with torch.no_grad():
        for conv, norm in zip(layers[::2], layers[1::2], strict=True):
            conv.weight *= 10
            norm.running_mean *= 10
            norm.running_var.add_(norm.eps).mul_(100).sub_(norm.eps)
        blocks = list(twin.layer4)  # features, which add up in these, ten times as large
        for norm in [getattr(each, "bn3", each.bn2) for each in blocks] + [blocks[0].downsample[1]]:
            norm.weight *= 10
            norm.bias *= 10
        for layer in [each.conv1 for each in blocks[1:]] + [twin.fc]:
            layer.weight /= 10
        expected = model(inputs)
        for network in (model, twin):
            training.rescale(network)
            torch.testing.assert_close(network(inputs), expected, rtol=1e-3, atol=1e-3)
    for name, weight in twin.named_parameters():
        torch.testing.assert_close(weight, model.get_parameter(name), rtol=1e-3, atol=1e-5)
        if weight.dim() == 4:  # 0.5 / sqrt(fan-in)
            size = weight.square().sum((1, 2, 3)).mean().sqrt().item()
            assert size == pytest.approx(0.5, rel=1e-4)


def stages_of(
    flags: str, data: training.Data, fold: int = 0, **losses: float
) -> list[training.Stage]:
    """The stages of a fold, where stages of the first one have ended with these losses."""
    rows = [{"fold": 1, "epoch": 0, "phase": name, "val_loss": x} for name, x in losses.items()]
    given = SimpleNamespace(settings=resolve(f"--batch-size 10 {flags}"), data=data, compute=CPU)
    return [*training.plan(given, SimpleNamespace(history=rows), fold)]


STAGES = {  # flags, and of each stage its name, epochs, passes and steps
    # 1,000 steps of 10 images, by 40 images, make 250 passes of 4 steps
    "--epochs 3": "head 0-0 250 1000, whole 1-3 1 12",
    "--epochs 3 --weights none": "whole 1-3 1 12",
    "--epochs 3 --frozen-epochs 2": "head 1-2 125 1000, whole 3-3 1 4",
    "--epochs 3 --frozen-epochs 3": "head 1-3 84 1008",
    # 190 steps are 48 epochs, and a fifth of 240
    "--epochs 239": "head 0-0 250 1000, whole 1-239 1 956",
    "--epochs 240 --weights none": "whole 1-240 1 960",
    "--epochs 240": "head 0-0 250 1000, trial 1-48 1 192, whole 49-240 1 768",
    "--epochs 241 --frozen-epochs 1": "head 1-1 250 1000, trial 2-49 1 192, whole 50-241 1 768",
}


@pytest.mark.parametrize("flags", STAGES)
def test_the_head_of_pretrained_weights_comes_first_and_a_trial_where_it_is_worth_it(
    flags, monkeypatch
):
    monkeypatch.setattr(training, "HEAD_STEPS", HEAD_STEPS)
    stages = stages_of(flags, images([0, 1] * 25, [EVERY] * 40 + [0] * 10))
    named = [f"{x.name} {x.epochs[0]}-{x.epochs[-1]} {x.passes} {x.steps}" for x in stages]
    assert ", ".join(named) == STAGES[flags] and not any(stage.fold for stage in stages)


def test_each_fold_has_stages_of_its_own_as_long_as_its_images_ask_for():
    data = images([0, 1] * 20, [0] * 5 + [1] * 15 + [2] * 20, folds=3)
    stages = [stages_of("--epochs 1 --folds 3", data, fold) for fold in range(3)]
    assert [(whole.name, whole.fold, whole.steps) for _, whole in stages] == [
        ("whole", fold, steps) for fold, steps in enumerate((4, 3, 2))
    ]


@pytest.mark.parametrize(("loss", "last"), [(2.1, "whole"), (2.3, "upper")])
def test_a_trial_fails_where_it_ends_with_a_tenth_more_loss_than_the_head(loss, last):
    """The first fold has it for all of them."""
    data = images([0, 1, 2] * 20, [0, 1, 2] * 20, folds=3)
    for fold, names in enumerate([["head", "trial", last], ["head", last], ["head", last]]):
        stages = stages_of("--epochs 500 --folds 3", data, fold, head=2.0, trial=loss)
        assert [stage.name for stage in stages] == names


@pytest.mark.parametrize(
    ("gains", "families", "kept"),
    [
        # Of the loss of three images, the first two of one class: in the mean each time 1.
        ((1.0, 1.0, 1.0), (0, 1, 2), True),
        ((2.0, 0.0, 1.0), (0, 1, 2), True),  # its error is the root of 1 / 4 ^ 2 + 1 / 4 ^ 2: 0.35
        ((2.7, -0.7, 1.0), (0, 1, 2), True),  # 0.60, of which 1.645 are 0.99
        ((2.8, -0.8, 1.0), (0, 1, 2), False),  # 0.64, of which they are 1.05
        ((2.8, -0.8, 1.0), (0, 0, 1), True),  # if the two are of one family, they cancel out
        ((0.0, 0.0, 0.0), (0, 1, 2), False),
    ],
)
def test_the_head_alone_is_kept_where_its_loss_is_surely_lower(gains, families, kept, monkeypatch):
    monkeypatch.setattr(training, "SURE", SURE)
    monkeypatch.setattr(training, "FEWEST_FAMILIES", 2)
    targets = torch.tensor([0, 0, 1])
    whole = SimpleNamespace(targets=targets, true_probability=torch.full((3,), math.exp(-3)))
    losses = torch.tensor(gains) - 3
    head = SimpleNamespace(targets=targets, true_probability=losses.exp())
    assert training.is_surely_better(head, whole, torch.tensor(families)) is kept


@pytest.mark.parametrize(("families", "kept"), [(9, False), (10, True)])
def test_nothing_is_sure_by_fewer_than_ten_families(families, kept, monkeypatch):
    monkeypatch.setattr(training, "SURE", SURE)
    targets = torch.arange(20) % 2
    whole = SimpleNamespace(targets=targets, true_probability=torch.full((20,), 0.2))
    head = SimpleNamespace(targets=targets, true_probability=torch.full((20,), 0.9))
    assert training.is_surely_better(head, whole, torch.arange(20) % families) is kept


# ------------------------------------------------------------------- training, by hand


def rate_by_hand(step: int, steps: int, rising: float) -> float:
    """Part of the peak: by half a cosine from 1 / 25 up in `rising` steps, and down to nothing."""
    if step <= rising:
        return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * step / rising)) / 2
    part = (step - rising) / (steps - 1 - rising)
    return 4e-6 + (1 - 4e-6) * (1 + math.cos(math.pi * part)) / 2


@pytest.mark.parametrize("stage", [training.WHOLE, training.UPPER])
@pytest.mark.parametrize(
    ("steps", "rising"), [(100, 9), (30, 2), (6, 1), *((steps, 1) for steps in (1, 2, 3, 4))]
)
def test_the_rate_rises_for_a_tenth_and_then_falls_in_any_number_of_steps(steps, rising, stage):
    model = nn.Module()
    model.fc = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 3.0)
    trainer = training.Trainer(
        model, stage._replace(steps=steps), optimizer, SimpleNamespace(compute=CPU)
    )
    rates, biases = [], [model.fc.bias.item()]
    for _ in range(steps):
        rates.append(trainer.rate())
        biases.append(biases[-1] - rates[-1])
        trainer.step(model.fc(torch.ones(1, 1)).sum())
    expected = [3 * rate_by_hand(step, max(4, steps), rising) for step in range(steps)]
    assert rates == pytest.approx(expected, abs=1e-9)
    end = sum(biases[1:]) / steps if stage.averages else biases[-1]  # the mean of all steps
    assert model.fc.bias.item() == pytest.approx(end, rel=1e-4)


def normalised(given: training.Given, pairs: Tensor) -> Tensor:
    """The images of (index, seed), as ImageNet's networks take them: (B, 3, S, S)."""
    dataset = training.Reader(given).loader.dataset
    pixels = torch.stack([dataset[tuple(pair)][0] for pair in pairs.tolist()])
    mean, std = (torch.tensor(each) for each in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)


def batches_of(given: training.Given, stage: training.Stage, epoch: int) -> tuple[Tensor, ...]:
    """Those that `run` trains on."""
    seeds = training.seeded("augment", given.settings.seed, 0, epoch)
    drawn = training.draw_epoch(given, stage, epoch)
    return training.cut_batches(drawn, given.settings.batch_size, seeds)


def network_with(state: dict[str, Tensor]) -> models.ResNet:
    """A network of torchvision with these weights."""
    model = models.resnet18(num_classes=3)
    model.load_state_dict(state)
    return model.to(memory_format=torch.channels_last)


def test_a_run_of_all_layers_ends_as_a_loop_that_is_written_by_hand(animals, pretrained, tmp_path):
    """They start where the weights do, not from the head that was trained before."""
    command = ["--weights", pretrained, "--epochs", 2, *TINY]
    command = [*map(str, command), "--no-calibration", "--output"]
    done = run(animals, *command, str(tmp_path / "run"))
    given, progress = prepare(animals, *command, str(tmp_path / "other"))
    _, stage = training.plan(given, progress, 0)
    model, step = network_with(progress.start), 0
    parts = {"conv1": 0.343, "bn1": 0.343, "layer1": 0.343, "layer2": 0.49, "layer3": 0.7}
    layers = [layer for layer in model.named_children() if list(layer[1].parameters())]
    groups = [{"params": layer.parameters(), "part": parts.get(name, 1)} for name, layer in layers]
    optimizer = torch.optim.AdamW(groups)
    losses: list[float] = []
    for epoch in (1, 2):
        total = 0.0
        for batch in batches_of(given, stage, epoch):  # 31 images: three steps
            for group in optimizer.param_groups:
                group["lr"] = 3e-4 * group["part"] * rate_by_hand(step, 6, 1)
            loss = F.cross_entropy(model(normalised(given, batch)), given.data.labels[batch[:, 0]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, step = total + loss.item() * len(batch), step + 1
        losses.append(total / 31)
    assert step == 6
    assert_moved_alike(whole_of(done.path), model, progress.start)
    head, *history = rows_of(done.path / "history.csv")
    assert [row["phase"] for row in (head, *history)] == ["head", "whole", "whole"]
    assert [float(row["train_loss"]) for row in history] == pytest.approx(losses, rel=1e-3)
    rate = 3e-4 * rate_by_hand(3, 6, 1)  # of the next step
    assert float(history[0]["learning_rate"]) == pytest.approx(rate, rel=1e-4)


@pytest.mark.parametrize(
    ("is_pretrained", "rates"),
    [
        (True, {"conv1": 1029, "bn1": 1029, "layer1": 1029, "layer2": 1470, "layer3": 2100}),
        (False, {}),
    ],
)
def test_pretrained_layers_learn_more_slowly_the_lower_they_are(
    is_pretrained, rates, animals, pretrained, tmp_path
):
    flags = ["--lr", "3e-3", "--weights", str(pretrained) if is_pretrained else "none"]
    given, progress = prepare(animals, *flags, *TINY, "--output", str(tmp_path / "run"))
    groups = training.whole_optimizer(given, progress, 0).param_groups
    found = {id(weight): group["lr"] for group in groups for weight in group["params"]}
    named = dict(progress.model.named_parameters())
    assert len(found) == len(named)
    for name, weight in named.items():
        expected = rates.get(name.split(".")[0], 3000) * 1e-6
        assert found[id(weight)] == pytest.approx(expected)
    assert groups[-1]["lr"] == 3e-3  # which the history shows


def test_a_run_of_the_head_ends_as_a_loop_that_is_written_by_hand(
    animals, pretrained, tmp_path, monkeypatch
):
    monkeypatch.setattr(training, "HEAD_STEPS", 60)  # of 12 images each: 24 passes over 31
    command = ["--weights", pretrained, "--epochs", 1, "--frozen-epochs", 1, *TINY]
    command = [*map(str, command), "--no-calibration", "--output"]
    done = run(animals, *command, str(tmp_path / "run"))
    given, progress = prepare(animals, *command, str(tmp_path / "other"))
    backbone = network_with(progress.start).eval()
    backbone.fc = nn.Identity()
    everything = torch.arange(len(given.data.labels))
    views = torch.stack([everything, torch.full_like(everything, training.EVALUATED)], 1)
    with torch.no_grad():
        features = backbone(normalised(given, views))
    square = (features[given.data.learns(0)] ** 2).sum(1).mean().item() / 512
    weight, bias = torch.zeros(3, 64, requires_grad=True), torch.zeros(3, requires_grad=True)
    pace = [[weight, 0.02 / square, 0.002 * square, 0.0], [bias, 0.02, 0.002, 0.0]]
    batches = batches_of(given, *training.plan(given, progress, 0), 1)
    assert len(batches) == 62
    for step, batch in enumerate(batches):
        indices = batch[:, 0]
        loss = F.cross_entropy(features[indices] @ weight.T + bias, given.data.labels[indices])
        for each, slope in zip(pace, torch.autograd.grad(loss, [weight, bias]), strict=True):
            each[3] = 0.9 * each[3] + slope + each[2] * each[0].detach()  # momentum
            each[0].data -= each[1] * rate_by_hand(step, 62, 5.2) * each[3]
    state = network_of(done.path)["networks"][0]
    torch.testing.assert_close(state["fc.weight"], weight.detach(), rtol=0.01, atol=2e-3)
    torch.testing.assert_close(state["fc.bias"], bias.detach(), rtol=0.01, atol=2e-3)
    assert all(torch.equal(v, progress.start[k]) for k, v in state.items() if "fc" not in k)


def test_after_a_trial_training_goes_on_or_with_the_upper_half_from_before_it(
    animals, pretrained, tmp_path, monkeypatch
):
    monkeypatch.setattr(training, "TRIAL_STEPS", 3)  # an epoch
    flags = ["--weights", str(pretrained), "--folds", "3", *TINY]
    given, progress = prepare(animals, *flags, "--output", str(tmp_path / "run"))
    progress.head = {"weight": torch.full((3, 64), 5.0), "bias": torch.full((3,), 6.0)}
    progress.features = torch.ones(38, 64).half()
    head, trial = ({"fold": 1, "epoch": at, "phase": ("head", "trial")[at]} for at in (0, 1))

    def changed() -> dict[str, set[float]]:
        """What is not as at the start."""
        now, start = progress.model.state_dict(), progress.start
        return {k: {*v.flatten().tolist()} for k, v in now.items() if not torch.equal(v, start[k])}

    for loss in (1.0, 2.0):
        progress.history = [head | {"val_loss": 1.0}, trial | {"val_loss": loss}]
        for value in progress.model.state_dict().values():
            value.fill_(7)
        trainer = begin(given, progress, 2).trainer
        if loss == 1.0:
            assert changed().keys() == progress.start.keys()
            assert {7.0} == set().union(*changed().values())
    assert changed() == {"fc.weight": {5.0}, "fc.bias": {6.0}}
    [group] = trainer.optimizer.param_groups
    assert group["max_lr"] == pytest.approx(2e-5)
    named = {id(weight): name for name, weight in progress.model.named_parameters()}
    trained = {named[id(weight)].split(".")[0] for weight in group["params"]}
    assert trained == {"layer3", "layer4", "fc"}
    assert not progress.model.training  # so BatchNorm keeps its statistics
    # The next fold begins where the first one did, and does as that one, with the head as it is.
    reader, (first, second) = training.Reader(given), training.plan(given, progress, 1)
    training.begin(given, progress, first, reader)
    assert changed() == {}
    nn.init.constant_(progress.model.fc.weight, 5.0)
    training.begin(given, progress, second, reader)
    assert second.name == "upper" and changed() == {"fc.weight": {5.0}}


# ------------------------------------------------------------------------------ whole runs


def test_a_run_folder_has_its_networks_and_what_is_said_of_them(default_run, animals, pretrained):
    assert {path.name for path in default_run.path.iterdir()} == FILES
    content = network_of(default_run.path)
    assert set(content) == {
        *("arch", "classes", "train_images", "weights", "train_size", "eval_size", "least_side"),
        *("natural", "white", "learnt", "folds", "networks"),
    }
    assert content["arch"] == "resnet18" and content["classes"] == ["ape", "bee", "cat"]
    assert content["train_images"] == [16, 10, 5] and content["weights"] == str(pretrained)
    assert (content["train_size"], content["eval_size"]) == (32, 32) and content["white"] == {}
    assert len(content["networks"]) == 2 and len(content["learnt"]) == 31
    for state in content["networks"]:
        models.resnet18(num_classes=3).load_state_dict(state)
    history = rows_of(default_run.path / "history.csv")
    told = [(row["fold"], row["epoch"], row["phase"]) for row in history]
    assert told == [("1", "0", "head"), ("1", "1", "whole"), ("1", "2", "whole")]
    for row in history:
        assert 0 <= float(row["data_wait"]) <= 1 and float(row["images_per_second"]) > 0
        assert int(row["fewest_draws"]) <= int(row["most_draws"])
        assert 0 < float(row["distinct_images"]) <= 1
    split = rows_of(default_run.path / "split.csv")
    assert {row["path"] for row in split} == {
        path.relative_to(animals).as_posix() for path in animals.rglob("*.jpg")
    }
    held = {row["path"] for row in split if row["part"] == "val"}
    assert {row["path"] for row in rows_of(default_run.path / "predictions.csv")} == held
    draws = sum(int(row["draws"]) for row in rows_of(default_run.path / "classes.csv"))
    assert draws == (39 + 2) * 31  # 100 steps of 12 images for the head, and two epochs


def test_the_first_lines_say_what_runs_where_on_what_images(default_run):
    first, second, *_ = default_run.out.splitlines()
    assert first.startswith("resnet18, ") and first.endswith("; cpu, torch.float32")  # --arch auto
    assert "head of 7 classes dropped for a new one" in first
    assert second.startswith("31 training images in 3 classes of 16 to 5, imbalance ratio 3.2; 7 v")
    assert "min to go" not in default_run.err  # but for runs of some minutes


def test_each_image_is_judged_once_by_the_network_of_its_fold(folds_run, animals):
    tested = {"test_predictions.csv", "test_classes.csv"}
    assert {path.name for path in folds_run.path.iterdir()} == FILES | tested
    parts = {row["path"]: row["part"] for row in rows_of(folds_run.path / "split.csv")}
    rows, network = rows_of(folds_run.path / "predictions.csv"), network_of(folds_run.path)
    assert len({row["path"] for row in rows}) == len(rows) == 38
    for fold, state in enumerate(network["networks"], 1):
        judged = [row for row in rows if parts[row["path"]] == f"fold {fold}"]
        assert len(judged) in (12, 13)
        logits = by_hand(network | {"networks": [state]}, [animals / row["path"] for row in judged])
        probability, predicted = logits.softmax(1).max(1)
        assert [row["predicted"] for row in judged] == [network["classes"][at] for at in predicted]
        said = [float(row["probability"]) for row in judged]
        assert said == pytest.approx(probability.tolist(), abs=1e-3)
    heads = [state["fc.weight"] for state in network["networks"]]
    assert not torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])
    assert folds_run.err.count("training, whole:   0%") == 3
    assert "the last layer alone vote" not in folds_run.out


def logits_of(network: dict[str, object], state: dict[str, Tensor], paths: list[Path]) -> Tensor:
    """The logits of one of the networks that vote."""
    return by_hand(network | {"networks": [state]}, paths)


def test_the_last_layer_alone_makes_a_quarter_of_the_answer(animals, pretrained, tmp_path):
    command = ["--weights", pretrained, "--epochs", 1, *TINY, "--no-calibration", "--output"]
    done = run(animals, *command, tmp_path / "run")
    network, rows = network_of(done.path), rows_of(done.path / "predictions.csv")
    paths = [animals / row["path"] for row in rows]
    targets = torch.tensor([network["classes"].index(row["class"]) for row in rows])
    state, whole = network["networks"][1], whole_of(done.path)
    alone = state | {name: 2 * state[name] for name in ("fc.weight", "fc.bias")}
    start = prepare(animals, *map(str, command), str(tmp_path / "other"))[1].start
    assert all(torch.equal(alone[key], start[key]) for key in start if not key.startswith("fc."))
    parts = [logits_of(network, whole, paths), logits_of(network, alone, paths)]
    answer = 0.75 * parts[0] + 0.25 * parts[1]
    said = [float(row["probability"]) for row in rows]
    assert said == pytest.approx(answer.softmax(1).max(1).values.tolist(), abs=1e-3)
    head, last = rows_of(done.path / "history.csv")
    for row, logits in ((head, parts[1]), (last, answer)):
        each = [F.cross_entropy(logits[targets == at], targets[targets == at]) for at in range(3)]
        assert float(row["val_loss"]) == pytest.approx(sum(each).item() / 3, rel=1e-2)
    note = "note: all layers and the last layer alone vote; the last epoch is judged so\n"
    assert done.out.count(note) == 1
    page = (done.path / "report.html").read_text()
    assert "2 resnet18 that vote, fine-tuned from" in page
    assert "; in the end the last layer alone, on the backbone of the start, makes 25 % of" in page


def test_training_goes_on_from_the_network_of_all_layers(default_run, animals, tmp_path):
    command = [animals, "--weights", default_run.path, "--epochs", 1, "--output", tmp_path / "run"]
    given, progress = prepare(*map(str, command))
    first, second = network_of(default_run.path)["networks"]
    norm = "layer1.0.bn1.bias"  # which no rescaling changes, as that of the last layer
    assert torch.equal(progress.start[norm], first[norm])
    assert not torch.equal(progress.start[norm], second[norm])
    torch.testing.assert_close(progress.start["fc.bias"], first["fc.bias"] / 1.5)
    assert "head kept" in given.origin and isinstance(progress.model, models.ResNet)


def test_on_random_weights_the_last_layer_alone_has_no_vote(animals, tmp_path):
    flags = ["--weights", "none", "--epochs", 2, "--frozen-epochs", 1, *TINY]
    done = run(animals, *flags, "--output", tmp_path / "run")
    assert len(network_of(done.path)["networks"]) == 1


def test_the_network_of_a_fold_has_not_seen_the_images_that_judge_it(
    folds_run, animals, pretrained, tmp_path, monkeypatch
):
    """It is trained as by a run on the images of the other folds alone."""
    monkeypatch.setattr(training, "HEAD_SHARE", 0.0)  # of which folds have none
    lines = ["path,part"]
    for row in rows_of(folds_run.path / "split.csv"):
        if row["part"].startswith("fold"):
            lines.append(f"{row['path']},{'val' if row['part'] == 'fold 1' else 'train'}")
    (tmp_path / "split.csv").write_text("\n".join(lines))
    flags = ["--split", tmp_path / "split.csv", "--epochs", 1, "--no-calibration", *TINY]
    done = run(animals, "--weights", pretrained, *flags, "--output", tmp_path / "run")
    alone = rows_of(done.path / "history.csv")
    fold = [row for row in rows_of(folds_run.path / "history.csv") if row["fold"] == "1"]
    for ours, theirs in zip(alone, fold, strict=True):
        assert (ours["phase"], ours["epoch"]) == (theirs["phase"], theirs["epoch"])
        assert float(ours["train_loss"]) == pytest.approx(float(theirs["train_loss"]), rel=1e-2)
        assert float(ours["val_loss"]) == pytest.approx(float(theirs["val_loss"]), rel=1e-2)


def test_the_networks_are_tested_together_and_vote_again_as_given_weights(
    folds_run, others, animals, tmp_path
):
    rows = rows_of(folds_run.path / "test_predictions.csv")
    assert "untouched test" in folds_run.out
    given = ["--weights", folds_run.path / "network.pt", "--epochs", 0, "--val", others]
    voted = run(animals, *given, *TINY, "--output", tmp_path / "voted")
    again = rows_of(voted.path / "predictions.csv")
    assert [row["predicted"] for row in again] == [row["predicted"] for row in rows]
    assert [float(row["probability"]) for row in again] == pytest.approx(
        [float(row["probability"]) for row in rows], abs=1e-4
    )
    assert len(network_of(voted.path)["networks"]) == 3 and "3 networks, head kept" in voted.out


def test_from_random_weights_every_layer_is_trained(scratch_run, animals, tmp_path):
    _, progress = prepare(animals, "--weights", "none", *TINY, "--output", str(tmp_path / "x"))
    [state] = network_of(scratch_run.path)["networks"]
    for name, value in progress.start.items():
        if name.endswith(("weight", "running_mean")):
            assert not torch.equal(state[name], value), name
    assert [row["phase"] for row in rows_of(scratch_run.path / "history.csv")] == ["whole"] * 2


# ---------------------------------------------------------------------- what may happen to a run


def test_two_runs_of_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seconds in range(120):
        moment = datetime.now() + timedelta(seconds=seconds)
        (tmp_path / f"runs/{moment:%Y-%m-%d_%H-%M-%S}").mkdir(parents=True)
    output = training.parse_args(["x"]).output
    assert output.name.endswith("-2") and output.with_name(output.name[:-2]).exists()
    assert not output.exists()


@pytest.mark.parametrize("precision", [None, torch.float16])
def test_a_diverging_run_says_so_in_one_line_and_names_the_flag_where_float16_may_be_why(
    precision, animals, pretrained, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(training, "pick_precision", lambda *_: precision)
    monkeypatch.setattr(training.Compute, "autocast", lambda _: contextlib.nullcontext())  # slow
    flags = ["--lr", "1e30", "--epochs", "2", *TINY]
    command = [animals, "--weights", pretrained, *flags, "--output", tmp_path / "run"]
    error = refused(command, capsys)[-1]
    assert "--lr: the loss became" in error or "the network's outputs are no numbers" in error
    assert ("--no-amp, " in error) is (precision is not None)
