"""/v1/responses, for text."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from gptc.generation.request import Request
from gptc.serve import chat
from gptc.serve.answers import Answers
from gptc.serve.problems import BadRequest
from gptc.serve.service import Service
from gptc.serve.streaming import Json, event_bytes, stream

if TYPE_CHECKING:
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response


PROMPT = "input"  # the field with it
IGNORED = ("tools", "text", "tool_choice")  # which have one value that is taken, as without them


def prepare(service: Service, fields: Mapping[str, Any]) -> list[Request]:
    """The request of an input."""
    given = fields["input"]
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if fields.get("tools"):
        raise BadRequest("tools are for /v1/chat/completions: ask there", param="tools")
    chat.check_contents(messages, PROMPT)
    if "instructions" in fields:
        messages = [{"role": "system", "content": fields["instructions"]}, *messages]
    ours = ("input", "instructions", *IGNORED)
    rest = {name: fields[name] for name in fields if name not in ours}
    if "max_output_tokens" in rest:
        rest["max_tokens"] = rest.pop("max_output_tokens")
    return chat.prepare(service, {**rest, "messages": messages}, PROMPT)


async def answer(
    service: Service, http: HttpRequest, fields: Mapping[str, Any], requests: list[Request]
) -> Response:
    """The answer, whole or as a stream of OpenAI's named events."""
    reply = _Reply(service, fields)
    if fields.get("stream"):
        return await stream(reply.events(http, requests), service.options.timeout)
    async with Answers(service, http, requests) as answers:
        text = "".join([piece async for _, piece in answers])
        return Json(reply.whole(text, answers))


class _Reply:
    def __init__(self, service: Service, fields: Mapping[str, Any]) -> None:
        self._service, self._created = service, int(time.time())
        self._model = service.model_of(fields)
        self._id, self._message = f"resp_{secrets.token_hex(12)}", f"msg_{secrets.token_hex(12)}"
        self._strips = service.scheduler.tokenizer.strips_space

    def whole(self, text: str | None, answers: Answers) -> dict[str, Any]:
        """The object of a response; `text` None = it has just begun."""
        found: dict[str, Any] = {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "model": self._model,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "output": [],
            "parallel_tool_calls": False,
            "temperature": None,
            "tool_choice": "none",
            "tools": [],
            "top_p": None,
        }
        if text is None:
            return found
        cut = answers.choices[0].finish == "length"
        item = self._item(text.removeprefix(" ") if self._strips else text)
        return found | {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [item],
            "usage": {
                "input_tokens": answers.n_prompt,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": answers.n_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": answers.n_prompt + answers.n_tokens,
            },
        }

    def _item(self, text: str) -> dict[str, Any]:
        part = {"type": "output_text", "text": text, "annotations": []}
        return {
            "id": self._message,
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [part],
        }

    async def events(self, http: HttpRequest, requests: list[Request]) -> AsyncIterator[bytes]:
        number = 0

        def event(name: str, **values: Any) -> bytes:
            nonlocal number
            number += 1
            return event_bytes({"type": name, "sequence_number": number - 1, **values}, name)

        where = {"item_id": self._message, "output_index": 0, "content_index": 0}
        async with Answers(self._service, http, requests) as answers:
            yield event("response.created", response=self.whole(None, answers))
            item = {**self._item(""), "status": "in_progress", "content": []}
            yield event("response.output_item.added", output_index=0, item=item)
            part = {"type": "output_text", "text": "", "annotations": []}
            yield event("response.content_part.added", **where, part=part)
            text, begun = "", False
            async for _, piece in answers:
                if self._strips and not begun:
                    piece, begun = piece.removeprefix(" "), bool(piece)
                text += piece
                if piece:
                    yield event("response.output_text.delta", **where, delta=piece, logprobs=[])
            yield event("response.output_text.done", **where, text=text, logprobs=[])
            yield event("response.content_part.done", **where, part={**part, "text": text})
            yield event("response.output_item.done", output_index=0, item=self._item(text))
            whole = self.whole(text, answers)
            name = (
                "response.incomplete" if whole["status"] == "incomplete" else "response.completed"
            )
            yield event(name, response=whole)
