"""GHPO: which groups are hard, escalation within a step, and the prompt that completions are learned under."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from method_cases import method

from rlpost.experience import Completion, Demonstration, Group, Outcome, Prompt, Score
from rlpost.gradient.metrics import values
from rlpost.methods import compute_advantages
from rlpost.methods.ghpo import is_hard, is_solved, level_ratios, next_first_level
from rlpost.recipe.sections.guidance import HintGuidance
from rlpost.recipe.sections.method import describe_order
from rlpost.teaching.guide import SEED_LEVEL, guide, remember
from rlpost.teaching.verdict import accuracies

G = 4
RATIOS = (0.25, 0.5, 0.75)


def score(value: float | None, outcome: Outcome = Outcome.SCORED) -> Score:
    return Score(outcome, value)


def prompt(name: str, *, solution: bool = True) -> Prompt:
    demonstration = Demonstration("abcdefgh") if solution else None
    return Prompt(name, ({"role": "user", "content": name},), name, (1, 2), {}, demonstration)


@dataclass
class World:
    """Prompts, and the level that solves each (0: without a hint; None: nothing does)."""

    solved_at: dict[str, int | None]
    calls: list[tuple[int, list[str]]] = field(default_factory=list)

    def sample(self, prompts, level):
        self.calls.append((level, [p.id for p in prompts]))
        tokens = tuple(range(3 + len(p_hint) if (p_hint := prompts[0].hint) else 3))
        made = Completion(tokens, (-1.0,) * len(tokens), "text", "stop")
        return [Group(p, (made,) * G) for p in prompts]

    def score(self, groups):
        return [Group(g.prompt, g.completions, self._scores(g)) for g in groups]

    def _scores(self, group):
        need, level = self.solved_at[group.prompt.id], len(group.prompt.hint) // 2
        right = need is not None and level >= need
        return tuple((score(1.0 if right and i == 0 else 0.0), score(1.0)) for i in range(G))  # accuracy, format

    def hint(self, prompts, ratio):
        return [self._hinted(p, ratio) for p in prompts]

    def _hinted(self, p, ratio):
        if p.demonstration is None:
            return None
        hint = p.demonstration.text[: round(8 * ratio)]
        return Prompt(p.id, p.messages, p.text + hint, (1, 2, *range(len(hint))), p.columns, p.demonstration, hint, p)

    def start(self, *, prompts=None):
        groups = self.score(self.sample(prompts or [prompt(name) for name in self.solved_at], 0))
        self.calls.clear()
        return groups

    def guide(self, groups, rollout=0, rollouts=10, known=None, **slots):
        section = HintGuidance(**slots)
        return guide(
            groups,
            section,
            sample=self.sample,
            score=self.score,
            hint=self.hint,
            accuracy_rewards=(True, False),
            rollout=rollout,
            rollouts=rollouts,
            memory=known or {},
        )


LEVELS = {"a": 0, "b": 1, "c": 2, "d": 3, "e": None, "f": 1}


def test_solved_at_every_level_and_never() -> None:
    world = World(dict(LEVELS))
    before = world.start()
    guided = world.guide(before)
    assert guided.levels == [0, 1, 2, 3, 3, 1]
    assert [g.prompt.id for g in guided.groups] == list(LEVELS)
    assert [g.prompt.hint for g in guided.groups] == ["", "ab", "abcd", "abcdef", "abcdef", "ab"]
    assert guided.groups[0] is before[0], "a group that was solved stays as it is"
    assert all(len(g.completions) == G for g in guided.groups), "replaced, never mixed"


def test_one_batched_call_a_level_with_only_the_groups_still_hard() -> None:
    world = World(dict(LEVELS))
    world.guide(world.start())
    assert world.calls == [
        (SEED_LEVEL + 1, ["b", "c", "d", "e", "f"]),
        (SEED_LEVEL + 2, ["c", "d", "e"]),
        (SEED_LEVEL + 3, ["d", "e"]),
    ]


def test_no_call_when_nothing_is_hard() -> None:
    world = World({"a": 0, "b": 0})
    guided = world.guide(world.start())
    assert world.calls == [] and guided.levels == [0, 0]


def test_metrics() -> None:
    world = World(dict(LEVELS))
    found = values(world.guide(world.start()).metrics)
    assert found["guidance/hard_share"] == pytest.approx(5 / 6)
    assert found["guidance/hinted_share"] == pytest.approx(5 / 6)
    assert found["guidance/unsolved_share"] == pytest.approx(1 / 6)
    assert [found[f"guidance/solved_level_{level}"] for level in (1, 2, 3)] == pytest.approx([2 / 5, 1 / 5, 1 / 5])
    assert [found[f"guidance/groups_level_{level}"] for level in (1, 2, 3)] == [5, 3, 2]
    assert [found[f"guidance/tokens_level_{level}"] for level in (1, 2, 3)] == [5 * G * 5, 3 * G * 7, 2 * G * 9]
    assert found["guidance/accuracy_without_hints"] == pytest.approx(1 / (6 * G))
    assert found["guidance/accuracy_trained"] == pytest.approx(5 / (6 * G))
    assert found["guidance/accuracy_trained_unhinted"] == 1 / G
    assert found["guidance/accuracy_trained_hinted"] == pytest.approx(4 / (5 * G))
    assert found["guidance/accuracy_level_3"] == pytest.approx(1 / (2 * G))
    assert found["guidance/hint_tokens"] == pytest.approx((2 + 4 + 6 + 6 + 2) / 5)
    assert found["guidance/no_hint"] == 0


def test_prompts_without_a_solution_keep_their_samples_and_are_counted() -> None:
    world = World({"a": None, "b": 1})
    guided = world.guide(world.start(prompts=[prompt("a", solution=False), prompt("b")]))
    assert guided.levels == [0, 1] and values(guided.metrics)["guidance/no_hint"] == 1
    assert all("a" not in names or level == SEED_LEVEL + 1 for level, names in world.calls)


@pytest.mark.parametrize(
    ("rows", "hard"),
    [
        ([0.0, 0.0, 0.0], True),
        ([0.0, 1.0, 0.0], False),
        ([0.0, 0.25, 0.99], True),
        ([0.0, 0.1 + 0.2 + 0.7, 0.0], False),
        ([0.0, None, 0.0], False),
        ([None, None, None], False),
        ([-1.0, 0.0, -1.0], True),
    ],
)
def test_hard_is_every_completion_known_to_be_wrong(rows, hard) -> None:
    assert is_hard(rows, HintGuidance()) is hard


@pytest.mark.parametrize("outcome", [Outcome.TIMED_OUT, Outcome.CRASHED, Outcome.UNPARSABLE, Outcome.NOT_APPLICABLE])
def test_unknown_is_not_wrong(outcome) -> None:
    """One gold answer that cannot be parsed, one timeout: the group is not hard (the released code's NaN <= 0)."""
    group = Group(prompt("a"), (), (*[(score(0.0), score(1.0))] * 3, (score(None, outcome), score(1.0))))
    assert accuracies(group, (True, False)) == [0.0, 0.0, 0.0, None]
    assert not is_hard(accuracies(group, (True, False)), HintGuidance())
    assert not is_solved(accuracies(group, (True, False)), HintGuidance()), "nor is it right"


def test_format_rewards_have_no_say_and_several_accuracy_rewards_all_have() -> None:
    group = Group(prompt("a"), (), tuple((score(0.0), score(float(i < 2)), score(0.0)) for i in range(4)))
    assert is_hard(accuracies(group, (True, False, True)), HintGuidance())
    assert not is_hard(accuracies(group, (True, True, True)), HintGuidance())
    assert accuracies(group, (False, False, False)) == [None] * 4, "nothing says what is right"
    mixed = Group(prompt("a"), (), ((score(None, Outcome.NOT_APPLICABLE), score(1.0), score(0.0)),))
    assert accuracies(mixed, (True, False, True)) == [0.0]


def test_partial_marks_count_as_wrong_up_to_a_limit() -> None:
    released = HintGuidance(wrong_at_most=0.2)
    assert is_hard([0.2, 0.0], released) and not is_hard([0.3, 0.0], released) and is_solved([0.3, 0.0], released)
    lower = HintGuidance(threshold=0.5)
    assert is_hard([0.49, 0.0], lower) and not is_hard([0.5, 0.0], lower) and is_solved([0.5, None], lower)
    assert method(preset="ghpo_released").guidance.wrong_at_most == 0.0


def test_prompts_that_earn_only_partial_credit_get_a_hint_and_are_reported_as_evaluation_would() -> None:
    """reasoning-gym gives wrong answers up to 0.75: with "wrong is 0" no such prompt would ever be hinted."""

    class Partial(World):
        def _scores(self, group):
            mark = 1.0 if group.prompt.hint else 0.5
            return tuple((score(mark if i == 0 else 0.01), score(1.0)) for i in range(G))

    guided = Partial({"a": None}).guide(Partial({"a": None}).start())
    found = values(guided.metrics)
    assert guided.levels == [1] and found["guidance/hard_share"] == 1.0
    assert found["guidance/accuracy_without_hints"] == 0.0 and found["guidance/accuracy_trained"] == 1 / G
    released = Partial({"a": None}).guide(Partial({"a": None}).start(), wrong_at_most=0.0)
    assert released.levels == [0] and values(released.metrics)["guidance/accuracy_without_hints"] == 0.0


def test_vectors_of_the_method_page() -> None:
    """methods/ghpo.md 3.3: reward = accuracy + 0.5 * format."""
    section, group = method(preset="ghpo"), torch.zeros(8, dtype=torch.int64)

    def advantage(accuracy, form):
        rewards = torch.stack([torch.tensor(accuracy), 0.5 * torch.tensor(form)], 1)
        return compute_advantages(section, rewards, group, weights=[1.0, 0.5]).advantage

    first = advantage([1.0] + [0.0] * 7, [1.0] * 8)
    torch.testing.assert_close(first, torch.tensor([2.47417] + [-0.35345] * 7, dtype=torch.float64), atol=5e-6, rtol=0)
    second = advantage([0.0] * 8, [1.0] * 4 + [0.0] * 4)
    torch.testing.assert_close(second.abs(), torch.full((8,), 0.93506, dtype=torch.float64), atol=5e-6, rtol=0)
    assert (advantage([0.0] * 8, [1.0] * 8) == 0).all()


@pytest.mark.parametrize(
    ("accuracy", "form", "level"),
    [([1] + [0] * 7, [1] * 8, 0), ([0] * 8, [1] * 4 + [0] * 4, 3), ([0] * 8, [1] * 8, 3)],
)
def test_hardness_of_the_method_pages_vectors_from_their_scores(accuracy, form, level) -> None:
    """methods/ghpo.md 3.3, through guide(): format is ignored, so the second and the third are sampled again to the end."""

    class Vector(World):
        def _scores(self, group):
            return tuple((score(float(a)), score(float(f))) for a, f in zip(accuracy, form, strict=True))

    groups = Vector({"a": None}).start()
    assert is_hard(accuracies(groups[0], (True, False)), HintGuidance()) is (level > 0)
    assert Vector({"a": None}).guide(groups).levels == [level]


def test_cold_start_and_schedule() -> None:
    assert level_ratios(HintGuidance(cold_start=20), 19, 100) == ()
    assert level_ratios(HintGuidance(cold_start=20), 20, 100) == RATIOS
    shrinking = HintGuidance(final_scale=0.5)
    assert level_ratios(shrinking, 0, 11) == RATIOS
    assert level_ratios(shrinking, 10, 11) == pytest.approx([0.125, 0.25, 0.375])
    assert level_ratios(shrinking, 5, 11) == pytest.approx([0.1875, 0.375, 0.5625])
    assert level_ratios(HintGuidance(final_scale=0.0), 10, 11) == ()
    world = World(dict(LEVELS))
    guided = world.guide(world.start(), cold_start=1)
    assert guided.levels == [0] * 6 and not world.calls
    found = values(guided.metrics)
    assert found["guidance/hard_share"] == pytest.approx(5 / 6), "still watched"
    assert found["guidance/no_hint"] == 0, "no hint was wanted"


def test_memory_begins_at_the_level_that_was_needed() -> None:
    world = World(dict(LEVELS))
    assert world.guide(world.start()).first_levels == {}, "off by default"
    section = HintGuidance(memory=True)

    def visit(memory):
        groups = world.start()
        guided = guide(
            groups,
            section,
            sample=world.sample,
            score=world.score,
            hint=world.hint,
            accuracy_rewards=(True, False),
            rollout=0,
            rollouts=10,
            memory=memory,
        )
        return guided, remember(memory, guided.first_levels)

    guided, memory = visit({})
    assert memory == {"c": 2, "d": 3, "e": 3}
    guided, memory = visit(memory)
    assert guided.levels == [0, 1, 2, 3, 3, 1]
    assert [names for _, names in world.calls] == [["b", "f"], ["c"], ["d", "e"]], "easier levels are not tried again"
    assert memory == {"d": 2, "e": 3}, "what was solved at once begins one level easier"
    world.solved_at["e"] = 0
    assert visit(memory)[1] == {"c": 2, "d": 3}, "e is solved without a hint and forgotten; d was begun too easy"


def test_next_first_level() -> None:
    assert [next_first_level(1, level, solved=True) for level in (1, 2, 3)] == [1, 2, 3]
    assert [next_first_level(2, level, solved=True) for level in (2, 3)] == [1, 3]
    assert [next_first_level(first, 3, solved=False) for first in (1, 2, 3)] == [3, 3, 3]
    assert next_first_level(1, 2, solved=False) == 2, "where the third hint does not fit"


OUTCOMES = {"t": Outcome.TIMED_OUT, "c": Outcome.CRASHED, "u": Outcome.UNPARSABLE, "n": Outcome.NOT_APPLICABLE}


class Scripted(World):
    """`solved_at` has every prompt's scores instead, a word a level: 0 wrong, 1 right, others of unknown accuracy."""

    def _scores(self, group):
        word = self.solved_at[group.prompt.id].split()[len(group.prompt.hint) // 2]
        return tuple((score(None, OUTCOMES[c]) if c in OUTCOMES else score(float(c)), score(1.0)) for c in word)


SCRIPT = {
    "solved": "0001",
    "timeout": "000t",
    "unparsable": "uuuu",
    "not applicable": "0n00",
    "late": "0000 000t 0001",
    "lost": "0000 tttt cccc uuuu",
    "one": "0000 1ttt",
    "never": "0000 00nn 0000 u000",
}


def test_unknown_outcomes_begin_nothing_and_end_nothing() -> None:
    """Only a group that is known to be all wrong is hinted; from then on only a right completion ends it."""
    world = Scripted(dict(SCRIPT))
    guided = world.guide(world.start())
    assert dict(zip(SCRIPT, guided.levels, strict=True)) == {
        "solved": 0, "timeout": 0, "unparsable": 0, "not applicable": 0, "late": 2, "lost": 3, "one": 1, "never": 3,
    }  # fmt: skip
    found = values(guided.metrics)
    assert found["guidance/hard_share"] == 4 / 8 and found["guidance/unknown_share"] == 3 / 8
    assert found["guidance/unsolved_share"] == 2 / 8
    assert [found[f"guidance/solved_level_{level}"] for level in (1, 2, 3)] == [1 / 4, 1 / 4, 0]
    # late 1/4, one 1/1, never 0/3, lost: nothing is known; and of those without a hint 1/4, 0/3, nothing, 0/3
    assert found["guidance/accuracy_trained_hinted"] == pytest.approx((1 / 4 + 1 + 0) / 3)
    assert found["guidance/accuracy_trained_unhinted"] == pytest.approx((1 / 4 + 0 + 0) / 3)


def test_unknown_outcomes_teach_the_memory_nothing() -> None:
    world = Scripted(dict(SCRIPT))
    memory = dict.fromkeys(SCRIPT, 2) | {"one": 1}
    guided = world.guide(world.start(), known=memory, memory=True)
    after = remember(memory, guided.first_levels)
    kept = {"timeout": 2, "unparsable": 2, "not applicable": 2}
    assert after == {**kept, "lost": 3, "never": 3}, "solved ones are forgotten; late was solved where it began"


def test_a_hint_that_does_not_fit_locks_no_prompt_out() -> None:
    """Levels 1 and 2 fit, level 3 does not: the next visits begin at 2, and a remembered 3 is forgotten."""

    class Narrow(World):
        def hint(self, prompts, ratio):
            return [None if ratio > 0.5 else p for p in super().hint(prompts, ratio)]

    world, memory = Narrow({"a": None}), {}
    for levels, after in (([2], {"a": 2}), ([2], {"a": 2})):
        guided = world.guide(world.start(), known=memory, memory=True)
        memory = remember(memory, guided.first_levels)
        assert guided.levels == levels and memory == after
    stuck = world.guide(world.start(), known={"a": 3}, memory=True)
    assert stuck.levels == [0] and values(stuck.metrics)["guidance/no_hint"] == 1
    assert remember({"a": 3}, stuck.first_levels) == {}, "it begins at the first level again"


@pytest.mark.parametrize(
    ("condition", "bare"), [("hinted", []), ("question", ["b", "c", "d", "e", "f"]), ("released", ["b", "c", "f"])]
)
def test_the_prompt_that_is_learned_under(condition, bare) -> None:
    """Released: the last level that ran keeps its hinted prompts; groups solved before are put under the bare question."""
    world = World(dict(LEVELS))
    guided = world.guide(world.start(), condition=condition)
    under_bare = [
        g.prompt.id for g, level in zip(guided.groups, guided.levels, strict=True) if level and not g.prompt.hint
    ]
    assert under_bare == bare
    for group, level in zip(guided.groups, guided.levels, strict=True):
        unknown = all(math.isnan(p) for c in group.completions for p in c.sampler_logprobs)
        assert unknown is (group.prompt.id in bare), "the sampler's log-probs belong to the prompt it saw"
        assert group.prompt.token_ids == ((1, 2) if not group.prompt.hint else (1, 2, *range(2 * level)))


def test_the_whole_turn_can_be_judged() -> None:
    seen: list[str] = []

    class Turn(World):
        def score(self, groups):
            seen.extend(c.text for g in groups for c in g.completions)
            return super().score(groups)

    world = Turn({"a": 1})
    groups = world.start()
    seen.clear()
    guided = world.guide(groups, place="assistant", judge="turn")
    assert seen == ["abtext"] * G
    assert [c.text for c in guided.groups[0].completions] == ["text"] * G, "what was sampled is what is kept"
    assert guided.groups[0].scores[0][0].value == 1.0


def test_the_order_is_printed() -> None:
    section = method(preset="capo", guidance={"type": "hint"}, gate={"type": "solve_rate"})
    order = describe_order(section)
    kinds = ["guide: ", "hinted groups replace", "gate: ", "advantage: ", "mask: curvature", "reduction: "]
    places = [next(i for i, step in enumerate(order) if step.startswith(kind)) for kind in kinds]
    assert places == sorted(places)
    assert "also at the last hint" in order[places[2]] and "masks act on RL rows only" in order[places[2]]
    assert "ABLATION" in " ".join(describe_order(method(preset="ghpo_released")))
