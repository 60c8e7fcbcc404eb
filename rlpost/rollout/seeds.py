"""Seeds of single samples: functions of what is sampled, never of where or when."""

from __future__ import annotations

import hashlib


def request_seed(run_seed: int, step: int, prompt_id: str, sample: int, level: int = 0) -> int:
    """The seed of one sample: 0 <= seed < 2**63, the same on every machine, Python version and process layout.

    `level` tells apart repeated attempts on the same prompt within a step (such as GHPO's hint levels).
    """
    key = f"{run_seed}|{step}|{level}|{sample}|{prompt_id}"  # the only free text stands last: no two keys collide
    digest = hashlib.blake2b(key.encode(), digest_size=8, person=b"rlpost.seed").digest()
    return int.from_bytes(digest, "big") >> 1
