"""vLLM in process, on a tiny random Llama in float32 (marked `engine`)."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_rollout import EOS, direct, nuclei, tiny

from rlpost.errors import RolloutError
from rlpost.recipe.sections.model import ModelSection
from rlpost.recipe.sections.rollout import VllmEngine
from rlpost.rollout import vllm_versions
from rlpost.rollout.engine import SamplingRequest, SamplingSettings
from rlpost.rollout.factory import make_engine
from rlpost.rollout.probe import check, compare
from rlpost.rollout.vllm_engine import VllmRolloutEngine
from rlpost.rollout.vllm_errors import explain_startup
from rlpost.rollout.vllm_logprobs import report_whole_distribution

SETTINGS = SamplingSettings(max_completion_tokens=24, temperature=1.0)
SECTION = VllmEngine(dtype="float32", kv_cache_gib=0.25, max_sequences=64)
engine_test = pytest.mark.engine


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Its generation_config.json asks for sampling that no engine must take up: the learner has none of it."""
    pytest.importorskip("vllm")
    found = tiny(tmp_path_factory.mktemp("tiny"))
    asked = {
        "do_sample": True,
        "temperature": 0.3,
        "top_k": 2,
        "min_p": 0.2,
        "repetition_penalty": 1.7,
        "eos_token_id": EOS,
    }
    Path(found[0], "generation_config.json").write_text(json.dumps(asked))
    return found


@pytest.fixture(scope="module")
def process():
    """What a learner would find before the engine starts. One thread: on a busy machine two would spin for minutes."""
    threads, setter = torch.get_num_threads(), torch.set_num_threads
    torch.set_num_threads(1)
    yield torch.get_rng_state(), 1, os.sched_getaffinity(0), setter
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def engine(saved, process):
    path, model, tokenizer = saved
    made = make_engine(SECTION, ModelSection(path=path), path, tokenizer, max_model_len=100, seed=0, device="cpu")
    yield made
    made.close()
    made.close()
    assert not torch.distributed.is_initialized(), "closing must remove the group that vLLM made"


@pytest.fixture(autouse=True)
def own_weights(request):
    yield
    if "engine" in request.fixturenames:
        model = request.getfixturevalue("saved")[1]
        request.getfixturevalue("engine").load_weights(model.named_parameters())


def requests(n: int = 40) -> list[SamplingRequest]:
    return [SamplingRequest(tuple(range(40 + i, 43 + i + i % 5)), seed=2**62 + i) for i in range(n)]


@engine_test
def test_the_learner_finds_its_process_as_it_was(engine, process):
    rng, threads, affinity, setter = process
    assert engine.name == "vllm"
    engine.sample(requests(4), SETTINGS)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.get_num_threads() == threads
    assert os.sched_getaffinity(0) == affinity
    assert torch.set_num_threads is setter


@engine_test
def test_same_requests_give_the_same_completions(saved, engine):
    first = engine.sample(requests(), SETTINGS)
    assert engine.sample(requests(), SETTINGS) == first
    engine.load_weights((name, w.clone()) for name, w in saved[1].named_parameters())
    assert engine.sample(requests(), SETTINGS) == first
    turned = engine.sample(requests()[::-1], SETTINGS)[::-1]
    assert [c.token_ids for c in turned] == [c.token_ids for c in first]
    assert [engine.sample([r], SETTINGS)[0].token_ids for r in requests(5)] == [c.token_ids for c in first[:5]]
    reseeded = [SamplingRequest(r.token_ids, r.seed + 1000) for r in requests()]
    assert [c.token_ids for c in engine.sample(reseeded, SETTINGS)] != [c.token_ids for c in first]


@engine_test
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_logprobs_are_of_the_distribution_sampled_from(saved, engine, temperature):
    settings = SamplingSettings(24, temperature)
    finishes = set()
    for request, completion in zip(requests(), engine.sample(requests(), settings), strict=True):
        n = len(completion.token_ids)
        finishes.add(completion.finish)
        assert len(completion.sampler_logprobs) == n <= 24
        assert completion.finish == ("stop" if completion.token_ids[-1] == EOS else "length")
        expected = direct(saved[1], request.token_ids + completion.token_ids, temperature)[-n:]
        assert completion.sampler_logprobs == pytest.approx(expected, abs=1e-3)
    assert finishes == {"stop", "length"}


@engine_test
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_top_k_and_top_p_restrict_what_is_drawn_and_log_probs_are_of_the_whole(saved, engine, temperature):
    for settings in (SamplingSettings(8, temperature, top_k=3), SamplingSettings(8, temperature, top_p=0.5)):
        for request, completion in zip(requests(8), engine.sample(requests(8), settings), strict=True):
            whole = direct(saved[1], request.token_ids + completion.token_ids, temperature)[
                len(request.token_ids) - 1 :
            ]
            assert completion.sampler_logprobs == pytest.approx(whole, abs=1e-3)
            assert all(
                token in kept
                for token, kept in zip(completion.token_ids, nuclei(saved[1], request, completion, settings))
            )


@engine_test
def test_prompts_that_are_read_in_pieces_keep_their_seeds(saved, engine):
    """Together they have more tokens than one step of vLLM holds, so some are read in two."""
    limit = engine._llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    asked = [SamplingRequest(tuple((7 * j + i) % 50 + 40 for j in range(90)), seed=2**62 + i) for i in range(64)]
    assert sum(len(request.token_ids) for request in asked) > limit
    few = replace(SETTINGS, max_completion_tokens=5)
    together = engine.sample(asked, few)
    alone = [engine.sample([request], few)[0] for request in asked[40:50]]
    assert [c.token_ids for c in together[40:50]] == [c.token_ids for c in alone]


@pytest.mark.parametrize("more", [(False,), (False, False)], ids=["0.32", "0.33"])
def test_both_samplers_of_vllm_report_the_whole_distribution(more):
    """The second model runner needs a GPU: one with the same method stands for its sampler. 0.33 gives it one word more."""

    class Second:
        def _sample_random(self, logits, mapping, mapping_np, pos, top_k, top_p, *flags):
            assert flags == more
            return logits.argmax(-1), logits.masked_fill_(logits < logits.max(), -torch.inf)

    pytest.importorskip("vllm")
    source = Path(importlib.util.find_spec("vllm").origin).parent / "v1/worker/gpu/sample/sampler.py"
    [method] = [f for f in ast.walk(ast.parse(source.read_text())) if getattr(f, "name", "") == "_sample_random"]
    assert [a.arg for a in method.args.args][5:7] == ["top_k", "top_p"], "the wrapper looks at these"
    worker = SimpleNamespace(model_runner=SimpleNamespace(sampler=Second()))
    assert report_whole_distribution(worker)
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    tokens, reported = worker.model_runner.sampler._sample_random(logits.clone(), None, None, None, 1, None, *more)
    assert tokens.tolist() == [1] and torch.equal(reported, logits)
    assert not report_whole_distribution(SimpleNamespace(model_runner=SimpleNamespace(sampler=object())))


@engine_test
def test_probe_passes_and_sees_other_weights(saved, engine, tmp_path):
    sequences = [
        r.token_ids + c.token_ids for r, c in zip(requests(), engine.sample(requests(), SETTINGS), strict=True)
    ]
    sequences.append((9,))
    learner = [direct(saved[1], s) for s in sequences]
    good = compare(learner, engine.logprobs(sequences))
    assert good.tokens == sum(len(s) - 1 for s in sequences)
    assert good.max_gap < 1e-3
    check(good, 1e-3, step=0)

    _, other, _ = tiny(tmp_path, seed=1)
    before = engine.sample(requests(), SETTINGS)
    engine.load_weights(other.named_parameters(), 7)
    after = engine.sample(requests(), SETTINGS)
    assert after != before
    assert all(c.versions == ((7, len(c.token_ids)),) for c in after), "every token knows the weights that sampled it"
    with pytest.raises(RolloutError, match="did not reach the engine"):
        check(compare(learner, engine.logprobs(sequences)), 0.5, step=1, earlier=good)
    assert compare([direct(other, s) for s in sequences], engine.logprobs(sequences)).max_gap < 1e-3


@engine_test
def test_prompt_cached_before_a_sync_is_forgotten(saved, engine, tmp_path):
    """A prefix longer than a cache block, scored under old weights, must not be reused under new ones."""
    long = SamplingRequest(tuple(40 + i % 50 for i in range(90)), 5)
    _, other, _ = tiny(tmp_path, seed=1)
    engine.sample([long], SamplingSettings(4, 1.0))
    engine.load_weights(other.state_dict().items())
    [completion] = engine.sample([long], SamplingSettings(4, 1.0))
    expected = direct(other, long.token_ids + completion.token_ids)[-len(completion.token_ids) :]
    assert completion.sampler_logprobs == pytest.approx(expected, abs=1e-3)


@engine_test
def test_a_groups_prompt_is_computed_once(saved, engine, monkeypatch):
    """All but what is left over from whole cache blocks: of 90 tokens, 64 on CPU."""
    prompt, made, generate = tuple(40 + i % 50 for i in range(90)), [], engine._llm.generate
    monkeypatch.setattr(engine._llm, "generate", lambda *given, **more: made.extend(generate(*given, **more)) or made)
    completions = engine.sample([SamplingRequest(prompt, seed) for seed in range(4)], SamplingSettings(4, 1.0))
    assert [output.num_cached_tokens for output in made] == [0, 64, 64, 64]
    for completion in completions:
        expected = direct(saved[1], prompt + completion.token_ids)[-len(completion.token_ids) :]
        assert completion.sampler_logprobs == pytest.approx(expected, abs=1e-3)


@engine_test
def test_stop_strings_end_a_completion_and_stay_in_it(engine):
    free = engine.sample(requests(), SETTINGS)
    victim = next(c for c in free if c.text[3:5].isascii() and len(c.text) > 10 and c.text.count(c.text[3:5]) == 1)
    stopped = engine.sample(requests(), SamplingSettings(24, 1.0, stop=(victim.text[3:5],)))[free.index(victim)]
    assert stopped.finish == "stop" and stopped.text == victim.text[:5]
    assert stopped.token_ids == victim.token_ids[: len(stopped.token_ids)] and EOS not in stopped.token_ids


@engine_test
def test_wrong_requests_and_weights_are_explained(saved, engine):
    with pytest.raises(RolloutError, match=r"100 tokens.*data\.max_prompt_tokens"):
        engine.sample([SamplingRequest(tuple([5] * 100), 1)], SETTINGS)
    [completion] = engine.sample([SamplingRequest(tuple([5] * 98), 1)], SETTINGS)
    assert len(completion.token_ids) <= 2
    with pytest.raises(RolloutError, match="did not reach vLLM"):
        engine.load_weights([("model.norm.weight", saved[1].model.norm.weight)])


@engine_test
def test_unknown_weights_are_refused(saved, engine):
    with pytest.raises(RolloutError, match="vLLM refused"):
        engine.load_weights([*saved[1].named_parameters(), ("model.layers.0.nonsense.weight", torch.zeros(2))])


# --- without starting vLLM ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (
            "max_model_len (900) is greater than the derived max_model_len (max_position_embeddings=256)",
            "max_completion",
        ),
        ("No available memory for the cache blocks.", "kv_cache_gib"),
        ("Available memory on node 0 on kv cache allocation is less than requested", "kv_cache_gib"),
        ("CUDA out of memory. Tried to allocate 2 GiB", "memory_fraction"),
        ("Model architectures ['Odd'] are not supported for now.", "type=transformers"),
        ("something else", "rlpost doctor"),
    ],
)
def test_startup_errors_name_a_fix(words, fix):
    error = explain_startup(ValueError(words), "some/model", SECTION, 900)
    assert isinstance(error, RolloutError)
    assert words in str(error) and fix in str(error) and "some/model" in str(error)


@pytest.mark.parametrize(
    ("version", "refused"),
    [("0.32.0", False), ("0.32.1+cpu", False), ("0.33.0", False), (None, False), ("0.31.2", True), ("0.34.0rc1", True)],
)
def test_a_vllm_that_rlpost_does_not_know_is_refused_by_name(monkeypatch, version, refused):
    monkeypatch.setattr(vllm_versions, "installed_version", lambda: version)
    if not refused:
        vllm_versions.check_version()
        return
    with pytest.raises(RolloutError, match=f"vLLM {version} is installed, and rlpost knows 0.32 and 0.33"):
        vllm_versions.check_version()


def test_the_installed_vllm_has_a_version_that_is_known():
    pytest.importorskip("vllm")
    assert vllm_versions.installed_version().startswith(vllm_versions.KNOWN)


def test_impossible_settings_are_refused_before_vllm_is_imported(monkeypatch):
    with pytest.raises(RolloutError, match="tensor_parallel=2"):
        VllmRolloutEngine("x", VllmEngine(tensor_parallel=2), max_model_len=8, seed=0, device="cpu")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(RolloutError, match="VLLM_ENABLE_V1_MULTIPROCESSING"):
        VllmRolloutEngine("x", VllmEngine(), max_model_len=8, seed=0, device="cpu")
