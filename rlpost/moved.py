"""Modules that were moved into rooms can still be imported under the names that they had: programs outside use these."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

SECTIONS = ("base", "critic", "data", "guidance", "learner", "masks", "method", "model", "preference", "presets")
MOVED = {
    **{f"rlpost.recipe.{name}": f"rlpost.recipe.sections.{name}" for name in (*SECTIONS, "reward", "rollout", "root")},
    "rlpost.assemble": "rlpost.run.assemble",
    "rlpost.baseline": "rlpost.source.baseline",
    "rlpost.conclude": "rlpost.run.conclude",
    "rlpost.evaluate": "rlpost.evaluation.checkpoint",
    "rlpost.gate": "rlpost.teaching.gate",
    "rlpost.guide": "rlpost.teaching.guide",
    "rlpost.learner.state": "rlpost.run.state",
    "rlpost.loop": "rlpost.run.loop",
    "rlpost.methods.context": "rlpost.gradient.step",
    "rlpost.pair_evaluation": "rlpost.evaluation.pairs",
    "rlpost.precision": "rlpost.policy.precision",
    "rlpost.recipe.memory": "rlpost.recipe.plan.memory",
    "rlpost.reference": "rlpost.source.reference",
    "rlpost.rehearse": "rlpost.run.rehearse",
    "rlpost.verdict": "rlpost.teaching.verdict",
    "rlpost.weigh": "rlpost.source.weigh",
}
"""Former name -> where the module is now."""


class _Alias(Loader):
    """Gives the module that is there now, the very same object, so that its classes are one under both names."""

    def __init__(self, now: str) -> None:
        self._now = now
        self._spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._now)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # which the import system has replaced by the alias's


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        now = MOVED.get(fullname)
        return None if now is None else ModuleSpec(fullname, _Alias(now))


def install() -> None:
    """Lets the former names be imported, from now on, in this process."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
