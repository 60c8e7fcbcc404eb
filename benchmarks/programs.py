"""How many programs a second the sandbox runs: python -m benchmarks.programs [--programs 40] [--repeats 5] [--at-once 2]

Rows, which take turns within a repeat: a program that prints a number, started without any sandbox (what an interpreter's start
costs); the same in a sandbox; and one of the code reward's answers held against its test cases (one sandbox, a process for
each case). Several at once, as with `scoring.workers`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.measure import machine, show, spread, table, write_result
from rlpost.sandbox import problem, run
from rlpost.sandbox.programs import Call, passed

PROGRAM = "def double(n):\n    return 2 * n\n\nprint(double(21))\n"
CASES = 4


def plain() -> bool:
    """The interpreter as the sandbox starts it, outside."""
    command = [f"{sys.base_prefix}/bin/python3", "-I", "-S", "-c", PROGRAM]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout == "42\n"


def sandboxed() -> bool:
    return run({"main.py": PROGRAM}).stdout == "42\n"


def judged() -> bool:
    return all(passed(PROGRAM, [Call(f"double({n})", 2 * n) for n in range(CASES)], seconds=10.0))


ROWS: dict[str, Callable[[], bool]] = {
    "an interpreter outside any sandbox": plain,
    "a program in a sandbox": sandboxed,
    f"an answer with {CASES} test cases": judged,
}


def rate(action: Callable[[], bool], programs: int, at_once: int) -> float:
    """Programs a second. Raises RuntimeError when one gives a wrong result."""
    start = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        right = list(pool.map(lambda _: action(), range(programs)))
    seconds = time.perf_counter() - start
    if not all(right):
        raise RuntimeError(f"{right.count(False)} of {programs} programs gave a wrong result")
    return programs / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/programs.json"))
    options = parser.parse_args()
    if (why := problem()) is not None:
        raise SystemExit(f"There is no sandbox here: {why}")
    described = machine()
    rates: dict[str, list[float]] = {name: [] for name in ROWS}
    for repeat in range(options.repeats):
        for name in list(ROWS) if repeat % 2 == 0 else reversed(ROWS):
            rates[name].append(rate(ROWS[name], options.programs, options.at_once))
    first = rates[next(iter(ROWS))]
    rows, results = [], {}
    for name, measured in rates.items():
        times = spread([a / b for a, b in zip(first, measured, strict=True)])
        results[name] = {"a_second": spread(measured), "times_the_first": times, "each": measured}
        rows.append((name, show(spread(measured), 1), show(times, 2)))
    print(table(("what", "a second", "times as long as the first"), rows))
    setting = {"programs": options.programs, "repeats": options.repeats, "at_once": options.at_once}
    write_result(options.out, {"machine": described, "setting": setting, "results": results})


if __name__ == "__main__":
    main()
