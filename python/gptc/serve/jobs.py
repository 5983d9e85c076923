"""A request given to the scheduler, and what it tells of its samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptc.generation.request import Request, Sample


@dataclass(frozen=True)
class Event:
    """News of one sample. Its token lists only grow, so their first `n_tokens` may be read."""

    sample: Sample
    piece: str
    n_tokens: int
    finish: str | None
    error: str | None = None


@dataclass(eq=False)
class Job:
    """A request that was submitted. `listener` is called by the scheduler's `post`: be quick."""

    request: Request
    samples: list[Sample]
    listener: Callable[[Event], None]
    key: str = ""
    priority: int = 0
    n_begun: int = 0
