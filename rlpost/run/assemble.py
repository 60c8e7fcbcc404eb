"""Puts a run together from its recipe, cheapest checks first: nothing slow happens before everything else is known good."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from rlpost.data.sampler import PromptSampler
from rlpost.learner.checkpoint import CheckpointStore
from rlpost.learner.factory import make_learner
from rlpost.learner.process import Processes
from rlpost.learner.resume import check_order, notes
from rlpost.learner.rng import seed_everything
from rlpost.learner.watch import Phases
from rlpost.policy.precision import decide_precision
from rlpost.recipe.rules.setting import zero_stage_from_environment
from rlpost.run.before_model import Before, look_before, try_saving
from rlpost.run.build import (
    build_curvature,
    build_engine,
    build_policy,
    build_updater,
    layout_for,
    sampling_settings,
    share_rows,
    start_engine,
)
from rlpost.run.offload import refuse_without_room, settle
from rlpost.run.opening import open_run
from rlpost.run.parts import Parts
from rlpost.scoring.factory import make_scorer
from rlpost.source.baseline import with_baselines
from rlpost.tracking.timeline import Timeline
from rlpost.tracking.tracker import Tracker

if TYPE_CHECKING:
    from rlpost.recipe.load import LoadedRecipe


def assemble(loaded: LoadedRecipe) -> Parts:
    """Builds all parts. Raises an RlpostError for whatever is wrong with recipe, data, rewards, model or machine."""
    processes = Processes()
    recipe, precision_notes = decide_precision(loaded.recipe)
    seed_everything(recipe.seed)
    with ExitStack() as undo:  # what was started is ended, last first, if a later part cannot be built
        scorer = processes.together(lambda: make_scorer(recipe.rewards, recipe.scoring, loaded.path.parent))
        undo.callback(scorer.close)
        zero = zero_stage_from_environment()
        before = Before(recipe, scorer, is_main=processes.is_main, zero_stage=zero)
        processes.together(lambda: look_before(before))  # before an earlier run is overwritten
        tokenizer, sets = before.tokenizer, before.sets
        assert tokenizer is not None and sets is not None
        run, resume_from = open_run(recipe, processes, partial(check_order, sets=sets, recipe=recipe))
        undo.callback(run.close)
        taken_up = notes(recipe, run.path, resume_from)  # before the recipe in the run's folder is replaced
        tracker = processes.together(lambda: Tracker(run, recipe, is_main=processes.is_main))
        undo.callback(tracker.close, "failed")
        for line in filter(None, (*loaded.notes, *taken_up, sets.note(), *before.notes, before.disk)):
            tracker.note(line)
        processes.together(lambda: refuse_without_room(recipe, processes))
        model_path, policy = processes.together(lambda: build_policy(recipe, resume_from, processes))
        processes.together(lambda: try_saving(policy, tokenizer, run.checkpoints) if processes.is_main else None)
        share_rows(recipe, policy, processes)
        start = partial(start_engine, recipe, model_path, tokenizer, processes)
        sets, sampled = with_baselines(recipe, sets, model_path, start, processes)
        engine = build_engine(recipe, model_path, tokenizer, processes)
        undo.callback(engine.close)
        curvature = build_curvature(recipe, policy, processes)  # before ZeRO shards the head, whose shape it needs
        section, forecast, offload_notes = settle(recipe, policy, processes, run.path)
        learner = make_learner(policy, section, processes, forecast)
        layout, note = layout_for(policy, recipe.learner.layout, recipe.longest_sequence)
        for line in filter(None, (*precision_notes, *policy.notes, *offload_notes, sampled, note)):
            tracker.note(line)
        undo.pop_all()
    timeline = Timeline(run.timeline if processes.is_main else None)
    phases = Phases(recipe.learner.watchdog_s, timeline.of("learner"))
    processes.watch = phases.watch
    return Parts(
        recipe=recipe,
        processes=processes,
        run=run,
        tracker=tracker,
        phases=phases,
        timeline=timeline,
        store=CheckpointStore(
            run.checkpoints, recipe.checkpoint.keep, processes, asynchronous=recipe.checkpoint.asynchronous
        ),
        resume_from=resume_from,
        tokenizer=tokenizer,
        prompts=sets.train,
        held_out=sets.held_out if recipe.evaluation.prompts else (),
        sampler=PromptSampler(len(sets.train), recipe.seed, recipe.data.shuffle, sets.fingerprint),
        scorer=scorer,
        engine=engine,
        learner=learner,
        updater=build_updater(recipe, learner, layout, tokenizer.pad_token_id, curvature),
        sampling=sampling_settings(recipe),
        model_path=model_path,
    )
