"""Has a call's requests answered: each by the server with the fewest under way, by another where that one is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

from rlpost.errors import RolloutError
from rlpost.rollout.remote.client import Client, ServerLost, ServerRefused
from rlpost.rollout.remote.lanes import Job, Lane, Server
from rlpost.rollout.remote.replies import BadReply

_HEARTBEATS = 12  # within one deadline


class Round:
    """One round over all open requests of a call, with the servers that live when it begins."""

    def __init__(
        self,
        servers: Sequence[Server],
        *,
        deadline_s: float,
        forget: bool,
        given_at: Callable[[], float],
        lose: Callable[[Server, str], None],
    ) -> None:
        """`deadline_s`: how long an engine may compute nothing. `forget`: whether own servers are to forget cached prefixes
        first. `given_at`: when the last sync ended; infinite during one, for a server then samples nothing. `lose`: is told
        which server is lost, and why."""
        self._servers, self._deadline_s, self._forgets = servers, deadline_s, forget
        self._given_at, self._lose = given_at, lose

    async def answer(self, job: Job[Any]) -> None:
        """Every open request of the job, until all are answered or no server is left."""
        async with AsyncExitStack() as stack:
            clients = [Client(server.address, deadline_s=self._deadline_s) for server in self._servers]
            lanes = [
                Lane(server, await stack.enter_async_context(client))
                for server, client in zip(self._servers, clients, strict=True)
            ]
            beats = [asyncio.create_task(self._heartbeat(lane)) for lane in lanes]
            try:
                # Prefixes that are cached from earlier calls would change which tokens are computed together, and so how they
                # are rounded. Where others use the same server they cannot be removed: salts keep them from being used.
                own = [lane for lane in lanes if lane.server.process is not None and self._forgets]
                await asyncio.gather(*(self._forget(lane) for lane in own))
                await asyncio.gather(*(self._one(job, number, lanes) for number in job.open))
            finally:
                for beat in beats:
                    beat.cancel()
                await asyncio.gather(*beats, return_exceptions=True)

    async def _forget(self, lane: Lane) -> None:
        try:
            await lane.client.call("/reset_prefix_cache")
        except (ServerLost, ServerRefused) as error:
            self._give_up(lane, str(error))

    async def _one(self, job: Job[Any], number: int, lanes: Sequence[Lane]) -> None:
        """Has one request answered, by the server with the fewest under way; where that one is lost, by another.

        The request stays open when no server is left."""
        while living := [lane for lane in lanes if lane.open]:
            lane = min(living, key=lambda lane: lane.running)
            lane.running += 1
            try:
                async with lane.slots:
                    reply = await lane.unless_lost(lane.client.generate(job.bodies[number]))
                job.take(number, reply)
                return
            except ServerRefused as error:
                raise RolloutError(
                    f"{lane.server.name} refused a request: {error}. If it was not started by this run, it must be started "
                    "with this recipe: `rlpost serve RECIPE`."
                ) from error
            except BadReply as error:
                self._give_up(lane, f"a reply cannot be right: {error}")
            except ServerLost as error:
                self._give_up(lane, str(error))
            finally:
                lane.running -= 1

    async def _heartbeat(self, lane: Lane) -> None:
        """Asks the engine, through all of its processes, whether it lives and works, for as long as it is waited for."""
        deadline, steps, at = self._deadline_s, -1, time.monotonic()
        while lane.open:
            await asyncio.sleep(deadline / _HEARTBEATS)
            try:
                told = await lane.client.ping()
            except (ServerLost, ServerRefused) as error:
                self._give_up(lane, str(error))
                break
            made = sum(worker.get("steps", 0) for worker in told if isinstance(worker, dict))
            if made != steps or not lane.running:
                steps, at = made, time.monotonic()
            elif time.monotonic() - max(at, self._given_at()) > deadline:
                self._give_up(
                    lane, f"it answers, and computes nothing: {lane.running} requests wait since {deadline:g} s"
                )
        lane.lost.set()  # another thread may have found out

    def _give_up(self, lane: Lane, why: str) -> None:
        if lane.open:
            self._lose(lane.server, why)
        lane.lost.set()
