"""What `data_training.py` reads: folders, splits, families, folds, pixels and views of them."""

import hashlib
import os
import re
import shutil
import struct
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    CPU,
    TINY,
    Run,
    images,
    load,
    network_of,
    open_run,
    refused,
    rows_of,
    run,
    write_folder,
)
from PIL import Image, ImageOps
from torchvision.transforms import v2

import data_creation as creation
import data_training as training

PREPARE = training.Preparation(32, 255)
WHOLE = 10**6  # pixels a side: no image is so large that it would be shrunk


def sides_of(data: training.Data) -> list[tuple[list[str], list[str]]]:
    """The names of the images that each fold learns, and of those that it is evaluated on."""
    sides = []
    for masks in zip(data.train_mask, data.eval_mask, strict=False):
        pair = (mask.nonzero().flatten().tolist() for mask in masks)
        sides.append(tuple([data.files[at].name for at in part] for part in pair))
    return sides


def assign(
    labels: list[int], families: str = "", seed: int = 0, folds: int = 1
) -> tuple[list[list[int]], list[int]]:
    """Images of each class that each network is evaluated on, and the network of each, or -1."""
    data = images(labels, [None] * len(labels))
    kin = torch.tensor([*map(ord, families)]) if families else data.families
    settings = SimpleNamespace(folds=folds, val=None, seed=seed)
    learns, held = training.assign_images(settings, data.files, kin)
    assert torch.equal(held[:-1], ~learns) and not held[-1].any() and held.sum(0).max() == 1
    counts = [data.labels[mask].bincount(minlength=max(labels) + 1).tolist() for mask in held[:-1]]
    return counts, [[*each, True].index(True) if any(each) else -1 for each in held.T.tolist()]


@pytest.mark.parametrize(
    ("labels", "families", "fraction", "held", "counts"),
    [
        ([0] * 10 + [1] * 5 + [2] * 100, "", 0.2, "", [2, 1, 20]),
        # Each class keeps an image to train on.
        ([0, 1, 1, 2, 2, 2, 3, 3, 3, 3], "", 0.99, "", [0, 1, 2, 3]),
        # 2 of 10 are wanted: the families of 4 and of 3 are too large, the one of 2 fits.
        ([0] * 10, "aaaabbbccd", 0.2, "c", [2]),
        ([0] * 6, "aaabbb", 0.2, "ab", [3]),  # two families: one on each side, whatever their size
        ([0, 0, 0, 1, 1], "aaabc", 0.5, "bc", [0, 1]),  # one family of a class: to train on
        ([0, 0, 0, 1, 1, 1], "xabxcd", 0.6, "xabcd", [2, 2]),  # one of both classes
    ],
)
def test_families_go_where_they_bring_the_counts_closest(
    labels, families, fraction, held, counts, monkeypatch
):
    monkeypatch.setattr(training, "VAL_FRACTION", fraction)
    for seed in range(10):
        found, parts = assign(labels, families, seed)
        assert found == [counts]
        sides = set(zip(families, parts, strict=False))
        assert len(sides) == len(set(families))  # none is on both
        assert {family for family, part in sides if part == 0} <= set(held)


def test_each_fold_gets_its_share_of_a_class_and_all_have_one_if_there_are_enough():
    for labels, families, counts in (
        ([0] * 9 + [1] * 3, "", [[3, 3, 3], [1, 1, 1]]),
        ([0] * 8 + [1] * 2, "", [[2, 3, 3], [0, 1, 1]]),
        ([0] * 6 + [1] * 3, "aaaabcxyz", [[1, 1, 4], [1, 1, 1]]),
        ([0, 1] * 6, "aabbccddeeff", [[2, 2, 2], [2, 2, 2]]),  # families of both classes
    ):
        for seed in range(10):
            found, _ = assign(labels, families, seed, folds=3)
            assert [*map(sorted, zip(*found, strict=True))] == counts


def test_a_split_hangs_on_seed_and_names_of_a_class_alone(folder, make_folder):
    [(_, held)] = sides_of(load(folder))
    assert Counter(name[:3] for name in held) == {"ape": 6, "bee": 4, "cat": 2}
    other = make_folder({"ape": 30, "bee": 18, "cat": 9}, "elsewhere")
    (other / "bee/new.jpg").write_bytes((other / "ape/ape_000.jpg").read_bytes() + b"x")
    [(_, moved)] = sides_of(load(other))
    assert {name[:3] for name in {*held} ^ {*moved}} <= {"bee"}
    assert sides_of(load(folder, "--seed", "1"))[0][1] != held


def test_what_is_hidden_or_no_image_is_left_out_and_links_are_followed(make_folder, capsys):
    """Small copies that a program keeps of images would be learnt while these validate."""
    root, others = make_folder({"ape": 5, "bee": 5}), make_folder({"sub": 3}, "others")
    names = {file.name for file in load(root).files}
    for name in ("ape/x.GIF", "bee/deep.jpg/y.jfif", "bee/notes", "top.jpg", "ape/._x.jpg"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"")
    for folder in (root / "ape/.thumbs", root / ".cache"):
        shutil.copytree(root / "bee", folder)
    (root / "bee/far").symlink_to(others)
    linked = {f"bee/far/sub/sub_00{n}.jpg" for n in range(3)}
    assert {file.name for file in load(root).files} == names | linked
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith(
        f"warning: {root}: 4 files are no images or in no class folder, and are "
    )
    assert said.endswith(" left out; the first is ape/x.GIF")


def test_every_file_is_found_once_and_folders_that_were_looked_into_are_told(make_folder):
    root = make_folder({"ape": 1, "bee": 1})
    (root / "ape/notes.txt").write_text("")
    (root / ".cache").mkdir()
    (root / ".cache/x.jpg").write_text("")
    seen: set[tuple[int, int]] = set()
    found = sorted(creation.walk_files(str(root), (), seen))
    names = {".cache": False, "ape/ape_000.jpg": True, "ape/notes.txt": False}
    names["bee/bee_000.jpg"] = True
    assert found == [(str(root / name), is_image) for name, is_image in names.items()]
    assert seen == {creation.identity(folder) for folder in (root, root / "ape", root / "bee")}


def test_a_link_that_leads_back_up_is_named(make_folder):
    root = make_folder({"ape": 2, "bee": 2})
    others = make_folder({"sub": 1}, "others")
    (root / "bee/far").symlink_to(others)
    (others / "sub/up").symlink_to(root)
    text = f"{root}/bee/far/sub/up: this link leads back to a folder above it; remove it"
    with pytest.raises(training.DataError, match=re.escape(text)):
        load(root)


def test_names_are_the_same_on_a_system_that_writes_paths_otherwise(monkeypatch):
    names = {"ape\\deep\\x.jpg": True, "y.png": True, "ape\\notes.txt": False, "owl\\z.tif": True}
    found = [(f"C\\{name}", is_image) for name, is_image in names.items()]
    with monkeypatch.context() as other:
        other.setattr(training, "walk_files", lambda _: found)
        other.setattr(os, "sep", "\\")
        files, left_out = training.list_images(Path("C"), ["ape"], "train")
    labels = [("ape/deep/x.jpg", 0), ("y.png", -1), ("owl/z.tif", -1)]
    assert [(file.name, file.label) for file in files] == labels
    assert left_out == ["ape/notes.txt"]


def test_an_image_that_two_classes_have_is_told(make_folder, capsys):
    root = make_folder({"ape": 6, "bee": 6})
    for at in range(2):
        shutil.copy(root / f"ape/ape_00{at}.jpg", root / f"bee/a{at}.jpg")
    pairs = training.list_contradictions(load(root))
    assert pairs == [(f"ape/ape_00{x}.jpg", f"bee/a{x}.jpg") for x in "01"]
    text = "2 images are copies of an image in another class, the first are ape/ape_000.jpg and "
    assert capsys.readouterr().err == f"warning: {text}bee/a0.jpg; all are used\n"


@pytest.mark.parametrize(
    ("names", "contents", "group", "families"),
    [
        ("a/P1x a/P2x b/P1y b/Q", [1, 2, 3, 4], "^(P.)", [0, 1, 0, 2]),
        ("a/P1x a/P2x b/P1y b/Q", [1, 2, 2, 4], "^(P.)", [0, 0, 0, 1]),  # a copy binds P1 and P2
        ("a/P1/x a/P1/y b/P2/x b/R", [1, 2, 3, 4], "P[0-9]", [0, 0, 1, 2]),  # no group: the match
        ("P1/x P1/y P1/x", [1, 2, 1], "P", [0, 1, 0]),  # the class is not searched
        ("a/P1x a/P1y b/P1x", [1, 2, 1], None, [0, 1, 0]),
    ],
)
def test_copies_and_what_the_pattern_matches_are_families(names, contents, group, families):
    files = [training.ImageFile(f"/{name}", name, 0, "train") for name in names.split()]
    assert training.find_families(files, contents, group).tolist() == families


@pytest.mark.parametrize("flags", ["--val", "--source", "--folds 3 --val", "--folds 3 --source"])
def test_no_family_is_on_both_sides_and_images_of_other_folders_are_left_out_for_it(
    flags, make_folder, capsys
):
    """The other folder holds P4 to P7, an image of P1, and a copy of P0's."""
    patients = make_folder({"ill": 32, "well": 32})
    for path in sorted(patients.rglob("*.jpg")):  # P0 to P7 have four images of each class
        number = int(path.stem[-3:])
        path.rename(path.with_name(f"P{number // 4}_{number % 4:02}.jpg"))
    other = patients.parent / "other"
    for path in sorted([*patients.rglob("P[4567]_*.jpg"), *patients.rglob("ill/P1_03.jpg")]):
        (other / path.parent.name).mkdir(parents=True, exist_ok=True)
        path.rename(other / path.parent.name / path.name)
    shutil.copy(patients / "ill/P0_00.jpg", other / "ill/copy.jpg")
    data = load(patients, *flags.split(), other, "--group", "^(P[0-9])")
    elsewhere = {Path(x.path).name[:2] for x in data.files if Path(x.path).is_relative_to(other)}
    assert elsewhere >= {"P4", "P5", "P6", "P7"}
    masks = [*zip(data.eval_mask, [*data.train_mask, data.train_mask.any(0)], strict=True)]
    for evaluated, learnt in masks if "--folds" in flags else masks[:1]:
        assert not torch.isin(data.families[evaluated], data.families[learnt]).any()
        assert data.counts(evaluated).min() >= 4
    assert data.leaks == 2 if flags != "--source" else data.leaks <= 2
    said = f"warning: {data.leaks} validation images are copies of training images, or of their "
    said += f"group, and are left out; the first is {other}/"
    assert (said in capsys.readouterr().err) is (data.leaks > 0)


def test_source_validates_on_what_out_left_out_and_leaves_the_split_alone(make_folder):
    source = make_folder({"ape": 20, "bee": 20})
    out = source.parent / "out"
    for name, kept in (("ape", 10), ("bee", 5)):
        (out / name).mkdir(parents=True)
        for path in sorted((source / name).iterdir())[:kept]:
            shutil.copy(path, out / name)
    (source / "ape/ape_000.jpg").write_bytes(b"another image than in OUT, which is not read")
    [(learnt, held)], data = sides_of(load(out)), load(out, "--source", str(source))
    [(still_learnt, evaluated)] = sides_of(data)
    assert still_learnt == learnt and evaluated[:-25] == held and not data.unreadable
    left_out = [f"ape/ape_{n:03}.jpg" for n in range(10, 20)]
    assert evaluated[-25:] == left_out + [f"bee/bee_{n:03}.jpg" for n in range(5, 20)]


def digest(content: bytes) -> int:
    """The first 64 bits of the SHA-256, signed."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big", signed=True)


@pytest.fixture(scope="module")
def patients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images, four of each of Ada1, Bob2, Cyd3 and Dan4, half of them ill."""
    root = write_folder(tmp_path_factory.mktemp("patients") / "src", {"ill": 8, "well": 8})
    for path in sorted(root.rglob("*.jpg")):
        at = int(path.stem[-3:])
        name = ("Ada1", "Bob2", "Cyd3", "Dan4")[at % 4]
        path.rename(path.with_name(f"{name}_visit{at // 4}.jpg"))
    return root


@pytest.fixture(scope="module")
def patients_run(patients: Path) -> Run:
    """A run that keeps patients together: three learn, one validates."""
    flags = ["--weights", "none", "--group", "^([A-Z][a-z]+[0-9])_", "--epochs", 1, *TINY]
    return run(patients, *flags, "--output", patients.parent / "run")


def test_the_network_file_holds_what_was_learnt_as_digests_alone(patients, patients_run):
    """Of twelve images and of three patients; it names neither files nor patients."""
    split = rows_of(patients_run.path / "split.csv")
    learnt = [row["path"] for row in split if row["part"] == "train"]
    names = {Path(path).name[:4] for path in learnt}
    assert (len(learnt), len(names)) == (12, 3)
    digests = [digest((patients / path).read_bytes()) for path in learnt]
    digests += [digest(name.encode()) for name in names]
    assert network_of(patients_run.path)["trained_on"].tolist() == sorted(digests)
    content = (patients_run.path / "network.pt").read_bytes()
    assert b"ill" in content and b"^([A-Z][a-z]+[0-9])_" in content  # as it is not compressed
    for name in ("Ada1", "Bob2", "Cyd3", "Dan4", "visit", ".jpg", str(patients)):
        assert name.encode() not in content


def warnings_of_weights(capsys: pytest.CaptureFixture[str], *command: object) -> list[str]:
    """What is said of `--weights` when the images of a run are read."""
    opened = open_run(*command)
    capsys.readouterr()
    data = training.load_data(opened.settings, opened.listing)
    training.count_seen(opened.settings, data, opened.weights)
    return [line for line in capsys.readouterr().err.splitlines() if "--weights" in line]


def test_validation_images_that_the_weights_have_learnt_are_counted(default_run, animals, capsys):
    """Its network has learnt 31 of 38 images; a fifth validates, or with folds all do."""
    weights = default_run.path
    split = rows_of(weights / "split.csv")
    learnt = {row["path"] for row in split if row["part"] == "train"}
    assert len(learnt) == 31
    assert warnings_of_weights(capsys, animals, "--weights", weights) == []
    [(_, held)] = sides_of(load(animals, "--seed", 1))
    count = len(learnt.intersection(held))
    assert 0 < count < 7
    said = f"warning: --weights {weights}: this network was trained on"
    for flags, counts in ((["--seed", 1], f"{count} of 7"), (["--folds", 3], "31 of 38")):
        lines = warnings_of_weights(capsys, animals, "--weights", weights, *flags)
        told = f"{counts.replace('of', 'of the')} validation images, so that results are too good"
        assert lines == [f"{said} {told}"]


def test_new_images_of_patients_that_the_weights_have_learnt_are_counted_too(
    patients, patients_run, make_folder, capsys
):
    """Three new images of each of four patients, of which three are learnt, and of a new one."""
    learnt = [row for row in rows_of(patients_run.path / "split.csv") if row["part"] == "train"]
    names = {Path(row["path"]).name[:4] for row in learnt}
    assert len(names) == 3
    new = make_folder({"ill": 15, "well": 15}, size=48)
    for path in new.rglob("*.jpg"):
        at = int(path.stem[-3:])
        name = ("Ada1", "Bob2", "Cyd3", "Dan4", "Eve5")[at % 5]
        path.rename(path.with_name(f"{name}_later{at // 5}.jpg"))
    command = [patients, "--weights", patients_run.path, "--val", new]
    [line] = warnings_of_weights(capsys, *command)
    told = " was trained on 18 of the 30 validation images, so that results are too good"
    assert line.endswith(told)


QUARTERS = np.zeros((40, 60, 3), np.uint8)
QUARTERS[:20, :30], QUARTERS[:20, 30:], QUARTERS[20:, :30] = (200, 40, 40), (40, 200, 40), 90


def read(path: Path, white: int = 65535, least: int = WHOLE) -> torch.Tensor:
    return training.read_image(str(path), white, least)


def test_every_mode_and_format_comes_out_as_rgb_over_white_where_transparent(tmp_path):
    picture = Image.fromarray(QUARTERS)
    grey = picture.convert("L")
    wide = np.array(grey).astype(np.uint16) * 257
    clear = picture.convert("RGBA")
    clear.paste((0, 0, 0, 0), (30, 0, 60, 40))  # black, and nowhere to be seen
    images = {
        **{f"rgb.{kind}": picture for kind in ("jpg", "png", "webp", "bmp", "tif", "ppm")},
        **{"rgb_cmyk.jpg": picture.convert("CMYK"), "rgb_palette.png": picture.quantize(8)},
        **{f"clear.{kind}": clear for kind in ("png", "webp", "tif")},
        **{"clear_palette.png": clear.quantize(8), "pale.png": clear.convert("LA")},
        **{f"grey.{kind}": grey for kind in ("jpg", "png")},
        **{f"grey16.{kind}": Image.fromarray(wide) for kind in ("png", "tif")},
    }
    for name, image in images.items():
        image.save(tmp_path / name, **({} if name.endswith("tif") else {"quality": 100}))
    picture.save(tmp_path / "rgb_png.jpg", "PNG")
    picture.save(tmp_path / "rgb_broken_tag.png", exif=b"Exif\0\0broken")
    upright = torch.from_numpy(QUARTERS).permute(2, 0, 1)
    colours = {"rgb": upright, "grey": torch.from_numpy(np.array(grey)).expand(3, -1, -1)}
    for name, whole in (("clear", "rgb"), ("pale", "grey")):
        colours[name] = colours[whole].clone()
        colours[name][:, :, 30:] = 255
    for path in tmp_path.iterdir():
        image = read(path)
        assert image.dtype == torch.uint8 and image.shape == (3, 40, 60), path
        wanted = next(colours[name] for name in colours if path.name.startswith(name))
        difference = (image.int() - wanted)[:, [6, 6, 33, 33], [6, 53, 53, 6]].abs().max()
        assert difference <= (12 if "cmyk" in path.name else 4), path


@pytest.mark.parametrize("suffix", ["jpg", "png", "late.png", "webp", "tif"])
def test_images_come_out_upright_as_pillow_turns_them(suffix, tmp_path):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        Image.fromarray(QUARTERS).save(path, exif=exif)
        if suffix == "late.png":  # the chunk that tells it is moved behind the pixels
            content = path.read_bytes()
            start = content.index(b"eXIf") - 4
            end = start + 12 + int.from_bytes(content[start : start + 4], "big")
            late = content[:start] + content[end:-12] + content[start:end] + content[-12:]
            path.write_bytes(late)
        picture = Image.open(path)
        picture.load()
        wanted = v2.functional.pil_to_tensor(ImageOps.exif_transpose(picture))
        assert wanted.shape == ((3, 40, 60) if orientation < 5 else (3, 60, 40))
        assert torch.equal(read(path), wanted)


@pytest.mark.parametrize("least", [848, 601, 600, 301, 149])
def test_a_large_jpeg_is_decoded_to_about_what_is_needed(least, tmp_path):
    """A half, a quarter or an eighth of 1,200 pixels, upright, where that is no less."""
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    noise = np.random.default_rng(0).integers(256, size=(12, 16, 3), dtype=np.uint8)
    photograph = Image.fromarray(noise).resize((1600, 1200), Image.Resampling.BICUBIC)
    path = tmp_path / "x.jpg"
    photograph.save(path, quality=95, exif=exif)
    image, whole = read(path, least=least), read(path)
    shrunk = v2.functional.resize(whole, [least])
    assert whole.shape == (3, 1600, 1200) and image.shape == shrunk.shape
    assert (image.float() - shrunk.float()).abs().mean() < 1
    assert torch.equal(image, shrunk) is (least > 600)
    assert torch.equal(read(path, least=849), whole)  # not twice the pixels


DEEP = [  # columns of the brightest image, white, what is seen of them
    (np.uint16, [0, 100, 200, 255], 255, [0, 100, 200, 255]),
    (np.uint16, [0, 100, 256, 512], 1023, [0, 25, 64, 128]),
    (np.uint16, [0, 257, 32896, 65535], 65535, [0, 1, 128, 255]),
    (np.int32, [0, 50000, 100000, 200000], 200000, [0, 64, 128, 255]),
]


@pytest.mark.parametrize(("dtype", "values", "white", "seen"), DEEP)
def test_all_grey_images_have_the_same_white(dtype, values, white, seen, make_folder):
    """A dark image among bright ones stays dark; in a TIFF white may be stored as zero."""
    root = make_folder({"ape": 2, "bee": 2})
    columns = np.tile(np.array(values).repeat(8), (32, 1))
    Image.fromarray(columns.astype(dtype)).save(root / "ape/deep.tif")
    Image.fromarray((columns // 4).astype(dtype)).save(root / "bee/dark.tif")
    assert load(root).white == white
    kinds = [struct.pack("<HHII", 262, 3, 1, kind) for kind in (1, 0)]
    (root / "bee/inverse.tif").write_bytes((root / "ape/deep.tif").read_bytes().replace(*kinds))
    scales = {"ape/deep": (0, 1), "bee/dark": (0, 0.25)}
    scales |= {"bee/inverse": (255, -1)} if dtype is np.uint16 else {}
    for name, (black, factor) in scales.items():
        image = read(root / f"{name}.tif", white)
        assert image.dtype == torch.uint8 and (image == image[:1, :1]).all()
        expected = pytest.approx([black + each * factor for each in seen], abs=0.76)
        assert image[0, 0, ::8].tolist() == expected
    assert read(root / "ape/deep.tif", white // 2)[0, 0, -1] == 255  # brighter than white


def test_of_a_tiff_with_several_pages_the_first_is_read_and_said_so(make_folder, capsys):
    root = make_folder({"ape": 5, "bee": 5})
    pages = [Image.new("L", (32, 32), shade) for shade in (50, 100)]
    pages[0].save(root / "ape/a.tif", save_all=True, append_images=pages[1:])
    load(root)
    said = "warning: 1 files have several pages, of which only the first is read; the first of"
    assert capsys.readouterr().err == f"{said} these files is {root}/ape/a.tif\n"
    assert (read(root / "ape/a.tif") == 50).all()


@pytest.mark.parametrize(("flip", "ways"), [("none", 1), ("sides", 2), ("all", 8)])
def test_images_are_mirrored_and_turned_as_told(flip, ways, monkeypatch):
    monkeypatch.setattr(training, "CROP_SCALE", 1.0)
    torch.manual_seed(0)
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, :16, :16], image[:, :16, 16:], image[:, 16:, :16] = 200, 40, 100
    view = training.Images([], torch.empty(0), PREPARE, flip).training
    seen = Counter(tuple(view(image)[0, ::31, ::31].flatten().tolist()) for _ in range(160))
    assert len(seen) == ways and min(seen.values()) > 100 / ways - 8
    assert (200, 40, 100, 0) in seen and ((40, 200, 0, 100) in seen) is (ways > 1)


@pytest.mark.parametrize("scale", [0.1, 0.5, 0.8])
def test_a_crop_shows_at_least_its_part_and_what_is_decoded_is_never_enlarged(scale, monkeypatch):
    monkeypatch.setattr(training, "CROP_SCALE", scale)
    torch.manual_seed(0)
    least = training.least_side(32)
    view = training.Images([], torch.empty(0), PREPARE).training
    shade = torch.arange(100.0).expand(3, 100, 100).byte()  # each column has its own
    widths = [(crop := view(shade))[0, 0, -1].item() - crop[0, 0, 0].item() for _ in range(200)]
    narrowest = 100 * (scale * 3 / 4) ** 0.5  # of a crop that is 3 wide and 4 high
    assert narrowest - 6 < min(widths) < narrowest + 12
    square = torch.zeros(3, least, least, dtype=torch.uint8)
    parts = [view.transforms[0].make_params([square]) for _ in range(500)]
    assert 31 <= min(min(part["height"], part["width"]) for part in parts) <= 36  # rounded


@pytest.mark.parametrize(
    ("width", "height", "size", "shape"),
    [
        (400, 300, 224, (256, 352)),  # 256 * 4 / 3 = 341, which is nearest to 11 cells of 32
        (60, 60, 224, (256, 256)),
        (34, 33, 33, (33, 33)),  # a cell is less
        (3000, 300, 224, (256, 768)),  # 3 : 1
        (3000, 1, 224, (256, 768)),  # to enlarge it as a whole would take gigabytes
    ],
)
def test_the_whole_image_is_evaluated_but_for_the_ends_of_a_strip(
    width, height, size, shape, tmp_path
):
    """From left to right it gets red, downwards green, what is not to be seen is blue."""
    resource = pytest.importorskip("resource")  # not on Windows
    peak, seen_width = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, min(width, 3 * height)
    x, y = np.meshgrid(np.arange(width) - (width - seen_width) // 2, np.arange(height))
    red, green = 255 * x / (seen_width - 1), 255 * y / max(1, height - 1)
    pixels = np.stack([red.clip(0, 255), green, 255 * ((red < 0) | (red > 255))], 2)
    for at, turned in enumerate((pixels, pixels.transpose(1, 0, 2))):
        Image.fromarray(turned.astype(np.uint8)).save(tmp_path / "x.png")
        look = training.Preparation(size, 0)
        seen, *_ = training.Images([str(tmp_path / "x.png")], torch.zeros(1), look)[0, -1]
        seen = seen.transpose(0, at).int()
        assert seen.shape == (*shape, 3) and not seen[..., 2].any()
        ends = [seen[row, column, :2].tolist() for row, column in ((0, 0), (0, -1), (-1, 0))]
        lowest = 255 * (height > 1)
        assert ends == [pytest.approx(end, abs=6) for end in ([0, 0], [255, 0], [0, lowest])]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**18  # kilobytes


def test_images_of_several_shapes_are_answered_in_their_order(tmp_path):
    """By a network that says the mean colour; a batch has three images of up to three shapes."""
    sides = [(40, 40), (120, 40), (40, 40), (40, 120), (120, 40), (40, 120), (40, 120)]
    paths = [str(tmp_path / f"{at}.png") for at in range(len(sides))]
    for at, path in enumerate(paths):
        Image.new("RGB", sides[at], (30 * at, 0, 255)).save(path)
    reader = training.Reader(training.Images(paths, torch.arange(7), PREPARE), CPU, 0, 3)
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    for order in ([0, 1, 2, 3, 4, 5, 6], [3, 0, 6, 2, 5, 1, 4]):
        outputs = training.compute_logits(network, reader, torch.tensor(order))
        reds = [(30 * at / 255 - 0.485) / 0.229 for at in order]
        assert outputs[:, 0].tolist() == pytest.approx(reds, abs=1e-4)
    [groups] = reader.read([torch.tensor([[0, -1], [1, -1], [2, -1]])], "")
    assert [group.indices.tolist() for group in groups] == [[0, 2], [1]]


def test_the_same_index_and_seed_give_the_same_pixels_in_any_process(folder):
    paths = sorted(map(str, folder.rglob("*.jpg")))
    labels = torch.arange(len(paths))
    images = training.Images(paths, labels, training.Preparation(24, 255), "all")
    drawn = training.cut_batches(labels[:22].repeat(2), 8, training.seeded("augment", 0, 1))
    batches = [*drawn, *training.cut_batches(labels[:22], 5)]
    loaded = []
    for workers in (0, 1, 2):
        torch.manual_seed(workers)
        read = training.Reader(images, CPU, workers, 8).read(batches, "")
        loaded.append([group for [group] in read])
    assert torch.equal(torch.cat([group.labels for group in loaded[0]]), labels[:22].repeat(3))
    for group, *others in zip(*loaded, strict=True):
        assert group.images.dtype == torch.uint8 and group.images.shape[1:] == (24, 24, 3)
        for other in others:
            assert all(map(torch.equal, group, other))
    assert not torch.equal(images[3, 77][0], images[3, 78][0])


def test_pixels_below_zero_are_left_out_for_all_would_be_black(tmp_path):
    Image.fromarray(np.int32([[-1000, 400]])).save(tmp_path / "x.tif")
    assert "pixels are below 0" in str(training.check_image(str(tmp_path / "x.tif")))


def test_an_empty_pattern_is_refused(animals, capsys, tmp_path):
    """Of an unset variable of the shell, say."""
    command = [animals, "--weights", "none", *TINY, "--group", "", "--output", tmp_path / "run"]
    error = refused(command, capsys, tmp_path)[-1]
    assert "images that do not match: 38; match what differs" in error
