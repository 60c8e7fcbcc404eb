"""`rlpost serve`: a vLLM server for runs with `rollout.engine.where: server`, kept alive."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

from rlpost.data.packaged import resolve_model_path
from rlpost.errors import EngineLost, RecipeError, RolloutError
from rlpost.policy.precision import decide_precision
from rlpost.recipe.rules.rollout import no_cpu
from rlpost.recipe.sections.rollout import VllmEngine
from rlpost.rollout.remote.client import answers
from rlpost.rollout.remote.make import server_process, start
from rlpost.rollout.served import Served
from rlpost.run.build import adapter_rank, max_model_len

if TYPE_CHECKING:
    from collections.abc import Callable

    from rlpost.recipe.load import LoadedRecipe
    from rlpost.rollout.remote.process import ServerProcess

_PING_EVERY_S = 5.0


def serve(loaded: LoadedRecipe, *, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serves the recipe's model until Ctrl-C or SIGTERM. A server that ends, or whose engine answers nothing for
    `rollout.engine.deadline_s` seconds, is started again, `rollout.engine.restarts` times at the most.

    The learner brings its weights with its first sync. Raises RecipeError for another engine than vLLM, RolloutError when the
    server cannot start, EngineLost when it was restarted too often.
    """
    import torch

    recipe, _ = decide_precision(loaded.recipe)
    engine_settings = recipe.rollout.engine
    if not isinstance(engine_settings, VllmEngine):
        raise RecipeError(
            f"`rlpost serve` needs rollout.engine.type=vllm; {loaded.path} has {engine_settings.type}, which samples inside "
            "the learner. Change it, or leave the server out."
        )
    on_cpu = not torch.cuda.is_available()
    if on_cpu and (problems := list(no_cpu(engine_settings))):
        raise RecipeError(f"{loaded.path}: {'; '.join(problems)}.")
    served = Served(
        resolve_model_path(recipe.model.path),
        max_model_len(recipe),
        recipe.seed,
        recipe.model.trust_remote_code,
        on_cpu=on_cpu,
        transfer=recipe.rollout.sync.transfer,
        adapter_rank=adapter_rank(recipe),
    )
    log = recipe.run_dir / "rollout" / f"serve_{port}.log"
    process = server_process(engine_settings, served, log=log, address=f"{host}:{port}")
    signal.signal(signal.SIGTERM, _stop)
    try:
        _keep_alive(process, engine_settings, served, say)
    except KeyboardInterrupt:
        say("Ended.")
    finally:
        process.end()


def _keep_alive(
    process: ServerProcess, engine_settings: VllmEngine, served: Served, say: Callable[[str], None]
) -> None:
    restarts = 0
    while True:
        say(f"Starting vLLM with {served.model_path} (its log: {process.log})")
        try:
            start(process, engine_settings, served)
        except RolloutError:
            if restarts == 0:
                raise
        else:
            say(f"Ready: rollout.engine.where=server 'rollout.engine.urls=[{process.address}]'. Ctrl-C ends it.")
            while process.alive and answers(process.address, deadline_s=engine_settings.deadline_s):
                time.sleep(_PING_EVERY_S)
        if restarts >= engine_settings.restarts:
            raise EngineLost(
                f"The rollout server at {process.address} was lost {restarts + 1} times, and "
                f"rollout.engine.restarts={engine_settings.restarts}. Its log says why: {process.log}"
            )
        restarts += 1
        say(f"The server is lost; restart {restarts} of {engine_settings.restarts}.")


def _stop(*_: object) -> None:
    raise KeyboardInterrupt
