"""One call of a reward function: its keywords, and what became of it as plain data."""

from __future__ import annotations

import contextlib
import math
import numbers
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlpost.experience import Outcome
from rlpost.scoring import formats
from rlpost.scoring.contract import LARGEST_REWARD, Call, LoadedReward, Reply, Unparsable
from rlpost.scoring.files import shown_name
from rlpost.scoring.formats import Chat, explain, misread

MAX_DETAIL = 400  # characters of an error message that are kept

_WAY_OUT = (
    "Let it `return` a list with a number for every entry of `completions`, in their order, None where it does not apply, and "
    "try it alone with `rlpost rewards try`"
)

_FORMATS = formats.__file__  # whose errors are about the line that used a completion


def run_plain(reward: LoadedReward, call: Call) -> Reply:
    """One call of a plain function."""
    logged: list[tuple[str, float]] = []
    start = time.perf_counter()
    try:
        given = keywords(reward, call, logged)
        with forks_ended():
            return reply(call, given, reward.function(**given), logged, start)
    except BaseException as error:  # whatever it is, sys.exit included, it is the reward function's
        return failure(error, call, start)


@contextlib.contextmanager
def forks_ended() -> Iterator[None]:
    """Around a reward's code: a child that it forked ends where it leaves this code, as at the end of a program, and does
    not answer beside its parent."""
    process, code = os.getpid(), 0
    try:
        yield
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except BaseException:
        code = 1
        raise
    finally:
        if os.getpid() != process:
            with contextlib.suppress(BaseException):  # either may be closed, or gone
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)


def keywords(reward: LoadedReward, call: Call, logged: list[tuple[str, float]]) -> dict[str, Any]:
    """The call's keywords, with those added that exist only in this process."""

    def log_metric(name: str, value: float) -> None:
        logged.append((str(name), float(value)))

    def log_extra(column: str, values: list[Any]) -> None:
        """Accepted and dropped: columns of TRL's own completions table."""

    made = {"trainer_state": call.state, "log_metric": log_metric, "log_extra": log_extra}
    given = {**call.keywords, **{name: value for name, value in made.items() if reward.wants(name)}}
    if call.guarded:
        for name in {"prompts", "completions"} & given.keys():
            given[name] = [Chat(one) if isinstance(one, list) else one for one in given[name]]
    return given


def reply(call: Call, given: Mapping[str, Any], returned: Any, logged: list[tuple[str, float]], start: float) -> Reply:
    """What a function returned, checked and as plain data."""
    if not isinstance(returned, Iterable) or isinstance(returned, str | bytes | Mapping):
        got = "None" if returned is None else f"a {type(returned).__name__}"
        return Reply(
            breach=f"returned {got} where a list with one number (or None) a completion was expected. {_WAY_OUT}"
        )
    values = list(returned)
    if len(values) != call.size:
        return Reply(
            breach=f"returned {len(values)} values, but {call.size} were expected: one a completion. {_WAY_OUT}"
        )
    if why := misread(given.get("completions")):
        return Reply(breach=why)
    verdicts = tuple(_verdict(value) for value in values)
    return Reply(verdicts, logged=tuple(logged), seconds=time.perf_counter() - start)


def _verdict(value: Any) -> tuple[str, float | None, str]:
    """The outcome of one returned value; bool, int, and the scalars of numpy and torch are numbers."""
    if value is None:
        return Outcome.NOT_APPLICABLE.value, None, ""
    number = value
    try:
        if not isinstance(number, numbers.Number) and callable(getattr(number, "item", None)):
            number = number.item()
        if not isinstance(number, numbers.Number):
            return Outcome.UNPARSABLE.value, None, f"returned {_short(repr(value))}, which is no number"
        number = float(number)  # type: ignore[arg-type]  # complex numbers raise
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        return Outcome.UNPARSABLE.value, None, f"returned {type(value).__name__}, which is no number: {error}"
    if not math.isfinite(number):
        return Outcome.UNPARSABLE.value, None, f"returned {number}"
    if abs(number) > LARGEST_REWARD:
        why = f"returned {number}, larger than {LARGEST_REWARD:g} (see docs/rewards.md)"
        return Outcome.UNPARSABLE.value, None, why
    return Outcome.SCORED.value, number, ""


def failure(error: BaseException, call: Call, start: float) -> Reply:
    """The outcome of a call that raised `error`."""
    if isinstance(error, Unparsable):
        return same(call, Outcome.UNPARSABLE, _short(str(error)), start)
    frames = [one for one in traceback.extract_tb(error.__traceback__) if one.filename != _FORMATS]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if len(frames) > 1 else ""
    last_line = shown_name(traceback.format_exception_only(error)[-1].strip())
    return same(call, Outcome.CRASHED, _short(last_line) + where + explain(error, last_line), start)


def same(call: Call, outcome: Outcome, detail: str, start: float) -> Reply:
    """The same outcome for all completions of a call."""
    return Reply(((outcome.value, None, detail),) * call.size, seconds=time.perf_counter() - start)


def _short(text: str) -> str:
    """A message that any file and terminal can take: not too long, and without characters that have no UTF-8."""
    text = text[: MAX_DETAIL + 1].encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= MAX_DETAIL else text[: MAX_DETAIL - 3] + "..."
