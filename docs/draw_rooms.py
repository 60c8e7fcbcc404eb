"""Draws the rooms of rlpost and what they import, from the code, into docs/architecture.md: `make docs`.

python docs/draw_rooms.py [--check]
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import grimp
import networkx

HERE = Path(__file__).resolve().parent
PAGE = HERE / "architecture.md"
BEGIN, END = "<!-- drawn by docs/draw_rooms.py -->", "<!-- end of the drawing -->"


def layers() -> list[list[str]]:
    """The layers of the contract in pyproject.toml, top first: on each the modules or packages that stand there."""
    settings = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["tool"]["importlinter"]
    return [[name.strip() for name in line.split(":")] for line in settings["contracts"][0]["layers"]]


def rooms() -> dict[str, str]:
    """The layers' modules and packages, each with its label in the drawing. Modules of one package on one layer share a box."""
    labels: dict[str, str] = {}
    for layer in layers():
        for name in layer:
            place, _, leaf = name.removeprefix("rlpost.").replace(".", "/").rpartition("/")
            beside = sorted(
                other.rpartition(".")[2] for other in layer if other.rpartition(".")[0] == name.rpartition(".")[0]
            )
            is_package = (HERE.parent / Path(*name.split("."))).is_dir()
            labels[name] = (
                f"{place}: {', '.join(beside)}" if place and not is_package else "/".join(filter(None, (place, leaf)))
            )
    return labels


def room_of(module: str, labels: dict[str, str]) -> str | None:
    """The label of the box that a module belongs to; None for packages' own files."""
    return next((label for name, label in labels.items() if module == name or module.startswith(f"{name}.")), None)


def draw() -> str:
    """A Mermaid flowchart: a box a room, and an arrow to every room that it uses and reaches in no other way.

    Experience and errors, which all use, and the former names are left out; so is that sources are handed `run.parts`."""
    graph, labels = grimp.build_graph("rlpost", cache_dir=None), rooms()
    arrows: set[tuple[str, str]] = set()
    for module in graph.modules:
        file = (HERE.parent / Path(*module.split("."))).with_suffix(".py")
        name = room_of(module, labels)
        if name is None or not file.is_file():
            continue
        for other in graph.find_modules_directly_imported_by(module) - {"rlpost.run.parts"}:
            target = room_of(other, labels)
            if target not in (None, name):
                arrows.add((name, target))
    order = {label: i for i, label in enumerate(dict.fromkeys(labels.values()))}
    shown = [name for name in order if name not in ("__main__", "errors", "experience", "moved")]
    between = networkx.DiGraph([(a, b) for a, b in arrows if {a, b} <= set(shown) and order[a] < order[b]])
    key = {name: f"r{i}" for i, name in enumerate(shown)}
    text = ["```mermaid", "flowchart TD"]
    for name in shown:
        text.append(f'    {key[name]}["{name}"]')
    edges = sorted(networkx.transitive_reduction(between).edges, key=lambda edge: (order[edge[0]], order[edge[1]]))
    return "\n".join([*text, *(f"    {key[a]} --> {key[b]}" for a, b in edges), "```"])


def main() -> int:
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    drawn, after = rest.split(END)
    fresh = f"\n{draw()}\n"
    if drawn == fresh:
        return 0
    if "--check" in sys.argv:
        print("the drawing of the rooms is not that of the code.")
        return 1
    PAGE.write_text(before + BEGIN + fresh + END + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
