"""The README's blocks, run as they stand."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import rows_of
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = re.compile(r"--epochs \d+")  # a few of the epochs show that a command works


def block(name: str) -> str:
    """The code after the mark `<!-- name -->`."""
    found = re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found, f"the README has no block {name}"
    return found[1]


def commands_after_installation(name: str) -> list[str]:
    """The block's commands but for those that make and fill an environment."""
    commands = [
        command.split("  #")[0].strip()
        for line in block(name).splitlines()
        for command in line.split(" && ")
        if not re.match(r"\s*($|#|git |cd |python3 -m venv |\. \.venv|pip install )", command)
    ]
    assert commands and all(command.startswith("python ") for command in commands)
    return commands


def execute(command: str, folder: Path) -> str:
    """What a command of the README prints, in `folder`."""
    _, *arguments = shlex.split(command)
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which "Try it" ran, without installation, for 3 epochs at most."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("data_creation.py", "data_training.py", "tests"):
        (folder / name).symlink_to(ROOT / name)
    for command in commands_after_installation("try it"):
        execute(SHORT.sub("--epochs 3", command), folder)
    return folder


def test_the_first_minute_ends_with_a_page_and_a_network_that_learned(tried):
    [*_, output] = re.findall(r"--output (\S+)", block("try it"))
    assert (tried / output / "network.pt").exists() and (tried / output / "report.html").exists()
    history = rows_of(tried / output / "history.csv")
    classes = len(rows_of(tried / output / "classes.csv"))
    assert float(history[-1]["balanced_accuracy"]) > 3 / classes  # of chance


def test_the_block_that_predicts_answers_for_every_image(tried):
    [command] = [line for line in block("use it").splitlines() if "--predict" in line]
    command = command.split("  #")[0]
    text = execute(command.split(" > ")[0], tried)
    if named := re.search(r"(?:--output|>) (\S+)", command):
        text = text or (tried / named[1]).read_text()
    rows = list(csv.DictReader(text.splitlines()))
    folder = tried / shlex.split(command)[2]
    assert len(rows) == len(list(folder.rglob("*.jpg"))) > 10
    for row in rows:
        assert (tried / row["path"]).is_file() and 0 < float(row["probability"]) <= 1


@pytest.mark.parametrize("factor", [1, 5])
def test_the_lines_for_a_program_of_ones_own_say_what_predict_says(factor, tried):
    """Of a large photograph, too."""
    lines = block("in a program")
    small = re.search(r'Image.open\("(.+?)"\)', lines)[1]
    with Image.open(tried / small) as image:
        image.resize([factor * side for side in image.size]).save(tried / f"{factor}.jpg")
    lines = lines.replace(small, f"{factor}.jpg")
    answer = subprocess.run(
        [sys.executable, "-c", lines], cwd=tried, capture_output=True, text=True, check=True
    ).stdout
    photo = re.search(r'Image.open\("(.+?)"\)', lines)[1]
    run = re.search(r'"(runs/\S+)/network.pt"', lines)[1]
    shown = execute(f"python data_training.py {photo} --predict {run} --no-amp", tried)
    [row] = csv.DictReader(shown.splitlines())
    name, probability = answer.split()
    assert (name, float(probability)) == (
        row["class"],
        pytest.approx(float(row["probability"]), abs=1e-5),
    )


def test_the_block_that_tests_finds_the_tests():
    """Only collected here: to run them would run this one, too."""
    pytest.importorskip("xdist")
    [command] = commands_after_installation("test command")
    arguments = [sys.executable, *command.split()[1:], "--collect-only"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert f"{Path(__file__).name}::" in done.stdout


def test_every_mark_is_of_a_block_that_is_run():
    marks = set(re.findall(r"<!-- (.*?) -->\n```", README))
    assert marks == {"try it", "use it", "in a program", "test command"}


def test_every_option_the_readme_names_exists():
    shown = ""
    for script in ("data_creation.py", "data_training.py"):
        command = [sys.executable, str(ROOT / script), "--help"]
        shown += subprocess.run(command, capture_output=True, text=True, check=True).stdout
    scripts = re.sub(r"torchrun .* data_training.py|-m pytest .*", "", README)  # have their own
    named = set(re.findall(r"--[a-z][a-z-]+", scripts)) - {"--help"}
    assert len(named) > 5
    assert named <= set(re.findall(r"--[a-z][a-z-]+", shown))
