"""Errors that a user is meant to read: what, where, what to do."""

from __future__ import annotations

import errno
import os
import re

LAST_WORD_S = 10.0
"""How long the other processes wait before they leave over an error that the main one reports: as soon as one process
ends, the launcher ends all others, and the message would be lost."""


def printable(text: str) -> str:
    """The text as it may be written to a terminal: without control characters. What a model, a data set or a reward has written
    must not move the user's cursor, set colours, or hide what was printed before."""
    return "".join(
        c if c.isprintable() or c == "\n" else " " if c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


_WORDS = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the file system or a limit (ulimit -f) allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EIO: "the disk reports an error (input/output error)",
    errno.ENOENT: "its folder does not exist any more",
    errno.ESTALE: "its folder does not exist any more on the file server",
    errno.EMFILE: "this process has too many files open (ulimit -n)",
    errno.ENFILE: "the machine has too many files open",
}
_OF_RUST = re.compile(r"\(os error (\d+)\)")


def system_error(error: BaseException) -> OSError | None:
    """The operating system's error behind whatever a library raised; None where there is none. Libraries wrap it (torch, which
    raises a RuntimeError over it) or write its number into a text (safetensors)."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        if isinstance(link, OSError) and link.errno is not None:
            return link
        if number := _OF_RUST.search(str(link)):
            return OSError(int(number[1]), os.strerror(int(number[1])))
        seen.add(id(link))
        link = link.__cause__ or link.__context__
    return None


def in_words(error: OSError) -> str:
    """What an error of the operating system means for whoever writes a file, with the file's name where it is known."""
    said = _WORDS.get(error.errno or 0)
    if said is None:
        return str(error)
    return f"{said} ({error.filename})" if error.errno in (errno.ENOENT, errno.ESTALE) and error.filename else said


class RlpostError(Exception):
    """A problem that the user can fix. The CLI prints its message as one paragraph and exits with `exit_code`."""

    exit_code = 2


class RecipeError(RlpostError):
    """The recipe is wrong, or asks for something impossible."""


class DataError(RlpostError):
    """The data set is missing, empty, or lacks what the recipe names."""


class RewardError(RlpostError):
    """A reward function cannot be loaded, or breaks its contract."""


class RolloutError(RlpostError):
    """The rollout engine cannot start, or disagrees with the learner."""


class EngineLost(RolloutError):
    """No rollout server is left that could go on. What was learned is saved: started again, the run goes on from there."""

    exit_code = 75  # of BSD's sysexits: a failure that may pass, so try again


class CheckpointError(RlpostError):
    """A checkpoint cannot be written or read."""

    exit_code = 3


class TrainingError(RlpostError):
    """Training cannot go on; the last good checkpoint is intact."""

    exit_code = 4
