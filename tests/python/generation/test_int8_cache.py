"""Texts with a KV cache in int8: those of other ways to decode agree with plain decoding."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc import Model
from gptc.engine.config import GPTConfig
from gptc.generation.beam import beam_search
from gptc.generation.decoder import generate
from gptc.generation.drafts import ModelDraft, NgramDraft
from gptc.generation.options import Sampling
from gptc.generation.request import make_request
from gptc.serve.jobs import Event
from gptc.serve.scheduler import Scheduler
from gptc.tokenizer.base import Tokenizer
from small_models import varied

Config = Callable[..., GPTConfig]


@pytest.fixture(params=["fp32", "bf16"])
def rounded(config: Config, request: pytest.FixtureRequest) -> Iterator[Model]:
    with varied(config(block_size=96), dtype=request.param, kv_dtype="int8") as model:
        yield model


@pytest.mark.parametrize("shift", [False, True])
def test_drafts_leave_the_text_as_it_is(rounded: Model, tokenizer: Tokenizer, shift: bool) -> None:
    options: dict[str, Any] = {
        "max_tokens": 120 if shift else 40, "temperature": 1.0, "seed": 4, "stop": (),
        "context_shift": shift, "num_samples": 2,
    }  # fmt: skip
    alone = generate(rounded, tokenizer, "ab ab ab", **options)
    same = ModelDraft(rounded, tokenizer, n_seq=2)
    for draft in (same, NgramDraft()):
        assert generate(rounded, tokenizer, "ab ab ab", draft=draft, **options) == alone
    assert same.n_right == same.n_guessed > 30


def test_beams_are_reordered_with_their_scales(rounded: Model, tokenizer: Tokenizer) -> None:
    request = make_request(rounded, tokenizer, "abc", max_tokens=6, stop=(), sampling=Sampling(0))
    for width in (1, 7):
        for sample, score in beam_search(rounded, tokenizer, request, width, 0.0):
            tokens = np.array(sample.tokens)
            with rounded.session() as session:  # the score of its tokens, decoded alone
                prompt = len(request.prompt)
                whole = np.concatenate([request.prompt, tokens[-6:]]).astype(np.int32)
                logits = session.decode(whole, 0, np.arange(len(whole)) >= prompt - 1)[:-1]
            logits = logits.astype(np.float64)
            chances = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            expected = chances[np.arange(6), whole[prompt:]].sum()
            assert score == pytest.approx(expected, rel=1e-2)


class Heard:
    """The text of one job."""

    def __init__(self) -> None:
        self.text, self._done = "", threading.Event()

    def __call__(self, event: Event) -> None:
        self.text += event.piece
        if event.finish:
            self._done.set()

    def wait(self) -> str:
        assert self._done.wait(60)
        return self.text


def test_a_servers_texts_with_reused_prefixes(rounded: Model, tokenizer: Tokenizer) -> None:
    prompts = ["A text that many begin with, "[: 29 - i % 3] + "xyz"[: i % 4] for i in range(9)]
    requests = [
        make_request(
            rounded, tokenizer, prompt, stop=(), max_tokens=12, sampling=Sampling(1.0, seed=i)
        )
        for i, prompt in enumerate(prompts)
    ]
    texts = []
    for n_seq in (1, 4, 4):
        scheduler = Scheduler(rounded, tokenizer, n_seq, chunk=8)
        heard = [Heard() for _ in requests]
        for request, listener in zip(requests, heard, strict=True):
            scheduler.submit(request, listener)
        texts.append([listener.wait() for listener in heard])
        assert scheduler.counts.prompt_tokens_reused > 0
        scheduler.close()
    assert texts[0] == texts[1] == texts[2]


def test_texts_of_windows_and_of_the_command(
    config: Config, saved: Path, tokenizer: Tokenizer, gptc: Callable[..., Any]
) -> None:
    with varied(config(window=7), kv_dtype="int8") as model:
        tokens = np.arange(40) % 7
        with model.session(2) as session:
            session.decode(tokens[:19], 0)
            session.fork(0, 1)
            at_once = session.decode(tokens[19:], 1)
            for token in tokens[19:]:
                one = session.decode([token], 0)
        np.testing.assert_allclose(one, at_once, atol=2e-2 * np.abs(one).max())
        exact = model.session(1, kv_dtype="auto").decode(tokens)
        assert 0 < np.abs(one - exact).max() < 0.1 * np.abs(exact).max()
    asked = ("infer", "-m", saved, "-p", "ab", "--temperature", "0", "--max-tokens", "5")
    assert gptc(*asked, "--kv-dtype", "int8").code == 0
