"""Rollout engines: who samples the completions, with which weights, and how that is verified."""
