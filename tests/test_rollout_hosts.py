"""A learner and servers on two hosts: two network namespaces of this machine, joined by a cable of their own (root only)."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, rows
from test_rollout_remote import all_gone, free_port

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


SRUN = """#!/usr/bin/env bash
# As Slurm's: one task a node of --nodelist, each knowing its node; signals go on to them.
nodes=()
while [[ $1 == --* ]]; do
  [[ $1 == --nodelist=* ]] && IFS=, read -ra nodes <<<"${1#--nodelist=}"
  shift
done
tasks=()
for i in "${!nodes[@]}"; do
  SLURM_NODEID=$i SLURMD_NODENAME=${nodes[i]} "$@" &
  tasks+=($!)
done
trap 'kill "${tasks[@]}" 2>/dev/null' TERM
code=0
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit $code
"""


@pytest.fixture
def slurm(tmp_path):
    """The environment of a job on two nodes, which are two addresses of this machine."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").write_text(SRUN)
    (programs / "scontrol").write_text('#!/bin/sh\necho "$3" | tr , "\\n"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    return {
        **{key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "127.0.0.1,127.0.0.2",
        "SLURM_JOB_ID": "7",
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.engine
@pytest.mark.slow
def test_a_slurm_job_of_learners_and_servers(write_recipe, tmp_path, slurm):
    pytest.importorskip("vllm")
    section = {"type": "vllm", "dtype": "float32", "kv_cache_gib": 0.25, "max_sequences": 16}
    recipe = write_recipe(tmp_path, {"learner.rollouts": 2, "rollout.engine": section})
    setting = {
        "GPUS_PER_NODE": "1",
        "LAUNCH_FILE": "launch/cpu.yaml",
        "SERVER_PORT": str(free_port()),
        "WEIGHTS_FOLDER": str(tmp_path / "weights"),
    }
    job = subprocess.Popen(
        ["launch/slurm-servers.sh", str(recipe)],
        cwd=REPOSITORY,
        env=slurm | setting,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = job.communicate(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 0, printed
    assert len(rows(tmp_path / "run", "train")) == 2
    assert "127.0.0.2" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_a_slurm_job_without_a_node_for_one_side_is_refused(slurm):
    for servers in ("0", "2"):
        ended = subprocess.run(
            ["launch/slurm-servers.sh", "recipe.yaml"],
            cwd=REPOSITORY,
            env=slurm | {"SERVER_NODES": servers},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 2
        assert "Take at least one node for each side" in ended.stderr
