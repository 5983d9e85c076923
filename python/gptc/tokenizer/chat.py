"""Prompts of conversations: messages become tokens by a model's chat template.

    prompt = chat_prompt(tokenizer, [{"role": "user", "content": "Hello"}])

The template is a program in Jinja, of whoever made the model. It runs in another process, with
limits, in jinja2's sandbox (render.py), and gives the text that transformers gives. That process is
ready for the next conversation with the same template (files/warm.py). The marks that
the template writes, such as <|im_end|>, become special tokens. In the messages the same characters
are text: a character that occurs nowhere else divides them while the template runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from gptc.errors import GptcError, UsageError, half_a_pair
from gptc.files.bounded import Fault
from gptc.files.limits import limit, refuse
from gptc.files.values import MOST_DEEP, nests_deeply
from gptc.files.warm import warm_answer
from gptc.tokenizer.base import Tokenizer, any_of
from gptc.tokenizer.marks import DEFAULT

_ADVICE = ": give another one with --chat-template FILE"
_SECONDS = 4  # and one for each MB, of one core
_BYTES = 1 << 29  # of address space
_BYTES_EACH = 64  # for each byte of a request
# A text has at most as many characters as a template, and so many for each byte of a request. All
# texts of a request have so many, without the begin that a text shares with that before it.
_TIMES, _IN_ALL = 4, 1 << 27

Difference: TypeAlias = tuple[int, str]
"""The characters with which a text begins like that before it, and the rest of the text."""

_REASONING = ("reasoning_content", "thinking", "reasoning")  # one field, by three names
_PRIVATE = range(0xF0000, 0xFFFFE)  # characters for private use


class TemplateFails(GptcError):
    """A chat template that fails for messages. `fault` is the message without advice."""

    def __init__(self, fault: str, advice: str = "") -> None:
        super().__init__(fault + advice)
        self.fault = fault


def chat_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """The tokens of a conversation, ready for the model's answer.

    With `continue_final_message` they end with the last message, which the model continues.

    `messages` are OpenAI's: {"role": "user", "content": "Hello"}. `tools` are JSON schemas of
    functions. `chat_template` is the name of one of the model's templates, or the text of another.
    `variables` are further values for the template, such as {"enable_thinking": False}.

    The tokens are those of transformers' `apply_chat_template`, but for special tokens that a
    message spells out: these are text here.
    """
    given = {"messages": check_messages(messages), "tools": tools, "documents": documents}
    for name in ("tools", "documents"):
        _check_objects(given[name], name)
    if taken := sorted({*given, "add_generation_prompt"}.intersection(variables or ())):
        raise UsageError(f"the template's variables set {taken[0]}: give it by its own name")
    if nests_deeply([given, variables]):
        raise UsageError(
            "the messages, tools, documents or variables are nested more than "
            f"{MOST_DEEP - 3} deep: give simpler ones"
        )
    template = choose_template(tokenizer, chat_template, bool(tools))
    names = tokenizer.special_texts()
    taken_texts = json.dumps([template, given], ensure_ascii=False)
    mark = unused(taken_texts)
    marked = divided(given, any_of(names, re.IGNORECASE), mark)
    end = unused(taken_texts + mark)
    if continue_final_message:
        marked["messages"][-1] = _with_end(marked["messages"][-1], end)
    values = {**named_tokens(tokenizer), **marked, **(variables or {})}
    values["add_generation_prompt"] = add_generation_prompt and not continue_final_message
    text = _rendered(template, values, mark)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the conversation has {half_a_pair(error)}") from None
    if continue_final_message:
        text = _before_end(text, end)
    return [int(id) for id in tokenizer.encode_parts(list(parts_of(text, names, mark)))]


def _rendered(template: str, values: Mapping[str, Any], mark: str) -> str:
    """The text of a template. A call without a text has an empty one if the template needs one."""
    try:
        return render(template, values, mark)
    except GptcError:
        messages = values["messages"]
        if all("content" in message for message in messages):
            raise
    filled = [{"content": "", **message} for message in messages]
    return render(template, {**values, "messages": filled}, mark)


def _with_end(message: dict[str, Any], end: str) -> dict[str, Any]:
    """The message with this character after its text, where a template may add more."""
    if not isinstance(message.get("content"), str):
        raise UsageError("the last message has no text that could be continued")
    return {**message, "content": message["content"] + end}


def _before_end(text: str, end: str) -> str:
    before, found, _ = text.rpartition(end)
    if not found:
        raise UsageError("the chat template leaves the last message out, so it cannot be continued")
    return before


def choose_template(tokenizer: Tokenizer, given: str | None, with_tools: bool = False) -> str:
    """The chat template of that name or text; None: the model's own. UsageError without one.

    As in transformers, the one of tool_use is taken for tools if there is one.
    """
    templates = tokenizer.marks.templates
    if given is not None:
        return templates.get(given, given)
    for name in ("tool_use", DEFAULT) if with_tools else (DEFAULT,):
        if name in templates:
            return templates[name]
    if templates:
        raise UsageError(
            f"the model has several chat templates and no default: choose with --chat-template "
            f"{' or '.join(templates)}"
        )
    raise UsageError(
        "the model has no chat template: give one with --chat-template FILE, or let it continue a "
        "text"
    )


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as templates expect them. UsageError for what is not a list of messages.

    Parts of text in a content are joined.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise UsageError(f"the messages are {messages!r:.60}; they must be a list of objects")
    if not messages:
        raise UsageError("the list of messages is empty: give at least one")
    return [_checked(message, i + 1) for i, message in enumerate(messages)]


def _checked(message: Any, number: int) -> dict[str, Any]:
    where = f"message {number}"
    if not isinstance(message, Mapping):
        raise UsageError(f'{where} is {message!r:.60}; it must be {{"role": …, "content": …}}')
    found = {name: value for name, value in message.items() if value is not None}
    role, content = found.get("role"), found.get("content")
    if not isinstance(role, str) or not role:
        raise UsageError(f'{where} has no "role": give one, such as "user"')
    if isinstance(content, Sequence) and not isinstance(content, str):
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise UsageError(f"{where} has parts that are not text, which gptc does not read")
        found["content"] = "\n".join(map(str, texts))
    elif content is not None and not isinstance(content, str):
        raise UsageError(f"the content of {where} is {content!r:.60}; it must be text")
    elif content is None and "tool_calls" not in found:
        raise UsageError(f'{where} has no "content": give its text')
    thought = next((found[name] for name in _REASONING if name in found), None)
    # Templates read either name.
    aliases = {} if thought is None else {"thinking": thought, "reasoning_content": thought}
    return aliases | found | ({} if thought is None else {"reasoning_content": thought})


def _check_objects(values: Any, name: str) -> None:
    if values is None:
        return
    several = isinstance(values, Sequence) and not isinstance(values, str)
    if not several or not all(isinstance(value, Mapping) for value in values):
        raise UsageError(f"{name} are {values!r:.60}; they must be a list of objects")


def render(template: str, variables: Mapping[str, Any], mark: str = "\0") -> str:
    """The text of a chat template. GptcError, in bounded time and memory, if it fails.

    `mark` is a character that JSON in the text keeps as it is.
    """
    ends = [(len(variables.get("messages", ())), bool(variables.get("add_generation_prompt")))]
    try:
        (texts,) = render_several(template, [(variables, ends)], mark)
        if isinstance(texts, GptcError):
            raise texts
    except TemplateFails as error:
        raise TemplateFails(error.fault, _ADVICE) from None
    ((_, text),) = texts
    return text


def render_several(
    template: str,
    conversations: Sequence[tuple[Mapping[str, Any], Sequence[tuple[int, bool]]]],
    mark: str = "\0",
) -> list[list[Difference] | GptcError]:
    """The texts of conversations, or the fault of each that the template does not take.

    A text is the number of characters with which it begins like that before it, and the rest. Each
    conversation has variables, with messages among them, and the ends of its texts: the number of
    messages, and whether the prompt for an answer follows. GptcError if the template fails for all.
    """
    most = limit("template")
    if len(template) > most:
        raise refuse("the chat template", "template", "use another one")
    several = [{"variables": variables, "ends": ends} for variables, ends in conversations]
    try:
        conversed = json.dumps(several)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"the messages or tools are not values of JSON: {error}") from None
    more = _TIMES * len(conversed)
    head = json.dumps({"mark": mark, "longest": most + more, "most": _IN_ALL + more})
    data = f'{head[:-1]}, "several": {conversed}}}'.encode()
    program = Path(__file__).with_name("render.py")
    n_texts = sum(len(ends) for _, ends in conversations)
    seconds, n_bytes = _SECONDS + len(data) // 1_000_000, _BYTES + _BYTES_EACH * len(data)
    seconds += n_texts // 1000
    try:
        text = template.encode("utf-8", "surrogatepass")
        answer = json.loads(warm_answer(program, text, data, seconds, n_bytes) or b"{}")
    except Fault as fault:
        answer = {"error": str(fault)}
    except (ValueError, RecursionError):
        answer = {}
    found = answer.get("several")
    if not isinstance(found, list) or len(found) != len(conversations):
        raise _failure(answer, _ADVICE)
    return [
        [(n, text) for n, text in one["texts"]]
        if _are_texts(one.get("texts"), len(ends))
        else _failure(one)
        for one, (_, ends) in zip(found, conversations, strict=True)
    ]


def _are_texts(texts: Any, n: int) -> bool:
    """Whether these are n differences, of which each begins like the text before it."""
    length = 0
    for some in texts if isinstance(texts, list) and len(texts) == n else [None]:
        if not isinstance(some, list) or list(map(type, some)) != [int, str]:
            return False
        if not 0 <= some[0] <= length:
            return False
        length = some[0] + len(some[1])
    return True


def whole_texts(differences: Sequence[Difference]) -> list[str]:
    """The texts of a conversation. GptcError for so many characters that memory could not hold."""
    found = [""]
    n_left = _IN_ALL
    for n, rest in differences:
        n_left -= n
        if n_left < 0:
            raise GptcError(
                f"the chat template writes more than {_IN_ALL:,} characters for the answers of one "
                "conversation: divide it, or give another template with --chat-template FILE"
            )
        found.append(found[-1][:n] + rest)
    return found[1:]


def _failure(answer: Mapping[str, Any], advice: str = "") -> GptcError:
    """The error of a template that gives no text."""
    if "refused" in answer:
        return GptcError(
            f"the chat template does not take these messages: {answer['refused']:.500}"
        )
    why = answer.get("error", "it ends the process")
    return TemplateFails(f"the chat template fails ({why:.500})", advice)


def named_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The special tokens that a template may name: bos_token, eos_token, unk_token, pad_token."""
    ids = {
        "bos_token": tokenizer.named_begin,
        "eos_token": next(iter(tokenizer.named_ends), None),
        "unk_token": tokenizer.unknown_id,
        "pad_token": tokenizer.marks.pad,
    }
    return {
        name: tokenizer.pieces[id].decode("utf-8", "replace")
        for name, id in ids.items()
        if id is not None
    }


# ---- special tokens ----


def unused(text: str) -> str:
    """A character that the text does not hold."""
    held = set(text)
    return next(char for code in _PRIVATE if (char := chr(code)) not in held)


def divided(value: Any, pattern: re.Pattern[str], mark: str) -> Any:
    """The value with `mark` after each character of the names in its texts; roles stay."""
    if isinstance(value, str):
        return pattern.sub(lambda found: "".join(char + mark for char in found[0]), value)
    if isinstance(value, Mapping):
        return {k: v if k == "role" else divided(v, pattern, mark) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [divided(item, pattern, mark) for item in value]
    return value


def parts_of(text: str, names: Mapping[str, int], mark: str) -> Iterator[str | int]:
    """The text as texts and ids of special tokens."""
    at = 0
    for found in any_of(names).finditer(text):
        yield text[at : found.start()].replace(mark, "")
        yield names[found[0]]
        at = found.end()
    yield text[at:].replace(mark, "")
