"""What a run says at its end: what was learned, where to look, and what to type next."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rlpost.errors import RlpostError

if TYPE_CHECKING:
    from rlpost.loop import RunResult


def conclude(result: RunResult, recipe_path: Path) -> None:
    """Draws the report and prints the closing lines; on the main process only."""
    if int(os.environ.get("RANK", "0")) != 0:
        return
    for line in closing_lines(result, recipe_path, draw_report(result)):
        print(line, flush=True)


def draw_report(result: RunResult) -> Path | str:
    """The report's page, or why there is none: a run that is done must not fail over a picture."""
    from rlpost.tracking.report import write_report

    try:
        return write_report(result.run_dir)
    except (RlpostError, OSError) as error:
        return f"no report: {error}"


def resume_command() -> str:
    """The command that started this run, its launcher included, with `resume=auto`."""
    import shlex

    import psutil

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
    return shlex.join([*kept, "resume=auto"])


def command() -> str:
    """How rlpost can be called from here: by name, or by its path in an environment that is not activated."""
    beside = Path(sys.executable).with_name("rlpost")
    if shutil.which("rlpost") or not beside.exists():
        return "rlpost"
    return str(beside.relative_to(Path.cwd())) if beside.is_relative_to(Path.cwd()) else str(beside)


def closing_lines(result: RunResult, recipe_path: Path, report: Path | str) -> list[str]:
    """The text."""
    lines = [""]
    if result.interrupted:
        lines += [
            f"Stopped after optimizer step {result.optimizer_steps} and saved. To go on:",
            f"  {resume_command()}",
        ]
    if result.accuracy_before is not None and result.accuracy_after is not None:
        gain = result.accuracy_after - result.accuracy_before
        lines.append(
            f"Held-out accuracy: {result.accuracy_before:.3f} before, {result.accuracy_after:.3f} after ({gain:+.3f})."
        )
    lines.append(f"Report: {report}")
    if result.checkpoint is not None:
        lines.append(f"Checkpoint (Hugging Face layout): {result.checkpoint}")
    if not result.interrupted and result.checkpoint is not None:
        rlpost = command()
        lines += [
            "Next:",
            f"  {rlpost} eval {recipe_path} --checkpoint {result.checkpoint} evaluation.samples=8 'evaluation.k=[1,8]'",
            f"  {rlpost} plan RECIPE    # your own recipe, checked before a model is loaded",
            f"  {rlpost} rewards try FILE:FUNCTION --samples samples.jsonl    # your own reward, without training",
        ]
    return lines
