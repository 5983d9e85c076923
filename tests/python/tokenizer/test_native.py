"""The byte, character, BPE and GPT-2 tokenizers are reversible, and cuts change no token."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from corpus import MIXED, nasty_text
from gptc.errors import GptcError
from gptc.tokenizer import native as module
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.native import BpeTokenizer, ByteTokenizer, CharTokenizer, Gpt2Tokenizer
from gptc.tokenizer.registry import make_tokenizer, read_tokenizer
from vocabularies import assert_cut_is_exact, byte_level, gpt2_folder, needs_gpt2


@pytest.fixture
def gpt2(monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_folder()))
    return make_tokenizer("gpt2")


# ---- bytes ----


def test_bytes_express_anything() -> None:
    tokenizer = make_tokenizer("bytes")
    data = bytes(range(256))
    tokens = tokenizer.encode_bytes(data)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == list(data)
    assert tokenizer.decode_bytes(tokens) == data
    assert tokenizer.decode(tokenizer.encode(MIXED)) == MIXED
    assert tokenizer.decode([0x61, 0xFF]) == "a\ufffd"
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (256, None)


def test_bytes_take_the_raw_bytes_of_a_command_line() -> None:
    argument = os.fsdecode(b"a\xff")
    assert ByteTokenizer().encode(argument).tolist() == [0x61, 0xFF]


@pytest.mark.parametrize("sort", ["bytes", "bpe", "tokenizers"])
def test_half_of_a_surrogate_pair_is_named(sort: str, tmp_path: Path) -> None:
    tokenizer: Tokenizer = ByteTokenizer()
    if sort == "bpe":
        tokenizer = make_tokenizer("bpe:260", [b"ab ab ab"])
    elif sort == "tokenizers":
        tokenizer = make_tokenizer(str(byte_level(tmp_path)))
    with pytest.raises(GptcError, match=r"character 2 of the text is U\+D83D, half of a surrogate"):
        tokenizer.encode("ab\ud83d")


# ---- char ----


def test_characters_are_numbered_in_order() -> None:
    tokenizer = make_tokenizer("char", [b"ba", "😀a".encode()])
    assert tokenizer.vocab_size == 3
    assert tokenizer.encode("ab😀").tolist() == [0, 1, 2]
    assert tokenizer.decode([2, 0]) == "😀a"
    assert tokenizer.count_bytes([2, 0]) == 5


def test_characters_are_collected_across_blocks() -> None:
    data = MIXED.encode()
    blocks = [data[i : i + 1] for i in range(len(data))]
    tokenizer = make_tokenizer("char", blocks)
    assert isinstance(tokenizer, CharTokenizer)
    assert tokenizer.characters == sorted(set(MIXED))
    assert tokenizer.decode(tokenizer.encode_bytes(data)) == MIXED


@pytest.mark.parametrize(("text", "at", "name"), [("aXb", 1, "'X'"), ("ab\U0010ffff", 2, "10FFFF")])
def test_an_unknown_character_is_named(text: str, at: int, name: str) -> None:
    with pytest.raises(GptcError, match=f"character {at} .*{name}"):
        CharTokenizer("ab").encode(text)


def test_text_that_is_no_utf8_is_named_by_its_offset() -> None:
    with pytest.raises(GptcError, match=r"byte 3 of the data \(0xff\)"):
        CharTokenizer("aé").encode_bytes("aé".encode() + b"\xff")
    with pytest.raises(GptcError, match=r"byte 5 of the data \(0xff\)"):
        make_tokenizer("char", [b"abc\xc3", b"\xa9\xff"])
    with pytest.raises(GptcError, match=r"byte 3 of the data \(0xc3\)"):
        make_tokenizer("char", [b"abc\xc3"])
    with pytest.raises(GptcError, match="needs text"):
        make_tokenizer("char", [])


# ---- gpt2 ----


@needs_gpt2
def test_gpt2_agrees_with_tiktoken(gpt2: Tokenizer) -> None:
    import tiktoken

    peer = tiktoken.get_encoding("gpt2")
    assert gpt2.vocab_size == peer.n_vocab
    assert list(gpt2.pieces) == [peer.decode_single_token_bytes(i) for i in range(peer.n_vocab)]
    rng = random.Random(1)
    for text in [MIXED, *(nasty_text(rng, 60) for _ in range(100))]:
        tokens = gpt2.encode(text)
        assert tokens.tolist() == peer.encode(text, allowed_special="all")
        assert tokens.dtype == np.int32
        assert gpt2.decode(tokens) == text
        assert gpt2.count_bytes(tokens) == len(text.replace("<|endoftext|>", "").encode())


@needs_gpt2
def test_gpt2_end_of_text_is_one_token(gpt2: Tokenizer) -> None:
    assert gpt2.encode("<|endoftext|>hi").tolist() == [50256, 5303]
    assert gpt2.end_of_text == 50256
    assert gpt2.encode(gpt2.start).tolist() == [50256]
    with pytest.raises(GptcError, match="byte 1 "):
        gpt2.encode_bytes(b"a\xff")


@needs_gpt2
def test_gpt2_vocabulary_loads_only_when_needed(
    gpt2: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt2.save(tmp_path)
    monkeypatch.setattr(module, "_gpt2_vocabulary", lambda: pytest.fail("loaded"))
    assert read_tokenizer(tmp_path).fingerprint() == gpt2.fingerprint()


def without_network(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise GptcError("no network")

    monkeypatch.setattr(module, "download", fail)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(folder))
    monkeypatch.setenv("GPTC_CACHE", str(folder / "own"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder / "cache"))
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    (folder / "cache").mkdir()


def test_gpt2_without_a_vocabulary_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_network(monkeypatch, tmp_path)
    (tmp_path / "cache" / module._GPT2_FILE).write_text("damaged")
    with pytest.raises(GptcError) as caught:
        make_tokenizer("gpt2")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("TIKTOKEN_CACHE_DIR", "vocab.bpe", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"):
        assert part in message


@needs_gpt2
def test_gpt2_vocabulary_is_kept_once_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = gpt2_folder()
    assert source is not None
    without_network(monkeypatch, tmp_path)
    with monkeypatch.context() as context:
        context.setattr(
            module, "download", lambda url, path, **_: shutil.copy(source / module._GPT2_FILE, path)
        )
        make_tokenizer("gpt2")
    assert make_tokenizer("gpt2").encode("hi").tolist() == [5303]


# ---- cuts ----


@needs_gpt2
def test_gpt2_cuts_change_no_token(gpt2: Tokenizer) -> None:
    rng = random.Random(2)
    n_cuts = sum(assert_cut_is_exact(gpt2, nasty_text(rng, 25).encode()) for _ in range(300))
    assert n_cuts > 500


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("one two thr", 7),
        ("one two ", 7),
        ("one \n ", 3),
        ("é x", 2),
        ("\u3000  x", 0),  # within whitespace the pieces depend on what follows
        ("one\u3000  x", 0),
        ("one<|endoftext|>two<|endoftext|>three", 19),
        ("one<|endoftext|>two", 3),
        ("onetwo", 0),
        ("  one", 0),
    ],
)
def test_gpt2_cuts_where_whitespace_begins(text: str, cut: int) -> None:
    assert Gpt2Tokenizer().cut(text.encode()) == cut


def test_char_and_byte_cuts_change_no_token() -> None:
    data = MIXED.encode()
    assert assert_cut_is_exact(CharTokenizer(MIXED), data) >= len(set(MIXED))
    assert assert_cut_is_exact(ByteTokenizer(), data) == len(data)


# ---- bpe ----


TEXT = "the cat and the hat sat on the mat. " * 20 + "<|endoftext|>" + "Ünïcödé, the end.\n"


@pytest.fixture
def bpe() -> BpeTokenizer:
    pytest.importorskip("tokenizers")
    tokenizer = make_tokenizer("bpe:280", [TEXT.encode()])
    assert isinstance(tokenizer, BpeTokenizer)
    return tokenizer


def test_bpe_learns_frequent_pieces_and_has_the_size_asked_for(bpe: BpeTokenizer) -> None:
    assert bpe.vocab_size == 280 == len(bpe.pieces)
    assert b" the" in bpe.pieces
    assert len(bpe.encode("the cat and the hat")) <= 7
    assert make_tokenizer("bpe:5000", [b"aaaa"]).vocab_size < 300  # no more pairs than there are


def test_bpe_expresses_any_text_and_never_merges_across_documents(bpe: BpeTokenizer) -> None:
    for text in (TEXT, "", "\n\n  x", "漢字 🙂 \x00", "zebra"):
        assert bpe.decode(bpe.encode(text)) == text
    assert list(bpe.encode("<|endoftext|>")) == [bpe.end_of_text] == [279]
    assert not any(b"endoftext" in piece for piece in bpe.merged)


def test_bpe_learns_from_text_without_spaces() -> None:
    """It took minutes once: words are now cut at the longest token before training."""
    dna = "".join(random.Random(1).choices("ACGT", k=100_000)).encode()
    learned = make_tokenizer("bpe:400", [dna])
    assert learned.vocab_size == 400
    assert len(learned.encode_bytes(dna[:1000])) < 400
    longest = max(make_tokenizer("bpe:5000", [b"a" * 100_000]).pieces, key=len)
    assert longest == b"a" * 255


def test_bpe_cut_changes_no_token(bpe: BpeTokenizer) -> None:
    data = TEXT.encode()
    whole = list(bpe.encode_bytes(data))
    for end in range(1, len(data), 37):
        cut = bpe.cut(data[:end])
        parts = [bpe.encode_bytes(data[:cut]), bpe.encode_bytes(data[cut:])]
        assert [token for part in parts for token in part] == whole


def test_bpe_is_saved_and_refuses_altered_files(bpe: BpeTokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    again = read_tokenizer(tmp_path)
    assert again.fingerprint() == bpe.fingerprint()
    assert list(again.encode(TEXT)) == list(bpe.encode(TEXT))
    file = tmp_path / "gptc_tokenizer.json"
    saved = json.loads(file.read_text())
    for merged in (saved["merged"][::-1], [*saved["merged"], "a"], ["\u0100b"], "ab", [1]):
        file.write_text(json.dumps({**saved, "merged": merged}))
        with pytest.raises(GptcError, match="altered"):
            read_tokenizer(tmp_path)
