"""What runs inside a scoring process: loads the reward functions once, calls them, and reports plain data."""

from __future__ import annotations

import asyncio
import faulthandler
import math
import numbers
import os
import signal
import threading
import time
import traceback
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from rlpost.errors import RewardError
from rlpost.experience import Outcome
from rlpost.scoring.contract import Call, Reply, RewardFunction, Unparsable
from rlpost.scoring.load import load_reward

MAX_DETAIL = 400  # characters of an error message that are kept
GRACE_S = 15.0  # by how much a process may outlive its deadline when nobody is left to kill it
CHECK_PARENT_S = 0.5

_WAY_OUT = (
    "Let it `return` a list with a number for every entry of `completions`, in their order, None where it does not apply, and "
    "try it alone with `rlpost rewards try`"
)

_rewards: list[RewardFunction | str] = []  # a string is why the function could not be loaded here


def initialize(specs: Sequence[str]) -> None:
    """Sets a scoring process up. Never raises: a function that cannot be loaded is reported by its first call."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # dies at once, also inside C code
    os.setpgid(0, 0)  # the whole group is killed with this process: see Worker.terminate
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    for spec in specs:
        try:
            _rewards.append(load_reward(spec))
        except RewardError as error:
            _rewards.append(str(error))


def run(calls: Sequence[Call]) -> list[Reply]:
    """Makes the calls: one call of a plain function, or any number of one async function, concurrently."""
    reward = _rewards[calls[0].reward]
    if isinstance(reward, str):
        return [Reply(breach=reward) for _ in calls]
    with Path(os.devnull).open("w") as nowhere:
        # A C thread, so it fires even where the interpreter's lock is held; for the case that the trainer is gone.
        faulthandler.dump_traceback_later(max(c.deadline_s for c in calls) * 2 + GRACE_S, exit=True, file=nowhere)
        try:
            if reward.is_async:
                return asyncio.run(_run_async(reward, calls))
            return [_run_plain(reward, call) for call in calls]
        finally:
            faulthandler.cancel_dump_traceback_later()


def ready() -> str:
    """Says that the process is up."""
    return "ready"


def _run_plain(reward: RewardFunction, call: Call) -> Reply:
    logged: list[tuple[str, float]] = []
    start = time.perf_counter()
    try:
        returned = reward.function(**_keywords(reward, call, logged))
        return _reply(reward, call, returned, logged, start)
    except BaseException as error:  # whatever it is, sys.exit included, it is the reward function's
        return _failure(error, call, start)


async def _run_async(reward: RewardFunction, calls: Sequence[Call]) -> list[Reply]:
    async def one(call: Call) -> Reply:
        logged: list[tuple[str, float]] = []
        start = time.perf_counter()
        coroutine = cast(Awaitable[Any], reward.function(**_keywords(reward, call, logged)))
        timer = asyncio.timeout(call.deadline_s)
        try:
            async with timer:
                returned = await coroutine
            return _reply(reward, call, returned, logged, start)
        except Exception as error:
            if timer.expired():  # and not a TimeoutError of the function's own
                return _same(call, Outcome.TIMED_OUT, f"no answer in {call.deadline_s:g} s", start)
            return _failure(error, call, start)

    return list(await asyncio.gather(*(one(call) for call in calls)))


def _keywords(reward: RewardFunction, call: Call, logged: list[tuple[str, float]]) -> dict[str, Any]:
    """The call's keywords, with those added that exist only in this process."""

    def log_metric(name: str, value: float) -> None:
        logged.append((str(name), float(value)))

    def log_extra(column: str, values: list[Any]) -> None:
        """Accepted and dropped: columns of TRL's own completions table."""

    made = {"trainer_state": call.state, "log_metric": log_metric, "log_extra": log_extra}
    return {**call.keywords, **{name: value for name, value in made.items() if reward.wants(name)}}


def _reply(reward: RewardFunction, call: Call, returned: Any, logged: list[tuple[str, float]], start: float) -> Reply:
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
    return Outcome.SCORED.value, number, ""


def _failure(error: BaseException, call: Call, start: float) -> Reply:
    if isinstance(error, Unparsable):
        return _same(call, Outcome.UNPARSABLE, _short(str(error)), start)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if len(frames) > 1 else ""
    last_line = traceback.format_exception_only(error)[-1].strip()
    return _same(call, Outcome.CRASHED, _short(last_line) + where, start)


def _same(call: Call, outcome: Outcome, detail: str, start: float) -> Reply:
    return Reply(((outcome.value, None, detail),) * call.size, seconds=time.perf_counter() - start)


def _short(text: str) -> str:
    return text if len(text) <= MAX_DETAIL else text[: MAX_DETAIL - 3] + "..."


def _die_with(parent: int) -> None:
    """Ends this process, and those it started, soon after the trainer is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(CHECK_PARENT_S)
    os.killpg(0, signal.SIGKILL)
