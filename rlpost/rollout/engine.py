"""The protocol of rollout engines: they sample completions, and take new weights in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rlpost.errors import RolloutError
from rlpost.experience import Completion

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """One prompt to be sampled from once.

    `seed` is derived from the run's seed, the step, the prompt and the sample's number (`rlpost.rollout.seeds`), never
    from its place in a batch: so the samples do not depend on how prompts are spread over processes.
    """

    token_ids: tuple[int, ...]
    seed: int


# Is told of the completion of request i as soon as it is there, in an order of its own and in another thread.
Finished = Callable[[int, Completion], None]


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How to sample; temperature 0 is greedy (log-probs are then those of temperature 1). Nothing else is set: penalties,
    min-p, biases and whatever a model's generation_config.json says of sampling stay out, for the learner has none of it."""

    max_completion_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = -1
    stop: tuple[str, ...] = ()

    @property
    def truncates(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


class RolloutEngine(Protocol):
    """What the loop asks of an engine. All calls are blocking, and but for `load_weights` local to the process.

    `Completion.sampler_logprobs` are of softmax(logits / temperature) over the whole vocabulary, also where top-k or
    top-p left tokens out: the distribution that the learner's log-probs are of, so that the two can be compared, and
    what is left of their difference is numerics (see `rlpost.gradient.correction`). A log-prob renormalised over the
    tokens kept would be higher by minus the log of the mass kept, which the learner does not know. A completion that
    ended at a stop string keeps its tokens as sampled, the stop string among them and in `text`, and no end-of-sequence
    token. Engines leave torch's, numpy's and Python's global random state as it was.
    """

    name: str

    def sample(
        self, requests: Sequence[SamplingRequest], settings: SamplingSettings, *, finished: Finished | None = None
    ) -> list[Completion]:
        """One completion a request, in the order of the requests. An engine that has them one by one, as servers do, tells
        `finished` of each at once; what it raises ends the call. Others leave it alone."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int = 0) -> None:
        """Replaces the engine's weights in place (Hugging Face names) and forgets every cached prefix. Collective: all
        processes of the run call it together. `version`: the number of optimizer steps that made these weights."""
        ...

    def logprobs(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        """For each token sequence of length n, the n - 1 log-probs (nats, temperature 1) of tokens 1..n-1."""
        ...

    def close(self) -> None:
        """Frees the engine's memory."""
        ...


def check_lengths(prompt_lengths: Sequence[int], max_model_len: int) -> None:
    """Raises RolloutError if a prompt leaves no room for a single new token."""
    longest = max(prompt_lengths, default=0)
    if longest >= max_model_len:
        raise RolloutError(
            f"A sequence of {longest} tokens does not fit the rollout engine, which holds prompt and completion in "
            f"{max_model_len} tokens. Lower `data.max_prompt_tokens`, or raise it together with "
            "`rollout.max_completion_tokens`: their sum is what the engine is built for."
        )
