"""A model's `generation_config.json`, which rlpost neither uses nor changes: it goes into every checkpoint as it came.

Transformers refuses to write some that are published (a temperature without `do_sample`) and to read others; neither may
cost a run its model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

FILE = "generation_config.json"


def loading_options(path: str) -> tuple[dict[str, Any], str | None]:
    """What `from_pretrained` has to be told so that it does not stumble over the generation settings that come with `path`,
    and a line for the user where something had to be left out. Mostly nothing."""
    from transformers import GenerationConfig

    with _quiet():
        try:
            GenerationConfig.from_pretrained(path)
        except OSError:  # there is none, or it is no JSON: transformers makes one from the model's configuration
            there = (Path(path).expanduser() / FILE).is_file()
            return {}, f"model: {FILE} of {path} is no JSON and is not taken into checkpoints" if there else None
        except Exception as error:
            config, dropped = _mended(_read(path))
            reason = str(error).strip().splitlines()[0]
            return {"generation_config": config}, (
                f"model: transformers cannot read {FILE} of {path} ({reason}): checkpoints are written without "
                f"{', '.join(dropped) or 'it'}; nothing in training depends on it"
            )
    return {}, None


def unwritable(model: PreTrainedModel) -> str | None:
    """A line for the user about what transformers refuses to write of a model's generation settings; None: nothing."""
    config = getattr(model, "generation_config", None)
    if config is None or (reason := _refusal(config)) is None:
        return None
    return f"model: {FILE} is written into checkpoints as it came, although transformers calls it invalid ({reason})"


@contextmanager
def written_as_it_came(model: PreTrainedModel, folder: Path) -> Iterator[None]:
    """Around `save_pretrained(folder)`: generation settings that transformers refuses to write are written all the same."""
    config = getattr(model, "generation_config", None)
    if config is None or _refusal(config) is None:
        yield
        return
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = config
    if (folder / FILE).is_file():
        config.to_json_file(folder / FILE, use_diff=True, keys_to_pop=["compile_config"])


def _refusal(config: GenerationConfig) -> str | None:
    """Why transformers would not write `config`: the first reason, in its words."""
    with _quiet():
        try:
            config.validate(strict=True)
        except Exception as error:
            lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
            return next((line for line in lines if line.startswith("`")), lines[0] if lines else type(error).__name__)
    return None


def _read(path: str) -> Any:
    from transformers.utils import cached_file

    try:
        return json.loads(Path(cached_file(path, FILE)).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return None


def _mended(settings: Any) -> tuple[GenerationConfig, list[str]]:
    """As many of the settings as transformers takes together, in their order, and the names of the others."""
    from transformers import GenerationConfig

    kept: dict[str, Any] = {}
    dropped: list[str] = []
    for name, value in settings.items() if isinstance(settings, dict) else ():
        try:
            GenerationConfig(**kept, **{name: value})
            kept[name] = value
        except Exception:
            dropped.append(name)
    return GenerationConfig(**kept), dropped


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' own warnings about the settings out of the console: what matters is said once."""
    logger = logging.getLogger("transformers.generation.configuration_utils")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
