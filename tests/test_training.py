"""What `data_training.py` promises of its command line, of training, and of whole runs."""

import itertools
import json
import math
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CPU,
    PLAIN,
    TINY,
    USUAL,
    assert_moved_alike,
    by_hand,
    eval_set_of,
    images,
    network_of,
    open_run,
    prepare,
    refused,
    rows_of,
    run,
    write_folder,
)
from torch import nn
from torchvision import models

import data_creation
import data_training as training

ERRORS = {
    "": "arguments are required: DATA",
    "DATA --epochs 0": "--epochs: not from 1 to",
    "DATA --power nan": "--power: not from 0 to 10",
    "DATA --group (": "--group: no regular expression",
    "--resume RUN --epochs 10": "--epochs and --resume: drop one",  # though the default
    "DATA --natural": "--natural: only with --predict; drop it",
    "DATA --source DATA --val OTHERS": "--source and --val",
    "NOWHERE": "DATA NOWHERE: no such folder",
    "DATA --output FILE": "--output FILE: not empty",
    "DATA --output DATA/new/run": "--output DATA/new/run: would be a class of",
    "DATA --weights none --group ZZZ": "--group ZZZ: 38 families; unmatched images: 38; match",
    "DATA --weights none --val EMPTY": "/EMPTY: nothing to validate on",
    "HOLLOW": "HOLLOW: at least two class folders are needed, with images in each; bee has none",
    "BROKEN": "/BROKEN: bee: no image that can be read is left to train on; add some or remove",
    "SINGLE": "/SINGLE: nothing to validate on",
    "PARTS": "parts of a data set, not classes; run data_training.py PARTS/train --val PARTS/valid",
    "DATA --source MORE": "--source MORE: not classes of DATA: cow, dog; rename or remove",
    "TWO --folds 3 --val HOLLOW": "--folds 3: too few images for so many, or all are learnt; take",
    "MORE --folds 5": "/MORE: dog: no image that can be read is left to train on",
    "DATA --weights none --baseline NOWHERE": "NOWHERE/split.csv: No such file",
    "DATA --weights none --image-size 32 --batch-size 2": "2: too few images for BatchNorm",
    "--resume RUN": "--resume RUN: no stopped run there, or a complete one",
    "DATA --device tpu": "--device tpu: not on this machine",
    "DATA --arch resnt18": "--arch resnt18: not with these weights, or unknown; take resnet101",
    "DATA --weights NOWHERE": "--weights NOWHERE: no such file; or take IMAGENET1K_V1",
    "DATA --weights FILE": "--weights FILE: damaged",
    "DATA --weights TRAP": "--weights TRAP: damaged, or not of tensors alone",
    "DATA --weights NUMBERS": "--weights NUMBERS: no weights in it",
    "DATA --weights NAME": "--weights NAME: no weights in it",
    "DATA --weights PLACES": "--weights PLACES: no weights in it",
    "DATA --weights NAN": "--weights: of a training that failed: not finite",
    "DATA --weights PRETRAINED --arch resnet50": "--weights: not of a resnet50",
    "DATA --weights RUN/network.pt --arch resnet50": "--arch resnet50: not with these weights",
    "DATA --weights VOTE": "--weights VOTE: an ensemble",
    "DATA --weights OLD": "OLD: written by version before 1.0 of this script, which is ",
    "DATA --predict EMPTY": "EMPTY: no network of a run there; name the folder of one",
    "NOWHERE --predict RUN": "DATA NOWHERE: no image there; known are .jpg",
    "BROKEN/bee --predict RUN": "DATA BROKEN/bee: no image that can be read",
    "DATA --predict RUN --output FILE": "--output FILE: there already, or no folder",
    "DATA --predict RUN --device tpu": "--device tpu: not on this machine",
    "DATA --predict RUN --image-size 32": "image-size and --predict: drop one of them",
}
FOLDERS = {  # with so many images in each of their class folders
    "HOLLOW": {"ape": 3, "bee": 0},
    "BROKEN": {"ape": 3, "bee": 1},
    "SINGLE": {"ape": 1, "bee": 1},
    "PARTS": {"train": 2, "valid": 2},
    "TWO": {"ape": 2, "bee": 2},
    "MORE": {"ape": 3, "bee": 3, "cow": 3, "dog": 1},
}


@pytest.fixture(scope="session")
def places(animals, others, pretrained, default_run, folds_run, tmp_path_factory):
    """What the names in capital letters stand for."""
    root = tmp_path_factory.mktemp("places")

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(root / "sprung"),)

    for name, counts in FOLDERS.items():
        write_folder(root / name, counts)
    (root / "BROKEN/bee/bee_000.jpg").write_text("broken")
    (root / "EMPTY").mkdir()
    (root / "FILE").write_text("something")
    torch.save({"state_dict": Trap()}, root / "TRAP")
    torch.save({"state_dict": {"fc.bias": 1}}, root / "NUMBERS")
    torch.save({"model": "resnet18"}, root / "NAME")
    torch.save({0: torch.ones(1)}, root / "PLACES")
    state = torch.load(pretrained, weights_only=True)
    torch.save(state | {"bn1.bias": state["bn1.bias"] / 0}, root / "NAN")
    torch.save({"classes": ["ape", "bee", "cat"], "networks": [state]}, root / "OLD")
    made = {path.name: path for path in root.iterdir()}
    made |= {"DATA": animals, "OTHERS": others, "PRETRAINED": pretrained}
    return made | {"RUN": default_run.path, "VOTE": folds_run.path}


def test_no_fold_trains_on_a_single_image():
    settings = training.Settings(image_size=32, batch_size=2)
    mask = torch.arange(8) < torch.tensor([[6], [7]])  # steps of 2, 2, 2 and of 2, 2, 2, 1 images
    data: Any = SimpleNamespace(train_mask=mask)
    with pytest.raises(training.DataError, match="--batch-size 2: too few images for BatchNorm"):
        training.check_batches(settings, data, 1)
    data.train_mask = mask[:1]
    training.check_batches(settings, data, 1)


@pytest.mark.parametrize("line", ERRORS)
def test_bad_input_gets_one_line_and_status_2_and_nothing_is_written(
    line, places, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name, path in places.items():
        (tmp_path / name).symlink_to(path)
    command = line.split()
    if not {"--resume", "--predict", "--output"}.intersection(command):
        command += ["--output", "some/new/run"]
    unchanged = (tmp_path, places["FILE"].parent, places["DATA"].parent)
    assert ERRORS[line] in refused(command, capsys, *unchanged)[-1]


@pytest.mark.parametrize("script", [training, data_creation])
def test_both_scripts_say_their_version(script, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        script.main(["--version"])
    assert capsys.readouterr().out == f"{script.__name__}.py {script.__version__}\n"


def test_what_is_not_said_is_settled_by_the_weights_and_the_images(
    animals, default_run, tmp_path, monkeypatch
):
    def settled(*flags: object) -> tuple[object, ...]:
        used, *_ = open_run(animals, "--output", tmp_path / "x", *flags)
        return used.arch, used.image_size, used.weights, used.batch_size

    monkeypatch.setattr(training, "SMALL", 30)  # of 38 images 30 are trained on, or 25 in folds
    assert settled() == ("resnet18", 224, "IMAGENET1K_V1", 64)
    assert settled("--weights", default_run.path, "--folds", 3)[1::2] == (32, 32)
    assert settled("--weights", default_run.path, "--image-size", 64)[1] == 64


def test_images_weigh_one_over_their_class():
    for power, few in ((1.0, 1 / 4), (0.5, 1 / 2), (0.0, 1.0)):
        weights = training.sample_weights(torch.tensor([0, 0, 0, 0, 1]), power)
        assert weights.tolist() == [few] * 4 + [1.0]


def test_an_epoch_draws_what_its_fold_learns_and_without_power_each_image_once():
    held = [*range(4)] * 250 + [4] * 9  # the last nine test the ensemble
    data = images([0] * 900 + [1] * 100 + [0] * 9, held, 4)
    drawn = {}
    for fold, power, seed in itertools.product(range(4), (0.0, 1.0), (0, 1)):
        learnt, stream = data.learnt(fold), training.seeded("draw", seed)
        draw = training.draw_epoch(data.labels, learnt, power, 2, stream)
        assert len(draw) == 1500
        assert {held[at] for at in draw.tolist()} == {0, 1, 2, 3} - {fold}
        drawn[fold, power, seed] = draw
    assert not torch.equal(drawn[0, 1.0, 0], drawn[0, 1.0, 1])
    assert abs(data.labels[drawn[0, 1.0, 0]].sum() - 750) < 4 * 375**0.5  # standard deviations
    first, second = drawn[0, 0.0, 0].split(750)
    assert sorted(first.tolist()) == sorted(second.tolist()) == data.learnt(0).tolist()
    assert not torch.equal(first, second)


def test_batches_differ_by_one_image_at_most_and_each_draw_is_augmented_in_its_own_way():
    for count, size, sizes in ((10, 4, [4, 3, 3]), (3, 8, [3]), (65, 64, [33, 32]), (0, 4, [0])):
        stream = training.seeded("augment", 0)
        batches = training.cut_batches(torch.arange(count), size, stream)
        assert [len(batch) for batch in batches] == sizes
        pairs = [pair for batch in batches for pair in batch.tolist()]
        assert [index for index, _ in pairs] == list(range(count))
        assert len({seed for _, seed in pairs}) == count
        evaluated = training.cut_batches(torch.arange(count), size)
        assert all((batch[:, 1] == training.EVALUATED).all() for batch in evaluated)


def test_weights_are_found_in_whatever_people_save(tmp_path):
    state = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}
    prefixed = {f"module.{key}": value for key, value in state.items()}
    for saved in (state, {"state_dict": state, "epoch": 3}, {"model": state}, prefixed):
        torch.save(saved, tmp_path / "x.pt")
        [found] = training.read_weights(str(tmp_path / "x.pt"))["networks"]
        assert found.keys() == state.keys()


@pytest.mark.parametrize(
    ("size", "known", "head", "power", "begins"),
    [
        (2, None, "fc", 1, "kept"),
        (2, ["no", "yes"], "fc", 0, "kept"),
        (2, ["yes", "no"], "fc", 1, "zeros"),
        (3, None, "fc", 0.5, "zeros"),
        (2, None, "fc.1", 0, "at random"),  # of several layers
    ],
)
def test_a_head_stays_where_size_and_known_classes_agree_or_begins_as_is_best_for_the_sampler(
    size, known, head, power, begins
):
    state = models.resnet18(num_classes=size).state_dict()
    weights = {key.replace("fc.", f"{head}."): value for key, value in state.items()}
    stored = {"networks": [weights]} | ({"classes": known} if known else {})
    settings = SimpleNamespace(seed=0, arch="resnet18", weights="x", power=power)
    model = training.load_model(settings, ["no", "yes"], stored)
    ratio = model.conv1.weight / state["conv1.weight"]  # rates are for one scale
    torch.testing.assert_close(ratio, torch.full_like(ratio, ratio.mean().item()))
    assert torch.equal(model.fc.bias, state["fc.bias"]) is (begins == "kept")
    assert model.fc.weight.shape == (2, 64) and model.fc.bias.shape == (2,)
    is_zero = not model.fc.weight.any() and not model.fc.bias.any()
    assert is_zero is (begins == "zeros")
    assert model.fc.bias.abs().max() <= 64**-0.5  # of torch's own


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_weights_of_any_scale_begin_with_the_one_that_rates_are_for(arch):
    """What they compute stays."""
    torch.manual_seed(0)
    model = models.get_model(arch, weights=None, num_classes=3).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 0.9)
            nn.init.uniform_(norm.bias, -0.2, 0.2)
            nn.init.uniform_(norm.running_mean, -0.2, 0.2)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    inputs = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(inputs)
        training.rescale_resnet(model)
        torch.testing.assert_close(model(inputs), expected, rtol=1e-3, atol=1e-3)
    for weight in model.parameters():
        if weight.dim() == 4:  # 0.5 / sqrt(fan-in)
            size = weight.square().sum((1, 2, 3)).mean().sqrt().item()
            assert size == pytest.approx(0.5, rel=1e-4)
    blocks = model.layer4  # what adds up to the features
    added = [getattr(block, "bn3", block.bn2) for block in blocks] + [blocks[0].downsample[1]]
    square = sum((norm.weight**2 + norm.bias**2).mean().item() for norm in added)
    assert square == pytest.approx(2**2, rel=1e-4)


def test_the_head_of_pretrained_weights_comes_first_and_a_trial_where_it_is_worth_it(monkeypatch):
    """Each stage by name, epochs, passes, steps and where it begins; batches are of 10 images."""
    monkeypatch.setattr(training, "HEAD_STEPS", USUAL["HEAD_STEPS"])
    data = images([0, 1] * 25, [None] * 40 + [0] * 10)

    def planned(epochs: int, weights: str = "x", **others: Any) -> list[tuple[Any, ...]]:
        settings = SimpleNamespace(epochs=epochs, batch_size=10, weights=weights)
        stages = training.plan(settings, data, **{"fold": 0} | others)
        assert {stage.fold for stage in stages} == {others.get("fold", 0)}
        return [(x.name, [*x.epochs][-1], x.passes, x.total_steps, x.begins_from) for x in stages]

    # 1,000 steps of 10 images, by 40 images, make 250 passes of 4 steps
    head = ("head", 0, 250, 1000, "weights")
    assert planned(240, weights="none") == [("whole", 240, 1, 960, "weights")]
    # 190 steps are 48 epochs, and a fifth of 240
    assert planned(239) == [head, ("whole", 239, 1, 956, "weights")]
    trial = ("trial", 48, 1, 192, "head")
    assert planned(240) == [head, trial, ("whole", 240, 1, 768, "trial")]
    assert planned(240, failed=True) == [head, trial, ("upper", 240, 1, 768, "head")]
    # Folds follow the first one's trial, each in as many steps as its images ask for.
    data = images([0, 1] * 20, [0] * 5 + [1] * 15 + [2] * 20, 3)
    assert planned(1)[-1] == ("whole", 1, 1, 4, "weights")
    assert planned(1, fold=2)[-1] == ("whole", 1, 1, 2, "weights")
    assert planned(500, fold=1, failed=True)[-1] == ("upper", 500, 1, 1500, "head")
    assert planned(500, fold=1)[-1] == ("whole", 500, 1, 1500, "head")


def test_a_trial_fails_where_it_ends_with_a_tenth_more_loss_than_the_head():
    for loss, failed in ((2.1, False), (2.3, True)):
        told = [(1, "head", 2.0), (1, "trial", 9.0), (1, "trial", loss), (2, "head", 0.1)]
        rows = [dict(zip(("fold", "stage", "val_loss"), row, strict=True)) for row in told]
        assert training.trial_failed(rows) is failed


def test_the_head_alone_is_kept_where_its_loss_is_surely_lower_or_all_layers_hardly_learnt(
    monkeypatch,
):
    for name, value in USUAL.items():
        monkeypatch.setattr(training, name, value)
    lost, won = (2.7, -0.7, 1.0), (-2.7, 0.7, -1.0)  # the error is 0.60, of which 1.645 are 0.99
    less_lost, less_won = (2.8, -0.8, 1.0), (-2.8, 0.8, -1.0)  # 0.64, of which they are 1.05
    learnt, few, ruined = (40, 0.62), (39, 0.62), (40, 0.63)  # steps, loss: 0.9 * log(2) = 0.624
    for gains, families, fewest, trained, kept in (
        # Of the loss of three images, the first two of one class: in the mean each time 1 or -1.
        ((1.0, 1.0, 1.0), [0, 1, 2], 2, learnt, "head"),
        (lost, [0, 1, 2], 2, learnt, "head"),
        (less_lost, [0, 1, 2], 2, learnt, "all"),
        (less_lost, [0, 0, 1], 2, learnt, "head"),  # if the two are of one family, they cancel out
        ((0.0, 0.0, 0.0), [0, 1, 2], 2, learnt, "all"),
        # They tell as much as 1 / (1/4^2 + 1/4^2 + 1/2^2) = 2.67 images of equal weight.
        ((1.0, 1.0, 1.0), [0, 1, 2], 2.6, learnt, "head"),
        ((1.0, 1.0, 1.0), [0, 1, 2], 2.7, learnt, "all, undecided"),
        (less_lost, [0, 1, 2], 2.7, learnt, "all"),
        (less_won, [0, 1, 2], 2.7, learnt, "all"),
        (less_won, [0, 1, 2], 2.7, few, "head"),
        (less_won, [0, 1, 2], 2.7, ruined, "head"),
        (won, [0, 1, 2], 2.7, few, "all"),
        (won, [0, 1, 2], 2.7, ruined, "all"),
        (less_won, [0, 0, 1], 2.7, few, "all"),
    ):
        monkeypatch.setattr(training, "FEWEST_EFFECTIVE", fewest)
        eval_set, (steps, loss) = eval_set_of([0, 0, 1], [1, 1], families), trained
        summary = {"val_loss": loss}
        whole = SimpleNamespace(eval_set=eval_set, losses=torch.full((3,), 3.0), summary=summary)
        head = SimpleNamespace(eval_set=eval_set, losses=3 - torch.tensor(gains))
        found = training.choose_kept(head, whole, steps)
        assert found == kept, (gains, families, fewest, trained)


def rate_by_hand(step: int, steps: int, rising: float) -> float:
    """Part of the peak: by half a cosine from 1 / 25 up in `rising` steps, and down to nothing."""
    if step <= rising:
        return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * step / rising)) / 2
    part = (step - rising) / (steps - 1 - rising)
    return 4e-6 + (1 - 4e-6) * (1 + math.cos(math.pi * part)) / 2


@pytest.mark.parametrize("stage", [training.WHOLE, training.UPPER])
@pytest.mark.parametrize(("steps", "rising"), [(100, 9), (6, 1), (4, 1), (3, 1), (2, 1), (1, 1)])
def test_the_rate_rises_for_a_tenth_and_then_falls_in_any_number_of_steps(steps, rising, stage):
    model = nn.Module()
    model.fc = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 3.0)
    trainer = training.Trainer(model, stage._replace(total_steps=steps), optimizer, CPU)
    biases = [model.fc.bias.item()]
    for step in range(steps):
        biases.append(biases[-1] - 3 * rate_by_hand(step, max(4, steps), rising))
        trainer.step(model.fc(torch.ones(1, 1)).sum())
    end = sum(biases[1:]) / steps if stage.upper_half else biases[-1]  # the mean of all steps
    assert model.fc.bias.item() == pytest.approx(end, rel=1e-4)


def test_a_run_of_all_layers_ends_as_a_loop_that_is_written_by_hand(
    default_run, animals, pretrained, tmp_path
):
    """They start where the weights do, not from the head that was trained before."""
    command = [animals, "--weights", pretrained, "--epochs", 2, *TINY]
    context, progress = prepare(*command, "--output", tmp_path / "run")
    data, dataset = context.data, context.reader.loader.dataset
    mean, std = (torch.tensor(each) for each in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    batches = []
    for epoch in (1, 2):
        stream = training.seeded("draw", 0, 0, epoch)
        drawn = training.draw_epoch(data.labels, data.learnt(0), 1.0, 1, stream)
        batches += training.cut_batches(drawn, 12, training.seeded("augment", 0, 0, epoch))
    model, losses = models.resnet18(num_classes=3), []
    model.load_state_dict(progress.start)
    layers = [layer for layer in model.named_children() if list(layer[1].parameters())]
    parts = {"conv1": 0.343, "bn1": 0.343, "layer1": 0.343, "layer2": 0.49, "layer3": 0.7}
    groups = [{"params": layer.parameters(), "part": parts.get(name, 1)} for name, layer in layers]
    optimizer = torch.optim.AdamW(groups)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 3e-4 * group["part"] * rate_by_hand(step, 6, 1)
        pixels = torch.stack([dataset[tuple(pair)][0] for pair in batch.tolist()])
        inputs = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
        loss = F.cross_entropy(model(inputs), data.labels[batch[:, 0]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() * len(batch))
    assert_moved_alike(network_of(default_run.path)["networks"][0], model, progress.start)
    _, *history = rows_of(default_run.path / "history.csv")
    found = [float(row["train_loss"]) for row in history]  # of 31 images in three steps
    assert found == pytest.approx([sum(losses[:3]) / 31, sum(losses[3:]) / 31], rel=1e-3)
    rate = 3e-4 * rate_by_hand(3, 6, 1)  # of the next step
    assert float(history[0]["learning_rate"]) == pytest.approx(rate, rel=1e-4)


def test_random_layers_learn_alike_and_a_layer_without_a_rate_is_an_error():
    model = training.build_model("resnet18", ["ape", "bee", "cat"])
    groups = training.whole_optimizer(model, False).param_groups
    assert {group["lr"] for group in groups} == {1e-3}
    model.layer5 = nn.Linear(1, 1)
    optimizer = training.whole_optimizer(model, True)
    with pytest.raises(ValueError, match="layer5.weight is in no group"):
        training.Trainer(model, training.WHOLE, optimizer, CPU)


@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_a_head_learns_the_same_whatever_the_scale_of_its_features(size):
    """Ten times the features with a tenth of the weights give the same logits, step by step."""
    head, features = nn.Linear(2, 3), torch.full((1, 2), 16.0)
    nn.init.constant_(head.weight, 1 / size)
    nn.init.zeros_(head.bias)
    optimizer = training.head_optimizer(head, size * features)  # of a squared length of 512
    F.cross_entropy(head(size * features), torch.tensor([0])).backward()
    optimizer.step()
    expected = 1 + 0.02 * (2 / 3 * 16 - 0.002)  # rate * (gradient + decay)
    assert size * head.weight[0, 0].item() == pytest.approx(expected, rel=1e-5)
    assert head.bias[0].item() == pytest.approx(0.02 * 2 / 3)


def test_few_images_and_epochs_keep_the_head_with_the_backbone_it_began_with(
    animals, pretrained, tmp_path, monkeypatch
):
    for name in ("SURE", "FEW_STEPS", "RUINED"):
        monkeypatch.setattr(training, name, USUAL[name])
    command = [animals, "--weights", pretrained, "--epochs", 2, *TINY, "--output"]
    done = run(*command, tmp_path / "run")
    start = prepare(*command, tmp_path / "other")[1].start
    [end] = network_of(done.path)["networks"]
    changed = {key for key in start if not torch.equal(start[key], end[key])}
    assert changed == {"fc.weight", "fc.bias"}
    # What is said is said of the head, which was trained on features of half the precision.
    losses = [float(row["val_loss"]) for row in rows_of(done.path / "history.csv")]
    assert losses[-1] == pytest.approx(losses[0], rel=1e-2)
    assert "\nThe head alone is kept, all layers are no better: 1 of 1\n" in done.out


def test_a_stage_begins_where_it_says_and_one_trains_the_upper_half_alone(
    animals, pretrained, tmp_path
):
    context, progress = prepare(animals, "--weights", pretrained, "--output", tmp_path / "run")
    model, start = context.model, progress.start
    progress.head = {"fc.weight": torch.full((3, 64), 5.0), "fc.bias": torch.full((3,), 6.0)}
    headed = start | progress.head
    sevens = {name: torch.full_like(value, 7) for name, value in start.items()}
    for begins_from, expected in (("trial", sevens), ("weights", start), ("head", headed)):
        model.load_state_dict(sevens)
        stage = training.UPPER._replace(begins_from=begins_from, epochs=range(2, 3))
        trainer = training.begin_stage(context, progress, stage)
        state = model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert not model.training  # so BatchNorm keeps its statistics
    [group] = trainer.optimizer.param_groups
    assert group["max_lr"] == pytest.approx(2e-5)
    trained = {name.split(".")[0] for name, x in model.named_parameters() if x.requires_grad}
    assert trained == {"layer3", "layer4", "fc"}


TABLES = {"classes.csv", "predictions.csv", "confusion.csv"}
FILES = TABLES | {"split.csv", "history.csv", "report.html", "config.json", "network.pt"}


def test_a_run_folder_has_its_networks_and_what_is_said_of_them(default_run, animals):
    assert {path.name for path in default_run.path.iterdir()} == FILES
    content = network_of(default_run.path)
    assert (content["arch"], content["classes"]) == ("resnet18", ["ape", "bee", "cat"])
    assert (content["version"], content["format"]) == (training.__version__, training.FORMAT)
    config = json.loads((default_run.path / "config.json").read_text())
    assert config["version"] == training.__version__ == data_creation.__version__
    assert content["train_images"] == [16, 10, 5]
    assert (content["image_size"], content["white"]) == (32, 0)  # no grey of over 8 bits
    assert (len(content["networks"]), len(content["learnt"]["digests"])) == (1, 31)
    history = rows_of(default_run.path / "history.csv")
    told = [(row["fold"], row["epoch"], row["stage"]) for row in history]
    assert told == [("1", "0", "head"), ("1", "1", "whole"), ("1", "2", "whole")]
    for name in ("scale", "shift"):  # of a single network, as they were fitted
        assert content[name] == pytest.approx(float(history[-1][f"logit_{name}"]), rel=1e-6)
    draws = sum(int(row["draws"]) for row in rows_of(default_run.path / "classes.csv"))
    assert draws == (39 + 2) * 31  # 100 steps of 12 images for the head, and two epochs


def test_each_image_is_judged_once_by_its_fold_and_others_by_the_ensemble(
    folds_run, animals, others
):
    tested = {f"test_{name}" for name in TABLES}
    assert {path.name for path in folds_run.path.iterdir()} == FILES | tested
    network, classes = network_of(folds_run.path), ["ape", "bee", "cat"]
    parts = {row["path"]: row["part"] for row in rows_of(folds_run.path / "split.csv")}
    rows = rows_of(folds_run.path / "predictions.csv")
    assert len({row["path"] for row in rows}) == len(rows) == 38
    folds = torch.tensor([int(parts[row["path"]].removeprefix("fold ")) for row in rows])
    logits = torch.empty(38, 3)
    for fold, state in enumerate(network["networks"], 1):
        paths = [animals / row["path"] for row in rows if parts[row["path"]] == f"fold {fold}"]
        logits[folds == fold] = by_hand(network | PLAIN | {"networks": [state]}, paths)
    targets = [classes.index(row["class"]) for row in rows]
    eval_set = eval_set_of(targets, network["train_images"])._replace(folds=folds)
    evaluation = training.evaluate_cross_fitted(logits, eval_set)
    # The mean of several is too cautious: theirs are the numbers of single ones, times 1.2.
    numbers = [1.2 * number for number in evaluation.calibration]
    assert [network["scale"], network["shift"]] == pytest.approx(numbers, rel=1e-3)
    result = json.loads((folds_run.path / "config.json").read_text())["result"]
    for name in ("as_trained_balanced_accuracy", "logit_scale", "logit_shift"):
        assert result[name] == pytest.approx(evaluation.summary[name], rel=1e-3)
    tests = rows_of(folds_run.path / "test_predictions.csv")
    assert len(tests) == 12
    answers = by_hand(network, [others / row["path"] for row in tests])
    found = evaluation.probabilities.amax(1), evaluation.predicted
    told = [(rows, *found), (tests, *answers.softmax(1).max(1))]
    for table, probability, predicted in told:
        assert [row["predicted"] for row in table] == [classes[at] for at in predicted]
        said = [float(row["probability"]) for row in table]
        assert said == pytest.approx(probability.tolist(), abs=1e-3)
