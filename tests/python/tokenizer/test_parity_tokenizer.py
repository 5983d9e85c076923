"""AutoTokenizer reads a checkpoint's tokenizer: the same ids, and the text comes back."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from gptc import Model
from gptc.checkpoint.reader import Checkpoint
from gptc.tokenizer.byte_level import to_characters
from gptc.tokenizer.registry import make_tokenizer
from pretokenizers import TEXTS
from small_models import make_config
from vocabularies import LLAMA, byte_level, gpt2_folder, small_tiktoken

TEXT = "the cat sat on the mat, and the hat.\nthe cat  ran\n\n" * 5
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers"),
]


@pytest.mark.parametrize("kind", ["bytes", "char", "bpe", "gpt2", "tiktoken", "json", "llama"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_auto_tokenizer_reads_a_checkpoint(
    tmp_path: Path, kind: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if kind == "gpt2":
        if gpt2_folder() is None:
            pytest.skip("no GPT-2 vocabulary")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_folder()))
    if kind == "llama" and not LLAMA.is_file():
        pytest.skip("no llama2-tokenizer.model")
    if kind == "tiktoken":
        tokenizer = small_tiktoken()
    else:
        spec = {"bpe": "bpe:300", "llama": str(LLAMA)}.get(kind, kind)
        spec = str(byte_level(tmp_path)) if kind == "json" else spec
        tokenizer = make_tokenizer(spec, [TEXT.encode()])
    config = make_config(family, vocab_size=tokenizer.vocab_size)
    with Model.create(config, threads=1) as model:
        model.save(tmp_path / "model", tokenizer)
    Checkpoint(tmp_path / "model").verify()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = theirs.encode(TEXT, add_special_tokens=False)
    assert ids == tokenizer.encode(TEXT).tolist()
    assert theirs.decode(ids) == TEXT
    if tokenizer.end_of_text is not None:
        assert theirs.eos_token_id == tokenizer.end_of_text
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.vocab_size == (
        tokenizer.vocab_size
    )


def test_qwens_pair_of_files_has_the_ids_of_its_class(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    vocab = {to_characters(bytes([i])): i for i in range(256)} | {"he": 256, "ll": 257}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\nl l\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    ours, theirs = make_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__.startswith("Qwen2Tokenizer")
    for text in [*TEXTS, "hello<|endoftext|>hell"]:
        assert ours.encode(text).tolist() == theirs.encode(text), text
    assert ours.end_of_text == theirs.eos_token_id
