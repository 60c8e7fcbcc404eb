"""`rlpost eval` for recipes on preference pairs: how well a checkpoint tells the held-out pairs apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rlpost.assemble import build_policy, load_prompts, load_reference
from rlpost.data.pairs import Pair
from rlpost.errors import CheckpointError
from rlpost.learner.checkpoint import MANIFEST, verify
from rlpost.learner.learner import token_logprobs
from rlpost.learner.pair_rows import pair_batches
from rlpost.learner.process import Processes
from rlpost.learner.rng import seed_everything
from rlpost.policy.attention import choose_layout
from rlpost.preference_loop import judge_pairs, open_pairs, pair_group
from rlpost.reference import ReferenceTable, cache_path, read_cache
from rlpost.scoring.scorer import Scorer

if TYPE_CHECKING:
    from rlpost.policy.model import Policy
    from rlpost.recipe.load import LoadedRecipe
    from rlpost.recipe.root import Recipe


def evaluate_pairs(loaded: LoadedRecipe, checkpoint: Path) -> dict[str, float]:
    """Judges the recipe's held-out pairs with the weights in `checkpoint`, prints the figures, and writes them beside the
    checkpoint as `<checkpoint>.eval.json`. Reference log-probs come from the cache of the run, where there is one.

    Raises CheckpointError when there is no readable model in `checkpoint`.
    """
    recipe, checkpoint = loaded.recipe, checkpoint.expanduser()
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"There is no folder {checkpoint}. Name a checkpoint such as runs/<name>/checkpoints/step_000010."
        )
    if (checkpoint / MANIFEST).is_file():
        verify(checkpoint)
    processes = Processes()
    seed_everything(recipe.seed)
    with Scorer((), recipe.scoring) as scorer:
        tokenizer, sets = processes.together(lambda: load_prompts(recipe, scorer))
    pairs = [pair for pair in sets.held_out if isinstance(pair, Pair)][: recipe.evaluation.prompts]
    own = list(range(processes.rank, len(pairs), processes.world))
    model_path, policy = processes.together(lambda: build_policy(recipe, checkpoint, processes))
    found = _judge(recipe, policy, model_path, pairs, own, tokenizer.pad_token_id, processes)
    if processes.is_main:
        target = checkpoint.with_name(checkpoint.name + ".eval.json")
        target.write_text(json.dumps({"metrics": {f"eval/{k}": v for k, v in found.items()}}, indent=1))
        show(found, len(pairs), checkpoint, target)
    processes.close()
    return found


def _judge(
    recipe: Recipe,
    policy: Policy,
    model_path: str,
    pairs: list[Pair],
    own: list[int],
    pad_id: int,
    processes: Processes,
) -> dict[str, float]:
    section = recipe.method.pairs
    assert section is not None  # the rules ask for it
    initial = section.baseline == "initial"
    buffer = open_pairs(
        [pair_group(pairs[i]) for i in own],
        [pairs[i].baseline if initial else None for i in own],
        step=0,
        minibatches=1,
        processes=processes,
    )
    layout, _ = choose_layout(policy.config, recipe.learner.layout, recipe.model.attention)
    rows = pair_batches(
        buffer.row_groups(), layout=layout, micro_batch_tokens=recipe.learner.micro_batch_tokens, pad_id=pad_id
    )
    kept = read_cache(cache_path(recipe, model_path, pairs), sum(len(ids) for pair in pairs for ids in pair.responses))
    if kept is not None:
        buffer.ref_logp = ReferenceTable.of(pairs, kept).take(own)
    else:
        reference = load_reference(recipe, model_path, processes.device)
        buffer.ref_logp = token_logprobs(reference, rows, buffer.tokens)
    return judge_pairs(section, policy, buffer, rows, processes)


def show(found: dict[str, float], pairs: int, checkpoint: Path, target: Path) -> None:
    """Prints the figures."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in found.items():
        table.add_row(name, f"{value:.4g}")
    console = Console()
    console.print(f"{checkpoint}: {pairs} held-out pairs", soft_wrap=True)
    console.print(table)
    console.print(f"Written to {target}", soft_wrap=True)
