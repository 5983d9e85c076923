"""The tokens that a regex, a grammar or a JSON schema allows after a text, by llguidance.

    constraint = make_constraint(tokenizer, tokenizer.vocab_size, regex="[0-9]+")
    state = constraint.begin()
    while not state.ended:
        state.take(one_of(state.allowed))

llguidance reads the bytes of tokens. Special tokens never count as text, and end tokens are ours:
they may follow when the text is complete.
"""

from __future__ import annotations

import importlib
import json
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from gptc.errors import DeadEnd, GptcError, Uncopied, UsageError, half_a_pair
from gptc.files.limits import limit, refuse
from gptc.files.words import pip_install
from gptc.generation import gbnf
from gptc.generation.multiples import check_multiples
from gptc.tokenizer.base import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

T = TypeVar("T")
Ints: TypeAlias = npt.NDArray[np.integer[Any]]
# Work: the symbols of a grammar, states of its lexer, parses of a text, and steps for one mask.
LIMITS = {
    "max_grammar_size": 20_000,
    "initial_lexer_fuel": 30_000,
    "max_lexer_states": 50_000,
    "max_items_in_row": 1000,
    "step_max_items": 10_000,
    "step_lexer_fuel": 200_000,
    "verbose_errors": False,
}
_STACK_BYTES = 512 << 20  # of which only what a pattern needs is used
_BYTES = tuple(bytes([i]) for i in range(256))
_LONGEST = 1024  # bytes of a token; longer ones are never drawn
_MOST_LISTED = 8  # characters in a message
# As docs/json.gbnf has it: one space, or one newline with its indentation, so whitespace ends.
_LAYOUT = {"whitespace_pattern": " |\n {0,20}"}


class Constraint(Uncopied):
    """A pattern applied to a vocabulary."""

    def __init__(self, pieces: Sequence[bytes], ends: Sequence[int], rules: str, kind: str) -> None:
        """`pieces` are the tokens' bytes, b"" for special ones; `ends` are the end tokens.

        `rules` is the pattern in llguidance's Lark, `kind` its name in errors. UsageError if it is
        invalid or too large, or if only the empty text matches. DeadEnd if no token can begin.
        """
        self.pieces = pieces
        self.ends = np.array(ends, np.int64)
        self._rules = rules
        self.kind = kind
        self.matcher = self._matcher(_vocabulary(tuple(pieces)))
        state = self.begin()
        if state.ended or not len(state.allowed):
            if self.coming(b""):
                raise state.dead_end()
            found = "only the empty text" if state.complete else "no text"
            raise UsageError(f"{found} matches the {kind}: allow at least one character")

    def begin(self) -> GrammarState:
        """The state of an empty text."""
        return GrammarState(self)

    def _matcher(self, vocabulary: LLTokenizer) -> LLMatcher:
        library = _library()
        limits = library.LLParserLimits(**LIMITS)
        matcher: LLMatcher = _on_a_large_stack(
            lambda: library.LLMatcher(vocabulary, self._rules, log_level=0, limits=limits)
        )
        if matcher.is_error():
            reason = _reason(matcher.get_error())
            raise UsageError(f"the {self.kind} is refused: {reason}; correct or simplify it")
        return matcher

    def coming(self, text: bytes) -> list[str]:
        """Allowed next characters for a message: one for each first byte."""
        matcher = self._matcher(_vocabulary(_BYTES))
        matcher.consume_tokens(list(text))
        found = []
        for byte in np.flatnonzero(_mask(matcher, 256)).tolist():
            char, here = bytes([byte]), matcher.deep_copy()
            here.consume_token(byte)
            while byte >= 0xC0 and not _is_utf8(char) and len(char) < 4:
                more = int(_mask(here, 256).argmax())
                here.consume_token(more)
                char += bytes([more])
            found.append(repr(char.decode()) if _is_utf8(char) else f"byte 0x{byte:02X}")
        return found


def _on_a_large_stack(call: Callable[[], T]) -> T:
    """The result of a call that recurses as deep as a pattern is nested."""
    with ThreadPoolExecutor(1) as pool:
        before = threading.stack_size(_STACK_BYTES)
        try:
            result = pool.submit(call)
        finally:
            threading.stack_size(before)
        return result.result()


class GrammarState(Uncopied):
    """The tokens that may follow one text."""

    def __init__(self, constraint: Constraint) -> None:
        self._constraint = constraint
        self._matcher = constraint.matcher.deep_copy()
        self._taken: list[int] = []
        self._allowed: Ints | None = None

    @property
    def allowed(self) -> Ints:
        """Ids of the tokens that may follow, sorted; with end tokens if the text is complete.

        Empty at a dead end. DeadEnd if the text can be parsed in too many ways.
        """
        if self._allowed is None:
            complete = self.complete
            mask = _mask(self._matcher, len(self._constraint.pieces))
            mask[self._constraint.ends] = complete
            self._allowed = np.flatnonzero(mask)
        return self._allowed

    def prepare(self) -> None:
        """Finds `allowed` now, perhaps in another thread; an error is left to the next use."""
        with suppress(DeadEnd):
            _ = self.allowed

    @property
    def complete(self) -> bool:
        """Whether the text matches as a whole."""
        return bool(self._matcher.is_accepting())

    @property
    def ended(self) -> bool:
        """Whether the text is complete and no token but an end can follow."""
        return self.complete and len(self.allowed) == len(self._constraint.ends)

    def take(self, token: int) -> None:
        """Appends an allowed token."""
        self._taken.append(token)
        self._allowed = None
        self._matcher.consume_token(token)

    @property
    def length(self) -> int:
        """Number of tokens taken."""
        return len(self._taken)

    def rewind(self, length: int) -> None:
        """Keeps the first `length` tokens and drops the others."""
        kept, dropped = self._taken[:length], self._taken[length:]
        if dropped and not self._matcher.rollback(len(dropped)):  # after a failure
            self._matcher = self._constraint.matcher.deep_copy()
            self._matcher.consume_tokens(kept)
        self._taken, self._allowed = kept, None

    def dead_end(self) -> DeadEnd:
        """The error for an incomplete text that no token continues."""
        text = b"".join(self._constraint.pieces[token] for token in self._taken)
        coming = self._constraint.coming(text)
        listed = ", ".join(coming[:_MOST_LISTED])
        more = ", …" if len(coming) > _MOST_LISTED else ""
        shown = text.decode("utf-8", "replace")[-60:]
        begun = f"no token fits after {shown!r}" if text else "no token can begin the text"
        return DeadEnd(f"{begun}: the rules allow {listed}{more}; use a different tokenizer")


def _mask(matcher: LLMatcher, n: int) -> npt.NDArray[np.bool_]:
    """Whether each id below n is allowed, (n,). DeadEnd if finding out is too much work."""
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    if matcher.is_error():
        error = matcher.get_error()
        if "NoExtension" not in error:
            raise DeadEnd(
                "the text can be parsed in too many ways: let the alternatives begin with "
                f"different characters ({_reason(error)})"
            )
        return np.zeros(n, bool)
    return np.unpackbits(bits, count=n, bitorder="little").view(bool)


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


class _Vocabulary:
    """What llguidance asks of a tokenizer. Its own end token follows ours."""

    is_tokenizer_wrapper = True
    eos_token_id = None
    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = tokens

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError  # only to force tokens, which _HEADER forbids


@lru_cache(maxsize=4)
def _vocabulary(pieces: tuple[bytes, ...]) -> LLTokenizer:
    fit = [piece if len(piece) <= _LONGEST else b"" for piece in pieces]
    made: LLTokenizer = _library().LLTokenizer(_Vocabulary(fit))
    return made


def _library() -> Any:
    """The module llguidance. GptcError if it is not installed."""
    try:
        return importlib.import_module("llguidance")
    except ImportError:
        raise GptcError(
            "a regex, a grammar or a JSON schema needs a package: "
            + pip_install("'llguidance>=1.8'")
        ) from None


# ---- patterns ----

_HEADER = (
    '%llguidance {"no_forcing": true}\n'  # any tokens of a forced text, not only the usual ones
)


def check_pattern(kind: str, text: str) -> None:
    """UsageError for a pattern that no vocabulary can match; `kind` as in `make_constraint`."""
    Constraint(_BYTES, (), _lark(kind, text), _named(kind))


def _lark(kind: str, text: str) -> str:
    """The pattern in llguidance's Lark. GptcError for one that is too large."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise UsageError(
            f"character {error.start} of the {_named(kind)} is {half_a_pair(error)}"
        ) from None
    if size > limit("pattern"):
        raise refuse(f"the {_named(kind)} of {size:,} bytes", "pattern", "simplify it")
    return _HEADER + {"regex": _of_regex, "grammar": gbnf.lark, "json_schema": _of_schema}[kind](
        text
    )


def _of_regex(text: str) -> str:
    return f"start: TEXT\nTEXT: /{_library().regex_to_lark(text, 'dws')}/\n"


def _of_schema(text: str) -> str:
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise UsageError(f"the JSON schema is not JSON: {error}") from None
    except RecursionError:
        raise UsageError("the JSON schema is nested too deeply: simplify it") from None
    schema = {} if schema is True else schema
    if not isinstance(schema, dict):
        raise UsageError('the JSON schema is not an object, such as {"type": "object"}')
    check_multiples(schema)
    layout = schema.get("x-guidance", {})
    if isinstance(layout, dict) and not layout.keys() & {"whitespace_flexible", *_LAYOUT}:
        schema = {**schema, "x-guidance": {**_LAYOUT, **layout}}
    return f"start: %json {json.dumps(schema)}\n"


def _named(kind: str) -> str:
    return "JSON schema" if kind == "json_schema" else kind


def _reason(error: str) -> str:
    """The line of llguidance's error that says what is wrong, without the pattern."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    first = re.sub(r"^(at )?\d+\(\d+\): ", "", lines[0]) if lines else "unknown"
    return (named or [first])[0][:300]


def make_constraint(tokenizer: Tokenizer, n_tokens: int, **patterns: str) -> Constraint:
    """The constraint of a pattern: `regex`, `grammar` or `json_schema`.

    Only the first `n_tokens` tokens can be drawn. UsageError if several are given or one is
    invalid; GptcError without llguidance.
    """
    if len(patterns) > 1:
        names = " and a ".join(map(_named, patterns))
        raise UsageError(f"a {names} exclude each other: give one of them")
    ((kind, text),) = patterns.items()
    return _constraint(tokenizer, n_tokens, kind, text)


@lru_cache(maxsize=8)
def _constraint(tokenizer: Tokenizer, n_tokens: int, kind: str, text: str) -> Constraint:
    rules = _lark(kind, text)
    pieces = list(tokenizer.pieces[:n_tokens])
    for token in tokenizer.specials:
        if token < n_tokens:
            pieces[token] = b""
    ends = sorted(end for end in tokenizer.ends if end < n_tokens)
    return Constraint(pieces, ends, rules, _named(kind))
