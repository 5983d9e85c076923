"""A text with a regex or a grammar matches it, with every combination of other options."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gptc import Model
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError, UsageError
from gptc.generation import constraint
from gptc.generation.beam import beam_search
from gptc.generation.decoder import Generation, generate, stream
from gptc.generation.drafts import ModelDraft, NgramDraft
from gptc.generation.options import Sampling
from gptc.generation.request import make_request
from gptc.generation.sampling import token_logprob
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.native import CharTokenizer
from patterns import JSON_GRAMMAR, of_bytes, reads
from small_models import varied

Config = Callable[..., GPTConfig]
CLOSE = tuple((ord(char), 3.0) for char in '"]},:0')  # so that lists and strings end


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_texts_are_json(writer: Model, tokenizer: Tokenizer, temperature: float) -> None:
    generation = Generation(
        writer, tokenizer, "A value: ", grammar=JSON_GRAMMAR, num_samples=12, max_tokens=400,
        context_shift=True, stop=(), sampling=Sampling(temperature, bias=CLOSE, typical_p=0.95),
    )  # fmt: skip
    for _ in generation:
        pass
    found, n_ended = of_bytes(grammar=JSON_GRAMMAR), 0
    for sample in generation.samples:
        assert reads(found.begin(), tokenizer.decode_bytes(sample.tokens))
        if sample.finish == "stop":
            json.loads(sample.text)
            n_ended += 1
        else:
            assert (sample.finish, sample.n_tokens) == ("length", 400)
    assert n_ended >= (0 if temperature == 0 else 4)


def test_texts_follow_a_schema(writer: Model, tokenizer: Tokenizer) -> None:
    schema = {
        "type": "object",
        "properties": {
            "n": {"type": "integer", "minimum": -99, "maximum": 99},
            "x": {"enum": ["é", 0]},
        },
        "required": ["n", "x"],
        "additionalProperties": False,
    }
    options: dict[str, Any] = {"num_samples": 4, "temperature": 1.5, "max_tokens": 200}
    texts = generate(writer, tokenizer, "A value: ", json_schema=schema, **options)
    for text in texts:
        value = json.loads(text)
        assert list(value) == ["n", "x"]
        assert -99 <= value["n"] <= 99
        assert value["x"] in ("é", 0)
    same = generate(writer, tokenizer, "A value: ", json_schema=json.dumps(schema), **options)
    assert same == texts


@pytest.mark.parametrize("seed", range(5))
def test_characters_come_whole_from_bytes(writer: Model, tokenizer: Tokenizer, seed: int) -> None:
    regex = "[à-ÿ]{2}[一-龥]😀?[^\\x00-\\uFFFF]"
    (text,) = generate(writer, tokenizer, "x", regex=regex, seed=seed, temperature=1.0)
    assert re.fullmatch(regex, text)
    assert "".join(stream(writer, tokenizer, "x", regex=regex, seed=seed, temperature=1.0)) == text


def test_the_most_likely_of_what_is_allowed(writer: Model, tokenizer: Tokenizer) -> None:
    generation = Generation(
        writer, tokenizer, "ab", regex="[k-p]{6}", sampling=Sampling(0), logprobs=3
    )
    for _ in generation:
        pass
    (sample,) = generation.samples
    assert sample.finish == "stop"
    for i, token in enumerate(sample.tokens):
        logits = writer.logits(np.array([sample.sequence[: 2 + i]]))[0, -1]
        assert token == ord("k") + int(logits[ord("k") : ord("p") + 1].argmax())
        # Log-probabilities are the unconstrained model's.
        own = token_logprob(logits, token, 3, 256)
        assert sample.logprobs[i].logprob == pytest.approx(own.logprob, abs=1e-3)
        assert [t for t, _ in sample.logprobs[i].top] == [t for t, _ in own.top]


def test_what_allows_all_changes_nothing(config: Config) -> None:
    tokenizer = CharTokenizer("".join(map(chr, range(64, 104))) + "é😀")
    with varied(config(vocab_size=48)) as model:
        options: dict[str, Any] = {"max_tokens": 40, "num_samples": 3, "frequency_penalty": 0.3}
        free = generate(model, tokenizer, "A", **options)
        assert generate(model, tokenizer, "A", regex=r"[\s\S]*", **options) == free
        assert generate(model, tokenizer, "A", grammar="root ::= .+", **options) == free


@pytest.mark.parametrize(
    "pattern",
    [
        {"regex": r"(ab|ba|é|\d+ ){3,25}!"},
        {"grammar": 'root ::= "ab" root | [0-9]+ " " root | "(" root root ")" | "é"'},
        {"json_schema": {"type": "array", "items": {"type": "integer"}, "minItems": 9}},
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_writes_the_same(
    writer: Model,
    config: Config,
    tokenizer: Tokenizer,
    temperature: float,
    pattern: dict[str, Any],
) -> None:
    options: dict[str, Any] = {
        **pattern, "temperature": temperature, "seed": 4, "num_samples": 2,
        "max_tokens": 120, "context_shift": True, "frequency_penalty": 0.1,
    }  # fmt: skip
    alone = generate(writer, tokenizer, "ab ab ab", **options)
    same = ModelDraft(writer, tokenizer, n_seq=2)
    with varied(config(n_layer=1), seed=9) as small:
        drafts: list[Any] = [same, ModelDraft(small, tokenizer, n_seq=2), NgramDraft()]
        for draft in drafts:
            assert generate(writer, tokenizer, "ab ab ab", draft=draft, **options) == alone
    # A draft's token that ends its sample is not counted as right.
    assert same.n_right >= same.n_guessed - 2 > 10


def test_samples_do_not_depend_on_each_other(writer: Model, tokenizer: Tokenizer) -> None:
    options: dict[str, Any] = {"regex": "([a-f]|[0-9]{3}){1,40}[.]", "temperature": 1.2}
    together = generate(writer, tokenizer, "x", num_samples=5, seed=7, **options)
    apart = [generate(writer, tokenizer, "x", seed=7 + i, **options)[0] for i in range(5)]
    assert together == apart
    assert len(set(together)) == 5


def test_a_text_may_end_where_it_is_complete(writer: Model, tokenizer: Tokenizer) -> None:
    tokenizer.end_of_text = 0
    ends = ((0, 2.0),)
    lengths = set()
    for seed in range(10):
        generation = Generation(
            writer, tokenizer, "x", regex="(abc)+\\x00?", sampling=Sampling(seed=seed, bias=ends)
        )
        for _ in generation:
            pass
        (sample,) = generation.samples
        assert re.fullmatch("(abc)+", sample.text)
        assert sample.finish == "stop"
        lengths.add(len(sample.text))
    assert len(lengths) > 1


def test_a_stop_string_ends_it_before_it_is_complete(writer: Model, tokenizer: Tokenizer) -> None:
    options: dict[str, Any] = {"regex": "[a-c]{5}--[a-c]{5}", "temperature": 1.0}
    (text,) = generate(writer, tokenizer, "x", stop=("--",), **options)
    assert re.fullmatch("[a-c]{5}", text)
    assert generate(writer, tokenizer, "x", **options)[0].startswith(f"{text}--")


def test_where_no_token_goes_on(config: Config) -> None:
    tokenizer = CharTokenizer("abc\n")
    with varied(config(vocab_size=4)) as model:
        with pytest.raises(GptcError, match=r"after 'ab': the rules allow 'é', '한'; use a dif"):
            generate(model, tokenizer, "a", regex="ab(é|한)")
        with pytest.raises(
            GptcError, match="no token can begin the text: the rules allow 'x', 'y'"
        ):
            generate(model, tokenizer, "a", regex="[xyz]*")
        with pytest.raises(GptcError, match="'d', 'e', 'f', 'g', 'h', 'i', 'j', 'k', …"):
            generate(model, tokenizer, "a", regex="[d-z]")
        assert generate(model, tokenizer, "a", regex="a[d-z]*") == ["a"]  # complete, at least
        with pytest.raises(UsageError, match="only the empty text matches the regex"):
            generate(model, tokenizer, "a", regex="(|){3}")
        with pytest.raises(GptcError, match="leave no token to draw"):
            generate(model, tokenizer, "a", regex="a", bias=((1, float("-inf")),))


def test_too_many_ways_fail_one_text_alone(
    writer: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(constraint.LIMITS, "step_max_items", 80)
    grammar = 'root ::= "a" s\ns ::= [b-d] s s | ""'
    request = make_request(writer, tokenizer, "x", grammar=grammar, max_tokens=60)
    from gptc.generation.decoder import Decoder

    other = make_request(writer, tokenizer, "x", max_tokens=9, stop=())
    samples = [*request.samples(tokenizer), *other.samples(tokenizer)]
    for _ in Decoder(writer, tokenizer, 2).run(samples):
        pass
    assert samples[0].finish == "error"
    assert "parsed in too many ways" in str(samples[0].error)
    assert (samples[1].finish, samples[1].n_tokens) == ("length", 9)


def test_what_excludes_each_other(writer: Model, tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="a regex and a grammar exclude each other"):
        generate(writer, tokenizer, "a", regex="a", grammar='root ::= "a"')
    with pytest.raises(UsageError, match="a grammar and a JSON schema exclude each other"):
        generate(writer, tokenizer, "a", json_schema=True, grammar='root ::= "a"')
    request = make_request(writer, tokenizer, "a", regex="[a-z]+")
    with pytest.raises(
        UsageError, match="beam search takes no regex, grammar or JSON schema: leave out --beams"
    ):
        beam_search(writer, tokenizer, request, 2)
