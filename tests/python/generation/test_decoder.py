"""A text depends only on its request, not on other texts in the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc import Model
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError, UsageError
from gptc.generation.chat import chat
from gptc.generation.decoder import Decoder, Generation, generate
from gptc.generation.embedding import embed
from gptc.generation.options import Sampling
from gptc.generation.request import Sample, make_request
from gptc.generation.sampling import sample_token
from gptc.tokenizer.base import Tokenizer
from small_models import softmax, varied

Config = Callable[..., GPTConfig]


@pytest.fixture(params=["fp32", "bf16"])
def writer(config: Config, request: pytest.FixtureRequest) -> Iterator[Model]:
    with varied(config(), dtype=request.param) as model:
        yield model


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
    from gptc.engine.session import Session

    counts: list[int] = []
    for name in ("decode", "sample"):
        step = getattr(Session, name)

        def counted(self: Session, tokens: Any, *rest: Any, step: Any = step) -> Any:
            counts.append(len(tokens))
            return step(self, tokens, *rest)

        monkeypatch.setattr(Session, name, counted)
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
    near = 0.05 if writer.options.dtype == "bf16" else 1e-4
    assert [entry.token for entry in sample.logprobs] == sample.tokens
    for i, entry in enumerate(sample.logprobs):
        text = np.array([sample.sequence[: 3 + i]])
        p = softmax(writer.logits(text)[0, -1])
        assert entry.logprob == pytest.approx(np.log(p[entry.token]), abs=near)
        first = [logprob for _, logprob in entry.top]
        np.testing.assert_allclose(first, np.log(np.sort(p)[:-4:-1]), atol=near)
        np.testing.assert_allclose(first, np.log(p[[token for token, _ in entry.top]]), atol=near)


# ---- penalties and biases ----


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
    with pytest.raises(UsageError, match="token 256 is outside the vocabulary of 256"):
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


# ---- decoders and requests ----


def test_a_decoder_can_run_again(writer: Model, tokenizer: Tokenizer) -> None:
    decoder = Decoder(writer, tokenizer, 2)
    request = make_request(writer, tokenizer, "abc", max_tokens=9, num_samples=3, stop=())
    left = decoder.run(request.samples(tokenizer))
    for _ in range(4):
        next(left)
    left.close()
    again = list(request.samples(tokenizer))
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
    with pytest.raises(GptcError, match="has 4 tokens; the cache holds 3"):
        list(Decoder(writer, tokenizer, n_ctx=3).run(request.samples(tokenizer)))


def test_prompts_may_be_tokens_and_bytes(writer: Model, tokenizer: Tokenizer) -> None:
    assert make_request(writer, tokenizer, [1, 2, 3]).prompt == [1, 2, 3]
    assert make_request(writer, tokenizer, []).prompt == make_request(writer, tokenizer).prompt
    assert make_request(writer, tokenizer, "a\udcff").prompt == [97, 255]
    tokenizer.byte_ids = None
    says = r"character 1 of the prompt is the byte 0xFF, which is not UTF-8 .*: give UTF-8"
    with pytest.raises(GptcError, match=says):
        make_request(writer, tokenizer, "a\udcff")
    with pytest.raises(GptcError, match=r"character 1 .* U\+D800"):
        make_request(writer, tokenizer, "a\ud800")


def test_wrong_arguments_are_named(writer: Model, tokenizer: Tokenizer, tmp_path: Path) -> None:
    anything: Any = None
    wrong: Any
    for wrong in (["a", 3], 5, [1.0], [-1], b"text"):
        with pytest.raises(UsageError, match="it must be one text, or a list of token ids"):
            generate(writer, tokenizer, wrong)
    call: Any
    for call in (generate, chat, embed):  # of what was not loaded
        with pytest.raises(
            UsageError, match=r"the model is 'runs/a'; load it with gptc.Model.load"
        ):
            call("runs/a", tokenizer, "x")
        with pytest.raises(UsageError, match=r"the tokenizer is 'x'; load the model's with"):
            call(writer, "x", "x")
    with pytest.raises(UsageError, match=r"the tokenizer is None; .*load_tokenizer"):
        generate(writer, anything, "a")
    with pytest.raises(UsageError, match=r"unknown option 'device'; known: max_tokens, num_sam"):
        generate(writer, tokenizer, "a", device=3)
    for there, here in (("max_length", "max_tokens"), ("temp", "temperature"), ("topk", "top_k")):
        with pytest.raises(UsageError, match=f"unknown option '{there}'; did you mean {here}[?]"):
            generate(writer, tokenizer, "a", **{there: 3})
    name: Any = "tiny"
    with pytest.raises(UsageError, match="it must be a GPTConfig, such as"):
        Model.create(name)
    with pytest.raises(GptcError, match="vocab_size is 'a', not a whole number"):
        GPTConfig.preset("tiny", vocab_size="a").check()
    with pytest.raises(UsageError, match=r"for 1 to 1: pass max_batch=8 when you create"):
        writer.logits(np.zeros((8, 4), np.int32))
    with Model.create(writer.config, threads=1, training=False) as model:
        model.save(tmp_path / "saved")
        model.save(tmp_path / "saved", replace=True)
