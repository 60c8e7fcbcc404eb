"""vLLM's own options that a recipe hands on: how they are spelt, and what they do to log-probs on a CPU."""

from __future__ import annotations

import statistics

import pytest
import torch
from conftest import save_tiny_model

from rlpost.errors import RecipeError
from rlpost.recipe.load import load_recipe
from rlpost.recipe.rules.check import Setting, check
from rlpost.recipe.rules.rollout import has_fp8_cache
from rlpost.recipe.sections.rollout import SpeculativeSection, VllmEngine
from rlpost.rollout.engine import SamplingRequest, SamplingSettings
from rlpost.rollout.remote.arguments import server_arguments
from rlpost.rollout.verify import LEVELS
from rlpost.rollout.vllm_options import as_arguments, passed_on
from rlpost.run.serve import serve

ALL = VllmEngine(kv_cache_dtype="fp8", quantization="fp8", speculative=SpeculativeSection(tokens=3))


def test_what_is_left_as_it_is_is_not_handed_on():
    assert passed_on(VllmEngine()) == {}


def test_the_same_in_process_and_to_servers():
    guesses = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2, "prompt_lookup_max": 5}
    assert passed_on(ALL) == {"kv_cache_dtype": "fp8", "quantization": "fp8", "speculative_config": guesses}
    arguments = server_arguments(
        "m", ALL, max_model_len=64, seed=0, on_cpu=True, trust_remote_code=False, address="unix:/s"
    )
    given = as_arguments(passed_on(ALL))
    assert given[:4] == ["--kv-cache-dtype", "fp8", "--quantization", "fp8"]
    assert given[4:] == ["--speculative-config", str(guesses).replace("'", '"')]
    assert [word for word in arguments if word in given] == given


def test_matches_have_an_order():
    with pytest.raises(ValueError, match="shortest_match=6 is above longest_match=5"):
        SpeculativeSection(shortest_match=6)


def test_a_server_on_a_cpu_refuses_what_a_cpu_cannot(write_recipe, tmp_path, monkeypatch):
    """Where the learner's machine cannot know, `rlpost serve` says so on its own, before anything is loaded."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    engine = {"type": "vllm", "where": "server", "urls": ["http://a:1"], "speculative": {}}
    loaded = load_recipe(write_recipe(tmp_path, {"rollout.engine": engine}))
    with pytest.raises(RecipeError, match=r"rollout\.engine\.speculative needs a CUDA GPU"):
        serve(loaded, host="127.0.0.1", port=1, say=print)


def test_an_fp8_cache_needs_a_cpu_that_can(write_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    loaded = load_recipe(write_recipe(tmp_path, {"rollout.engine": {"type": "vllm", "kv_cache_dtype": "fp8"}}))
    for able, problems in (({"avx2": True}, 1), ({"avx512_f": True}, 0), ({"amx_tile": True}, 0), ({}, 1)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        said = [line for line in check(loaded.recipe, Setting(1, tmp_path)) if "kv_cache_dtype" in line]
        assert len(said) == problems and all("AVX-512 or AMX" in line for line in said)


@pytest.mark.engine
@pytest.mark.skipif(not has_fp8_cache(), reason="vLLM has no 8-bit cache for this CPU, and the recipe is refused")
def test_an_fp8_cache_on_a_cpu_gives_true_logprobs_of_coarser_attention(tmp_path):
    """Sampler and scoring agree on them, a sync goes through, and the gap stays within the probe's level."""
    from rlpost.rollout.vllm_engine import VllmRolloutEngine

    model, _ = save_tiny_model(tmp_path)
    section = VllmEngine(dtype="float32", kv_cache_gib=0.25, kv_cache_dtype="fp8")
    engine = VllmRolloutEngine(str(tmp_path), section, max_model_len=96, seed=0, device="cpu")
    try:
        engine.load_weights([(n, p) for n, p in model.state_dict().items() if n != "lm_head.weight"], 1)
        requests = [SamplingRequest(tuple(range(40, 60 + i)), i) for i in range(8)]
        sampled = engine.sample(requests, SamplingSettings(24, 1.0))
        whole = [r.token_ids + c.token_ids for r, c in zip(requests, sampled, strict=True)]
        scored = engine.logprobs(whole)
    finally:
        engine.close()
    gaps = []
    for ids, completion in zip(whole, sampled, strict=True):
        with torch.no_grad():
            theirs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        true = theirs.gather(-1, torch.tensor(ids[1:])[:, None])[-len(completion.token_ids) :, 0].tolist()
        gaps += [abs(a - b) for a, b in zip(true, completion.sampler_logprobs, strict=True)]
    said = [x for row, c in zip(scored, sampled, strict=True) for x in row[-len(c.token_ids) :]]
    own = [x for c in sampled for x in c.sampler_logprobs]
    assert statistics.fmean(abs(a - b) for a, b in zip(said, own, strict=True)) < LEVELS["quantised"] / 2
    print("mean gap", statistics.fmean(gaps), max(gaps))
    assert 1e-3 < statistics.fmean(gaps) < LEVELS["quantised"]
