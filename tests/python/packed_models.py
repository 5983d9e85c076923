"""GGUF files of random blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gptc.engine.config import GPTConfig
from gptc.formats import layout
from gptc.formats.blocks import BLOCKS, Blocks
from gptc.formats.family_names import GGUF_SPLIT
from gptc.formats.gguf import GgufModel
from gptc.formats.gguf_container import ALIGNMENT, header
from gptc.formats.layout import Naming, Part
from gptc.formats.numbers import F16, F32, Codec
from small_models import make_config

CONFIG = make_config("llama", n_embd=256, n_ff=512, vocab_size=96, n_layer=2, tied=True)
BY_NAME = {kind.name: kind for kind in BLOCKS}
# As llama.cpp's Q4_K_M: some values, and what leads back to the residual stream, are finer.
MIXED = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q8_0"}


# What the integers of a type have above the middle of its numbers, where it has minima.
MIDDLES = {"Q4_1": -7.5, "Q5_1": -15.5, "Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}


def random_blocks(kind: Blocks, shape: tuple[int, ...], rng: np.random.Generator) -> bytes:
    """Blocks whose numbers are about as large as the weights of a model, and of both signs."""
    size = (kind.n_bytes(shape) // kind.block_bytes, kind.block_bytes)
    blocks = rng.integers(0, 256, size, np.uint8)
    scales = rng.uniform(0.5, 1.5, len(blocks)) * rng.choice([-1, 1], len(blocks))
    for unit in (1.0, 0.06):
        for i, at in enumerate(kind.scales_at):
            halves = (unit * scales * (MIDDLES[kind.name] if i else 1)).astype("<f2")
            blocks[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
        scales /= kind.dequantize(blocks[:64]).std()
    return blocks.tobytes()


def write_gguf(
    path: Path, kinds: dict[str, str], rest: str, seed: int = 1, config: GPTConfig | None = None
) -> GgufModel:
    """A Llama with random blocks: of `kinds` by a part of a tensor's name, else of `rest`."""
    config = config or CONFIG
    rng = np.random.default_rng(seed)
    codecs: list[tuple[Part, Codec]] = []
    for part in layout.parts(config, Naming(layout.with_leaves(GGUF_SPLIT))):
        name = next((kind for mark, kind in kinds.items() if mark in part.name), rest)
        codecs.append((part, BY_NAME.get(name, F16) if len(part.shape) == 2 else F32))
    sizes = {
        "context_length": config.block_size,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.n_ff,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": config.n_kv_head,
    }
    values = {"general.architecture": "llama", "tokenizer.ggml.model": "no_vocab"}
    values |= {f"llama.{key}": size for key, size in sizes.items()}
    with path.open("wb") as file:
        file.write(header(values, [(part.name, codec, part.shape) for part, codec in codecs]))
        for part, codec in codecs:
            if isinstance(codec, Blocks):
                data = random_blocks(codec, part.shape, rng)
            else:
                mean = 1.0 if len(part.shape) == 1 else 0.0
                data = bytes(codec.encode(rng.normal(mean, 0.06, part.shape).astype(np.float32)))
            file.write(data + bytes(-len(data) % ALIGNMENT))
    return GgufModel(path)
