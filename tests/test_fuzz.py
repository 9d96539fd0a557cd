"""Damaged files are refused or told, never obeyed: see `fuzz.py`, which runs for as long as one likes."""

import os
import sys
from pathlib import Path

import pytest
from command import FORK

FUZZ = Path(__file__).with_name("fuzz.py")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_no_damage_ends_in_a_defect_a_crash_a_hang_or_a_wrong_answer(seed, tmp_path):
    process = FORK.Process(target=run, args=(tmp_path, seed))
    process.start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "said").read_text()


def run(folder: Path, seed: int) -> None:
    os.dup2(os.open(folder / "said", os.O_WRONLY | os.O_CREAT), 1)
    from fuzz import fuzz

    _, bad = fuzz(folder, 300, seed, most=100)
    sys.exit(bool(bad))
