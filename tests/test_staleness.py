"""Rollouts sampled ahead of the policy (`rollout.staleness`): by which weights, in which order, and after a kill."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import rows, weights
from test_rollout_remote import free_port

import rlpost.source.ahead as ahead_module
from rlpost.data.sampler import PromptSampler
from rlpost.errors import RolloutError
from rlpost.learner.watch import Phases
from rlpost.source.ahead import Ahead
from rlpost.teaching.teacher import Teaching
from rlpost.tracking.timeline import Timeline

engine_test = pytest.mark.engine


class FakeCollector:
    """Draws two prompts a rollout, and says what it was told."""

    fails_at: int | None = None

    def __init__(self, parts, draw) -> None:
        self.parts, self.draw = parts, draw

    def begin(self, rollout) -> list:
        drawn = self.draw(2)
        with self.parts.phases("rollout"):
            time.sleep(0.01 if rollout % 2 else 0.03)
        if rollout == self.fails_at:
            raise RolloutError(f"rollout {rollout} cannot be made")
        return drawn

    def finish(self, drawn, rollout, memory) -> Teaching:
        drawn = drawn + self.draw(1)  # as dynamic sampling does
        told = {"rollout": rollout, "step": self.parts.optimizer_step, "memory": len(memory)}
        return Teaching([], {name: float(value) for name, value in told.items()} | {f"p{i}": 1.0 for i in drawn})


def prompts(found) -> list[set[str]]:
    """What each rollout was made of."""
    return [{name for name in made if name.startswith("p")} for made in found]


@pytest.fixture
def make(monkeypatch):
    """An `Ahead` without model and engine, of six rollouts, with its parts."""
    monkeypatch.setattr(ahead_module, "Collector", FakeCollector)

    def replaced(one, **changes):
        return SimpleNamespace(**vars(one) | changes) if isinstance(one, SimpleNamespace) else replace(one, **changes)

    monkeypatch.setattr(ahead_module, "replace", replaced)

    def make(lag: int, in_flight: bool = False):
        parts = SimpleNamespace(
            recipe=SimpleNamespace(learner=SimpleNamespace(planned_rollouts=6, watchdog_s=60.0)),
            processes=SimpleNamespace(apart=lambda: None, world=1, is_main=True),
            phases=Phases(60.0),
            timeline=Timeline(),
            tokenizer=None,
            sampler=PromptSampler(50, seed=1),
            optimizer_step=0,
        )
        return Ahead(parts, lag, in_flight=in_flight), parts

    return make


def learn(rollouts, parts, first: int, last: int) -> list[dict[str, float]]:
    """What rollouts first to last - 1 were made of, with one optimizer step each."""
    found = []
    for n in range(first, last):
        collected = rollouts.collect(n, {"a": 2} if n else {})
        rollouts.ahead(n, {"a": 2})
        found.append(collected.teaching.metrics)
        rollouts.settle()  # before the sync
        parts.optimizer_step += 1
    return found


@pytest.mark.parametrize("lag", [1, 2, 4])
def test_a_rollout_is_made_by_the_weights_of_lag_rollouts_before(make, lag):
    rollouts, parts = make(lag)
    found = learn(rollouts, parts, 0, 6)
    assert [m["rollout"] for m in found] == list(range(6))
    assert [m["step"] for m in found] == [max(0, n - lag) for n in range(6)]
    assert [m["memory"] for m in found] == [0] + [1] * 5
    order = PromptSampler(50, seed=1)
    assert prompts(found) == [{f"p{i}" for i in order.next(3)} for _ in range(6)]
    assert rollouts.kept() == []  # nothing beyond the planned rollouts


@pytest.mark.parametrize("lag", [1, 3])
def test_what_is_kept_goes_on_as_if_it_had_never_stopped(make, lag):
    whole = learn(*make(lag), 0, 6)
    rollouts, parts = make(lag)
    half = learn(rollouts, parts, 0, 3)
    position, kept = json.loads(json.dumps(rollouts.position())), rollouts.kept()
    assert [n for n, _ in kept] == list(range(3, min(3 + lag, 6)))
    again, parts = make(lag)
    parts.optimizer_step = 3
    again.load(position)
    again.keep(kept)
    assert half + learn(again, parts, 3, 6) == whole


def test_without_what_was_kept_the_same_prompts_are_drawn_again(make):
    """As when a run is taken up by another number of processes: newer weights, the same prompts."""
    whole = learn(*make(2), 0, 6)
    rollouts, parts = make(2)
    learn(rollouts, parts, 0, 3)
    again, parts = make(2)
    parts.optimizer_step = 3
    again.load(rollouts.position())
    found = learn(again, parts, 3, 6)
    assert prompts(found) == prompts(whole[3:])
    assert [m["step"] for m in found] == [3, 3, 3]


@pytest.mark.parametrize("again_in_flight", [True, False])
@pytest.mark.parametrize("keeps", [True, False])
def test_in_flight_every_prompt_is_learned_from_once_also_after_a_stop(make, keeps, again_in_flight):
    """Samples and refills are drawn in whatever order threads come to it; which, must not matter for what is used up."""
    rollouts, parts = make(3, in_flight=True)
    half = learn(rollouts, parts, 0, 2)
    kept = rollouts.kept()
    position = json.loads(json.dumps(rollouts.position()))
    assert [n for n, _ in kept] == [2, 3, 4]
    again, parts = make(3, in_flight=again_in_flight)
    parts.optimizer_step = 2
    again.load(position)
    if keeps:
        again.keep(kept)
    found = half + learn(again, parts, 2, 6)
    assert [m["rollout"] for m in found] == list(range(6))
    used = [name for made in prompts(found) for name in made]
    assert len(used) == len(set(used)) == 18
    assert set(used) == {f"p{i}" for i in PromptSampler(50, seed=1).next(18)}


def test_in_flight_the_sync_does_not_wait_and_several_rollouts_are_sampled_at_once(make, monkeypatch):
    go, running = threading.Event(), threading.Semaphore(0)

    def begin(self, rollout):
        running.release()
        assert rollout == 0 or go.wait(10)
        return self.draw(2)

    monkeypatch.setattr(FakeCollector, "begin", begin)
    rollouts, _ = make(2, in_flight=True)
    rollouts.collect(0, {})
    rollouts.ahead(0, {})
    assert running.acquire(timeout=10) and running.acquire(timeout=10) and running.acquire(timeout=10)
    rollouts.settle()  # both are still under way
    assert not any(job.done.done() for job in rollouts._jobs.values())
    go.set()
    rollouts.rest()
    assert all(job.done.done() for job in rollouts._jobs.values())


@pytest.mark.parametrize("in_flight", [True, False])
def test_a_rollout_that_is_not_learned_from_is_collected_again(make, in_flight):
    rollouts, parts = make(2, in_flight=in_flight)
    learn(rollouts, parts, 0, 1)
    go_back = rollouts.bookmark()
    first = rollouts.collect(1, {})
    go_back()
    assert rollouts.collect(1, {}) is first
    go_back = rollouts.bookmark()
    go_back()  # nothing was collected meanwhile
    assert list(rollouts._jobs) == [2]


def test_an_error_ahead_is_raised_where_its_rollout_is_wanted_and_its_prompts_are_drawn_again(make, monkeypatch):
    monkeypatch.setattr(FakeCollector, "fails_at", 2)
    rollouts, parts = make(2)
    found = learn(rollouts, parts, 0, 2)  # 2 has failed meanwhile, 3 is made
    assert len(found) == 2
    assert rollouts.kept() == []
    after = PromptSampler(50, seed=1)
    after.load_state_dict(rollouts.position())
    order = PromptSampler(50, seed=1)
    order.next(6)
    assert after.next(20) == order.next(20)
    with pytest.raises(RolloutError, match="rollout 2 cannot be made"):
        rollouts.collect(2, {})


def served(folder, write_recipe, port: int, **changes) -> Path:
    engine = {"type": "vllm", "dtype": "float32", "kv_cache_gib": 0.25, "max_sequences": 16, "where": "server"}
    return write_recipe(
        folder,
        {
            "rollout.engine": engine | {"urls": [f"http://127.0.0.1:{port}"]},
            "rollout.staleness": 2,
            "learner.rollouts": 5,
            "learner.minibatches": 2,
            "learner.learning_rate": 1e-3,
            "checkpoint.every": 1,
            **changes,
        },
    )


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@engine_test
def test_a_run_ahead_says_how_old_its_samples_are_and_stops_and_resumes_exactly(write_recipe, children, tmp_path, port):
    """Stopped at rollout 2 by its recipe, taken up by another process: rows and weights equal those of a run in one piece."""
    pytest.importorskip("vllm")
    recipe = served(tmp_path / "whole", write_recipe, port)
    children.start(Path("serve"), str(recipe), "--port", str(port))
    code, printed = children.run(recipe, timeout=600)
    assert code == 0, printed
    whole = rows(tmp_path / "whole" / "run", "train")
    # Two optimizer steps a rollout: rollouts 0 to 2 are sampled by the first weights, then always four steps behind.
    assert [row["staleness/max"] for row in whole] == [0, 0, 2, 2, 4, 4, 4, 4, 4, 4]
    assert all(row["sync/mean_abs_gap"] < 1e-4 for row in whole if "sync/mean_abs_gap" in row)
    assert sum("sync/mean_abs_gap" in row for row in whole) == 5
    killed = served(tmp_path / "killed", write_recipe, port)
    times = kill_at_random(children, killed, tmp_path / "killed" / "run", kills=1, seed=1)
    assert times == 1
    same(tmp_path / "whole" / "run", tmp_path / "killed" / "run")


@engine_test
@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(write_recipe, children, tmp_path):
    pytest.importorskip("vllm")
    port = free_port()
    changes = {"learner.rollouts": 24}
    recipe = served(tmp_path / "whole", write_recipe, port, **changes)
    children.start(Path("serve"), str(recipe), "--port", str(port))
    code, printed = children.run(recipe, timeout=900)
    assert code == 0, printed
    killed = served(tmp_path / "killed", write_recipe, port, **changes)
    assert kill_at_random(children, killed, tmp_path / "killed" / "run", kills=20, seed=2) == 20
    same(tmp_path / "whole" / "run", tmp_path / "killed" / "run")


def kill_at_random(children, recipe: Path, run: Path, *, kills: int, seed: int) -> int:
    """Starts the run, ends it by SIGKILL a random time after its first new row, and again; then lets it finish."""
    drawn, done = random.Random(seed), 0
    while done < kills:
        metrics = run / "metrics.jsonl"
        had = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
        learner = children.start(recipe, "resume=auto")
        until = time.monotonic() + 600
        while not metrics.is_file() or len(metrics.read_text().splitlines()) <= had:
            assert learner.poll() is None and time.monotonic() < until, learner.communicate()[0]
            time.sleep(0.01)
        time.sleep(drawn.uniform(0, 0.5))
        if learner.poll() is not None:
            break
        learner.send_signal(signal.SIGKILL)
        learner.wait()
        done += 1
    code, printed = children.run(recipe, "resume=auto", timeout=900)
    assert code == 0, printed
    return done


def same(whole: Path, killed: Path) -> None:
    assert rows(killed, "train") == rows(whole, "train")
    last = max(p.name for p in (whole / "checkpoints").iterdir() if p.is_dir())
    first, second = weights(whole / "checkpoints" / last), weights(killed / "checkpoints" / last)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
