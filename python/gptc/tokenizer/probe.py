"""A fixed text, whose tokens tell whether two tokenizers are the same."""

from __future__ import annotations

import json
from collections.abc import Iterator

from gptc.errors import GptcError
from gptc.tokenizer.base import END_OF_TEXT, Tokenizer
from gptc.tokenizer.with_tokenizers import HuggingFaceTokenizer

_TEXTS = (
    "Hello world, it's the king's 1234th day: I'LL go!",
    "  two spaces, three   spaces,\n\n    lines\tand a tab \r\n end  ",
    "a",
    " a",
    "na\u00efve caf\u00e9, cafe\u0301, \ufb01ne \u00bd \uff21\uff11 \u00df\u0130",
    "\u65e5\u672c\u8a9e\u3002\u043f\u0440\u0438\u0432\u0435\u0442 "
    "\u0645\u0631\u062d\u0628\u0627 \U0001f600 \U0001f469\u200d\U0001f467\u00a0\u3000\u2028x",
    "def f(x):\n    return {'a': [1.5, -2]}  # https://a.b/c?d=e_f",
    "[PAD] <|im_end|>",
)
# SentencePiece's library does not find these in a text, other programs do.
_CONTROLS = ("<unk>", "<s>", "</s>", "<pad>")
_MOST_NAMES = 64  # tokens whose text is tried; there may be thousands


def check_tokens(ours: Tokenizer, theirs: Tokenizer, what: str) -> None:
    """GptcError when two tokenizers cut a text of the probe in different ways."""
    for text in probe(ours):
        if _tokens(ours, text) != _tokens(theirs, text):
            raise GptcError(f"{what} would cut {text!r} into other tokens")


def probe(tokenizer: Tokenizer) -> Iterator[str]:
    """Texts with spaces, accents, digits and the names of added tokens."""
    known = [text for text in _TEXTS if _tokens(tokenizer, text) is not None]
    if not known:  # a vocabulary of some characters
        known = [piece.decode("utf-8", "replace") for piece in tokenizer.pieces[:256]]
        known = ["".join(text for text in known if _tokens(tokenizer, text) is not None)]
    yield from known
    for name in _names(tokenizer):
        for text in (name, f"a {name} b", f"x{name}y", f"{name}{name}"):
            if _tokens(tokenizer, text) is not None:
                yield text


def _names(tokenizer: Tokenizer) -> list[str]:
    """Tokens that the tokenizer finds in a text before it cuts that text."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return [END_OF_TEXT] if tokenizer.start_text() == END_OF_TEXT else []
    added = json.loads(tokenizer.mapping()["definition"]).get("added_tokens") or []
    names = [entry["content"] for entry in added if entry["content"] not in _CONTROLS]
    # Those of no particular use, of which there are many, come last.
    names.sort(key=lambda name: "reserved" in name)
    return names[:_MOST_NAMES]


def _tokens(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """The tokens of a text; None where it cannot be expressed."""
    try:
        return [int(token) for token in tokenizer.encode(text)]
    except GptcError:
        return None
