"""Programs that a model wrote, run where they can reach nothing: `run(files, command, limits) -> Result`."""

from rlpost.sandbox.bubblewrap import End, Limits, Result, Unavailable, problem, run

__all__ = ["End", "Limits", "Result", "Unavailable", "problem", "run"]
