"""How many calls of a quick reward function a pool of scoring processes answers in a second.

    python -m benchmarks.scoring [--before CHECKOUT] [--calls 4096] [--repeats 5] [--out FILE]

One call a completion, and one a group of eight. `--before`: another checkout of rlpost, measured in turns with this one. Every
number comes from a fresh process that has scored once before it is timed, with two scoring processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine, show, spread, table, write_result

FORMS = ("sample", "group")


def rate(checkout: Path, form: str, calls: int) -> float:
    """Calls a second in a fresh process that takes rlpost from `checkout`."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--child", form, "--calls", str(calls)]
    done = subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        raise RuntimeError(f"scoring failed in {checkout}:\n{done.stderr[-3000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def child(form: str, calls: int) -> float:
    """The same in this process."""
    from rlpost.experience import Completion, Group, Prompt
    from rlpost.recipe.sections.reward import RewardSection, ScoringSection
    from rlpost.scoring import Scorer

    each = 1 if form == "sample" else 8  # completions that a call sees
    prompt = Prompt("p", ({"role": "user", "content": "one and one"},), "one and one", (1, 2), {"answer": "2"})
    groups = [
        Group(prompt, tuple(Completion((5, 6), (0.0, 0.0), f"it is {i}", "stop") for i in range(8)))
        for _ in range(calls * each // 8)
    ]
    section = RewardSection.model_validate({"function": "length:linear", "call": form, "arguments": {"cost": 0.5}})
    with Scorer([section], ScoringSection(workers=2)) as scorer:
        scorer.score(groups[:16])
        began = time.perf_counter()
        scored = scorer.score(groups)
        seconds = time.perf_counter() - began
    assert all(row[0].value is not None for group in scored for row in group.scores)
    return calls / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--calls", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/scoring.json"))
    parser.add_argument("--child", choices=FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, options.calls)))
        return
    places = {"now": ROOT} | ({"before": options.before.resolve()} if options.before else {})
    rates: dict[str, dict[str, list[float]]] = {form: {name: [] for name in places} for form in FORMS}
    described = machine()
    for _ in range(options.repeats):
        for form in FORMS:
            for name, checkout in places.items():
                rates[form][name].append(rate(checkout, form, options.calls))
    found: dict[str, Any] = {form: {n: spread(values) for n, values in rates[form].items()} for form in FORMS}
    if options.before:
        for form in FORMS:
            pairs = zip(rates[form]["now"], rates[form]["before"], strict=True)
            found[form]["ratio"] = spread([now / before for now, before in pairs])
    columns = list(found["sample"])
    rows = [(form, *(show(found[form][name], 2 if name == "ratio" else 0) for name in columns)) for form in FORMS]
    print(table(("calls a second, one call a", *columns), rows))
    write_result(options.out, {"machine": described, "calls": options.calls, "rates": rates, "summary": found})


if __name__ == "__main__":
    main()
