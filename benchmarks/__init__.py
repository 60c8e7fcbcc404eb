"""Measurements of rlpost, and of TRL beside it. Run them from the repository's root: `python -m benchmarks.<name>`."""
