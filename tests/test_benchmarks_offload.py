"""The comparison of offloads: order of visits, what is made of results, arms that end their processes, and its small form."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from benchmarks import offload
from benchmarks.offload import FORMS, PARTS, measure, summary, visits, wrong
from benchmarks.offload_arms import REFERENCE, arms, configuration, equal_memory_ratio

FORM = FORMS["cpu"]
PARAMETERS = 43_776


def test_every_repeat_visits_all_arms_in_an_order_of_its_own():
    found = visits(12, 3)
    orders = [[number for repeat, number in found if repeat == r] for r in range(3)]
    assert all(sorted(order) == list(range(12)) and order[0] == 0 for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert visits(12, 3) == found


def test_twin_flow_gets_the_memory_that_ours_takes():
    parameters, piece = 1_500_000_000, 2**25
    on_accelerator = 12 * parameters * (1 - equal_memory_ratio(parameters, piece))
    assert on_accelerator == pytest.approx(4 * parameters + 24 * piece, rel=0.02)
    assert equal_memory_ratio(1000, 10**9) == 0.0  # more is staged than there is: all of it on the accelerator


def test_names_are_different_and_configurations_say_what_the_arm_is():
    every = arms(1_500_000_000, 2**25)
    assert len({arm.name for arm in every}) == len(every) and every[0].name == REFERENCE
    assert [arm.name for arm in every if not arm.exact] == ["ZenFlow (not exact)"]
    for arm in every:
        config = configuration(arm, 8, clip=1.0, bf16=True)
        assert config["zero_optimization"].items() >= arm.zero.items() and config["zero_optimization"]["stage"] == 3
        assert config["gradient_clipping"] == 1.0


def visit(number: int, repeat: int, *, losses=(1.0, 2.0, 3.0), bits=(7,), slow=1.0, **more) -> dict:
    times = {part: [slow, slow + 1] for part in PARTS}
    return {
        "arm": number,
        "repeat": repeat,
        "times": times,
        "losses": list(losses),
        "bits": list(bits),
        "peak_mib": [5],
        **more,
    }


ABOUT = {"rates": {}, "parameters_a_process": PARAMETERS, "processes": 2, "planned": {}}


def test_results_are_compared_with_the_reference():
    lines = [
        ABOUT,
        visit(0, 0),
        visit(8, 0, slow=3.0, way="on the accelerator"),
        visit(10, 0, bits=(8,), way="all through the accelerator"),
        visit(1, 0, losses=(1.0, 2.0, 3.5), bits=(9,)),
        {"arm": 5, "repeat": 0, "cannot": "CUDA only"},
    ]
    result = summary(lines, FORM, gpu=False)
    names = [arm.name for arm in arms(PARAMETERS, FORM["piece_size"])]
    found = result["arms"]
    assert list(found) == names and found[names[5]] == {"ran": False, "why": "CUDA only"}
    assert "not visited" in found[names[6]]["why"]
    assert found[names[8]]["update"] == {"median": 3.5, "low": 3.0, "high": 4.0, "count": 2}
    assert found[names[8]]["step"]["median"] == 10.5 and found[names[8]]["bits_equal"]
    assert found[names[1]]["largest_loss_difference"] == 0.5 and not found[names[1]]["losses_equal"]
    assert wrong(result) == [names[10]]  # DeepSpeed's own offload need not have the reference's bits
    assert "did not run" in offload.shown(result) and names[8] in offload.shown(result)


def test_on_a_gpu_only_what_is_all_updated_there_must_have_the_bits():
    lines = [ABOUT, visit(0, 0)]
    lines += [visit(i, 0, bits=(8,), way="w", up_bytes=4e9, down_bytes=2e9) for i in range(8, 18)]
    result = summary(lines, FORM, gpu=True)
    assert all("accelerator" in name and " of " not in name for name in wrong(result)) and len(wrong(result)) == 3
    assert result["arms"]["ours, all by the CPU"]["link_gb_s"] == {"up": 4 / 1.5, "down": 2 / 1.5}


def test_an_arm_that_ends_its_process_is_left_out_and_the_others_go_on(monkeypatch, tmp_path):
    starts = []

    def start(job, results, form, environment) -> str:
        wanted = json.loads(job.read_text())["visits"]
        starts.append(wanted)
        with results.open("a") as out:
            out.write(json.dumps(ABOUT) + "\n")
            for repeat, number in wanted:
                out.write(json.dumps({"begun": number, "repeat": repeat}) + "\n")
                if number == 2:
                    return "its process ended with code -9"
                out.write(json.dumps(visit(number, repeat)) + "\n")
            out.write('{"ended": true}\n')
        return ""

    monkeypatch.setattr(offload, "_start", start)
    wanted = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 2), (1, 3)]
    lines = measure(FORM, wanted, {}, tmp_path / "kept.jsonl")
    assert starts[1] == [[0, 3], [1, 0], [1, 3]] and len(starts) == 2
    result = summary(lines, FORM, gpu=False)["arms"]
    names = list(result)
    assert result[names[2]] == {"ran": False, "why": "its process ended with code -9"}
    assert [result[names[i]]["visits"] for i in (0, 1, 3)] == [2, 1, 2]


def test_processes_that_do_not_come_up_end_the_measurement(monkeypatch, tmp_path):
    monkeypatch.setattr(offload, "_start", lambda *_: "no such module")
    with pytest.raises(RuntimeError, match="did not come up: no such module"):
        measure(FORM, [(0, 0)], {}, tmp_path / "kept.jsonl")


def test_a_measurement_that_is_stopped_keeps_what_it_has(monkeypatch, tmp_path):
    def start(job, results, form, environment) -> str:
        lines = [ABOUT, {"begun": 0, "repeat": 0}, visit(0, 0), {"begun": 1, "repeat": 0}]
        results.write_text("".join(json.dumps(line) + "\n" for line in lines))
        raise KeyboardInterrupt

    monkeypatch.setattr(offload, "_start", start)
    result = summary(measure(FORM, [(0, 0), (0, 1)], {}, tmp_path / "kept.jsonl"), FORM, gpu=False)["arms"]
    first, second, *_ = result.values()
    assert first["visits"] == 1 and second == {"ran": False, "why": "the benchmark was stopped"}


def test_what_a_process_died_of_is_told_before_its_launchers_own_words():
    log = "a warning\n[rank0]: ModuleNotFoundError: No module named 'x'\n" + 50 * "launcher: many lines\n"
    assert offload.cause(log).startswith("[rank0]: ModuleNotFoundError: No module named 'x'")
    assert offload.cause("no more\nmemory") == "no more memory"


@pytest.mark.engine
@pytest.mark.slow
def test_the_small_form_end_to_end(tmp_path):
    """DeepSpeed's own AdamW cannot be built, as on many machines: the arms that need it say so, all others run."""
    environment = {**os.environ, "CXX": "/bin/false", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    command = [sys.executable, "-m", "benchmarks.offload", "--repeats", "1", "--minutes", "10"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "found.json")],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=850,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "found.json").read_text())
    for name, entry in result["arms"].items():
        if name.startswith("ours") or name == REFERENCE:
            assert entry["ran"] and entry["losses_equal"] and entry["bits_equal"], (name, entry)
        elif name == "DeepSpeed offload, torch's AdamW":
            assert entry["ran"] and entry["largest_loss_difference"] < 1e-3
        else:
            assert not entry["ran"] and ("DeepSpeedCPUAdam" in entry["why"] or "CUDA" in entry["why"]), (name, entry)
