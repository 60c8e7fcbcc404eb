"""Seeds, groups, probe, factory, and the transformers engine in full."""

from __future__ import annotations

import copy
import importlib.util
import logging
import math

import pytest
import torch
from conftest import save_tiny_model

from rlpost.errors import RolloutError
from rlpost.experience import Completion, Prompt
from rlpost.recipe.sections.model import ModelSection
from rlpost.recipe.sections.rollout import TransformersEngine, VllmEngine
from rlpost.rollout.engine import SamplingRequest, SamplingSettings
from rlpost.rollout.factory import make_engine
from rlpost.rollout.probe import ProbeResult, check, compare
from rlpost.rollout.sampler import sample_groups
from rlpost.rollout.seeds import request_seed
from rlpost.rollout.transformers_engine import TransformersRolloutEngine

EOS = 1
SETTINGS = SamplingSettings(max_completion_tokens=24, temperature=1.0)


def tiny(folder, *, seed: int = 0):
    """The tiny model's folder, the model, and its tokenizer; it ends often enough to test endings."""
    return str(folder), *save_tiny_model(folder, seed=seed, spread=0.3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(saved):
    _, model, tokenizer = saved
    return TransformersRolloutEngine(copy.deepcopy(model), tokenizer, batch_size=64, max_model_len=100)


def requests(n: int = 40) -> list[SamplingRequest]:
    return [SamplingRequest(tuple(range(40 + i, 43 + i + i % 5)), seed=900 + i) for i in range(n)]


def direct(model, tokens, temperature: float = 1.0) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1] / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


# --- seeds, groups ---------------------------------------------------------------------------------------------------


def test_seeds_are_stable_and_tell_everything_apart():
    assert request_seed(0, 3, "gsm8k/17", 5) == 3991303744246193321
    keys = [
        (r, s, p, i, lv)
        for r in (0, 1)
        for s in (0, 11)
        for p in ("a/1", "a/11", "1|a")
        for i in (0, 1)
        for lv in (0, 1)
    ]
    seeds = {request_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


class Recorder:
    name = "recorder"

    def __init__(self, lose: int = 0):
        self.calls: list[list[SamplingRequest]] = []
        self.lose = lose

    def sample(self, requests, settings):
        self.calls.append(list(requests))
        made = [Completion((r.seed,), (0.0,), "", "stop") for r in requests]
        return made[: len(made) - self.lose]


def prompt(name: str) -> Prompt:
    return Prompt(name, ({"role": "user", "content": name},), name, (7, 8, 9))


def test_groups_come_in_order_from_one_call_and_do_not_depend_on_the_other_prompts():
    one, many = Recorder(), Recorder()
    groups = sample_groups(many, [prompt("x"), prompt("y"), prompt("x")], 3, SETTINGS, run_seed=1, step=2)
    assert [g.prompt.id for g in groups] == ["x", "y", "x"]
    assert len(many.calls) == 1 and all(len(g.completions) == 3 for g in groups)
    [alone] = sample_groups(one, [prompt("y")], 3, SETTINGS, run_seed=1, step=2)
    assert alone.completions == groups[1].completions
    assert len({c.token_ids for g in groups for c in g.completions}) == 9, "a repeated prompt got the same samples"
    assert sample_groups(one, [], 3, SETTINGS, run_seed=1, step=2) == []


def test_a_group_is_told_when_its_last_completion_is_there():
    class OneByOne(Recorder):
        def sample(self, requests, settings, *, finished=None):
            made = super().sample(requests, settings)
            for i in (4, 0, 2, 5, 1, 3):  # any order
                finished(i, made[i])
            return made

    told = []
    groups = sample_groups(
        OneByOne(), [prompt("x"), prompt("y"), prompt("x")], 2, SETTINGS, run_seed=1, step=2, finished=told.append
    )
    assert [groups.index(group) for group in told] == [2, 0, 1]
    assert all(
        a is b
        for group in told
        for a, b in zip(group.completions, groups[groups.index(group)].completions, strict=True)
    )


def test_an_engine_that_loses_completions_is_found_out():
    with pytest.raises(RolloutError, match="returned 2 completions for 3 requests"):
        sample_groups(Recorder(lose=1), [prompt("x")], 3, SETTINGS, run_seed=1, step=2)


# --- probe -----------------------------------------------------------------------------------------------------------


def test_probe_measures_gaps():
    assert compare([[-1.0, -2.0], [-3.0]], [[-1.5, -2.0], [-2.0]]) == ProbeResult(0.5, 1.0, 3)
    check(ProbeResult(0.5, 1.0, 3), 0.5, step=1)
    check(compare([[]], [[]]), 0.5, step=1)
    with pytest.raises(RolloutError, match="cannot compare"):
        compare([[-1.0]], [[-1.0, -2.0]])


def test_probe_names_the_cause():
    bad = ProbeResult(3.0, 9.0, 40)
    with pytest.raises(
        RolloutError, match=r"template, temperature, top-k and top-p are not the cause\..*no probe.*dtype"
    ) as first:
        check(bad, 0.5, step=0)
    assert "Step 0" in str(first.value) and "max_mean_gap" in str(first.value)
    with pytest.raises(RolloutError, match="passed with 0.01 nats.*did not reach the engine"):
        check(bad, 0.5, step=7, earlier=ProbeResult(0.01, 0.1, 40))
    with pytest.raises(RolloutError, match="not finite"):
        check(compare([[-1.0, math.nan]], [[-1.0, -1.0]]), 0.5, step=7)


# --- transformers engine ---------------------------------------------------------------------------------------------


def test_same_requests_give_the_same_completions_and_touch_no_global_random_state(engine):
    before = torch.get_rng_state()
    first = engine.sample(requests(), SETTINGS)
    assert engine.sample(requests(), SETTINGS) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert len({c.token_ids for c in first}) == len(first)
    assert {c.finish for c in first} == {"stop", "length"}, "the tiny model should show both endings"


@pytest.mark.thorough
def test_samples_do_not_depend_on_the_batch(saved, engine):
    wanted = [c.token_ids for c in engine.sample(requests(), SETTINGS)]
    assert [c.token_ids for c in engine.sample(requests()[::-1], SETTINGS)] == wanted[::-1]
    assert [engine.sample([r], SETTINGS)[0].token_ids for r in requests()] == wanted
    small = TransformersRolloutEngine(saved[1], saved[2], batch_size=3, max_model_len=100)
    assert [c.token_ids for c in small.sample(requests(), SETTINGS)] == wanted
    longer = SamplingSettings(max_completion_tokens=48, temperature=1.0)
    for completion, tokens in zip(engine.sample(requests(), longer), wanted, strict=True):
        assert completion.token_ids[:24] == tokens


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_logprobs_are_those_of_a_direct_forward(saved, engine, temperature):
    for request, completion in zip(
        requests(), engine.sample(requests(), SamplingSettings(24, temperature)), strict=True
    ):
        n = len(completion.token_ids)
        assert 0 < n <= 24 and len(completion.sampler_logprobs) == n
        assert completion.finish == ("stop" if completion.token_ids[-1] == EOS else "length")
        assert EOS not in completion.token_ids[:-1]
        expected = direct(saved[1], request.token_ids + completion.token_ids, temperature)[-n:]
        assert completion.sampler_logprobs == pytest.approx(expected, abs=1e-4)


def test_draws_follow_the_distribution(saved, engine):
    many = [SamplingRequest((9, 10, 11), seed) for seed in range(4000)]
    engine._batch_size = 4000
    drawn = torch.tensor([c.token_ids[0] for c in engine.sample(many, SamplingSettings(1, 1.0))])
    with torch.no_grad():
        p = saved[1](torch.tensor([[9, 10, 11]])).logits[0, -1].softmax(-1)
    seen = torch.bincount(drawn, minlength=len(p)) / 4000
    assert (seen - p).abs().max() < 4 * math.sqrt(0.25 / 4000)
    assert (seen - p).abs().sum() < 0.2


def test_greedy_takes_the_likeliest(saved, engine):
    [completion] = engine.sample([SamplingRequest((9, 10, 11), 1)], SamplingSettings(6, 0.0))
    tokens = [9, 10, 11]
    with torch.no_grad():
        for token in completion.token_ids:
            assert token == int(saved[1](torch.tensor([tokens])).logits[0, -1].argmax())
            tokens.append(token)
    assert completion.sampler_logprobs == pytest.approx(direct(saved[1], tokens)[2:], abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_top_k_and_top_p_restrict_what_is_drawn_and_log_probs_are_of_the_whole(saved, engine, temperature):
    for settings in (SamplingSettings(8, temperature, top_k=3), SamplingSettings(8, temperature, top_p=0.5)):
        for request, completion in zip(requests(), engine.sample(requests(), settings), strict=True):
            whole = direct(saved[1], request.token_ids + completion.token_ids, temperature)[
                len(request.token_ids) - 1 :
            ]
            assert completion.sampler_logprobs == pytest.approx(whole, abs=1e-4)
            assert all(
                token in kept
                for token, kept in zip(completion.token_ids, nuclei(saved[1], request, completion, settings))
            )
    narrow = engine.sample(requests(), SamplingSettings(8, temperature, top_p=1e-6))
    greedy = engine.sample(requests(), SamplingSettings(8, 0.0))
    assert [c.token_ids for c in narrow] == [c.token_ids for c in greedy]


def nuclei(model, request, completion, settings) -> list[set[int]]:
    """By token of the completion: what could be drawn there."""
    tokens = request.token_ids + completion.token_ids
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, len(request.token_ids) - 1 : -1] / settings.temperature
    ordered, ids = logits.softmax(-1).sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    sizes = [settings.top_k] * len(ids) if settings.top_k > 0 else (before < settings.top_p).sum(-1).tolist()
    return [set(row[:size].tolist()) for row, size in zip(ids, sizes, strict=True)]


def test_stop_strings_end_a_completion_and_stay_in_it(saved, engine):
    free = engine.sample(requests(), SETTINGS)
    victim = next(c for c in free if len(c.token_ids) > 10 and saved[2].decode(list(c.token_ids[5:7])).isascii())
    stop = saved[2].decode(list(victim.token_ids[5:7]))
    stopped = engine.sample(requests(), SamplingSettings(24, 1.0, stop=("never seen", stop)))[free.index(victim)]
    assert stopped.text.endswith(stop) and stopped.text.count(stop) == 1
    assert stopped.finish == "stop" and stopped.token_ids[-1] != EOS
    assert stopped.token_ids == victim.token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) <= 7


def test_logprobs_score_given_tokens(saved, engine):
    sequences = [(5, 6, 7, 8), (9,), (10, 11), (12, 13, 14, 15, 16, 17)]
    scored = engine.logprobs(sequences)
    assert [len(s) for s in scored] == [3, 0, 1, 5]
    for sequence, got in zip(sequences, scored, strict=True):
        assert got == pytest.approx(direct(saved[1], sequence), abs=1e-4)
    assert engine.logprobs([]) == []


def test_loaded_weights_are_used_and_copied(saved, engine, tmp_path):
    _, other, _ = tiny(tmp_path, seed=1)
    before = engine.sample(requests(), SETTINGS)
    engine.load_weights(iter(other.named_parameters()), 7)  # the tied head is left out
    assert engine.logprobs([(5, 6, 7, 8)])[0] == pytest.approx(direct(other, (5, 6, 7, 8)), abs=1e-4)
    after = engine.sample(requests(), SETTINGS)
    assert after != before
    assert all(c.versions == ((7, len(c.token_ids)),) for c in after), "every token knows the weights that sampled it"
    with torch.no_grad():
        other.model.norm.weight.zero_()
    assert engine.sample(requests(), SETTINGS) == after, "the engine must hold its own copy"
    engine.load_weights(saved[1].state_dict().items())  # with the tied head
    assert engine.sample(requests(), SETTINGS) == before


def test_wrong_weights_are_refused(saved, engine):
    with pytest.raises(RolloutError, match="no such weight"):
        engine.load_weights([("model.layers.0.base_layer.weight", torch.zeros(1))])
    with pytest.raises(RolloutError, match="shape"):
        engine.load_weights([("model.norm.weight", torch.zeros(3))])
    with pytest.raises(RolloutError, match="did not reach"):
        engine.load_weights([("model.norm.weight", saved[1].model.norm.weight)])


def test_the_context_limit_is_kept(engine):
    [completion] = engine.sample([SamplingRequest(tuple([5] * 98), 1)], SamplingSettings(24, 1.0))
    assert len(completion.token_ids) <= 2
    with pytest.raises(RolloutError, match=r"100 tokens.*data\.max_prompt_tokens"):
        engine.sample([SamplingRequest(tuple([5] * 100), 1)], SETTINGS)


# --- factory ---------------------------------------------------------------------------------------------------------


def test_factory_makes_the_transformers_engine(saved):
    path, model, tokenizer = saved
    engine = make_engine(
        TransformersEngine(), ModelSection(path=path), path, tokenizer, max_model_len=64, seed=0, device="cpu"
    )
    assert engine.name == "transformers"
    assert engine.logprobs([(5, 6, 7)])[0] == pytest.approx(direct(model, (5, 6, 7)), abs=1e-4)
    engine.close()
    engine.close()


def test_factory_falls_back_loudly_without_vllm(saved, monkeypatch, caplog):
    path, _, tokenizer = saved
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else found(name, *a))
    with caplog.at_level(logging.WARNING):
        engine = make_engine(
            VllmEngine(), ModelSection(path=path), path, tokenizer, max_model_len=64, seed=0, device="cpu"
        )
    assert engine.name == "transformers"
    assert "vLLM IS NOT INSTALLED" in caplog.text


def test_an_unreadable_model_is_a_rollout_error(tmp_path, saved):
    with pytest.raises(RolloutError, match="cannot load its copy"):
        make_engine(
            TransformersEngine(),
            ModelSection(path="x"),
            str(tmp_path),
            saved[2],
            max_model_len=64,
            seed=0,
            device="cpu",
        )
