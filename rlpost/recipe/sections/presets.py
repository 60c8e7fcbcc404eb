"""Presets: named choices for the slots of `method`, and how a recipe's own choices are laid over them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from rlpost.errors import RecipeError

Slots = dict[str, Any]

_GRPO: Slots = {  # arXiv 2402.03300, without the KL penalty (coefficient 0.04 there), which later work dropped
    "advantage": {"center": "group", "scale": "group_std", "eps": 1e-4, "unbiased": True},
    "ratio": {"level": "token"},
    "clip": {"type": "ppo", "low": 0.2, "high": 0.2},
    "masks": [],
    "kl": {"coefficient": 0.0, "estimator": "k3", "where": "loss"},
    "entropy": {"coefficient": 0.0},
    "reduction": {"type": "sequence"},
}
_DR_GRPO: Slots = {  # arXiv 2503.20783: no division by std, none by the completion's own length
    "advantage": {"scale": "none"},
    "reduction": {"type": "constant"},
}
_REINFORCE: Slots = {
    "advantage": {"center": "none", "scale": "none"},
    "ratio": {"level": "none"},
    "clip": {"type": "none"},
}
_CURVATURE: Slots = {"masks": [{"type": "curvature", "step": "adam"}]}  # arXiv 2510.00819; limits calibrated

_HINTS: Slots = {"guidance": {"type": "hint"}}  # arXiv 2507.10628
# arXiv 2509.04419. Its text and its code disagree on nearly all of the RL part; the shared core is a centred reward.
_GATE: Slots = {"gate": {"type": "solve_rate"}}
# The gate with gamma 1, which needs no samples to know where a prompt goes.
_SFT: Slots = {"gate": {"type": "sft_first", "rollouts": None}}

_RPO: Slots = {"pairs": {"loss": "sigmoid", "beta": 0.01, "sft": {"type": "sum", "eta": 0.005}}}

_PPO: Slots = {  # arXiv 1707.06347, with GAE (1506.02438) and adaptive KL in the reward (1909.08593)
    "advantage": {"center": "none", "scale": "none"},
    "critic": {"level": "token", "gamma": 1.0, "lam": 0.95},
    "controller": {"type": "adaptive_kl"},
    "kl": {"estimator": "k1"},
    "reduction": {"type": "token"},
}
_SAFE: Slots = {  # arXiv 2602.04651; the value is read at the prompt's end, not behind the answer as in its code
    "critic": {
        "heads": 2,
        "aggregate": "soft_min",
        "alpha": 0.3,
        "level": "sequence",
        "loss": {"type": "huber", "delta": 0.5, "clip": 0.2, "combine": "mean", "weight": 0.5},
        "whiten_reward": "full",
    },
    "kl": {"estimator": "k3"},
    "entropy": {"coefficient": 0.01},
}

_OVERLAYS: dict[str, tuple[Slots, ...]] = {
    "grpo": (),
    "dr_grpo": (_DR_GRPO,),
    "dapo": (  # arXiv 2503.14476
        {
            "clip": {"low": 0.2, "high": 0.28},
            "reduction": {"type": "token"},
            "dynamic_sampling": {"enabled": True},
            "overlong": {"filter": True, "penalty": 1.0, "buffer": 0.2},  # both, as the paper's table 1 adds them up
        },
    ),
    "gspo": (  # arXiv 2507.18071
        {"ratio": {"level": "sequence"}, "clip": {"low": 3e-4, "high": 4e-4}, "reduction": {"type": "sequence"}},
    ),
    "cispo": (  # arXiv 2506.13585; the upper limit is not published there, 5 is ScaleRL's (arXiv 2510.13786)
        {"clip": {"type": "cispo", "high": 4.0}, "reduction": {"type": "token"}},
    ),
    "rloo": (  # arXiv 2402.14740: REINFORCE on whole completions, the others' mean as baseline
        _REINFORCE,
        {"advantage": {"center": "leave_one_out"}, "reduction": {"type": "constant", "constant": 1}},
    ),
    "reinforce_pp": (  # arXiv 2501.03262
        {
            "advantage": {"center": "batch", "scale": "batch_std"},
            "kl": {"coefficient": 0.01, "estimator": "k1", "where": "reward"},
            "reduction": {"type": "token"},
        },
    ),
    "capo": (_CURVATURE,),
    "dr_capo": (_DR_GRPO, _CURVATURE),
    "rein_capo": (_REINFORCE, _CURVATURE),
    "ppo": (_PPO,),
    "safe": (_PPO, _SAFE, {"controller": {"type": "safe"}}),
    # ryyzn9/SAFE: its controller has no gradient, all of the value loss reaches the trunk, values are of whole answers
    "safe_released": (
        _PPO,
        _SAFE,
        {
            "critic": {"trunk_gradient": 1.0, "level": "answer"},
            "kl": {"estimator": "k1"},
            "controller": {"type": "safe_published", "term": "released"},
        },
    ),
    "ghpo": (_HINTS,),
    "ghpo_released": (  # hkgc-1/GHPO: token mean, raw prefixes of characters, and its loss on bare prompts
        _HINTS,
        {
            "guidance": {"snap": False, "condition": "released", "wrong_at_most": 0.0},
            "reduction": {"type": "token"},
        },
    ),
    "hpt": (_GATE, {"advantage": {"scale": "none"}}),  # every prompt weighs the same, whichever way it goes
    "hpt_paper": (_GATE, {"reduction": {"type": "constant", "constant": 1}}),  # eq. 7-13: RL summed over tokens
    "hpt_released": (  # TsinghuaC3I/Unify-Post-Training; 64 = the sequences of a process, which it sums over
        _GATE,
        {
            "advantage": {"scale": "none"},
            "clip": {"type": "none"},
            "correction": {"action": "none"},
            "entropy": {"coefficient": 0.001},
            "reduction": {"type": "constant", "constant": 8192},
            "gate": {"rl_weight": 64.0, "reduction": "token", "balance": "parts", "entropy": True},
        },
    ),
    "sft": (_SFT,),
    "dpo": ({"pairs": {"loss": "sigmoid", "beta": 0.1}},),  # arXiv 2305.18290
    "rpo": (_RPO,),  # arXiv 2405.16436, the loss of its main text, with the values of its Zephyr beta series
    "rpo_average": (  # the same, its appendix F: the mean log-prob of each response, not multiplied by beta
        {"pairs": {"loss": "sigmoid", "beta": 0.5, "sft": {"type": "sequence_mean", "weight": 0.2}}},
    ),
}


def merge_slots(below: Mapping[str, Any], above: Mapping[str, Any]) -> Slots:
    """Lays `above` over `below`: mappings are merged, everything else (lists too) is replaced.

    A mapping with another `type` than the one below replaces it: the old choice's settings mean nothing to the new one.
    """
    merged: Slots = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            same_choice = "type" not in value or "type" not in old or value["type"] == old["type"]
            merged[key] = merge_slots(old, value) if same_choice else dict(value)
        else:
            merged[key] = value
    return merged


def preset_slots(name: str) -> Slots:
    """The slots of a preset. Raises RecipeError for an unknown name."""
    if name not in _OVERLAYS:
        near = difflib.get_close_matches(str(name), _OVERLAYS, n=3, cutoff=0.4)
        near.sort(key=lambda known: sorted(known) != sorted(str(name)))  # two letters swapped before two others
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise RecipeError(f"method.preset: there is no preset `{name}`.{hint} Presets: {', '.join(_OVERLAYS)}.")
    slots: Slots = _GRPO
    for overlay in _OVERLAYS[name]:
        slots = merge_slots(slots, overlay)
    return slots


def preset_names() -> tuple[str, ...]:
    """All presets."""
    return tuple(_OVERLAYS)


def fill_preset(raw: Mapping[str, Any]) -> tuple[Slots, dict[str, str]]:
    """Lays a recipe's `method` over its preset.

    Returns the merged mapping, and for every dotted path in it where its value came from: "preset" or "recipe".
    Raises RecipeError for an unknown preset.
    """
    name = raw.get("preset", "grpo")
    merged = merge_slots(preset_slots(name), {**raw, "preset": name})
    given = _leaves(raw)
    return merged, {path: "recipe" if path in given else "preset" for path in _leaves(merged)}


def _leaves(mapping: Mapping[str, Any], prefix: str = "") -> set[str]:
    paths: set[str] = set()
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            paths |= _leaves(value, f"{prefix}{key}.")
        else:
            paths.add(f"{prefix}{key}")
    return paths
