"""Whole optimizer steps over random rollouts: tree, sorted and padded rows give one gradient, to 1e-6 of its norm in float32.

Where sequences' gradients cancel in the sum, its norm says little about rounding, which is theirs: then to 5e-7 of the sum
of their norms, some eight roundings. Which examples need that depends on the CPU's matrix products.

A rollout has dead groups, groups that were sampled under a hinted prompt, demonstrations under the group's own prompt and
under another, and goes through the gate, `weigh` and the `Updater` as a run's does; pairs go through `pair_batches`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_policy_layouts import VOCABULARY, make_policy

from rlpost.experience import Completion, Group, Outcome, Prompt, Score
from rlpost.learner.buffer import RolloutBuffer
from rlpost.learner.learner import DataParallelLearner, StepReport, token_logprobs
from rlpost.learner.process import Processes
from rlpost.learner.update import Updater
from rlpost.recipe.sections.learner import LearnerSection
from rlpost.recipe.sections.method import MethodSection
from rlpost.recipe.sections.reward import RewardSection
from rlpost.source.pair_buffer import open_pairs
from rlpost.source.weigh import open_buffer, weigh
from rlpost.teaching.gate import gate

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = settings(
    max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate]
)  # shrinking takes minutes
MODELS = ("llama", "qwen2", "qwen3", "gemma", "gemma3_text", "qwen2_tied")
LIMIT = 14
METHODS = {
    "both by weight": {"preset": "grpo", "gate": {"type": "soft"}},
    "either or": {"preset": "hpt"},
    "demonstrations off-policy": {"preset": "dr_grpo", "gate": {"type": "luffy"}, "reduction": {"type": "token"}},
    "sequence ratios": {"preset": "gspo", "gate": {"type": "soft"}},
    "kl and entropy": {
        "preset": "dr_grpo",
        "gate": {"type": "soft"},
        "kl": {"coefficient": 0.1},
        "entropy": {"coefficient": 0.02},
    },
}
PAIRS = (
    {"preset": "dpo"},
    {"preset": "rpo", "pairs": {"beta": 0.2, "sft": {"type": "sequence_mean", "weight": 0.2}, "baseline": "initial"}},
    {"preset": "dpo", "pairs": {"loss": "ipo"}},
)


class Recording(DataParallelLearner):
    """Keeps the gradient of a step instead of taking it."""

    gradient: torch.Tensor
    uncancelled = 0.0  # the sum of the norms of its micro-batches' gradients

    def backward(self, loss, *, last):
        before = self._flat()
        super().backward(loss, last=last)
        self.uncancelled += float((self._flat().double() - before.double()).norm())

    def _flat(self):
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self._parameters])

    def step(self, index, *, scale=1.0, critic_only=False):
        self._reduce_gradients()
        self.gradient = self._flat()
        self.discard()
        return StepReport(float(self.gradient.norm()), 0.0, False)


@dataclass(frozen=True)
class Shape:
    """One group: what is drawn of it."""

    prompt: int
    lengths: tuple[int, ...]
    right: tuple[bool, ...]  # none or all: the group is dead
    hint: int  # tokens that the hint adds to the prompt; 0: not hinted
    demonstration: int  # tokens; 0: there is none


@st.composite
def shapes(draw, fewest=1):
    lengths = draw(st.lists(st.integers(1, LIMIT), min_size=fewest, max_size=5))
    kind = draw(st.sampled_from(["mixed", "none right", "all right"]))
    right = [kind == "all right" or (kind == "mixed" and i % 2 == 0) for i in range(len(lengths))]
    hint = draw(st.sampled_from([0, 0, 5]))
    return Shape(draw(st.integers(1, 9)), tuple(lengths), tuple(right), hint, draw(st.sampled_from([0, 1, 8])))


LIVE = Shape(5, (3, 9, 1), (True, False, False), 0, 0)  # so that no example is all zeros


def words(draw: random.Random, count: int) -> tuple[int, ...]:
    return tuple(draw.choices(range(VOCABULARY), k=count))


def make_rollout(policy, method, drawn, seed, minibatches):
    """The rollout as the loop would have made it, and its solutions' prompts."""
    draw = random.Random(seed)
    groups, solutions = [], {}
    for i, shape in enumerate(drawn):
        bare = Prompt(f"p{i}", (), "", words(draw, shape.prompt))
        hinted = replace(bare, token_ids=bare.token_ids + words(draw, shape.hint), hint="so", origin=bare)
        made = [words(draw, n) for n in shape.lengths]
        completions = tuple(Completion(ids, tuple(draw.gauss(-4, 0.5) for _ in ids), "", "stop") for ids in made)
        scores = tuple((Score(Outcome.SCORED, float(right)),) for right in shape.right)
        groups.append(Group(hinted if shape.hint else bare, completions, scores))
        solutions[bare.id] = words(draw, shape.demonstration) or None
    gated = gate(
        groups, method.gate, accuracy_rewards=[True], rollout=0, read=lambda asked: [solutions[p.id] for p in asked]
    )
    buffer = open_buffer(groups, step=0, minibatches=minibatches, gated=gated)
    weigh(
        buffer,
        method=method,
        rewards=[RewardSection(function="right")],
        names=["right"],
        minibatches=minibatches,
        max_completion_tokens=LIMIT,
        processes=Processes(),
    )
    return with_logprobs(policy, method, buffer, seed)


def with_logprobs(policy, method, buffer: RolloutBuffer, seed: int) -> RolloutBuffer:
    """Ratios on both sides of the clip's limits, and a reference policy that is another."""
    rows = updater(Recording(policy, LearnerSection(), Processes()), method, "padded", 10_000, 1).rows(buffer, None)
    logp = token_logprobs(policy, rows, buffer.tokens)
    noise = torch.randn(2, buffer.tokens, generator=torch.Generator().manual_seed(seed))
    buffer.old_logp, buffer.ref_logp = logp + 0.2 * noise[0], logp + 0.3 * noise[1]
    return buffer


def updater(learner, method, layout, budget, minibatches):
    section = LearnerSection(layout=layout, micro_batch_tokens=budget, minibatches=minibatches)
    return Updater(learner, method, section, layout, 0, None, 0)


def gradients(policy, method, buffer, layout, budget, minibatches):
    """The gradient of every minibatch's optimizer step, its metrics, and the sum of its micro-batches' norms."""
    found = []
    for done in range(minibatches):
        learner = Recording(policy, LearnerSection(), Processes())
        buffer.updates_done = done
        metrics = updater(learner, method, layout, budget, minibatches).update(buffer, done)
        found.append((learner.gradient, metrics, learner.uncancelled))
    return found


def assert_one_gradient(policy, method, buffer, exact, budget, minibatches):
    """`exact`: the same rollout of which nothing is left out."""
    want = gradients(policy, method, exact, "padded", 10_000, minibatches)
    one_by_one = [
        terms for *_, terms in gradients(policy, method, exact, "padded", 1, minibatches)
    ]  # a row a micro-batch
    assert want[0][0].norm() > 0
    for layout in ("tree", "sorted", "padded"):
        got = gradients(policy, method, buffer, layout, budget, minibatches)
        for (ours, ours_said, _), (theirs, theirs_said, _), terms in zip(got, want, one_by_one, strict=True):
            assert ours.shape == theirs.shape
            gap, norm = float((ours.double() - theirs.double()).norm()), float(theirs.double().norm())
            assert gap <= max(1e-6 * norm, 5e-7 * terms), (layout, gap, norm, terms)
            assert ours_said["tokens/useful"] <= theirs_said["tokens/useful"]
            assert ours_said["optimizer/loss"] == pytest.approx(theirs_said["optimizer/loss"], rel=1e-5, abs=1e-5)


@pytest.fixture(scope="module")
def policies():
    return {kind: make_policy(kind, temperature=0.8) for kind in MODELS}


@pytest.mark.thorough
@pytest.mark.parametrize("kind", MODELS)
@given(
    drawn=st.lists(shapes(), min_size=1, max_size=4),
    name=st.sampled_from(list(METHODS)),
    budget=st.integers(20, 200),
    minibatches=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
@EXAMPLES
def test_a_step_has_one_gradient_in_all_layouts(policies, kind, drawn, name, budget, minibatches, seed):
    method, policy = MethodSection.model_validate(METHODS[name]), policies[kind]
    buffer = make_rollout(policy, method, [LIVE, *drawn], seed, minibatches)
    # What a group pulls on by KL and entropy counts also where no sample is to be learned from: routes leave it out.
    pulled = method.kl.coefficient > 0 or method.entropy.coefficient != 0
    exact = replace(buffer, dead=tuple(pulled and not route.samples for route in buffer.routes))
    assert_one_gradient(policy, method, buffer, exact, budget, minibatches)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", MODELS)
@given(
    drawn=st.lists(shapes(fewest=3), min_size=1, max_size=4),
    number=st.integers(0, len(PAIRS) - 1),
    budget=st.integers(20, 200),
    seed=st.integers(0, 1000),
)
@EXAMPLES
def test_pairs_have_one_gradient_in_all_layouts(policies, kind, drawn, number, budget, seed):
    method, policy, draw = MethodSection.model_validate(PAIRS[number]), policies[kind], random.Random(seed)
    groups, baselines = [], []
    for i, shape in enumerate(drawn):
        sides = [words(draw, n) for n in shape.lengths[:2]]
        completions = tuple(Completion(ids, (float("nan"),) * len(ids), "", "stop") for ids in sides)
        groups.append(Group(Prompt(f"p{i}", (), "", words(draw, shape.prompt)), completions))
        baselines.append(words(draw, shape.lengths[2]) if method.pairs.baseline == "initial" else None)
    buffer = open_pairs(groups, baselines, step=0, minibatches=1, processes=Processes())
    buffer = with_logprobs(policy, method, buffer, seed)
    assert_one_gradient(policy, method, buffer, buffer, budget, 1)


def test_the_rollouts_drawn_have_all_that_is_claimed(policies):
    """Dead groups, a hinted group, demonstrations as another branch of the group's tree and in a row of their own."""
    method = MethodSection.model_validate(METHODS["both by weight"])
    drawn = [
        LIVE,
        Shape(4, (2, 5, 3), (False, True, False), 0, 8),
        Shape(4, (2, 5, 3), (True, False, False), 5, 8),
        Shape(3, (4, 2), (False, False), 0, 6),
        Shape(3, (4, 2, 5, 1, 2), (True,) * 5, 0, 0),
    ]
    buffer = make_rollout(policies["llama"], method, drawn, 0, 1)
    assert buffer.dead == (False, False, False, True, True)
    made = [(len(group.prompt_ids), len(group.completions)) for group in buffer.row_groups(0)]
    assert made == [(5, 3), (4, 4), (9, 3), (4, 1), (3, 1)]
    exact = replace(buffer, dead=(False,) * 5)
    assert [len(g.completions) for g in exact.row_groups(0)] == [3, 4, 3, 1, 3, 5]
    assert_one_gradient(policies["llama"], method, buffer, exact, 60, 1)
