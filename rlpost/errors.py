"""Errors that a user is meant to read: what, where, what to do."""

LAST_WORD_S = 10.0
"""How long the other processes wait before they leave over an error that the main one reports: as soon as one process
ends, the launcher ends all others, and the message would be lost."""


def printable(text: str) -> str:
    """The text as it may be written to a terminal: without control characters. What a model, a data set or a reward has written
    must not move the user's cursor, set colours, or hide what was printed before."""
    return "".join(
        c if c.isprintable() or c == "\n" else " " if c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


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
