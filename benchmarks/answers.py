"""How often `math`, and math-verify alone, give the pairs of tests/answer_pairs.jsonl their right verdict, by kind.

    python -m benchmarks.answers

Prints a table in Markdown: pairs, right verdicts of each, and wrong answers that each accepts; then how long a verdict takes.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from rlpost.answers import final_text, is_readable, is_right

PAIRS = Path(__file__).parents[1] / "tests" / "answer_pairs.jsonl"
Verdict = int | str
Judge = Callable[[str, str], Verdict]


def ours(gold: str, completion: str) -> Verdict:
    """The verdict of the reward `math`."""
    return int(is_right(final_text(completion), gold)) if is_readable(gold) else "unknown"


def library(gold: str, completion: str) -> Verdict:
    """The verdict of math-verify with its defaults, as its README shows them: the gold answer between dollars."""
    from math_verify import parse, verify

    right = parse(gold if "boxed" in gold or "$" in gold.replace(r"\$", "") else f"${gold}$")
    return int(verify(right, parse(completion))) if right else "unknown"


def main() -> None:
    """Prints the table."""
    from math_verify import parse

    parse("$1$")  # its regular expressions are compiled at first use
    counts: dict[str, list[int]] = defaultdict(lambda: [0] * 6)
    seconds: dict[str, list[tuple[float, str]]] = {"math": [], "math-verify": []}
    pairs = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    ours("1", r"\boxed{2}")
    for pair in pairs:
        count = counts[pair["kind"]]
        count[0] += 1
        count[1] += pair["want"] != 1
        judges: tuple[tuple[str, Judge], ...] = (("math", ours), ("math-verify", library))
        for i, (name, judge) in enumerate(judges):
            start = time.perf_counter()
            verdict = judge(pair["gold"], pair["completion"])
            seconds[name].append((time.perf_counter() - start, pair["completion"]))
            count[2 + 2 * i] += verdict == pair["want"]
            count[3 + 2 * i] += verdict == 1 and pair["want"] != 1
    print("| kind | pairs | of them wrong | `math` agrees | accepts wrongly | math-verify agrees | accepts wrongly |")
    print("|---|---|---|---|---|---|---|")
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    for kind, count in [*counts.items(), ("all", total)]:
        print(f"| {kind} | " + " | ".join(map(str, count)) + " |")
    for name, times in seconds.items():
        slowest = max(times)
        median = statistics.median(t for t, _ in times)
        print(f"\n{name}: median {1e3 * median:.2f} ms, slowest {1e3 * slowest[0]:.0f} ms ({slowest[1]})")


if __name__ == "__main__":
    main()
