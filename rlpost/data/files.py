"""Local data files: which ones a source's path means, and their lines. Says of a path what it is, where it is no data."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from glob import glob, has_magic
from pathlib import Path
from typing import IO, Any

from rlpost.data.rows import nearest
from rlpost.errors import DataError
from rlpost.recipe.places import candidates, looks_local

KINDS = (".jsonl", ".json", ".csv", ".parquet")
_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}

# Endings of files that hold data in forms that are not read: a path with one of them is no hub name either.
_OTHERS: tuple[str, ...] = (
    ".txt",
    ".tsv",
    ".tab",
    ".xlsx",
    ".xls",
    ".zip",
    ".tar",
    ".tgz",
    ".zst",
    ".7z",
    ".arrow",
    ".feather",
    ".pkl",
)
_OTHERS = (*_OTHERS, ".jsonlines", ".ndjson", ".yaml", ".yml", ".py", ".db", ".sqlite", ".npy", ".npz", ".md", *_OPEN)
_SAYS = (
    "Files that are read end in .jsonl, .json, .csv or .parquet (the first three also with .gz, .bz2 or .xz behind it)."
)
_SAVED = {"dataset_info.json", "state.json", "dataset_dict.json"}  # by datasets.save_to_disk
_SIGNATURES = {
    b"\x1f\x8b": "compressed with gzip: add .gz to its name",
    b"BZh": "compressed with bzip2: add .bz2 to its name",
    b"\xfd7zXZ": "compressed with xz: add .xz to its name",
    b"\x28\xb5\x2f\xfd": "compressed with zstandard: decompress it first",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"PAR1": "a parquet file: name it .parquet",
    b"\xff\xfe": "text in UTF-16: save it as UTF-8",
    b"\xfe\xff": "text in UTF-16: save it as UTF-8",
}


def kind_of(file: Path) -> str | None:
    """The form of a file's content by its name (one of KINDS), compressed or not; None for other names."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _OPEN:
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in KINDS[:3] else None
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else None


def is_local(path: str) -> bool:
    """Whether a source's path means files of this machine. What exists is never a hub name."""
    place = Path(path).expanduser()
    if kind_of(place) is not None or place.suffix.lower() in _OTHERS:
        return True
    return place.exists() or looks_local(path) or has_magic(path)


def find_files(path: str, where: str, base: Path | None = None) -> list[Path]:
    """The files that a local path or glob means, in the order of their names.

    A file of exactly that name comes before a glob. Raises DataError where there is none, or where it is something else:
    a folder, a file of another form, nothing but empty files. `base` is the recipe's folder, in which was looked too
    (`rlpost.recipe.places`), for the message.
    """
    pattern = str(Path(path).expanduser())
    place = Path(pattern)
    # Path.glob takes no absolute patterns.
    matches = [place] if place.exists() else sorted(Path(one) for one in glob(pattern, recursive=True))  # noqa: PTH207
    if not matches:
        beside = f", then beside the recipe in {base}" if base is not None and len(candidates(path, base)) > 1 else ""
        raise DataError(
            f"{where}.path={path}: no file matches `{path}`: there is no such file (looked in {Path.cwd()}{beside})."
            f"{_nearest_file(pattern)} Correct the path, or give a hub name without a file ending."
        )
    if matches == [place] and place.is_dir():
        raise DataError(f"{where}.path: `{path}` is a folder{_in_folder(place, path)}")
    files = [file for file in matches if not file.is_dir()]
    strange = next((file for file in files if kind_of(file) is None), None)
    if strange is not None or not files:
        what = f"{strange or place} is a file whose name" if files else f"`{path}` matches folders only, and a folder"
        raise DataError(f"{where}.path: {what} does not say what it holds. {_SAYS} Rename or convert it.")
    filled = [file for file in files if _size(file, where) > 0]
    if not filled:
        raise DataError(f"{where}.path: `{path}` is empty ({len(files)} file(s) without any content).")
    return filled


def _size(file: Path, where: str) -> int:
    try:
        with file.open("rb"):  # a file that may not be read is found here
            return file.stat().st_size
    except OSError as error:
        raise DataError(
            f"{where}.path: {file} cannot be read: {error.strerror or error}. Check its permissions."
        ) from error


def _in_folder(folder: Path, path: str) -> str:
    """The end of "`path` is a folder", and what to give instead."""
    there = {file.name for file in folder.iterdir()}
    if there & _SAVED and not any(kind_of(Path(name)) for name in there - _SAVED):
        return (
            " saved by datasets.save_to_disk, a form that is not read. Convert it once, in Python: "
            f'datasets.load_from_disk("{path}").to_parquet("{folder.name}.parquet"), of a DatasetDict one split, and give that '
            "file."
        )
    inside = sorted({kind for file in folder.rglob("*") if (kind := kind_of(file)) is not None and file.is_file()})
    if not inside:
        return f", with no data file in it. {_SAYS}"
    deep = not any(kind_of(Path(name)) for name in there)
    globs = " or ".join(f"`{path.rstrip('/')}/{'**/' if deep else ''}*{kind}`" for kind in inside)
    return f", and which of its files are meant is not known. Name them, such as {globs}."


def _nearest_file(pattern: str) -> str:
    folder = Path(pattern).parent
    if not folder.is_dir():
        return f" The folder {folder} does not exist."
    return nearest(Path(pattern).name, (file.name for file in folder.iterdir()))


def open_binary(file: Path) -> IO[bytes]:
    """A file's bytes, decompressed by its ending."""
    opener: Callable[..., IO[bytes]] | None = _OPEN.get(file.suffix.lower())
    return file.open("rb") if opener is None else opener(file, "rb")


def numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its end) of a text file in UTF-8, with or without a byte order mark.

    Raises DataError for what is no UTF-8, with its line, and for a damaged compressed file.
    """
    number = 0
    try:
        with open_binary(file) as lines:
            for number, line in enumerate(lines, start=1):
                if number == 1:
                    _check_signature(file, line)
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if b"\0" in line:
                    raise _not_utf8(file, number, "it has zero bytes, as text in UTF-16 or a damaged file does")
                try:
                    yield number, line.decode("utf-8")
                except UnicodeDecodeError as error:
                    byte = line[error.start]
                    raise _not_utf8(
                        file, number, f"byte 0x{byte:02x} at place {error.start + 1} of the line"
                    ) from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(
            f"{file} cannot be read behind line {number}: {error}. The file is damaged or incomplete: copy or make it anew."
        ) from error


def _check_signature(file: Path, line: bytes) -> None:
    for signature, what in _SIGNATURES.items():
        if line.startswith(signature):
            raise DataError(f"{file} is {what}.")


def _not_utf8(file: Path, number: int, what: str) -> DataError:
    return DataError(
        f"{file}, line {number}, is not UTF-8 ({what}). Save the file as UTF-8, for one with `iconv -f LATIN1 -t UTF-8` if "
        "it is in Latin-1 (ISO 8859-1)."
    )
