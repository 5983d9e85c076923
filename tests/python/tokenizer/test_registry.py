"""A saved tokenizer loads unchanged, and damaged files and unknown names are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from corpus import MIXED
from gptc.errors import GptcError, UsageError
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.native import ByteTokenizer, CharTokenizer, Gpt2Tokenizer
from gptc.tokenizer.registry import bpe_size, make_tokenizer, read_tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [ByteTokenizer("<|endoftext|>\n"), CharTokenizer(MIXED + '\u2028\\"', "é"), Gpt2Tokenizer()],
    ids=lambda tokenizer: str(tokenizer.kind),
)
def test_a_saved_tokenizer_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "gptc_tokenizer.json"):
        loaded = read_tokenizer(path)
        assert type(loaded) is type(tokenizer)
        assert loaded.to_json() == tokenizer.to_json()
        assert loaded.start == tokenizer.start
    assert make_tokenizer(str(tmp_path)).fingerprint() == tokenizer.fingerprint()
    assert [path.name for path in tmp_path.iterdir()] == ["gptc_tokenizer.json"]


def test_a_fingerprint_tells_mappings_apart() -> None:
    tokenizers = [ByteTokenizer(), CharTokenizer("ab"), CharTokenizer("abc"), Gpt2Tokenizer()]
    assert len({tokenizer.fingerprint() for tokenizer in tokenizers}) == 4
    assert CharTokenizer("ab", "a").fingerprint() == CharTokenizer("ba", "b").fingerprint()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"characters": "abd"}, "altered"),
        ({"vocab_size": 4}, "altered"),
        ({"kind": "word"}, "altered"),
        ({"characters": None}, "altered"),
        ({"start": ""}, "altered"),
        ({"version": 5}, "newer"),
    ],
)
def test_an_altered_file_is_refused(change: dict[str, object], why: str, tmp_path: Path) -> None:
    CharTokenizer("abc").save(tmp_path)
    path = tmp_path / "gptc_tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(GptcError, match=why):
        read_tokenizer(tmp_path)


def test_a_missing_or_truncated_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GptcError, match=r"no tokenizer at .*gptc_tokenizer\.json"):
        read_tokenizer(tmp_path)
    CharTokenizer("abc").save(tmp_path)
    path = tmp_path / "gptc_tokenizer.json"
    for content in (path.read_bytes()[:-9], b"", b"[]", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(GptcError, match=r"gptc_tokenizer\.json (is damaged|was altered)"):
            read_tokenizer(path)


def test_a_text_is_not_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("once")
    with pytest.raises(UsageError, match=r"story\.txt is not a tokenizer's file: choose bytes, "):
        make_tokenizer(str(tmp_path / "story.txt"))


def test_an_unknown_kind_lists_the_kinds() -> None:
    with pytest.raises(UsageError, match="bytes, char, gpt2"):
        make_tokenizer("words")
    for path in ("tokenizer.json", "a/b", "llama.model"):
        with pytest.raises(UsageError, match=f"the tokenizer {path} does not exist"):
            make_tokenizer(path)


@pytest.mark.parametrize("name", ["bpe:257", "bpe:x", "bpe:", "bpe:-3", "bpe:99999999", "bpe:2M"])
def test_bpe_needs_a_sensible_size(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}: the vocabulary size .* 258 to 1,048,576"):
        make_tokenizer(name, [b"text"])


def test_bpe_sizes_take_a_suffix() -> None:
    assert bpe_size("bpe:4K") == bpe_size("bpe:4000") == 4000
