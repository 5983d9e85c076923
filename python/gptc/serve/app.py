"""The HTTP server: paths, keys, errors. The endpoints are modules of their own."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gptc.errors import GptcError
from gptc.serve import chat, completions, embeddings, responses, tables
from gptc.serve.answers import ClientGone
from gptc.serve.bodies import read_json
from gptc.serve.openapi import document
from gptc.serve.problems import (
    BadRequest,
    Forbidden,
    NotAllowed,
    NotFound,
    Problem,
    TooLong,
    Unauthorized,
    Unavailable,
)
from gptc.serve.schema import check_fields
from gptc.serve.service import Service
from gptc.serve.streaming import Json, encoded, problem_response

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

log = logging.getLogger("gptc.serve")
_PAGES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/playground.js": ("playground.js", "text/javascript; charset=utf-8"),
    "/playground.css": ("playground.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/docs": ("docs.html", "text/html; charset=utf-8"),
    "/docs.js": ("docs.js", "text/javascript; charset=utf-8"),
}
_OPEN = {*_PAGES, "/health", "/ready", "/openapi.json"}  # without a key
_LOCAL = {"localhost", "127.0.0.1", "[::1]"}
_LOGGED = 100  # characters of a path
_POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True)
class Endpoint:
    """A path, the fields of its body (None: it has none), and its answer."""

    method: str
    path: str
    help: str
    answer: Callable[[Service, HttpRequest, Any], Awaitable[Response]]
    fields: Mapping[str, Any] | None = None


def _texts(module: Any) -> Callable[[Service, HttpRequest, Any], Awaitable[Response]]:
    """An endpoint that generates: `prepare` runs in another thread, then `answer`."""

    async def run(service: Service, http: HttpRequest, fields: Any) -> Response:
        if not service.ready:
            raise Unavailable("this server is shutting down: try another one")
        if service.options.log_prompts:
            log.info("%s asks %s", http.scope["gptc.id"], encoded(fields).decode())
        loop = asyncio.get_running_loop()
        try:
            requests = await loop.run_in_executor(service.pool, module.prepare, service, fields)
            response: Response = await module.answer(service, http, fields, requests)
        except TooLong as problem:
            problem.param = problem.param or module.PROMPT
            raise
        return response

    return run


async def _models(service: Service, http: HttpRequest, fields: Any) -> Response:
    model = {
        "object": "model",
        "created": service.created,
        "owned_by": "gptc",
        "context": service.scheduler.n_ctx,
        "vocab_size": service.scheduler.tokenizer.vocab_size,
        "chat": service.can_chat,
        "root": service.name,
    }
    found = {
        name: {"id": name, **model, "parent": None if name == service.name else service.name}
        for name in service.names
    }
    name = http.url.path.removeprefix("/v1/models").removeprefix("/")
    if name:
        return Json(found[service.model_of({"model": name})])
    return Json({"object": "list", "data": list(found.values())})


async def _tokenize(service: Service, http: HttpRequest, fields: Any) -> Response:
    loop, tokenizer = asyncio.get_running_loop(), service.scheduler.tokenizer
    try:
        # A long text must not hold up the streams, which this thread sends.
        found = await loop.run_in_executor(service.pool, tokenizer.encode, fields["content"])
        tokens = [int(token) for token in found]
    except (GptcError, UnicodeEncodeError) as error:
        raise BadRequest(f"content cannot be tokenized: {error}", param="content") from None
    if fields.get("add_special") and tokenizer.bos is not None and tokens[:1] != [tokenizer.bos]:
        tokens = [tokenizer.bos, *tokens]
    return Json({"tokens": tokens})


async def _detokenize(service: Service, http: HttpRequest, fields: Any) -> Response:
    try:
        text = service.scheduler.tokenizer.decode([int(token) for token in fields["tokens"]])
    except GptcError as error:
        raise BadRequest(str(error), param="tokens") from None
    return Json({"content": text})


async def _health(service: Service, http: HttpRequest, fields: Any) -> Response:
    return Json({"status": "ok"})


async def _ready(service: Service, http: HttpRequest, fields: Any) -> Response:
    if not (service.ready and service.scheduler.ready):
        raise Unavailable("this server is shutting down")
    return Json({"status": "ready"})


async def _metrics(service: Service, http: HttpRequest, fields: Any) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def endpoints(service: Service) -> list[Endpoint]:
    """All endpoints but the pages."""
    o = service.options
    return [
        Endpoint("GET", "/v1/models", "The model of this server, and its adapters.", _models),
        Endpoint("POST", "/v1/completions", "Continuations of prompts.", _texts(completions),
                 tables.completion_fields(o)),
        Endpoint("POST", "/v1/chat/completions", "Answers to a conversation.", _texts(chat),
                 tables.chat_fields(o)),
        Endpoint("POST", "/v1/responses", "The answer to an input, as text.", _texts(responses),
                 tables.response_fields(o)),
        Endpoint("POST", "/v1/embeddings", "Vectors of texts.", _texts(embeddings),
                 tables.embedding_fields(o)),
        Endpoint("POST", "/tokenize", "The tokens of a text.", _tokenize,
                 tables.tokenize_fields(o)),
        Endpoint("POST", "/detokenize", "The text of tokens.", _detokenize,
                 tables.detokenize_fields(o)),
        Endpoint("GET", "/health", "Whether the server runs.", _health),
        Endpoint("GET", "/ready", "Whether the server takes requests.", _ready),
        Endpoint("GET", "/metrics", "Numbers for Prometheus.", _metrics),
    ]  # fmt: skip


def _method(http: HttpRequest) -> str:
    """HEAD is answered as GET, for monitors; the protocol leaves the body out."""
    return "GET" if http.method == "HEAD" else http.method


class App:
    """The server as an ASGI application."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._endpoints = {(e.method, e.path): e for e in endpoints(service)}
        self._document = encoded(document(self._endpoints.values(), service.name))
        self._digests = [hashlib.sha256(key).digest() for key in service.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request. Whatever fails here is an answer of status 500, and a log entry."""
        if scope["type"] != "http":
            return
        begin_s, scope["gptc.id"] = time.monotonic(), secrets.token_hex(8)
        status, noted = 0, False

        async def told(message: Message) -> None:
            nonlocal status, noted
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", [])
                message["headers"] = [*message["headers"], *self._headers(http)]
            elif not message.get("more_body"):  # whoever has the whole answer finds it in the log
                self._note(http, status, begin_s)
                noted = True
            await send(message)

        http = HttpRequest(scope, receive)
        try:
            response = await self._answer(http)
        except Problem as problem:
            response = problem_response(problem)
        except ClientGone:
            response = None
        except Exception:
            log.exception("%s failed", scope["gptc.id"])
            response = problem_response(Problem("an error of the server; its log has the cause"))
        try:
            if response:
                await response(scope, receive, told)
        except (ClientGone, OSError, asyncio.TimeoutError):
            pass
        if not noted:  # the client left before the last message
            self._note(http, status, begin_s)

    def _note(self, http: HttpRequest, status: int, begin_s: float) -> None:
        """Counts and logs an answered request; status 0: the client got none."""
        scope = http.scope
        path = self._path(http)
        counted = path if (_method(http), path) in self._endpoints else "other"
        self._service.metrics.requests.labels(counted, str(status)).inc()
        took_ms = 1000 * (time.monotonic() - begin_s)
        log.info(
            "%s %s %s %s %d %.0f ms", scope["gptc.id"], scope.get("gptc.client", "-"), http.method,
            quote(path)[:_LOGGED], status, took_ms,
        )  # fmt: skip

    def _path(self, http: HttpRequest) -> str:
        path = str(http.scope["path"])
        return "/v1/models" if path.startswith("/v1/models/") else path

    def _headers(self, http: HttpRequest) -> list[tuple[bytes, bytes]]:
        found = [
            (b"x-request-id", http.scope["gptc.id"].encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"content-security-policy", _POLICY.encode()),
        ]
        origin = http.headers.get("origin")
        allowed = self._service.options.cors
        if origin and ("*" in allowed or origin in allowed):
            found += [
                (b"access-control-allow-origin", origin.encode("latin-1")),
                (b"access-control-allow-headers", b"authorization, content-type"),
                (b"access-control-allow-methods", b"GET, POST"),
                (b"vary", b"origin"),
            ]
        return found

    async def _answer(self, http: HttpRequest) -> Response:
        path, method = self._path(http), _method(http)
        self._check_host(http)
        if method == "OPTIONS" and self._service.options.cors:
            return Response(status_code=204)
        if path not in _OPEN:
            self._check_key(http)
        elif method == "GET" and path in _PAGES:
            name, kind = _PAGES[path]
            content = files("gptc.serve").joinpath("static").joinpath(name).read_bytes()
            return Response(content, media_type=kind)
        elif method == "GET" and path == "/openapi.json":
            return Response(self._document, media_type="application/json")
        endpoint = self._endpoints.get((method, path))
        if endpoint is None:
            others = sorted(m for m, p in self._endpoints if p == path)
            if others or path in _OPEN:
                allow = ", ".join(others) or "GET"
                raise NotAllowed(f"{path} takes {allow}", headers={"Allow": allow})
            raise NotFound(f"{path!r:.60} is not a path of this server; {self._instead(path)}")
        fields = None
        if endpoint.fields is not None:
            body = await read_json(http, self._service.options.timeout)
            fields = check_fields(endpoint.fields, body)
        return await endpoint.answer(self._service, http, fields)

    def _instead(self, path: str) -> str:
        """The advice for an unknown path: mostly a client's base URL lacks its /v1, or has two."""
        known = {p for _, p in self._endpoints}
        path = re.sub("/+", "/", path)
        for near in (path, f"/v1{path}", path.removeprefix("/v1")):
            if near in known:
                return f"{near} is one: the client's base URL may end in the wrong part"
        return "see /docs"

    def _check_host(self, http: HttpRequest) -> None:
        """Refuses names that a web page has made point here, where no key protects the server."""
        if self._digests or self._service.options.host not in ("127.0.0.1", "localhost", "::1"):
            return
        host = http.headers.get("host", "localhost")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name.lower() not in _LOCAL:
            raise Forbidden(f"the host {host!r:.60} is not this machine's name for itself")

    def _check_key(self, http: HttpRequest) -> None:
        client = http.scope.get("client")
        http.scope["gptc.client"] = client[0] if client else ""
        if not self._digests:
            return
        scheme, _, key = http.headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthorized(
                "the key is missing or wrong: send it as Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )
        http.scope["gptc.client"] = f"key {matches.index(True) + 1}"
