"""/v1/chat/completions."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gptc.errors import GptcError, python_names
from gptc.generation.options import ANSWER_STOP
from gptc.generation.request import Request
from gptc.generation.sampling import StopFilter
from gptc.serve.answers import Answer, Answers
from gptc.serve.completions import token_text
from gptc.serve.problems import BadRequest
from gptc.serve.service import Service, pattern_of, stops_of
from gptc.serve.streaming import DONE, Json, event_bytes, refuse_together, stream
from gptc.serve.tools import BEGIN, bare_call, call_schema, parse_calls
from gptc.tokenizer.chat import TemplateFails, chat_prompt, choose_template

if TYPE_CHECKING:
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response


PROMPT = "messages"  # the field with it


def prepare(service: Service, fields: Mapping[str, Any], source: str = PROMPT) -> list[Request]:
    """The request of a conversation, which the body has in the field `source`."""
    service.model_of(fields)
    names = {"prompt": source}
    if fields.get("top_logprobs") and not fields.get("logprobs"):
        raise BadRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    refuse_together(fields, "max_tokens", "max_completion_tokens")
    choice = fields.get("tool_choice", "auto")
    tools = fields.get("tools") if choice != "none" else None
    pattern = pattern_of(fields)
    if forced(fields):
        if pattern:
            raise BadRequest(
                "tool_choice and a form of the text exclude each other", param="tool_choice"
            )
        name = choice["function"]["name"] if isinstance(choice, dict) else None
        if name is not None and name not in {tool["function"]["name"] for tool in tools or ()}:
            raise BadRequest(
                f"tool_choice names {name!r:.60}, which is not one of the tools",
                param="tool_choice",
            )
        pattern, names["json_schema"] = {"json_schema": call_schema(tools or (), name)}, "tools"
    prompt = prompt_of(
        service, fields["messages"], tools, _variables(fields), source=source,
        begins=bool(fields.get("add_generation_prompt", True)), continues=_continues(fields),
    )  # fmt: skip
    room = service.scheduler.n_ctx - len(prompt) + 1
    wanted = fields.get("max_tokens", fields.get("max_completion_tokens", max(1, room)))
    top = int(fields.get("top_logprobs", 0)) if fields.get("logprobs") else None
    return [
        service.make_request(
            prompt,
            fields,
            names,
            max_tokens=int(wanted),
            num_samples=int(fields.get("n", 1)),
            stop=stops_of(fields) or ANSWER_STOP,
            logprobs=top,
            **pattern,
        )
    ]


def forced(fields: Mapping[str, Any]) -> bool:
    """Whether the answer must be a call of a tool."""
    choice = fields.get("tool_choice", "auto")
    must = choice == "required" or isinstance(choice, dict)
    if must and not fields.get("tools"):
        raise BadRequest("tool_choice asks for a call, and tools is missing", param="tools")
    return must


def _variables(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The further values for the template. Some have a field of their own at OpenAI."""
    own = {name: fields[name] for name in ("reasoning_effort",) if name in fields}
    return {**own, **fields.get("chat_template_kwargs", {})}


def check_contents(messages: list[dict[str, Any]], source: str) -> None:
    """BadRequest for a message without a text, which only a call may be."""
    for i, message in enumerate(messages):
        if message.get("content") is None and message.get("tool_calls") is None:
            name = f"{source}[{i}].content"
            raise BadRequest(f"{name} is missing: give its text", param=name)


def _continues(fields: Mapping[str, Any]) -> bool:
    """Whether the answer is the rest of the last message."""
    if not fields.get("continue_final_message"):
        return False
    if forced(fields):
        raise BadRequest(
            "tool_choice asks for a call, which cannot continue a message", param="tool_choice"
        )
    role = fields["messages"][-1]["role"]
    if role != "assistant":
        raise BadRequest(
            f"continue_final_message needs a last message of the assistant; it is of {role}",
            param="continue_final_message",
        )
    return True


def prompt_of(
    service: Service,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    *,
    source: str = PROMPT,
    begins: bool = True,
    continues: bool = False,
) -> list[int]:
    """The tokens of a conversation. BadRequest if the model's template does not take it.

    `begins`: they end with what begins an answer. `continues`: with the last message.
    """
    tokenizer = service.scheduler.tokenizer
    if not service.can_chat:
        raise BadRequest(
            "the model has no chat template: use /v1/completions, or start the server with "
            "--chat-template FILE",
            param=source,
        )
    check_contents(messages, source)
    try:
        template = choose_template(tokenizer, service.chat_template, bool(tools))
        if tools and "tools" not in template:
            raise BadRequest(
                "the model's chat template has no place for tools: leave them out, or start the "
                "server with another --chat-template FILE",
                param="tools",
            )
        with python_names():
            return chat_prompt(
                tokenizer, [_message(m) for m in messages], tools=tools, chat_template=template,
                add_generation_prompt=begins, continue_final_message=continues,
                variables=variables,
            )  # fmt: skip
    except TemplateFails as error:
        raise BadRequest(
            f"{error.fault}: give other messages, or start the server with another "
            "--chat-template FILE",
            param=source,
        ) from None
    except GptcError as error:
        raise BadRequest(str(error), param=source) from None


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: the system's role, and arguments of calls as values."""
    found = {name: value for name, value in message.items() if value is not None}
    if found["role"] == "developer":
        found["role"] = "system"
    if calls := found.get("tool_calls"):
        found["tool_calls"] = [_call(call) for call in calls]
    return found


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if isinstance(function["arguments"], str):
        with suppress(ValueError, RecursionError):  # else the template writes the text
            function["arguments"] = json.loads(function["arguments"])
    return {**call, "type": "function", "function": function}


@dataclass
class _Choice:
    """A choice's text so far, without the calls in it."""

    text: str = ""
    filter: StopFilter = field(default_factory=lambda: StopFilter((BEGIN,)))
    stripped: bool = False  # of the space that the tokenizer adds to a text
    begun: bool = False


class _Reply:
    """The parts of an answer in OpenAI's shape."""

    def __init__(self, service: Service, fields: Mapping[str, Any]) -> None:
        self._service, self._fields = service, fields
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self._tokenizer = service.scheduler.tokenizer
        self._forced = forced(fields)
        self._continues = bool(fields.get("continue_final_message"))
        self._reads_calls = bool(fields.get("tools")) and fields.get("tool_choice") != "none"

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._service.model_of(self._fields),
        }

    def plain(self, text: str) -> str:
        """A text without the space that the tokenizer adds to its beginning."""
        adds = self._tokenizer.strips_space and not self._continues
        return text.removeprefix(" ") if adds else text

    def message(self, text: str, finish: str | None) -> tuple[dict[str, Any], str | None]:
        """The message of a whole text, and the reason for its end."""
        calls: list[dict[str, Any]] = []
        if self._forced:
            calls = bare_call(text)
        elif self._reads_calls:
            text, calls = parse_calls(text)
        if not calls:
            return {"role": "assistant", "content": text}, finish
        content = None if self._forced else text or None
        return {"role": "assistant", "content": content, "tool_calls": calls}, "tool_calls"

    def logprobs(self, answer: Answer) -> dict[str, Any] | None:
        """Log-probabilities of the tokens that were not told yet."""
        if not self._fields.get("logprobs"):
            return None
        scores = answer.sample.logprobs[answer.n_told : answer.n_tokens]
        return {
            "content": [
                {
                    **self._token(score.token, score.logprob),
                    "top_logprobs": [self._token(t, x) for t, x in score.top],
                }
                for score in scores
            ]
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.pieces[token]
        return {
            "token": token_text(self._tokenizer, token),
            "logprob": logprob,
            "bytes": list(data),
        }

    def chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any, finish: str | None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self.head("chat.completion.chunk"), "choices": [choice]}

    async def events(self, http: HttpRequest, requests: list[Request]) -> AsyncIterator[bytes]:
        priority = int(self._fields.get("priority", 0))
        async with Answers(self._service, http, requests, priority) as answers:
            choices = [_Choice() for _ in answers.choices]
            async for answer, piece in answers:
                choice = choices[answer.index]
                logprobs = self.logprobs(answer)
                ids = answer.sample.tokens[answer.n_told : answer.n_tokens]
                answer.n_told = answer.n_tokens
                delta: dict[str, Any] = {} if choice.begun else {"role": "assistant", "content": ""}
                if piece and not choice.stripped:
                    piece, choice.stripped = self.plain(piece), True
                choice.begun = True
                choice.text += piece
                finish = answer.finish
                if self._reads_calls:
                    piece = "" if self._forced else choice.filter.push(piece)
                if finish and self._reads_calls:
                    piece, calls, finish = self._end(choice, piece, finish)
                    if calls:
                        delta["tool_calls"] = calls
                if piece:
                    delta["content"] = piece
                if self._fields.get("return_token_ids"):
                    delta["token_ids"] = ids
                if not (delta or logprobs or finish):  # of a call, which is told whole
                    continue
                yield event_bytes(self.chunk(answer.index, delta, logprobs, finish))
            if self._fields.get("stream_options", {}).get("include_usage"):
                head = self.head("chat.completion.chunk")
                yield event_bytes({**head, "choices": [], "usage": answers.usage()})
            yield DONE

    def _end(
        self, choice: _Choice, piece: str, finish: str
    ) -> tuple[str, list[dict[str, Any]], str | None]:
        """The last piece of text, the calls, and the reason, at the end of a text with tools."""
        message, reason = self.message(choice.text, finish)
        calls = message.get("tool_calls", [])
        if not calls:
            told = len(choice.text) - len(choice.filter.flush())
            if self._forced:
                return choice.text, [], finish
            begin = choice.text.find(BEGIN)
            held = choice.text[begin:] if begin >= 0 else choice.text[told:]
            return piece + held, [], finish
        return piece, [{"index": i, **call} for i, call in enumerate(calls)], reason


async def answer(
    service: Service, http: HttpRequest, fields: Mapping[str, Any], requests: list[Request]
) -> Response:
    """The answer, whole or as a stream."""
    reply = _Reply(service, fields)
    if fields.get("stream"):
        return await stream(reply.events(http, requests), service.options.timeout)
    async with Answers(service, http, requests, int(fields.get("priority", 0))) as answers:
        texts = [""] * len(answers.choices)
        async for choice, piece in answers:
            texts[choice.index] += piece
        choices = []
        for choice in answers.choices:
            message, finish = reply.message(reply.plain(texts[choice.index]), choice.finish)
            if fields.get("return_token_ids"):
                message["token_ids"] = choice.sample.tokens
            logprobs = reply.logprobs(choice)
            choices.append(
                {
                    "index": choice.index,
                    "message": message,
                    "logprobs": logprobs,
                    "finish_reason": finish,
                }
            )
        usage = answers.usage()
    return Json({**reply.head("chat.completion"), "choices": choices, "usage": usage})
