"""What /metrics shows, in Prometheus' format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from gptc.serve.scheduler import Scheduler

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self._registry}
        self.requests = Counter("gptc_requests", "Requests answered.", ["path", "status"], **kept)
        self.first_s = Histogram(
            "gptc_time_to_first_token_seconds", "From the request to its first token.",
            buckets=_SECONDS, **kept,
        )  # fmt: skip
        self.between_s = Histogram(
            "gptc_time_between_tokens_seconds", "From a token of a choice to its next.",
            buckets=_SECONDS, **kept,
        )  # fmt: skip
        self._steps_s = Histogram("gptc_step_seconds", "Time of a step.", buckets=_SECONDS, **kept)
        self._batch = Histogram("gptc_batch_size", "Sequences in a step.", buckets=_SIZES, **kept)

    def step(self, seconds: float, n_samples: int) -> None:
        """Counts a step of the engine."""
        self._steps_s.observe(seconds)
        self._batch.observe(n_samples)

    def watch(self, scheduler: Scheduler) -> None:
        """Adds the scheduler's numbers, which are read when they are asked for."""
        self._registry.register(_Scheduled(scheduler))

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self._registry)


class _Scheduled:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Any:
        """The families of the scheduler's numbers."""
        scheduler = self._scheduler
        counts = scheduler.counts
        yield GaugeMetricFamily("gptc_waiting", "Requests that wait.", scheduler.n_waiting)
        yield GaugeMetricFamily("gptc_running", "Choices being decoded.", scheduler.n_running)
        for name, help, value in (
            ("gptc_tokens", "Tokens generated.", counts.tokens),
            ("gptc_prompt_tokens_read", "Tokens of prompts computed.", counts.prompt_tokens_read),
            ("gptc_prompt_tokens_reused", "Tokens of prompts that a cache held.",
             counts.prompt_tokens_reused),
            ("gptc_draft_tokens", "Tokens that a draft proposed.", counts.draft_tokens),
            ("gptc_draft_tokens_accepted", "Tokens of drafts that texts have.",
             counts.draft_tokens_accepted),
            ("gptc_cancelled", "Requests whose client left.", counts.cancelled),
            ("gptc_failed", "Requests that the engine could not answer.", counts.failed),
        ):  # fmt: skip
            yield CounterMetricFamily(name, help, value)
