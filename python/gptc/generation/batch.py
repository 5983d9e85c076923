"""Samples that one session decodes together. They join and leave between steps.

    batch = Batch(session, tokenizer)
    if batch.has_room(sample):
        batch.join(sample)
    while batch.active:
        for sample, piece in batch.step():
            print(sample.index, piece)

A step reads the tokens that each sample has not yet in its cache, and draws its next token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from gptc.errors import GptcError
from gptc.generation.drafts import Draft, Wanted
from gptc.generation.prefixes import n_reusable
from gptc.generation.request import Request, Sample
from gptc.generation.sampling import Draw, TokenLogprob, draw_tokens
from gptc.tokenizer.base import Tokenizer

if TYPE_CHECKING:
    from gptc.engine.arrays import FloatArray, TokenArray
    from gptc.engine.session import AdapterCopy, Session

# What a step gives for a row: its logits, or the token that was drawn from them.
_Given: TypeAlias = "FloatArray | tuple[int, TokenLogprob | None]"

# Rows of a step that read prompts, with those that decode. Above it, the products in fp32 are those
# of a library, whose results for a row depend on the number of rows.
MOST_ROWS = 64


@dataclass(eq=False)
class _Slot:
    """A sequence of the session."""

    index: int
    sample: Sample | None = None
    adapter: AdapterCopy | None = None
    begin: int = 0  # position in the sample's sequence at which the cache begins
    last: Sample | None = None  # the sample whose tokens are in the cache, ended or not
    prompt_of: Request | None = None  # the request whose prompt begins the cache
    used: int = 0  # when a sample began here or copied from here; 0 = never


@dataclass(eq=False)
class _Prompt:
    """The logits after a prompt and its scores, kept while samples of it wait to begin."""

    logits: FloatArray
    scores: list[TokenLogprob]
    n_waiting: int


@dataclass
class _Feed:
    """A slot's part of a step."""

    slot: _Slot
    tokens: list[int]
    guess: list[int]
    ends: bool  # the last token gets a row of logits, from which the next one is drawn

    @property
    def pooling(self) -> str | None:
        """That of the sample, if it is an embedding."""
        return self.slot.sample.request.pooling if self.slot.sample else None

    @property
    def want(self) -> list[bool]:
        """Whether each token's logits, or states, are needed."""
        sample = self.slot.sample
        if self.pooling == "mean":
            return [True] * len(self.tokens)
        scored = sample is not None and sample.unscored > 0
        return [scored] * (len(self.tokens) - 1) + [scored or self.ends] + [True] * len(self.guess)

    @property
    def place(self) -> int:
        """That among the feeds of a step."""
        return 1 if len(self.tokens) == 1 else 0 if self.ends else 2


def _rows(feeds: list[_Feed]) -> tuple[TokenArray, TokenArray, list[bool]]:
    """The tokens of a step, their sequences, and which of them are wanted."""
    each = [feed.tokens + feed.guess for feed in feeds]
    tokens = [token for some in each for token in some]
    seqs = np.repeat([feed.slot.index for feed in feeds], [len(some) for some in each])
    want = [wanted for feed in feeds for wanted in feed.want]
    return np.array(tokens, np.int32), seqs.astype(np.int32), want


class Batch:
    """The sequences of a session, each with at most one sample.

    A prompt with several samples is computed once. A sample ends when the n_ctx tokens of its cache
    are full. With context_shift it continues from their newer half, which is recomputed as a new
    prefix; if the text began with the tokenizer's `bos`, so does that prefix.

    With `keep`, a prompt that begins as another text did is computed from where the two differ.

    With `chunk`, prompts are read in blocks of so many tokens: in a step one block at least, and of
    other samples more up to MOST_ROWS rows. Blocks begin at multiples of `chunk`, whatever else the
    step has, and `keep` reuses only such blocks. So the logits of a text are its own.

    `masks` runs the grammars of samples during the step.

    The sample of a request with `pooling` is an embedding: it ends when its prompt is read. Its
    blocks are a call of the session after that of the texts.

    Samples of several adapters, or of none, are in one step.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        *,
        draft: Draft | None = None,
        keep: bool = False,
        chunk: int | None = None,
        masks: Executor | None = None,
    ) -> None:
        self.session = session
        self._tokenizer = tokenizer
        self._draft = draft
        self._keep = keep
        self._chunk = chunk
        self._masks = masks
        self._slots = [_Slot(i) for i in range(session.n_seq)]
        self._prompts: dict[Request, _Prompt] = {}
        self._n_joined = 0
        self.n_reused = 0
        """Tokens of prompts that were in a cache already."""
        self.n_read = 0
        """Tokens of prompts that were computed."""

    @property
    def active(self) -> list[Sample]:
        """The samples that have joined and not ended."""
        return [slot.sample for slot in self._slots if slot.sample]

    # ---- joining and leaving ----

    def has_room(self, sample: Sample) -> bool:
        """Whether a slot is free, and no other is about to compute the sample's prompt."""
        request = sample.request
        if sample.index > 0 and request not in self._prompts:
            for slot in self._slots:
                if slot.sample and slot.sample.request is request and slot.prompt_of is None:
                    return False
        return any(not slot.sample for slot in self._slots)

    def join(self, sample: Sample) -> Iterator[tuple[Sample, str]]:
        """Gives the sample a slot; yields its first piece if the prompt's logits are known."""
        request, n_ctx = sample.request, self.session.n_ctx
        if len(request.prompt) > n_ctx and not request.options.context_shift:
            raise GptcError(
                f"the prompt has {len(request.prompt):,} tokens; the cache holds {n_ctx:,}: "
                "shorten it, or use a longer n_ctx"
            )
        known = self._prompts.get(request)
        n_prompt, reachable = len(request.prompt), self.session.reachable
        having = (slot for slot in self._slots if slot.prompt_of is request)
        with_prompt = next((s for s in having if reachable(s.index, n_prompt)), None)
        source, n_known = (with_prompt, n_prompt) if known else self._held(sample)
        slot = self._choose(source, n_known)
        self._n_joined += 1
        slot.used = self._n_joined
        if source and n_known and source is not slot:
            source.used = self._n_joined
            self.session.fork(source.index, slot.index, n_known)
        else:
            self.session.rewind(slot.index, n_known if source is slot else 0)
        if request.adapter is not slot.adapter:
            self.session.adapt(slot.index, request.adapter)
            slot.adapter = request.adapter
        slot.sample, slot.begin, slot.last = sample, 0, sample
        if known:
            sample.prompt_logprobs = list(known.scores)
            known.n_waiting -= 1
            if known.n_waiting == 0:
                del self._prompts[request]
        slot.prompt_of = request if known and source else None
        if slot.prompt_of:
            assert known
            yield from self._advance(slot, known.logits)
        else:
            self.n_reused += n_known if source else 0

    def leave(self, sample: Sample) -> None:
        """Ends a sample; the next one can have its slot. Its cache stays for prompts like it."""
        for slot in self._slots:
            if slot.sample is sample:
                slot.sample = None

    def clear(self) -> None:
        """Ends all samples."""
        self._prompts = {}
        for slot in self._slots:
            slot.sample = slot.prompt_of = None

    def reset(self) -> None:
        """Ends all samples and empties their caches, after a step that failed."""
        self.clear()
        for slot in self._slots:
            slot.last = None
            self.session.rewind(slot.index, 0)

    def keep_only(self, adapters: Collection[AdapterCopy]) -> None:
        """Empties the caches of other adapters that no sample uses, so that those can be freed."""
        for slot in self._slots:
            if not slot.sample and slot.adapter and slot.adapter not in adapters:
                self.session.rewind(slot.index, 0)
                self.session.adapt(slot.index, None)
                slot.last = slot.adapter = slot.prompt_of = None

    def forget(self, request: Request) -> None:
        """Drops the logits kept for samples of a request that will not join."""
        self._prompts.pop(request, None)

    def _choose(self, source: _Slot | None, n_known: int) -> _Slot:
        """The free slot for a sample whose first tokens `source` holds.

        That slot if it would lose nothing, else the one that was used longest ago.
        """
        free = [slot for slot in self._slots if not slot.sample]
        if source in free and source:
            others = [slot for slot in free if slot is not source]
            if not others or source.prompt_of or self.session.length(source.index) <= n_known:
                return source
            free = others
        return min(free, key=lambda slot: slot.used)

    def _held(self, sample: Sample) -> tuple[_Slot | None, int]:
        """The slot whose cache shares most of a sample's prompt, and how many tokens."""
        if not self._keep or sample.unscored or sample.request.pooling == "mean":
            return None, 0
        prompt, adapter, block = sample.request.prompt, sample.request.adapter, self._chunk or 1
        shared = [(n_reusable(self._cached(s, adapter), prompt, block), s) for s in self._slots]
        shared = [(self.session.reachable(slot.index, n), slot) for n, slot in shared]
        n_known, source = max(shared, key=lambda pair: pair[0])
        return (source, n_known) if n_known else (None, 0)

    def _cached(self, slot: _Slot, adapter: AdapterCopy | None) -> list[int]:
        """The tokens of a cache that another prompt of this adapter may use.

        The last token of a sequence was never read; in its place there may be those of a draft.
        """
        if slot.last is None or slot.begin or slot.last.request.adapter is not adapter:
            return []
        sequence = slot.last.sequence
        n_sure = min(self.session.length(slot.index), len(sequence) - 1)
        if self._chunk:
            n_sure = min(n_sure, len(slot.last.request.prompt))
        return sequence[:n_sure]

    # ---- a step ----

    def step(self) -> Iterator[tuple[Sample, str]]:
        """Yields (sample, piece of text) as pieces are decoded, and once when a sample ends."""
        feeds = self._feeds([slot for slot in self._slots if slot.sample])
        texts = [feed for feed in feeds if not feed.pooling]
        pools = [feed for feed in feeds if feed.pooling]
        if texts:
            yield from self._write(texts)
        if pools:
            yield from self._pool(pools)

    def _pool(self, feeds: list[_Feed]) -> Iterator[tuple[Sample, str]]:
        """Reads the prompts of embeddings; yields those that have ended."""
        states = self.session.states(*_rows(feeds))
        row = 0
        for feed in feeds:
            n, sample = sum(feed.want), feed.slot.sample
            assert sample
            sample.pool(states[row : row + n])
            row += n
            if feed.ends:
                sample.finish, feed.slot.sample = "stop", None
                yield sample, ""

    def _write(self, feeds: list[_Feed]) -> Iterator[tuple[Sample, str]]:
        """Continues texts by a token each, or by a block of their prompts."""
        tokens, seqs, want = _rows(feeds)
        samples = [feed.slot.sample for feed in feeds if feed.ends]
        states = [sample.grammar for sample in samples if sample and sample.grammar]
        made = [self._masks.submit(state.prepare) for state in states] if self._masks else []
        given: Sequence[_Given]
        draws = self._draws(feeds)
        if draws:
            given = draw_tokens(self.session, tokens, seqs, want, draws)
        else:
            given = list(self.session.decode(tokens, seqs, want))
        for mask in made:
            mask.result()
        row = 0
        for feed in feeds:
            n = sum(feed.want)
            yield from self._check(feed, given[row : row + n])
            row += n

    def _feeds(self, active: list[_Slot]) -> list[_Feed]:
        """What each slot reads in this step; prompts wait for their turn, the oldest first."""
        whole = [(slot, self._unread(slot)) for slot in active]
        n_decoded = sum(len(tokens) == 1 for _, tokens in whole)
        room = max(1, MOST_ROWS - n_decoded)
        feeds: dict[int, _Feed] = {}
        for slot, tokens in sorted(whole, key=lambda pair: pair[0].used):
            assert slot.sample
            n = len(tokens)
            if n > 1 and self._chunk:
                if room <= 0:
                    continue
                n = min(n, self._chunk)
                room = room - n if room - n >= self._chunk else 0
            feed = _Feed(slot, tokens[:n], [], n == len(tokens))
            if slot.sample.n_tokens == 0:
                self.n_read += n
            feeds[slot.index] = feed
        self._guess(list(feeds.values()))
        first: dict[AdapterCopy | None, int] = {}
        for index in sorted(feeds):
            first.setdefault(self._slots[index].adapter, index)
        # Those of an adapter are neighbours; among them the wanted rows, which the head reads its
        # weights for once: the last of a prompt, then the single tokens, then other prompts.
        return sorted(
            feeds.values(),
            key=lambda feed: (first[feed.slot.adapter], feed.place, feed.slot.index),
        )

    def _unread(self, slot: _Slot) -> list[int]:
        """The tokens of the sample that are not yet in the cache."""
        sample, n_ctx = slot.sample, self.session.n_ctx
        assert sample
        if len(sample.sequence) - slot.begin > n_ctx:
            self.session.rewind(slot.index, 0)
            slot.begin = len(sample.sequence) - max(1, n_ctx // 2)
            slot.prompt_of = None
            half = sample.sequence[slot.begin :]
            if sample.sequence[0] == self._tokenizer.bos and len(half) > 1:
                half[0] = sample.sequence[0]
            return half
        return sample.sequence[slot.begin + self.session.length(slot.index) :]

    def _guess(self, feeds: list[_Feed]) -> None:
        """Adds drafts to the feeds of one token, as far as the step has room for their rows."""
        alone = [feed for feed in feeds if len(feed.tokens) == 1 and not feed.pooling]
        if not self._draft or not alone:
            return
        room = (MOST_ROWS - sum(len(feed.tokens) for feed in feeds)) // len(alone)
        wanted, guessing = [], []
        for feed in alone:
            slot, sample = feed.slot, feed.slot.sample
            assert sample
            left = self.session.n_ctx - (len(sample.sequence) - slot.begin)
            most = min(room, left, sample.request.options.max_tokens - sample.n_tokens - 1)
            if feed.ends and most > 0:
                wanted.append(Wanted(slot.index, sample, most))
                guessing.append(feed)
        if wanted:
            for feed, guess in zip(guessing, self._draft.guess(wanted), strict=True):
                feed.guess = guess

    def _draws(self, feeds: list[_Feed]) -> list[Draw] | None:
        """A draw for each row of the step; None if the logits of one are needed here."""
        draws: list[Draw] = []
        for feed in feeds:
            sample = feed.slot.sample
            assert sample
            if sample.unscored:
                return None
            if feed.ends:
                of_sample = sample.draws(feed.guess)
                if of_sample is None or self._others(feed.slot, sample):
                    return None
                draws += of_sample
        return draws

    def _check(self, feed: _Feed, given: Sequence[_Given]) -> Iterator[tuple[Sample, str]]:
        """Takes one token after another, until one differs from the draft.

        So a draft changes the speed and never the text.
        """
        slot, guess, sample = feed.slot, feed.guess, feed.slot.sample
        assert sample
        if sample.unscored:
            for row in given[: len(feed.tokens)]:
                assert not isinstance(row, tuple)
                sample.score(row)
            given = given[len(feed.tokens) - 1 :]
        if not feed.ends:
            return
        self._remember_prompt(slot, sample, given[0])
        n_right = 0
        for i in range(len(given)):
            yield from self._advance(slot, given[i])
            if sample.finish or i == len(guess) or sample.sequence[-1] != guess[i]:
                break
            n_right += 1
        if self._draft and guess:
            self._draft.learn(len(guess), n_right)
            if not sample.finish:
                self.session.rewind(slot.index, len(sample.sequence) - 1 - slot.begin)

    def _advance(self, slot: _Slot, given: _Given) -> Iterator[tuple[Sample, str]]:
        """Appends the next token: drawn already, or from its logits."""
        sample, n_ctx = slot.sample, self.session.n_ctx
        assert sample
        if isinstance(given, tuple):
            piece = sample.take(*given, n_ctx)
        else:
            piece = sample.advance(given, n_ctx)
        if sample.finish:
            slot.sample = None
        if piece or sample.finish:
            yield sample, piece

    def _others(self, slot: _Slot, sample: Sample) -> int:
        """The number of samples that wait for the logits after this one's prompt."""
        request = sample.request
        first = sample.n_tokens == 0 and slot.begin == 0 and slot.prompt_of is None
        if not first or request in self._prompts:
            return 0
        return request.options.num_samples - sample.index - 1

    def _remember_prompt(self, slot: _Slot, sample: Sample, given: _Given) -> None:
        """Keeps the logits after the first sample's prompt, for the request's other samples."""
        if sample.n_tokens == 0 and slot.begin == 0 and slot.prompt_of is None:
            if (others := self._others(slot, sample)) and not isinstance(given, tuple):
                scores = sample.prompt_logprobs
                self._prompts[sample.request] = _Prompt(given.copy(), scores, others)
            slot.prompt_of = sample.request
