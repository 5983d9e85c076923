"""How text is written, declared once: see gptc.settings.

The command line, the lines of --prompts and the Python API take these same options.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from gptc.settings import check, option, spelled

DEFAULT_STOP = ("<|endoftext|>",)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Biases and penalties change the logits. Then come the temperature and the filters top_k,
    typical_p, top_p and min_p, each on what the one before has left.
    """

    temperature: float = option(0.7, "Sampling temperature; 0 = greedy.", least=0)
    top_k: int = option(0, "Keep the N most likely tokens; 0 = all.", least=0, below=2**31)
    top_p: float = option(
        1.0, "Keep the fewest tokens with this much probability; 1 = all.", above=0, most=1
    )
    min_p: float = option(
        0.0,
        "Drop tokens less likely than this share of the most likely one; 0 = none.",
        least=0,
        most=1,
    )
    seed: int = option(0, "Random seed.", least=0, below=2**63, shown="random")
    typical_p: float = option(
        1.0, "Keep the most typical tokens with this much probability; 1 = all.", above=0, most=1
    )
    repetition_penalty: float = option(
        1.0, "Divides the logits of tokens already used; 1 = none.", above=0
    )
    presence_penalty: float = option(0.0, "Subtracted from the logits of tokens already used.")
    frequency_penalty: float = option(
        0.0, "Subtracted from a token's logit for each time it was used."
    )
    penalty_last_n: int = option(
        64,
        "Number of tokens that penalties look back, prompt included; 0 = all.",
        least=0,
        below=2**31,
    )
    bias: tuple[tuple[int, float], ...] = option(
        (),
        "Number added to a token's logit; -inf = never drawn. May be repeated.",
        flag="logit-bias",
        metavar="ID=X",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "bias", tuple((token, x) for token, x in self.bias))

    def check(self) -> None:
        """UsageError for a value outside its range, or outside of what C can hold."""
        check(self, spelled, number=_as_float32)

    @property
    def looks_back(self) -> bool:
        """Whether a draw depends on earlier tokens other than through the logits."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1, 0, 0)


@dataclass(frozen=True)
class TextOptions:
    """How many texts are written, how long they are, and what they must match."""

    max_tokens: int = option(256, "Most tokens to write.", least=1)
    num_samples: int = option(1, "Number of samples.", least=1)
    stop: tuple[str, ...] = option(
        DEFAULT_STOP, "Text that ends a sample. May be repeated.", metavar="TEXT"
    )
    logprobs: int | None = option(
        None, "Log-probabilities of each token and of the N most likely ones.", least=0
    )
    context_shift: bool = option(False, "When the context is full, continue from its newer half.")
    regex: str | None = option(None, "Regular expression that the text matches.", metavar="PATTERN")
    grammar: str | None = option(
        None, "Grammar in GBNF whose rule root the text matches.", metavar="FILE"
    )

    def check(self) -> None:
        """UsageError for a value outside its range."""
        check(self, spelled)


def _as_float32(x: float) -> float:
    """The number as C will hold it: too large a one is infinite, too small a one 0."""
    return ctypes.c_float(x).value if isinstance(x, float) else x
