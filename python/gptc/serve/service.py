"""The model that a server offers, and requests made of the fields of a body."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gptc.errors import GptcError, PromptTooLong, UsageError, python_names
from gptc.generation.options import Sampling
from gptc.generation.request import Request, make_request
from gptc.serve.options import ServeOptions
from gptc.serve.problems import BadRequest, NotFound, TooLong
from gptc.settings import declared

if TYPE_CHECKING:
    from gptc.serve.adapters import Adapters
    from gptc.serve.metrics import Metrics
    from gptc.serve.scheduler import Scheduler

_FIELDS = {"bias": "logit_bias", "json_schema": "response_format"}
_PREPARING = 4  # threads that tokenize, render templates and compile grammars


@dataclass
class Service:
    """Everything that the endpoints share."""

    name: str
    scheduler: Scheduler
    options: ServeOptions
    metrics: Metrics
    chat_template: str | None = None
    keys: Sequence[bytes] = ()
    adapters: Adapters | None = None
    ready: bool = True
    created: int = field(default_factory=lambda: int(time.time()))
    pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_PREPARING, thread_name_prefix="gptc-prepare")
    )

    @property
    def can_chat(self) -> bool:
        """Whether there is a chat template."""
        return bool(self.chat_template or self.scheduler.tokenizer.marks.templates)

    @property
    def names(self) -> tuple[str, ...]:
        """The names that a request may have for the model: its own, and those of adapters."""
        return (self.name, *(self.adapters.names if self.adapters else ()))

    def model_of(self, fields: Mapping[str, Any]) -> str:
        """The name of the model that a body asks for. NotFound if it is not here."""
        name = fields.get("model") or self.name
        if name not in self.names:
            raise NotFound(
                f"the model {name!r:.60} is not here; this server has {', '.join(self.names)}",
                param="model",
            )
        return str(name)

    def adapt(self, request: Request, fields: Mapping[str, Any]) -> Request:
        """The request, with the adapter that the body asks for."""
        name = self.model_of(fields)
        if self.adapters:
            own = name == self.name
            request.adapter = self.adapters.none if own else self.adapters.find(name)
        return request

    def make_request(
        self,
        prompt: str | Sequence[int],
        fields: Mapping[str, Any],
        names: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Request:
        """A request for the scheduler. BadRequest for a value that the model cannot take.

        `names` are the fields of options that have another name in the body.
        """
        try:
            with python_names():
                request = make_request(
                    self.scheduler.model, self.scheduler.tokenizer, prompt,
                    sampling=_sampling(fields), **options,
                )  # fmt: skip
                return self.adapt(request, fields)
        except PromptTooLong as error:
            raise self.too_long(error) from None
        except GptcError as error:
            named = error.about and (_FIELDS | dict(names or {})).get(error.about, error.about)
            raise BadRequest(str(error), param=named) from None

    def too_long(self, error: PromptTooLong, param: str | None = None) -> TooLong:
        """The answer to a prompt that does not fit into a sequence of this server."""
        return TooLong(error.n_tokens, self.scheduler.n_ctx, param=param)


def _sampling(fields: Mapping[str, Any]) -> Sampling:
    names = declared(Sampling)
    whole = {name for name, option in names.items() if option.kind is int}
    given = {
        name: int(fields[name]) if name in whole else fields[name]
        for name in names
        if name in fields
    }
    given.setdefault("temperature", 1.0)
    given.setdefault("seed", secrets.randbits(31))
    try:
        bias = {int(token): x for token, x in fields.get("logit_bias", {}).items()}
    except ValueError:
        raise BadRequest(
            "logit_bias has a name that is not a token id; its names must be whole numbers",
            param="logit_bias",
        ) from None
    sampling = Sampling(**given, bias=tuple(sorted(bias.items())))
    try:
        with python_names():
            sampling.check()
    except UsageError as error:
        raise BadRequest(str(error)) from None
    return sampling


def stops_of(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The stop strings of a body."""
    stop = fields.get("stop", ())
    return (stop,) if isinstance(stop, str) else tuple(stop)


def pattern_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The pattern that the text must match, as an option of `make_request`."""
    given = {name: fields[name] for name in ("grammar", "regex") if name in fields}
    form = fields.get("response_format", {})
    if form.get("type") == "json_object":
        given["json_schema"] = {"type": "object"}
    elif form.get("type") == "json_schema":
        if not form.get("json_schema"):
            raise BadRequest(
                "response_format.json_schema is missing: give an object with a schema",
                param="response_format.json_schema",
            )
        given["json_schema"] = form["json_schema"]["schema"]
    if len(given) > 1:
        names = " and ".join(given)
        raise BadRequest(f"{names} exclude each other: give one of them", param=next(iter(given)))
    return given
