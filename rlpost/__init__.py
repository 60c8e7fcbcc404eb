"""rlpost: reinforcement-learning post-training for reasoning LLMs."""
