"""A learner and servers on two hosts: two network namespaces of this machine, joined by a cable of their own (root only)."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import rows
from test_rollout_remote import all_gone

ADDRESSES = ("10.213.7.1", "10.213.7.2")


def ip(*words: str) -> None:
    subprocess.run(("ip", *words), check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """The names of two namespaces, with `ADDRESSES`; nothing else of the machine's network is in them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the `ip` program")
    names = tuple(f"rlpost-{os.getpid()}-{i}" for i in range(2))
    cables = tuple(f"rlp{os.getpid() % 100000}{i}" for i in range(2))
    made: list[str] = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", cables[0], "netns", names[0], "type", "veth", "peer", "name", cables[1], "netns", names[1])
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        for name in made:
            ip("netns", "del", name)
        pytest.skip(f"this machine gives no network namespaces: {error.stderr.strip()}")
    yield names
    for name in made:
        ip("netns", "del", name)


@pytest.mark.engine
@pytest.mark.slow
def test_a_run_over_two_hosts_goes_on_when_the_other_hosts_server_is_killed(write_recipe, children, tmp_path, hosts):
    """A server beside the learner, one on the other host; weights go by a folder that both see."""
    import psutil

    pytest.importorskip("vllm")
    section = {"type": "vllm", "dtype": "float32", "kv_cache_gib": 0.25, "max_sequences": 16, "deadline_s": 10}
    changes = {"learner.rollouts": 6, "rollout.probe": {"max_mean_gap": 1e-3}}
    alone = write_recipe(tmp_path / "alone", changes | {"rollout.engine": section})
    code, printed = children.run(alone, timeout=600)
    assert code == 0, printed
    urls = [f"http://{address}:8000" for address in ADDRESSES]
    served = section | {"where": "server", "urls": urls, "weights_folder": str(tmp_path / "weights")}
    recipe = write_recipe(tmp_path / "served", changes | {"rollout.engine": served})
    servers = [
        children.start(Path("serve"), str(recipe), "--host", address, "--port", "8000", host=host)
        for host, address in zip(hosts, ADDRESSES, strict=True)
    ]
    learner = children.start(recipe, host=hosts[0])
    metrics = tmp_path / "served" / "run" / "metrics.jsonl"
    until = time.monotonic() + 300
    while not metrics.is_file() or metrics.read_text().count('"train"') < 1:
        assert learner.poll() is None and time.monotonic() < until, learner.communicate()[0]
        time.sleep(0.05)
    processes = [psutil.Process(servers[1].pid), *psutil.Process(servers[1].pid).children(recursive=True)]
    servers[1].kill()
    printed, _ = learner.communicate(timeout=300)
    assert learner.returncode == 0, printed
    assert f"{urls[1]} is lost" in printed
    assert all_gone([process.pid for process in processes], 10)
    wanted, got = rows(tmp_path / "alone" / "run", "train"), rows(tmp_path / "served" / "run", "train")
    assert [row["reward/mean"] for row in got] == pytest.approx([row["reward/mean"] for row in wanted], rel=1e-6)
    assert list((tmp_path / "weights").iterdir()) == [], "the run took its weights away"
