"""Runs calls of an async reward function at the same time, in one event loop that lasts as long as the process.

It lasts because TRL's does: a client or a semaphore that a reward makes once belongs to the loop in which it was made.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import replace
from typing import Any, cast

from rlpost.experience import Outcome
from rlpost.scoring.contract import Call, LoadedReward, Reply
from rlpost.scoring.outcome import failure, forks_ended, keywords, reply, same

_loops: list[asyncio.AbstractEventLoop] = []  # the one in use


def run_async(reward: LoadedReward, calls: Sequence[Call]) -> list[Reply]:
    """All calls' replies, in their order.

    A call that exits, or stops, closes or cancels what all calls run in, takes those with it that have not come back yet.
    Where there are several, or were others in this loop before (which may have left a timer or a task), who it was is not
    known: their replies are `disturbed`.
    """
    done: dict[int, Reply] = {}
    shared = len(calls) > 1 or bool(_loops)
    loop, start = _loop(), time.perf_counter()
    why: BaseException | None = None
    try:
        loop.run_until_complete(_run_all(reward, calls, done, shared=shared))
    except BaseException as error:  # SystemExit of a task that the function started, a stopped loop, a cancelled task
        why, done = error, dict(done)
        _discard(loop)
    lost = why or asyncio.CancelledError()
    return [done.get(i) or replace(failure(lost, call, start), disturbed=shared) for i, call in enumerate(calls)]


async def _run_all(reward: LoadedReward, calls: Sequence[Call], done: dict[int, Reply], *, shared: bool) -> None:
    async def one(i: int, call: Call) -> None:
        outcome = await _run_one(reward, call)
        done[i] = replace(outcome, disturbed=outcome.disturbed and shared)

    # A function may have cancelled its own task just before it came back: no reply then, and no error here.
    await asyncio.gather(*(one(i, call) for i, call in enumerate(calls)), return_exceptions=True)


async def _run_one(reward: LoadedReward, call: Call) -> Reply:
    logged: list[tuple[str, float]] = []
    start = time.perf_counter()
    timer = asyncio.timeout(call.deadline_s)
    try:
        given = keywords(reward, call, logged)
        async with timer, _forks_ended():
            returned = await cast(Awaitable[Any], reward.function(**given))
        return reply(call, given, returned, logged, start)
    except BaseException as error:
        if isinstance(error, TimeoutError) and timer.expired():  # and not a TimeoutError of the function's own
            return same(call, Outcome.TIMED_OUT, f"no answer in {call.deadline_s:g} s", start)
        # Who cancelled this call, itself or another one, cannot be seen from here.
        return replace(failure(error, call, start), disturbed=isinstance(error, asyncio.CancelledError))


@contextlib.asynccontextmanager
async def _forks_ended() -> AsyncIterator[None]:
    with forks_ended():
        yield


def _loop() -> asyncio.AbstractEventLoop:
    if not _loops or _loops[0].is_closed():
        _loops[:] = [asyncio.new_event_loop()]
    return _loops[0]


def _discard(loop: asyncio.AbstractEventLoop) -> None:
    """Closes a loop in which a call went wrong, with what is left of it; the next job gets a fresh one."""
    _loops.clear()
    loop.set_exception_handler(lambda _loop, _context: None)  # what went wrong is in the outcomes
    with contextlib.suppress(BaseException):
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        waiting = asyncio.wait(left, timeout=1.0)
        try:
            loop.run_until_complete(waiting)
        finally:
            waiting.close()
    with contextlib.suppress(BaseException):
        loop.close()
