"""Does rlpost take the same step as TRL? Loss and gradient on identical frozen rollouts, in float32.

    python -m benchmarks.trl_parity                        # a tiny random Llama
    python -m benchmarks.trl_parity --model FOLDER         # a real model in Hugging Face layout

Exits with 1 unless loss and gradient norm agree to --tolerance (relative) for every loss type. Ratios differ from 1 and
some are clipped, since both sides are given the same noisy log-probs of an older policy; the gradient is read before it
is clipped. TRL's importance correction and rlpost's are off, beta is 0, temperature 1, truncated completions count.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.frozen import FrozenRollout, RolloutSpec, make_rollout
from benchmarks.measure import machine, table, write_result

TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class Pair:
    """A loss of TRL and the slots of rlpost that mean the same. `whole`: only with one micro-batch."""

    trl: dict[str, Any]
    rlpost: dict[str, Any]
    whole: bool = False


_CLIP = {"epsilon": 0.2, "epsilon_high": 0.2}
PAIRS = {
    "grpo": Pair({"loss_type": "grpo", **_CLIP}, {"preset": "grpo"}),
    "dapo": Pair(
        {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28},
        {"clip": {"low": 0.2, "high": 0.28}, "reduction": {"type": "token"}},
    ),
    # TRL takes bnpo's token mean within a micro-batch, rlpost always over the whole batch.
    "bnpo": Pair({"loss_type": "bnpo", **_CLIP}, {"reduction": {"type": "token"}}, whole=True),
    "dr_grpo": Pair({"loss_type": "dr_grpo", "scale_rewards": "none", **_CLIP}, {"preset": "dr_grpo"}),
    "gspo": Pair(
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.11, "epsilon_high": 0.13},
        {"preset": "gspo", "clip": {"low": 0.11, "high": 0.13}},
    ),
    # TRL's epsilon_high is CISPO's upper limit itself, rlpost's `high` its distance from 1.
    "cispo": Pair({"loss_type": "cispo", "epsilon_high": 1.2}, {"preset": "cispo", "clip": {"high": 0.2}}),
}


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far the two sides are apart, relative to TRL's."""

    name: str
    loss: float  # rlpost's surrogate
    loss_error: float
    grad_norm: float
    norm_error: float
    gradient_error: float  # |difference| / |TRL's|, over all parameters

    def holds(self, tolerance: float) -> bool:
        return self.loss_error <= tolerance and self.norm_error <= tolerance


def compare(name: str, model: str, rollout: FrozenRollout, *, layout: str = "tree", micro_batch: int = 4) -> Agreement:
    """One loss type on one rollout, which may carry old log-probs."""
    from benchmarks.rlpost_side import RlpostSetting, RlpostSide
    from benchmarks.trl_side import TrlSetting, run_trl

    pair = PAIRS[name]
    size = len(rollout.lengths) if pair.whole else micro_batch
    theirs = run_trl(
        model,
        rollout,
        TrlSetting(micro_batch=size, autocast="none"),
        loss=pair.trl,
        max_grad_norm=1e9,
        keep_gradients=True,
    )
    setting = RlpostSetting(layout=layout, autocast="none", micro_batch_tokens=1024)  # type: ignore[arg-type]
    side = RlpostSide(model, rollout, setting, method=pair.rlpost, max_grad_norm=None)
    loss, gradients = side.surrogate(), side.gradients()
    assert gradients.keys() == theirs.gradients.keys()
    squares = {n: (float(g.double().square().sum())) for n, g in gradients.items()}
    their_squares = {n: float(g.double().square().sum()) for n, g in theirs.gradients.items()}
    difference = sum(float((gradients[n].double() - theirs.gradients[n].double()).square().sum()) for n in gradients)
    norm, their_norm = sum(squares.values()) ** 0.5, sum(their_squares.values()) ** 0.5
    return Agreement(
        name,
        loss,
        apart(loss, theirs.loss),
        norm,
        apart(norm, their_norm),
        difference**0.5 / their_norm if their_norm else math.inf,
    )


def apart(ours: float, theirs: float) -> float:
    """|ours - theirs| / |theirs|; infinite where theirs is 0, since nothing was compared then."""
    return abs(ours - theirs) / abs(theirs) if theirs else math.inf


def drifted(model: str, spec: RolloutSpec, drift: float) -> FrozenRollout:
    """A rollout whose old log-probs are the model's own plus noise of standard deviation `drift`."""
    from benchmarks.rlpost_side import RlpostSetting, RlpostSide

    setting = RlpostSetting(autocast="none", layout="sorted")
    return RlpostSide(model, make_rollout(spec), setting, method={}).drifted_logprobs(drift)


def check_parity(
    model: str, spec: RolloutSpec, names: list[str], *, layout: str = "tree", drift: float = 0.15
) -> list[Agreement]:
    """Every named loss type."""
    rollout = drifted(model, spec, drift)
    return [compare(name, model, rollout, layout=layout) for name in names]


def report(agreements: list[Agreement], tolerance: float, *, only_norm: bool = False) -> str:
    """A table. `only_norm`: agreement is about the gradient norm alone (an on-policy loss can sum to zero)."""
    rows = [
        [
            a.name,
            f"{a.loss:.6f}",
            f"{a.loss_error:.1e}",
            f"{a.grad_norm:.6f}",
            f"{a.norm_error:.1e}",
            f"{a.gradient_error:.1e}",
            "yes" if a.holds(tolerance) or (only_norm and a.norm_error <= tolerance) else "NO",
        ]
        for a in agreements
    ]
    return table(["loss", "value", "apart", "gradient norm", "apart", "gradient apart", "agrees"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder in Hugging Face layout; a tiny random Llama if not given")
    parser.add_argument("--layout", default="tree", choices=["tree", "sorted", "padded"])
    parser.add_argument("--losses", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/trl_parity.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        from benchmarks.models import make_tiny, vocabulary_of

        model = args.model or str(make_tiny(Path(folder)))
        spec = RolloutSpec(
            prompts=4,
            completions=4,
            prompt_tokens=17,
            max_completion_tokens=args.max_tokens,
            mean_tokens=args.max_tokens // 2,
            dead_share=0.25,
            vocabulary=vocabulary_of(model),
        )
        found = check_parity(model, spec, args.losses, layout=args.layout)
    print(report(found, args.tolerance))
    agreed = all(a.holds(args.tolerance) for a in found)
    write_result(
        args.output,
        {
            "what": "rlpost against TRL, float32, identical frozen rollouts",
            "model": "tiny random Llama" if args.model is None else Path(args.model).name,
            "rollout": spec.as_dict(),
            "layout": args.layout,
            "tolerance": args.tolerance,
            "agrees": agreed,
            "losses": [asdict(a) for a in found],
            "machine": machine(),
        },
    )
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
