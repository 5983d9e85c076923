"""Tokenizers: reversible, saved and loaded whole, and clear about what they cannot express."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from gptc.errors import GptcError, UsageError
from gptc.files.whole import write_file
from gptc.tokenizer import native as module
from gptc.tokenizer.base import StreamDecoder, Tokenizer
from gptc.tokenizer.native import BpeTokenizer, ByteTokenizer, CharTokenizer, Gpt2Tokenizer
from gptc.tokenizer.registry import bpe_size, make_tokenizer, read_tokenizer
from gptc.tokenizer.utf8 import character_cut

MIXED = "Naïve café, 東京 😀 don't <|endoftext|>\n\n  Zoë's 12345\t\u3000x\r\n"


def gpt2_folder() -> Path | None:
    """A folder that holds the two GPT-2 files under the names that tiktoken gives them."""
    folders = [Path(__file__).parents[4] / "shared" / "data" / "tiktoken-cache"]
    if named := os.environ.get("TIKTOKEN_CACHE_DIR"):
        folders.insert(0, Path(named))
    files = (module._GPT2_FILE, "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
    for folder in folders:
        if all((folder / file).is_file() for file in files):
            return folder
    return None


needs_gpt2 = pytest.mark.skipif(gpt2_folder() is None, reason="no GPT-2 vocabulary")


@pytest.fixture
def gpt2(monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_folder()))
    return make_tokenizer("gpt2")


def nasty_text(rng: random.Random, length: int) -> str:
    pieces = [" ", "  ", "\n", "\t", "\r\n", "\u3000", "\u2003", "\x1c", "'s", "'", "ab", "c", "é"]
    pieces += ["東京", "😀", "12", "...", "<|endoftext|>", "<|endo", "|>", "\x00", "\u0301"]
    return "".join(rng.choice(pieces) for _ in range(length))


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
    with pytest.raises(GptcError, match="character 2 "):
        ByteTokenizer().encode("ab\ud800")


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
        assert gpt2.count_bytes(tokens) == len(text.encode())


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


# ---- cutting ----


def assert_cut_is_exact(tokenizer: Tokenizer, data: bytes) -> int:
    """Compares both sides of every cut with the whole; returns how many cuts there were."""
    whole = tokenizer.encode_bytes(data).tolist()
    cuts = {tokenizer.cut(data[:end]) for end in range(1, len(data) + 1)} - {0}
    for cut in cuts:
        parts = [tokenizer.encode_bytes(part).tolist() for part in (data[:cut], data[cut:])]
        assert parts[0] + parts[1] == whole, (data, cut)
    return len(cuts)


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


def test_a_character_is_never_cut() -> None:
    data = "aé東😀".encode()
    assert [character_cut(data[:n]) for n in range(len(data) + 1)] == [
        *(0, 1, 1, 3, 3, 3, 6, 6, 6, 6, 10)
    ]
    assert character_cut(b"\x80" * 9) == 9  # no UTF-8: for the decoder to refuse


# ---- streaming ----


def test_stream_decoder_equals_decode() -> None:
    rng = random.Random(3)
    tokenizer = ByteTokenizer()
    for _ in range(200):
        tokens = [rng.choice(MIXED.encode() + b"\xff\xc3\xf0") for _ in range(20)]
        stream = StreamDecoder(tokenizer)
        text = "".join(stream.push(token) for token in tokens) + stream.flush()
        assert text == tokenizer.decode(tokens)


def test_stream_decoder_waits_for_whole_characters() -> None:
    stream = StreamDecoder(ByteTokenizer())
    assert [stream.push(byte) for byte in "😀a".encode()] == ["", "", "", "😀", "a"]
    assert stream.push(0xF0) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(0x61) == "a"


@pytest.mark.parametrize("token", [-1, 256])
def test_an_id_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(GptcError, match=f"token {token} .* of 256"):
        ByteTokenizer().decode_bytes(np.array([65, token]))


# ---- files ----


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
        ({"version": 3}, "newer"),
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
        with pytest.raises(GptcError, match=r"gptc_tokenizer\.json (is truncated|was altered)"):
            read_tokenizer(path)


def test_an_unknown_kind_lists_the_kinds() -> None:
    with pytest.raises(UsageError, match="bytes, char, gpt2"):
        make_tokenizer("words")


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# ---- a byte-pair encoding of one's own ----

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
    """It took minutes: now nothing that it learns from is longer than what a token may hold."""
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


@pytest.mark.parametrize("name", ["bpe:257", "bpe:x", "bpe:", "bpe:-3", "bpe:99999999", "bpe:2M"])
def test_bpe_needs_a_sensible_size(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}: the vocabulary size .* 258 to 1,048,576"):
        make_tokenizer(name, [b"text"])


def test_bpe_sizes_take_a_suffix() -> None:
    assert bpe_size("bpe:4K") == bpe_size("bpe:4000") == 4000
