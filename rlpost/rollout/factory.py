"""Makes the rollout engine that a recipe asks for."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from rlpost.data.answers import end_ids
from rlpost.recipe.sections.base import unknown_choice
from rlpost.recipe.sections.model import LoraSection, ModelSection
from rlpost.recipe.sections.rollout import TransformersEngine, VllmEngine
from rlpost.rollout.engine import RolloutEngine
from rlpost.rollout.place import Place
from rlpost.rollout.served import Served
from rlpost.rollout.vllm_versions import check_version

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


def make_engine(
    engine_settings: VllmEngine | TransformersEngine,
    model: ModelSection,
    model_path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_model_len: int,
    seed: int,
    device: str,
    place: Place | None = None,
    in_flight: bool = False,
    transfer: Literal["files", "nccl"] = "files",
    adapter_rank: int | None = None,
) -> RolloutEngine:
    """The engine of `rollout.engine`; transformers, with a loud note, where vLLM is asked for and not installed.

    `model_path` is a folder with weights and tokenizer; `max_model_len` is prompt plus completion in tokens; `device`
    is a torch device ("cpu", "cuda", "cuda:1"); `place` is this process among others, by default the only one; `in_flight`:
    weights may change while another thread samples; `transfer`: how weights
    reach servers; `adapter_rank`: of LoRA adapters that come by themselves.
    Raises RolloutError when the engine cannot start.
    """
    if not isinstance(engine_settings, VllmEngine | TransformersEngine):
        raise unknown_choice("rollout.engine", engine_settings)
    if isinstance(engine_settings, VllmEngine):
        on_cpu = device.split(":")[0] == "cpu"
        served = Served(model_path, max_model_len, seed, model.trust_remote_code, on_cpu, transfer, adapter_rank)
        place = place or Place()
        engine = _vllm(engine_settings, served, end_ids(tokenizer), device, place, model.lora, in_flight=in_flight)
        if engine is not None:
            return engine
        _log.warning(
            "vLLM IS NOT INSTALLED: sampling with transformers instead, ten or more times slower. Install "
            "`rlpost[cuda]` or `rlpost[cpu]`, or silence this with rollout.engine.type=transformers."
        )
        engine_settings = TransformersEngine(dtype="bfloat16" if engine_settings.dtype == "bfloat16" else "float32")
    from rlpost.rollout.transformers_engine import TransformersRolloutEngine

    return TransformersRolloutEngine.from_path(
        model_path,
        tokenizer,
        engine_settings,
        max_model_len=max_model_len,
        device=device,
        attention=model.attention,
        trust_remote_code=model.trust_remote_code,
    )


def _vllm(
    engine_settings: VllmEngine,
    served: Served,
    ends: Sequence[int],
    device: str,
    place: Place,
    lora: LoraSection | None,
    *,
    in_flight: bool,
) -> RolloutEngine | None:
    """vLLM where the recipe wants it; None where it is wanted in this process and is not installed."""
    match engine_settings.where:
        case "colocated":
            if importlib.util.find_spec("vllm") is None:
                return None
            check_version()
            from rlpost.rollout.vllm_engine import VllmRolloutEngine

            return VllmRolloutEngine(
                served.model_path,
                engine_settings,
                max_model_len=served.max_model_len,
                seed=served.seed,
                device=device,
                trust_remote_code=served.trust_remote_code,
                ends=ends,
            )
        case "worker" | "server":
            from rlpost.rollout.remote.make import make_remote_engine

            adapters = lora if served.adapter_rank else None
            return make_remote_engine(
                engine_settings, served, ends, place, device=device, lora=adapters, in_flight=in_flight
            )
        case _:
            raise unknown_choice("rollout.engine.where", engine_settings.where)
