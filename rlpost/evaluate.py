"""`rlpost eval`: a checkpoint's held-out accuracy, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rlpost.assemble import build_engine, build_policy, judge, load_prompts
from rlpost.errors import CheckpointError
from rlpost.learner.checkpoint import MANIFEST, verify
from rlpost.learner.process import Processes
from rlpost.learner.rng import seed_everything
from rlpost.scoring.scorer import Scorer

if TYPE_CHECKING:
    from rlpost.evaluation import EvaluationResult
    from rlpost.recipe.load import LoadedRecipe


def evaluate_checkpoint(loaded: LoadedRecipe, checkpoint: Path) -> EvaluationResult:
    """Samples, scores and judges the recipe's held-out prompts with the weights in `checkpoint`, prints the figures, and
    writes them with every completion beside the checkpoint as `<checkpoint>.eval.json`.

    Raises CheckpointError when there is no readable model in `checkpoint`.
    """
    from rlpost.evaluation import evaluation_rows

    recipe = loaded.recipe
    checkpoint = checkpoint.expanduser()
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"There is no folder {checkpoint}. Name a checkpoint such as runs/<name>/checkpoints/step_000010, or any folder "
            f"with a model in Hugging Face layout."
        )
    if (checkpoint / MANIFEST).is_file():
        verify(checkpoint)
    processes = Processes()
    seed_everything(recipe.seed)
    with Scorer(recipe.rewards, recipe.scoring, loaded.path.parent) as scorer:
        tokenizer, sets = processes.together(lambda: load_prompts(recipe, scorer))
        model_path, policy = processes.together(lambda: build_policy(recipe, checkpoint, processes))
        engine = build_engine(recipe, model_path, tokenizer, processes)
        try:
            engine.load_weights(policy.named_weights())
            result = judge(recipe, engine, scorer, sets.held_out, processes)
        finally:
            engine.close()
            names = scorer.names
    if processes.is_main:
        target = checkpoint.with_name(checkpoint.name + ".eval.json")
        page = {"metrics": result.metrics(), "completions": evaluation_rows(result, names)}
        target.write_text(json.dumps(page, indent=1, ensure_ascii=False))
        show(result, checkpoint, target)
    processes.close()
    return result


def show(result: EvaluationResult, checkpoint: Path, target: Path) -> None:
    """Prints the figures."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in result.metrics().items():
        table.add_row(name.removeprefix("eval/"), f"{value:.4g}")
    console = Console()
    console.print(f"{checkpoint}: {len(result.groups)} held-out prompts", soft_wrap=True)
    console.print(table)
    console.print(f"Every completion and its verdict: {target}", soft_wrap=True)
