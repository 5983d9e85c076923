"""A model's own tokenizer or an error, never another one; and the ends of a text that it names.

The class: files of a folder were passed over without a word. vocab.json and merges.txt, tokens
added to a SentencePiece model, and the end-of-text ids of four config files decide here. The right
tokens are those of tokenizers and sentencepiece.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gptc import Model
from gptc.checkpoint.find import open_checkpoint
from gptc.errors import GptcError
from gptc.tokenizer import native, scored
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.byte_level import to_characters
from gptc.tokenizer.marks import Marks
from gptc.tokenizer.registry import make_tokenizer, read_tokenizer
from gptc.tokenizer.with_tokenizers import HuggingFaceTokenizer
from pretokenizers import PUBLISHED, TEXTS
from small_models import make_config, varied
from vocabularies import PIECES, TYPES, byte_level, gpt2_folder, llama_like, needs_gpt2

tokenizers = pytest.importorskip("tokenizers")
BYTES = {to_characters(bytes([i])): i + 3 for i in range(256)}
MERGES = [("h", "e"), ("l", "l"), ("he", "ll")]


def dump(folder: Path, **files: Any) -> Path:
    """Writes JSON files, named without their ending."""
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def pair(folder: Path, names: tuple[str, str] = ("vocab.json", "merges.txt")) -> dict[str, int]:
    """GPT-2's pair of files, with other tokens than GPT-2's; returns the vocabulary."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **BYTES}
    for merge in MERGES:
        vocab["".join(merge)] = len(vocab)
    vocab["<|endoftext|>"] = len(vocab)
    (folder / names[0]).write_text(json.dumps(vocab))
    (folder / names[1]).write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES))
    return vocab


# ---- vocab.json and merges.txt ----


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_gpt2s_pair_of_files_is_read(tmp_path: Path, line_end: str) -> None:
    vocab = pair(tmp_path)
    merges = (tmp_path / "merges.txt").read_text().replace("\n", line_end)
    (tmp_path / "merges.txt").write_text(merges, newline="")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=MERGES))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.add_special_tokens(["<|endoftext|>"])
    ours = make_tokenizer(str(tmp_path))
    for text in ("hello  world", "</s> <s>", "é\n<|endoftext|>x"):
        assert ours.encode(text).tolist() == theirs.encode(text).ids, text
        assert ours.decode(ours.encode(text)) == text
    assert ours.end_of_text == vocab["<|endoftext|>"]


def test_a_models_pair_is_not_replaced_by_gpt2s(tmp_path: Path) -> None:
    with Model.create(make_config("gpt2", vocab_size=50264, n_embd=8)) as model:
        model.save(tmp_path / "m")
    vocab = pair(tmp_path / "m")
    tokens = open_checkpoint(tmp_path / "m").tokenizer().encode("hello").tolist()
    assert tokens == [vocab["hell"], vocab["o"]]
    (tmp_path / "m" / "merges.txt").unlink()
    with pytest.raises(
        GptcError, match=r"a tokenizer that gptc does not read \(vocab\.json\): add"
    ):
        open_checkpoint(tmp_path / "m").tokenizer()


@needs_gpt2
def test_gpt2s_list_of_merges_is_enough(tmp_path: Path) -> None:
    with Model.create(make_config("gpt2", vocab_size=50257, n_embd=8)) as model:
        model.save(tmp_path / "m")
    found = gpt2_folder()
    assert found is not None
    shutil.copy(found / native._GPT2_FILE, tmp_path / "m" / "merges.txt")
    assert open_checkpoint(tmp_path / "m").tokenizer().kind == "gpt2"


def test_the_files_next_to_the_pair_add_tokens(tmp_path: Path) -> None:
    vocab = pair(tmp_path)
    n = len(vocab)
    config = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>", "add_bos_token": True}
    config["added_tokens_decoder"] = {str(n + 1): {"content": "<|user|>", "special": True}}
    dump(tmp_path, added_tokens={"spouse": n}, tokenizer_config=config)
    ours = make_tokenizer(str(tmp_path))
    assert ours.encode("a spouse<|user|></s>").tolist() == [
        vocab["a"], vocab["Ġ"], n, n + 1, vocab["</s>"]]  # fmt: skip
    assert n not in ours.specials
    assert n + 1 in ours.specials
    assert (ours.bos, ours.marks) == (1, Marks(1, (2,), 0))


def test_the_pair_of_another_class_is_refused(tmp_path: Path) -> None:
    pair(tmp_path)
    dump(tmp_path, tokenizer_config={"tokenizer_class": "CodeGenTokenizer"})
    with pytest.raises(GptcError, match=r"has a CodeGenTokenizer in vocab\.json and merges\.txt"):
        make_tokenizer(str(tmp_path))


@pytest.mark.parametrize("named", ["by its class", "by the model", "with its special tokens"])
def test_qwens_pair_cuts_and_composes_as_qwen(tmp_path: Path, named: str) -> None:
    """The pre-tokenizer and normalizer are those of transformers' Qwen2Tokenizer."""
    vocab = pair(tmp_path)
    del vocab["<|endoftext|>"]
    end = {"content": "<|endoftext|>", "special": True}
    turn = {"content": "<|im_start|>", "special": True}
    config: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer"}
    if named == "with its special tokens":
        n = len(vocab)
        config |= {"added_tokens_decoder": {str(n): end, str(n + 1): turn}, "eos_token": end}
    dump(tmp_path, vocab=vocab)
    if named == "by the model":
        dump(tmp_path, config={"model_type": "qwen3"})
    else:
        dump(tmp_path, tokenizer_config=config)
    ours = make_tokenizer(str(tmp_path))
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=MERGES))
    splitter, normalizer = PUBLISHED["qwen2"]
    saved = {**json.loads(theirs.to_str()), "pre_tokenizer": splitter, "normalizer": normalizer}
    theirs = tokenizers.Tokenizer.from_str(json.dumps(saved))
    theirs.add_special_tokens(["<|endoftext|>", *(["<|im_start|>"] if len(config) > 1 else [])])
    for text in [*TEXTS, "hello<|endoftext|><|im_start|>hell", "e\u0301 123"]:
        assert ours.encode(text).tolist() == theirs.encode(text).ids, text
    assert ours.end_of_text == len(vocab)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("merges.txt", "#version: 0.2\nh e l\n", r"merges\.txt is damaged: a line is not two"),
        ("vocab.json", '{"a": "b"}', r"vocab\.json is damaged: not a mapping"),
        ("vocab.json", '{"a": 4000000000}', r"its ids go far beyond its 1 tokens"),
        ("added_tokens.json", '{"a": 4000000000}', r"its ids go far beyond its 263 tokens"),
        ("vocab.json", "[", r"vocab\.json is damaged: not JSON from byte 1 on"),
        ("added_tokens.json", "[1]", r"added_tokens\.json is damaged: not a JSON object"),
    ],
)
def test_damaged_files_of_the_pair(tmp_path: Path, name: str, content: str, message: str) -> None:
    pair(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(GptcError, match=message):
        make_tokenizer(str(tmp_path))


# ---- recognised by content ----


def test_files_are_recognised_by_content(tmp_path: Path) -> None:
    sp: Any = llama_like()
    (tmp_path / "spiece.bin").write_bytes(sp.proto)
    assert make_tokenizer(str(tmp_path / "spiece.bin")).fingerprint() == sp.fingerprint()
    byte_level(tmp_path).rename(tmp_path / "tokens.model")
    assert make_tokenizer(str(tmp_path / "tokens.model")).kind == "huggingface"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "spiece.model").write_bytes(sp.proto)
    assert make_tokenizer(str(tmp_path / "folder")).fingerprint() == sp.fingerprint()
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(GptcError, match="is of tiktoken's sort, without its pattern"):
        make_tokenizer(str(tmp_path / "tokenizer.model"))


# ---- tokens added to a SentencePiece model ----


@pytest.mark.parametrize("legacy", [None, True, False])
def test_tokens_added_to_a_sentencepiece_model(tmp_path: Path, legacy: bool | None) -> None:
    sp: Any = llama_like()
    n = sp.vocab_size
    (tmp_path / "tokenizer.model").write_bytes(sp.proto)
    decoder = {
        "1": {"content": "<s>", "special": True},
        str(n): {"content": "<|user|>", "special": True},
        str(n + 1): {"content": "spouse", "special": False},
    }
    config = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": decoder}
    dump(tmp_path, tokenizer_config={**config, **({} if legacy is None else {"legacy": legacy})})
    ours = make_tokenizer(str(tmp_path))
    assert (ours.vocab_size, ours.bos, ours.end_of_text) == (n + 2, 1, 2)
    # transformers encodes the parts between added tokens; without `legacy` only the first part is
    # begun with a space.
    library = sp._model
    rest = library.encode("hat")
    if legacy is False:
        assert library.id_to_piece(rest[0]) == "▁"
        rest = rest[1:]
    expected = [*library.encode("the"), n, *rest, n + 1]
    assert ours.encode("the<|user|>hatspouse").tolist() == expected
    plain = "the cat in the hat é"
    assert ours.encode(plain).tolist() == sp.encode(plain).tolist()
    ours.save(tmp_path)
    assert read_tokenizer(tmp_path).encode("the<|user|>").tolist() == [*library.encode("the"), n]


def test_added_tokens_that_cannot_be_placed_are_refused(tmp_path: Path) -> None:
    sp: Any = llama_like()
    (tmp_path / "tokenizer.model").write_bytes(sp.proto)
    dump(tmp_path, added_tokens={"<|user|>": sp.vocab_size + 7})
    with pytest.raises(GptcError, match="the ids of the tokens added to it are not those that"):
        make_tokenizer(str(tmp_path))
    unigram = scored.model_proto(scored.Scored(PIECES, [0.0] * len(PIECES), TYPES))
    unigram = unigram.replace(b"\x18\x02 ", b"\x18\x01 ", 1)  # the trainer's model_type
    assert not scored.read_proto(unigram).is_bpe
    (tmp_path / "tokenizer.model").write_bytes(unigram)
    dump(tmp_path, added_tokens={"<|user|>": sp.vocab_size})
    with pytest.raises(GptcError, match=r"tokens that other files add, and .* not of the sort BPE"):
        make_tokenizer(str(tmp_path))


def test_tokens_added_to_a_tokenizer_json(tmp_path: Path) -> None:
    """The ids are those of transformers 5.24: AutoTokenizer.from_pretrained(folder)."""
    plain = named(tmp_path)
    n = plain.vocab_size
    flags = {"special": False, "lstrip": True}
    decoder = {
        "1": {"content": "<|im_start|>", "special": True},  # is there already
        str(n - 1): {"content": "</s>", "special": True},  # a word of the vocabulary
        str(n): {"content": "spouse", **flags},
        str(n + 1): {"content": "<|user|>"},
    }
    dump(tmp_path, tokenizer_config={"added_tokens_decoder": decoder})
    ours = make_tokenizer(str(tmp_path / "tokenizer.json"))
    text = "a<|user|>b  spouse<|im_start|></s>"
    a, b = plain.encode("ab").tolist()
    assert ours.encode(text).tolist() == [a, n + 1, b, n, 1, n - 1]
    assert ours.vocab_size == n + 2
    assert {1, n - 1} <= ours.specials
    assert n not in ours.specials
    ours.save(tmp_path)
    assert read_tokenizer(tmp_path).encode(text).tolist() == ours.encode(text).tolist()
    named(tmp_path)  # tokenizer.json as it was
    dump(tmp_path, tokenizer_config={}, added_tokens={"cat": n})
    assert make_tokenizer(str(tmp_path / "tokenizer.json")).encode("acat").tolist() == [a, n]
    dump(tmp_path, added_tokens={"<|user|>": n + 7})
    with pytest.raises(GptcError, match=r"files add, gives its token '<\|user\|>' an id that"):
        make_tokenizer(str(tmp_path / "tokenizer.json"))


# ---- ends ----

NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot|>"]


def named(folder: Path, names: list[str] = NAMES, **files: Any) -> Tokenizer:
    """The tokenizer of a folder whose special tokens are the first ids."""
    vocab = {name: i for i, name in enumerate(names)}
    vocab |= {char: len(names) + i for i, char in enumerate(BYTES)}
    vocab |= {"</": len(vocab), "s>": len(vocab) + 1, "</s>": len(vocab) + 2}
    merges = [("<", "/"), ("s", ">"), ("</", "s>")]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(names)
    made.save(str(folder / "tokenizer.json"))
    return make_tokenizer(str(dump(folder, **files)))


def test_ends_are_those_that_the_files_name(tmp_path: Path) -> None:
    ours = named(
        tmp_path,
        generation_config={"eos_token_id": [2, 3]},
        config={"eos_token_id": 2, "bos_token_id": 1},
        tokenizer_config={"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|im_end|>"},
    )
    assert ours.marks == Marks(begin=1, ends=(2, 3), pad=2)
    assert ours.end_of_text == 0  # which separates documents
    assert ours.ends == {0, 2, 3}
    assert ours.bos is None  # named, but no text begins with it


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({"config": {"eos_token_id": 2}}, (2,)),
        ({"config": {"eos_token_id": [1, 2]}}, (1, 2)),
        ({"generation_config": {"eos_token_id": [3]}, "config": {"eos_token_id": 2}}, (3, 2)),
        ({"special_tokens_map": {"eos_token": "<|eot|>"}}, (3,)),
        ({"tokenizer_config": {"eos_token": "<|nobody|>"}}, ()),
        ({"config": {"eos_token_id": [10**6, -1, None, "2", True, 2.0]}}, ()),
        ({}, ()),
    ],
)
def test_each_file_may_name_ends(tmp_path: Path, files: Any, ends: tuple[int, ...]) -> None:
    assert named(tmp_path, **files).marks.ends == ends


def test_plain_text_is_not_an_end(tmp_path: Path) -> None:
    """ "</s>" is a piece of HTML here; the end is named."""
    ours = named(tmp_path, ["<|end|>"], tokenizer_config={"eos_token": "<|end|>"})
    assert (ours.end_of_text, ours.ends) == (0, {0})
    assert ours.id_of("</s>") is not None  # type: ignore[attr-defined]
    assert len(ours.encode("</s>")) == 1
    assert ours.start == "<|end|>"
    # Nor is another added token an end, whose name is usual.
    other = named(tmp_path, ["</s>", "<|end|>"], tokenizer_config={"eos_token": "<|end|>"})
    assert (other.end_of_text, other.ends) == (1, {1})
    # Without a name nothing is guessed from plain pieces.
    named(tmp_path, ["<|end|>"])
    (tmp_path / "tokenizer_config.json").unlink()
    assert make_tokenizer(str(tmp_path)).end_of_text is None
    assert make_tokenizer(str(tmp_path)).start == "\n"


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_chat_template_is_kept(tmp_path: Path, file: str) -> None:
    if file.endswith("jinja"):
        (tmp_path / file).write_text("{{ x }}")
        ours = named(tmp_path)
    else:
        several = [{"name": "tools", "template": "-"}, {"name": "default", "template": "{{ x }}"}]
        ours = named(tmp_path, tokenizer_config={"chat_template": several})
    assert ours.marks.chat_template == "{{ x }}"


def test_marks_are_stored_with_the_tokenizer(tmp_path: Path) -> None:
    ours = named(tmp_path, config={"eos_token_id": [2, 3], "pad_token_id": 1})
    fingerprint = ours.fingerprint()
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    again = read_tokenizer(tmp_path / "saved")
    assert (again.marks, again.end_of_text) == (ours.marks, ours.end_of_text)
    assert again.fingerprint() == fingerprint
    saved = json.loads((tmp_path / "saved" / "gptc_tokenizer.json").read_text())
    assert saved["version"] == 3
    assert saved["marks"] == {"ends": [2, 3], "pad": 1}
    for wrong in ({"ends": [10**6]}, {"ends": 2}, [], {"pad": "1"}, {"nobody": 1}):
        text = json.dumps({**saved, "marks": wrong})
        (tmp_path / "saved" / "gptc_tokenizer.json").write_text(text)
        with pytest.raises(GptcError, match="altered"):
            read_tokenizer(tmp_path / "saved")


def test_a_file_with_a_guessed_end_is_read_as_before(tmp_path: Path) -> None:
    ours = named(tmp_path, ["<|end|>"])
    assert isinstance(ours, HuggingFaceTokenizer)
    ours.end_of_text = ours.id_of("</s>")  # as gptc 0.1 guessed it
    ours.save(tmp_path)
    assert read_tokenizer(tmp_path).end_of_text == ours.end_of_text


def test_a_checkpoint_keeps_them_in_hugging_faces_terms(tmp_path: Path) -> None:
    template = {"chat_template": "{{ x }}", "pad_token": "<|eot|>", "bos_token": "<|im_start|>"}
    ours = named(tmp_path, config={"eos_token_id": [2, 3]}, tokenizer_config=template)
    with varied(make_config("llama", vocab_size=ours.vocab_size)) as model:
        model.save(tmp_path / "m", ours)
    (tmp_path / "m" / "gptc_tokenizer.json").unlink()
    (tmp_path / "m" / "checksums.json").unlink()
    again = open_checkpoint(tmp_path / "m").tokenizer()
    assert (again.marks, again.bos) == (ours.marks, None)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    ids = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 3}
    assert ids.items() <= config.items()
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text()) == ids
