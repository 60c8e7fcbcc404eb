"""Calls of one vLLM server, over a Unix socket or TCP; each has a deadline, and each failure says of which call it is."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import httpx

T = TypeVar("T")


if logging.getLogger("httpx").level == logging.NOTSET:
    logging.getLogger("httpx").setLevel(logging.WARNING)  # else a line for every sample


class ServerLost(Exception):
    """A server that does not answer, not in time, or not what can be true. It is not asked again before it is replaced."""


class ServerRefused(Exception):
    """A server that answered that it cannot do what it was asked for."""


class Client:
    """One server. To be used within one event loop: `async with Client(...)`."""

    def __init__(self, address: str, *, deadline_s: float) -> None:
        """`address`: a URL, or `unix:` and the path of a socket. `deadline_s`: for every call but `generate`."""
        self.address, self.deadline_s = address, deadline_s
        socket = address.removeprefix("unix:") if address.startswith("unix:") else None
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=socket, limits=limits),
            base_url="http://worker" if socket else address.rstrip("/"),
            timeout=None,  # a whole call's deadline is kept below: httpx's are for single packets
            trust_env=False,  # no proxy between learner and server
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    async def call(
        self,
        path: str,
        body: Any = None,
        *,
        deadline_s: float | None = None,
        method: str = "POST",
        json: bool = True,
    ) -> Any:
        """The JSON that `path` answers with; None for an empty answer, or for one that is no JSON (`json` false). Raises
        ServerLost or ServerRefused."""
        seconds = self.deadline_s if deadline_s is None else deadline_s
        try:
            async with asyncio.timeout(seconds):
                reply = await self._http.request(method, path, json=body)
        except TimeoutError:
            raise ServerLost(f"{path} was not answered within {seconds:g} s") from None
        except httpx.HTTPError as error:
            raise ServerLost(f"{path}: {type(error).__name__} {error}".strip()) from error
        return _read(path, reply, json=json)

    async def generate(self, body: dict[str, Any]) -> Any:
        """The reply to one request for tokens. It may take as long as it takes: whether the engine lives, `ping` says."""
        try:
            reply = await self._http.post("/inference/v1/generate", json=body)
        except httpx.HTTPError as error:
            raise ServerLost(f"generate: {type(error).__name__} {error}".strip()) from error
        if reply.status_code >= 500:  # of the server, not of the request
            raise ServerLost(f"generate answered {reply.status_code}: {_words(reply)}")
        return _read("generate", reply)

    async def ping(self) -> list[Any]:
        """What every worker answers. It passes the API server, the engine and its workers; `/health` asks the first alone."""
        return await self.rpc("rlpost_ping")

    async def rpc(self, name: str, *, deadline_s: float | None = None) -> list[Any]:
        """What every worker of the server answers to a method of `rlpost.rollout.remote.worker.Extension`."""
        body = {"method": name, "timeout": self.deadline_s if deadline_s is None else deadline_s}
        reply = await self.call("/collective_rpc", body, deadline_s=deadline_s)
        results = reply.get("results") if isinstance(reply, dict) else None
        if not isinstance(results, list) or not results:
            raise ServerLost(f"{name} was answered with {reply!r}")
        return results


def _read(path: str, reply: httpx.Response, *, json: bool = True) -> Any:
    if reply.status_code >= 500 and ("EngineDead" in reply.text or "EngineCore encountered" in reply.text):
        raise ServerLost(f"{path}: its engine died")
    if reply.status_code != 200:
        raise ServerRefused(f"{path} answered {reply.status_code}: {_words(reply)}")
    if not json or not reply.content.strip():
        return None
    try:
        return reply.json()
    except ValueError as error:
        raise ServerLost(f"{path} answered no JSON ({error})") from error


def _words(reply: httpx.Response) -> str:
    return " ".join(reply.text.split())[:600]


def answers(address: str, *, deadline_s: float) -> bool:
    """Whether the server at `address` is up: its API, its engine and every worker."""

    async def ask() -> bool:
        try:
            async with Client(address, deadline_s=deadline_s) as client:
                await client.ping()
        except (ServerLost, ServerRefused):
            return False
        return True

    return run(ask())


def run(action: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end in a thread with an event loop of its own: the caller may stand in one already."""
    results: list[T] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            results.append(asyncio.run(action))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, name="rlpost-rollout", daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return results[0]
