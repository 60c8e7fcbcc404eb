"""Weights by broadcast: ranks, whole layers, what is asked of servers in which order; and the path itself, on CPU.

Between GPUs the group is NCCL's; here it is vLLM's own for small things, with the same calls. What needs GPUs is marked so.
"""

from __future__ import annotations

import threading

import pytest
import torch
from test_rollout_remote import SECTION, SETTINGS, expected, free_port, make, requests, saved, versions  # noqa: F401

from rlpost.errors import EngineLost
from rlpost.rollout.place import Place
from rlpost.rollout.remote import broadcast as module
from rlpost.rollout.remote.broadcast import Sender, broadcast, buckets, make_group, offsets, update_info
from rlpost.rollout.remote.client import Client, ServerLost
from rlpost.rollout.remote.make import make_remote_engine, server_process, start
from rlpost.rollout.served import Served


def test_every_worker_of_every_server_has_a_rank_of_its_own():
    assert offsets([1]) == ([1], 2)
    assert offsets([2, 1, 4]) == ([1, 3, 4], 8)
    sizes = [2, 8, 1]
    first, size = offsets(sizes)
    ranks = [0, *(rank + i for rank, n in zip(first, sizes, strict=True) for i in range(n))]
    assert ranks == list(range(size))


def test_buckets_end_where_a_layer_ends_and_one_tensor_is_whole_at_a_time(monkeypatch):
    """The tensors of a sharded learner are gathered into one buffer, which the next overwrites."""
    monkeypatch.setattr(module, "BUCKET_BYTES", 100)
    buffer, alive = torch.empty(8), []

    def gathered():
        names = [
            "embed.weight",
            *(f"model.layers.{i}.{part}.{e}.w" for i in (0, 1, 10) for part in "ab" for e in (0, 1)),
            "norm",
        ]
        for i, name in enumerate(names):
            alive.append(name)
            yield name, buffer.fill_(i)

    found = []
    for bucket in buckets(gathered()):
        assert len(alive) - sum(map(len, found)) <= len(bucket) + 1, "nothing beyond the next tensor was asked for"
        found.append(bucket)
    layers = [sorted({".".join(name.split(".")[:3]) for name, _ in bucket}) for bucket in found]
    assert layers == [["embed.weight", "model.layers.0"], ["model.layers.1"], ["model.layers.10"], ["norm"]]
    values = [float(tensor[0]) for bucket in found for _, tensor in bucket]
    assert values == list(range(14))
    assert all(tensor.eq(tensor[0]).all() for bucket in found for _, tensor in bucket)


def test_what_is_said_of_tensors_is_what_the_workers_engine_reads():
    pytest.importorskip("vllm")
    from rlpost.rollout.remote.worker import GroupEngine

    bucket = [("a", torch.zeros(2, 3)), ("b", torch.zeros(4, dtype=torch.bfloat16))]
    engine = object.__new__(GroupEngine)
    told = engine.parse_update_info(update_info(bucket))
    assert (told.names, told.dtypes, told.shapes) == (["a", "b"], ["float32", "bfloat16"], [[2, 3], [4]])
    init = engine.parse_init_info({"address": "h", "port": 1, "rank_offset": 3, "world_size": 8})
    assert (init.rank_offset, init.world_size) == (3, 8)
    with pytest.raises(ValueError):
        engine.parse_init_info({"port": 1})


class Group:
    """Takes note of what is sent."""

    def __init__(self) -> None:
        self.sent: list[float] = []

    def broadcast(self, tensor, src):
        assert src == 0
        self.sent.append(float(tensor.flatten()[0]))
        return tensor


def test_servers_are_asked_in_order_and_a_group_is_made_once(monkeypatch):
    asked, made = [], []

    async def call(self, path, body=None, *, deadline_s=None, method="POST"):
        asked.append((self.address, path, body))
        return {"world_size": 2 if self.address.endswith("1") else 3} if path == "/get_world_size" else None

    def group(address, port, rank, world_size, device):
        made.append((port, rank, world_size))
        return Group()

    monkeypatch.setattr(Client, "call", call)
    monkeypatch.setattr(module, "make_group", group)
    sender = Sender(torch.device("cpu"), 5.0)
    both = [("http://127.0.0.1:1", 0), ("http://127.0.0.1:2", 0)]
    sender.join(both)
    sender.join(both)
    [(port, rank, world_size)] = made
    assert (rank, world_size) == (0, 6)
    told = {address: body["init_info"] for address, path, body in asked if path == "/init_weight_transfer_engine"}
    assert [info["rank_offset"] for info in told.values()] == [1, 3]
    assert all(info["port"] == port and info["world_size"] == 6 for info in told.values())
    asked.clear()
    sender.send([("a", torch.full((2,), 1.0)), ("b", torch.full((2,), 2.0))])
    assert [path for _, path, _ in asked] == ["/update_weights"] * 2 and sender._group.sent == [1.0, 2.0]
    sender.join([("http://127.0.0.1:1", 0), ("http://127.0.0.1:2", 1)])
    assert len(made) == 2, "one of them has come back: another group"


def test_a_broadcast_that_hangs_or_fails_is_an_error_within_the_deadline(monkeypatch):
    release = threading.Event()

    class Hanging(Group):
        def broadcast(self, tensor, src):
            release.wait(60)

    class Failing(Group):
        def broadcast(self, tensor, src):
            raise RuntimeError("unhandled system error")

    async def call(self, *_, **__):
        return None

    monkeypatch.setattr(Client, "call", call)
    for group, words in ((Hanging(), "did not end within 0.2 s"), (Failing(), "unhandled system error")):
        sender = Sender(torch.device("cpu"), 0.2)
        sender._group, sender._members = group, (("http://127.0.0.1:1", 0),)
        with pytest.raises(ServerLost, match=words):
            sender.send([("a", torch.zeros(1))])
        assert sender._members == (), "the next sync makes another group"
    release.set()


@pytest.fixture(scope="module")
def servers(saved, tmp_path_factory):  # noqa: F811
    """Two, at ports of this machine, which take weights by broadcast."""
    section = SECTION.model_copy(update={"deadline_s": 60.0, "start_s": 300.0})
    served = Served(saved[0], 100, 0, False, True, "nccl")
    logs = tmp_path_factory.mktemp("logs")
    made = []
    try:
        for _ in range(2):
            port = free_port()
            process = server_process(section, served, log=logs / f"{port}.log", address=f"127.0.0.1:{port}")
            made.append(process)
            start(process, section, served)
        urls = tuple(process.address for process in made)
        engine = make_remote_engine(section.model_copy(update={"where": "server", "urls": urls}), served, (), Place())
        yield engine, made
        engine.close()
    finally:
        for process in made:
            process.end()


@pytest.mark.engine
@pytest.mark.slow
def test_two_servers_take_weights_from_the_learners_memory(servers, expected, saved, monkeypatch):  # noqa: F811
    """The completions are those of a colocated engine with the same weights; fingerprints are compared as with files."""
    engine, processes = servers
    monkeypatch.setattr(module, "BUCKET_BYTES", 2**14)
    for number, (model, (completions, scores)) in enumerate(zip(versions(saved[1]), expected, strict=True)):
        engine.load_weights(model.named_parameters(), number)
        assert not list(engine._files.folder.iterdir()), "no file is written"
        assert not any(server.lost for server in engine.servers)
        found = engine.sample(requests(), SETTINGS)
        assert [c.token_ids for c in found] == [c.token_ids for c in completions]
        for got, wanted in zip(engine.logprobs([r.token_ids for r in requests()]), scores, strict=True):
            assert got == pytest.approx(wanted, abs=1e-4)
    processes[0].end()
    engine.load_weights(saved[1].named_parameters(), 2)
    assert [server.lost is None for server in engine.servers] == [False, True], "found lost before the group is made"
    found = engine.sample(requests(), SETTINGS)
    assert [c.token_ids for c in found] == [c.token_ids for c in expected[0][0]]
    send = Sender.send

    def dies(self, bucket):
        processes[1].end()
        return send(self, bucket)

    monkeypatch.setattr(Sender, "send", dies)
    with pytest.raises(EngineLost, match="No rollout server is left"):
        engine.load_weights(saved[1].named_parameters(), 3)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_tensor_goes_from_one_gpu_to_another():
    """The group itself; never run so far."""
    import multiprocessing

    port = free_port()
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    other = context.Process(target=_receive, args=(port, answers))
    other.start()
    group = make_group("127.0.0.1", port, 0, 2, torch.device("cuda:0"))
    broadcast(group, torch.arange(1000.0, device="cuda:0"))
    torch.cuda.synchronize()
    assert answers.get(timeout=120) == float(torch.arange(1000.0).sum())
    other.join(60)


def _receive(port, answers) -> None:
    torch.cuda.set_device(1)
    group = make_group("127.0.0.1", port, 1, 2, torch.device("cuda:1"))
    found = broadcast(group, torch.empty(1000, device="cuda:1"))
    torch.cuda.synchronize()
    answers.put(float(found.sum()))
