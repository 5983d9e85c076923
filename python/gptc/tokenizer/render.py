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
import secrets
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import accumulate, pairwise
from typing import Any

import jinja2
import jinja2.constants
import jinja2.debug
import jinja2.ext
import jinja2.nodes
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
        self.first_walked, self.lists = 0, set[str]()
        environment = _environment(lambda: self.mark)
        try:
            self._template = environment.from_string(text)
        except BaseException as error:
            self.fault = _fault(error)
            return
        try:
            walk = _walk(environment.parse(text))
        except BaseException:  # whatever the walk does not expect
            return
        if walk is not None:
            self._border, self.first_walked = secrets.token_hex(16), walk.first
            self.lists = walk.lists
            end = jinja2.nodes.TemplateData(self._border)
            walk.loop.body.append(jinja2.nodes.Output([end], lineno=walk.loop.lineno))
            self._walked = environment.from_string(walk.template)

    def pieces(self, variables: dict[str, Any], n: int, prompt: bool) -> list[str]:
        """The text of n messages, cut after each of them that the loop has passed."""
        text: list[str] = []
        found: list[str] = []
        n_left = self.longest
        for piece in self._walked.generate(_ended(variables, n, prompt)):
            if piece == self._border:
                found.append("".join(text))
                text.clear()
                continue
            n_left -= len(piece)
            if n_left < 0:
                raise ValueError("too long")
            text.append(piece)
        return [*found, "".join(text)]

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
        return n, self.counted(text[n:])

    def counted(self, rest: str) -> str:
        """The rest of a text. ValueError for too many characters."""
        self.left -= len(rest)
        if self.left < 0:
            raise ValueError(f"its texts have more than {self.most:,} characters together")
        return rest


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


def _ended(variables: dict[str, Any], n: int, prompt: bool) -> dict[str, Any]:
    """The variables of a conversation that ends after n messages."""
    messages = variables.get("messages", [])[:n]
    return {**variables, "messages": messages, "add_generation_prompt": prompt}


def _rendered(template: _Template, variables: dict[str, Any], ends: list[Any]) -> dict[str, Any]:
    """The texts of a conversation, ended at each of `ends`."""
    texts: list[tuple[int, str]] = []
    before = ""
    n_slow = sum(n < template.first_walked for n, _ in ends) if template.first_walked else len(ends)
    try:
        walked = _texts_walked(template, variables, ends[n_slow:])
        for n, prompt in ends if walked is None else ends[:n_slow]:
            text = template.render(_ended(variables, n, prompt))
            texts.append(template.difference(before, text))
            before = text
        if walked is not None:
            first, rest = walked
            texts.append(template.difference(before, first))
            texts += ((n, template.counted(some)) for n, some in rest)
    except MemoryError:
        raise
    except BaseException as error:
        return _fault(error)
    return {"texts": texts}


# ---- one walk through a conversation ----


class _Walk:
    """A template that passes the messages in a loop, and of which nothing looks ahead.

    What it has written after a message is the same, however many messages follow. So the texts of
    all ends are parts of one, and a conversation of thousands of turns takes one run.
    """

    def __init__(self, template: Any, loop: Any, first: int, lists: set[str]) -> None:
        self.template, self.loop = template, loop
        self.first = first  # messages of the shortest text that is a part
        self.lists = lists  # names of messages; one that is a variable too may be a value of that


# Not its methods: the text of one has the number of messages.
_BEHIND = ("index", "index0", "first", "previtem", "depth", "depth0")
_MESSAGES = "messages"


def _walk(template: Any) -> _Walk | None:
    """The walk of a template; None where it may depend on messages that follow."""
    nodes = jinja2.nodes
    names = list(template.find_all(nodes.Name))
    known = [node for node in template.find_all(nodes.Assign) if _n_skipped(node.node) is not None]
    known = [node for node in known if isinstance(node.target, nodes.Name)]
    lists = {_MESSAGES, *(node.target.name for node in known)}  # {% set rest = messages[1:] %}
    at = [i for i, node in enumerate(template.body) if _is_over(node, lists)]
    items = [node for node in template.find_all(nodes.Getitem) if _is_list(node.node, lists)]
    numbers = [found for node in items if (found := _number(node.arg)) is not None]
    if (
        len(at) != 1
        # Each name of a list is the loop's, or an item's, or is set to the messages.
        or sum(_is_list(name, lists) for name in names) != 1 + len(numbers) + len(known)
        or sum(name.ctx != "load" and name.name in lists for name in names) != len(known)
        # A parameter of that name hides an inner loop's own `loop`.
        or any(name.ctx != "load" and name.name == "loop" for name in names)
        or template.find((nodes.Block, nodes.Break, nodes.Continue)) is not None
    ):
        return None
    loop: Any = template.body[at[0]]
    if loop.test is not None or loop.recursive or loop.else_:
        return None
    if any(_looks_ahead(node) for node in loop.body):
        return None
    changed = {name.name for name in names if name.ctx != "load"} | lists
    changed |= {node.name for node in template.find_all(nodes.Macro)}
    for node in template.body[at[0] + 1 :]:  # what follows the loop
        if changed & {name.name for name in node.find_all(nodes.Name)}:
            return None
    n_skipped = sum(_n_skipped(node.node) or 0 for node in known)  # by one after another
    first = 1 + n_skipped + max(numbers, default=0)
    return _Walk(template, loop, first, lists - {_MESSAGES})


def _is_list(node: Any, lists: set[str]) -> bool:
    return isinstance(node, jinja2.nodes.Name) and node.ctx == "load" and node.name in lists


def _is_over(node: Any, lists: set[str]) -> bool:
    return isinstance(node, jinja2.nodes.For) and _is_list(node.iter, lists)


def _n_skipped(node: Any) -> int | None:
    """The number of messages that `messages` or `messages[2:]` leaves out; None for another."""
    if _is_list(node, {_MESSAGES}):
        return 0
    if not isinstance(node, jinja2.nodes.Getitem) or not _is_list(node.node, {_MESSAGES}):
        return None
    cut = node.arg
    if not isinstance(cut, jinja2.nodes.Slice) or cut.stop is not None or cut.step is not None:
        return None
    return _number(cut.start)


def _number(node: Any) -> int | None:
    if isinstance(node, jinja2.nodes.Const) and type(node.value) is int and node.value >= 0:
        return int(node.value)
    return None


def _looks_ahead(node: Any) -> bool:
    """Whether a part of the loop uses its `loop` for more than the messages so far."""
    nodes = jinja2.nodes
    inner = node.node if isinstance(node, nodes.Getattr) else None
    if isinstance(inner, nodes.Name) and inner.name == "loop":
        return node.attr not in _BEHIND
    if isinstance(node, nodes.Name) and node.name == "loop":
        return True
    if isinstance(node, nodes.For):  # whose `loop` is its own
        outer = [node.iter, *([node.test] if node.test is not None else [])]
        return any(_looks_ahead(part) for part in [*outer, *node.else_])
    return any(_looks_ahead(part) for part in node.iter_child_nodes())


def _texts_walked(
    template: _Template, variables: dict[str, Any], ends: list[Any]
) -> tuple[str, Iterator[tuple[int, str]]] | None:
    """The first text of these ends, and differences for the others; None if each has to be run."""
    messages = variables.get(_MESSAGES)
    if len(ends) < 2 or not isinstance(messages, list) or template.lists & variables.keys():
        return None
    most = max(n for n, _ in ends)
    if most > len(messages) or [n for n, _ in ends] != sorted(n for n, _ in ends):
        return None
    try:
        runs = {p: template.pieces(variables, most, p) for p in {bool(p) for _, p in ends}}
    except MemoryError:
        raise
    except BaseException:  # which a run for each text tells of, at its place
        return None
    cut = [pieces[:-1] for pieces in runs.values()]
    n_before = most - len(cut[0])  # messages that the loop does not pass
    if cut[0] != cut[-1] or not 0 <= n_before < ends[0][0] >= template.first_walked:
        return None
    return _parts_walked(cut[0], {p: run[-1] for p, run in runs.items()}, ends, n_before)


def _parts_walked(
    parts: list[str], last: dict[bool, str], ends: list[Any], n_before: int
) -> tuple[str, Iterator[tuple[int, str]]]:
    lengths = [0, *accumulate(map(len, parts))]

    def differences() -> Iterator[tuple[int, str]]:
        for (n0, before), (n1, prompt) in pairwise(ends):
            begin = n0 - n_before
            rest = "".join(parts[begin : n1 - n_before]) + last[bool(prompt)]
            n = n_common(last[bool(before)], rest)
            yield lengths[begin] + n, rest[n:]

    first, prompt = ends[0]
    return "".join(parts[: first - n_before]) + last[bool(prompt)], differences()


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
