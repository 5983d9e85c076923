"""The samples that wait for a sequence: by priority, and within one in turn by key."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from gptc.serve.jobs import Job


class FairQueue:
    """Jobs with samples that have not begun. The larger priority comes first.

    Keys take turns, a sample each, so that one client's thousand requests delay another client's
    first by a sample and not by a thousand.
    """

    def __init__(self) -> None:
        self._jobs: dict[int, dict[str, deque[Job]]] = {}

    def __len__(self) -> int:
        return sum(len(jobs) for keys in self._jobs.values() for jobs in keys.values())

    def add(self, job: Job) -> None:
        """Puts a job behind those of its key."""
        self._jobs.setdefault(job.priority, {}).setdefault(job.key, deque()).append(job)

    def __iter__(self) -> Iterator[Job]:
        """The first job of each key, in the order in which they may begin."""
        for priority in sorted(self._jobs, reverse=True):
            for jobs in list(self._jobs[priority].values()):
                yield jobs[0]

    def took(self, job: Job, all_begun: bool) -> None:
        """Moves the job's key behind the others, and drops the job once all its samples began."""
        keys = self._jobs[job.priority]
        jobs = keys.pop(job.key)
        if all_begun:
            jobs.remove(job)
        if jobs:
            keys[job.key] = jobs
        elif not keys:
            del self._jobs[job.priority]

    def drop(self, job: Job) -> None:
        """Removes a job that was cancelled; harmless for one that is not here."""
        jobs = self._jobs.get(job.priority, {}).get(job.key, ())
        if job in jobs:
            keys = self._jobs[job.priority]
            keys[job.key].remove(job)
            if not keys[job.key]:
                del keys[job.key]
            if not keys:
                del self._jobs[job.priority]
