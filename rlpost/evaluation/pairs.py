"""`rlpost eval` for recipes on preference pairs: how well a checkpoint tells the held-out pairs apart."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rlpost.data.pairs import Pair
from rlpost.evaluation.checkpoint import settings, show, write_page
from rlpost.evaluation.judge import judge_pairs
from rlpost.evaluation.recipe import open_checkpoint, recipe_for, warn_of_trained_on
from rlpost.learner.learner import token_logprobs
from rlpost.learner.pair_rows import pair_batches
from rlpost.learner.process import Processes
from rlpost.learner.rng import seed_everything
from rlpost.policy.precision import decide_precision
from rlpost.run.build import build_policy, layout_for, load_reference, start_engine
from rlpost.run.checks import load_prompts
from rlpost.scoring.scorer import Scorer
from rlpost.source.baseline import with_baselines
from rlpost.source.pair_buffer import open_pairs, pair_group
from rlpost.source.reference import ReferenceTable, cache_path, read_cache

if TYPE_CHECKING:
    from rlpost.policy.model import Policy
    from rlpost.recipe.load import LoadedRecipe
    from rlpost.recipe.sections.root import Recipe


def evaluate_pairs(loaded: LoadedRecipe, checkpoint: Path) -> dict[str, float]:
    """Judges the recipe's held-out pairs with the weights in `checkpoint`, prints the figures, and writes them beside the
    checkpoint as `<checkpoint>.eval.json`. Reference log-probs come from the cache of the run, where there is one.

    Raises CheckpointError when there is no readable model in `checkpoint`.
    """
    checkpoint = open_checkpoint(checkpoint)
    recipe, _ = decide_precision(recipe_for(loaded, checkpoint).recipe)
    processes = Processes()
    seed_everything(recipe.seed)
    with Scorer((), recipe.scoring) as scorer:
        tokenizer, sets = processes.together(lambda: load_prompts(recipe, scorer))
    model_path, policy = processes.together(lambda: build_policy(recipe, checkpoint, processes))
    start = partial(start_engine, recipe, model_path, tokenizer, processes)
    sets, _ = with_baselines(recipe, sets, model_path, start, processes)  # of all pairs: as the run kept them
    pairs = [pair for pair in sets.held_out if isinstance(pair, Pair)][: recipe.evaluation.prompts]
    seen = warn_of_trained_on(pairs, recipe, checkpoint, tokenizer)
    own = list(range(processes.rank, len(pairs), processes.world))
    metrics = _judge(recipe, policy, model_path, pairs, own, tokenizer.pad_token_id, processes)
    metrics |= {} if seen is None else {"trained_on": float(seen)}
    if processes.is_main:
        show(metrics, len(pairs), checkpoint, "pairs")
        page = {"settings": settings(recipe), "metrics": {f"eval/{k}": v for k, v in metrics.items()}}
        print(f"The same as JSON: {write_page(checkpoint, page)}")
    processes.close()
    return metrics


def _judge(
    recipe: Recipe,
    policy: Policy,
    model_path: str,
    pairs: list[Pair],
    own: list[int],
    pad_id: int,
    processes: Processes,
) -> dict[str, float]:
    preference = recipe.method.pairs
    assert preference is not None  # the rules ask for it
    initial = preference.from_initial
    buffer = open_pairs(
        [pair_group(pairs[i]) for i in own],
        [pairs[i].baseline if initial else None for i in own],
        step=0,
        minibatches=1,
        processes=processes,
    )
    layout, _ = layout_for(policy, recipe.learner.layout, recipe.longest_sequence)
    rows = pair_batches(
        buffer.row_groups(), layout=layout, micro_batch_tokens=recipe.learner.micro_batch_tokens, pad_id=pad_id
    )
    kept = read_cache(cache_path(recipe, model_path, pairs), sum(len(ids) for pair in pairs for ids in pair.responses))
    if kept is not None:
        buffer.ref_logp = ReferenceTable.of(pairs, kept).take(own)
    else:
        reference = load_reference(recipe, model_path, processes.device)
        buffer.ref_logp = token_logprobs(reference, rows, buffer.tokens)
    return judge_pairs(preference, policy, buffer, rows, processes)
