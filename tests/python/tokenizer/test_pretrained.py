"""Tokenizers of other libraries give the ids of those libraries, and are stored whole."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, cast

import pytest

from corpus import nasty_text
from gptc.data.preparation import prepare
from gptc.errors import GptcError
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.pretrained import read_sentencepiece
from gptc.tokenizer.registry import make_tokenizer, read_tokenizer
from gptc.tokenizer.with_tokenizers import HuggingFaceTokenizer, _check_normalizer
from vocabularies import (
    LLAMA,
    TEXT,
    byte_level,
    gpt2_folder,
    needs_gpt2,
    small_tiktoken,
)


@pytest.fixture(params=["tiktoken", "byte_level", "llama"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "tiktoken":
        return small_tiktoken()
    if request.param == "byte_level":
        return make_tokenizer(str(byte_level(tmp_path)))
    pytest.importorskip("sentencepiece")
    if not LLAMA.is_file():
        pytest.skip("no llama2-tokenizer.model")
    return make_tokenizer(str(LLAMA))


def test_it_is_stored_whole(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "stored"
    folder.mkdir()
    tokenizer.save(folder)
    again = read_tokenizer(folder)
    assert again.to_json() == tokenizer.to_json()
    assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    saved = json.loads((folder / "gptc_tokenizer.json").read_text())
    for change in ({"kind": "bytes"}, {"vocab_size": 3}, {"fingerprint": "0"}):
        (folder / "gptc_tokenizer.json").write_text(json.dumps(saved | change))
        with pytest.raises(GptcError, match="altered"):
            read_tokenizer(folder)


def test_text_comes_back(tokenizer: Tokenizer) -> None:
    for text in (TEXT, "Naïve café, 東京 😀 don't\n\n  Zoë's 12345\tx"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.pieces) == tokenizer.vocab_size
    end = tokenizer.end_of_text
    tokens = tokenizer.encode("the<|endoftext|>the").tolist()
    assert tokens.count(end) == 1
    assert tokens.index(end) == len(tokens) // 2


def test_bytes_that_are_no_text_become_tokens_of_bytes(tokenizer: Tokenizer) -> None:
    data = b"the \xff\xfe cat \xe6\x9d"
    assert tokenizer.decode_bytes(tokenizer.encode_raw(data)).strip() == data
    with pytest.raises(GptcError, match="byte 4 "):
        tokenizer.encode_bytes(data)


def test_the_ids_are_those_of_the_library(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    path = byte_level(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(path))
    ours = make_tokenizer(str(path))
    assert ours.encode(TEXT).tolist() == theirs.encode(TEXT).ids
    assert make_tokenizer(str(tmp_path)).fingerprint() == ours.fingerprint()  # its folder will do


@pytest.mark.skipif(not LLAMA.is_file(), reason="no llama2-tokenizer.model")
def test_llama_2_agrees_with_sentencepiece() -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(LLAMA))
    ours = make_tokenizer(str(LLAMA))
    assert (ours.vocab_size, ours.end_of_text) == (32000, 2)
    for text in (TEXT, "Once upon a time", "東京 😀\n\n x"):
        assert ours.encode(text).tolist() == theirs.encode(text)


@needs_gpt2
def test_an_encoding_of_tiktoken_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_folder()))
    theirs = tiktoken.get_encoding("gpt2")  # the only one that needs no network here
    monkeypatch.setattr(tiktoken, "get_encoding", {"r50k_base": theirs}.__getitem__)
    ours = make_tokenizer("r50k_base")
    text = nasty_text(random.Random(3), 400)
    assert ours.encode(text).tolist() == theirs.encode(text, allowed_special="all")
    assert ours.vocab_size == theirs.n_vocab


def test_an_encoding_that_cannot_be_had_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import requests
    import tiktoken

    def fail(name: str) -> None:
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(GptcError, match=r"cl100k_base .*TIKTOKEN_CACHE_DIR"):
        make_tokenizer("cl100k_base")


def test_pieces_that_only_look_like_bytes() -> None:
    assert read_sentencepiece("<0x0A>") == b"\n"
    for piece in ("<0xZZ>", "<0x+1>", "<0x1>"):
        assert read_sentencepiece(piece) == piece.encode()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    (tmp_path / "a.model").write_bytes(b"no model")
    with pytest.raises(GptcError, match=r"a\.model is not a tokenizer that sentencepiece"):
        make_tokenizer(str(tmp_path / "a.model"))
    for content in (b"", b"\n\x03\n\x01\xff"):
        (tmp_path / "a.model").write_bytes(content)
        with pytest.raises(GptcError, match=r"a\.model is not a tokenizer that sentencepiece"):
            make_tokenizer(str(tmp_path / "a.model"))
    (tmp_path / "b.json").write_text('{"model": {"type": "Words"}}')
    with pytest.raises(GptcError, match=r"b\.json is not a tokenizer that tokenizers"):
        make_tokenizer(str(tmp_path / "b.json"))


def test_a_dataset_is_made_with_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    tokenizer.save(given)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"the cat {i}"}) + "\n" for i in range(20)))
    dataset = prepare([str(rows)], tmp_path / "out", tokenizer=str(given))
    tokens = [int(t) for split in ("train", "val") for t in dataset.shard(split, 0)]
    assert tokens[0] == tokenizer.end_of_text  # a document starts with it, as in llm.c
    assert tokens.count(tokenizer.end_of_text) == 20
    assert dataset.shard("val", 0)[0] == tokenizer.end_of_text
    assert dataset.tokenizer.fingerprint() == tokenizer.fingerprint()


def test_a_normalizer_with_a_number_in_place_of_a_text_is_left_to_its_library() -> None:
    _check_normalizer({"type": "Replace", "pattern": {"String": 0}, "content": "a"}, "it")


class Counted:
    """A tokenizer of the library, which counts the ids that it is asked for."""

    def __init__(self, made: Any) -> None:
        self.made, self.n_asked = made, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.made, name)

    def id_to_token(self, id: int) -> str | None:
        self.n_asked += 1
        return cast("str | None", self.made.id_to_token(id))


@pytest.mark.parametrize("hole", [0, 1, 1000])
def test_ids_beyond_the_number_of_tokens_are_asked_for_where_some_are_missing(
    tmp_path: Path, hole: int
) -> None:
    definition = json.loads(byte_level(tmp_path).read_bytes())
    vocabulary = definition["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.__getitem__)
    vocabulary[last] += hole
    tokenizer: Any = HuggingFaceTokenizer(json.dumps(definition))
    assert tokenizer.vocab_size == len(vocabulary) + hole
    tokenizer._tokenizer = counted = Counted(tokenizer._tokenizer)
    names = dict(tokenizer._names("it"))
    assert (len(names), names[last]) == (len(vocabulary), vocabulary[last])
    assert (counted.n_asked <= 2 * len(vocabulary)) == (hole == 0)
