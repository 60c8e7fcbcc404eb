"""Taking up a run: which checkpoint is meant, whether the recipe can go on from it, and what to say about it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlpost.data.sampler import PromptSampler
from rlpost.errors import CheckpointError
from rlpost.learner.checkpoint import checkpoints_in, verify
from rlpost.recipe.changes import Change, Effect, changes
from rlpost.recipe.secrets import conceal, dump
from rlpost.recipe.sections.root import Recipe

if TYPE_CHECKING:
    from rlpost.data.pairs import PairSets
    from rlpost.data.prompts import PromptSets


def read_counters(path: Path) -> dict[str, Any]:
    """`trainer/state.json` of a verified checkpoint. Raises CheckpointError when it is not one of a training run."""
    verify(path)
    try:
        counters = json.loads((path / "trainer" / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} has no readable trainer/state.json ({error}): it cannot be resumed.") from error
    if not isinstance(counters, dict) or "optimizer_step" not in counters:
        raise CheckpointError(f"{path}/trainer/state.json is not that of a training run: it cannot be resumed.")
    return counters


def counters_or_offer(path: Path) -> dict[str, Any]:
    """As `read_counters`; the error about a damaged checkpoint also names the newest older one that is whole, as the key to
    type."""
    try:
        return read_counters(path)
    except CheckpointError as error:
        older = [other for other in checkpoints_in(path.parent) if _step(other) < _step(path)]
        for other in reversed(older):
            try:
                step = read_counters(other)["optimizer_step"]
            except CheckpointError:
                continue
            raise CheckpointError(
                f"{error} An older one is whole, that of optimizer step {step}; to go on from there, without what came after, "
                f"put this behind the command instead of another resume: resume={other}"
            ) from error
        raise


def _step(checkpoint: Path) -> int:
    digits = checkpoint.name.removeprefix("step_")
    return int(digits) if digits.isdigit() else -1


def saved_recipe(path: Path, counters: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The recipe that saved a checkpoint, as plain values: of the checkpoint itself, or, where an older version of rlpost
    wrote it, of its run's folder; None where neither has one."""
    recipe = counters.get("recipe")
    if isinstance(recipe, dict):
        return recipe
    if not counters:
        return None
    try:
        import yaml

        tree = yaml.safe_load((path.parent.parent / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return tree if isinstance(tree, dict) else None


def found_changes(path: Path, counters: Mapping[str, Any], recipe: Recipe) -> list[Change]:
    """The keys whose values differ between the recipe and the one that saved the checkpoint `path`."""
    saved = saved_recipe(path, counters)
    if saved is None:
        return []
    return [one for one in changes(conceal(saved), dump(recipe)) if not _same_place(one)]


def _same_place(change: Change) -> bool:
    """Whether the change is only another way to write the path of the same model."""
    if change.key != "model.path":
        return False
    before, now = Path(change.before).expanduser(), Path(change.now).expanduser()
    return before.exists() and now.exists() and before.resolve() == now.resolve()


def check_changes(path: Path, counters: Mapping[str, Any], recipe: Recipe) -> None:
    """Whether the recipe can go on from a checkpoint. Raises CheckpointError naming the keys that cannot be changed, both
    values, and the ways out."""
    in_rollout = counters["in_rollout"]
    limit = Effect.ROLLOUT if in_rollout else Effect.RUN
    refused = [change for change in found_changes(path, counters, recipe) if change.effect >= limit]
    if not refused:
        return
    first, *others = sorted(refused, key=lambda change: -change.effect)
    fixed = [change for change in refused if change.effect is Effect.RUN]
    where = "" if fixed else ", in the middle of a rollout"
    also = (
        f" Likewise {', '.join(f'{c.key}={_short(c.before)} (now {_short(c.now)})' for c in others)}." if others else ""
    )
    raise CheckpointError(
        f"{path} was saved with {first.key}={_short(first.before)}{where}, and the recipe now has {first.key}="
        f"{_short(first.now)}: what was saved does not fit it.{also} Set {first.key} back to {_short(first.before)}"
        f"{' and so on' if others else ''}, or {_way_out(path, counters, fixed)}."
    )


def _way_out(path: Path, counters: Mapping[str, Any], fixed: Sequence[Change]) -> str:
    keys = {change.key for change in fixed}
    if "model.path" in keys:
        return "put a link to the same model where it was, or begin a new run"
    if any(key.startswith("model.lora") for key in keys):
        return "begin a new run (another name, without resume)"
    if fixed:
        return f"begin a new run from its weights with model.path={path}"
    return (
        "resume from a checkpoint at a rollout's end (a checkpoint.every that is a multiple of minibatches x epochs makes all "
        f"of them such); learner.stop_after={counters.get('rollout', 0) + 1} with the old values goes on to the end of this one"
    )


def check_order(path: Path | None, sets: PromptSets | PairSets, recipe: Recipe) -> None:
    """Whether the training prompts are those that a checkpoint's sampler was drawing from, before a model is loaded. Raises
    CheckpointError, which names what was changed in the recipe. Pairs are compared later: their baselines may still have to be
    sampled."""
    saved = {} if path is None else read_counters_unverified(path).get("sampler")
    if not saved or path is None or recipe.data.has_pairs:
        return
    try:
        PromptSampler(len(sets.train), recipe.seed, recipe.data.shuffle, sets.fingerprint).load_state_dict(saved)
    except CheckpointError as error:
        lines = _changed_lines(path, read_counters_unverified(path), recipe)
        raise CheckpointError("\n".join([str(error), *lines])) from error


def notes(recipe: Recipe, run_dir: Path, resume_from: Path | None) -> list[str]:
    """What `resume` did, in a line or a few."""
    if recipe.resume == "never":
        return []
    if resume_from is None:
        return [
            f"resume=auto: there is no checkpoint in {run_dir / 'checkpoints'}, so the run starts anew{_others(run_dir)}"
        ]
    counters = read_counters_unverified(resume_from)
    step, rollout = counters["optimizer_step"], counters.get("rollout", 0)
    where = f"in the middle of rollout {rollout + 1}" if counters.get("in_rollout") else f"after {rollout} rollouts"
    lines = [f"Going on from {resume_from}: optimizer step {step}, {where} of {recipe.learner.rollouts}"]
    return lines + _changed_lines(resume_from, counters, recipe)


def _changed_lines(path: Path, counters: dict[str, Any], recipe: Recipe) -> list[str]:
    """A line for every key that has another value than in the recipe of the checkpoint."""
    different = [change for change in found_changes(path, counters, recipe) if change.key not in ("name", "output_dir")]
    return [f"Changed since it was saved: {c.key} {_short(c.before)} -> {_short(c.now)}" for c in different]


def read_counters_unverified(path: Path) -> dict[str, Any]:
    """The same as `read_counters` of a checkpoint that was verified before; {} where it cannot be read."""
    try:
        counters = json.loads((path / "trainer" / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return counters if isinstance(counters, dict) else {}


def _others(run_dir: Path) -> str:
    """Runs beside this one that have checkpoints: one of them may have been meant."""
    names = sorted(
        path.parents[1].name for path in run_dir.parent.glob("*/checkpoints/step_*") if path.parents[1] != run_dir
    )
    unique = list(dict.fromkeys(names))
    if not unique:
        return ""
    near = difflib.get_close_matches(run_dir.name, unique, n=3, cutoff=0.5)
    shown = near or unique[:3]
    more = f" and {len(unique) - len(shown)} more" if len(unique) > len(shown) else ""
    return f". Runs beside it that have checkpoints: {', '.join(shown)}{more} (name=... chooses one)"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:100]}..."
