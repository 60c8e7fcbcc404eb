"""What is said when a rollout engine does not get the weights that it needs."""

from __future__ import annotations

from collections.abc import Sequence

_SAME_MODEL = "Engine and learner must be built from the same `model.path`"


def refusal(name: str, sent: str, shape: Sequence[int], own: Sequence[int] | None) -> str:
    """Of a tensor `name` [shape], made of what was sent last, `sent`; the engine's own has another shape or does not exist."""
    made = "" if name == sent else f" (made of {sent!r})"
    why = "it has no such weight" if own is None else f"its weight has shape {tuple(own)}"
    return f"The rollout engine cannot take {name!r}{made} of shape {tuple(shape)}: {why}. {_SAME_MODEL}."


def incomplete(missing: Sequence[str], engine: str) -> str:
    """Of tensors that were not sent, or only in part."""
    named = ", ".join(repr(name) for name in missing[:3]) + (", ..." if len(missing) > 3 else "")
    return (
        f"{len(missing)} of the model's weights did not reach {engine}, or not whole: {named}. It now holds a mixture of old "
        f"and new weights. {_SAME_MODEL}, and every sync must send all of it."
    )


def not_replaced(layers: Sequence[str]) -> str:
    """Of layers of vLLM's model that hold on to old weights although all were sent."""
    named = ", ".join(repr(name) for name in layers[:3]) + (", ..." if len(layers) > 3 else "")
    return (
        f"vLLM did not replace the weights of {len(layers)} of its layers ({named}), although the learner sent all: its code "
        "for this model cannot do that while it runs, and would go on sampling with old ones. Use "
        "`rollout.engine.type=transformers`."
    )


def held_wrongly(names: Sequence[str]) -> str:
    """Of tensors, or layers, whose bits an engine does not hold after an update, though it took everything."""
    named = ", ".join(repr(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"after the sync it holds other bits than the learner sent in {len(names)} of the weights: {named} (their fingerprints "
        "differ)"
    )


def not_compared(names: Sequence[str], of: int) -> str:
    """Of tensors whose place in vLLM's model is not known."""
    named = ", ".join(repr(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"{len(names)} of {of} weights are not compared bit by bit after a sync ({named}): vLLM's code for this model computes "
        "what it holds from them, or leaves them out. The log-probs of both sides are compared as ever."
    )
