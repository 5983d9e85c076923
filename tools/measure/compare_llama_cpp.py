"""Compares llama.cpp on our GGUF files with gptc: greedy text, logits and tokens.

    pip install llama-cpp-python    # compiles for some minutes
    python tools/measure/compare_llama_cpp.py              # small random models of each shape
    python tools/measure/compare_llama_cpp.py --families   # those of tests/python/reference.py
    python tools/measure/compare_llama_cpp.py -m runs/tiny-stories --prompt "Once upon a time"

Greedy texts of float32 files must be the same, up to a step at which our two best logits are closer
than llama.cpp's rounding; that step is printed. Other dtypes are not compared: llama.cpp also
rounds activations.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gptc import Model
from gptc.checkpoint.facade import load_model
from gptc.checkpoint.find import open_checkpoint
from gptc.convert.export_model import export_model
from gptc.engine.arrays import FloatArray
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError
from gptc.formats import hf
from gptc.formats.model_file import ModelFile
from gptc.generation.request import prompt_tokens
from gptc.tokenizer.registry import make_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "python"))

import reference

TEXT = "the cat sat on the mat, and the hat.\nDon't 123 panic!"
_LLAMA3 = {"rope_factor": 8.0, "rope_low_freq": 1.0, "rope_high_freq": 4.0, "rope_original": 64}
_GROUPED = {"preset": "llama-15m", "n_head": 4, "n_kv_head": 2, "tied": False}
SHAPES = {
    "gpt2": {"preset": "gpt2", "n_head": 4, "n_embd": 64},
    "llama": {**_GROUPED, "n_embd": 64, "n_ff": 96},
    "llama-linear": {
        **_GROUPED,
        "n_embd": 128,
        "n_ff": 96,
        "rope_scaling": "linear",
        "rope_factor": 3.0,
    },
    "llama3": {**_GROUPED, "n_embd": 128, "n_ff": 96, "rope_scaling": "llama3", **_LLAMA3},
}


def random_model(folder: Path, name: str, tokenizer_name: str) -> ModelFile:
    """A model whose logits differ by more than rounding."""
    tokenizer = make_tokenizer(tokenizer_name, [TEXT.encode() * 50])
    shape = {"vocab_size": tokenizer.vocab_size, "block_size": 256, "n_layer": 2, **SHAPES[name]}
    config = GPTConfig.preset(str(shape.pop("preset")), **shape)
    rng = np.random.default_rng(11)
    with Model.create(config, training=False) as model:
        for parameter, size, decay in config.parameters():
            values = rng.normal(0, 0.2, size) if decay else rng.normal(1, 0.3, size)
            model.set(parameter, values.astype(np.float32))
        model.save(folder / f"{name}-{tokenizer_name.replace(':', '')}", tokenizer)
    return open_checkpoint(folder / f"{name}-{tokenizer_name.replace(':', '')}")


def family_model(folder: Path, case: reference.Case) -> ModelFile | None:
    """A model of a family, longer and with bytes as tokens; None if it has no GGUF file."""
    tokenizer = make_tokenizer("bytes", [])
    length = "n_positions" if case.kind in reference.GPT2_KEYS else "max_position_embeddings"
    sizes = {"vocab_size": tokenizer.vocab_size, length: 256}
    config = hf.config_from_json({**case.config, **sizes}, case.name)
    if config.window and not config.layers:  # llama.cpp has no windows there, as a note says
        config = replace(config, window=0)
    weights = reference.weights({part.name: part.shape for part in hf.parts(config)})
    with Model.create(config, training=False) as model:
        hf.import_tensors(config, Weights(weights), case.name, model.set)
        # llama.cpp looks for tokens of Phi-3 where the name says so.
        model.save(folder / case.name / "model", tokenizer)
    source = open_checkpoint(folder / case.name / "model")
    try:
        export_model(source, "gguf", folder / "try.gguf", replace=True)
    except GptcError as error:
        print(f"{case.name}: {error}")
        return None
    return source


def name_of(source: ModelFile) -> str:
    """The case that family_model saved, or the folder's name."""
    return source.path.parent.name if source.path.name == "model" else source.path.name


class Weights:
    """Named tensors in memory."""

    def __init__(self, values: dict[str, FloatArray]) -> None:
        self.values = values
        self.shapes = {name: tensor.shape for name, tensor in values.items()}

    def read(self, name: str) -> FloatArray:
        return self.values[name]

    def stored(self, name: str) -> None:
        return None

    def same(self, one: str, other: str) -> bool:
        return np.array_equal(self.values[one], self.values[other])


def compare(source: ModelFile, gguf: Path, text: str, n_tokens: int) -> bool:
    """Prints how far the two programs agree on a file; returns whether they agree enough."""
    import llama_cpp

    notes = export_model(source, "gguf", gguf, replace=True).notes
    if other := next((note for note in notes if "computes these models" in note), None):
        print(f"{name_of(source)}: {other}")
        return True
    ours = open_checkpoint(gguf)
    prompt = prompt_tokens(ours.tokenizer(), text)
    n_ctx = min(len(prompt) + n_tokens, ours.config.block_size)
    exact: dict[str, Any] = {"type_k": 0, "type_v": 0}  # a float32 KV cache, not float16
    # The file's rotary scaling, which the package's defaults would replace.
    exact |= dict.fromkeys(("yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"), -1.0)
    try:
        theirs = llama_cpp.Llama(str(gguf), n_ctx=n_ctx, verbose=False, logits_all=True, **exact)
    except ValueError as error:
        print(f"{name_of(source)}: {error}")
        return False
    # With "add_bos", the file decides whether there is one.
    same_ids = theirs.tokenize(text.encode(), add_bos=True, special=False) == prompt
    tokens, largest, closest, first = list(prompt), 0.0, np.inf, None
    with load_model(ours, max_batch=0) as model:
        session = model.session(1, n_ctx)
        logits = session.decode(np.array(prompt, np.int32))
        theirs.eval(prompt)
        while len(tokens) < n_ctx:
            other = np.array(theirs.scores[theirs.n_tokens - 1])
            largest = max(largest, float(np.abs(other - logits).max()))
            second, best = np.sort(logits)[-2:]
            token = int(np.argmax(logits))
            if token != int(np.argmax(other)) and first is None:
                first, closest = len(tokens) - len(prompt), float(best - second)
            tokens.append(token)
            theirs.eval([token])
            logits = session.decode(np.array([token], np.int32))
    agreed = first is None or closest < 2 * largest
    if first is None:
        text_found = f"the same for {len(tokens) - len(prompt)} tokens"
    else:
        same = "the same" if agreed else "DIFFERS"
        text_found = f"{same} up to token {first}, where our best logits are {closest:.2g} apart"
    print(
        f"{name_of(source)}: tokens of the text {'the same' if same_ids else 'DIFFER'}; "
        f"greedy {text_found}; logits differ by at most {largest:.2g}",
        flush=True,
    )
    return agreed and same_ids


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", help="model to compare; default: random ones")
    parser.add_argument("--families", action="store_true", help="compare those that gptc reads")
    parser.add_argument("--prompt", default=TEXT)
    parser.add_argument("--tokens", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            if options.model:
                sources = [open_checkpoint(options.model)]
            elif options.families:
                cases = [*reference.FAMILIES, *reference.ARCHITECTURES]
                found = [family_model(folder, case) for case in cases]
                sources = [source for source in found if source]
            else:
                pairs = [(shape, kind) for shape in SHAPES for kind in ("bytes", "bpe:300")]
                sources = [random_model(folder, *pair) for pair in pairs]
            results = [
                compare(source, folder / "model.gguf", options.prompt, options.tokens)
                for source in sources
            ]
        except (GptcError, ImportError) as error:
            print(f"compare_llama_cpp: {error}", file=sys.stderr)
            return 1
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
