"""Weights from the learner's memory into that of every worker of every server, by broadcast: NCCL between GPUs.

The learner is rank 0 of one group; each server's workers follow, those of the second after those of the first. A group cannot
lose a member: when one does not take part, all wait in vain, so a transfer that fails loses all servers of the group, and the
run goes on from its checkpoint. On a CPU the group is vLLM's own for small things, which carries tensors too: for tests.
"""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rlpost.rollout.remote.client import Client, ServerLost, ServerRefused, run

if TYPE_CHECKING:
    from torch import Tensor

BUCKET_BYTES = 2**28
Bucket = list[tuple[str, "Tensor"]]


def offsets(sizes: Sequence[int]) -> tuple[list[int], int]:
    """The rank of each server's first worker, and the size of the group; `sizes`: how many workers each has."""
    found, rank = [], 1
    for size in sizes:
        found.append(rank)
        rank += size
    return found, rank


def buckets(weights: Iterable[tuple[str, Tensor]]) -> Iterator[Bucket]:
    """Copies of whole layers together, of at least `BUCKET_BYTES` where there is so much: vLLM keeps what it is given of a
    layer until the layer is complete."""
    bucket: Bucket = []
    size, layer = 0, None
    for name, tensor in weights:
        if size >= BUCKET_BYTES and _layer(name) != layer:
            yield bucket
            bucket, size = [], 0
        layer = _layer(name)
        bucket.append((name, tensor.detach().clone().contiguous()))  # the next one may be gathered into the same memory
        size += bucket[-1][1].nbytes
    if bucket:
        yield bucket


def _layer(name: str) -> str:
    """Of a tensor's name: all up to its first number, or the whole."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else name


def update_info(bucket: Bucket) -> dict[str, Any]:
    """What the workers must know before the tensors come."""
    return {
        "names": [name for name, _ in bucket],
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }


def make_group(address: str, port: int, rank: int, world_size: int, device: Any) -> Any:
    """A group with `broadcast(tensor, src)`; waits for its other members. vLLM's own: of NCCL on a GPU."""
    from vllm.distributed.utils import StatelessProcessGroup

    if device.type == "cpu":
        return StatelessProcessGroup.create(host=address, port=port, rank=rank, world_size=world_size)
    from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

    return stateless_init_process_group(address, port, rank, world_size, device.index or 0)


def broadcast(group: Any, tensor: Tensor) -> Tensor:
    """The tensor of rank 0, on every rank; elsewhere `tensor` is room for it."""
    if tensor.device.type == "cpu":
        found: Tensor = group.broadcast(tensor, src=0)
        return found
    import torch

    group.broadcast(tensor, src=0, stream=torch.cuda.current_stream())
    return tensor


class Sender:
    """The learner's side."""

    def __init__(self, device: Any, deadline_s: float) -> None:
        self._device, self._deadline_s = device, deadline_s
        self._group: Any = None
        self._members: tuple[tuple[str, int], ...] = ()

    def join(self, addresses: Sequence[tuple[str, int]]) -> None:
        """A group with these servers (address, number of its life), if it is not the one that there is. Raises ServerLost."""
        if tuple(addresses) == self._members:
            return
        self._members = ()
        urls = [address for address, _ in addresses]
        sizes = [int(told["world_size"]) for told in run(self._all(urls, "/get_world_size", method="GET"))]
        ranks, world_size = offsets(sizes)
        address, port = _own_address(urls[0]), _free_port()
        bodies = [
            {"init_info": {"address": address, "port": port, "rank_offset": rank, "world_size": world_size}}
            for rank in ranks
        ]

        def own() -> None:
            self._group = make_group(address, port, 0, world_size, self._device)

        self._both(self._all(urls, "/init_weight_transfer_engine", bodies), own)
        self._members = tuple(addresses)

    def send(self, bucket: Bucket) -> None:
        """To all members, which load it meanwhile. Raises ServerLost; the group is then of no more use."""
        tensors = [tensor.to(self._device) for _, tensor in bucket]

        def own() -> None:
            for tensor in tensors:
                broadcast(self._group, tensor)
            if self._device.type != "cpu":
                import torch

                torch.cuda.current_stream().synchronize()

        body = {"update_info": update_info(bucket)}
        urls = [address for address, _ in self._members]
        try:
            self._both(self._all(urls, "/update_weights", [body] * len(urls)), own)
        except (ServerLost, ServerRefused):
            self._members = ()
            raise

    def _both(self, requests: Coroutine[Any, Any, Any], collective: Callable[[], None]) -> None:
        """The requests, and beside them the learner's part, which nothing can interrupt: it has a thread of its own."""
        failed: list[BaseException] = []

        def work() -> None:
            try:
                if self._device.type != "cpu":
                    import torch

                    torch.cuda.set_device(self._device)
                collective()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=work, name="rlpost-broadcast", daemon=True)
        thread.start()
        run(requests)
        thread.join(self._deadline_s)
        if thread.is_alive():
            raise ServerLost(f"the broadcast did not end within {self._deadline_s:g} s")
        if failed:
            raise ServerLost(f"the broadcast failed: {type(failed[0]).__name__}: {failed[0]}") from failed[0]

    async def _all(
        self, urls: Sequence[str], path: str, bodies: Sequence[Any] | None = None, method: str = "POST"
    ) -> list[Any]:
        async def one(url: str, body: Any) -> Any:
            async with Client(url, deadline_s=self._deadline_s) as client:
                return await client.call(path, body, method=method)

        return list(await asyncio.gather(*map(one, urls, bodies or [None] * len(urls))))


def _own_address(url: str) -> str:
    """This machine's address as a server sees it."""
    parts = urlsplit(url)
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as found:  # nothing is sent
        found.connect((parts.hostname or "127.0.0.1", parts.port or 80))
        return str(found.getsockname()[0])


def _free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])
