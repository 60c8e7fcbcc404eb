"""Processes of several end with their exit code, after their exit handlers, and without Python's finalisation."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

SCRIPT = """
import sys
from rlpost.run.ending import ends_at_once

class Finalised:
    def __del__(self, write=print):
        write("finalised")

kept = Finalised()
with ends_at_once():
    import atexit
    atexit.register(print, "handler ran")
    {action}
"""


def end(action: str, world: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "WORLD_SIZE": str(world)}
    command = [sys.executable, "-c", SCRIPT.format(action=action)]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("action", "code", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('why')", 1, "why"),
        ("raise ValueError('broken')", 1, "ValueError: broken"),
    ],
)
def test_the_exit_code_and_the_last_words_are_those_of_the_work(action, code, said):
    several = end(action, 2)
    assert several.returncode == code
    assert said in several.stderr
    assert several.stdout == "handler ran\n"


def test_one_process_ends_as_python_does():
    assert end("sys.exit(3)", 1).returncode == 3
    assert "finalised" in end("pass", 1).stdout
