"""The performance model of `rlpost.offload` held against the two published sweeps of Deep Optimizer States.

    python -m benchmarks.offload_model

Maurya et al. (Middleware 2024) update a 20B model on four GPUs with every k-th piece through the GPU, k = 2 to 10; the figures
are read from their plots. Per process: 3.832 billion parameters in 31 pieces; gradients are in host memory already, so pieces
that the CPU updates bring none down. Two columns a machine: with the CPU's rate that follows from their logs, where one number,
the bandwidth of the memory, is fitted to these six points; and with both fitted. The errors say how well the form fits, and
predict nothing. Then what the model says of patterns that they did not run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import table, write_result
from rlpost.offload.plan import Way, timeline, ways
from rlpost.offload.program import Op
from rlpost.offload.simulate import Load, Rates, load_of

PARAMETERS, PIECES, BILLIONS = 3_832_000_000, 31, 20.0
PUBLISHED = {  # billions of parameters of the model a second, by k
    "4 x H100": {2: 15.3, 3: 14.9, 4: 14.2, 6: 13.3, 8: 13.0, 10: 12.7},
    "4 x A100": {2: 5.7, 3: 5.6, 4: 5.3, 6: 5.1, 8: 5.1, 10: 5.1},
}
LINK = {"4 x H100": 55.2e9, "4 x A100": 25e9}  # bytes a second and direction
SPECIFIED = {
    "4 x H100": 2.2e9,
    "4 x A100": 0.91e9,
}  # elements a second of AdamW on one process's cores, from their logs
FITTED = {"4 x H100": (1.5e9, 4.5e9), "4 x A100": (0.8e9, 2.2e9)}  # where to look for a better one
GPU_ADAM, CAST = 90e9, 10e9


def rates(machine: str, cpu: float, memory: float) -> Rates:
    return Rates(LINK[machine], LINK[machine], memory, GPU_ADAM, cpu, CAST)


def without_gradients(of: Rates) -> Callable[[Op], Load]:
    def load(op: Op) -> Load:
        return Load(0.0) if op.name == "gradients" else load_of(op, of)

    return load


def seconds(way: Way, of: Rates) -> float:
    return timeline(PARAMETERS, way, of, pieces=PIECES, load=without_gradients(of)).total


def error(machine: str, of: Rates) -> float:
    """The largest relative difference between model and published time, over k."""
    return max(abs(seconds(Way(1, k), of) / (BILLIONS / published) - 1) for k, published in PUBLISHED[machine].items())


def best_memory(machine: str, cpu: float) -> tuple[float, float]:
    """(largest error, bytes a second of host memory for a process) of the bandwidth that fits best."""
    return min((error(machine, rates(machine, cpu, m * 1e9)), m * 1e9) for m in range(20, 200))


def fit(machine: str) -> tuple[float, float, float]:
    """(largest error, CPU rate, bandwidth) of the best pair."""
    low, high = FITTED[machine]
    found = []
    for step in range(13):
        cpu = low + (high - low) * step / 12
        gap, memory = best_memory(machine, cpu)
        found.append((gap, cpu, memory))
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/offload_model.json"))
    options = parser.parse_args()
    result = {}
    for machine in PUBLISHED:
        specified = best_memory(machine, SPECIFIED[machine])
        gap, cpu, memory = fit(machine)
        none = error(machine, rates(machine, SPECIFIED[machine], 1e15))
        found = {}
        for name, of in (
            ("specified", rates(machine, SPECIFIED[machine], specified[1])),
            ("fitted", rates(machine, cpu, memory)),
        ):
            of_k = {k: seconds(Way(1, k), of) for k in PUBLISHED[machine]}
            beyond = {way.name: seconds(way, of) for way in ways(4)}
            found[name] = {"rates": {slot: getattr(of, slot) for slot in Rates.__slots__}, "by_k": of_k, "ways": beyond}
        result[machine] = {
            "largest_error": {"specified": specified[0], "fitted": gap, "specified, no limit of memory": none},
            **found,
        }
        print(
            f"{machine}: largest error {specified[0]:.1%} with the CPU rate of their logs and {specified[1] / 1e9:.0f} GB/s,"
        )
        print(
            f"  {gap:.1%} with {cpu / 1e9:.2f} G/s and {memory / 1e9:.0f} GB/s (both fitted), {none:.1%} with no such limit"
        )
        rows = [
            (f"k = {k}", f"{BILLIONS / published:.2f}", *(f"{found[name]['by_k'][k]:.2f}" for name in found))
            for k, published in PUBLISHED[machine].items()
        ]
        rows += [
            (name, "", *(f"{found[which]['ways'][name]:.2f}" for which in found)) for name in found["fitted"]["ways"]
        ]
        print(table(("update, seconds", "published", "specified", "fitted"), rows))
    write_result(options.out, result)


if __name__ == "__main__":
    main()
