"""Every way to generate begins with the token that begins a text, exactly once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc.checkpoint.facade import load_model
from gptc.checkpoint.find import open_checkpoint
from gptc.generation.beam import beam_search
from gptc.generation.decoder import Generation, generate
from gptc.generation.drafts import ModelDraft, NgramDraft
from gptc.generation.options import Sampling
from gptc.generation.request import make_request, prompt_tokens
from gptc.tokenizer.native import ByteTokenizer
from scripted import Script
from small_models import make_config, varied
from vocabularies import PROMPT, begun, llama_like, published

Gptc = Callable[..., Any]


@pytest.fixture
def taught(tmp_path: Path) -> Path:
    return published(tmp_path / "taught", llama_like())


def test_every_way_of_infer_begins_so(gptc: Gptc, taught: Path, tmp_path: Path) -> None:
    source = open_checkpoint(taught)
    tokenizer = source.tokenizer()
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "stop": ()}
    with load_model(source, dtype="fp32") as model:
        ids = [1, *tokenizer.encode(PROMPT).tolist()]
        expected = Generation(
            model, tokenizer, ids, sampling=Sampling(temperature=0), max_tokens=12
        )
        text = "".join(piece for _, piece in expected)
        raw = tokenizer.encode(PROMPT).tolist()
        without = Generation(model, tokenizer, raw, sampling=Sampling(temperature=0), max_tokens=12)
        assert "".join(piece for _, piece in without) != text  # else this test would be vacuous
        assert generate(model, tokenizer, PROMPT, **options) == [text]
        for draft in (NgramDraft(), ModelDraft(model, tokenizer)):
            assert generate(model, tokenizer, PROMPT, draft=draft, **options) == [text]
        nothing = generate(model, tokenizer, "", **options)
        beams = {
            given: beam_search(model, tokenizer, make_request(model, tokenizer, given), 3)[0][
                0
            ].text
            for given in ("", PROMPT)
        }
    command = ("infer", "-m", taught, "--dtype", "fp32", "--temperature", 0, "--max-tokens", 12)
    assert gptc(*command, "-p", PROMPT).out == f"{PROMPT}{text}\n"
    assert gptc(*command, "-p", "").out == f"{nothing[0]}\n"
    assert gptc(*command, "-p", PROMPT, "--draft", "ngram").out == f"{PROMPT}{text}\n"
    answer = json.loads(gptc(*command, "-p", PROMPT, "--json").out)
    assert answer["prompt_tokens"] == len(ids)
    assert answer["samples"][0]["text"] == text
    (tmp_path / "prompts").write_text(json.dumps({"prompt": PROMPT}) + '\n{"prompt": ""}\n')
    lines = gptc(*command, "--prompts", tmp_path / "prompts").out.splitlines()
    assert [json.loads(line)["samples"][0]["text"] for line in lines] == [text, nothing[0]]
    command = ("infer", "-m", taught, "--dtype", "fp32", "--beams", 3)
    assert gptc(*command, "-p", PROMPT).out == f"{PROMPT}{beams[PROMPT]}\n"
    assert gptc(*command, "-p", "").out == f"{beams['']}\n"


def test_a_conversation_goes_on_without_a_second_one(taught: Path) -> None:
    from gptc.cli.writer import Writer

    source = open_checkpoint(taught)
    tokenizer = source.tokenizer()
    settings = {"sampling": Sampling(temperature=0), "max_tokens": 4, "num_samples": 1, "stop": ()}
    with load_model(source, dtype="fp32") as model:
        writer = Writer(model, tokenizer, source.path, settings, None, random_seed=False)
        writer.answer(PROMPT)
        writer.answer("")
        assert writer._last is not None
        sequence = writer._last.sequence
        whole = Generation(
            model, tokenizer, PROMPT, sampling=Sampling(temperature=0), max_tokens=8, stop=()
        )
        for _ in whole:
            pass
    assert sequence == whole.samples[0].sequence
    assert sequence.count(1) == 1


def test_where_another_text_begins_this_one_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in llama2.c's run: its models are trained with no other end token."""
    tokenizer = begun(ByteTokenizer(), 1)
    with varied(make_config("byte")) as model:
        Script(monkeypatch, b"yes\x01no", 2)  # after the prompt: it and "a"
        generation = Generation(model, tokenizer, "a", max_tokens=20)
        assert "".join(piece for _, piece in generation) == "yes"
        assert generation.samples[0].finish == "stop"
        begun(tokenizer, None)
        Script(monkeypatch, b"yes\x01no", 1)
        assert generate(model, tokenizer, "a", max_tokens=6, stop=()) == ["yes\x01no"]


def test_a_beam_ends_there_too() -> None:
    """A beam ends at this token as it does at the end-of-text token."""
    tokenizer = ByteTokenizer()
    with varied(make_config("byte")) as model:
        request = make_request(model, tokenizer, [1, 97], max_tokens=8, stop=(), num_samples=3)
        ((sample, _), *_) = beam_search(model, tokenizer, request, 3, 0.0)
        # The likeliest token at the third position now ends texts.
        tokenizer.end_of_text = sample.tokens[2]  # type: ignore[assignment]
        expected = beam_search(model, tokenizer, request, 3, 0.0)
        tokenizer.end_of_text, tokenizer.bos = None, sample.tokens[2]
        found = beam_search(model, tokenizer, request, 3, 0.0)
    assert "stop" in {sample.finish for sample, _ in expected}
    assert [(s.tokens, s.finish, score) for s, score in found] == [
        (s.tokens, s.finish, score) for s, score in expected
    ]


@pytest.mark.parametrize(("n_ctx", "draft"), [(48, False), (48, True), (5, False), (3, False)])
def test_a_context_that_shifts_keeps_it_first(n_ctx: int, draft: bool) -> None:
    """It replaces the oldest token of the half, unless that half is a single token."""
    tokenizer = begun(llama_like())
    n = 110
    config = make_config("llama", vocab_size=tokenizer.vocab_size, block_size=n_ctx)
    with varied(config) as model:
        ban = Sampling(temperature=0, bias=((1, float("-inf")), (2, float("-inf"))))
        generation = Generation(
            model, tokenizer, PROMPT, sampling=ban, max_tokens=n, stop=(), context_shift=True,
            draft=NgramDraft() if draft else None,
        )  # fmt: skip
        for _ in generation:
            pass
        found = generation.samples[0].sequence
        held = expected = prompt_tokens(tokenizer, PROMPT)
        for _ in range(n):
            if len(held) > n_ctx:
                held = held[-(n_ctx // 2) :]
                held = [1, *held[1:]] if len(held) > 1 else held
            logits = model.logits(np.array([held], np.int32))[0, -1].copy()
            logits[[1, 2]] = -np.inf
            token = int(np.argmax(logits))
            held, expected = [*held, token], [*expected, token]
    assert found == expected


def test_info_says_so(gptc: Gptc, taught: Path) -> None:
    assert "<s> before a text" in gptc("info", taught).out
