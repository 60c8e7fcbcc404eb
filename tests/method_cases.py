"""Small float64 batches for the tests of gradients and methods."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rlpost.gradient.reduction import count_batch
from rlpost.gradient.types import Counts, HeadStatistics, TokenView
from rlpost.methods import StepContext
from rlpost.recipe.sections.method import MethodSection

LENGTHS = (3, 5, 2, 6, 1, 4)
PROMPT = (0, 0, 0, 1, 1, 1)
VOCABULARY, WIDTH, LIMIT = 7, 4, 9
CONTEXT = StepContext(learning_rate=0.1, optimizer_step=3, seed=11)


def method(**slots) -> MethodSection:
    return MethodSection.model_validate(slots)


class Case:
    """A head W [V, d] on fixed hidden states [N, d]; `view()` is what a method sees of it."""

    def __init__(self, seed: int = 0, *, drift: float = 0.3, mismatch: float = 0.3) -> None:
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        n = sum(LENGTHS)
        self.hidden, self.head = normal(n, WIDTH), normal(VOCABULARY, WIDTH).requires_grad_()
        self.token = torch.randint(VOCABULARY, (n,), generator=g)
        self.sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
        self.prompt = torch.tensor(PROMPT)
        logp, _ = self.score()
        self.old_logp = logp.detach() + drift * normal(n)
        self.sampler_logp = self.old_logp + mismatch * normal(n)
        self.sampler_logp[::5] = torch.nan
        self.ref_logp = logp.detach() + 0.5 * normal(n)
        self.advantage = normal(len(LENGTHS))  # one a completion
        self.version = torch.arange(n) % 4.0  # how many optimizer steps had made the weights that sampled a token
        self.version[::7] = torch.nan

    def logits(self) -> Tensor:
        return self.hidden @ self.head.T

    def score(self) -> tuple[Tensor, Tensor]:
        """(logp [N], entropy [N]) with gradients to the head."""
        logq = torch.log_softmax(self.logits(), -1)
        return logq.gather(1, self.token[:, None]).squeeze(1), -(logq.exp() * logq).sum(-1)

    def statistics(self, k: int = VOCABULARY) -> HeadStatistics:
        logits = self.logits().detach()
        p = torch.softmax(logits, -1)
        top, ids = logits.topk(k)
        missing = ~(ids == self.token[:, None]).any(1)
        ids[missing, -1] = self.token[missing]
        return HeadStatistics(self.hidden, (p**2).sum(1), (p**3).sum(1), ids, logits.gather(1, ids))

    def view(self, **changes) -> TokenView:
        logp, entropy = (x.detach() for x in self.score())
        s = len(LENGTHS)
        view = TokenView(
            logp=logp,
            entropy=entropy,
            old_logp=self.old_logp,
            sampler_logp=self.sampler_logp,
            advantage=self.advantage[self.sequence],
            sequence=self.sequence,
            prompt=self.prompt,
            truncated=torch.tensor([False, True, False, False, False, True]),
            demonstration=torch.zeros(s, dtype=torch.bool),
            ref_logp=self.ref_logp,
            statistics=self.statistics(),
            token=self.token,
            token_index=torch.arange(logp.numel()),
            version=self.version,
        )
        return replace(view, **changes)

    def counts(self) -> Counts:
        return count_batch(torch.tensor(LENGTHS), self.prompt, LIMIT)

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.head, retain_graph=True)[0]


def cut(view: TokenView, counts: Counts, keep: list[int]) -> tuple[TokenView, Counts, Tensor]:
    """The micro-batch of the completions `keep`, in that order; also its tokens' places in the whole view."""
    places = torch.cat([(view.sequence == s).nonzero().squeeze(1) for s in keep])
    sequences = torch.tensor(keep)
    prompts, prompt = torch.unique(view.prompt[sequences], return_inverse=True)
    lengths = torch.bincount(view.sequence, minlength=view.prompt.numel())[sequences]

    def part(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[places]

    st = view.statistics
    small = TokenView(
        logp=view.logp[places],
        entropy=view.entropy[places],
        old_logp=view.old_logp[places],
        sampler_logp=view.sampler_logp[places],
        advantage=view.advantage[places],
        sequence=torch.repeat_interleave(torch.arange(len(keep)), lengths),
        prompt=prompt,
        truncated=view.truncated[sequences],
        demonstration=view.demonstration[sequences],
        ref_logp=part(view.ref_logp),
        statistics=None
        if st is None
        else HeadStatistics(st.hidden[places], part(st.sum_p2), part(st.sum_p3), part(st.top_ids), part(st.top_logits)),
        token=part(view.token),
        token_index=part(view.token_index),
        version=part(view.version),
    )
    return small, replace(counts, prompt_tokens=counts.prompt_tokens[prompts]), places
