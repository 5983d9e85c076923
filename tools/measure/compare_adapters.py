"""Compares greedy text of adapters in gptc and in llama.cpp, merged and as a GGUF adapter.

    pip install llama-cpp-python
    gptc export -m RUN --merge --to gguf --dtype fp32 --out merged.gguf
    gptc export -m RUN --to gguf --out adapter.gguf
    gptc export -m model.gguf --to gguf --dtype fp32 --out base.gguf
    python tools/measure/compare_adapters.py base.gguf adapter.gguf merged.gguf people.jsonl

Prompts are the instructions of the first rows, through the model's chat template, and all programs
get the same tokens. Without rounded weights, a difference is a fault or a tie of two logits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from gptc import Model
from gptc.checkpoint.find import open_checkpoint
from gptc.checkpoint.merged import AdapterSet
from gptc.tokenizer.chat import chat_prompt

N_PROMPTS, N_TOKENS, N_CTX = 10, 32, 256


def ours(path: Path, prompts: list[list[int]], adapter: Path | None = None) -> list[Any]:
    """The tokens after each prompt, and the logits after the prompt, by gptc."""
    adapters = AdapterSet(open_checkpoint(path), [adapter]) if adapter else None
    lora = adapters.lora if adapters else None
    found = []
    with Model.load(path, dtype="fp32", device="cpu", training=False, lora=lora) as model:
        if adapters:
            adapters.use(model, adapters.names[0])
        for prompt in prompts:
            with model.session(1, N_CTX) as session:
                first = logits = session.decode(np.array(prompt, np.int32))
                tokens = []
                for _ in range(N_TOKENS):
                    tokens.append(int(np.argmax(logits)))
                    logits = session.decode(np.array(tokens[-1:], np.int32))
            found.append((tokens, np.array(first).ravel()))
    return found


def theirs(path: Path, prompts: list[list[int]], adapter: Path | None = None) -> list[Any]:
    """The same by llama.cpp."""
    from llama_cpp import Llama

    llama: Any = Llama(
        str(path),
        lora_path=str(adapter) if adapter else None,
        n_ctx=N_CTX,
        n_threads=2,
        logits_all=True,
        verbose=False,
    )
    found = []
    for prompt in prompts:
        llama.reset()
        llama.eval(prompt)
        first = logits = np.array(llama.scores[llama.n_tokens - 1])
        tokens = []
        for _ in range(N_TOKENS):
            tokens.append(int(np.argmax(logits)))
            llama.eval(tokens[-1:])
            logits = llama.scores[llama.n_tokens - 1]
        found.append((tokens, first))
    return found


def main() -> None:
    base, adapter, merged, rows = map(Path, sys.argv[1:5])
    asked = [json.loads(line)["instruction"] for line in rows.read_text().splitlines()[:N_PROMPTS]]
    tokenizer = open_checkpoint(merged).tokenizer()
    prompts = [
        list(chat_prompt(tokenizer, [{"role": "user", "content": question}])) for question in asked
    ]
    cases: dict[str, tuple[Any, ...]] = {"base": (base,), "merged": (merged,)}
    for name, case in (cases | {"adapter": (base, adapter)}).items():
        model, *more = case
        pairs = list(zip(ours(model, prompts, *more), theirs(model, prompts, *more), strict=True))
        n_same = sum(one[0] == other[0] for one, other in pairs)
        apart = max(
            np.linalg.norm(one[1] - other[1]) / np.linalg.norm(one[1]) for one, other in pairs
        )
        print(f"{name}: {n_same} of {len(pairs)} texts are the same, logits differ by {apart:.1e}")


if __name__ == "__main__":
    main()
