"""Valid small files of each sort of tokenizer, and a function that uses what they describe."""

from __future__ import annotations

import importlib.util
import io
import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import mutate
from gptc.checkpoint.find import open_checkpoint
from gptc.convert.export_model import export_model
from gptc.errors import GptcError
from gptc.tokenizer import scored, vocabulary
from gptc.tokenizer.base import END_OF_TEXT, Tokenizer
from gptc.tokenizer.byte_level import to_characters
from gptc.tokenizer.definition import scored_definition, scored_vocabulary
from gptc.tokenizer.native import BpeTokenizer, CharTokenizer
from gptc.tokenizer.patterns import CUTS
from gptc.tokenizer.registry import make_tokenizer
from gptc.tokenizer.vocabulary import simplest
from gptc.tokenizer.with_sentencepiece import SentencePieceTokenizer
from gptc.tokenizer.with_tiktoken import TiktokenTokenizer
from gptc.tokenizer.with_tokenizers import HuggingFaceTokenizer
from model_files import Target, small_model

TEXTS = ("a", "the cat, 12!\n\n  x", "\u65e5\u672c \U0001f600", "<s>the</s>", "th" * 300, " " * 300)
_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_SPACED = {"type": "Metaspace", "replacement": scored.SPACE, "prepend_scheme": "always"}
_LEARNED = ["\u2581", "a", "t", "h", "th", "\u2581th", "e", "\u2581the", ",", "1"]


def use(path: Path) -> None:
    """Reads the tokenizer in a file or folder, and does with it what commands do."""
    tokenizer = make_tokenizer(str(path))
    for text in TEXTS:
        with suppress(GptcError):
            tokens = tokenizer.encode(text)
            tokenizer.decode(tokens)
            tokenizer.cut(text.encode())
    tokenizer.fingerprint()
    assert len(tokenizer.pieces) == tokenizer.vocab_size
    assert tokenizer.specials <= set(range(tokenizer.vocab_size))
    with suppress(GptcError):
        simplest(tokenizer, str(path))
    tokenizer.to_json()


def targets(folder: Path) -> dict[str, Target]:
    """A small valid file of each sort of tokenizer, made in `folder`."""
    found: dict[str, Target] = {}
    has_sentencepiece = importlib.util.find_spec("sentencepiece") is not None
    for name, definition in _definitions(has_sentencepiece).items():
        path = folder / name / "tokenizer.json"
        path.parent.mkdir()
        path.write_text(json.dumps(definition))
        found[f"tokenizer.json-{name}"] = Target(path, partial(use, path), mutate.json_value)
    if has_sentencepiece:
        protos = {"bpe": sentencepiece_model(), "unigram": _unigram_model()}
        for name, model in protos.items():
            path = folder / f"{name}.model"
            path.write_bytes(model)
            found[f"tokenizer.model-{name}"] = Target(path, partial(use, path), mutate.proto)
    _pair(folder / "pair", found)
    _pair_of_qwen(folder / "qwen", found)
    _ours(folder, found, has_sentencepiece)
    _in_gguf(folder, found)
    _named_by_others(folder / "named", found)
    return found


# ---- tokenizer.json ----


def _definition(model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    empty = dict.fromkeys(
        ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor")
    )
    return {"version": "1.0", **empty, "added_tokens": [], "model": model, **parts}


def _added(id: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": content, "special": True, **flags}


def _byte_level_definition(pattern: str | None) -> dict[str, Any]:
    vocab = {to_characters(bytes([i])): i for i in range(256)}
    pairs = [("t", "h"), ("th", "e"), (to_characters(b" "), "the"), ("a", "t"), ("1", "2")]
    for i, (one, other) in enumerate(pairs):
        vocab[one + other] = 256 + i
    end = len(vocab)
    cut = _LEVEL
    if pattern is not None:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
        steps = [{**split, "invert": False}, {**_LEVEL, "use_regex": False}]
        cut = {"type": "Sequence", "pretokenizers": steps}
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {"<s>": {"id": "<s>", "ids": [end + 1], "tokens": ["<s>"]}}
    template = {"type": "TemplateProcessing", "single": [begin, text], "pair": [begin, text, text]}
    model = {"type": "BPE", "vocab": vocab, "merges": [list(pair) for pair in pairs]}
    return _definition(
        {**model, "unk_token": None, "ignore_merges": pattern is not None},
        pre_tokenizer=cut,
        decoder=_LEVEL,
        post_processor={**template, "special_tokens": tokens} if pattern else None,
        added_tokens=[_added(end, END_OF_TEXT), _added(end + 1, "<s>")],
    )


def _definitions(has_sentencepiece: bool) -> dict[str, dict[str, Any]]:
    words = ["<unk>", "<s>", "</s>", *_LEARNED, "##e", "the"]
    ids = {word: i for i, word in enumerate(words)}
    special = [_added(i, words[i]) for i in range(3)]
    nfkc = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}
    weighted = [[word, -float(i)] for i, word in enumerate(words)]
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": weighted, "byte_fallback": False}
    pieces = {"type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##"}
    spaced = {"pre_tokenizer": _SPACED, "decoder": _SPACED, "added_tokens": special}
    level = {"type": "WordLevel", "unk_token": "<unk>", "vocab": ids}
    found = {
        "byte-level": _byte_level_definition(None),
        "split": _byte_level_definition(CUTS["llama-bpe"].patterns[0]),
        "unigram": _definition(unigram, **spaced, normalizer=nfkc),
        "wordpiece": _definition({**pieces, "max_input_chars_per_word": 9, "vocab": ids}, **spaced),
        "wordlevel": _definition(level, **spaced),
    }
    if has_sentencepiece:
        model = SentencePieceTokenizer(sentencepiece_model())
        found["scored"] = scored_definition(scored_vocabulary(model))
        found["scored-first"] = scored_definition(scored_vocabulary(model), first_only=True)
    return found


# ---- SentencePiece ----


def sentencepiece_model() -> bytes:
    """A tokenizer.model of a few hundred pieces, such as Llama 2's."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    kinds = [scored.UNKNOWN, *[scored.CONTROL] * 2, *[scored.BYTE] * 256]
    kinds += [scored.NORMAL] * len(_LEARNED)
    scores = [-float(i) for i in range(len(kinds))]
    made = vocabulary.from_scored(scored.Scored(pieces + _LEARNED, scores, kinds), "fuzz.py")
    assert isinstance(made, SentencePieceTokenizer)
    return made.proto


def _unigram_model() -> bytes:
    """A tokenizer.model of SentencePiece's own sort, with its map of characters."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat, 12 times."] * 20),
        model_writer=out,
        vocab_size=40,
        hard_vocab_limit=False,
        user_defined_symbols=["<x>"],
        minloglevel=4,
    )
    return out.getvalue()


# ---- other files ----


def _pair(folder: Path, found: dict[str, Target]) -> None:
    """GPT-2's pair of files."""
    folder.mkdir()
    model = _byte_level_definition(None)["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n")
    read = partial(use, folder)
    found["vocab.json"] = Target(folder / "vocab.json", read, mutate.json_value)
    found["merges.txt"] = Target(folder / "merges.txt", read, mutate.lines)


def _pair_of_qwen(folder: Path, found: dict[str, Target]) -> None:
    """Qwen's pair of files, and those that tell that it is Qwen's."""
    _pair(folder, {})
    vocab = json.loads((folder / "vocab.json").read_text())  # without special tokens
    added = {str(len(vocab) + i): _added(0, name) for i, name in enumerate((END_OF_TEXT, "<x>"))}
    for entry in added.values():
        del entry["id"]
    config = {"added_tokens_decoder": added, "eos_token": "<x>", "add_prefix_space": False}
    files = {
        "tokenizer_config.json": {**config, "tokenizer_class": "Qwen2Tokenizer"},
        "config.json": {"model_type": "qwen2", "eos_token_id": len(vocab)},
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    read = partial(use, folder)
    for name in (*files, "vocab.json"):
        found[f"{name}-qwen"] = Target(folder / name, read, mutate.json_value)
    found["merges.txt-qwen"] = Target(folder / "merges.txt", read, mutate.lines)


def _ours(folder: Path, found: dict[str, Target], has_sentencepiece: bool) -> None:
    """gptc_tokenizer.json of each kind."""
    ranked = [*(bytes([i]) for i in range(256)), b"th", b"the", b" the", b"at"]
    special = {END_OF_TEXT: 260, "<|x|>": 261}
    tokenizers: dict[str, Tokenizer] = {
        "bytes": make_tokenizer("bytes"),
        "char": CharTokenizer("the cats\n\u65e5"),
        "bpe": BpeTokenizer([b"th", b"the", b" the", b"at"]),
        "tiktoken": TiktokenTokenizer("small", CUTS["llama-bpe"].patterns[0], ranked, special),
        "huggingface": HuggingFaceTokenizer(json.dumps(_byte_level_definition(None))),
    }
    if has_sentencepiece:
        tokenizers["sentencepiece"] = SentencePieceTokenizer(sentencepiece_model())
    for kind, tokenizer in tokenizers.items():
        path = folder / f"gptc-{kind}"
        path.mkdir()
        tokenizer.save(path)
        file = path / "gptc_tokenizer.json"
        found[f"gptc_tokenizer.json-{kind}"] = Target(file, partial(use, path), mutate.json_value)


def _in_gguf(folder: Path, found: dict[str, Target]) -> None:
    """The arrays of GGUF's metadata."""
    tokenizers: dict[str, Tokenizer] = {"bpe": BpeTokenizer([b"th", b"the", b" the", b"at"])}
    if importlib.util.find_spec("sentencepiece"):
        tokenizers["scored"] = SentencePieceTokenizer(sentencepiece_model())
    for name, tokenizer in tokenizers.items():
        path = folder / f"{name}.gguf"
        model = open_checkpoint(small_model(folder / f"of-{name}", "gpt2", tokenizer))
        export_model(model, "gguf", path)
        read = partial(_use_of_model, path)
        found[f"gguf-tokenizer-{name}"] = Target(path, read, mutate.gguf)


def _use_of_model(path: Path) -> None:
    tokenizer = open_checkpoint(path).tokenizer()
    for text in TEXTS:
        tokenizer.decode(tokenizer.encode(text))
    tokenizer.fingerprint()


_NAMED = {
    "tokenizer_config.json": {
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "special": True},
        "pad_token": None,
        "legacy": False,
        "tokenizer_class": "LlamaTokenizer",
        "chat_template": [{"name": "default", "template": "{{ messages }}"}],
        "added_tokens_decoder": {"269": {"content": "<x>", "special": True}},
        "additional_special_tokens": ["<x>"],
    },
    "special_tokens_map.json": {"bos_token": {"content": "<s>"}, "unk_token": "<unk>"},
    "added_tokens.json": {"<y>": 270},
    "generation_config.json": {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0},
}


def _named_by_others(folder: Path, found: dict[str, Target]) -> None:
    """The files that name the special tokens of a tokenizer, here of a SentencePiece model."""
    if not importlib.util.find_spec("sentencepiece"):
        return
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m }}{% endfor %}")
    for name, values in _NAMED.items():
        (folder / name).write_text(json.dumps(values))
        found[f"{name}-named"] = Target(folder / name, partial(use, folder), mutate.json_value)
    template = folder / "chat_template.jinja"
    found["chat_template.jinja"] = Target(template, partial(use, folder), mutate.lines)
