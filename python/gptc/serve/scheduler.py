"""Decodes the requests of many threads in one batch.

    scheduler = Scheduler(model, tokenizer, n_seq=16)
    job = scheduler.submit(request, print)    # print is called with each Event
    scheduler.cancel(job)
    scheduler.close()

One thread, the engine's, uses the model. In each step it decodes all running samples and reads a
bounded part of the prompts that have joined (generation/batch.py), so a long prompt delays the
others by one block at a time. Requests wait in turn by key (queue.py) until a sequence is free.

A forked child has no such thread, and may have a lock that nobody will release: it makes another
scheduler.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptc.errors import GptcError, PromptTooLong, Uncopied
from gptc.generation.batch import Batch
from gptc.generation.drafts import Draft
from gptc.serve.jobs import Event, Job
from gptc.serve.queue import FairQueue

if TYPE_CHECKING:
    from gptc.engine.model import Model
    from gptc.engine.session import AdapterCopy
    from gptc.generation.request import Request, Sample
    from gptc.tokenizer.base import Tokenizer

log = logging.getLogger("gptc.serve")
CHUNK = 32  # tokens of a prompt that a step reads at once
_MASK_THREADS = 2


class QueueFull(GptcError):
    """As many requests wait as may."""


class Closed(GptcError):
    """The scheduler takes no more requests."""


@dataclass
class Counts:
    """Totals since the start."""

    steps: int = 0
    tokens: int = 0  # generated
    prompt_tokens_read: int = 0
    prompt_tokens_reused: int = 0
    draft_tokens: int = 0  # proposed
    draft_tokens_accepted: int = 0
    cancelled: int = 0
    failed: int = 0


class Scheduler(Uncopied):
    """A session of n_seq sequences of n_ctx tokens, shared by all requests.

    At most `most_waiting` requests wait. `on_step` is told the seconds
    and samples of each step. `post` is given a function after each step, which calls the listeners:
    in another thread if that is where they belong.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        n_seq: int = 16,
        n_ctx: int | None = None,
        *,
        chunk: int = CHUNK,
        most_waiting: int = 1024,
        draft: Draft | None = None,
        on_step: Callable[[float, int], None] = lambda seconds, n_samples: None,
    ) -> None:
        self.model, self.tokenizer, self._draft = model, tokenizer, draft
        self._session = model.session(n_seq, n_ctx)
        self._masks = ThreadPoolExecutor(_MASK_THREADS, thread_name_prefix="gptc-masks")
        self._batch = Batch(
            self._session, tokenizer, draft=draft, keep=True, chunk=chunk, masks=self._masks
        )
        self.n_seq, self.n_ctx = n_seq, self._session.n_ctx
        self._most_waiting = most_waiting
        self._on_step = on_step
        self.post: Callable[[Callable[[], None]], object] = lambda tell: tell()
        self._news: list[tuple[Job, Event]] = []
        self._changed = threading.Condition()
        self._queue = FairQueue()
        self._running: dict[Sample, Job] = {}
        self._cancelled: set[Job] = set()
        self._calls: list[tuple[Future[None], Callable[[], None]]] = []
        self._closing = self._stopping = self._hurried = False
        self._process = os.getpid()
        self.counts = Counts()
        self._thread = threading.Thread(target=self._run, name="gptc-engine", daemon=True)
        self._thread.start()

    # ---- from any thread ----

    def submit(
        self,
        request: Request,
        listener: Callable[[Event], None],
        *,
        key: str = "",
        priority: int = 0,
    ) -> Job:
        """Queues a request. QueueFull, Closed, or PromptTooLong for one that cannot fit."""
        if len(request.prompt) > self.n_ctx and not request.options.context_shift:
            raise PromptTooLong(
                f"the prompt has {len(request.prompt):,} tokens; a sequence holds {self.n_ctx:,}: "
                "shorten it",
                len(request.prompt),
            )
        self._check_process()
        job = Job(request, list(request.samples(self.tokenizer)), listener, key, priority)
        with self._changed:
            if self._closing:
                raise Closed("this server is shutting down: try another one")
            if len(self._queue) >= self._most_waiting:
                raise QueueFull(f"{self._most_waiting:,} requests wait already: try again later")
            self._queue.add(job)
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Ends a job before the next step; harmless for an ended one, and in a forked child."""
        if self._is_forked:
            return
        with self._changed:
            self._cancelled.add(job)
            self._changed.notify()

    def between_steps(self, function: Callable[[], None]) -> None:
        """Calls a function in the engine's thread between steps. Raises its error, or Closed."""
        done: Future[None] = Future()
        self._check_process()
        with self._changed:
            if self._stopping:
                raise Closed("this server is shutting down")
            self._calls.append((done, function))
            self._changed.notify()
        done.result()

    def keep_only(self, adapters: Collection[AdapterCopy]) -> None:
        """As `Batch.keep_only`. For the engine's thread, as in `between_steps`."""
        self._batch.keep_only(adapters)

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return not self._closing and not self._is_forked

    @property
    def n_waiting(self) -> int:
        """Requests with samples that have not begun."""
        return len(self._queue)

    @property
    def n_running(self) -> int:
        """Samples that are being decoded."""
        return len(self._running)

    def close(self, drain_s: float = 0.0) -> bool:
        """Takes no more requests, waits so long for those it has, and frees the session.

        False if some had to be ended. Always False in a forked child.
        """
        if self._is_forked:
            self._session.close()
            return False
        end = time.monotonic() + drain_s
        with self._changed:
            self._closing = True
            while not self._is_idle() and not self._hurried:
                if (left := end - time.monotonic()) <= 0:
                    break
                self._changed.wait(min(left, 0.1))
            complete = self._is_idle()
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()
        self._masks.shutdown()
        self._session.close()
        return complete

    def hurry(self) -> None:
        """Lets `close` wait no longer, now or later."""
        if self._is_forked:
            return
        with self._changed:
            self._hurried = True
            self._changed.notify_all()

    @property
    def _is_forked(self) -> bool:
        return os.getpid() != self._process

    def _check_process(self) -> None:
        if self._is_forked:
            raise GptcError(
                "this process was forked from the one that decodes: load the model and make "
                "another scheduler in the child"
            )

    # ---- in the engine's thread ----

    def _run(self) -> None:
        try:
            self._turns()
        except Exception as error:  # nobody decodes any more: no request may wait for it
            log.exception("the engine has stopped")
            with self._changed, suppress(Exception):
                self._closing = self._stopping = True
                self._end_all(str(error))

    def _turns(self) -> None:
        while True:
            with self._changed:
                while not self._has_work():
                    self._changed.wait()
                if self._stopping:
                    self._end_all("the server has stopped")
                    return
                for job in self._cancelled:
                    self._leave(job)
                self._cancelled.clear()
                calls, self._calls = self._calls, []
            for done, function in calls:
                try:
                    done.set_result(function())
                except Exception as error:  # of the function's: whoever waits for it gets it
                    done.set_exception(error)
            try:
                self._admit()
                self._step()
            except Exception as error:  # of the engine: whatever runs ends, the server continues
                with self._changed:
                    self._end_all(str(error))
            self._post_news()

    def _has_work(self) -> bool:
        waits = self._cancelled or self._running or self._calls or len(self._queue)
        return bool(self._stopping or waits)

    def _is_idle(self) -> bool:
        return not self._running and not len(self._queue)

    def _post_news(self) -> None:
        """Tells the listeners, in one call, what has happened since the last one."""
        news, self._news = self._news, []

        def tell() -> None:
            for job, event in news:
                job.listener(event)

        if news:
            self.post(tell)

    def _admit(self) -> None:
        """Lets samples join while sequences are free, in the order of the queue."""
        joined = True
        while joined:
            joined = False
            with self._changed:
                ready = (j for j in self._queue if self._batch.has_room(j.samples[j.n_begun]))
                job = next(ready, None)
                if job:
                    sample = job.samples[job.n_begun]
                    job.n_begun += 1
                    self._queue.took(job, job.n_begun == len(job.samples))
                    self._running[sample] = job
                    joined = True
            if job:
                for told, piece in self._batch.join(sample):
                    self._tell(told, piece)

    def _step(self) -> None:
        active = self._batch.active
        if not active:
            return
        begin, before = time.monotonic(), sum(sample.n_tokens for sample in active)
        for sample, piece in self._batch.step():
            self._tell(sample, piece)
        counts = self.counts
        counts.steps += 1
        counts.tokens += sum(sample.n_tokens for sample in active) - before
        counts.prompt_tokens_read = self._batch.n_read
        counts.prompt_tokens_reused = self._batch.n_reused
        if self._draft:
            counts.draft_tokens = self._draft.n_guessed
            counts.draft_tokens_accepted = self._draft.n_right
        self._on_step(time.monotonic() - begin, len(active))

    def _tell(self, sample: Sample, piece: str) -> None:
        job = self._running[sample]
        if sample.finish:
            with self._changed:
                del self._running[sample]
                self._changed.notify_all()
        error = str(sample.error) if sample.error else None
        self._news.append((job, Event(sample, piece, sample.n_tokens, sample.finish, error)))

    def _leave(self, job: Job) -> None:
        """Ends a job that was cancelled."""
        self._queue.drop(job)
        self._batch.forget(job.request)
        running = [sample for sample in job.samples if self._running.pop(sample, None)]
        for sample in running:
            self._batch.leave(sample)
        self.counts.cancelled += bool(running) or job.n_begun < len(job.samples)
        self._changed.notify_all()

    def _end_all(self, reason: str) -> None:
        """Ends all jobs, and tells each of its samples why."""
        for done, _ in self._calls:
            done.set_exception(Closed(reason))
        self._calls = []
        jobs = set(self._running.values())
        if self._stopping:
            while waiting := list(self._queue):
                for job in waiting:
                    self._queue.drop(job)
                    jobs.add(job)
        for job in jobs:
            self._queue.drop(job)
        self._running.clear()
        for job in jobs:
            self.counts.failed += 1
            for sample in job.samples:
                if not sample.finish:
                    sample.finish = "error"
                    event = Event(sample, "", sample.n_tokens, "error", reason)
                    self._news.append((job, event))
        self._changed.notify_all()
        self._post_news()
        self._batch.reset()
