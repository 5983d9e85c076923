"""The options of text generation, declared once: see gptc.settings.

The command line, the lines of --prompts and the Python API share them.
"""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass
from typing import ClassVar

from gptc.errors import UsageError
from gptc.settings import check, option

DEFAULT_STOP = ("<|endoftext|>",)
# Of an answer in a conversation, whose end is a token.
ANSWER_TOKENS, ANSWER_STOP = 2048, ()


@dataclass(frozen=True)
class Sampling:
    """The options for drawing the next token.

    Biases and penalties change the logits. Then the temperature applies, and the filters top_k,
    typical_p, top_p and min_p in this order, each to the tokens that the last one kept.
    """

    SECTION: ClassVar[str] = "Sampling"

    temperature: float = option(0.7, "Sampling temperature; 0 = greedy.", least=0)
    top_k: int = option(0, "Number of most likely tokens to keep; 0 = all.", least=0, below=2**31)
    top_p: float = option(
        1.0, "Total probability of the likeliest tokens to keep; 1 = all.", above=0, most=1
    )
    min_p: float = option(
        0.0,
        "Least probability to keep, as a share of the likeliest token's; 0 = all.",
        least=0,
        most=1,
    )
    seed: int = option(0, "Random seed.", least=0, below=2**63, shown="random")
    typical_p: float = option(
        1.0, "Total probability of the most typical tokens to keep; 1 = all.", above=0, most=1
    )
    repetition_penalty: float = option(
        1.0, "Divisor of the logits of tokens already used; 1 = none.", above=0
    )
    presence_penalty: float = option(
        0.0, "Amount to subtract from the logits of tokens already used."
    )
    frequency_penalty: float = option(
        0.0, "Amount to subtract from a token's logit for each time it was used."
    )
    penalty_last_n: int = option(
        64,
        "Number of last tokens, prompt included, that penalties count; 0 = all.",
        least=0,
        below=2**31,
    )
    bias: tuple[tuple[int, float], ...] = option(
        (),
        "Token id and number to add to its logit; -inf = never drawn. May be repeated.",
        flag="logit-bias",
        metavar="ID=X",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "bias", tuple((token, x) for token, x in self.bias))

    def check(self) -> None:
        """Raises UsageError for a value outside its range, or out of range in C."""
        check(self, number=_as_float32)

    @property
    def looks_back(self) -> bool:
        """Whether any penalty is set, so that a draw needs the earlier tokens."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1, 0, 0)


@dataclass(frozen=True)
class TextOptions:
    """The options for the number, length and form of samples."""

    SECTION: ClassVar[str] = "Text"

    max_tokens: int = option(
        256,
        "Largest number of tokens to generate.",
        least=1,
        shown=f"256; of an answer in a conversation {ANSWER_TOKENS}",
    )
    num_samples: int = option(1, "Number of samples.", least=1, most=10_000)
    stop: tuple[str, ...] = option(
        DEFAULT_STOP,
        r"Stop string, which ends a sample; \n = end of a line. May be repeated.",
        metavar="TEXT",
    )
    logprobs: int | None = option(
        None, "Log-probabilities of each token and of the N most likely ones.", least=0
    )
    context_shift: bool = option(False, "Continue from the newer half of a full context.")
    regex: str | None = option(
        None, "Regular expression that the text must match.", metavar="PATTERN"
    )
    grammar: str | None = option(
        None,
        "GBNF grammar, in a file or as it is; the text must match its rule root.",
        metavar="FILE",
    )
    json_schema: str | None = option(
        None,
        "JSON schema, in a file or as it is; the text must be JSON that it allows.",
        metavar="FILE",
    )
    PATTERNS: ClassVar[tuple[str, ...]] = ("regex", "grammar", "json_schema")

    def __post_init__(self) -> None:
        if isinstance(self.json_schema, dict | bool):
            try:
                object.__setattr__(self, "json_schema", json.dumps(self.json_schema))
            except (TypeError, ValueError, RecursionError) as error:
                raise UsageError(f"json_schema has no text in JSON: {error}") from None

    @property
    def patterns(self) -> dict[str, str]:
        """The patterns that the text must match, by kind: at most one is allowed."""
        given = {name: getattr(self, name) for name in self.PATTERNS}
        return {name: text for name, text in given.items() if text is not None}

    def check(self) -> None:
        """Raises UsageError for a value outside its range, or an empty stop string."""
        check(self)
        if "" in self.stop:
            raise UsageError("a stop string is empty: leave it out")


@dataclass(frozen=True)
class ChatOptions:
    """The options for conversations with a model that was taught a chat template."""

    SECTION: ClassVar[str] = "Conversation"

    chat: bool = option(False, "Conversation at the terminal, with commands such as /help.")
    messages: str | None = option(
        None,
        'JSON file of messages, such as [{"role": "user", "content": …}], to answer; - = standard '
        "input. With --chat, the beginning of the conversation.",
        metavar="FILE",
    )
    system: str | None = option(
        None, "System message, which begins the conversation.", metavar="TEXT"
    )
    chat_template: str | None = option(
        None, "Chat template: a file in Jinja, or the name of one of the model's.", metavar="FILE"
    )


def _as_float32(x: float) -> float:
    """The number rounded to float32; overflow gives infinity, underflow 0."""
    return ctypes.c_float(x).value if isinstance(x, float) else x
