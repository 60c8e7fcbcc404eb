"""Large data sets as tokenised prompts on disk: made once, in one pass, by the first process that asks, and read by all.

What decides of a prompt is part of a table's name (files with size and times, the section of the recipe, tokenizer, template,
versions), so a table is never wrong, only unused. Small data sets stay in memory.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import date
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlpost.data.dataset import RowStream
from rlpost.data.packaged import cache_folder
from rlpost.data.rows import Row
from rlpost.data.table import PromptTable, Unkept, write_table
from rlpost.data.template import ChatTemplate
from rlpost.errors import DataError
from rlpost.experience import Prompt
from rlpost.recipe.sections.data import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FORM = 1  # of the tables: counted up when what is written changes
KEPT = 16  # tables of other data sets, the last used
LEFT_S = 86400.0  # what a killed run left half written is cleared away after a day
WAIT_S = 7200.0  # for the process that makes the table: a hundred million rows
_UNLIKE_ANY_ROW = ("held_out", "max_prompt_tokens", "too_long", "shuffle", "train", "eval")


def kept_prompts(
    stream: RowStream,
    data: DataSection,
    template: ChatTemplate,
    tokenised: Callable[[Iterable[Row], ChatTemplate], Iterator[Prompt]],
) -> PromptTable | None:
    """All prompts of a large data set, tokenised by `tokenised` unless a table of them is there; None where they cannot be
    kept on disk. Raises DataError for what is wrong with the data."""
    name = _name_of(stream, data, template)
    if name is None:
        return None
    folder = cache_folder() / "prompts"
    try:
        table = _opened(folder / name) or _made(folder, name, stream, template, tokenised)
    except (OSError, NotImplementedError) as error:  # a disk that is full or read-only, or one without locks
        logger.warning("%s cannot hold the prompts (%s): every process keeps them in memory", folder, error)
        return None
    except Unkept as error:
        logger.info("The prompts of %s stay in memory: %s", stream.name, error)
        return None
    template.learn(table.about["template"])
    return table


def _made(
    folder: Path,
    name: str,
    stream: RowStream,
    template: ChatTemplate,
    tokenised: Callable[[Iterable[Row], ChatTemplate], Iterator[Prompt]],
) -> PromptTable:
    """Makes the table, or waits for the process that does."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".making_{name}"
    try:
        with FileLock(folder / f"{name}.lock", timeout=WAIT_S):
            if (table := _opened(folder / name)) is not None:  # another process was faster
                return table
            own = template.anew()
            shutil.rmtree(scratch, ignore_errors=True)  # left by a process that was killed
            scratch.mkdir()
            try:
                write_table(
                    scratch,
                    stream.name,
                    tokenised(stream, own),
                    lambda: {"columns": stream.others, "template": own.learned()},
                )
                shutil.rmtree(folder / name, ignore_errors=True)  # one that could not be opened
                scratch.rename(folder / name)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            _clear(folder, name)
            return PromptTable.open(folder / name)
    except Timeout as error:
        raise DataError(
            f"{stream.where}: another process has been preparing the prompts of `{stream.name}` for over {WAIT_S:.0f} s (lock "
            f"{error.lock_file}). End it, or set RLPOST_CACHE to another folder."
        ) from error


def _opened(folder: Path) -> PromptTable | None:
    """The table in a folder, noted as used; None where there is none that can be read."""
    if not folder.is_dir():
        return None
    try:
        table = PromptTable.open(folder)
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s cannot be read (%s) and is made anew", folder, error)
        return None
    with suppress(OSError):
        os.utime(folder)
    return table


def _clear(folder: Path, name: str) -> None:
    """Removes what was not used for the longest time. A process that has a table open keeps what it has."""
    tables = sorted((p for p in folder.iterdir() if p.is_dir() and p.name[0] != "."), key=lambda p: -p.stat().st_mtime)
    old = time.time() - LEFT_S
    left = [p for p in folder.glob(".making_*") if p.stat().st_mtime < old]
    for path in (*(p for p in tables[KEPT:] if p.name != name), *left):
        shutil.rmtree(path, ignore_errors=True)
        (folder / f"{path.name}.lock").unlink(missing_ok=True)


def _name_of(stream: RowStream, data: DataSection, template: ChatTemplate) -> str | None:
    """A hash of all that decides of the prompts; None where that is not known."""
    rows, words = stream.identity(), _tokenizer_of(template.tokenizer)
    if rows is None or words is None:
        return None
    source = template.tokenizer.chat_template
    what: list[Any] = [
        FORM,
        rows,
        stream.source.model_dump(mode="json"),
        data.model_dump(mode="json", exclude=set(_UNLIKE_ANY_ROW)),
        words,
        source,
        [version(package) for package in ("transformers", "tokenizers", "jinja2")],
    ]
    if "strftime_now" in str(source):
        what.append(date.today().isoformat())
    return blake2b(json.dumps(what, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _tokenizer_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A hash of a tokenizer; None for one that is a program of its own."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    told = f"{type(tokenizer).__name__}\0{backend.to_str()}\0{tokenizer.special_tokens_map}\0{tokenizer.init_kwargs}"
    return blake2b(told.encode(), digest_size=16).hexdigest()
