"""Checks of the cases about answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from rlpost.scoring import Unparsable, load_reward


def check_samples(folder: Path) -> None:
    """The reward that the folder's README names gives every sample what it `want`s, or 0 where it wants nothing."""
    spec = re.search(r"rlpost rewards try (\S+)", (folder / "README.md").read_text())[1]
    function = load_reward(spec).function
    for line in (folder / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        columns = {name: [value] for name, value in sample.items() if name not in ("prompt", "completion", "want")}
        try:
            [value] = function(completions=[[{"role": "assistant", "content": sample["completion"]}]], **columns)
        except Unparsable:
            value = "unknown"
        assert value == sample.get("want", 0), (sample, value)


CHECKS: dict[str, Callable[[Path], None]] = dict.fromkeys(
    (
        "choice-article-a",
        "choice-several-letters",
        "leading-dot",
        "math-degenerate-repetition",
        "math-dollar-in-latex",
        "math-latex-without-box",
        "math-minus-sign-outside-box",
        "math-number-bases",
        "math-thin-space-thousands",
        "math-tiny-values",
        "math-upright-constants",
        "scientific-notation",
    ),
    check_samples,
)
