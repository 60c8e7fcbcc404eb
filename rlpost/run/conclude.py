"""What a run says at its end: what was learned, where to look, and what to type next."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlpost.errors import RlpostError

if TYPE_CHECKING:
    from rlpost.run.result import RunResult


def conclude(result: RunResult, recipe_path: Path, launched: Sequence[str], *, report: bool = True) -> None:
    """Draws the report if wanted and prints the closing lines; on the main process only. `launched`: see `launch_command`."""
    if int(os.environ.get("RANK", "0")) != 0:
        return
    drawn = draw_report(result) if report else f"not drawn (tracking.report=false); {command()} report {result.run_dir}"
    for line in closing_lines(result, recipe_path, drawn, launched):
        print(line, flush=True)


def conclude_at_once(run_dir: Path, launched: Sequence[str]) -> None:
    """What to say when Ctrl-C ends a run on the spot: while it is put together, or the second time."""
    if int(os.environ.get("RANK", "0")) != 0:
        return
    # The manifest's name is not imported: that would import torch, which may be what was interrupted.
    saved = sorted(path.parent for path in run_dir.glob("checkpoints/step_*/manifest.json"))
    metrics = run_dir / "metrics.jsonl"
    if saved:
        print(
            f"\nStopped at once. The last checkpoint is {saved[-1]}. To go on from it:\n  {resume_command(launched, run_dir)}"
        )
    elif metrics.is_file() and metrics.stat().st_size:
        again = shlex.join([*launched, "overwrite=true"])
        print(f"\nStopped at once; nothing has been saved yet. To start again:\n  {again}")
    else:
        print("\nStopped; nothing has been saved yet. Run the same command to start again.")


def draw_report(result: RunResult) -> Path | str:
    """The report's page, or why there is none: a run that is done must not fail over a picture."""
    try:
        from rlpost.tracking.report import write_report

        return write_report(result.run_dir)
    except RlpostError as error:
        return f"no report: {error}"
    except Exception as error:
        return f"no report: {type(error).__name__}: {error}"


def launch_command() -> list[str]:
    """The command that started this run, its launcher included, without `resume` and `overwrite`. To be asked for at the
    start: at Ctrl-C the launcher may be gone before the run is."""
    import psutil

    if "RLPOST_COMMAND" in os.environ:  # launch/run.sh says how it was called
        given = [word for word in sys.argv[1:] if not word.startswith(("resume=", "overwrite="))]
        return [*shlex.split(os.environ["RLPOST_COMMAND"]), *given]
    process = psutil.Process()
    parent = process.parent()
    launched = parent is not None and any("accelerate" in word for word in parent.cmdline()[:4])
    words = parent.cmdline() if parent is not None and launched else process.cmdline()
    kept = [word for word in words if not word.startswith(("resume=", "overwrite="))]
    if len(kept) > 1 and Path(kept[1]).name in (
        "accelerate",
        "rlpost",
    ):  # a script: its first line names the interpreter
        kept = kept[1:]
    if launched and "launch" in kept[:3] and not {"--quiet", "-q"} & set(kept):
        kept.insert(
            kept.index("launch") + 1, "--quiet"
        )  # else its traceback stands below what the run says at an error
    return kept


def resume_command(launched: Sequence[str], run_dir: Path) -> str:
    """How to go on with the run that was started with `launched`."""
    return shlex.join([*launched, "resume=auto", *_not_again(run_dir)])


def _not_again(run_dir: Path) -> list[str]:
    """A recipe that says `overwrite: true` itself would delete what is to be gone on from."""
    from rlpost.recipe.load import load_recipe

    try:
        return ["overwrite=false"] if load_recipe(run_dir / "recipe.yaml").recipe.overwrite else []
    except RlpostError:
        return []


def command() -> str:
    """How rlpost can be called from here: by name, or by its path in an environment that is not activated."""
    beside = Path(sys.executable).with_name("rlpost")
    if shutil.which("rlpost") or not beside.exists():
        return "rlpost"
    return str(beside.relative_to(Path.cwd())) if beside.is_relative_to(Path.cwd()) else str(beside)


def closing_lines(result: RunResult, recipe_path: Path, report: Path | str, launched: Sequence[str]) -> list[str]:
    """The text."""
    lines = [""]
    if result.interrupted:
        lines += [
            f"Stopped after optimizer step {result.optimizer_steps} and saved. To go on:",
            f"  {resume_command(launched, result.run_dir)}",
        ]
    if result.accuracy_before is not None and result.accuracy_after is not None:
        lines.append(_accuracy(result.accuracy_before, result.accuracy_after, result.run_dir))
    lines.append(f"Report: {report}")
    if result.checkpoint is not None:
        lines.append(f"Checkpoint (Hugging Face layout): {result.checkpoint}")
    if not result.interrupted and result.checkpoint is not None:
        rlpost = command()
        lines += [
            "Next:",
            *[f"  {line}" for line in eval_command(rlpost, result.run_dir, result.checkpoint)],
            f"  {rlpost} plan RECIPE    # your own recipe, checked before a model is loaded",
            f"  {rlpost} rewards try FILE:FUNCTION --samples samples.jsonl    # your own reward, without training",
        ]
    return lines


def eval_command(rlpost: str, run_dir: Path, checkpoint: Path) -> list[str]:
    """How to evaluate a checkpoint with the recipe that its run kept, overrides included; [] where nothing can be held
    against it."""
    from rlpost.recipe.load import load_recipe

    kept = run_dir / "recipe.yaml"
    try:
        recipe = load_recipe(kept).recipe
    except RlpostError:
        return []
    words = [rlpost, "eval", str(kept), "--checkpoint", str(checkpoint)]
    pairs = recipe.data.has_pairs
    judged = pairs or any(reward.accuracy for reward in recipe.rewards)
    if not judged or (recipe.data.eval is None and recipe.data.held_out == 0):
        return []
    words += [] if pairs else ["evaluation.samples=8", "evaluation.k=[1,8]"]
    words += [] if recipe.evaluation.prompts else ["evaluation.prompts=64"]
    return [shlex.join(words)]


def _accuracy(before: float, after: float, run_dir: Path) -> str:
    if math.isnan(before) or math.isnan(after):
        return (
            "Held-out accuracy is not known: the rewards with accuracy=true gave no verdict on any held-out completion (None, "
            f"or a failure: see `scores` in {run_dir / 'completions'})."
        )
    return f"Held-out accuracy: {before:.3f} before, {after:.3f} after ({after - before:+.3f})."
