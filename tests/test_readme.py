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


def commands_after_installation(name: str) -> list[str]:
    """The block's commands but for the first two, which must make and fill an environment."""
    made, installed, *rest = block(name).splitlines()
    assert made.split("  ")[0] == "python3 -m venv .venv && . .venv/bin/activate"
    pip, *chained = installed.split(" && ")
    assert pip.startswith("pip install -r requirements.txt")
    commands = chained + rest
    assert commands and all(command.startswith("python ") for command in commands)
    return commands


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which "Try it" ran, without installation, for 3 of 20 epochs."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("data_creation.py", "data_training.py", "tests"):
        (folder / name).symlink_to(ROOT / name)
    for command in commands_after_installation("try it"):
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


def test_the_block_that_tests_finds_the_tests() -> None:
    """Only collected here: to run them would run this one, too."""
    pytest.importorskip("xdist")
    [command] = commands_after_installation("test command")
    arguments = [sys.executable, *command.split()[1:], "--collect-only"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert f"{Path(__file__).name}::" in done.stdout


def answers(tried: Path, snippet: str) -> dict[str, tuple[str, float]]:
    """What the snippet prints of each image."""
    command = [sys.executable, "-c", snippet]
    shown = subprocess.run(command, cwd=tried, capture_output=True, text=True, check=True).stdout
    rows = csv.reader(shown.splitlines())
    return {path: (name, float(probability)) for path, name, probability in rows}


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


def test_the_recipe_for_patients_keeps_every_patient_on_one_side(scans: Path) -> None:
    subprocess.run([sys.executable, "-c", block("split by patients")], cwd=scans.parent, check=True)
    train, val = patients_of(scans, "split.csv")
    assert not train & val and len(train | val) == 25 and 4 <= len(val) <= 6


def test_every_option_the_readme_names_exists() -> None:
    shown = ""
    for script in ("data_creation.py", "data_training.py"):
        command = [sys.executable, str(ROOT / script), "--help"]
        shown += subprocess.run(command, capture_output=True, text=True, check=True).stdout
    scripts = re.sub(r"torchrun .* data_training.py|-m pytest .*", "", README)  # have their own
    named = set(re.findall(r"--[a-z][a-z-]+", scripts)) - {"--help"}
    assert len(named) > 15
    assert named <= set(re.findall(r"--[a-z][a-z-]+", shown))
