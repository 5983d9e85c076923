"""What `generate` returns: texts, details, several prompts; errors name parameters.

The class: what the command line gives, and Python does not, or by other names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from gptc import Completion, Model, generate, stream
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError, UsageError, python_names
from gptc.tokenizer.base import Tokenizer
from small_models import softmax, varied


@pytest.fixture
def writer(config: Callable[..., GPTConfig]) -> Iterator[Model]:
    with varied(config()) as model:
        yield model


def test_details_of_a_text(writer: Model, tokenizer: Tokenizer) -> None:
    (text,) = generate(writer, tokenizer, "Once", max_tokens=9, seed=5)
    (found,) = generate(
        writer, tokenizer, "Once", max_tokens=9, seed=5, logprobs=2, return_details=True
    )
    assert isinstance(found, Completion)
    assert (found.text, found.n_prompt, found.finish) == (text, 4, "length")
    assert tokenizer.decode(found.tokens) == text
    logits = writer.logits(np.array([[*tokenizer.encode("Once"), *found.tokens]]))[0]
    for i, entry in enumerate(found.logprobs):
        p = softmax(logits[3 + i])
        assert entry.token == found.tokens[i]
        assert entry.logprob == pytest.approx(np.log(p[entry.token]), abs=1e-3)
        assert [t for t, _ in entry.top] == list(np.argsort(-p)[:2])


def test_reasons_to_end(writer: Model, tokenizer: Tokenizer) -> None:
    def finish(**options: object) -> tuple[str, str]:
        (found,) = generate(
            writer, tokenizer, "Once", seed=5, return_details=True, **options
        )  # fmt: skip
        return found.finish, found.text

    _, text = finish(max_tokens=9)
    stop = text[4]
    assert finish(max_tokens=9, stop=stop) == ("stop", text[: text.index(stop)])
    assert finish(max_tokens=10**6, stop=())[0] == "context"


def test_a_stop_string_is_one_string(writer: Model, tokenizer: Tokenizer) -> None:
    (text,) = generate(writer, tokenizer, "Once", max_tokens=20, seed=5, stop=())
    two = text[6:8]
    expected = text[: text.index(two)]
    assert generate(writer, tokenizer, "Once", max_tokens=20, seed=5, stop=two) == [expected]
    assert "".join(stream(writer, tokenizer, "Once", max_tokens=20, seed=5, stop=two)) == expected


def test_several_prompts_are_decoded_as_each_alone(writer: Model, tokenizer: Tokenizer) -> None:
    options = {"max_tokens": 9, "seed": 5, "num_samples": 2}
    prompts = ["Once", "A", "There was"]
    alone = [generate(writer, tokenizer, prompt, **options) for prompt in prompts]
    assert generate(writer, tokenizer, prompts, **options) == alone
    details = generate(writer, tokenizer, prompts, return_details=True, **options)
    assert [[c.text for c in each] for each in details] == alone
    assert [each[0].n_prompt for each in details] == [4, 1, 9]


def test_errors_name_python_parameters(writer: Model, tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match=r"^top_p is 0; it must be above 0"):
        generate(writer, tokenizer, "a", top_p=0)
    with pytest.raises(GptcError, match=r"newer half with context_shift$"):
        stream(writer, tokenizer, "a" * 1000)
    with (
        pytest.raises(GptcError, match=r"^min_lr: try gptc train --resume R --lr 3, or val_by$"),
        python_names(),
    ):
        raise GptcError("--min-lr: try gptc train --resume R --lr 3, or --val-by")


@pytest.mark.parametrize(
    ("option", "wanted"),
    [
        ({"stop": 3}, "a list"),
        ({"stop": ["a", 3]}, "text, or a list of texts"),
        ({"bias": {5: 1.0}}, "a list"),
        ({"bias": [5]}, r"a list of \(token id, number\)"),
        ({"max_tokens": "9"}, "a whole number"),
        ({"temperature": None}, "a number"),
        ({"regex": 5}, "text"),
        ({"json_schema": 5}, "text"),
    ],
)
def test_values_of_the_wrong_type_are_named(
    writer: Model, tokenizer: Tokenizer, option: dict[str, Any], wanted: str
) -> None:
    (name,) = option
    with pytest.raises(UsageError, match=rf"^{name} is .*; it must be {wanted}$"):
        generate(writer, tokenizer, "a", **option)


def test_options_may_be_numbers_of_numpy(writer: Model, tokenizer: Tokenizer) -> None:
    options: dict[str, Any] = {"max_tokens": 5, "seed": 3, "temperature": 0.5}
    theirs = {"max_tokens": np.int64(5), "seed": np.uint32(3), "temperature": np.float32(0.5)}
    assert generate(writer, tokenizer, "a", **theirs) == generate(writer, tokenizer, "a", **options)
