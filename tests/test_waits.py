"""Every wait of the package has a limit, or stands here with what ends it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import REPOSITORY

WAITS = {"wait", "join", "recv", "acquire", "result", "communicate"}  # and `get` of a queue: without an argument

REASONS = {
    "rlpost/answers/scalar.py": "loops over the text that is read: each turn takes some of it",
    "rlpost/learner/checkpoint.py": "the thread that writes a checkpoint, under the watchdog of the phase `checkpoint`",
    "rlpost/offload/calibrate.py": "lanes that are measured, each for a second; one that fails ends all",
    "rlpost/offload/backends.py": "lanes of an update, under the watchdog of the phase `update`; a lane that fails ends all",
    "rlpost/rollout/remote/client.py": "a thread whose every call has a deadline, or a heartbeat beside it",
    "rlpost/rollout/remote/lanes.py": "a request: ended by the heartbeat, which gives an engine up that lives or works no more",
    "rlpost/rollout/remote/process.py": "a process that was killed",
    "rlpost/rollout/transformers_engine.py": "one token a turn, up to the limit of tokens",
    "rlpost/run/serve.py": "a server is there until it is ended",
    "rlpost/sandbox/bubblewrap.py": "a process that was killed",
    "rlpost/sandbox/inside.py": "what a test case writes, up to its deadline: every turn looks at the clock",
    "rlpost/scoring/pool.py": "jobs have deadlines, and who waits for one looks whether the thread of the pool lives",
    "rlpost/scoring/process.py": "a task beside those that have limits: it ends with the process",
    "rlpost/scoring/worker.py": "a process that waits for calls, and ends when the trainer closes its pipe or is gone",
    "rlpost/source/ahead.py": "a rollout beside the learner, under the watchdog of the phase `wait` and of its own phases",
}


def unbounded(path: Path) -> list[int]:
    """The lines on which something is waited for without a limit, or a loop has no condition."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.While) and isinstance(node.test, ast.Constant):
            lines.append(node.lineno)
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute | ast.Name):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        limited = any(keyword.arg == "timeout" for keyword in node.keywords)
        if name == "get" and not node.args and not node.keywords:
            lines.append(node.lineno)
        # An argument is a limit (`process.wait(12)`), or what is joined (`", ".join(...)`), but for `concurrent.futures.wait`.
        if name in WAITS and not limited and (not node.args or isinstance(node.func, ast.Name)):
            lines.append(node.lineno)
    return lines


def test_every_wait_has_a_limit_or_a_reason():
    found = {
        str(path.relative_to(REPOSITORY)): lines
        for path in sorted((REPOSITORY / "rlpost").rglob("*.py"))
        if (lines := unbounded(path))
    }
    without = {path: lines for path, lines in found.items() if path not in REASONS}
    assert not without, "give these waits a limit, or say in REASONS what ends them"
    assert not REASONS.keys() - found.keys(), "these have no such wait any more"


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("a.wait()", [1]),
        ("a.wait(3)", []),
        ("a.wait(timeout=3)", []),
        ("wait(jobs)", [1]),
        ("wait(jobs, timeout=1)", []),
        ("queue.get()", [1]),
        ("tree.get('a')", []),
        ("', '.join(x)", []),
        ("thread.join()", [1]),
        ("while True:\n    pass", [1]),
        ("while busy():\n    pass", []),
    ],
)
def test_what_counts_as_a_wait(tmp_path, code, lines):
    (tmp_path / "x.py").write_text(code)
    assert unbounded(tmp_path / "x.py") == lines
