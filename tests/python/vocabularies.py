"""Tokenizers of other libraries: small ones, GPT-2's, Llama 2's, and models that include one."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from corpus import DOWNLOADS
from gptc.tokenizer import native as module
from gptc.tokenizer import scored, vocabulary
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.with_tiktoken import TiktokenTokenizer
from small_models import make_config, varied

LLAMA = DOWNLOADS / "llama2-tokenizer.model"
# cl100k_base's: the strictest of tiktoken's patterns about where text may be cut.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
TEXT = "the cat sat on the mat, and the hat.\n" * 20
PROMPT = "the cat sat"


_NAMED = os.environ.get("TIKTOKEN_CACHE_DIR")  # tests see an empty folder (conftest.py)


def gpt2_folder() -> Path | None:
    """A folder with the two GPT-2 files under tiktoken's names for them."""
    folders = [DOWNLOADS / "tiktoken-cache"]
    if _NAMED:
        folders.insert(0, Path(_NAMED))
    files = (module._GPT2_FILE, "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
    for folder in folders:
        if all((folder / file).is_file() for file in files):
            return folder
    return None


needs_gpt2 = pytest.mark.skipif(gpt2_folder() is None, reason="no GPT-2 vocabulary")


def assert_cut_is_exact(tokenizer: Tokenizer, data: bytes) -> int:
    """Compares both sides of every cut with the whole; returns the number of cuts."""
    whole = tokenizer.encode_bytes(data).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "encode", cache(tokenizer.encode))  # the same texts recur
        cuts = {tokenizer.cut(data[:end]) for end in range(1, len(data) + 1)} - {0}
    for cut in cuts:
        parts = [tokenizer.encode_bytes(data[:cut]), tokenizer.encode_bytes(data[cut:], True)]
        assert [*parts[0].tolist(), *parts[1].tolist()] == whole, (data, cut)
    return len(cuts)


def byte_level(folder: Path, end: str = "<|endoftext|>") -> Path:
    """A small tokenizer.json of GPT-2's sort."""
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[end],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([TEXT], trainer)
    trained.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def small_tiktoken() -> TiktokenTokenizer:
    """The bytes, a few merged pieces and two special tokens."""
    ranked = [bytes([i]) for i in range(256)]
    ranked += [b"th", b"the", b" the", b"at", b".\n", b"\n\n", b"12", b"..", b".\n\n"]
    return TiktokenTokenizer("small", PATTERN, ranked, {"<|endoftext|>": 270, "<|fim|>": 271})


# As in Llama 2: the unknown token, begin and end of a text, the bytes; then some letters.
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdefghilmnorstuw"]
TYPES = [scored.UNKNOWN, scored.CONTROL, scored.CONTROL]
TYPES += [scored.BYTE] * 256 + [scored.NORMAL] * (len(PIECES) - 259)


def llama_like() -> Tokenizer:
    """A small SentencePiece model of Llama 2's sort, without a token that begins a text."""
    pytest.importorskip("sentencepiece")
    scores = [0.0] * 259 + [-float(i) for i in range(len(PIECES) - 259)]
    return vocabulary.from_scored(scored.Scored(PIECES, scores, TYPES), "it")


def begun(tokenizer: Tokenizer, bos: int | None = 1) -> Tokenizer:
    """The tokenizer, with `bos` as the token that begins a text."""
    tokenizer.bos = bos
    return tokenizer


def template(name: str, token: int, added: bool = True) -> dict[str, Any]:
    """A post-processor as transformers writes it, even if it adds nothing."""
    begin = [{"SpecialToken": {"id": name, "type_id": 0}}] if added else []
    return {
        "type": "TemplateProcessing",
        "single": [*begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": part, "type_id": i}} for i, part in enumerate("AB")],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }


def published(folder: Path, tokenizer: Tokenizer, seed: int = 3) -> Path:
    """A small Llama as published by others: a template in tokenizer.json, no gptc files."""
    with varied(make_config("llama", vocab_size=tokenizer.vocab_size), seed=seed) as model:
        model.save(folder, begun(tokenizer, None))
    for name in ("gptc_tokenizer.json", "checksums.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "tokenizer.model").unlink(missing_ok=True)
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["post_processor"] = template("<s>", 1)
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
