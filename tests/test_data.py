"""What `data_training.py` reads: folders, splits, families, folds, pixels and views of them."""

import dataclasses
import hashlib
import json
import math
import random
import shlex
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, load, network_of, png, prepare, refused, rows_of, run, write_folder
from PIL import Image
from torchvision.transforms import v2

import data_creation as creation
import data_training as training

Maker = Callable[..., Path]
SMALL = ["--weights", "none", "--image-size", "32", "--device", "cpu"]


def names_of(data: training.Data, part: torch.Tensor) -> list[str]:
    return [data.names[index] for index in part.tolist()]


def write_parts(path: Path, parts: dict[str, str], encoding: str = "utf-8") -> Path:
    """A table as other tools write it: rows in any order, and a column more."""
    rows = [f"{name},{number},{part}" for number, (name, part) in enumerate(parts.items())]
    random.Random(0).shuffle(rows)
    path.write_text("\n".join(["path,patient,part", *rows, ""]), encoding)
    return path


# ------------------------------------------------------------------------- who is dealt where


def deal(
    labels: list[int], shares: list[float], seed: int = 0, families: str | list[str] = ""
) -> tuple[list[int], list[Counter[int]]]:
    """The part of each image, and how many images of each class each part gets."""
    alone = [str(at) for at in range(len(labels))]
    order = [hashlib.sha256(f"{seed}/{at}".encode()).digest() for at in range(len(labels))]
    parts = training.deal(labels, families or alone, order, shares)
    counts = [
        Counter(label for label, part in zip(labels, parts, strict=True) if part == each)
        for each in range(len(shares))
    ]
    return parts, counts


def labels_of(counts: list[int]) -> list[int]:
    """So many images of each class."""
    return [label for label, count in enumerate(counts) for _ in range(count)]


@pytest.mark.parametrize(
    ("counts", "fraction", "validation"),
    [
        ([10, 5, 100], 0.2, [2, 1, 20]),
        ([1, 2, 3, 4], 0.2, [0, 1, 1, 1]),
        ([1, 2, 3, 4], 0.99, [0, 1, 2, 3]),
        ([14, 252], 0.2, [3, 50]),
        ([7, 7], 0.5, [4, 4]),
    ],
)
def test_each_class_gives_its_part_and_keeps_a_training_image(counts, fraction, validation):
    for seed in range(5):
        _, (train, val) = deal(labels_of(counts), [1 - fraction, fraction], seed)
        assert [val[label] for label in range(len(counts))] == validation
        assert [train[label] + val[label] for label in range(len(counts))] == counts


@pytest.mark.parametrize(
    ("labels", "families", "fraction", "held", "counts"),
    [
        # 2 of 10 are wanted: the families of 4 and of 3 are too large, the one of 2 fits.
        ([0] * 10, "aaaabbbccd", 0.2, "c", [2]),
        ([0] * 6, "aaabbb", 0.2, "ab", [3]),  # two families: one on each side, whatever their size
        ([0] * 6, "aaaaab", 0.2, "b", [1]),
        ([0, 0, 0, 1, 1], "aaabc", 0.5, "bc", [0, 1]),  # one family of a class: to train on
        ([0, 0, 0, 1, 1], "aaabc", 0.8, "bc", [0, 1]),
        ([0, 0, 0, 1, 1, 1], "xabxcd", 0.6, "xabcd", [2, 2]),  # one of both classes
        ([0, 0, 1, 1], "xaxb", 0.2, "ab", [1, 1]),
    ],
)
def test_families_go_where_they_bring_the_counts_closest(labels, families, fraction, held, counts):
    for seed in range(10):
        parts, (_, val) = deal(labels, [1 - fraction, fraction], seed, families)
        sides = set(zip(families, parts, strict=True))
        assert len(sides) == len(set(families))  # none is on both
        assert {family for family, part in sides if part} <= set(held)
        assert [val[label] for label in range(len(counts))] == counts


@pytest.mark.parametrize("folds", [3, 5])
def test_each_fold_gets_its_share_of_each_class(folds):
    counts = [folds, 7, 11, 23, 8]
    _, parts = deal(labels_of(counts), [1 / folds] * folds)
    for label, count in enumerate(counts):
        share = {part[label] for part in parts}
        assert share <= {count // folds, math.ceil(count / folds)}, label
    _, parts = deal(labels_of([folds + 1] * folds), [1 / folds] * folds)
    assert {part.total() for part in parts} == {folds + 1}  # each class leaves one to another fold


@pytest.mark.parametrize("shares", [[0.8, 0.2], [0.5, 0.5], [1 / 3] * 3, [0.2] * 5])
def test_random_families_stay_together_and_no_part_lacks_a_class(shares):
    for seed in range(40):
        stream = random.Random(seed)
        labels, families = [], []
        for label in range(4):
            for number in range(len(shares) + stream.randrange(5)):
                for _ in range(stream.randint(1, 6)):
                    labels.append(label)
                    families.append(f"{label}/{number}")
        parts, counts = deal(labels, shares, seed, families)
        assert len(set(zip(families, parts, strict=True))) == len(set(families))
        for part, share in zip(counts, shares, strict=True):
            for label in range(4):
                wanted = share * labels.count(label)
                assert part[label] and abs(part[label] - wanted) <= 6, (seed, label)


def test_a_split_hangs_on_seed_and_names_of_a_class_alone(folder, make_folder):
    data = load(folder)
    held = names_of(data, data.judges(0))
    assert data.counts(data.judges(0)).tolist() == [6, 4, 2]
    assert sorted(held + names_of(data, data.learns(0))) == sorted(data.names)
    other = make_folder({"ape": 30, "bee": 18, "cat": 9}, "elsewhere")
    (other / "bee/new.jpg").write_bytes((other / "ape/ape_000.jpg").read_bytes() + b"x")
    moved = load(other)
    kept = [name for name in names_of(moved, moved.judges(0)) if name[:3] != "bee"]
    assert kept == [name for name in held if name[:3] != "bee"]
    reseeded = load(folder, "--seed", "1")
    assert names_of(reseeded, reseeded.judges(0)) != held


@pytest.mark.parametrize("flags", [[], ["--folds", "3"]])
def test_copies_never_stand_on_both_sides(flags, make_folder):
    root = make_folder({"ape": 20, "bee": 20})
    for number in range(15):
        content = (root / f"ape/ape_{number:03}.jpg").read_bytes()
        (root / f"ape/copy_{number:03}.jpg").write_bytes(content)
        (root / f"bee/copy_{number:03}.jpg").write_bytes(content if number < 5 else b"x" + content)
    data = load(root, *(flags or ["--val-fraction", "0.3"]))
    for fold in range(data.folds):
        sides = [{Path(data.paths[i]).read_bytes() for i in part.tolist()}
                 for part in (data.learns(fold), data.judges(fold))]  # fmt: skip
        assert sides[1] and not sides[0] & sides[1]
    assert data.related == 0 and len(data.names) == 60 and len(data.unreadable) == 10


def test_files_that_are_no_images_by_their_names_are_counted(make_folder, capsys):
    root = make_folder({"ape": 5, "bee": 5})
    for name in ("ape/x.GIF", "bee/deep/y.jfif", "bee/notes", "readme.txt", "ape/._x.gif"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"")
    load(root)
    said = f"warning: {root}: 3 files left out, whose names end in .GIF, .jfif, notes\n"
    assert capsys.readouterr().err == said


def test_hidden_images_are_left_out_and_links_are_followed_but_not_back_up(make_folder, capsys):
    """Small copies that a program keeps of images would be learnt while these validate."""
    root, others = make_folder({"ape": 5, "bee": 5}), make_folder({"sub": 3}, "others")
    names = set(load(root).names)
    for folder in (root / "ape/.thumbs", root / ".cache"):
        shutil.copytree(root / "ape", folder, ignore=shutil.ignore_patterns(".*"))
    (root / "bee/.bee_000.jpg").write_bytes(b"hidden")
    (root / "bee/far").symlink_to(others)
    assert set(load(root).names) == names | {f"bee/far/sub/sub_00{n}.jpg" for n in range(3)}
    (others / "sub/up").symlink_to(root)
    command = [root, "--output", root.parent / "run", *SMALL]
    [error] = refused(command, capsys, root.parent)
    assert f"{root}/bee/far/sub/up: this link leads back to a folder above it; remove it" in error


# ------------------------------------------------------------- what the network has learnt before


def digests_of(*paths: Path) -> torch.Tensor:
    """As in network.pt."""
    numbers = [hashlib.sha256(path.read_bytes()).digest()[:8] for path in paths]
    return torch.tensor([int.from_bytes(number, "big", signed=True) for number in numbers])


@pytest.mark.parametrize("flags", ["", "--val-fraction 0.4", "--seed 3", "--folds 3"])
def test_images_that_the_network_has_learnt_are_trained_on_and_judge_nothing(
    flags, make_folder, capsys
):
    root = make_folder({"ape": 20, "bee": 15})
    known = [*sorted((root / "ape").iterdir())[:14], *sorted((root / "bee").iterdir())[:12]]
    data = load(root, *flags.split(), known=digests_of(*known))
    names = {path.relative_to(root).as_posix() for path in known}
    for fold in range(data.folds):
        assert names <= set(names_of(data, data.learns(fold)))
        assert min(data.counts(data.judges(fold)).tolist()) >= 1
    wanted = {"": [4, 3], "--seed 3": [4, 3]}.get(flags, [6, 3])
    assert data.counts(data.judged()).tolist() == wanted and data.related == 0
    said = "note: the network of --weights has learnt 26 of 35 images, or others of their families;"
    assert capsys.readouterr().err == f"{said} these do not judge\n"


@pytest.mark.parametrize(
    "flags", ["--val", "--source", "--split", "--folds 3 --val", "--folds 3 --source"]
)
def test_images_named_to_judge_are_left_out_where_the_network_has_learnt_their_family(
    flags, patients, capsys
):
    """P5 was learnt, of whom another folder, or the table, names all images to judge."""
    other, table = patients.parent / "other", patients.parent / "split.csv"
    by_table = flags == "--split"
    rows = {path.relative_to(patients).as_posix(): "train" for path in patients.rglob("*.jpg")}
    for path in sorted(patients.rglob("P[4567]_*.jpg")):
        (other / path.parent.name).mkdir(parents=True, exist_ok=True)
        rows[path.relative_to(patients).as_posix()] = "val"
        if not by_table:
            path.rename(other / path.parent.name / path.name)
    known = digests_of(next((patients if by_table else other).rglob("P5_02.jpg")))
    write_parts(table, rows)
    where = str(table if by_table else other)
    data = load(patients, *flags.split(), where, "--group", "^(P[0-9])", known=known)
    judged = names_of(data, data.judges(training.TEST if data.folds > 1 else 0))
    tested = {name.partition("/")[2][:2] for name in judged} - {"P0", "P1", "P2", "P3"}
    assert tested == {"P4", "P6", "P7"} and data.related == 8
    assert not [name for name in data.names if "/P5" in name]
    assert "of 64 images, or others of their families; these do not judge, and 8 of them are " in (
        capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def coin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 tiles of noise, their classes thrown by a coin, and a run that has learnt 32 of them."""
    root, stream = tmp_path_factory.mktemp("coin") / "tiles", np.random.default_rng(0)
    for number in range(40):
        path = root / ("heads" if number % 2 else "tails") / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = stream.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(path)
    flags = [*TINY, "--flip", "none", "--crop-scale", "1", "--weights", "none"]
    run(root, *flags, "--epochs", 8, "--output", root.parent / "run")
    return root


def test_a_network_is_not_judged_by_what_its_weights_have_learnt(coin, tmp_path, capsys):
    """Judged by all 40 it would seem to know what a coin will show."""
    first, split = coin.parent / "run", rows_of(coin.parent / "run/split.csv")
    learnt = [coin / row["path"] for row in split if row["part"] == "train"]
    assert len(learnt) == 32
    assert network_of(first)["learnt"].tolist() == sorted(digests_of(*learnt).tolist())
    command = [coin, "--weights", first, *TINY]
    flags = ["--folds", 4, "--epochs", 1, "--frozen-epochs", 1, "--output", tmp_path / "folds"]
    again = run(*command, *flags)
    judged = {row["path"] for row in rows_of(again.path / "predictions.csv")}
    assert judged == {row["path"] for row in split if row["part"] == "val"}
    result = json.loads((again.path / "config.json").read_text())["result"]
    assert result["low"] < 0.5 < result["high"]
    assert "has learnt 32 of 40 images" in again.err
    assert torch.equal(network_of(again.path)["learnt"], digests_of(*coin.rglob("*.png")).unique())
    given = run(*command, "--epochs", 0, "--seed", 7, "--output", tmp_path / "given")
    assert {row["path"] for row in rows_of(given.path / "predictions.csv")} == judged
    assert torch.equal(network_of(given.path)["learnt"], network_of(first)["learnt"])
    for row in split:
        (coin / row["path"]).unlink() if row["part"] == "val" else None
    output = ["--output", tmp_path / "none"]
    error = refused([*command, "--epochs", 0, *output], capsys, tmp_path)[-1]
    assert "the network of --weights has learnt all images, or copies or relatives of" in error
    error = refused([*command, "--folds", 3, *output], capsys, tmp_path)[-1]
    assert "has 0 different images that the network of --weights has not learnt; add" in error


# ------------------------------------------------------------------------------- families


@pytest.fixture
def patients(make_folder: Maker) -> Path:
    """Patients P0 to P7 have four images of each of two classes: P3_01.png is one."""
    root = make_folder({"ill": 32, "well": 32}, "scans")
    for name in ("ill", "well"):
        for number, path in enumerate(sorted((root / name).iterdir())):
            path.rename(root / name / f"P{number // 4}_{number % 4:02}.jpg")
    return root


@pytest.mark.parametrize("flags", [[], ["--folds", "3"]])
@pytest.mark.parametrize(
    "pattern", ["^(P[0-9]+)_[0-9]+", "^P[0-9]+_", "(P.)_|(Q.)_", "^(P[0-9]+)/"]
)
def test_the_images_of_a_patient_are_on_one_side(pattern, flags, patients, capsys):
    for path in sorted(patients.rglob("*.jpg")) if "/" in pattern else ():  # to a folder of his own
        path.with_name(path.name[:2]).mkdir(exist_ok=True)
        path.rename(path.with_name(path.name[:2]) / path.name[3:])
    data = load(patients, "--group", pattern, *flags)
    assert capsys.readouterr().err == "--group: 8 families of 64 images\n"
    for fold in range(data.folds):
        sides = [
            {name.partition("/")[2][:2] for name in names_of(data, part)}
            for part in (data.learns(fold), data.judges(fold))
        ]
        assert sides[1] and not sides[0] & sides[1] and len(sides[0] | sides[1]) == 8
        assert min(data.counts(data.judges(fold)).tolist()) >= 4


def test_copies_bind_patients_and_names_that_do_not_match_are_families_of_one(patients, capsys):
    for number in range(4):
        (patients / f"ill/P7_{number:02}.jpg").rename(patients / f"ill/x{number}.jpg")
    load(patients, "--group", "^(P[0-9]+)")
    said = "--group: 12 families of 64 images; 4 do not match and are one each\n"
    assert capsys.readouterr().err == said
    for number in range(6):  # an image of each patient is one of the next
        content = (patients / f"ill/P{number}_00.jpg").read_bytes()
        (patients / f"ill/P{number + 1}_01.jpg").write_bytes(content)
    load(patients, "--group", "^(P[0-9]+)")
    assert capsys.readouterr().err.startswith("--group: 6 families of 64 images; 4 do not match")


@pytest.mark.parametrize("flags", [[], ["--folds", "3"]])
@pytest.mark.parametrize("flag", ["--source", "--val"])
def test_images_of_a_folder_to_judge_by_are_left_out_where_their_family_is_learnt(
    flag, flags, patients, tmp_path, capsys
):
    """P0 to P3 are in both folders, P7 in the other alone; x0 is of no family, here and there."""
    other, own = tmp_path / "other", tmp_path / "own"
    for path in sorted(patients.rglob("*.jpg")):
        number = int(path.name[1])
        home = other if number == 7 or (number < 4 and path.stem[-1] == "3") else own
        name = {"P6_00": "x0", "P7_00": "x0"}.get(path.stem, path.stem)
        (home / path.parent.name).mkdir(parents=True, exist_ok=True)
        (home / path.parent.name / f"{name}.jpg").write_bytes(path.read_bytes())
    data = load(own, flag, str(other), "--group", "^(P[0-9])", *flags)
    families = [Path(name).name[:2] for name in data.names]
    learnt = {families[at] for at in (data.judged() if flags else data.learns(0))}
    judged = data.judges(training.TEST if flags else 0)
    tested = {families[at] for at in judged if data.parts[at] != "train"}
    if flags or flag == "--val":
        assert tested == {"P7", *(["x0"] if flag == "--val" else [])} and data.related == 8
    assert not (tested & learnt) - {"x0"} and "P7" in tested
    assert f"{data.related} images are copies of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pattern", "noted"),
    [
        ("P{family:03}_{at:02}.jpg", True),
        ("scan {family}-{at}.jpg", True),
        ("img_{number:03}.jpg", False),
        ("Tr-gl_{number:04}.jpg", False),
        ("{number}.jpg", False),
        ("P{number:03}_0.jpg", False),
    ],
)
def test_names_that_look_like_families_are_noted_with_what_keeps_them_together(
    pattern, noted, make_folder, capsys
):
    root = make_folder({"ape": 20, "bee": 20, "cat": 4})
    for name in ("ape", "bee"):
        for number, path in enumerate(sorted((root / name).iterdir())):
            fields = {"family": number // 4, "at": number % 4, "number": number}
            path.rename(root / name / pattern.format(**fields))
    load(root)
    said = capsys.readouterr().err
    assert said.startswith("note: file names differ in a last number alone") is noted
    if noted:
        group = shlex.split(said.strip().splitlines()[-1].partition("keep them together: ")[2])
        load(root, *group)
        assert capsys.readouterr().err == "--group: 6 families of 44 images\n"


@pytest.fixture
def left_out(make_folder: Maker) -> tuple[Path, Path]:
    """SRC with 2 x 20 images, and OUT with 10 of the first class and 5 of the second."""
    source = make_folder({"ape": 20, "bee": 20})
    out = source.parent / "out"
    for name, kept in (("ape", 10), ("bee", 5)):
        (out / name).mkdir(parents=True)
        for path in sorted((source / name).iterdir())[:kept]:
            (out / name / path.name).write_bytes(path.read_bytes())
    return source, out


def test_source_validates_on_what_out_left_out_and_leaves_the_split_alone(left_out):
    source, out = left_out
    (source / "ape/._ape_000.jpg").write_bytes(b"what macOS writes beside a file")
    (source / ".cache").mkdir()
    (source / "ape/ape_000.jpg").write_bytes(b"another image than in OUT, which is not read")
    alone, data = load(out), load(out, "--source", str(source))
    assert data.parts.count("source") == 25 and not data.unreadable
    assert names_of(data, data.learns(0)) == names_of(alone, alone.learns(0))
    assert names_of(data, data.judges(0))[:-25] == names_of(alone, alone.judges(0))
    below = {path.relative_to(source).as_posix() for path in source.rglob("[ab]*.jpg")}
    assert set(data.names) == below and len(data.names) == 40
    for index in data.judges(0)[-25:].tolist():
        assert data.paths[index] == str(source / data.names[index])
        assert data.names[index].startswith(data.classes[data.labels[index]] + "/")
    folds = load(out, "--source", str(source), "--folds", "3")
    tested = folds.judges(training.TEST)
    assert {folds.parts[at] for at in tested} == {"source"} and len(tested) == 25
    assert sorted(folds.judged().tolist()) == list(range(15))


@pytest.mark.parametrize("folds", [1, 3])
def test_a_folder_to_validate_on_leaves_all_of_the_other_for_training(folds, make_folder, capsys):
    """It holds two of three classes, copies of two training images, and a name of one."""
    train = make_folder({"ape": 10, "bee": 10, "cat": 10})
    val = make_folder({"ape": 14, "bee": 14}, "val")
    for name in ("ape", "bee"):
        for path in sorted((val / name).iterdir())[1:10]:
            path.unlink()
        (val / name / f"{name}_000.jpg").rename(val / name / "copy.jpg")
    (val / "ape/ape_010.jpg").rename(val / "ape/ape_000.jpg")
    data = load(train, "--val", str(val), *(["--folds", "3"] if folds > 1 else []))
    assert data.train_counts().tolist() == [10, 10, 10]
    judged = data.judges(training.TEST if folds > 1 else 0)
    assert data.counts(judged).tolist() == [4, 4, 0]
    assert data.parts == ["train"] * 30 + ["val"] * 8 and data.related == 2
    assert all(Path(data.paths[index]).is_relative_to(val) for index in judged)
    [warning] = [line for line in capsys.readouterr().err.splitlines() if "copies of" in line]
    assert warning.startswith("warning: 2 images") and str(val / "ape/copy.jpg") in warning


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_split_from_a_file_is_kept_to_and_what_it_does_not_name_is_counted(
    encoding, make_folder, capsys
):
    sides = ("train", "val", "train", "val", "train")
    parts = {f"{x}/{x}_{at:03}.jpg": part for x in ("ape", "bee") for at, part in enumerate(sides)}
    folder = make_folder({"ape": 6, "bee": 6})
    file = write_parts(folder.parent / "parts.csv", parts, encoding)
    for seed in ("0", "1"):
        data = load(folder, "--split", str(file), "--seed", seed)
        assert names_of(data, data.learns(0)) == [name for name in parts if parts[name] == "train"]
        assert names_of(data, data.judges(0)) == [name for name in parts if parts[name] == "val"]
        assert data.classes == ["ape", "bee"] and data.labels.tolist() == [0] * 5 + [1] * 5
        said = f"warning: {file}: 2 images are not named there; left out"
        assert said in capsys.readouterr().err.splitlines()


def test_a_split_from_a_file_takes_from_the_source_what_it_names_and_nothing_else(left_out, capsys):
    source, out = left_out
    parts = {"ape/ape_000.jpg": "train", "ape/ape_001.jpg": "val", "bee/bee_000.jpg": "train"}
    added = {"bee/bee_019.jpg": "source", "ape/ape_010.jpg": "source"}
    file = write_parts(out.parent / "parts.csv", parts | added)
    data = load(out, "--split", str(file), "--source", str(source))
    assert data.parts == ["train", "val", "train", "source", "source"]
    judges = ["ape/ape_001.jpg", "ape/ape_010.jpg", "bee/bee_019.jpg"]
    assert names_of(data, data.judges(0)) == judges
    assert [Path(path).parents[1] for path in data.paths] == [out] * 3 + [source] * 2
    assert f"{file}: 35 images are not named there" in capsys.readouterr().err
    for name, part in (("ape/ape_001.jpg", "source"), ("ape/ape_019.jpg", "val")):
        write_parts(file, {**parts, name: part})
        with pytest.raises(training.DataError, match=f"parts.csv: {name}: not .*; such rows: 1"):
            load(out, "--split", str(file), "--source", str(source))


# ----------------------------------------------------------------- folders that are refused

LAYOUTS = {  # folders of images, and what is said of them, if they are no classes
    "cat dog": "",
    "cat cat/2019 dog/2019 dog/2020": "",
    "bus/left bus/right car/left car/right train/left train/right": "",
    "strain_a/1 strain_b/1 strain_b/2": "",
    "train/left car/left bus/right": "",
    "train test car": "",  # toys
    "train test": "",
    "train train/old test/old": "",
    "steam_train/a fast_train/a": "",
    "trainer/a tester/a": "",
    "test/a val/a": "",
    "fold1 fold2": "",
    "fold1/a fold2/a cat/a": "",
    "train/cat train/dog test/cat test/dog": "train --val test",
    "test/cat train/cat valid/dog val/dog": "train --val val",
    "Training/cat Training/dog Testing/cat Testing/dog": "Training --val Testing",
    "seg_train/cat seg_train/dog seg_test/cat": "seg_train --val seg_test",
    "train/cat train/dog valid/cat valid/dog other": "train --val valid",
    "train2017/cat train2017/dog validation": "train2017",  # without labels
    "extra/cat train/cat train/dog test": "train",
    "Fold1/cat Fold1/dog Fold2/cat": "Fold1 --val Fold2",
    "part_a/cat part_b/cat split3/dog": "part_a --val part_b",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_of_a_data_set_are_told_from_classes_by_both_scripts(layout, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    train, *val = [data / name for name in LAYOUTS[layout].split(" --val ")]
    for folder in layout.split():
        (data / folder).mkdir(parents=True, exist_ok=True)
        (data / folder / "x.jpg").write_bytes(b"")
        (data / folder / "y.jpg").write_bytes(b"")
    (data / "readme.txt").write_text("not a part")
    if not LAYOUTS[layout]:
        assert creation.main([str(data), str(out), "--step", "0"]) == 0
        training.list_images(data)
        return
    [error] = refused([data, out], capsys, tmp_path, script=creation)
    assert "look like parts" in error and f"run data_creation.py {train} OUT" in error
    [error] = refused([data, "--output", tmp_path / "run", *SMALL], capsys, tmp_path)
    assert f"{data}: " in error and "parts of a data set, not classes" in error
    assert error.endswith(f"; run data_training.py {train}" + "".join(f" --val {x}" for x in val))


GOOD = "path,part ape/ape_000.jpg,train ape/ape_001.jpg,val bee/bee_000.jpg,train"
UNKNOWN = " ape/none.jpg,train good/ape/ape_002.jpg,val ./bee/bee_001.jpg,val"
SPLITS = [  # the rows of a table, and what is said of it
    ("", "no rows with these columns; needed is a CSV file of path, part"),
    (GOOD.replace("part", "fold"), "no rows with these columns"),
    (GOOD.replace(",", ";"), "no rows with these columns"),
    (GOOD + ' "' + 200_000 * "x", "field larger than field limit"),
    (GOOD.replace("val", "Val") + " ape/ape_002.jpg,test",
        "ape/ape_001.jpg: no part 'Val'; write train, val or source; such rows: 2"),
    (GOOD + " ape/ape_002.jpg", "ape/ape_002.jpg: no part None"),
    (GOOD + UNKNOWN, "ape/none.jpg: not in DATA; write class/file as there; such rows: 3"),
    ("path,part ape\\ape_000.jpg,train", "ape\\ape_000.jpg: not in DATA;"),
    (GOOD + " ape/ape_002.jpg,source", "ape_002.jpg: not among what --source SRC adds to DATA;"),
    (GOOD + " ape/ape_000.jpg,train", "ape_000.jpg: named before; leave one row of it; such rows"),
    (GOOD.replace("bee_000.jpg,train", "bee_000.jpg,val"),
        "bee: all images of this class validate; leave some of them to train on; such classes: 1"),
    (GOOD.replace("val", "train"), "names no image to validate on, as part val"),
]  # fmt: skip
ERRORS = {
    "one": "one: fewer than two classes",
    "hollow": "hollow/bee: no image in it, of .jpg, .jpeg, ",
    "veiled": "veiled: fewer than two classes",  # a hidden folder is none
    "broken": "broken: bee: no image of this class to train on that can be read",
    "single": "single: no image differs from those trained on; nothing to validate on",
    "good --source more": "/more: not classes of DATA: cat, dog; rename or remove",
    "good --val more": "/more: not classes of DATA: cat, dog; rename or remove",
    "good --val good": "good: no image differs from those trained on; nothing to validate on",
    "good --split none.csv": "none.csv: No such file or directory; needed is a CSV file of path",
    "good --group jpg": "--group jpg: makes all images one family; name what differs",
    "good --group (?=x)*": "makes all images one family",
    "more --folds 5": "--folds 5: class dog has 1 different images; add images, or drop it",
    "four --folds 5": "--folds 5: class bee has 4 different images; the largest that fits is 4",
    "four --folds 4 --group (bee)_00[01]": "class bee has 3 families; the largest that fits is 3",
    "four --folds 3 --split split.csv": "split.csv names validation images, which folds choose",
}
ERRORS |= {f"good --split {number}.csv": said for number, (_, said) in enumerate(SPLITS)}


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders and tables that something is wrong with; nothing is ever written there."""
    root = tmp_path_factory.mktemp("bad")
    folders = {"good": {"ape": 3, "bee": 3}, "more": {"ape": 3, "bee": 3, "cat": 3, "dog": 1}}
    folders |= {"four": {"ape": 9, "bee": 4}, "one": {"ape": 3}, "single": {"ape": 1, "bee": 1}}
    folders |= {name: {"ape": 3, "bee": at} for at, name in enumerate(("hollow", "broken"))}
    for name, counts in (folders | {"veiled": {"ape": 3, ".bee": 3}}).items():
        write_folder(root / name, counts)
    (root / "broken/bee/bee_000.jpg").write_text("broken")
    (root / "split.csv").write_text(f"{GOOD} bee/bee_001.jpg,val".replace(" ", "\n"))
    for number, (rows, _) in enumerate(SPLITS):
        (root / f"{number}.csv").write_text(rows.replace(" ", "\n"))
    return root


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_trained_on_gets_one_line_and_status_2(case, bad, monkeypatch, capsys):
    monkeypatch.chdir(bad)
    assert ERRORS[case] in refused([*case.split(), "--output", "run", *SMALL], capsys, bad)[-1]


# -------------------------------------------------------------------------- reading images

QUARTERS = np.zeros((40, 60, 3), np.uint8)
QUARTERS[:20, :30], QUARTERS[:20, 30:], QUARTERS[20:, :30] = (200, 40, 40), (40, 200, 40), 90
GREY = np.array(Image.fromarray(QUARTERS).convert("L"))
UPRIGHT = torch.from_numpy(QUARTERS).permute(2, 0, 1)


def read(path: Path, least: int = 0) -> torch.Tensor:
    return training.read_image(str(path), {}, least)


def corners(image: torch.Tensor) -> np.ndarray:
    """The colours a little inside the four corners, clockwise from the upper left."""
    height, width = image.shape[1:]
    places = [(6, 6), (6, width - 7), (height - 7, width - 7), (height - 7, 6)]
    return np.array([image[:, y, x].tolist() for y, x in places])


def test_every_mode_and_format_comes_out_as_rgb(tmp_path):
    picture, grey = Image.fromarray(QUARTERS), Image.fromarray(GREY)
    wide = GREY.astype(np.uint16) * 257
    sixteen = Image.fromarray(wide)
    images = {
        **{"rgb.jpg": picture, "rgb.png": picture, "rgb.webp": picture, "rgb.bmp": picture},
        **{"rgb.tif": picture, "rgb.ppm": picture, "cmyk.jpg": picture.convert("CMYK")},
        **{"rgba.png": picture.convert("RGBA"), "palette.png": picture.quantize(8)},
        **{"grey.jpg": grey, "grey.png": grey, "grey_alpha.png": grey.convert("LA")},
        **{"grey16.png": sixteen, "grey16.tif": sixteen},
    }
    for name, image in images.items():
        fine = {"quality": 100} if name.endswith(("jpg", "webp")) else {}
        image.save(tmp_path / name, **fine)
    picture.save(tmp_path / "a_png.jpg", "PNG")
    content = b"P5 60 40 65535\n" + wide.astype(">u2").tobytes()
    (tmp_path / "grey16.pgm").write_bytes(content)
    for path in tmp_path.iterdir():
        image = training.read_image(str(path), {"I": 65535})
        assert image.dtype == torch.uint8 and image.shape == (3, 40, 60), path
        wanted = torch.from_numpy(GREY).expand(3, -1, -1) if "grey" in path.name else UPRIGHT
        difference = np.abs(corners(image) - corners(wanted)).max()
        assert difference <= (12 if "cmyk" in path.name else 4), path


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "16.png"])
@pytest.mark.parametrize(
    ("orientation", "undo"),
    [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90), (2, 0)],
)
def test_images_come_out_upright(tmp_path, suffix, orientation, undo):
    exif = Image.Exif()
    exif[274] = orientation
    deep, path = suffix == "16.png", tmp_path / f"x.{suffix}"
    picture = Image.fromarray(GREY.astype(np.uint16) * 257 if deep else QUARTERS)
    stored = picture.transpose(undo)  # turned back by the orientation
    stored.save(path, exif=exif, **({"quality": 95} if "tif" not in suffix else {}))
    wanted = torch.from_numpy(GREY).expand(3, -1, -1) if deep else UPRIGHT
    image = training.read_image(str(path), {"I": 65535})
    assert image.shape == wanted.shape
    assert np.abs(corners(image) - corners(wanted)).max() < 25


@pytest.mark.parametrize("kind", ["RGBA.png", "LA.png", "P.png", "RGBA.webp", "RGBA.tif", "P.gif"])
def test_what_is_transparent_shows_white_not_the_colour_below(tmp_path, kind):
    mode, path = kind.partition(".")[0], tmp_path / f"x.{kind}"
    picture = Image.new("LA", (24, 24), (0, 0))  # black, and nowhere to be seen
    picture.paste((100, 255), (0, 0, 12, 24))
    if mode == "P":
        picture = Image.new("P", (24, 24), 1)
        picture.putpalette([100] * 3 + [0] * 3)
        picture.paste(0, (0, 0, 12, 24))
    options = {"P": {"transparency": 1}, "RGBA": {"lossless": True}}.get(mode, {})
    (picture if mode == "P" else picture.convert(mode)).save(path, **options)
    image = read(path)
    assert image.shape == (3, 24, 24)
    assert (image[..., :12] == 100).all() and (image[..., 12:] == 255).all()


def write_photograph(path: Path, width: int, height: int, **options: object) -> Path:
    stream = np.random.default_rng(0).integers(256, size=(12, 16, 3), dtype=np.uint8)
    Image.fromarray(stream).resize((width, height), Image.Resampling.BICUBIC).save(path, **options)
    return path


@pytest.mark.parametrize("least", [848, 601, 600, 301, 149])
def test_a_large_jpeg_is_decoded_to_about_what_is_needed(tmp_path, least):
    """A half, a quarter or an eighth of 1,200 pixels, upright, where that is no less."""
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    path = write_photograph(tmp_path / "x.jpg", 1600, 1200, quality=95, exif=exif)
    image, whole = read(path, least), read(path)
    shrunk = v2.functional.resize(whole, [least])
    assert whole.shape == (3, 1600, 1200) and image.shape == shrunk.shape
    assert (image.float() - shrunk.float()).abs().mean() < 1
    assert torch.equal(image, shrunk) is (least > 600)
    assert torch.equal(read(path, 849), whole)  # not twice the pixels


def write_deep(path: Path, kind: str, values: list[float]) -> Path:
    """Columns of these values as grey, RGB or RGBA 16-bit PNG, as 32-bit or float TIFF."""
    columns = np.tile(np.array(values).repeat(8), (32, 1))
    if kind in ("rgb16", "rgba16"):
        pixels = columns[..., None].repeat(len(kind) - 2, 2)
        pixels[..., 3:] = 65535  # opaque
        rows = [b"\0" + row.astype(">u2").tobytes() for row in pixels]
        content = png(32, 32, 16, b"".join(rows), 6 if kind == "rgba16" else 2)
        path.with_suffix(".png").write_bytes(content)
    elif kind == "grey16":
        Image.fromarray(columns.astype(np.uint16)).save(path.with_suffix(".png"))
    else:
        dtype = np.int32 if kind == "grey32" else np.float32
        Image.fromarray(columns.astype(dtype)).save(path.with_suffix(".tif"))
    return path.with_suffix(".png" if "16" in kind else ".tif")


def test_a_tiff_of_16_bit_colours_is_left_out_with_the_reason(make_folder, capsys):
    """Of which Pillow reads the upper half alone: 12 bits would be black."""
    root = make_folder({"ape": 5, "bee": 5})
    tags = [(256, 4), (257, 4), (258, 122), (259, 1), (262, 2), (273, 128), (277, 3), (278, 4)]
    tags.append((279, 96))
    rows = [struct.pack("<HHII", tag, 3, 3 if tag == 258 else 1, x) for tag, x in tags]
    content = struct.pack("<2sHIH", b"II", 42, 8, 9) + b"".join(rows) + struct.pack("<I", 0)
    content += struct.pack("<HHH", 16, 16, 16) + struct.pack("<48H", *[4000] * 48)
    (root / "ape/deep.tif").write_bytes(content)
    assert Image.open(root / "ape/deep.tif").convert("RGB").getextrema()[0] == (15, 15)
    assert load(root).unreadable == [str(root / "ape/deep.tif")]
    one, two = capsys.readouterr().err.splitlines()
    assert one.endswith("deep.tif: a TIFF with colours of over 8 bits; left out")
    assert two.startswith("warning: 1 TIFFs have colours of over 8 bits, which Pillow cannot read.")
    compile(two.partition('python -c "')[2].removesuffix('"'), "", "exec")


def test_of_a_tiff_with_several_pages_the_first_is_read_and_said_so(make_folder, capsys):
    root = make_folder({"ape": 5, "bee": 5})
    pages = [Image.new("L", (32, 32), shade) for shade in (50, 100, 150)]
    for number, path in enumerate((root / "ape/a.tif", root / "bee/b.tif", root / "bee/c.tif")):
        pages[number].save(path, save_all=True, append_images=pages[number + 1 :])
    load(root)
    said = "warning: 2 TIFFs have several pages, of which only the first is read"
    assert capsys.readouterr().err == f"{said}, {root}/ape/a.tif for one\n"
    assert (read(root / "ape/a.tif") == 50).all()


def test_images_far_darker_than_others_of_over_8_bits_are_counted(make_folder, capsys):
    """12 bits beside 16: as bright as a sixteenth."""
    root = make_folder({"ape": 5, "bee": 5})
    for name, peak in (("ape/x", 65535), ("ape/y", 8192), ("bee/x", 4095), ("bee/y", 4000)):
        write_deep(root / name, "grey16", [0, 1, 2, peak])
    write_deep(root / "bee/z", "float", [0, 0, 0, 0.01])
    assert load(root).white == {"I": 65535, "F": 1}
    said = f"warning: 2 of 4 images of more than 8 bits are nearly black: {root}/bee/x.png has no "
    said += "value above 4095, where 65535 is white for all; "
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(said)


DEEP = [  # kind, columns of the brightest image, white, what is seen of them
    ("grey16", [0, 100, 200, 255], 255, [0, 100, 200, 255]),
    ("grey16", [0, 100, 256, 512], 1023, [0, 25, 64, 128]),
    ("grey16", [0, 257, 32896, 65535], 65535, [0, 1, 128, 255]),
    ("grey16", [0, 4096, 8192, 16383], 16383, [0, 64, 128, 255]),
    ("rgb16", [0, 1024, 2048, 4095], 4095, [0, 64, 128, 255]),
    ("rgb16", [0, 257, 32896, 65535], 65535, [0, 1, 128, 255]),
    ("rgba16", [0, 1024, 2048, 4095], 4095, [0, 64, 128, 255]),
    ("grey32", [0, 50000, 100000, 200000], 200000, [0, 64, 128, 255]),
    ("float", [0, 0.25, 0.5, 1], 1, [0, 64, 128, 255]),
    ("float", [0, 1.5, 100, 200], 255, [0, 2, 100, 200]),
    ("float", [0, 1000, 2000, 4000], 4095, [0, 62, 125, 249]),
    ("float", [0, 0, 0, 0], 1, [0, 0, 0, 0]),
]


@pytest.mark.parametrize(("kind", "values", "white", "seen"), DEEP)
def test_all_images_of_a_kind_have_the_same_white(kind, values, white, seen, make_folder):
    """A dark image among bright ones stays dark; images of 8 bits are not touched."""
    root = make_folder({"ape": 2, "bee": 2})
    deep = write_deep(root / "ape/deep", kind, values)
    dark = write_deep(root / "bee/dark", kind, [value / 4 for value in values])
    plain = read(root / "ape/ape_000.jpg")
    data = load(root)
    assert data.white == {"F" if kind == "float" else "I": white}
    for path, factor in ((deep, 1), (dark, 0.25)):
        image = training.read_image(str(path), data.white)
        assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
        assert (image == image[:1, :1]).all()
        expected = pytest.approx([each * factor for each in seen], abs=0.76)
        assert image[0, 0, ::8].tolist() == expected
    assert torch.equal(training.read_image(str(root / "ape/ape_000.jpg"), data.white), plain)


@pytest.mark.parametrize(
    ("kind", "values", "white", "seen"),
    [
        ("grey16", [0, 2048, 8000, 65535], {"I": 4095}, [0, 128, 255, 255]),
        ("grey32", [0, 2048, 4096, 2**31 - 1], {"I": 4095}, [0, 128, 255, 255]),
        ("float", [0, 0.5, 1.01, 3.4e38], {"F": 1}, [0, 128, 255, 255]),
    ],
)
def test_what_is_brighter_than_white_is_white(kind, values, white, seen, tmp_path, recwarn):
    path = write_deep(tmp_path / "photo", kind, values)
    image = training.read_image(str(path), white)
    assert image[0, 0, ::8].tolist() == seen
    assert not recwarn.list


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, -math.inf])
def test_values_that_are_no_brightness_are_refused_in_one_line(value, make_folder, capsys):
    root = make_folder({"ape": 3, "bee": 3})
    path = write_deep(root / "ape/x", "float", [0, value, 0.5, 1])
    [error] = refused([root, "--output", root.parent / "run", *SMALL], capsys, root.parent)
    cure = "shift them, or remove the image"
    assert error.endswith(f"error: {path}: values below 0 or not finite; {cure}")


# ----------------------------------------------------------------------------- views of images


def views(size: int, *arguments: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """How images are seen in training and in evaluation."""
    args = training.parse_args(["x", "--image-size", str(size), *arguments])
    return training.transforms(args)


FLIPS = {"--flip none": 1, "": 2, "--flip sides": 2, "--flip all": 8}


@pytest.mark.parametrize("flags", FLIPS)
def test_images_are_mirrored_and_turned_as_told(flags):
    torch.manual_seed(0)
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, :16], image[:, :, :16] = 40, image[:, :, :16] + 100
    image[:, :16, :16] = 200
    view, sides = views(32, *flags.split(), "--crop-scale", "1")[0], FLIPS[flags]
    seen = Counter(tuple(view(image)[0, ::31, ::31].flatten().tolist()) for _ in range(160))
    assert len(seen) == sides and min(seen.values()) > 100 / sides - 8
    mirrored = {tuple(image.flip(-1)[0, ::31, ::31].flatten().tolist())} & seen.keys()
    assert bool(mirrored) is (sides > 1) and tuple(image[0, ::31, ::31].flatten().tolist()) in seen


@pytest.mark.parametrize("scale", [0.1, 0.8])
def test_a_crop_shows_at_least_the_part_asked_for(scale):
    image = torch.arange(100.0).expand(3, 100, 100).byte()  # each column has its own shade
    view = views(32, "--flip", "none", "--crop-scale", str(scale))[0]
    widths = [(crop := view(image))[0, 0, -1].item() - crop[0, 0, 0].item() for _ in range(200)]
    narrowest = 100 * (scale * 3 / 4) ** 0.5  # of a crop that is 3 wide and 4 high
    assert narrowest - 6 < min(widths) < narrowest + 12


@pytest.mark.parametrize("scale", ["0.08", "0.5", "1"])
def test_no_crop_of_what_is_decoded_is_enlarged(scale):
    args = training.parse_args(["x", "--image-size", "32", "--crop-scale", scale])
    least = training.least_side(args)
    assert least >= training.eval_size(32)
    crop = v2.RandomResizedCrop(32, (args.crop_scale, 1.0))
    image = torch.zeros(3, least, least, dtype=torch.uint8)
    parts = [crop.make_params([image]) for _ in range(500)]
    assert min(min(part["height"], part["width"]) for part in parts) >= 31  # they are rounded


def test_evaluation_is_larger_by_up_to_a_seventh_in_whole_cells_of_32_pixels():
    sizes = {32: 32, 56: 64, 64: 64, 112: 128, 128: 128, 160: 160, 224: 256, 288: 320}
    assert {size: training.eval_size(size) for size in sizes} == sizes
    image = torch.zeros(3, 300, 600, dtype=torch.uint8)
    image[:, :, 150:450] = 255  # the central square
    seen = views(224)[1](image)
    assert seen.shape == (3, 256, 256) and (seen == 255).float().mean() > 0.99


def given_of(folder: Path) -> training.Given:
    """A run before its first epoch; its folder is beside the images."""
    output = training.unused(folder.parent / "read")
    small = ["--weights", "none", "--image-size", "24", "--epochs", "1", "--output", str(output)]
    return prepare(folder, *small)[0]


def test_the_same_index_and_seed_give_the_same_pixels_in_any_process(folder):
    given, loaded = given_of(folder), []
    train = given.data.learns(0)[torch.randperm(45)][:22]
    drawn = training.cut_batches(train.repeat(2), 8, training.seeded("augment", 0, 1))
    for workers in (0, 1, 2):
        settings = dataclasses.replace(given.settings, workers=workers)
        reader = training.Reader(dataclasses.replace(given, settings=settings))
        torch.manual_seed(workers)
        loaded.append([*reader.read(drawn, ""), *reader.read(training.cut_batches(train, 5), "")])
    assert [len(labels) for _, labels in loaded[0]] == [8, 8, 7, 7, 7, 7, 5, 5, 4, 4, 4]
    labels = torch.cat([labels for _, labels in loaded[0]])
    assert torch.equal(labels, given.data.labels[train.repeat(3)])
    for (pixels, labels), *others in zip(*loaded, strict=True):
        assert pixels.dtype == torch.uint8 and pixels.shape[1:] == (24, 24, 3)
        for same, again in others:
            assert torch.equal(pixels, same) and torch.equal(labels, again)
    images, at = reader.loader.dataset, int(train[0])
    assert torch.equal(images[at, 77][0], images[at, 77][0])
    assert not torch.equal(images[at, 77][0], images[at, 78][0])
