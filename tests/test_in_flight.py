"""Weights that change under running requests (`rollout.in_flight`): which token is whose, and what is lost by it (nothing)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from conftest import rows
from test_rollout import direct
from test_rollout_remote import SECTION, free_port, processes, reply, requests, saved, start_engine, versions  # noqa: F401
from test_staleness import kill_at_random, served

from rlpost.experience import Completion, Group, Prompt
from rlpost.learner.process import Processes
from rlpost.rollout.engine import SamplingSettings
from rlpost.rollout.remote.client import Client, run
from rlpost.rollout.remote.replies import BadReply, read_sample
from rlpost.source.ages import age_metrics

engine_test = pytest.mark.engine
LONG = SamplingSettings(max_completion_tokens=90, temperature=1.0)


def spans(*named) -> list[dict]:
    """(version, number of tokens) as vLLM writes them."""
    found, at = [], 0
    for version, tokens in named:
        found.append({"version": version, "start": at, "end": at + tokens})
        at += tokens
    return found


@pytest.mark.parametrize("named", [[("3", 3)], [("4", 3)], [("3", 1), ("4", 2)], [("3", 1), ("4", 1), ("6", 1)]])
def test_a_reply_may_be_of_the_weights_that_were_held_since_it_was_asked_for(named):
    found = read_sample(reply(weight_versions=spans(*named)), vocabulary=10, longest=3, versions=["3", "4", "6"])
    assert found.versions == tuple((int(version), tokens) for version, tokens in named)


@pytest.mark.parametrize("named", [[("2", 3)], [("4", 1), ("3", 2)], [("3", 1), ("5", 2)], [("3", 2)]])
def test_a_reply_of_older_weights_or_in_another_order_is_refused(named):
    with pytest.raises(BadReply):
        read_sample(reply(weight_versions=spans(*named)), vocabulary=10, longest=3, versions=["3", "4", "6"])


def test_ages_are_counted_token_by_token():
    def completion(*stretches):
        n = sum(tokens for _, tokens in stretches)
        return Completion((1,) * n, (-1.0,) * n, "", "stop", tuple(stretches))

    prompt = Prompt("p", (), "", (1,))
    groups = [Group(prompt, (completion((3, 2), (5, 4)), completion((5, 3)))), Group(prompt, (completion((4, 1)),))]
    assert age_metrics(groups, 5, Processes()) == {
        "staleness/mean": (2 * 2 + 1) / 10,
        "staleness/max": 2.0,
        "staleness/share_of_age_0": 0.7,
        "staleness/share_of_age_1": 0.1,
        "staleness/share_of_age_2": 0.2,
    }
    assert age_metrics([], 5, Processes()) == {}


# --- real servers ----------------------------------------------------------------------------------------------------------


def make_one(saved, logs, **changes):  # noqa: F811
    """A worker whose weights may change while it samples."""
    return start_engine(saved, logs, SECTION.model_copy(update=changes), in_flight=True)


@pytest.fixture(scope="module")
def flying(saved, tmp_path_factory):  # noqa: F811
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    engine = make_one(saved, tmp_path_factory.mktemp("logs"), deadline_s=60.0, restarts=4)
    yield engine
    engine.close()
    torch.set_num_threads(threads)


def steps(engine) -> int:
    """How often the model has run."""

    async def ask() -> int:
        async with Client(engine.servers[0].address, deadline_s=30) as client:
            return sum(worker["steps"] for worker in await client.ping())

    return run(ask())


def under_way(engine, tokens: int) -> None:
    """Waits until about so many tokens of every completion are sampled."""
    first = steps(engine)
    while steps(engine) < first + tokens:
        time.sleep(0.001)


def check_against(found, asked, models) -> dict[int, int]:
    """Every token's log-prob is that of the weights which the completion names for it; how many tokens each sampled."""
    shares: dict[int, int] = {}
    for request, completion in zip(asked, found, strict=True):
        prompt = len(request.token_ids)
        whole = (*request.token_ids, *completion.token_ids)
        named = {version for version, _ in completion.versions}
        by_model = {version: direct(models[version], whole)[prompt - 1 :] for version in named}
        at = 0
        for version, tokens in completion.versions:
            told, ours = completion.sampler_logprobs[at : at + tokens], by_model[version][at : at + tokens]
            assert max(abs(a - b) for a, b in zip(told, ours, strict=True)) < 2e-4
            shares[version] = shares.get(version, 0) + tokens
            at += tokens
        assert at == len(completion.token_ids)
    return shares


@engine_test
def test_a_sync_under_running_requests_shows_in_every_completion(flying, saved):  # noqa: F811
    """Before it tokens have the old weights' log-probs, after it the new ones', as a learner computes them: what the old
    weights had cached is computed again."""
    first, other = versions(saved[1])
    models, asked = [], requests()
    for attempt in range(8):  # on a busy machine all may be sampled before this thread comes to its sync
        models += [first, other]
        flying.load_weights(first.named_parameters(), 2 * attempt)
        with ThreadPoolExecutor(1) as pool:
            sampling = pool.submit(flying.sample, asked, LONG)
            under_way(flying, 8)
            flying.load_weights(other.named_parameters(), 2 * attempt + 1)
            assert flying.logprobs([(1, 2, 3)])  # the probe asks while others sample
            found = sampling.result(60)
        check_against(found, asked, models)
        crossed = [completion for completion in found if len(completion.versions) == 2]
        if crossed:  # both stretches of each were held against their own weights
            break
    assert crossed and all(tokens > 0 for completion in crossed for _, tokens in completion.versions)
    again = flying.sample(asked, LONG)
    assert {version for completion in again for version, _ in completion.versions} == {2 * attempt + 1}


@engine_test
@pytest.mark.slow
@pytest.mark.parametrize("phase", ["/pause", "/update_weights", "/resume"])
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_worker_lost_in_a_sync_under_running_requests(saved, make_flying, phase, sent, monkeypatch):  # noqa: F811
    """The requests are sampled by its successor, with the new weights; nothing is lost or doubled."""
    models, engine = versions(saved[1]), make_flying(deadline_s=8.0)
    engine.load_weights(models[0].named_parameters(), 0)
    call, dead = Client.call, []

    async def deadly(self, path, *args, **options):
        if path.startswith(phase) and not dead:
            dead.append(True)
            os.kill(processes(engine)["worker"], sent)
        return await call(self, path, *args, **options)

    asked = requests()
    with ThreadPoolExecutor(1) as pool:
        sampling = pool.submit(engine.sample, asked, LONG)
        under_way(engine, 5)
        monkeypatch.setattr(Client, "call", deadly)
        engine.load_weights(models[1].named_parameters(), 1)
        found = sampling.result(120)
    if not engine.restarts:  # everything was sampled before the sync; the loss shows when it is asked again
        found = engine.sample(asked, LONG)
    assert dead and engine.restarts == 1
    assert len(found) == len(asked)
    check_against(found, asked, models)


@engine_test
@pytest.mark.slow
def test_an_engine_that_answers_and_computes_nothing_is_lost(saved, make_flying):  # noqa: F811
    """As when a request is forgotten: here its scheduler is held, as a learner leaves it that was killed within a sync."""
    engine = make_flying(deadline_s=8.0)
    engine.load_weights(saved[1].named_parameters(), 0)

    async def hold() -> None:
        async with Client(engine.servers[0].address, deadline_s=30) as client:
            await client.call("/pause?mode=keep")

    asyncio.run(hold())
    began = time.monotonic()
    found = engine.sample(requests(), LONG)
    assert len(found) == 40 and engine.restarts == 1
    assert time.monotonic() - began < 60


def flying_run(folder, write_recipe, port: int, **changes) -> Path:
    return served(
        folder, write_recipe, port, **{"rollout.in_flight": True, "rollout.max_completion_tokens": 60, **changes}
    )


def learned_once(run: Path, rollouts: int) -> None:
    """Every (rollout, prompt, sample) is learned from exactly once, and every prompt of the data as often as its turn comes."""
    rows_by_rollout = [row["rollout"] for row in rows(run, "train")]
    assert rows_by_rollout == sorted(rows_by_rollout) and set(rows_by_rollout) == set(range(rollouts))
    assert len(rows_by_rollout) == 2 * rollouts  # minibatches
    seen = []
    for file in sorted((run / "completions").glob("*.jsonl")):
        seen += [json.loads(line) for line in file.open()]
    names = [(record["step"], record["prompt_id"], record["sample"]) for record in seen]
    assert len(names) == len(set(names))
    prompts = [name[:2] for name in names if name[2] == 0]
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert len(prompts) == rollouts * recipe["rollout"]["prompts_per_step"]
    often = Counter(prompt for _, prompt in prompts)
    assert max(often.values()) - min(often.values()) <= 1 and len(often) > 1, often


@engine_test
def test_a_run_in_flight_learns_from_every_sample_once_and_says_how_old_its_tokens_are(
    write_recipe, children, tmp_path
):
    pytest.importorskip("vllm")
    port = free_port()
    recipe = flying_run(tmp_path / "run", write_recipe, port)
    children.start(Path("serve"), str(recipe), "--port", str(port))
    code, printed = children.run(recipe, timeout=600)
    assert code == 0, printed
    folder = tmp_path / "run" / "run"
    learned_once(folder, 5)
    train = rows(folder, "train")
    assert all(0 <= row["staleness/mean"] <= row["staleness/max"] <= 4 for row in train)  # two rollouts of two steps
    assert max(row["staleness/max"] for row in train) > 0
    for row in train:
        assert sum(share for name, share in row.items() if name.startswith("staleness/share")) == pytest.approx(1)
    assert all(row["sync/mean_abs_gap"] < 1e-4 for row in train if "sync/mean_abs_gap" in row)
    # The learner's log-probs differ from the sampler's by as much as the policy has moved; a stale cache would show as nats.
    assert all(row["mismatch/mean_abs_gap"] < 0.5 for row in train), [row["mismatch/mean_abs_gap"] for row in train]


@engine_test
@pytest.mark.slow
def test_after_twenty_kills_in_flight_every_sample_was_learned_from_once(write_recipe, children, tmp_path):
    pytest.importorskip("vllm")
    port = free_port()
    recipe = flying_run(tmp_path / "killed", write_recipe, port, **{"learner.rollouts": 24})
    children.start(Path("serve"), str(recipe), "--port", str(port))
    run = tmp_path / "killed" / "run"
    assert kill_at_random(children, recipe, run, kills=20, seed=3) == 20
    learned_once(run, 24)


@pytest.fixture
def make_flying(saved, tmp_path):  # noqa: F811
    pytest.importorskip("vllm")
    threads, made = torch.get_num_threads(), []
    torch.set_num_threads(1)

    def make(**changes):
        made.append(make_one(saved, tmp_path, **changes))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
    torch.set_num_threads(threads)
