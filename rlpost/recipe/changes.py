"""What may change in a recipe when a run is taken up again: one decision for every key, and the comparison.

A key without a decision fails a test (tests/test_recipe_changes.py), so that a new one is thought about.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

_Tree = Mapping[str, Any]


class Effect(IntEnum):
    """What a key is to a run that was started with another value of it."""

    NONE = 0
    """Nothing that is learned depends on it: files, speed, memory, what is shown."""
    LATER = 1
    """What is learned from now on does: it is named, with both values."""
    ROLLOUT = 2
    """A rollout in progress was sampled, scored or weighed with the other value, and its arrays would be read wrongly:
    refused in the middle of a rollout, `LATER` between rollouts."""
    RUN = 3
    """What was saved does not fit another value: always refused."""


NONE, LATER, ROLLOUT, RUN = Effect

# By section; `*` stands for the items of a list. A section that has several types is listed with the keys of all of them.
# A section that may be left out, and a list, also counts as a key of the section around it. The decision about that key is for
# the change in which the section is added or removed, or the list becomes longer or shorter.
DECISIONS: dict[str, dict[Effect, str]] = {
    "": {NONE: "name output_dir resume overwrite", ROLLOUT: "rewards", RUN: "seed"},
    # A template is in the prompts' tokens, which are compared with those of the start (as all of `data`).
    "model": {
        NONE: "gradient_checkpointing trust_remote_code",
        LATER: "dtype autocast attention chat_template",
        RUN: "path lora",
    },
    # alpha is a factor on what the adapter has learned, and 4 bits are other weights under it.
    "model.lora": {LATER: "dropout", RUN: "rank alpha targets quantize"},
    # Training prompts are compared by themselves, as texts, when they are there (`PromptSampler`).
    "data": {
        LATER: "eval held_out system_prompt max_prompt_tokens too_long shuffle template_options",
        ROLLOUT: "max_demonstration_tokens long_demonstrations",
    },
    "data.train": {
        LATER: "type path name split prompt demonstration columns system limit task size seed options suffix low high "
        "operations template chosen rejected baseline plain too_long empty identical missing mismatch"
    },
    "data.eval": {
        LATER: "type path name split prompt demonstration columns system limit task size seed options suffix low high "
        "operations template chosen rejected baseline plain too_long empty identical missing mismatch"
    },
    "rollout": {
        NONE: "probe",
        LATER: "staleness in_flight",
        ROLLOUT: "prompts_per_step completions_per_prompt max_completion_tokens temperature top_p top_k stop",
    },
    "rollout.engine": {
        NONE: "memory_fraction kv_cache_gib max_sequences eager sleep tensor_parallel batch_size where urls replicas devices "
        "cores deadline_s start_s restarts weights_folder",
        LATER: "type dtype kv_cache_dtype quantization speculative",
    },
    "rollout.engine.speculative": {LATER: "method tokens shortest_match longest_match"},
    "rollout.sync": {NONE: "transfer", LATER: "rounding lora"},
    "rollout.probe": {NONE: "every max_mean_gap"},
    "rewards.*": {
        NONE: "name deadline_s device batch_tokens trust_remote_code",
        ROLLOUT: "type function path weight arguments call accuracy dtype label text max_tokens completions timeout_score",
    },
    "scoring": {NONE: "workers memory_gib max_failed_share", ROLLOUT: "threshold"},
    "method": {LATER: "preset masks", ROLLOUT: "guidance gate controller pairs", RUN: "critic"},
    "method.advantage": {ROLLOUT: "center scale combine eps unbiased"},
    "method.ratio": {LATER: "level"},
    "method.clip": {LATER: "type low high dual"},
    # Of a curvature mask some is refused always: see `_memory`.
    "method.masks.*": {
        NONE: "chunk_tokens verify_every",
        LATER: "type step kl form top_k rate match below max_gap negative_only max_age",
    },
    "method.masks.*.thresholds": {LATER: "type max_kl max_objective min_objective target steps rules"},
    "method.correction": {LATER: "level action max min"},
    "method.kl": {ROLLOUT: "coefficient estimator where"},
    "method.entropy": {LATER: "coefficient"},
    "method.reduction": {LATER: "type constant denominator"},
    "method.dynamic_sampling": {ROLLOUT: "enabled max_rounds"},
    "method.overlong": {ROLLOUT: "filter penalty buffer"},
    "method.guidance": {
        ROLLOUT: "type ratios unit snap place wording judge threshold wrong_at_most cold_start final_scale memory condition"
    },
    "method.gate": {
        ROLLOUT: "type sft_weight rl_weight reduction balance entropy threshold gamma below shaping rl sft positive rollouts"
    },
    "method.critic": {
        LATER: "train trunk_gradient learning_rate max_grad_norm warmup_rollouts",
        ROLLOUT: "aggregate alpha level gamma lam value_lam whiten_reward whiten_advantage",
        RUN: "model path heads layer_norm hidden_share",
    },
    "method.critic.loss": {LATER: "type delta clip combine weight"},
    "method.controller": {
        LATER: "initial target gain clip threshold threshold_limits weight max_coefficient kl_decay gate_softness gate_limits "
        "kp ki kd leak authority reward_decay spread_decay target_velocity error_limit climb steady converged_within phases "
        "momentum brake entropy_floor gate_min integral_limit converged_above asymmetric window",
        ROLLOUT: "term",
        RUN: "type",
    },
    "method.controller.asymmetric": {LATER: "threshold weight momentum window"},
    "method.pairs": {
        NONE: "reference",
        LATER: "loss beta label_smoothing length_normalised",
        ROLLOUT: "baseline min_gap",
    },
    "method.pairs.sft": {LATER: "type eta weight"},
    "learner": {
        NONE: "stop_after layout micro_batch_tokens sequence_parallel head_chunk_tokens skip_nonfinite watchdog_s "
        "offload",
        LATER: "rollouts learning_rate schedule warmup_steps betas eps weight_decay max_grad_norm",
        ROLLOUT: "minibatches epochs",
    },
    "learner.offload": {
        NONE: "type piece_size gpu_of every resident park accelerator_gib host_gib",
        LATER: "arithmetic",
    },
    "checkpoint": {NONE: "every keep asynchronous"},
    "evaluation": {NONE: "every at_start at_end", LATER: "prompts samples k temperature threshold"},
    "tracking": {NONE: "console show_completion_every report"},
    "tracking.wandb": {NONE: "mode project entity tags"},
}

# Keys whose values are mappings of the user's own: compared whole.
MAPPINGS = frozenset({"arguments", "columns", "options", "template_options"})
_BY_KEY = {
    f"{section}.{name}".lstrip("."): effect
    for section, effects in DECISIONS.items()
    for effect, names in effects.items()
    for name in names.split()
}


@dataclass(frozen=True, slots=True)
class Change:
    """A key with another value than before. Values are plain, as in JSON."""

    key: str
    before: Any
    now: Any
    effect: Effect


def effect_of(key: str) -> Effect:
    """The decision about a key such as `rewards.0.weight`. Raises KeyError where there is none."""
    general = re.sub(r"\.\d+(?=\.|$)", ".*", key)
    return _BY_KEY[general.replace(".match.", ".")]  # a control's curvature mask is decided about as the mask itself


def changes(before: _Tree, now: _Tree) -> list[Change]:
    """What differs between two recipes, each as `recipe.model_dump(mode="json")` gives it.

    Keys that one of them does not have are left out: another version of rlpost wrote it.
    """
    different = [
        Change(key, old, new, _effect(key, old, new))
        for key, old, new in _differences("", before, now)
        if key not in ("resume", "overwrite")
    ]
    return [*different, *_memory(before, now)]


def _differences(path: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if before == now:
        return
    name = path.rpartition(".")[2]
    if isinstance(before, Mapping) and isinstance(now, Mapping) and name not in MAPPINGS and _same_type(before, now):
        for key in now:
            if key in before:
                yield from _differences(f"{path}.{key}".lstrip("."), before[key], now[key])
        return
    lists = isinstance(before, list) and isinstance(now, list) and len(before) == len(now)
    if lists and all(isinstance(item, Mapping) for item in (*before, *now)):
        for i, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from _differences(f"{path}.{i}", old, new)
        return
    yield path, before, now


def _same_type(before: _Tree, now: _Tree) -> bool:
    return before.get("type") == now.get("type")


def _effect(key: str, before: Any, now: Any) -> Effect:
    chosen_otherwise = isinstance(before, Mapping) and isinstance(now, Mapping) and "type" in now
    effect = effect_of(f"{key}.type" if chosen_otherwise else key)
    # A controller's memory can be left behind, but not be taken up where it was never written.
    return RUN if key == "method.controller" and before is None else effect


def _memory(before: _Tree, now: _Tree) -> Iterator[Change]:
    """A curvature mask remembers moments, in a form that depends on its step and on where its thresholds come from."""
    old, new = (_curvature(tree.get("method", {})) for tree in (before, now))
    if new is not None and new != old:
        yield Change("method.masks", old, new, RUN)


def _curvature(method: _Tree) -> dict[str, Any] | None:
    for mask in method.get("masks", ()):
        curvature = mask if mask.get("type") == "curvature" else mask.get("match")
        if curvature:
            thresholds = (curvature.get("thresholds") or {}).get("type")
            return {"type": "curvature", "step": curvature.get("step"), "thresholds": thresholds}
    return None
