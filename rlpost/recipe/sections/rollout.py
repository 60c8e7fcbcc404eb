"""`rollout`: how completions are sampled."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from rlpost.recipe.sections.base import Section


class SpeculativeSection(Section):
    """Tokens guessed from what stands before in prompt and completion, checked by the model all at once."""

    method: Literal["ngram"] = "ngram"
    """How they are guessed."""
    tokens: PositiveInt = 4
    """How many at a time."""
    shortest_match: PositiveInt = 2
    """How many of the last tokens must have stood before, at the least."""
    longest_match: PositiveInt = 5
    """And how many are looked for first."""

    @model_validator(mode="after")
    def _shortest_first(self) -> SpeculativeSection:
        if self.shortest_match > self.longest_match:
            raise ValueError(
                f"shortest_match={self.shortest_match} is above longest_match={self.longest_match}. Lower it"
            )
        return self


class VllmEngine(Section):
    """vLLM: inside the learner's process, in one beside it, or on servers."""

    type: Literal["vllm"] = "vllm"
    where: Literal["colocated", "worker", "server"] = "colocated"
    """colocated: inside each learner process, on its device. worker: a vLLM server beside each learner process, on other cores
    or cards of the same node, started and ended by the run. server: the servers at `urls`, started by `rlpost serve RECIPE`."""
    urls: tuple[str, ...] = ()
    """Where the servers are, such as http://10.0.0.2:8000; with `where: server` only. A dead one's requests go to others."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """The precision of the sampler. auto: bfloat16 where the device has instructions for it, else float32."""
    memory_fraction: float = Field(0.4, gt=0, lt=1)
    """The share of GPU memory that vLLM may take (weights and KV cache)."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """The KV cache's size on CPU, in GiB."""
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3", "fp8_e5m2"] = "auto"
    """The precision of the KV cache; auto: the sampler's. fp8 holds twice as many tokens, and moves log-probs: see
    docs/rollouts.md."""
    quantization: Literal["none", "fp8"] = "none"
    """fp8: vLLM rounds the weights of linear layers to 8 bits as they arrive. CUDA only, and not tested there yet."""
    speculative: SpeculativeSection | None = None
    """Speculative decoding. CUDA only, and not tested there yet: on CPU vLLM 0.32 gives wrong log-probs with it."""
    max_sequences: PositiveInt = 256
    """How many sequences are decoded at once at the most."""
    eager: bool | None = None
    """Without CUDA graphs or compilation. Default: on CPU yes, on CUDA no."""
    sleep: bool = False
    """Give GPU memory back between rollouts (vLLM's sleep mode: weights to the host, KV cache dropped). CUDA only."""
    tensor_parallel: PositiveInt = 1
    """GPUs per engine. Only 1 in a colocated engine for now."""
    replicas: PositiveInt = 1
    """Engines per server (vLLM's data parallelism), each on `tensor_parallel` GPUs. Not in a colocated engine."""
    devices: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """The node's GPUs for its workers, as many as all workers of the node need; with `where: worker` on CUDA."""
    cores: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """The processor cores for a worker; default: those of the learner. With `where: worker` only."""
    deadline_s: float = Field(60.0, ge=1)
    """A server whose engine answers nothing for so long is lost: it is replaced (worker), or left out (server)."""
    start_s: float = Field(600.0, gt=0)
    """How long a worker may take to start."""
    restarts: int = Field(3, ge=0)
    """How often a worker is replaced in a run. With none left the run ends with what it learned saved, and exit code 75."""
    weights_folder: str | None = None
    """Where new weights are handed to the servers, as files. Default: shared memory. Servers on other nodes need a folder that
    every node sees under the same path."""

    @property
    def in_eight_bits(self) -> bool:
        """Whether weights or the KV cache are held so coarsely."""
        return self.quantization != "none" or self.kv_cache_dtype != "auto"


class TransformersEngine(Section):
    """A sampling loop over transformers' forward: slow, works everywhere. The fallback where vLLM is not installed."""

    type: Literal["transformers"] = "transformers"
    batch_size: PositiveInt = 64
    """How many sequences are decoded at once."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """The precision of the sampler's own copy of the weights."""


Engine = Annotated[VllmEngine | TransformersEngine, Field(discriminator="type")]


class ProbeSection(Section):
    """Learner and engine score the same tokens: those of the rollout, and a few of them again after the sync. Where they
    disagree, or the learner's last change did not arrive, the run stops with the cause named."""

    every: PositiveInt = 1
    """Compare on every so many-th rollout."""
    max_mean_gap: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Mean |learner log-prob - engine log-prob| (nats) above which the engine is held to have wrong weights. auto: by the
    coarsest precision of the two, 0.001 in float32, 0.05 in float16, 0.1 in bfloat16, 0.5 with weights in 4 bits or an
    engine in fp8."""


MAX_RANK = 512
"""Of adapters that vLLM serves."""


class SyncSection(Section):
    """How new weights go to the engine."""

    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How float32 weights become those of a bfloat16 engine. nearest: a step below half of a weight's last digit does not
    arrive. stochastic: up or down by chance (the same on every process), so that the mean arrives whole."""
    transfer: Literal["files", "nccl"] = "files"
    """How weights reach servers. nccl: from GPU to GPU, without a folder that both see; `where: server` on CUDA only. Not run
    on GPUs yet: see docs/rollouts.md."""
    lora: Literal["merged", "adapter"] = "merged"
    """With `model.lora`. merged: the engine gets all weights, with the adapters added. adapter: it gets the model once, and at
    every sync the adapters alone (a few megabytes), under a new name each time. For workers and servers only."""


class RolloutSection(Section):
    """Sampling: P prompts a step, G completions a prompt."""

    engine: Engine = Field(default_factory=VllmEngine)
    """Who samples."""
    staleness: int = Field(0, ge=0)
    """How many rollouts the samples lag behind the policy. 0: sampling and learning take turns. k: while rollout n is learned
    from, rollout n + k is sampled by the weights of that moment. 1 overlaps all there is to overlap; more is for studies, and
    for `in_flight`."""
    in_flight: bool = False
    """Whether new weights reach samples that are under way: a sync then does not wait for them, they go on with the new
    weights, and up to `staleness` rollouts are sampled at once. For completions of very different lengths. Runs are then not
    reproducible to the bit."""
    prompts_per_step: PositiveInt = 8
    """Prompts per rollout, over all processes."""
    completions_per_prompt: PositiveInt = 8
    """G, the group's size."""
    max_completion_tokens: PositiveInt = 256
    """Completions are cut (finish: length) here."""
    temperature: float = Field(1.0, ge=0.01)
    """Sampling temperature, at least 0.01 (below that vLLM silently samples at 0.01). All log-probs, the learner's too, are of
    softmax(scores / temperature)."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling; 1 is off. It limits what is drawn, not what log-probs are of: those of sampler and learner alike are
    of the whole distribution, so that they can be compared."""
    top_k: int = Field(-1, ge=-1)
    """Top-k sampling; -1 and 0 are off. As for `top_p`, log-probs are of the whole distribution."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end a completion."""
    probe: ProbeSection | None = Field(default_factory=ProbeSection)
    """Verification of the engine's weights; null switches it off."""
    sync: SyncSection = Field(default_factory=SyncSection)
    """How weights are sent."""
