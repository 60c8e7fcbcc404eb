"""The chat template: the one place that renders conversations, and that says what went wrong in a template's own code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlpost.data.messages import RESERVED
from rlpost.errors import DataError, RecipeError
from rlpost.experience import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chat = Sequence[Message]
WATCHED = (
    "tool_calls",
    "tool_call_id",
    "name",
    "reasoning_content",
    "reasoning",
    "thinking",
)  # keys that templates show


class ChatTemplate:
    """A tokenizer's chat template with the recipe's keywords (`data.template_options`).

    Raises DataError where the tokenizer has no template, RecipeError for keywords that are no template's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None) -> None:
        require_template(tokenizer)
        self.tokenizer, self.options = tokenizer, dict(options or {})
        self._unseen: dict[str, str] = {}  # what the template does not show, and the first row that has it
        self._looked: set[str] = set()
        if taken := next((name for name in RESERVED if name in self.options), None):
            raise RecipeError(
                f"data.template_options.{taken}: this keyword is no chat template's, it says what is done with the template. "
                "Remove it."
            )

    def prompts(
        self, chats: Sequence[Chat], rows: Sequence[str], options: Sequence[Mapping[str, Any]] | None = None
    ) -> list[str]:
        """The text of every conversation, ready for the assistant's answer. `rows` are the rows' ids, for errors; `options`
        their own keywords, which come before the recipe's. Raises DataError."""
        own = options or [{}] * len(chats)
        for chat, row, more in zip(chats, rows, own, strict=True):
            self._look(chat, row, more)
        return [self._render(chat, row, more, answer=True) for chat, row, more in zip(chats, rows, own, strict=True)]

    def conversation(self, chat: Chat, row: str, options: Mapping[str, Any] | None = None) -> str:
        """The text of a conversation as it stands, without an opening for an answer. Raises DataError."""
        return self._render(chat, row, options or {}, answer=False)

    def anew(self) -> ChatTemplate:
        """The same template, which has rendered nothing yet."""
        return ChatTemplate(self.tokenizer, self.options)

    def learned(self) -> dict[str, Any]:
        """What rendering has shown, as `learn` takes it up."""
        return {"looked": sorted(self._looked), "unseen": self._unseen}

    def learn(self, learned: Mapping[str, Any]) -> None:
        """Takes over what another one has learned by rendering."""
        for what, row in learned["unseen"].items():
            if what.strip("`") not in self._looked:
                self._unseen[what] = row
        self._looked |= set(learned["looked"])

    def notes(self) -> list[str]:
        """What should be known of the prompts that were rendered, a line each."""
        notes = [
            f"the chat template shows nothing of {what} (row {row} is the first)" for what, row in self._unseen.items()
        ]
        source = self.tokenizer.chat_template
        text = " ".join(source.values()) if isinstance(source, Mapping) else str(source)
        notes += [
            f"the chat template has no keyword `{name}`, so data.template_options.{name} changes nothing"
            for name in self.options
            if name not in text
        ]
        if "strftime_now" in text and "date_string" not in self.options:
            fixed = (
                "data.template_options.date_string fixes it"
                if "date_string" in text
                else "a copy without it fixes that"
            )
            notes.append(
                "the chat template writes today's date, so that prompts change from day to day, and a run can be resumed on "
                f"the same day only ({fixed})"
            )
        return notes

    def _render(self, chat: Chat, row: str, options: Mapping[str, Any], *, answer: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(message) for message in chat],
                    tokenize=False,
                    add_generation_prompt=answer,
                    **{**self.options, **options},
                )
            )
        except Exception as error:  # a template is a program: whatever it raises is its answer to this conversation
            several = self.tokenizer.chat_template
            if isinstance(several, Mapping) and "default" not in several:
                named = ", ".join(f"`{name}`" for name in several)
                raise DataError(
                    f"The tokenizer has several chat templates ({named}) and none is `default`, so it is not known which one "
                    f"is meant for row {row}. Save the one that is to a file, and give that: model.chat_template: "
                    "path/to/template.jinja."
                ) from error
            raise DataError(
                f"The chat template fails on row {row}: {_said(error)}. Check the roles of its messages and their keys, its "
                "columns `tools` and `chat_template_kwargs`, data.system_prompt (some templates take no system message), "
                "data.template_options, and model.chat_template."
            ) from error

    def _look(self, chat: Chat, row: str, options: Mapping[str, Any]) -> None:
        """Finds out, once for each key, whether the template shows it."""
        keys = {key for message in chat for key in WATCHED if message.get(key)}
        for key in keys - self._looked:
            without = [{k: v for k, v in message.items() if k != key} for message in chat]
            self._compare(f"`{key}`", (chat, options), (without, options), row)
        for name in options.keys() - self._looked:
            self._compare(f"`{name}`", (chat, options), (chat, {k: v for k, v in options.items() if k != name}), row)
        self._looked |= keys | options.keys()

    def _compare(self, what: str, whole: tuple[Any, Any], less: tuple[Any, Any], row: str) -> None:
        text = self._render(whole[0], row, whole[1], answer=True)
        try:
            if self._render(less[0], row, less[1], answer=True) == text:
                self._unseen[what] = row
        except DataError:  # without it the template fails: so it is asked for
            return


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises DataError for a tokenizer without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"The tokenizer of `{tokenizer.name_or_path or 'the model'}` has no chat template, so prompts cannot be "
            "turned into tokens. Give one in the recipe: `model.chat_template: path/to/template.jinja`."
        )


def _said(error: Exception) -> str:
    """What a template's error says; of a plain Python error also its kind, since its words alone say little."""
    from jinja2 import TemplateError, TemplateSyntaxError

    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, TemplateSyntaxError):
        return f"it is not valid Jinja ({text}, line {error.lineno})"
    return text if isinstance(error, TemplateError) and text else f"{type(error).__name__}: {text}"
