"""Rows of conversations whose answers are JSON with fixed keys, and a small model to teach them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from gptc import Model
from gptc.engine.config import GPTConfig
from gptc.tokenizer.native import BpeTokenizer

NAMES = ["Amy", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hal", "Ivy", "Jon", "Kim", "Leo"]
CITIES = ["Oslo", "Rome", "Lima", "Bonn", "Cairo", "Quito", "Paris", "Seoul"]


def rows(n: int, seed: int = 1) -> list[dict[str, Any]]:
    """Instructions, and answers as JSON."""
    rng = random.Random(seed)
    found = []
    for _ in range(n):
        name, city, age = rng.choice(NAMES), rng.choice(CITIES), rng.randint(10, 90)
        asked = f"{name} is {age} years old and lives in {city}."
        answer = json.dumps({"name": name, "age": age, "city": city})
        found.append({"instruction": asked, "output": answer})
    return found


def write_rows(path: Path, found: list[dict[str, Any]]) -> Path:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def write_base(folder: Path, block_size: int = 128) -> Path:
    """A checkpoint of a small random model with a tokenizer that knows these words."""
    text = " ".join(row[name] + "\n" for row in rows(60) for name in ("instruction", "output"))
    tokenizer = BpeTokenizer.train(text + "<|im_start|>user assistant<|im_end|>" * 20, 400)
    config = GPTConfig.preset(
        "llama-15m",
        vocab_size=tokenizer.vocab_size,
        block_size=block_size,
        n_layer=2,
        n_head=4,
        n_kv_head=4,
        n_embd=64,
        n_ff=128,
    )
    with Model.create(config, threads=1, seed=3) as model:
        model.save(folder, tokenizer)
    return folder
