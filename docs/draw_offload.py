"""Draws docs/images/offload-timeline.png: three ways of one update, as the performance model has them.

python docs/draw_offload.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from rlpost.offload.plan import Way, timeline
from rlpost.offload.program import LANES
from rlpost.recipe.plan.update import REFERENCE

PARAMETERS, PIECES = 3_832_000_000, 12
COLORS = dict(zip(LANES, ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#D55E00", "#F0E442"), strict=True))
SAID = {
    "gpu": "AdamW on the GPU",
    "fetch": "p, m, v to the GPU",
    "flush": "p, m, v back",
    "up": "weights up",
    "down": "gradients down",
    "cpu": "AdamW on the CPU",
    "cast": "cast on the CPU",
}


def main() -> None:
    found = [(way, timeline(PARAMETERS, way, REFERENCE, pieces=PIECES)) for way in (Way(1, 2), Way(2, 3), Way(1, 1))]
    longest = max(one.total for _, one in found)
    figure, rows = plt.subplots(len(found), 1, figsize=(10, 7.5), sharex=True, layout="constrained")
    for (way, one), axes in zip(found, rows, strict=True):
        for i, lane in enumerate(LANES):
            bars = [(s.start, s.seconds) for op, s in zip(one.program.ops, one.spans, strict=True) if op.lane == lane]
            axes.broken_barh(bars, (i - 0.4, 0.8), color=COLORS[lane], edgecolor="white", linewidth=0.5)
        axes.set_yticks(range(len(LANES)), [SAID[lane] for lane in LANES], fontsize=8)
        axes.set_ylim(len(LANES) - 0.5, -0.5)
        axes.set_xlim(0, longest * 1.02)
        axes.set_title(f"{way.name}: {one.total:.2f} s", loc="left", fontsize=11, fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
    rows[-1].set_xlabel("seconds, by the model (3.8 billion parameters a process, a node of four H100)")
    path = Path(__file__).parent / "images" / "offload-timeline.png"
    figure.savefig(path, dpi=110)
    print(path)


if __name__ == "__main__":
    main()
