"""The README's marked blocks, run as they stand."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import make_sample
import protocol
import pytest
from conftest import Process, rows_of

import data_training as training

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "tests/experiments/RESULTS.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    """The code after the mark `<!-- name -->`."""
    found = re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found, f"the README has no block {name}"
    return found[1]


def execute(command: str, folder: Path) -> str:
    """What a command of the README prints, in `folder`; one epoch shows that it works."""
    python, script, *arguments = shlex.split(re.sub(r"--epochs \d+", "--epochs 1", command))
    assert python == "python" and (ROOT / script).is_file()
    main = importlib.import_module(Path(script).stem).main
    if main is make_sample.main:
        return str(main(folder / arguments[0]))
    return Process(*arguments, folder=folder, main=main).end()[0]


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which "Try it" ran."""
    folder = tmp_path_factory.mktemp("clone")
    for command in block("try it").splitlines():
        execute(command, folder)
    return folder


def test_the_first_minute_ends_with_a_page_and_its_images_are_predicted(tried):
    [*_, output] = re.findall(r"--output (\S+)", block("try it"))
    assert (tried / output / "report.html").exists()
    execute(block("use it"), tried)
    _, _, folder, *_, answers = shlex.split(block("use it"))
    rows = rows_of(tried / answers)
    assert len(rows) == len(list((tried / folder).rglob("*.jpg"))) > 100
    assert all(row["true"] in row["path"] for row in rows)


def test_the_lines_for_a_program_of_ones_own_print_the_probability_of_each_class(
    tried, monkeypatch, capsys
):
    monkeypatch.chdir(tried)
    exec(block("in a program"), {})
    said = ast.literal_eval(capsys.readouterr().out)
    assert said.keys() == make_sample.BREEDS.keys() and sum(said.values()) == pytest.approx(1)


def test_every_option_the_readme_names_exists(capsys):
    shown = (ROOT / "data_creation.py").read_text() + training.make_parser().format_help()
    text = re.sub(r"torchrun .* data_training.py|-m pytest .*", "", README)  # have their own
    named = set(re.findall(r"--[a-z][a-z-]+", text)) - {"--help"}
    assert len(named) > 5 and named <= set(re.findall(r"--[a-z][a-z-]+", shown))


def test_every_figure_of_the_readme_is_among_the_results():
    """All numbers with a decimal point, but versions; also the tables and the intervals."""
    text = re.sub(r"```.*?```|\]\([^)]*\)|`[^`]*`", "", README, flags=re.DOTALL)
    figures = set(re.findall(r"\d+\.\d+", text)) - {"3.10", "1.0"}
    assert len(figures) > 20 and figures <= set(re.findall(r"\d+\.\d+", RESULTS))


def test_the_table_of_the_results_is_that_of_their_rows():
    table = RESULTS.partition("<!-- ten sets -->\n")[2].partition("\n\n")[0]
    by_set = RESULTS.partition("By set;")[2].partition("\n\n    python")[0]
    sets = re.findall(r"^\| (\w+).*\]\(https", by_set, re.MULTILINE)
    rows = rows_of(ROOT / "tests/experiments/results.csv")
    ten = {tuple(row[name] for name in protocol.KEY): row for row in rows if row["set"] in sets}
    assert len(sets) == 10 and table == protocol.make_table(ten)
