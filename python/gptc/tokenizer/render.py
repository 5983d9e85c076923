"""A program that renders a chat template as transformers does: `chat` runs it within limits.

    template = prepare(b"{{ messages[0].content }}")
    answer(template, b'{"mark": "|", "longest": 1000, "most": 9000, "several": [...]}')

A request is JSON: a mark, the most characters of a text and of all, and `several` conversations:
their variables, and in `ends` the numbers of messages at which to end and whether the prompt for an
answer follows. The answer is JSON too: for each, {"texts": […]}, or {"refused": …} for a message of
the template itself, or {"error": …}. A text is [n, rest], the first n characters of the one before
it and the rest: a long conversation is not repeated for each of its turns.
It imports nothing of gptc, to start soon. files/forker.py calls the two functions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.constants
import jinja2.debug
import jinja2.ext
import jinja2.sandbox


class _Refused(jinja2.TemplateError):
    """The template's own raise_exception."""


class _Generation(jinja2.ext.Extension):
    """{% generation %}…{% endgeneration %} is around the model's own text; it prints that text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Any) -> Any:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """namespace(…), without names that begin with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *rest = args
        values = dict(*rest, **values)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no {name!r}")


class _Dict:
    """dict(…) and dict.fromkeys(…), without the other attributes of Python's class."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _refuse(message: object) -> None:
    raise _Refused(str(message))


def _environment(mark: Callable[[], str]) -> jinja2.Environment:
    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        text = json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )
        return text.replace(json.dumps(mark())[1:-1], mark()) if ensure_ascii else text

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


class _Template:
    """A template, or its fault. `mark`, `longest` and `most` are those of the request."""

    def __init__(self, text: str) -> None:
        self.mark, self.fault = "", {}
        self.longest = self.most = self.left = 0
        try:
            self._template = _environment(lambda: self.mark).from_string(text)
        except BaseException as error:
            self.fault = _fault(error)

    def render(self, variables: dict[str, Any]) -> str:
        """A text. ValueError when it would be too long to be used."""
        text, n = [], 0
        for piece in self._template.generate(variables):
            n += len(piece)
            if n > self.longest:
                raise ValueError(f"its text has more than {self.longest:,} characters")
            text.append(piece)
        return "".join(text)

    def difference(self, before: str, text: str) -> tuple[int, str]:
        """A text as one that begins like that before it. ValueError for too many characters."""
        n = n_common(before, text)
        self.left -= len(text) - n
        if self.left < 0:
            raise ValueError(f"its texts have more than {self.most:,} characters together")
        return n, text[n:]


def prepare(template: bytes) -> _Template:
    """The template, compiled once."""
    time.localtime()  # reads the time zone
    return _Template(template.decode("utf-8", "surrogatepass"))


def answer(template: _Template, data: bytes) -> bytes:
    """The answer to a request."""
    found: dict[str, Any] = template.fault
    if not found:
        try:
            request = json.loads(data)
            template.mark = request["mark"]
            template.longest, template.most = request["longest"], request["most"]
            template.left = template.most
            found = {"several": [_rendered(template, **one) for one in request["several"]]}
        except BaseException as error:
            found = _fault(error)
    return json.dumps(found).encode()


def _rendered(template: _Template, variables: dict[str, Any], ends: list[Any]) -> dict[str, Any]:
    """The texts of a conversation, ended at each of `ends`."""
    texts, before = [], ""
    try:
        for n, add_generation_prompt in ends:
            some = {"messages": variables.get("messages", [])[:n]}
            some["add_generation_prompt"] = add_generation_prompt
            text = template.render({**variables, **some})
            texts.append(template.difference(before, text))
            before = text
    except MemoryError:
        raise
    except BaseException as error:
        return _fault(error)
    return {"texts": texts}


def n_common(a: str, b: str) -> int:
    """The number of characters with which both texts begin.

    generation/prefixes.py has the same for tokens; this program imports nothing of gptc.
    """
    if b.startswith(a):
        return len(a)
    least, most = 0, min(len(a), len(b))
    while least < most:  # comparing slices is much faster than a loop over characters
        middle = (least + most + 1) // 2
        if a[least:middle] == b[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least


def _fault(error: BaseException) -> dict[str, Any]:
    """The answer for an error."""
    if isinstance(error, _Refused):
        return {"refused": str(error)}
    if isinstance(error, jinja2.TemplateSyntaxError):
        return {"error": f"line {error.lineno}: {error.message}"}
    if isinstance(error, MemoryError):
        return {"error": "it takes too much memory"}
    return {"error": _line(error) + (str(error).strip() or type(error).__name__)}


def _line(error: BaseException) -> str:
    """The template's line at which an error was raised, if it is known."""
    found, step = "", error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<template>":
            found = f"line {step.tb_lineno}: "
        step = step.tb_next
    return found
