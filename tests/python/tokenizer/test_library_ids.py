"""The ids of a text are those of the library on the whole text, wherever it is cut.

The class: text that is changed because it is encoded in parts. Tokenizers that add a space to a
text, or take spaces from it, did so at every border between parts, and leading spaces were lost.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from corpus import set_block, tokens_of, write_source
from gptc.data import encode
from gptc.data.preparation import prepare
from gptc.generation.request import prompt_tokens
from gptc.tokenizer.base import StreamDecoder, Tokenizer
from gptc.tokenizer.cutting import cut_inside
from gptc.tokenizer.registry import make_tokenizer
from gptc.tokenizer.with_sentencepiece import SentencePieceTokenizer
from gptc.tokenizer.with_tokenizers import HuggingFaceTokenizer
from pretokenizers import TEXTS
from vocabularies import LLAMA, assert_cut_is_exact, begun, small_tiktoken

pytestmark = pytest.mark.usefixtures("untried")

Ids = Callable[[str], list[int]]
LINES = ["the cat sat on the mat, and the hat.", "  def f(x):", "    return the_cat  # 12 345"]
WORDS = [
    "the",
    "cat",
    " ",
    " ",
    "  ",
    "    ",
    "\n",
    "\n\n",
    "\t",
    ".",
    ",",
    "12",
    "'s",
    "é",
    "東京",
]
WORDS += [
    "<MASK>",
    "THE CAT",
    "tHe cat",
    "aaaa",
    "()",
    "<mask>",
    "e\u0301",
    "\u3000",
    "ﬁ",
    "\u2581",
    "<s>",
    "😀",
]


def trained(**options: Any) -> tuple[Tokenizer, Ids]:
    """A SentencePiece model, and the ids of its library."""
    sentencepiece = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    options = {"model_type": "bpe", "vocab_size": 330, "byte_fallback": True, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 9),
        model_writer=out,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    return SentencePieceTokenizer(out.getvalue()), theirs.encode


def described(
    changes: dict[str, Any], unigram: bool = False, **flags: bool
) -> tuple[Tokenizer, Ids]:
    """A tokenizer.json of Llama's or GPT-2's sort with these parts, and its library's ids."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    common: dict[str, Any] = {"special_tokens": special, "show_progress": False}
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer: Any = tokenizers.trainers.BpeTrainer(vocab_size=350, **common)
    if unigram:
        made.model = tokenizers.models.Unigram([("<unk>", 0.0)], 0, True)
        trainer = tokenizers.trainers.UnigramTrainer(vocab_size=350, unk_token="<unk>", **common)
    if changes["pre_tokenizer"] and changes["pre_tokenizer"]["type"] == "ByteLevel":
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=350, initial_alphabet=alphabet, show_progress=False
        )
    made.train_from_iterator(LINES * 9, trainer)
    definition = {**json.loads(made.to_str()), "decoder": {"type": "Metaspace"}, **changes}
    definition["decoder"] = {"replacement": "▁", "prepend_scheme": "never", **definition["decoder"]}
    named = ("<unk>", "<s>", "</s>")
    definition["added_tokens"] = [t for t in definition["added_tokens"] if t["content"] in named]
    theirs = tokenizers.Tokenizer.from_str(json.dumps(definition))
    names = ("<mask>", "tHe cat") if flags else ("<mask>",)
    flags = flags or {"rstrip": True, "normalized": False}
    theirs.add_tokens([tokenizers.AddedToken(name, **flags) for name in names])
    return (
        HuggingFaceTokenizer(theirs.to_str()),
        lambda text: list(theirs.encode(text, add_special_tokens=False).ids),
    )


def metaspace(scheme: str, split: bool = False) -> dict[str, Any]:
    step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}
    return {"normalizer": None, "pre_tokenizer": step}


LEGACY = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    },
    "pre_tokenizer": None,
}
STRIPPED = {**metaspace("first"), "normalizer": {"type": "Strip", "strip_left": True}}
STRIPPED["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
SPACED = {"pre_tokenizer": BYTES, "decoder": BYTES}
PLAIN = {"pre_tokenizer": {**BYTES, "add_prefix_space": False}, "decoder": BYTES}
LOWER = {"type": "Lowercase"}
IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def llama() -> tuple[Tokenizer, Ids]:
    sentencepiece = pytest.importorskip("sentencepiece")
    if not LLAMA.is_file():
        pytest.skip("no llama2-tokenizer.model")
    return (
        begun(make_tokenizer(str(LLAMA)), None),
        sentencepiece.SentencePieceProcessor(model_file=str(LLAMA)).encode,
    )


def tiktoken() -> tuple[Tokenizer, Ids]:
    ours = small_tiktoken()
    return ours, lambda text: list(ours.encoding.encode(text, disallowed_special=()))


KINDS: dict[str, Callable[[], tuple[Tokenizer, Ids]]] = {
    "llama 2": llama,
    "tiktoken": tiktoken,
    "bpe": lambda: trained(**IDENTITY),
    "bpe without a space": lambda: trained(**IDENTITY, add_dummy_prefix=False),
    "bpe with suffixes": lambda: trained(**IDENTITY, treat_whitespace_as_suffix=True),
    "bpe across words": lambda: trained(**IDENTITY, split_by_whitespace=False),
    "bpe with names": lambda: trained(**IDENTITY, user_defined_symbols=["\n", "t s", "<mask>"]),
    "bpe nfkc": lambda: trained(),
    "bpe nfkc unknown": lambda: trained(byte_fallback=False),
    "unigram": lambda: trained(model_type="unigram"),
    "unigram unknown": lambda: trained(model_type="unigram", byte_fallback=False, vocab_size=80),
    "json legacy": lambda: described(LEGACY),
    "json first": lambda: described(metaspace("first")),
    "json always": lambda: described(metaspace("always", split=True)),
    "json never": lambda: described(metaspace("never")),
    "json stripped": lambda: described(STRIPPED),
    "json nfc": lambda: described({**metaspace("always"), "normalizer": {"type": "NFC"}}),
    "json unigram": lambda: described(metaspace("always", split=True), unigram=True),
    "json bytes": lambda: described({**PLAIN, "normalizer": None}),
    "json bytes with a space": lambda: described({**SPACED, "normalizer": None}),
    **{
        f"json added {flag}, {name}": partial(
            described, {**changes, "normalizer": LOWER}, **{"normalized": False, flag: True}
        )
        for name, changes in (("spaces", metaspace("first")), ("bytes", PLAIN))
        for flag in ("lstrip", "rstrip", "single_word", "normalized")
    },
}


@cache
def made(kind: str) -> tuple[Tokenizer, Ids]:
    """A tokenizer of KINDS and its library's ids, trained once for all tests."""
    return KINDS[kind]()


each_kind = pytest.mark.parametrize("kind", list(KINDS))


def some_text(rng: random.Random, n_words: int) -> str:
    return "".join(rng.choice(WORDS) for _ in range(n_words))


@each_kind
def test_a_text(kind: str) -> None:
    ours, theirs = made(kind)
    rng = random.Random(1)
    texts = [" wind of", "  two", " ", "   ", "\nx", "x", "", " \n x", *LINES]
    for text in [*texts, *TEXTS, *(some_text(rng, 20) for _ in range(40))]:
        assert ours.encode(text).tolist() == theirs(text), text
        if text:
            assert prompt_tokens(ours, text) == theirs(text), text


def with_decoder(changes: dict[str, Any], *steps: dict[str, Any]) -> tuple[Tokenizer, Ids]:
    decoder = {"type": "Sequence", "decoders": list(steps)} if steps[1:] else steps[0]
    return described({**changes, "decoder": decoder})


LLAMAS_DECODER: list[dict[str, Any]] = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]
# With the text that the ids of "x" give in the library: some decoders keep the space.
DECODED: dict[str, tuple[Callable[[], tuple[Tokenizer, Ids]], str]] = {
    **{
        name: (partial(made, name), "x")
        for name in ("llama 2", "tiktoken", "bpe", "bpe without a space")
    },
    "bpe across words": (partial(made, "bpe across words"), "x"),
    "json of llama": (lambda: with_decoder(LEGACY, *LLAMAS_DECODER), "x"),
    "json that keeps": (lambda: with_decoder(LEGACY, *LLAMAS_DECODER[:3]), " x"),
    "json always": (
        lambda: with_decoder(
            metaspace("always"), {"type": "Metaspace", "prepend_scheme": "always", "split": False}
        ),
        "x",
    ),
    "json never": (partial(made, "json never"), "x"),
    "json bytes": (partial(made, "json bytes"), "x"),
    "json bytes with a space": (partial(made, "json bytes with a space"), " x"),
}


@pytest.mark.parametrize("kind", list(DECODED))
def test_a_text_comes_back(kind: str) -> None:
    """A space that is added to a text is taken away again, as in the library, and no other."""
    make, x = DECODED[kind]
    ours: Any = make()[0]
    if isinstance(ours, HuggingFaceTokenizer):
        assert ours._tokenizer.decode(ours.encode("x").tolist()) == x
    elif isinstance(ours, SentencePieceTokenizer):
        assert ours._model.decode(ours.encode("x").tolist()) == x
    added = x.removesuffix("x")
    rng = random.Random(2)
    plain = [word for word in WORDS if not word.startswith(("<", "▁"))]
    texts = ["x", "  two", "\nx", *LINES, *("".join(rng.choices(plain, k=9)) for _ in range(200))]
    for text in texts:
        ids = ours.encode(text)
        if kind in ("json always", "json bytes with a space"):  # whose space is not added to one
            text = text.removeprefix(" ")
        assert ours.decode(ids) == added + text
        stream = StreamDecoder(ours, continued=False)
        assert "".join(map(stream.push, ids.tolist())) + stream.flush() == added + text
        rest = ours.encode(text, continued=True)
        assert ours.decode(rest, continued=True) == text


@each_kind
def test_every_cut(kind: str) -> None:
    ours, _ = made(kind)
    rng = random.Random(22)
    n_cuts = 0
    for _ in range(5):
        n_cuts += assert_cut_is_exact(ours, some_text(rng, 40).encode())
    assert n_cuts > 15


def test_every_cut_between_words_that_are_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A word is known at its end only, and unknown words that follow each other are one token."""
    ours, theirs = trained(model_type="word", byte_fallback=False)
    rng = random.Random(22)
    words = [*" ".join(LINES).split(), "zz", "\n", "", "\u3000" * 9 + "thezz", "\u3000" * 9 + "cat"]
    texts = [" ".join(rng.choices(words, k=60)) for _ in range(20)]
    assert sum(assert_cut_is_exact(ours, text.encode()) for text in texts) > 60
    set_block(monkeypatch, 64)
    ours.save(tmp_path)
    source = write_source(tmp_path, "\n".join(texts))
    dataset = prepare([source], tmp_path / "out", tokenizer=str(tmp_path), val_fraction=0)
    assert tokens_of(dataset, "train") == theirs("\n".join(texts))


@each_kind
def test_a_place_without_spaces(kind: str) -> None:
    ours, theirs = made(kind)
    rng = random.Random(33)
    found = 0
    runs = ["a" * 300, "the" * 100, "東京" * 100, "12" * 150, " " * 300, "\n" * 300, "é.," * 90]
    for text in [*runs, *(some_text(rng, 60).replace(" ", "") for _ in range(20))]:
        data = text.encode()
        if cut := cut_inside(ours, data, continued=False):
            parts = [ours.encode_bytes(data[:cut]), ours.encode_bytes(data[cut:], True)]
            assert [*parts[0].tolist(), *parts[1].tolist()] == theirs(text), (text, cut)
            found += 1
    assert found > 15


@each_kind
@pytest.mark.parametrize("longest", [64, 1 << 20])
def test_a_dataset(
    kind: str, longest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = made(kind)
    set_block(monkeypatch, 64)
    monkeypatch.setattr(encode, "_LONGEST_RUN_BYTES", longest)
    n_pieces = 0

    def counted(*args: Any) -> Iterator[bytes]:
        nonlocal n_pieces
        for piece in pieces(*args):
            n_pieces += 1
            yield piece

    pieces = encode._pieces
    monkeypatch.setattr(encode, "_pieces", counted)
    rng = random.Random(44)
    text = some_text(rng, 300) + "\n" + "\n".join(LINES * 5) + "a" * 500 + " b\n" + "東" * 200
    ours.save(tmp_path)
    source = write_source(tmp_path, text)
    dataset = prepare([source], tmp_path / "out", tokenizer=str(tmp_path), val_fraction=0)
    assert tokens_of(dataset, "train") == theirs(text)
    assert n_pieces > 3


COUNTED = {
    "of a length": {"type": "FixedLength", "length": 8},
    "of a pattern": {"type": "Split", "pattern": {"Regex": r"[\s\S]{1,2}"}, "invert": False},
    "of a long pattern": {"type": "Split", "pattern": {"Regex": r"[\s\S]{1,7}"}, "invert": False},
    "at the beginning": {"type": "Split", "pattern": {"Regex": r"\A[\s\S]{40}"}, "invert": False},
}


@pytest.mark.parametrize("step", COUNTED)
def test_pieces_that_are_counted_from_the_beginning(step: str) -> None:
    """Text around a place says nothing about them: what surrounds it may fit by chance."""
    cut = {"behavior": "Isolated", **COUNTED[step]}
    bytes_alone = {**BYTES, "add_prefix_space": False, "use_regex": False}
    steps = {"type": "Sequence", "pretokenizers": [cut, bytes_alone]}
    made: Any = described({**PLAIN, "normalizer": None})[0]
    ours = HuggingFaceTokenizer(json.dumps({**made.saved, "pre_tokenizer": steps}))
    rng = random.Random(55)
    words = [word for line in LINES for word in line.split()]
    for _ in range(3):
        data = " ".join(rng.choices(words, k=1500)).encode()
        whole = ours.encode_bytes(data).tolist()
        for end in range(3000, len(data), 2000):
            if at := ours.cut(data[:end]):
                parts = [ours.encode_bytes(data[:at]), ours.encode_bytes(data[at:], True)]
                assert [*parts[0].tolist(), *parts[1].tolist()] == whole


def test_bytes_that_are_not_text_add_no_space() -> None:
    ours, theirs = KINDS["bpe"]()
    assert ours.decode_bytes(ours.encode_raw(b"the\xffcat \xfe  sat")) == b" the\xffcat \xfe  sat"
    rest = ours.encode_raw(b"the\xff sat").tolist()
    assert rest[: -len(theirs("sat"))] == [*theirs("the"), 3 + 0xFF]
    assert rest[-len(theirs("sat")) :] == theirs("sat")  # the space that is there
