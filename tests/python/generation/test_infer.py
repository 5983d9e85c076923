"""Sampling: the same text for the same call, stop strings, the context's end, and `gptc infer`."""

from __future__ import annotations

import io
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc import Model
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError, UsageError
from gptc.generation import request as generation_module
from gptc.generation.decoder import Generation, generate, stream
from gptc.generation.options import Sampling
from gptc.generation.sampling import StopFilter, sample_token
from gptc.tokenizer.base import Tokenizer

Config = Callable[..., GPTConfig]


class Script:
    """Replaces the sampler: says the given bytes, whatever the model thinks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, text: bytes, n_prompt: int) -> None:
        def token(
            logits: Any, sampling: Sampling, position: int, vocab_size: int, history: Any
        ) -> int:
            return text[(position - n_prompt) % len(text)]

        monkeypatch.setattr(generation_module, "sample_token", token)


# ---- drawing ----


def test_greedy_is_the_most_likely_token(writer: Model, tokenizer: Tokenizer) -> None:
    text = generate(writer, tokenizer, "ab", max_tokens=8, temperature=0, stop=())[0]
    tokens = [97, 98]
    for _ in range(8):
        tokens.append(int(writer.logits(np.array([tokens]))[0, -1].argmax()))
    assert text == tokenizer.decode(tokens[2:])


def test_a_draw_is_a_function_of_seed_and_position() -> None:
    logits = np.zeros(256, np.float32)
    draws = {
        (seed, position): sample_token(logits, Sampling(1.0, seed=seed), position, 256)
        for seed in range(20)
        for position in range(20)
    }
    assert len(set(draws.values())) > 150  # uniform over 256
    for (seed, position), token in draws.items():
        assert sample_token(logits, Sampling(1.0, seed=seed), position, 256) == token


def test_tokens_beyond_the_tokenizers_vocabulary_are_never_drawn() -> None:
    logits = np.zeros(300, np.float32)
    logits[256:] = 50  # such as the padding rows of a published model
    drawn = {sample_token(logits, Sampling(1.0, seed=seed), 0, 256) for seed in range(50)}
    assert max(drawn) < 256


def test_filters_reach_the_sampler() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))

    def drawn(**options: Any) -> set[int]:
        return {sample_token(logits, Sampling(1.0, seed=s, **options), 0, 4) for s in range(200)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_p=0.9) == {0, 1, 2}
    assert drawn(min_p=0.5) == {0, 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top-k is -1"),
        ({"top_p": 0.0}, "top-p is 0.0"),
        ({"top_p": 1.1}, "top-p is 1.1"),
        ({"min_p": 1.01}, "min-p is 1.01"),
        ({"seed": -1}, "seed is -1"),
        ({"max_tokens": 0}, "max-tokens is 0"),
        ({"num_samples": 0}, "num-samples is 0"),
        ({"stop": ("",)}, "a stop string is empty"),
    ],
)
def test_senseless_options_are_refused(
    writer: Model, tokenizer: Tokenizer, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        generate(writer, tokenizer, "a", **options)


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
    real = sample_token

    def token(logits: Any, sampling: Sampling, position: int, vocab_size: int, history: Any) -> int:
        if sampling.seed % 2 and position == 5:
            return ord("#")
        token = real(logits, sampling, position, vocab_size, history)
        return ord("+") if token == ord("#") else token

    monkeypatch.setattr(generation_module, "sample_token", token)
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


def test_an_empty_prompt_begins_a_document(writer: Model, tokenizer: Tokenizer) -> None:
    tokenizer.start = "##"  # type: ignore[misc]
    without = generate(writer, tokenizer, "", max_tokens=10)
    assert without == generate(writer, tokenizer, "##", max_tokens=10)


# ---- where a text ends ----


def test_a_text_ends_where_the_context_is_full(writer: Model, tokenizer: Tokenizer) -> None:
    for n_prompt in (1, 40, 47, 48):
        generation = Generation(writer, tokenizer, "x" * n_prompt, max_tokens=500, stop=())
        for _ in generation:
            pass
        sample = generation.samples[0]
        assert sample.finish == "context"
        assert len(sample.tokens) == 48 - n_prompt + 1  # the last one needs no room to come back


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


def test_the_stop_filter_against_a_search_of_the_whole() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        text = "".join(rng.choice("ab<") for _ in range(rng.randrange(30)))
        stop = tuple("".join(rng.choice("ab<") for _ in range(rng.randrange(1, 5))) for _ in "12")
        stop_filter, out, at = StopFilter(stop), "", 0
        while at < len(text) and not stop_filter.stopped:
            step = rng.randrange(1, 4)
            out += stop_filter.push(text[at : at + step])
            at += step
            assert text.startswith(out)
        stopped = stop_filter.stopped
        out += stop_filter.flush()
        # The stop string that is complete first wins; among those, the one that begins first.
        ends = [text.find(word) + len(word) for word in stop if word in text]
        assert stopped == bool(ends)
        if not ends:
            assert out == text
        else:
            assert not any(word in out for word in stop)
            assert any(text.startswith(out + word) for word in stop)


# ---- the command ----


def test_infer_prints_prompt_and_text(
    gptc: Callable[..., Any], saved: Path, writer: Model, tokenizer: Tokenizer
) -> None:
    common = ("infer", "-m", saved, "--dtype", "fp32", "--threads", 1)
    ran = gptc(*common, "-p", "Once", "--seed", 4, "--max-tokens", 20)
    expected = generate(writer, tokenizer, "Once", seed=4, max_tokens=20)[0]
    assert (ran.code, ran.out) == (0, f"Once{expected}\n")
    assert ran.err == ""  # speed is for terminals


def test_infer_json_holds_every_sample(gptc: Callable[..., Any], saved: Path) -> None:
    common = ("infer", "-m", saved, "-p", "a", "--seed", 4, "--max-tokens", 6, "--threads", 1)
    ran = gptc(*common, "--num-samples", 2, "--json")
    result = json.loads(ran.out)
    assert result["prompt"] == "a"
    assert [s["finish"] for s in result["samples"]] == ["length", "length"]
    plain = gptc(*common, "--num-samples", 2).out
    for i, sample in enumerate(result["samples"]):
        assert f"--- sample {i + 1} ---\na{sample['text']}\n" in plain


@pytest.mark.parametrize("text", ["from a pipe", "two\nlines\n"])
def test_infer_reads_a_prompt_from_files_and_pipes(
    gptc: Callable[..., Any],
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(text)
    common = ("infer", "-m", saved, "--seed", 4, "--max-tokens", 6, "--json")
    from_file = json.loads(gptc(*common, "--prompt-file", file).out)
    assert from_file["prompt"] == text.removesuffix("\n")
    with file.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        from_pipe = json.loads(gptc(*common).out)
    assert from_pipe["prompt"] == from_file["prompt"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("not a pipe"))
    assert json.loads(gptc(*common).out)["prompt"] == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--temperature", "-1"], 2, "temperature is -1.0; it must be 0 (greedy) or more"),
        (["--top-p", "0"], 2, "top-p is 0.0"),
        (["--max-tokens", "0"], 2, "0 is less than 1"),
        (["-p", "x", "--prompt-file", "y"], 2, "-p and --prompt-file exclude each other"),
        (["--prompt-file", "nowhere.txt"], 1, "cannot read the prompt nowhere.txt"),
        (["-p", "x" * 60], 1, "the prompt has 60 tokens"),
        (["-m", "nowhere"], 1, "nowhere does not exist"),
    ],
)
def test_infer_errors(
    gptc: Callable[..., Any], saved: Path, arguments: list[str], code: int, message: str
) -> None:
    ran = gptc("infer", *(["-m", saved] if "-m" not in arguments else []), *arguments)
    assert ran.code == code
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""
