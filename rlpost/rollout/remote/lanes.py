"""What one call asks of the servers: its requests, and each server as the call knows it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar

from rlpost.rollout.remote.client import Client, ServerLost
from rlpost.rollout.remote.process import ServerProcess

T = TypeVar("T")
_CONNECTIONS = 400  # to one server at once: a process may open about a thousand files


class Server:
    """One server as this process knows it."""

    def __init__(self, address: str, process: ServerProcess | None = None) -> None:
        self.address, self.process = address, process
        self.lost: str | None = None  # why it is not to be asked
        self.life = 0  # how often it has come back; what a call learned of an earlier life says nothing of this one
        self.fresh = True  # whether it has taken no weights yet
        self.refused: str | None = (
            None  # why it refused the weights when it was fresh: a new process would refuse them, too
        )

    @property
    def name(self) -> str:
        return "the rollout worker" if self.process else f"the rollout server {self.address}"

    def come_back(self) -> None:
        """It may be asked again once it has been given weights; what was asked of it before is lost."""
        if self.lost is not None:
            self.lost, self.life, self.fresh = None, self.life + 1, True


class Job(Generic[T]):
    """Requests of one call, and what was read of their replies."""

    def __init__(
        self,
        bodies: Sequence[dict[str, Any]],
        read: Callable[[Any, int], T],
        finished: Callable[[int, T], None] | None = None,
    ) -> None:
        self.bodies, self._read, self._finished = bodies, read, finished
        self.replies: dict[int, T] = {}

    def take(self, number: int, reply: Any) -> None:
        """A server's reply to request `number`. Raises BadReply when it cannot be right."""
        taken = self.replies[number] = self._read(reply, number)
        if self._finished is not None:
            self._finished(number, taken)

    @property
    def open(self) -> list[int]:
        return [i for i in range(len(self.bodies)) if i not in self.replies]

    def results(self) -> list[T]:
        return [self.replies[i] for i in range(len(self.bodies))]


class Lane:
    """A server during one call, for as long as it lives."""

    def __init__(self, server: Server, client: Client) -> None:
        self.server, self.client, self.life = server, client, server.life
        self.running = 0
        self.slots = asyncio.Semaphore(_CONNECTIONS)
        self.lost = asyncio.Event()

    @property
    def open(self) -> bool:
        """Whether the server is the one that the call began with, as far as any thread knows."""
        return self.server.lost is None and self.server.life == self.life

    async def unless_lost(self, call: Awaitable[Any]) -> Any:
        """What `call` gives. Raises ServerLost as soon as the server is found lost by anybody."""
        mine, lost = asyncio.ensure_future(call), asyncio.ensure_future(self.lost.wait())
        try:
            await asyncio.wait((mine, lost), return_when=asyncio.FIRST_COMPLETED)
            if mine.done():
                return mine.result()
            raise ServerLost(self.server.lost or "it was lost")
        finally:
            for task in (mine, lost):
                task.cancel()
            await asyncio.gather(mine, lost, return_exceptions=True)
