"""The rollout buffer: scored groups with their advantages, from which one or more optimizer steps are taken."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from rlpost.experience import Completion, Group, TokenRows
from rlpost.gradient.types import Counts, TokenView
from rlpost.methods.hpt import Route
from rlpost.policy.model import PolicyOutput
from rlpost.policy.rows import RowGroup, build_rows


@dataclass(frozen=True, slots=True)
class DemonstrationRow:
    """A worked solution that is learned from, under the bare question."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]  # with the end-of-sequence token


@dataclass(slots=True)
class RolloutBuffer:
    """One rollout of one process: S completions of its groups, N tokens, in the order of the groups.

    A group's demonstration, if it has one, counts as one more completion, behind the sampled ones.
    Plain tensors and nouns, so that it can be saved in the middle of its optimizer steps and taken up again.
    """

    step: int  # the rollout's number in the run, from 0
    groups: tuple[Group, ...]
    minibatch: tuple[int, ...]  # by group: in which minibatch it is learned from
    dead: tuple[bool, ...]  # by group: its samples have no coefficient but zero, so they do not go through the model
    advantage: Tensor  # [S] float32
    counts: tuple[Counts, ...]  # by minibatch: the denominators, over all processes
    old_logp: Tensor | None = None  # [N] None while the policy has not changed since the rollout
    ref_logp: Tensor | None = None  # [N]
    old_values: Tensor | None = None  # [N, H] of the critic's heads before the first update; None without a critic
    token_advantage: Tensor | None = None  # [N] with a critic
    target: Tensor | None = None  # [N] what the value before a token is to become
    known: Tensor | None = None  # [N] bool: the completion's reward is known
    metrics: dict[str, float] = field(default_factory=dict)  # of the rollout, over all processes
    updates_done: int = 0
    routes: tuple[Route, ...] = ()  # by group; () without a gate
    demonstrations: tuple[DemonstrationRow | None, ...] = ()  # by group; () without a gate
    hint_levels: dict[str, int] = field(
        default_factory=dict
    )  # what the run remembers of prompts once this is learned from

    def demonstration(self, i: int) -> DemonstrationRow | None:
        """The demonstration that group i is learned from."""
        return self.demonstrations[i] if self.demonstrations else None

    @property
    def lengths(self) -> list[int]:
        return [length for length, _ in self._sequences()]

    @property
    def sampled(self) -> list[bool]:
        """[S] whether the completion was sampled, and is no demonstration."""
        return [sampled for _, sampled in self._sequences()]

    def _sequences(self) -> list[tuple[int, bool]]:
        """[S] (tokens, sampled)."""
        sequences: list[tuple[int, bool]] = []
        for i, group in enumerate(self.groups):
            sequences += [(len(c.token_ids), True) for c in group.completions]
            row = self.demonstration(i)
            sequences += [(len(row.token_ids), False)] if row is not None else []
        return sequences

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def row_groups(self, minibatch: int | None = None, *, skip_dead: bool = True) -> list[RowGroup]:
        """What `build_rows` takes: the groups of a minibatch (None: of all), dead ones left out."""
        rows: list[RowGroup] = []
        sequence, offset = 0, 0
        for i, group in enumerate(self.groups):
            row = self.demonstration(i)
            entries = []
            for token_ids in [c.token_ids for c in group.completions] + ([row.token_ids] if row is not None else []):
                entries.append((sequence, offset, token_ids))
                sequence, offset = sequence + 1, offset + len(token_ids)
            if minibatch is not None and self.minibatch[i] != minibatch:
                continue
            samples = [] if skip_dead and self.dead[i] else entries[: len(group.completions)]
            demonstrations = entries[len(group.completions) :]
            if row is not None and samples and row.prompt_ids == group.prompt.token_ids:
                samples, demonstrations = entries, []  # one more branch of the same tree
            if samples:
                rows.append(RowGroup(prompt_ids=group.prompt.token_ids, completions=tuple(samples)))
            if row is not None and demonstrations:
                rows.append(RowGroup(prompt_ids=row.prompt_ids, completions=tuple(demonstrations)))
        return rows

    def arrays(self, device: torch.device) -> FlatArrays:
        """The buffer as flat tensors on `device`."""
        lengths = self.lengths
        sampler: list[float] = []
        versions: list[float] = []
        truncated: list[bool] = []
        prompt_of: list[int] = []
        for i, group in enumerate(self.groups):
            row = self.demonstration(i)
            sampler += [p for c in group.completions for p in c.sampler_logprobs]
            sampler += [math.nan] * (0 if row is None else len(row.token_ids))
            versions += [version for c in group.completions for version in token_versions(c)]
            versions += [math.nan] * (0 if row is None else len(row.token_ids))
            truncated += [c.truncated for c in group.completions] + [False] * (row is not None)
            prompt_of += [i] * (len(group.completions) + (row is not None))
        group_tokens = [sum(len(c.token_ids) for c in group.completions) for group in self.groups]
        return FlatArrays(
            sampler_logp=torch.tensor(sampler, dtype=torch.float32, device=device),
            old_logp=None if self.old_logp is None else self.old_logp.to(device),
            ref_logp=None if self.ref_logp is None else self.ref_logp.to(device),
            advantage=self.advantage.to(device),
            token_advantage=None if self.token_advantage is None else self.token_advantage.to(device),
            prompt=torch.tensor(prompt_of, dtype=torch.int64, device=device),
            truncated=torch.tensor(truncated, dtype=torch.bool, device=device),
            demonstration=~torch.tensor(self.sampled, dtype=torch.bool, device=device),
            group_tokens=torch.tensor(group_tokens, dtype=torch.float64, device=device),
            offsets=list(accumulate(lengths, initial=0)),
            token_key=token_keys(self.groups, self.demonstrations).to(device),
            version=torch.tensor(versions, dtype=torch.float64, device=device),
        )


def token_versions(completion: Completion) -> list[float]:
    """By token: how many optimizer steps had made the weights that sampled it; NaN: not known."""
    # A checkpoint in the middle of a rollout may hold completions that were saved before they had this field.
    versions: tuple[tuple[int, int], ...] = getattr(completion, "versions", ())
    if not versions:
        return [math.nan] * len(completion.token_ids)
    return [float(version) for version, tokens in versions for _ in range(tokens)]


def token_keys(groups: Sequence[Group], demonstrations: Sequence[DemonstrationRow | None]) -> Tensor:
    """[N] int64: a name for every token of the groups and their demonstrations (() for none), a function of the prompt, the
    sample's number in its group, what was sampled, and the token's place in it: never of the process that holds it."""
    keys = []
    for i, group in enumerate(groups):
        row = demonstrations[i] if demonstrations else None
        named = [(str(sample), completion.token_ids) for sample, completion in enumerate(group.completions)]
        for name, token_ids in [*named, *([("demonstration", row.token_ids)] if row is not None else [])]:
            named_by = hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=8, person=b"rlpost.token")
            named_by.update(f"{name}|{group.prompt.id}".encode())
            first = int.from_bytes(named_by.digest(), "big", signed=True) >> 1  # room for the tokens behind it
            keys.append(torch.arange(len(token_ids)) + first)
    return torch.cat(keys) if keys else torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class FlatArrays:
    """The rollout's arrays, from which micro-batches take their share."""

    sampler_logp: Tensor  # [N]
    old_logp: Tensor | None  # [N]
    ref_logp: Tensor | None  # [N]
    advantage: Tensor  # [S]
    prompt: Tensor  # [S] int64
    truncated: Tensor  # [S] bool
    demonstration: Tensor  # [S] bool
    group_tokens: Tensor  # [P] float64
    offsets: list[int]  # [S + 1]
    token_key: Tensor  # [N] int64, see `token_keys`
    version: Tensor  # [N] float64, see `token_versions`
    token_advantage: Tensor | None = None  # [N]

    def view(self, rows: TokenRows, output: PolicyOutput) -> tuple[TokenView, Tensor]:
        """The micro-batch as methods see it, and the group tokens of its prompts ([P of the view])."""
        index = rows.token_index.to(self.advantage.device)
        sequences, local = torch.unique_consecutive(rows.sequence.to(index.device), return_inverse=True)
        prompts, prompt = torch.unique(self.prompt[sequences], return_inverse=True)
        logp = output.logp.detach()
        view = TokenView(
            logp=logp,
            entropy=output.entropy.detach(),
            old_logp=logp if self.old_logp is None else self.old_logp[index],
            sampler_logp=self.sampler_logp[index],
            advantage=(
                self.advantage[sequences][local] if self.token_advantage is None else self.token_advantage[index]
            ),
            sequence=local,
            prompt=prompt,
            truncated=self.truncated[sequences],
            demonstration=self.demonstration[sequences],
            ref_logp=None if self.ref_logp is None else self.ref_logp[index],
            statistics=output.statistics,
            token_index=self.token_key[index],
            token=rows.target.to(index.device),
            version=self.version[index],
        )
        return view, self.group_tokens[prompts]


def micro_batches(
    row_groups: Sequence[RowGroup], *, layout: str, micro_batch_tokens: int, pad_id: int
) -> list[TokenRows]:
    """Rows of the given layout, stacked into micro-batches of at most `micro_batch_tokens` positions."""
    if not row_groups:
        return []
    return build_rows(row_groups, layout=layout, micro_batch_tokens=micro_batch_tokens, pad_id=pad_id)  # type: ignore[arg-type]
