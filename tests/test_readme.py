"""The README's blocks, run as they stand."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Process, rows_of
from PIL import Image
from torchvision import models

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# A few of the epochs, on small images, show that a command works.
SHORT = {r"--epochs \d+": "--epochs 2", r"--image-size \d+": "--image-size 32"}


def block(name: str) -> str:
    """The code after the mark `<!-- name -->`."""
    found = re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found, f"the README has no block {name}"
    return found[1]


def commands_after_installation(name: str) -> list[str]:
    """The block's commands but for those that make and fill an environment."""
    commands = [
        command.strip()
        for line in block(name).splitlines()
        for command in line.split(" && ")
        if not re.match(r"\s*($|#|git |cd |python3 -m venv |\. \.venv|pip install )", command)
    ]
    assert commands and all(command.startswith("python ") for command in commands)
    return commands


def execute(command: str, folder: Path = ROOT) -> str:
    """What a command of the README prints, in `folder`."""
    _, script, *arguments = shlex.split(command)
    code = (ROOT / script).read_text(encoding="utf-8")
    return Process(*arguments, code=code, script=Path(script), folder=folder).end()[0]


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which "Try it" ran, shortened, with networks of full width."""
    folder = tmp_path_factory.mktemp("clone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.resnet, "ResNet", models.ResNet)
        for command in commands_after_installation("try it"):
            for usual, short in SHORT.items():
                command = re.sub(usual, short, command)
            execute(command, folder)
        yield folder


def test_the_first_minute_ends_with_a_page_and_a_network_that_learned(tried):
    [*_, output] = re.findall(r"--output (\S+)", block("try it"))
    assert (tried / output / "network.pt").exists() and (tried / output / "report.html").exists()
    history = rows_of(tried / output / "history.csv")
    classes = len(rows_of(tried / output / "classes.csv"))
    assert float(history[-1]["balanced_accuracy"]) > 3 / classes  # of chance


def test_the_block_that_predicts_answers_for_every_image(tried):
    [command] = commands_after_installation("use it")
    [output] = re.findall("--output (\\S+)", command)
    execute(command, tried)
    rows, folder = rows_of(tried / output), tried / shlex.split(command)[2]
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
    answer, _ = Process(code=lines.replace(small, f"{factor}.jpg"), folder=tried).end()
    run = re.search(r'"(runs/\S+)/network.pt"', lines)[1]
    shown = execute(f"python data_training.py {factor}.jpg --predict {run} --no-amp", tried)
    [row] = csv.DictReader(shown.splitlines())
    name, probability = answer.split()
    expected = pytest.approx(float(row["probability"]), abs=1e-5)
    assert (name, float(probability)) == (row["class"], expected)


def test_the_block_that_tests_finds_the_tests():
    """Only collected here: to run them would run this one, too."""
    pytest.importorskip("xdist")
    [command] = commands_after_installation("test command")
    arguments = [sys.executable, *command.removeprefix("python ").split(), "--collect-only"]
    printed = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"{Path(__file__).name}::" in printed


def test_every_mark_is_of_a_block_that_is_run():
    marks = set(re.findall(r"<!-- (.*?) -->\n```", README))
    assert marks == {"try it", "use it", "in a program", "test command"}


def test_every_option_the_readme_names_exists():
    scripts = ("data_creation.py", "data_training.py")
    shown = "".join(execute(f"python {script} --help") for script in scripts)
    text = re.sub(r"torchrun .* data_training.py|-m pytest .*", "", README)  # have their own
    named = set(re.findall(r"--[a-z][a-z-]+", text)) - {"--help"}
    assert len(named) > 5 and named <= set(re.findall(r"--[a-z][a-z-]+", shown))
