"""`rlpost eval`: a checkpoint's held-out accuracy, without training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlpost.errors import CheckpointError, TrainingError
from rlpost.evaluation.accuracy import evaluation_rows, select_prompts
from rlpost.evaluation.judge import judge
from rlpost.evaluation.recipe import open_checkpoint, recipe_for, warn_of_trained_on
from rlpost.learner.process import Processes
from rlpost.learner.rng import seed_everything
from rlpost.policy.precision import decide_precision
from rlpost.recipe.secrets import conceal
from rlpost.recipe.sections.root import Recipe
from rlpost.rollout.verify import check_sync, level, precision
from rlpost.run.build import adapter_rank, build_engine, build_policy, layout_for
from rlpost.run.checks import load_prompts
from rlpost.run.sync_probe import choose, look
from rlpost.scoring.factory import make_scorer
from rlpost.tracking.metrics import write_atomically

if TYPE_CHECKING:
    from rlpost.evaluation.accuracy import EvaluationResult
    from rlpost.policy.model import Policy
    from rlpost.recipe.load import LoadedRecipe
    from rlpost.rollout.engine import RolloutEngine

GREEDY = ("eval/greedy_accuracy", "eval/greedy_accuracy_stderr", "eval/greedy_reward")


def evaluate_checkpoint(loaded: LoadedRecipe, checkpoint: Path) -> EvaluationResult:
    """Samples, scores and judges the recipe's held-out prompts with the weights in `checkpoint`, prints the figures, and
    writes them with every completion beside the checkpoint (see `write_page`). With `evaluation.samples` above 1 every prompt
    is answered greedily too, so that one evaluation gives greedy accuracy and pass@k; what is returned are the samples.

    Raises CheckpointError when there is no readable model in `checkpoint`, or nothing can be written beside it.
    """
    checkpoint = open_checkpoint(checkpoint)
    recipe, _ = decide_precision(recipe_for(loaded, checkpoint).recipe)
    processes = Processes()
    seed_everything(recipe.seed)
    with closing(make_scorer(recipe.rewards, recipe.scoring, loaded.path.parent)) as scorer:
        tokenizer, sets = processes.together(lambda: load_prompts(recipe, scorer))
        chosen = select_prompts(sets.held_out, recipe.evaluation.prompts)
        seen = warn_of_trained_on(chosen, recipe, checkpoint, tokenizer)
        model_path, policy = processes.together(lambda: build_policy(recipe, checkpoint, processes))
        engine = build_engine(recipe, model_path, tokenizer, processes)
        try:
            engine.load_weights(policy.named_weights(form="apart" if adapter_rank(recipe) else "merged"))
            result = judge(recipe, engine, scorer, sets.held_out, processes)
            verify(recipe, policy, engine, processes, result, tokenizer.pad_token_id)
            greedy = None
            if recipe.evaluation.samples > 1:
                greedy = judge(greedily(recipe), engine, scorer, sets.held_out, processes)
        finally:
            engine.close()
            names = scorer.names
    if processes.is_main:
        report(recipe, checkpoint, result, greedy, names, seen)
    processes.close()
    return result


def verify(
    recipe: Recipe,
    policy: Policy,
    engine: RolloutEngine,
    processes: Processes,
    result: EvaluationResult,
    pad_id: int,
) -> None:
    """Compares the engine that answered with the checkpoint's own model, on a few answers. Raises RolloutError where they
    are not the same model."""
    probe, sequences = recipe.rollout.probe, choose(result.groups)
    if probe is None or not sequences:
        return
    layout = layout_for(policy, recipe.learner.layout, recipe.longest_sequence)[0]
    tokens = recipe.learner.micro_batch_tokens
    said = look(policy, engine, processes, sequences, layout=layout, micro_batch_tokens=tokens, pad_id=pad_id)
    limit = level(probe.max_mean_gap, precision(recipe))
    check_sync(None, said, limit=limit, exact=False, when="Evaluation")


def greedily(recipe: Recipe) -> Recipe:
    """The same evaluation with one greedy answer a prompt."""
    evaluation = recipe.evaluation.model_copy(update={"samples": 1, "k": (1,)})
    return recipe.model_copy(update={"evaluation": evaluation})


def report(
    recipe: Recipe,
    checkpoint: Path,
    result: EvaluationResult,
    greedy: EvaluationResult | None,
    names: Sequence[str],
    trained_on: int | None = None,
) -> None:
    """Prints the figures, and writes them with every completion beside the checkpoint."""
    metrics = result.metrics()
    if trained_on is not None:
        metrics["eval/trained_on"] = float(trained_on)
    page: dict[str, Any] = {"settings": settings(recipe), "metrics": metrics}
    page["completions"] = evaluation_rows(result, names)
    if greedy is not None:
        of_greedy = {key.replace("eval/", "eval/greedy_", 1): value for key, value in greedy.metrics().items()}
        metrics |= {key: of_greedy[key] for key in GREEDY if key in of_greedy}
        page["greedy_completions"] = evaluation_rows(greedy, names)
    show(metrics, len(result.groups), checkpoint)
    print(f"Every completion and its verdict: {write_page(checkpoint, page)}")


def settings(recipe: Recipe) -> dict[str, Any]:
    """What the figures depend on beside the checkpoint."""
    parts = conceal(recipe.model_dump(mode="json", include={"evaluation", "data", "rewards", "seed"}))
    sampling = {"max_completion_tokens", "top_p", "top_k", "stop"}
    return parts | {"rollout": recipe.rollout.model_dump(mode="json", include=sampling)}


def write_page(checkpoint: Path, page: Mapping[str, Any]) -> Path:
    """Writes an evaluation as `<checkpoint>.eval.json`, or as `.eval-2.json` and so on where one with other `settings` lies
    already: only the same evaluation made again replaces itself. Raises CheckpointError where that cannot be written."""
    for number in count(1):
        target = checkpoint.with_name(f"{checkpoint.name}.eval{'' if number == 1 else f'-{number}'}.json")
        if not target.exists() or _settings_in(target) == page["settings"]:
            break
    try:
        write_atomically(target, json.dumps(page, indent=1, ensure_ascii=False))
    except TrainingError as error:
        cause = getattr(error.__cause__, "strerror", None) or error
        raise CheckpointError(
            f"The evaluation cannot be written to {target}: {cause}. Its figures are above; for the "
            f"completions make room or make the folder writable, or copy {checkpoint} to where you can write, and evaluate "
            "again."
        ) from error
    return target


def _settings_in(page: Path) -> Any:
    try:
        return json.loads(page.read_text(encoding="utf-8")).get("settings")
    except (OSError, ValueError, AttributeError):
        return None


def show(metrics: Mapping[str, float], number: int, checkpoint: Path, what: str = "prompts") -> None:
    """Prints the figures."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name.removeprefix("eval/"), f"{value:.4g}")
    console = Console()
    console.print(f"{checkpoint}: {number} held-out {what}", soft_wrap=True)
    console.print(table)
