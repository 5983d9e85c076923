"""Rows of chat and instruction data as messages with roles.

    kind = recognised(["instruction", "output"])
    chat = kind.chat({"instruction": "Add 2 and 3.", "output": "5"}, "chats.jsonl: line 1")

Five layouts are known, by the names of their columns: OpenAI's `messages`, ShareGPT's
`conversations`, TRL's `prompt` and `completion`, Alpaca's `instruction`, `input` and `output`, and
`prompt`, `chosen` and `rejected` of preference data. A row that is not such a conversation is a
GptcError that names its file and line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from gptc.errors import GptcError
from gptc.tokenizer.chat import check_messages

Messages: TypeAlias = list[dict[str, Any]]
Fields: TypeAlias = Mapping[str, Any]

_SHAREGPT = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "model": "assistant", "bard": "assistant", "bing": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
_FIRST = ("system", "developer")
_SKIP = "repair it, or leave such rows out with --on-bad-row skip"


@dataclass(frozen=True)
class Chat:
    """One conversation, which ends with a turn of the assistant."""

    messages: Messages
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of functions that the assistant may call."""


@dataclass(frozen=True)
class Kind:
    """A layout of rows."""

    name: str
    needs: tuple[str, ...]
    """Columns that a row must have."""
    read: Callable[[Fields], Iterable[Messages]] = field(repr=False)
    """The conversations of a row: one, or the chosen and the rejected one. ValueError."""
    takes: tuple[str, ...] = ("system", "tools")
    """Columns that a row may have."""

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        return (*self.needs, *self.takes)

    def chats(self, row: Fields, where: str) -> list[Chat]:
        """The conversations of a row, checked. GptcError names its place and the fault."""
        for name in self.needs:
            if row.get(name) is None:
                if name in row:
                    raise GptcError(f"{where}: its {name} {_is(name)} null: {_SKIP}")
                names = ", ".join(map(str, row)) or "no fields"
                raise GptcError(f"{where} has no {name} (only {names:.100}): {_SKIP}")
        try:
            tools = row.get("tools") or None
            if tools is not None and not _are_objects(tools):
                raise ValueError(f"its tools are {tools!r:.40}, not a list of objects")
            return [Chat(_checked(turns, row), tools) for turns in self.read(row)]
        except ValueError as error:
            raise GptcError(f"{where}: {error}: {_SKIP}") from None


def recognised(names: Iterable[str]) -> Kind | None:
    """The layout of rows with these columns; None where it is none of them."""
    found = set(names)
    return next((kind for kind in KINDS if found.issuperset(kind.needs)), None)


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _checked(turns: Messages, row: Fields) -> Messages:
    """The messages, with the row's system prompt. ValueError for what is not a conversation."""
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"its system prompt is {system!r:.40}, not text")
    if system and turns and turns[0].get("role") not in _FIRST:
        turns = [{"role": "system", "content": system}, *turns]
    if not turns:
        raise ValueError("it has no messages")
    try:
        messages = check_messages(turns)
    except GptcError as error:
        raise ValueError(str(error)) from None
    _check_roles([message["role"] for message in messages])
    for i, message in enumerate(messages):
        said = message.get("content") or ""
        if message["role"] not in _FIRST and not said.strip() and not message.get("tool_calls"):
            raise ValueError(f"message {i + 1} ({message['role']}) is empty")
    return messages


def _check_roles(roles: list[str]) -> None:
    """ValueError unless user and assistant take turns, after the system, and tools answer calls."""
    follows = {
        None: ("user", *_FIRST),
        "system": ("user",),
        "developer": ("user",),
        "user": ("assistant",),
        "assistant": ("user", "tool"),
        "tool": ("tool", "assistant"),
    }
    if "assistant" not in roles:
        raise ValueError("it has no turn of the assistant")
    before: str | None = None
    for i, role in enumerate(roles):
        if role not in follows:
            raise ValueError(
                f"message {i + 1} has the role {role!r:.40}; known: user, assistant, "
                "system, developer, tool"
            )
        if role not in follows[before]:
            after = f"after {before}" if before else "first"
            raise ValueError(
                f"message {i + 1} ({role}) comes {after}, where {' or '.join(follows[before])} is "
                "expected"
            )
        before = role
    if before != "assistant":
        raise ValueError(f"it ends with {before}, not with the assistant")


# ---- the layouts ----


def _is(name: str) -> str:
    return "are" if name in ("messages", "conversations") else "is"


def _text(row: Fields, name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"its {name} is {value!r:.40}, not text")
    return value


def _list(row: Fields, name: str) -> Messages:
    value = row[name]
    if not _are_objects(value):
        raise ValueError(f"its {name} are {value!r:.40}, not a list of objects (JSON)")
    return [{k: v for k, v in item.items() if v is not None} for item in value]


def _turns(row: Fields, name: str, role: str) -> Messages:
    """A text as one message of `role`, or a list of messages."""
    if isinstance(row[name], str):
        return [{"role": role, "content": row[name]}]
    return _list(row, name)


def _messages(row: Fields) -> Iterable[Messages]:
    return [_list(row, "messages")]


def _conversations(row: Fields) -> Iterable[Messages]:
    turns = []
    for i, turn in enumerate(_list(row, "conversations")):
        role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(role, str) or role not in _SHAREGPT:
            known = "human, gpt, system, tool"
            raise ValueError(f"message {i + 1} is from {role!r:.40}; known: {known}")
        turns.append({"role": _SHAREGPT[role], "content": content})
    return [turns]


def _completion(row: Fields) -> Iterable[Messages]:
    return [[*_turns(row, "prompt", "user"), *_turns(row, "completion", "assistant")]]


def _instruction(row: Fields) -> Iterable[Messages]:
    parts = [_text(row, "instruction")]
    if row.get("input"):
        parts.append(_text(row, "input"))
    asked, answer = "\n\n".join(parts), _text(row, "output")
    return [[{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]]


def _preference(row: Fields) -> Iterable[Messages]:
    asked = [] if row.get("prompt") is None else _turns(row, "prompt", "user")
    found = []
    if not asked and (isinstance(row["chosen"], str) or isinstance(row["rejected"], str)):
        raise ValueError("its answers are texts, which need a prompt, and it has none")
    for name in ("chosen", "rejected"):
        turns = _turns(row, name, "assistant")
        # Some sets repeat the prompt in both.
        begins = turns[: len(asked)] == asked or (turns and turns[0].get("role") != "assistant")
        found.append(turns if begins and turns else [*asked, *turns])
    if found[0] == found[1]:
        raise ValueError("its chosen and rejected answers are the same")
    if found[0][:-1] != found[1][:-1]:
        raise ValueError("its chosen and rejected conversations differ before the last turn")
    return found


KINDS = (
    Kind("preference", ("chosen", "rejected"), _preference, ("prompt", "system", "tools")),
    Kind("messages", ("messages",), _messages),
    Kind("conversations", ("conversations",), _conversations),
    Kind("prompt and completion", ("prompt", "completion"), _completion),
    Kind("instructions", ("instruction", "output"), _instruction, ("input", "system", "tools")),
)
COLUMNS = tuple(dict.fromkeys(column for kind in KINDS for column in kind.columns))
