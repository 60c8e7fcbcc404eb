"""Sampling by vLLM servers: requests to whoever is free, weights to all, and what is done when one is lost."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from rlpost.errors import EngineLost, RolloutError
from rlpost.experience import Completion
from rlpost.policy.names import WeightNames
from rlpost.recipe.sections.rollout import VllmEngine
from rlpost.rollout.engine import Finished, SamplingRequest, SamplingSettings, check_lengths
from rlpost.rollout.fingerprint import compare, from_json
from rlpost.rollout.place import Place
from rlpost.rollout.remote.adapters import Adapters
from rlpost.rollout.remote.broadcast import Sender, buckets
from rlpost.rollout.remote.client import Client, ServerLost, ServerRefused, answers, run
from rlpost.rollout.remote.lanes import Job, Server
from rlpost.rollout.remote.replies import read_sample, read_scores, sampling_body, scoring_body
from rlpost.rollout.remote.round import Round
from rlpost.rollout.remote.weights import WeightFiles
from rlpost.rollout.sync_errors import held_wrongly, incomplete, not_compared

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)
T = TypeVar("T")


class RemoteEngine:
    """Samples with vLLM in other processes. A `RolloutEngine`.

    Seeds, parameters and vLLM's options are those of the engine in process (`rlpost.rollout.vllm_engine`), and so are the
    tokens. Every reply is checked (`rlpost.rollout.remote.replies`): a server that answers what cannot be, or by other weights
    than the learner's last, is treated like one that does not answer.

    With `in_flight` several threads may sample while another brings new weights: those change under running requests, which
    are held, computed again up to where they stand, and go on. Every completion says which weights sampled which tokens.

    A server that is lost while it samples: its requests go to others, with their seeds, or to the process that replaces it,
    which is given the same weights. A sync is one transaction: a server that fails within it is lost, for it may hold a mixture
    of old and new weights. One at a URL may join again at a later sync, which brings all weights.
    """

    name = "vllm"

    def __init__(
        self,
        servers: Sequence[Server],
        engine_settings: VllmEngine,
        names: WeightNames,
        *,
        vocabulary: int,
        max_model_len: int,
        ends: Sequence[int],
        place: Place,
        files: WeightFiles | None,
        in_flight: bool = False,
        sender: Sender | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        """`names`: of the weights that every sync must bring. `files`: in the process that hands weights over.
        `sender`: where weights do not go as files. `adapters`: where LoRA comes by itself; then the first sync alone brings the
        model under it."""
        self.servers, self._settings, self._names, self._place, self._files = (
            servers,
            engine_settings,
            names,
            place,
            files,
        )
        self._vocabulary, self._max_model_len, self._ends = vocabulary, max_model_len, tuple(ends)
        self._in_flight, self._sender, self._adapters = in_flight, sender, adapters
        self._versions = ["default"]  # of the weights, oldest first; vLLM's word for those that it started with
        self._given_at = -math.inf  # when the last sync ended; infinite during one, for a server then samples nothing
        self._mending = threading.RLock()  # held by the thread that replaces a server, or gives all new weights
        self.restarts = 0
        self._closed = False
        self._calls = itertools.count()
        self._first = True  # no sync has come yet
        self._told_unseen = False

    @property
    def version(self) -> str:
        """Of the weights that the servers were given last."""
        return self._versions[-1]

    def sample(
        self, requests: Sequence[SamplingRequest], settings: SamplingSettings, *, finished: Finished | None = None
    ) -> list[Completion]:
        """One completion a request, in the order of the requests. Raises RolloutError for prompts that are too long, EngineLost
        when no server is left."""
        check_lengths([len(request.token_ids) for request in requests], self._max_model_len)
        salt, first = self._salt(), len(self._versions) - 1
        bodies = [
            self._named(sampling_body(request, settings, self._ends, request_id=f"{salt}-{i}", salt=salt))
            for i, request in enumerate(requests)
        ]
        longest = settings.max_completion_tokens
        return self._all(
            bodies,
            lambda reply, _: read_sample(
                reply, vocabulary=self._vocabulary, longest=longest, versions=self._versions[first:]
            ),
            finished,
        )

    def logprobs(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        """For each sequence of n tokens the n - 1 log-probs (nats, temperature 1) of its tokens 1..n-1."""
        check_lengths([len(sequence) for sequence in sequences], self._max_model_len)
        salt = self._salt()
        scored = [i for i, sequence in enumerate(sequences) if len(sequence) > 1]
        bodies = [self._named(scoring_body(sequences[i], request_id=f"{salt}-{i}", salt=salt)) for i in scored]
        scores = self._all(bodies, lambda reply, k: read_scores(reply, sequences[scored[k]], version=self.version))
        out: list[list[float]] = [[] for _ in sequences]
        for i, row in zip(scored, scores, strict=True):
            out[i] = row
        return out

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int = 0) -> None:
        """Gives all servers new weights. Collective. Raises RolloutError when some are missing or the servers cannot take them,
        EngineLost when no server is left."""
        with self._mending:
            self._given_at = math.inf
            try:
                self._load_weights(weights, version)
            finally:
                self._given_at = time.monotonic()

    def _load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        error: RolloutError | None = None
        if self._adapters is not None:
            self._adapters.begin(str(version), self._place)
        if self._sender is not None:
            self._versions.append(str(version))
            self._agree(self._send_all(weights, self._sender))
            return
        if self._files is not None:
            try:
                self._write(weights)
            except RolloutError as found:
                error = found
                for _ in weights:  # the other processes gather every tensor with this one
                    pass
        else:
            for _ in weights:
                pass
        self._versions.append(str(version))
        if self._files is not None and error is None:
            error = self._give_all()
        self._agree(error)

    def _write(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        assert self._files is not None
        if self._adapters is not None:
            weights = self._adapters.taken(weights)
        if self._adapters is None or not self._files.files:
            self._files.write(weights)
            if missing := self._names.missing(self._files.names()):
                raise RolloutError(incomplete(missing, "the rollout servers"))
        for _ in weights:
            pass
        if self._adapters is not None:
            self._adapters.write()

    def close(self) -> None:
        """Ends the worker; servers that the run did not start go on. Closing twice does nothing."""
        self._closed = True  # for a thread that still samples: what it loses now is not replaced
        for server in self.servers:
            if server.process is not None:
                server.process.end()
        if self._files is not None:
            self._files.close()

    def _named(self, body: dict[str, Any]) -> dict[str, Any]:
        """With the name of the adapters, where those come by themselves."""
        return body if self._adapters is None else {**body, "model": self._adapters.name}

    def _salt(self) -> str:
        return f"{self.version}-{self._place.rank}-{os.getpid()}-{next(self._calls)}"

    def _agree(self, error: RolloutError | None) -> None:
        """Every process of the run goes on, or none does; all know which servers are lost."""
        lost = {s.address: s.lost for s in self.servers if s.process is None}
        told = self._place.gather((None if error is None else (type(error), str(error)), lost, self._files is not None))
        for failed, _, _ in told:
            if failed is not None:
                raise error or failed[0](failed[1])
        shared: dict[str, str | None] = next((lost for _, lost, gives in told if gives), {})
        for server in self.servers:
            if server.process is not None:
                continue
            if (why := shared.get(server.address, server.lost)) is None:
                server.come_back()
                server.fresh = False
            else:
                server.lost = why

    def _give_all(self) -> RolloutError | None:
        """The weights to every server, lost ones included: with all weights they may join again."""
        for server in self.servers:
            if server.process is None:
                server.come_back()
        try:
            if self._first:
                self._wait_for_servers()
            run(self._give(self.servers))
            if not self._living():
                self._replace()
        except RolloutError as error:
            return error
        self._first = False
        if self._adapters is not None:
            self._adapters.forget_old()
        elif self._files is not None and not any(s.process for s in self.servers):
            self._files.remove()  # a worker that is replaced is given them again
        return None

    def _wait_for_servers(self) -> None:
        """Before the first sync: learner and servers may have been started at the same time."""
        until, told = time.monotonic() + self._settings.start_s, False
        while absent := [s for s in self.servers if s.process is None and not answers(s.address, deadline_s=5)]:
            if time.monotonic() > until:
                return  # those that are there go on; none at all is an error of the sync
            if not told:
                _log.warning(
                    "Waiting for %s, %g s at most", " and ".join(s.name for s in absent), self._settings.start_s
                )
                told = True
            time.sleep(2)

    async def _give(self, servers: Sequence[Server]) -> None:
        """Start, every file, finish: the same on all servers at once."""
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(self._client(server)) for server in servers]
            await asyncio.gather(*(self._give_one(s, c) for s, c in zip(servers, clients, strict=True)))

    async def _give_one(self, server: Server, client: Client) -> None:
        assert self._files is not None
        if server.lost is not None:
            return
        async with self._transaction(server, client):
            await self._prepare(client)
            if self._adapters is None or server.fresh:
                await client.call("/start_weight_update")
                for path, names in self._files.files:
                    await client.call("/update_weights", {"update_info": {"path": str(path), "names": names}})
                await client.call("/finish_weight_update", {"weight_version": self.version})
                self._compare(await client.rpc("rlpost_held"))
            if self._adapters is not None:
                await self._adapters.give(client, self.version, fresh=server.fresh)
            await self._take_up(server, client)

    async def _prepare(self, client: Client) -> None:
        """Before new weights: nothing is computed until `_take_up`."""
        await client.ping()
        whole = await client.rpc("rlpost_prepare")
        if not all(isinstance(found, dict) and found.get("whole") for found in whole):
            raise ServerRefused(
                "its sampler is built otherwise than in the versions that rlpost knows, and would report log-probs that "
                "the learner cannot compare with its own. Install the vLLM version that rlpost asks for"
            )
        if self._in_flight:  # running requests keep their place, and forget what the old weights have computed
            await client.call("/pause?mode=keep&clear_cache=true")

    async def _take_up(self, server: Server, client: Client) -> None:
        """After new weights."""
        told = await client.call("/weight_info", method="GET")
        if told != {"weight_version": self.version}:
            raise ServerLost(f"after the sync it holds weights {told!r}, not {self.version!r}")
        await client.call("/reset_prefix_cache")
        if self._in_flight or server.fresh:  # an earlier learner may have been killed while it held the server
            await client.call("/resume")
        server.fresh, server.refused = False, None

    @asynccontextmanager
    async def _transaction(self, server: Server, client: Client) -> AsyncIterator[None]:
        """What fails within it loses the server, for it may hold a mixture of old and new weights."""
        try:
            yield
        except (ServerRefused, ServerLost) as error:
            if isinstance(error, ServerRefused) and server.fresh:
                server.refused = str(error)
            self._lose(server, str(error))
            await _send_away(client)

    async def _on_each(self, step: Callable[[Server, Client], Awaitable[object]]) -> None:
        """The same on all servers that live, at once."""

        async def one(server: Server) -> None:
            async with self._client(server) as client, self._transaction(server, client):
                await step(server, client)

        await asyncio.gather(*(one(server) for server in self.servers if server.lost is None))

    def _send_all(self, weights: Iterable[tuple[str, Tensor]], sender: Sender) -> RolloutError | None:
        """The same as writing and `_give_all`, from memory to memory: a layer at a time reaches all servers at once."""
        assert self._files is not None
        for server in self.servers:
            server.come_back()
        rest = self._files.noted(weights)
        try:
            if self._first:
                self._wait_for_servers()
            run(self._on_each(lambda _, client: self._prepare(client)))
            living = [server for server in self.servers if server.lost is None]
            try:
                if living:
                    sender.join([(server.address, server.life) for server in living])
                run(self._on_each(lambda _, client: client.call("/start_weight_update")))
                for bucket in buckets(rest):
                    if not all(server.lost is None for server in living):
                        raise ServerLost("another server of its group was lost")
                    sender.send(bucket)
            except (ServerLost, ServerRefused) as error:
                for server in living:
                    self._lose(server, str(error))
            if missing := [] if not self._living() else self._names.missing(self._files.sent):
                raise RolloutError(incomplete(missing, "the rollout servers"))
            run(self._on_each(self._finish))
            if all(server.lost for server in self.servers):
                self._replace()
        except RolloutError as error:
            return error
        finally:
            for _ in rest:  # the other processes gather every tensor with this one
                pass
        self._first = False
        return None

    async def _finish(self, server: Server, client: Client) -> None:
        await client.call("/finish_weight_update", {"weight_version": self.version})
        self._compare(await client.rpc("rlpost_held"))
        await self._take_up(server, client)

    def _compare(self, told: Sequence[Any]) -> None:
        """What a server's processes hold after an update beside what was sent. Raises ServerRefused where it differs."""
        assert self._files is not None
        try:
            held = [[from_json(row) for row in worker["held"]] for worker in told]
            stale = sorted({name for worker in told for name in worker["stale"]})
            unloaded = sorted({name for worker in told for name in worker["unloaded"]})
        except (KeyError, TypeError, ValueError) as error:
            raise ServerLost(f"what it holds was answered with {told!r:.200}") from error
        found = compare(self._files.sent, held)
        if wrong := [*found.wrong, *unloaded, *stale]:
            raise ServerRefused(held_wrongly(wrong))
        if found.unseen and not self._told_unseen:
            self._told_unseen = True
            _log.warning(not_compared(found.unseen, len(self._files.sent)))

    def _all(
        self,
        bodies: Sequence[dict[str, Any]],
        read: Callable[[Any, int], T],
        finished: Callable[[int, T], None] | None = None,
    ) -> list[T]:
        """What `read` makes of the reply to each of `bodies`, in their order; `finished` is told of each at once. A lost worker
        is replaced. Raises EngineLost when no server is left."""
        job = Job(bodies, read, finished)
        while job.open:
            if not self._living():
                with self._mending:  # two threads may find out at once
                    self._replace()
            run(self._round().answer(job))
        return job.results()

    def _round(self) -> Round:
        return Round(
            self._living(),
            deadline_s=self._settings.deadline_s,
            forget=not self._in_flight,
            given_at=lambda: self._given_at,
            lose=self._lose,
        )

    def _living(self) -> list[Server]:
        for server in self.servers:
            if server.lost is None and server.process is not None and not server.process.alive:
                self._lose(server, "its process ended")
        held = self.version != "default"  # a server that has come back holds other weights until it is given these
        return [server for server in self.servers if server.lost is None and not (server.fresh and held)]

    def _replace(self) -> None:
        """Starts a lost worker again, at most `rollout.engine.restarts` times in the run, and gives it the weights that it had.

        Raises EngineLost when no server is left."""
        while not self._closed and not self._living() and self.restarts < self._settings.restarts:
            worker = next((s for s in self.servers if s.process is not None and s.refused is None), None)
            if worker is None:
                break
            self._restart(worker)
        if not self._living():
            why = "; ".join(f"{server.name}: {server.lost}" for server in self.servers)
            if all(server.refused for server in self.servers):
                raise RolloutError(
                    f"No rollout server takes the learner's weights ({why}). Engine and learner must be built from the same "
                    "`model.path`, and servers of where=server must be able to read rollout.engine.weights_folder. If that is "
                    "so, vLLM cannot replace this model's weights while it runs: use `rollout.engine.type=transformers`."
                )
            raise EngineLost(
                f"No rollout server is left ({why}). {self.restarts} of rollout.engine.restarts={self._settings.restarts} "
                "restarts were used. What was learned is saved: mend the server and start the same command again with "
                "resume=auto."
            )

    def _restart(self, server: Server) -> None:
        """One more process for a worker that is lost; it may be lost again at once."""
        assert server.process is not None
        self.restarts += 1
        _log.warning("%s is replaced (%d of %d)", server.name, self.restarts, self._settings.restarts)
        try:
            server.process.start()
        except ServerLost as error:
            server.lost = str(error)
            return
        server.address = server.process.address
        server.come_back()
        if self.version != "default":
            run(self._give([server]))

    def _lose(self, server: Server, why: str) -> None:
        if server.lost is None:
            server.lost = why
            _log.warning("%s is lost: %s", server.name, why)

    def _client(self, server: Server) -> Client:
        return Client(server.address, deadline_s=self._settings.deadline_s)


async def _send_away(client: Client) -> None:
    """Ends a server that may hold a mixture of weights, so that whoever started it starts it anew."""
    # It ends without an answer. Where it cannot be reached, there is nothing to be sent away: whoever started it finds out.
    with contextlib.suppress(ServerLost, ServerRefused):
        await client.rpc("rlpost_end", deadline_s=5)
