"""How completions and prompts are handed to reward functions: in TRL's two formats, each hard to mistake for the other.

With a text prompt column TRL hands over texts, with a chat column lists of messages. So do we. A `Text` is a text that can
also be read as a chat, for functions that read `completion[-1]["content"]`; a `Chat` is a list of messages that refuses to be
taken for a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

Messages = Sequence[Mapping[str, Any]]

_WAY_OUT = (
    'Read `completion[-1]["content"]`, or give this reward `completions: text` in the recipe; or, if it means '
    "the list of messages, `completions: messages`"
)
_NO_MESSAGE = ("'Text' object has no attribute", "'str' object has no attribute 'get'")


class Text(str):
    """A completion or prompt of a data set whose prompts are texts: a `str`, as in TRL.

    Beyond that, `text[-1]` and `text[0]` are characters that can be asked for `["content"]` and `["role"]` as the last and
    first message of a chat can. No text's character can be indexed with a name otherwise, so nothing else changes.
    """

    messages: tuple[Mapping[str, Any], ...]

    def __new__(cls, text: str, messages: Messages = ()) -> Text:
        made = super().__new__(cls, text)
        made.messages = tuple(messages)
        return made

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        if isinstance(key, slice):
            return str.__getitem__(self, key)
        place = key.__index__()
        if not -len(self.messages) <= place < len(self.messages):
            return str.__getitem__(self, place)
        inside = -len(self) <= place < len(self)
        return _Character(str.__getitem__(self, place) if inside else "", self.messages[place])


class _Character(str):
    """A character of a `Text`, which is also its message."""

    message: Mapping[str, Any]

    def __new__(cls, text: str, message: Mapping[str, Any] | None = None) -> _Character:
        made = super().__new__(cls, text)
        made.message = message or {}
        return made

    def __getitem__(self, key: Any) -> Any:
        return self.message[key] if isinstance(key, str) else str.__getitem__(self, key)

    def get(self, key: str, default: Any = None) -> Any:
        """As of a message."""
        return self.message.get(key, default)


class Chat(list):
    """A completion or prompt of a data set whose prompts are chats: a list of messages, as in TRL.

    What is only done with texts raises, with the way out. `len()`, which a list has, too, is noted: see `misread`.
    """

    measured = False  # len() was asked for
    read = False  # a message was looked at

    def __len__(self) -> int:
        self.measured = True
        return super().__len__()

    def __bool__(self) -> bool:
        return super().__len__() > 0

    def __getitem__(self, key: Any) -> Any:
        self.read = True
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[Any]:
        self.read = True
        return super().__iter__()

    def __repr__(self) -> str:
        self.read = True
        return super().__repr__()

    def __contains__(self, item: object) -> bool:
        self.read = True
        if isinstance(item, str):
            raise TypeError(f"`{item[:20]!r} in` a chat is never true: a chat is a list of messages. {_WAY_OUT}")
        return super().__contains__(item)

    def __eq__(self, other: object) -> bool:
        self.read = True
        if isinstance(other, str):
            raise TypeError(f"a chat never equals a text: it is a list of messages. {_WAY_OUT}")
        return super().__eq__(other)

    __hash__ = None  # as of every list

    def __getattr__(self, name: str) -> Any:
        if hasattr(str, name):
            raise AttributeError(f"a chat is a list of messages and has no `{name}`. {_WAY_OUT}")
        raise AttributeError(f"'Chat' object has no attribute {name!r}")

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Other processes get a plain list."""
        self.read = True
        return list, (list.copy(self),)


def misread(completions: object) -> str:
    """How a function that has come back misread its completions: it took their `len()` and looked at none. Else "".

    The length of a chat is the number of its messages, which is 1 for every completion: a reward that teaches nothing.
    """
    chats = [one for one in completions if isinstance(one, Chat)] if isinstance(completions, list) else []
    if not any(chat.measured for chat in chats) or any(chat.read for chat in chats):
        return ""
    return f"took len() of completions that are chats, so 1 for each, and read none of them. {_WAY_OUT}"


def explain(error: BaseException, said: str) -> str:
    """What to add to `said`, the last line of an error that comes of taking one format for the other; "" for all others."""
    if isinstance(error, TypeError) and ("'Chat'" in said or "not Chat" in said):
        return f". Completions are chats here, lists of messages. {_WAY_OUT}"
    wanted_messages = isinstance(error, TypeError) and "string indices must be integers" in said
    no_message = isinstance(error, AttributeError) and any(one in said for one in _NO_MESSAGE)
    if wanted_messages or no_message:
        return (
            ". If it wants a chat: completions are texts here, since the data's prompts are; give this reward "
            "`completions: messages` in the recipe"
        )
    return ""
