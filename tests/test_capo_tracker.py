"""CAPO's tracker: capped logits, what it holds in memory, what it costs, and that layouts do not matter to it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from method_cases import VOCABULARY, Case
from test_capo import capo, context, tracker_of
from torch.utils._python_dispatch import TorchDispatchMode
from zero_worker import CAPO, SECTION, Alone, flat, policy, rollout

from rlpost.gradient.metrics import merge, values
from rlpost.gradient.types import Counts, HeadStatistics, TokenView
from rlpost.learner import curvature_step
from rlpost.learner.curvature_step import CurvatureStep, mask_share
from rlpost.learner.learner import DataParallelLearner
from rlpost.learner.process import Processes
from rlpost.learner.update import Updater
from rlpost.methods import compute_coefficients
from rlpost.methods.capo import CurvatureTracker, make_tracker
from rlpost.policy.head import LogitRule
from rlpost.recipe.sections.method import MethodSection


def test_capped_logits_against_a_real_step_of_the_head() -> None:
    """With z = cap tanh(f / cap) / T every score has its own slope: the small Adam step moves the scores as predicted."""
    case, rule = Case(4), LogitRule(temperature=0.8, scale=1.5, softcap=2.0)
    raw = case.logits().detach()

    def capped(raw: torch.Tensor) -> torch.Tensor:
        return 2.0 * torch.tanh(raw * 1.5 / 2.0) / 0.8

    scores = rule.logits(raw.clone())
    st = replace(case.statistics(), top_ids=torch.arange(VOCABULARY).expand(raw.shape), top_logits=scores)
    tracker = tracker_of(capo(top_k=VOCABULARY))
    got = tracker.predict(case.view(statistics=st), context(tracker, 1e-6, logit_slope=rule.slope))
    for n in range(5):
        head = case.head.detach().clone().requires_grad_()
        before = torch.log_softmax(capped(head @ case.hidden[n]), -1)[case.token[n]]
        (-case.advantage[case.sequence[n]] * before).backward()
        torch.optim.Adam([head], lr=1e-6).step()
        after = torch.log_softmax(capped(head.detach() @ case.hidden[n]), -1)[case.token[n]]
        torch.testing.assert_close(got.shift[n], (after - before).detach(), rtol=1e-3, atol=1e-12)
    sgd = tracker_of(capo(step="sgd"))
    with pytest.raises(ValueError, match="step: adam"):
        sgd.predict(case.view(), context(sgd, logit_slope=rule.slope))


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            self.elements = max(self.elements, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return made


def test_nothing_of_tokens_times_ids_times_width_is_ever_held() -> None:
    """Neither in the prediction, whose chunks bound it, nor in the tracker, whose rows are the head's at the most."""
    n, vocabulary, width, k = 96, 40, 32, 20
    g = torch.Generator().manual_seed(0)
    hidden, scores = torch.randn(n, width, generator=g), torch.randn(n, vocabulary, generator=g)
    token, sequence = scores.argmax(-1), torch.zeros(n, dtype=torch.int64)
    top, ids = scores.topk(k)
    logp, one = torch.log_softmax(scores, -1).amax(-1), torch.zeros(1, dtype=torch.bool)
    view = TokenView(
        logp, -logp, logp, logp, torch.ones(n), sequence, sequence[:1], one, one, token=token, token_index=torch.arange(n),
        statistics=HeadStatistics(hidden, top_ids=ids, top_logits=top),
    )  # fmt: skip
    section = capo(top_k=k, chunk_tokens=4)
    tracker = CurvatureTracker(section.curvature, vocabulary, width)
    with LargestTensor() as predicting:
        tracker.predict(view, context(tracker))
    assert predicting.elements == 4 * k * width
    coefficients = compute_coefficients(section, view, Counts(n, 1, 1), context=context(tracker))
    with LargestTensor() as tracking:
        for _ in range(3):
            tracker.accumulate(view, coefficients, context(tracker))
            tracker.finish_step(context(tracker))
    assert tracking.elements <= max(n * width, n * k, (vocabulary + 1) * width) < n * k * width / 10
    assert tracker.moments._first.data.shape[0] <= vocabulary + 1


def test_moments_and_rejections_are_free_of_padding_layout_and_accumulation(tiny_model, one_thread) -> None:
    """Tree, sorted or padded rows, in few or many micro-batches: the tracker learns the same from real rollouts."""
    found = []
    for layout, tokens in (("tree", 4096), ("tree", 48), ("sorted", 48), ("padded", 256)):
        section = SECTION.model_copy(update={"micro_batch_tokens": tokens})
        learner, slots = DataParallelLearner(policy(tiny_model), section, Alone()), MethodSection.model_validate(CAPO)
        tracker = make_tracker(slots, 258, 64)
        updater, metrics = Updater(learner, slots, section, layout, 0, None, 0, tracker), []
        for step in (0, 1, 2):
            buffer = rollout(step // 2, 0, 1)
            buffer.updates_done = step % 2
            metrics.append(updater.update(buffer, step))
        found.append((flat(tracker.state_dict()), metrics))
    state, steps = found[0]
    assert any(row["tokens/micro_batches"] > steps[0]["tokens/micro_batches"] for row in found[1][1])
    for other, rows in found[1:]:
        assert torch.equal(other["ids"], state["ids"]) and torch.equal(other["steps"], state["steps"])
        for name in ("first", "second", "limits"):
            assert float((other[name] - state[name]).abs().max() / state[name].abs().max()) < 1e-4, name
        for row, expected in zip(rows, steps, strict=True):
            for key in ("mask/curvature/rejected_share", "mask/curvature/kl_mean", "optimizer/loss"):
                assert row.get(key) == pytest.approx(expected.get(key), rel=1e-4, abs=1e-7)


def test_the_masks_cost_is_a_mean_over_processes_and_a_share_of_the_whole_step() -> None:
    check = CurvatureStep(tracker_of(capo()), context())
    check.mask_seconds = 0.25
    assert values(merge([check.cost(), check.cost()])) == {"time/mask_ms": 250.0}
    assert mask_share({"time/mask_ms": 250.0}, {"time/rollout": 4.0, "time/update": 1.0}) == {"time/mask_share": 0.05}
    assert mask_share({}, {"time/update": 1.0}) == {}


def test_only_the_mask_is_timed_and_a_gpu_is_waited_for(monkeypatch) -> None:
    case, section = Case(6), capo(verify_every=0)
    tracker, waited = tracker_of(section), []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    check = CurvatureStep(tracker, context(tracker))
    view, inside = case.view(), []
    original = curvature_step.compute_coefficients

    def untimed(*arguments, **keywords):
        inside.append(check.mask_seconds)
        found = original(*arguments, **keywords)
        inside.append(check.mask_seconds)
        return found

    monkeypatch.setattr(curvature_step, "compute_coefficients", untimed)
    found = check.coefficients(section, None, view, case.counts())
    assert 0 < inside[0] == inside[1] < check.mask_seconds and not waited
    before = check.mask_seconds
    check.finish(None, Processes())
    assert check.mask_seconds > before and tracker.moments.steps == 1
    alone = compute_coefficients(section, view, case.counts(), context=context(tracker_of(section)))
    assert alone.coefficient.equal(found.coefficient)
    tracker.device = torch.device("cuda", 0)
    with check._clock():
        pass
    assert waited == [torch.device("cuda", 0)] * 2


def test_the_sgd_form_is_refused_for_a_model_with_capped_logits_before_it_is_loaded(tmp_path, write_recipe) -> None:
    from transformers import Gemma2Config

    from rlpost.recipe.load import load_recipe
    from rlpost.recipe.rules.check import RULES, Setting
    from rlpost.recipe.rules.model import capped_logits

    Gemma2Config(vocab_size=64, hidden_size=8, final_logit_softcapping=30.0).save_pretrained(tmp_path / "gemma")
    recipe = write_recipe(tmp_path, {"model.path": str(tmp_path / "gemma")})
    for step, expected in (("sgd", 1), ("adam", 0)):
        loaded = load_recipe(recipe, [f"method.masks=[{{type: curvature, step: {step}}}]"])
        problems = list(capped_logits(loaded.recipe, Setting()))
        assert len(problems) == expected and all("final_logit_softcapping=30" in text for text in problems)
    assert capped_logits in RULES
