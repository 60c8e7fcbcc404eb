"""One reader for answers: what is boxed, said or chosen, as an exact value, and whether it is the right one.

The rewards in rewards/ that look at answers use it; `rlpost.answers.verdict` says in what order it reads.
"""

from __future__ import annotations

from rlpost.answers.completion import completion_text, final_text
from rlpost.answers.verdict import is_readable, is_right

__all__ = ["completion_text", "final_text", "is_readable", "is_right"]
