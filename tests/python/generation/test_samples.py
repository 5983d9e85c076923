"""The same call writes the same text, and the context, stop strings and end-of-text end it."""

from __future__ import annotations

from typing import Any

import pytest

from gptc import Model
from gptc.errors import GptcError
from gptc.generation import batch
from gptc.generation.decoder import Generation, generate, stream
from gptc.generation.options import Sampling
from gptc.generation.request import make_request
from gptc.generation.sampling import draw_tokens
from gptc.tokenizer.base import Tokenizer
from scripted import Script

# ---- whole samples ----


def test_the_same_call_writes_the_same_text(writer: Model, tokenizer: Tokenizer) -> None:
    one = generate(writer, tokenizer, "Once", max_tokens=30, seed=4)
    assert one == generate(writer, tokenizer, "Once", max_tokens=30, seed=4)
    assert one != generate(writer, tokenizer, "Once", max_tokens=30, seed=5)
    assert "".join(stream(writer, tokenizer, "Once", max_tokens=30, seed=4)) == one[0]


def test_samples_of_a_batch_are_those_of_their_seeds(writer: Model, tokenizer: Tokenizer) -> None:
    several = generate(writer, tokenizer, "Once", max_tokens=20, seed=7, num_samples=4)
    single = [generate(writer, tokenizer, "Once", max_tokens=20, seed=7 + i)[0] for i in range(4)]
    assert several == single
    assert len(set(several)) == 4


def test_samples_may_end_at_different_times(
    writer: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_ends(*step: Any) -> list[tuple[int, None]]:
        drawn = []
        for draw, (token, _) in zip(step[-1], draw_tokens(*step), strict=True):
            ends = draw.sampling.seed % 2 and draw.position == 5
            drawn.append((ord("#") if ends else ord("+") if token == ord("#") else token, None))
        return drawn

    monkeypatch.setattr(batch, "draw_tokens", with_ends)
    options: dict[str, Any] = {"max_tokens": 12, "stop": ("#",)}
    generation = Generation(
        writer, tokenizer, "abc", num_samples=4, sampling=Sampling(seed=0), **options
    )
    for _ in generation:
        pass
    assert [s.finish for s in generation.samples] == ["length", "stop", "length", "stop"]
    assert [len(s.tokens) for s in generation.samples] == [12, 3, 12, 3]
    for sample in generation.samples:
        assert [sample.text] == generate(writer, tokenizer, "abc", seed=sample.index, **options)


def test_the_rows_of_a_step_that_are_drawn_from_are_neighbours(
    writer: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[list[int], list[bool]]] = []

    def seen(*step: Any) -> list[tuple[int, Any]]:
        steps.append((list(step[2]), list(step[3])))
        return draw_tokens(*step)

    monkeypatch.setattr(batch, "draw_tokens", seen)
    options: dict[str, Any] = {"max_tokens": 6, "sampling": Sampling(seed=1)}
    with writer.session(4) as session:
        together = batch.Batch(session, tokenizer, chunk=4)
        samples = []
        for text in ("abc" * 5, "b", "c" * 13, "de" * 5):
            request = make_request(writer, tokenizer, text, **options)
            samples += list(request.samples(tokenizer))
            list(together.join(samples[-1]))
            list(together.step())
        while together.active:
            list(together.step())
    assert [sample.text for sample in samples] == [
        generate(writer, tokenizer, text, seed=1, max_tokens=6)[0]
        for text in ("abc" * 5, "b", "c" * 13, "de" * 5)
    ]
    assert any(len(set(seqs)) == 4 and len(seqs) > 4 for seqs, _ in steps)
    for _, want in steps:
        first = want.index(True)
        assert all(want[first : first + sum(want)])


def test_an_empty_prompt_begins_a_document(writer: Model, tokenizer: Tokenizer) -> None:
    tokenizer.start = "##"  # type: ignore[misc]
    without = generate(writer, tokenizer, "", max_tokens=10)
    assert without == generate(writer, tokenizer, "##", max_tokens=10)


# ---- ends of texts ----


def test_a_text_ends_where_the_context_is_full(writer: Model, tokenizer: Tokenizer) -> None:
    for n_prompt in (1, 40, 47, 48):
        generation = Generation(writer, tokenizer, "x" * n_prompt, max_tokens=500, stop=())
        for _ in generation:
            pass
        sample = generation.samples[0]
        assert sample.finish == "context"
        assert len(sample.tokens) == 48 - n_prompt + 1  # the last one is never fed back


def test_a_longer_prompt_is_refused(writer: Model, tokenizer: Tokenizer) -> None:
    with pytest.raises(GptcError, match=r"the prompt has 49 tokens, more than .* context of 48"):
        generate(writer, tokenizer, "x" * 49)


def test_the_end_of_text_token_ends_it(
    writer: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    Script(monkeypatch, b"yes\x00no", 1)
    tokenizer.end_of_text = 0
    generation = Generation(writer, tokenizer, "a", max_tokens=20)
    assert "".join(piece for _, piece in generation) == "yes"
    assert generation.samples[0].finish == "stop"


def test_a_character_cut_by_the_end_is_marked(
    writer: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    Script(monkeypatch, "né".encode(), 1)
    pieces = list(stream(writer, tokenizer, "a", max_tokens=6, stop=()))
    assert pieces == ["n", "é", "n", "é"]
    assert "".join(stream(writer, tokenizer, "a", max_tokens=5, stop=())) == "nén\ufffd"


@pytest.mark.parametrize(
    ("said", "stop", "text"),
    [
        (b"one<|endoftext|>two", ("<|endoftext|>",), "one"),
        (b"one<|endofline|>two", ("<|endoftext|>",), "one<|endofline|>two"),
        (b"ababac", ("abac",), "ab"),
        (b"aaab!!", ("aab",), "a"),
        (b"hello world", ("xyz", "lo wo", "lo"), "hel"),
        (b"<|end", ("<|endoftext|>",), "<|end"),
    ],
)
def test_stop_strings_across_tokens_leak_nothing(
    writer: Model,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    said: bytes,
    stop: tuple[str, ...],
    text: str,
) -> None:
    Script(monkeypatch, said, 1)
    pieces = list(stream(writer, tokenizer, "a", max_tokens=len(said), stop=stop))
    assert "".join(pieces) == text
