"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, with a status."""

from __future__ import annotations

from typing import Any


class Problem(Exception):
    """An answer that is an error. `param` is the field at fault."""

    status = 500
    kind = "server_error"
    code: str | None = None

    def __init__(
        self, message: str, *, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        inner = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": inner}


class BadRequest(Problem):
    """The request cannot be understood, or asks for what is not there."""

    status, kind = 400, "invalid_request_error"


class TooLong(BadRequest):
    """The prompt does not fit into the context. Clients know it by the code or the words."""

    code = "context_length_exceeded"

    def __init__(self, n_tokens: int, n_ctx: int, *, param: str | None = None) -> None:
        super().__init__(
            f"the prompt has {n_tokens:,} tokens; this model's maximum context length is "
            f"{n_ctx:,} tokens: shorten it",
            param=param,
        )


class Unauthorized(Problem):
    """No key, or a wrong one."""

    status, kind, code = 401, "invalid_request_error", "invalid_api_key"


class Forbidden(Problem):
    """A request that a web page of another site has made."""

    status, kind, code = 403, "invalid_request_error", "forbidden"


class NotFound(Problem):
    """No such path or model."""

    status, kind, code = 404, "invalid_request_error", "not_found"


class NotAllowed(Problem):
    """A path with another method."""

    status, kind, code = 405, "invalid_request_error", "method_not_allowed"


class TooSlow(Problem):
    """The body did not arrive in time."""

    status, kind, code = 408, "invalid_request_error", "timeout"


class TooLarge(Problem):
    """The body has too many bytes."""

    status, kind, code = 413, "invalid_request_error", "too_large"


class NotJson(Problem):
    """The body is of another type."""

    status, kind, code = 415, "invalid_request_error", "unsupported_media_type"


class Busy(Problem):
    """The queue is full."""

    status, kind, code = 429, "rate_limit_error", "queue_full"


class Unavailable(Problem):
    """The server is shutting down."""

    status, kind, code = 503, "server_error", "shutting_down"
