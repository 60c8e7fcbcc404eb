"""`rlpost serve`: a vLLM server for runs with `rollout.engine.where: server`, kept alive."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rlpost.data.packaged import resolve_model_path
from rlpost.errors import EngineLost, RecipeError
from rlpost.policy.generation import loading_options
from rlpost.policy.precision import decide_precision
from rlpost.recipe.sections.rollout import VllmEngine
from rlpost.rollout.remote.arguments import server_arguments, server_environment
from rlpost.rollout.remote.client import ServerLost
from rlpost.rollout.remote.process import ServerProcess
from rlpost.rollout.vllm_errors import explain_startup
from rlpost.run.build import max_model_len

if TYPE_CHECKING:
    from collections.abc import Callable

    from rlpost.recipe.load import LoadedRecipe

_PING_EVERY_S = 5.0


def serve(loaded: LoadedRecipe, *, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serves the recipe's model until Ctrl-C or SIGTERM. A server that ends, or whose engine answers nothing for
    `rollout.engine.deadline_s` seconds, is started again, `rollout.engine.restarts` times at the most.

    The learner brings its weights with its first sync. Raises RecipeError for another engine than vLLM, RolloutError when the
    server cannot start, EngineLost when it was restarted too often.
    """
    import torch

    recipe, _ = decide_precision(loaded.recipe)
    section = recipe.rollout.engine
    if not isinstance(section, VllmEngine):
        raise RecipeError(
            f"`rlpost serve` needs rollout.engine.type=vllm; {loaded.path} has {section.type}, which samples inside the "
            "learner. Change it, or leave the server out."
        )
    model_path, longest = resolve_model_path(recipe.model.path), max_model_len(recipe)
    on_cpu = not torch.cuda.is_available()
    process = ServerProcess(
        lambda address: server_arguments(
            model_path,
            section,
            max_model_len=longest,
            seed=recipe.seed,
            on_cpu=on_cpu,
            trust_remote_code=recipe.model.trust_remote_code,
            address=address,
            generation_config="vllm" if loading_options(model_path)[0] else None,
        ),
        server_environment(section, on_cpu=on_cpu, deadline_s=section.deadline_s),
        cores=section.cores,
        log=_log_file(recipe.run_dir, port),
        remove=None,
        start_s=section.start_s,
        address=f"{host}:{port}",
    )
    signal.signal(signal.SIGTERM, _stop)
    try:
        _keep_alive(process, section, say, model_path, longest)
    except KeyboardInterrupt:
        say("Ended.")
    finally:
        process.end()


def _keep_alive(
    process: ServerProcess, section: VllmEngine, say: Callable[[str], None], model_path: str, longest: int
) -> None:
    restarts = 0
    while True:
        say(f"Starting vLLM with {model_path} (its log: {process.log})")
        try:
            process.start()
        except ServerLost as error:
            if restarts == 0:
                raise explain_startup(error, model_path, section, longest) from error
        else:
            say(f"Ready: rollout.engine.where=server 'rollout.engine.urls=[{process.address}]'. Ctrl-C ends it.")
            while process.alive and process.answers(section.deadline_s):
                time.sleep(_PING_EVERY_S)
        if restarts >= section.restarts:
            raise EngineLost(
                f"The rollout server at {process.address} was lost {restarts + 1} times, and "
                f"rollout.engine.restarts={section.restarts}. Its log says why: {process.log}"
            )
        restarts += 1
        say(f"The server is lost; restart {restarts} of {section.restarts}.")


def _log_file(run_dir: Path, port: int) -> Path:
    return run_dir / "rollout" / f"serve_{port}.log"


def _stop(*_: object) -> None:
    raise KeyboardInterrupt
