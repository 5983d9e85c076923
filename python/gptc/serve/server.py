"""Runs a server: addresses, keys, TLS, signals, and the end."""

from __future__ import annotations

import asyncio
import codecs
import logging
import resource
import signal
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gptc.errors import GptcError, UsageError
from gptc.files.limits import read_file
from gptc.files.memory import available_bytes
from gptc.files.words import amount
from gptc.serve.adapters import Adapters
from gptc.serve.app import App
from gptc.serve.metrics import Metrics
from gptc.serve.options import ServeOptions
from gptc.serve.scheduler import Scheduler
from gptc.serve.service import Service

if TYPE_CHECKING:
    from gptc.checkpoint.merged import AdapterSet
    from gptc.engine.model import Model
    from gptc.generation.drafts import DraftPlan
    from gptc.tokenizer.base import Tokenizer

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_LEAST_KEY = 16  # characters
_LEAST_CTX = 16  # tokens
_BACKLOG = 2048  # connections that wait to be accepted

log = logging.getLogger("gptc.serve")


def check_security(options: ServeOptions) -> list[bytes]:
    """The keys of the file, if there is one. UsageError for a server that anybody could use."""
    if options.host not in LOOPBACK and not options.api_key_file and options.auth:
        raise UsageError(
            f"--host {options.host} lets other machines use the model: give --api-key-file FILE, "
            "or --no-auth to let anybody"
        )
    if bool(options.tls_cert) != bool(options.tls_key):
        raise UsageError("--tls-cert and --tls-key go together: give both")
    for name in ("tls_cert", "tls_key"):
        path = getattr(options, name)
        if path and not Path(path).is_file():
            raise UsageError(f"--{name.replace('_', '-')} {path} does not exist: give a PEM file")
    if options.tls_cert and options.tls_key:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                options.tls_cert, options.tls_key
            )
        except (ssl.SSLError, OSError) as error:
            raise UsageError(
                f"{options.tls_cert} and {options.tls_key} are not a certificate and its key in "
                f"PEM: {error}"
            ) from None
    return _read_keys(Path(options.api_key_file)) if options.api_key_file else []


def _read_keys(path: Path) -> list[bytes]:
    try:
        data = read_file(path, "header").removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UsageError(f"cannot read the keys in {path}: {error.strerror}") from None
    lines = [line.strip() for line in data.splitlines()]
    keys = [line for line in lines if line and not line.startswith(b"#")]
    if not keys:
        raise UsageError(f"{path} has no key: write one a line")
    if min(map(len, keys)) < _LEAST_KEY:
        raise UsageError(
            f"{path} has a key of less than {_LEAST_KEY} characters: take a longer one, such as "
            "that of openssl rand -hex 24"
        )
    return keys


def choose_context(model: Model, options: ServeOptions, draft: DraftPlan | None = None) -> int:
    """Tokens of a sequence: as asked, else as many as half of the free memory holds."""
    size = model.config.block_size
    if options.context is not None:
        if options.context > size:
            raise UsageError(
                f"--context is {options.context:,}; the model's context is {size:,}: give less"
            )
        return options.context
    free, n_ctx = available_bytes(), size
    while (
        free is not None
        and n_ctx > _LEAST_CTX
        and cache_bytes(model, options, draft, n_ctx) > free / 2
    ):
        n_ctx //= 2
    return n_ctx


def cache_bytes(model: Model, options: ServeOptions, draft: DraftPlan | None, n_ctx: int) -> int:
    """Number of bytes of all sequences of the model and its draft."""
    from gptc.engine.session import session_bytes

    own = session_bytes(model, options.parallel, n_ctx)
    return own + (draft.session_bytes(n_ctx) if draft else 0)


def make_service(
    model: Model,
    tokenizer: Tokenizer,
    options: ServeOptions,
    *,
    name: str,
    chat_template: str | None = None,
    draft: DraftPlan | None = None,
    adapters: Callable[[], AdapterSet] | None = None,
) -> Service:
    """The service of a model. GptcError if its sequences do not fit into memory.

    `adapters` opens those of a model that was created with room for them.
    """
    keys, metrics = check_security(options), Metrics()
    several = Adapters(model, adapters) if adapters else None
    if several and name in several.names:
        raise UsageError(f"an adapter and the model are both named {name}: give one another name")
    n_ctx = choose_context(model, options, draft)
    try:
        guesses = draft.make(n_ctx) if draft else None
        scheduler = Scheduler(
            model, tokenizer, options.parallel, n_ctx, chunk=options.prefill_chunk,
            most_waiting=options.max_waiting, draft=guesses, on_step=metrics.step,
        )  # fmt: skip
    except GptcError as error:
        size = amount(cache_bytes(model, options, draft, n_ctx))
        raise GptcError(
            f"{options.parallel} sequences of {n_ctx:,} tokens need {size}: give less with "
            f"--parallel or --context ({error})"
        ) from None
    metrics.watch(scheduler)
    return Service(name, scheduler, options, metrics, chat_template, keys, several)


class _Protocol(H11Protocol):
    """Ends a connection whose request does not arrive, or whose answer is not read, in time."""

    timeout_s = 30.0
    _n_left: int | None = None  # bytes of a closing connection that were not read

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.timeout_s, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def _check(self) -> None:
        if self.transport.is_closing():  # and stays open until the client has read the rest
            before, self._n_left = self._n_left, self.transport.get_write_buffer_size()
            if before == self._n_left:
                self.transport.abort()
            else:
                self._timer = self.loop.call_later(self.timeout_s, self._check)
            return
        answering = self.cycle is not None and not self.cycle.response_complete
        if not answering and self.timeout_keep_alive_task is None:
            self.transport.close()
        else:
            self._timer = self.loop.call_later(self.timeout_s, self._check)


class Server:
    """A service at an address. `run` returns after SIGTERM or Ctrl-C, or after `stop`."""

    def __init__(self, service: Service, ready: Callable[[str], None] = lambda url: None) -> None:
        options = service.options
        self.service, self._ready = service, ready
        settings: dict[str, Any] = {
            "http": type("Protocol", (_Protocol,), {"timeout_s": options.timeout}),
            "ws": "none",
            "lifespan": "off",
            "log_config": None,
            "access_log": False,
            "server_header": False,
            "timeout_keep_alive": min(75, max(1, int(options.timeout))),
            "timeout_graceful_shutdown": max(1, int(options.drain_seconds)),
            "ssl_certfile": options.tls_cert,
            "ssl_keyfile": options.tls_key,
        }
        self._uvicorn = uvicorn.Server(uvicorn.Config(App(service), **settings))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = asyncio.Event()

    def run(self) -> bool:
        """Answers requests until the end. False if texts had to be cut off."""
        _raise_file_limit()
        return asyncio.run(self._run())

    def stop(self) -> None:
        """Begins the end, from any thread; harmless after it."""
        if self._loop:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._ended.set)

    def _end(self) -> None:
        """Begins the end, or at the second time cuts off the texts that still run."""
        if self._ended.is_set():
            log.info("stopping at once")
            self.service.scheduler.hurry()
            self._uvicorn.force_exit = True
        self._ended.set()

    def reload(self) -> None:
        """Reads the adapters again, in another thread. Called in the loop's."""
        assert self._loop
        self._loop.run_in_executor(None, self._reload)

    def _reload(self) -> None:
        if not self.service.adapters:
            log.info("there are no adapters to read again")
            return
        try:
            self.service.adapters.reload(self.service.scheduler)
        except (GptcError, OSError) as error:
            log.error("the adapters stay as they were: %s", error)
        else:
            log.info("the adapters are read again: %s", ", ".join(self.service.adapters.names))

    def _post(self, tell: Callable[[], None]) -> None:
        """Calls a function in the loop's thread, from the engine's: one wake-up a step."""
        assert self._loop
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(tell)

    async def _run(self) -> bool:
        self._loop = asyncio.get_running_loop()
        self.service.scheduler.post = self._post
        for number in (signal.SIGTERM, signal.SIGINT):
            with suppress(ValueError, RuntimeError):  # not the main thread
                self._loop.add_signal_handler(number, self._end)
        with suppress(ValueError, RuntimeError):
            self._loop.add_signal_handler(signal.SIGHUP, self.reload)
        self._socket = self._listen()
        serving = asyncio.create_task(self._uvicorn._serve([self._socket]))
        while not self._uvicorn.started and not serving.done():
            await asyncio.sleep(0.01)
        self._ready(self.url)
        ending = asyncio.create_task(self._ended.wait())
        await asyncio.wait((serving, ending), return_when=asyncio.FIRST_COMPLETED)
        return await self._drain(serving)

    async def _drain(self, serving: asyncio.Task[None]) -> bool:
        """/ready is false now; running texts finish, then connections close."""
        service = self.service
        service.ready = False
        log.info("stopping: running choices: %d", service.scheduler.n_running)
        loop = asyncio.get_running_loop()
        complete = await loop.run_in_executor(
            None, service.scheduler.close, service.options.drain_seconds
        )
        self._uvicorn.should_exit = True
        await serving
        service.pool.shutdown(wait=False, cancel_futures=True)
        return complete

    @property
    def connections(self) -> set[Any]:
        """The connections that are open."""
        return self._uvicorn.server_state.connections

    @property
    def url(self) -> str:
        """The address, once the server runs."""
        return self._address(self._socket.getsockname()[1])

    def _listen(self) -> socket.socket:
        options = self.service.options
        try:
            found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)
            family, _, _, _, address = found[0]
            return socket.create_server(address, family=family, backlog=_BACKLOG)
        except OSError as error:
            raise GptcError(
                f"cannot listen on {self._address()}: {error.strerror or error}; choose another "
                "--host or --port"
            ) from None

    def _address(self, port: int | None = None) -> str:
        options = self.service.options
        host = f"[{options.host}]" if ":" in options.host else options.host
        scheme = "https" if options.tls_cert else "http"
        return f"{scheme}://{host}:{options.port if port is None else port}"


def _raise_file_limit() -> None:
    """Lets the process have as many connections as the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
