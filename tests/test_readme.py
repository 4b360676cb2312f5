"""The README's blocks, run as they stand."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    assert len(commands) == 3
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


def test_the_snippet_answers_what_the_run_predicted(tried: Path) -> None:
    snippet = block("use it").replace("best.pt", "last.pt")
    subprocess.run([sys.executable, "-c", snippet], cwd=tried, check=True)
    with open(tried / "answers.csv", newline="") as file:
        answers = {path: (name, float(probability)) for path, name, probability in csv.reader(file)}
    assert len(answers) == len(list((tried / "sample/husky").iterdir())) > 40
    with open(tried / "runs/sample/predictions.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["class"] == "husky"]
    assert len(rows) > 3
    for row in rows:
        name, probability = answers[f"sample/{row['path']}"]
        assert name == row["predicted"]
        assert probability == pytest.approx(float(row["probability"]), abs=0.1)  # not bfloat16


def test_every_option_the_readme_names_exists() -> None:
    shown = ""
    for script in ("data_creation.py", "data_training.py"):
        command = [sys.executable, str(ROOT / script), "--help"]
        shown += subprocess.run(command, capture_output=True, text=True, check=True).stdout
    scripts = re.sub(r"torchrun .* data_training.py|-m pytest .*", "", README)  # have their own
    named = set(re.findall(r"--[a-z][a-z-]+", scripts)) - {"--help"}
    assert len(named) > 15
    assert named <= set(re.findall(r"--[a-z][a-z-]+", shown))
