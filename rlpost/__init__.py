"""rlpost: reinforcement-learning post-training for reasoning LLMs."""

from rlpost.moved import install as _install

_install()
