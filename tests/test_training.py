"""What `data_training.py` promises of its command line, of training, and of whole runs."""

import itertools
import json
import math
import os
import re
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CPU,
    PLAIN,
    TINY,
    assert_moved_alike,
    by_hand,
    eval_set_of,
    images,
    load,
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
    "DATA --epochs 0": "--epochs: 0 is not at least 1",
    "DATA --power nan": "--power: nan is not at least 0",
    "DATA --group (": "--group: this is no regular expression (missing ), unterminated subpattern",
    "--resume RUN --epochs 9": "--epochs and --resume cannot be used together; drop one of them",
    "--resume RUN --epochs 10": "--resume RUN: there is no stopped run in it",  # 10: as if not said
    "DATA --natural": "--natural works only with --predict; drop it",
    "DATA --source DATA --val OTHERS": "--source and --val cannot be used together",
    "NOWHERE": "DATA NOWHERE: this folder does not exist; pass one that holds class folders",
    "DATA --output FILE": "--output FILE: this is not an empty folder; name a new one, or go on",
    "DATA --output DATA/new/run": "--output DATA/new/run: this is inside DATA, where it would be "
    "taken for a class; name a folder outside it",
    "DATA --weights none --group ZZZ": "--group ZZZ: 38 families; images that do not match: 38; "
    "match what differs",
    "DATA --weights none --val EMPTY": "/EMPTY: it has no image to validate on; pass another "
    "folder",
    "HOLLOW": "HOLLOW: at least two class folders are needed, with images in each; fill or remove "
    "bee",
    "BROKEN": "/BROKEN: bee: this class has no readable image left to train on; add images, or "
    "remove the class",
    "SINGLE": "/SINGLE: no image is left to validate on; pass some by --val",
    "PARTS": "PARTS: train and valid look like parts of a data set, not like classes; run "
    "data_training.py PARTS/train --val PARTS/valid",
    "DATA --source MORE": "--source MORE: these folders are no classes of DATA: cow, dog; rename "
    "or remove them",
    "TWO --folds 3 --val HOLLOW": "--folds 3: there are too few images; take fewer folds",
    "MORE --folds 5": "/MORE: dog: this class has no readable image left to train on",
    "DATA --weights none --baseline NOWHERE": "--baseline NOWHERE: there is no finished run in "
    "it; name another folder",
    "DATA --weights none --image-size 32 --batch-size 2": "--batch-size 2: a step has too few "
    "images a process for batch normalisation; choose a larger number",
    "--resume RUN": "--resume RUN: there is no stopped run in it, or the run is complete; name "
    "the folder of a run that was stopped",
    "DATA --device tpu": "--device tpu: this machine has none, or one that is too old; try "
    "--device cpu",
    "DATA --arch resnt18": "--arch resnt18: not supported; choose one of resnet101, resnet152, ",
    "DATA --weights NOWHERE": "--weights NOWHERE: this file does not exist; name one, or "
    "IMAGENET1K_V1, DEFAULT, or none",
    "DATA --weights FILE": "--weights FILE: this file is damaged, or was not written by "
    "torch.save; ",
    "DATA --weights TRAP": "--weights TRAP: this file is damaged, or was not written by "
    "torch.save; pass another",
    "DATA --weights NUMBERS": "--weights NUMBERS: this file holds no weights; pass one with the "
    "state_dict of a network",
    "DATA --weights NAME": "--weights NAME: this file holds no weights; pass one with",
    "DATA --weights PLACES": "--weights PLACES: this file holds no weights; pass one with",
    "DATA --weights NAN": "error: --weights: the weights are not finite numbers; pass others",
    "DATA --weights PRETRAINED --arch resnet50": "--weights: these are not the weights of a "
    "resnet50: Missing key(s) in state_dict: ",
    "DATA --weights PRETRAINED --arch resnet34": " ...; pass others, or change --arch",
    "DATA --weights RUN/network.pt --arch resnet50": "--arch resnet50: --weights is a resnet18; "
    "leave --arch out",
    "DATA --weights VOTE": "--weights VOTE: this run has several networks; name a run of one",
    "DATA --weights OLD": "--weights OLD: this was written by version before 1.0 of the script, "
    "and this is version ",
    "DATA --predict EMPTY": "--predict EMPTY: this is not the folder of a finished run; name one",
    "NOWHERE --predict RUN": "DATA NOWHERE: there is no image; pass an image, or a folder that "
    "holds files of the types .jpg, ",
    "BROKEN/bee --predict RUN": "DATA BROKEN/bee: none of the images can be read; pass other "
    "images",
    "DATA --predict RUN --output FILE": "--output FILE: the file exists already, or its folder "
    "does not exist; name a new file in a folder that exists",
    "DATA --predict RUN --device tpu": "--device tpu: this machine has none, or one that is too "
    "old",
    "DATA --predict RUN --image-size 32": "--image-size and --predict cannot be used together",
}
FOLDERS = {  # with so many images in each of their class folders
    "HOLLOW": {"ape": 3, "bee": 0},
    "BROKEN": {"ape": 3, "bee": 1},
    "SINGLE": {"ape": 1, "bee": 1},
    "PARTS/train": {"ape": 2, "bee": 2},
    "PARTS/valid": {"ape": 2, "bee": 2},
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
    settings: Any = SimpleNamespace(image_size=32, batch_size=2)
    mask = torch.arange(8) < torch.tensor([[6], [7]])  # steps of 2, 2, 2 and of 2, 2, 2, 1 images
    data: Any = SimpleNamespace(train_mask=mask)
    with pytest.raises(training.DataError, match="^--batch-size 2: a step has too few images"):
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


def test_folders_named_like_parts_are_classes_if_their_images_lie_in_them(tmp_path, capsys):
    """Else the command to run is told: each part has class folders of its own."""
    flat = write_folder(tmp_path / "flat", {"train": 8, "test": 6, "car": 6})
    flags = ["--weights", "none", "--epochs", 1, *TINY, "--output", tmp_path / "run"]
    assert network_of(run(flat, *flags).path)["classes"] == ["car", "test", "train"]
    for part, size in (("Training", 32), ("Testing", 40)):  # of other sizes: other images
        write_folder(tmp_path / "nested" / part, {"ape": 3, "bee": 3}, size)
    nested = tmp_path / "nested"
    flags[-1] = tmp_path / "other"
    [line] = refused([nested, *flags], capsys, tmp_path)
    told = f"{nested}: Training and Testing look like parts of a data set, not like classes; run "
    told += f"data_training.py {nested}/Training --val {nested}/Testing"
    assert line == f"data_training.py: error: {told}"
    assert load(nested / "Training", "--val", nested / "Testing").eval_mask.sum() == 6


def test_a_folder_with_a_lock_and_a_file_of_others_is_refused(animals, tmp_path, capsys):
    """A lock alone is what a run leaves that was killed before its first state."""
    output = tmp_path / "run"
    output.mkdir()
    (output / training.LOCK).touch()
    training.check_output(output)
    (output / "classes.csv").write_text("mine")
    command = [animals, "--weights", "none", *TINY, "--output", output]
    [line] = refused(command, capsys, tmp_path)
    told = "this is not an empty folder; name a new one, or go on with the run in it by --resume"
    assert line == f"data_training.py: error: --output {output}: {told}"
    assert (output / "classes.csv").read_text() == "mine"


def test_a_baseline_that_is_not_there_is_named_before_any_image_is_read(
    animals, default_run, tmp_path, monkeypatch, capsys
):
    """Nor is one that is unfinished waited for."""
    unfinished = shutil.copytree(default_run.path, tmp_path / "unfinished")
    (unfinished / training.STATE).touch()

    def read(*_: object) -> None:
        raise AssertionError("an image was read")

    for name in ("list_data", "check_images", "read_image"):
        monkeypatch.setattr(training, name, read)
    for baseline in (tmp_path / "defualt", unfinished, animals):
        command = [animals, "--weights", "none", *TINY, "--baseline", baseline]
        [line] = refused([*command, "--output", tmp_path / "run"], capsys, tmp_path)
        told = f"--baseline {baseline}: there is no finished run in it; name another folder"
        assert line == f"data_training.py: error: {told}"


def test_a_seed_that_is_too_large_is_told_a_limit_that_it_exceeds(capsys):
    """Of 2 ** 62, which is accepted itself."""
    assert training.parse_args(["x", "--seed", str(2**62)])[0].seed == 2**62
    for seed in (9 * 10**18, 2**62 + 1):
        [line] = refused(["x", "--seed", seed], capsys)
        said = re.fullmatch(rf".* --seed: {seed} is not at most (\S+); see --help", line)
        assert said and float(said[1]) < 9e18


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
        learnt = data.train_indices(fold)
        draw = training.draw_epoch(data.labels, learnt, power, training.seeded("draw", seed))
        assert len(draw) == 750
        assert {held[at] for at in draw.tolist()} == {0, 1, 2, 3} - {fold}
        drawn[fold, power, seed] = draw
    assert not torch.equal(drawn[0, 1.0, 0], drawn[0, 1.0, 1])
    assert abs(data.labels[drawn[0, 1.0, 0]].sum() - 375) < 4 * 187.5**0.5  # standard deviations
    first, second = drawn[0, 0.0, 0], drawn[0, 0.0, 1]
    assert sorted(first.tolist()) == sorted(second.tolist()) == data.train_indices(0).tolist()
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
    ("size", "known", "head"),
    [(3, ["ape", "bee", "cat"], "fc"), (3, None, "fc"), (1000, None, "fc"), (3, None, "fc.1")],
)
def test_a_network_begins_with_the_lower_layers_of_its_weights_and_a_last_layer_of_its_own(
    size, known, head
):
    """Whatever the file's last layer is: of the same classes, of as many, of several layers."""
    state = models.resnet18(num_classes=size).state_dict()
    weights = {key.replace("fc.", f"{head}."): value for key, value in state.items()}
    stored = {"networks": [weights]} | ({"classes": known} if known else {})
    settings = SimpleNamespace(seed=0, arch="resnet18", weights="x")
    classes = [str(number) for number in range(size)]
    model = training.load_model(settings, classes, stored)
    ratio = model.conv1.weight / state["conv1.weight"]  # rates are for one scale
    torch.testing.assert_close(ratio, torch.full_like(ratio, ratio.mean().item()))
    assert model.fc.weight.shape == (size, 64)
    assert model.fc.bias.shape == (size,)
    assert not torch.equal(model.fc.bias, state["fc.bias"])
    # Its direction is another as well: the weights may have been multiplied.
    cosine = F.cosine_similarity(model.fc.weight.flatten(), state["fc.weight"].flatten(), 0)
    assert abs(cosine) < 0.5
    again = training.load_model(settings, classes, stored)
    assert torch.equal(model.fc.weight, again.fc.weight)


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
        training.rescale(model)
        torch.testing.assert_close(model(inputs), expected, rtol=1e-3, atol=1e-3)
    for weight in model.parameters():
        if weight.dim() == 4:  # 0.5 / sqrt(fan-in)
            size = weight.square().sum((1, 2, 3)).mean().sqrt().item()
            assert size == pytest.approx(0.5, rel=1e-4)
    blocks = model.layer4  # what adds up to the features
    added = [getattr(block, "bn3", block.bn2) for block in blocks] + [blocks[0].downsample[1]]
    square = sum((norm.weight**2 + norm.bias**2).mean().item() for norm in added)
    assert square == pytest.approx(2**2, rel=1e-4)


def balanced_loss(parameters: Any, features: Any, labels: Any, weights: Any) -> Any:
    """The loss of a linear probe by its definition; parameters are a row (weights, bias) a class.

    It is the weighted mean of minus the log of the true class's probability, and a small penalty.
    """
    logits = features @ parameters[:, :-1].T + parameters[:, -1]
    surprise = logits.logsumexp(1) - logits[range(len(labels)), labels]
    return weights @ surprise + 3e-5 / 2 * (parameters[:, :-1] ** 2).sum()


def fit_by_hand(features: Any, labels: Any, weights: Any) -> tuple[Any, float]:
    """The linear probe by Newton's method in float64: its answer, and its loss without penalty."""
    features, weights = features.double(), weights.double() / weights.sum()
    features = features / (weights @ (features**2).sum(1)).sqrt()
    parameters = torch.zeros(int(labels.max()) + 1, features.shape[1] + 1, dtype=torch.float64)

    def loss(flat: Any) -> Any:
        return balanced_loss(flat.view_as(parameters), features, labels, weights)

    flat = parameters.flatten()
    for _ in range(50):
        slope = torch.autograd.functional.jacobian(loss, flat)
        curvature = torch.autograd.functional.hessian(loss, flat)
        way = torch.linalg.pinv(curvature, hermitian=True) @ slope
        while loss(flat - way) > loss(flat) and way.norm() > 1e-9:
            way = way / 2
        flat = flat - way
    assert slope.norm() < 1e-6
    fitted = flat.view_as(parameters)
    logits = features @ fitted[:, :-1].T + fitted[:, -1]
    answer = logits.softmax(1)
    return answer, -(weights @ answer[range(len(labels)), labels].log()).item()


@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_the_linear_probe_is_a_logistic_regression_in_which_classes_weigh_the_same(size):
    """Of 24, 12 and 6 features that overlap, whatever their scale."""
    labels = torch.tensor([0] * 24 + [1] * 12 + [2] * 6)
    stream = training.seeded("features")
    centres = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    features = size * (centres[labels] + torch.randn(42, 2, generator=stream))
    weights = 1 / torch.tensor([24.0, 12.0, 6.0])[labels]
    head, loss = training.fit_probe(features, labels, weights)
    assert list(head) == ["fc.weight", "fc.bias"]
    answer = (features @ head["fc.weight"].T + head["fc.bias"]).softmax(1)
    expected, least = fit_by_hand(features, labels, weights)
    assert loss == pytest.approx(least, abs=1e-5)
    torch.testing.assert_close(answer.double(), expected, rtol=0, atol=5e-3)
    # The mean probability of a class is its part of the weights: a third, not 24, 12, 6 of 42.
    mean = weights / weights.sum() @ answer
    assert mean.tolist() == pytest.approx([1 / 3] * 3, abs=2e-3)


@pytest.mark.parametrize("power", [1.0, 0.0])
def test_a_run_begins_with_the_linear_probe_of_its_features(power, animals, pretrained, tmp_path):
    """By the weights of the sampler: with a power of 0 each image weighs the same."""
    command = [animals, "--weights", pretrained, "--power", power, *TINY]
    setup, progress, model = prepare(*command, "--output", tmp_path / "run")
    row = training.make_probe(setup, progress, model, 0)
    learnt = setup.data.train_indices(0)
    inputs = [setup.reader.loader.dataset[index, training.EVALUATED][0] for index in learnt]
    twin = models.resnet18(num_classes=3).eval()
    twin.load_state_dict(progress.start)
    twin.fc = nn.Identity()
    with torch.no_grad():
        features = twin(training.normalise(torch.stack(inputs)))
    labels = setup.data.labels[learnt]
    weights = torch.bincount(labels).double()[labels] ** -power
    # 31 images tell little of 64 features: their main directions tell the same.
    shift, scale, directions = torch.linalg.svd(features.double(), full_matrices=False)
    expected, least = fit_by_hand(shift * scale, labels, weights)
    assert row["train_loss"] == pytest.approx(least, abs=1e-4)
    answer = (features @ progress.head["fc.weight"].T + progress.head["fc.bias"]).softmax(1)
    assert (answer - expected).abs().max() < 0.01
    assert torch.equal(model.fc.weight, progress.head["fc.weight"])
    assert (row["fewest_draws"], row["most_draws"]) == (5, 16)


def test_features_that_tell_nothing_leave_chance_and_those_that_are_no_numbers_are_an_error():
    labels, weights = torch.tensor([0, 0, 0, 1]), torch.tensor([1.0, 1.0, 1.0, 3.0])
    head, loss = training.fit_probe(torch.zeros(4, 2), labels, weights)
    assert loss == pytest.approx(math.log(2))
    assert not head["fc.weight"].any()
    with pytest.raises(training.DataError, match="loss of the linear probe became nan; try"):
        training.fit_probe(torch.full((4, 2), math.nan), labels, weights)


def test_weights_whose_features_are_no_numbers_get_one_line(animals, pretrained, tmp_path, capsys):
    """A variance of -1: all weights are finite, but no root of that is."""
    state = torch.load(pretrained, weights_only=True)
    state["bn1.running_var"] -= 2
    torch.save(state, tmp_path / "x.pth")
    command = [animals, "--weights", tmp_path / "x.pth", *TINY, "--output", tmp_path / "run"]
    [error] = refused(command, capsys)
    assert "the network's outputs became nan; try --no-amp or other weights; go on with" in error
    assert not (tmp_path / "run/network.pt").exists()


def test_a_point_of_the_line_is_so_much_of_the_way_in_weights_and_statistics():
    probe = {"fc.weight": torch.tensor([0.0, 4.0]), "bn1.running_var": torch.tensor([1.0])}
    end = {"fc.weight": torch.tensor([8.0, 0.0]), "bn1.running_var": torch.tensor([3.0])}
    probe["bn1.num_batches_tracked"] = torch.tensor(0)
    end["bn1.num_batches_tracked"] = torch.tensor(7)  # a whole number: that of the end
    for point, weight, variance in ((0.0, [0, 4], 1), (0.25, [2, 3], 1.5), (1.0, [8, 0], 3)):
        state = training.interpolate(probe, end, point)
        assert state["fc.weight"].tolist() == weight
        assert state["bn1.running_var"].tolist() == [variance]
        assert state["bn1.num_batches_tracked"].tolist() == 7


def test_the_point_of_the_lowest_loss_over_all_folds_together_is_kept(monkeypatch):
    """Where the first fold alone would keep another one: it has few images."""
    monkeypatch.setattr(training, "POINTS", (0.0, 0.5, 1.0))
    labels = [0, 1] * 5 + [0, 1] * 50
    data = images(labels, [0] * 10 + [1] * 100, 2)
    # How many of ten images, and of a hundred, are answered wrongly at each point.
    wrong = ((0, 2, 4), (40, 10, 20))
    results = []
    for fold, size in enumerate((10, 100)):
        truth = F.one_hot(torch.tensor([0, 1] * (size // 2)), 2)
        points = []
        for number in wrong[fold]:
            sign = torch.where(torch.arange(size) < number, -1.0, 1.0)
            points.append(3 * truth * sign[:, None])
        head, end = ({"fc.bias": torch.tensor([x + fold])} for x in (0.0, 10.0))
        results.append(training.FoldResult(head, end, torch.stack(points)))
    setup: Any = SimpleNamespace(data=data, settings=SimpleNamespace(power=1.0))
    for finished, point, biases in ((1, 0.0, [0]), (2, 0.5, [5, 6])):
        start = {"fc.bias": torch.tensor([9.0])}
        progress: Any = SimpleNamespace(start=start, finished=results[:finished])
        kept = training.choose_point(setup, progress)
        assert kept.point == point
        assert [state["fc.bias"].item() for state in kept.networks] == biases
        assert [row["point"] for row in kept.line] == [0.0, 0.5, 1.0]
        losses = [row["val_loss"] for row in kept.line]
        assert [row["kept"] for row in kept.line] == [int(x == min(losses)) for x in losses]
        assert kept.evaluation.summary["val_loss"] == min(losses)


def test_a_run_tells_what_it_has_kept_of_the_line(default_run):
    line = rows_of(default_run.path / "line.csv")
    points = [0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0]
    assert [float(row["point"]) for row in line] == points
    [kept] = [row for row in line if row["kept"] == "1"]
    losses = [float(row["val_loss"]) for row in line]
    assert float(kept["val_loss"]) == min(losses)
    config = json.loads((default_run.path / "config.json").read_text())
    assert config["kept_point"] == float(kept["point"])
    assert config["result"]["val_loss"] == pytest.approx(min(losses))
    title = "point  val loss  balanced [95 %]   from linear probe (0) to fine-tuning (1)"
    _, _, table = default_run.out.partition(f"\n{title}\n")
    printed = table.splitlines()[: len(points)]
    assert [float(row.split()[0]) for row in printed] == pytest.approx(points, abs=0.006)
    assert [row.endswith("  kept") for row in printed] == [row["kept"] == "1" for row in line]
    history = rows_of(default_run.path / "history.csv")
    for row, end in ((history[0], line[0]), (history[-1], line[-1])):  # both ends are epochs
        assert float(row["val_loss"]) == pytest.approx(float(end["val_loss"]), abs=1e-4)


def test_the_network_file_holds_the_weights_of_the_kept_point(
    animals, pretrained, tmp_path, monkeypatch
):
    networks = []
    for point in (0.0, 0.25, 1.0):
        monkeypatch.setattr(training, "POINTS", (point,))
        output = tmp_path / str(point)
        run(animals, "--weights", pretrained, "--epochs", 1, *TINY, "--output", output)
        assert json.loads((output / "config.json").read_text())["kept_point"] == point
        [state] = network_of(output)["networks"]
        networks.append(state)
    probe, kept, end = networks
    assert not torch.equal(probe["fc.weight"], end["fc.weight"])
    for name, value in kept.items():
        expected = 0.75 * probe[name] + 0.25 * end[name]
        if not value.is_floating_point():
            expected = end[name]
        torch.testing.assert_close(value, expected)


def test_each_fold_has_class_shares_of_its_own():
    """Of eight "no" the folds hold 4, 2, 2 and so learn 4, 6, 6; of four "yes" 0, 2, 2 and 4, 2, 2.

    Two more of each class test all networks together.
    """
    held = [0, 0, 0, 0, 1, 1, 2, 2, 1, 1, 2, 2, 3, 3, 3, 3]
    data = images([0] * 8 + [1] * 4 + [0, 0, 1, 1], held, 3)
    assert data.fold_counts().tolist() == [[4, 4], [6, 2], [6, 2]]
    half = math.log(3) / 2  # of the log of 6 / 2
    eval_set = training.make_eval_set(data, range(3))
    assert eval_set.folds.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    shares = training.class_shares(data, eval_set, 1.0)
    expected = torch.tensor([[0.0, 0.0]] * 4 + [[half, -half]] * 8)
    torch.testing.assert_close(shares.log_share.float(), expected)
    assert shares.train_counts.tolist() == pytest.approx([16 / 3, 8 / 3])
    shares = training.class_shares(data, training.make_eval_set(data, [1]), 1.0)
    assert shares.train_counts.tolist() == [6, 2]
    shares = training.class_shares(data, training.make_eval_set(data, [3]), 0.5)
    mean = 2 / 3 * half
    torch.testing.assert_close(shares.log_share.float(), torch.tensor([[mean, -mean]] * 4))
    assert shares.expected_shift == 1.5  # half of the imbalance is drawn as well
    settings: Any = SimpleNamespace(arch="resnet18", image_size=32, group=None)
    evaluation: Any = SimpleNamespace(calibration=training.Calibration())
    content = training.describe_networks(settings, data, training.Kept([{}] * 3, evaluation))
    assert content["natural"].tolist() == pytest.approx([mean, -mean])
    assert content["train_images"] == [5, 3]
    alone = training.describe_networks(settings, data, training.Kept([{}], evaluation))
    assert alone["natural"].tolist() == [0, 0]


def test_families_of_unlike_size_make_folds_of_unlike_classes(make_folder):
    """The first family is half of the larger class, so its fold learns as many of both."""
    folder = make_folder({"ape": 20, "bee": 10})
    for number in range(10):
        (folder / f"ape/ape_{number:03}.jpg").rename(folder / f"ape/family_{number}.jpg")
    data = load(folder, "--weights", "none", "--folds", 3, "--group", "^family", "--output", "x")
    held = [data.counts(data.eval_mask[fold].nonzero().flatten()) for fold in range(3)]
    assert sorted(int(counts[0]) for counts in held) == [5, 5, 10]
    expected = [(torch.tensor([20, 10]) - counts).tolist() for counts in held]
    assert data.fold_counts().tolist() == expected


def rate_by_hand(step: int, steps: int, rising: float) -> float:
    """Part of the peak: by half a cosine from 1 / 25 up in `rising` steps, and down to nothing."""
    if step <= rising:
        return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * step / rising)) / 2
    part = (step - rising) / (steps - 1 - rising)
    return 4e-6 + (1 - 4e-6) * (1 + math.cos(math.pi * part)) / 2


@pytest.mark.parametrize(("steps", "rising"), [(100, 9), (6, 1), (4, 1), (3, 1), (2, 1), (1, 1)])
def test_the_rate_rises_for_a_tenth_and_then_falls_in_any_number_of_steps(steps, rising):
    model = training.build_model("resnet18", ["ape", "bee", "cat"])
    trainer = training.Trainer(model, True, steps, CPU)
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        trainer.step(model.fc.weight.sum())
    for step, found in enumerate(rates):
        part = rate_by_hand(step, max(4, steps), rising)
        assert found == pytest.approx([rate * part for rate in PEAKS])


PEAKS = (1.029e-4, 1.47e-4, 2.1e-4, 3e-4)  # 0.7 of the rate above


def test_pretrained_layers_learn_the_slower_the_lower_they_are_and_random_ones_alike():
    model = training.build_model("resnet18", ["ape", "bee", "cat"])
    names = {id(weight): name for name, weight in model.named_parameters()}
    for is_pretrained, peaks in ((True, PEAKS), (False, (1e-3,) * 4)):
        groups = training.Trainer(model, is_pretrained, 100, CPU).optimizer.param_groups
        assert [group["max_lr"] for group in groups] == pytest.approx(list(peaks))
        layers = [{names[id(x)].split(".")[0] for x in group["params"]} for group in groups]
        assert layers == [{"conv1", "bn1", "layer1"}, {"layer2"}, {"layer3"}, {"layer4", "fc"}]
        assert sum(len(group["params"]) for group in groups) == len(names)


def test_fine_tuning_ends_as_a_loop_that_is_written_by_hand(
    default_run, animals, pretrained, tmp_path, monkeypatch
):
    """It starts from the pretrained layers, and a quarter of the linear probe as the last one."""
    monkeypatch.setattr(training, "POINTS", (1.0,))
    command = [animals, "--weights", pretrained, "--epochs", 2, *TINY]
    done = run(*command, "--output", tmp_path / "run")
    setup, progress, model = prepare(*command, "--output", tmp_path / "other")
    training.make_probe(setup, progress, model, 0)
    data, dataset = setup.data, setup.reader.loader.dataset
    mean, std = (torch.tensor(each) for each in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    batches = []
    for epoch in (1, 2):
        stream = training.seeded("draw", 0, 0, epoch)
        drawn = training.draw_epoch(data.labels, data.train_indices(0), 1.0, stream)
        batches += training.cut_batches(drawn, 12, training.seeded("augment", 0, 0, epoch))
    model, losses = models.resnet18(num_classes=3), []
    quarter = {name: value / 4 for name, value in progress.head.items()}
    start = progress.start | quarter
    model.load_state_dict(start)
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
    assert_moved_alike(network_of(done.path)["networks"][0], model, start)
    probe, *history = rows_of(done.path / "history.csv")
    assert probe["learning_rate"] == "nan"
    found = [float(row["train_loss"]) for row in history]  # of 31 images in three steps
    assert found == pytest.approx([sum(losses[:3]) / 31, sum(losses[3:]) / 31], rel=1e-3)
    rates = [3e-4 * rate_by_hand(step, 6, 1) for step in (2, 5)]  # of the last step of each epoch
    assert [float(row["learning_rate"]) for row in history] == pytest.approx(rates, rel=1e-4)
    losses = [
        [row["train_loss"] for row in rows_of(each.path / "history.csv")]
        for each in (done, default_run)
    ]
    assert losses[0] == losses[1]


def test_the_history_has_the_rate_of_the_last_step_of_each_epoch(default_run):
    """As of a scheduler of its own: six steps of which two rise; the last is all but zero."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-4, total_steps=6, pct_start=2 / 6, cycle_momentum=False
    )
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(rates) < 6:
            scheduler.step()
    assert rates[5] == pytest.approx(1.2e-9)  # 3e-4 / 25 / 10,000
    probe, *history = rows_of(default_run.path / "history.csv")
    assert probe["learning_rate"] == "nan"
    found = [float(row["learning_rate"]) for row in history]
    assert found == pytest.approx([rates[2], rates[5]], rel=1e-5)


TABLES = {"classes.csv", "predictions.csv", "confusion.csv"}
FILES = TABLES | {"split.csv", "history.csv", "line.csv"}
FILES |= {"report.html", "config.json", "network.pt"}


def test_a_run_folder_has_its_networks_and_what_is_said_of_them(default_run, animals):
    assert {path.name for path in default_run.path.iterdir()} == FILES
    content = network_of(default_run.path)
    assert (content["arch"], content["classes"]) == ("resnet18", ["ape", "bee", "cat"])
    assert (content["version"], content["format"]) == (training.__version__, training.FORMAT)
    config = json.loads((default_run.path / "config.json").read_text())
    assert config["version"] == training.__version__ == data_creation.__version__
    assert content["train_images"] == [16, 10, 5]
    assert (content["image_size"], content["white"]) == (32, 0)  # no grey of over 8 bits
    assert (len(content["networks"]), len(content["trained_on"])) == (1, 31)
    history = rows_of(default_run.path / "history.csv")
    told = [(row["fold"], row["epoch"], row["step"]) for row in history]
    tuned = [("1", "1", "fine-tuning"), ("1", "2", "fine-tuning")]
    assert told == [("1", "0", "linear probe"), *tuned]
    for name in ("scale", "shift"):  # of a single network, as they were fitted
        assert content[name] == pytest.approx(config["result"][f"logit_{name}"], rel=1e-6)
    draws = sum(int(row["draws"]) for row in rows_of(default_run.path / "classes.csv"))
    assert draws == 2 * 31  # two epochs; the linear probe draws none


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
    eval_set = eval_set_of(targets)._replace(folds=folds)
    counts = torch.zeros(3, 3)  # of the images of each class that each fold has learnt
    for row in rows:
        held = int(parts[row["path"]].removeprefix("fold ")) - 1
        counts[torch.arange(3) != held, classes.index(row["class"])] += 1
    log_share = counts.log() - counts.log().mean(1, keepdim=True)
    shares = training.ClassShares(counts.double().mean(0), log_share[folds - 1], 1.0)
    evaluation = training.evaluate_cross_fitted(logits, eval_set, shares)
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
