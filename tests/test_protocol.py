"""The protocol on invented sets: what it prints, and that it goes on from its table."""

from pathlib import Path

import protocol
import pytest
import torch
from conftest import open_run, rows_of, weights_file, write_folder

WAYS = ["default", "none", "default --folds 3", "loop-none", "loop-1e-4", "loop"]
NAMES = ["default", "none", "none, calibrated", "default --folds 3", "loop-none"]
NAMES += ["loop-none, calibrated", "loop-1e-4", "loop"]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two sets of 12 and 14 images a class, of which 6 are left to test."""
    root = tmp_path_factory.mktemp("sets")
    write_folder(root / "fur", {"a": 12, "b": 12, "c": 12})
    write_folder(root / "skin", {"d": 14, "e": 14})
    flags = "--arch resnet18 --device cpu --no-amp --batch-size 12 --workers 0"
    numbers = "--rare 4 --most 7 --epochs 1 --image-size 32 --rotations 1 --seeds 1"
    weights = ["--weights", str(weights_file(root / "w.pth")), "--csv", str(root / "table.csv")]
    return [str(root / "fur"), str(root / "skin"), *numbers.split(), *weights, f"--flags={flags}"]


def test_all_ways_are_tested_once_and_a_second_call_finds_them(command, monkeypatch, capsys):
    monkeypatch.setattr(protocol, "LEAST", 6)
    protocol.main([*command, "--ways", *WAYS])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [line[0].strip("| ") for line in lines[2:]] == NAMES
    assert {line[1] for line in lines[2:]} == {"2"}
    assert all(" [" in line[-1] for line in lines[3:])  # differences, with intervals over sets
    path = Path(command[command.index("--csv") + 1])
    before, rows = path.read_text().splitlines(), rows_of(path)
    assert len(rows) == 16 and all(0 <= float(row["calibrated"]) <= 100 for row in rows)
    path.write_text("".join(f"{line}\n" for line in before[:-1]))  # stopped before the last one
    protocol.main([*command, "--ways", *WAYS])
    assert capsys.readouterr().err.count("loop: ") == 1
    again = path.read_text().splitlines()
    assert [x.rpartition(",")[0] for x in again] == [x.rpartition(",")[0] for x in before]


def test_the_counts_fall_geometrically_to_the_rarest_and_leave_a_test():
    assert protocol.count_stairs([900, 900, 900], 6, 600) == [600, 60, 6]
    assert protocol.count_stairs([900, 900, 900], 6, 150) == [150, 30, 6]
    assert protocol.count_stairs([250, 90, 900], 20, 600) == [200, 40, 20]


def test_the_loop_begins_with_the_weights_as_they_are_and_a_new_head_at_random(command):
    weights, classes = command[command.index("--weights") + 1], ["a", "b", "c"]
    settings = open_run(command[0], "--weights", weights, "--arch", "resnet18").settings
    stored = torch.load(weights, weights_only=True)
    state = protocol.load_plain(settings, classes).state_dict()
    assert state["fc.weight"].shape[0] == 3 and state["fc.weight"].std() > 0.01
    for name in stored.keys() - {"fc.weight", "fc.bias"}:
        assert torch.equal(state[name], stored[name]), name
