"""/v1/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gptc.generation.request import Request, Sample
from gptc.generation.sampling import TokenLogprob
from gptc.serve.answers import Answer, Answers
from gptc.serve.problems import BadRequest
from gptc.serve.service import Service, pattern_of, stops_of
from gptc.serve.streaming import DONE, Json, event_bytes, refuse_together, stream
from gptc.tokenizer.base import Tokenizer

if TYPE_CHECKING:
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response


PROMPT = "prompt"  # the field with it


def prepare(service: Service, fields: Mapping[str, Any]) -> list[Request]:
    """The requests of a body, one for each prompt."""
    service.model_of(fields)
    if "suffix" in fields:
        raise BadRequest("suffix is not supported: models here continue a text", param="suffix")
    refuse_together(fields, "stream", "best_of")
    n, best_of = int(fields.get("n", 1)), int(fields.get("best_of", 0))
    if best_of and best_of < n:
        raise BadRequest(f"best_of is {best_of}; it must be at least n, {n}", param="best_of")
    logprobs = fields.get("logprobs")
    scored = fields.get("echo", False) and logprobs is not None
    found = []
    for prompt in _prompts(fields.get("prompt", "")):
        request = service.make_request(
            prompt,
            fields,
            max_tokens=max(1, int(fields.get("max_tokens", 16))),
            num_samples=max(n, best_of),
            stop=stops_of(fields),
            logprobs=0 if logprobs is None and best_of > n else logprobs,
            **pattern_of(fields),
        )
        request.prompt_logprobs = int(logprobs) if scored and logprobs is not None else None
        found.append(request)
    return found


def _prompts(prompt: Any) -> list[str | Sequence[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], (str, list)):
        return list(prompt)
    return [prompt]


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
        chosen = reply.chosen(answers.choices, len(requests))
        choices = []
        for i, choice in enumerate(chosen):
            text = reply.prompt_text(choice.sample) + (reply.kept(texts[choice.index]))
            logprobs = reply.logprobs(choice, with_prompt=True)
            choices.append(reply.choice(i, text, choice, logprobs, choice.finish))
        usage = reply.usage(answers)
    return Json({**reply.head(), "choices": choices, "usage": usage})


class _Reply:
    """The parts of an answer in OpenAI's shape."""

    def __init__(self, service: Service, fields: Mapping[str, Any]) -> None:
        self._service, self._fields = service, fields
        self._id, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self._tokenizer: Tokenizer = service.scheduler.tokenizer
        self._nothing = fields.get("max_tokens") == 0  # asked for; one token is decoded

    def head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._service.model_of(self._fields),
        }

    def kept(self, text: str) -> str:
        return "" if self._nothing else text

    def usage(self, answers: Answers) -> dict[str, Any]:
        found = answers.usage()
        if self._nothing:
            found |= {"completion_tokens": 0, "total_tokens": answers.n_prompt}
        return found

    def prompt_text(self, sample: Sample) -> str:
        if not self._fields.get("echo"):
            return ""
        prompt = sample.request.prompt
        skip = 1 if prompt[0] == self._tokenizer.bos else 0
        return self._tokenizer.decode(prompt[skip:])

    def chosen(self, choices: list[Answer], n_prompts: int) -> list[Answer]:
        """The n likeliest of best_of choices of each prompt."""
        n, size = int(self._fields.get("n", 1)), len(choices) // n_prompts
        found = []
        for first in range(0, len(choices), size):
            some = choices[first : first + size]
            if size > n:
                some = sorted(some, key=_mean_logprob, reverse=True)[:n]
            found += some
        return found

    def choice(
        self, index: int, text: str, answer: Answer, logprobs: Any, finish: str | None
    ) -> dict[str, Any]:
        found = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        if self._fields.get("return_token_ids"):
            tokens = answer.sample.tokens[answer.n_told : answer.n_tokens]
            found["token_ids"] = [] if self._nothing else tokens
        return found

    def logprobs(self, answer: Answer, with_prompt: bool) -> dict[str, Any] | None:
        """Log-probabilities of the tokens that were not told yet."""
        if self._fields.get("logprobs") is None:
            return None
        sample = answer.sample
        found: list[tuple[int, TokenLogprob | None]] = []
        if with_prompt and self._fields.get("echo"):
            scores: list[TokenLogprob | None] = [None, *sample.prompt_logprobs]
            found += zip(sample.request.prompt, scores, strict=True)
        if not self._nothing:
            new = sample.logprobs[answer.n_told : answer.n_tokens]
            found += [(score.token, score) for score in new]
        return _as_openai(self._tokenizer, found, answer)

    async def events(self, http: HttpRequest, requests: list[Request]) -> AsyncIterator[bytes]:
        priority = int(self._fields.get("priority", 0))
        async with Answers(self._service, http, requests, priority) as answers:
            begun: set[int] = set()
            async for answer, piece in answers:
                first = answer.index not in begun
                begun.add(answer.index)
                text = self.prompt_text(answer.sample) if first else ""
                logprobs = self.logprobs(answer, with_prompt=first)
                text += self.kept(piece)
                choice = self.choice(answer.index, text, answer, logprobs, answer.finish)
                answer.n_told = answer.n_tokens
                yield event_bytes({**self.head(), "choices": [choice]})
            if self._fields.get("stream_options", {}).get("include_usage"):
                yield event_bytes({**self.head(), "choices": [], "usage": self.usage(answers)})
            yield DONE


def _mean_logprob(answer: Answer) -> float:
    scores = [score.logprob for score in answer.sample.logprobs]
    return sum(scores) / max(1, len(scores))


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; bytes that are not UTF-8 as OpenAI writes them."""
    data = tokenizer.pieces[token]
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _as_openai(
    tokenizer: Tokenizer, scores: list[tuple[int, TokenLogprob | None]], answer: Answer
) -> dict[str, Any]:
    """The scores of tokens that follow those told before; offsets are those of the whole text."""
    offsets = []
    for token, _ in scores:
        offsets.append(answer.n_characters)
        if token != tokenizer.bos:  # which an echo leaves out
            answer.n_characters += len(answer.utf8.decode(tokenizer.pieces[token]))
    return {
        "tokens": [token_text(tokenizer, token) for token, _ in scores],
        "token_logprobs": [score and score.logprob for _, score in scores],
        "top_logprobs": [
            score
            and {token_text(tokenizer, t): x for t, x in (*score.top, (score.token, score.logprob))}
            for _, score in scores
        ],
        "text_offset": offsets,
    }
