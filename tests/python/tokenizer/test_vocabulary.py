"""A tokenizer written to GGUF or llama2.c and read again gives the same ids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptc.checkpoint.reader import Checkpoint
from gptc.convert.export_model import export_model
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError
from gptc.formats import gguf_tokenizer
from gptc.formats.hf_tokenizer import hf_files
from gptc.formats.registry import open_model
from gptc.tokenizer.registry import make_tokenizer
from gptc.tokenizer.with_tokenizers import HuggingFaceTokenizer
from small_models import make_checkpoint
from vocabularies import LLAMA, gpt2_folder

Config = Callable[..., GPTConfig]


@pytest.mark.parametrize("kind", ["bytes", "bpe", "char", "gpt2", "llama"])
def test_tokenizers_go_through_gguf(
    config: Config, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = ["the cat sat on the mat and the hat; " * 30]
    if kind == "llama":
        pytest.importorskip("sentencepiece")
        if not LLAMA.is_file():
            pytest.skip("no llama2-tokenizer.model")
    if kind == "gpt2":
        if gpt2_folder() is None:
            pytest.skip("no GPT-2 vocabulary")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_folder()))
    spec = {"llama": str(LLAMA), "bpe": "bpe:300"}.get(kind, kind)
    tokenizer = make_tokenizer(spec, [text[0].encode()])
    shape = config("llama", vocab_size=tokenizer.vocab_size + 3)
    source = make_checkpoint(shape, "", tmp_path / "source")
    tokenizer.save(source.path)
    (source.path / "checksums.json").unlink()
    source = Checkpoint(source.path)
    assert export_model(source, "gguf", tmp_path / "m.gguf").notes == []
    again = open_model(tmp_path / "m.gguf").tokenizer()
    for line in (text[0], "the cat  sat, on\n\n" if kind != "char" else "the mat"):
        assert again.encode(line).tolist() == tokenizer.encode(line).tolist()
    if kind != "llama":
        assert again.fingerprint() == tokenizer.fingerprint()
    assert again.end_of_text == tokenizer.end_of_text
    export_model(source, "llama2.c", tmp_path / "m.bin")
    third = open_model(tmp_path / "m.bin").tokenizer()
    assert third.encode(text[0]).tolist() == tokenizer.encode(text[0]).tolist()


def test_a_tokenizer_json_of_llama_2s_sort_goes_through_gguf() -> None:
    """As TinyLlama publishes it: pieces of text, and bytes for what they lack."""
    pytest.importorskip("sentencepiece")
    if not LLAMA.is_file():
        pytest.skip("no llama2-tokenizer.model")
    theirs = make_tokenizer(str(LLAMA))
    definition = hf_files(theirs, 48)["tokenizer.json"].decode()
    ours = HuggingFaceTokenizer(definition)
    again = gguf_tokenizer.from_gguf(gguf_tokenizer.to_gguf(ours, 32_000), "it")
    for text in ("Once upon a time, 東京 😀", "  the cat\n\nsat", "don't 123"):
        expected = theirs.encode(text).tolist()
        assert ours.encode(text).tolist() == expected
        assert again.encode(text).tolist() == expected


def test_a_tokenizer_that_sets_digits_apart_goes_through_gguf() -> None:
    """As SmolLM's: every digit alone, then GPT-2's pattern between the digits."""
    tokenizers = pytest.importorskip("tokenizers")
    steps = tokenizers.pre_tokenizers
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = steps.Sequence(
        [steps.Digits(individual_digits=True), steps.ByteLevel(add_prefix_space=False)]
    )
    theirs.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>"],  # first, as there
        initial_alphabet=steps.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator(
        ["the cat's 12  hats;   the mat\n\n  sat  !!  they'll 東京 "] * 9, trainer
    )
    ours = HuggingFaceTokenizer(theirs.to_str())
    values = gguf_tokenizer.to_gguf(ours, 400)
    assert values["pre"] == "smollm"
    again = gguf_tokenizer.from_gguf(values, "it")
    parts = [*"a1 2\n\t'!²Ⅷ½٣", "the", "  ", "cat", "'s", "'ll", "東京", "\u3000", "<|endoftext|>"]
    rng = np.random.default_rng(0)
    for _ in range(2000):
        text = "".join(rng.choice(parts, rng.integers(1, 12)))
        assert again.encode(text).tolist() == theirs.encode(text).ids
    # Another order of the same steps, or digits in groups, is not that.
    for wrong in (
        [steps.ByteLevel(add_prefix_space=False), steps.Digits(individual_digits=True)],
        [steps.Digits(individual_digits=False), steps.ByteLevel(add_prefix_space=False)],
        [steps.Whitespace(), steps.ByteLevel(add_prefix_space=False)],
    ):
        theirs.pre_tokenizer = steps.Sequence(wrong)
        with pytest.raises(GptcError, match=r"llama\.cpp has no"):
            gguf_tokenizer.to_gguf(HuggingFaceTokenizer(theirs.to_str()), 400)


def test_gpt2s_tokenizer_is_known_by_its_merges(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published folders hold a tokenizer.json; datasets are made with our "gpt2"."""
    if gpt2_folder() is None:
        pytest.skip("no GPT-2 vocabulary")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_folder()))
    tokenizer = make_tokenizer("gpt2")
    shape = config("gpt2", vocab_size=50257)
    source = make_checkpoint(shape, "gpt2", tmp_path / "source")
    for name in ("gptc_tokenizer.json", "checksums.json"):
        (source.path / name).unlink()
    # With nothing but that file: its merges go into our own cache.
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setenv("GPTC_CACHE", str(tmp_path / "cache"))
    again = Checkpoint(source.path).tokenizer()
    assert again.kind == "gpt2"
    assert again.encode("Hello world").tolist() == tokenizer.encode("Hello world").tolist()
