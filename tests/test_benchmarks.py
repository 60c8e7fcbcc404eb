"""The benchmarks' own parts: frozen rollouts, what TRL is given of them, tables, and the gradient gate."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from benchmarks.frozen import RolloutSpec, TrlRollout, frozen_reward, make_rollout, with_old_logprobs
from benchmarks.measure import StepClock, show, spread, table, update_share

pytestmark = pytest.mark.engine

SPEC = RolloutSpec(
    prompts=6, completions=4, prompt_tokens=7, max_completion_tokens=40, mean_tokens=16, dead_share=0.5, vocabulary=50
)


def test_a_rollout_follows_from_its_spec_alone():
    assert make_rollout(SPEC) == make_rollout(SPEC)
    assert make_rollout(SPEC) != make_rollout(replace(SPEC, seed=1))
    rollout = make_rollout(SPEC)
    assert [len(g.completions) for g in rollout.groups] == [4] * 6
    assert all(len(g.prompt.token_ids) == 7 for g in rollout.groups)
    assert all(2 <= n <= 40 for n in rollout.lengths) and len(set(rollout.lengths)) > 5
    assert all(3 <= t < 50 for g in rollout.groups for c in g.completions for t in c.token_ids)
    assert set(make_rollout(replace(SPEC, lengths="equal")).lengths) == {16}


@pytest.mark.parametrize(("share", "dead"), [(0.0, 0), (0.25, 1), (0.5, 3), (1.0, 6)])
def test_the_share_of_dead_groups(share, dead):
    rollout = make_rollout(replace(SPEC, dead_share=share))
    rewards = [{g.reward(i, (1.0,)) for i in range(4)} for g in rollout.groups]
    assert sum(len(r) == 1 for r in rewards) == dead
    assert all(r == {0.0, 1.0} for r in rewards if len(r) > 1)


def test_lognormal_lengths_have_the_given_mean():
    spec = replace(SPEC, prompts=500, max_completion_tokens=100_000, mean_tokens=200)
    assert make_rollout(spec).counts()["mean_completion"] == pytest.approx(200, rel=0.1)


def test_counts():
    rollout = make_rollout(SPEC)
    counts, n = rollout.counts(), sum(rollout.lengths)
    assert counts["rows"] == n + 24 * 7 and counts["tree"] == n + 6 * 7
    assert counts["padded"] == 24 * (max(rollout.lengths) + 7) and counts["completion"] == n


def test_trl_gets_the_same_completions_in_its_own_order():
    rollout = make_rollout(SPEC)
    flat = [0.5 * i for i in range(sum(rollout.lengths))]
    frozen = TrlRollout(with_old_logprobs(rollout, flat))
    assert frozen.prompts() == [{"prompt": str(i)} for i in range(6)]
    asked = [text for text in ("3", "0", "5") for _ in range(4)]
    output = frozen.sample(asked, None)
    want = [c for g in (3, 0, 5) for c in rollout.groups[g].completions]
    assert [tuple(ids) for ids in output["completion_ids"]] == [c.token_ids for c in want]
    assert output["prompt_ids"][4] == list(rollout.groups[0].prompt.token_ids)
    rewards = [rollout.groups[g].reward(i, (1.0,)) for g in (3, 0, 5) for i in range(4)]
    assert frozen_reward([""] * 12, frozen_reward=output["frozen_reward"]) == rewards
    old = frozen.old_logprobs()
    assert old is not None and [len(values) for values in old] == [len(c.token_ids) for c in want]
    assert old[4][0] == flat[0]  # group 0 begins the rollout's flat arrays


def test_the_clock_leaves_out_what_is_paused(monkeypatch):
    ticks = iter([(0.0, 10.0), (1.0, 12.0), (4.0, 20.0), (6.0, 23.0)])
    monkeypatch.setattr("benchmarks.measure.now", lambda: next(ticks))
    clock = StepClock()
    clock.start()
    with clock.paused():
        pass
    clock.stop()
    assert clock.cpu == [3.0] and clock.wall == [5.0]


def test_tables_and_spreads():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "count": 3}
    assert show(spread([3.0, 1.0, 2.0])) == "2.00 (1.00-3.00)"
    assert table(["a", "b"], [["1", "2"]]).splitlines() == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]


def test_the_share_of_the_update_in_a_run(tmp_path):
    rows = [{"time/update": 99.0, "time/rollout": 1.0}] * 2  # left out
    rows += [{"time/update": 1.0, "time/rollout": 3.0, "time/checkpoint": 50.0}, {"time/update": 3.0, "time/sync": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = update_share(tmp_path)
    assert found["share"] == 0.5 and (found["low"], found["high"]) == (0.25, 0.75)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ValueError, match="two optimizer steps"):
        update_share(tmp_path)


def test_factors_are_against_the_fastest_setting_of_trl():
    from benchmarks.trl import rows_of, summarise

    def result(cpu, peak):
        return {"cpu_s": [cpu], "wall_s": [cpu], "peak_mib": peak}

    row = rows_of(SPEC)[0]
    found = {
        "trl micro-batch 2": [result(10.0, 100.0), result(12.0, 100.0)],
        "trl micro-batch 4": [result(8.0, 200.0), result(9.0, 200.0)],
        "rlpost tree": [result(2.0, 150.0), result(3.0, 150.0)],
    }
    summary = summarise(row, found)
    tree = summary["sides"]["rlpost tree"]
    assert (summary["trl_fastest"], summary["trl_leanest"]) == ("trl micro-batch 4", "trl micro-batch 2")
    assert tree["times_less"]["of_medians"] == pytest.approx(8.5 / 2.5)
    assert (tree["times_less"]["low"], tree["times_less"]["high"]) == (3.0, 4.0)  # pairs of the same repeat
    assert tree["memory_of_leanest"] == 1.5


def test_the_gate_wants_loss_and_norm():
    from benchmarks.trl_parity import Agreement, report

    good = Agreement("grpo", 0.1, 1e-7, 1.0, 1e-7, 1e-6)
    assert good.holds(1e-5) and not replace(good, norm_error=1e-4).holds(1e-5)
    flat = replace(good, loss_error=1.0)  # an on-policy loss of zero
    assert not flat.holds(1e-5)
    assert "NO" in report([flat], 1e-5) and "NO" not in report([flat], 1e-5, only_norm=True)
    assert not replace(good, norm_error=math.nan).holds(1e-5)
    assert asdict(good)["name"] == "grpo"


def test_the_learner_benchmark_takes_one_mechanism_away_at_a_time():
    from benchmarks.learner import cases_of, render, summarise

    cases = cases_of(4096, [0.0, 0.5])
    assert len([c for c in cases if c.part == "layouts"]) == 2 * 3 * 2
    result = {"cpu_s": [2.0], "wall_s": [2.0], "peak_mib": 1024.0, "real": 90.0, "padded": 100.0, "micro_batches": 1.0}
    rows = [summarise(c, [{**result, "cpu_s": [1.0], "parameters": 1e9}], 80.0, 1.0, "wall_s") for c in cases]
    by_cpu = summarise(cases[0], [{**result, "cpu_s": [1.0], "parameters": 1e9}], 80.0, None, "cpu_s")
    assert by_cpu["useful_per_s"] == 80 and "mfu" not in by_cpu
    assert rows[0]["useful_per_s"] == 40 and rows[0]["padding_share"] == pytest.approx(0.1)
    assert rows[0]["mfu"] == pytest.approx(6e9 * 45 / 1e12)
    assert "| dead groups not skipped | 50% | 2.00 (2.00-2.00) | 1.00 |" in render(rows, "ablation", "wall_s")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from benchmarks.models import make_tiny

    return str(make_tiny(tmp_path_factory.mktemp("tiny")))


def test_layouts_skipping_and_heads_change_no_gradient(tiny):
    import torch

    from benchmarks.rlpost_side import RlpostSetting, RlpostSide

    rollout = make_rollout(SPEC)
    exact = {"autocast": "none", "micro_batch_tokens": 128}
    want = RlpostSide(tiny, rollout, RlpostSetting("padded", skip_dead=False, head="full", **exact), method={})
    wanted = want.gradients()
    for setting in (RlpostSetting(**exact), RlpostSetting("sorted", **exact), RlpostSetting(head="full", **exact)):
        got = RlpostSide(tiny, rollout, setting, method={}).gradients()
        for name, gradient in wanted.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.norm()))


def test_steps_with_and_without_the_mask_share_policy_and_rollout(tiny):
    from benchmarks.mask_overhead import MASK, measure
    from rlpost.methods.capo import CurvatureTracker

    predict = CurvatureTracker.predict
    found = measure(tiny, make_rollout(SPEC), {**MASK, "top_k": 5}, pairs=2, tokens=512)
    assert found["share"]["count"] == 2 and len(found["raw"]["with"]) == 2
    assert min(found["raw"]["with"] + found["raw"]["without"]) > 0
    assert CurvatureTracker.predict is predict, "counting was for the steps alone"
    assert all(part["count"] == 2 and part["low"] > 0 for part in found["own_calls_s"].values()), "every part is met"
    assert 0 < found["share_of_own_calls"]["median"] < 0.9


@pytest.mark.parametrize("kind", ["trunk", "separate"])
def test_steps_with_and_without_a_critic_share_policy_and_rollout(tiny, kind):
    from benchmarks.critic_cost import measure

    rollout = make_rollout(replace(SPEC, dead_share=0.0))
    found = measure(tiny, rollout, {"model": kind, "heads": 2}, pairs=2, tokens=512)
    assert found["step_share"]["count"] == 2 and all(len(found["raw"][k]["step_s"]) == 2 for k in ("with", "without"))
    assert min(found["raw"]["with"]["values_s"]) > 10 * max(found["raw"]["without"]["values_s"])
    assert (found["state_mib"] > 0.5) is (
        kind == "separate"
    )  # a model's weights, gradients and moments, or heads' alone


def test_a_critics_cost_is_told_pair_by_pair():
    from benchmarks.critic_cost import summarise

    with_ = {"step_s": [3.0, 6.0], "values_s": [1.0, 1.0], "peak_mib": [110.0, 130.0]}
    without = {"step_s": [2.0, 4.0], "values_s": [0.0, 0.0], "peak_mib": [100.0, 100.0]}
    found = summarise({"with": with_, "without": without}, 2**21)
    assert (found["step_share"]["low"], found["step_share"]["high"]) == (0.5, 0.5)
    assert (found["step_and_values_share"]["low"], found["step_and_values_share"]["high"]) == (0.75, 1.0)
    assert found["extra_peak_mib"]["median"] == 20.0 and found["state_mib"] == 2.0


@pytest.mark.parametrize("name", ["grpo", "dapo", "bnpo", "dr_grpo", "gspo", "cispo"])
def test_rlpost_takes_the_step_that_trl_takes(tiny, name):
    """Loss and gradient of TRL on identical frozen rollouts in float32, clipped tokens and a dead group included."""
    from benchmarks.trl_parity import compare, drifted

    spec = replace(SPEC, prompts=4, dead_share=0.25)
    found = compare(name, tiny, drifted(tiny, spec, 0.15))
    assert found.holds(1e-5), found
    assert found.gradient_error < 2e-5, found
    assert abs(found.loss) > 1e-3  # the comparison is not one of rounding errors


def test_one_measurement_of_each_side_in_fresh_processes(tiny):
    from benchmarks.measure import fresh_process
    from benchmarks.worker import Job

    spec = replace(SPEC, prompts=2).as_dict()
    for side, setting in (("trl", {"micro_batch": 4}), ("rlpost", {"layout": "tree"})):
        result = fresh_process(Job(side, tiny, spec, setting, steps=2), threads=1)
        assert len(result["cpu_s"]) == 1 and result["cpu_s"][0] > 0 and result["peak_mib"] > 10
    with pytest.raises(RuntimeError, match="measurement failed"):
        fresh_process(Job("rlpost", tiny + "-missing", spec, {}), threads=1)


def test_updaters_differ_in_their_masks_only(tiny):
    from benchmarks.rlpost_side import RlpostSetting, RlpostSide

    side = RlpostSide(tiny, make_rollout(SPEC), RlpostSetting(), method={"preset": "dr_grpo"})
    other = side.with_masks([{"type": "curvature"}])
    assert other.method.reduction == side.method.reduction
    assert side.updater.curvature is None and other.curvature is not None and other.learner is side.learner


@pytest.fixture
def fake_processes(monkeypatch):
    """`benchmarks.trl` without a single process: canned answers, and a list of the jobs that were asked for."""
    import benchmarks.trl as bench

    jobs, apart = [], [1e-7]

    def answer(job, *, threads):
        jobs.append(job)
        if job.side == "parity":
            return {"name": "dapo", "loss": 0.0, "loss_error": 1.0, "grad_norm": 1.0} | {
                "norm_error": apart[0],
                "gradient_error": 1e-6,
            }
        seconds = 12.0 if job.side == "trl" else 3.0
        return {"cpu_s": [seconds], "wall_s": [seconds], "peak_mib": 512.0}

    monkeypatch.setattr(bench, "fresh_process", answer)
    return SimpleNamespace(bench=bench, jobs=jobs, apart=apart)


def run_trl_benchmark(fake, monkeypatch, tiny, tmp_path):
    arguments = ["trl", "--model", tiny, "--scale", "small", "--repeats", "2", "--rows", "equal"]
    monkeypatch.setattr("sys.argv", [*arguments, "--output", str(tmp_path / "out" / "trl.json")])
    return fake.bench.main()


def test_the_comparison_with_trl_end_to_end(fake_processes, monkeypatch, tiny, tmp_path, capsys):
    assert run_trl_benchmark(fake_processes, monkeypatch, tiny, tmp_path) == 0
    sides = [(job.side, job.setting.get("micro_batch")) for job in fake_processes.jobs]
    assert sides[0] == ("parity", 8)
    assert sides[1:5] == [("trl", 2), ("trl", 4), ("trl", 8), ("rlpost", None)]
    assert sides[5:] == [("rlpost", None), ("trl", 2)]  # the other way, and of TRL's micro-batches the fastest alone
    result = json.loads((tmp_path / "out" / "trl.json").read_text())
    assert result["rows"]["equal"]["sides"]["rlpost tree"]["times_less"]["median"] == 4.0
    assert result["valid"] and result["machine"]["versions"]["torch"]
    assert (tmp_path / "out" / "trl.png").stat().st_size > 1000
    assert "| 4.00 (4.00-4.00) |" in capsys.readouterr().out


def test_the_comparison_is_void_where_gradients_differ(fake_processes, monkeypatch, tiny, tmp_path, capsys):
    fake_processes.apart[0] = 2e-5
    assert run_trl_benchmark(fake_processes, monkeypatch, tiny, tmp_path) == 1
    assert len(fake_processes.jobs) == 1 and "VOID" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
