"""The kinds of tokens in a dataset of conversations, and which of them are targets.

A shard's mask has a byte for each token: the bits SAID, LAST and FIRST of
tokenizer/conversations.py, and REJECTED at the first token of the worse of two answers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gptc.data.options import TrainOn
from gptc.tokenizer.conversations import FIRST, LAST, SAID, Kinds

REJECTED = 8


def is_target(kinds: Kinds, train_on: TrainOn) -> npt.NDArray[np.bool_]:
    """Whether each token (N,) is to be learned. The first of a sequence has no token before it."""
    first = (kinds & FIRST) > 0
    if train_on == "all":
        return ~first
    return ((kinds & (SAID if train_on == "assistant" else LAST)) > 0) & ~first
