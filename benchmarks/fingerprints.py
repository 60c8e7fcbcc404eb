"""What it costs to compare, after every sync, the bits that a worker holds with those that were sent.

    python -m benchmarks.fingerprints [--model package:smollm2-135m] [--syncs 12]

One worker on this machine's CPU, in float32, with one thread on each side. Every sync is timed as a whole and, inside it, what
learner and worker spend on fingerprints and on asking packed matrices for columns: so both are of the same moments. The first
sync, in which places are found, is reported by itself.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import machine, show, spread, table, write_result
from rlpost.data.packaged import resolve_model_path
from rlpost.policy.weights import named_weights
from rlpost.recipe.sections.model import ModelSection
from rlpost.recipe.sections.rollout import VllmEngine
from rlpost.rollout.factory import make_engine
from rlpost.rollout.place import Place
from rlpost.rollout.remote.engine import RemoteEngine


def syncs(path: str, number: int) -> list[dict[str, float]]:
    """Seconds of each: as a whole, and of them the learner's and the worker's looking."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    section = VllmEngine(where="worker", dtype="float32", kv_cache_gib=0.25, max_sequences=16, deadline_s=300)
    place = Place(logs=Path(tempfile.mkdtemp(prefix="fingerprints-")))
    tokenizer = AutoTokenizer.from_pretrained(path)
    engine = make_engine(
        section, ModelSection(path=path), path, tokenizer, max_model_len=256, seed=0, device="cpu", place=place
    )
    assert isinstance(engine, RemoteEngine) and engine._files is not None
    answers: list[Any] = []
    compare = engine._compare

    def noted(told: Sequence[Any]) -> None:
        answers.extend(told)
        compare(told)

    engine._compare = noted  # type: ignore[method-assign]
    found = []
    try:
        for version in range(number + 1):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1e-6 * torch.randn_like(parameter).sign())
            began = time.perf_counter()
            engine.load_weights(named_weights(model), version)
            whole = time.perf_counter() - began
            found.append({"sync": whole, "learner": engine._files.seconds, "worker": answers[-1]["seconds"]})
    finally:
        engine.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:smollm2-135m")
    parser.add_argument("--syncs", type=int, default=12)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    first, *others = syncs(resolve_model_path(options.model), options.syncs)
    shares = [(row["learner"] + row["worker"]) / (row["sync"] - row["learner"] - row["worker"]) for row in others]
    rows = {f"{name}, seconds": spread([row[name] for row in others]) for name in ("sync", "learner", "worker")}
    rows["added to a sync without them"] = spread(shares)
    print(table(("what", "median (range)"), [(name, show(numbers, 3)) for name, numbers in rows.items()]))
    print("the first sync:", first)
    if options.out:
        write_result(options.out, {"machine": machine(), "model": options.model, "first": first, "others": rows})


if __name__ == "__main__":
    main()
