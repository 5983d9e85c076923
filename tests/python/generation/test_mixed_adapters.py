"""Samples of several adapters share the steps of a batch; each has the text that it has alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from gptc import Lora, Model
from gptc.engine.config import GPTConfig
from gptc.engine.lora import targets_named
from gptc.engine.session import AdapterCopy
from gptc.errors import GptcError
from gptc.generation.batch import Batch
from gptc.generation.decoder import Decoder
from gptc.generation.drafts import NgramDraft
from gptc.generation.options import Sampling
from gptc.generation.request import Request, Sample, make_request
from gptc.tokenizer.base import Tokenizer

NAMES = ("one", "none", "two", "one", "own")
PROMPTS = ("ab ab ab", "a longer text that this one begins with", "x", "ab ab", "ab ab ab")


class Adapted:
    """A model with adapters, copies of two sets of their numbers, and a third as its own."""

    def __init__(self, config: GPTConfig, dtype: str) -> None:
        self.plain = self._create(config, dtype)
        self.model = self._create(
            config, dtype, lora=Lora(3, 6.0, targets_named(config, "all"), dora=dtype == "fp32")
        )
        rng = np.random.default_rng(3)
        for name, shape, _ in config.parameters():
            values = rng.normal(0, 0.3, shape).astype(np.float32)
            self.plain.set(name, values)
            self.model.set(name, values)
        self.copies: dict[str, AdapterCopy | None] = {"own": None}
        for seed, name in enumerate(("one", "two", "own")):
            self.use(seed)
            if name not in self.copies:
                self.copies[name] = AdapterCopy(self.model)
        self.copies["none"] = AdapterCopy(self.model, none=True)

    @staticmethod
    def _create(config: GPTConfig, dtype: str, **more: Any) -> Model:
        return Model.create(config, dtype=dtype, threads=1, training=False, max_batch=0, **more)

    def use(self, seed: int) -> None:
        """Gives the model the numbers of a set."""
        rng = np.random.default_rng(seed)
        for name, shape, _ in self.model.trained:
            self.model.set(name, rng.normal(0, 0.3, shape).astype(np.float32))

    def alone(
        self, tokenizer: Tokenizer, name: str, request: Request, chunk: int | None = None
    ) -> str:
        """The text of the request, by a model that has these numbers and no copies."""
        if name != "none":
            self.use(("one", "two", "own").index(name))
        model = self.plain if name == "none" else self.model
        (sample,) = request.samples(tokenizer)
        list(Decoder(model, tokenizer, chunk=chunk).run([sample]))
        return sample.text


@pytest.fixture(params=["fp32", "bf16"])
def adapted(config: Callable[..., GPTConfig], request: pytest.FixtureRequest) -> Iterator[Adapted]:
    made = Adapted(config("llama", block_size=96), request.param)
    yield made
    made.model.close()
    made.plain.close()


def asked(adapted: Adapted, tokenizer: Tokenizer, prompt: str, seed: int = 1) -> Request:
    return make_request(
        adapted.model, tokenizer, prompt, sampling=Sampling(1.0, seed=seed), max_tokens=12, stop=()
    )


def joined(batch: Batch, tokenizer: Tokenizer, request: Request) -> Sample:
    (sample,) = request.samples(tokenizer)
    list(batch.join(sample))
    return sample


@pytest.mark.parametrize("drafts", [False, True])
def test_a_step_has_samples_of_all_adapters(
    adapted: Adapted, tokenizer: Tokenizer, drafts: bool
) -> None:
    requests = [asked(adapted, tokenizer, prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    want = [adapted.alone(tokenizer, *pair) for pair in zip(NAMES, requests, strict=True)]
    assert want[0] != adapted.alone(tokenizer, "two", requests[0])
    adapted.use(2)
    with adapted.model.session(len(NAMES)) as session:
        batch = Batch(session, tokenizer, draft=NgramDraft() if drafts else None)
        samples = []
        for name, request in zip(NAMES, requests, strict=True):
            request.adapter = adapted.copies[name]
            samples.append(joined(batch, tokenizer, request))
        n_steps = 0
        while batch.active:
            list(batch.step())
            n_steps += 1
    assert [sample.text for sample in samples] == want
    assert n_steps == 12 or (drafts and n_steps < 12)


def test_a_cache_is_of_one_adapter(adapted: Adapted, tokenizer: Tokenizer) -> None:
    names = ("one", "two", "one", "none", "two")
    asks = [asked(adapted, tokenizer, PROMPTS[1]) for _ in names]
    want = [adapted.alone(tokenizer, *each, 4) for each in zip(names, asks, strict=True)]
    with adapted.model.session(4) as session:
        batch, reused = Batch(session, tokenizer, keep=True, chunk=4), []
        for name, text in zip(names, want, strict=True):
            request, before = asked(adapted, tokenizer, PROMPTS[1]), batch.n_reused
            request.adapter = adapted.copies[name]
            sample = joined(batch, tokenizer, request)
            while batch.active:
                list(batch.step())
            assert sample.text == text
            reused.append(batch.n_reused > before)
        assert reused == [False, False, True, False, True]
        gone = weakref.ref(adapted.copies["two"])
        del adapted.copies["two"], request, sample
        batch.keep_only([copy for copy in adapted.copies.values() if copy])
        assert gone() is None
        assert [slot.adapter for slot in batch._slots].count(None) >= 1
        assert adapted.copies["one"] in [slot.adapter for slot in batch._slots]


def test_a_copy_ends_with_its_model(adapted: Adapted) -> None:
    copy = adapted.copies["one"]
    with adapted.model.session() as session, pytest.raises(GptcError, match="sequence 1 does not"):
        session.adapt(1, copy)
    with pytest.raises(GptcError, match="the model has no adapters"):
        AdapterCopy(adapted.plain)
    with adapted.plain.session() as session, pytest.raises(GptcError, match="another model"):
        session.adapt(0, copy)
    session = adapted.model.session()
    session.adapt(0, copy)
    adapted.model.close()
    with pytest.raises(GptcError, match="closed"):
        session.adapt(0, copy)
