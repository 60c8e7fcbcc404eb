"""Every folder in tests/cases/ is an input on which rlpost was once wrong; each behaves now as its README says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from case_checks import answers, data, models, rewards, runs, sampling

CASES = Path(__file__).with_name("cases")
AREAS = (answers, data, models, rewards, runs, sampling)
CHECKS = {name: check for area in AREAS for name, check in area.CHECKS.items()}


@pytest.mark.engine
@pytest.mark.parametrize("name", sorted(CHECKS))
def test_case(name, tmp_path, monkeypatch):
    """In a copy of the case's folder, which is the working directory, as a user would run it."""
    folder = tmp_path / name
    shutil.copytree(CASES / name, folder)
    monkeypatch.chdir(folder)
    CHECKS[name](folder)
