"""PPO and SAFE from a recipe: they learn, resume exactly with controller and whitening, and do not depend on the layout."""

from __future__ import annotations

import math
import signal

import pytest
from conftest import rows, weights

from rlpost.recipe.load import load_recipe
from rlpost.run.loop import train

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("one_thread")]
RELEASED = {"preset": "safe_released"}
SAME = ("critic/", "controller/", "policy/", "optimizer/", "reward/")
SMALL = {"evaluation.prompts": 0, "learner.rollouts": 3, "learner.minibatches": 2, "rollout.prompts_per_step": 4}


def run(recipe, *overrides):
    return train(load_recipe(recipe, overrides))


@pytest.mark.parametrize(
    "method",
    [
        {"preset": "ppo", "entropy": {"coefficient": 0.01}},  # two passes over a rollout instead of two minibatches
        {"preset": "safe"},
        RELEASED,
        {
            "preset": "ppo",
            "critic": {"model": "separate"},
            "controller": None,
            "kl": {"coefficient": 0.05, "where": "reward"},
        },
        {"preset": "safe", "controller": {"term": "reward"}, "critic": {"train": "heads"}},
        {"preset": "grpo", "controller": {"type": "safe"}},
    ],
    ids=["ppo", "safe", "released", "separate", "reward", "grpo"],
)
def test_methods_resume_exactly(write_recipe, tmp_path, method):
    """Stopped in the middle of a rollout and taken up again: the same weights, critic and metrics."""
    import torch

    changes = {**SMALL, "method": method, "checkpoint.every": 3}
    if "entropy" in method:
        changes |= {"learner.epochs": 2, "learner.minibatches": 1}
    whole = run(write_recipe(tmp_path / "whole", changes))
    cut = write_recipe(tmp_path / "cut", changes)
    run(cut)
    last = tmp_path / "cut" / "run" / "checkpoints" / "step_000006"
    first = tmp_path / "cut" / "run" / "checkpoints" / "step_000003"
    assert last.is_dir()
    again = run(cut, f"resume={first}")
    assert again.optimizer_steps == whole.optimizer_steps == 6
    a, b = (weights(r.checkpoint) for r in (whole, again))
    assert all(torch.equal(a[k], b[k]) for k in a)
    if method["preset"] != "grpo":
        c, d = (torch.load(r.checkpoint / "trainer" / "critic.pt", weights_only=True) for r in (whole, again))
        assert c and all(torch.equal(c[k], d[k]) for k in c)
    wanted, found = rows(whole.run_dir, "train"), rows(again.run_dir, "train")
    assert len(wanted) == 6 and [r["step"] for r in found] == [r["step"] for r in wanted]
    for x, y in zip(wanted, found, strict=True):
        ours, theirs = ({k: v for k, v in row.items() if k.startswith(SAME)} for row in (x, y))
        assert ours == theirs
    keys = set(wanted[-1])
    if method["preset"] != "grpo":
        assert {"critic/loss", "critic/explained_variance", "critic/rmse"} <= keys
    if "controller" not in method or method["controller"]:
        assert {"controller/coefficient", "controller/kl", "policy/kl_penalised"} <= keys
    assert {"reward/crashes", "policy/kl_reference", "policy/kl_reference_p95", "policy/kl_reference_max"} <= keys
    assert all(math.isfinite(v) for row in wanted for v in row.values() if isinstance(v, float))


def test_a_stop_during_a_rollout_counts_its_rewards_once(write_recipe, tmp_path, monkeypatch):
    """The rollout is drawn again on resume: whitening, crash counter and a controller that acts on rewards must not have
    seen it before."""
    from rlpost.source.sampled import SampledSource

    changes = {**SMALL, "method": {"preset": "safe", "controller": {"term": "reward"}}}
    whole = run(write_recipe(tmp_path / "whole", changes))
    original, calls = SampledSource.next, []

    def next_and_stop(self, rollout):
        buffer = original(self, rollout)
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return buffer

    monkeypatch.setattr(SampledSource, "next", next_and_stop)
    cut = write_recipe(tmp_path / "cut", changes)
    stopped = run(cut)
    assert stopped.interrupted and stopped.optimizer_steps == 2
    again = run(cut, "resume=auto")
    wanted, found = rows(whole.run_dir, "train"), rows(again.run_dir, "train")
    assert len(calls) == 4 and len(wanted) == len(found) == 6
    for x, y in zip(wanted, found, strict=True):
        ours, theirs = ({k: v for k, v in row.items() if k.startswith(SAME)} for row in (x, y))
        assert ours == theirs


@pytest.mark.parametrize(("term", "calls"), [("coefficient", 12), ("reward", 3)])
def test_one_controller_call_per_optimizer_step(write_recipe, tmp_path, monkeypatch, term, calls):
    """And each rollout's reward in the first of them only. With the reward as its lever it is asked once a rollout."""
    from rlpost.methods.controllers import KlController

    seen, original = [], KlController.step
    monkeypatch.setattr(KlController, "step", lambda self, o: (seen.append(o), original(self, o))[1])
    changes = {**SMALL, "learner.epochs": 2, "method": {"preset": "safe", "controller": {"term": term}}}
    result = run(write_recipe(tmp_path, changes))
    assert result.optimizer_steps == 12 and len(seen) == calls
    known = [not math.isnan(observation.reward) for observation in seen]
    assert known == [i % (calls // 3) == 0 for i in range(calls)]
    assert [not math.isnan(observation.reward_std) for observation in seen] == known
    # Whatever the reward, KL is the newest: the rollout's, then that of the step before.
    metrics = rows(result.run_dir, "train")
    if term == "coefficient":
        assert all(a.kl == b["policy/kl_penalised"] for a, b in zip(seen[1:4], metrics[:3], strict=True))


def test_a_fixed_penalty_has_the_same_watch(write_recipe, tmp_path):
    """KL's tail and the crash counter do not need a controller, so that baselines can be compared."""
    kl = {"coefficient": 0.05, "estimator": "k1", "where": "loss"}
    result = run(write_recipe(tmp_path, {**SMALL, "method": {"preset": "grpo", "kl": kl}}))
    for row in rows(result.run_dir, "train"):
        assert {"reward/crashes", "reward/crashes_per_1000"} <= set(row) and "policy/kl_penalised" not in row
        assert row["policy/kl_reference_max"] >= row["policy/kl_reference"] >= 0
        assert 0 <= row["policy/kl_reference_p95"] <= 1.08 * row["policy/kl_reference_max"]  # a bin's upper edge


@pytest.mark.parametrize("preset", ["ppo", "safe"])
def test_layouts_agree(write_recipe, tmp_path, preset):
    found = []
    for layout in ("padded", "tree"):
        recipe = write_recipe(
            tmp_path / layout, {**SMALL, "method": {"preset": preset}, "learner.layout": layout, "learner.rollouts": 2}
        )
        found.append(rows(run(recipe).run_dir, "train"))
    for a, b in zip(*found, strict=True):
        for name in ("critic/loss", "critic/value_mean", "optimizer/grad_norm", "controller/coefficient"):
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-5)


def test_the_critic_learns_and_its_rates_are_its_own(write_recipe, tmp_path):
    """Only the critic moves while the policy's learning rate does nothing: its error on fresh rewards falls."""
    method = {
        "preset": "ppo",
        "controller": None,
        "critic": {"warmup_rollouts": 100, "learning_rate": 1e-2, "lam": 1.0},
    }
    changes = {**SMALL, "method": method, "learner.rollouts": 12, "learner.epochs": 2, "learner.weight_decay": 0.1}
    recipe = write_recipe(tmp_path, changes)
    result = run(recipe)
    errors = [row["critic/rmse"] for row in rows(result.run_dir, "train")[::4]]
    assert sum(errors[-3:]) < 0.5 * sum(errors[:3])
    import torch
    from safetensors.torch import load_file

    start = load_file(f"{load_recipe(recipe).recipe.model.path}/model.safetensors")
    end = weights(result.checkpoint)
    assert all(torch.equal(start[k], end[k]) for k in start)


def test_controllers_act(write_recipe, tmp_path):
    """The KL term changes the run in every differentiable term, and does not in the released one."""
    found = {}
    for term in ("released", "coefficient", "literal"):
        changes = {
            "type": "safe_published",
            "threshold": 1e-3,
            "threshold_limits": [1e-4, 2e-3],
            "weight": 50.0,
            "term": term,
        }
        method = {"preset": "safe", "controller": changes}
        folder = tmp_path / term
        found[term] = weights(run(write_recipe(folder, {**SMALL, "method": method, "learner.rollouts": 4})).checkpoint)
        seen = [row["controller/coefficient"] for row in rows(folder / "run", "train")]
        assert max(seen) > 0
    import torch

    name = next(iter(found["released"]))
    assert not torch.equal(found["released"][name], found["coefficient"][name])
    assert not torch.equal(found["coefficient"][name], found["literal"][name])


def test_the_brake_reaches_the_optimizer(write_recipe, tmp_path):
    method = {"preset": "safe", "controller": {"brake": 1e-9}}
    found = rows(run(write_recipe(tmp_path, {**SMALL, "method": method})).run_dir, "train")
    scales = [row["controller/step_scale"] for row in found]
    assert min(scales) < 0.01 and max(scales) == 1.0
    assert [row["optimizer/learning_rate"] for row in found] == pytest.approx([1e-3 * s for s in scales])


def test_lora_trains_adapter_and_critic(write_recipe, tmp_path):
    import torch

    changes = {**SMALL, "method": {"preset": "safe"}, "model.lora": {"rank": 4, "alpha": 8, "targets": "all-linear"}}
    result = run(write_recipe(tmp_path, {**changes, "checkpoint.every": 1, "checkpoint.keep": 9}))
    folder = result.checkpoint.parent
    early, late = (torch.load(folder / f"step_{n:06d}/trainer/critic.pt", weights_only=True) for n in (1, 6))
    assert all(not torch.equal(early[k], late[k]) for k in early if "weight" in k)
    a, b = weights(folder / "step_000001"), weights(folder / "step_000006")
    assert all("lora" in name for name in a) and any(not torch.equal(a[k], b[k]) for k in a)


@pytest.mark.engine
@pytest.mark.parametrize(
    "launch",
    ["cpu2.yaml", *(pytest.param(f"cpu-zero{stage}.yaml", marks=pytest.mark.slow) for stage in (2, 3))],
)
def test_two_processes_equal_one(write_recipe, tmp_path, children, launch):
    """DeepSpeed clips policy and critic together, so here nothing is clipped."""
    method = {"preset": "safe", "critic": {"level": "token", "max_grad_norm": None}}
    changes = {**SMALL, "method": method, "checkpoint.every": 3, "learner.max_grad_norm": None}
    changes |= {"learner.learning_rate": 1e-4}
    alone = run(write_recipe(tmp_path / "one", changes))
    recipe = write_recipe(tmp_path / "two", changes)
    code, printed = children.run(recipe, launch=launch)
    assert code == 0, printed[-3000:]
    wanted, found = rows(alone.run_dir, "train"), rows(tmp_path / "two" / "run", "train")
    names = (
        "critic/loss",
        "critic/value_mean",
        "critic/rmse",
        "controller/coefficient",
        "controller/kl",
        "reward/mean",
    )
    for a, b in zip(wanted, found, strict=True):
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=2e-2, abs=1e-4), (name, a["step"])
    middle = tmp_path / "two" / "run" / "checkpoints" / "step_000003"
    before = rows(tmp_path / "two" / "run", "train")
    code, printed = children.run(recipe, f"resume={middle}", launch=launch)
    assert code == 0, printed[-3000:]
    for a, b in zip(before[3:], rows(tmp_path / "two" / "run", "train")[3:], strict=True):
        assert {k: a[k] for k in names} == {k: b[k] for k in names}
