"""Each text of a shared batch is that of a run alone, whoever joins, waits or leaves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gptc import Model
from gptc.engine.config import GPTConfig
from gptc.engine.session import Session
from gptc.errors import GptcError
from gptc.generation.drafts import ModelDraft, NgramDraft
from gptc.generation.options import Sampling
from gptc.generation.request import Request, make_request
from gptc.serve.jobs import Event, Job
from gptc.serve.scheduler import Closed, QueueFull, Scheduler
from gptc.tokenizer.base import Tokenizer
from small_models import varied

CHUNK = 8


@pytest.fixture(params=["fp32", "bf16"])
def writer(config: Callable[..., GPTConfig], request: pytest.FixtureRequest) -> Iterator[Model]:
    with varied(config(block_size=128), dtype=request.param) as model:
        yield model


@pytest.fixture
def make(writer: Model, tokenizer: Tokenizer) -> Iterator[Callable[..., Scheduler]]:
    made: list[Scheduler] = []

    def schedule(n_seq: int = 4, **options: Any) -> Scheduler:
        made.append(Scheduler(writer, tokenizer, n_seq, **{"chunk": CHUNK, **options}))
        return made[-1]

    yield schedule
    for scheduler in made:
        scheduler.close()


class Heard:
    """The events of one job."""

    def __init__(self, n: int = 1) -> None:
        self.events: list[Event] = []
        self.times: list[float] = []
        self._left = threading.Semaphore(0)
        self._n = n

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.times.append(time.monotonic())
        if event.finish:
            self._left.release()

    def texts(self) -> list[str]:
        for _ in range(self._n):
            assert self._left.acquire(timeout=60)
        pieces = [""] * self._n
        for event in self.events:
            pieces[event.sample.index] += event.piece
        return pieces


def asks(writer: Model, tokenizer: Tokenizer, n: int = 24) -> list[Request]:
    """Requests with prompts of many lengths, some of which begin alike."""
    begin = "A text that many of the prompts begin with, "
    return [
        make_request(
            writer, tokenizer, begin[: (7 * i) % 45] + "xyz"[: 1 + i % 3], stop=(),
            max_tokens=2 + 3 * i % 23, num_samples=1 + i % 3, sampling=Sampling(1.0, seed=100 * i),
        )
        for i in range(n)
    ]  # fmt: skip


def alone(make: Callable[..., Scheduler], requests: list[Request]) -> list[list[str]]:
    """The texts of each request when nothing else runs and no cache is warm."""
    found = []
    for request in requests:
        scheduler, heard = make(1), Heard(request.options.num_samples)
        scheduler.submit(request, heard)
        found.append(heard.texts())
        scheduler.close()
    return found


@pytest.mark.parametrize("n_seq", [2, 5, 16])
def test_each_text_is_that_of_its_own_run(
    make: Callable[..., Scheduler], writer: Model, tokenizer: Tokenizer, n_seq: int
) -> None:
    requests = asks(writer, tokenizer)
    expected = alone(make, requests)
    scheduler = make(n_seq)
    for _ in range(2):  # the second time with warm caches
        heard = [Heard(request.options.num_samples) for request in requests]
        for i, (request, listener) in enumerate(zip(requests, heard, strict=True)):
            scheduler.submit(request, listener, key=str(i % 3), priority=i % 2)
        assert [listener.texts() for listener in heard] == expected
    assert scheduler.counts.prompt_tokens_reused > 0
    assert scheduler.n_waiting == scheduler.n_running == 0


def test_a_prompt_reuses_the_blocks_of_one_that_began_alike(
    make: Callable[..., Scheduler], writer: Model, tokenizer: Tokenizer
) -> None:
    scheduler = make(2)
    for prompt, reused in (("x" * 20, 0), ("x" * 20, 16), ("x" * 9 + "y" * 9, 8), ("y" * 9, 0)):
        before, heard = scheduler.counts.prompt_tokens_reused, Heard()
        scheduler.submit(make_request(writer, tokenizer, prompt, max_tokens=3, stop=()), heard)
        heard.texts()
        while scheduler.n_running:
            time.sleep(0.001)
        time.sleep(0.01)
        assert scheduler.counts.prompt_tokens_reused - before == reused


def test_a_long_prompt_delays_a_running_text_by_one_block_at_a_time(
    make: Callable[..., Scheduler], writer: Model, tokenizer: Tokenizer, monkeypatch: Any
) -> None:
    from gptc.engine.session import Session

    rows: list[list[int]] = []
    both = threading.Event()  # the second request is there, before the first one's text ends
    for name, at in (("decode", 1), ("sample", 2)):
        step = getattr(Session, name)

        def counted(self: Session, tokens: Any, *rest: Any, step: Any = step, at: int = at) -> Any:
            rows.append(list(rest[at - 1]))
            assert len(rows) < 3 or both.wait(60)
            return step(self, tokens, *rest)

        monkeypatch.setattr(Session, name, counted)
    scheduler, running, long = make(2), Heard(), Heard()
    begun = threading.Event()
    scheduler.submit(
        make_request(writer, tokenizer, "a", max_tokens=100, stop=()),
        lambda event: (running(event), begun.set()),
    )
    assert begun.wait(60)
    scheduler.submit(make_request(writer, tokenizer, "b" * 90, max_tokens=2, stop=()), long)
    both.set()
    long.texts()
    together = [step for step in rows if len(set(step)) == 2]
    assert len(together) >= 90 // CHUNK
    assert max(len(step) for step in together) <= CHUNK + 1
    running.texts()


def test_keys_take_turns(
    make: Callable[..., Scheduler], writer: Model, tokenizer: Tokenizer
) -> None:
    scheduler, order = make(1), []
    gate = threading.Event()
    first = make_request(writer, tokenizer, "first", max_tokens=2, stop=())
    scheduler.submit(first, lambda event: gate.wait(60))
    heard = []

    def listening(name: str) -> Heard:
        listener = Heard()

        def tell(event: Event) -> None:
            if event.finish:
                order.append(name)
            listener(event)

        heard.append(listener)
        scheduler.submit(
            make_request(writer, tokenizer, name, max_tokens=1, stop=()), tell,
            key=name[0], priority=int(name[0] == "z"),
        )  # fmt: skip
        return listener

    for name in ("a1", "a2", "a3", "a4", "b1", "b2", "z1"):
        listening(name)
    gate.set()
    for listener in heard:
        listener.texts()
    assert order == ["z1", "a1", "b1", "a2", "b2", "a3", "a4"]


def test_a_cancelled_job_frees_its_sequences_at_once(
    make: Callable[..., Scheduler], writer: Model, tokenizer: Tokenizer
) -> None:
    scheduler, begun, heard = make(1), threading.Event(), Heard()
    endless = make_request(
        writer, tokenizer, "a", max_tokens=10**6, num_samples=3, context_shift=True, stop=()
    )
    job = scheduler.submit(endless, lambda event: begun.set())
    assert begun.wait(60)
    scheduler.submit(make_request(writer, tokenizer, "b", max_tokens=2, stop=()), heard, key="k")
    scheduler.cancel(job)
    scheduler.cancel(job)
    assert len(heard.texts()[0]) > 0
    assert scheduler.counts.cancelled == 1
    assert scheduler.n_running == scheduler.n_waiting == 0


def test_a_full_queue_and_a_long_prompt_are_refused(
    make: Callable[..., Scheduler], writer: Model, tokenizer: Tokenizer
) -> None:
    scheduler = make(1, most_waiting=2, n_ctx=16)
    gate, jobs = threading.Event(), list[Job]()
    one = make_request(writer, tokenizer, "a", max_tokens=2, stop=())
    with pytest.raises(GptcError, match="20 tokens; a sequence holds 16"):
        scheduler.submit(make_request(writer, tokenizer, "x" * 20), print)
    jobs.append(scheduler.submit(one, lambda event: gate.wait(60)))
    while scheduler.n_waiting:
        time.sleep(0.001)
    jobs += [scheduler.submit(one, Heard()) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 requests wait"):
        scheduler.submit(one, Heard())
    gate.set()
    scheduler.close(10)
    with pytest.raises(Closed):
        scheduler.submit(one, Heard())


def test_closing_waits_for_texts_or_ends_them_with_an_error(
    make: Callable[..., Scheduler], writer: Model, tokenizer: Tokenizer
) -> None:
    scheduler, heard = make(1), Heard()
    scheduler.submit(make_request(writer, tokenizer, "a", max_tokens=50, stop=()), heard)
    assert scheduler.close(60)
    assert heard.events[-1].finish == "length"
    scheduler, heard = make(1), Heard()
    endless = make_request(writer, tokenizer, "a", max_tokens=10**6, context_shift=True, stop=())
    scheduler.submit(endless, heard)
    assert not scheduler.close(0.05)
    assert heard.events[-1].error == "the server has stopped"


def test_an_error_of_the_engine_ends_what_runs_and_nothing_else(
    make: Callable[..., Scheduler], writer: Model, tokenizer: Tokenizer, monkeypatch: Any
) -> None:
    from gptc.generation import batch

    scheduler, heard = make(2), Heard()
    request = make_request(writer, tokenizer, "a", max_tokens=5, stop=())
    with monkeypatch.context() as patch:
        patch.setattr(batch, "draw_tokens", lambda *step: 1 / 0)
        scheduler.submit(request, heard)
        heard.texts()
    assert heard.events[-1].error == "division by zero"
    after = Heard()
    scheduler.submit(request, after)
    assert after.texts() == alone(make, [request])[0]


def test_an_engine_that_cannot_continue_leaves_no_request_waiting(
    make: Callable[..., Scheduler], writer: Model, tokenizer: Tokenizer, monkeypatch: Any
) -> None:
    from gptc.generation import batch

    scheduler, heard = make(1), [Heard() for _ in range(3)]
    request = make_request(writer, tokenizer, "a", max_tokens=5, stop=())
    with monkeypatch.context() as patch:
        patch.setattr(batch, "draw_tokens", lambda *step: time.sleep(0.2) or 1 / 0)
        patch.setattr(batch.Batch, "reset", lambda self: 1 / 0)
        for listener in heard:
            scheduler.submit(request, listener)
        for listener in heard:
            listener.texts()
    assert {listener.events[-1].finish for listener in heard} == {"error"}
    assert not scheduler.ready
    with pytest.raises(Closed):
        scheduler.submit(request, Heard())


def test_masks_of_grammars_and_prompt_logprobs_share_a_batch_with_plain_texts(
    make: Callable[..., Scheduler], writer: Model, tokenizer: Tokenizer
) -> None:
    pytest.importorskip("llguidance", reason="pip install '.[grammar]'")
    plain = make_request(writer, tokenizer, "abc" * 9, max_tokens=9, stop=())
    digits = make_request(writer, tokenizer, "n = ", regex="[0-9]{5}", max_tokens=9, stop=())
    scored = make_request(writer, tokenizer, "abc" * 9, max_tokens=1, stop=())
    scored.prompt_logprobs = 1
    requests = [plain, digits, scored]
    expected = alone(make, requests)
    scheduler, heard = make(3), [Heard() for _ in requests]
    for request, listener in zip(requests, heard, strict=True):
        scheduler.submit(request, listener)
    assert [listener.texts() for listener in heard] == expected
    assert expected[1][0].isdigit()
    logprobs = heard[2].events[-1].sample.prompt_logprobs
    assert [found.token for found in logprobs] == list(b"abc" * 9)[1:]
    one_by_one = []
    with writer.session() as session:
        from gptc.generation.sampling import token_logprob

        for now, then in zip(b"abc" * 9, list(b"abc" * 9)[1:], strict=False):
            row = session.decode([now])
            one_by_one.append(token_logprob(row, then, 1, 256).logprob)
    found = [x.logprob for x in logprobs]
    assert found == pytest.approx(one_by_one, abs=0.05)


@pytest.mark.parametrize("ngram", [False, True])
def test_texts_with_a_draft_are_those_without(
    make: Callable[..., Scheduler], writer: Model, tokenizer: Tokenizer, ngram: bool,
    config: Callable[..., GPTConfig],
) -> None:  # fmt: skip
    requests = asks(writer, tokenizer, 12)
    plain, heard = alone(make, requests), [Heard(r.options.num_samples) for r in requests]
    with varied(config(block_size=128, n_layer=1), seed=9) as small:
        draft = NgramDraft() if ngram else ModelDraft(small, tokenizer, 4)
        scheduler = make(draft=draft)
        for request, listener in zip(requests, heard, strict=True):
            scheduler.submit(request, listener)
        assert [listener.texts() for listener in heard] == plain
        scheduler.close()
        counts = scheduler.counts
        assert counts.draft_tokens > counts.draft_tokens_accepted
        assert counts.draft_tokens_accepted > 0 or not ngram


def test_a_draft_that_is_right_saves_steps(
    make: Callable[..., Scheduler], writer: Model, tokenizer: Tokenizer
) -> None:
    """The step has room for the rows of 4 drafts; all of them are accepted."""
    requests = [
        make_request(
            writer, tokenizer, "ab", sampling=Sampling(1.0, seed=seed), stop=(), max_tokens=41
        )
        for seed in range(4)
    ]
    scheduler = make(draft=ModelDraft(writer, tokenizer, 4))
    heard = [Heard() for _ in requests]
    for request, listener in zip(requests, heard, strict=True):
        scheduler.submit(request, listener)
    for listener in heard:
        listener.texts()
    scheduler.close()
    counts = scheduler.counts
    assert counts.draft_tokens_accepted == counts.draft_tokens > 4 * 20
    assert counts.steps < 40
