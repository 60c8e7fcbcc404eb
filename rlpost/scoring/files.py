"""Reward files as modules that any process can import: the children of a reward's process pools, too.

A file's module is named `rlpost.scoring.files.<stem>_<path in hexadecimal>`. Importing a module imports its package first,
and this package brings the finder that reads the path out of the name: so whatever process unpickles one of the file's
functions, started by fork, spawn, forkserver or loky, finds the file. A name of its own also means that rewards/math.py
never hides the module math, and that two files of equal names in different folders are two modules.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType

__path__: list[str] = []  # makes this module a package; what lies in it, the finder below knows alone

_folders: list[str] = []  # of reward files; they stand at the end of sys.path
_put_aside: dict[str, dict[str, ModuleType]] = {}  # folder -> its modules whose names another folder's modules have now


class _Loader(SourceFileLoader):
    """Runs a reward's file with its own folder at hand."""

    def exec_module(self, module: ModuleType) -> None:
        # No parent package: `from . import x` then fails with Python's own words rather than with this package's name.
        module.__package__ = ""
        settle(Path(self.path).parent)
        super().exec_module(module)


class _Finder(MetaPathFinder):
    """Finds the modules of this package by the paths in their names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != __name__ or "_" not in name:
            return None
        try:
            file = os.fsdecode(bytes.fromhex(name.rpartition("_")[2]))
        except ValueError:
            return None
        return importlib.util.spec_from_file_location(fullname, file, loader=_Loader(fullname, file))


def module_name(file: Path) -> str:
    """The name under which any process can import `file`, an absolute path."""
    return f"{__name__}.{re.sub(r'[^0-9A-Za-z_]', '_', file.stem)}_{os.fsencode(file).hex()}"


def shown_name(text: str) -> str:
    """`text` with such names shortened to the file's stem, for messages."""
    return re.sub(rf"{re.escape(__name__)}\.(\w+)_[0-9a-f]+", r"\1", text)


def know(folders: Iterable[Path]) -> None:
    """Says which folders of reward files there will be, where sys.path comes from a process that has them already."""
    _folders.extend(str(folder) for folder in folders if str(folder) not in _folders)


def settle(folder: Path) -> None:
    """Makes imports find what lies in `folder`, behind everything that is found without it, so that it hides nothing.

    Where files of two folders import neighbours of the same name, each gets its own: called before a file is run, and
    before every call of its function, for functions that import when they are called.
    """
    home = str(folder)
    if home not in _folders:
        _folders.append(home)
    if home not in sys.path or len(_folders) > 1:
        sys.path[:] = [entry for entry in sys.path if entry not in _folders]
        sys.path += [home, *(entry for entry in _folders if entry != home)]
    if len(_folders) > 1:
        _make_room(folder)


def _make_room(folder: Path) -> None:
    """Exchanges the modules of other reward folders whose names also stand in `folder`."""
    for top, module in list(sys.modules.items()):
        origin = getattr(module, "__file__", None)
        if "." in top or origin is None:
            continue
        lies_in = Path(origin).parent
        owner = str(lies_in.parent if Path(origin).name == "__init__.py" else lies_in)
        if owner in _folders and owner != str(folder) and _holds(folder, top):
            aside = _put_aside.setdefault(owner, {})
            for name in [name for name in sys.modules if name == top or name.startswith(f"{top}.")]:
                aside[name] = sys.modules.pop(name)
    sys.modules.update(_put_aside.pop(str(folder), {}))


def _holds(folder: Path, top: str) -> bool:
    return (folder / f"{top}.py").is_file() or (folder / top).is_dir()


if not any(
    type(finder).__qualname__ == _Finder.__qualname__ and type(finder).__module__ == __name__
    for finder in sys.meta_path
):
    sys.meta_path.append(_Finder())
