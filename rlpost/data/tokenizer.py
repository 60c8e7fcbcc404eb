"""The model's tokenizer, with the recipe's chat template if it names one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlpost.data.packaged import described_by
from rlpost.errors import RecipeError
from rlpost.recipe.sections.model import ModelSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.path`; `model.chat_template` replaces its chat template, and a missing pad token is EOS.

    Raises RecipeError when the tokenizer or the template file cannot be read, or when there is no EOS token.
    """
    from transformers import AutoTokenizer

    path = described_by(model.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise RecipeError(
            f"model.path: no tokenizer can be loaded from `{model.path}`: {' '.join(str(error).split())} "
            "Give a Hugging Face model name, a local folder with a tokenizer in it, or `package:smollm2-135m`."
        ) from error
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            f"model.path: the tokenizer of `{model.path}` has no end-of-sequence token, so completions could never "
            "stop. Add `eos_token` to its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.chat_template is not None:
        tokenizer.chat_template = _read_template(model.chat_template)
    return tokenizer


def _read_template(path: str) -> str:
    from jinja2 import Environment, TemplateSyntaxError

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        # `{% generation %}` is a tag of transformers' own; it parses the template again with it.
        if "generation %}" not in text:
            Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"model.chat_template: `{path}` cannot be read: {error}. Give the path of a Jinja file."
        ) from error
    except TemplateSyntaxError as error:
        raise RecipeError(
            f"model.chat_template: `{path}`, line {error.lineno}, is not valid Jinja: {error}."
        ) from error
    return text
