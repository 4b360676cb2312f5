"""The protocol on invented sets: what it prints, and that it goes on from its table."""

import csv
from pathlib import Path

import protocol
import pytest
from conftest import weights_file, write_folder


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two sets of 12 and 14 images a class, of which 6 are left to test."""
    root = tmp_path_factory.mktemp("sets")
    sets = [write_folder(root / name, dict.fromkeys(classes, 12 + 2 * at))
            for at, (name, classes) in enumerate({"fur": "abc", "skin": "de"}.items())]  # fmt: skip
    flags = "--arch resnet18 --device cpu --no-amp --batch-size 12 --workers 0"
    numbers = "--rare 4 --most 7 --epochs 1 --image-size 32 --rotations 2 --seeds 1 --folds 3"
    weights = ["--weights", str(weights_file(root / "w.pth")), "--csv", str(root / "table.csv")]
    return [*map(str, sets), *numbers.split(), *weights, f"--flags={flags}"]


def test_all_ways_are_judged_once_and_a_second_call_finds_them(command, monkeypatch, capsys):
    monkeypatch.setattr(protocol, "LEAST", 6)
    ways = ["--ways", "default", "none", "folds", "loop-1e-4", "weighted-loss"]
    protocol.main([*command, "--rotations", "1", *ways])
    table = capsys.readouterr().out
    lines = [line.split(" | ") for line in table.splitlines()]
    names = ["default", "none", "none, calibrated", "folds (3)", "loop-1e-4", "weighted-loss"]
    assert [line[0].strip("| ") for line in lines[2:]] == names
    assert {line[1] for line in lines[2:]} == {"2"}
    assert all(" [" in line[10] for line in lines[3:])  # differences, with intervals over sets
    path = Path(command[command.index("--csv") + 1])
    before = path.read_text()
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["most"] for row in rows} == {"7"}
    assert len(rows) == 12 and all(0 <= float(row["calibrated"]) <= 100 for row in rows)
    path.write_text("".join(before.splitlines(keepends=True)[:-1]))  # stopped before the last one
    protocol.main([*command, "--rotations", "1", *ways])
    assert capsys.readouterr().err.count("\n") == 1
    again = path.read_text().splitlines()
    assert [each.rpartition(",")[0] for each in again] == [
        each.rpartition(",")[0] for each in before.splitlines()
    ]
    protocol.main(["--csv", str(path)])
    assert len(capsys.readouterr().out.splitlines()) == 8


def test_the_counts_fall_geometrically_to_the_rarest_and_leave_a_test():
    assert protocol.count_stairs([900, 900, 900], 6, 600) == [600, 60, 6]
    assert protocol.count_stairs([900, 900, 900], 6, 150) == [150, 30, 6]
    assert protocol.count_stairs([250, 90, 900], 20, 600) == [200, 40, 20]
