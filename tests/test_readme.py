"""The README's blocks, run as they stand."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import load, rows_of, write_folder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    """The code after the mark `<!-- name -->`."""
    return re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```", README, re.DOTALL)[1]


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which "Try it" ran, without installation, for 3 of 20 epochs."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("data_creation.py", "data_training.py", "tests"):
        (folder / name).symlink_to(ROOT / name)
    commands = [line for line in block("try it").splitlines() if line.startswith("python ")]
    assert len(commands) == 4
    for command in commands:
        arguments = [sys.executable, *command.replace("--epochs 20", "--epochs 3").split()[1:]]
        done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        print(done.stdout)
    return folder


def test_the_first_minute_ends_with_pictures_and_a_network_that_learned(tried: Path) -> None:
    assert {path.suffix for path in (tried / "runs/sample").iterdir()} >= {".png", ".pt", ".csv"}
    with open(tried / "runs/sample/history.csv", newline="") as file:
        history = list(csv.DictReader(file))
    assert len(history) == 3
    assert float(history[-1]["balanced_accuracy"]) > 0.25  # chance: 0.08


def answers(tried: Path, snippet: str) -> dict[str, tuple[str, float]]:
    """What the snippet writes of each image."""
    subprocess.run([sys.executable, "-c", snippet], cwd=tried, check=True)
    with open(tried / "answers.csv", newline="") as file:
        return {path: (name, float(probability)) for path, name, probability in csv.reader(file)}


def test_the_snippet_answers_what_the_saved_network_says(tried: Path) -> None:
    given = ["--weights", "runs/sample/best.pt", "--epochs", "0", "--output", "runs/given"]
    command = [sys.executable, "data_training.py", "sample_imbalanced", *given]
    subprocess.run(command, cwd=tried, check=True, capture_output=True)
    found = answers(tried, block("use it"))
    assert len(found) == len(list((tried / "sample/husky").iterdir())) > 40
    rows = [row for row in rows_of(tried / "runs/given/predictions.csv") if row["class"] == "husky"]
    assert len(rows) > 3
    for row in rows:
        name, probability = found[f"sample/{row['path']}"]
        assert name == row["predicted"]
        assert probability == pytest.approx(float(row["probability"]), abs=0.1)  # not bfloat16


def test_the_line_in_the_snippet_favours_classes_as_frequent_as_in_training(tried: Path) -> None:
    snippet = block("use it").replace("sample/husky", "sample/akita")  # the most frequent breed
    line = re.search(r"# (logits \+= .*?)  #", snippet)
    same, skewed = (
        answers(tried, each) for each in (snippet, snippet.replace(line[0], f"{line[1]}  #"))
    )
    assert same != skewed
    for path, (name, probability) in same.items():
        if name == "akita":  # of which no other breed has more
            assert skewed[path][0] == "akita" and skewed[path][1] >= probability


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scans each of patients 0 to 9, who are ill, and 8 to 24, who are well: two are both."""
    folder = write_folder(tmp_path_factory.mktemp("recipes") / "scans", {"ill": 30, "well": 51})
    for name, first in (("ill", 0), ("well", 8)):
        for number, path in enumerate(sorted((folder / name).iterdir())):
            patient, scan = divmod(number, 3)
            path.rename(folder / name / f"P{first + patient:02}_{scan}.png")
    return folder


def patients_of(scans: Path, split: str) -> tuple[set[str], set[str]]:
    """Those to train and those to validate on, who have images of both classes."""
    data = load(scans, "--split", str(scans.parent / split))
    assert len(data.names) == 81 and data.counts(data.val).min() >= 3
    parts = data.train.tolist(), data.val.tolist()
    return tuple({Path(data.names[at]).name.split("_")[0] for at in part} for part in parts)


def test_the_recipe_with_names_keeps_every_patient_on_one_side(scans: Path) -> None:
    subprocess.run([sys.executable, "-c", block("split by names")], cwd=scans.parent, check=True)
    train, val = patients_of(scans, "split.csv")
    assert not train & val and len(train | val) == 25 and 4 <= len(val) <= 6


def test_in_the_recipe_with_scikit_learn_every_patient_is_validated_once(scans: Path) -> None:
    pytest.importorskip("sklearn")
    recipe = block("split by scikit-learn")
    subprocess.run([sys.executable, "-c", recipe], cwd=scans.parent, check=True)
    folds = [patients_of(scans, f"fold_{fold}.csv") for fold in range(5)]
    assert all(not train & val for train, val in folds)
    assert sorted(name for _, val in folds for name in val) == [f"P{at:02}" for at in range(25)]


def test_the_command_lists_the_labels_that_are_likely_wrong_first(tried: Path) -> None:
    command = [sys.executable, "-c", block("wrong labels")]
    shown = subprocess.run(command, cwd=tried, capture_output=True, text=True, check=True).stdout
    assert len(shown.splitlines()) == 20
    rows = rows_of(tried / "runs/sample/predictions.csv")
    least = min(rows, key=lambda row: float(row["true_probability"]))
    assert shown.splitlines()[0] == " ".join(least.values())
    last = [float(line.split()[-1]) for line in shown.splitlines()]
    assert last == sorted(float(row["true_probability"]) for row in rows)[:20]


def test_every_option_the_readme_names_exists() -> None:
    shown = ""
    for script in ("data_creation.py", "data_training.py"):
        command = [sys.executable, str(ROOT / script), "--help"]
        shown += subprocess.run(command, capture_output=True, text=True, check=True).stdout
    scripts = re.sub(r"torchrun .* data_training.py|-m pytest .*", "", README)  # have their own
    named = set(re.findall(r"--[a-z][a-z-]+", scripts)) - {"--help"}
    assert len(named) > 15
    assert named <= set(re.findall(r"--[a-z][a-z-]+", shown))
