"""A draft changes the speed of decoding, and not the text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from gptc import Model
from gptc.engine.config import GPTConfig
from gptc.errors import UsageError
from gptc.generation.decoder import generate
from gptc.generation.drafts import ModelDraft, NgramDraft, Wanted, check_draft
from gptc.generation.request import Sample, make_request
from gptc.generation.sampling import draw_tokens
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.registry import make_tokenizer
from small_models import varied

Config = Callable[..., GPTConfig]


@pytest.fixture(params=["fp32", "bf16"])
def writer(config: Config, request: pytest.FixtureRequest) -> Iterator[Model]:
    with varied(config(), dtype=request.param) as model:
        yield model


class Tally:
    """A draft of given tokens, every `wrong_every`-th of which is wrong."""

    def __init__(self, text: list[int], wrong_every: int) -> None:
        self.text, self.wrong_every = text, wrong_every
        self.n_guessed = self.n_right = 0

    def guess(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        return [self.continuation(sample, most) for _, sample, most in wanted]

    def continuation(self, sample: Sample, most: int) -> list[int]:
        at = len(sample.sequence)
        guess = list(self.text[at : at + min(most, 5)])
        return [(t + ((at + i) % self.wrong_every == 0)) % 256 for i, t in enumerate(guess)]

    def learn(self, n_guessed: int, n_right: int) -> None:
        self.n_guessed += n_guessed
        self.n_right += n_right


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("shift", [False, True])
def test_a_draft_changes_nothing_but_the_time(
    writer: Model, config: Config, tokenizer: Tokenizer, temperature: float, shift: bool
) -> None:
    options: dict[str, Any] = {
        "max_tokens": 90 if shift else 30, "temperature": temperature, "seed": 4, "stop": (),
        "context_shift": shift, "num_samples": 2, "frequency_penalty": 0.1,
    }  # fmt: skip
    alone = generate(writer, tokenizer, "ab ab ab", **options)
    request = make_request(writer, tokenizer, "ab ab ab", stop=())
    known = [*request.prompt, *tokenizer.encode(alone[0])]
    same = ModelDraft(writer, tokenizer, n_seq=2)
    with varied(config(n_layer=1), seed=9) as small:
        other = ModelDraft(small, tokenizer, n_seq=2)
        drafts: list[Any] = [same, other, NgramDraft(), Tally(known, 3), Tally(known, 10**9)]
        for draft in drafts:
            assert generate(writer, tokenizer, "ab ab ab", draft=draft, **options) == alone
    assert same.n_right == same.n_guessed > 30
    assert 0 <= other.n_right < other.n_guessed


def test_what_stood_there_before_is_guessed_again() -> None:
    def sample(text: list[int]) -> Any:
        return type("Text", (), {"sequence": text})()

    def guess(slot: int, text: Any, most: int) -> list[int]:
        return draft.guess([Wanted(slot, text, most)])[0]

    draft, text = NgramDraft(longest=3), sample([1, 2, 3, 4, 5, 1, 2])
    assert guess(0, text, 8) == [3, 4, 5, 1, 2]
    assert guess(0, text, 2) == [3, 4]
    text.sequence += [3, 9]
    assert guess(0, text, 8) == []
    text.sequence += [2, 3]  # occurred before 4, and later before 9
    assert guess(0, text, 2) == [9, 2]
    assert guess(0, sample([7, 8, 7]), 8) == [8, 7]  # independent of other texts
    assert guess(1, sample([1, 2, 4]), 8) == []


def test_a_draft_of_other_tokens_is_refused(writer: Model, tokenizer: Tokenizer) -> None:
    other = make_tokenizer("char", [b"some text"])
    with pytest.raises(UsageError, match="use a draft with the same tokenizer"):
        check_draft(writer, tokenizer, writer, other)
    check_draft(writer, tokenizer, writer, make_tokenizer("bytes"))


def test_a_draft_that_was_interrupted_goes_on(
    writer: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptc.generation import drafts as speculative

    draft = ModelDraft(writer, tokenizer)
    options: dict[str, Any] = {"max_tokens": 20, "stop": (), "draft": draft, "seed": 3}
    expected = generate(writer, tokenizer, "abc", **options)
    real, calls = draw_tokens, itertools.count()

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(speculative, "draw_tokens", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(writer, tokenizer, "abc", **options)
    monkeypatch.setattr(speculative, "draw_tokens", real)
    assert generate(writer, tokenizer, "ab", **options) == generate(
        writer, tokenizer, "ab", **{**options, "draft": None}
    )
    assert generate(writer, tokenizer, "abc", **options) == expected
