"""Drafts for speculative decoding (Leviathan et al. 2023).

A draft proposes several tokens. The model reads them in about the time of one token, draws its own
token after each, and accepts the draft up to the first difference. So the text is the same as
without a draft, only faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from gptc.engine.session import session_bytes
from gptc.errors import DeadEnd, UsageError
from gptc.generation.prefixes import n_common
from gptc.generation.sampling import Draw, draw_tokens, sample_token
from gptc.tokenizer.compare import same_tokens

if TYPE_CHECKING:
    from gptc.engine.arrays import FloatArray
    from gptc.engine.model import Model
    from gptc.generation.request import Sample
    from gptc.tokenizer.base import Tokenizer

MOST = 8  # tokens of a draft


class Wanted(NamedTuple):
    """A sample that a draft is wanted for, of at most so many tokens."""

    slot: int
    sample: Sample
    most: int


class Draft(Protocol):
    """Proposes the next tokens of a sample, for the model to check in one step."""

    n_guessed: int
    n_right: int

    def guess(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """The draft tokens of each, perhaps none. A slot holds one sample at a time."""
        ...

    def learn(self, n_guessed: int, n_right: int) -> None:
        """Reports that `n_right` of `n_guessed` draft tokens were accepted."""
        ...


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

    def guess(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """The tokens after the last occurrence of the longest repeated suffix; else none."""
        return [self._continue(*each) for each in wanted]

    def _continue(self, slot: int, sample: Sample, most: int) -> list[int]:
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

    def guess(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """The draft model's continuations, in one step for all samples a token.

        None for a text that is longer than its context.
        """
        drafts = [_Growing(each, self._length_of(each)) for each in wanted]
        for draft in drafts:
            self._keep_common(draft)
        try:
            while open := [draft for draft in drafts if draft.is_open]:
                self._grow(open)
        finally:
            for draft in drafts:
                draft.end()
        return [draft.text[len(draft.sample.sequence) :] for draft in drafts]

    def _length_of(self, wanted: Wanted) -> int:
        return min(wanted.most, self._length, self._n_ctx - len(wanted.sample.sequence))

    def _keep_common(self, draft: _Growing) -> None:
        """Rewinds the slot's cache to the tokens that it has in common with the sample."""
        same = min(n_common(self._texts[draft.slot], draft.text), len(draft.text) - 1)
        same = self._session.reachable(draft.slot, same)
        self._session.rewind(draft.slot, same)
        # Matches the cache at all times, even when interrupted.
        self._texts[draft.slot] = draft.text[:same]

    def _grow(self, drafts: list[_Growing]) -> None:
        """Appends a token to each draft."""
        feeds = [draft.text[len(self._texts[draft.slot]) :] for draft in drafts]
        tokens = np.array([token for feed in feeds for token in feed], np.int32)
        slots = [draft.slot for draft in drafts]
        seqs = np.repeat(slots, [len(feed) for feed in feeds]).astype(np.int32)
        want = np.append(seqs[1:] != seqs[:-1], True)
        if any(draft.sample.grammar for draft in drafts):
            rows = self._session.decode(tokens, seqs, want)
            found = [
                draft.drawn(row, self._vocab_size) for draft, row in zip(drafts, rows, strict=True)
            ]
        else:
            draws = [draft.draw(self._vocab_size) for draft in drafts]
            drawn = draw_tokens(self._session, tokens, seqs, want, draws)
            found = [token for token, _ in drawn]
        for draft, feed, token in zip(drafts, feeds, found, strict=True):
            self._texts[draft.slot] += feed
            draft.take(token)


@dataclass(frozen=True)
class DraftPlan:
    """A draft of `n_seq` sequences, whose length is chosen later. Without a model: n-grams."""

    model: Model | None = None
    tokenizer: Tokenizer | None = None
    n_seq: int = 1

    def make(self, n_ctx: int) -> NgramDraft | ModelDraft:
        """The draft for sequences of so many tokens; 0 = those of the model's context."""
        if self.model is None or self.tokenizer is None:
            return NgramDraft()
        return ModelDraft(self.model, self.tokenizer, self.n_seq, n_ctx)

    def session_bytes(self, n_ctx: int) -> int:
        """Number of bytes that `make` allocates for its caches."""
        if self.model is None:
            return 0
        return session_bytes(self.model, self.n_seq, min(n_ctx, self.model.config.block_size))


class _Growing:
    """A draft while a model writes it. With a grammar, it follows that of the sample."""

    def __init__(self, wanted: Wanted, length: int) -> None:
        self.slot, self.sample = wanted.slot, wanted.sample
        self.text = list(wanted.sample.sequence)
        self._end = len(self.text) + length
        self._grammar = wanted.sample.grammar
        self._n_taken = self._grammar.length if self._grammar else 0

    @property
    def is_open(self) -> bool:
        """Whether another token is wanted, and possible."""
        if len(self.text) >= self._end:
            return False
        if not self._grammar:
            return True
        with suppress(DeadEnd):  # of the draft only; the sample may still continue
            return not self._grammar.ended and len(self._grammar.allowed) > 0
        return False

    def draw(self, vocab_size: int) -> Draw:
        """The draw of the next token: with the sample's seed, at its position."""
        return Draw(self.sample.sampling, len(self.text), vocab_size, list(self.text), None)

    def drawn(self, logits: FloatArray, vocab_size: int) -> int:
        """The same, of logits."""
        allowed = (self._grammar.allowed,) if self._grammar else ()
        return sample_token(
            logits, self.sample.sampling, len(self.text), vocab_size, self.text, *allowed
        )

    def take(self, token: int) -> None:
        """Appends a token."""
        self.text.append(token)
        if self._grammar:
            self._grammar.take(token)

    def end(self) -> None:
        """Leaves the sample's grammar as it was."""
        if self._grammar:
            self._grammar.rewind(self._n_taken)


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
