"""The house keeps its shape: imports run downwards and in no circle, files and functions stay small, the plan is drawn true."""

from __future__ import annotations

import ast
import importlib
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import networkx
import pytest
from conftest import REPOSITORY

from rlpost.moved import MOVED

PACKAGE = REPOSITORY / "rlpost"
FILES = sorted(PACKAGE.rglob("*.py"))
LINTER = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]


@pytest.fixture(scope="module")
def imports() -> networkx.DiGraph:
    """Which module imports which, those for type checkers included."""
    graph = grimp.build_graph("rlpost", cache_dir=None)
    edges = [(a, b) for a in graph.modules for b in graph.find_modules_directly_imported_by(a)]
    made = networkx.DiGraph(edges)
    made.add_nodes_from(graph.modules)
    return made


def test_no_circle_of_imports(imports) -> None:
    circles = [sorted(part) for part in networkx.strongly_connected_components(imports) if len(part) > 1]
    assert circles == []


def test_every_module_stands_on_a_layer(imports) -> None:
    """A new room must be entered in the contract, or its imports would go unchecked."""
    contract = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    layers = [name.strip() for line in contract["layers"] for name in line.split(":")]
    packages = {str(path.parent.relative_to(REPOSITORY)).replace("/", ".") for path in PACKAGE.rglob("__init__.py")}
    outside = [
        module
        for module in imports.nodes
        if module not in packages and not any(module == layer or module.startswith(f"{layer}.") for layer in layers)
    ]
    assert outside == [], "enter them in [tool.importlinter] of pyproject.toml"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("policy/rows.py", "from rlpost.run import loop"),
        ("source/sampled.py", "from rlpost.run import loop"),
        ("run/parts.py", "import rlpost.source.pairs"),
        ("gradient/kl.py", "import logging"),
    ],
)
def test_a_planted_upward_import_breaks_a_contract(file, line, tmp_path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "rlpost", ignore=shutil.ignore_patterns("__pycache__", "_shipped"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    planted = tmp_path / "rlpost" / file
    planted.write_text(planted.read_text() + f"\n\ndef _planted() -> None:\n    {line}\n")
    done = subprocess.run(LINTER, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1 and "BROKEN" in done.stdout, done.stdout + done.stderr


def test_modules_are_found_under_their_former_names() -> None:
    for former, now in MOVED.items():
        assert importlib.import_module(former) is importlib.import_module(now)
        assert importlib.import_module(now).__spec__.name == now


def test_methods_and_gradients_call_nothing_distributed() -> None:
    """The contract sees imports; `torch.distributed` needs none beyond torch."""
    for file in [*(PACKAGE / "methods").rglob("*.py"), *(PACKAGE / "gradient").rglob("*.py")]:
        names = {ast.unparse(node) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
        assert not any(name.startswith("torch.distributed") for name in names), file
        assert not {"open", "print"} & {
            node.func.id
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }, file


def test_few_loose_files_and_a_short_loop() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 7
    assert len((PACKAGE / "run" / "loop.py").read_text().splitlines()) < 150


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(file) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= 500, f"{file} has more than 500 lines: split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{file.name}: {node.name} is longer than 60 lines"


def test_the_drawn_plan_is_the_codes() -> None:
    done = subprocess.run(
        [sys.executable, "docs/draw_rooms.py", "--check"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, f"docs/architecture.md: {done.stdout}{done.stderr} Run `make docs`."
