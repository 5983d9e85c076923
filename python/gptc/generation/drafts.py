"""Drafts for speculative decoding (Leviathan et al. 2023).

A draft proposes several tokens. The model reads them in about the time of one token, draws its own
token after each, and accepts the draft up to the first difference. So the text is the same as
without a draft, only faster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gptc.errors import UsageError
from gptc.generation.sampling import sample_token
from gptc.tokenizer.compare import same_tokens

if TYPE_CHECKING:
    from gptc.engine.model import Model
    from gptc.generation.request import Sample
    from gptc.tokenizer.base import Tokenizer

MOST = 8  # tokens of a draft


class _Adaptive:
    """Adapts the draft's length to the number of tokens accepted last."""

    def __init__(self, first: int, most: int) -> None:
        self.n_guessed = 0
        self.n_right = 0
        self._most = most
        self._length = min(first, most)

    def learn(self, n_guessed: int, n_right: int) -> None:
        self.n_guessed += n_guessed
        self.n_right += n_right
        self._length = min(self._most, 2 * n_right + 1)


class NgramDraft(_Adaptive):
    """Proposes the tokens that followed the last few tokens earlier in the text.

    Saxena 2023, prompt lookup decoding.
    """

    def __init__(self, longest: int = 3, most: int = MOST) -> None:
        super().__init__(most, most)
        self._longest = longest
        self._samples: dict[int, Sample] = {}
        self._after: dict[int, dict[tuple[int, ...], int]] = {}
        self._n_seen: dict[int, int] = {}

    def guess(self, slot: int, sample: Sample, most: int) -> list[int]:
        """The tokens after the last occurrence of the longest repeated suffix; else none."""
        if self._samples.get(slot) is not sample:
            self._samples[slot], self._after[slot], self._n_seen[slot] = sample, {}, 0
        text, after = sample.sequence, self._after[slot]
        for end in range(self._n_seen[slot] + 1, len(text)):  # text[end] follows the n-gram
            for n in range(1, min(self._longest, end) + 1):
                after[tuple(text[end - n : end])] = end
        self._n_seen[slot] = max(0, len(text) - 1)
        length = min(most, self._length)
        for n in range(min(self._longest, len(text)), 0, -1):
            if (at := after.get(tuple(text[-n:]))) is not None:
                return text[at : at + length]
        return []


class ModelDraft(_Adaptive):
    """A smaller model with the same tokenizer.

    It draws with the sample's seed and positions, so that it agrees with the model more often.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer, n_seq: int = 1, n_ctx: int = 0, most: int = MOST
    ) -> None:
        super().__init__(4, most)
        self._n_ctx = min(n_ctx or model.config.block_size, model.config.block_size)
        self._session = model.session(n_seq, self._n_ctx)
        self._vocab_size = tokenizer.vocab_size
        self._texts: list[list[int]] = [[] for _ in range(n_seq)]

    def guess(self, slot: int, sample: Sample, most: int) -> list[int]:
        """The draft model's continuation; nothing if the text is longer than its context."""
        text = list(sample.sequence)
        length = min(most, self._length, self._n_ctx - len(text))
        if length < 1:
            return []
        held, same = self._texts[slot], 0
        while same < min(len(held), len(text) - 1) and held[same] == text[same]:
            same += 1
        self._session.rewind(slot, same)
        self._texts[slot] = text[:same]  # matches the cache at all times, even when interrupted
        grammar = sample.grammar
        n_taken = grammar.length if grammar else 0
        try:
            for _ in range(length):
                if grammar and (grammar.ended or not len(grammar.allowed)):
                    break
                feed = text[len(self._texts[slot]) :]
                logits = self._session.decode(np.array(feed, np.int32), slot)
                self._texts[slot] += feed
                allowed = (grammar.allowed,) if grammar else ()
                text.append(
                    sample_token(
                        logits, sample.sampling, len(text), self._vocab_size, text, *allowed
                    )
                )
                if grammar:
                    grammar.take(text[-1])
        finally:
            if grammar:
                grammar.rewind(n_taken)
        return text[len(sample.sequence) :]


def check_draft(
    model: Model, tokenizer: Tokenizer, draft: Model, draft_tokenizer: Tokenizer
) -> None:
    """Raises UsageError unless draft and model have the same tokens."""
    if not same_tokens(tokenizer, draft_tokenizer):
        raise UsageError(
            f"the draft's tokenizer ({draft_tokenizer.kind} of {draft_tokenizer.vocab_size}) "
            f"differs from the model's ({tokenizer.kind} of {tokenizer.vocab_size}): use a draft "
            "with the same tokenizer"
        )
    if draft.config.vocab_size < tokenizer.vocab_size:
        raise UsageError(
            f"the draft has {draft.config.vocab_size} tokens, the tokenizer "
            f"{tokenizer.vocab_size}: use a draft with as many"
        )
