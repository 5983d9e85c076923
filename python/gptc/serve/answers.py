"""The samples of a body's requests while they are decoded, as one stream of news."""

from __future__ import annotations

import asyncio
import time
from codecs import getincrementaldecoder
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from gptc.errors import GptcError, PromptTooLong
from gptc.generation.request import Request, Sample
from gptc.serve.jobs import Event, Job
from gptc.serve.problems import BadRequest, Busy, Problem, Unavailable
from gptc.serve.scheduler import Closed, QueueFull

if TYPE_CHECKING:
    from starlette.requests import Request as HttpRequest

    from gptc.serve.service import Service

_MOST_AT_ONCE = 4  # events of one answer that are sent before others have their turn
RETRY_S = 1  # seconds after which a client that got 429 may try again
_FINISH = {"stop": "stop", "length": "length", "context": "length"}


class ClientGone(Exception):
    """The client has closed the connection."""


class EngineFailed(Problem):
    """The engine could not continue a text."""


class Answer:
    """One choice of an answer: a sample's text, and which of it was told already."""

    def __init__(self, index: int, sample: Sample) -> None:
        self.index, self.sample = index, sample
        self.finish: str | None = None
        self.n_tokens = 0
        self.n_told = 0  # tokens whose log-probabilities were told
        self.n_characters = 0  # of these tokens
        self.utf8 = getincrementaldecoder("utf-8")("replace")
        self.last_s: float | None = None


class Answers:
    """The choices of requests submitted together. Leaving the context cancels unfinished ones.

    async with Answers(service, http, requests) as answers:
        async for answer, piece in answers:
            ...
    """

    def __init__(
        self,
        service: Service,
        http: HttpRequest,
        requests: Sequence[Request],
        priority: int = 0,
    ) -> None:
        self._service, self._http, self._requests = service, http, requests
        self._priority = priority
        self._events: deque[Event] = deque()
        self._n_at_once = 0  # events taken since the loop had its turn
        self._waiter: asyncio.Future[None] | None = None
        self._jobs: list[Job] = []
        self.choices: list[Answer] = []
        self.n_prompt = sum(len(request.prompt) for request in requests)
        self._begin_s = time.monotonic()
        self._gone: asyncio.Task[None] | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens generated so far."""
        return sum(answer.n_tokens for answer in self.choices)

    async def __aenter__(self) -> Answers:
        try:
            for request in self._requests:
                self._jobs.append(self._submit(request, self._tell))
        except BaseException:
            self._cancel()
            raise
        samples = [sample for job in self._jobs for sample in job.samples]
        self.choices = [Answer(i, sample) for i, sample in enumerate(samples)]
        self._gone = asyncio.create_task(self._until_gone())
        self._gone.add_done_callback(lambda task: self._wake())
        return self

    def _tell(self, event: Event) -> None:
        """Takes an event, in the loop's thread (see `Server`)."""
        self._events.append(event)
        self._wake()

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def _submit(self, request: Request, tell: Any) -> Job:
        key = self._http.scope.get("gptc.client", "")
        try:
            return self._service.scheduler.submit(request, tell, key=key, priority=self._priority)
        except QueueFull as error:
            raise Busy(str(error), headers={"Retry-After": str(RETRY_S)}) from None
        except Closed as error:
            raise Unavailable(str(error)) from None
        except PromptTooLong as error:
            raise self._service.too_long(error) from None
        except GptcError as error:
            raise BadRequest(str(error)) from None

    async def __aexit__(self, *error: object) -> None:
        if self._gone:
            self._gone.cancel()
        self._cancel()

    def _cancel(self) -> None:
        for job in self._jobs:
            if not all(sample.finish for sample in job.samples):
                self._service.scheduler.cancel(job)

    async def _until_gone(self) -> None:
        while (await self._http.receive())["type"] != "http.disconnect":
            pass

    async def __aiter__(self) -> AsyncIterator[tuple[Answer, str]]:
        """Yields (choice, piece of text) until all have ended. ClientGone, or EngineFailed."""
        assert self._gone
        of_sample = {answer.sample: answer for answer in self.choices}
        left = len(of_sample)
        while left:
            event = await self._next(self._gone)
            answer = of_sample[event.sample]
            self._measure(answer, event)
            answer.n_tokens = event.n_tokens
            if event.finish:
                left -= 1
                if event.finish == "error":
                    if event.sample.error:  # the text has no way to match its pattern
                        raise BadRequest(str(event.error))
                    raise EngineFailed(f"the text could not be continued: {event.error}")
                answer.finish = _FINISH[event.finish]
            yield answer, event.piece

    async def _next(self, gone: asyncio.Task[None]) -> Event:
        """The next event. No task is made for it, since there is one for each token."""
        if self._events:
            self._n_at_once += 1
            if self._n_at_once % _MOST_AT_ONCE == 0:
                await asyncio.sleep(0)  # other streams have their turn, and news of the connection
        while not gone.done():
            if self._events:
                return self._events.popleft()
            self._n_at_once = 0
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        raise ClientGone

    def _measure(self, answer: Answer, event: Event) -> None:
        if answer.sample.request.pooling:
            return  # it has no tokens
        now, n_new = time.monotonic(), event.n_tokens - answer.n_tokens
        metrics = self._service.metrics
        if answer.last_s is None:
            metrics.first_s.observe(now - self._begin_s)
        elif n_new:
            metrics.between_s.observe((now - answer.last_s) / n_new)
        answer.last_s = now

    def usage(self) -> dict[str, Any]:
        """The numbers of tokens, as OpenAI names them."""
        return {
            "prompt_tokens": self.n_prompt,
            "completion_tokens": self.n_tokens,
            "total_tokens": self.n_prompt + self.n_tokens,
        }
