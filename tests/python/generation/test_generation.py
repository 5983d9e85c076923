"""Many texts at once: prompts shared, places taken in turn, contexts shifted, drafts, beams."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import varied
from gptc import Model
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError, UsageError
from gptc.generation.beam import beam_search
from gptc.generation.decoder import Decoder, Generation, generate
from gptc.generation.drafts import ModelDraft, NgramDraft, check_draft
from gptc.generation.options import Sampling
from gptc.generation.request import Sample, make_request
from gptc.generation.sampling import sample_token, token_logprob
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.registry import make_tokenizer

Config = Callable[..., GPTConfig]


@pytest.fixture(params=["fp32", "bf16"])
def writer(config: Config, request: pytest.FixtureRequest) -> Iterator[Model]:
    with varied(config(), dtype=request.param) as model:
        yield model


def softmax(logits: Any) -> Any:
    e = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return e / e.sum()


# ---- many texts ----


@pytest.mark.parametrize("n_seq", [1, 2, 5])
def test_texts_do_not_depend_on_what_is_decoded_beside(
    writer: Model, tokenizer: Tokenizer, n_seq: int
) -> None:
    prompts = ["a", "some longer prompt", "b", "twenty-three characters", "xy"]
    requests = [
        make_request(
            writer, tokenizer, prompt, max_tokens=3 + 5 * i, num_samples=1 + i % 3, stop=(),
            sampling=Sampling(1.0, seed=10 * i),
        )
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    samples = [sample for request in requests for sample in request.samples(tokenizer)]
    pieces: dict[Sample, str] = dict.fromkeys(samples, "")
    for sample, piece in Decoder(writer, tokenizer, n_seq).run(iter(samples)):
        pieces[sample] += piece
    for i, prompt in enumerate(prompts):
        alone = [
            generate(writer, tokenizer, prompt, max_tokens=3 + 5 * i, temperature=1.0,
                     seed=10 * i + k, stop=())[0]
            for k in range(1 + i % 3)
        ]  # fmt: skip
        mine = [sample for sample in samples if sample.request is requests[i]]
        assert [sample.text for sample in mine] == alone
        assert [pieces[sample] for sample in mine] == alone
        assert all(sample.finish == "length" for sample in mine)


def test_a_prompt_is_computed_once_for_all_its_samples(
    writer: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptc.engine.model import Session

    decode, counts = Session.decode, []

    def counted(self: Session, tokens: Any, *rest: Any) -> Any:
        counts.append(len(tokens))
        return decode(self, tokens, *rest)

    monkeypatch.setattr(Session, "decode", counted)
    generate(writer, tokenizer, "x" * 20, max_tokens=4, num_samples=6, temperature=1.0, stop=())
    assert counts == [20, 6, 6, 6]
    counts.clear()
    request = make_request(writer, tokenizer, "x" * 20, max_tokens=3, num_samples=5, stop=())
    for _ in Decoder(writer, tokenizer, 2).run(request.samples(tokenizer)):
        pass
    assert counts == [20, 2, 2, 2, 2, 1, 1]


def test_log_probabilities_are_the_models(writer: Model, tokenizer: Tokenizer) -> None:
    generation = Generation(
        writer, tokenizer, "abc", max_tokens=6, logprobs=3, stop=(),
        sampling=Sampling(1.5, top_k=20, seed=5),
    )  # fmt: skip
    for _ in generation:
        pass
    (sample,) = generation.samples
    assert [entry.token for entry in sample.logprobs] == sample.tokens
    for i, entry in enumerate(sample.logprobs):
        text = np.array([sample.sequence[: 3 + i]])
        p = softmax(writer.logits(text)[0, -1])
        assert entry.logprob == pytest.approx(np.log(p[entry.token]), abs=0.02)
        first = [logprob for _, logprob in entry.top]
        np.testing.assert_allclose(first, np.log(np.sort(p)[:-4:-1]), atol=0.05)
        np.testing.assert_allclose(first, np.log(p[[token for token, _ in entry.top]]), atol=0.05)


# ---- penalties and biases ----


def test_penalties_look_back_as_far_as_they_are_told() -> None:
    logits = np.zeros(8, np.float32)
    logits[3], logits[5] = 2.0, 1.9
    greedy = Sampling(0, presence_penalty=1.0, penalty_last_n=2)
    assert sample_token(logits, greedy, 0, 8, [3, 0, 0]) == 3
    assert sample_token(logits, greedy, 0, 8, [0, 3, 0]) == 5
    assert sample_token(logits, replace(greedy, penalty_last_n=0), 0, 8, [3, 0, 0]) == 5


def test_a_repetition_penalty_reaches_the_text(writer: Model, tokenizer: Tokenizer) -> None:
    options: dict[str, Any] = {"max_tokens": 40, "temperature": 0, "stop": ()}
    plain = generate(writer, tokenizer, "ab", **options)[0]
    varied_text = generate(
        writer, tokenizer, "ab", presence_penalty=1e6, penalty_last_n=0, **options
    )[0]
    codes = list(varied_text)
    assert len(set(codes) - {"\ufffd"}) == len([c for c in codes if c != "\ufffd"])
    assert plain != varied_text


def test_a_banned_token_is_not_drawn(writer: Model, tokenizer: Tokenizer) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 0, "stop": ()}
    text = Generation(writer, tokenizer, "ab", max_tokens=20, sampling=Sampling(0), stop=())
    assert list(text)
    first = text.samples[0].tokens[0]
    ban = Sampling(0, bias=((first, float("-inf")),))
    without = Generation(writer, tokenizer, "ab", max_tokens=20, sampling=ban, stop=())
    assert list(without)
    assert first not in without.samples[0].tokens
    with pytest.raises(UsageError, match="token 256; the vocabulary has 256"):
        generate(writer, tokenizer, "ab", bias=((256, 1.0),), **options)


# ---- past the context ----


@pytest.mark.parametrize("writer", ["fp32"], indirect=True)
def test_a_shifted_context_goes_on_from_its_newer_half(writer: Model, tokenizer: Tokenizer) -> None:
    generation = Generation(
        writer, tokenizer, "Once upon a time", max_tokens=120, context_shift=True, stop=(),
        sampling=Sampling(0.9, seed=3),
    )  # fmt: skip
    for _ in generation:
        pass
    (sample,) = generation.samples
    assert (sample.finish, sample.n_tokens) == ("length", 120)
    block, begin = writer.config.block_size, 0
    for at in range(len(sample.request.prompt), len(sample.sequence)):
        if at - begin > block:
            begin = at - block // 2
        logits = writer.logits(np.array([sample.sequence[begin:at]]))[0, -1]
        assert sample_token(logits, sample.sampling, at, 256) == sample.sequence[at]
    assert begin > block


# ---- drafts ----


class Tally:
    """A draft that says given tokens, right or wrong."""

    def __init__(self, text: list[int], wrong_every: int) -> None:
        self.text, self.wrong_every = text, wrong_every
        self.n_guessed = self.n_right = 0

    def guess(self, slot: int, sample: Sample, most: int) -> list[int]:
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

    draft, text = NgramDraft(longest=3), sample([1, 2, 3, 4, 5, 1, 2])
    assert draft.guess(0, text, 8) == [3, 4, 5, 1, 2]
    assert draft.guess(0, text, 2) == [3, 4]
    text.sequence += [3, 9]
    assert draft.guess(0, text, 8) == []
    text.sequence += [2, 3]  # stood before 4, and later before 9
    assert draft.guess(0, text, 2) == [9, 2]
    assert draft.guess(0, sample([7, 8, 7]), 8) == [8, 7]  # another text knows nothing of these
    assert draft.guess(1, sample([1, 2, 4]), 8) == []


def test_a_draft_of_other_tokens_is_refused(writer: Model, tokenizer: Tokenizer) -> None:
    other = make_tokenizer("char", [b"some text"])
    with pytest.raises(UsageError, match="another tokenizer"):
        check_draft(writer, tokenizer, writer, other)
    check_draft(writer, tokenizer, writer, make_tokenizer("bytes"))


# ---- beams ----


class FourLetters:
    """A tokenizer of four letters, the last of which ends a text."""

    kind, vocab_size, start, end_of_text, bos = "four", 4, "a", 3, None

    def encode(self, text: str) -> Any:
        return np.array(["abcd".index(c) for c in text], np.int32)

    def decode_bytes(self, tokens: Any) -> bytes:
        return "".join("abcd"[t] for t in tokens).encode()


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_wide_beams_find_the_best_of_all_texts(config: Config, length_penalty: float) -> None:
    tokenizer: Any = FourLetters()
    most, prompt = 4, [0, 1]
    with varied(config(vocab_size=4), seed=6) as model:
        request = make_request(
            model, tokenizer, "ab", max_tokens=most, num_samples=5, stop=(), logprobs=0
        )
        found = beam_search(model, tokenizer, request, 200, length_penalty)
        every = {}
        for length in range(1, most + 1):
            for text in itertools.product(range(4), repeat=length):
                ended = text[-1] == 3
                if 3 in text[:-1] or (length < most and not ended):
                    continue
                logits = model.logits(np.array([[*prompt, *text]]))[0]
                score = sum(
                    np.log(softmax(logits[len(prompt) - 1 + i]))[t] for i, t in enumerate(text)
                )
                every[text] = score / length**length_penalty
    best = sorted(every, key=lambda text: -every[text])[:5]
    assert [(*s.tokens, 3) if s.finish == "stop" else tuple(s.tokens) for s, _ in found] == best
    for (sample, score), text in zip(found, best, strict=True):
        assert score == pytest.approx(every[text], abs=1e-4)
        assert sample.text == "".join("abc"[t] for t in text if t != 3)
        assert len(sample.logprobs) == len(sample.tokens)


def test_a_search_ends_when_nothing_better_can_come(config: Config) -> None:
    tokenizer: Any = FourLetters()
    for seed in range(8):
        with varied(config(vocab_size=4), seed=seed) as model:
            request = make_request(model, tokenizer, "ab", max_tokens=12, num_samples=2, stop=())
            (_, first), (_, second) = beam_search(model, tokenizer, request, 64, 1.0)
            (_, narrow), *_ = beam_search(model, tokenizer, request, 2, 1.0)
            assert first >= second
            assert first >= narrow - 1e-6


def test_beams_heed_bans_and_the_context(writer: Model, tokenizer: Tokenizer) -> None:
    options: dict[str, Any] = {"max_tokens": 100, "stop": ()}
    plain = make_request(writer, tokenizer, "Once", **options)
    ((sample, _),) = beam_search(writer, tokenizer, plain, 2)
    assert sample.finish == "context"
    assert len(sample.sequence) == writer.config.block_size + 1
    first = sample.tokens[0]
    ban = Sampling(bias=((first, float("-inf")),))
    ((other, _),) = beam_search(
        writer, tokenizer, make_request(writer, tokenizer, "Once", sampling=ban, **options), 2
    )
    assert first not in other.tokens


def test_a_decoder_can_run_again(writer: Model, tokenizer: Tokenizer) -> None:
    decoder = Decoder(writer, tokenizer, 2)
    request = make_request(writer, tokenizer, "abc", max_tokens=9, num_samples=3, stop=())
    left = decoder.run(request.samples(tokenizer))
    for _ in range(4):
        next(left)
    left.close()
    again = request.samples(tokenizer)
    assert {sample for sample, _ in decoder.run(again[1:])} == set(again[1:])
    expected = generate(writer, tokenizer, "abc", max_tokens=9, num_samples=3, stop=())
    assert [sample.text for sample in again[1:]] == expected[1:]


def test_a_small_cache_ends_a_text_and_refuses_a_prompt(
    writer: Model, tokenizer: Tokenizer
) -> None:
    request = make_request(writer, tokenizer, "abcd", max_tokens=30, stop=())
    (sample,) = request.samples(tokenizer)
    assert list(Decoder(writer, tokenizer, n_ctx=8).run([sample]))
    assert (sample.finish, len(sample.sequence)) == ("context", 9)
    with pytest.raises(GptcError, match="4 tokens, more than the 3"):
        list(Decoder(writer, tokenizer, n_ctx=3).run(request.samples(tokenizer)))


def test_a_draft_that_was_interrupted_goes_on(
    writer: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptc.generation import drafts as speculative

    draft = ModelDraft(writer, tokenizer)
    options: dict[str, Any] = {"max_tokens": 20, "stop": (), "draft": draft, "seed": 3}
    expected = generate(writer, tokenizer, "abc", **options)
    real, calls = sample_token, itertools.count()

    def interrupted(*arguments: Any) -> int:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(speculative, "sample_token", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(writer, tokenizer, "abc", **options)
    monkeypatch.setattr(speculative, "sample_token", real)
    assert generate(writer, tokenizer, "ab", **options) == generate(
        writer, tokenizer, "ab", **{**options, "draft": None}
    )
    assert generate(writer, tokenizer, "abc", **options) == expected


def test_prompts_may_be_tokens_and_bytes(writer: Model, tokenizer: Tokenizer) -> None:
    assert make_request(writer, tokenizer, [1, 2, 3]).prompt == [1, 2, 3]
    assert make_request(writer, tokenizer, []).prompt == make_request(writer, tokenizer).prompt
    assert make_request(writer, tokenizer, "a\udcff").prompt == [97, 255]
    with pytest.raises(GptcError, match=r"character 1 .* U\+D800"):
        make_request(writer, tokenizer, "a\ud800")


def test_one_beam_is_greedy(writer: Model, tokenizer: Tokenizer) -> None:
    greedy = generate(writer, tokenizer, "Once", max_tokens=30, temperature=0, stop=())
    request = make_request(writer, tokenizer, "Once", max_tokens=30, stop=())
    assert [sample.text for sample, _ in beam_search(writer, tokenizer, request, 1)] == greedy


def test_more_beams_never_score_worse(writer: Model, tokenizer: Tokenizer) -> None:
    request = make_request(writer, tokenizer, "Once", max_tokens=8, stop=())
    scores = [beam_search(writer, tokenizer, request, n)[0][1] for n in (1, 300)]
    assert scores[0] <= scores[1] + 1e-5
    with pytest.raises(UsageError, match="2 beams cannot give 3 samples"):
        beam_search(writer, tokenizer, replace(request, num_samples=3), 2)


# ---- sessions ----


def test_logits_after_chosen_tokens(writer: Model) -> None:
    tokens = np.array([5, 6, 7, 8, 9, 1, 2])
    seqs = np.array([0, 0, 0, 0, 0, 1, 1])
    whole = writer.logits(tokens[None, :5])[0]
    with writer.session(2) as session:
        some = session.decode(tokens, seqs, [True, False, True, False, True, False, False])
        np.testing.assert_allclose(some, whole[[0, 2, 4]], atol=0.05)
        none = session.decode([3], 0, [False])
        assert none.shape == (0, 256)
        assert session.length(0) == 6
        session.fork(0, 1, 5)
        assert session.length(1) == 5
        session.fork(0, 1)
        np.testing.assert_array_equal(session.decode([4], 0), session.decode([4], 1))
        with pytest.raises(GptcError, match="want has the shape"):
            session.decode([1, 2], 0, [True])


def test_logprobs_of_a_token_beside_padding() -> None:
    logits = np.array([0.0, 1.0, 2.0, 50.0], np.float32)
    entry = token_logprob(logits, 1, 10, vocab_size=3)
    p = softmax(logits[:3])
    assert entry.logprob == pytest.approx(np.log(p[1]), abs=1e-6)
    assert [token for token, _ in entry.top] == [2, 1, 0]


def test_wrong_arguments_are_named(writer: Model, tokenizer: Tokenizer, tmp_path: Path) -> None:
    anything: Any = None
    wrong: Any
    for wrong in (["a", "b"], 5, [1.0], [-1]):
        with pytest.raises(UsageError, match="it must be one text, or a list of tokens' numbers"):
            generate(writer, tokenizer, wrong)
    with pytest.raises(UsageError, match=r"the tokenizer is None; .*load_tokenizer"):
        generate(writer, anything, "a")
    with pytest.raises(UsageError, match=r"no option 'max_new_tokens'; known: max_tokens, stop"):
        generate(writer, tokenizer, "a", max_new_tokens=3)
    name: Any = "tiny"
    with pytest.raises(UsageError, match="it must be a GPTConfig, such as"):
        Model.create(name)
    with pytest.raises(GptcError, match="vocab_size is 'a'; it must be a number"):
        GPTConfig.preset("tiny", vocab_size="a").check()
    with pytest.raises(UsageError, match=r"for 1 to 1: pass max_batch=8 where it is created"):
        writer.logits(np.zeros((8, 4), np.int32))
    with Model.create(writer.config, threads=1, training=False) as model:
        model.save(tmp_path / "saved")
        model.save(tmp_path / "saved", replace=True)
