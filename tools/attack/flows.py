"""What a user does in Python, in every dtype, for a library that is built with sanitizers.

    cmake --preset asan && cmake --build --preset asan --target gpt
    python tools/attack/flows.py build/asan/libgpt.so

Trains in fp32 and bf16, saves, loads, quantizes, computes losses and logits, decodes, samples, and
passes wrong arguments. With a library it starts itself again with that one and AddressSanitizer,
whose first report ends it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from gptc import GPTConfig, Model, generate
from gptc.checkpoint.find import open_checkpoint
from gptc.convert.export_model import export_model
from gptc.errors import GptcError
from gptc.formats.registry import open_model
from gptc.tokenizer.registry import make_tokenizer

_SHAPES = {
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 66},  # odd sizes: the ends of rows and tiles
    "tiny": {"n_layer": 2, "n_head": 3, "n_kv_head": 1, "n_embd": 78, "n_ff": 100},
    "byte": {"n_layer": 2, "n_head": 2, "n_embd": 68, "n_ff": 99},
}
T = 37


def train(model: Model, tokens: np.ndarray) -> None:
    x, y = tokens[:, :-1], tokens[:, 1:]
    for _ in range(3):
        model.train_step([x, x], [y, y], lr=1e-3)
    ignored = np.where(np.arange(T - 1) % 3 == 0, -1, y)
    assert np.isfinite(model.losses(x, ignored)).all()
    model.write("wte.weight", "moment1", model.read("wte.weight", "moment1"))


def infer(folder: Path, dtype: str, tokens: np.ndarray) -> None:
    """Everything that a model for inference does."""
    tokenizer = make_tokenizer("bytes")
    with Model.load(folder, dtype=dtype, threads=2, max_batch=3) as model:
        assert np.isfinite(model.logits(tokens)).all()
        assert np.isfinite(model.loss(tokens, tokens))
        with model.session(3, T) as session:
            seqs = np.repeat(np.arange(3), T // 2)
            session.decode(tokens[:, : T // 2].ravel(), seqs)
            session.fork(0, 1)
            session.decode(tokens[:, T // 2], np.arange(3))
            session.rewind(2, 1)
        for options in ({"temperature": 0}, {"top_k": 5, "top_p": 0.9, "num_samples": 3}):
            generate(model, tokenizer, "Once", max_tokens=20, seed=3, **options)
        generate(model, tokenizer, "a", max_tokens=9, regex="[a-f]+x", repetition_penalty=1.2)
        for wrong in (lambda: model.logits(tokens + 300), lambda: model.session(0)):
            try:
                wrong()
            except GptcError:
                continue
            raise AssertionError("a wrong argument was taken")


def flows(folder: Path) -> int:
    n = 0
    tokens = np.random.default_rng(0).integers(0, 256, (3, T), dtype=np.int32)
    for preset, shape in _SHAPES.items():
        config = GPTConfig.preset(preset, vocab_size=256, block_size=T, **shape)
        for dtype in ("fp32", "bf16"):
            path = folder / f"{preset}-{dtype}"
            options = {"dtype": dtype, "device": "cpu", "threads": 2, "dropout": 0.1}
            with Model.create(config, max_batch=3, max_seq=T, **options) as model:
                train(model, tokens)
                model.save(path, make_tokenizer("bytes"))
            for inferred in ("fp32", "bf16", "int8", "int4"):
                infer(path, inferred, tokens)
                n += 1
        if preset != "byte":
            export_model(open_checkpoint(path), "gguf", folder / f"{preset}.gguf")
            open_model(folder / f"{preset}.gguf").check()
    return n


def main() -> int:
    if len(sys.argv) == 2:
        runtime = subprocess.run(
            ["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
        )
        # Python keeps what it has until its end, which are not leaks of the library.
        settings = {
            "GPTC_LIBRARY": sys.argv[1],
            "LD_PRELOAD": runtime.stdout.strip(),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        return subprocess.run([sys.executable, __file__], env=os.environ | settings).returncode
    with tempfile.TemporaryDirectory() as folder:
        n = flows(Path(folder))
    print(f"{n} models trained, saved, loaded and sampled from: no report")
    return 0


if __name__ == "__main__":
    sys.exit(main())
